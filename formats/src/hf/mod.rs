//! A model directory as Hugging Face lays it out.

mod config;

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

pub use config::{HfConfig, RopeParameters, TokenIds};

use crate::{FormatError, io};

const JSON_BYTES_MAX: u64 = 64 << 20;
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;

/// A special token: its text, or an object that has it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum SpecialToken {
    /// The text itself.
    Text(String),
    /// An `AddedToken` object.
    Added {
        /// The token's text.
        content: String,
    },
}

impl SpecialToken {
    /// The token's text.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Added { content: text } => text,
        }
    }
}

/// A chat template: its text, or several with names.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum ChatTemplates {
    /// The only template.
    One(String),
    /// Named templates; the one called "default" is meant.
    Named(Vec<NamedTemplate>),
}

/// One of several chat templates.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct NamedTemplate {
    /// "default", "tool_use", …
    pub name: String,
    /// Its Jinja text.
    pub template: String,
}

/// `tokenizer_config.json`, as far as it matters to serving.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct TokenizerConfig {
    /// Beginning of text.
    pub bos_token: Option<SpecialToken>,
    /// End of text or turn.
    pub eos_token: Option<SpecialToken>,
    /// Unknown text.
    pub unk_token: Option<SpecialToken>,
    /// Padding.
    pub pad_token: Option<SpecialToken>,
    /// Whether a prompt begins with BOS; what absence means is the reader's matter.
    pub add_bos_token: Option<bool>,
    /// The chat template, if it is not in `chat_template.jinja`.
    pub chat_template: Option<ChatTemplates>,
}

/// `generation_config.json`, as far as it matters to serving.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct GenerationConfig {
    /// Beginning of text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end an answer.
    pub eos_token_id: Option<TokenIds>,
}

/// A Hugging Face model directory.
#[derive(Clone, Debug)]
pub struct HfDir {
    dir: PathBuf,
}

