//! llama.cpp's figures: its own two benchmark programs, and what they print.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use super::plan::{Figure, Plan};
use crate::bench::child::Job;
use crate::failure::Failure;
use crate::models::Cancel;

/// llama.cpp gives each sequence a context that is a multiple of this.
const CONTEXT_STEP: usize = 256;

/// llama.cpp's programs, ready to run.
#[derive(Clone, Debug)]
pub(in crate::bench) struct Llama {
    /// Their folder.
    pub(in crate::bench) programs: PathBuf,
    /// A folder for what they print.
    pub(in crate::bench) words: PathBuf,
}

/// A line of `llama-bench -o json`.
#[derive(Debug, Deserialize)]
struct BenchRow {
    n_prompt: usize,
    n_gen: usize,
    samples_ts: Vec<f64>,
}

/// A line of `llama-batched-bench --output-format jsonl`.
#[derive(Debug, Deserialize)]
struct BatchRow {
    pl: usize,
    speed_tg: f64,
}

impl Llama {
    /// Runs both programs once.
    ///
    /// # Errors
    /// When one fails, prints something else than figures, leaves one out, or `cancel` is set.
    pub(super) fn measure(
        &self,
        model: &Path,
        threads: usize,
        plan: &Plan,
        cancel: &Cancel,
    ) -> Result<BTreeMap<Figure, f64>, Failure> {
        let threads = threads.to_string();
        let mut bench = self.command("llama-bench");
        bench.arg("-m").arg(model).args(["-t", &threads, "-r", "1", "-o", "json"]);
        bench.args(["-p", &plan.prompt_tokens.to_string(), "-n", &plan.gen_tokens.to_string()]);
        let mut found = parse_bench(&self.run("llama-bench", bench, cancel)?, plan)?;

        let mut batched = self.command("llama-batched-bench");
        batched.arg("-m").arg(model).args(["-t", &threads, "-tb", &threads]);
        batched.args(["-npp", &plan.batch_prompt_tokens.to_string()]);
        batched.args(["-ntg", &plan.batch_gen_tokens.to_string()]);
        let sizes: Vec<String> = plan.batches.iter().map(usize::to_string).collect();
        batched.args(["-npl", &sizes.join(",")]);
        let context = plan.batch_tokens().next_multiple_of(CONTEXT_STEP);
        batched.args(["-c", &context.to_string(), "--output-format", "jsonl"]);
        found.append(&mut parse_batched(&self.run("llama-batched-bench", batched, cancel)?)?);

        match plan.figures().into_iter().find(|figure| !found.contains_key(figure)) {
            None => Ok(found),
            Some(figure) => {
                let name = plan.name(figure);
                Err(Failure::Failed(format!("llama.cpp gave no figure for {name}")))
            }
        }
    }

    /// One of the programs.
    pub(in crate::bench) fn command(&self, program: &str) -> Command {
        Command::new(self.programs.join(program))
    }

    /// Runs a program to its end; what it printed on standard output.
    ///
    /// # Errors
    /// When it fails, or `cancel` is set.
    pub(in crate::bench) fn run(
        &self,
        name: &str,
        command: Command,
        cancel: &Cancel,
    ) -> Result<String, Failure> {
        let out = self.words.join(format!("{name}.out"));
        let err = self.words.join(format!("{name}.err"));
        Job { doing: name, command, out: out.clone(), err }.run(cancel, &mut |_| ())?;
        fs::read_to_string(&out)
            .map_err(|error| Failure::Failed(format!("cannot read {}: {error}", out.display())))
    }
}

fn parse_bench(text: &str, plan: &Plan) -> Result<BTreeMap<Figure, f64>, Failure> {
    let rows: Vec<BenchRow> = serde_json::from_str(text).map_err(|error| {
        Failure::Failed(format!("llama-bench printed no table in JSON: {error}"))
    })?;
    let mut found = BTreeMap::new();
    for row in rows {
        let figure = match (row.n_prompt, row.n_gen) {
            (prompt, 0) if prompt == plan.prompt_tokens => Figure::Prefill,
            (0, generated) if generated == plan.gen_tokens => Figure::Decode,
            _ => continue,
        };
        if let [sample] = row.samples_ts[..] {
            found.insert(figure, sound("llama-bench", sample)?);
        }
    }
    Ok(found)
}

