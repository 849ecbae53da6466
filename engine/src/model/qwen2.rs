//! Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections.

use super::config::{Activation, ModelConfig};
use super::error::LoadError;
use super::family::{Family, GgufReader, HfReader};

pub(super) const FAMILY: Family = Family {
    name: "qwen2",
    hf_types: &["qwen2"],
    gguf_arch: "qwen2",
    gguf_interleaved: false,
    from_hf,
    from_gguf,
};

fn from_hf(reader: &HfReader<'_>) -> Result<ModelConfig, LoadError> {
    let mut config = reader.decoder(&FAMILY, Activation::Silu)?;
    config.qkv_bias = true;
    config.windows = windows(reader, config.layers)?;
    Ok(config)
}

/// Layers from `max_window_layers` on slide, if the file switches sliding on at all. Qwen3 too.
pub(super) fn windows(
    reader: &HfReader<'_>,
    layers: usize,
) -> Result<Vec<Option<usize>>, LoadError> {
    let hf = reader.config;
    let on = hf.use_sliding_window.unwrap_or(false) && hf.sliding_window.is_some();
    let first = hf.max_window_layers.unwrap_or(layers);
    reader.windows(layers, |i| on && i >= first)
}

fn from_gguf(reader: &GgufReader<'_>) -> Result<ModelConfig, LoadError> {
    let mut config = reader.decoder(&FAMILY, Activation::Silu)?;
    config.qkv_bias = true;
    Ok(config)
}
