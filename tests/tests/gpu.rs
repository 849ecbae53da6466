//! GPUs: what happens without one, and the golden files on one. What is about more than kernels runs on
//! the emulated device.

use std::path::Path;
use std::process::Command;

use headstart_cluster::testing::EtcdServer;
use headstart_engine::executor::cuda;
use headstart_tests::golden::check_file;
use headstart_tests::http::{Client, counter};
use headstart_tests::process::{Process, fixture, free_address, run, wait_ready};
use serde_json::{Value, json};

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

/// The folder of the emulated device's libraries.
fn emulated() -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/emulated-cuda");
    let built = Command::new(script).output().expect("the script runs");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    String::from_utf8(built.stdout).expect("a path").trim().to_owned()
}

/// The answers of a cluster whose reading and writing bases run on these devices, and the tokens whose
/// KV moved between them.
fn answers(devices: [&str; 2]) -> (Vec<Value>, f64) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let etcd = runtime.block_on(EtcdServer::start()).expect("etcd-server is installed");
    let (endpoint, libraries, metrics) = (etcd.endpoint(), emulated(), free_address());
    let model = fixture("stories260k").display().to_string();
    let start = |binary: &str, device: &str, more: &[&str]| {
        let mut arguments = vec!["--model", &model, "--name", "m", "--etcd", &endpoint];
        arguments.extend(["--dtype", "f32", "--threads", "1", "--kv-tokens", "2048"]);
        arguments.extend(["--device", device]);
        arguments.extend(more);
        Process::start_env(binary, &arguments, &[("HEADSTART_CUDA_LIBRARIES", &libraries)])
    };
    let mut parts = [
        start("headstart-base", devices[0], &["--role", "score"]),
        start("headstart-base", devices[1], &["--role", "decode", "--metrics", &metrics]),
        start("headstart-drafter", "cpu", &[]),
    ];
    let (http, grpc) = (free_address(), free_address());
    let doors = ["--http", &http, "--grpc", &grpc, "--etcd", &endpoint];
    let mut router = Process::start("headstart-router", &doors);
    let client = Client::new(&http);
    let mut all: Vec<&mut Process> = parts.iter_mut().collect();
    all.push(&mut router);
    wait_ready(&client, &mut all);
    let writer = r#"headstart_router_nodes{tier="base",role="decode",state="up"}"#;
    while client.metric(writer) != Some(1) {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let ask = |name: &&str| {
        let content =
            format!("Once upon a time, there was a little {name} who lived in the woods.");
        let messages = json!([{"role": "user", "content": content}]);
        let body = json!({"model": "m", "messages": messages, "max_tokens": 60,
            "temperature": 0, "return_token_ids": true, "headstart": {"draft_tokens_max": 20}});
        let answer = client.post("/v1/chat/completions", &body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.body["choices"][0].clone()
    };
    let answers = ["girl", "bear", "fox"].iter().map(ask).collect();
    let moved = counter(&metrics, "headstart_base_kv_moved_total");
    for process in parts.into_iter().chain([router]) {
        assert_eq!(process.terminate(), Some(0), "everything stops cleanly");
    }
    (answers, moved)
}

#[test]
fn kv_moves_between_a_gpu_and_a_cpu_and_answers_stay_the_same() {
    let (expected, moved) = answers(["cpu", "cpu"]);
    assert!(moved > 0.0);
    for devices in [["cuda", "cpu"], ["cpu", "cuda"], ["cuda", "cuda"]] {
        let (found, moved) = answers(devices);
        println!("{devices:?}: {moved} tokens of KV moved");
        assert_eq!(found, expected, "{devices:?}");
        assert!(moved > 0.0, "{devices:?}");
    }
}
