//! The report as one page: no other file, no script, no fetch. Plots are inline SVG that follow the
//! reader's light or dark setting.

use std::fmt::Write;

use super::report::{Report, Spread};
use crate::bench::stats::figure;

/// A plot's size, and the room for its labels.
const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 52.0;
const BOTTOM: f64 = 36.0;
const TOP: f64 = 14.0;
const RIGHT: f64 = 30.0;
/// A curve has no more points than this.
const POINTS_MAX: usize = 400;
const BARS: usize = 40;
const TICKS: u32 = 5;

const STYLE: &str = "
:root { --ink: #1d2330; --soft: #6b7280; --line: #d8dce4; --paper: #ffffff; --card: #f6f7f9;
  --one: #2563eb; --two: #d97706; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa3b2; --line: #343b49;
  --paper: #12151c; --card: #1a1f29; --one: #6ea8fe; --two: #f0a94a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1140px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; } p { color: var(--soft); margin: .2rem 0 1.4rem; }
h2 { font-size: 1rem; margin: 0 0 .4rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; }
.card, figure { background: var(--card); border-radius: 8px; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.35rem; } .card span { color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: .8rem;
  margin: .8rem 0; }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; } .one { color: var(--one); } .two { color: var(--two); }
.curve { fill: none; stroke: currentColor; stroke-width: 2; } .bar, .dot { fill: currentColor; }
.dot { opacity: .65; } .key { fill: currentColor !important; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: right; padding: .3rem .6rem;
  border-bottom: 1px solid var(--line); } th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 500; }
";

/// The whole page.
pub(super) fn page(report: &Report) -> String {
    let title = format!("{} at {}", report.model, report.target);
    let subtitle =
        format!("{}, {} s, Headstart {}", report.load, figure(report.seconds), report.version);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title>\
         <style>{STYLE}</style></head><body>\n<h1>{title}</h1><p>{subtitle}</p>\n",
        title = escaped(&title),
        subtitle = escaped(&subtitle),
    );
    page.push_str(&cards(report));
    page.push_str("<div class=\"plots\">\n");
    for (title, plot) in plots(report) {
        // Writing to a String cannot fail.
        let _ = writeln!(page, "<figure><h2>{}</h2>{plot}</figure>", escaped(title));
    }
    page.push_str("</div>\n");
    page.push_str(&table(report));
    page.push_str("</body></html>\n");
    page
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn cards(report: &Report) -> String {
    let summary = &report.summary;
    let mut cards = vec![
        (summary.answered.to_string(), "answers".to_owned()),
        (figure(summary.requests_per_second), "answers a second".to_owned()),
        (figure(summary.tokens_per_second), "tokens a second".to_owned()),
    ];
    if let Some(ttft) = summary.ttft {
        cards.push((format!("{} ms", figure(ttft.p50 * 1e3)), "median TTFT".to_owned()));
    }
    if let Some(drafts) = summary.drafts {
        cards.push((format!("{:.0} %", drafts.switch_rate * 100.0), "switched".to_owned()));
        let cut = figure(drafts.cut_mean);
        cards.push((figure(drafts.kept_mean), format!("draft tokens kept, {cut} cut")));
    }
    if let Some(ratio) = report.ttft_ratio() {
        cards.push((format!("{ratio:.2} ×"), "the drafter's TTFT alone".to_owned()));
    }
    if let Some(steps) = report.handoff_steps() {
        cards.push((figure(steps), "base steps of handoff".to_owned()));
    }
    if let Some(computed) = report.computed {
        cards.push((computed.beyond.to_string(), "tokens computed twice or in vain".to_owned()));
    }
    let errors: usize = summary.errors.values().sum();
    cards.push((errors.to_string(), "errors".to_owned()));
    let cards: String = cards
        .iter()
        .map(|(value, what)| {
            format!(
                "<div class=\"card\"><b>{}</b><span>{}</span></div>\n",
                escaped(value),
                escaped(what)
            )
        })
        .collect();
    format!("<div class=\"cards\">\n{cards}</div>\n")
}

fn plots(report: &Report) -> Vec<(&'static str, String)> {
    let ms = |value: f64| value * 1e3;
    let all = |times: &dyn Fn(&super::sample::Sample) -> Vec<f64>| -> Vec<f64> {
        report.samples.iter().filter(|s| s.error.is_none()).flat_map(times).map(ms).collect()
    };
    let ttft = all(&|sample| sample.ttft.into_iter().collect());
    let total = all(&|sample| vec![sample.total]);
    let itl = all(&|sample| sample.itl.clone());
    let times: Vec<(f64, f64, bool)> = report
        .samples
        .iter()
        .map(|s| (s.sent, ms(s.ttft.unwrap_or(s.total)), s.error.is_none()))
        .collect();
    vec![
        ("Share of answers whose first token came within … ms", curve(ttft)),
        ("Share of answers that were whole within … ms", curve(total)),
        ("Time between tokens, ms", bars(itl)),
        ("Time to first token of requests sent after … s, ms", dots(&times)),
    ]
}

/// An empty frame with its axes: `x` and `y` are the largest values.
fn frame(x: f64, y: f64, y_label: &dyn Fn(f64) -> String) -> String {
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">");
    for tick in 0..=TICKS {
        let part = f64::from(tick) / f64::from(TICKS);
        let (at_x, at_y) = place(part, part);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at_y:.1}\" y2=\"{at_y:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <text x=\"{at_x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at_y + 4.0,
            y_label(y * part),
            HEIGHT - BOTTOM + 18.0,
            figure(x * part),
        );
    }
    svg
}

