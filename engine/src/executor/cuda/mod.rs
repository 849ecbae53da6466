//! The CUDA executor: one forward pass for all rows of a batch, over paged keys and values.
//!
//! A model may be cut among tensor-parallel ranks. One executor, on one thread, drives all of them
//! through a step, kernel by kernel, and sums what they found after attention and after the MLP.
//!
//! The new tokens of all rows are laid end to end and run in chunks. A chunk in which every row has
//! one new token, a decode step, runs as a recorded graph: the first batch of a shape runs plainly,
//! the second is recorded, later ones are one launch. Only what was asked for leaves the device, and the
//! host waits for it when it collects a batch, not when it submits one.
//!
//! In single precision ([`WeightDtype::F32`]) a row's results depend on nothing but the row, bit for
//! bit. In bf16 they do so within a kind of batch (alone, few rows, many rows): the products of large
//! batches are cublasLt's, whose order of additions is its own.

mod collective;
mod forward;
mod hosts;
mod in_flight;
mod load;
pub mod measure;
mod pages;
mod plan;
mod probe;

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use headstart_kernels::cuda::{Buffer, CudaError, Device, KvCache, KvDims, Precision};

use super::{Executor, ExecutorError, Found, KvFormat, Limits, PageId, Pipeline, Row};
use crate::model::{LoadError, Progress, WeightDtype};
pub use collective::Ranks;
pub use hosts::{CudaPart, follow, lead, load_ranks};
pub use load::CudaModel;
use load::RankModel;

/// How a [`CudaExecutor`] is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Positions a KV page holds, a multiple of 16.
    pub page_size: usize,
    /// Positions that the KV pool holds for all sequences together.
    pub kv_tokens: usize,
    /// Tokens that go through the layers together; bounds scratch memory.
    pub chunk_tokens: usize,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self { page_size: 16, kv_tokens: 16 * 1024, chunk_tokens: 2048 }
    }
}

/// GPUs that this machine has; 0 without a driver.
#[must_use]
pub fn devices() -> usize {
    Device::count()
}

