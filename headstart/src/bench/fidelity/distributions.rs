//! Whole next-token distributions, through the executor that nodes run: all tokens are asked for as
//! the "most likely ones". Nothing is faster than it must be for a measurement.

use std::path::Path;
use std::sync::Arc;

use headstart_engine::core::pages::PageId;
use headstart_engine::executor::cpu::{CpuExecutor, CpuOptions};
use headstart_engine::executor::{Executor, Probe, Row};
use headstart_engine::model::{LoadOptions, Model, WeightDtype};
use headstart_engine::{Sampling, TokenId};

use super::{CHUNK_TOKENS, COMPARED, FIRST};
use crate::failure::Failure;

/// Positions whose distributions exist at once.
const GROUP: usize = 15;

/// A model to be asked for distributions.
pub(super) struct Distributions {
    executor: CpuExecutor,
    pages: Vec<PageId>,
}

/// The distributions of one chunk, from position [`FIRST`] on.
pub(super) struct Reading<'a> {
    of: &'a mut Distributions,
    tokens: &'a [TokenId],
    /// Positions that were extended.
    done: usize,
}

impl Distributions {
    /// Loads the model at `path`.
    ///
    /// # Errors
    /// When it cannot be loaded, or its context is too short.
    pub(super) fn load(path: &Path, dtype: WeightDtype, threads: usize) -> Result<Self, Failure> {
        let model =
            Model::load(path, LoadOptions { dtype, threads }, &mut |_| ()).map_err(failed)?;
        let context = model.config().context_length;
        if context < CHUNK_TOKENS {
            return Err(Failure::Usage(format!(
                "--model: expected a context of at least {CHUNK_TOKENS} tokens, found {context}"
            )));
        }
        let options = CpuOptions { threads, kv_tokens: CHUNK_TOKENS, ..CpuOptions::default() };
        let executor = CpuExecutor::new(Arc::new(model), options).map_err(failed)?;
        let pages = u32::try_from(executor.limits().pages).unwrap_or(u32::MAX);
        Ok(Self { executor, pages: (0..pages).map(PageId).collect() })
    }

    /// Tokens in the vocabulary.
    pub(super) fn vocab(&self) -> usize {
        self.executor.limits().vocab_size
    }

    /// Reads a chunk.
    pub(super) fn read<'a>(&'a mut self, tokens: &'a [TokenId]) -> Reading<'a> {
        Reading { of: self, tokens, done: 0 }
    }
}

impl Reading<'_> {
    /// The natural-log probabilities at the next few positions, each `[vocab]`; `None` at the end.
    ///
    /// # Errors
    /// When the executor fails.
    pub(super) fn next(&mut self) -> Result<Option<Vec<Vec<f32>>>, Failure> {
        if self.done < FIRST {
            // Only the last token needs a probe, and whatever it finds is dropped.
            self.extend(FIRST, FIRST - 1, 0)?;
        }
        let end = (self.done + GROUP).min(FIRST + COMPARED);
        if self.done >= end {
            return Ok(None);
        }
        let vocab = self.of.vocab();
        self.extend(end, self.done, vocab).map(Some)
    }

    fn extend(&mut self, end: usize, first: usize, top: usize) -> Result<Vec<Vec<f32>>, Failure> {
        let probe = |position| Probe { position, target: None, sample: false, top };
        let probes: Vec<Probe> = (first..end).map(probe).collect();
        let sampling = Sampling::default();
        let row = Row {
            context: &self.tokens[..end],
            start: self.done,
            pages: &self.of.pages,
            answer_start: end,
            probes: &probes,
            sampling: &sampling,
            pending: None,
        };
        let found = self.of.executor.execute(&[row]).map_err(failed)?;
        self.done = end;
        let vocab = self.of.vocab();
        let whole = |found: &headstart_engine::executor::Found| {
            let mut logprobs = vec![f32::NEG_INFINITY; vocab];
            for scored in &found.top {
                logprobs[scored.token as usize] = scored.logprob;
            }
            logprobs
        };
        Ok(found.iter().flatten().map(whole).collect())
    }
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::Failed(error.to_string())
}
