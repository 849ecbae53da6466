//! Ranks in several processes give what ranks in one process give. Here the processes are threads
//! that share nothing but their connections.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;

use common::{KV_TOKENS, Runner, load_parts, tiny};
use headstart_engine::Sampling;
use headstart_engine::collective::hosts::{JoinError, Place};
use headstart_engine::core::pages::PageId;
use headstart_engine::executor::cpu::{self, CpuOptions, follow};
use headstart_engine::executor::hosts::{FollowError, HostTimes, LeadError};
use headstart_engine::executor::{Executor, Found, Probe};
use headstart_engine::model::{LoadOptions, WeightDtype, Weights};

/// Long enough for any machine: nothing here waits for it.
const PATIENCE: Duration = Duration::from_secs(120);

fn weights(name: &str, place: Place) -> Weights {
    let options = LoadOptions { dtype: WeightDtype::F32, threads: 1 };
    Weights::load_ranks(&tiny(name), options, place.local(), place.ranks, &mut |_| {})
        .expect("the model is right")
}

type Following = JoinHandle<Result<(), FollowError>>;

fn follower(name: &'static str, address: String, place: Place) -> Following {
    std::thread::spawn(move || {
        let mut find = || Ok(address.clone());
        follow(&weights(name, place), 2, place, PATIENCE, &mut find, &mut || {})
    })
}

fn times(join_timeout: Duration) -> HostTimes {
    HostTimes { join_timeout, silence_max: PATIENCE }
}

fn lead(
    name: &str,
    listener: &TcpListener,
    place: Place,
    chunk_tokens: usize,
) -> Result<Box<dyn Executor>, LeadError> {
    let parts = weights(name, place).parts().to_vec();
    let options = CpuOptions { threads: 2, page_size: 16, kv_tokens: KV_TOKENS, chunk_tokens };
    cpu::lead(parts, options, place, times(PATIENCE), listener)
}

/// A leader and its followers.
fn start(name: &'static str, ranks: usize, hosts: usize) -> (Box<dyn Executor>, Vec<Following>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let address = listener.local_addr().expect("bound").to_string();
    let place = |host| Place { ranks, hosts, host };
    let following = (1..hosts).map(|host| follower(name, address.clone(), place(host))).collect();
    (lead(name, &listener, place(0), 7).expect("everyone comes"), following)
}

/// What is found at every position of two texts, over the whole vocabulary.
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

#[test]
fn processes_give_the_bits_of_one() {
    let drawn = Sampling { temperature: 0.8, seed: 7, ..Sampling::default() };
    for (name, ranks, hosts) in
        [("llama3-rope", 2, 2), ("gemma2", 4, 2), ("qwen3", 3, 3), ("qwen2-bias.gguf", 2, 2)]
    {
        let whole = load_parts(&tiny(name), WeightDtype::F32, ranks);
        for sampling in [&Sampling::default(), &drawn] {
            let expected = read(&mut Runner::parallel(&whole, 4, 7), sampling);
            let (leader, following) = start(name, ranks, hosts);
            let mut runner = Runner::on(leader);
            assert_eq!(
                read(&mut runner, sampling),
                expected,
                "{name}: {ranks} ranks, {hosts} hosts"
            );
            drop(runner);
            for follower in following {
                follower.join().expect("no panic").expect("the leader says goodbye");
            }
        }
    }
}

#[test]
fn pages_of_all_processes_leave_and_come_back() {
    let (mut leader, following) = start("gemma2", 4, 2);
    let whole = load_parts(&tiny("gemma2"), WeightDtype::F32, 4);
    let mut alone = Runner::parallel(&whole, 4, 7);
    read(&mut alone, &Sampling::default());
    let (mut page, mut back) = (Vec::new(), Vec::new());
    alone.executor.read_page(PageId(0), &mut page).expect("a page");
    assert_eq!(leader.kv_format(), alone.executor.kv_format());
    leader.write_page(PageId(5), &page).expect("a page");
    leader.read_page(PageId(5), &mut back).expect("a page");
    assert_eq!(back, page);
    leader.read_page(PageId(6), &mut back).expect("a page");
    assert_ne!(back, page);
    assert!(leader.write_page(PageId(5), &page[1..]).is_err_and(|error| !error.fatal));
    drop(leader);
    for follower in following {
        follower.join().expect("no panic").expect("the leader says goodbye");
    }
}

