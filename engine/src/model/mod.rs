//! Model families and their weights.
//!
//! A family is a short file (`llama.rs`, `qwen2.rs`, `qwen3.rs`, `gemma2.rs`) that turns a file's
//! metadata into one [`ModelConfig`]; everything after that, loading and running, is the same code
//! for all of them. GGUF files and Hugging Face directories give the same [`Model`]: rows that GGUF
//! stores in interleaved rotary order are put back in rotate-half order, so that a KV page means the
//! same whichever file it was computed from.

mod config;
mod error;
mod family;
mod gemma2;
mod hash;
mod llama;
mod loader;
mod names;
mod qwen2;
mod qwen3;
mod rope;
mod shard;
mod source;
pub(crate) mod tensors;
mod weights;

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::str::FromStr;

use headstart_formats::gguf::Gguf;
use headstart_formats::hf::HfDir;
use headstart_formats::safetensors::SafetensorsDir;
use headstart_kernels::{DType, Matrix, ThreadPool};

pub use config::{Activation, ModelConfig};
pub use error::LoadError;
pub use rope::{Rope, RopeScaling};
pub use shard::{Shard, TooManyRanks};
pub use weights::Weights;

use crate::executor::ModelHash;
use family::{GgufReader, HfReader};
use loader::Loader;
use names::Names;
use source::Source;

/// How matrices are kept in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightDtype {
    /// As the file has them.
    #[default]
    Auto,
    /// Every weight expanded to f32.
    F32,
    /// Every weight expanded, then rounded to bf16.
    Bf16,
}

impl WeightDtype {
    const ALL: [(Self, &'static str); 3] =
        [(Self::Auto, "auto"), (Self::F32, "f32"), (Self::Bf16, "bf16")];
}

impl fmt::Display for WeightDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name =
            Self::ALL.iter().find(|(dtype, _)| dtype == self).map_or("auto", |(_, name)| name);
        f.write_str(name)
    }
}

impl FromStr for WeightDtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .iter()
            .find(|(_, name)| *name == text)
            .map(|(dtype, _)| *dtype)
            .ok_or_else(|| format!("{text:?} is none of auto, f32, bf16"))
    }
}

/// How to load a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// How matrices are kept.
    pub dtype: WeightDtype,
    /// Threads that repack them, at least 1.
    pub threads: usize,
}

impl Default for LoadOptions {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { dtype: WeightDtype::Auto, threads }
    }
}

/// How far loading has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the file's tensors read so far.
    pub bytes_loaded: u64,
    /// Bytes of all its tensors.
    pub bytes_total: u64,
}

/// A matrix with the bias that may follow it.
#[derive(Debug)]
pub(crate) struct Linear {
    /// `[out][in]`.
    pub(crate) weight: Matrix,
    /// `[out]`.
    pub(crate) bias: Option<Vec<f32>>,
}

/// The weights of a layer. Norm weights are ready to multiply with.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) query: Linear,
    pub(crate) key: Linear,
    pub(crate) value: Linear,
    /// Of queries and of keys, `[head_dim]` each.
    pub(crate) qk_norms: Option<(Vec<f32>, Vec<f32>)>,
    pub(crate) output: Linear,
    pub(crate) post_attention_norm: Option<Vec<f32>>,
    pub(crate) mlp_norm: Vec<f32>,
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
    pub(crate) post_mlp_norm: Option<Vec<f32>>,
}

/// What is the same on every rank.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Whole {
    pub(crate) hash: ModelHash,
    pub(crate) kv_heads: usize,
}

/// A loaded model, or one rank's part of it: configuration and weights, shared read-only by its
/// executors.
#[derive(Debug)]
pub struct Model {
    /// Of this rank: its own heads and its own part of the MLP's width.
    config: ModelConfig,
    whole: Whole,
    shard: Shard,
    /// Tokens whose rows of the embedding and the head are here.
    pub(crate) vocab: Range<usize>,
    /// `[vocab.len()][hidden]`, as the head.
    pub(crate) embedding: Matrix,
    /// `None`: the embedding is the head.
    pub(crate) head: Option<Matrix>,
    pub(crate) final_norm: Vec<f32>,
    pub(crate) layers: Vec<Layer>,
}

