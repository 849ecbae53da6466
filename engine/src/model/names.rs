//! What tensors are called in the two formats.

/// A tensor of a layer, by its part in the computation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    AttentionNorm,
    Query,
    Key,
    Value,
    Output,
    QueryNorm,
    KeyNorm,
    PostAttentionNorm,
    MlpNorm,
    Gate,
    Up,
    Down,
    PostMlpNorm,
}

/// A naming scheme.
#[derive(Clone, Copy, Debug)]
pub(super) enum Names {
    /// llama.cpp's.
    Gguf,
    /// Hugging Face transformers'. With norms after the blocks, "post_attention_layernorm" is one
    /// of those; without, it is the norm before the MLP.
    Hf { post_norms: bool },
}

impl Names {
    pub(super) fn embedding(self) -> &'static str {
        match self {
            Self::Gguf => "token_embd.weight",
            Self::Hf { .. } => "model.embed_tokens.weight",
        }
    }

    pub(super) fn head(self) -> &'static str {
        match self {
            Self::Gguf => "output.weight",
            Self::Hf { .. } => "lm_head.weight",
        }
    }

    pub(super) fn final_norm(self) -> &'static str {
        match self {
            Self::Gguf => "output_norm.weight",
            Self::Hf { .. } => "model.norm.weight",
        }
    }

    /// The name of a layer's tensor; `kind` is "weight" or "bias".
    pub(super) fn layer(self, layer: usize, slot: Slot, kind: &str) -> String {
        match self {
            Self::Gguf => format!("blk.{layer}.{}.{kind}", gguf(slot)),
            Self::Hf { post_norms } => {
                format!("model.layers.{layer}.{}.{kind}", hf(slot, post_norms))
            }
        }
    }
}

fn gguf(slot: Slot) -> &'static str {
    match slot {
        Slot::AttentionNorm => "attn_norm",
        Slot::Query => "attn_q",
        Slot::Key => "attn_k",
        Slot::Value => "attn_v",
        Slot::Output => "attn_output",
        Slot::QueryNorm => "attn_q_norm",
        Slot::KeyNorm => "attn_k_norm",
        Slot::PostAttentionNorm => "post_attention_norm",
        Slot::MlpNorm => "ffn_norm",
        Slot::Gate => "ffn_gate",
        Slot::Up => "ffn_up",
        Slot::Down => "ffn_down",
        Slot::PostMlpNorm => "post_ffw_norm",
    }
}

fn hf(slot: Slot, post_norms: bool) -> &'static str {
    match slot {
        Slot::AttentionNorm => "input_layernorm",
        Slot::Query => "self_attn.q_proj",
        Slot::Key => "self_attn.k_proj",
        Slot::Value => "self_attn.v_proj",
        Slot::Output => "self_attn.o_proj",
        Slot::QueryNorm => "self_attn.q_norm",
        Slot::KeyNorm => "self_attn.k_norm",
        Slot::PostAttentionNorm => "post_attention_layernorm",
        Slot::MlpNorm if post_norms => "pre_feedforward_layernorm",
        Slot::MlpNorm => "post_attention_layernorm",
        Slot::Gate => "mlp.gate_proj",
        Slot::Up => "mlp.up_proj",
        Slot::Down => "mlp.down_proj",
        Slot::PostMlpNorm => "post_feedforward_layernorm",
    }
}
