//! From hidden states to what was asked, on the device.

use std::collections::BTreeMap;

use headstart_kernels::VocabStats;
use headstart_kernels::cuda::{
    AskRoom, Buffer, CudaError, Device, Facts, Keep, Pinned, Questions, Rows, SampleArgs,
    TokenFound,
};

use super::Rank;
use super::collective::Piece;
use super::load::{CudaModel, RankModel};
use super::plan::GRAPH_ROWS_MAX;
use crate::core::sampling::Sampling;
use crate::executor::vocab::join_stats;
use crate::executor::{Row, TokenId};

/// Rows that are sampled at once; each needs room for a row of logits.
pub(super) const SAMPLED_ROWS: usize = 32;

/// Rows of logits that exist at once.
pub(super) const ROWS: usize = GRAPH_ROWS_MAX;

/// Values that are found of a row.
const FACTS: usize = 4;

/// A rank's buffers, kept from call to call.
#[derive(Debug)]
pub(super) struct Scratch {
    /// `[ROWS][vocab]`, of the rank's part of the vocabulary.
    pub(super) logits: Buffer<f32>,
    parts: Buffer<f32>,
    pub(super) found: Buffer<f32>,
    pub(super) ask: AskRoom,
}

impl Scratch {
    pub(super) fn new(model: &RankModel) -> Result<Self, CudaError> {
        let (device, vocab) = (&model.device, model.vocab.len());
        // A part of the vocabulary is never drawn from alone.
        let sampled = if vocab == model.config.vocab_size { SAMPLED_ROWS } else { 0 };
        Ok(Self {
            logits: device.alloc(ROWS * vocab, "logits")?,
            parts: device.alloc(Device::vocab_parts(ROWS, vocab), "logits")?,
            found: device.alloc(FACTS * ROWS, "logits")?,
            ask: AskRoom::new(device, ROWS, vocab, sampled)?,
        })
    }
}

/// Tokens that are chosen from what several ranks found, on each device alike.
#[derive(Debug, PartialEq)]
pub(super) struct Choice {
    /// The rows of logits that come together, one for each sample.
    pub(super) rows: Vec<usize>,
    /// Its samples are of rows `0..rows.len()` of these; what is kept and not drawn is of any row.
    pub(super) questions: Questions,
}

impl Choice {
    /// What is drawn and kept of `all`, so much at a time as there is room for.
    pub(super) fn all(all: &Questions) -> Vec<Self> {
        let kept = usize::from(!all.keep.is_empty());
        let choices = all.samples.len().div_ceil(SAMPLED_ROWS).max(kept);
        (0..choices).map(|index| Self::new(all, index)).collect()
    }

    fn new(all: &Questions, index: usize) -> Self {
        let first = index * SAMPLED_ROWS;
        let drawn = first..(first + SAMPLED_ROWS).min(all.samples.len());
        let keep = all.keep.iter().filter_map(|keep| match keep.drawn {
            true if drawn.contains(&(keep.at as usize)) => {
                Some(Keep { at: keep.at - first as u32, ..*keep })
            }
            false if index == 0 => Some(*keep),
            _ => None,
        });
        let samples = || all.samples[drawn.clone()].iter().enumerate();
        let questions = Questions {
            samples: samples().map(|(row, args)| SampleArgs { row: row as u32, ..*args }).collect(),
            penalties: all.penalties.clone(),
            keep: keep.collect(),
            ..Questions::default()
        };
        Self { rows: samples().map(|(_, args)| args.row as usize).collect(), questions }
    }
}

/// Where what several ranks found comes together, on one device: the facts of all rows of logits, and
/// those rows from which a token is drawn. Other rows never do.
#[derive(Debug)]
pub(super) struct Gathered {
    /// `[ranks][rows]`, of as many rows as were looked at.
    facts: Buffer<f32>,
    /// `[SAMPLED_ROWS][vocab]`.
    logits: Buffer<f32>,
    ask: AskRoom,
}

impl Gathered {
    pub(super) fn new(device: &Device, ranks: usize, vocab: usize) -> Result<Self, CudaError> {
        Ok(Self {
            facts: device.alloc(FACTS * ranks * ROWS, "sampling")?,
            logits: device.alloc(SAMPLED_ROWS * vocab, "sampling")?,
            ask: AskRoom::new(device, ROWS, vocab, SAMPLED_ROWS)?,
        })
    }

