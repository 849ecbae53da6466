//! Bad input through every door: each answers with a status and a message that names what was
//! wrong, and the cluster serves on.

use std::fs;
use std::net::TcpListener;
use std::path::Path;

use headstart_tests::http::{Client, Response};
use headstart_tests::process::{Process, fixture, free_address, run, wait_ready};
use serde_json::{Value, json};

fn stories() -> String {
    fixture("stories260k").display().to_string()
}

fn up() -> (Process, Client) {
    let (http, grpc, model) = (free_address(), free_address(), stories());
    let arguments = [
        "up",
        "--drafter",
        &model,
        "--base",
        &model,
        "--http",
        &http,
        "--grpc",
        &grpc,
        "--drafter-name",
        "drafter",
        "--base-name",
        "base",
    ];
    let mut process = Process::start("headstart", &arguments);
    let client = Client::new(&http);
    wait_ready(&client, &mut [&mut process]);
    (process, client)
}

fn request(change: &Value) -> Value {
    let mut body = json!({
        "model": "base",
        "messages": [{"role": "user", "content": "Once upon a time"}],
        "max_tokens": 8,
    });
    for (key, value) in change.as_object().into_iter().flatten() {
        body[key] = value.clone();
    }
    body
}

/// Prints what was seen and checks it.
fn expect(what: &str, response: &Response, status: u16, words: &[&str]) {
    let message = response.body["error"]["message"].as_str().unwrap_or_default();
    println!("{what}: {} {message}", response.status);
    assert_eq!(response.status, status, "{what}: {}", response.body);
    for word in words {
        let text = response.body["error"].to_string();
        assert!(text.contains(word), "{what}: expected `{word}` in {text}");
    }
}

#[test]
fn over_http() {
    let (process, client) = up();
    let message = |role: &str, content: Value| json!([{"role": role, "content": content}]);
    let long = "once upon a time ".repeat(2_000);
    let cases: &[(&str, Value, u16, &[&str])] = &[
        ("no messages", json!({"messages": null}), 400, &["messages"]),
        ("empty messages", json!({"messages": []}), 400, &["messages"]),
        ("unknown role", json!({"messages": message("wizard", json!("hi"))}), 400, &["role"]),
        ("empty content", json!({"messages": message("user", json!(""))}), 400, &["content"]),
        (
            "content of a wrong type",
            json!({"messages": message("user", json!(7))}),
            400,
            &["content"],
        ),
        ("negative max_tokens", json!({"max_tokens": -1}), 400, &["max_tokens"]),
        ("zero max_tokens", json!({"max_tokens": 0}), 400, &["max_tokens"]),
        ("huge max_tokens", json!({"max_tokens": 1e18}), 400, &["max_tokens"]),
        ("max_tokens beyond the context", json!({"max_tokens": 100_000}), 400, &["max_tokens"]),
        ("negative temperature", json!({"temperature": -0.1}), 400, &["temperature"]),
        ("huge temperature", json!({"temperature": 1e30}), 400, &["temperature"]),
        ("temperature as NaN", json!({"temperature": "NaN"}), 400, &["temperature"]),
        ("top_p of 0", json!({"top_p": 0}), 400, &["top_p"]),
        ("top_p of 2", json!({"top_p": 2}), 400, &["top_p"]),
        ("n of 0", json!({"n": 0}), 400, &["n"]),
        ("too many stop strings", json!({"stop": vec!["x"; 17]}), 400, &["stop"]),
        (
            "a prompt beyond the context",
            json!({"messages": message("user", json!(long))}),
            400,
            &["context"],
        ),
        ("an unknown model", json!({"model": "gpt-9"}), 404, &["gpt-9"]),
        ("an unknown drafter", json!({"model": "base@nobody"}), 404, &["nobody"]),
        (
            "an unknown drafter by name",
            json!({"headstart": {"drafter": "nobody"}}),
            404,
            &["nobody"],
        ),
        ("window 0", json!({"headstart": {"window": 0}}), 400, &["window"]),
        ("threshold 1.5", json!({"headstart": {"threshold": 1.5}}), 400, &["threshold"]),
        ("an unknown extension", json!({"headstart": {"windows": 6}}), 400, &["windows"]),
        ("tools", json!({"tools": [{"type": "function"}]}), 400, &["tools"]),
        ("an unknown field", json!({"temprature": 1}), 400, &["temprature"]),
    ];
    for (what, change, status, words) in cases {
        let response = client.post("/v1/chat/completions", &request(change));
        expect(what, &response, *status, words);
    }
    let raw = |body: &[u8]| client.post_bytes("/v1/chat/completions", body);
    expect("malformed JSON", &raw(b"{\"model\": "), 400, &["JSON"]);
    expect("NaN in JSON", &raw(b"{\"temperature\": NaN}"), 400, &["temperature", "NaN"]);
    expect("not UTF-8", &raw(b"{\"model\": \"\xff\xfe\"}"), 400, &["UTF-8"]);
    expect("nesting without end", &raw("[".repeat(100_000).as_bytes()), 400, &[]);
    expect("a body of 10 MB", &raw(&vec![b' '; 10 << 20]), 413, &["bytes"]);
    let fine = client.post("/v1/chat/completions", &request(&json!({})));
    assert_eq!(fine.status, 200, "the cluster serves on: {}", fine.body);
    assert_eq!(process.terminate(), Some(0));
}

