//! Choosing the next token, reproducibly.
//!
//! Randomness comes from a counter-based generator keyed by `(seed, position)`: a request that is
//! replayed, or moved to another node, draws the same numbers. Greedy is an exact argmax with the
//! lowest id on ties.

use std::cmp::Ordering;

use crate::executor::TokenId;

/// How the next token is chosen. The order of operations is: penalties, temperature, `min_p`,
/// `top_k`, `top_p`, draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// `0` is greedy.
    pub temperature: f32,
    /// Keeps the fewest most likely tokens whose probabilities reach this sum; `1` keeps all.
    pub top_p: f32,
    /// Keeps so many most likely tokens; `0` keeps all.
    pub top_k: usize,
    /// Keeps tokens at least this fraction as likely as the likeliest; `0` keeps all.
    pub min_p: f32,
    /// The generator's key, together with the position.
    pub seed: u64,
    /// Taken from the logit of each token that the answer has.
    pub presence_penalty: f32,
    /// Taken from the logit of a token once for each time the answer has it.
    pub frequency_penalty: f32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
        }
    }
}

impl Sampling {
    /// Whether the raw argmax is the answer, so that the logits need no second look.
    #[must_use]
    pub fn is_plain_greedy(&self) -> bool {
        self.temperature == 0.0 && !self.has_penalties()
    }

    /// Whether the tokens of the answer so far have a say.
    #[must_use]
    pub fn has_penalties(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// Buffers that [`sample`] reuses from call to call.
#[derive(Debug, Default)]
pub struct Scratch {
    history: Vec<TokenId>,
    candidates: Vec<(f32, TokenId)>,
}

/// Chooses the token at `position` of the answer.
///
/// `logits` is one row of `[vocab]`, free of NaN, and is overwritten; `history` is the answer so
/// far (for penalties).
pub fn sample(
    logits: &mut [f32],
    history: &[TokenId],
    position: usize,
    sampling: &Sampling,
    scratch: &mut Scratch,
) -> TokenId {
    if sampling.has_penalties() {
        penalise(logits, history, sampling, &mut scratch.history);
    }
    if sampling.temperature == 0.0 {
        return argmax(logits);
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        return argmax(logits);
    }
    // From here on a logit is a natural-log weight relative to the likeliest token's.
    for logit in logits.iter_mut() {
        *logit = (*logit - max) / sampling.temperature;
    }
    let uniform = uniform(sampling.seed, position);
    if sampling.top_p >= 1.0 && sampling.top_k == 0 && sampling.min_p <= 0.0 {
        let weights = logits.iter().enumerate().map(|(id, &weight)| (weight, id as TokenId));
        return draw(weights, uniform);
    }
    let candidates = &mut scratch.candidates;
    candidates.clear();
    let floor = if sampling.min_p > 0.0 { sampling.min_p.ln() } else { f32::NEG_INFINITY };
    candidates.extend(
        logits
            .iter()
            .enumerate()
            .filter(|&(_, &weight)| weight >= floor)
            .map(|(id, &weight)| (weight, id as TokenId)),
    );
    if sampling.top_k > 0 && sampling.top_k < candidates.len() {
        candidates.select_nth_unstable_by(sampling.top_k - 1, likelier_first);
        candidates.truncate(sampling.top_k);
    }
    if sampling.top_p < 1.0 {
        keep_top_p(candidates, sampling.top_p);
    }
    // An order that does not depend on how the candidates were selected.
    candidates.sort_unstable_by_key(|&(_, id)| id);
    draw(candidates.iter().copied(), uniform)
}

/// The index of the greatest logit, the lowest one on ties.
#[must_use]
pub fn argmax(logits: &[f32]) -> TokenId {
    let mut best = 0;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = id;
        }
    }
    best as TokenId
}

fn penalise(
    logits: &mut [f32],
    history: &[TokenId],
    sampling: &Sampling,
    sorted: &mut Vec<TokenId>,
) {
    sorted.clear();
    sorted.extend_from_slice(history);
    sorted.sort_unstable();
    for run in sorted.chunk_by(PartialEq::eq) {
        if let Some(logit) = logits.get_mut(run[0] as usize) {
            *logit -= sampling.presence_penalty + sampling.frequency_penalty * run.len() as f32;
        }
    }
}

