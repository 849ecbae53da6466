//! Nothing is computed twice, through the whole stack: what the base extended is the prompts, the
//! draft tokens kept, its own tokens and the draft tokens that a switch cut, to the token; and the
//! second turn of a chat prefills only what is new.

use std::time::{Duration, Instant};

use headstart_tests::http::Client;
use headstart_tests::process::{Process, free_address, wait_ready};
use serde_json::{Value, json};

/// The server's gauges are at most a moment old; on a busy machine a moment is long.
const SETTLE_WITHIN: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
const PAGE_TOKENS: u64 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Computed {
    extended: u64,
    reused: u64,
    cut: u64,
}

impl Computed {
    fn now(client: &Client) -> Self {
        let metric = |name: &str| {
            let name = format!("headstart_base_tokens_{name}");
            client.metric(&name).unwrap_or_else(|| panic!("{name} is told"))
        };
        Self { extended: metric("extended"), reused: metric("reused"), cut: metric("cut") }
    }

    /// What there is once it is `expected` tokens beside the cut ones; else what there was last.
    fn settled(client: &Client, expected: u64) -> Self {
        let begun = Instant::now();
        loop {
            let now = Self::now(client);
            if now.extended + now.reused == expected + now.cut || begun.elapsed() > SETTLE_WITHIN {
                return now;
            }
            std::thread::sleep(POLL);
        }
    }
}

/// An answer, and the tokens that it takes: all but the last one of an answer that was cut off at
/// its limit go through the model.
fn ask(client: &Client, messages: &Value, max_tokens: u32, threshold: f64) -> (Value, u64) {
    let request = json!({
        "model": "smollm2",
        "messages": messages,
        "temperature": 0,
        "max_tokens": max_tokens,
        "headstart": {"threshold": threshold},
    });
    let response = client.post("/v1/chat/completions", &request);
    assert_eq!(response.status, 200, "{}", response.body);
    let body = response.body;
    assert_eq!(body["choices"][0]["finish_reason"], "length", "{body}");
    let usage = |key: &str| body["usage"][key].as_u64().expect("a count");
    let tokens = usage("prompt_tokens") + usage("completion_tokens") - 1;
    (body, tokens)
}

#[test]
fn nothing_is_computed_twice() {
    let (http, grpc) = (free_address(), free_address());
    let models = ["up", "--drafter", "smollm2", "--base", "smollm2", "--encoding", "text"];
    let doors = ["--http", &http, "--grpc", &grpc];
    let mut process = Process::start("headstart", &[&models[..], &doors[..]].concat());
    let client = Client::new(&http);
    wait_ready(&client, &mut [&mut process]);

    let mut expected = 0;
    let mut switched = 0;
    for (subject, threshold) in
        [("a fox", 0.05), ("the sea", 0.5), ("a lighthouse", 0.9), ("an old train", 1.0)]
    {
        let question = format!("Tell me a long story about {subject}.");
        let messages = json!([{"role": "user", "content": question}]);
        let (body, tokens) = ask(&client, &messages, 24, threshold);
        expected += tokens;
        switched += u32::from(body["headstart"]["switched"] == true);
    }
    assert!((1..=3).contains(&switched), "both kinds of drafts were read: {switched}");
    let computed = Computed::settled(&client, expected);
    println!("{expected} expected, {computed:?}");
    assert_eq!(computed.extended + computed.reused, expected + computed.cut);

    let line = |page: usize| format!("Page {page}: the ferry left at dawn and came back at noon.");
    let pages: Vec<String> = (0..80).map(line).collect();
    let first = json!({"role": "user", "content": format!("{} Go on.", pages.join(" "))});
    let (answer, tokens) = ask(&client, &json!([first]), 16, 0.5);
    expected += tokens;
    let before = Computed::settled(&client, expected);
    let first_prompt = answer["usage"]["prompt_tokens"].as_u64().expect("a count");
    assert!(first_prompt >= 1000, "{first_prompt}");
    let said = json!({"role": "assistant", "content": answer["choices"][0]["message"]["content"]});
    let next = json!({"role": "user", "content": "And then?"});
    let (answer, tokens) = ask(&client, &json!([first, said, next]), 16, 0.5);
    expected += tokens;
    let after = Computed::settled(&client, expected);
    let second_prompt = answer["usage"]["prompt_tokens"].as_u64().expect("a count");
    let prefilled = second_prompt - (after.reused - before.reused);
    println!("turns of {first_prompt} and {second_prompt} tokens, {prefilled} of the latter new");
    assert_eq!(after.extended + after.reused, expected + after.cut);
    // The last page of the first prompt is shared only if it is full.
    assert!(prefilled <= second_prompt - first_prompt + PAGE_TOKENS, "{prefilled}");
    assert_eq!(process.terminate(), Some(0));
}