impl Model {
    /// Loads a GGUF file or a Hugging Face directory. `progress` is called after each tensor.
    ///
    /// # Errors
    /// The files are malformed, the model needs something that is not supported, or a tensor is
    /// missing or has another shape than the configuration says.
    pub fn load(
        path: &Path,
        options: LoadOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, LoadError> {
        Self::load_part(path, options, Shard::WHOLE, progress)
    }

    /// Loads what one tensor-parallel rank holds of a model; nothing else of it is kept in memory.
    ///
    /// # Errors
    /// As [`Model::load`]; and [`LoadError::Ranks`] when it cannot be cut so often.
    pub fn load_part(
        path: &Path,
        options: LoadOptions,
        shard: Shard,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, LoadError> {
        let pool = ThreadPool::new(options.threads.max(1));
        if path.is_dir() {
            let hf = HfDir::open(path)?.config()?;
            let file = path.join("config.json");
            let family = family::of_hf(&hf, &file)?;
            let config =
                (family.from_hf)(&HfReader { config: &hf, path: &file })?.validate(&file)?;
            let names = Names::Hf { post_norms: config.post_norms };
            let source = Source::Dir(SafetensorsDir::open(path)?);
            let hash = hash::hash(&source, &config, options.dtype)?;
            let loader = Loader::new(source, names, false, options.dtype, shard, &pool, progress);
            Ok(loader.model(config)?.named(hash))
        } else {
            let gguf = Gguf::open(path)?;
            let family = family::of_gguf(&gguf)?;
            let reader = GgufReader { gguf: &gguf, arch: family.gguf_arch };
            let config = (family.from_gguf)(&reader)?.validate(path)?;
            let source = Source::Gguf(gguf);
            let hash = hash::hash(&source, &config, options.dtype)?;
            let interleaved = family.gguf_interleaved;
            let names = Names::Gguf;
            let loader =
                Loader::new(source, names, interleaved, options.dtype, shard, &pool, progress);
            Ok(loader.model(config)?.named(hash))
        }
    }

    /// What the model is. Of a part of a model: with its own heads and MLP width; the vocabulary
    /// and everything else are the whole model's.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Which part of the model this is.
    #[must_use]
    pub fn shard(&self) -> Shard {
        self.shard
    }

    /// Names the model and how its weights are kept.
    #[must_use]
    pub fn hash(&self) -> ModelHash {
        self.whole.hash
    }

    /// Key-value heads of the whole model.
    #[must_use]
    pub fn kv_heads(&self) -> usize {
        self.whole.kv_heads
    }

    fn named(mut self, hash: ModelHash) -> Self {
        self.whole.hash = hash;
        self
    }

    /// How keys and values are best kept: in single precision beside weights in single precision,
    /// else in half.
    pub(crate) fn kv_dtype(&self) -> DType {
        let single = self.layers.iter().all(|l| l.key.weight.dtype() == DType::F32);
        if single { DType::F32 } else { DType::F16 }
    }

    /// Bytes of all matrices in memory.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        let all = self.layer_matrices().chain([&self.embedding]).chain(&self.head);
        all.map(Matrix::bytes).sum()
    }

    /// Weights in the layers' matrices: every token takes a product and a sum with each of them.
    #[must_use]
    pub fn layer_weights(&self) -> usize {
        self.layer_matrices().map(|matrix| matrix.rows() * matrix.cols()).sum()
    }

    fn layer_matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.layers.iter().flat_map(|l| {
            [&l.query, &l.key, &l.value, &l.output, &l.gate, &l.up, &l.down].map(|l| &l.weight)
        })
    }

    /// Bytes of the matrices that each step reads whole: all but an embedding that is not the head.
    #[must_use]
    pub fn decode_bytes(&self) -> usize {
        let looked_up = self.head.as_ref().map_or(0, |_| self.embedding.bytes());
        self.weight_bytes() - looked_up
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtypes_have_names() {
        for (dtype, name) in WeightDtype::ALL {
            assert_eq!(dtype.to_string(), name);
            assert_eq!(name.parse(), Ok(dtype));
        }
        assert!("int3".parse::<WeightDtype>().is_err());
    }
}
