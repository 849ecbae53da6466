//! A base whose tensor-parallel ranks are processes of their own: the golden answers come out; a rank
//! that is killed or stalls ends its node at once, with a sentence that names it.

use std::path::Path;
use std::time::Instant;

use headstart_cluster::testing::EtcdServer;
use headstart_tests::golden::check_file;
use headstart_tests::http::{Client, counter};
use headstart_tests::process::{Process, fixture, free_address, run, until, wait_ready};
use serde_json::json;

fn etcd() -> (tokio::runtime::Runtime, EtcdServer) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let etcd = runtime.block_on(EtcdServer::start()).expect("etcd-server is installed");
    (runtime, etcd)
}

fn smollm2() -> String {
    let (code, model, errors) = run("headstart", &["models", "pull", "smollm2"]);
    assert_eq!(code, Some(0), "{errors}");
    model.trim().to_owned()
}

/// Waits for a line of a log.
fn said(log: &Path, what: &str) {
    until(what, || std::fs::read_to_string(log).is_ok_and(|text| text.contains(what)));
}

/// What all parts of a cluster are told.
struct Cluster {
    etcd: EtcdServer,
    model: String,
    _runtime: tokio::runtime::Runtime,
}

impl Cluster {
    fn new(model: String) -> Self {
        let (runtime, etcd) = etcd();
        Self { etcd, model, _runtime: runtime }
    }

    fn node(&self, binary: &str, log: &Path, more: &[&str]) -> Process {
        let endpoint = self.etcd.endpoint();
        let mut arguments = vec!["--model", &self.model, "--name", "m", "--etcd", &endpoint];
        arguments.extend(["--device", "cpu"]);
        arguments.extend(more);
        Process::start_logged(binary, &arguments, log)
    }

    fn router(&self) -> (Process, Client) {
        let (http, grpc, endpoint) = (free_address(), free_address(), self.etcd.endpoint());
        let doors = ["--http", &http, "--grpc", &grpc, "--etcd", &endpoint, "--encoding", "text"];
        (Process::start("headstart-router", &doors), Client::new(&http))
    }
}

const TWO: [&str; 6] = ["--dtype", "f32", "--tp", "2", "--tp-hosts", "2"];

#[test]
fn two_processes_give_the_golden_answers_and_a_killed_one_ends_the_node() {
    let (cluster, logs) = (Cluster::new(smollm2()), tempfile::tempdir().expect("a folder"));
    let log = |name: &str| logs.path().join(name);
    let metrics = free_address();
    let rank = |name: &str, rank: &str| {
        // They find each other through etcd, under the node's id.
        let mut more = TWO.to_vec();
        more.extend(["--node-id", "b1", "--tp-host-rank", rank, "--threads", "1"]);
        // A follower has none of its own: it takes no address.
        more.extend(["--metrics", &metrics]);
        cluster.node("headstart-base", &log(name), &more)
    };
    let start = |round: usize| (rank(&format!("l{round}"), "0"), rank(&format!("f{round}"), "1"));
    let (mut leader, mut follower) = start(1);
    let drafting = ["--dtype", "f32", "--node-id", "d1", "--threads", "1"];
    let mut drafter = cluster.node("headstart-drafter", &log("drafter"), &drafting);
    let (mut router, client) = cluster.router();
    wait_ready(&client, &mut [&mut leader, &mut follower, &mut drafter, &mut router]);

    check_file(&client, "m", "smollm2_to_smollm2.jsonl", 8, 1);

    // Both are asked to stop, the follower first: it stays until the leader has drained.
    follower.signal("TERM");
    assert_eq!((leader.terminate(), follower.ended()), (Some(0), Some(0)), "both stop cleanly");

    let (mut leader, mut follower) = start(2);
    // By now the first one is out of the router's view.
    said(&log("l2"), "node is ready");
    wait_ready(&client, &mut [&mut leader, &mut follower, &mut router]);
    let content = "Write a very long story about a lighthouse.";
    let messages = json!([{"role": "user", "content": content}]);
    let request = json!({"model": "m", "messages": messages, "max_tokens": 1000});
    let answer = std::thread::scope(|scope| {
        let asked = scope.spawn(|| client.post("/v1/chat/completions", &request));
        until("the base is at it", || counter(&metrics, "headstart_base_slots_used") >= 1.0);
        follower.signal("KILL");
        asked.join().expect("an answer")
    });
    let body = answer.body.to_string();
    println!("killed: {} {body}", answer.status);
    assert_eq!(answer.status, 503, "{body}");
    assert!(["unavailable", "no_base"].iter().any(|code| body.contains(code)), "{body}");
    assert_eq!(leader.ended(), Some(1), "the node fails");
    let lost =
        "error: the engine has stopped: tensor-parallel rank 1 was lost: its process has closed";
    said(&log("l2"), lost);
    for process in [drafter, router] {
        assert_eq!(process.terminate(), Some(0), "everything else stops cleanly");
    }
}

#[test]
fn who_does_not_fit_is_refused_and_who_stalls_is_lost() {
    let cluster = Cluster::new(fixture("stories260k").display().to_string());
    let logs = tempfile::tempdir().expect("a folder");
    let log = |name: &str| logs.path().join(name);
    let address = free_address();
    let rank = |name: &str, more: &[&str]| {
        let mut all = TWO.to_vec();
        all.extend(["--tp-leader", &address, "--tp-timeout", "2s", "--threads", "1"]);
        all.extend(more);
        cluster.node("headstart-base", &log(name), &all)
    };
    let leader = rank("leader", &["--node-id", "b1"]);
    let wrong = ["--tp-host-rank", "1", "--model", &cluster.model, "--dtype", "bf16"];
    let (endpoint, tp) = (cluster.etcd.endpoint(), ["--tp", "2", "--tp-hosts", "2"]);
    let more = ["--device", "cpu", "--etcd", &endpoint, "--tp-leader", &address];
    let (code, _, errors) = run("headstart-base", &[&wrong[..], &tp, &more].concat());
    assert_eq!(code, Some(1), "{errors}");
    assert!(errors.contains("refused this process: it has another model"), "{errors}");

    let follower = rank("follower", &["--tp-host-rank", "1"]);
    said(&log("leader"), "node is ready");
    follower.signal("STOP");
    let stopped = Instant::now();
    assert_eq!(leader.ended(), Some(1), "the node fails");
    println!("a stalled rank was found after {:?}", stopped.elapsed());
    said(&log("leader"), "tensor-parallel rank 1 was lost: its process was silent for 2s");
    follower.signal("CONT");
    assert_eq!(follower.ended(), Some(1), "who lost its leader goes");
    said(&log("follower"), "tensor-parallel rank 0 was lost: its process has closed");
}

#[test]
fn numbers_that_do_not_fit_are_told_before_anything_is_loaded() {
    let model = fixture("stories260k").display().to_string();
    let cases: [(&[&str], &str); 3] = [
        (&["--tp", "3", "--tp-hosts", "2"], "--tp: expected a multiple of --tp-hosts 2, found 3"),
        (&["--tp-host-rank", "1"], "--tp-host-rank: expected a number below --tp-hosts 1, found 1"),
        (&["--tp", "2", "--nnodes", "2", "--node-rank", "1"], "--node-id: expected the node's id"),
    ];
    for (arguments, expected) in cases {
        let (code, _, errors) = run("headstart-base", &[&["--model", &model], arguments].concat());
        assert_eq!(code, Some(2), "{errors}");
        assert!(errors.contains(expected), "{errors}");
    }
}