    /// Has the tokens of a choice chosen from what is here, `rows` rows of each rank, by way of `asked`;
    /// `answers` gets those that are drawn.
    pub(super) fn choose(
        &mut self,
        model: &CudaModel,
        device: &Device,
        (choice, rows): (&Choice, usize),
        [asked, answers]: [&mut Pinned<u32>; 2],
        kept: &mut Buffer<u32>,
    ) -> Result<(), CudaError> {
        let facts = Facts { found: &self.facts, ranks: model.of, rows };
        let logits = (&self.logits, model.config.vocab_size);
        device.ask(&choice.questions, logits, facts, &mut self.ask, asked, answers, kept)
    }
}

/// Brings the facts of `count` rows together.
pub(super) fn gather_facts(
    model: &CudaModel,
    ranks: &[Rank],
    gathered: &mut [Gathered],
    count: usize,
) -> Result<(), CudaError> {
    if gathered.is_empty() {
        return Ok(());
    }
    let len = FACTS * count;
    let pieces = model.parts.iter().zip(ranks).enumerate().map(|(index, (part, rank))| {
        let from = &rank.probes.found;
        (&part.device, [Piece { from, at: 0, to: index * len, len }])
    });
    let mut to: Vec<_> = gathered.iter_mut().map(|gathered| &mut gathered.facts).collect();
    model.collective.gather(pieces, &mut to, ranks.len() * len)
}

/// Brings rows of logits together, in their order.
pub(super) fn gather_logits(
    model: &CudaModel,
    ranks: &[Rank],
    gathered: &mut [Gathered],
    rows: &[usize],
) -> Result<(), CudaError> {
    if rows.is_empty() {
        return Ok(());
    }
    let vocab = model.config.vocab_size;
    let pieces = model.parts.iter().zip(ranks).map(|(part, rank)| {
        let (from, start, len) = (&rank.probes.logits, part.vocab.start, part.vocab.len());
        let piece = move |(to, row): (usize, &usize)| Piece {
            from,
            at: row * len,
            to: to * vocab + start,
            len,
        };
        (&part.device, rows.iter().enumerate().map(piece))
    });
    let mut to: Vec<_> = gathered.iter_mut().map(|gathered| &mut gathered.logits).collect();
    model.collective.gather(pieces, &mut to, rows.len() * vocab)
}

/// A rank's part of the final norm, head and facts of the logits of `count` probes from `first` on. A
/// probe's row of the residual stream gets what the last block adds, so this is done once for each.
pub(super) fn head(
    model: &RankModel,
    rank: &mut Rank,
    first: usize,
    count: usize,
) -> Result<(), CudaError> {
    let (s, p) = (&mut rank.scratch, &mut rank.probes);
    let (device, config, vocab) = (&model.device, &model.config, model.vocab.len());
    let (rows, eps) = (Rows::Probes(&s.staged, first, count), config.norm_eps);
    let delta = Some(&s.delta);
    device.add_rms_norm(&mut s.hidden, delta, &model.final_norm, eps, rows, &mut s.input)?;
    let head = model.head.as_ref().unwrap_or(&model.embedding);
    device.matmul(head, &s.input, count, &mut p.logits, vocab, 0, &mut s.tile)?;
    if let Some(cap) = config.logit_softcap {
        device.softcap(&mut p.logits, cap, count * vocab)?;
    }
    let tokens = model.vocab.clone();
    device.vocab_stats(&p.logits, tokens, count, &s.staged, first, &mut p.parts, &mut p.found)
}

/// One answer of what ranks found of a row, in their order.
pub(super) fn join(parts: &[TokenFound]) -> TokenFound {
    let stats = |found: &TokenFound| {
        let TokenFound { argmax, max, log_sum_exp, .. } = *found;
        VocabStats { argmax, max, log_sum_exp }
    };
    let VocabStats { argmax, max, log_sum_exp } = join_stats(parts.iter().map(stats));
    let target = parts.iter().map(|part| part.target).find(|target| !target.is_nan());
    TokenFound { argmax, max, log_sum_exp, target: target.unwrap_or(f32::NAN) }
}

