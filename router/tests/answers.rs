//! What clients get from a router in front of scripted nodes.

mod common;

use common::client::{Open, get, post};
use common::{CONTEXT, Cluster, DraftEnding, Step, chat_body, ids, model_text};
use headstart_proto::v1;
use headstart_proto::v1::generate_frame::Event;
use headstart_proto::v1::router_client::RouterClient;
use headstart_text::{Message, Role};
use serde_json::{Value, json};

/// "Once upon", of which "Once " is the drafter's.
const ANSWER: [Step; 5] = [
    Step::Draft("On"),
    Step::Draft("ce "),
    Step::Switch(true, 5, 7),
    Step::Write("upon"),
    Step::Stop,
];

fn extension() -> Value {
    json!({
        "drafter": "small", "base": "big", "switched": true, "switch_index": 4,
        "drafted_tokens": 7, "kept_tokens": 5, "window": 6, "threshold": 0.8,
    })
}

fn prompt_ids() -> Vec<u32> {
    model_text().base_prompt(&[Message::new(Role::User, "hi")]).unwrap().ids
}

#[tokio::test]
async fn an_answer_in_one_piece() {
    let cluster = Cluster::start().await;
    cluster.script.set(&ANSWER);
    let reply = cluster.chat(r#", "return_token_ids": true, "seed": 5, "max_tokens": 20"#).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let body = reply.json();
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], "big");
    let choice = &body["choices"][0];
    assert_eq!(
        choice["message"],
        json!({"role": "assistant", "content": "Once upon", "refusal": null})
    );
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["token_ids"], json!(ids("Once upon")));
    assert_eq!(choice["logprobs"], Value::Null);
    assert_eq!(body["prompt_token_ids"], json!(prompt_ids()));
    let prompt = prompt_ids().len();
    let usage =
        json!({"prompt_tokens": prompt, "completion_tokens": 9, "total_tokens": prompt + 9});
    assert_eq!(body["usage"], usage);
    assert_eq!(body["headstart"].to_string(), extension().to_string());
}

#[tokio::test]
async fn the_nodes_are_asked_for_what_the_client_wants() {
    let cluster = Cluster::start().await;
    cluster.script.set(&ANSWER);
    let extra = r#", "seed": 5, "max_tokens": 20, "top_k": 3,
        "headstart": {"window": 2, "threshold": 0.5, "draft_tokens_max": 9, "drafter": "small"}"#;
    assert_eq!(cluster.chat(extra).await.status, 200);
    let serve = cluster.script.serves.lock().unwrap()[0].clone();
    let draft = cluster.script.drafts.lock().unwrap()[0].clone();
    assert_eq!((serve.request_id.as_str(), serve.epoch), (draft.request_id.as_str(), draft.epoch));
    assert!(serve.request_id.ends_with("-0") && serve.epoch == 1);
    assert_eq!(serve.prompt_ids, prompt_ids());
    assert!(serve.prompt_text.ends_with("[Assistant]\n"));
    assert_eq!((serve.max_tokens, serve.top_logprobs), (20, None));
    let sampling = serve.sampling.unwrap();
    assert_eq!(
        (sampling.seed, sampling.top_k, sampling.temperature),
        (Some(5), Some(3), Some(1.0))
    );
    let policy = serve.draft.unwrap();
    assert_eq!((policy.window, policy.threshold), (2, 0.5));
    assert_eq!(policy.encoding(), v1::DraftEncoding::Ids, "equal tokenizers");
    assert_eq!(policy.on_draft_complete(), v1::OnDraftComplete::Continue);
    assert!(!policy.continue_empty_draft, "closed by default");
    assert_eq!((draft.draft_tokens_max, draft.encoding()), (9, v1::DraftEncoding::Ids));
    assert_eq!(draft.sampling.unwrap().temperature, Some(0.0));
    assert!(draft.base_address.starts_with("127.0.0.1:"));
    assert!(cluster.chat("").await.status == 200);
    let whole = CONTEXT - u32::try_from(prompt_ids().len()).unwrap();
    assert_eq!(cluster.script.serves.lock().unwrap()[1].max_tokens, whole);
}

