//! What was measured, for people and for programs.

use std::path::PathBuf;

use anstyle::{AnsiColor, Style};
use headstart_kernels::Peak;
use serde::Serialize;

use crate::bench::stats::{Summary, figure};
use crate::bench::table::{Cell, render};
use crate::models::progress::human_bytes;

const HEADING: Style = Style::new().bold();
const ASIDE: Style = Style::new().dimmed();
const AHEAD: Style = AnsiColor::Green.on_default().bold();
const BEHIND: Style = AnsiColor::Yellow.on_default().bold();
/// Fewer alternations say little about two programs on a machine with neighbours.
const ALTERNATIONS_MIN: usize = 5;

/// Everything that `headstart bench engine` found out.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    /// Headstart's version.
    pub(super) version: &'static str,
    /// What ran.
    pub(super) model: ModelReport,
    /// Where.
    pub(super) machine: MachineReport,
    /// Rounds; each gives every figure one sample.
    pub(super) repetitions: usize,
    /// The other engines' names.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) against: Vec<&'static str>,
    /// The package that they come from.
    pub(super) package: &'static str,
    /// Tokens a second.
    pub(super) figures: Vec<FigureReport>,
    /// How near reading a prompt comes to what the arithmetic units allow.
    pub(super) arithmetic: ArithmeticReport,
    /// How near decoding comes to what memory allows.
    pub(super) memory: MemoryReport,
}

/// The model that ran.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ModelReport {
    /// As clients call it.
    pub(super) name: String,
    /// The file, or the directory.
    pub(super) path: PathBuf,
    /// Bytes of the file, or of the weights in the directory.
    pub(super) file_bytes: u64,
    /// How weights are kept: `auto`, `f32`, `bf16`.
    pub(super) dtype: String,
    /// Bytes of the matrices in memory.
    pub(super) weight_bytes: u64,
    /// Bytes of the matrices that each decode step reads.
    pub(super) decode_bytes: u64,
}

/// The machine that ran it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct MachineReport {
    /// The processor's name.
    pub(super) processor: String,
    /// Threads that computed.
    pub(super) threads: usize,
}

/// One figure, in tokens a second.
#[derive(Clone, Debug, Serialize)]
pub(super) struct FigureReport {
    /// `pp512`, `tg128`, `batch 16`.
    pub(super) name: String,
    /// Headstart's.
    pub(super) ours: Summary,
    /// The other engines'.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) others: Vec<Other>,
}

/// One figure of another engine.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Other {
    /// The engine.
    pub(super) name: &'static str,
    /// Its samples.
    pub(super) theirs: Summary,
    /// Our median by theirs.
    pub(super) ratio: f64,
}

/// Arithmetic: what the units do at most, and how much of it reading a prompt takes. A product and
/// its sum are two operations.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ArithmeticReport {
    /// Operations a second on f32, all threads together.
    pub(super) f32_per_second: Summary,
    /// On bytes, in dot products of vectors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) avx512_i8_per_second: Option<Summary>,
    /// On bf16, in dot products of vectors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) avx512_bf16_per_second: Option<Summary>,
    /// On bytes, in the matrix unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) amx_i8_per_second: Option<Summary>,
    /// On bf16, in the matrix unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) amx_bf16_per_second: Option<Summary>,
    /// Operations a second of reading a prompt: its median rate times two for each weight of the
    /// layers. Attention is not counted.
    pub(super) prefill_per_second: f64,
}

/// Memory: how fast it is read, and how much of it is used.
#[derive(Clone, Debug, Serialize)]
pub(super) struct MemoryReport {
    /// Bytes a second that the same threads read from a large buffer.
    pub(super) bandwidth: Summary,
    /// Bytes of that buffer.
    pub(super) buffer_bytes: usize,
    /// Bytes a second of weights that decoding reads: its median rate times the bytes of a step.
    pub(super) decode_bytes_per_second: f64,
    /// Its rate by the bandwidth of the same round, the median of all rounds: a machine that is shared
    /// changes within minutes.
    pub(super) decode_share: f64,
    /// The most this process had resident before the bandwidth was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) resident_bytes_max: Option<u64>,
    /// Tokens that the KV pool holds, all of them touched.
    pub(super) kv_tokens: usize,
    /// Bytes of the KV pool.
    pub(super) kv_bytes: u64,
}

impl ArithmeticReport {
    /// The medians of `peaks`; `None` without any.
    pub(super) fn new(peaks: &[Peak], prefill_per_second: f64) -> Option<Self> {
        let of = |rate: &dyn Fn(&Peak) -> Option<f64>| {
            Summary::of(peaks.iter().filter_map(rate).collect())
        };
        Some(Self {
            f32_per_second: of(&|peak| Some(peak.f32_per_second))?,
            avx512_i8_per_second: of(&|peak| peak.avx512_i8_per_second),
            avx512_bf16_per_second: of(&|peak| peak.avx512_bf16_per_second),
            amx_i8_per_second: of(&|peak| peak.amx_i8_per_second),
            amx_bf16_per_second: of(&|peak| peak.amx_bf16_per_second),
            prefill_per_second,
        })
    }
}