/// Asks for a sample at `position` of a row, whose logits are in row `at`.
pub(super) fn sample_question(
    row: &Row<'_>,
    position: usize,
    at: usize,
    questions: &mut Questions,
) {
    let next = position + 1;
    let history = row.context.get(row.answer_start.min(next)..next).unwrap_or_default();
    let answered = next.saturating_sub(row.answer_start);
    let from = questions.penalties.len();
    penalise(history, row.sampling, &mut questions.penalties);
    let to = questions.penalties.len();
    questions.samples.push(sample_args(row.sampling, answered, at, from, to));
}

fn sample_args(
    sampling: &Sampling,
    position: usize,
    row: usize,
    from: usize,
    to: usize,
) -> SampleArgs {
    SampleArgs {
        seed: sampling.seed,
        position: position as u64,
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        top_k: u32::try_from(sampling.top_k).unwrap_or(u32::MAX),
        row: row as u32,
        penalties: (to - from) as u32,
        first_penalty: from as u32,
        padding: 0,
    }
}

/// Adds what is taken from the logit of each token of the answer.
fn penalise(history: &[TokenId], sampling: &Sampling, penalties: &mut Vec<(TokenId, f32)>) {
    if sampling.presence_penalty == 0.0 && sampling.frequency_penalty == 0.0 {
        return;
    }
    let mut counts = BTreeMap::new();
    for token in history {
        *counts.entry(*token).or_insert(0u32) += 1;
    }
    let taken = |count: u32| sampling.presence_penalty + sampling.frequency_penalty * count as f32;
    penalties.extend(counts.into_iter().map(|(token, count)| (token, taken(count))));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 70 samples, of every second row, come as 32, 32 and 6; what is not drawn is kept with the first.
    #[test]
    fn choices_are_as_many_as_there_is_room_for() {
        let mut all = Questions { rows: 200, ..Questions::default() };
        for at in 0..70 {
            let sampling = Sampling { seed: at as u64, ..Sampling::default() };
            all.samples.push(sample_args(&sampling, 5, 2 * at, 0, 1));
            all.keep.push(Keep { place: 100 + at as u32, at: at as u32, drawn: true });
            all.keep.push(Keep { place: 200 + at as u32, at: 2 * at as u32 + 1, drawn: false });
        }
        all.penalties = vec![(3, 0.5)];
        let choices = Choice::all(&all);
        let sizes: Vec<_> =
            choices.iter().map(|c| (c.rows.len(), c.questions.keep.len())).collect();
        assert_eq!(sizes, [(32, 32 + 70), (32, 32), (6, 6)]);
        for (index, Choice { rows, questions }) in choices.iter().enumerate() {
            assert_eq!((questions.rows, questions.tops.len()), (0, 0));
            assert_eq!(questions.penalties, all.penalties);
            for (row, args) in questions.samples.iter().enumerate() {
                let at = 32 * index + row;
                assert_eq!((rows[row], args.row as usize, args.seed as usize), (2 * at, row, at));
            }
            for keep in &questions.keep {
                let (place, at) = (keep.place as usize, keep.at as usize);
                let expected = if keep.drawn { 100 + 32 * index + at } else { 200 + at / 2 };
                assert_eq!(place, expected, "{keep:?}");
            }
        }
    }

    #[test]
    fn there_is_no_choice_where_nothing_is_chosen() {
        let none = Questions { rows: 3, ..Questions::default() };
        assert_eq!(Choice::all(&none), []);
        let greedy = Keep { place: 0, at: 2, drawn: false };
        let one = Choice::all(&Questions { keep: vec![greedy], ..none.clone() });
        assert_eq!((one.len(), &one[0].questions.keep[..]), (1, &[greedy][..]));
        // What is drawn for nobody behind is drawn all the same.
        let drawn = sample_args(&Sampling::default(), 0, 2, 0, 0);
        let one = Choice::all(&Questions { samples: vec![drawn], ..none });
        assert_eq!((one.len(), &one[0].rows[..]), (1, &[2][..]));
    }
}