#[tokio::test]
async fn a_stream_tells_who_wrote_what() {
    let cluster = Cluster::start().await;
    cluster.script.set(&ANSWER);
    let extra =
        r#", "stream": true, "return_token_ids": true, "stream_options": {"include_usage": true}"#;
    let reply = cluster.chat(extra).await;
    assert_eq!(reply.status, 200);
    assert!(reply.header("content-type").unwrap().starts_with("text/event-stream"));
    let (events, done) = reply.events();
    assert!(done);
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(events[0]["prompt_token_ids"], json!(prompt_ids()));
    let (mut texts, mut tokens) = ([String::new(), String::new()], [vec![], vec![]]);
    for event in &events[1..events.len() - 1] {
        let choice = &event["choices"][0];
        assert_eq!(event["object"], "chat.completion.chunk");
        assert_eq!(event["usage"], Value::Null);
        let by = usize::from(choice["source"] == "base");
        assert!(by == 1 || choice["source"] == "drafter");
        texts[by].push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        tokens[by].extend(choice["token_ids"].as_array().unwrap().clone());
    }
    assert_eq!(texts, ["Once ", "upon"]);
    assert_eq!(json!(tokens), json!([ids("Once "), ids("upon")]));
    let last = &events[events.len() - 2];
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert_eq!(last["headstart"].to_string(), extension().to_string());
    let usage = &events[events.len() - 1];
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 9);
    assert_eq!(usage["headstart"].to_string(), extension().to_string());
}

