//! GPUs: what happens without one, and the golden files on one. What is about more than kernels runs on
//! the emulated device.

use std::path::Path;
use std::process::Command;

use headstart_cluster::testing::EtcdServer;
use headstart_engine::executor::cuda;
use headstart_tests::golden::check_file;
use headstart_tests::http::{Client, counter};
use headstart_tests::process::{Process, fixture, free_address, run, run_env, until, wait_ready};
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

/// What a base runs on.
#[derive(Clone, Copy, Debug)]
struct On {
    device: &'static str,
    /// Tensor-parallel ranks.
    tp: &'static str,
    /// GPUs that its machine has.
    gpus: &'static str,
}

const CPU: On = On { device: "cpu", tp: "1", gpus: "1" };
const CUDA: On = On { device: "cuda", tp: "1", gpus: "1" };
/// Two ranks that share a GPU.
const TWO_RANKS: On = On { device: "cuda", tp: "2", gpus: "1" };
/// Two ranks that have one each.
const TWO_GPUS: On = On { device: "cuda", tp: "2", gpus: "2" };

/// The answers of a cluster whose reading and writing bases run on these, and the tokens whose KV moved
/// between them.
fn answers(bases: [On; 2]) -> (Vec<Value>, f64) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let etcd = runtime.block_on(EtcdServer::start()).expect("etcd-server is installed");
    let (endpoint, libraries, metrics) = (etcd.endpoint(), emulated(), free_address());
    let model = fixture("stories260k").display().to_string();
    let start = |binary: &str, on: On, more: &[&str]| {
        let mut arguments = vec!["--model", &model, "--name", "m", "--etcd", &endpoint];
        arguments.extend(["--dtype", "f32", "--threads", "1", "--kv-tokens", "2048"]);
        arguments.extend(["--device", on.device, "--tp", on.tp]);
        arguments.extend(more);
        let gpus = ("HEADSTART_EMULATED_GPUS", on.gpus);
        Process::start_env(binary, &arguments, &[("HEADSTART_CUDA_LIBRARIES", &libraries), gpus])
    };
    let mut parts = [
        start("headstart-base", bases[0], &["--role", "score"]),
        start("headstart-base", bases[1], &["--role", "decode", "--metrics", &metrics]),
        start("headstart-drafter", CPU, &[]),
    ];
    let (http, grpc) = (free_address(), free_address());
    let doors = ["--http", &http, "--grpc", &grpc, "--etcd", &endpoint];
    let mut router = Process::start("headstart-router", &doors);
    let client = Client::new(&http);
    let mut all: Vec<&mut Process> = parts.iter_mut().collect();
    all.push(&mut router);
    wait_ready(&client, &mut all);
    until("the router knows the writer", || client.bases_up("decode") == Some(1));
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

/// Also where a base is two ranks: each keeps its own heads' part of a page.
#[test]
fn kv_moves_between_a_gpu_and_a_cpu_and_answers_stay_the_same() {
    let (expected, moved) = answers([CPU, CPU]);
    assert!(moved > 0.0);
    for bases in [
        [CUDA, CPU],
        [CPU, CUDA],
        [CUDA, CUDA],
        [TWO_RANKS, CPU],
        [CPU, TWO_RANKS],
        [CUDA, TWO_GPUS],
    ] {
        let (found, moved) = answers(bases);
        println!("{bases:?}: {moved} tokens of KV moved");
        assert_eq!(found, expected, "{bases:?}");
        assert!(moved > 0.0, "{bases:?}");
    }
}

/// Too many ranks, and ranks on several GPUs without NCCL: one sentence, and a failure.
#[test]
fn ranks_that_cannot_be_are_refused_in_a_sentence() {
    let (all, model) = (emulated(), fixture("stories260k").display().to_string());
    let some = tempfile::tempdir().expect("a folder");
    for name in ["libcuda.so", "libnvrtc.so", "libcublasLt.so"] {
        let copied = std::fs::copy(Path::new(&all).join(name), some.path().join(name));
        copied.expect("the emulated libraries can be copied");
    }
    let some = some.path().display().to_string();
    let many = "--tp: expected 1 to 2 ranks, one on each GPU, found 3";
    let heads = "expected 1 to 8 tensor-parallel ranks for this model, found 9";
    let nccl = "libnccl.so.2, which ranks on several GPUs need, is not on this machine";
    for (libraries, gpus, tp, said) in
        [(&all, "2", "3", many), (&all, "1", "9", heads), (&some, "2", "2", nccl)]
    {
        let (http, grpc) = (free_address(), free_address());
        let models = ["up", "--drafter", &model, "--base", &model, "--device", "cuda"];
        let more = ["--tp", tp, "--http", &http, "--grpc", &grpc];
        let env = [("HEADSTART_CUDA_LIBRARIES", &**libraries), ("HEADSTART_EMULATED_GPUS", gpus)];
        let (code, _, error) = run_env("headstart", &[&models[..], &more].concat(), &env);
        assert_eq!(code, Some(1), "{said}: {error}");
        assert_eq!(error.matches(said).count(), 1, "{said}: {error}");
        assert!(!error.contains("panicked"), "{error}");
    }
}
