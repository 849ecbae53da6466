//! Models from the hub, against a stand-in on the loopback device that answers as the hub does:
//! the entity tag of a large file is its SHA-256, its bytes come from elsewhere by a redirect.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use headstart::models::cache::hex;
use headstart::models::hub::Hub;
use headstart::models::progress::Show;
use headstart::models::{Cancel, ModelError};
use sha2::{Digest, Sha256};

/// What the stand-in does with a file.
#[derive(Clone, Debug)]
struct Remote {
    bytes: Vec<u8>,
    /// The entity tag; 64 digits make it a large file, which is redirected.
    etag: String,
    /// The body ends after so many bytes.
    cut_after: Option<usize>,
    /// The size it claims, where that is a lie.
    claimed_bytes: Option<usize>,
    /// Answers nothing more after the headers.
    stalls: bool,
}

impl Remote {
    fn small(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.to_vec(),
            etag: hex(&Sha256::digest(bytes)[..20]),
            cut_after: None,
            claimed_bytes: None,
            stalls: false,
        }
    }

    fn large(bytes: &[u8]) -> Self {
        Self { etag: hex(&Sha256::digest(bytes)), ..Self::small(bytes) }
    }
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Remote>,
    requests: Vec<String>,
    token: Option<String>,
}

struct StandIn {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    folder: tempfile::TempDir,
}

impl StandIn {
    fn new(files: &[(&str, Remote)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let files = files.iter().map(|(name, file)| ((*name).to_owned(), file.clone())).collect();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, state) = (stream.unwrap(), Arc::clone(&shared));
                // A client that hangs up in the middle is part of the tests.
                std::thread::spawn(move || answer(&stream, address, &state).unwrap_or(()));
            }
        });
        Self { address, state, folder: tempfile::tempdir().unwrap() }
    }

    fn hub(&self) -> Hub {
        Hub {
            endpoint: Some(format!("http://{}", self.address)),
            token: None,
            cache_folder: self.folder.path().join("hub"),
            state_folder: self.folder.path().join("state"),
            stall_max: Duration::from_secs(20),
        }
    }

    fn fetch(&self, model: &str) -> Result<PathBuf, ModelError> {
        fetch(&self.hub(), model)
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Remote)) {
        change(self.state.lock().unwrap().files.get_mut(name).unwrap());
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    /// Blobs in the hub's cache, whole or partial, and links that lead nowhere.
    fn blobs(&self) -> usize {
        let folder = self.folder.path().join("hub/models--owner--repo/blobs");
        std::fs::read_dir(folder).map_or(0, |entries| {
            entries
                .filter(|e| !e.as_ref().unwrap().path().to_string_lossy().ends_with(".lock"))
                .count()
        })
    }
}

fn fetch(hub: &Hub, model: &str) -> Result<PathBuf, ModelError> {
    hub.fetch(&model.parse().unwrap(), Show::Nothing, &Cancel::default())
}

fn answer(stream: &TcpStream, address: SocketAddr, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let (mut start, mut end, mut token) = (0, None, None);
        loop {
            line.clear();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim().split_once(": ") else {
                break;
            };
            if name.eq_ignore_ascii_case("range") {
                let (from, to) = value.trim_start_matches("bytes=").split_once('-').unwrap();
                (start, end) = (from.parse().unwrap(), to.parse::<usize>().ok());
            } else if name.eq_ignore_ascii_case("authorization") {
                token = Some(value.to_owned());
            }
        }
        let mut guard = state.lock().unwrap();
        guard.requests.push(path.clone());
        if guard.token.is_some() && guard.token != token {
            (&*stream).write_all(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")?;
            continue;
        }
        let reply = reply(&path, address, &guard.files, start, end);
        drop(guard);
        if !reply.send(stream)? {
            return Ok(());
        }
    }
}

struct Reply {
    head: String,
    body: Vec<u8>,
    /// Ends the connection after so many bytes of the body.
    cut_after: Option<usize>,
    stalls: bool,
}

impl Reply {
    fn plain(head: String, body: Vec<u8>) -> Self {
        Self { head, body, cut_after: None, stalls: false }
    }

    /// Whether the connection goes on.
    fn send(&self, mut stream: &TcpStream) -> std::io::Result<bool> {
        let length = self.body.len();
        write!(stream, "HTTP/1.1 {}\r\nContent-Length: {length}\r\n\r\n", self.head)?;
        if self.stalls {
            std::thread::sleep(Duration::from_secs(30));
        }
        stream.write_all(&self.body[..self.cut_after.unwrap_or(length).min(length)])?;
        Ok(self.cut_after.is_none() && !self.stalls)
    }
}

