//! Move or recompute: how long pages that are still on their way are worth waiting for.

use std::time::Duration;

/// What was measured lately; zero: nothing yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Of the link that the pages come over.
    pub link_bytes_per_second: u64,
    /// Of the engine that would compute them anew.
    pub prefill_tokens_per_second: u64,
}

/// What a link is taken for until it is measured: a tenth of a gigabyte a second, 1 Gbit/s Ethernet.
const LINK_BYTES_PER_SECOND: u64 = 100 << 20;
/// What an engine is taken for until it is measured.
const PREFILL_TOKENS_PER_SECOND: u64 = 1_000;

/// How long to wait for the KV of `missing_tokens`, `token_bytes` each, that are on their way. Zero:
/// computing them is faster. Otherwise it is worth as long as computing them takes: then one would
/// be where one would have been without waiting.
#[must_use]
pub fn patience(missing_tokens: usize, token_bytes: usize, rates: Rates) -> Duration {
    let or = |rate: u64, default: u64| if rate == 0 { default } else { rate };
    let link = or(rates.link_bytes_per_second, LINK_BYTES_PER_SECOND);
    let prefill = or(rates.prefill_tokens_per_second, PREFILL_TOKENS_PER_SECOND);
    let bytes = missing_tokens as f64 * token_bytes as f64;
    let moving = bytes / link as f64;
    let computing = missing_tokens as f64 / prefill as f64;
    if moving < computing {
        Duration::try_from_secs_f64(computing).unwrap_or(Duration::MAX)
    } else {
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of `missing_tokens token_bytes link_bytes_per_second prefill_tokens_per_second ms`.
    #[test]
    fn table() {
        let table = include_str!("testdata/rates.txt");
        let lines = table.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        let mut cases = 0;
        for line in lines {
            let numbers: Vec<u64> =
                line.split_whitespace().map(|word| word.parse().expect("a number")).collect();
            let [missing, token_bytes, link, prefill, ms] = numbers[..] else { panic!("{line}") };
            let rates = Rates { link_bytes_per_second: link, prefill_tokens_per_second: prefill };
            let patience = patience(missing as usize, token_bytes as usize, rates);
            assert_eq!(patience.as_millis(), u128::from(ms), "{line}");
            cases += 1;
        }
        assert!(cases > 8);
    }
}
