//! What was measured, for people and for programs.

use std::collections::BTreeMap;

use anstyle::{AnsiColor, Style};
use serde::Serialize;

use super::counters::Computed;
use super::sample::Sample;
use crate::bench::stats::{figure, median, quantile};
use crate::bench::table::{Cell, render};

const HEADING: Style = Style::new().bold();
const ASIDE: Style = Style::new().dimmed();
const AHEAD: Style = AnsiColor::Green.on_default().bold();
const BEHIND: Style = AnsiColor::Yellow.on_default().bold();
/// What the design allows: TTFT over the drafter's alone, and a handoff in the base's steps.
const TTFT_RATIO_MAX: f64 = 1.1;
const HANDOFF_STEPS_MAX: f64 = 1.5;

/// Everything that `headstart bench serve` found out.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    /// Headstart's version.
    pub(super) version: &'static str,
    /// The server, or the models of the cluster that was started.
    pub(super) target: String,
    /// The model's name.
    pub(super) model: String,
    /// How requests were sent.
    pub(super) load: String,
    /// How long it took, in seconds.
    pub(super) seconds: f64,
    /// What came of it.
    pub(super) summary: Digest,
    /// The same prompts to the drafter alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) alone: Option<Digest>,
    /// What the base computed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) computed: Option<Computed>,
    /// Median seconds from the decision on a draft to the base's first token, as the base counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) handoff: Option<f64>,
    /// Every request.
    pub(super) samples: Vec<Sample>,
}

/// Many requests in few numbers. Times are in seconds.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Digest {
    /// Requests that were answered.
    pub(super) answered: usize,
    /// Requests that were not, by why.
    pub(super) errors: BTreeMap<String, usize>,
    /// Answers a second.
    pub(super) requests_per_second: f64,
    /// Tokens of answers a second.
    pub(super) tokens_per_second: f64,
    /// Tokens of prompts.
    pub(super) prompt_tokens: u64,
    /// Tokens of answers.
    pub(super) completion_tokens: u64,
    /// Events with text.
    pub(super) events: u64,
    /// Time to the first text.
    pub(super) ttft: Option<Spread>,
    /// Between tokens.
    pub(super) itl: Option<Spread>,
    /// From a request to its end.
    pub(super) total: Option<Spread>,
    /// Drafts, where there were any.
    pub(super) drafts: Option<Drafts>,
    /// The median time between two tokens of the base.
    pub(super) base_step: Option<f64>,
    /// The median time from the drafter's last text to the base's first, as clients saw it.
    pub(super) takeover: Option<f64>,
}

/// Percentiles of some times, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) mean: f64,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

/// What became of the drafts. Tokens are the base's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Drafts {
    /// Answers that a drafter began.
    pub(super) answers: usize,
    /// The share of them that switched by the threshold.
    pub(super) switch_rate: f64,
    /// Draft tokens kept, on average.
    pub(super) kept_mean: f64,
    /// Draft tokens that came to the base and were cut, on average.
    pub(super) cut_mean: f64,
}

impl Spread {
    fn of(mut samples: Vec<f64>) -> Option<Self> {
        samples.sort_by(f64::total_cmp);
        let max = *samples.last()?;
        let mean = samples.iter().sum::<f64>() / samples.len() as f64;
        let at = |q| quantile(&samples, q);
        Some(Self { mean, p50: at(0.5), p90: at(0.9), p99: at(0.99), max })
    }
}

impl Digest {
    /// Of requests that took `seconds` together.
    pub(super) fn of(samples: &[Sample], seconds: f64) -> Self {
        let answered: Vec<&Sample> = samples.iter().filter(|s| s.error.is_none()).collect();
        let mut errors = BTreeMap::new();
        for error in samples.iter().filter_map(|sample| sample.error.clone()) {
            *errors.entry(error).or_insert(0) += 1;
        }
        let sum = |count: &dyn Fn(&Sample) -> u32| -> u64 {
            answered.iter().map(|sample| u64::from(count(sample))).sum()
        };
        let all = |times: &dyn Fn(&Sample) -> Vec<f64>| -> Vec<f64> {
            answered.iter().flat_map(|sample| times(sample)).collect()
        };
        let middle = |mut times: Vec<f64>| (!times.is_empty()).then(|| median(&mut times));
        let completion_tokens = sum(&|sample| sample.completion_tokens);
        Self {
            answered: answered.len(),
            errors,
            requests_per_second: answered.len() as f64 / seconds,
            tokens_per_second: completion_tokens as f64 / seconds,
            prompt_tokens: sum(&|sample| sample.prompt_tokens),
            completion_tokens,
            events: sum(&|sample| sample.events),
            ttft: Spread::of(all(&|sample| sample.ttft.into_iter().collect())),
            itl: Spread::of(all(&|sample| sample.itl.clone())),
            total: Spread::of(all(&|sample| vec![sample.total])),
            drafts: Drafts::of(&answered),
            base_step: middle(all(&|sample| sample.base_itl.clone())),
            takeover: middle(all(&|sample| sample.takeover.into_iter().collect())),
        }
    }
}

