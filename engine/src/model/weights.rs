//! A model in memory: whole, or in one part for each tensor-parallel rank.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::{LoadError, LoadOptions, Model, ModelConfig, Progress, Shard};

/// A model in memory, whole or in parts. Clones share the memory.
#[derive(Clone, Debug)]
pub struct Weights(Vec<Arc<Model>>);

impl Weights {
    /// Loads a GGUF file or a Hugging Face directory in `tp` parts, one after the other. `progress`
    /// is called after each tensor.
    ///
    /// # Errors
    /// As [`Model::load_part`].
    pub fn load(
        path: &Path,
        options: LoadOptions,
        tp: usize,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, LoadError> {
        Self::load_ranks(path, options, 0..tp.max(1), tp, progress)
    }

    /// Loads the parts of neighbouring ranks of `tp`; the others are in other processes.
    ///
    /// # Errors
    /// As [`Model::load_part`].
    ///
    /// # Panics
    /// Without a rank.
    pub fn load_ranks(
        path: &Path,
        options: LoadOptions,
        ranks: Range<usize>,
        tp: usize,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, LoadError> {
        assert!(!ranks.is_empty(), "a process has a rank");
        let (first, parts) = (ranks.start, ranks.len() as u64);
        let part = |rank| {
            // Each part reports its own way through the whole file.
            let mut scaled = |p: Progress| {
                let done = ((rank - first) as u64 * p.bytes_total + p.bytes_loaded) / parts;
                progress(Progress { bytes_loaded: done, ..p });
            };
            Model::load_part(path, options, Shard { rank, ranks: tp }, &mut scaled).map(Arc::new)
        };
        ranks.map(part).collect::<Result<_, _>>().map(Self)
    }

    /// The parts, in the order of their ranks.
    #[must_use]
    pub fn parts(&self) -> &[Arc<Model>] {
        &self.0
    }

    /// What the model is; heads and MLP width are those of the first part.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        self.0[0].config()
    }

    /// Bytes of all matrices in memory.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.0.iter().map(|part| part.weight_bytes()).sum()
    }

    /// Bytes of the matrices that each step reads whole.
    #[must_use]
    pub fn decode_bytes(&self) -> usize {
        self.0.iter().map(|part| part.decode_bytes()).sum()
    }
}
