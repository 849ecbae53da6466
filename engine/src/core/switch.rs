//! The switch rule of Weak-to-Strong Decoding (Song et al., arXiv 2506.07434, "auto-switch").

use std::collections::VecDeque;

/// Finds the switch index of a draft, one log-probability at a time.
///
/// With `p_i` the base's probability of draft token `i`, a window `w` and a threshold `γ`, the
/// switch index is the least `i ≥ w-1` whose window mean reaches the threshold:
/// `(ln p_{i-w+1} + … + ln p_i) / w ≥ ln γ`. A probability of zero is `-inf` and keeps every window
/// that it lies in below any threshold.
#[derive(Clone, Debug)]
pub struct SwitchRule {
    window: usize,
    ln_threshold: f64,
    recent: VecDeque<f64>,
    scored: usize,
    floor: usize,
    switch: Option<usize>,
}

impl SwitchRule {
    /// A rule with `window ≥ 1` tokens and a threshold in `(0, 1]`.
    #[must_use]
    pub fn new(window: usize, threshold: f64) -> Self {
        Self {
            window: window.max(1),
            ln_threshold: threshold.ln(),
            recent: VecDeque::new(),
            scored: 0,
            floor: 0,
            switch: None,
        }
    }

    /// A rule for a draft whose first `accepted` tokens are out already: none of them is taken back,
    /// so no window that ends before the last of them switches, whatever its scores are here.
    #[must_use]
    pub fn with_accepted(mut self, accepted: usize) -> Self {
        self.floor = accepted.saturating_sub(1);
        self
    }

    /// Takes the log-probability of the next draft token. Returns whether the draft switches there.
    /// After a switch nothing more is taken.
    pub fn push(&mut self, logprob: f32) -> bool {
        if self.switch.is_some() {
            return false;
        }
        if self.recent.len() == self.window {
            self.recent.pop_front();
        }
        self.recent.push_back(f64::from(logprob));
        let index = self.scored;
        self.scored += 1;
        // The sum is taken anew each time: a running sum would never recover from a `-inf`.
        let reached = index >= self.floor
            && self.recent.len() == self.window
            && self.recent.iter().sum::<f64>() / self.window as f64 >= self.ln_threshold;
        if reached {
            self.switch = Some(index);
        }
        reached
    }

    /// Draft tokens scored so far.
    #[must_use]
    pub fn scored(&self) -> usize {
        self.scored
    }

    /// The switch index, once it is known.
    #[must_use]
    pub fn switch(&self) -> Option<usize> {
        self.switch
    }
}

/// How many of `received` draft tokens belong to the answer for certain.
///
/// Token `i` belongs to it iff no window that ends before `i` reached the threshold, so the first
/// `window` tokens are certain unseen, and each score makes one more certain.
/// `kept` is the decided length of the draft, once it is decided.
#[must_use]
pub fn certain_tokens(window: usize, received: usize, scored: usize, kept: Option<usize>) -> usize {
    match kept {
        Some(kept) => kept.min(received),
        None => received.min(window.max(scored + 1)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn brute_force(logprobs: &[f32], window: usize, threshold: f64) -> Option<usize> {
        (0..logprobs.len()).find(|&i| {
            i + 1 >= window && {
                let p: f64 =
                    logprobs[i + 1 - window..=i].iter().map(|&l| f64::from(l).exp()).product();
                p > 0.0 && p.ln() / window as f64 >= threshold.ln() - 1e-12
            }
        })
    }

    fn switch_of(logprobs: &[f32], window: usize, threshold: f64) -> Option<usize> {
        let mut rule = SwitchRule::new(window, threshold);
        for &logprob in logprobs {
            rule.push(logprob);
        }
        rule.switch()
    }

    #[test]
    fn table() {
        let ln = |p: f32| p.ln();
        let cases: &[(&[f32], usize, f64, Option<usize>)] = &[
            (&[], 1, 0.8, None),
            (&[0.0], 1, 1.0, Some(0)),
            (&[0.0, 0.0], 3, 0.1, None),
            (&[ln(0.9), ln(0.9)], 2, 0.8, Some(1)),
            (&[ln(0.1), ln(0.9), ln(0.9)], 2, 0.8, Some(2)),
            (&[f32::NEG_INFINITY, 0.0, 0.0], 2, 0.8, Some(2)),
            (&[f32::NEG_INFINITY; 4], 2, 1e-30, None),
        ];
        for (logprobs, window, threshold, expected) in cases {
            assert_eq!(switch_of(logprobs, *window, *threshold), *expected, "{logprobs:?}");
        }
    }

    #[test]
    fn nothing_is_taken_after_the_switch() {
        let mut rule = SwitchRule::new(1, 0.5);
        assert!(rule.push(0.0));
        assert!(!rule.push(0.0));
        assert_eq!((rule.switch(), rule.scored()), (Some(0), 1));
    }

    #[test]
    fn accepted_tokens_are_not_taken_back() {
        for (accepted, expected) in [(0, 1), (1, 1), (2, 1), (3, 2), (5, 4)] {
            let mut rule = SwitchRule::new(2, 0.5).with_accepted(accepted);
            (0..6).for_each(|_| {
                rule.push(0.0);
            });
            assert_eq!(rule.switch(), Some(expected), "{accepted} accepted");
        }
    }

    proptest! {
        #[test]
        fn equals_brute_force(
            logprobs in prop::collection::vec(
                prop_oneof![4 => -0.6f32..0.0, 1 => -9f32..0.0, 1 => Just(f32::NEG_INFINITY), 1 => Just(0.0)],
                0..60,
            ),
            window in 1usize..9,
            threshold in 0.01f64..1.0,
        ) {
            prop_assert_eq!(
                switch_of(&logprobs, window, threshold),
                brute_force(&logprobs, window, threshold)
            );
        }

        /// A token is called certain exactly when the finished rule keeps it, whatever comes later.
        #[test]
        fn certain_tokens_are_never_taken_back(
            logprobs in prop::collection::vec(prop_oneof![-0.3f32..0.0, -4f32..0.0], 1..40),
            window in 1usize..7,
        ) {
            let kept = switch_of(&logprobs, window, 0.8).map_or(logprobs.len(), |k| k + 1);
            let mut rule = SwitchRule::new(window, 0.8);
            for scored in 0..=logprobs.len() {
                let decided = rule.switch().map(|k| k + 1);
                let certain = certain_tokens(window, logprobs.len(), scored, decided);
                prop_assert!(certain <= kept.max(window.min(logprobs.len())));
                if scored + 1 >= window && decided.is_none() {
                    // No more could have been released: a window may end at any later token.
                    prop_assert_eq!(certain, (scored + 1).min(logprobs.len()));
                }
                if decided.is_some() {
                    prop_assert_eq!(certain, kept);
                    break;
                }
                if let Some(&next) = logprobs.get(scored) {
                    rule.push(next);
                }
            }
        }
    }
}
