//! Reads the tensors of a described model one by one into the kernels' layouts.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use headstart_kernels::{Arena, DType, Matrix, ThreadPool, dequantise};

use super::config::ModelConfig;
use super::error::LoadError;
use super::names::{Names, Slot};
use super::shard::{Cut, Parts, Shard, TooManyRanks};
use super::source::{Record, Source};
use super::{Layer, Linear, Model, Progress, WeightDtype, Whole};
use crate::executor::ModelHash;

/// Bytes that are read together, about.
pub(super) const STRIP_BYTES: usize = 8 << 20;

/// One model being read, a strip of rows at a time, so the peak is the weights and one strip.
pub(super) struct Loader<'a> {
    source: Source,
    names: Names,
    /// Query and key rows are stored in interleaved rotary order.
    interleaved: bool,
    dtype: WeightDtype,
    shard: Shard,
    pool: &'a ThreadPool,
    progress: &'a mut dyn FnMut(Progress),
    bytes_loaded: u64,
    bytes_total: u64,
    arena: Arena,
    bytes: Vec<u8>,
    spare: Vec<u8>,
    floats: Vec<f32>,
}

impl<'a> Loader<'a> {
    pub(super) fn new(
        source: Source,
        names: Names,
        interleaved: bool,
        dtype: WeightDtype,
        shard: Shard,
        pool: &'a ThreadPool,
        progress: &'a mut dyn FnMut(Progress),
    ) -> Self {
        let bytes_total = source.bytes();
        Self {
            source,
            names,
            interleaved,
            dtype,
            shard,
            pool,
            progress,
            bytes_loaded: 0,
            bytes_total,
            arena: Arena::default(),
            bytes: Vec::new(),
            spare: Vec::new(),
            floats: Vec::new(),
        }
    }

    /// Reads what this rank holds of everything that `config` describes.
    pub(super) fn model(mut self, config: ModelConfig) -> Result<Model, LoadError> {
        let refused = |error: TooManyRanks| LoadError::ranks(self.source.path(), error);
        let parts = self.shard.parts(&config).map_err(refused)?;
        let (rows, cols) = (Cut::of(config.vocab_size, &parts.vocab), Cut::all(config.hidden_size));
        let embedding = self.matrix(self.names.embedding(), &rows, &cols, None)?;
        let head = match config.tied_embeddings {
            true => None,
            false => Some(self.matrix(self.names.head(), &rows, &cols, None)?),
        };
        let layers =
            (0..config.layers).map(|i| self.layer(&config, &parts, i)).collect::<Result<_, _>>()?;
        let final_norm = self.norm(self.names.final_norm(), config.hidden_size, &config)?;
        (self.progress)(Progress { bytes_loaded: self.bytes_total, bytes_total: self.bytes_total });
        let whole = Whole { hash: ModelHash::default(), kv_heads: config.kv_heads };
        let config = parts.config(&config);
        let (shard, vocab) = (self.shard, parts.vocab);
        Ok(Model { config, whole, shard, vocab, embedding, head, final_norm, layers })
    }

    fn layer(
        &mut self,
        config: &ModelConfig,
        parts: &Parts,
        index: usize,
    ) -> Result<Layer, LoadError> {
        let hidden = Cut::all(config.hidden_size);
        let queries = Cut::heads(config.heads, &parts.heads, config.head_dim);
        let kv = Cut::heads(config.kv_heads, &parts.kv_heads, config.head_dim);
        let mlp = Cut::of(config.intermediate_size, &parts.mlp);
        let (qkv_bias, mlp_bias) = (config.qkv_bias, config.mlp_bias);
        // What is summed over the ranks has its bias on one of them.
        let summed = self.shard.rank == 0;
        let rotary = self.interleaved.then_some(config.head_dim);
        let mut linear = |slot, rows: &Cut, cols: &Cut, bias, rotary| {
            let name = self.names.layer(index, slot, "weight");
            let weight = self.matrix(&name, rows, cols, rotary)?;
            let bias = match bias {
                true => Some(self.vector(&self.names.layer(index, slot, "bias"), rows, rotary)?),
                false => None,
            };
            Ok::<_, LoadError>(Linear { weight, bias })
        };
        let query = linear(Slot::Query, &queries, &hidden, qkv_bias, rotary)?;
        let key = linear(Slot::Key, &kv, &hidden, qkv_bias, rotary)?;
        let value = linear(Slot::Value, &kv, &hidden, qkv_bias, None)?;
        let output = linear(Slot::Output, &hidden, &queries, config.output_bias && summed, None)?;
        let gate = linear(Slot::Gate, &mlp, &hidden, mlp_bias, None)?;
        let up = linear(Slot::Up, &mlp, &hidden, mlp_bias, None)?;
        let down = linear(Slot::Down, &hidden, &mlp, mlp_bias && summed, None)?;
        let mut norm = |slot, len| self.norm(&self.names.layer(index, slot, "weight"), len, config);
        let hidden = config.hidden_size;
        Ok(Layer {
            attention_norm: norm(Slot::AttentionNorm, hidden)?,
            mlp_norm: norm(Slot::MlpNorm, hidden)?,
            qk_norms: match config.qk_norm {
                true => {
                    let dim = config.head_dim;
                    Some((norm(Slot::QueryNorm, dim)?, norm(Slot::KeyNorm, dim)?))
                }
                false => None,
            },
            post_attention_norm: match config.post_norms {
                true => Some(norm(Slot::PostAttentionNorm, hidden)?),
                false => None,
            },
            post_mlp_norm: match config.post_norms {
                true => Some(norm(Slot::PostMlpNorm, hidden)?),
                false => None,
            },
            query,
            key,
            value,
            output,
            gate,
            up,
            down,
        })
    }