impl Drafts {
    fn of(answered: &[&Sample]) -> Option<Self> {
        let drafts: Vec<_> = answered.iter().filter_map(|sample| sample.draft).collect();
        let count = drafts.len() as f64;
        let mean =
            |of: &dyn Fn(&super::sample::Draft) -> f64| drafts.iter().map(of).sum::<f64>() / count;
        (!drafts.is_empty()).then(|| Self {
            answers: drafts.len(),
            switch_rate: mean(&|draft| f64::from(u8::from(draft.switched))),
            kept_mean: mean(&|draft| f64::from(draft.kept_tokens)),
            cut_mean: mean(&|draft| {
                f64::from(draft.drafted_tokens.saturating_sub(draft.kept_tokens))
            }),
        })
    }
}

impl Report {
    /// TTFT by the drafter's alone, medians.
    pub(super) fn ttft_ratio(&self) -> Option<f64> {
        let alone = self.alone.as_ref()?.ttft?;
        Some(self.summary.ttft?.p50 / alone.p50)
    }

    /// The median handoff in the base's median steps.
    pub(super) fn handoff_steps(&self) -> Option<f64> {
        Some(self.handoff? / self.summary.base_step?)
    }

    /// The report for a terminal, in colours that the stream may strip.
    pub(super) fn table(&self) -> String {
        let Self { target, model, load, seconds, .. } = self;
        let heading =
            format!("{HEADING}{model}{HEADING:#} at {target}, {load}, {} s", figure(*seconds));
        let times = render(&self.time_rows());
        let rest = render(&self.fact_rows());
        format!("{heading}\n\n{times}\n{rest}")
    }

    fn time_rows(&self) -> Vec<Vec<Cell>> {
        let head = |text: &str| Cell::new(text).styled(HEADING);
        let mut rows = vec![["ms", "p50", "p90", "p99", "max", "mean"].map(head).to_vec()];
        let mut row = |name: &str, spread: Option<Spread>| {
            let Some(spread) = spread else { return };
            let Spread { mean, p50, p90, p99, max } = spread;
            let cells = [p50, p90, p99, max, mean].map(|s| Cell::new(figure(s * 1e3)));
            rows.push(std::iter::once(Cell::new(name)).chain(cells).collect());
        };
        row("time to first token", self.summary.ttft);
        if let Some(alone) = &self.alone {
            row("  the drafter alone", alone.ttft);
        }
        row("between tokens", self.summary.itl);
        row("whole answer", self.summary.total);
        rows
    }

    fn fact_rows(&self) -> Vec<Vec<Cell>> {
        let summary = &self.summary;
        let mut rows = Vec::new();
        let mut fact = |name: &str, value: String, aside: String| {
            rows.push(vec![Cell::new(name), Cell::new(value), Cell::new(aside).styled(ASIDE)]);
        };
        fact(
            "answers",
            summary.answered.to_string(),
            format!("{} a second", figure(summary.requests_per_second)),
        );
        fact(
            "tokens a second",
            figure(summary.tokens_per_second),
            format!("{} in {} events", summary.completion_tokens, summary.events),
        );
        if let Some(drafts) = summary.drafts {
            fact(
                "switched",
                format!("{:.0} %", drafts.switch_rate * 100.0),
                format!("of {} drafts", drafts.answers),
            );
            fact(
                "draft tokens kept",
                figure(drafts.kept_mean),
                format!("and {} cut, on average", figure(drafts.cut_mean)),
            );
        }
        if let Some(Computed { extended, prompt, reused, kept, continued, cut, beyond }) =
            self.computed
        {
            fact(
                "the base computed",
                extended.to_string(),
                format!(
                    "prompt {prompt} (and {reused} reused) + kept {kept} + continued {continued} + cut {cut}"
                ),
            );
            fact("beyond that", beyond.to_string(), "tokens".to_owned());
        }
        for (error, count) in &summary.errors {
            fact(error, count.to_string(), "errors".to_owned());
        }
        rows.extend(self.goal_rows());
        rows
    }

