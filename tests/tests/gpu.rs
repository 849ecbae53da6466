//! GPUs: what happens without one, and the golden files on one.

use headstart_engine::executor::cuda;
use headstart_tests::golden::check_file;
use headstart_tests::http::Client;
use headstart_tests::process::{Process, fixture, free_address, run, wait_ready};

/// Skips by name.
fn gpus_or_skip(test: &str) -> bool {
    let found = cuda::devices() > 0;
    if !found {
        eprintln!("SKIPPED {test}: this machine has no GPU");
    }
    found
}

/// One sentence and a failure, not a panic and not a fall-back. Every other test of this folder
/// shows that the same binaries serve here without libcuda.
#[test]
fn without_a_gpu_device_cuda_says_what_is_missing() {
    if cuda::devices() > 0 {
        return;
    }
    let model = fixture("stories260k").display().to_string();
    let (http, grpc) = (free_address(), free_address());
    let doors = ["--http", &http, "--grpc", &grpc];
    let cases: [(&str, Vec<&str>); 2] = [
        ("headstart", [&["up", "--drafter", &model, "--base", &model][..], &doors].concat()),
        ("headstart", vec!["bench", "engine", "--shape", "llama-3.2-3b"]),
    ];
    for (binary, arguments) in cases {
        let (code, _, error) = run(binary, &[&arguments[..], &["--device", "cuda"]].concat());
        assert_eq!(code, Some(1), "{arguments:?}: {error}");
        let said = error.lines().filter(|line| line.contains("no CUDA device can be used")).count();
        assert_eq!(said, 1, "{arguments:?}: {error}");
        assert!(!error.contains("panicked"), "{error}");
    }
}

/// As on the CPU: every position of every file, in single precision.
#[test]
fn the_golden_files_on_a_gpu() {
    if !gpus_or_skip("the_golden_files_on_a_gpu") {
        return;
    }
    let (http, grpc) = (free_address(), free_address());
    let models = ["up", "--drafter", "smollm2", "--base", "smollm2", "--dtype", "f32"];
    let doors = ["--device", "cuda", "--encoding", "text", "--http", &http, "--grpc", &grpc];
    let mut process = Process::start("headstart", &[&models[..], &doors[..]].concat());
    let client = Client::new(&http);
    wait_ready(&client, &mut [&mut process]);
    check_file(&client, "smollm2", "smollm2_to_smollm2.jsonl", 16, 1);
    check_file(&client, "smollm2", "smollm2_to_smollm2.w4_t0.55.jsonl", 1, 1);
    assert_eq!(process.terminate(), Some(0));
}