    fn loaded(&mut self, bytes: usize) {
        self.bytes_loaded += bytes as u64;
        let (bytes_loaded, bytes_total) = (self.bytes_loaded, self.bytes_total);
        (self.progress)(Progress { bytes_loaded, bytes_total });
    }

    /// A part of a matrix, kept as `self.dtype` says. `rotary` is the head size of rows to be put
    /// back in rotate-half order.
    fn matrix(
        &mut self,
        name: &str,
        rows: &Cut,
        cols: &Cut,
        rotary: Option<usize>,
    ) -> Result<Matrix, LoadError> {
        let Record { dtype, .. } = self.source.record(name, &[rows.size, cols.size])?;
        let row_bytes = dtype.bytes_for(cols.size).map_err(|e| self.refused(name, &e))?;
        let cut = match (dtype.bytes_for(cols.part.start), dtype.bytes_for(cols.part.end)) {
            (Ok(from), Ok(to)) => Some(from..to),
            // The cut goes through blocks of quantised weights.
            _ => None,
        };
        let storage = match self.dtype {
            WeightDtype::Auto if cut.is_some() => dtype,
            WeightDtype::Auto | WeightDtype::F32 => DType::F32,
            WeightDtype::Bf16 => DType::BF16,
        };
        let mut matrix = Matrix::zeros(&self.arena, storage, rows.part.len(), cols.part.len())
            .map_err(|e| self.refused(name, &e))?;
        let step = strip_rows(row_bytes, rotary);
        for start in rows.part.clone().step_by(step) {
            let strip = start..rows.part.end.min(start + step);
            let (count, first) = (strip.len(), start - rows.part.start);
            self.source.read_rows(name, strip, &mut self.bytes)?;
            self.loaded(self.bytes.len() * cols.part.len() / cols.size.max(1));
            if let Some(head_dim) = rotary {
                half_split(&self.bytes, count, head_dim, &mut self.spare);
                std::mem::swap(&mut self.bytes, &mut self.spare);
            }
            if storage == dtype
                && let Some(cut) = &cut
            {
                cut_columns(&mut self.bytes, row_bytes, cut);
                matrix.fill(self.pool, first, &self.bytes).map_err(|e| self.refused(name, &e))?;
            } else {
                self.expand(name, dtype, count, cols.size)?;
                cut_columns(&mut self.floats, cols.size, &cols.part);
                matrix.fill_f32(self.pool, first, &self.floats);
            }
        }
        Ok(matrix)
    }

    /// A part of a vector.
    fn vector(
        &mut self,
        name: &str,
        cut: &Cut,
        rotary: Option<usize>,
    ) -> Result<Vec<f32>, LoadError> {
        let Record { dtype, rows } = self.source.record(name, &[cut.size])?;
        self.source.read_rows(name, 0..rows, &mut self.bytes)?;
        self.loaded(self.bytes.len());
        self.expand(name, dtype, 1, cut.size)?;
        let floats = &self.floats;
        Ok(match rotary {
            None => floats[cut.part.clone()].to_vec(),
            Some(dim) => {
                cut.part.clone().map(|to| floats[interleaved_index(to, dim / 2)]).collect()
            }
        })
    }

