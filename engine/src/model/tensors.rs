//! The tensors of a model one by one, as bytes in file order: for executors that keep weights in
//! memory of their own. Of each, only what one tensor-parallel rank holds.

use std::ops::Range;
use std::path::Path;

use headstart_formats::gguf::Gguf;
use headstart_formats::hf::HfDir;
use headstart_formats::safetensors::SafetensorsDir;
use headstart_kernels::{DType, dequantise};

use super::config::ModelConfig;
use super::error::LoadError;
use super::family::{self, GgufReader, HfReader};
use super::loader::{STRIP_BYTES, cut_columns, half_split, interleaved_index};
use super::names::{Names, Slot};
use super::shard::{Cut, Parts, Shard};
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

/// A matrix `[rows][cols]` as its file has it, or in single precision where the cut goes through
/// blocks of quantised weights; rows of queries and keys in rotate-half order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Raw<'a> {
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) bytes: &'a [u8],
}

/// A model's files, open. Holds one tensor's part at a time.
pub(crate) struct Tensors<'a> {
    source: Source,
    names: Names,
    interleaved: bool,
    /// The whole model.
    whole: ModelConfig,
    /// What the rank holds of it.
    parts: Parts,
    config: ModelConfig,
    progress: &'a mut dyn FnMut(Progress),
    bytes_loaded: u64,
    bytes_total: u64,
    bytes: Vec<u8>,
    spare: Vec<u8>,
    floats: Vec<f32>,
}

impl<'a> Tensors<'a> {
    /// Opens a GGUF file or a Hugging Face directory, for one rank.
    ///
    /// # Errors
    /// As `Model::load_part`.
    pub(crate) fn open(
        path: &Path,
        shard: Shard,
        progress: &'a mut dyn FnMut(Progress),
    ) -> Result<Self, LoadError> {
        let (source, names, interleaved, whole) = if path.is_dir() {
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
        let parts = shard.parts(&whole).map_err(|error| LoadError::ranks(path, error))?;
        let (config, bytes_total) = (parts.config(&whole), source.bytes());
        Ok(Self {
            source,
            names,
            interleaved,
            whole,
            parts,
            config,
            progress,
            bytes_loaded: 0,
            bytes_total,
            bytes: Vec::new(),
            spare: Vec::new(),
            floats: Vec::new(),
        })
    }

    /// Names the model, whose weights are kept as `dtype`.
    ///
    /// # Errors
    /// A tensor cannot be read.
    pub(crate) fn hash(&self, dtype: WeightDtype) -> Result<ModelHash, LoadError> {
        hash::hash(&self.source, &self.whole, dtype)
    }

    /// What the whole model is.
    pub(crate) fn whole(&self) -> &ModelConfig {
        &self.whole
    }

    /// What the rank's part is: with its own heads and MLP width.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Tokens whose rows of the embedding and the head are the rank's.
    pub(crate) fn vocab(&self) -> Range<usize> {
        self.parts.vocab.clone()
    }

    /// The type in which the file has the embedding.
    ///
    /// # Errors
    /// It is not there, or of another shape.
    pub(crate) fn embedding_dtype(&self) -> Result<DType, LoadError> {
        let shape = [self.whole.vocab_size, self.whole.hidden_size];
        Ok(self.source.record(self.names.embedding(), &shape)?.dtype)
    }

    /// The rank's rows of the embedding.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn embedding(&mut self) -> Result<Raw<'_>, LoadError> {
        let name = self.names.embedding();
        let [rows, cols] = self.vocabulary();
        self.matrix(name, &rows, &cols, false)
    }

