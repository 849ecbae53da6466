//! How far a download or a load has come.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Whether progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// A bar on a terminal, a few plain lines elsewhere; always on standard error.
    Progress,
    /// Nothing.
    Nothing,
}

/// Progress of one piece of work, in bytes.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    plain: Option<Plain>,
}

/// Without a terminal: a line at every quarter.
#[derive(Debug)]
struct Plain {
    label: String,
    total_bytes: AtomicU64,
    quarters_told: AtomicU64,
}

impl Progress {
    /// Starts showing `label`. A `total_bytes` of 0 is not known yet.
    #[must_use]
    pub fn start(show: Show, label: &str, total_bytes: u64) -> Self {
        if show == Show::Nothing {
            return Self { bar: None, plain: None };
        }
        if std::io::stderr().is_terminal() {
            return Self { bar: Some(bar(label, total_bytes)), plain: None };
        }
        match total_bytes {
            0 => eprintln!("{label} …"),
            _ => eprintln!("{label} ({}) …", human_bytes(total_bytes)),
        }
        Self {
            bar: None,
            plain: Some(Plain {
                label: label.to_owned(),
                total_bytes: AtomicU64::new(total_bytes),
                quarters_told: AtomicU64::new(0),
            }),
        }
    }

    /// The size became known.
    pub fn set_total(&self, total_bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total_bytes);
        }
        if let Some(plain) = &self.plain {
            plain.total_bytes.store(total_bytes, Ordering::Relaxed);
        }
    }

    /// `bytes` are there in all.
    pub fn set(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(bytes);
        }
        if let Some(plain) = &self.plain {
            plain.set(bytes);
        }
    }

    /// The work is done; the bar goes away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Plain {
    fn set(&self, bytes: u64) {
        let total_bytes = self.total_bytes.load(Ordering::Relaxed);
        if total_bytes == 0 {
            return;
        }
        let quarters = (bytes.saturating_mul(4) / total_bytes).min(4);
        if self.quarters_told.fetch_max(quarters, Ordering::Relaxed) < quarters {
            let percent = quarters * 25;
            eprintln!("{}: {percent} %", self.label);
        }
    }
}

fn bar(label: &str, total_bytes: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total_bytes), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template(
        "{msg} {wide_bar:.cyan/dim} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}",
    );
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar.set_message(label.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// `98362432` as `98 MB`, decimal units.
#[must_use]
#[allow(clippy::cast_precision_loss)] // three digits are shown
pub fn human_bytes(bytes: u64) -> String {
    let bytes = bytes as f64;
    for (unit, size) in [("GB", 1e9), ("MB", 1e6), ("kB", 1e3)] {
        if bytes >= size {
            let amount = bytes / size;
            return if amount < 10.0 {
                format!("{amount:.2} {unit}")
            } else {
                format!("{amount:.0} {unit}")
            };
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(human_bytes(98_362_432), "98 MB");
        assert_eq!(human_bytes(1_117_320_768), "1.12 GB");
        assert_eq!(human_bytes(12), "12 B");
    }
}