#[tokio::test]
async fn the_drafters_words_do_not_wait_for_the_base() {
    let cluster = Cluster::start().await;
    cluster.script.set(&[Step::Draft("On"), Step::Gate, Step::Switch(true, 2, 2), Step::Stop]);
    let body = chat_body(r#", "stream": true"#);
    let mut open =
        Open::start(cluster.http(), "POST", "/v1/chat/completions", body.as_bytes()).await;
    let mut seen = String::new();
    while !seen.contains(r#""content":"On""#) {
        seen.push_str(&open.chunk().await.unwrap());
    }
    assert!(!seen.contains("finish_reason\":\"stop"));
    cluster.script.gate.cancel();
    while let Some(more) = open.chunk().await {
        seen.push_str(&more);
    }
    assert!(seen.ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn several_answers_at_once() {
    let cluster = Cluster::start().await;
    cluster.script.set(&ANSWER);
    let reply = cluster.chat(r#", "n": 2, "seed": 18446744073709551615"#).await;
    let body = reply.json();
    for index in 0..2 {
        let choice = &body["choices"][index];
        assert_eq!(choice["index"], index);
        assert_eq!(choice["message"]["content"], "Once upon");
        assert_eq!(choice["headstart"].to_string(), extension().to_string());
    }
    assert_eq!(body["usage"]["completion_tokens"], 18);
    {
        let serves = cluster.script.serves.lock().unwrap();
        let mut seeds: Vec<_> = serves.iter().map(|s| s.sampling.unwrap().seed.unwrap()).collect();
        seeds.sort_unstable();
        assert_eq!(seeds, [0, u64::MAX], "seed + choice, wrapping");
        assert_ne!(serves[0].request_id, serves[1].request_id);
    }
    let (events, done) = cluster.chat(r#", "n": 2, "stream": true"#).await.events();
    assert!(done);
    for index in 0..2 {
        let of_choice = events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == index);
        let text: String = of_choice.filter_map(|c| c["delta"]["content"].as_str()).collect();
        assert_eq!(text, "Once upon");
    }
    assert_eq!(events.iter().filter(|e| e["headstart"].is_object()).count(), 2);
}

#[tokio::test]
async fn stop_strings_cut_across_frames_and_across_the_switch() {
    let cluster = Cluster::start().await;
    cluster.script.set(&[
        Step::Draft("one E"),
        Step::Switch(true, 5, 5),
        Step::Write("N"),
        Step::Write("D two"),
        Step::Hang,
    ]);
    let reply = cluster.chat(r#", "stop": ["END"], "return_token_ids": true"#).await;
    let body = reply.json();
    let choice = &body["choices"][0];
    assert_eq!(choice["message"]["content"], "one ");
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["token_ids"], json!(ids("one END")), "up to the token that completes it");
    assert_eq!(body["usage"]["completion_tokens"], 7);
    cluster.script.until_live((0, 0)).await;

    // Without the stop string what was held back comes out, each part as its writer's.
    cluster.script.set(&[
        Step::Draft("one E"),
        Step::Switch(true, 5, 5),
        Step::Write("N"),
        Step::Write("E"),
        Step::Length,
    ]);
    let reply = cluster.chat(r#", "stop": "END", "stream": true"#).await;
    let (events, _) = reply.events();
    let mut texts = [String::new(), String::new()];
    for choice in events.iter().map(|event| &event["choices"][0]) {
        let text = choice["delta"]["content"].as_str().unwrap_or_default();
        texts[usize::from(choice["source"] == "base")].push_str(text);
    }
    assert_eq!(texts, ["one E", "NE"]);
    let last = events.last().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn the_plain_prompts_own_stops_are_always_on() {
    let cluster = Cluster::start().await;
    cluster.script.set(&[
        Step::Draft("Bye."),
        Step::Switch(true, 4, 4),
        Step::Write("\n\n[Us"),
        Step::Write("er]\nMore"),
        Step::Hang,
    ]);
    let body = cluster.chat("").await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "Bye.");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn logprobs_come_in_both_formats() {
    let cluster = Cluster::start().await;
    cluster.script.set(&[Step::Draft("é"), Step::Switch(true, 2, 2), Step::Write("b"), Step::Stop]);
    let body = cluster.chat(r#", "logprobs": true, "top_logprobs": 2"#).await.json();
    let content = body["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(content.len(), 3);
    assert_eq!((&content[0]["bytes"], &content[0]["token"]), (&json!([0xc3]), &json!("\u{fffd}")));
    assert_eq!((&content[2]["token"], &content[2]["logprob"]), (&json!("b"), &json!(-0.5)));
    let top = json!([
        {"token": "b", "logprob": -0.5, "bytes": [98]}, {"token": "c", "logprob": -1.5, "bytes": [99]}
    ]);
    assert_eq!(content[2]["top_logprobs"], top);
    assert_eq!(cluster.script.serves.lock().unwrap()[0].top_logprobs, Some(2));

    let body = chat_body(r#", "logprobs": true, "stream": true"#);
    let reply = post(cluster.http(), "/v1/chat/completions", body.as_bytes()).await;
    let streamed: usize = reply
        .events()
        .0
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array())
        .map(Vec::len)
        .sum();
    assert_eq!(streamed, 3);

    let body = br#"{"model": "big", "prompt": "hi", "logprobs": 1, "return_token_ids": true}"#;
    let reply = post(cluster.http(), "/v1/completions", body).await.json();
    assert_eq!(
        (&reply["object"], &reply["choices"][0]["text"]),
        (&json!("text_completion"), &json!("éb"))
    );
    let logprobs = &reply["choices"][0]["logprobs"];
    assert_eq!(logprobs["token_logprobs"], json!([-0.5, -0.5, -0.5]));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2]));
    assert_eq!(logprobs["top_logprobs"][2], json!({"b": -0.5}));
    assert_eq!(reply["choices"][0]["prompt_token_ids"], json!(prompt_ids()));
}

#[tokio::test]
async fn an_empty_draft_is_an_empty_answer() {
    let cluster = Cluster::start().await;
    cluster.script.set(&[Step::Stop]);
    let body = cluster.chat("").await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let expected = json!({
        "drafter": "small", "base": "big", "switched": false, "switch_index": null,
        "drafted_tokens": 0, "kept_tokens": 0, "window": 6, "threshold": 0.8,
    });
    assert_eq!(body["headstart"].to_string(), expected.to_string());
    let (events, done) = cluster.chat(r#", "stream": true"#).await.events();
    assert!(done && events.len() == 2, "{events:?}");
}

#[tokio::test]
async fn models_health_and_metrics() {
    let mut cluster = Cluster::start().await;
    let names = |body: Value| -> Vec<String> {
        let data = body["data"].as_array().unwrap().clone();
        data.iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect()
    };
    let models = get(cluster.http(), "/v1/models").await.json();
    assert_eq!(names(models), ["big", "big@small"]);
    let one = get(cluster.http(), "/v1/models/big@small").await.json();
    assert_eq!((&one["id"], &one["object"]), (&json!("big@small"), &json!("model")));
    assert_eq!(get(cluster.http(), "/v1/models/none").await.error().1, "model_not_found");
    assert_eq!(get(cluster.http(), "/health").await.status, 200);
    cluster.script.set(&ANSWER);
    assert_eq!(cluster.chat("").await.status, 200);
    assert_eq!(get(cluster.http(), "/ready").await.status, 200, "the tokenizers are there");
    let metrics = get(cluster.http(), "/metrics").await.body;
    for name in ["requests_total{outcome=\"ok\"}", "ttft_seconds", "tokens_total", "switch_index"] {
        assert!(metrics.contains(&format!("headstart_router_{name}")), "{name} in {metrics}");
    }
    cluster.lose_drafter().await;
    assert_eq!(get(cluster.http(), "/health").await.status, 200, "the process lives");
    assert_eq!(get(cluster.http(), "/ready").await.status, 503);
}

#[tokio::test]
async fn grpc_clients_read_the_same_answer() {
    let cluster = Cluster::start().await;
    cluster.script.set(&ANSWER);
    let address = cluster.router.as_ref().unwrap().grpc_addr();
    let mut client = RouterClient::connect(format!("http://{address}")).await.unwrap();
    let request = v1::GenerateRequest {
        model: "big@small".into(),
        messages: vec![v1::Message { role: "user".into(), content: "hi".into() }],
        ..Default::default()
    };
    let mut frames = client.generate(request.clone()).await.unwrap().into_inner();
    let (mut texts, mut tokens, mut end) = ([String::new(), String::new()], 0, None);
    while let Some(frame) = frames.message().await.unwrap() {
        match frame.event.unwrap() {
            Event::Started(started) => assert_eq!(started.prompt_ids, prompt_ids()),
            Event::Text(text) => {
                assert_eq!(frame.position, tokens);
                tokens += u32::try_from(text.ids.len()).unwrap();
                texts[usize::from(text.source() == v1::Source::Base)].push_str(&text.text);
            }
            Event::Finished(finished) => end = Some(finished),
        }
    }
    assert_eq!(texts, ["Once ", "upon"]);
    let draft = end.unwrap().draft.unwrap();
    assert_eq!((draft.switch_index, draft.kept_tokens, draft.drafted_tokens), (Some(4), 5, 7));
    let models = client.list_models(v1::ListModelsRequest {}).await.unwrap().into_inner().models;
    assert_eq!(models.iter().map(|m| m.id.as_str()).collect::<Vec<_>>(), ["big", "big@small"]);
    let error = client.generate(v1::GenerateRequest { n: Some(99), ..request }).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::InvalidArgument);
    assert!(error.message().contains("n must be an integer from 1 to 16, found 99"));
}

#[tokio::test]
async fn a_draft_that_fails_after_the_switch_costs_nothing() {
    let cluster = Cluster::start().await;
    cluster.script.set_draft(DraftEnding::GateThenFail(headstart_proto::ErrorCode::Internal));
    cluster.script.set(&[
        Step::Draft("On"),
        Step::Switch(true, 2, 4),
        Step::Write("c"),
        Step::Gate,
        Step::Write("e"),
        Step::Stop,
    ]);
    let body = chat_body(r#", "stream": true"#);
    let mut open =
        Open::start(cluster.http(), "POST", "/v1/chat/completions", body.as_bytes()).await;
    let mut seen = String::new();
    while !seen.contains(r#""content":"c""#) {
        seen.push_str(&open.chunk().await.unwrap());
    }
    cluster.script.gate.cancel();
    while let Some(more) = open.chunk().await {
        seen.push_str(&more);
    }
    assert!(seen.contains(r#""content":"e""#) && seen.ends_with("data: [DONE]\n\n"), "{seen}");
}