impl Other {
    /// `theirs` beside `ours`.
    pub(super) fn new(name: &'static str, ours: &Summary, theirs: Summary) -> Self {
        Self { name, ratio: ours.median / theirs.median, theirs }
    }
}

impl Report {
    /// The report for a terminal, in colours that the stream may strip.
    pub(super) fn table(&self) -> String {
        let ModelReport { name, file_bytes, dtype, .. } = &self.model;
        let MachineReport { processor, threads } = &self.machine;
        let counted = |number: usize, what: &str| match number {
            1 => format!("1 {what}"),
            _ => format!("{number} {what}s"),
        };
        let (threads, rounds) = (counted(*threads, "thread"), counted(self.repetitions, "round"));
        let size = human_bytes(*file_bytes);
        let heading = format!(
            "{HEADING}{name}{HEADING:#} ({size}, dtype {dtype}), {threads} of {processor}, {rounds}"
        );
        let figures = render(&self.figure_rows());
        let memory = render(&[self.memory_rows(), self.arithmetic_rows()].concat());
        let notes: String =
            self.notes().iter().map(|note| format!("{ASIDE}{note}{ASIDE:#}\n")).collect();
        format!("{heading}\n\n{figures}\n{memory}{notes}")
    }

    fn figure_rows(&self) -> Vec<Vec<Cell>> {
        let head = |text: &str| Cell::new(text).styled(HEADING);
        let mut heads = vec![head("tokens/s"), head("headstart"), head("min … max")];
        for name in &self.against {
            heads.extend([head(name), head("min … max"), head("ratio")]);
        }
        let row = |figure: &FigureReport| {
            let mut row = vec![Cell::new(&figure.name)];
            row.extend(summary(&figure.ours));
            for other in &figure.others {
                row.extend(summary(&other.theirs));
                row.push(ratio(other.ratio));
            }
            row
        };
        std::iter::once(heads).chain(self.figures.iter().map(row)).collect()
    }

    fn memory_rows(&self) -> Vec<Vec<Cell>> {
        let memory = &self.memory;
        let rate = |bytes: f64| format!("{:.1} GB/s", bytes / 1e9);
        let Summary { median, min, max, .. } = &memory.bandwidth;
        let spread = format!("{:.1} … {:.1}", min / 1e9, max / 1e9);
        let aside = |text: String| Cell::new(text).styled(ASIDE);
        let share = format!("{:.0} % of it", memory.decode_share * 100.0);
        let mut rows = vec![
            vec![Cell::new("memory reads at"), Cell::new(rate(*median)), aside(spread)],
            vec![
                Cell::new("decoding reads at"),
                Cell::new(rate(memory.decode_bytes_per_second)),
                Cell::new(share),
            ],
            vec![Cell::new("a step reads"), bytes(self.model.decode_bytes)],
            vec![Cell::new("weights"), bytes(self.model.weight_bytes)],
        ];
        if let Some(resident) = memory.resident_bytes_max {
            let by_file = resident as f64 / self.model.file_bytes.max(1) as f64;
            let by_file = Cell::new(format!("{by_file:.2} × the file"));
            rows.push(vec![Cell::new("peak memory"), bytes(resident), by_file]);
        }
        rows
    }

    fn arithmetic_rows(&self) -> Vec<Vec<Cell>> {
        let it = &self.arithmetic;
        let rate = |name: &str, per_second: f64| {
            vec![Cell::new(name), Cell::new(format!("{:.0} Gop/s", per_second / 1e9))]
        };
        let unit = |name: &str, peak: &Summary| {
            let mut row = rate(name, peak.median);
            let share = it.prefill_per_second / peak.median * 100.0;
            row.push(Cell::new(format!("a prompt takes {share:.1} % of it")).styled(ASIDE));
            row
        };
        let mut rows = vec![
            rate("reading a prompt does", it.prefill_per_second),
            unit("f32 vectors do", &it.f32_per_second),
        ];
        for (name, peak) in [
            ("bf16 dots do", &it.avx512_bf16_per_second),
            ("byte dots do", &it.avx512_i8_per_second),
            ("bf16 tiles do", &it.amx_bf16_per_second),
            ("byte tiles do", &it.amx_i8_per_second),
        ] {
            rows.extend(peak.iter().map(|peak| unit(name, peak)));
        }
        rows
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.against.is_empty() {
            return notes;
        }
        let package = self.package;
        notes.push(format!("llama.cpp is the one in {package}, built for this processor."));
        if self.against.contains(&"llama.cpp-no-amx") {
            notes.push("llama.cpp-no-amx does without the processor's matrix unit.".to_owned());
        }
        if self.model.dtype != "auto" {
            notes.push("llama.cpp keeps the file's own weight types; --dtype is ours.".to_owned());
        }
        if self.repetitions < ALTERNATIONS_MIN {
            notes.push(format!("Fewer than {ALTERNATIONS_MIN} alternations: do not quote these."));
        }
        notes
    }
}

