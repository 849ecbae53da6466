//! A real cluster: etcd, two drafters, two bases and a router, each its own process. The golden
//! prompts 16 at a time give the same answers; without a drafter there is no answer at all; and
//! every process stops when it is asked to.

use headstart_cluster::testing::EtcdServer;
use headstart_tests::golden::check_file;
use headstart_tests::http::Client;
use headstart_tests::process::{Process, free_address, run, wait_ready};
use serde_json::json;

#[test]
fn sixteen_at_a_time_over_separate_processes() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let etcd = runtime.block_on(EtcdServer::start()).expect("etcd-server is installed");
    let endpoint = etcd.endpoint();
    let (code, model, errors) = run("headstart", &["models", "pull", "smollm2"]);
    assert_eq!(code, Some(0), "{errors}");
    let model = model.trim();
    let node = |binary: &str, id: &str| {
        let address = free_address();
        let arguments = [
            "--model",
            model,
            "--name",
            "smollm2",
            "--node-id",
            id,
            "--dtype",
            "f32",
            "--threads",
            "2",
            "--listen",
            &address,
            "--etcd",
            &endpoint,
        ];
        Process::start(binary, &arguments)
    };
    let mut bases = [node("headstart-base", "b1"), node("headstart-base", "b2")];
    let mut drafters = [node("headstart-drafter", "d1"), node("headstart-drafter", "d2")];
    let (http, grpc) = (free_address(), free_address());
    let doors = ["--http", &http, "--grpc", &grpc, "--etcd", &endpoint, "--encoding", "text"];
    let mut router = Process::start("headstart-router", &doors);
    let client = Client::new(&http);
    let mut processes: Vec<&mut Process> = bases.iter_mut().chain(&mut drafters).collect();
    processes.push(&mut router);
    wait_ready(&client, &mut processes);

    check_file(&client, "smollm2", "smollm2_to_smollm2.jsonl", 16, 2);
    check_file(&client, "smollm2@smollm2", "smollm2_to_smollm2.w4_t0.55.jsonl", 16, 2);

    for drafter in drafters {
        assert_eq!(drafter.terminate(), Some(0), "a drafter stops cleanly");
    }
    let messages = json!([{"role": "user", "content": "What is the capital of France?"}]);
    let request = json!({"model": "smollm2", "messages": messages, "max_tokens": 8});
    let refused = client.post("/v1/chat/completions", &request);
    println!(
        "no drafter: {} {} retry-after {:?}",
        refused.status, refused.body, refused.retry_after
    );
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert!(refused.retry_after.is_some_and(|seconds| seconds.parse::<u32>().is_ok()));
    assert_eq!(client.get("/ready").map(|response| response.status), Some(503));
    assert_eq!(client.get("/health").map(|response| response.status), Some(200));
    for base in bases {
        assert_eq!(base.terminate(), Some(0), "a base stops cleanly");
    }
    assert_eq!(router.terminate(), Some(0), "the router stops cleanly");
}
