//! What the server itself counted, from its `/metrics`. Only a cluster in one process tells all of
//! it there.

use std::time::Duration;

use serde::Serialize;

use super::sample::Sample;
use crate::bench::client::Client;

const SCRAPE_TIMEOUT: Duration = Duration::from_secs(10);
/// Gauges may be this old.
const GAUGES_SETTLE: Duration = Duration::from_millis(300);
const HANDOFF: &str = "headstart_base_handoff_seconds";

/// The base's counters since its start.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Counters {
    extended: f64,
    reused: f64,
    cut: f64,
    /// Upper bounds of the handoff histogram, with the samples up to each.
    handoffs: Vec<(f64, f64)>,
}

/// Every token that the base computed, and what it was. If nothing was computed twice, the first is
/// the sum of the others.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Computed {
    /// Tokens that went through the model.
    pub(super) extended: u64,
    /// Tokens of the prompts, less those whose KV the prefix cache had.
    pub(super) prompt: u64,
    /// Tokens of prompts and drafts that the prefix cache had.
    pub(super) reused: u64,
    /// Draft tokens that were kept.
    pub(super) kept: u64,
    /// Tokens that the base wrote, less the last of each answer that ended at its limit: nothing
    /// comes after it, so it never goes through the model.
    pub(super) continued: u64,
    /// Draft tokens that were computed and then cut by a switch.
    pub(super) cut: u64,
    /// What is left: 0 unless something was computed twice, or a client left, or text after a stop
    /// string was written.
    pub(super) beyond: i64,
}

impl Counters {
    /// Asks the server at `address`; `None` if it does not tell.
    pub(super) async fn scrape(address: &str) -> Option<Self> {
        tokio::time::sleep(GAUGES_SETTLE).await;
        let text = Client::new(address).get("/metrics", SCRAPE_TIMEOUT).await.ok()?;
        Self::parse(&String::from_utf8_lossy(&text))
    }

    fn parse(text: &str) -> Option<Self> {
        let value = |name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        };
        let bucket = |line: &str| {
            let rest = line.strip_prefix(HANDOFF)?.strip_prefix("_bucket{le=\"")?;
            let (bound, count) = rest.split_once("\"} ")?;
            let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse().ok()? };
            Some((bound, count.trim().parse().ok()?))
        };
        Some(Self {
            extended: value("headstart_base_tokens_extended")?,
            reused: value("headstart_base_tokens_reused")?,
            cut: value("headstart_base_tokens_cut")?,
            handoffs: text.lines().filter_map(bucket).collect(),
        })
    }

    /// What was computed from `self` until `later`, which must be for `samples`.
    pub(super) fn until(&self, later: &Self, samples: &[Sample]) -> Computed {
        #[allow(clippy::cast_possible_truncation)] // counts, which fit
        let rounded = |value: f64| value.round() as i64;
        let (extended, reused) =
            (rounded(later.extended - self.extended), rounded(later.reused - self.reused));
        let cut = rounded(later.cut - self.cut);
        let sum = |count: &dyn Fn(&Sample) -> u32| -> i64 {
            samples.iter().map(|sample| i64::from(count(sample))).sum()
        };
        let kept_of = |sample: &Sample| sample.draft.map_or(0, |draft| draft.kept_tokens);
        let kept = sum(&kept_of);
        let prompt = sum(&|sample| sample.prompt_tokens) - reused;
        let at_limit = |sample: &Sample| sample.finish_reason.as_deref() == Some("length");
        let written = sum(&|sample| sample.completion_tokens.saturating_sub(kept_of(sample)));
        let continued = written - sum(&|sample| u32::from(at_limit(sample)));
        let count = |value: i64| u64::try_from(value).unwrap_or(0);
        Computed {
            extended: count(extended),
            prompt: count(prompt),
            reused: count(reused),
            kept: count(kept),
            continued: count(continued),
            cut: count(cut),
            beyond: extended - (prompt + kept + continued + cut),
        }
    }

    /// Median seconds from the decision on a draft to the base's first token, within the histogram's
    /// buckets.
    pub(super) fn handoff_median(&self, later: &Self) -> Option<f64> {
        let before = |bound: f64| {
            self.handoffs.iter().find(|(other, _)| *other == bound).map_or(0.0, |(_, count)| *count)
        };
        let grown: Vec<(f64, f64)> =
            later.handoffs.iter().map(|&(bound, count)| (bound, count - before(bound))).collect();
        let half = grown.last().map(|(_, count)| count / 2.0).filter(|half| *half > 0.0)?;
        let mut lower = (0.0, 0.0);
        for &(bound, count) in &grown {
            if count >= half {
                if bound.is_infinite() {
                    return Some(lower.0);
                }
                let part = (half - lower.1) / (count - lower.1).max(f64::MIN_POSITIVE);
                return Some(lower.0 + (bound - lower.0) * part);
            }
            lower = (bound, count);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::Draft;
    use super::*;

    const TEXT: &str = "# HELP headstart_base_tokens_extended x\n\
        headstart_base_tokens_extended 110\nheadstart_base_tokens_reused 16\n\
        headstart_base_tokens_cut 3\nheadstart_base_handoff_seconds_bucket{le=\"0.001\"} 4\n\
        headstart_base_handoff_seconds_bucket{le=\"0.003\"} 8\n\
        headstart_base_handoff_seconds_bucket{le=\"+Inf\"} 8\n";

    fn sample(prompt: u32, kept: u32, completion: u32, finish: &str) -> Sample {
        let draft = Draft { switched: true, drafted_tokens: kept + 2, kept_tokens: kept };
        Sample {
            prompt_tokens: prompt,
            completion_tokens: completion,
            finish_reason: Some(finish.to_owned()),
            draft: Some(draft),
            ..Sample::default()
        }
    }

    #[test]
    fn what_is_computed_adds_up() {
        let (before, after) = (Counters::default(), Counters::parse(TEXT).unwrap());
        // 66 of the prompts, 16 of them found; 10 kept; 48 written, the last of one not extended.
        let samples = [sample(30, 6, 40, "length"), sample(36, 4, 18, "stop")];
        let computed = before.until(&after, &samples);
        let expected = Computed {
            extended: 110,
            prompt: 50,
            reused: 16,
            kept: 10,
            continued: 47,
            cut: 3,
            beyond: 0,
        };
        assert_eq!(computed, expected);
        assert_eq!(before.handoff_median(&after), Some(0.001));
        assert_eq!(before.until(&after, &samples[..1]).beyond, 110 - (14 + 6 + 33 + 3));
        assert_eq!(after.handoff_median(&after), None);
        assert_eq!(Counters::parse("up 1\n"), None);
    }
}
