//! Whole models: prompts, BOS, stop tokens, bundles, and the golden prompts.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{QWEN, SMOLLM2, model};
use headstart_formats::gguf::{Metadata, Value as Meta};
use headstart_text::{
    BasePrompt, DraftEncoder, Message, ModelText, Prompt, Role, StopMatcher, TextError,
};
use serde_json::{Value, json};

fn user(content: &str) -> Vec<Message> {
    vec![Message::new(Role::User, content)]
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn golden_prompts_and_drafts() {
    let folder = std::env::var_os("HEADSTART_GOLDEN").map(std::path::PathBuf::from);
    let folder = folder.unwrap_or_else(|| common::fixtures().join("golden"));
    let Ok(entries) = std::fs::read_dir(&folder) else {
        eprintln!("no golden files in {}: skipped", folder.display());
        return;
    };
    let mut checked = 0;
    for path in entries.map(|entry| entry.unwrap().path()) {
        let name = path.file_name().unwrap().to_str().unwrap();
        let base = if name.contains("_to_qwen") { QWEN } else { SMOLLM2 };
        let (true, Some(drafter), Some(base)) =
            (name.contains("_to_"), model(SMOLLM2), model(base))
        else {
            continue;
        };
        for line in std::fs::read_to_string(&path).unwrap().lines() {
            check_golden(
                &serde_json::from_str(line).unwrap(),
                drafter,
                base,
                name.contains(".ids"),
            );
            checked += 1;
        }
    }
    eprintln!("{checked} golden prompts");
}

fn check_golden(golden: &Value, drafter: &ModelText, base: &ModelText, by_ids: bool) {
    let id = &golden["id"];
    let messages: Vec<Message> = serde_json::from_value(golden["messages"].clone()).unwrap();
    let prompt = drafter.drafter_prompt(&messages).unwrap();
    assert_eq!(prompt.ids, ids(&golden["drafter_prompt_ids"]), "{id}");
    let Prompt { text, ids: prompt_ids } = base.base_prompt(&messages).unwrap();
    assert_eq!(prompt_ids, ids(&golden["base_prompt_ids"]), "{id}");

    let mut detokenizer = headstart_text::Detokenizer::new(drafter.tokenizer());
    let mut encoder = DraftEncoder::new(base.tokenizer(), &text, &prompt_ids).unwrap();
    let (mut draft, mut streamed) = (String::new(), Vec::new());
    for token in ids(&golden["draft_ids"]) {
        let piece = detokenizer.push(token);
        streamed.extend(encoder.push(&piece).unwrap());
        draft.push_str(&piece);
    }
    let rest = detokenizer.finish();
    streamed.extend(encoder.push(&rest).unwrap());
    streamed.extend(encoder.finish().unwrap());
    draft.push_str(&rest);
    assert_eq!(draft, golden["draft_text"], "{id}");
    if !by_ids {
        assert_eq!(streamed, ids(&golden["base_draft_ids"]), "{id}");
        assert!(encoder.clean_boundary());
    }

    let answer_ids = [ids(&golden["kept_ids"]), ids(&golden["continuation_ids"])].concat();
    let stops = base.base_stop_strings().iter().map(|&stop| stop.to_owned()).collect();
    let mut matcher = StopMatcher::new(stops);
    let mut answer = matcher.push(&base.tokenizer().decode(&answer_ids)).text;
    answer.push_str(&matcher.finish());
    assert_eq!(answer, golden["answer"], "{id}");
    assert_eq!(matcher.stopped(), golden["end"] == "stop", "{id}");
}

/// `chat.json` is what `transformers` renders with the models' own templates.
#[test]
fn chat_templates_are_those_of_transformers() {
    let cases = common::json("chat.json");
    for case in cases.as_array().unwrap() {
        let Some(text) = model(case["model"].as_str().unwrap()) else { continue };
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        assert_eq!(text.drafter_prompt(&messages).unwrap().text, case["text"]);
    }
}

/// Figures for a person to look at: `cargo test --release -p headstart-text speed -- --ignored --nocapture`.
#[test]
#[ignore = "prints times"]
fn speed() {
    let Some(text) = model(QWEN) else { return };
    let tokenizer = text.tokenizer();
    let content = common::texts().concat().repeat(8);
    let prompt = text.base_prompt(&user(&content)).unwrap();
    let timed = |what: &str, n: usize, run: &mut dyn FnMut()| {
        let start = std::time::Instant::now();
        run();
        println!("{what}: {n} tokens in {:?}", start.elapsed());
    };
    timed("encode, first", prompt.ids.len(), &mut || drop(tokenizer.encode(&prompt.text)));
    timed("encode, again", prompt.ids.len(), &mut || drop(tokenizer.encode(&prompt.text)));
    let mut encoder = None;
    timed("DraftEncoder::new", prompt.ids.len(), &mut || {
        encoder = DraftEncoder::new(tokenizer, &prompt.text, &prompt.ids).ok();
    });
    let mut encoder = encoder.unwrap();
    let pieces: Vec<String> = content.chars().map(String::from).collect();
    let (mut ids, mut longest) = (0, std::time::Duration::ZERO);
    timed("draft, by character", pieces.len(), &mut || {
        for piece in &pieces {
            let start = std::time::Instant::now();
            ids += encoder.push(piece).unwrap().len();
            longest = longest.max(start.elapsed());
        }
    });
    println!("{ids} draft tokens, the slowest push {longest:?}");
    let mut hard = DraftEncoder::new(tokenizer, "x\n", &tokenizer.encode("x\n").unwrap()).unwrap();
    timed("one word of 60,000 letters, by 3", 20_000, &mut || {
        for _ in 0..20_000 {
            hard.push("abc").unwrap();
        }
    });
    timed("bundle", 0, &mut || println!("{} bytes", text.to_bundle().len()));
    let bundle = text.to_bundle();
    timed("from_bundle", 0, &mut || drop(ModelText::from_bundle(&bundle)));
}

#[test]
fn bos_begins_the_plain_prompt_of_a_directory_that_has_one() {
    let text = common::stories();
    let prompt = text.base_prompt(&user("Hi")).unwrap();
    assert_eq!(prompt.text, "\n\n[User]\nHi\n\n[Assistant]\n");
    assert_eq!(prompt.ids[0], 1);
    assert_eq!(prompt.ids[1..], text.tokenizer().encode(&prompt.text).unwrap());
    assert_eq!(text.drafter_prompt(&user("Hi")).unwrap(), prompt);
    assert_eq!(text.stop_tokens(), [2]);
    assert!(DraftEncoder::new(text.tokenizer(), &prompt.text, &prompt.ids).is_ok());
}

/// A directory with the small tokenizer and the given `tokenizer_config.json`.
fn directory(config: &Value, generation: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write("config.json", "{}");
    write("tokenizer.json", common::small_byte_level("llama-bpe").to_json());
    write("tokenizer_config.json", &config.to_string());
    write("generation_config.json", &generation.to_string());
    dir
}

#[test]
fn the_rule_for_bos_in_a_directory() {
    let bos = "<|endoftext|>";
    for (config, expected) in [
        (json!({"bos_token": bos}), true),
        (json!({"bos_token": {"content": bos}, "add_bos_token": true}), true),
        (json!({"bos_token": bos, "add_bos_token": false}), false),
        (json!({"bos_token": null, "add_bos_token": true}), false),
        (json!({}), false),
    ] {
        let text = ModelText::load(directory(&config, &json!({})).path()).unwrap();
        assert_eq!(text.add_bos(), expected, "{config}");
        let prompt = text.base_prompt(&user("Hi")).unwrap();
        let id = text.tokenizer().token_id(bos).unwrap();
        assert_eq!(prompt.ids.first() == Some(&id), expected, "{config}");
    }
    let config = json!({"bos_token": "<nowhere>"});
    let error = ModelText::load(directory(&config, &json!({})).path()).unwrap_err();
    assert!(error.to_string().contains("bos_token"), "{error}");
}

#[test]
fn the_rule_for_bos_in_a_gguf_file() {
    let fixture = common::json("byte_level_small.json");
    let base = common::metadata(&fixture, "gpt2", Some("qwen2"));
    let id = common::small_byte_level("qwen2").token_id("<|endoftext|>").unwrap();
    let with = |extra: &[(&str, Meta)]| {
        let mut values: BTreeMap<String, Meta> =
            base.iter().map(|(key, value)| (key.to_owned(), value.clone())).collect();
        values.extend(
            extra.iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value.clone())),
        );
        ModelText::from_metadata(&Metadata::new(Path::new("x.gguf"), values))
    };
    let bos = ("bos_token_id", Meta::Unsigned(u64::from(id)));
    assert!(!with(&[]).unwrap().add_bos());
    assert!(!with(&[("add_bos_token", Meta::Bool(true))]).unwrap().add_bos());
    assert!(with(std::slice::from_ref(&bos)).unwrap().add_bos());
    assert!(with(&[bos.clone(), ("add_bos_token", Meta::Bool(true))]).unwrap().add_bos());
    let without = with(&[bos, ("add_bos_token", Meta::Bool(false))]).unwrap();
    assert!(!without.add_bos());
    assert_eq!(without.bos().unwrap().text, "<|endoftext|>");
    // <|im_end|> ends a turn even if no key says so.
    assert_eq!(without.stop_tokens(), [without.tokenizer().token_id("<|im_end|>").unwrap()]);
    let error = with(&[("bos_token_id", Meta::Unsigned(99_999_999))]).unwrap_err();
    assert!(error.to_string().contains("bos_token_id"), "{error}");
}

