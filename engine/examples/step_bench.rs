//! Runs one phase of one model again and again, for a profiler to look at and for a quick figure:
//! `cargo run --release -p headstart-engine --example step_bench MODEL PHASE [dtype] [rounds] [threads]`,
//! PHASE being `pp512`, `tg128`, `tg128@1024` (after a prompt of 1,024 tokens) or `b16`.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use headstart_engine::executor::cpu::{CpuExecutor, CpuOptions};
use headstart_engine::model::{LoadOptions, Model};
use headstart_engine::step::Engine;
use headstart_engine::{Executor, Request, Sampling};

/// Sequences, prompt tokens and written tokens of a phase, and whether its prompt is timed.
fn phase(name: &str) -> Option<(usize, usize, usize, bool)> {
    if let Some(prompt) = name.strip_prefix("pp") {
        return Some((1, prompt.parse().ok()?, 1, true));
    }
    if let Some(batch) = name.strip_prefix('b') {
        return Some((batch.parse().ok()?, 32, 49, false));
    }
    let (tokens, prompt) = name.strip_prefix("tg")?.split_once('@').unwrap_or((&name[2..], "1"));
    Some((1, prompt.parse().ok()?, 1 + tokens.parse::<usize>().ok()?, false))
}

/// Seconds that this thread has been running: on a busy machine, and with one thread, a better clock
/// than the wall's.
fn busy_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos: f64 = text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(f64::NAN);
    nanos / 1e9
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let text = |i: usize, default: &str| args.get(i).map_or(default.to_owned(), Clone::clone);
    let (batch, prompt, written, timed) = phase(&text(1, "tg128")).expect("a phase");
    let dtype = text(2, "auto").parse().expect("a dtype");
    let rounds: usize = text(3, "5").parse().expect("rounds");
    let threads = text(4, "2").parse().expect("threads");
    let load = LoadOptions { dtype, threads };
    let model = Model::load(Path::new(&args[0]), load, &mut |_| ()).expect("a model");
    let model = Arc::new(model);
    let options = CpuOptions { threads, kv_tokens: 4096, ..CpuOptions::default() };
    let executor = CpuExecutor::new(Arc::clone(&model), options).expect("options");
    let vocab = executor.limits().vocab_size as u64;
    let mut engine = Engine::new(Box::new(executor), 2048);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut token = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        ((state >> 33) % vocab) as u32
    };
    let (mut rates, mut busy_rates) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        for _ in 0..batch {
            engine.add(Request {
                prompt: (0..prompt).map(|_| token()).collect(),
                max_tokens: written,
                sampling: Sampling::default(),
                stop_tokens: Arc::new([]),
                top_logprobs: 0,
                draft: None,
                known: Default::default(),
            });
        }
        let (mut begun, mut busy) = (Instant::now(), busy_seconds());
        let mut tokens = 0;
        while engine.has_work() {
            let (events, result) = engine.step();
            result.expect("a step");
            match (timed, tokens) {
                (true, _) => tokens = prompt,
                (false, 0) => {
                    (begun, busy) = (Instant::now(), busy_seconds());
                    tokens = batch * (written - 1);
                }
                _ => {}
            }
            drop(events);
        }
        let rate = tokens as f64 / begun.elapsed().as_secs_f64();
        if round > 0 {
            rates.push(rate);
            busy_rates.push(tokens as f64 / (busy_seconds() - busy));
        }
    }
    rates.sort_by(f64::total_cmp);
    busy_rates.sort_by(f64::total_cmp);
    let median = rates[rates.len() / 2];
    let gbs = median * model.decode_bytes() as f64 / 1e9;
    println!(
        "{} {:.1} tok/s ({:.1} … {:.1}), {:.1} a second that the thread ran; {:.1} MB a step{}",
        text(1, "tg128"),
        median,
        rates[0],
        rates[rates.len() - 1],
        busy_rates[busy_rates.len() / 2],
        model.decode_bytes() as f64 / 1e6,
        if batch == 1 && !timed { format!(", {gbs:.1} GB/s") } else { String::new() },
    );
}
