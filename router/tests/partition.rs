//! Nodes that fall silent: no packet says that they are gone.

mod common;

use std::time::Duration;

use common::client::{Open, Reply};
use common::{Cluster, DraftEnding, Step, chat_body};
use headstart_cluster::testing::Line;
use headstart_router::RouterOptions;
use headstart_service::channel::KeepAlive;

const GOOD: [Step; 4] =
    [Step::Draft("On"), Step::Switch(true, 2, 2), Step::Write("ce"), Step::Stop];

/// The frame timeouts stay at minutes: only the pings can find a silent node in time.
async fn cluster() -> Cluster {
    let keep_alive =
        KeepAlive { interval: Duration::from_millis(100), timeout: Duration::from_millis(400) };
    // There is no other node to go on at.
    let resume_timeout = Duration::from_secs(2);
    Cluster::with_lines(RouterOptions { keep_alive, resume_timeout, ..Default::default() }).await
}

/// Starts a stream, silences a line, and gives the stream's last event.
async fn last_event(cluster: &Cluster, line: usize) -> serde_json::Value {
    let body = chat_body(r#", "stream": true"#);
    let mut open =
        Open::start(cluster.http(), "POST", "/v1/chat/completions", body.as_bytes()).await;
    let mut seen = open.chunk().await.unwrap();
    cluster.script.until_live((1, 1)).await;
    cluster.lines[line].set(Line::Silent);
    while let Some(more) = open.chunk().await {
        seen.push_str(&more);
    }
    let (events, done) = Reply { status: 200, headers: vec![], body: seen }.events();
    assert!(!done, "it cannot end well");
    events.last().unwrap().clone()
}

async fn until_served(cluster: &Cluster) {
    for _ in 0..3000 {
        if cluster.chat("").await.status == 200 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it never served again");
}

#[tokio::test]
async fn a_base_that_falls_silent_ends_its_streams_on_both_sides_and_comes_back() {
    let cluster = cluster().await;
    cluster.script.set_draft(DraftEnding::Hang);
    cluster.script.set(&[Step::Draft("On"), Step::Hang]);
    let error = last_event(&cluster, 0).await;
    assert_eq!(error["error"]["code"], "unavailable", "{error}");
    // The node finds the router gone by its own pings, and frees what it held.
    cluster.script.until_live((0, 0)).await;
    cluster.script.set_draft(DraftEnding::Eos);
    cluster.script.set(&GOOD);
    cluster.lines[0].set(Line::Open);
    until_served(&cluster).await;
}

#[tokio::test]
async fn a_drafter_that_falls_silent_does_so_too() {
    let cluster = cluster().await;
    cluster.script.set_draft(DraftEnding::Hang);
    cluster.script.set(&[Step::Draft("On"), Step::Hang]);
    let error = last_event(&cluster, 1).await;
    assert_eq!(error["error"]["code"], "unavailable", "{error}");
    cluster.script.until_live((0, 0)).await;
    cluster.script.set_draft(DraftEnding::Eos);
    cluster.script.set(&GOOD);
    cluster.lines[1].set(Line::Open);
    until_served(&cluster).await;
}
