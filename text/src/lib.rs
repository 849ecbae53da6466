//! Text for Headstart: tokenizers, chat templates, prompts, and text that arrives in pieces.
//!
//! Everything between characters and token ids lives here, for the two tokenizers of a pair:
//!
//! - [`Tokenizer`]: from `tokenizer.json` or from a GGUF file's metadata, token for token what the
//!   model was trained with; its [`Fingerprint`] says whether two models share one.
//! - [`ModelText`]: tokenizer, chat template, BOS rule and stop tokens of one model, as one value that
//!   travels between nodes.
//! - [`DraftEncoder`]: re-encodes a draft with the base's tokenizer while it is still being written,
//!   and gives out only tokens that no further text can change.
//! - [`Detokenizer`]: ids to text, incrementally, never splitting a character.
//! - [`StopMatcher`]: stop strings in a stream.
//!
//! No clock but for `strftime_now`, no network, no model.

mod added;
mod bpe;
mod detokenizer;
mod draft;
mod error;
mod fingerprint;
mod from_gguf;
mod model_text;
mod pipeline;
mod prompt;
mod spec;
mod stop;
mod stream;
mod template;
mod tokenizer;
mod vocab;

pub use detokenizer::Detokenizer;
pub use draft::{DraftEncoder, encode_draft};
pub use error::TextError;
pub use fingerprint::Fingerprint;
pub use model_text::{BUNDLE_BYTES_MAX, BasePrompt, ModelText, Special};
pub use prompt::{Message, Prompt, Role, plain_prompt};
pub use stop::{StopMatcher, StopStep};
pub use template::{ChatTemplate, TemplateTokens};
pub use tokenizer::{Streaming, Tokenizer};
