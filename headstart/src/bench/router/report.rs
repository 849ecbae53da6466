//! What was measured, for people and for programs.

use anstyle::{AnsiColor, Style};
use serde::Serialize;

use super::load::Streams;
use crate::bench::stats::{Summary, figure};
use crate::bench::table::{Cell, render};

const HEADING: Style = Style::new().bold();
const ASIDE: Style = Style::new().dimmed();
const AHEAD: Style = AnsiColor::Green.on_default().bold();
const BEHIND: Style = AnsiColor::Yellow.on_default().bold();

/// Everything that `headstart bench router` found out.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    /// Headstart's version.
    pub(super) version: &'static str,
    /// Streams at once.
    pub(super) concurrency: usize,
    /// Tokens of a stream.
    pub(super) tokens: usize,
    /// Rounds.
    pub(super) repetitions: usize,
    /// The median time of rendering and tokenising both prompts, in microseconds.
    pub(super) rendering_us: f64,
    /// Headstart first.
    pub(super) sides: Vec<SideReport>,
}

/// One router's figures.
#[derive(Clone, Debug, Serialize)]
pub(super) struct SideReport {
    /// `headstart`, or a package.
    pub(super) name: String,
    /// Streams that ended a second.
    pub(super) streams_per_second: Summary,
    /// Server-sent events of a stream.
    pub(super) events_per_stream: Summary,
    /// Median time of a unary request without the router, in microseconds.
    pub(super) direct_us: Summary,
    /// And through it.
    pub(super) through_us: Summary,
    /// The difference of the two in each round.
    pub(super) added_us: Summary,
}

/// One router's figures in one round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round {
    pub(super) streams: Streams,
    pub(super) direct_us: f64,
    pub(super) through_us: f64,
}

/// A router and its rounds.
#[derive(Clone, Debug)]
pub(super) struct Side {
    name: String,
    rounds: Vec<Round>,
}

impl Side {
    pub(super) fn new(name: String) -> Self {
        Self { name, rounds: Vec::new() }
    }

    pub(super) fn push(&mut self, round: Round) {
        self.rounds.push(round);
    }

    /// Its medians; `None` without a round.
    pub(super) fn summed(self) -> Option<SideReport> {
        let of =
            |value: &dyn Fn(&Round) -> f64| Summary::of(self.rounds.iter().map(value).collect());
        Some(SideReport {
            streams_per_second: of(&|round| round.streams.per_second)?,
            events_per_stream: of(&|round| round.streams.events)?,
            direct_us: of(&|round| round.direct_us)?,
            through_us: of(&|round| round.through_us)?,
            added_us: of(&|round| round.through_us - round.direct_us)?,
            name: self.name,
        })
    }
}

impl Report {
    /// The report for a terminal, in colours that the stream may strip.
    pub(super) fn table(&self) -> String {
        let Self { concurrency, tokens, repetitions, rendering_us, .. } = self;
        let heading = format!(
            "{HEADING}streams of {tokens} tokens, {concurrency} at once; unary requests one at a \
             time; medians of {repetitions} rounds{HEADING:#}"
        );
        let rendering = format!(
            "rendering and tokenising both prompts takes {} µs of what Headstart adds\n",
            figure(*rendering_us)
        );
        let goals: String = self.goals().iter().map(|line| format!("{line}\n")).collect();
        format!("{heading}\n\n{}\n{}\n{rendering}{goals}", self.streams(), self.unary())
    }

    fn streams(&self) -> String {
        let heads = ["streams", "requests/s", "min … max", "events a stream"];
        let mut rows = vec![heads.map(|text| Cell::new(text).styled(HEADING)).to_vec()];
        for side in &self.sides {
            let rate = &side.streams_per_second;
            let spread = format!("{} … {}", figure(rate.min), figure(rate.max));
            rows.push(vec![
                Cell::new(&side.name),
                Cell::new(figure(rate.median)),
                Cell::new(spread).styled(ASIDE),
                Cell::new(figure(side.events_per_stream.median)),
            ]);
        }
        render(&rows)
    }

    fn unary(&self) -> String {
        let heads = ["unary, µs", "added p50", "min … max", "through it", "without"];
        let mut rows = vec![heads.map(|text| Cell::new(text).styled(HEADING)).to_vec()];
        for side in &self.sides {
            let added = &side.added_us;
            let spread = format!("{} … {}", figure(added.min), figure(added.max));
            rows.push(vec![
                Cell::new(&side.name),
                Cell::new(figure(added.median)),
                Cell::new(spread).styled(ASIDE),
                Cell::new(figure(side.through_us.median)),
                Cell::new(figure(side.direct_us.median)),
            ]);
        }
        render(&rows)
    }

    /// How Headstart stands against the better of the others.
    fn goals(&self) -> Vec<String> {
        let Some((ours, peers)) = self.sides.split_first() else { return Vec::new() };
        let best = peers
            .iter()
            .max_by(|a, b| a.streams_per_second.median.total_cmp(&b.streams_per_second.median));
        let least = peers.iter().min_by(|a, b| a.added_us.median.total_cmp(&b.added_us.median));
        let mut lines = Vec::new();
        if let Some(best) = best {
            let ratio = ours.streams_per_second.median / best.streams_per_second.median;
            let style = if ratio >= 1.0 { AHEAD } else { BEHIND };
            lines.push(format!("requests/s: {style}{ratio:.2} ×{style:#} {}", best.name));
        }
        if let Some(least) = least {
            let allowed = least.added_us.median + self.rendering_us;
            let (added, name) = (ours.added_us.median, &least.name);
            let style = if added <= allowed { AHEAD } else { BEHIND };
            lines.push(format!(
                "added p50: {style}{} µs{style:#} beside {} µs ({name} and the rendering)",
                figure(added),
                figure(allowed)
            ));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(name: &str, rates: [f64; 3], added: f64) -> SideReport {
        let mut side = Side::new(name.to_owned());
        for per_second in rates {
            let streams = Streams { per_second, events: 130.0 };
            side.push(Round { streams, direct_us: 50.0, through_us: 50.0 + added });
        }
        side.summed().unwrap()
    }

    fn report(peers: Vec<SideReport>) -> Report {
        let mut sides = vec![side("headstart", [900.0, 1200.0, 1000.0], 130.0)];
        sides.extend(peers);
        Report {
            version: "0.1.0",
            concurrency: 32,
            tokens: 128,
            repetitions: 3,
            rendering_us: 40.0,
            sides,
        }
    }

    fn plain(report: &Report) -> String {
        anstream::adapter::strip_str(&report.table()).to_string()
    }

    #[test]
    fn the_better_of_the_others_is_the_measure() {
        let peers =
            vec![side("fast==1", [500.0, 800.0, 600.0], 100.0), side("slow==2", [400.0; 3], 85.0)];
        let text = plain(&report(peers));
        assert!(text.contains("requests/s: 1.67 × fast==1"), "{text}");
        assert!(text.contains("130.0 µs beside 125.0 µs (slow==2 and the rendering)"), "{text}");
        assert!(text.contains("headstart        1000   900.0 … 1200            130.0"), "{text}");
        let alone = plain(&report(Vec::new()));
        assert!(!alone.contains("requests/s:") && alone.contains("takes 40.00 µs"), "{alone}");
    }

    #[test]
    fn the_json_has_every_round() {
        let json = serde_json::to_value(report(Vec::new())).unwrap();
        assert_eq!(json["sides"][0]["streams_per_second"]["samples"][1], 1200.0);
        assert_eq!(json["sides"][0]["added_us"]["median"], 130.0);
    }
}
