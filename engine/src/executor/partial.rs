//! What a rank finds in its part of the vocabulary, and one answer of what all ranks found.
//!
//! Logits leave their rank only where a token is drawn from all of them.

use headstart_kernels::VocabStats;

use super::vocab::{join_stats, join_top};
use super::{ExecutorError, Found, Probe, Row, Scored, TokenId};
use crate::core::sampling::{self, sample};

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
