//! The golden files through the HTTP door of `headstart up`, one process, embedded membership.

use headstart_tests::golden::check_file;
use headstart_tests::http::Client;
use headstart_tests::process::{Process, free_address, wait_ready};

fn up(encoding: &str, tp: &str) -> (Process, Client) {
    let (http, grpc) = (free_address(), free_address());
    let models = ["--drafter", "smollm2", "--base", "smollm2", "--dtype", "f32", "--tp", tp];
    let doors = ["--encoding", encoding, "--http", &http, "--grpc", &grpc];
    let mut process = Process::start("headstart", &[&["up"], &models[..], &doors[..]].concat());
    let client = Client::new(&http);
    wait_ready(&client, &mut [&mut process]);
    (process, client)
}

#[test]
fn a_draft_as_text() {
    let (process, client) = up("text", "1");
    check_file(&client, "smollm2", "smollm2_to_smollm2.jsonl", 16, 1);
    check_file(&client, "smollm2", "smollm2_to_smollm2.w4_t0.55.jsonl", 1, 1);
    assert_eq!(process.terminate(), Some(0));
}

#[test]
fn a_draft_as_ids() {
    let (process, client) = up("ids", "1");
    check_file(&client, "smollm2", "smollm2_to_smollm2.ids.jsonl", 1, 1);
    check_file(&client, "smollm2", "smollm2_to_smollm2.ids.w4_t0.55.jsonl", 16, 1);
    assert_eq!(process.terminate(), Some(0));
}

#[test]
fn a_base_of_two_ranks() {
    let (process, client) = up("text", "2");
    check_file(&client, "smollm2", "smollm2_to_smollm2.jsonl", 16, 1);
    assert_eq!(process.terminate(), Some(0));
}

#[test]
fn a_base_of_four_ranks() {
    let (process, client) = up("ids", "4");
    check_file(&client, "smollm2", "smollm2_to_smollm2.ids.jsonl", 16, 1);
    assert_eq!(process.terminate(), Some(0));
}
