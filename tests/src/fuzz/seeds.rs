//! Right inputs, small and varied: what mutation starts from.

use futures::FutureExt as _;
use headstart_engine::{KvDtype, KvFormat, KvLayout, ModelHash};
use headstart_handoff::wire::{
    Hello, ReceiverFrame, SenderFrame, write_control, write_page, write_receiver,
};
use headstart_handoff::{Refusal, RefusalCode};
use headstart_proto::v1::{self, serve_frame};
use headstart_proto::{Epoch, RequestId};
use headstart_text::ModelText;
use prost::Message;
use serde_json::{Value, json};

use crate::chaos::requests;
use crate::process::fixture;

fn bytes(values: &[Value]) -> Vec<Vec<u8>> {
    values.iter().map(|value| value.to_string().into_bytes()).collect()
}

pub(super) fn chat_bodies() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Value> = requests::all().iter().take(9).map(requests::Ask::http).collect();
    seeds.push(json!({
        "model": "a@b", "messages": [
            {"role": "system", "content": [{"type": "text", "text": "x"}]},
            {"role": "user", "content": "hi", "name": "u"}, {"role": "assistant", "content": null},
        ],
        "max_completion_tokens": 5, "stop": "x", "stream": true, "stream_options": {"include_usage": true},
        "logprobs": true, "top_logprobs": 20, "user": "me", "metadata": {"k": "v"}, "tools": null,
        "response_format": {"type": "text"}, "min_p": 0.1, "top_k": -1, "seed": -1,
        "headstart": {"window": 4, "threshold": 0.5, "draft_tokens_max": 7, "drafter": "d"},
    }));
    bytes(&seeds)
}