    /// The rank's rows of the head; `None`: the embedding is the head.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn head(&mut self) -> Result<Option<Raw<'_>>, LoadError> {
        if self.whole.tied_embeddings {
            return Ok(None);
        }
        let name = self.names.head();
        let [rows, cols] = self.vocabulary();
        self.matrix(name, &rows, &cols, false).map(Some)
    }

    /// The rank's part of a matrix of a layer.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn weight(&mut self, layer: usize, part: Part) -> Result<Raw<'_>, LoadError> {
        let name = self.names.layer(layer, part.slot(), "weight");
        let [rows, cols] = self.cuts(part);
        self.matrix(&name, &rows, &cols, matches!(part, Part::Query | Part::Key))
    }

    /// The bias that follows a matrix, if the model has one: of the rank's outputs, or, where those
    /// are summed over the ranks, of the sum.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn bias(&mut self, layer: usize, part: Part) -> Result<Option<Vec<f32>>, LoadError> {
        let config = &self.whole;
        let there = match part {
            Part::Query | Part::Key | Part::Value => config.qkv_bias,
            Part::Output => config.output_bias,
            Part::Gate | Part::Up | Part::Down => config.mlp_bias,
        };
        if !there {
            return Ok(None);
        }
        let half = config.head_dim / 2;
        let [Cut { size, part: here }, _] = self.cuts(part);
        let name = self.names.layer(layer, part.slot(), "bias");
        let stored = self.vector(&name, size)?;
        let rotary = self.interleaved && matches!(part, Part::Query | Part::Key);
        Ok(Some(match rotary {
            true => here.map(|to| stored[interleaved_index(to, half)]).collect(),
            false => stored[here].to_vec(),
        }))
    }

    /// The weights of a norm, ready to multiply with, if the model has it.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn norm(&mut self, layer: usize, norm: Norm) -> Result<Option<Vec<f32>>, LoadError> {
        let config = &self.whole;
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
        self.norm_named(self.names.final_norm(), self.whole.hidden_size)
    }

    /// Tells that everything is loaded: a rank does not read all bytes of the files.
    pub(crate) fn finish(&mut self) {
        self.loaded(usize::MAX);
    }

    /// Rows and columns of the embedding and the head.
    fn vocabulary(&self) -> [Cut; 2] {
        let rows = Cut::of(self.whole.vocab_size, &self.parts.vocab);
        [rows, Cut::all(self.whole.hidden_size)]
    }

    /// Rows and columns of a layer's matrix.
    fn cuts(&self, part: Part) -> [Cut; 2] {
        let (whole, parts) = (&self.whole, &self.parts);
        let hidden = Cut::all(whole.hidden_size);
        let queries = || Cut::heads(whole.heads, &parts.heads, whole.head_dim);
        let mlp = || Cut::of(whole.intermediate_size, &parts.mlp);
        match part {
            Part::Query => [queries(), hidden],
            Part::Key | Part::Value => {
                [Cut::heads(whole.kv_heads, &parts.kv_heads, whole.head_dim), hidden]
            }
            Part::Output => [hidden, queries()],
            Part::Gate | Part::Up => [mlp(), hidden],
            Part::Down => [hidden, mlp()],
        }
    }

    fn matrix(
        &mut self,
        name: &str,
        rows: &Cut,
        cols: &Cut,
        rotary: bool,
    ) -> Result<Raw<'_>, LoadError> {
        let Record { dtype, .. } = self.source.record(name, &[rows.size, cols.size])?;
        let dtype = match cols.is_all() {
            true => {
                self.read(name, rows.part.clone())?;
                dtype
            }
            false => self.read_columns(name, dtype, rows, cols)?,
        };
        let (rows, cols) = (rows.part.len(), cols.part.len());
        if rotary && self.interleaved {
            half_split(&self.bytes, rows, self.whole.head_dim, &mut self.spare);
            std::mem::swap(&mut self.bytes, &mut self.spare);
        }
        Ok(Raw { dtype, rows, cols, bytes: &self.bytes })
    }

    /// Reads a part of the columns, some rows at a time, and says what they are in now.
    fn read_columns(
        &mut self,
        name: &str,
        dtype: DType,
        rows: &Cut,
        cols: &Cut,
    ) -> Result<DType, LoadError> {
        let row_bytes = dtype.bytes_for(cols.size).map_err(|e| self.refused(name, &e))?;
        let cut = match (dtype.bytes_for(cols.part.start), dtype.bytes_for(cols.part.end)) {
            (Ok(from), Ok(to)) => Some(from..to),
            // The cut goes through blocks of quantised weights.
            _ => None,
        };
        let mut kept = std::mem::take(&mut self.spare);
        kept.clear();
        let step = (STRIP_BYTES / row_bytes.max(1)).max(1);
        for start in rows.part.clone().step_by(step) {
            let strip = start..rows.part.end.min(start + step);
            let count = strip.len();
            self.source.read_rows(name, strip, &mut self.bytes)?;
            self.loaded(self.bytes.len() * cols.part.len() / cols.size.max(1));
            if let Some(cut) = &cut {
                cut_columns(&mut self.bytes, row_bytes, cut);
                kept.extend_from_slice(&self.bytes);
            } else {
                self.floats.resize(count * cols.size, 0.0);
                let expanded = dequantise(dtype, &self.bytes, &mut self.floats);
                expanded.map_err(|e| self.refused(name, &e))?;
                cut_columns(&mut self.floats, cols.size, &cols.part);
                kept.extend(self.floats.iter().flat_map(|value| value.to_le_bytes()));
            }
        }
        self.spare = std::mem::replace(&mut self.bytes, kept);
        Ok(if cut.is_some() { dtype } else { DType::F32 })
    }

    fn norm_named(&mut self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        let mut weight = self.vector(name, len)?;
        if self.whole.norm_offset {
            weight.iter_mut().for_each(|w| *w += 1.0);
        }
        Ok(weight)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        let Record { dtype, rows } = self.source.record(name, &[len])?;
        self.read(name, 0..rows)?;
        let mut floats = vec![0.0; len];
        dequantise(dtype, &self.bytes, &mut floats).map_err(|e| self.refused(name, &e))?;
        Ok(floats)
    }

    fn read(&mut self, name: &str, rows: Range<usize>) -> Result<(), LoadError> {
        self.source.read_rows(name, rows, &mut self.bytes)?;
        self.loaded(self.bytes.len());
        Ok(())
    }

    fn loaded(&mut self, bytes: usize) {
        let bytes_total = self.bytes_total;
        self.bytes_loaded = self.bytes_loaded.saturating_add(bytes as u64).min(bytes_total);
        (self.progress)(Progress { bytes_loaded: self.bytes_loaded, bytes_total });
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
