//! Token for token what independent implementations make of the same text
//! (`tests/fixtures/tokenizers/make_fixtures.py`).

mod common;

use common::{QWEN, SMOLLM2, ids, json, model, texts};
use headstart_text::{Streaming, Tokenizer};

fn assert_ids(tokenizer: &Tokenizer, texts: &[String], expected: &[Vec<u32>]) {
    assert_eq!(texts.len(), expected.len());
    for (text, expected) in texts.iter().zip(expected) {
        assert_eq!(&tokenizer.encode(text).unwrap(), expected, "{text:?}");
    }
}

#[test]
fn stories260k_is_that_of_the_tokenizers_package() {
    let stories = common::stories();
    assert_ids(stories.tokenizer(), &texts(), &ids(&json("ids_stories260k.json")));
}

#[test]
fn byte_level_from_gguf_is_that_of_the_tokenizers_package() {
    let fixture = json("byte_level_small.json");
    for pre in ["smollm", "qwen2", "llama-bpe"] {
        let tokenizer = common::small_byte_level(pre);
        assert_ids(&tokenizer, &texts(), &ids(&fixture["ids"][pre]));
    }
}

#[test]
fn scores_merge_as_sentencepiece_does() {
    let fixture = json("metaspace_small.json");
    let tokenizer = common::small_metaspace();
    let texts: Vec<String> = serde_json::from_value(fixture["texts"].clone()).unwrap();
    assert_ids(&tokenizer, &texts, &ids(&fixture["ids"]));
}

#[test]
fn real_models_are_those_of_tiktoken() {
    for (name, file) in [(SMOLLM2, "ids_smollm2.json"), (QWEN, "ids_qwen2.json")] {
        if let Some(text) = model(name) {
            assert_ids(text.tokenizer(), &texts(), &ids(&json(file)));
        }
    }
}

/// By hand, with the file that `make_fixtures.py` writes of the real Llama 3 vocabulary:
/// `HEADSTART_LLAMA3_CHECK=file cargo test -p headstart-text llama3 -- --ignored`.
#[test]
#[ignore = "needs the Llama 3 vocabulary"]
fn llama3_is_that_of_tiktoken() {
    let (fixture, tokenizer) = common::llama3().expect("HEADSTART_LLAMA3_CHECK");
    assert_eq!(tokenizer.streaming(), Streaming::Incremental);
    assert_ids(&tokenizer, &texts(), &ids(&fixture["ids"]["llama-bpe"]));
}

#[test]
fn all_stream() {
    for (name, tokenizer) in common::all() {
        assert_eq!(tokenizer.streaming(), Streaming::Incremental, "{name}");
    }
}

#[test]
fn decoding_gives_the_text_back() {
    let special = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"];
    for pre in ["smollm", "gpt-2", "llama-bpe"] {
        let tokenizer = common::small_byte_level(pre);
        let own = special.iter().filter(|name| tokenizer.token_id(name).is_some());
        for text in texts() {
            let expected = own.clone().fold(text.clone(), |text, name| text.replace(name, ""));
            assert_eq!(tokenizer.decode(&tokenizer.encode(&text).unwrap()), expected, "{pre}");
        }
    }
    // A stretch of text after an added token begins with a space of its own there.
    let added = ["<s>", "</s>", "<unk>", "<tool>"];
    for tokenizer in [common::stories().tokenizer().clone(), common::small_metaspace()] {
        for text in texts().iter().filter(|text| !added.iter().any(|name| text.contains(name))) {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()), text.replace('▁', " "));
        }
    }
}

#[test]
fn a_tokenizer_survives_its_own_canonical_form() {
    for (name, tokenizer) in common::all() {
        let again = Tokenizer::from_json(tokenizer.to_json().as_bytes()).unwrap();
        assert_eq!(again.to_json(), tokenizer.to_json(), "{name}");
        assert_eq!(again.fingerprint(), tokenizer.fingerprint(), "{name}");
        assert_eq!(again.vocab_size(), tokenizer.vocab_size(), "{name}");
    }
    let mut seen: Vec<_> = common::all().iter().map(|(_, t)| t.fingerprint().clone()).collect();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), common::all().len());
}