pub(super) fn completion_bodies() -> Vec<Vec<u8>> {
    bytes(&[
        json!({"model": "m", "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0.7}),
        json!({"model": "m", "prompt": ["one"], "logprobs": 5, "n": 2, "stop": ["\n", "x"], "echo": false}),
        json!({"model": "m", "prompt": "é\u{1F600}", "stream": true, "suffix": null, "best_of": 1,
            "headstart": {"threshold": 1e-3}}),
    ])
}

pub(super) fn generate_requests() -> Vec<Vec<u8>> {
    requests::all().iter().take(9).map(|ask| ask.grpc().encode_to_vec()).collect()
}

pub(super) fn serve_requests() -> Vec<Vec<u8>> {
    let draft = v1::DraftPolicy {
        window: 6,
        threshold: 0.8,
        encoding: v1::DraftEncoding::Text.into(),
        on_draft_complete: v1::OnDraftComplete::Continue.into(),
        continue_empty_draft: false,
    };
    let plain = v1::ServeRequest {
        request_id: "018f-r".into(),
        epoch: 1,
        prompt_ids: vec![1, 2, 3],
        prompt_text: "hello".into(),
        max_tokens: 16,
        sampling: Some(sampling()),
        top_logprobs: Some(2),
        draft: Some(draft),
        ..v1::ServeRequest::default()
    };
    let decided = v1::Switched { by_threshold: true, kept_tokens: 2, drafted_tokens: 5 };
    let kv = v1::KvSource { address: "127.0.0.1:7".into(), request_id: "018f-r".into(), epoch: 1 };
    let resume = v1::Resume {
        answer_ids: vec![4, 5, 6],
        decision: Some(decided),
        scores: vec![-0.5, f32::NEG_INFINITY],
        kv: Some(kv),
    };
    let resumed = v1::ServeRequest { epoch: 2, resume: Some(resume), ..plain.clone() };
    let moving = v1::ServeRequest { move_when_decided: true, draft: None, ..plain.clone() };
    [plain, resumed, moving].iter().map(Message::encode_to_vec).collect()
}

fn sampling() -> v1::Sampling {
    v1::Sampling {
        temperature: Some(0.8),
        top_p: Some(0.9),
        top_k: Some(5),
        min_p: Some(0.1),
        seed: Some(7),
        presence_penalty: Some(0.5),
        frequency_penalty: Some(-0.5),
    }
}

pub(super) fn draft_requests() -> Vec<Vec<u8>> {
    let plain = v1::DraftRequest {
        request_id: "018f-r".into(),
        epoch: 1,
        prompt_ids: vec![1, 2, 3],
        draft_tokens_max: 64,
        sampling: Some(sampling()),
        base_address: "127.0.0.1:7000".into(),
        encoding: v1::DraftEncoding::Ids.into(),
        serve_epoch: 1,
        ..v1::DraftRequest::default()
    };
    let resumed = v1::DraftRequest { epoch: 3, prefix_ids: vec![7, 8], ..plain.clone() };
    [plain, resumed].iter().map(Message::encode_to_vec).collect()
}

/// Whole answers, frame after frame.
pub(super) fn serve_frames() -> Vec<Vec<u8>> {
    let tokens = |source: v1::Source, ids: &[u32]| {
        let logprob = |&id: &u32| v1::PositionLogprobs {
            token: Some(v1::TokenLogprob { id, logprob: -1.5 }),
            top: vec![v1::TokenLogprob { id: 9, logprob: -0.5 }],
        };
        let logprobs = ids.iter().map(logprob).collect();
        serve_frame::Event::Tokens(v1::Tokens {
            source: source.into(),
            ids: ids.to_vec(),
            logprobs,
        })
    };
    let switched = v1::Switched { by_threshold: true, kept_tokens: 3, drafted_tokens: 5 };
    let finished = v1::Finished {
        reason: v1::FinishReason::Stop.into(),
        prompt_tokens: 3,
        completion_tokens: 5,
    };
    let moved = v1::Moved { kv: None, scores: vec![-0.1] };
    let answers: [Vec<(u32, serve_frame::Event)>; 2] = [
        vec![
            (0, tokens(v1::Source::Drafter, &[1, 2, 3])),
            (3, serve_frame::Event::Switched(switched)),
            (3, tokens(v1::Source::Base, &[4, 5])),
            (5, serve_frame::Event::Finished(finished)),
        ],
        vec![
            (0, tokens(v1::Source::Drafter, &[1, 2, 3])),
            (1, tokens(v1::Source::Drafter, &[2, 3])),
            (3, serve_frame::Event::Switched(switched)),
            (3, serve_frame::Event::Moved(moved)),
        ],
    ];
    let encode = |answer: &Vec<(u32, serve_frame::Event)>| {
        let frame = |(position, event): &(u32, serve_frame::Event)| v1::ServeFrame {
            request_id: "r".into(),
            epoch: 1,
            position: *position,
            event: Some(event.clone()),
        };
        answer.iter().map(frame).flat_map(|frame| frame.encode_length_delimited_to_vec()).collect()
    };
    answers.iter().map(encode).collect()
}

/// A draft, frame after frame.
pub(super) fn handoff_frames() -> Vec<Vec<u8>> {
    use v1::handoff_frame::Event;
    let tokens = |position, count, ids: &[u32], text: &str| {
        (position, Event::Tokens(v1::DraftTokens { count, ids: ids.to_vec(), text: text.into() }))
    };
    let ended = v1::DraftEnded { reason: v1::DraftEnd::Eos.into() };
    let drafts = [
        [tokens(0, 3, &[1, 2, 3], ""), tokens(1, 2, &[2, 3], ""), (3, Event::Ended(ended))],
        [tokens(0, 2, &[], "Hello"), tokens(2, 4, &[], " w\u{f6}rld"), (6, Event::Ended(ended))],
    ];
    let frame = |(position, event): &(u32, Event)| {
        let (request_id, event) = ("r".to_owned(), Some(event.clone()));
        let frame = v1::HandoffFrame { request_id, epoch: 1, position: *position, event };
        frame.encode_length_delimited_to_vec()
    };
    drafts.iter().map(|draft| draft.iter().flat_map(frame).collect()).collect()
}

/// The pages of the KV seeds.
pub(super) const KV_LAYOUT: KvLayout =
    KvLayout { page_size: 4, layers: 2, kv_heads: 1, head_dim: 4, dtype: KvDtype::F16, tp: 1 };

fn kv_format() -> KvFormat {
    KvFormat { model: ModelHash([7; 32]), layout: KV_LAYOUT }
}

pub(super) fn kv_receiver_frames() -> Vec<Vec<u8>> {
    let Ok(request_id) = RequestId::new("018f-r") else { return Vec::new() };
    let hello = Hello { request_id, epoch: Epoch::FIRST, format: kv_format() };
    let frames = [ReceiverFrame::Hello(hello), ReceiverFrame::OtherVersion(9), ReceiverFrame::Done];
    let mut out = Vec::new();
    for frame in &frames {
        let _ = write_receiver(&mut out, frame).now_or_never();
    }
    vec![out]
}

pub(super) fn kv_sender_frames() -> Vec<Vec<u8>> {
    let refusal = Refusal::new(RefusalCode::Busy, "no");
    let last = [SenderFrame::End { pages: 2 }, SenderFrame::Refuse(refusal)];
    let stream = |last: &SenderFrame| {
        let mut out = Vec::new();
        let _ = write_control(&mut out, &SenderFrame::Accept(kv_format())).now_or_never();
        for page in 0..2 {
            let data = vec![page as u8; KV_LAYOUT.page_bytes()];
            let _ = write_page(&mut out, page, &[1, 2, 3, 4], &data).now_or_never();
            let _ = write_control(&mut out, &SenderFrame::Alive).now_or_never();
        }
        let _ = write_control(&mut out, last).now_or_never();
        out
    };
    last.iter().map(stream).collect()
}

pub(super) fn error_trailers() -> Vec<Vec<u8>> {
    let detail = v1::ErrorDetail {
        code: "overloaded".into(),
        message: "no".into(),
        field: Some("n".into()),
        retry_after_ms: Some(5),
    };
    vec![detail.encode_to_vec()]
}

pub(super) fn node_records() -> Vec<Vec<u8>> {
    let hash = "ab".repeat(32);
    bytes(&[
        json!({"node_id": "b1", "tier": "base", "address": "10.0.0.1:7000", "model": "m",
            "tokenizer_fingerprint": hash, "text_fingerprint": hash, "context_length": 2048, "slots": 8,
            "draining": false, "incarnation": 1_700_000_000_000_u64}),
        json!({"node_id": "d1", "tier": "drafter", "address": "[::1]:7", "model": "é",
            "tokenizer_fingerprint": hash, "text_fingerprint": hash, "context_length": 1, "slots": 1,
            "incarnation": 1, "later": {"unknown": [1]}}),
    ])
}

/// Small GGUF files: a byte-level and a metaspace vocabulary, every type of value, two tensors.
pub(super) fn gguf_files() -> Vec<Vec<u8>> {
    vec![gguf("gpt2"), gguf("llama")]
}

fn gguf(model: &str) -> Vec<u8> {
    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }
    fn array<T>(kind: u32, items: &[T], encode: impl Fn(&T) -> Vec<u8>) -> Vec<u8> {
        let mut out = kind.to_le_bytes().to_vec();
        out.extend((items.len() as u64).to_le_bytes());
        items.iter().for_each(|item| out.extend(encode(item)));
        out
    }
    let tokens: Vec<String> =
        ["<unk>", "<s>", "</s>", "a", "b", "ab", "\u{120}", "\u{2581}", "\u{10a}"]
            .map(str::to_owned)
            .into_iter()
            .chain((0..16).map(|byte| format!("<0x{byte:02X}>")))
            .collect();
    let kinds: Vec<i32> = (0..tokens.len())
        .map(|at| [2, 3, 3, 1, 1, 1, 1, 1, 1].get(at).copied().unwrap_or(6))
        .collect();
    let scores: Vec<f32> = (0..tokens.len()).map(|at| -(at as f32)).collect();
    let merges = [String::from("a b")];
    let entries: Vec<(&str, u32, Vec<u8>)> = vec![
        ("general.architecture", 8, text("llama")),
        ("general.alignment", 4, 32u32.to_le_bytes().to_vec()),
        ("llama.rope.freq_base", 6, 1e4f32.to_le_bytes().to_vec()),
        ("a.double", 12, 1e4f64.to_le_bytes().to_vec()),
        ("a.long", 10, 7u64.to_le_bytes().to_vec()),
        ("a.byte", 1, vec![0xff]),
        ("a.flag", 7, vec![1]),
        ("a.nested", 9, array(9, &[3i32], |it| array(5, &[*it], |it| it.to_le_bytes().to_vec()))),
        ("tokenizer.ggml.model", 8, text(model)),
        ("tokenizer.ggml.pre", 8, text("gpt-2")),
        ("tokenizer.ggml.tokens", 9, array(8, &tokens, |it| text(it))),
        ("tokenizer.ggml.token_type", 9, array(5, &kinds, |it| it.to_le_bytes().to_vec())),
        ("tokenizer.ggml.scores", 9, array(6, &scores, |it| it.to_le_bytes().to_vec())),
        ("tokenizer.ggml.merges", 9, array(8, &merges, |it| text(it))),
        ("tokenizer.ggml.bos_token_id", 4, 1u32.to_le_bytes().to_vec()),
        ("tokenizer.ggml.eos_token_id", 4, 2u32.to_le_bytes().to_vec()),
        ("tokenizer.chat_template", 8, text("{% for m in messages %}{{ m.content }}{% endfor %}")),
    ];
    let tensors: [(&str, &[u64], u32, u64); 2] = [("a", &[4, 3], 0, 0), ("q", &[32, 2], 8, 64)];
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((entries.len() as u64).to_le_bytes());
    for (key, kind, value) in &entries {
        out.extend(text(key));
        out.extend(kind.to_le_bytes());
        out.extend(value);
    }
    for (name, shape, dtype, offset) in tensors {
        out.extend(text(name));
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|size| out.extend(size.to_le_bytes()));
        out.extend(dtype.to_le_bytes());
        out.extend(offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(32), 0);
    out.resize(out.len() + 64 + 96, 7);
    out
}

pub(super) fn safetensors_files() -> Vec<Vec<u8>> {
    let file = |header: &Value, data: usize| {
        let header = header.to_string();
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend(header.bytes());
        out.resize(out.len() + data, 7);
        out
    };
    vec![
        file(
            &json!({"__metadata__": {"format": "pt"},
                "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
                "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}),
            32,
        ),
        file(&json!({"s": {"dtype": "F16", "shape": [], "data_offsets": [0, 2]}}), 2),
        file(&json!({}), 0),
    ]
}

pub(super) fn hf_configs() -> Vec<Vec<u8>> {
    let tiny = ["gemma2", "llama3-rope", "mistral-window", "qwen2-bias", "qwen3"];
    tiny.iter().map(|name| file(&format!("tiny/{name}/config.json"))).collect()
}

/// A file of the fixtures; empty if it is missing, which the seeds' own test would show.
fn file(path: &str) -> Vec<u8> {
    std::fs::read(fixture(path)).unwrap_or_default()
}

/// A byte-level and a metaspace tokenizer with few tokens.
pub(super) fn tokenizers() -> Vec<Vec<u8>> {
    let added = json!([{"id": 0, "content": "<s>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true}]);
    let byte_level = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null, "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": {"<s>": 0, "H": 1, "e": 2, "l": 3, "o": 4, "He": 5, "ll": 6, "\u{120}": 7},
            "merges": [["H", "e"], ["l", "l"]]},
    });
    let metaspace = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<s>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": {"<s>": 0, "\u{2581}": 1, "H": 2, "e": 3, "He": 4, "\u{2581}He": 5, "<0x0A>": 6},
            "merges": [["H", "e"], ["\u{2581}", "He"]]},
    });
    bytes(&[byte_level, metaspace])
}

