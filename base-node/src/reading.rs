//! A draft under way: from what drafters say to the base's own tokens. Plain state, no IO.

use headstart_proto::v1::DraftEncoding;
use headstart_proto::{Error, ErrorCode};
use headstart_text::{DraftEncoder, Tokenizer};

use crate::convert::{DraftJob, Job};
use crate::rendezvous::{DraftInput, Handoff};

/// See the [module](self).
pub struct Reading {
    job: DraftJob,
    tokenizer: Tokenizer,
    /// Set for a draft that comes as text.
    encoder: Option<DraftEncoder>,
    /// The answer's tokens that were out before this attempt: the draft begins with them.
    known: Vec<u32>,
    /// Those of them that the draft has said again.
    said: usize,
    /// Draft tokens received, in the drafter's tokens.
    drafted: u32,
    /// Text at the draft's end that belongs to tokens received before. Another drafter would say it
    /// again, so it counts only with the end.
    tail: String,
    complete: bool,
}

impl Reading {
    /// Nothing is read of `draft` yet.
    ///
    /// # Errors
    /// A prompt that no draft can be joined to.
    pub fn new(job: &Job, draft: &DraftJob, tokenizer: &Tokenizer) -> Result<Self, Error> {
        let encoder = match draft.encoding {
            DraftEncoding::Text => Some(
                DraftEncoder::new(tokenizer, &job.prompt_text, &job.prompt)
                    .map_err(|error| Error::invalid("prompt_text", error.to_string()))?,
            ),
            _ => None,
        };
        Ok(Self {
            job: draft.clone(),
            tokenizer: tokenizer.clone(),
            encoder,
            known: job.begun.answer.clone(),
            said: 0,
            drafted: 0,
            tail: String::new(),
            complete: false,
        })
    }

    /// The draft has ended by itself: no drafter is needed any more.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Lets a drafter go on with the draft. Returns how many tokens of it are here, in the drafter's.
    ///
    /// # Errors
    /// [`ErrorCode::Mismatch`] for a drafter whose draft cannot be read.
    pub fn open(&mut self, handoff: &Handoff) -> Result<u32, Error> {
        let (own, encoding) = (self.tokenizer.fingerprint(), handoff.encoding);
        if encoding != self.job.encoding {
            let message =
                format!("expected a draft as {:?}, found {encoding:?}", self.job.encoding);
            return Err(Error::new(ErrorCode::Mismatch, message).with_field("encoding"));
        }
        let found = &handoff.tokenizer_fingerprint;
        if encoding == DraftEncoding::Ids && *found != own.to_string() {
            let message = format!("expected the base's own tokenizer {own}, found {found}");
            return Err(Error::new(ErrorCode::Mismatch, message).with_field("encoding"));
        }
        self.tail.clear();
        Ok(self.drafted)
    }

    /// Takes what a drafter says. Returns the draft's next tokens that are new here.
    ///
    /// # Errors
    /// [`ErrorCode::Protocol`]: not what was agreed on, or another draft than the one that is out.
    pub fn take(&mut self, input: DraftInput) -> Result<Vec<u32>, Error> {
        let ids = match input {
            DraftInput::Ids(ids) => {
                self.check(&ids)?;
                self.drafted =
                    self.drafted.saturating_add(u32::try_from(ids.len()).unwrap_or(u32::MAX));
                ids
            }
            DraftInput::Text { count: 0, text } => {
                self.tail.push_str(&text);
                return Ok(Vec::new());
            }
            DraftInput::Text { count, text } => {
                self.drafted = self.drafted.saturating_add(count);
                self.encode(&text)?
            }
            DraftInput::Ended => {
                self.complete = true;
                self.finish()?
            }
        };
        self.unsaid(ids)
    }

    /// Leaves out what is known already.
    fn unsaid(&mut self, mut ids: Vec<u32>) -> Result<Vec<u32>, Error> {
        let expected = &self.known[self.said..];
        let overlap = expected.len().min(ids.len());
        if ids[..overlap] != expected[..overlap] {
            let message = "expected the draft that is out already, found another one";
            return Err(Error::new(ErrorCode::Protocol, message));
        }
        self.said += overlap;
        if self.complete && self.said < self.known.len() {
            let (known, said) = (self.known.len(), self.said);
            let message = format!("expected a draft of at least {known} tokens, found {said}");
            return Err(Error::new(ErrorCode::Protocol, message));
        }
        Ok(ids.split_off(overlap))
    }

    fn check(&self, ids: &[u32]) -> Result<(), Error> {
        let vocab_size = self.job.vocab_size;
        if self.job.encoding != DraftEncoding::Ids {
            return Err(Error::new(ErrorCode::Protocol, "expected text, found token ids"));
        }
        match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(id) => {
                let message = format!("expected draft ids below {vocab_size}, found {id}");
                Err(Error::new(ErrorCode::Protocol, message))
            }
            None => Ok(()),
        }
    }

    fn encode(&mut self, text: &str) -> Result<Vec<u32>, Error> {
        let Some(encoder) = &mut self.encoder else {
            return Err(Error::new(ErrorCode::Protocol, "expected token ids, found text"));
        };
        encoder.push(text).map_err(|error| Error::internal(error.to_string()))
    }

    fn finish(&mut self) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::new();
        if !self.tail.is_empty() {
            let tail = std::mem::take(&mut self.tail);
            ids = self.encode(&tail)?;
        }
        if let Some(encoder) = &mut self.encoder {
            ids.extend(encoder.finish().map_err(|error| Error::internal(error.to_string()))?);
        }
        Ok(ids)
    }
}
