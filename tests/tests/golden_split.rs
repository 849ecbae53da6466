//! Bases of which one reads and another writes on, each its own process: the golden answers come
//! out, from KV that moved. Then the writer is asked to stop in the middle of the load: its answers
//! move to a third base, and not one fails.

use headstart_cluster::testing::EtcdServer;
use headstart_tests::golden::check_file;
use headstart_tests::http::{Client, counter};
use headstart_tests::process::{Process, free_address, run, until, wait_ready};

#[test]
fn a_split_pair_gives_the_golden_answers_and_drains_under_load() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let etcd = runtime.block_on(EtcdServer::start()).expect("etcd-server is installed");
    let endpoint = etcd.endpoint();
    let (code, model, errors) = run("headstart", &["models", "pull", "smollm2"]);
    assert_eq!(code, Some(0), "{errors}");
    let model = model.trim();
    let start = |binary: &str, id: &str, more: &[&str]| {
        let address = free_address();
        let mut arguments = vec!["--model", model, "--name", "smollm2", "--node-id", id];
        arguments.extend(["--dtype", "f32", "--threads", "2", "--slots", "16"]);
        arguments.extend(["--listen", &address, "--etcd", &endpoint]);
        arguments.extend(more);
        Process::start(binary, &arguments)
    };
    let metrics: Vec<String> = (0..3).map(|_| free_address()).collect();
    let base = |id, index: usize, role| {
        start("headstart-base", id, &["--role", role, "--metrics", &metrics[index]])
    };
    let (mut reader, mut writer) = (base("s1", 0, "score"), base("w1", 1, "decode"));
    let mut drafter = start("headstart-drafter", "d1", &[]);
    let (http, grpc) = (free_address(), free_address());
    let doors = ["--http", &http, "--grpc", &grpc, "--etcd", &endpoint, "--encoding", "text"];
    let mut router = Process::start("headstart-router", &doors);
    let client = Client::new(&http);
    wait_ready(&client, &mut [&mut reader, &mut writer, &mut drafter, &mut router]);
    let knows = |role| client.bases_up(role) == Some(1);
    until("the router knows the pair", || knows("score") && knows("decode"));

    check_file(&client, "smollm2", "smollm2_to_smollm2.jsonl", 8, 1);
    let moved = counter(&metrics[1], "headstart_base_kv_moved_total");
    let recomputed = counter(&metrics[1], "headstart_base_kv_recomputed_total");
    let sent = counter(&metrics[0], "headstart_base_kv_sent_bytes_total");
    println!("KV moved: {moved} tokens, {sent} bytes; recomputed: {recomputed} tokens");
    assert!(moved > 0.0 && sent > 0.0);
    assert_eq!(counter(&metrics[0], "headstart_base_written_total"), 0.0, "the reader only reads");

    let mut third = base("u1", 2, "unified");
    until("the router knows the third base", || knows("unified"));
    assert!(third.is_running());
    let drained = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            check_file(&client, "smollm2", "smollm2_to_smollm2.jsonl", 8, 2);
        });
        until("the writer writes", || counter(&metrics[1], "headstart_base_slots_used") >= 2.0);
        let drained = writer.terminate();
        load.join().expect("every answer is as it must be");
        drained
    });
    assert_eq!(drained, Some(0), "the writer stops cleanly");
    for process in [third, reader, drafter, router] {
        assert_eq!(process.terminate(), Some(0), "everything stops cleanly");
    }
}
