//! Rotary position embedding (Su et al., arXiv 2104.09864), rotate-half order.

use std::f64::consts::TAU;

/// The rotation of queries and keys.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The base of the frequencies.
    pub theta: f64,
    /// How they are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// Stretching of rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// All frequencies divided by a factor (arXiv 2306.15595).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Low frequencies divided, high ones kept, those between blended (Llama 3.1; transformers
    /// `modeling_rope_utils.py`).
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Below this many turns in the original context a frequency is low.
        low_freq_factor: f64,
        /// Above this many it is high.
        high_freq_factor: f64,
        /// The context length before stretching.
        original_context: f64,
    },
    /// A divisor for each frequency (GGUF tensor `rope_freqs.weight`).
    Factors(Vec<f32>),
}

impl Rope {
    /// Radians a position turns each pair of dimensions, `head_dim / 2` of them.
    #[must_use]
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|i| {
                let plain = self.theta.powf(-((2 * i) as f64) / head_dim as f64);
                let stretched = match &self.scaling {
                    RopeScaling::None => plain,
                    RopeScaling::Linear { factor } => plain / factor,
                    RopeScaling::Factors(factors) => {
                        plain / factors.get(i).map_or(1.0, |f| f64::from(*f))
                    }
                    RopeScaling::Llama3 {
                        factor,
                        low_freq_factor,
                        high_freq_factor,
                        original_context,
                    } => {
                        let turns = original_context * plain / TAU;
                        let blend =
                            (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        // 0: stretched fully; 1: as trained.
                        let blend = blend.clamp(0.0, 1.0);
                        (1.0 - blend) * plain / factor + blend * plain
                    }
                };
                stretched as f32
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(scaling: RopeScaling) -> Vec<f32> {
        Rope { theta: 10_000.0, scaling }.inverse_frequencies(8)
    }

    #[test]
    fn the_stretchings_divide_what_they_should() {
        assert_eq!(frequencies(RopeScaling::None), [1.0, 0.1, 0.01, 0.001]);
        assert_eq!(
            frequencies(RopeScaling::Linear { factor: 4.0 }),
            [0.25, 0.025, 0.0025, 0.000_25]
        );
        assert_eq!(frequencies(RopeScaling::Factors(vec![1.0, 2.0])), [1.0, 0.05, 0.01, 0.001]);
        let llama3 = frequencies(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 100.0,
        });
        // 100 positions turn the first pair 15.9 times, the second 1.59, the third 0.159.
        assert_eq!((llama3[0], llama3[2], llama3[3]), (1.0, 0.01 / 8.0, 0.001 / 8.0));
        let blend = (100.0 * 0.1 / TAU - 1.0) / 3.0;
        let expected = (1.0 - blend) * 0.1 / 8.0 + blend * 0.1;
        assert!((f64::from(llama3[1]) - expected).abs() < 1e-8);
    }
}