    fn norm(
        &mut self,
        name: &str,
        len: usize,
        config: &ModelConfig,
    ) -> Result<Vec<f32>, LoadError> {
        let mut weight = self.vector(name, &Cut::all(len), None)?;
        if config.norm_offset {
            weight.iter_mut().for_each(|w| *w += 1.0);
        }
        Ok(weight)
    }

    /// Expands `self.bytes`, `rows` equal parts of it, into `self.floats`.
    fn expand(
        &mut self,
        name: &str,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> Result<(), LoadError> {
        self.floats.resize(rows * cols, 0.0);
        let (bytes, row_bytes) = (&self.bytes, self.bytes.len() / rows);
        let step = rows.div_ceil(4 * self.pool.threads());
        let failure = Mutex::new(None);
        self.pool.run_chunks(&mut self.floats, step * cols, &|i, floats| {
            let part = &bytes[i * step * row_bytes..][..floats.len() / cols * row_bytes];
            if let Err(error) = dequantise(dtype, part, floats) {
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        });
        let failure = failure.into_inner().unwrap_or_else(PoisonError::into_inner);
        failure.map_or(Ok(()), |error| Err(self.refused(name, &error)))
    }

    fn refused(&self, name: &str, error: &headstart_kernels::KernelError) -> LoadError {
        LoadError::tensor(
            self.source.path(),
            name,
            "data that a kernel can read",
            error.to_string(),
        )
    }
}

/// Where row `to` of a rotate-half head lies in interleaved order: pair `i` is `(2i, 2i + 1)` there
/// and `(i, i + half)` here.
pub(super) fn interleaved_index(to: usize, half: usize) -> usize {
    let (head, within) = (to / (2 * half), to % (2 * half));
    head * 2 * half + 2 * (within % half) + within / half
}

/// Reorders whole rows; their bytes stay as they are, quantised or not.
pub(super) fn half_split(bytes: &[u8], rows: usize, head_dim: usize, out: &mut Vec<u8>) {
    let row_bytes = bytes.len() / rows;
    out.clear();
    for to in 0..rows {
        let from = interleaved_index(to, head_dim / 2);
        out.extend_from_slice(&bytes[from * row_bytes..][..row_bytes]);
    }
}

/// Rows of a strip: whole panels of a matrix, and whole heads where these are reordered.
fn strip_rows(row_bytes: usize, rotary: Option<usize>) -> usize {
    let heads = rotary.unwrap_or(1).max(1);
    let (mut a, mut b) = (heads, Matrix::ROWS);
    while b > 0 {
        (a, b) = (b, a % b);
    }
    let unit = heads / a * Matrix::ROWS;
    (STRIP_BYTES / row_bytes.max(1) / unit).max(1) * unit
}

/// Keeps columns `part` of rows of `width` elements each.
pub(super) fn cut_columns<T: Copy>(rows: &mut Vec<T>, width: usize, part: &Range<usize>) {
    if part.len() == width {
        return;
    }
    let count = rows.len() / width.max(1);
    for row in 0..count {
        rows.copy_within(row * width + part.start..row * width + part.end, row * part.len());
    }
    rows.truncate(count * part.len());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strips_are_whole_panels_and_heads() {
        for (row_bytes, rotary, want) in [
            (1 << 30, None, 16),
            (1 << 30, Some(64), 64),
            (1 << 30, Some(80), 80),
            (1 << 30, Some(24), 48),
            (1 << 10, None, 8192),
            (3 << 10, Some(80), 2720),
        ] {
            assert_eq!(strip_rows(row_bytes, rotary), want, "{row_bytes} {rotary:?}");
        }
    }

    #[test]
    fn columns_are_cut_in_place() {
        let mut rows: Vec<usize> = (0..12).collect();
        cut_columns(&mut rows, 4, &(1..3));
        assert_eq!(rows, [1, 2, 5, 6, 9, 10]);
        cut_columns(&mut rows, 2, &(0..2));
        assert_eq!(rows, [1, 2, 5, 6, 9, 10]);
    }

    #[test]
    fn interleaved_rows_come_back_in_order() {
        // Two heads of six; a row is two bytes with its rotate-half index.
        let stored = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11];
        let bytes: Vec<u8> = stored.iter().flat_map(|i| [*i, 100]).collect();
        let mut out = Vec::new();
        half_split(&bytes, 12, 6, &mut out);
        assert_eq!(out, (0..12).flat_map(|i| [i, 100]).collect::<Vec<u8>>());
    }
}
