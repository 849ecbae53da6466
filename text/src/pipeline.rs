//! What a tokenizer does to text before it merges, as far as that is understood well enough to do it to
//! text that is still growing.

use serde_json::{Value, json};
use tokenizers::utils::SysRegex;

use crate::TextError;
use crate::spec::{Spec, flatten};

/// GPT-2's pattern, built into the `tokenizers` crate's byte-level pre-tokenizer.
pub(crate) const GPT2_PATTERN: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Qwen2's pattern (Qwen2, 2.5 and 3: `tokenizer.json`).
pub(crate) const QWEN2_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Llama 3's pattern (`llama3/tokenizer.py`, `pat_str`).
pub(crate) const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Two characters of one class: in the middle of a run of that class, a pattern that starts here goes
/// on as if it had started at the run's beginning.
const SAME_RUN: &str = r"^(?:\p{L}{2}|[^\s\p{L}\p{N}]{2})";

/// When `▁` is put before the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prepend {
    Never,
    /// Before every stretch of text.
    Always,
    /// Before every stretch that does not begin with one already.
    Unless,
    /// The same, at the very start only.
    UnlessFirst,
}

/// How the text is cut before merging.
pub(crate) enum Split {
    /// By a pattern; digits may be set apart before that.
    Pattern { regex: SysRegex, digits_apart: bool },
    /// Not at all.
    Whole,
    /// Before each `▁`.
    Metaspace,
}

/// A tokenizer's steps before merging.
pub(crate) struct Pipeline {
    pub(crate) nfc: bool,
    /// Spaces become `▁`.
    pub(crate) metaspace: bool,
    pub(crate) prepend: Prepend,
    pub(crate) split: Split,
    pub(crate) same_run: SysRegex,
}

impl Pipeline {
    /// The steps; none when one of them is not known here.
    pub(crate) fn new(spec: &Spec) -> Result<Option<Self>, TextError> {
        let mut normalizers = Vec::new();
        flatten(&spec.normalizer, &mut normalizers);
        let mut pre_tokenizers = Vec::new();
        flatten(&spec.pre_tokenizer, &mut pre_tokenizers);

        let mut pipeline = Self {
            nfc: false,
            metaspace: false,
            prepend: Prepend::Never,
            split: Split::Whole,
            same_run: regex(SAME_RUN)?,
        };
        for step in &normalizers {
            if !pipeline.add_normalizer(step) {
                return Ok(None);
            }
        }
        let split = match pre_tokenizers.as_slice() {
            [] => pipeline.metaspace.then_some(Split::Whole),
            [only] if is_type(only, "Metaspace") => pipeline.add_metaspace(only),
            // Spaces are `▁` by now, so it cuts nothing.
            [only] if is_type(only, "Split") && only["pattern"] == json!({"String": " "}) => {
                pipeline.metaspace.then_some(Split::Whole)
            }
            steps if !pipeline.metaspace => pattern_split(steps)?,
            _ => None,
        };
        let odd = pipeline.nfc && pipeline.metaspace || odd_added_tokens(spec, &pipeline);
        Ok(split.filter(|_| !odd).map(|split| Self { split, ..pipeline }))
    }

    fn add_normalizer(&mut self, step: &Value) -> bool {
        if is_type(step, "NFC") {
            self.nfc = true;
        } else if is_type(step, "Prepend") && step["prepend"] == "▁" && !self.metaspace {
            self.prepend = Prepend::Always;
        } else if is_type(step, "Replace")
            && step["pattern"] == json!({"String": " "})
            && step["content"] == "▁"
        {
            self.metaspace = true;
        } else {
            return false;
        }
        true
    }

    fn add_metaspace(&mut self, step: &Value) -> Option<Split> {
        if self.metaspace || self.prepend != Prepend::Never || step["replacement"] != "▁" {
            return None;
        }
        self.metaspace = true;
        let scheme = step.get("prepend_scheme").and_then(Value::as_str).unwrap_or("always");
        self.prepend = match scheme {
            _ if step.get("add_prefix_space") == Some(&json!(false)) => Prepend::Never,
            "always" => Prepend::Unless,
            "first" => Prepend::UnlessFirst,
            "never" => Prepend::Never,
            _ => return None,
        };
        let split = step.get("split").and_then(Value::as_bool).unwrap_or(true);
        Some(if split { Split::Metaspace } else { Split::Whole })
    }
}

fn regex(pattern: &str) -> Result<SysRegex, TextError> {
    SysRegex::new(pattern)
        .map_err(|e| TextError::tokenizer("pre_tokenizer", "a pattern", e.to_string()))
}

fn is_type(step: &Value, name: &str) -> bool {
    step.get("type").and_then(Value::as_str) == Some(name)
}

/// Byte-level pre-tokenizers with a pattern for which [`crate::stream`] has the proof of what later
/// text can change.
fn pattern_split(steps: &[Value]) -> Result<Option<Split>, TextError> {
    let byte_level = |step: &Value, use_regex: bool| {
        is_type(step, "ByteLevel")
            && step["add_prefix_space"] == false
            && step["use_regex"] == use_regex
    };
    Ok(match steps {
        [only] if byte_level(only, true) => {
            Some(Split::Pattern { regex: regex(GPT2_PATTERN)?, digits_apart: false })
        }
        [digits, last] if is_type(digits, "Digits") && byte_level(last, true) => {
            let apart = digits["individual_digits"] == true;
            let regex = regex(GPT2_PATTERN)?;
            apart.then_some(Split::Pattern { regex, digits_apart: true })
        }
        [split, last] if is_type(split, "Split") && byte_level(last, false) => {
            let pattern = split["pattern"]["Regex"].as_str().unwrap_or("");
            let known = [QWEN2_PATTERN, LLAMA3_PATTERN].contains(&pattern)
                && split["behavior"] == "Isolated"
                && split["invert"] == false;
            let regex = regex(pattern)?;
            known.then_some(Split::Pattern { regex, digits_apart: false })
        }
        _ => None,
    })
}

/// Tokens that are found in normalised text, of which the given text does not show the place.
fn odd_added_tokens(spec: &Spec, pipeline: &Pipeline) -> bool {
    // NFC may even make ASCII of what was not (U+212A, the Kelvin sign, becomes K).
    let odd = |content: &str| pipeline.nfc || !content.is_ascii() || content.contains(' ');
    let normalises = pipeline.nfc || pipeline.metaspace;
    normalises && spec.added.iter().any(|token| token.normalized && odd(&token.content))
}
