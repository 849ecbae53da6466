//! From hidden states to what was asked: log-probabilities, samples, the likeliest tokens.
//!
//! Each rank looks at its own part of the vocabulary; what it finds is a [`Partial`].

use headstart_kernels::{VocabStats, rms_norm, softcap, top_n, vocab_stats_rows};

use super::CpuExecutor;
use super::forward::Span;
use crate::executor::partial::Partial;
use crate::executor::{Probe, Row};

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
