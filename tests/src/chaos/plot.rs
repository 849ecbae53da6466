//! Curves over time, as a table's rows and as one HTML page that needs nothing else.

use std::fmt::Write as _;
use std::time::Duration;

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 160.0;

/// One quantity over time.
#[derive(Clone, Debug)]
pub struct Curve {
    /// What it is.
    pub name: String,
    unit: &'static str,
    /// Seconds, value.
    points: Vec<(f64, f64)>,
    last: (f64, f64),
    peak: f64,
    /// Every how many-th sample becomes a point.
    stride: usize,
    samples: usize,
}

impl Curve {
    /// A curve of one point.
    #[must_use]
    pub fn new(name: String, unit: &'static str, at: Duration, value: f64) -> Self {
        let point = (at.as_secs_f64(), value);
        Self { name, unit, points: vec![point], last: point, peak: value, stride: 1, samples: 1 }
    }

    /// One more sample. With `points_max` points, every second one is dropped.
    pub fn push(&mut self, at: Duration, value: f64, points_max: usize) {
        self.last = (at.as_secs_f64(), value);
        self.peak = self.peak.max(value);
        if self.samples.is_multiple_of(self.stride) {
            self.points.push(self.last);
        }
        self.samples += 1;
        if self.points.len() >= points_max {
            let mut keep = false;
            self.points.retain(|_| {
                keep = !keep;
                keep
            });
            self.stride *= 2;
        }
    }

    /// Change an hour, by least squares over the second half: what a cluster takes while it warms
    /// up is no growth.
    #[must_use]
    pub fn slope_per_hour(&self) -> f64 {
        let half = &self.points[self.points.len() / 2..];
        let count = half.len() as f64;
        let mean = |pick: fn(&(f64, f64)) -> f64| half.iter().map(pick).sum::<f64>() / count;
        let (mean_at, mean_value) = (mean(|point| point.0), mean(|point| point.1));
        let spread: f64 = half.iter().map(|point| (point.0 - mean_at).powi(2)).sum();
        let common: f64 =
            half.iter().map(|point| (point.0 - mean_at) * (point.1 - mean_value)).sum();
        if spread == 0.0 { 0.0 } else { common / spread * 3600.0 }
    }

    /// First, last, peak and slope.
    #[must_use]
    pub fn row(&self) -> String {
        let first = self.points.first().map_or(0.0, |point| point.1);
        let (name, unit, last, peak) = (&self.name, self.unit, self.last.1, self.peak);
        let slope = match unit {
            "" => String::new(),
            _ => format!("{:+.1} {unit}", self.slope_per_hour()),
        };
        format!("{name:<28} {first:>10.1} {last:>10.1} {peak:>10.1}  {slope}")
    }

    fn svg(&self) -> String {
        let time = self.last.0.max(1.0);
        let top = if self.peak > 0.0 { self.peak * 1.1 } else { 1.0 };
        let mut points = String::new();
        for (at, value) in self.points.iter().chain([&self.last]) {
            let (x, y) = (at / time * WIDTH, HEIGHT - value / top * HEIGHT);
            let _ = write!(points, "{x:.1},{y:.1} ");
        }
        let (name, unit, peak) = (&self.name, self.unit, self.peak);
        format!(
            "<h3>{name}: peak {peak:.1} {unit}, {time:.0} s</h3>\
             <svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\">\
             <rect width=\"100%\" height=\"100%\" fill=\"#f6f6f6\"/>\
             <polyline points=\"{points}\" fill=\"none\" stroke=\"#246\" stroke-width=\"1.5\"/></svg>\n"
        )
    }
}

/// Every curve that ever was above zero, one below the other.
#[must_use]
pub fn page(title: &str, curves: &[Curve]) -> String {
    let curves: String = curves.iter().filter(|curve| curve.peak > 0.0).map(Curve::svg).collect();
    format!(
        "<!doctype html><meta charset=\"utf-8\"><title>{title}</title>\
         <style>body{{font:14px sans-serif;margin:2em}}h3{{margin:1em 0 .3em;font-weight:normal}}</style>\
         <h1>{title}</h1>\n{curves}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_knows_its_slope_and_stays_small() {
        let mut curve = Curve::new("x".into(), "MiB", Duration::ZERO, 100.0);
        for second in 1..10_000_u32 {
            curve.push(Duration::from_secs(second.into()), 100.0 + f64::from(second) / 3600.0, 64);
        }
        assert!((curve.slope_per_hour() - 1.0).abs() < 0.01, "{}", curve.slope_per_hour());
        assert!(curve.points.len() < 64);
        assert!((curve.peak - curve.last.1).abs() < f64::EPSILON);
        let page = page("t", &[curve]);
        assert!(page.contains("<polyline") && page.starts_with("<!doctype html>"));
    }

    #[test]
    fn what_a_cluster_takes_at_first_is_no_growth() {
        let mut curve = Curve::new("x".into(), "", Duration::ZERO, 0.0);
        for second in 1..100_u32 {
            curve.push(Duration::from_secs(second.into()), f64::from(second.min(40)), 4096);
        }
        assert!(curve.slope_per_hour().abs() < 1e-9);
    }
}
