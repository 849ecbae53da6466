//! `config.json` of the decoder families that Headstart runs.
//!
//! The fields are those of Hugging Face transformers, old names and new: `torch_dtype`/`dtype`,
//! `rope_theta` + `rope_scaling` (up to transformers 4) and `rope_parameters` (from 5 on).

use serde::Deserialize;

/// One id or several, as `eos_token_id` is written.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum TokenIds {
    /// A single id.
    One(u32),
    /// Several.
    Many(Vec<u32>),
}

impl TokenIds {
    /// The ids as a list.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![*id],
            Self::Many(ids) => ids.clone(),
        }
    }
}

/// Rotary embedding parameters: `rope_scaling` or `rope_parameters`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct RopeParameters {
    /// "default", "linear", "llama3", …
    pub rope_type: Option<String>,
    /// What older files call `rope_type`; some have both.
    #[serde(rename = "type")]
    pub old_type: Option<String>,
    /// The base θ, in `rope_parameters` only.
    pub rope_theta: Option<f64>,
    /// How far the context is stretched.
    pub factor: Option<f64>,
    /// llama3: below this many turns per original context a frequency is interpolated.
    pub low_freq_factor: Option<f64>,
    /// llama3: above this many turns per original context a frequency stays.
    pub high_freq_factor: Option<f64>,
    /// llama3: the context length before stretching.
    pub original_max_position_embeddings: Option<u64>,
    /// The rotated share of a head, 1 when absent.
    pub partial_rotary_factor: Option<f64>,
}

impl RopeParameters {
    /// The kind of scaling, under either name.
    #[must_use]
    pub fn kind(&self) -> &str {
        self.rope_type.as_deref().or(self.old_type.as_deref()).unwrap_or("default")
    }
}

/// `config.json`. Unknown keys are ignored; each family checks the ones it needs.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct HfConfig {
    /// "llama", "mistral", "qwen2", "qwen3", "gemma2".
    pub model_type: Option<String>,
    /// Class names, `["LlamaForCausalLM"]`.
    pub architectures: Option<Vec<String>>,
    /// Width of the residual stream.
    pub hidden_size: Option<usize>,
    /// Width of the MLP.
    pub intermediate_size: Option<usize>,
    /// Layers.
    pub num_hidden_layers: Option<usize>,
    /// Query heads.
    pub num_attention_heads: Option<usize>,
    /// Key-value heads; as many as query heads when absent.
    pub num_key_value_heads: Option<usize>,
    /// Width of a head; `hidden_size / num_attention_heads` when absent.
    pub head_dim: Option<usize>,
    /// Tokens in the vocabulary, padding rows included.
    pub vocab_size: Option<usize>,
    /// Context length.
    pub max_position_embeddings: Option<usize>,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: Option<f64>,
    /// Rotary base θ.
    pub rope_theta: Option<f64>,
    /// Rotary scaling, transformers 4.
    pub rope_scaling: Option<RopeParameters>,
    /// Rotary parameters, transformers 5.
    pub rope_parameters: Option<RopeParameters>,
    /// The rotated share of a head, 1 when absent.
    pub partial_rotary_factor: Option<f64>,
    /// The head is the embedding.
    pub tie_word_embeddings: Option<bool>,
    /// Activation of the MLP.
    pub hidden_act: Option<String>,
    /// Activation of the MLP in Gemma.
    pub hidden_activation: Option<String>,
    /// Biases on the attention projections.
    pub attention_bias: Option<bool>,
    /// Biases on the MLP projections.
    pub mlp_bias: Option<bool>,
    /// Sliding attention window in tokens.
    pub sliding_window: Option<usize>,
    /// Qwen2: whether `sliding_window` is used at all.
    pub use_sliding_window: Option<bool>,
    /// Qwen2: layers from here on slide.
    pub max_window_layers: Option<usize>,
    /// "full_attention" or "sliding_attention" for each layer.
    pub layer_types: Option<Vec<String>>,
    /// Gemma 2: attention scores are scaled by its inverse square root.
    pub query_pre_attn_scalar: Option<f64>,
    /// Gemma 2: soft cap of attention scores.
    pub attn_logit_softcapping: Option<f64>,
    /// Gemma 2: soft cap of logits.
    pub final_logit_softcapping: Option<f64>,
    /// Type of the weights.
    pub dtype: Option<String>,
    /// What older files call `dtype`; some have both.
    pub torch_dtype: Option<String>,
    /// Beginning of text.
    pub bos_token_id: Option<u32>,
    /// End of text or turn.
    pub eos_token_id: Option<TokenIds>,
    /// Present when the weights are quantised by another tool (GPTQ, AWQ, …).
    pub quantization_config: Option<serde_json::Value>,
}