fn parse_batched(text: &str) -> Result<BTreeMap<Figure, f64>, Failure> {
    // Other lines, empty ones among them, surround the figures.
    text.lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| {
            let row: BatchRow = serde_json::from_str(line).map_err(|error| {
                Failure::Failed(format!(
                    "llama-batched-bench printed a line like no other: {error}"
                ))
            })?;
            Ok((Figure::Batch(row.pl), sound("llama-batched-bench", row.speed_tg)?))
        })
        .collect()
}

fn sound(program: &str, rate: f64) -> Result<f64, Failure> {
    if rate.is_finite() && rate > 0.0 {
        return Ok(rate);
    }
    Err(Failure::Failed(format!("{program} printed {rate} tokens a second")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shortened: a row has some forty fields.
    const BENCH: &str = r#"[
  {
    "build_commit": "unknown",
    "model_type": "llama 256M Q4_1",
    "n_threads": 2,
    "n_prompt": 512,
    "n_gen": 0,
    "n_depth": 0,
    "avg_ts": 441.5,
    "samples_ns": [ 1159683000 ],
    "samples_ts": [ 441.5 ]
  },
  {
    "n_prompt": 0,
    "n_gen": 128,
    "avg_ts": 153.2,
    "samples_ts": [ 153.2 ]
  }
]
"#;
    const BATCHED: &str = "\n\
        {\"n_kv_max\": 1280, \"pp\": 32, \"tg\": 48, \"pl\": 1, \"speed_pp\": 300.5, \"speed_tg\": 150.25}\n\
        {\"n_kv_max\": 1280, \"pp\": 32, \"tg\": 48, \"pl\": 16, \"speed_pp\": 400.0, \"speed_tg\": 318.4}\n\n\
        llama_perf_context_print: load time = 1.00 ms\n";

    #[test]
    fn llama_benchs_rows_are_told_apart() {
        let found = parse_bench(BENCH, &Plan::default()).unwrap();
        let expected = [(Figure::Prefill, 441.5), (Figure::Decode, 153.2)];
        assert_eq!(found, BTreeMap::from(expected));
        let other = Plan { gen_tokens: 32, ..Plan::default() };
        assert_eq!(parse_bench(BENCH, &other).unwrap().len(), 1);
    }

    #[test]
    fn llama_batched_benchs_rows_are_found_among_other_lines() {
        let found = parse_batched(BATCHED).unwrap();
        let expected = [(Figure::Batch(1), 150.25), (Figure::Batch(16), 318.4)];
        assert_eq!(found, BTreeMap::from(expected));
        assert!(parse_batched("").unwrap().is_empty());
    }

    #[test]
    fn what_is_no_figure_is_refused() {
        let message =
            |text: &str| parse_bench(text, &Plan::default()).unwrap_err().message().to_owned();
        assert!(message("error: no model").contains("llama-bench printed no table in JSON"));
        assert!(message(&BENCH.replace("[ 441.5 ]", "[ 0.0 ]")).contains("0 tokens a second"));
        let cut = "{\"pl\": 16, \"speed_tg\": 318.4";
        let error = parse_batched(cut).unwrap_err();
        assert!(error.message().contains("llama-batched-bench"), "{}", error.message());
    }

    #[test]
    #[cfg(unix)]
    fn both_programs_are_run_and_a_missing_figure_is_named() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let program = |name: &str, prints: &str| {
            let path = folder.path().join(name);
            // The arguments go to standard error, to be looked at.
            let script = format!("#!/bin/sh\necho \"$@\" >&2\ncat <<'END'\n{prints}\nEND\n");
            fs::write(&path, script).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        program("llama-bench", BENCH);
        program("llama-batched-bench", BATCHED);
        let llama = Llama { programs: folder.path().to_owned(), words: folder.path().to_owned() };
        let plan = Plan { batches: vec![1, 16], ..Plan::default() };
        let measure =
            |plan: &Plan| llama.measure(Path::new("some model.gguf"), 2, plan, &Cancel::default());
        assert_eq!(measure(&plan).unwrap().len(), 4);
        let said = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!(said("llama-bench.err"), "-m some model.gguf -t 2 -r 1 -o json -p 512 -n 128\n");
        let batched = said("llama-batched-bench.err");
        assert!(batched.contains("-npp 32 -ntg 48 -npl 1,16 -c 1280"), "{batched}");
        let error = measure(&Plan::default()).unwrap_err();
        assert_eq!(error.message(), "llama.cpp gave no figure for batch 4");
    }
}
