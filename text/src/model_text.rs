//! Everything textual about one model.

use std::path::Path;

use headstart_formats::gguf::{Gguf, Metadata};
use headstart_formats::hf::{HfDir, SpecialToken};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::prompt::PLAIN_STOPS;
use crate::template::TemplateTokens;
use crate::{ChatTemplate, Fingerprint, Message, Prompt, TextError, Tokenizer, plain_prompt};

/// The largest bundle that is read.
pub const BUNDLE_BYTES_MAX: usize = 128 << 20;
const BUNDLE_VERSION: u64 = 1;
const STOP_TOKENS_MAX: usize = 256;

/// Tokens that end a turn in the families' chat templates, whatever a model's files say.
const TURN_ENDS: [&str; 3] = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>"];

/// A special token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Special {
    /// Its id.
    pub id: u32,
    /// Its name.
    pub text: String,
}

/// Which prompt a model reads as a base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BasePrompt {
    /// The plain transcript.
    #[default]
    Plain,
    /// The model's own chat template.
    Chat,
}

/// A model's tokenizer, chat template, BOS rule and stop tokens. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ModelText {
    tokenizer: Tokenizer,
    chat_template: Option<ChatTemplate>,
    bos: Option<Special>,
    add_bos: bool,
    stop_tokens: Vec<u32>,
    base_prompt: BasePrompt,
}

/// A bundle but for the tokenizer.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BundleParts {
    chat_template: Option<String>,
    template_tokens: TemplateTokens,
    bos: Option<Special>,
    add_bos: bool,
    stop_tokens: Vec<u32>,
    base_prompt: BasePrompt,
}

impl ModelText {
    /// Of a model at a path: a `.gguf` file, or a Hugging Face directory.
    ///
    /// # Errors
    /// The model's files are missing, malformed or of a kind that is not supported.
    pub fn load(path: &Path) -> Result<Self, TextError> {
        if path.is_dir() { Self::from_hf_dir(path) } else { Self::from_gguf(&Gguf::open(path)?) }
    }