#[test]
fn a_template_that_writes_bos_gets_no_second_one() {
    let config = json!({"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>",
        "chat_template": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ m.content }}{{ eos_token }}\n{% endfor %}"});
    let text =
        ModelText::load(directory(&config, &json!({"eos_token_id": [6258, 6260]})).path()).unwrap();
    let prompt = text.drafter_prompt(&user("Hi")).unwrap();
    assert_eq!(prompt.text, "<|endoftext|>Hi<|im_end|>\n");
    let bos = text.bos().unwrap().id;
    assert_eq!(prompt.ids.iter().filter(|&&id| id == bos).count(), 1);
    assert_eq!(text.stop_tokens(), [6258, 6259, 6260]);

    let refused = text.drafter_prompt(&[Message::new(Role::System, "Be kind")]).unwrap_err();
    assert!(matches!(&refused, TextError::Messages(m) if m == "System role not supported"));
    // The plain prompt needs no template's leave.
    assert!(text.base_prompt(&[Message::new(Role::System, "Be kind")]).is_ok());
    let chat = text.with_base_prompt(BasePrompt::Chat).unwrap();
    assert_eq!(chat.base_prompt(&user("Hi")).unwrap(), prompt);
    assert!(chat.base_stop_strings().is_empty());
    assert!(common::stories().with_base_prompt(BasePrompt::Chat).is_err());
}