fn reply(
    path: &str,
    address: SocketAddr,
    files: &BTreeMap<String, Remote>,
    start: usize,
    end: Option<usize>,
) -> Reply {
    if path == "/api/models/owner/repo/revision/main" {
        let names: Vec<_> = files.keys().map(|n| serde_json::json!({ "rfilename": n })).collect();
        let body = serde_json::json!({ "sha": "c0ffee", "siblings": names }).to_string();
        return Reply::plain("200 OK".to_owned(), body.into_bytes());
    }
    let direct = path.strip_prefix("/owner/repo/resolve/main/");
    let stored = path.strip_prefix("/store/");
    let Some((name, file)) = direct.or(stored).and_then(|n| files.get_key_value(n)) else {
        return Reply::plain("404 Not Found".to_owned(), Vec::new());
    };
    let commit = "X-Repo-Commit: c0ffee";
    if direct.is_some() && file.etag.len() == 64 {
        let head = format!(
            "302 Found\r\nX-Linked-Etag: \"{}\"\r\n{commit}\r\nLocation: http://{address}/store/{name}",
            file.etag
        );
        return Reply::plain(head, Vec::new());
    }
    let all = file.claimed_bytes.unwrap_or(file.bytes.len());
    let stop = end.map_or(file.bytes.len(), |end| (end + 1).min(file.bytes.len()));
    let head = format!(
        "206 Partial Content\r\nETag: \"{}\"\r\n{commit}\r\nContent-Range: bytes {start}-{}/{all}",
        file.etag,
        stop.saturating_sub(1)
    );
    Reply {
        head,
        body: file.bytes[start.min(stop)..stop].to_vec(),
        cut_after: file.cut_after.filter(|_| end.is_none()),
        stalls: file.stalls && end.is_none(),
    }
}

fn sharded() -> Vec<(&'static str, Remote)> {
    let index = br#"{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors","c":"model-1.safetensors"}}"#;
    vec![
        ("README.md", Remote::small(b"# not needed")),
        ("config.json", Remote::small(b"{\"a\": 1}")),
        ("model-1.safetensors", Remote::large(&[1; 5000])),
        ("model-2.safetensors", Remote::large(&[2; 7000])),
        ("model.safetensors.index.json", Remote::small(index)),
        ("pytorch_model.bin", Remote::large(b"not needed")),
        ("tokenizer.json", Remote::large(b"{\"b\": 2}")),
        ("tokenizer_config.json", Remote::small(b"{}")),
    ]
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

#[test]
fn a_gguf_file_comes_once_and_then_from_the_cache() {
    let hub = StandIn::new(&[("m.gguf", Remote::large(&[7; 10_000]))]);
    let path = hub.fetch("owner/repo:m.gguf").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), [7; 10_000]);
    assert_eq!(path.file_name().unwrap(), "m.gguf");
    assert!(!hub.requests().is_empty());
    assert_eq!(hub.fetch("owner/repo:m.gguf").unwrap(), path);
    assert_eq!(hub.requests(), [""; 0]);
}

#[test]
fn a_repository_with_one_gguf_needs_no_file_name() {
    let hub = StandIn::new(&[("m.gguf", Remote::large(b"one")), ("x.md", Remote::small(b"x"))]);
    assert!(hub.fetch("owner/repo").unwrap().ends_with("m.gguf"));
    let two = StandIn::new(&[("a.gguf", Remote::large(b"a")), ("b.gguf", Remote::large(b"b"))]);
    let message = two.fetch("owner/repo").unwrap_err().to_string();
    assert!(message.contains("a.gguf, b.gguf") && message.contains(":file"), "{message}");
}

