//! One suite for both stores, and what only a real etcd can show.

use std::sync::Arc;
use std::time::Duration;

use headstart_cluster::testing::EtcdServer;
use headstart_cluster::{
    BaseRole, Change, ClusterError, Etcd, InMemory, Membership, NodeRecord, Tier, View, diff,
};
use tokio::sync::watch;

/// The shortest lease etcd grants is two seconds.
const TTL: Duration = Duration::from_secs(1);
/// Far beyond anything a test waits for.
const PATIENCE: Duration = Duration::from_secs(60);

fn record(id: &str, incarnation: u64) -> NodeRecord {
    NodeRecord {
        node_id: id.parse().unwrap(),
        tier: Tier::Base,
        address: "127.0.0.1:7000".into(),
        model: "qwen".into(),
        tokenizer_fingerprint: "ab".repeat(32),
        text_fingerprint: "cd".repeat(32),
        context_length: 4096,
        slots: 8,
        kv_tokens: 0,
        draining: false,
        incarnation,
        base_role: BaseRole::Unified,
        kv_address: String::new(),
    }
}

async fn until(view: &mut watch::Receiver<Arc<View>>, what: &str, ok: impl Fn(&View) -> bool) {
    let reached = tokio::time::timeout(PATIENCE, view.wait_for(|view| ok(view))).await;
    reached.unwrap_or_else(|_| panic!("never saw: {what}")).expect("the watch lives");
}

fn has(view: &View, id: &str) -> bool {
    view.nodes.contains_key(&id.parse().unwrap())
}

async fn connect(server: &EtcdServer) -> Etcd {
    Etcd::connect(&[server.endpoint()], "test", PATIENCE).await.unwrap()
}

/// Holds for every store: `one` and `two` are two members of the same cluster.
async fn suite(one: &dyn Membership, two: &dyn Membership) {
    registered_nodes_are_seen_updated_and_deregistered(one, two).await;
    a_record_expires_after_its_registration_died(one, two).await;
    a_restarted_node_replaces_its_record(one, two).await;
    malformed_records_are_refused_by_field(one).await;
}

async fn registered_nodes_are_seen_updated_and_deregistered(
    one: &dyn Membership,
    two: &dyn Membership,
) {
    let mut view = two.watch();
    let before = view.borrow().clone();
    let registration = one.register(record("a", 1), TTL).await.unwrap();
    assert_eq!(registration.node_id().as_str(), "a");
    until(&mut view, "a registered", |view| has(view, "a")).await;
    let with_a = view.borrow().clone();
    assert_eq!(diff(&before, &with_a), [Change::Add(record("a", 1))]);

    registration.update(|record| {
        record.draining = true;
        record.incarnation = 77;
    });
    let drained = NodeRecord { draining: true, ..record("a", 1) };
    until(&mut view, "a draining", |view| view.nodes.values().any(|r| r.draining)).await;
    let expected = [Change::Update { old: record("a", 1), new: drained.clone() }];
    assert_eq!(diff(&with_a, &view.borrow().clone()), expected);

    // It outlives its lease's time as long as it is held.
    tokio::time::sleep(TTL * 4).await;
    assert!(has(&view.borrow(), "a"));
    registration.deregister().await;
    until(&mut view, "a gone", |view| !has(view, "a")).await;
    // Someone who looks later sees the same.
    until(&mut one.watch(), "a gone here too", |view| !has(view, "a")).await;
}

async fn a_record_expires_after_its_registration_died(one: &dyn Membership, two: &dyn Membership) {
    let mut view = two.watch();
    let registration = one.register(record("b", 1), TTL).await.unwrap();
    until(&mut view, "b registered", |view| has(view, "b")).await;
    drop(registration);
    assert!(has(&view.borrow(), "b"), "a crash is not a farewell");
    until(&mut view, "b expired", |view| !has(view, "b")).await;
}

async fn a_restarted_node_replaces_its_record(one: &dyn Membership, two: &dyn Membership) {
    let mut view = two.watch();
    let old = one.register(record("c", 5), TTL).await.unwrap();
    until(&mut view, "c registered", |view| has(view, "c")).await;
    let new = two.register(record("c", 6), TTL).await.unwrap();
    until(&mut view, "the new c", |view| view.nodes.values().any(|r| r.incarnation == 6)).await;

    let late = one.register(record("c", 4), TTL).await.unwrap_err();
    let expected = ClusterError::Superseded { node_id: "c".parse().unwrap(), incarnation: 6 };
    assert_eq!(late, expected);
    // Neither the old start's updates nor its end touch the new record.
    old.update(|record| record.slots = 99);
    old.deregister().await;
    tokio::time::sleep(TTL * 4).await;
    assert_eq!(view.borrow().nodes.values().collect::<Vec<_>>(), [&record("c", 6)]);
    new.deregister().await;
    until(&mut view, "c gone", |view| view.nodes.is_empty()).await;
}

