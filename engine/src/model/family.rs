//! What the families have in common when a configuration is read.

use std::path::Path;

use headstart_formats::FormatError;
use headstart_formats::gguf::Gguf;
use headstart_formats::hf::HfConfig;

use super::config::{Activation, ModelConfig};
use super::error::LoadError;
use super::rope::{Rope, RopeScaling};
use super::{gemma2, llama, qwen2, qwen3};

/// How one family is recognised and described.
pub(super) struct Family {
    /// Its name.
    pub(super) name: &'static str,
    /// `model_type` in `config.json`.
    pub(super) hf_types: &'static [&'static str],
    /// `general.architecture` in GGUF.
    pub(super) gguf_arch: &'static str,
    /// Q and K rows in GGUF are stored in interleaved rotary order.
    pub(super) gguf_interleaved: bool,
    /// Reads `config.json`.
    pub(super) from_hf: fn(&HfReader<'_>) -> Result<ModelConfig, LoadError>,
    /// Reads GGUF metadata.
    pub(super) from_gguf: fn(&GgufReader<'_>) -> Result<ModelConfig, LoadError>,
}

const FAMILIES: [&Family; 4] = [&llama::FAMILY, &qwen2::FAMILY, &qwen3::FAMILY, &gemma2::FAMILY];

fn supported(names: impl Fn(&Family) -> Vec<&'static str>) -> String {
    FAMILIES.iter().flat_map(|f| names(f)).collect::<Vec<_>>().join(", ")
}

/// The family of a Hugging Face configuration.
pub(super) fn of_hf(config: &HfConfig, path: &Path) -> Result<&'static Family, LoadError> {
    let kind = config.model_type.as_deref().unwrap_or("nothing");
    FAMILIES.into_iter().find(|f| f.hf_types.contains(&kind)).ok_or_else(|| {
        LoadError::unsupported(path, "model_type", kind, supported(|f| f.hf_types.to_vec()))
    })
}

/// The family of a GGUF file.
pub(super) fn of_gguf(gguf: &Gguf) -> Result<&'static Family, LoadError> {
    let arch = gguf.metadata().require_str("general.architecture")?;
    FAMILIES.into_iter().find(|f| f.gguf_arch == arch).ok_or_else(|| {
        let known = supported(|f| vec![f.gguf_arch]);
        LoadError::unsupported(gguf.path(), "general.architecture", arch, known)
    })
}

/// `config.json` with the name of its file.
pub(super) struct HfReader<'a> {
    pub(super) config: &'a HfConfig,
    pub(super) path: &'a Path,
}

