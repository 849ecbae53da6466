//! Llama: Llama 2 and 3.x, SmolLM2, TinyLlama, and Mistral with its sliding window.

use super::config::{Activation, ModelConfig};
use super::error::LoadError;
use super::family::{Family, GgufReader, HfReader};

pub(super) const FAMILY: Family = Family {
    name: "llama",
    hf_types: &["llama", "mistral"],
    gguf_arch: "llama",
    gguf_interleaved: true,
    from_hf,
    from_gguf,
};

fn from_hf(reader: &HfReader<'_>) -> Result<ModelConfig, LoadError> {
    let hf = reader.config;
    let mut config = reader.decoder(&FAMILY, Activation::Silu)?;
    config.qkv_bias = hf.attention_bias.unwrap_or(false);
    config.output_bias = config.qkv_bias;
    config.mlp_bias = hf.mlp_bias.unwrap_or(false);
    let slides = hf.model_type.as_deref() == Some("mistral") && hf.sliding_window.is_some();
    config.windows = reader.windows(config.layers, |_| slides)?;
    Ok(config)
}

fn from_gguf(reader: &GgufReader<'_>) -> Result<ModelConfig, LoadError> {
    let mut config = reader.decoder(&FAMILY, Activation::Silu)?;
    if let Some(window) = reader.size("attention.sliding_window")?.filter(|w| *w > 0) {
        config.windows.fill(Some(window));
    }
    Ok(config)
}
