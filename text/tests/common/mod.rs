//! The tokenizers that the tests run over: small ones from the repository, and those of real models
//! where the files are (`HEADSTART_MODELS`, or the user's cache).
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use headstart_formats::gguf::{Array, Metadata, Value as Meta};
use headstart_text::{ModelText, Tokenizer};
use serde_json::Value;

pub const SMOLLM2: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
pub const QWEN: &str = "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf";

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

pub fn json(name: &str) -> Value {
    let path = fixtures().join("tokenizers").join(name);
    serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap()
}

pub fn texts() -> Vec<String> {
    serde_json::from_value(json("texts.json")).unwrap()
}

pub fn ids(value: &Value) -> Vec<Vec<u32>> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The real model of this name, read once; none where it is not.
pub fn model(name: &str) -> Option<&'static ModelText> {
    static SMOLLM2_TEXT: OnceLock<Option<ModelText>> = OnceLock::new();
    static QWEN_TEXT: OnceLock<Option<ModelText>> = OnceLock::new();
    let cell = if name == SMOLLM2 { &SMOLLM2_TEXT } else { &QWEN_TEXT };
    cell.get_or_init(|| {
        let path = models_dir()?.join(name);
        if !path.exists() {
            eprintln!("{name} is not here: what needs it is skipped");
            return None;
        }
        Some(ModelText::load(&path).unwrap())
    })
    .as_ref()
}

fn models_dir() -> Option<PathBuf> {
    let set = std::env::var_os("HEADSTART_MODELS").map(PathBuf::from);
    set.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/headstart/models")))
}

pub fn stories() -> ModelText {
    ModelText::load(&fixtures().join("stories260k")).unwrap()
}

/// Metadata as a GGUF file would have it, from a fixture.
pub fn metadata(fixture: &Value, model: &str, pre: Option<&str>) -> Metadata {
    let strings = |name: &str| {
        let list: Vec<String> = serde_json::from_value(fixture[name].clone()).unwrap();
        Meta::Array(Array::Str(list))
    };
    let mut values = BTreeMap::from([
        ("tokenizer.ggml.model".to_owned(), Meta::Str(model.to_owned())),
        ("tokenizer.ggml.tokens".to_owned(), strings("tokens")),
    ]);
    let types: Vec<i64> = serde_json::from_value(fixture["types"].clone()).unwrap();
    values.insert("tokenizer.ggml.token_type".to_owned(), Meta::Array(Array::Signed(types)));
    if let Some(pre) = pre {
        values.insert("tokenizer.ggml.pre".to_owned(), Meta::Str(pre.to_owned()));
        values.insert("tokenizer.ggml.merges".to_owned(), strings("merges"));
    } else {
        let scores: Vec<f64> = serde_json::from_value(fixture["scores"].clone()).unwrap();
        values.insert("tokenizer.ggml.scores".to_owned(), Meta::Array(Array::Float(scores)));
    }
    Metadata::new(Path::new("fixture.gguf"), values)
}

pub fn small_byte_level(pre: &str) -> Tokenizer {
    let fixture = json("byte_level_small.json");
    Tokenizer::from_gguf(&metadata(&fixture, "gpt2", Some(pre))).unwrap()
}

pub fn small_metaspace() -> Tokenizer {
    Tokenizer::from_gguf(&metadata(&json("metaspace_small.json"), "llama", None)).unwrap()
}

/// A tokenizer like another but for some parts of its `tokenizer.json`.
pub fn changed(tokenizer: &Tokenizer, change: impl FnOnce(&mut Value)) -> Tokenizer {
    let mut json: Value = serde_json::from_str(tokenizer.to_json()).unwrap();
    change(&mut json);
    Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
}

/// Every tokenizer here, with its name.
pub fn all() -> &'static [(String, Tokenizer)] {
    static ALL: OnceLock<Vec<(String, Tokenizer)>> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut all = vec![
            ("stories260k".to_owned(), stories().tokenizer().clone()),
            ("metaspace_small".to_owned(), small_metaspace()),
            ("gemma_like".to_owned(), gemma_like()),
            ("metaspace_first".to_owned(), metaspace_scheme("first", false)),
            ("metaspace_split".to_owned(), metaspace_scheme("always", true)),
        ];
        for pre in ["smollm", "qwen2", "llama-bpe", "gpt-2"] {
            all.push((format!("small {pre}"), small_byte_level(pre)));
        }
        for (name, short) in [(SMOLLM2, "smollm2"), (QWEN, "qwen2.5")] {
            all.extend(model(name).map(|text| (short.to_owned(), text.tokenizer().clone())));
        }
        all.extend(llama3().map(|(_, tokenizer)| ("llama3".to_owned(), tokenizer)));
        all
    })
}

/// The real Llama 3 vocabulary, where `HEADSTART_LLAMA3_CHECK` names the file that `make_fixtures.py`
/// writes of it.
pub fn llama3() -> Option<(Value, Tokenizer)> {
    let path = std::env::var_os("HEADSTART_LLAMA3_CHECK")?;
    let fixture: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let tokenizer = Tokenizer::from_gguf(&metadata(&fixture, "gpt2", Some("llama-bpe"))).unwrap();
    Some((fixture, tokenizer))
}

/// As Gemma's: no space put before the text, runs of newlines and spaces as added tokens.
fn gemma_like() -> Tokenizer {
    changed(&small_metaspace(), |json| {
        json["normalizer"] =
            serde_json::json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        json["pre_tokenizer"] = serde_json::json!({"type": "Split", "pattern": {"String": " "},
            "behavior": "MergedWithPrevious", "invert": false});
        let added = json["added_tokens"].as_array_mut().unwrap();
        for (i, content) in ["\n", "\n\n", "\n\n\n", "\n\n\n\n", "▁▁", "<div>"].iter().enumerate()
        {
            added
                .push(serde_json::json!({"id": 2000 + i, "content": content, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false, "special": false}));
        }
    })
}

fn metaspace_scheme(scheme: &str, split: bool) -> Tokenizer {
    changed(&small_metaspace(), |json| {
        json["normalizer"] = Value::Null;
        let metaspace = serde_json::json!({"type": "Metaspace", "replacement": "▁",
            "prepend_scheme": scheme, "split": split});
        json["pre_tokenizer"] = metaspace;
    })
}