/// Loads a model for `ranks`, each of which reads and keeps its own part of it; compiled kernels are
/// kept in `cache`.
///
/// # Errors
/// One sentence that says what is missing, or what is wrong with the file.
pub fn load(
    path: &Path,
    dtype: WeightDtype,
    ranks: Ranks,
    cache: Option<PathBuf>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Arc<CudaModel>, CudaLoadError> {
    let devices = open(ranks, cache.as_deref())?;
    CudaModel::load(&devices, ranks, path, dtype, progress).map(Arc::new)
}

/// The device of each rank, in order.
fn open(ranks: Ranks, cache: Option<&Path>) -> Result<Vec<Device>, CudaLoadError> {
    let mut devices: Vec<(usize, Device)> = Vec::new();
    for ordinal in ranks.ordinals() {
        let open = devices.iter().find(|(other, _)| *other == ordinal).map(|(_, d)| d.clone());
        let device = match open {
            Some(device) => device,
            None => Device::open(ordinal, cache).map_err(CudaLoadError::Device)?,
        };
        devices.push((ordinal, device));
    }
    Ok(devices.into_iter().map(|(_, device)| device).collect())
}

/// Why a model is not on the GPU.
#[derive(Debug, thiserror::Error)]
pub enum CudaLoadError {
    /// The device or its libraries.
    #[error("no CUDA device can be used: {0}")]
    Device(CudaError),
    /// The model's files.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Copying to the device.
    #[error("loading to the GPU: {0}")]
    Copy(CudaError),
}

/// A device that failed is of no further use: its context is in an unknown state.
fn lost(error: CudaError) -> ExecutorError {
    ExecutorError { message: format!("GPU: {error}"), fatal: true }
}

/// What one rank has beside its part of the model.
#[derive(Debug)]
struct Rank {
    /// Of its own KV heads.
    kv: KvCache,
    /// A page on its way.
    page: Buffer<u8>,
    scratch: forward::Scratch,
    probes: probe::Scratch,
}

/// Runs a model on GPUs. Several executors may share one model; their work is serialised.
#[derive(Debug)]
pub struct CudaExecutor {
    /// These go before the model, whose communicators wait for what recorded their sums.
    graphs: forward::Graphs,
    model: Arc<CudaModel>,
    /// In the order of the model's parts.
    ranks: Vec<Rank>,
    /// Where several ranks' findings come together, on each device; none if they are not all here.
    gathered: Vec<probe::Gathered>,
    /// A rank's part of a page on its way.
    page_host: Vec<u8>,
    batches: in_flight::Batches,
    chunk_tokens: usize,
    limits: Limits,
}

impl Rank {
    fn new(
        model: &RankModel,
        precision: Precision,
        limits: Limits,
        chunk_tokens: usize,
    ) -> Result<Self, CudaError> {
        let (device, config) = (&model.device, &model.config);
        let dims = KvDims {
            layers: config.layers,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            page_size: limits.page_size,
            // One more, for the rows that fill a recorded batch up.
            pages: limits.pages + 1,
        };
        let kv = KvCache::new(device, dims, precision)?;
        let page = device.alloc(kv.page_bytes(), "a KV page")?;
        let scratch = forward::Scratch::new(model, precision, limits, chunk_tokens)?;
        let probes = probe::Scratch::new(model)?;
        Ok(Self { kv, page, scratch, probes })
    }
}

impl CudaExecutor {
    /// An executor with an empty KV pool. All memory that it will ever use is taken here.
    ///
    /// # Errors
    /// The page size or the model's head size is one that the kernels cannot work with, or the
    /// device has too little memory.
    pub fn new(model: Arc<CudaModel>, options: &CudaOptions) -> Result<Self, ExecutorError> {
        let refused = |e: CudaError| ExecutorError { message: e.to_string(), fatal: true };
        let config = model.config();
        let page_size = options.page_size.max(1);
        let pages = options.kv_tokens.div_ceil(page_size).max(1);
        let limits = Limits {
            vocab_size: config.vocab_size,
            context_length: config.context_length.min(pages * page_size),
            page_size,
            pages,
        };
        let chunk_tokens = options.chunk_tokens.max(plan::GRAPH_ROWS_MAX);
        let rank = |part| Rank::new(part, model.precision(), limits, chunk_tokens);
        let ranks: Vec<Rank> =
            model.parts.iter().map(rank).collect::<Result<_, _>>().map_err(refused)?;
        let (of, vocab) = (model.of, config.vocab_size);
        let gathered = |device| probe::Gathered::new(device, of, vocab);
        let gathered = match model.is_whole() || model.is_spread() {
            true => Vec::new(),
            false => model.devices().map(gathered).collect::<Result<_, _>>().map_err(refused)?,
        };
        let batches = in_flight::Batches::new(&model, limits).map_err(refused)?;
        let (page_host, graphs) = (Vec::new(), forward::Graphs::default());
        Ok(Self { model, ranks, gathered, page_host, graphs, batches, chunk_tokens, limits })
    }

    /// The model that it runs.
    #[must_use]
    pub fn model(&self) -> &Arc<CudaModel> {
        &self.model
    }

    /// Bytes of the KV pool.
    #[must_use]
    pub fn kv_bytes(&self) -> usize {
        self.ranks.iter().map(|rank| rank.kv.page_bytes() * rank.kv.dims().pages).sum()
    }

    /// Recorded graphs.
    #[must_use]
    pub fn graphs(&self) -> usize {
        self.graphs.recorded()
    }

    /// Has the devices do a batch.
    fn start(&mut self, rows: &[Row<'_>]) -> Result<(), ExecutorError> {
        self.limits.check_behind(rows, &self.batches.samples)?;
        let mut batch = self.batches.begin(rows.len())?;
        let model = Arc::clone(&self.model);
        let _turn = model.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let extends = self.ranks[0].kv.extends();
        for (index, chunk) in plan::chunks(rows, self.chunk_tokens).iter().enumerate() {
            let planned = plan::plan(rows, chunk, self.limits, extends);
            self.run(rows, index, &planned, &mut batch).map_err(lost)?;
        }
        self.tell_kept(&batch).map_err(lost)?;
        let done = model.devices().map(Device::timer).collect::<Result<_, _>>().map_err(lost)?;
        self.batches.push(batch, rows, done);
        Ok(())
    }

    /// What came of something; after a fatal error other devices may wait for one that failed, and no sum
    /// is worth waiting for. (Where other processes have ranks, their pulse ends the sums.)
    fn or_give_up<T>(&mut self, result: Result<T, ExecutorError>) -> Result<T, ExecutorError> {
        if result.as_ref().is_err_and(|error| error.fatal) && !self.model.is_spread() {
            self.graphs = forward::Graphs::default();
            self.model.collective.give_up();
        }
        result
    }
}

impl Executor for CudaExecutor {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn execute(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<Found>>, ExecutorError> {
        if !self.batches.is_empty() {
            let message = "batches are in flight".into();
            return Err(ExecutorError { message, fatal: false });
        }
        self.submit(rows)?;
        self.collect()
    }

    fn pipeline(&mut self) -> Option<&mut dyn Pipeline> {
        // What ranks of several processes choose is known on the leader's host alone.
        match self.model.is_spread() {
            true => None,
            false => Some(self),
        }
    }

    fn kv_format(&self) -> Option<KvFormat> {
        self.format_of_all()
    }

    fn read_page(&mut self, page: PageId, out: &mut Vec<u8>) -> Result<(), ExecutorError> {
        out.resize(self.local_page_bytes(), 0);
        self.page_out(page, out)
    }

    fn write_page(&mut self, page: PageId, data: &[u8]) -> Result<(), ExecutorError> {
        self.page_in(page, data)
    }
}

impl Pipeline for CudaExecutor {
    fn submit(&mut self, rows: &[Row<'_>]) -> Result<(), ExecutorError> {
        let submitted = self.start(rows);
        self.or_give_up(submitted)
    }

    fn collect(&mut self) -> Result<Vec<Vec<Found>>, ExecutorError> {
        let found = self.batches.collect();
        self.or_give_up(found)
    }
}