fn summary(summary: &Summary) -> [Cell; 2] {
    let spread = format!("{} … {}", figure(summary.min), figure(summary.max));
    [Cell::new(figure(summary.median)), Cell::new(spread).styled(ASIDE)]
}

fn ratio(ratio: f64) -> Cell {
    let style = if ratio >= 1.0 { AHEAD } else { BEHIND };
    Cell::new(format!("{ratio:.2} ×")).styled(style)
}

fn bytes(bytes: u64) -> Cell {
    Cell::new(human_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summed(samples: &[f64]) -> Summary {
        Summary::of(samples.to_vec()).unwrap()
    }

    fn report(against: bool) -> Report {
        let figure = |name: &str, ours: &[f64], theirs: &[f64]| {
            let ours = summed(ours);
            let other = against.then(|| Other::new("llama.cpp", &ours, summed(theirs)));
            FigureReport { name: name.into(), ours, others: other.into_iter().collect() }
        };
        Report {
            version: "0.1.0",
            model: ModelReport {
                name: "small".into(),
                path: "/models/small.gguf".into(),
                file_bytes: 100_000_000,
                dtype: "auto".into(),
                weight_bytes: 98_000_000,
                decode_bytes: 90_000_000,
            },
            machine: MachineReport { processor: "A CPU".into(), threads: 2 },
            repetitions: 3,
            against: against.then_some("llama.cpp").into_iter().collect(),
            package: "llama-cpp-python==0.3.36",
            figures: vec![
                figure("pp512", &[2000.0, 1990.0, 2100.0], &[500.0, 400.0, 600.0]),
                figure("tg128", &[90.0; 3], &[100.0; 3]),
            ],
            arithmetic: ArithmeticReport::new(
                &[Peak {
                    f32_per_second: 100e9,
                    avx512_i8_per_second: Some(500e9),
                    avx512_bf16_per_second: None,
                    amx_i8_per_second: Some(4e12),
                    amx_bf16_per_second: None,
                }],
                50e9,
            )
            .unwrap(),
            memory: MemoryReport {
                bandwidth: summed(&[18e9, 20e9, 21e9]),
                buffer_bytes: 1 << 30,
                decode_bytes_per_second: 8.1e9,
                decode_share: 0.405,
                resident_bytes_max: Some(130_000_000),
                kv_tokens: 4096,
                kv_bytes: 1 << 20,
            },
        }
    }

    fn plain(report: &Report) -> String {
        anstream::adapter::strip_str(&report.table()).to_string()
    }

    #[test]
    fn alone_it_shows_medians_and_limits() {
        let expected = "\
small (100 MB, dtype auto), 2 threads of A CPU, 3 rounds

tokens/s  headstart      min … max
pp512          2000    1990 … 2100
tg128         90.00  90.00 … 90.00

memory reads at         20.0 GB/s                  18.0 … 21.0
decoding reads at        8.1 GB/s                   40 % of it
a step reads                90 MB
weights                     98 MB
peak memory                130 MB              1.30 × the file
reading a prompt does    50 Gop/s
f32 vectors do          100 Gop/s  a prompt takes 50.0 % of it
byte dots do            500 Gop/s  a prompt takes 10.0 % of it
byte tiles do          4000 Gop/s   a prompt takes 1.2 % of it
";
        assert_eq!(plain(&report(false)), expected);
    }

    #[test]
    fn against_another_it_shows_ratios_of_medians() {
        let text = plain(&report(true));
        let row = |name: &str| text.lines().find(|l| l.starts_with(name)).unwrap().to_owned();
        assert!(row("pp512").contains("500.0  400.0 … 600.0") && row("pp512").ends_with("4.00 ×"));
        assert!(row("tg128").ends_with("0.90 ×"), "{text}");
        assert!(text.contains("llama-cpp-python==0.3.36"), "{text}");
        assert!(text.contains("Fewer than 5 alternations"), "{text}");
        let enough = Report { repetitions: 5, ..report(true) };
        assert!(!plain(&enough).contains("alternations"));
    }

    #[test]
    fn the_json_has_the_samples() {
        let json = serde_json::to_value(report(true)).unwrap();
        assert_eq!(json["figures"][0]["ours"]["samples"][2], 2100.0);
        assert_eq!(json["figures"][0]["others"][0]["theirs"]["median"], 500.0);
        assert_eq!(json["figures"][0]["others"][0]["ratio"], 4.0);
        assert_eq!(json["memory"]["decode_share"], 0.405);
        let alone = serde_json::to_value(report(false)).unwrap();
        assert!(alone["figures"][0].get("others").is_none() && alone.get("against").is_none());
    }
}