#[test]
fn a_bundle_carries_everything() {
    let config =
        json!({"bos_token": "<|endoftext|>", "chat_template": "{{ messages[0].content }}"});
    let chat = ModelText::load(directory(&config, &json!({"eos_token_id": 5})).path()).unwrap();
    let chat = chat.with_base_prompt(BasePrompt::Chat).unwrap();
    let real = [SMOLLM2, QWEN].into_iter().filter_map(model).cloned();
    for text in [common::stories(), chat].into_iter().chain(real) {
        let bundle = text.to_bundle();
        let again = ModelText::from_bundle(&bundle).unwrap();
        assert_eq!(again.to_bundle(), bundle);
        assert_eq!(again.fingerprint(), text.fingerprint());
        assert_eq!(again.tokenizer().fingerprint(), text.tokenizer().fingerprint());
        assert_eq!(again.stop_tokens(), text.stop_tokens());
        assert_eq!(again.base_prompt_kind(), text.base_prompt_kind());
        let messages = user("What's 2+2? 你好");
        assert_eq!(
            again.drafter_prompt(&messages).unwrap(),
            text.drafter_prompt(&messages).unwrap()
        );
        assert_eq!(again.base_prompt(&messages).unwrap(), text.base_prompt(&messages).unwrap());
    }
}

#[test]
fn a_broken_bundle_is_refused_by_field() {
    let good = common::stories().to_bundle();
    assert!(ModelText::from_bundle(b"").is_err());
    assert!(ModelText::from_bundle(b"{}").is_err());
    assert!(ModelText::from_bundle(&good[..good.len() / 2]).is_err());
    let good: Value = serde_json::from_slice(&good).unwrap();
    type Change = fn(&mut Value);
    let cases: [(&str, Change); 8] = [
        ("version", |json| json["version"] = 2.into()),
        ("text", |json| json["text"] = Value::Null),
        ("text", |json| json["text"]["surprise"] = 1.into()),
        ("text.bos", |json| json["text"]["bos"]["id"] = 7.into()),
        ("text.add_bos", |json| json["text"]["bos"] = Value::Null),
        ("text.stop_tokens", |json| json["text"]["stop_tokens"] = vec![1; 1000].into()),
        ("model.vocab", |json| json["tokenizer"]["model"]["vocab"] = 5.into()),
        ("chat template", |json| json["text"]["base_prompt"] = "chat".into()),
    ];
    for (field, change) in cases {
        let mut json = good.clone();
        change(&mut json);
        let error = ModelText::from_bundle(json.to_string().as_bytes()).unwrap_err().to_string();
        assert!(error.contains(field), "{field}: {error}");
    }
}

#[test]
fn a_directory_without_a_tokenizer_says_so() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    let error = ModelText::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
    let error = ModelText::load(&dir.path().join("none.gguf")).unwrap_err().to_string();
    assert!(error.contains("none.gguf"), "{error}");
}
