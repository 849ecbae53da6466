//! The CPU executor: one forward pass for all rows of a batch, over paged keys and values.
//!
//! The new tokens of all rows are laid end to end and run in chunks, so scratch memory has a bound
//! whatever the batch. Only positions with a probe meet the final norm and the head, a few rows of
//! logits at a time.
//!
//! With tensor parallelism an executor is one rank: it has its own heads, its own part of the MLP
//! and of the vocabulary, its own threads and KV pool ([`TensorParallel`] runs them side by side).

mod follow;
mod forward;
mod parallel;
mod probe;

use std::sync::Arc;

use headstart_kernels::{DType, KvPool, KvShape, RopeAngles, ThreadPool};

use super::check::check_page_bytes;
use super::partial::{self, Partial};
use super::{Executor, ExecutorError, Found, KvDtype, KvFormat, KvLayout, Limits, PageId, Row};
use crate::collective::{Alone, Collective, RankLost};
use crate::core::sampling;
use crate::model::{Model, Weights};
use forward::{Scratch, Span};

pub use follow::follow;
pub use parallel::{TensorParallel, lead};

/// How a [`CpuExecutor`] is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads that compute, at least 1.
    pub threads: usize,
    /// Positions a KV page holds, a multiple of 16.
    pub page_size: usize,
    /// Positions that the KV pool holds for all sequences together.
    pub kv_tokens: usize,
    /// Tokens that go through the layers together; bounds scratch memory.
    pub chunk_tokens: usize,
}

impl Default for CpuOptions {
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            page_size: 16,
            kv_tokens: 16 * 1024,
            chunk_tokens: 256,
        }
    }
}

/// An executor for a model in memory: one rank, or several side by side.
///
/// # Errors
/// As [`CpuExecutor::new`].
pub fn executor(
    weights: &Weights,
    options: CpuOptions,
) -> Result<Box<dyn Executor>, ExecutorError> {
    match weights.parts() {
        [whole] => Ok(Box::new(CpuExecutor::new(Arc::clone(whole), options)?)),
        parts => Ok(Box::new(TensorParallel::new(parts.to_vec(), options)?)),
    }
}

/// Runs a model on CPU threads of its own. Several executors may share one model.
#[derive(Debug)]
pub struct CpuExecutor {
    model: Arc<Model>,
    collective: Box<dyn Collective>,
    pool: ThreadPool,
    kv: KvPool,
    angles: RopeAngles,
    scratch: Scratch,
    probes: probe::Scratch,
    sampler: sampling::Scratch,
    chunk_tokens: usize,
    limits: Limits,
}

impl CpuExecutor {
    /// An executor with an empty KV pool. Memory of KV pages is touched when they are first used.
    ///
    /// # Errors
    /// The page size or the model's head size is one that the kernels cannot work with, or the pool
    /// is beyond the address space.
    ///
    /// # Panics
    /// If the model is one rank's part.
    pub fn new(model: Arc<Model>, options: CpuOptions) -> Result<Self, ExecutorError> {
        assert_eq!(model.shard().ranks, 1, "a part of a model needs its other ranks");
        Self::rank(model, options, Box::new(Alone))
    }

    /// One rank of several.
    fn rank(
        model: Arc<Model>,
        options: CpuOptions,
        collective: Box<dyn Collective>,
    ) -> Result<Self, ExecutorError> {
        let config = model.config();
        let page_size = options.page_size.max(1);
        let pages = options.kv_tokens.div_ceil(page_size).max(1);
        let shape = KvShape {
            layers: config.layers,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            page_size,
            pages,
            dtype: model.kv_dtype(),
        };
        let kv = KvPool::new(shape)
            .map_err(|e| ExecutorError { message: format!("KV pool: {e}"), fatal: true })?;
        let limits = Limits {
            vocab_size: config.vocab_size,
            context_length: config.context_length.min(pages * page_size),
            page_size,
            pages,
        };
        let angles = RopeAngles::new(config.rope.inverse_frequencies(config.head_dim), 1.0);
        Ok(Self {
            pool: ThreadPool::new(options.threads.max(1)),
            kv,
            angles,
            scratch: Scratch::default(),
            probes: probe::Scratch::default(),
            sampler: sampling::Scratch::default(),
            chunk_tokens: options.chunk_tokens.max(1),
            limits,
            collective,
            model,
        })
    }