impl HfReader<'_> {
    fn require<T>(&self, field: &str, value: Option<T>) -> Result<T, LoadError> {
        value.ok_or_else(|| FormatError::invalid(self.path, field, "a value", "none").into())
    }

    /// The description without the family's own features.
    pub(super) fn decoder(
        &self,
        family: &Family,
        activation: Activation,
    ) -> Result<ModelConfig, LoadError> {
        let c = self.config;
        if c.quantization_config.is_some() {
            let known = "plain F32, F16 and BF16 safetensors, or GGUF";
            return Err(LoadError::unsupported(self.path, "quantization_config", "it", known));
        }
        let hidden_size = self.require("hidden_size", c.hidden_size)?;
        let heads = self.require("num_attention_heads", c.num_attention_heads)?;
        let head_dim = c.head_dim.unwrap_or_else(|| hidden_size.checked_div(heads).unwrap_or(0));
        let layers = self.require("num_hidden_layers", c.num_hidden_layers)?;
        let (name, wanted) = match activation {
            Activation::Silu => (c.hidden_act.as_deref(), "silu"),
            Activation::GeluTanh => {
                (c.hidden_activation.as_deref().or(c.hidden_act.as_deref()), "gelu_pytorch_tanh")
            }
        };
        if name.is_some_and(|name| name != wanted) {
            let found = name.unwrap_or_default();
            return Err(LoadError::unsupported(self.path, "hidden_act", found, wanted));
        }
        Ok(ModelConfig {
            family: family.name,
            vocab_size: self.require("vocab_size", c.vocab_size)?,
            hidden_size,
            intermediate_size: self.require("intermediate_size", c.intermediate_size)?,
            layers,
            heads,
            kv_heads: c.num_key_value_heads.unwrap_or(heads),
            head_dim,
            context_length: self.require("max_position_embeddings", c.max_position_embeddings)?,
            rope: self.rope()?,
            norm_eps: c.rms_norm_eps.unwrap_or(1e-6) as f32,
            norm_offset: false,
            qk_norm: false,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            post_norms: false,
            tied_embeddings: c.tie_word_embeddings.unwrap_or(false),
            activation,
            attention_scale: 1.0 / (head_dim as f32).sqrt(),
            attention_softcap: None,
            logit_softcap: None,
            windows: self.windows(layers, |_| false)?,
            embedding_scale: 1.0,
        })
    }

    fn rope(&self) -> Result<Rope, LoadError> {
        let c = self.config;
        let parameters = c.rope_parameters.clone().or(c.rope_scaling.clone()).unwrap_or_default();
        let partial = parameters.partial_rotary_factor.or(c.partial_rotary_factor).unwrap_or(1.0);
        if partial != 1.0 {
            let found = partial.to_string();
            return Err(LoadError::unsupported(self.path, "partial_rotary_factor", found, "1"));
        }
        let positive = |field: &str, value: Option<f64>| {
            let value = self.require(field, value)?;
            if value.is_finite() && value > 0.0 {
                return Ok(value);
            }
            let found = value.to_string();
            let error = FormatError::invalid(self.path, field, "a positive number", found);
            Err(LoadError::Format(error))
        };
        let factor = || positive("rope factor", parameters.factor);
        let scaling = match parameters.kind() {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: factor()? },
            "llama3" => {
                let low_freq_factor = positive("low_freq_factor", parameters.low_freq_factor)?;
                let high_freq_factor = positive("high_freq_factor", parameters.high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    let found = high_freq_factor.to_string();
                    let expected = "more than low_freq_factor";
                    let error =
                        FormatError::invalid(self.path, "high_freq_factor", expected, found);
                    return Err(error.into());
                }
                RopeScaling::Llama3 {
                    factor: factor()?,
                    low_freq_factor,
                    high_freq_factor,
                    original_context: positive(
                        "original_max_position_embeddings",
                        parameters.original_max_position_embeddings.map(|n| n as f64),
                    )?,
                }
            }
            other => {
                let known = "default, linear, llama3";
                return Err(LoadError::unsupported(self.path, "rope_type", other, known));
            }
        };
        let theta = parameters.rope_theta.or(c.rope_theta).unwrap_or(10_000.0);
        Ok(Rope { theta, scaling })
    }

    /// Windows by `layer_types` where the file has them, else by the family's rule.
    pub(super) fn windows(
        &self,
        layers: usize,
        slides: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<usize>>, LoadError> {
        let window = || self.require("sliding_window", self.config.sliding_window);
        let Some(types) = &self.config.layer_types else {
            // A wrong layer count is refused later; it must not be collected before.
            let layers = layers.min(1 << 16);
            return (0..layers).map(|i| slides(i).then(window).transpose()).collect();
        };
        if types.len() != layers {
            let expected = format!("{layers} entries");
            let found = types.len().to_string();
            return Err(FormatError::invalid(self.path, "layer_types", expected, found).into());
        }
        types
            .iter()
            .map(|kind| match kind.as_str() {
                "full_attention" => Ok(None),
                "sliding_attention" => window().map(Some),
                other => {
                    let known = "full_attention, sliding_attention";
                    Err(LoadError::unsupported(self.path, "layer_types", other, known))
                }
            })
            .collect()
    }
}

/// A GGUF file whose metadata keys begin with its architecture.
pub(super) struct GgufReader<'a> {
    pub(super) gguf: &'a Gguf,
    pub(super) arch: &'static str,
}

