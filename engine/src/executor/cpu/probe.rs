//! From hidden states to what was asked: log-probabilities, samples, the likeliest tokens.
//!
//! Each rank looks at its own part of the vocabulary; [`join`] makes one answer of the parts. Logits
//! leave their rank only where a token is drawn from all of them.

use headstart_kernels::{VocabStats, rms_norm, softcap, top_n, vocab_stats_rows};

use super::CpuExecutor;
use super::forward::Span;
use crate::core::sampling::{self, sample};
use crate::executor::vocab::{join_stats, join_top};
use crate::executor::{ExecutorError, Found, Probe, Row, Scored, TokenId};

/// Rows of logits that exist at once.
const LOGIT_ROWS: usize = 16;

/// Buffers kept from call to call.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// `[LOGIT_ROWS][hidden]`, as they come and normed.
    hidden: Vec<f32>,
    normed: Vec<f32>,
    /// `[LOGIT_ROWS][vocab]`, of this rank's part of the vocabulary.
    logits: Vec<f32>,
}

/// A probe whose position is in the chunk.
#[derive(Clone, Copy)]
struct Wanted {
    row: usize,
    probe: Probe,
    /// The token's place in the chunk.
    at: usize,
}

/// What a rank found at a probe in its part of the vocabulary.
#[derive(Debug)]
pub(super) struct Partial {
    /// `argmax` is a token of the whole vocabulary.
    pub(super) stats: VocabStats,
    /// The target's logit, if the target is here.
    pub(super) target: Option<f32>,
    /// The likeliest tokens here with their logits, most likely first.
    pub(super) top: Vec<(TokenId, f32)>,
    /// All logits here, if a token is to be drawn.
    pub(super) logits: Vec<f32>,
}

impl CpuExecutor {
    /// Looks at the probes of the chunk that has just been through the layers.
    pub(super) fn look(&mut self, rows: &[Row<'_>], spans: &[Span], found: &mut [Vec<Partial>]) {
        let mut wanted = Vec::new();
        for span in spans {
            let probes = rows[span.row].probes;
            let end = span.start + span.len;
            let first = probes.partition_point(|p| p.position < span.start);
            let last = probes.partition_point(|p| p.position < end);
            wanted.extend(probes[first..last].iter().map(|probe| Wanted {
                row: span.row,
                probe: *probe,
                at: span.at + probe.position - span.start,
            }));
        }
        let vocab = self.model.vocab.clone();
        for group in wanted.chunks(LOGIT_ROWS) {
            self.logits(group);
            let stats = vocab_stats_rows(&self.pool, &self.probes.logits, vocab.len());
            let logits = self.probes.logits.chunks_exact(vocab.len());
            for ((wanted, stats), logits) in group.iter().zip(stats).zip(logits) {
                let (probe, row) = (wanted.probe, &rows[wanted.row]);
                let global = |token: u32| token + vocab.start as u32;
                let here = |token: u32| (token as usize).checked_sub(vocab.start);
                let target = probe.target.and_then(here).and_then(|i| logits.get(i).copied());
                let drawn = probe.sample && !row.sampling.is_plain_greedy();
                found[wanted.row].push(Partial {
                    stats: VocabStats { argmax: global(stats.argmax), ..stats },
                    target,
                    top: top_n(logits, probe.top)
                        .into_iter()
                        .map(|(t, l)| (global(t), l))
                        .collect(),
                    logits: if drawn { logits.to_vec() } else { Vec::new() },
                });
            }
        }
    }

    /// Final norm and head at the places asked for.
    fn logits(&mut self, group: &[Wanted]) {
        let (model, p) = (&*self.model, &mut self.probes);
        let config = model.config();
        let hidden = config.hidden_size;
        p.hidden.clear();
        for wanted in group {
            p.hidden.extend_from_slice(&self.scratch.hidden[wanted.at * hidden..][..hidden]);
        }
        p.normed.resize(p.hidden.len(), 0.0);
        rms_norm(&self.pool, &p.hidden, &model.final_norm, config.norm_eps, &mut p.normed);
        p.logits.resize(group.len() * model.vocab.len(), 0.0);
        let head = model.head.as_ref().unwrap_or(&model.embedding);
        head.matmul(&self.pool, &p.normed, group.len(), &mut p.logits);
        if let Some(cap) = config.logit_softcap {
            softcap(&self.pool, &mut p.logits, cap);
        }
    }
}

/// Makes the answers to all probes of a batch from what the ranks found, in the order of the ranks.
///
/// # Errors
/// The model's logits are not finite.
pub(super) fn join(
    rows: &[Row<'_>],
    ranks: Vec<Vec<Vec<Partial>>>,
    sampler: &mut sampling::Scratch,
) -> Result<Vec<Vec<Found>>, ExecutorError> {
    let mut ranks: Vec<_> = ranks.into_iter().map(|rank| rank.into_iter()).collect();
    rows.iter()
        .map(|row| {
            let mut parts: Vec<_> =
                ranks.iter_mut().map(|rank| rank.next().unwrap_or_default().into_iter()).collect();
            let probe = |probe: &Probe| {
                answer(row, *probe, parts.iter_mut().filter_map(Iterator::next).collect(), sampler)
            };
            row.probes.iter().map(probe).collect()
        })
        .collect()
}

/// Answers one probe.
fn answer(
    row: &Row<'_>,
    probe: Probe,
    mut parts: Vec<Partial>,
    sampler: &mut sampling::Scratch,
) -> Result<Found, ExecutorError> {
    let stats = join_stats(parts.iter().map(|part| part.stats));
    if !stats.log_sum_exp.is_finite() {
        let message = format!("the model's logits at position {} are not finite", probe.position);
        return Err(ExecutorError { message, fatal: false });
    }
    // The norm is a sum of at least this token's weight; rounding must not make it more than 1.
    let scored =
        |token, logit: f32| Scored { token, logprob: (logit - stats.log_sum_exp).min(0.0) };
    let target = parts.iter().find_map(|part| part.target).map(|logit| scored(0, logit).logprob);
    let sampled = probe.sample.then(|| {
        if row.sampling.is_plain_greedy() {
            return scored(stats.argmax, stats.max);
        }
        let mut logits = std::mem::take(&mut parts[0].logits);
        parts[1..].iter().for_each(|part| logits.extend_from_slice(&part.logits));
        // The sampler overwrites them.
        let raw = logits.clone();
        let next = probe.position + 1;
        let history = &row.context[row.answer_start.min(next)..next];
        let position = next.saturating_sub(row.answer_start);
        let token = sample(&mut logits, history, position, row.sampling, sampler);
        scored(token, raw[token as usize])
    });
    let top = join_top(parts.into_iter().map(|part| part.top), probe.top);
    let top = top.into_iter().map(|(token, logit)| scored(token, logit)).collect();
    Ok(Found { target, sampled, top })
}
