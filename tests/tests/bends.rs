//! Real processes and a real etcd: etcd goes away and comes back empty while requests run, a node is
//! paused past its lease, and a router leaves while another stays.

use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use headstart_cluster::testing::EtcdServer;
use headstart_cluster::{Etcd, Membership};
use headstart_tests::http::{Client, Response};
use headstart_tests::process::{Process, fixture, free_address, wait_ready};
use serde_json::json;
use tokio::runtime::Runtime;

/// Far beyond anything waited for here.
const PATIENCE: Duration = Duration::from_secs(120);
/// Longer than any lease here.
const OUTAGE: Duration = Duration::from_secs(4);

struct Cluster {
    runtime: Runtime,
    etcd: EtcdServer,
    base: Process,
    drafter: Process,
    router: Process,
    client: Client,
}

impl Cluster {
    fn start() -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let etcd = runtime.block_on(EtcdServer::start()).expect("etcd-server is installed");
        let model = fixture("stories260k").display().to_string();
        let node = |binary: &str, id: &str| {
            let (address, endpoint) = (free_address(), etcd.endpoint());
            let arguments = [
                "--model",
                &model,
                "--name",
                "stories",
                "--node-id",
                id,
                "--threads",
                "1",
                "--lease-ttl",
                "2s",
                "--etcd-timeout",
                "2s",
                "--listen",
                &address,
                "--etcd",
                &endpoint,
            ];
            Process::start(binary, &arguments)
        };
        let (mut base, mut drafter) =
            (node("headstart-base", "b1"), node("headstart-drafter", "d1"));
        let (mut router, client) = router(&etcd);
        wait_ready(&client, &mut [&mut base, &mut drafter, &mut router]);
        Self { runtime, etcd, base, drafter, router, client }
    }

    /// Waits until someone who looks for the first time sees so many nodes in etcd.
    fn until_registered(&self, nodes: usize) {
        let deadline = Instant::now() + PATIENCE;
        let endpoint = [self.etcd.endpoint()];
        let seen = || {
            self.runtime.block_on(async {
                let etcd =
                    Etcd::connect(&endpoint, "default", Duration::from_secs(3)).await.ok()?;
                Some(etcd.watch().borrow().nodes.len())
            })
        };
        while seen() != Some(nodes) {
            assert!(Instant::now() < deadline, "never {nodes} nodes");
            sleep(Duration::from_millis(50));
        }
    }

    fn stop(self) {
        for process in [self.router, self.drafter, self.base] {
            assert_eq!(process.terminate(), Some(0));
        }
    }
}

fn router(etcd: &EtcdServer) -> (Process, Client) {
    let (http, grpc, endpoint) = (free_address(), free_address(), etcd.endpoint());
    let doors = ["--http", &http, "--grpc", &grpc, "--etcd", &endpoint, "--etcd-timeout", "2s"];
    (Process::start("headstart-router", &doors), Client::new(&http))
}

fn ask(client: &Client) -> Response {
    let messages = json!([{"role": "user", "content": "Once upon a time"}]);
    let body =
        json!({"model": "stories", "messages": messages, "max_tokens": 16, "temperature": 0});
    client.post("/v1/chat/completions", &body)
}

/// Runs `meanwhile` while two clients ask without a pause; every request must be answered.
fn under_load(client: &Client, meanwhile: impl FnOnce()) {
    let (stop, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let response = ask(client);
                    assert_eq!(response.status, 200, "{}", response.body);
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        meanwhile();
        stop.store(true, Ordering::Relaxed);
    });
    println!("{} requests, none failed", served.into_inner());
}

/// Whoever waits for etcd can be asked to stop.
#[test]
fn a_process_that_waits_for_etcd_stops_when_asked() {
    let model = fixture("stories260k").display().to_string();
    let node = ["--model", &*model, "--name", "stories"];
    let addresses: [String; 2] = std::array::from_fn(|_| free_address());
    let router = ["--http", &*addresses[0], "--grpc", &addresses[1]];
    let cases =
        [("headstart-base", &node), ("headstart-drafter", &node), ("headstart-router", &router)];
    for (binary, options) in cases {
        // It takes connections, and answers nothing.
        let silent = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let endpoint = silent.local_addr().expect("bound").to_string();
        let waits = ["--etcd", &*endpoint, "--etcd-timeout", "60s"];
        let mut arguments = [&options[..], &waits].concat();
        let listen = free_address();
        if binary != "headstart-router" {
            arguments.extend(["--listen", &listen]);
        }
        let process = Process::start(binary, &arguments);
        let connected = silent.accept().expect("it asks for etcd");
        assert_eq!(process.terminate(), Some(0), "{binary}");
        drop(connected);
    }
}

#[test]
fn etcd_goes_away_and_comes_back_empty_and_nobody_notices() {
    let mut cluster = Cluster::start();
    let client = cluster.client.clone();
    under_load(&client, || {
        // Paused past every lease, which it takes away when it goes on.
        cluster.etcd.set_paused(true).unwrap();
        sleep(OUTAGE);
        cluster.etcd.set_paused(false).unwrap();
        cluster.until_registered(2);
        // Stopped, and back with nothing.
        cluster.etcd.wipe().unwrap();
        sleep(OUTAGE);
        cluster.runtime.block_on(cluster.etcd.resume()).unwrap();
        cluster.until_registered(2);
    });
    // A router that knows nothing of the past serves as well.
    let (mut second, client) = router(&cluster.etcd);
    wait_ready(&client, &mut [&mut second]);
    assert_eq!(ask(&client).status, 200);
    assert_eq!(second.terminate(), Some(0));
    cluster.stop();
}

#[test]
fn a_base_that_is_paused_past_its_lease_is_found_and_comes_back() {
    let cluster = Cluster::start();
    assert_eq!(ask(&cluster.client).status, 200);
    cluster.base.signal("STOP");
    // Its connection stands and says nothing. The frame timeouts are minutes: the pings find it.
    let response = ask(&cluster.client);
    assert_eq!(response.status, 503, "{}", response.body);
    assert!(response.retry_after.is_some());
    cluster.until_registered(1);
    cluster.base.signal("CONT");
    cluster.until_registered(2);
    let deadline = Instant::now() + PATIENCE;
    while ask(&cluster.client).status != 200 {
        assert!(Instant::now() < deadline, "it never served again");
        sleep(Duration::from_millis(50));
    }
    cluster.stop();
}
