//! `tokenizer.json`, read, checked and written in one canonical form.
//!
//! Two descriptions of the same tokenizer (a Hugging Face directory and a GGUF file, merges written as
//! strings or as pairs, a vocabulary in another order) have the same canonical form. What does not
//! change the ids or the text is left out: padding, truncation, offsets, and the post-processor, since
//! nothing here ever asks a tokenizer to add BOS or EOS by itself.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};

use crate::TextError;

/// No vocabulary in use is near this; a larger id is a broken file.
const TOKEN_ID_MAX: u64 = 4_000_000;

/// A tokenizer's description.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    /// Token text and id, by id, with the added tokens.
    pub(crate) vocab: Vec<(String, u32)>,
    /// Pairs to merge, the most urgent first.
    pub(crate) merges: Vec<(String, String)>,
    pub(crate) added: Vec<AddedToken>,
    pub(crate) normalizer: Value,
    pub(crate) pre_tokenizer: Value,
    decoder_json: Value,
    pub(crate) decoder: DecoderKind,
    pub(crate) unk_token: Option<String>,
    pub(crate) fuse_unk: bool,
    pub(crate) byte_fallback: bool,
    pub(crate) ignore_merges: bool,
}

/// A token that is found in the text before anything else is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AddedToken {
    pub(crate) id: u32,
    pub(crate) content: String,
    pub(crate) single_word: bool,
    pub(crate) lstrip: bool,
    pub(crate) rstrip: bool,
    pub(crate) normalized: bool,
    pub(crate) special: bool,
}

/// How tokens become text again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DecoderKind {
    /// Each character of a token stands for a byte.
    ByteLevel,
    /// `▁` stands for a space, `<0x0A>` for a byte.
    Metaspace {
        /// Whether a space at the very start of the text was put there by the tokenizer.
        strip_first_space: bool,
    },
}

/// The parts from which [`Spec::new`] makes a description.
pub(crate) struct SpecParts {
    pub(crate) vocab: Vec<(String, u32)>,
    pub(crate) merges: Vec<(String, String)>,
    pub(crate) added: Vec<AddedToken>,
    pub(crate) normalizer: Value,
    pub(crate) pre_tokenizer: Value,
    pub(crate) decoder: Value,
    pub(crate) unk_token: Option<String>,
    pub(crate) fuse_unk: bool,
    pub(crate) byte_fallback: bool,
    pub(crate) ignore_merges: bool,
}

impl Spec {
    /// Reads a `tokenizer.json`.
    pub(crate) fn from_json(bytes: &[u8]) -> Result<Self, TextError> {
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|e| TextError::tokenizer("tokenizer.json", "JSON", e.to_string()))?;
        Self::from_value(value)
    }

    /// Reads a parsed `tokenizer.json`.
    pub(crate) fn from_value(mut value: Value) -> Result<Self, TextError> {
        let Some(root) = value.as_object_mut() else {
            return Err(TextError::tokenizer("tokenizer.json", "an object", "another value"));
        };
        let mut model = match root.remove("model") {
            Some(Value::Object(model)) => model,
            _ => return Err(TextError::tokenizer("model", "an object", "none")),
        };
        check_model(&model)?;
        let vocab = read_vocab(model.remove("vocab"))?;
        let merges = read_merges(model.remove("merges"))?;
        let added = read_added(root.remove("added_tokens"))?;
        let flag = |name: &str| model.get(name).and_then(Value::as_bool).unwrap_or(false);
        Self::new(SpecParts {
            fuse_unk: flag("fuse_unk"),
            byte_fallback: flag("byte_fallback"),
            ignore_merges: flag("ignore_merges"),
            unk_token: model.get("unk_token").and_then(Value::as_str).map(str::to_owned),
            vocab,
            merges,
            added,
            normalizer: root.remove("normalizer").unwrap_or(Value::Null),
            pre_tokenizer: root.remove("pre_tokenizer").unwrap_or(Value::Null),
            decoder: root.remove("decoder").unwrap_or(Value::Null),
        })
    }

    /// A description from its parts, checked.
    pub(crate) fn new(parts: SpecParts) -> Result<Self, TextError> {
        let mut vocab: HashMap<String, u32> = parts.vocab.into_iter().collect();
        let mut added = parts.added;
        for token in &mut added {
            token.id = *vocab.entry(token.content.clone()).or_insert(token.id);
        }
        added.sort_by_key(|token| token.id);
        let mut vocab: Vec<(String, u32)> = vocab.into_iter().collect();
        vocab.sort_unstable_by(|a, b| (a.1, &a.0).cmp(&(b.1, &b.0)));
        let spec = Self {
            vocab,
            merges: parts.merges,
            added,
            normalizer: canonical(&parts.normalizer),
            pre_tokenizer: canonical(&parts.pre_tokenizer),
            decoder: decoder_kind(&parts.decoder)?,
            decoder_json: canonical_decoder(&parts.decoder),
            unk_token: parts.unk_token,
            fuse_unk: parts.fuse_unk,
            byte_fallback: parts.byte_fallback,
            ignore_merges: parts.ignore_merges,
        };
        spec.check()?;
        Ok(spec)
    }

    /// Everything that the `tokenizers` crate takes for granted.
    fn check(&self) -> Result<(), TextError> {
        if self.vocab.is_empty() {
            return Err(TextError::tokenizer("model.vocab", "tokens", "none"));
        }
        for (text, id) in &self.vocab {
            if u64::from(*id) > TOKEN_ID_MAX {
                let field = format!("model.vocab[{text:?}]");
                return Err(TextError::tokenizer(
                    field,
                    format!("an id up to {TOKEN_ID_MAX}"),
                    id.to_string(),
                ));
            }
        }
        let known: HashSet<&str> = self.vocab.iter().map(|(text, _)| text.as_str()).collect();
        for (index, (left, right)) in self.merges.iter().enumerate() {
            for text in [left.as_str(), right.as_str(), &format!("{left}{right}")] {
                if !known.contains(text) || text.is_empty() {
                    let field = format!("model.merges[{index}]");
                    return Err(TextError::tokenizer(
                        field,
                        "tokens of the vocabulary",
                        format!("{text:?}"),
                    ));
                }
            }
        }
        if let Some(unk) = self.unk_token.as_deref().filter(|unk| !known.contains(unk)) {
            return Err(TextError::tokenizer(
                "model.unk_token",
                "a token of the vocabulary",
                format!("{unk:?}"),
            ));
        }
        Ok(())
    }

    /// The canonical `tokenizer.json`.
    pub(crate) fn to_value(&self) -> Value {
        let added: Vec<Value> = self.added.iter().map(AddedToken::to_value).collect();
        let vocab: Map<String, Value> =
            self.vocab.iter().map(|(text, id)| (text.clone(), json!(id))).collect();
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": self.normalizer,
            "pre_tokenizer": self.pre_tokenizer,
            "post_processor": null,
            "decoder": self.decoder_json,
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": self.unk_token,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": self.fuse_unk,
                "byte_fallback": self.byte_fallback,
                "ignore_merges": self.ignore_merges,
                "vocab": vocab,
                "merges": self.merges,
            },
        })
    }
}

