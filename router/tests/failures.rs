//! What clients get when something is wrong: with them, with a node, with the cluster.

mod common;

use std::time::Duration;

use common::client::{Open, Reply, exchange, get, post, send};
use common::{Cluster, DraftEnding, Step, chat_body};
use headstart_proto::ErrorCode;
use headstart_router::{OnNoDrafter, RouterOptions};

const GOOD: [Step; 4] =
    [Step::Draft("On"), Step::Switch(true, 2, 2), Step::Write("ce"), Step::Stop];

#[tokio::test]
async fn bad_requests_and_what_they_are_told() {
    let cluster = Cluster::start().await;
    cluster.script.set(&GOOD);
    let long = format!(
        r#"{{"model": "big", "messages": [{{"role": "user", "content": "{}"}}]}}"#,
        "x y ".repeat(2000)
    );
    let huge = format!(r#"{{"model": "big", "pad": "{}"}}"#, "x".repeat(10 << 20));
    let with = |extra: &str| chat_body(extra).into_bytes();
    let model = |name: &str| {
        format!(r#"{{"model": "{name}", "messages": [{{"role": "user", "content": "hi"}}]}}"#)
            .into_bytes()
    };
    let cases: Vec<(Vec<u8>, u16, &str, &str)> = vec![
        (b"{".to_vec(), 400, "invalid_argument", "not valid JSON"),
        (b"{\"model\": \"\xff\xfe\"}".to_vec(), 400, "invalid_argument", "must be UTF-8"),
        (b"".to_vec(), 400, "invalid_argument", "not valid JSON"),
        (huge.into_bytes(), 413, "too_large", "at most 4194304 bytes"),
        (long.into_bytes(), 400, "context_length_exceeded", "maximum context length is 512"),
        (model("none"), 404, "model_not_found", "no model \"none\""),
        (model("big@none"), 404, "unknown_drafter", "no drafter \"none\""),
        (with(r#", "headstart": {"drafter": "none"}"#), 404, "unknown_drafter", "no drafter"),
        (with(r#", "headstart": {"window": 0}"#), 400, "invalid_argument", "headstart.window"),
        (
            with(r#", "headstart": {"threshold": 1.5}"#),
            400,
            "invalid_argument",
            "headstart.threshold",
        ),
        (
            with(r#", "max_tokens": 600"#),
            400,
            "context_length_exceeded",
            "max_tokens is too large: 600",
        ),
        (with(r#", "max_tokens": -1"#), 400, "invalid_argument", "max_tokens"),
        (with(r#", "temperature": NaN"#), 400, "invalid_argument", "temperature must be a finite"),
        (with(r#", "top_p": 1e400"#), 400, "invalid_argument", "top_p must be a finite"),
        (with(r#", "tools": [{}]"#), 400, "unsupported", "tools is not supported"),
        (with(r#", "zzz": 1"#), 400, "unsupported", "unknown field zzz"),
    ];
    for (body, status, code, message) in cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(90)]).into_owned();
        let reply = post(cluster.http(), "/v1/chat/completions", &body).await;
        let error = reply.error();
        assert_eq!((error.0, error.1.as_str()), (status, code), "{shown}: {}", error.2);
        assert!(error.2.contains(message), "{shown}: {}", error.2);
        assert_eq!(reply.json()["error"]["type"], "invalid_request_error");
    }
    assert!(cluster.script.serves.lock().unwrap().is_empty(), "no node was asked");
    assert_eq!(get(cluster.http(), "/v2").await.error().0, 404);
    let wrong = exchange(cluster.http(), "DELETE", "/v1/models", b"").await;
    assert_eq!(wrong.error().0, 405);
    assert_eq!(cluster.chat("").await.status, 200, "and it still serves");
}

#[tokio::test]
async fn a_body_without_a_length_is_bounded_too() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let options = RouterOptions { body_bytes_max: 1024, ..Default::default() };
    let cluster = Cluster::with(options).await;
    let mut stream = tokio::net::TcpStream::connect(cluster.http()).await.unwrap();
    let head =
        "POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let chunk = format!("400\r\n{}\r\n", "x".repeat(1024));
    let body = format!("{}0\r\n\r\n", chunk.repeat(3));
    let _ = stream.write_all(body.as_bytes()).await;
    let mut reply = [0; 12];
    stream.read_exact(&mut reply).await.unwrap();
    assert_eq!(&reply, b"HTTP/1.1 413");
}

#[tokio::test]
async fn no_drafter_means_no_answer() {
    let mut cluster = Cluster::start().await;
    cluster.script.set(&GOOD);
    cluster.lose_drafter().await;
    for extra in ["", r#", "stream": true"#] {
        let reply = cluster.chat(extra).await;
        assert_eq!(reply.error(), (503, "no_drafter".into(), "no drafter is up".into()));
        assert_eq!(reply.header("retry-after"), Some("1"));
    }
    assert!(cluster.script.serves.lock().unwrap().is_empty());
    cluster.base.take().unwrap().deregister().await;
    let reply = cluster.chat("").await;
    assert_eq!((reply.error().0, reply.error().1.as_str()), (503, "no_base"));
    assert!(reply.header("retry-after").is_some());
}

#[tokio::test]
async fn an_operator_may_let_the_base_answer_alone() {
    let options = RouterOptions { on_no_drafter: OnNoDrafter::BaseOnly, ..Default::default() };
    let mut cluster = Cluster::with(options).await;
    cluster.script.set(&GOOD);
    assert_eq!(cluster.chat("").await.status, 200);
    let policy = cluster.script.serves.lock().unwrap()[0].draft.unwrap();
    assert!(policy.continue_empty_draft);
    cluster.lose_drafter().await;
    cluster.script.set(&[Step::Write("alone"), Step::Stop]);
    let body = cluster.chat("").await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "alone");
    assert_eq!(body["headstart"]["drafter"], serde_json::Value::Null);
    assert!(cluster.script.serves.lock().unwrap()[1].draft.is_none());
    let (events, _) = cluster.chat(r#", "stream": true"#).await.events();
    assert!(events.iter().all(|event| event["choices"][0]["source"] == "base"));
}

#[tokio::test]
async fn a_base_that_speaks_before_the_draft_is_decided_is_not_heard() {
    let cluster = Cluster::start().await;
    cluster.script.set(&[Step::Write("unaligned"), Step::Stop]);
    let error = cluster.chat("").await.error();
    assert_eq!((error.0, error.1.as_str()), (502, "protocol"));
    assert!(error.2.contains("base-1") && error.2.contains("before the draft was decided"));
    cluster.script.set(&[Step::Switch(false, 0, 0), Step::Write("unaligned"), Step::Stop]);
    let error = cluster.chat("").await.error();
    assert!(error.2.contains("no drafter began"), "{}", error.2);
}

#[tokio::test]
async fn overload_and_absence_of_nodes_are_different_answers() {
    let cluster = Cluster::start().await;
    let cases = [
        (ErrorCode::Overloaded, 429, "overloaded", Some("7")),
        (ErrorCode::Draining, 503, "draining", Some("7")),
        (ErrorCode::Unavailable, 503, "unavailable", Some("7")),
        (ErrorCode::NotFound, 503, "unavailable", Some("7")),
        (ErrorCode::Internal, 500, "internal", Some("7")),
    ];
    for (code, status, name, retry) in cases {
        cluster.script.set(&[Step::Fail(code)]);
        for extra in ["", r#", "stream": true"#] {
            let reply = cluster.chat(extra).await;
            let error = reply.error();
            assert_eq!((error.0, error.1.as_str()), (status, name));
            assert_eq!(reply.header("retry-after"), retry, "{code}");
        }
    }
}

#[tokio::test]
async fn the_only_drafter_that_fails_before_the_switch_fails_the_answer() {
    let resume_timeout = Duration::from_millis(300);
    let cluster = Cluster::with(RouterOptions { resume_timeout, ..Default::default() }).await;
    cluster.script.set(&[Step::Draft("On"), Step::Hang]);
    for (ending, status, part) in [
        (DraftEnding::Fail(ErrorCode::Overloaded), 429, "drafter-1"),
        (DraftEnding::Fail(ErrorCode::Internal), 500, "drafter drafter-1: scripted draft"),
        (DraftEnding::Vanish, 500, "cost 2 drafters at position 2 and is not passed on"),
    ] {
        cluster.script.set_draft(ending);
        let error = cluster.chat("").await.error();
        assert_eq!(error.0, status, "{ending:?}: {}", error.2);
        assert!(error.2.contains(part), "{}", error.2);
        cluster.script.until_live((0, 0)).await;
    }
    // The base's own reason is the better one, when it is the client's business.
    cluster.script.set_draft(DraftEnding::Fail(ErrorCode::NotFound));
    cluster.script.set(&[Step::Fail(ErrorCode::Overloaded)]);
    assert_eq!(cluster.chat("").await.error().0, 429);
}

#[tokio::test]
async fn frames_that_were_seen_are_dropped_and_a_gap_is_an_error() {
    let cluster = Cluster::start().await;
    cluster.script.set(&[
        Step::Draft("On"),
        Step::DraftAt { epoch: 1, position: 0, text: "On" },
        Step::DraftAt { epoch: 0, position: 9, text: "old" },
        Step::Draft("ce"),
        Step::DraftAt { epoch: 1, position: 2, text: "ce" },
        Step::Switch(true, 4, 4),
        Step::Write("."),
        Step::Stop,
    ]);
    assert_eq!(cluster.chat("").await.json()["choices"][0]["message"]["content"], "Once.");

    cluster.script.set(&[
        Step::Draft("On"),
        Step::Gate,
        // Whichever attempt this is, its own frame is the one that counts: each leaves the gap.
        Step::DraftAt { epoch: 1, position: 3, text: "e" },
        Step::DraftAt { epoch: 2, position: 3, text: "e" },
        Step::DraftAt { epoch: 3, position: 3, text: "e" },
        Step::Hang,
    ]);
    let body = chat_body(r#", "stream": true"#);
    let mut open =
        Open::start(cluster.http(), "POST", "/v1/chat/completions", body.as_bytes()).await;
    assert_eq!(open.status, 200);
    let mut seen = open.chunk().await.unwrap();
    cluster.script.gate.cancel();
    while let Some(more) = open.chunk().await {
        seen.push_str(&more);
    }
    let reply = Reply { status: 200, headers: vec![], body: seen };
    let (events, done) = reply.events();
    assert!(!done, "no [DONE] after an error");
    let error = &events.last().unwrap()["error"];
    assert_eq!((&error["code"], &error["type"]), (&"protocol".into(), &"server_error".into()));
    assert!(error["message"].as_str().unwrap().contains("expected position 2, found 3"));
    let reply = cluster.chat("").await;
    assert_eq!(reply.error().0, 502);
    cluster.script.set(&[Step::Draft("On"), Step::Vanish]);
    let error = cluster.chat("").await.error();
    assert!(error.0 == 500 && error.2.contains("cost 2 bases at position 2"), "{error:?}");
    cluster.script.until_live((0, 0)).await;
}

#[tokio::test]
async fn a_client_that_hangs_up_frees_everything() {
    let options = RouterOptions { in_flight_max: 2, queue_requests_max: 0, ..Default::default() };
    let cluster = Cluster::with(options).await;
    cluster.script.set_draft(DraftEnding::Hang);
    cluster.script.set(&[Step::Draft("On"), Step::Hang]);
    for extra in [r#", "n": 2"#, r#", "n": 2, "stream": true"#] {
        let body = chat_body(extra);
        let stream = send(cluster.http(), "POST", "/v1/chat/completions", body.as_bytes()).await;
        cluster.script.until_live((2, 2)).await;
        let refused = cluster.chat("").await;
        assert_eq!(refused.error().0, 429, "both places are taken");
        assert_eq!(refused.header("retry-after"), Some("1"));
        drop(stream);
        cluster.script.until_live((0, 0)).await;
    }
    cluster.script.set_draft(DraftEnding::Eos);
    cluster.script.set(&GOOD);
    let reply = cluster.chat(r#", "n": 2"#).await;
    assert_eq!(reply.status, 200, "both places are free: {}", reply.body);
    assert_eq!(cluster.chat(r#", "n": 3"#).await.error().0, 429, "more than there ever are");
}

#[tokio::test]
async fn no_wait_is_without_a_deadline() {
    let short = Duration::from_millis(200);
    let options =
        RouterOptions { first_frame_timeout: short, frame_timeout: short, ..Default::default() };
    let cluster = Cluster::with(options).await;
    for steps in [vec![Step::Hang], vec![Step::Draft("On"), Step::Hang]] {
        cluster.script.set(&steps);
        let error = cluster.chat("").await.error();
        assert_eq!((error.0, error.1.as_str()), (504, "deadline_exceeded"));
        cluster.script.until_live((0, 0)).await;
    }
    let options = RouterOptions { request_timeout: short, ..Default::default() };
    let cluster = Cluster::with(options).await;
    cluster.script.set(&[Step::Draft("On"), Step::Hang]);
    let (events, done) = cluster.chat(r#", "stream": true"#).await.events();
    assert!(!done);
    assert_eq!(events.last().unwrap()["error"]["code"], "deadline_exceeded");
}

#[tokio::test]
async fn a_router_that_stops_finishes_what_it_has() {
    let mut cluster = Cluster::start().await;
    cluster.script.set(&[Step::Draft("On"), Step::Gate, Step::Draft("ce"), Step::Stop]);
    let body = chat_body(r#", "stream": true"#);
    let mut open =
        Open::start(cluster.http(), "POST", "/v1/chat/completions", body.as_bytes()).await;
    let mut seen = open.chunk().await.unwrap();
    let address = cluster.http();
    cluster.shutdown.cancel();
    let router = cluster.router.take().unwrap();
    let ended = tokio::spawn(router.wait());
    // The door closes.
    while tokio::net::TcpStream::connect(address).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    cluster.script.gate.cancel();
    while let Some(more) = open.chunk().await {
        seen.push_str(&more);
    }
    assert!(seen.ends_with("data: [DONE]\n\n"), "{seen}");
    ended.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_drain_that_takes_too_long_is_cut() {
    let options = RouterOptions { drain_timeout: Duration::from_millis(50), ..Default::default() };
    let mut cluster = Cluster::with(options).await;
    cluster.script.set(&[Step::Draft("On"), Step::Hang]);
    let body = chat_body(r#", "stream": true"#);
    let mut open =
        Open::start(cluster.http(), "POST", "/v1/chat/completions", body.as_bytes()).await;
    let mut seen = open.chunk().await.unwrap();
    cluster.shutdown.cancel();
    while let Some(more) = open.chunk().await {
        seen.push_str(&more);
    }
    assert!(seen.contains("shutting down") && !seen.contains("[DONE]"), "{seen}");
    cluster.router.take().unwrap().wait().await.unwrap();
    cluster.script.until_live((0, 0)).await;
}
