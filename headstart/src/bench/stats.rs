//! Samples in few words.

use serde::Serialize;

/// The median and the spread of some samples.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Summary {
    /// The middle sample, or the mean of the two in the middle.
    pub(super) median: f64,
    /// The smallest sample.
    pub(super) min: f64,
    /// The largest sample.
    pub(super) max: f64,
    /// All of them, in the order they were taken.
    pub(super) samples: Vec<f64>,
}

impl Summary {
    /// Sums up `samples`; `None` without any.
    pub(super) fn of(samples: Vec<f64>) -> Option<Self> {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        };
        Some(Self { median, min, max, samples })
    }
}

/// The middle of `samples`, which are sorted; NaN without any.
pub(super) fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    quantile(samples, 0.5)
}

/// The quantile `q` in 0..=1 of ascending samples, between the two nearest; NaN without any.
pub(super) fn quantile(ascending: &[f64], q: f64) -> f64 {
    let Some(last) = ascending.len().checked_sub(1) else { return f64::NAN };
    let place = q.clamp(0.0, 1.0) * last as f64;
    let low = place.floor();
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // within 0..=last
    let at = low as usize;
    let (a, b) = (ascending[at], ascending[(at + 1).min(last)]);
    a + (b - a) * (place - low)
}

/// A figure with as many digits as it deserves: `1537`, `318.4`, `35.21`, `0.872`.
pub(super) fn figure(value: f64) -> String {
    match value.abs() {
        v if v >= 999.95 => format!("{value:.0}"),
        v if v >= 99.995 => format!("{value:.1}"),
        v if v >= 9.9995 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one() {
        let summary = Summary::of(vec![5.0, 1.0, 9.0]).unwrap();
        assert_eq!((summary.median, summary.min, summary.max), (5.0, 1.0, 9.0));
        assert_eq!(summary.samples, [5.0, 1.0, 9.0]);
        assert_eq!(Summary::of(vec![4.0, 1.0, 9.0, 2.0]).unwrap().median, 3.0);
        assert_eq!(Summary::of(vec![7.0]).unwrap().median, 7.0);
        assert_eq!(Summary::of(Vec::new()), None);
    }

    #[test]
    fn figures_keep_four_digits() {
        let figures = [1537.2, 999.97, 318.44, 35.208, 0.87249, 9.9999];
        let expected = ["1537", "1000", "318.4", "35.21", "0.872", "10.00"];
        assert_eq!(figures.map(figure), expected);
    }
}
