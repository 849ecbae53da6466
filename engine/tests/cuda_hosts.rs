//! Ranks on the GPUs of several processes give what ranks on one GPU give; a process that is lost ends
//! the others, also those that wait for it in a sum.
//!
//! The processes that follow are this test's own binary, started once more. Runs on the emulated device;
//! with `HEADSTART_CUDA_TESTS=device` in the environment on the machine's GPUs, one for each process,
//! skipped where there are fewer.

mod common;

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{KV_TOKENS, Runner, load_parts, tiny};
use headstart_engine::Sampling;
use headstart_engine::collective::hosts::Place;
use headstart_engine::core::pages::PageId;
use headstart_engine::executor::cuda::{
    self, CudaExecutor, CudaOptions, Ranks, follow, load_ranks,
};
use headstart_engine::executor::hosts::{HostTimes, LeadError};
use headstart_engine::executor::{Executor, Found, Probe, Row};
use headstart_engine::model::WeightDtype;
use headstart_kernels::cuda::Communicators;

/// Long enough for any machine: nothing here waits for it.
const PATIENCE: Duration = Duration::from_secs(120);

/// Says to a process of this test that it follows: the model, ranks, hosts, host and the leader's address.
const FOLLOWS: &str = "HEADSTART_TEST_FOLLOWS";
/// How a follower's process ends that lost its leader.
const LOST: i32 = 7;

/// What a follower's process runs; in the test's own, nothing.
#[test]
fn a_follower() {
    let Ok(told) = std::env::var(FOLLOWS) else { return };
    let told: Vec<&str> = told.split(' ').collect();
    let number = |at: usize| told[at].parse().expect("a number");
    let place = Place { ranks: number(1), hosts: number(2), host: number(3) };
    common::open_cuda_libraries();
    let part = load_ranks(&tiny(told[0]), WeightDtype::F32, place, None, &mut |_| ());
    let mut find = || Ok(told[4].to_owned());
    if let Err(error) = follow(part.expect("it loads"), PATIENCE, &mut find, &mut || ()) {
        eprintln!("followed: {error}");
        std::process::exit(LOST);
    }
}

/// A follower's process, killed when it is dropped.
struct Follower(Child);

impl Follower {
    fn start(name: &str, place: Place, address: &str) -> Self {
        let Place { ranks, hosts, host } = place;
        let mut command = Command::new(std::env::current_exe().expect("a test has a path"));
        command.args(["--exact", "a_follower", "--nocapture"]);
        command.env(FOLLOWS, format!("{name} {ranks} {hosts} {host} {address}"));
        command.env("CUDA_VISIBLE_DEVICES", host.to_string());
        let piped = command.stdout(Stdio::null()).stderr(Stdio::piped());
        Self(piped.spawn().expect("this test can be started"))
    }

    /// Its exit code, and what it said.
    fn ended(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        let mut stderr = self.0.stderr.take().expect("it is piped");
        std::io::Read::read_to_string(&mut stderr, &mut said).expect("text");
        (self.0.wait().expect("it ends").code(), said)
    }

