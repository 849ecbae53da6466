//! The golden files of the pair with two tokenizers: SmolLM2 drafts, Qwen2.5-Coder takes over.

use headstart_tests::golden::check_file;
use headstart_tests::http::Client;
use headstart_tests::process::{Process, free_address, wait_ready};

#[test]
#[ignore = "needs the 1.1 GB Qwen2.5-Coder model and 8 GB of memory: make test-full"]
fn smollm2_drafts_and_qwen_takes_over() {
    let (http, grpc) = (free_address(), free_address());
    let models = ["--drafter", "smollm2", "--base", "qwen2.5-coder", "--dtype", "f32"];
    let doors = ["--http", &http, "--grpc", &grpc];
    let mut process = Process::start("headstart", &[&["up"], &models[..], &doors[..]].concat());
    let client = Client::new(&http);
    wait_ready(&client, &mut [&mut process]);
    check_file(&client, "qwen2.5-coder", "smollm2_to_qwen2.5-coder.jsonl", 16, 1);
    check_file(&client, "qwen2.5-coder", "smollm2_to_qwen2.5-coder.w4_t0.55.jsonl", 16, 1);
    assert_eq!(process.terminate(), Some(0));
}
