//! Qwen3: Llama with normed queries and keys, heads of their own width.

use super::config::{Activation, ModelConfig};
use super::error::LoadError;
use super::family::{Family, GgufReader, HfReader};
use super::qwen2;

pub(super) const FAMILY: Family = Family {
    name: "qwen3",
    hf_types: &["qwen3"],
    gguf_arch: "qwen3",
    gguf_interleaved: false,
    from_hf,
    from_gguf,
};

fn from_hf(reader: &HfReader<'_>) -> Result<ModelConfig, LoadError> {
    let mut config = reader.decoder(&FAMILY, Activation::Silu)?;
    config.qk_norm = true;
    config.qkv_bias = reader.config.attention_bias.unwrap_or(false);
    config.output_bias = config.qkv_bias;
    if reader.config.head_dim.is_none() {
        // transformers' default, which config.json may leave out.
        config.head_dim = 128;
        config.attention_scale = 1.0 / 128f32.sqrt();
    }
    config.windows = qwen2::windows(reader, config.layers)?;
    Ok(config)
}

fn from_gguf(reader: &GgufReader<'_>) -> Result<ModelConfig, LoadError> {
    let mut config = reader.decoder(&FAMILY, Activation::Silu)?;
    config.qk_norm = true;
    Ok(config)
}
