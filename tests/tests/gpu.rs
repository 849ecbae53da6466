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
    /// Processes that share them.
    hosts: usize,
    /// GPUs that each of their machines has.
    gpus: &'static str,
}

const CPU: On = On { device: "cpu", tp: "1", hosts: 1, gpus: "1" };
const CUDA: On = On { device: "cuda", tp: "1", hosts: 1, gpus: "1" };
/// Two ranks that share a GPU.
const TWO_RANKS: On = On { device: "cuda", tp: "2", hosts: 1, gpus: "1" };
/// Two ranks that have one each.
const TWO_GPUS: On = On { device: "cuda", tp: "2", hosts: 1, gpus: "2" };
/// Two ranks that have one each, and a process each.
const TWO_PROCESSES: On = On { device: "cuda", tp: "2", hosts: 2, gpus: "1" };

/// What all nodes of a cluster are told.
struct Cluster {
    etcd: EtcdServer,
    libraries: String,
    model: String,
    _runtime: tokio::runtime::Runtime,
}

impl Cluster {
    fn new() -> Self {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let etcd = runtime.block_on(EtcdServer::start()).expect("etcd-server is installed");
        let (libraries, model) = (emulated(), fixture("stories260k").display().to_string());
        Self { etcd, libraries, model, _runtime: runtime }
    }

    /// The processes of a node, the first of which is the node; each writes to `log` and its number,
    /// where one is given.
    fn node(&self, binary: &str, on: On, log: Option<&Path>, more: &[&str]) -> Vec<Process> {
        let endpoint = self.etcd.endpoint();
        let process = |host: usize| {
            let (hosts, host) = (on.hosts.to_string(), host.to_string());
            let mut arguments = vec!["--model", &self.model, "--name", "m", "--etcd", &endpoint];
            arguments.extend(["--dtype", "f32", "--threads", "1", "--kv-tokens", "2048"]);
            arguments.extend(["--device", on.device, "--tp", on.tp]);
            arguments.extend(["--tp-hosts", &hosts, "--tp-host-rank", &host]);
            arguments.extend(more);
            let gpus = ("HEADSTART_EMULATED_GPUS", on.gpus);
            let env = [("HEADSTART_CUDA_LIBRARIES", &*self.libraries), gpus];
            match log {
                Some(log) => {
                    let log = log.with_extension(&host);
                    Process::start_logged_env(binary, &arguments, &log, &env)
                }
                None => Process::start_env(binary, &arguments, &env),
            }
        };
        (0..on.hosts).map(process).collect()
    }

    fn router(&self) -> (Process, Client) {
        let (http, grpc, endpoint) = (free_address(), free_address(), self.etcd.endpoint());
        let doors = ["--http", &http, "--grpc", &grpc, "--etcd", &endpoint];
        (Process::start("headstart-router", &doors), Client::new(&http))
    }
}

/// A request for a story about somebody.
fn story(name: &str, max_tokens: usize) -> Value {
    let content = format!("Once upon a time, there was a little {name} who lived in the woods.");
    let messages = json!([{"role": "user", "content": content}]);
    json!({"model": "m", "messages": messages, "max_tokens": max_tokens, "temperature": 0,
        "return_token_ids": true, "headstart": {"draft_tokens_max": 20}})
}

/// What comes of it.
fn answer(client: &Client, body: &Value) -> Value {
    let answer = client.post("/v1/chat/completions", body);
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.body["choices"][0].clone()
}

/// The answers of a cluster whose reading and writing bases run on these, and the tokens whose KV moved
/// between them.
fn answers(bases: [On; 2]) -> (Vec<Value>, f64) {
    let (cluster, metrics) = (Cluster::new(), free_address());
    let score = ["--role", "score", "--node-id", "b1"];
    let decode = ["--role", "decode", "--node-id", "b2", "--metrics", &metrics];
    let mut parts = cluster.node("headstart-base", bases[0], None, &score);
    parts.extend(cluster.node("headstart-base", bases[1], None, &decode));
    parts.extend(cluster.node("headstart-drafter", CPU, None, &[]));
    let (mut router, client) = cluster.router();
    let mut all: Vec<&mut Process> = parts.iter_mut().collect();
    all.push(&mut router);
    wait_ready(&client, &mut all);
    for role in ["score", "decode"] {
        until("the router knows both bases", || client.bases_up(role) == Some(1));
    }
    let ask = |name: &&str| answer(&client, &story(name, 60));
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
        [TWO_PROCESSES, CPU],
        [CUDA, TWO_PROCESSES],
    ] {
        let (found, moved) = answers(bases);
        println!("{bases:?}: {moved} tokens of KV moved");
        assert_eq!(found, expected, "{bases:?}");
        assert!(moved > 0.0, "{bases:?}");
    }
}

/// The leader waits for the killed process in a sum on its GPU. It ends with a sentence, and the answer
/// goes on where there is another base.
#[test]
fn a_killed_rank_ends_its_node_and_the_answer_goes_on_elsewhere() {
    let (cluster, logs) = (Cluster::new(), tempfile::tempdir().expect("a folder"));
    let (log, metrics) = (logs.path().join("base"), free_address());
    // So long a silence is none.
    let more = ["--node-id", "b1", "--metrics", &metrics, "--tp-timeout", "10m"];
    let mut base = cluster.node("headstart-base", TWO_PROCESSES, Some(&log), &more);
    let mut others = cluster.node("headstart-drafter", CPU, None, &[]);
    let (mut router, client) = cluster.router();
    let mut all: Vec<&mut Process> = base.iter_mut().chain(&mut others).collect();
    all.push(&mut router);
    wait_ready(&client, &mut all);
    let request = story("girl", 200);
    let expected = answer(&client, &request);

    let follower = base.pop().expect("two processes");
    let leader = base.pop().expect("two processes");
    let answered = std::thread::scope(|scope| {
        let asked = scope.spawn(|| answer(&client, &request));
        until("the base is at it", || counter(&metrics, "headstart_base_slots_used") >= 1.0);
        // Now it stands still.
        follower.signal("STOP");
        others.extend(cluster.node("headstart-base", CPU, None, &["--node-id", "b2"]));
        until("the router knows another base", || client.bases_up("unified") == Some(2));
        follower.signal("KILL");
        assert_eq!(leader.ended(), Some(1), "the node fails");
        asked.join().expect("an answer")
    });
    assert_eq!(answered, expected);
    let said = std::fs::read_to_string(log.with_extension("0")).expect("a log");
    let lost =
        "error: the engine has stopped: tensor-parallel rank 1 was lost: its process has closed";
    assert!(said.contains(lost), "{said}");
    for process in others.into_iter().chain([router]) {
        assert_eq!(process.terminate(), Some(0), "everything else stops cleanly");
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
    let few =
        "--tp: 2 of the 4 ranks are this process's, with a GPU for each: expected 2 GPUs, found 1";
    for (libraries, tp, said) in [(&all, "4", few), (&some, "2", nccl)] {
        let ranks = ["--tp", tp, "--tp-hosts", "2", "--tp-host-rank", "1"];
        let more = ["--model", &model, "--device", "cuda", "--tp-leader", "127.0.0.1:1"];
        let env = [("HEADSTART_CUDA_LIBRARIES", &**libraries), ("HEADSTART_EMULATED_GPUS", "1")];
        let (code, _, error) = run_env("headstart-base", &[&ranks[..], &more].concat(), &env);
        assert_eq!(code, Some(1), "{said}: {error}");
        assert_eq!(error.matches(said).count(), 1, "{said}: {error}");
    }
}