impl AddedToken {
    fn to_value(&self) -> Value {
        json!({
            "id": self.id,
            "content": self.content,
            "single_word": self.single_word,
            "lstrip": self.lstrip,
            "rstrip": self.rstrip,
            "normalized": self.normalized,
            "special": self.special,
        })
    }
}

fn check_model(model: &Map<String, Value>) -> Result<(), TextError> {
    // Files of old versions have no type.
    let kind = model.get("type").and_then(Value::as_str).unwrap_or("BPE");
    if kind != "BPE" {
        return Err(TextError::unsupported("model.type", kind, "BPE"));
    }
    for name in ["continuing_subword_prefix", "end_of_word_suffix"] {
        let text = model.get(name).and_then(Value::as_str).unwrap_or("");
        if !text.is_empty() {
            return Err(TextError::unsupported(
                format!("model.{name}"),
                format!("{text:?}"),
                "none",
            ));
        }
    }
    let dropout = model.get("dropout").and_then(Value::as_f64).unwrap_or(0.0);
    if dropout != 0.0 {
        return Err(TextError::unsupported("model.dropout", dropout.to_string(), "none"));
    }
    Ok(())
}

fn read_vocab(vocab: Option<Value>) -> Result<Vec<(String, u32)>, TextError> {
    let Some(Value::Object(vocab)) = vocab else {
        return Err(TextError::tokenizer("model.vocab", "an object", "none"));
    };
    vocab
        .into_iter()
        .map(|(text, id)| {
            let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let number = number.ok_or_else(|| {
                TextError::tokenizer(format!("model.vocab[{text:?}]"), "an id", id.to_string())
            })?;
            Ok((text, number))
        })
        .collect()
}

fn read_merges(merges: Option<Value>) -> Result<Vec<(String, String)>, TextError> {
    let Some(Value::Array(merges)) = merges else {
        return Err(TextError::tokenizer("model.merges", "an array", "none"));
    };
    let comment = |value: &Value| value.as_str().is_some_and(|line| line.starts_with("#version"));
    let lines = merges.into_iter().filter(|value| !comment(value)).enumerate();
    lines
        .map(|(index, value)| {
            let pair = match &value {
                Value::String(line) => line.split_once(' '),
                Value::Array(pair) => match pair.as_slice() {
                    [Value::String(left), Value::String(right)] => {
                        Some((left.as_str(), right.as_str()))
                    }
                    _ => None,
                },
                _ => None,
            };
            let (left, right) = pair.ok_or_else(|| {
                TextError::tokenizer(
                    format!("model.merges[{index}]"),
                    "two tokens",
                    value.to_string(),
                )
            })?;
            Ok((left.to_owned(), right.to_owned()))
        })
        .collect()
}

