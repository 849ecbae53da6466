//! Gemma 2: GELU, norms before and after each block, soft caps, a window on every other layer.

use super::config::{Activation, ModelConfig};
use super::error::LoadError;
use super::family::{Family, GgufReader, HfReader};

pub(super) const FAMILY: Family = Family {
    name: "gemma2",
    hf_types: &["gemma2"],
    gguf_arch: "gemma2",
    gguf_interleaved: false,
    from_hf,
    from_gguf,
};

/// Gemma 2 27B, the only size whose scores are not scaled by its head size, has this many layers.
const LAYERS_27B: usize = 46;

fn shared(mut config: ModelConfig) -> ModelConfig {
    config.post_norms = true;
    config.embedding_scale = (config.hidden_size as f32).sqrt();
    config
}

fn slides(layer: usize) -> bool {
    layer.is_multiple_of(2)
}

fn from_hf(reader: &HfReader<'_>) -> Result<ModelConfig, LoadError> {
    let hf = reader.config;
    let mut config = shared(reader.decoder(&FAMILY, Activation::GeluTanh)?);
    config.norm_offset = true;
    config.qkv_bias = hf.attention_bias.unwrap_or(false);
    config.output_bias = config.qkv_bias;
    config.tied_embeddings = hf.tie_word_embeddings.unwrap_or(true);
    config.attention_scale = 1.0 / (hf.query_pre_attn_scalar.unwrap_or(256.0) as f32).sqrt();
    config.attention_softcap = hf.attn_logit_softcapping.map(|cap| cap as f32);
    config.logit_softcap = hf.final_logit_softcapping.map(|cap| cap as f32);
    config.windows = reader.windows(config.layers, slides)?;
    Ok(config)
}

fn from_gguf(reader: &GgufReader<'_>) -> Result<ModelConfig, LoadError> {
    let mut config = shared(reader.decoder(&FAMILY, Activation::GeluTanh)?);
    // GGUF has no key for the scale; llama.cpp derives it in the same way.
    if config.layers == LAYERS_27B {
        let width = config.hidden_size as f32 / config.heads.max(1) as f32;
        config.attention_scale = 1.0 / width.sqrt();
    }
    config.attention_softcap = Some(reader.float("attn_logit_softcapping")?.unwrap_or(50.0));
    config.logit_softcap = Some(reader.float("final_logit_softcapping")?.unwrap_or(30.0));
    let window = reader.size("attention.sliding_window")?.unwrap_or(4096);
    for (layer, slot) in config.windows.iter_mut().enumerate() {
        *slot = slides(layer).then_some(window);
    }
    Ok(config)
}