    /// Of a GGUF file.
    ///
    /// # Errors
    /// Its metadata is malformed or of a kind that is not supported.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, TextError> {
        Self::from_metadata(gguf.metadata())
    }

    /// Of a GGUF file's metadata. BOS is put before the base's prompt iff there is a `bos_token_id` and
    /// `add_bos_token` is not false.
    ///
    /// # Errors
    /// It is malformed or of a kind that is not supported.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, TextError> {
        let tokenizer = Tokenizer::from_gguf(metadata)?;
        let token = |name: &str| -> Result<Option<Special>, TextError> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            metadata.get_u32(&key)?.map(|id| special(&tokenizer, &key, id)).transpose()
        };
        let bos = token("bos")?;
        let (eos, eot) = (token("eos")?, token("eot")?);
        let add_bos = metadata.get_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(true);
        let text = |token: &Option<Special>| token.as_ref().map(|token| token.text.clone());
        let tokens = TemplateTokens {
            bos_token: text(&bos),
            eos_token: text(&eos),
            unk_token: text(&token("unknown")?),
            pad_token: text(&token("padding")?),
        };
        let source = metadata.get_str("tokenizer.chat_template")?;
        let chat_template = source.map(|source| ChatTemplate::new(source, tokens)).transpose()?;
        let ends: Vec<u32> = eos.iter().chain(&eot).map(|token| token.id).collect();
        Ok(Self {
            stop_tokens: stop_tokens(&tokenizer, &ends),
            add_bos: add_bos && bos.is_some(),
            base_prompt: BasePrompt::Plain,
            tokenizer,
            chat_template,
            bos,
        })
    }

    /// Of a Hugging Face directory. BOS is put before the base's prompt iff `bos_token` is set and
    /// `add_bos_token` is not false.
    ///
    /// # Errors
    /// A file is missing, malformed or of a kind that is not supported.
    pub fn from_hf_dir(path: &Path) -> Result<Self, TextError> {
        let dir = HfDir::open(path)?;
        let tokenizer = Tokenizer::from_json(&dir.tokenizer_json()?)?;
        let config = dir.tokenizer_config()?;
        let text = |token: &Option<SpecialToken>| token.as_ref().map(|t| t.text().to_owned());
        let named = |field: &str, text: Option<String>| -> Result<Option<Special>, TextError> {
            let Some(text) = text else { return Ok(None) };
            let id = tokenizer.token_id(&text).ok_or_else(|| {
                let field = format!("tokenizer_config.json: {field}");
                TextError::tokenizer(field, "a token of the vocabulary", format!("{text:?}"))
            })?;
            Ok(Some(Special { id, text }))
        };
        let bos = named("bos_token", text(&config.bos_token))?;
        let eos = named("eos_token", text(&config.eos_token))?;
        let mut ends = dir.eos_token_ids()?;
        ends.extend(eos.iter().map(|token| token.id));
        let tokens = TemplateTokens {
            bos_token: text(&config.bos_token),
            eos_token: text(&config.eos_token),
            unk_token: text(&config.unk_token),
            pad_token: text(&config.pad_token),
        };
        let source = dir.chat_template()?;
        let chat_template = source.map(|source| ChatTemplate::new(&source, tokens)).transpose()?;
        Ok(Self {
            stop_tokens: stop_tokens(&tokenizer, &ends),
            add_bos: bos.is_some() && config.add_bos_token != Some(false),
            base_prompt: BasePrompt::Plain,
            tokenizer,
            chat_template,
            bos,
        })
    }

    /// The same model, read as a base with another prompt.
    ///
    /// # Errors
    /// The chat template is asked for and there is none.
    pub fn with_base_prompt(mut self, base_prompt: BasePrompt) -> Result<Self, TextError> {
        if base_prompt == BasePrompt::Chat && self.chat_template.is_none() {
            return Err(TextError::Template(
                "the model has none, so it cannot be the base's prompt".into(),
            ));
        }
        self.base_prompt = base_prompt;
        Ok(self)
    }

    /// The model's tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Its chat template.
    #[must_use]
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Its BOS token, whether a prompt begins with it or not.
    #[must_use]
    pub fn bos(&self) -> Option<&Special> {
        self.bos.as_ref()
    }

    /// Whether the plain prompt begins with BOS.
    #[must_use]
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// The tokens that end an answer, by id.
    #[must_use]
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// Which prompt it reads as a base.
    #[must_use]
    pub fn base_prompt_kind(&self) -> BasePrompt {
        self.base_prompt
    }

    /// The prompt that a drafter answers: its chat template's, or the plain one if it has none.
    ///
    /// # Errors
    /// The template refuses the messages or fails.
    pub fn drafter_prompt(&self, messages: &[Message]) -> Result<Prompt, TextError> {
        match &self.chat_template {
            Some(template) => self.chat_prompt(template, messages),
            None => self.plain(messages),
        }
    }

    /// The prompt that a base continues.
    ///
    /// # Errors
    /// The template refuses the messages or fails.
    pub fn base_prompt(&self, messages: &[Message]) -> Result<Prompt, TextError> {
        match (&self.chat_template, self.base_prompt) {
            (Some(template), BasePrompt::Chat) => self.chat_prompt(template, messages),
            _ => self.plain(messages),
        }
    }

    /// The stop strings that go with the base's prompt.
    #[must_use]
    pub fn base_stop_strings(&self) -> &'static [&'static str] {
        match self.base_prompt {
            BasePrompt::Plain => &PLAIN_STOPS,
            BasePrompt::Chat => &[],
        }
    }

    /// A chat template writes BOS itself where the model wants one.
    fn chat_prompt(
        &self,
        template: &ChatTemplate,
        messages: &[Message],
    ) -> Result<Prompt, TextError> {
        let text = template.render(messages)?;
        let ids = self.tokenizer.encode(&text)?;
        Ok(Prompt { text, ids })
    }

    fn plain(&self, messages: &[Message]) -> Result<Prompt, TextError> {
        let text = plain_prompt(messages);
        let mut ids = self.tokenizer.encode(&text)?;
        if let Some(bos) = self.bos.as_ref().filter(|_| self.add_bos) {
            ids.insert(0, bos.id);
        }
        Ok(Prompt { text, ids })
    }

    /// The whole as JSON, for another node.
    #[must_use]
    pub fn to_bundle(&self) -> Vec<u8> {
        let template = self.chat_template.as_ref();
        let parts = BundleParts {
            chat_template: template.map(|template| template.source().to_owned()),
            template_tokens: template.map(|template| template.tokens().clone()).unwrap_or_default(),
            bos: self.bos.clone(),
            add_bos: self.add_bos,
            stop_tokens: self.stop_tokens.clone(),
            base_prompt: self.base_prompt,
        };
        let parts = json!(parts);
        let tokenizer = self.tokenizer.to_json();
        format!(r#"{{"version":{BUNDLE_VERSION},"text":{parts},"tokenizer":{tokenizer}}}"#)
            .into_bytes()
    }

    /// Reads what [`ModelText::to_bundle`] wrote, on another node.
    ///
    /// # Errors
    /// It is too long, or malformed in any way.
    pub fn from_bundle(bundle: &[u8]) -> Result<Self, TextError> {
        if bundle.len() > BUNDLE_BYTES_MAX {
            let expected = format!("at most {BUNDLE_BYTES_MAX} bytes");
            return Err(TextError::bundle("bundle", expected, bundle.len().to_string()));
        }
        let mut root: Value = serde_json::from_slice(bundle)
            .map_err(|e| TextError::bundle("bundle", "JSON", e.to_string()))?;
        if root["version"] != BUNDLE_VERSION {
            let found = root["version"].to_string();
            return Err(TextError::bundle("version", BUNDLE_VERSION.to_string(), found));
        }
        let parts: BundleParts = serde_json::from_value(root["text"].take())
            .map_err(|e| TextError::bundle("text", "the model's text settings", e.to_string()))?;
        let tokenizer =
            Tokenizer::from_spec(&crate::spec::Spec::from_value(root["tokenizer"].take())?)?;
        Self::from_parts(parts, tokenizer)
    }

    fn from_parts(parts: BundleParts, tokenizer: Tokenizer) -> Result<Self, TextError> {
        if let Some(bos) = &parts.bos
            && tokenizer.token_id(&bos.text) != Some(bos.id)
        {
            let found = format!("{} {:?}", bos.id, bos.text);
            return Err(TextError::bundle("text.bos", "a token of the vocabulary", found));
        }
        if parts.add_bos && parts.bos.is_none() {
            return Err(TextError::bundle("text.add_bos", "false without a BOS", "true"));
        }
        if parts.stop_tokens.len() > STOP_TOKENS_MAX {
            let expected = format!("at most {STOP_TOKENS_MAX} tokens");
            return Err(TextError::bundle(
                "text.stop_tokens",
                expected,
                parts.stop_tokens.len().to_string(),
            ));
        }
        let tokens = parts.template_tokens;
        let template = parts.chat_template;
        let chat_template =
            template.map(|source| ChatTemplate::new(&source, tokens)).transpose()?;
        let text = Self {
            bos: parts.bos,
            add_bos: parts.add_bos,
            stop_tokens: parts.stop_tokens,
            base_prompt: BasePrompt::Plain,
            tokenizer,
            chat_template,
        };
        text.with_base_prompt(parts.base_prompt)
    }

    /// SHA-256 of the bundle: equal for models whose prompts and tokens are equal.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.to_bundle())
    }
}

fn special(tokenizer: &Tokenizer, field: &str, id: u32) -> Result<Special, TextError> {
    let bytes = tokenizer.token_bytes(id);
    let text = String::from_utf8(bytes).unwrap_or_default();
    if text.is_empty() {
        return Err(TextError::tokenizer(field, "a token of the vocabulary", id.to_string()));
    }
    Ok(Special { id, text })
}

fn stop_tokens(tokenizer: &Tokenizer, ends: &[u32]) -> Vec<u32> {
    let turn_ends = TURN_ENDS.iter().filter_map(|name| tokenizer.token_id(name));
    let mut tokens: Vec<u32> =
        turn_ends.filter(|&id| tokenizer.is_special(id)).chain(ends.iter().copied()).collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}
