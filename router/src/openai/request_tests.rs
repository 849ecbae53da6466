use super::*;
use headstart_proto::ErrorCode;

fn chat(extra: &str) -> Result<(Ask, Delivery), Error> {
    let body =
        format!(r#"{{"model": "b", "messages": [{{"role": "user", "content": "hi"}}]{extra}}}"#);
    parse(Format::Chat, body.as_bytes())
}

fn completion(extra: &str) -> Result<(Ask, Delivery), Error> {
    parse(Format::Completion, format!(r#"{{"model": "b", "prompt": "hi"{extra}}}"#).as_bytes())
}

#[test]
fn a_full_chat_request_is_read_whole() {
    let body = br#"{
        "model": "base@tuned",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": null, "tool_calls": []},
            {"role": "user", "content": "d"}],
        "max_completion_tokens": 9, "temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.1,
        "seed": -1, "stop": ["x", "y"], "n": 2, "logprobs": true, "top_logprobs": 3,
        "presence_penalty": -2, "frequency_penalty": 2, "stream": true,
        "stream_options": {"include_usage": true}, "return_token_ids": true,
        "headstart": {"window": 4, "threshold": 1, "draft_tokens_max": 7, "drafter": "tuned"},
        "user": "me", "metadata": {"a": "b"}, "store": false, "tools": null, "tool_choice": "none",
        "response_format": {"type": "text"}, "logit_bias": {}, "parallel_tool_calls": true}"#;
    let (ask, delivery) = parse(Format::Chat, body).unwrap();
    assert_eq!(ask.model, "base@tuned");
    assert_eq!(ask.messages.len(), 4);
    assert_eq!(ask.messages[1].content, "a\nb");
    assert_eq!(ask.max_tokens, Some(9));
    assert_eq!(ask.sampling.top_k, 0);
    assert_eq!(ask.sampling.seed, Some(u64::MAX));
    assert_eq!(ask.stop, ["x", "y"]);
    assert_eq!((ask.choices, ask.top_logprobs), (2, Some(3)));
    assert_eq!((ask.window, ask.threshold, ask.draft_tokens_max), (Some(4), Some(1.0), Some(7)));
    assert_eq!(ask.drafter.as_deref(), Some("tuned"));
    assert!(delivery.stream && delivery.include_usage && delivery.return_token_ids);
}

#[test]
fn absent_and_null_fields_take_their_defaults() {
    let (ask, delivery) =
        chat(r#", "temperature": null, "stop": null, "headstart": null"#).unwrap();
    assert_eq!(ask.sampling, SamplingParams::default());
    assert_eq!((ask.max_tokens, ask.choices, ask.top_logprobs), (None, 1, None));
    assert!(ask.stop.is_empty() && !delivery.stream && !delivery.return_token_ids);
}

#[test]
fn bad_chat_fields_are_refused_by_name() {
    // field at fault, what is added to a sound request, a part of the message
    let cases = [
        ("max_tokens", r#", "max_tokens": 0"#, "an integer from 1 to 4294967295, found 0"),
        ("max_tokens", r#", "max_tokens": -5"#, "found -5"),
        ("max_tokens", r#", "max_tokens": 1e30"#, "found 1e+30"),
        ("max_tokens", r#", "max_tokens": 99999999999"#, "found 99999999999"),
        ("max_tokens", r#", "max_tokens": "9""#, "found the string \"9\""),
        ("max_tokens", r#", "max_tokens": NaN"#, "finite number, found NaN"),
        ("max_tokens", r#", "max_tokens": 1, "max_completion_tokens": 2"#, "must be equal"),
        ("temperature", r#", "temperature": -0.1"#, "a number from 0 to 2, found -0.1"),
        ("temperature", r#", "temperature": 1e300"#, "a number from 0 to 2"),
        ("temperature", r#", "temperature": NaN"#, "finite number"),
        ("temperature", r#", "temperature": Infinity"#, "finite number"),
        ("top_p", r#", "top_p": 0"#, "above 0 and at most 1"),
        ("top_p", r#", "top_p": 1.1"#, "above 0 and at most 1"),
        ("top_p", r#", "top_p": -Infinity"#, "finite number"),
        ("top_k", r#", "top_k": -2"#, "from -1"),
        ("min_p", r#", "min_p": -1"#, "from 0 to 1"),
        ("seed", r#", "seed": 1.5"#, "an integer"),
        ("presence_penalty", r#", "presence_penalty": 2.5"#, "from -2 to 2"),
        ("frequency_penalty", r#", "frequency_penalty": -3"#, "from -2 to 2"),
        ("stop", r#", "stop": """#, "1 to 1024 bytes"),
        ("stop", r#", "stop": [1]"#, "an array of strings"),
        (
            "stop",
            r#", "stop": ["1","2","3","4","5","6","7","8","9","a","b","c","d","e","f","g","h"]"#,
            "found 17",
        ),
        ("n", r#", "n": 0"#, "from 1 to 16"),
        ("n", r#", "n": 17"#, "from 1 to 16"),
        ("logprobs", r#", "logprobs": 3"#, "true or false"),
        ("top_logprobs", r#", "logprobs": true, "top_logprobs": 21"#, "from 0 to 20"),
        ("top_logprobs", r#", "top_logprobs": 2"#, "needs logprobs"),
        ("stream_options", r#", "stream_options": {"include_usage": true}"#, "needs stream"),
        (
            "stream_options.odd",
            r#", "stream": true, "stream_options": {"odd": 1}"#,
            "unknown field",
        ),
        ("headstart", r#", "headstart": 3"#, "an object"),
        ("headstart.window", r#", "headstart": {"window": 0}"#, "from 1 to 4096, found 0"),
        ("headstart.window", r#", "headstart": {"window": 4097}"#, "from 1 to 4096"),
        (
            "headstart.threshold",
            r#", "headstart": {"threshold": 1.5}"#,
            "above 0 and at most 1, found 1.5",
        ),
        ("headstart.threshold", r#", "headstart": {"threshold": 0}"#, "above 0"),
        ("headstart.threshold", r#", "headstart": {"threshold": NaN}"#, "finite"),
        ("headstart.draft_tokens_max", r#", "headstart": {"draft_tokens_max": 0}"#, "from 1"),
        ("headstart.drafter", r#", "headstart": {"drafter": ""}"#, "1 to 256 bytes"),
        ("headstart.odd", r#", "headstart": {"odd": 1}"#, "unknown field headstart.odd"),
        ("tools", r#", "tools": [{"type": "function"}]"#, "not supported"),
        ("tool_choice", r#", "tool_choice": "auto""#, "not supported"),
        ("response_format", r#", "response_format": {"type": "json_object"}"#, "not supported"),
        ("logit_bias", r#", "logit_bias": {"50256": -100}"#, "not supported"),
        ("best_of", r#", "best_of": 2"#, "not supported"),
        ("store", r#", "store": true"#, "not supported"),
        ("audio", r#", "audio": {"voice": "x"}"#, "not supported"),
        ("modalities", r#", "modalities": ["text", "audio"]"#, "not supported"),
        ("echo", r#", "echo": true"#, "unknown field echo"),
        ("guided_json", r#", "guided_json": "{}""#, "unknown field guided_json"),
    ];
    for (field, extra, part) in cases {
        let error = chat(extra).expect_err(extra);
        assert_eq!(error.code.http_status(), 400, "{extra}");
        let found = error.field.as_deref().unwrap_or_default();
        // Malformed numbers are found before their object is known, so only their own name is.
        let last = field.rsplit('.').next().unwrap();
        assert!(
            found == field || (error.message.contains("finite") && found == last),
            "{extra}: {found}"
        );
        assert!(error.message.contains(part), "{extra}: {}", error.message);
    }
}

#[test]
fn bad_conversations_are_refused() {
    let cases = [
        (r#"{}"#, "model is required"),
        (r#"{"model": ""}"#, "model must be a name"),
        (r#"{"model": 1}"#, "model must be a string"),
        (r#"{"model": "b"}"#, "messages is required"),
        (r#"{"model": "b", "messages": []}"#, "at least one message"),
        (r#"{"model": "b", "messages": {}}"#, "an array of messages"),
        (r#"{"model": "b", "messages": ["hi"]}"#, "messages[0] must be an object"),
        (r#"{"model": "b", "messages": [{"content": "x"}]}"#, "messages[0].role is required"),
        (r#"{"model": "b", "messages": [{"role": "king", "content": "x"}]}"#, "found \"king\""),
        (r#"{"model": "b", "messages": [{"role": "tool", "content": "x"}]}"#, "there are no tools"),
        (
            r#"{"model": "b", "messages": [{"role": "developer", "content": "x"}]}"#,
            "use \"system\"",
        ),
        (r#"{"model": "b", "messages": [{"role": "user"}]}"#, "content must not be empty"),
        (r#"{"model": "b", "messages": [{"role": "user", "content": null}]}"#, "must not be empty"),
        (
            r#"{"model": "b", "messages": [{"role": "user", "content": " \n"}]}"#,
            "must not be empty",
        ),
        (r#"{"model": "b", "messages": [{"role": "user", "content": []}]}"#, "must not be empty"),
        (r#"{"model": "b", "messages": [{"role": "user", "content": 4}]}"#, "array of text parts"),
        (
            r#"{"model": "b", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#,
            "content[0].type must be \"text\"",
        ),
        (
            r#"{"model": "b", "messages": [{"role": "user", "content": "x", "name": "n"}]}"#,
            "unknown field messages[0].name",
        ),
    ];
    for (body, part) in cases {
        let error = parse(Format::Chat, body.as_bytes()).expect_err(body);
        assert_eq!(error.code.http_status(), 400, "{body}");
        assert!(error.message.contains(part), "{body}: {}", error.message);
        assert!(error.field.is_some(), "{body}");
    }
}

#[test]
fn completions_take_one_prompt_as_a_user_message() {
    let (ask, delivery) = completion(r#", "logprobs": 2, "echo": false, "suffix": null"#).unwrap();
    assert_eq!(ask.messages, [Message { role: Role::User, content: "hi".into() }]);
    assert_eq!(ask.top_logprobs, Some(2));
    assert_eq!(delivery.format, Format::Completion);
    let one = parse(Format::Completion, br#"{"model": "b", "prompt": ["hi"]}"#).unwrap().0;
    assert_eq!(one.messages, ask.messages);
    for (field, body) in [
        ("prompt", r#"{"model": "b", "prompt": ""}"#),
        ("prompt", r#"{"model": "b", "prompt": ["a", "b"]}"#),
        ("prompt", r#"{"model": "b", "prompt": [1, 2]}"#),
        ("echo", r#"{"model": "b", "prompt": "a", "echo": true}"#),
        ("suffix", r#"{"model": "b", "prompt": "a", "suffix": "z"}"#),
        ("logprobs", r#"{"model": "b", "prompt": "a", "logprobs": true}"#),
        ("messages", r#"{"model": "b", "prompt": "a", "messages": []}"#),
    ] {
        let error = parse(Format::Completion, body.as_bytes()).expect_err(body);
        assert_eq!(error.field.as_deref(), Some(field), "{body}");
    }
    let error = completion(r#", "tools": []"#).unwrap_err();
    assert_eq!(error.code, ErrorCode::Unsupported);
}
