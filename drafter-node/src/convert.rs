//! The edge between wire types and the node's own.

use std::sync::Arc;

use headstart_engine::{Finish, Known, Limits, Request, Sampling};
use headstart_node::convert::{prompt, sampling};
use headstart_proto::v1::{self, DraftEncoding, DraftEnd};
use headstart_proto::{Epoch, Error, RequestId};

/// The longest address of a base, in bytes.
const ADDRESS_BYTES_MAX: usize = 256;

/// A valid [`v1::DraftRequest`].
#[derive(Clone, Debug)]
pub struct Job {
    /// The request.
    pub id: RequestId,
    /// The attempt.
    pub epoch: Epoch,
    /// At least one id of the vocabulary.
    pub prompt: Vec<u32>,
    /// At least 1.
    pub draft_tokens_max: usize,
    /// Greedy unless asked otherwise.
    pub sampling: Sampling,
    /// `host:port` of the base that reads the draft.
    pub base_address: String,
    /// How the draft travels.
    pub encoding: DraftEncoding,
    /// The attempt that reads the draft.
    pub serve_epoch: Epoch,
    /// The draft's first tokens, which an earlier drafter wrote; at most `draft_tokens_max`.
    pub prefix: Vec<u32>,
    /// Another drafter could go on.
    pub movable: bool,
}

impl Job {
    /// Checks a request against the model's limits. A draft that the context has no room for is
    /// shortened to what it has.
    ///
    /// # Errors
    /// An error that names the field and what was expected.
    pub fn new(request: v1::DraftRequest, limits: Limits) -> Result<Self, Error> {
        let id = RequestId::new(&request.request_id)?;
        let epoch = Epoch::new(request.epoch)?;
        let encoding = match request.encoding() {
            DraftEncoding::Unspecified => {
                return Err(Error::invalid("encoding", "expected IDS or TEXT"));
            }
            known => known,
        };
        let prompt = prompt(request.prompt_ids, limits)?;
        let context = limits.context_length.min(limits.pages * limits.page_size);
        let room = context.saturating_sub(prompt.len());
        if room == 0 {
            let message = format!("expected fewer than {context} ids, found {}", prompt.len());
            return Err(Error::invalid("prompt_ids", message));
        }
        if request.draft_tokens_max == 0 {
            return Err(Error::invalid("draft_tokens_max", "expected at least 1"));
        }
        let address = &request.base_address;
        if address.len() > ADDRESS_BYTES_MAX || !address.contains(':') {
            return Err(Error::invalid("base_address", "expected host:port"));
        }
        let draft_tokens_max = (request.draft_tokens_max as usize).min(room);
        let mut prefix = request.prefix_ids;
        if let Some(id) = prefix.iter().find(|&&id| id as usize >= limits.vocab_size) {
            let message = format!("expected ids below {}, found {id}", limits.vocab_size);
            return Err(Error::invalid("prefix_ids", message));
        }
        prefix.truncate(draft_tokens_max);
        Ok(Self {
            id,
            epoch,
            prompt,
            draft_tokens_max,
            sampling: sampling(&request.sampling.unwrap_or_default(), 0.0)?,
            base_address: request.base_address,
            encoding,
            serve_epoch: Epoch::new(request.serve_epoch)?,
            prefix,
            movable: request.movable,
        })
    }

    /// Whether the prefix is as long as the draft may be.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.prefix.len() >= self.draft_tokens_max
    }

    /// What the engine is asked.
    #[must_use]
    pub fn engine_request(&self, stop_tokens: &Arc<[u32]>) -> Request {
        Request {
            prompt: self.prompt.clone(),
            max_tokens: self.draft_tokens_max,
            sampling: self.sampling.clone(),
            stop_tokens: Arc::clone(stop_tokens),
            top_logprobs: 0,
            draft: None,
            known: Known { answer: self.prefix.clone(), scores: Vec::new() },
        }
    }
}

/// How a draft that ended by itself is told.
#[must_use]
pub fn draft_end(finish: Finish) -> DraftEnd {
    match finish {
        Finish::Stop => DraftEnd::Eos,
        Finish::Length => DraftEnd::Length,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { vocab_size: 10, context_length: 8, page_size: 4, pages: 16 };

    fn request() -> v1::DraftRequest {
        v1::DraftRequest {
            request_id: "r".into(),
            epoch: 1,
            prompt_ids: vec![1, 2],
            draft_tokens_max: 48,
            base_address: "127.0.0.1:1".into(),
            encoding: DraftEncoding::Text.into(),
            serve_epoch: 1,
            ..Default::default()
        }
    }

    #[test]
    fn a_draft_fits_the_context() {
        assert_eq!(Job::new(request(), LIMITS).expect("valid").draft_tokens_max, 6);
    }

    #[test]
    fn bad_fields_are_named() {
        type Spoil = fn(&mut v1::DraftRequest);
        let cases: &[(&str, Spoil)] = &[
            ("request_id", |r| r.request_id = "no spaces".into()),
            ("epoch", |r| r.epoch = 0),
            ("prompt_ids", |r| r.prompt_ids.clear()),
            ("prompt_ids", |r| r.prompt_ids = vec![10]),
            ("prompt_ids", |r| r.prompt_ids = vec![1; 8]),
            ("draft_tokens_max", |r| r.draft_tokens_max = 0),
            ("base_address", |r| r.base_address = "nowhere".into()),
            ("encoding", |r| r.encoding = 0),
            ("epoch", |r| r.serve_epoch = 0),
            ("prefix_ids", |r| r.prefix_ids = vec![10]),
            ("sampling.temperature", |r| {
                r.sampling.get_or_insert_default().temperature = Some(f32::INFINITY);
            }),
        ];
        for (field, spoil) in cases {
            let mut request = request();
            spoil(&mut request);
            let error = Job::new(request, LIMITS).expect_err(field);
            assert_eq!(error.field.as_deref(), Some(*field));
        }
    }
}
