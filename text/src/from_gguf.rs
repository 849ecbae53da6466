//! A tokenizer from a GGUF file's metadata.
//!
//! What the keys mean: the GGUF specification (`docs/gguf.md` of ggml) and llama.cpp's
//! `src/llama-vocab.cpp`.

use std::cmp::Ordering;
use std::collections::HashMap;

use headstart_formats::gguf::Metadata;
use serde_json::{Value, json};

use crate::TextError;
use crate::pipeline::{LLAMA3_PATTERN, QWEN2_PATTERN};
use crate::spec::{AddedToken, Spec, SpecParts};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";

/// `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl TokenType {
    fn new(number: i32) -> Option<Self> {
        Some(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

/// The tokenizer's description.
pub(crate) fn spec(metadata: &Metadata) -> Result<Spec, TextError> {
    match metadata.require_str(MODEL)? {
        "gpt2" => byte_level(metadata),
        "llama" => metaspace(metadata),
        other => Err(TextError::unsupported(MODEL, format!("{other:?}"), "gpt2, llama")),
    }
}

/// Byte-level BPE; `tokenizer.ggml.pre` names the pre-tokenizer.
fn byte_level(metadata: &Metadata) -> Result<Spec, TextError> {
    let pre = metadata.get_str(PRE)?.unwrap_or("none");
    let split = |pattern: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]})
    };
    let gpt2 = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let nfc = json!({"type": "NFC"});
    let (normalizer, pre_tokenizer, ignore_merges) = match pre {
        "smollm" | "starcoder" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            (Value::Null, json!({"type": "Sequence", "pretokenizers": [digits, gpt2]}), false)
        }
        "gpt-2" => (Value::Null, gpt2, false),
        "qwen2" => (nfc, split(QWEN2_PATTERN), false),
        "llama-bpe" | "llama3" | "llama-v3" => (Value::Null, split(LLAMA3_PATTERN), true),
        other => {
            let supported = "smollm, starcoder, gpt-2, qwen2, llama-bpe, llama3, llama-v3";
            return Err(TextError::unsupported(PRE, format!("{other:?}"), supported));
        }
    };
    let tokens = tokens(metadata)?;
    let lines =
        metadata.get_str_array(MERGES)?.ok_or_else(|| metadata.error(MERGES, "an array"))?;
    let mut merges = Vec::with_capacity(lines.len());
    for (index, line) in lines.iter().enumerate() {
        let pair = line.split_once(' ').ok_or_else(|| {
            TextError::tokenizer(format!("{MERGES}[{index}]"), "two tokens", format!("{line:?}"))
        })?;
        merges.push((pair.0.to_owned(), pair.1.to_owned()));
    }
    Spec::new(SpecParts {
        vocab: vocab(&tokens),
        merges,
        added: added(&tokens),
        normalizer,
        pre_tokenizer,
        decoder: json!({"type": "ByteLevel"}),
        unk_token: None,
        fuse_unk: false,
        byte_fallback: false,
        ignore_merges,
    })
}

/// SentencePiece's BPE with byte fallback. Its merges are not in the file: a pair is merged if the
/// result is a token, and the better that token's score the sooner.
fn metaspace(metadata: &Metadata) -> Result<Spec, TextError> {
    if metadata.get_bool("tokenizer.ggml.remove_extra_whitespaces")? == Some(true) {
        let field = "tokenizer.ggml.remove_extra_whitespaces";
        return Err(TextError::unsupported(field, "true", "false"));
    }
    let tokens = tokens(metadata)?;
    let scores =
        metadata.get_f32_array(SCORES)?.ok_or_else(|| metadata.error(SCORES, "an array"))?;
    if scores.len() != tokens.len() {
        let expected = format!("{} scores, one a token", tokens.len());
        return Err(TextError::tokenizer(SCORES, expected, scores.len().to_string()));
    }
    if let Some(index) = scores.iter().position(|score| score.is_nan()) {
        return Err(TextError::tokenizer(format!("{SCORES}[{index}]"), "a number", "NaN"));
    }
    let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let prefix = metadata.get_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    let mut normalizers = vec![space];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = tokens.iter().find(|token| token.kind == TokenType::Unknown);
    Spec::new(SpecParts {
        vocab: vocab(&tokens),
        merges: merges_by_score(&tokens, &scores),
        added: added(&tokens),
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        unk_token: unknown.map(|token| token.text.to_owned()),
        fuse_unk: true,
        byte_fallback: true,
        ignore_merges: false,
    })
}