#[test]
fn who_does_not_fit_is_told_why_and_the_right_one_still_joins() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let address = listener.local_addr().expect("bound").to_string();
    let place = |ranks, hosts, host| Place { ranks, hosts, host };
    let leader = std::thread::spawn(move || lead("qwen3", &listener, place(2, 2, 0), 7));
    let refusals: [(&str, Place, &str); 4] = [
        ("llama3-rope", place(2, 2, 1), "another model"),
        ("qwen3", place(4, 2, 1), "it has --tp 4 and --tp-hosts 2, the leader 2 and 2"),
        ("qwen3", place(3, 3, 2), "it has --tp 3 and --tp-hosts 3, the leader 2 and 2"),
        ("qwen3", place(2, 2, 0), "there is no follower 0 of 2"),
    ];
    for (name, place, expected) in refusals {
        let refused = follower(name, address.clone(), place).join().expect("no panic");
        let said = refused.expect_err(expected).to_string();
        assert!(said.contains("refused") && said.contains(expected), "{said}");
    }
    // Another version, and somebody who is no rank at all.
    let mut other = TcpStream::connect(&address).expect("listens");
    other.write_all(b"HSTP\xff\x00").expect("listens");
    let mut said = Vec::new();
    other.read_to_end(&mut said).expect("an answer");
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("it speaks protocol 255, the leader 2: run the same version"), "{said}");
    let mut stranger = TcpStream::connect(&address).expect("listens");
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("listens");
    let right = follower("qwen3", address, place(2, 2, 1));
    let led = leader.join().expect("no panic").expect("the right one comes");
    drop(led);
    right.join().expect("no panic").expect("the leader says goodbye");
}

#[test]
fn who_does_not_come_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let place = Place { ranks: 4, hosts: 2, host: 0 };
    let parts = weights("qwen3", place).parts().to_vec();
    let times = times(Duration::from_millis(50));
    let missing = cpu::lead(parts, CpuOptions::default(), place, times, &listener);
    let said = missing.err().expect("nobody comes").to_string();
    assert_eq!(said, "tensor-parallel ranks 2, 3 did not join within 50ms");
    let address = listener.local_addr().expect("bound").to_string();
    drop(listener);
    let place = Place { host: 1, ..place };
    let mut find = || Ok(address.clone());
    let timeout = Duration::from_millis(50);
    let alone = follow(&weights("qwen3", place), 1, place, timeout, &mut find, &mut || {});
    let said = alone.expect_err("nobody leads");
    assert!(matches!(said, FollowError::Join(JoinError::NoLeader { .. })), "{said}");
}

/// A follower that breaks off in the middle of a step.
#[test]
fn a_lost_process_fails_the_step_for_good_and_is_named() {
    let (leader, following) = start("llama3-rope", 2, 2);
    let pulse = leader.pulse().expect("ranks elsewhere");
    let mut runner = Runner::on(leader);
    read(&mut runner, &Sampling::default());
    // As if the follower had closed: it loses its leader, the leader's steps fail.
    pulse.lose(headstart_engine::collective::RankLost::new(1, "it was cut off"));
    let context = [1, 2, 3];
    let sampling = Sampling::default();
    let row = headstart_engine::executor::Row {
        context: &context,
        start: 0,
        pages: &[PageId(0)],
        answer_start: 0,
        probes: &[],
        sampling: &sampling,
        pending: None,
    };
    let error = runner.executor.execute(&[row]).expect_err("a rank is gone");
    assert!(error.fatal);
    assert_eq!(error.message, "tensor-parallel rank 1 was lost: it was cut off");
    for follower in following {
        let lost = follower.join().expect("no panic").expect_err("the leader is gone");
        let said = lost.to_string();
        assert!(
            said.starts_with("tensor-parallel rank 0 was lost: its process has closed"),
            "{said}"
        );
    }
}
