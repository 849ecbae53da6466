//! From hidden states to what was asked: log-probabilities, samples, the likeliest tokens.

use headstart_kernels::{VocabStats, rms_norm, softcap, top_n, vocab_stats_rows};

use super::CpuExecutor;
use super::forward::Span;
use crate::core::sampling::{self, sample};
use crate::executor::{ExecutorError, Found, Probe, Row, Scored};

/// Rows of logits that exist at once.
const LOGIT_ROWS: usize = 16;

/// Buffers kept from call to call.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// `[LOGIT_ROWS][hidden]`, as they come and normed.
    hidden: Vec<f32>,
    normed: Vec<f32>,
    /// `[LOGIT_ROWS][vocab]`.
    logits: Vec<f32>,
    /// One row, for the sampler to overwrite.
    sampled: Vec<f32>,
    sampler: sampling::Scratch,
}

/// A probe whose position is in the chunk.
#[derive(Clone, Copy)]
struct Wanted {
    row: usize,
    probe: Probe,
    /// The token's place in the chunk.
    at: usize,
}

impl CpuExecutor {
    /// Answers the probes of the chunk that has just been through the layers.
    pub(super) fn answer(
        &mut self,
        rows: &[Row<'_>],
        spans: &[Span],
        found: &mut [Vec<Found>],
    ) -> Result<(), ExecutorError> {
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
        for group in wanted.chunks(LOGIT_ROWS) {
            self.logits(group);
            let vocab = self.limits.vocab_size;
            let stats = vocab_stats_rows(&self.pool, &self.probes.logits, vocab);
            for (index, (wanted, stats)) in group.iter().zip(stats).enumerate() {
                let row = &rows[wanted.row];
                found[wanted.row].push(self.probes.look(index, vocab, row, wanted.probe, stats)?);
            }
        }
        Ok(())
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
        p.logits.resize(group.len() * config.vocab_size, 0.0);
        let head = model.head.as_ref().unwrap_or(&model.embedding);
        head.matmul(&self.pool, &p.normed, group.len(), &mut p.logits);
        if let Some(cap) = config.logit_softcap {
            softcap(&self.pool, &mut p.logits, cap);
        }
    }
}

impl Scratch {
    /// Answers one probe from its row of logits.
    fn look(
        &mut self,
        index: usize,
        vocab: usize,
        row: &Row<'_>,
        probe: Probe,
        stats: VocabStats,
    ) -> Result<Found, ExecutorError> {
        if !stats.log_sum_exp.is_finite() {
            let message =
                format!("the model's logits at position {} are not finite", probe.position);
            return Err(ExecutorError { message, fatal: false });
        }
        let logits = &self.logits[index * vocab..][..vocab];
        // The norm is a sum of at least this token's weight; rounding must not make it more than 1.
        let logprob = |logit: f32| (logit - stats.log_sum_exp).min(0.0);
        let scored = |token: u32| Scored { token, logprob: logprob(logits[token as usize]) };
        let sampled = probe.sample.then(|| {
            if row.sampling.is_plain_greedy() {
                return scored(stats.argmax);
            }
            self.sampled.clear();
            self.sampled.extend_from_slice(logits);
            let next = probe.position + 1;
            let history = &row.context[row.answer_start.min(next)..next];
            let position = next.saturating_sub(row.answer_start);
            let sampler = &mut self.sampler;
            scored(sample(&mut self.sampled, history, position, row.sampling, sampler))
        });
        let top = top_n(logits, probe.top);
        Ok(Found {
            target: probe.target.map(|token| logprob(logits[token as usize])),
            sampled,
            top: top
                .into_iter()
                .map(|(token, logit)| Scored { token, logprob: logprob(logit) })
                .collect(),
        })
    }
}
