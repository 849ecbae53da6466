//! The tensors of a model one by one, as bytes in file order: for executors that keep weights in
//! memory of their own.

use std::path::Path;

use headstart_formats::gguf::Gguf;
use headstart_formats::hf::HfDir;
use headstart_formats::safetensors::SafetensorsDir;
use headstart_kernels::{DType, dequantise};

use super::config::ModelConfig;
use super::error::LoadError;
use super::family::{self, GgufReader, HfReader};
use super::loader::{half_split, interleaved_index};
use super::names::{Names, Slot};
use super::source::{Record, Source};
use super::{Progress, WeightDtype, hash};
use crate::executor::ModelHash;

/// A matrix of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Query,
    Key,
    Value,
    Output,
    Gate,
    Up,
    Down,
}

impl Part {
    fn slot(self) -> Slot {
        match self {
            Self::Query => Slot::Query,
            Self::Key => Slot::Key,
            Self::Value => Slot::Value,
            Self::Output => Slot::Output,
            Self::Gate => Slot::Gate,
            Self::Up => Slot::Up,
            Self::Down => Slot::Down,
        }
    }
}

/// A norm of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Norm {
    Attention,
    Query,
    Key,
    PostAttention,
    Mlp,
    PostMlp,
}

impl Norm {
    fn slot(self) -> Slot {
        match self {
            Self::Attention => Slot::AttentionNorm,
            Self::Query => Slot::QueryNorm,
            Self::Key => Slot::KeyNorm,
            Self::PostAttention => Slot::PostAttentionNorm,
            Self::Mlp => Slot::MlpNorm,
            Self::PostMlp => Slot::PostMlpNorm,
        }
    }
}

/// A matrix `[rows][cols]` as its file has it; rows of queries and keys in rotate-half order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Raw<'a> {
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) bytes: &'a [u8],
}

/// A model's files, open. Holds one tensor at a time.
pub(crate) struct Tensors<'a> {
    source: Source,
    names: Names,
    interleaved: bool,
    config: ModelConfig,
    progress: &'a mut dyn FnMut(Progress),
    bytes_loaded: u64,
    bytes_total: u64,
    bytes: Vec<u8>,
    spare: Vec<u8>,
}

impl<'a> Tensors<'a> {
    /// Opens a GGUF file or a Hugging Face directory.
    ///
    /// # Errors
    /// As `Model::load`.
    pub(crate) fn open(
        path: &Path,
        progress: &'a mut dyn FnMut(Progress),
    ) -> Result<Self, LoadError> {
        let (source, names, interleaved, config) = if path.is_dir() {
            let hf = HfDir::open(path)?.config()?;
            let file = path.join("config.json");
            let family = family::of_hf(&hf, &file)?;
            let config =
                (family.from_hf)(&HfReader { config: &hf, path: &file })?.validate(&file)?;
            let names = Names::Hf { post_norms: config.post_norms };
            (Source::Dir(SafetensorsDir::open(path)?), names, false, config)
        } else {
            let gguf = Gguf::open(path)?;
            let family = family::of_gguf(&gguf)?;
            let reader = GgufReader { gguf: &gguf, arch: family.gguf_arch };
            let config = (family.from_gguf)(&reader)?.validate(path)?;
            (Source::Gguf(gguf), Names::Gguf, family.gguf_interleaved, config)
        };
        let bytes_total = source.bytes();
        Ok(Self {
            source,
            names,
            interleaved,
            config,
            progress,
            bytes_loaded: 0,
            bytes_total,
            bytes: Vec::new(),
            spare: Vec::new(),
        })
    }

    /// Names the model, whose weights are kept as `dtype`.
    ///
    /// # Errors
    /// A tensor cannot be read.
    pub(crate) fn hash(&self, dtype: WeightDtype) -> Result<ModelHash, LoadError> {
        hash::hash(&self.source, &self.config, dtype)
    }