impl GgufReader<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    /// An optional size.
    pub(super) fn size(&self, name: &str) -> Result<Option<usize>, LoadError> {
        Ok(self.gguf.metadata().get_u32(&self.key(name))?.map(|n| n as usize))
    }

    fn require_size(&self, name: &str) -> Result<usize, LoadError> {
        Ok(self.gguf.metadata().require_u32(&self.key(name))? as usize)
    }

    /// An optional float.
    pub(super) fn float(&self, name: &str) -> Result<Option<f32>, LoadError> {
        Ok(self.gguf.metadata().get_f32(&self.key(name))?)
    }

    fn has(&self, tensor: &str) -> bool {
        self.gguf.tensor(tensor).is_some()
    }

    /// The description without the family's own features.
    pub(super) fn decoder(
        &self,
        family: &Family,
        activation: Activation,
    ) -> Result<ModelConfig, LoadError> {
        let path = self.gguf.path();
        for (key, most) in [("expert_count", 0), ("split.count", 1)] {
            let key = if key == "expert_count" { self.key(key) } else { key.to_owned() };
            let found = self.gguf.metadata().get_u32(&key)?.unwrap_or(0);
            if found > most {
                let supported = format!("at most {most}");
                return Err(LoadError::unsupported(path, key, found.to_string(), supported));
            }
        }
        let hidden_size = self.require_size("embedding_length")?;
        let heads = self.require_size("attention.head_count")?;
        let head_dim = match self.size("attention.key_length")? {
            Some(size) => size,
            None => hidden_size.checked_div(heads).unwrap_or(0),
        };
        for (name, supported) in
            [("attention.value_length", head_dim), ("rope.dimension_count", head_dim)]
        {
            if let Some(found) = self.size(name)?.filter(|found| *found != supported) {
                let supported = format!("{supported}, the head size");
                return Err(LoadError::unsupported(
                    path,
                    self.key(name),
                    found.to_string(),
                    supported,
                ));
            }
        }
        let embedding = "token_embd.weight";
        let rows = self.gguf.tensor(embedding).map(|t| t.rows());
        let layers = self.require_size("block_count")?;
        Ok(ModelConfig {
            family: family.name,
            vocab_size: rows
                .ok_or_else(|| LoadError::tensor(path, embedding, "a matrix", "nothing"))?,
            hidden_size,
            intermediate_size: self.require_size("feed_forward_length")?,
            layers,
            heads,
            kv_heads: self.size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            context_length: self.require_size("context_length")?,
            rope: self.rope(head_dim)?,
            norm_eps: self
                .gguf
                .metadata()
                .require_f32(&self.key("attention.layer_norm_rms_epsilon"))?,
            norm_offset: false,
            qk_norm: false,
            qkv_bias: self.has("blk.0.attn_q.bias"),
            output_bias: self.has("blk.0.attn_output.bias"),
            mlp_bias: self.has("blk.0.ffn_gate.bias"),
            post_norms: false,
            tied_embeddings: !self.has("output.weight"),
            activation,
            attention_scale: 1.0 / (head_dim as f32).sqrt(),
            attention_softcap: None,
            logit_softcap: None,
            windows: vec![None; layers.min(1 << 16)],
            embedding_scale: 1.0,
        })
    }

    fn rope(&self, head_dim: usize) -> Result<Rope, LoadError> {
        let path = self.gguf.path();
        let theta = f64::from(self.float("rope.freq_base")?.unwrap_or(10_000.0));
        if self.has(FACTORS) {
            return Ok(Rope { theta, scaling: RopeScaling::Factors(self.factors(head_dim)?) });
        }
        let key = self.key("rope.scaling.type");
        let kind = self.gguf.metadata().get_str(&key)?.unwrap_or("none");
        let scaling = match kind {
            "none" => RopeScaling::None,
            "linear" => {
                let factor = self.float("rope.scaling.factor")?.unwrap_or(1.0);
                if factor <= 0.0 {
                    let key = self.key("rope.scaling.factor");
                    return Err(self.gguf.metadata().error(&key, "a positive number").into());
                }
                RopeScaling::Linear { factor: f64::from(factor) }
            }
            other => return Err(LoadError::unsupported(path, key, other, "none, linear")),
        };
        Ok(Rope { theta, scaling })
    }

    fn factors(&self, head_dim: usize) -> Result<Vec<f32>, LoadError> {
        let wanted = head_dim / 2 * 4;
        let mut bytes = Vec::new();
        self.gguf.read(FACTORS, &mut bytes)?;
        let factors: Vec<f32> = bytes
            .chunks_exact(4)
            .filter_map(|b| b.first_chunk().map(|b| f32::from_le_bytes(*b)))
            .collect();
        if bytes.len() != wanted || factors.iter().any(|f| !f.is_finite() || *f <= 0.0) {
            let expected = format!("{} positive F32 values", head_dim / 2);
            let found = format!("{} bytes", bytes.len());
            return Err(LoadError::tensor(self.gguf.path(), FACTORS, expected, found));
        }
        Ok(factors)
    }
}

const FACTORS: &str = "rope_freqs.weight";