#[test]
fn how_a_tokenizer_is_written_down_does_not_change_its_fingerprint() {
    let tokenizer = common::small_byte_level("smollm");
    let other = common::changed(&tokenizer, |json| {
        let merges = json["model"]["merges"].as_array_mut().unwrap();
        for merge in merges {
            *merge =
                format!("{} {}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap()).into();
        }
        let vocab = json["model"]["vocab"].as_object_mut().unwrap();
        *vocab = vocab.clone().into_iter().rev().filter(|(t, _)| t != "<|im_end|>").collect();
        json["truncation"] = serde_json::json!({"max_length": 3});
        json["decoder"] = serde_json::json!({"type": "ByteLevel", "trim_offsets": false});
        json["post_processor"] = serde_json::json!({"type": "ByteLevel"});
        json["pre_tokenizer"]["pretokenizers"][1] = serde_json::json!(
            {"use_regex": true, "type": "ByteLevel", "add_prefix_space": false});
        json.as_object_mut().unwrap().remove("normalizer");
    });
    assert_eq!(other.to_json(), tokenizer.to_json());
    assert_eq!(other.fingerprint(), tokenizer.fingerprint());
    let another = common::changed(&tokenizer, |json| {
        json["added_tokens"][0]["special"] = false.into();
    });
    assert_ne!(another.fingerprint(), tokenizer.fingerprint());
}

#[test]
fn token_bytes_and_special_tokens() {
    let tokenizer = common::small_byte_level("qwen2");
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    assert!(tokenizer.is_special(end));
    assert_eq!(tokenizer.token_bytes(end), b"<|im_end|>");
    let ids = tokenizer.encode("a<|im_end|>\u{e9}").unwrap();
    assert!(ids.contains(&end));
    assert_eq!(tokenizer.decode(&ids), "aé");
    assert_eq!(tokenizer.decode(&[u32::MAX, 5_000_000]), "");
    let stories = common::stories();
    let newline = stories.tokenizer().token_id("<0x0A>").unwrap();
    assert_eq!(stories.tokenizer().token_bytes(newline), b"\n");
}

#[test]
fn malformed_tokenizers_are_refused_by_field() {
    let good: serde_json::Value =
        serde_json::from_str(common::small_byte_level("smollm").to_json()).unwrap();
    type Change = fn(&mut serde_json::Value);
    let cases: [(&str, Change); 11] = [
        ("model", |json| json["model"] = 3.into()),
        ("model.type", |json| json["model"]["type"] = "Unigram".into()),
        ("model.vocab", |json| json["model"]["vocab"] = serde_json::json!([])),
        ("model.vocab[\"a\"]", |json| json["model"]["vocab"]["a"] = (-1).into()),
        ("model.vocab[\"a\"]", |json| json["model"]["vocab"]["a"] = 4_000_000_000_u32.into()),
        ("model.merges", |json| json["model"]["merges"] = "x".into()),
        ("model.merges[0]", |json| json["model"]["merges"][0] = "one".into()),
        ("model.merges[1]", |json| {
            json["model"]["merges"][1] = serde_json::json!(["zzzz", "zzzz"])
        }),
        ("added_tokens[0]", |json| json["added_tokens"][0] = serde_json::json!({"id": "x"})),
        ("decoder", |json| json["decoder"] = serde_json::json!({"type": "WordPiece"})),
        ("model.unk_token", |json| json["model"]["unk_token"] = "nowhere".into()),
    ];
    for (field, change) in cases {
        let mut json = good.clone();
        change(&mut json);
        let error = Tokenizer::from_json(json.to_string().as_bytes()).unwrap_err().to_string();
        assert!(error.contains(field), "{field}: {error}");
    }
    assert!(Tokenizer::from_json(b"{").is_err());
    assert!(Tokenizer::from_json(b"[]").is_err());
    let deep = "[".repeat(100_000);
    assert!(Tokenizer::from_json(deep.as_bytes()).is_err());
}

#[test]
fn malformed_metadata_is_refused_by_key() {
    let small = json("byte_level_small.json");
    let refused = |fixture: &serde_json::Value, model: &str, pre: Option<&str>| {
        Tokenizer::from_gguf(&common::metadata(fixture, model, pre)).unwrap_err().to_string()
    };
    let error = refused(&small, "gpt2", Some("tekken"));
    assert!(error.contains("tokenizer.ggml.pre") && error.contains("tekken"), "{error}");
    let error = refused(&small, "rwkv", Some("qwen2"));
    assert!(error.contains("tokenizer.ggml.model") && error.contains("rwkv"), "{error}");
    let mut wrong = small.clone();
    wrong["types"] = serde_json::json!([1, 1]);
    assert!(refused(&wrong, "gpt2", Some("qwen2")).contains("tokenizer.ggml.token_type"));
    let mut wrong = small.clone();
    wrong["types"][3] = 9.into();
    assert!(refused(&wrong, "gpt2", Some("qwen2")).contains("tokenizer.ggml.token_type[3]"));
    let mut wrong = small;
    wrong["merges"][2] = "nospace".into();
    assert!(refused(&wrong, "gpt2", Some("qwen2")).contains("tokenizer.ggml.merges[2]"));
    let mut wrong = json("metaspace_small.json");
    wrong["scores"] = serde_json::json!([0.0]);
    assert!(refused(&wrong, "llama", None).contains("tokenizer.ggml.scores"));
}