    /// What the model is.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The type in which the file has the embedding.
    ///
    /// # Errors
    /// It is not there, or of another shape.
    pub(crate) fn embedding_dtype(&self) -> Result<DType, LoadError> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        Ok(self.source.record(self.names.embedding(), &shape)?.dtype)
    }

    /// The embedding.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn embedding(&mut self) -> Result<Raw<'_>, LoadError> {
        let name = self.names.embedding();
        self.matrix(name, self.config.vocab_size, self.config.hidden_size, false)
    }

    /// The head; `None`: the embedding is the head.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn head(&mut self) -> Result<Option<Raw<'_>>, LoadError> {
        if self.config.tied_embeddings {
            return Ok(None);
        }
        let name = self.names.head();
        self.matrix(name, self.config.vocab_size, self.config.hidden_size, false).map(Some)
    }

    /// A matrix of a layer.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn weight(&mut self, layer: usize, part: Part) -> Result<Raw<'_>, LoadError> {
        let name = self.names.layer(layer, part.slot(), "weight");
        let (rows, cols) = self.shape(part);
        self.matrix(&name, rows, cols, matches!(part, Part::Query | Part::Key))
    }

    /// The bias that follows a matrix, if the model has one.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn bias(&mut self, layer: usize, part: Part) -> Result<Option<Vec<f32>>, LoadError> {
        let config = &self.config;
        let there = match part {
            Part::Query | Part::Key | Part::Value => config.qkv_bias,
            Part::Output => config.output_bias,
            Part::Gate | Part::Up | Part::Down => config.mlp_bias,
        };
        if !there {
            return Ok(None);
        }
        let (len, half) = (self.shape(part).0, config.head_dim / 2);
        let name = self.names.layer(layer, part.slot(), "bias");
        let stored = self.vector(&name, len)?;
        let rotary = self.interleaved && matches!(part, Part::Query | Part::Key);
        Ok(Some(match rotary {
            true => (0..len).map(|to| stored[interleaved_index(to, half)]).collect(),
            false => stored,
        }))
    }

    /// The weights of a norm, ready to multiply with, if the model has it.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn norm(&mut self, layer: usize, norm: Norm) -> Result<Option<Vec<f32>>, LoadError> {
        let config = &self.config;
        let (there, len) = match norm {
            Norm::Attention | Norm::Mlp => (true, config.hidden_size),
            Norm::Query | Norm::Key => (config.qk_norm, config.head_dim),
            Norm::PostAttention | Norm::PostMlp => (config.post_norms, config.hidden_size),
        };
        if !there {
            return Ok(None);
        }
        let name = self.names.layer(layer, norm.slot(), "weight");
        self.norm_named(&name, len).map(Some)
    }

    /// The weights of the last norm.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn final_norm(&mut self) -> Result<Vec<f32>, LoadError> {
        self.norm_named(self.names.final_norm(), self.config.hidden_size)
    }

    /// `[rows][cols]` of a layer's matrix.
    fn shape(&self, part: Part) -> (usize, usize) {
        let config = &self.config;
        let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
        match part {
            Part::Query => (config.query_size(), hidden),
            Part::Key | Part::Value => (config.kv_size(), hidden),
            Part::Output => (hidden, config.query_size()),
            Part::Gate | Part::Up => (mlp, hidden),
            Part::Down => (hidden, mlp),
        }
    }

    fn matrix(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
        rotary: bool,
    ) -> Result<Raw<'_>, LoadError> {
        let dtype = self.read(name, &[rows, cols])?;
        if rotary && self.interleaved {
            half_split(&self.bytes, rows, self.config.head_dim, &mut self.spare);
            std::mem::swap(&mut self.bytes, &mut self.spare);
        }
        Ok(Raw { dtype, rows, cols, bytes: &self.bytes })
    }

    fn norm_named(&mut self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        let mut weight = self.vector(name, len)?;
        if self.config.norm_offset {
            weight.iter_mut().for_each(|w| *w += 1.0);
        }
        Ok(weight)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        let dtype = self.read(name, &[len])?;
        let mut floats = vec![0.0; len];
        dequantise(dtype, &self.bytes, &mut floats).map_err(|e| self.refused(name, &e))?;
        Ok(floats)
    }

    fn read(&mut self, name: &str, shape: &[usize]) -> Result<DType, LoadError> {
        let Record { dtype, rows } = self.source.record(name, shape)?;
        self.source.read_rows(name, 0..rows, &mut self.bytes)?;
        self.bytes_loaded += self.bytes.len() as u64;
        let (bytes_loaded, bytes_total) = (self.bytes_loaded, self.bytes_total);
        (self.progress)(Progress { bytes_loaded, bytes_total });
        Ok(dtype)
    }

    /// Data that no executor can use.
    pub(crate) fn refused(&self, name: &str, error: &dyn std::fmt::Display) -> LoadError {
        LoadError::tensor(
            self.source.path(),
            name,
            "data that a kernel can read",
            error.to_string(),
        )
    }
}
