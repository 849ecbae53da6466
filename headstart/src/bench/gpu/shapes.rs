//! Shapes of known models.

use std::fmt;

use clap::ValueEnum;
use headstart_engine::model::{Activation, ModelConfig, Rope, RopeScaling};

/// A model whose shape is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Shape {
    /// Llama 3.2 3B
    #[value(name = "llama-3.2-3b")]
    Llama32_3b,
    /// Llama 3.1 8B
    #[value(name = "llama-3.1-8b")]
    Llama31_8b,
    /// Llama 3.3 70B: 141 GB in bf16; see --layers
    #[value(name = "llama-3.3-70b")]
    Llama33_70b,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

impl Shape {
    /// The model's description; contexts are cut to what the benchmark needs.
    pub(super) fn config(self) -> ModelConfig {
        let (hidden_size, intermediate_size, layers, heads, tied_embeddings) = match self {
            Self::Llama32_3b => (3072, 8192, 28, 24, true),
            Self::Llama31_8b => (4096, 14336, 32, 32, false),
            Self::Llama33_70b => (8192, 28672, 80, 64, false),
        };
        ModelConfig {
            family: "llama",
            vocab_size: 128_256,
            hidden_size,
            intermediate_size,
            layers,
            heads,
            kv_heads: 8,
            head_dim: 128,
            context_length: 8192,
            rope: Rope { theta: 500_000.0, scaling: RopeScaling::None },
            norm_eps: 1e-5,
            norm_offset: false,
            qk_norm: false,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            post_norms: false,
            tied_embeddings,
            activation: Activation::Silu,
            attention_scale: 1.0 / 128f32.sqrt(),
            attention_softcap: None,
            logit_softcap: None,
            windows: vec![None; layers],
            embedding_scale: 1.0,
        }
    }
}