    fn goal_rows(&self) -> Vec<Vec<Cell>> {
        let goal = |name: &str, value: f64, max: f64, aside: String| {
            let style = if value <= max { AHEAD } else { BEHIND };
            let value = Cell::new(figure(value)).styled(style);
            vec![Cell::new(name), value, Cell::new(aside).styled(ASIDE)]
        };
        let ttft = self.ttft_ratio().map(|ratio| {
            let aside = format!("of the drafter's alone, at most {TTFT_RATIO_MAX}");
            goal("time to first token", ratio, TTFT_RATIO_MAX, aside)
        });
        let handoff = self.handoff_steps().map(|steps| {
            let step = figure(self.summary.base_step.unwrap_or(f64::NAN) * 1e3);
            let aside = format!("steps of the base ({step} ms), at most {HANDOFF_STEPS_MAX}");
            goal("handoff", steps, HANDOFF_STEPS_MAX, aside)
        });
        ttft.into_iter().chain(handoff).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::sample::Draft;
    use super::*;

    /// A report of four requests, the last of them refused.
    pub(in super::super) fn report() -> Report {
        let sample = |at: usize| Sample {
            sent: at as f64,
            ttft: Some(0.1 * (at + 1) as f64),
            itl: vec![0.01, 0.03],
            base_itl: vec![0.02],
            takeover: Some(0.04),
            total: 0.5,
            events: 3,
            prompt_tokens: 20,
            completion_tokens: 4,
            finish_reason: Some("length".to_owned()),
            draft: Some(Draft { switched: at > 0, drafted_tokens: 8, kept_tokens: 6 }),
            error: None,
        };
        let mut samples: Vec<Sample> = (0..3).map(sample).collect();
        let refused =
            Sample { sent: 3.0, error: Some("429 overloaded".into()), ..Sample::default() };
        samples.push(refused);
        let alone = Digest::of(&[Sample { ttft: Some(0.16), ..sample(0) }], 1.0);
        let computed = Computed {
            extended: 90,
            prompt: 60,
            reused: 0,
            kept: 18,
            continued: 9,
            cut: 3,
            beyond: 0,
        };
        Report {
            version: "0.1.0",
            target: "127.0.0.1:8080".into(),
            model: "big".into(),
            load: "2 at once".into(),
            seconds: 2.0,
            summary: Digest::of(&samples, 2.0),
            alone: Some(alone),
            computed: Some(computed),
            handoff: Some(0.01),
            samples,
        }
    }

    #[test]
    fn requests_become_few_numbers() {
        let report = report();
        let summary = &report.summary;
        assert_eq!((summary.answered, summary.completion_tokens), (3, 12));
        assert_eq!(summary.errors, BTreeMap::from([("429 overloaded".to_owned(), 1)]));
        let ttft = summary.ttft.unwrap();
        assert!((ttft.p50 - 0.2).abs() < 1e-9 && (ttft.max - 0.3).abs() < 1e-9, "{ttft:?}");
        assert_eq!(summary.tokens_per_second, 6.0);
        let drafts = summary.drafts.unwrap();
        assert_eq!((drafts.kept_mean, drafts.cut_mean, drafts.answers), (6.0, 2.0, 3));
        assert!((drafts.switch_rate - 2.0 / 3.0).abs() < 1e-9);
        assert!((report.ttft_ratio().unwrap() - 1.25).abs() < 1e-9);
        assert!((report.handoff_steps().unwrap() - 0.5).abs() < 1e-9);
        let none = Digest::of(&[], 1.0);
        assert!(none.ttft.is_none() && none.drafts.is_none() && none.answered == 0);
    }

    #[test]
    fn the_table_says_it_all() {
        let text = anstream::adapter::strip_str(&report().table()).to_string();
        for line in [
            "time to first token  200.0  280.0  298.0  300.0  200.0",
            "the drafter alone",
            "429 overloaded",
            "of the drafter's alone, at most 1.1",
            "prompt 60 (and 0 reused) + kept 18 + continued 9 + cut 3",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