    fn signal(&self, name: &str) {
        let sent =
            Command::new("kill").args([format!("-{name}"), self.0.id().to_string()]).status();
        assert!(sent.is_ok_and(|status| status.success()), "SIG{name}");
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether the machine's own GPUs are tested.
fn on_the_machine() -> bool {
    std::env::var_os("HEADSTART_CUDA_TESTS").is_some_and(|v| v == "device")
}

/// Whether the machine has NCCL, and a GPU for each process.
fn can_run(ranks: usize, hosts: usize) -> bool {
    common::open_cuda_libraries();
    let enough =
        || ranks == hosts && cuda::devices() >= hosts && Communicators::available().is_ok();
    let can = !on_the_machine() || enough();
    if !can {
        eprintln!("SKIPPED {ranks} ranks in {hosts} processes: not as many GPUs here, or not NCCL");
    }
    can
}

fn lead(
    name: &str,
    listener: &TcpListener,
    place: Place,
    silence_max: Duration,
) -> Result<Box<dyn Executor>, LeadError> {
    let part = load_ranks(&tiny(name), WeightDtype::F32, place, None, &mut |_| ());
    let options = CudaOptions { kv_tokens: KV_TOKENS, ..CudaOptions::default() };
    let times = HostTimes { join_timeout: PATIENCE, silence_max };
    cuda::lead(part.expect("it loads"), &options, times, listener)
}

/// A leader and its followers.
fn start(
    name: &str,
    ranks: usize,
    hosts: usize,
    silence_max: Duration,
) -> (Box<dyn Executor>, Vec<Follower>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let address = listener.local_addr().expect("bound").to_string();
    let place = |host| Place { ranks, hosts, host };
    let followers = (1..hosts).map(|host| Follower::start(name, place(host), &address)).collect();
    (lead(name, &listener, place(0), silence_max).expect("everyone comes"), followers)
}

/// As many ranks that share a GPU of this process.
fn together(name: &str, ranks: usize) -> Box<dyn Executor> {
    let ranks = Ranks::SameDevice(ranks);
    let model = cuda::load(&tiny(name), WeightDtype::F32, ranks, None, &mut |_| ());
    let options = CudaOptions { kv_tokens: KV_TOKENS, ..CudaOptions::default() };
    Box::new(CudaExecutor::new(model.expect("it loads"), &options).expect("options are right"))
}

/// What is found at every position of two texts, over the whole vocabulary, and behind them: the last
/// steps are recorded ones.
fn read(runner: &mut Runner, sampling: &Sampling) -> Vec<Vec<Found>> {
    let vocab = runner.executor.limits().vocab_size;
    let text = |seed: u32| -> common::Sequence {
        let tokens: Vec<u32> = (0..40u32).map(|i| (i * 37 + seed) % vocab as u32).collect();
        runner.sequence(&tokens, sampling)
    };
    let (mut one, mut two) = (text(5), text(11));
    let everything = |position| Probe {
        position,
        target: Some((position * 11 % vocab) as u32),
        sample: true,
        top: vocab,
    };
    let probes = || (0..40).map(everything).collect::<Vec<_>>();
    let mut found = runner.extend(&mut [(&mut one, probes()), (&mut two, vec![])]);
    one.tokens.push(1);
    two.tokens.push(2);
    found.extend(runner.generate(&mut [one, two], 5));
    found
}

/// Ends in good order; what recorded sums goes before the communicators, or this never ends.
fn end(leader: impl Sized, followers: Vec<Follower>) {
    drop(leader);
    for follower in followers {
        let (code, said) = follower.ended();
        assert_eq!(code, Some(0), "the leader says goodbye: {said}");
    }
}

#[test]
fn processes_give_the_bits_of_ranks_on_one_gpu() {
    let drawn =
        Sampling { temperature: 0.8, seed: 7, frequency_penalty: 0.4, ..Sampling::default() };
    for (name, ranks, hosts) in [("llama3-rope", 2, 2), ("gemma2", 4, 2), ("qwen3", 3, 3)] {
        // NCCL promises no order, which only two have in common.
        if !can_run(ranks, hosts) || (on_the_machine() && ranks > 2) {
            continue;
        }
        let (leader, followers) = start(name, ranks, hosts, PATIENCE);
        let mut spread = Runner::on(leader);
        let mut alone = Runner::on(together(name, ranks));
        for sampling in [&Sampling::default(), &drawn] {
            let (found, expected) = (read(&mut spread, sampling), read(&mut alone, sampling));
            assert_eq!(found, expected, "{name}: {ranks} ranks, {hosts} processes");
        }
        end(spread, followers);
    }
}

#[test]
fn pages_of_all_processes_leave_and_come_back() {
    let (name, ranks) = ("gemma2", 2);
    if !can_run(ranks, 2) {
        return;
    }
    let (mut leader, followers) = start(name, ranks, 2, PATIENCE);
    let parts = load_parts(&tiny(name), WeightDtype::F32, ranks);
    let mut cpu = Runner::parallel(&parts, ranks, 64);
    read(&mut cpu, &Sampling::default());
    let (mut page, mut back) = (Vec::new(), Vec::new());
    cpu.executor.read_page(PageId(0), &mut page).expect("a page");
    assert_eq!(leader.kv_format(), cpu.executor.kv_format());
    leader.write_page(PageId(5), &page).expect("a page");
    leader.read_page(PageId(5), &mut back).expect("a page");
    assert_eq!(back, page);
    leader.read_page(PageId(6), &mut back).expect("a page");
    assert_ne!(back, page);
    assert!(leader.write_page(PageId(5), &page[1..]).is_err_and(|error| !error.fatal));
    end(leader, followers);
}

/// A step that computes three tokens.
fn step(executor: &mut dyn Executor) -> Result<Vec<Vec<Found>>, String> {
    let (context, sampling) = ([1, 2, 3], Sampling::default());
    let row = Row {
        context: &context,
        start: 0,
        pages: &[PageId(0)],
        answer_start: 0,
        probes: &[],
        sampling: &sampling,
        pending: None,
    };
    executor.execute(&[row]).map_err(|error| {
        assert!(error.fatal, "{}", error.message);
        error.message
    })
}

/// The others wait for it in a sum, on their devices, where no closed connection frees them.
#[test]
fn who_waits_for_a_process_that_stalls_is_freed() {
    if !can_run(3, 3) {
        return;
    }
    let silence_max = Duration::from_secs(5);
    let (mut leader, mut followers) = start("qwen3", 3, 3, silence_max);
    step(&mut *leader).expect("all are there");
    let stalled = followers.pop().expect("two follow");
    stalled.signal("STOP");
    let said = step(&mut *leader).expect_err("one stalls");
    assert_eq!(said, "tensor-parallel rank 2 was lost: its process was silent for 5s");
    assert_eq!(step(&mut *leader).expect_err("for good"), said);
    drop(leader);
    for (follower, stalls) in followers.into_iter().map(|f| (f, false)).chain([(stalled, true)]) {
        if stalls {
            follower.signal("CONT");
        }
        let (code, said) = follower.ended();
        assert_eq!(code, Some(LOST), "{said}");
        let lost = "followed: tensor-parallel rank 0 was lost: its process has closed";
        assert!(said.contains(lost), "stalled: {stalls}: {said}");
    }
}

#[test]
fn a_killed_process_is_named() {
    if !can_run(2, 2) {
        return;
    }
    let (mut leader, followers) = start("llama3-rope", 2, 2, PATIENCE);
    // Decode steps are recorded by now.
    let mut runner = Runner::on(leader);
    read(&mut runner, &Sampling::default());
    leader = runner.executor;
    followers[0].signal("KILL");
    let said = step(&mut *leader).expect_err("it is gone");
    assert!(said.starts_with("tensor-parallel rank 1 was lost: its process has closed"), "{said}");
}

/// Ranks on a CPU do not sum with ranks on GPUs.
#[test]
fn another_device_is_refused() {
    use headstart_engine::executor::cpu;
    use headstart_engine::model::{LoadOptions, Weights};
    if !can_run(2, 2) {
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let address = listener.local_addr().expect("bound").to_string();
    let place = |host| Place { ranks: 2, hosts: 2, host };
    let on_cpu = std::thread::spawn({
        let address = address.clone();
        move || {
            let options = LoadOptions { dtype: WeightDtype::F32, threads: 1 };
            let weights =
                Weights::load_ranks(&tiny("qwen3"), options, place(1).local(), 2, &mut |_| ());
            let weights = weights.expect("the model is right");
            let mut find = || Ok(address.clone());
            let refused = cpu::follow(&weights, 1, place(1), PATIENCE, &mut find, &mut || ());
            // Then the right one comes.
            (refused, Follower::start("qwen3", place(1), &address))
        }
    });
    let leader = lead("qwen3", &listener, place(0), PATIENCE).expect("the right one comes");
    let (refused, follower) = on_cpu.join().expect("no panic");
    let said = refused.expect_err("another device").to_string();
    assert!(said.ends_with("it has --device cpu, the leader cuda"), "{said}");
    end(leader, vec![follower]);
}
