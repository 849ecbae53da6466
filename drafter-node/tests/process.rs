//! `headstart-drafter` as a process: what it refuses, how it serves, and how it leaves.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use headstart_cluster::testing::EtcdServer;
use headstart_cluster::{Etcd, Membership, NodeRecord, Tier};
use headstart_proto::v1::node_client::NodeClient;
use headstart_proto::v1::{InfoRequest, NodeRole};
use headstart_service::channel;
use headstart_service::channel::KeepAlive;
use headstart_service::link::Link;
use headstart_service::net::Dialer;
use headstart_service::text_client::fetch_model_text;

/// Far beyond anything a test waits for.
const PATIENCE: Duration = Duration::from_secs(60);

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/stories260k")
}

/// The binary, with nothing of this process's own configuration.
fn drafter() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headstart-drafter"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("HEADSTART_") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    command
}

fn refused(args: &[&str]) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = drafter().args(args).output().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

/// A process that is killed when the test ends.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn signal(&self, name: &str) {
        let id = self.0.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    async fn ended(&mut self) -> Option<i32> {
        for _ in 0..600 {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("the process did not end");
    }
}

async fn registered(etcd: &Etcd) -> NodeRecord {
    let mut view = etcd.watch();
    let seen = view.wait_for(|view| !view.nodes.is_empty());
    let view = tokio::time::timeout(PATIENCE, seen).await.expect("the node registers").unwrap();
    view.nodes.values().next().unwrap().clone()
}

#[test]
fn a_wrong_configuration_is_refused_with_code_two_and_its_field() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "model = 'm.gguf'\nslots = 'many'").unwrap();
    let path = file.path().to_str().unwrap();
    let (code, message) = refused(&["--config", path]);
    assert_eq!(code, Some(2));
    assert!(
        message.starts_with(&format!("error: {path}: slots: invalid value 'many'")),
        "{message}"
    );
    let (code, message) = refused(&[]);
    assert_eq!(code, Some(2));
    assert!(message.contains("--model"), "{message}");
    let (code, message) = refused(&[
        "--model=m.gguf",
        "--listen=0.0.0.0:0",
        "--etcd=127.0.0.1:1",
        "--etcd-timeout=200ms",
    ]);
    assert_eq!(code, Some(2));
    assert!(message.starts_with("error: --advertise: expected host:port"), "{message}");
}

#[test]
fn help_tells_every_option_and_its_variable() {
    let output = drafter().arg("--help").output().unwrap();
    assert!(output.status.success());
    let help = String::from_utf8(output.stdout).unwrap();
    for word in ["--model", "HEADSTART_MODEL", "--etcd", "HEADSTART_ETCD", "--config", "Example:"] {
        assert!(help.contains(word), "{help}");
    }
}

#[test]
fn a_port_in_use_and_a_silent_etcd_are_one_line_each() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let (code, message) = refused(&["--model=m.gguf", &format!("--listen={address}")]);
    assert_eq!(code, Some(1));
    assert_eq!(message, format!("error: --listen {address}: address already in use\n"));
    // The listener accepts connections, and never says a word.
    let etcd = format!("--etcd={address}");
    let (code, message) = refused(&["--model=m.gguf", &etcd, "--etcd-timeout=300ms"]);
    assert_eq!(code, Some(1));
    let expected = format!("error: etcd at {address} did not answer within 300ms");
    assert!(message.starts_with(&expected) && message.lines().count() == 1, "{message}");
}

#[tokio::test]
async fn a_missing_model_is_named() {
    let server = EtcdServer::start().await.unwrap();
    let etcd = format!("--etcd={}", server.endpoint());
    let (code, message) =
        tokio::task::spawn_blocking(move || refused(&["--model=/nowhere/m.gguf", &etcd]))
            .await
            .unwrap();
    assert_eq!(code, Some(1));
    assert!(message.contains("/nowhere/m.gguf") && message.starts_with("error: "), "{message}");
}

#[tokio::test]
async fn a_drafter_registers_serves_and_leaves_when_told() {
    let server = EtcdServer::start().await.unwrap();
    let etcd = Etcd::connect(&[server.endpoint()], "shop", PATIENCE).await.unwrap();
    let mut process = Process(
        drafter()
            .arg("--model")
            .arg(model())
            .args(["--etcd", &server.endpoint(), "--node-id=d-1", "--slots=3", "--threads=1"])
            .args(["--dtype=f32", "--kv-tokens=256"])
            .env("HEADSTART_CLUSTER", "shop")
            .env("HEADSTART_NAME", "stories")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let record = registered(&etcd).await;
    assert_eq!((record.node_id.as_str(), record.tier), ("d-1", Tier::Drafter));
    assert_eq!((record.model.as_str(), record.slots, record.context_length), ("stories", 3, 256));
    let channel = channel::connect(&record.address, PATIENCE).await.unwrap();
    let info = NodeClient::new(channel).info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.role(), info.dtype.as_str()), (NodeRole::Drafter, "f32"));
    let link =
        Link::new(&Dialer::default(), &record.address, PATIENCE, KeepAlive::CLUSTER).unwrap();
    let text = fetch_model_text(link, &record.text_fingerprint, PATIENCE).await.unwrap();
    assert_eq!(text.tokenizer().fingerprint().to_string(), record.tokenizer_fingerprint);

    process.signal("TERM");
    assert_eq!(process.ended().await, Some(0));
    let mut view = etcd.watch();
    let gone = view.wait_for(|view| view.nodes.is_empty());
    tokio::time::timeout(PATIENCE, gone).await.expect("the node deregisters").unwrap();
    let mut log = String::new();
    process.0.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    for line in ["node is ready", "draining", "node has left"] {
        assert!(log.contains(line), "{log}");
    }
}
