//! One distribution beside another.

use serde::Serialize;

/// How close distributions are to the reference.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Closeness {
    /// The mean of KL(reference ‖ other), natural log.
    pub(super) kl_mean: f64,
    /// The share of positions where both have the same likeliest token.
    pub(super) same_top: f64,
}

/// Adds positions up.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    positions: u64,
    kl_sum: f64,
    same_top: u64,
}

impl Tally {
    /// Takes the natural-log probabilities of one position: the reference's and the other's.
    pub(super) fn push(&mut self, reference: &[f32], other: &[f32]) {
        self.positions += 1;
        self.kl_sum += kl_divergence(reference, other);
        self.same_top += u64::from(likeliest(reference) == likeliest(other));
    }

    /// The means. NaN without a position.
    pub(super) fn closeness(self) -> Closeness {
        let positions = self.positions as f64;
        Closeness { kl_mean: self.kl_sum / positions, same_top: self.same_top as f64 / positions }
    }
}

/// Σ p (ln p − ln q), in f64. What has no probability in the reference adds nothing.
fn kl_divergence(reference: &[f32], other: &[f32]) -> f64 {
    let pairs = reference.iter().zip(other).filter(|(p, _)| p.is_finite());
    pairs
        .map(|(&p, &q)| {
            let (p, q) = (f64::from(p), f64::from(q));
            p.exp() * (p - q)
        })
        .sum()
}

/// The lowest of the likeliest tokens.
fn likeliest(logprobs: &[f32]) -> Option<usize> {
    let better = |best: Option<usize>, at: usize| match best {
        Some(best) if logprobs[best] >= logprobs[at] => Some(best),
        _ => Some(at),
    };
    (0..logprobs.len()).fold(None, better)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergences_by_hand() {
        let ln = |p: [f32; 3]| p.map(f32::ln);
        let (p, q) = (ln([0.5, 0.25, 0.25]), ln([0.25, 0.5, 0.25]));
        let expected = 0.5 * 2f64.ln() - 0.25 * 2f64.ln();
        assert!((kl_divergence(&p, &q) - expected).abs() < 1e-6);
        assert_eq!(kl_divergence(&p, &p), 0.0);
        let certain = ln([1.0, 0.0, 0.0]);
        assert!((kl_divergence(&certain, &q) - 4f64.ln()).abs() < 1e-6);
    }

    #[test]
    fn means_and_tops() {
        let mut tally = Tally::default();
        let (p, q) = ([-1.0, -2.0], [-2.0, -1.0]);
        tally.push(&p, &p);
        tally.push(&p, &q);
        let closeness = tally.closeness();
        assert_eq!(closeness.same_top, 0.5);
        assert!((closeness.kl_mean - kl_divergence(&p, &q) / 2.0).abs() < 1e-12);
        assert_eq!(likeliest(&[-1.0, -1.0]), Some(0), "the lowest id wins");
    }
}
