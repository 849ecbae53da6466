//! The one error of this crate.

use headstart_formats::FormatError;

/// Text that cannot be handled: a tokenizer, a template, a bundle or a prompt.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A model file could not be read.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A tokenizer's description is malformed.
    #[error("tokenizer: {field}: expected {expected}, found {found}")]
    Tokenizer {
        /// The field of `tokenizer.json` or the metadata key.
        field: String,
        /// What a valid one has there.
        expected: String,
        /// What this one has there.
        found: String,
    },
    /// A tokenizer is well formed, but of a kind that is not supported.
    #[error("tokenizer: {field}: {found} is not supported (supported: {supported})")]
    Unsupported {
        /// The field of `tokenizer.json` or the metadata key.
        field: String,
        /// What is there.
        found: String,
        /// What could be there.
        supported: String,
    },
    /// The tokenizer refused a text.
    #[error("tokenizer: {0}")]
    Encode(String),
    /// The chat template cannot be used at all.
    #[error("chat template: {0}")]
    Template(String),
    /// The chat template refused these messages, in its own words.
    #[error("messages: the model's chat template refuses them: {0}")]
    Messages(String),
    /// The prompt's ids are not those of the prompt's text.
    #[error("prompt: its token ids do not end with the encoding of its text")]
    PromptMismatch,
    /// A bundle from another node is malformed.
    #[error("text bundle: {field}: expected {expected}, found {found}")]
    Bundle {
        /// The field.
        field: String,
        /// What a valid bundle has there.
        expected: String,
        /// What this one has there.
        found: String,
    },
}

impl TextError {
    /// A short name that does not change.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Format(_) => "format",
            Self::Tokenizer { .. } => "tokenizer",
            Self::Unsupported { .. } => "unsupported",
            Self::Encode(_) => "encode",
            Self::Template(_) => "template",
            Self::Messages(_) => "messages",
            Self::PromptMismatch => "prompt_mismatch",
            Self::Bundle { .. } => "bundle",
        }
    }

    /// Whether the request is at fault, not the model or the server.
    #[must_use]
    pub fn client_fault(&self) -> bool {
        matches!(self, Self::Messages(_))
    }

    pub(crate) fn tokenizer(
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Tokenizer { field: field.into(), expected: expected.into(), found: found.into() }
    }

    pub(crate) fn unsupported(
        field: impl Into<String>,
        found: impl Into<String>,
        supported: impl Into<String>,
    ) -> Self {
        Self::Unsupported { field: field.into(), found: found.into(), supported: supported.into() }
    }

    pub(crate) fn bundle(
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Bundle { field: field.into(), expected: expected.into(), found: found.into() }
    }
}
