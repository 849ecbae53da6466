//! One description of a decoder that all families share.

use std::path::Path;

use headstart_formats::FormatError;

use super::error::LoadError;
use super::rope::Rope;

/// The gate of the MLP: `act(gate) * up`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
}

/// A decoder: pre-norm attention with rotary embeddings and grouped heads, then a gated MLP.
/// What differs between families are values in here, not code.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// "llama", "qwen2", "qwen3" or "gemma2".
    pub family: &'static str,
    /// Tokens in the vocabulary, padding rows included.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Width of a head, even.
    pub head_dim: usize,
    /// Tokens a sequence can hold.
    pub context_length: usize,
    /// Rotary embedding of queries and keys.
    pub rope: Rope,
    /// Epsilon of the RMS norms.
    pub norm_eps: f32,
    /// Norm weights are stored less one (Gemma as Hugging Face stores it).
    pub norm_offset: bool,
    /// Queries and keys are normed per head before the rotation.
    pub qk_norm: bool,
    /// The query, key and value projections have biases.
    pub qkv_bias: bool,
    /// The output projection of attention has a bias.
    pub output_bias: bool,
    /// The MLP's projections have biases.
    pub mlp_bias: bool,
    /// Attention's and the MLP's outputs are normed before they join the residual stream.
    pub post_norms: bool,
    /// The head is the embedding.
    pub tied_embeddings: bool,
    /// The MLP's activation.
    pub activation: Activation,
    /// Attention scores are multiplied by this.
    pub attention_scale: f32,
    /// `cap · tanh(score / cap)` on attention scores.
    pub attention_softcap: Option<f32>,
    /// `cap · tanh(logit / cap)` on logits.
    pub logit_softcap: Option<f32>,
    /// For each layer: how many positions, its own included, a token sees; all when `None`.
    pub windows: Vec<Option<usize>>,
    /// Embeddings are multiplied by this.
    pub embedding_scale: f32,
}

/// No model comes near these; they keep products of sizes inside a `usize`.
const SIZE_MAX: usize = 1 << 24;
const LAYERS_MAX: usize = 4096;
const HEAD_DIM_MAX: usize = 1024;

impl ModelConfig {
    /// Width of all query heads.
    #[must_use]
    pub fn query_size(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads.
    #[must_use]
    pub fn kv_size(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Refuses sizes that contradict each other or that no model has.
    pub(super) fn validate(self, path: &Path) -> Result<Self, LoadError> {
        let sizes = [
            ("vocabulary size", self.vocab_size, SIZE_MAX),
            ("hidden size", self.hidden_size, SIZE_MAX),
            ("intermediate size", self.intermediate_size, SIZE_MAX),
            ("layer count", self.layers, LAYERS_MAX),
            ("head count", self.heads, SIZE_MAX),
            ("key-value head count", self.kv_heads, SIZE_MAX),
            ("head size", self.head_dim, HEAD_DIM_MAX),
            ("context length", self.context_length, 1 << 31),
        ];
        for (field, size, max) in sizes {
            if size == 0 || size > max {
                let expected = format!("1..={max}");
                return Err(FormatError::invalid(path, field, expected, size.to_string()).into());
            }
        }
        let checks = [
            (
                "head count",
                self.heads.is_multiple_of(self.kv_heads),
                "a multiple of the key-value heads",
                self.heads,
            ),
            ("head size", self.head_dim.is_multiple_of(2), "an even number", self.head_dim),
        ];
        for (field, right, expected, found) in checks {
            if !right {
                return Err(FormatError::invalid(path, field, expected, found.to_string()).into());
            }
        }
        let floats = [
            ("norm epsilon", Some(self.norm_eps)),
            ("attention scale", Some(self.attention_scale)),
            ("rope theta", Some(self.rope.theta as f32)),
            ("attention softcap", self.attention_softcap),
            ("logit softcap", self.logit_softcap),
        ];
        for (field, value) in floats {
            if let Some(value) = value.filter(|v| !v.is_finite() || *v <= 0.0) {
                return Err(FormatError::invalid(
                    path,
                    field,
                    "a positive number",
                    value.to_string(),
                )
                .into());
            }
        }
        if let Some(window) = self.windows.iter().flatten().find(|w| **w == 0) {
            let expected = "at least 1";
            return Err(
                FormatError::invalid(path, "sliding window", expected, window.to_string()).into()
            );
        }
        Ok(self)
    }
}
