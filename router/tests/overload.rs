//! More than the cluster can do, clients who do not read, keys, and routers side by side.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::client::{Open, exchange_with, get, post, send};
use common::{Cluster, DraftEnding, Step, chat_body};
use headstart_proto::v1;
use headstart_proto::v1::router_client::RouterClient;
use headstart_router::{ApiKeys, RouterOptions};
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request};

const GOOD: [Step; 4] =
    [Step::Draft("On"), Step::Switch(true, 2, 2), Step::Write("ce"), Step::Stop];

/// Metrics are the process's, so its tests run one after the other.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A value of the router's metrics, the sum over the lines that start so.
async fn metric(cluster: &Cluster, start: &str) -> f64 {
    let text = get(cluster.http(), "/metrics").await.body;
    let lines = text.lines().filter(|line| line.starts_with(start));
    lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}

async fn until_queued(cluster: &Cluster, class: &str, expected: f64) {
    let name = format!("headstart_router_queue_requests{{class=\"{class}\"}}");
    for _ in 0..3000 {
        if metric(cluster, &name).await == expected {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never {expected} of {class}");
}

fn tagged(content: &str, extra: &str) -> Vec<u8> {
    format!(
        r#"{{"model": "big", "max_tokens": 20, "messages": [{{"role": "user", "content": "{content}"}}]{extra}}}"#
    )
    .into_bytes()
}

#[tokio::test]
async fn what_does_not_fit_waits_in_order_and_a_full_queue_answers_at_once() {
    let _alone = ALONE.lock().await;
    let options =
        RouterOptions { in_flight_max: 1, queue_requests_max: 3, ..RouterOptions::default() };
    let cluster = Cluster::with(options).await;
    cluster.script.set(&[Step::Draft("On"), Step::Gate, Step::Stop]);
    let ask = |content: &'static str, extra: &'static str, headers: &'static str| {
        let http = cluster.http();
        tokio::spawn(async move {
            let body = tagged(content, extra);
            exchange_with(http, "POST", "/v1/chat/completions", headers, &body).await
        })
    };
    let waits = "headstart_router_queue_wait_seconds_count";
    let waits_before = metric(&cluster, waits).await;
    let first = ask("first", "", "");
    cluster.script.until_live((1, 0)).await;
    // The header and the body say how urgent a request is; the body wins.
    let batch = ask("batch", "", "x-headstart-priority: batch\r\n");
    until_queued(&cluster, "batch", 1.0).await;
    let urgent_batch = ask(
        "body",
        r#", "headstart": {"priority": "interactive"}"#,
        "x-headstart-priority: batch\r\n",
    );
    until_queued(&cluster, "interactive", 1.0).await;
    let urgent = ask("urgent", "", "authorization: Bearer other\r\n");
    until_queued(&cluster, "interactive", 2.0).await;
    assert!(metric(&cluster, "headstart_router_queue_tokens").await >= 60.0);
    // Full: whoever is last in the order hears it at once.
    let refused = ask("late", "", "x-headstart-priority: batch\r\n").await.unwrap();
    assert_eq!((refused.error().0, refused.error().1.as_str()), (429, "overloaded"));
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    assert_eq!(refused.header("retry-after"), Some("1"));
    let reason = r#"headstart_router_refused_total{class="batch",reason="full"}"#;
    assert_eq!(metric(&cluster, reason).await, 1.0);
    cluster.script.gate.cancel();
    for running in [first, batch, urgent_batch, urgent] {
        assert_eq!(running.await.unwrap().status, 200);
    }
    let order: Vec<String> = cluster
        .script
        .serves
        .lock()
        .unwrap()
        .iter()
        .map(|serve| serve.prompt_text.clone())
        .collect();
    let place = |content: &str| order.iter().position(|prompt| prompt.contains(content)).unwrap();
    assert!(place("first") < place("body") && place("body") < place("batch"));
    assert!(place("urgent") < place("batch"));
    assert_eq!(metric(&cluster, "headstart_router_queue_requests").await, 0.0);
    assert_eq!(metric(&cluster, waits).await - waits_before, 4.0);

    let wrong = ask("x", r#", "headstart": {"priority": "soon"}"#, "").await.unwrap();
    assert!(wrong.error().2.contains("headstart.priority must be interactive or batch"));
    let wrong = ask("x", "", "x-headstart-priority: soon\r\n").await.unwrap();
    assert_eq!(wrong.error().0, 400);
    assert!(wrong.error().2.contains("x-headstart-priority must be"), "{}", wrong.error().2);
}

#[tokio::test]
async fn a_wait_has_a_deadline_and_the_nodes_slots_are_the_limit() {
    let _alone = ALONE.lock().await;
    let options =
        RouterOptions { queue_timeout: Duration::from_millis(100), ..RouterOptions::default() };
    let cluster = Cluster::with(options).await;
    cluster.script.set_draft(DraftEnding::Hang);
    cluster.script.set(&[Step::Draft("On"), Step::Hang]);
    let body = chat_body(r#", "n": 4"#);
    let held = send(cluster.http(), "POST", "/v1/chat/completions", body.as_bytes()).await;
    cluster.script.until_live((4, 4)).await;
    let refused = cluster.chat("").await;
    assert_eq!((refused.error().0, refused.error().1.as_str()), (429, "overloaded"));
    assert!(refused.error().2.contains("did not come in time"), "{}", refused.error().2);
    assert!(refused.header("retry-after").is_some());
    assert_eq!(cluster.script.serves.lock().unwrap().len(), 4, "no node was asked for more");
    drop(held);
    cluster.script.until_live((0, 0)).await;
    cluster.script.set_draft(DraftEnding::Eos);
    cluster.script.set(&GOOD);
    assert_eq!(cluster.chat("").await.status, 200);
    assert_eq!(cluster.chat(r#", "n": 5"#).await.error().0, 429, "no node has five slots");
}

#[tokio::test]
async fn with_keys_only_their_holders_are_served() {
    let _alone = ALONE.lock().await;
    let keys = ApiKeys::parse("web=sk-web\n").unwrap();
    let options =
        RouterOptions { api_keys: Some(std::sync::Arc::new(keys)), ..RouterOptions::default() };
    let cluster = Cluster::with(options).await;
    cluster.script.set(&GOOD);
    let ask = |headers: &'static str| async {
        let body = chat_body("");
        exchange_with(cluster.http(), "POST", "/v1/chat/completions", headers, body.as_bytes())
            .await
    };
    for headers in ["", "authorization: Bearer sk-other\r\n"] {
        let refused = ask(headers).await;
        assert_eq!((refused.error().0, refused.error().1.as_str()), (401, "invalid_api_key"));
        assert_eq!(refused.json()["error"]["type"], "invalid_request_error");
    }
    assert_eq!(get(cluster.http(), "/v1/models").await.status, 401);
    assert_eq!(get(cluster.http(), "/health").await.status, 200);
    assert_eq!(ask("authorization: Bearer sk-web\r\n").await.status, 200);

    let address = cluster.router.as_ref().unwrap().grpc_addr();
    let mut client = RouterClient::connect(format!("http://{address}")).await.unwrap();
    let request = || {
        Request::new(v1::GenerateRequest {
            model: "big".into(),
            messages: vec![v1::Message { role: "user".into(), content: "hi".into() }],
            ..Default::default()
        })
    };
    assert_eq!(client.generate(request()).await.unwrap_err().code(), Code::Unauthenticated);
    let mut keyed = request();
    keyed.metadata_mut().insert("authorization", "Bearer sk-web".parse().unwrap());
    assert!(client.generate(keyed).await.is_ok());
}

/// Answers that no socket buffer holds.
fn long_answer(end: Step) -> Vec<Step> {
    let mut steps = vec![Step::Draft("On"), Step::Switch(true, 2, 2)];
    steps.extend(vec![Step::Write("abcdefghijklmnopqrstuvwxyz"); 18]);
    steps.push(end);
    steps
}

/// Asks for some megabytes, through a socket that takes little and is never read.
async fn never_read(cluster: &Cluster) -> tokio::net::TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(cluster.http()).await.unwrap();
    let body = chat_body(r#", "n": 4, "stream": true, "logprobs": true, "top_logprobs": 20"#);
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    stream
}

#[tokio::test]
async fn a_reader_that_does_not_read_frees_its_nodes() {
    let _alone = ALONE.lock().await;
    let options = RouterOptions { reader_bytes_max: 4096, ..RouterOptions::default() };
    let cluster = Cluster::with(options).await;
    cluster.script.set(&long_answer(Step::Hang));
    let _unread = never_read(&cluster).await;
    cluster.script.until_served(4).await;
    cluster.script.until_live((0, 0)).await;
    let slow = r#"headstart_router_requests_total{outcome="slow_reader"}"#;
    assert_eq!(metric(&cluster, slow).await, 1.0);

    // Over gRPC: a stream that nobody polls.
    let address = cluster.router.as_ref().unwrap().grpc_addr();
    let mut client = RouterClient::connect(format!("http://{address}")).await.unwrap();
    let request = v1::GenerateRequest {
        model: "big".into(),
        messages: vec![v1::Message { role: "user".into(), content: "hi".into() }],
        n: Some(4),
        top_logprobs: Some(20),
        ..Default::default()
    };
    let mut unread = client.generate(request).await.unwrap().into_inner();
    cluster.script.until_served(8).await;
    cluster.script.until_live((0, 0)).await;
    assert_eq!(metric(&cluster, slow).await, 2.0);
    let error = loop {
        match unread.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it did not end well"),
            Err(status) => break headstart_proto::Error::from_status(&status),
        }
    };
    assert_eq!(error.code.code(), "slow_reader", "{error}");
    cluster.script.set(&GOOD);
    assert_eq!(cluster.chat("").await.status, 200);
}

#[tokio::test]
async fn two_routers_and_one_leaves_under_load() {
    let _alone = ALONE.lock().await;
    let mut cluster = Cluster::start().await;
    cluster.script.set(&GOOD);
    let leaving = CancellationToken::new();
    let options = RouterOptions { queue_timeout: Duration::from_secs(60), ..Default::default() };
    let second = common::router(options, &cluster.membership, &leaving).await;
    let doors = [second.http_addr(), cluster.http()];
    let (served, stop) = (std::sync::Arc::new(AtomicUsize::new(0)), CancellationToken::new());
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (served, stop) = (std::sync::Arc::clone(&served), stop.clone());
            tokio::spawn(async move {
                while !stop.is_cancelled() {
                    answered_by_either(doors).await;
                    served.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    let until = |count: usize| {
        let served = std::sync::Arc::clone(&served);
        async move {
            while served.load(Ordering::SeqCst) < count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    };
    until(50).await;
    leaving.cancel();
    second.wait().await.unwrap();
    let at_exit = served.load(Ordering::SeqCst);
    until(at_exit + 50).await;
    stop.cancel();
    for client in clients {
        client.await.expect("no request failed");
    }
    cluster.script.until_live((0, 0)).await;
    cluster.router.take();
}

/// Asks one door, and the other where that one does not take the request; panics on a failed answer.
async fn answered_by_either(doors: [std::net::SocketAddr; 2]) {
    for _ in 0..1000 {
        for door in doors {
            let Ok(probe) = tokio::net::TcpStream::connect(door).await else { continue };
            drop(probe);
            let asked = tokio::spawn(async move {
                post(door, "/v1/chat/completions", chat_body("").as_bytes()).await
            });
            // A door that closed between the two connections is one that did not take the request.
            let Ok(reply) = asked.await else { continue };
            match reply.status {
                200 => {
                    assert_eq!(reply.json()["choices"][0]["message"]["content"], "Once");
                    return;
                }
                503 | 429 => {}
                status => panic!("{status}: {}", reply.body),
            }
        }
    }
    panic!("neither door took it");
}

#[tokio::test]
async fn a_router_that_drains_says_so_and_sends_away_who_waits() {
    let _alone = ALONE.lock().await;
    let options = RouterOptions { in_flight_max: 1, ..RouterOptions::default() };
    let mut cluster = Cluster::with(options).await;
    cluster.script.set(&[Step::Draft("On"), Step::Gate, Step::Stop]);
    let body = chat_body(r#", "stream": true"#);
    let mut live =
        Open::start(cluster.http(), "POST", "/v1/chat/completions", body.as_bytes()).await;
    let mut seen = live.chunk().await.unwrap();
    let http = cluster.http();
    let queued =
        tokio::spawn(
            async move { post(http, "/v1/chat/completions", chat_body("").as_bytes()).await },
        );
    // The same router's other connections are still there when it stops.
    let mut kept = tokio::net::TcpStream::connect(http).await.unwrap();
    let waits = r#"headstart_router_queue_requests{class="interactive"}"#;
    while metric(&cluster, waits).await < 1.0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    kept.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\n").await.unwrap();
    cluster.shutdown.cancel();
    let refused = queued.await.unwrap();
    assert_eq!((refused.error().0, refused.error().1.as_str()), (503, "draining"));
    assert!(refused.header("retry-after").is_some());
    cluster.script.gate.cancel();
    while let Some(more) = live.chunk().await {
        seen.push_str(&more);
    }
    assert!(seen.ends_with("data: [DONE]\n\n"), "{seen}");
    cluster.router.take().unwrap().wait().await.unwrap();
}