fn read_added(added: Option<Value>) -> Result<Vec<AddedToken>, TextError> {
    let added = match added {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(added)) => added,
        Some(_) => return Err(TextError::tokenizer("added_tokens", "an array", "another value")),
    };
    let mut tokens: Vec<AddedToken> = Vec::with_capacity(added.len());
    for (index, value) in added.iter().enumerate() {
        let id = value.get("id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
        let content = value.get("content").and_then(Value::as_str);
        let (Some(id), Some(content)) = (id, content) else {
            let field = format!("added_tokens[{index}]");
            return Err(TextError::tokenizer(field, "an id and a content", value.to_string()));
        };
        if content.is_empty() || tokens.iter().any(|token| token.content == content) {
            continue;
        }
        let flag = |name: &str| value.get(name).and_then(Value::as_bool).unwrap_or(false);
        tokens.push(AddedToken {
            id,
            content: content.to_owned(),
            single_word: flag("single_word"),
            lstrip: flag("lstrip"),
            rstrip: flag("rstrip"),
            normalized: flag("normalized"),
            special: flag("special"),
        });
    }
    Ok(tokens)
}

/// Sequences in sequences opened, sequences of one unpacked, keys sorted, offsets' options left out.
fn canonical(value: &Value) -> Value {
    let mut parts = Vec::new();
    flatten(value, &mut parts);
    let kind = if value.get("normalizers").is_some() { "normalizers" } else { "pretokenizers" };
    match parts.len() {
        0 => Value::Null,
        1 => parts.remove(0),
        _ => json!({"type": "Sequence", kind: parts}),
    }
}

/// The steps of a normalizer or pre-tokenizer, in order.
pub(crate) fn flatten(value: &Value, parts: &mut Vec<Value>) {
    let steps = ["normalizers", "pretokenizers"].iter().find_map(|kind| value.get(kind));
    match steps.and_then(Value::as_array) {
        Some(steps) => steps.iter().for_each(|step| flatten(step, parts)),
        None if value.is_null() => {}
        None => parts.push(canonical_step(value)),
    }
}

fn canonical_step(value: &Value) -> Value {
    let Some(step) = value.as_object() else { return value.clone() };
    let mut step = step.clone();
    if step.get("type").and_then(Value::as_str) == Some("ByteLevel") {
        step.insert("trim_offsets".to_owned(), json!(true));
        step.entry("use_regex").or_insert(json!(true));
    }
    let mut sorted: Vec<(String, Value)> = step.into_iter().collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    Value::Object(sorted.into_iter().map(|(key, value)| (key, canonical_step(&value))).collect())
}

fn decoder_steps(decoder: &Value) -> Vec<&Value> {
    match decoder.get("decoders").and_then(Value::as_array) {
        Some(steps) => steps.iter().flat_map(decoder_steps).collect(),
        None => vec![decoder],
    }
}

fn type_of(value: &Value) -> &str {
    value.get("type").and_then(Value::as_str).unwrap_or("none")
}

fn decoder_kind(decoder: &Value) -> Result<DecoderKind, TextError> {
    let steps = decoder_steps(decoder);
    let types: Vec<&str> = steps.iter().map(|step| type_of(step)).collect();
    let field = |key: &str, of: &str| {
        steps.iter().find(|step| type_of(step) == of).and_then(|step| step.get(key)).cloned()
    };
    if types == ["ByteLevel"] {
        return Ok(DecoderKind::ByteLevel);
    }
    if types == ["Metaspace"] {
        let never = field("prepend_scheme", "Metaspace") == Some(json!("never"))
            || field("add_prefix_space", "Metaspace") == Some(json!(false));
        return Ok(DecoderKind::Metaspace { strip_first_space: !never });
    }
    let replaces = field("content", "Replace") == Some(json!(" "))
        && field("pattern", "Replace") == Some(json!({"String": "▁"}));
    if replaces && types == ["Replace", "ByteFallback", "Fuse", "Strip"] {
        let strip_first_space = field("content", "Strip") == Some(json!(" "))
            && field("start", "Strip") == Some(json!(1))
            && field("stop", "Strip") == Some(json!(0));
        if strip_first_space {
            return Ok(DecoderKind::Metaspace { strip_first_space });
        }
    }
    if replaces && types == ["Replace", "ByteFallback", "Fuse"] {
        return Ok(DecoderKind::Metaspace { strip_first_space: false });
    }
    let supported = "ByteLevel; Metaspace; Replace ▁, ByteFallback, Fuse, with or without Strip";
    Err(TextError::unsupported("decoder", types.join(", "), supported))
}

fn canonical_decoder(decoder: &Value) -> Value {
    if decoder_steps(decoder).iter().any(|step| type_of(step) == "ByteLevel") {
        // Its options change nothing when it decodes.
        return json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                      "use_regex": true});
    }
    let mut steps: Vec<Value> = decoder_steps(decoder).into_iter().map(canonical_step).collect();
    match steps.len() {
        1 => steps.remove(0),
        _ => json!({"type": "Sequence", "decoders": steps}),
    }
}