/// Where the parts `x` and `y` of a plot lie.
fn place(x: f64, y: f64) -> (f64, f64) {
    let (width, height) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
    (LEFT + x * width, HEIGHT - BOTTOM - y * height)
}

fn nothing() -> String {
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\"><text x=\"{:.0}\" y=\"{:.0}\" \
         text-anchor=\"middle\">nothing was measured</text></svg>",
        WIDTH / 2.0,
        HEIGHT / 2.0
    )
}

/// A cumulative distribution.
fn curve(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let Some(&max) = values.last() else { return nothing() };
    let max = max.max(f64::MIN_POSITIVE);
    let count = values.len();
    let mut svg = frame(max, 1.0, &|share| format!("{:.0} %", share * 100.0));
    let step = count.div_ceil(POINTS_MAX);
    let (x, y) = place(values[0] / max, 0.0);
    let mut path = format!("M{x:.1} {y:.1}");
    for at in (0..count).filter(|at| at % step == 0 || at + 1 == count) {
        let (x, y) = place(values[at] / max, (at + 1) as f64 / count as f64);
        let _ = write!(path, "L{x:.1} {y:.1}");
    }
    let _ = write!(svg, "<path class=\"curve one\" d=\"{path}\"/></svg>");
    svg
}

/// A histogram, up to the 99th percentile: what lies beyond is in the last bar.
fn bars(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    if values.is_empty() {
        return nothing();
    }
    let max = crate::bench::stats::quantile(&values, 0.99).max(f64::MIN_POSITIVE);
    let mut counts = [0u32; BARS];
    for value in &values {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // clamped to the bars
        let bar = (value / max * BARS as f64).clamp(0.0, BARS as f64 - 1.0) as usize;
        counts[bar] += 1;
    }
    let most = f64::from(counts.iter().copied().max().unwrap_or(1).max(1));
    let mut svg = frame(max, most, &|count| format!("{count:.0}"));
    for (bar, &count) in counts.iter().enumerate() {
        let (x, y) = place(bar as f64 / BARS as f64, f64::from(count) / most);
        let (next, bottom) = place((bar + 1) as f64 / BARS as f64, 0.0);
        let _ = write!(
            svg,
            "<rect class=\"bar one\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>",
            next - x - 1.0,
            bottom - y
        );
    }
    svg.push_str("</svg>");
    svg
}

/// Points in time; those that are not sound stand out.
fn dots(points: &[(f64, f64, bool)]) -> String {
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::MIN_POSITIVE, f64::max);
    if points.is_empty() {
        return nothing();
    }
    let x_max = largest(&mut points.iter().map(|point| point.0)).max(1e-3);
    let y_max = largest(&mut points.iter().map(|point| point.1));
    let mut svg = frame(x_max, y_max, &figure);
    let step = points.len().div_ceil(POINTS_MAX * 10);
    for (x, y, sound) in points.iter().step_by(step) {
        let (x, y) = place(x / x_max, y / y_max);
        let class = if *sound { "one" } else { "two" };
        let _ = write!(svg, "<circle class=\"dot {class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>");
    }
    if points.iter().any(|(_, _, sound)| !sound) {
        let _ = write!(
            svg,
            "<text class=\"key two\" x=\"{:.0}\" y=\"{TOP}\" text-anchor=\"end\">errors</text>",
            WIDTH - RIGHT
        );
    }
    svg.push_str("</svg>");
    svg
}

fn table(report: &Report) -> String {
    let row = |name: &str, spread: Option<Spread>| -> String {
        let Some(Spread { mean, p50, p90, p99, max }) = spread else { return String::new() };
        let cells: String = [p50, p90, p99, max, mean]
            .iter()
            .map(|seconds| format!("<td>{}</td>", figure(seconds * 1e3)))
            .collect();
        format!("<tr><td>{name}</td>{cells}</tr>\n")
    };
    let summary = &report.summary;
    let mut rows = row("time to first token", summary.ttft);
    rows.push_str(&row("— the drafter alone", report.alone.as_ref().and_then(|a| a.ttft)));
    rows.push_str(&row("between tokens", summary.itl));
    rows.push_str(&row("whole answer", summary.total));
    for (error, count) in &summary.errors {
        let _ = writeln!(rows, "<tr><td>{}</td><td>{count} errors</td></tr>", escaped(error));
    }
    format!(
        "<table><tr><th>ms</th><th>p50</th><th>p90</th><th>p99</th><th>max</th><th>mean</th></tr>\n\
         {rows}</table>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    #[test]
    fn the_page_stands_alone() {
        let mut report = report();
        report.model = "a<b".into();
        let page = page(&report);
        assert!(page.contains("a&lt;b") && !page.contains("a<b"), "{page}");
        for outside in ["http://", "https://", "<script", "<link", "@import", "src="] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert_eq!(page.matches("<svg").count(), 4);
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        // Three answers and the one that was refused.
        assert_eq!(page.matches("dot one").count(), 3);
        assert_eq!(page.matches("dot two").count(), 1);
        assert!(page.contains("429 overloaded") && !page.contains("NaN"), "{page}");
    }

    #[test]
    fn plots_of_nothing_say_so() {
        for plot in [curve(vec![]), bars(vec![]), dots(&[])] {
            assert!(plot.contains("nothing was measured"));
        }
        assert!(!curve(vec![0.0]).contains("NaN") && !bars(vec![0.0; 3]).contains("NaN"));
    }
}