#[test]
fn a_sharded_repository_brings_what_is_needed_and_nothing_else() {
    let hub = StandIn::new(&sharded());
    let folder = hub.fetch("owner/repo").unwrap();
    assert_eq!(
        names(&folder),
        [
            "config.json",
            "model-1.safetensors",
            "model-2.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    );
    assert_eq!(std::fs::read(folder.join("model-2.safetensors")).unwrap(), [2; 7000]);
    hub.requests();
    assert_eq!(hub.fetch("owner/repo").unwrap(), folder);
    assert_eq!(hub.requests(), [""; 0], "everything is cached");
}

#[test]
fn a_repository_that_came_by_half_is_completed() {
    let hub = StandIn::new(&sharded());
    hub.change("model-2.safetensors", |file| file.cut_after = Some(100));
    let message = hub.fetch("owner/repo").unwrap_err().to_string();
    assert!(message.contains("model-2.safetensors"), "{message}");
    hub.change("model-2.safetensors", |file| file.cut_after = None);
    hub.requests();
    let folder = hub.fetch("owner/repo").unwrap();
    assert_eq!(std::fs::read(folder.join("model-2.safetensors")).unwrap(), [2; 7000]);
    let again = hub.requests();
    assert!(!again.iter().any(|path| path.ends_with("model-1.safetensors")), "{again:?}");
}

#[test]
fn what_is_not_there_is_named() {
    let hub = StandIn::new(&[("m.gguf", Remote::large(b"m"))]);
    let message = hub.fetch("owner/repo:other.gguf").unwrap_err().to_string();
    assert!(message.contains("hf:owner/repo:other.gguf") && message.contains("404"), "{message}");
    assert!(message.contains("no such file"), "{message}");
    let message = hub.fetch("owner/nothing").unwrap_err().to_string();
    assert!(message.contains("hf:owner/nothing") && message.contains("404"), "{message}");
    let message = StandIn::new(&[("x.md", Remote::small(b"x"))]).fetch("owner/repo");
    assert!(message.unwrap_err().to_string().contains("neither config.json nor a .gguf"));
}

#[test]
fn a_wrong_checksum_removes_the_file() {
    let hub = StandIn::new(&[("m.gguf", Remote::large(b"right"))]);
    let right = hex(&Sha256::digest(b"right"));
    hub.change("m.gguf", |file| file.bytes = b"wrong".to_vec());
    let message = hub.fetch("owner/repo:m.gguf").unwrap_err().to_string();
    assert!(message.contains("m.gguf") && message.contains(&right), "{message}");
    assert!(message.contains("SHA-256") && message.contains("removed"), "{message}");
    assert_eq!(hub.blobs(), 0);
    hub.change("m.gguf", |file| file.bytes = b"right".to_vec());
    hub.fetch("owner/repo:m.gguf").unwrap();
}

#[test]
fn a_wrong_size_removes_the_file() {
    let hub = StandIn::new(&[("m.gguf", Remote::small(b"short"))]);
    hub.change("m.gguf", |file| file.claimed_bytes = Some(50));
    let message = hub.fetch("owner/repo:m.gguf").unwrap_err().to_string();
    assert!(message.contains("size in bytes is 5, expected 50"), "{message}");
    assert_eq!(hub.blobs(), 0);
}

#[test]
fn a_transfer_that_breaks_off_leaves_nothing() {
    let hub = StandIn::new(&[("m.gguf", Remote::large(&[3; 50_000]))]);
    hub.change("m.gguf", |file| file.cut_after = Some(0));
    let message = hub.fetch("owner/repo:m.gguf").unwrap_err().to_string();
    assert!(message.contains("hf:owner/repo:m.gguf"), "{message}");
    assert_eq!(hub.blobs(), 0);
}

#[test]
fn a_transfer_that_stands_still_is_given_up() {
    let hub = StandIn::new(&[("m.gguf", Remote::large(&[3; 50_000]))]);
    hub.change("m.gguf", |file| file.stalls = true);
    let impatient = Hub { stall_max: Duration::from_millis(500), ..hub.hub() };
    let message = fetch(&impatient, "owner/repo:m.gguf").unwrap_err().to_string();
    assert!(message.contains("nothing arrived"), "{message}");
    assert_eq!(hub.blobs(), 0);
}

#[test]
fn a_file_damaged_in_another_tools_cache_is_noticed() {
    let hub = StandIn::new(&[("m.gguf", Remote::large(b"right"))]);
    let path = hub.fetch("owner/repo:m.gguf").unwrap();
    std::fs::remove_dir_all(hub.folder.path().join("state")).unwrap();
    std::fs::write(path.canonicalize().unwrap(), b"wrong").unwrap();
    let message = hub.fetch("owner/repo:m.gguf").unwrap_err().to_string();
    assert!(message.contains("SHA-256"), "{message}");
    assert_eq!(std::fs::read(hub.fetch("owner/repo:m.gguf").unwrap()).unwrap(), b"right");
}

#[test]
fn a_private_model_needs_the_token() {
    let hub = StandIn::new(&[("m.gguf", Remote::large(b"secret"))]);
    hub.state.lock().unwrap().token = Some("Bearer hf_right".to_owned());
    let message = hub.fetch("owner/repo:m.gguf").unwrap_err().to_string();
    assert!(message.contains("401") && message.contains("HF_TOKEN"), "{message}");
    let entitled = Hub { token: Some("hf_right".to_owned()), ..hub.hub() };
    fetch(&entitled, "owner/repo:m.gguf").unwrap();
}

#[test]
fn an_index_cannot_lead_out_of_the_repository() {
    let mut files = sharded();
    files[4].1 = Remote::small(br#"{"weight_map":{"a":"../../../escape.safetensors"}}"#);
    let message = StandIn::new(&files).fetch("owner/repo").unwrap_err().to_string();
    assert!(message.contains("escape.safetensors") && message.contains("no name"), "{message}");
}

#[test]
fn a_hub_that_is_not_there_is_named() {
    let hub = StandIn::new(&[]);
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nowhere = Hub { endpoint: Some(format!("http://{free}")), ..hub.hub() };
    let message = fetch(&nowhere, "owner/repo:m.gguf").unwrap_err().to_string();
    assert!(message.contains("hf:owner/repo:m.gguf") && message.contains("onnect"), "{message}");
}