fn likelier_first(a: &(f32, TokenId), b: &(f32, TokenId)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// Keeps the fewest likeliest candidates that hold `top_p` of the probability.
fn keep_top_p(candidates: &mut Vec<(f32, TokenId)>, top_p: f32) {
    let total: f64 = candidates.iter().map(|&(weight, _)| f64::from(weight).exp()).sum();
    let wanted = total * f64::from(top_p);
    let mut sorted = 0;
    let mut mass = 0.0;
    let mut step = 256;
    // Sorts only as far as the nucleus goes: it is nearly always a few dozen tokens.
    loop {
        let end = (sorted + step).min(candidates.len());
        if end < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(end - sorted - 1, likelier_first);
        }
        candidates[sorted..end].sort_unstable_by(likelier_first);
        for index in sorted..end {
            mass += f64::from(candidates[index].0).exp();
            if mass >= wanted {
                candidates.truncate(index + 1);
                return;
            }
        }
        if end == candidates.len() {
            return;
        }
        sorted = end;
        step *= 4;
    }
}

/// Draws by inverting the cumulative distribution of `(ln weight, id)` in the order given.
fn draw(weights: impl Iterator<Item = (f32, TokenId)> + Clone, uniform: f64) -> TokenId {
    let total: f64 = weights.clone().map(|(weight, _)| f64::from(weight).exp()).sum();
    let mut left = uniform * total;
    let mut last = 0;
    for (weight, id) in weights {
        let weight = f64::from(weight).exp();
        if weight > 0.0 {
            last = id;
            left -= weight;
            if left < 0.0 {
                break;
            }
        }
    }
    last
}

/// A number in `[0, 1)` that depends on nothing but its key: two rounds of the SplitMix64 output
/// function (Steele, Lea, Flood, OOPSLA 2014).
fn uniform(seed: u64, position: usize) -> f64 {
    let key = mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15));
    let bits = mix(key ^ (position as u64).wrapping_mul(0xd134_2543_de82_ef95));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn once(logits: &[f32], history: &[TokenId], position: usize, sampling: &Sampling) -> TokenId {
        sample(&mut logits.to_vec(), history, position, sampling, &mut Scratch::default())
    }

    fn counts(logits: &[f32], sampling: &Sampling, draws: usize) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        for position in 0..draws {
            counts[once(logits, &[], position, sampling) as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_lowest_id_on_ties() {
        assert_eq!(once(&[1.0, 3.0, 3.0], &[], 0, &Sampling::default()), 1);
    }

    #[test]
    fn penalties_count_the_answer() {
        let logits = [2.0, 1.5, 1.0];
        let presence = Sampling { presence_penalty: 0.6, ..Sampling::default() };
        assert_eq!(once(&logits, &[0, 0], 0, &presence), 1);
        let frequency = Sampling { frequency_penalty: 0.3, ..Sampling::default() };
        assert_eq!(once(&logits, &[0], 0, &frequency), 0);
        assert_eq!(once(&logits, &[0, 0], 0, &frequency), 1);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
        let sampling = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
        let counts = counts(&logits, &sampling, 20_000);
        for (count, expected) in counts.iter().zip([10_000.0, 6_000.0, 4_000.0]) {
            let deviation = (*count as f64 - expected).abs();
            assert!(deviation < 5.0 * f64::sqrt(expected), "{counts:?}");
        }
    }

    #[test]
    fn filters_keep_what_they_say() {
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.15f32.ln(), 0.05f32.ln()];
        let base = Sampling { temperature: 1.0, ..Sampling::default() };
        let cases = [
            (Sampling { top_k: 2, ..base.clone() }, 2),
            (Sampling { top_p: 0.5, ..base.clone() }, 1),
            (Sampling { top_p: 0.81, ..base.clone() }, 3),
            (Sampling { min_p: 0.2, ..base.clone() }, 3),
            (Sampling { top_k: 3, top_p: 0.6, ..base.clone() }, 2),
            (Sampling { top_k: 9, top_p: 1.0, min_p: 0.0, ..base }, 4),
        ];
        for (sampling, kept) in cases {
            let counts = counts(&logits, &sampling, 2_000);
            assert!(counts[..kept].iter().all(|&c| c > 0), "{sampling:?} {counts:?}");
            assert!(counts[kept..].iter().all(|&c| c == 0), "{sampling:?} {counts:?}");
        }
    }

    #[test]
    fn a_flat_distribution_survives_top_p() {
        let logits = vec![0.0; 5_000];
        let sampling = Sampling { temperature: 1.0, top_p: 0.9, ..Sampling::default() };
        assert!((0..200).all(|p| once(&logits, &[], p, &sampling) < 4_501));
    }

    proptest! {
        #[test]
        fn the_same_key_draws_the_same_token(
            logits in prop::collection::vec(-8f32..8.0, 2..300),
            seed: u64,
            position in 0usize..10_000,
            top_p in 0.05f32..1.0,
            top_k in 0usize..40,
        ) {
            let sampling = Sampling { temperature: 0.8, top_p, top_k, seed, ..Sampling::default() };
            let token = once(&logits, &[], position, &sampling);
            prop_assert!((token as usize) < logits.len());
            prop_assert_eq!(token, once(&logits, &[], position, &sampling));
        }
    }
}