/// The line that says what was wrong.
fn told(errors: &str) -> &str {
    errors.lines().find(|line| line.starts_with("error")).unwrap_or_default()
}

/// Runs `headstart up` on a model that cannot be loaded.
fn refused(what: &str, model: &Path, words: &[&str]) {
    let model = model.display().to_string();
    let (http, grpc) = (free_address(), free_address());
    let arguments = ["up", "--drafter", &model, "--base", &model, "--http", &http, "--grpc", &grpc];
    let (code, _, errors) = run("headstart", &arguments);
    println!("{what}: exit {code:?}: {}", told(&errors));
    assert!(code.is_some_and(|code| code != 0 && code != 101), "{what}: {code:?} {errors}");
    assert!(!errors.contains("panicked"), "{what}: {errors}");
    for word in words {
        assert!(errors.contains(word), "{what}: expected `{word}` in {errors}");
    }
}

/// A GGUF file: magic, version, tensor count, metadata count, then nothing.
fn gguf(magic: &[u8; 4], tensors: u64, metadata: u64) -> Vec<u8> {
    let counts = [tensors.to_le_bytes(), metadata.to_le_bytes()].concat();
    [&magic[..], &3u32.to_le_bytes(), &counts].concat()
}

#[test]
fn broken_models() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).expect("writes");
        path
    };
    let magic = write("magic.gguf", &gguf(b"GGML", 0, 0));
    refused("a wrong magic", &magic, &["magic.gguf", "magic"]);
    let counts = write("counts.gguf", &gguf(b"GGUF", u64::MAX, u64::MAX));
    refused("absurd counts", &counts, &["counts.gguf"]);
    let nowhere = folder.path().join("nowhere.gguf");
    refused("no such file", &nowhere, &["nowhere.gguf"]);
    refused("a directory without a model", folder.path(), &["config.json"]);

    let copy = |name: &str| {
        let target = folder.path().join(name);
        fs::create_dir(&target).expect("creates");
        for file in fs::read_dir(fixture("stories260k")).expect("the fixture") {
            let file = file.expect("an entry");
            fs::copy(file.path(), target.join(file.file_name())).expect("copies");
        }
        target
    };
    let no_tokenizer = copy("no-tokenizer");
    fs::remove_file(no_tokenizer.join("tokenizer.json")).expect("removes");
    refused("no tokenizer", &no_tokenizer, &["tokenizer.json"]);
    let lying = copy("lying-header");
    let weights = lying.join("model.safetensors");
    let mut bytes = fs::read(&weights).expect("reads");
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&weights, &bytes).expect("writes");
    refused("a lying header", &lying, &["model.safetensors", "header"]);
    let short = copy("short-weights");
    let weights = short.join("model.safetensors");
    let bytes = fs::read(&weights).expect("reads");
    fs::write(&weights, &bytes[..bytes.len() / 2]).expect("writes");
    refused("weights cut in half", &short, &["model.safetensors"]);
}

#[test]
fn a_gguf_file_cut_in_half() {
    let (code, path, errors) = run("headstart", &["models", "pull", "smollm2"]);
    assert_eq!(code, Some(0), "{errors}");
    let whole = fs::read(path.trim()).expect("the model is in the cache");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let half = folder.path().join("half.gguf");
    fs::write(&half, &whole[..whole.len() / 2]).expect("writes");
    refused("a GGUF file cut in half", &half, &["half.gguf"]);
    fs::write(&half, &whole[..100_000]).expect("writes");
    refused("a GGUF file cut in its metadata", &half, &["half.gguf"]);
}

#[test]
fn bad_options() {
    let model = stories();
    let held = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let held_address = held.local_addr().expect("bound").to_string();
    let free = free_address();
    let up = |more: &[&str]| {
        let base = ["up", "--drafter", &model, "--base", &model];
        run("headstart", &[&base[..], more].concat())
    };
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("a port in use", &["--http", &held_address, "--grpc", &free], &["in use", "--http"]),
        ("window 0", &["--window", "0"], &["window"]),
        ("threshold 1.5", &["--threshold", "1.5"], &["threshold"]),
        ("an unknown dtype", &["--dtype", "f8"], &["dtype", "f8"]),
        (
            "etcd that does not answer",
            &["--etcd", "127.0.0.1:1", "--http", &free],
            &["etcd", "127.0.0.1:1"],
        ),
    ];
    for (what, more, words) in cases {
        let (code, _, errors) = up(more);
        println!("{what}: exit {code:?}: {}", told(&errors));
        assert!(code.is_some_and(|code| code != 0 && code != 101), "{what}: {code:?} {errors}");
        for word in *words {
            assert!(errors.contains(word), "{what}: expected `{word}` in {errors}");
        }
    }
}