async fn malformed_records_are_refused_by_field(one: &dyn Membership) {
    let bad = NodeRecord { address: "nowhere".into(), ..record("d", 1) };
    let error = one.register(bad, TTL).await.unwrap_err();
    assert!(matches!(error, ClusterError::Invalid { field: "address", .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_memory() {
    let memory = InMemory::new();
    suite(&memory, &memory.clone()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd() {
    let server = EtcdServer::start().await.unwrap();
    suite(&connect(&server).await, &connect(&server).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clusters_of_another_name_are_not_seen() {
    let server = EtcdServer::start().await.unwrap();
    let other = Etcd::connect(&[server.endpoint()], "test-2", PATIENCE).await.unwrap();
    let ours = connect(&server).await;
    let _stranger = other.register(record("x", 1), TTL).await.unwrap();
    let _ours = ours.register(record("a", 1), TTL).await.unwrap();
    until(&mut ours.watch(), "a", |view| has(view, "a")).await;
    assert!(!has(&ours.watch().borrow(), "x"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_values_in_etcd_are_passed_over() {
    let server = EtcdServer::start().await.unwrap();
    let mut raw = etcd_client::Client::connect([server.endpoint()], None).await.unwrap();
    let prefix = "/headstart/test/nodes/";
    raw.put(format!("{prefix}junk"), "{not json", None).await.unwrap();
    let cluster = connect(&server).await;
    let mut view = cluster.watch();
    let wrong_key = serde_json::to_vec(&record("other", 1)).unwrap();
    raw.put(format!("{prefix}liar"), wrong_key, None).await.unwrap();
    raw.put(format!("{prefix}a/b"), "x", None).await.unwrap();
    raw.put(format!("{prefix}bytes"), vec![0xff; 100_000], None).await.unwrap();
    let _good = cluster.register(record("good", 1), TTL).await.unwrap();
    until(&mut view, "good", |view| has(view, "good")).await;
    assert_eq!(view.borrow().nodes.len(), 1);
    // A good record that turns bad is no node any more.
    raw.put(format!("{prefix}good"), "{}", None).await.unwrap();
    until(&mut view, "good gone bad", |view| view.nodes.is_empty()).await;
}

/// A watch that starts from a compacted revision lists again. `connect` returns before its watch
/// is first polled, and nothing polls it while history goes on and is compacted away.
#[test]
fn a_watch_resumes_after_a_compaction() {
    let other = tokio::runtime::Runtime::new().unwrap();
    let watching = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let server = other.block_on(EtcdServer::start()).unwrap();
    let writer = other.block_on(connect(&server));
    let a = other.block_on(writer.register(record("a", 1), PATIENCE)).unwrap();
    let b = other.block_on(writer.register(record("b", 1), PATIENCE)).unwrap();
    let cluster = watching.block_on(connect(&server));
    let mut view = cluster.watch();
    assert!(has(&view.borrow(), "a") && has(&view.borrow(), "b"));
    let c = other.block_on(async {
        b.deregister().await;
        let c = writer.register(record("c", 1), PATIENCE).await.unwrap();
        let mut raw = etcd_client::Client::connect([server.endpoint()], None).await.unwrap();
        let last = raw.put("/elsewhere", "", None).await.unwrap();
        raw.compact(last.header().unwrap().revision(), None).await.unwrap();
        c
    });
    watching.block_on(until(&mut view, "c", |view| has(view, "c")));
    watching.block_on(until(&mut view, "b gone", |view| !has(view, "b")));
    assert!(has(&view.borrow(), "a"));
    // And news flow again.
    other.block_on(c.deregister());
    watching.block_on(until(&mut view, "c gone", |view| !has(view, "c")));
    other.block_on(a.deregister());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_restart_changes_nothing_and_news_flow_again() {
    let mut server = EtcdServer::start().await.unwrap();
    let cluster = connect_patiently(&server).await;
    let mut view = cluster.watch();
    let a = cluster.register(record("a", 1), TTL * 2).await.unwrap();
    until(&mut view, "a", |view| has(view, "a")).await;
    server.kill();
    tokio::time::sleep(TTL * 3).await;
    assert!(has(&view.borrow(), "a"), "the last view stays while etcd is away");
    a.update(|record| record.slots = 3);
    server.resume().await.unwrap();
    until(&mut view, "the update made meanwhile", |view| view.nodes.values().all(|r| r.slots == 3))
        .await;
    assert!(has(&view.borrow(), "a"));
    a.deregister().await;
    until(&mut view, "a gone", |view| !has(view, "a")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_register_again_when_etcd_lost_everything() {
    let mut server = EtcdServer::start().await.unwrap();
    let cluster = connect_patiently(&server).await;
    let mut view = cluster.watch();
    let _a = cluster.register(record("a", 1), TTL * 2).await.unwrap();
    until(&mut view, "a", |view| has(view, "a")).await;
    view.mark_unchanged();
    server.wipe().unwrap();
    server.resume().await.unwrap();
    // A newcomer sees what etcd has: the node is back by itself, under a new lease.
    let newcomer = connect_patiently(&server).await;
    until(&mut newcomer.watch(), "a registered again", |view| has(view, "a")).await;
    assert!(has(&view.borrow(), "a"), "it never left the view of one who knew it");
    assert!(!view.has_changed().unwrap());
}

/// A short call timeout, so that calls into a dead connection end soon.
async fn connect_patiently(server: &EtcdServer) -> Etcd {
    for _ in 0..20 {
        let timeout = Duration::from_secs(3);
        if let Ok(etcd) = Etcd::connect(&[server.endpoint()], "test", timeout).await {
            return etcd;
        }
    }
    panic!("etcd never answered");
}

#[tokio::test]
async fn an_etcd_that_does_not_answer_is_a_typed_error_that_names_it() {
    // It accepts connections and never says a word.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    for address in [silent.local_addr().unwrap(), refused] {
        let endpoint = address.to_string();
        let timeout = Duration::from_millis(300);
        let error =
            Etcd::connect(std::slice::from_ref(&endpoint), "test", timeout).await.unwrap_err();
        assert_eq!(error.code(), "unreachable");
        assert!(error.to_string().contains(&endpoint), "{error}");
    }
}
