//! From hidden states to what was asked, on the device.

use std::collections::BTreeMap;

use headstart_kernels::cuda::{Buffer, CudaError, Device, Rows, SampleArgs, TokenFound};

use super::forward;
use super::load::CudaModel;
use super::plan::{GRAPH_ROWS_MAX, Wanted};
use super::{CudaExecutor, lost};
use crate::core::sampling::Sampling;
use crate::executor::{ExecutorError, Found, Limits, Row, Scored, TokenId};

/// Rows that are sampled at once; each needs room for a row of logits.
const SAMPLED_ROWS: usize = 32;

/// Buffers kept from call to call.
#[derive(Debug)]
pub(super) struct Scratch {
    /// `[GRAPH_ROWS_MAX][vocab]`.
    logits: Buffer<f32>,
    parts: Buffer<f32>,
    found: Buffer<f32>,
    work: Buffer<f32>,
}

impl Scratch {
    pub(super) fn new(model: &CudaModel, limits: Limits) -> Result<Self, CudaError> {
        let (device, vocab, rows) = (model.device(), limits.vocab_size, GRAPH_ROWS_MAX);
        Ok(Self {
            logits: device.alloc(rows * vocab, "logits")?,
            parts: device.alloc(Device::vocab_parts(rows, vocab), "logits")?,
            found: device.alloc(4 * rows, "logits")?,
            work: device.alloc(SAMPLED_ROWS * vocab, "sampling")?,
        })
    }

    /// Rows of logits that exist at once.
    pub(super) fn rows(&self) -> usize {
        GRAPH_ROWS_MAX
    }
}

/// Final norm, head and facts of the logits of `count` probes from `first` on. A probe's row of the
/// residual stream gets what the last block adds, so this is done once for each.
pub(super) fn head(
    model: &CudaModel,
    s: &mut forward::Scratch,
    p: &mut Scratch,
    first: usize,
    count: usize,
) -> Result<(), CudaError> {
    let (device, config) = (model.device(), model.config());
    let (rows, eps) = (Rows::Probes(&s.staged, first, count), config.norm_eps);
    let delta = Some(&s.delta);
    device.add_rms_norm(&mut s.hidden, delta, &model.final_norm, eps, rows, &mut s.input)?;
    let head = model.head.as_ref().unwrap_or(&model.embedding);
    let vocab = config.vocab_size;
    device.matmul(head, &s.input, count, &mut p.logits, vocab, 0, &mut s.tile)?;
    if let Some(cap) = config.logit_softcap {
        device.softcap(&mut p.logits, cap, count * vocab)?;
    }
    device.vocab_stats(&p.logits, count, &s.staged, first, &mut p.parts, &mut p.found)
}

/// The norm is a sum of at least this token's weight; rounding must not make it more than 1.
fn logprob(logit: f32, found: &TokenFound) -> f32 {
    (logit - found.log_sum_exp).min(0.0)
}

impl CudaExecutor {
    /// Answers the probes whose logits are on the device: `first..first + count` of the batch.
    pub(super) fn answer(
        &mut self,
        rows: &[Row<'_>],
        wanted: &[Wanted],
        first: usize,
        count: usize,
        found: &mut [Vec<Found>],
    ) -> Result<(), ExecutorError> {
        let here = |w: &&Wanted| (first..first + count).contains(&w.at);
        let wanted: Vec<Wanted> = wanted.iter().filter(here).copied().collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let facts = self.model.device().read_found(&self.probes.found, count).map_err(lost)?;
        if let Some(bad) = wanted.iter().find(|w| !facts[w.at - first].log_sum_exp.is_finite()) {
            let position = bad.probe.position;
            let message = format!("the model's logits at position {position} are not finite");
            return Err(ExecutorError { message, fatal: false });
        }
        let sampled = self.sample(rows, &wanted, first).map_err(lost)?;
        let vocab = self.limits.vocab_size;
        let tops: Vec<(u32, u32)> =
            wanted.iter().map(|w| ((w.at - first) as u32, w.probe.top.min(vocab) as u32)).collect();
        let device = self.model.device();
        let tops = device.top_tokens(&self.probes.logits, vocab, &tops).map_err(lost)?;
        for (index, (wanted, top)) in wanted.iter().zip(tops).enumerate() {
            let facts = &facts[wanted.at - first];
            let scored = |token, logit| Scored { token, logprob: logprob(logit, facts) };
            let sampled = wanted.probe.sample.then(|| match sampled.get(&index) {
                Some((token, logit)) => scored(*token, *logit),
                None => scored(facts.argmax, facts.max),
            });
            found[wanted.row].push(Found {
                target: wanted.probe.target.map(|_| logprob(facts.target, facts)),
                sampled,
                top: top.into_iter().map(|(token, logit)| scored(token, logit)).collect(),
            });
        }
        Ok(())
    }

    /// Samples where the argmax is not the answer: for each of these probes the token and its logit.
    fn sample(
        &mut self,
        rows: &[Row<'_>],
        wanted: &[Wanted],
        first: usize,
    ) -> Result<BTreeMap<usize, (TokenId, f32)>, CudaError> {
        let (mut indices, mut args, mut penalties) = (Vec::new(), Vec::new(), Vec::new());
        for (index, wanted) in wanted.iter().enumerate() {
            let row = &rows[wanted.row];
            if !wanted.probe.sample || row.sampling.is_plain_greedy() {
                continue;
            }
            let next = wanted.probe.position + 1;
            let history = &row.context[row.answer_start.min(next)..next];
            let position = next.saturating_sub(row.answer_start);
            let from = penalties.len();
            penalise(history, row.sampling, &mut penalties);
            indices.push(index);
            args.push(sample_args(
                row.sampling,
                position,
                wanted.at - first,
                from,
                penalties.len(),
            ));
        }
        let device = self.model.device();
        let (p, vocab) = (&mut self.probes, self.limits.vocab_size);
        let mut sampled = BTreeMap::new();
        for (indices, args) in indices.chunks(SAMPLED_ROWS).zip(args.chunks(SAMPLED_ROWS)) {
            let drawn = device.sample(&p.logits, vocab, args, &penalties, &mut p.work)?;
            sampled.extend(indices.iter().copied().zip(drawn));
        }
        Ok(sampled)
    }
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
