//! How far a measurement or a build has come.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Progress in steps, on standard error: a bar on a terminal, a line at every quarter elsewhere.
#[derive(Debug)]
pub(super) struct Steps {
    label: String,
    bar: Option<ProgressBar>,
    total: u64,
    quarters_told: u64,
}

impl Steps {
    /// Starts showing `label`. A `total` of 0 is not known yet.
    pub(super) fn start(label: &str, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| bar(label, total));
        if bar.is_none() {
            eprintln!("{label} …");
        }
        Self { label: label.to_owned(), bar, total, quarters_told: 0 }
    }

    /// `done` of `total` steps are done, and `what` is next.
    pub(super) fn set(&mut self, done: u64, total: u64, what: &str) {
        self.total = total;
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(format!("{} {what}", self.label));
            return;
        }
        let quarters = (done.saturating_mul(4) / total.max(1)).min(4);
        if quarters > self.quarters_told {
            self.quarters_told = quarters;
            eprintln!("{}: {} %", self.label, quarters * 25);
        }
    }

    /// As [`Steps::set`], with the total as it was.
    pub(super) fn at(&mut self, done: u64, what: &str) {
        self.set(done, self.total, what);
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(label: &str, total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let style =
        ProgressStyle::with_template("{spinner} {msg} {wide_bar:.cyan/dim} {pos}/{len} {elapsed}");
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar.set_message(label.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}
