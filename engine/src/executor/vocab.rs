//! One answer of what ranks found, each in its part of the vocabulary.

use headstart_kernels::VocabStats;

use super::TokenId;

/// Facts of the whole row of logits, from those of its parts in the order of the ranks. One part
/// keeps its bits. Nothing is likely where there are no parts.
pub(super) fn join_stats(parts: impl IntoIterator<Item = VocabStats>) -> VocabStats {
    let mut parts = parts.into_iter();
    let none = VocabStats { argmax: 0, max: f32::NEG_INFINITY, log_sum_exp: f32::NEG_INFINITY };
    let mut all = parts.next().unwrap_or(none);
    for VocabStats { argmax, max, log_sum_exp } in parts {
        // Later ranks hold higher ids: only a greater logit wins.
        if max > all.max {
            (all.argmax, all.max) = (argmax, max);
        }
        // `min` and `max` would drop a NaN, and with it that the model's logits are not finite.
        let pair = (all.log_sum_exp, log_sum_exp);
        let (low, high) = if pair.0 < pair.1 { pair } else { (pair.1, pair.0) };
        all.log_sum_exp = high + (low - high).exp().ln_1p();
    }
    all
}

/// The `count` likeliest tokens with their logits, likeliest first, of those that are the likeliest
/// in each part.
pub(super) fn join_top(
    parts: impl IntoIterator<Item = Vec<(TokenId, f32)>>,
    count: usize,
) -> Vec<(TokenId, f32)> {
    let mut top: Vec<(TokenId, f32)> = parts.into_iter().flatten().collect();
    top.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    top.truncate(count);
    top
}

#[cfg(test)]
mod tests {
    use headstart_kernels::{top_n, vocab_stats};

    use super::*;

    #[test]
    fn parts_make_the_whole() {
        let row = [1.5, -2.0, 4.0, 4.0, f32::NEG_INFINITY, 3.0, 4.0, 0.0];
        let whole = vocab_stats(&row);
        for cuts in [&[0, 8][..], &[0, 3, 8], &[0, 1, 2, 4, 8], &[0, 4, 5, 8]] {
            let parts = || cuts.windows(2).map(|cut| (cut[0], &row[cut[0]..cut[1]]));
            let found = join_stats(parts().map(|(start, part)| {
                let stats = vocab_stats(part);
                VocabStats { argmax: stats.argmax + start as u32, ..stats }
            }));
            assert_eq!((found.argmax, found.max), (2, 4.0), "{cuts:?}");
            assert!((found.log_sum_exp - whole.log_sum_exp).abs() < 1e-6, "{cuts:?}");
            for count in 0..9 {
                let named = |(start, part): (usize, &[f32])| -> Vec<(TokenId, f32)> {
                    let top = top_n(part, count).into_iter();
                    top.map(|(token, logit)| (token + start as u32, logit)).collect()
                };
                let top = join_top(parts().map(named), count);
                assert_eq!(top, top_n(&row, count), "{cuts:?} {count}");
            }
        }
        let nan = VocabStats { argmax: 0, max: 1.0, log_sum_exp: f32::NAN };
        for parts in [[nan, whole, whole], [whole, nan, whole], [whole, whole, nan]] {
            assert!(!join_stats(parts).log_sum_exp.is_finite(), "a part that is not finite shows");
        }
    }
}