    /// The model that it runs.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Bytes of the KV pool.
    #[must_use]
    pub fn kv_bytes(&self) -> usize {
        self.kv.shape().page_bytes() * self.kv.shape().pages
    }

    /// This rank's part of a batch that passed [`Self::check`]: what it finds at each probe of each
    /// row.
    fn run(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<Partial>>, RankLost> {
        let mut found: Vec<Vec<Partial>> =
            rows.iter().map(|row| Vec::with_capacity(row.probes.len())).collect();
        for spans in chunks(rows, self.chunk_tokens) {
            self.forward(rows, &spans)?;
            self.look(rows, &spans, &mut found);
        }
        Ok(found)
    }

    /// What pages are that `ranks` of these make together.
    fn kv_format_of(&self, ranks: usize) -> KvFormat {
        let KvShape { layers, head_dim, page_size, dtype, .. } = *self.kv.shape();
        let (model, kv_heads) = (self.model.hash(), self.model.kv_heads());
        let dtype = if dtype == DType::F32 { KvDtype::F32 } else { KvDtype::F16 };
        let layout = KvLayout { page_size, layers, kv_heads, head_dim, dtype, tp: ranks };
        KvFormat { model, layout }
    }

    /// Copies this rank's part of a page; the pool's own layout is that of [`KvLayout`].
    fn copy_page_out(&self, page: PageId, out: &mut [u8]) {
        self.kv.export_page(page.0, out);
    }

    fn copy_page_in(&mut self, page: PageId, data: &[u8]) {
        self.kv.import_page(page.0, data);
    }
}

/// Cuts the rows' new tokens into chunks of at most `tokens`, each a list of spans.
fn chunks(rows: &[Row<'_>], tokens: usize) -> Vec<Vec<Span>> {
    let mut chunks = Vec::new();
    let mut chunk = Vec::new();
    let mut used = 0;
    for (index, row) in rows.iter().enumerate() {
        let mut start = row.start;
        while start < row.context.len() {
            let len = (row.context.len() - start).min(tokens - used);
            chunk.push(Span { row: index, start, len, at: used });
            start += len;
            used += len;
            if used == tokens {
                chunks.push(std::mem::take(&mut chunk));
                used = 0;
            }
        }
    }
    if !chunk.is_empty() {
        chunks.push(chunk);
    }
    chunks
}

impl Executor for CpuExecutor {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn execute(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<Found>>, ExecutorError> {
        self.limits.check(rows)?;
        let found = self.run(rows)?;
        partial::join(rows, vec![found], &mut self.sampler)
    }

    fn kv_format(&self) -> Option<KvFormat> {
        Some(self.kv_format_of(1))
    }

    fn read_page(&mut self, page: PageId, out: &mut Vec<u8>) -> Result<(), ExecutorError> {
        self.limits.check_page(page)?;
        out.resize(self.kv.shape().page_bytes(), 0);
        self.copy_page_out(page, out);
        Ok(())
    }

    fn write_page(&mut self, page: PageId, data: &[u8]) -> Result<(), ExecutorError> {
        self.limits.check_page(page)?;
        check_page_bytes(data, self.kv.shape().page_bytes())?;
        self.copy_page_in(page, data);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::sampling::Sampling;

    fn row<'a>(context: &'a [u32], start: usize, sampling: &'a Sampling) -> Row<'a> {
        Row { context, start, pages: &[], answer_start: 0, probes: &[], sampling, pending: None }
    }

    #[test]
    fn chunks_cover_every_token_once() {
        let sampling = Sampling::default();
        let context = [0; 20];
        let rows = [
            row(&context[..7], 2, &sampling),
            row(&context, 19, &sampling),
            row(&context, 0, &sampling),
        ];
        for tokens in 1..30 {
            let chunks = chunks(&rows, tokens);
            let mut next = [2, 19, 0];
            for chunk in &chunks {
                let mut at = 0;
                for span in chunk {
                    assert_eq!((span.start, span.at), (next[span.row], at));
                    next[span.row] += span.len;
                    at += span.len;
                }
                assert!(at <= tokens);
            }
            assert_eq!(next, [7, 20, 20]);
            assert_eq!(chunks.len(), 26usize.div_ceil(tokens));
        }
    }
}