struct Token<'a> {
    id: u32,
    text: &'a str,
    kind: TokenType,
}

fn tokens(metadata: &Metadata) -> Result<Vec<Token<'_>>, TextError> {
    let texts = metadata.require_str_array(TOKENS)?;
    let kinds = metadata.get_i32_array(TOKEN_TYPE)?.unwrap_or_else(|| vec![1; texts.len()]);
    if kinds.len() != texts.len() {
        let expected = format!("{} types, one a token", texts.len());
        return Err(TextError::tokenizer(TOKEN_TYPE, expected, kinds.len().to_string()));
    }
    let mut tokens = Vec::with_capacity(texts.len());
    for (index, (text, kind)) in texts.iter().zip(kinds).enumerate() {
        let kind = TokenType::new(kind).ok_or_else(|| {
            let field = format!("{TOKEN_TYPE}[{index}]");
            TextError::tokenizer(field, "a type from 1 to 6", kind.to_string())
        })?;
        tokens.push(Token { id: index as u32, text, kind });
    }
    Ok(tokens)
}

/// All but the tokens that only fill the vocabulary up; of two with one text the first.
fn vocab(tokens: &[Token<'_>]) -> Vec<(String, u32)> {
    let used =
        tokens.iter().filter(|token| token.kind != TokenType::Unused && !token.text.is_empty());
    used.rev().map(|token| (token.text.to_owned(), token.id)).collect()
}

fn added(tokens: &[Token<'_>]) -> Vec<AddedToken> {
    let is_added = |token: &&Token<'_>| {
        matches!(token.kind, TokenType::Control | TokenType::Unknown | TokenType::UserDefined)
            && !token.text.is_empty()
    };
    let added = tokens.iter().filter(is_added).map(|token| AddedToken {
        id: token.id,
        content: token.text.to_owned(),
        single_word: false,
        lstrip: false,
        rstrip: false,
        normalized: false,
        special: token.kind != TokenType::UserDefined,
    });
    added.collect()
}

/// For every token the pairs of tokens that make it up, ordered as `transformers` orders them when it
/// converts a SentencePiece model (`convert_slow_tokenizer.py`, `generate_merges`): the best score
/// first, then the longer left, then the longer right part.
fn merges_by_score(tokens: &[Token<'_>], scores: &[f32]) -> Vec<(String, String)> {
    struct Merge<'a> {
        score: f32,
        chars: (usize, usize),
        left: &'a str,
        right: &'a str,
    }
    let merging =
        |token: &&Token<'_>| matches!(token.kind, TokenType::Normal | TokenType::UserDefined);
    let ids: HashMap<&str, u32> =
        tokens.iter().filter(merging).map(|token| (token.text, token.id)).collect();
    let mut merges = Vec::new();
    for token in tokens.iter().filter(merging) {
        let mut of_token = Vec::new();
        for (at, _) in token.text.char_indices().skip(1) {
            let (left, right) = token.text.split_at(at);
            if let (Some(a), Some(b)) = (ids.get(left), ids.get(right)) {
                let chars = (left.chars().count(), right.chars().count());
                of_token.push((
                    (*a, *b),
                    Merge { score: scores[token.id as usize], chars, left, right },
                ));
            }
        }
        of_token.sort_by_key(|(ids, _)| *ids);
        merges.extend(of_token.into_iter().map(|(_, merge)| merge));
    }
    merges.sort_by(|a, b| {
        b.score.partial_cmp(&a.score).unwrap_or(Ordering::Equal).then(b.chars.cmp(&a.chars))
    });
    merges.into_iter().map(|merge| (merge.left.to_owned(), merge.right.to_owned())).collect()
}