/// What nodes send of their model's text side.
pub(super) fn bundles() -> Vec<Vec<u8>> {
    use headstart_formats::gguf::Gguf;
    let texts = gguf_files().into_iter().filter_map(|file| {
        let (metadata, _) = Gguf::check(&file, std::path::Path::new("seed.gguf")).ok()?;
        ModelText::from_metadata(&metadata).ok()
    });
    texts.map(|text| text.to_bundle()).collect()
}

pub(super) fn templates() -> Vec<Vec<u8>> {
    [
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ \
         '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + \
         message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if \
         add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}\
         {% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% elif m.role == 'system' %}\
         {{ raise_exception('no system') }}{% else %}{{ m.content.split('x')[-1] }}{% endif %}{% endfor %}",
        "{%- macro show(x, deep=false) -%}{{ x | tojson(indent=2) }}{%- endmacro -%}{{ show(messages) }}\
         {%- for k, v in messages[0].items() %}{{ k ~ '=' ~ v }}{% endfor -%}{{ range(5) | list }}\
         {{ strftime_now('%d %b %Y') }}{% generation %}x{% endgeneration %}",
    ]
    .map(|template| template.as_bytes().to_vec())
    .to_vec()
}

pub(super) fn configs() -> Vec<Vec<u8>> {
    vec![
        b"http = \"127.0.0.1:8080\"\netcd = ['a:1', 'b:2']\nwindow = 4\nthreshold = 0.5\n\
          draft-tokens-max = 100\nencoding = 'text'\nframe_timeout = '30s'\nlog-format = 'json'\n"
            .to_vec(),
        b"# comment\nin_flight_max = 10\nrequest_timeout = 2.5\non_no_drafter = \"reject\"\n\
          drain_timeout = \"500ms\"\n[table]\nx = 1\n"
            .to_vec(),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::targets::ALL;

    /// A seed that its parser refuses at the door tests nothing behind it.
    #[test]
    fn seeds_are_there_and_right() {
        for target in ALL {
            let seeds = (target.seeds)();
            assert!(!seeds.is_empty(), "{}", target.name);
            for seed in &seeds {
                assert!(seed.len() <= target.bytes_max, "{}: {} bytes", target.name, seed.len());
                (target.run)(seed);
            }
        }
        use headstart_formats::{gguf::Gguf, safetensors::SafetensorsFile};
        use headstart_router::testing;
        use headstart_text::{ModelText, Tokenizer};
        let path = std::path::Path::new("seed");
        assert_eq!(super::bundles().len(), 2);
        assert!(super::bundles().iter().all(|it| ModelText::from_bundle(it).is_ok()));
        assert!(super::gguf_files().iter().all(|it| Gguf::check(it, path).is_ok()));
        assert!(
            super::safetensors_files().iter().all(|it| SafetensorsFile::check(it, path).is_ok())
        );
        assert!(super::tokenizers().iter().all(|it| Tokenizer::from_json(it).is_ok()));
        assert!(super::chat_bodies().iter().take(9).all(|it| testing::parse_chat(it).is_ok()));
    }
}
