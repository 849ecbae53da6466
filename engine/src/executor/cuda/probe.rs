//! From hidden states to what was asked, on the device.

use std::collections::BTreeMap;

use headstart_kernels::cuda::{AskRoom, Buffer, CudaError, Device, Questions, Rows, SampleArgs};

use super::forward;
use super::load::CudaModel;
use super::plan::GRAPH_ROWS_MAX;
use crate::core::sampling::Sampling;
use crate::executor::{Limits, Row, TokenId};

/// Rows that are sampled at once; each needs room for a row of logits.
const SAMPLED_ROWS: usize = 32;

/// Buffers kept from call to call.
#[derive(Debug)]
pub(super) struct Scratch {
    /// `[GRAPH_ROWS_MAX][vocab]`.
    pub(super) logits: Buffer<f32>,
    parts: Buffer<f32>,
    pub(super) found: Buffer<f32>,
    pub(super) ask: AskRoom,
}

impl Scratch {
    pub(super) fn new(model: &CudaModel, limits: Limits) -> Result<Self, CudaError> {
        let (device, vocab, rows) = (model.device(), limits.vocab_size, GRAPH_ROWS_MAX);
        Ok(Self {
            logits: device.alloc(rows * vocab, "logits")?,
            parts: device.alloc(Device::vocab_parts(rows, vocab), "logits")?,
            found: device.alloc(4 * rows, "logits")?,
            ask: AskRoom::new(device, rows, vocab, SAMPLED_ROWS)?,
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
