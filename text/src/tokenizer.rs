//! A model's tokenizer.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use headstart_formats::gguf;

use crate::added::AddedTokens;
use crate::bpe::Merges;
use crate::pipeline::{Pipeline, Split};
use crate::spec::{DecoderKind, Spec};
use crate::stream::{Encoder, Start, Stream};
use crate::vocab::Vocab;
use crate::{Fingerprint, TextError, from_gguf};

/// Texts on which the streaming steps must agree with the tokenizer before they are trusted.
const PROBES: [&str; 6] = [
    "Hello there,  world! I'll say it's 12345 o'clock.\n\n  Yes?\tNo.",
    "def f(x):\n    return x[::-1]  # ok\r\n\r\n\u{a0}\u{3000}end",
    " a ▁b▁ ▁▁c  d   e",
    "naïve e\u{301}a\u{323}\u{307} \u{1100}\u{1161}\u{11a8} 가 한국어 Å\u{212b}",
    "中文，没有空格的文本。日本語のテキスト、ですね！",
    "👩\u{200d}💻👍🏽 ＜<|im_start|><s></s>[INST] 😀😀😀",
];

/// Whether a draft can be re-encoded while it is being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streaming {
    /// Token by token.
    Incremental,
    /// Only once it is complete: the tokenizer has steps whose effect of later text is not known here.
    AtEnd,
}

/// A tokenizer. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    whole: tokenizers::Tokenizer,
    json: String,
    fingerprint: Fingerprint,
    vocab: Arc<Vocab>,
    encoder: Option<Arc<Encoder>>,
    strips_first_space: bool,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("fingerprint", &self.inner.fingerprint)
            .field("vocab_size", &self.vocab_size())
            .field("streaming", &self.streaming())
            .finish()
    }
}

impl Tokenizer {
    /// From the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// It is malformed, or of a kind that is not supported.
    pub fn from_json(bytes: &[u8]) -> Result<Self, TextError> {
        Self::from_spec(&Spec::from_json(bytes)?)
    }

    /// From the metadata of a GGUF file.
    ///
    /// # Errors
    /// The metadata is malformed, or describes a tokenizer of a kind that is not supported.
    pub fn from_gguf(metadata: &gguf::Metadata) -> Result<Self, TextError> {
        Self::from_spec(&from_gguf::spec(metadata)?)
    }

    pub(crate) fn from_spec(spec: &Spec) -> Result<Self, TextError> {
        let json = spec.to_value().to_string();
        let whole = load_whole(&json)?;
        let vocab = Arc::new(Vocab::new(spec));
        let encoder = new_encoder(spec, &vocab)?;
        let encoder =
            encoder.filter(|encoder| PROBES.iter().all(|text| agrees(&whole, encoder, text)));
        let strips_first_space = spec.decoder == DecoderKind::Metaspace { strip_first_space: true };
        let fingerprint = Fingerprint::of(json.as_bytes());
        let inner = Inner { whole, json, fingerprint, vocab, encoder, strips_first_space };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The canonical `tokenizer.json`: equal for equal tokenizers, wherever they were read from.
    #[must_use]
    pub fn to_json(&self) -> &str {
        &self.inner.json
    }

    /// SHA-256 of the canonical `tokenizer.json`.
    #[must_use]
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.inner.fingerprint
    }

    /// Whether [`crate::DraftEncoder`] gives out tokens before the draft is complete.
    #[must_use]
    pub fn streaming(&self) -> Streaming {
        if self.inner.encoder.is_some() { Streaming::Incremental } else { Streaming::AtEnd }
    }

    /// The tokens of a text. Never adds BOS or EOS; special tokens written in the text are found.
    ///
    /// # Errors
    /// The tokenizer has no token for some of the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        encode_whole(&self.inner.whole, text)
    }

    /// The text of tokens, without special tokens; bytes that are no UTF-8 become U+FFFD.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend_from_slice(self.text_bytes(id));
        }
        let skip = usize::from(self.inner.strips_first_space && bytes.first() == Some(&b' '));
        String::from_utf8_lossy(&bytes[skip..]).into_owned()
    }

    /// The bytes that a token stands for; a special token's are its name. Empty for an unknown id.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.inner.vocab.bytes(id).to_vec()
    }

    /// Whether decoding leaves the token out.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.vocab.is_special(id)
    }

    /// The id of a token, by its name in the vocabulary.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.whole.token_to_id(token)
    }

    /// One more than the highest id. A model may have more (padding), never fewer.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.inner.vocab.len()
    }

    /// What a token adds to the text: nothing for a special one.
    pub(crate) fn text_bytes(&self, id: u32) -> &[u8] {
        if self.inner.vocab.is_special(id) { &[] } else { self.inner.vocab.bytes(id) }
    }

    pub(crate) fn strips_first_space(&self) -> bool {
        self.inner.strips_first_space
    }

    pub(crate) fn encoder(&self) -> Option<&Arc<Encoder>> {
        self.inner.encoder.as_ref()
    }
}

/// The `tokenizers` crate's tokenizer. The description has been checked, but a panic in there must not
/// become ours.
fn load_whole(json: &str) -> Result<tokenizers::Tokenizer, TextError> {
    let loaded =
        catch_unwind(AssertUnwindSafe(|| tokenizers::Tokenizer::from_bytes(json.as_bytes())));
    match loaded {
        Ok(Ok(whole)) => Ok(whole),
        Ok(Err(e)) => Err(TextError::tokenizer("tokenizer.json", "a tokenizer", e.to_string())),
        Err(_) => {
            Err(TextError::tokenizer("tokenizer.json", "a tokenizer", "one that cannot be built"))
        }
    }
}

fn encode_whole(whole: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>, TextError> {
    let encoding = whole.encode_fast(text, false).map_err(|e| TextError::Encode(e.to_string()))?;
    Ok(encoding.get_ids().to_vec())
}

fn new_encoder(spec: &Spec, vocab: &Arc<Vocab>) -> Result<Option<Arc<Encoder>>, TextError> {
    let (Some(pipeline), Some(merges)) = (Pipeline::new(spec)?, Merges::new(spec)?) else {
        return Ok(None);
    };
    // A pattern's pieces are merged from bytes, `▁` text from characters.
    if matches!(pipeline.split, Split::Pattern { .. }) == merges.by_char() {
        return Ok(None);
    }
    Ok(Some(Arc::new(Encoder {
        added: AddedTokens::new(&spec.added),
        vocab: vocab.clone(),
        ignore_merges: spec.ignore_merges,
        pipeline,
        merges,
    })))
}

fn agrees(whole: &tokenizers::Tokenizer, encoder: &Arc<Encoder>, text: &str) -> bool {
    let mut stream = Stream::new(encoder, Start::Text);
    let mut ids = Vec::new();
    for c in text.chars() {
        if stream.push(c.encode_utf8(&mut [0; 4]), &mut ids).is_err() {
            return false;
        }
    }
    let closed = stream.close(&mut ids).is_ok();
    let expected = encode_whole(whole, text);
    closed
        && expected.is_ok_and(|expected| {
            if stream.unclear() { expected.starts_with(&ids) } else { expected == ids }
        })
}