impl HfDir {
    /// The directory at `path`.
    ///
    /// # Errors
    /// There is no directory, or it has no `config.json`.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        if !path.is_dir() {
            return Err(FormatError::invalid(path, "model directory", "a directory", "none"));
        }
        let dir = Self { dir: path.to_owned() };
        if !dir.file("config.json").exists() {
            return Err(FormatError::invalid(path, "config.json", "a file", "none"));
        }
        Ok(dir)
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn bytes(&self, name: &str, bytes_max: u64) -> Result<Option<Vec<u8>>, FormatError> {
        let path = self.file(name);
        if !path.exists() {
            return Ok(None);
        }
        io::read_small(&path, bytes_max).map(Some)
    }

    fn text(&self, name: &str) -> Result<Option<String>, FormatError> {
        let Some(bytes) = self.bytes(name, JSON_BYTES_MAX)? else { return Ok(None) };
        String::from_utf8(bytes).map(Some).map_err(|e| {
            FormatError::invalid(self.file(name), "text", "UTF-8", e.utf8_error().to_string())
        })
    }

    fn json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, FormatError> {
        let Some(bytes) = self.bytes(name, JSON_BYTES_MAX)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|e| {
            FormatError::invalid(self.file(name), "JSON", format!("a valid {name}"), e.to_string())
        })
    }

    /// `config.json`.
    ///
    /// # Errors
    /// It cannot be read or is malformed.
    pub fn config(&self) -> Result<HfConfig, FormatError> {
        self.json("config.json")?
            .ok_or_else(|| FormatError::invalid(&self.dir, "config.json", "a file", "none"))
    }

    /// The bytes of `tokenizer.json`.
    ///
    /// # Errors
    /// It is not there or cannot be read.
    pub fn tokenizer_json(&self) -> Result<Vec<u8>, FormatError> {
        self.bytes("tokenizer.json", TOKENIZER_BYTES_MAX)?
            .ok_or_else(|| FormatError::invalid(&self.dir, "tokenizer.json", "a file", "none"))
    }

    /// `tokenizer_config.json`; the default when there is none.
    ///
    /// # Errors
    /// It cannot be read or is malformed.
    pub fn tokenizer_config(&self) -> Result<TokenizerConfig, FormatError> {
        Ok(self.json("tokenizer_config.json")?.unwrap_or_default())
    }

    /// `generation_config.json`; the default when there is none.
    ///
    /// # Errors
    /// It cannot be read or is malformed.
    pub fn generation_config(&self) -> Result<GenerationConfig, FormatError> {
        Ok(self.json("generation_config.json")?.unwrap_or_default())
    }

    /// The chat template: `chat_template.jinja`, else the one in `tokenizer_config.json` (of several
    /// the one named "default").
    ///
    /// # Errors
    /// A file cannot be read or is malformed.
    pub fn chat_template(&self) -> Result<Option<String>, FormatError> {
        if let Some(text) = self.text("chat_template.jinja")? {
            return Ok(Some(text));
        }
        Ok(match self.tokenizer_config()?.chat_template {
            None => None,
            Some(ChatTemplates::One(text)) => Some(text),
            Some(ChatTemplates::Named(all)) => {
                all.into_iter().find(|t| t.name == "default").map(|t| t.template)
            }
        })
    }

    /// Tokens that end an answer: of `generation_config.json`, else of `config.json`.
    ///
    /// # Errors
    /// A file cannot be read or is malformed.
    pub fn eos_token_ids(&self) -> Result<Vec<u32>, FormatError> {
        let ids = match self.generation_config()?.eos_token_id {
            Some(ids) => Some(ids),
            None => self.config()?.eos_token_id,
        };
        Ok(ids.map(|ids| ids.to_vec()).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn eos_may_be_one_or_many() {
        let one = dir(&[("config.json", r#"{"eos_token_id": 2}"#)]);
        assert_eq!(HfDir::open(one.path()).unwrap().eos_token_ids().unwrap(), [2]);
        let many = dir(&[
            ("config.json", r#"{"eos_token_id": 2}"#),
            ("generation_config.json", r#"{"eos_token_id": [7, 9]}"#),
        ]);
        assert_eq!(HfDir::open(many.path()).unwrap().eos_token_ids().unwrap(), [7, 9]);
    }

    #[test]
    fn the_template_file_goes_before_the_config() {
        let config = r#"{"chat_template": [{"name": "tool_use", "template": "t"},
                         {"name": "default", "template": "d"}]}"#;
        let both = dir(&[
            ("config.json", "{}"),
            ("tokenizer_config.json", config),
            ("chat_template.jinja", "file"),
        ]);
        assert_eq!(HfDir::open(both.path()).unwrap().chat_template().unwrap().unwrap(), "file");
        let named = dir(&[("config.json", "{}"), ("tokenizer_config.json", config)]);
        assert_eq!(HfDir::open(named.path()).unwrap().chat_template().unwrap().unwrap(), "d");
    }

    #[test]
    fn special_tokens_may_be_objects() {
        let dir = dir(&[
            ("config.json", "{}"),
            ("tokenizer_config.json", r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}"#),
        ]);
        let config = HfDir::open(dir.path()).unwrap().tokenizer_config().unwrap();
        assert_eq!(config.bos_token.unwrap().text(), "<s>");
        assert_eq!(config.eos_token.unwrap().text(), "</s>");
    }

    #[test]
    fn rope_of_both_generations() {
        let dir = dir(&[(
            "config.json",
            r#"{"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0},
                "torch_dtype": "bfloat16", "dtype": "bfloat16",
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}"#,
        )]);
        let config = HfDir::open(dir.path()).unwrap().config().unwrap();
        assert_eq!(config.rope_scaling.unwrap().kind(), "linear");
        assert_eq!(config.rope_parameters.unwrap().rope_theta, Some(5e5));
        assert_eq!(config.dtype.as_deref(), Some("bfloat16"));
    }

    #[test]
    fn a_broken_config_names_file_and_reason() {
        let broken = dir(&[("config.json", r#"{"hidden_size": "many"}"#)]);
        let error = HfDir::open(broken.path()).unwrap().config().unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("many"), "{error}");
        let empty = dir(&[]);
        let error = HfDir::open(empty.path()).unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
        let no_tokenizer = dir(&[("config.json", "{}")]);
        let error = HfDir::open(no_tokenizer.path()).unwrap().tokenizer_json().unwrap_err();
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    }
}
