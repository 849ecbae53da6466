//! From hidden states to what was asked, on the device.

use std::collections::BTreeMap;

use headstart_kernels::VocabStats;
use headstart_kernels::cuda::{
    AskRoom, Buffer, CudaError, Device, Pinned, Questions, Rows, SampleArgs, TokenFound,
};

use super::Rank;
use super::load::{CudaModel, RankModel};
use super::plan::GRAPH_ROWS_MAX;
use crate::core::sampling::Sampling;
use crate::executor::vocab::join_stats;
use crate::executor::{Row, TokenId};

/// Rows that are sampled at once; each needs room for a row of logits.
pub(super) const SAMPLED_ROWS: usize = 32;

/// Rows of logits that exist at once.
pub(super) const ROWS: usize = GRAPH_ROWS_MAX;

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
            found: device.alloc(4 * ROWS, "logits")?,
            ask: AskRoom::new(device, ROWS, vocab, sampled)?,
        })
    }
}

/// Tokens that are drawn together from the logits of several ranks.
#[derive(Debug, Default)]
pub(super) struct Draw {
    /// The rows of logits, one for each sample.
    pub(super) rows: Vec<usize>,
    /// Its samples are of rows `0..rows.len()`.
    pub(super) questions: Questions,
}

/// Where rows of logits come together from several ranks, on the first rank's device. Other rows never
/// do.
#[derive(Debug)]
pub(super) struct Drawing {
    /// `[SAMPLED_ROWS][vocab]`.
    gathered: Buffer<f32>,
    ask: AskRoom,
    host: Vec<f32>,
}

impl Drawing {
    pub(super) fn new(model: &CudaModel) -> Result<Self, CudaError> {
        let (device, vocab) = (model.device(), model.config.vocab_size);
        Ok(Self {
            gathered: device.alloc(SAMPLED_ROWS * vocab, "sampling")?,
            ask: AskRoom::new(device, SAMPLED_ROWS, vocab, SAMPLED_ROWS)?,
            host: Vec::new(),
        })
    }

    /// Has the tokens drawn, by way of `asked`; `answers` gets them.
    pub(super) fn draw(
        &mut self,
        model: &CudaModel,
        ranks: &[Rank],
        draw: &Draw,
        [asked, answers]: [&mut Pinned<u32>; 2],
        kept: &mut Buffer<u32>,
    ) -> Result<(), CudaError> {
        let (device, vocab) = (model.device(), model.config.vocab_size);
        for (to, row) in draw.rows.iter().enumerate() {
            for (part, rank) in model.parts.iter().zip(ranks) {
                let (from, len) = (row * part.vocab.len(), part.vocab.len());
                let (logits, at) = (&rank.probes.logits, to * vocab + part.vocab.start);
                if model.collective.spans_devices() {
                    self.host.resize(len, 0.0);
                    part.device.read(logits, from, &mut self.host)?;
                    device.write(&mut self.gathered, at, &self.host)?;
                } else {
                    device.copy(logits, from, &mut self.gathered, at, len)?;
                }
            }
        }
        let (logits, found) = ((&self.gathered, vocab), &ranks[0].probes.found);
        device.ask(&draw.questions, logits, found, &mut self.ask, asked, answers, kept)
    }
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
