//! Server-sent events. Each is written straight into a buffer: the part that all of a request's
//! events share is rendered once, the rest is serialised from borrowed structs.

use headstart_proto::Error;
use serde::Serialize;

use super::request::{Delivery, Format};
use super::response::{ErrorBody, Extension, Id, Logprobs, Usage};
use crate::answer::Piece;
use crate::frames::{FinishReason, Source};
use crate::generate::Head;
use crate::outbox::{Event, Summary};

/// Writes one request's events.
#[derive(Debug)]
pub(crate) struct SseWriter {
    head: Head,
    delivery: Delivery,
    logprobs: bool,
    /// Everything of an event up to its choices.
    prefix: Vec<u8>,
    choices: Vec<ChoiceState>,
    completion_tokens: u32,
    first_summary: Option<Summary>,
    failed: bool,
}

/// What the writer remembers of one answer.
#[derive(Clone, Copy, Debug)]
struct ChoiceState {
    opened: bool,
    last: Source,
    /// Characters that its log-probabilities have covered.
    offset: usize,
}

#[derive(Serialize)]
struct Prefix<'a> {
    id: Id<'a>,
    object: &'static str,
    created: u64,
    model: &'a str,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Delta<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    source: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

#[derive(Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

impl SseWriter {
    pub(crate) fn new(head: Head, delivery: Delivery, logprobs: bool) -> Self {
        let state = ChoiceState { opened: false, last: head.first_source(), offset: 0 };
        let mut prefix = b"data: ".to_vec();
        json(
            &mut prefix,
            &Prefix {
                id: Id(&head, delivery.format),
                object: delivery.format.object(true),
                created: head.created,
                model: &head.model,
            },
        );
        prefix.pop();
        prefix.extend_from_slice(b",\"choices\":[");
        Self {
            delivery,
            logprobs,
            prefix,
            choices: vec![state; head.choices as usize],
            completion_tokens: 0,
            first_summary: None,
            failed: false,
            head,
        }
    }

    /// Appends what `event` looks like on the stream.
    pub(crate) fn write(&mut self, event: &Event, out: &mut Vec<u8>) {
        match event {
            Event::Text { choice, piece } => self.text(*choice, piece, out),
            Event::Finished { choice, reason, completion_tokens, summary } => {
                self.finished(*choice, *reason, *completion_tokens, summary, out);
            }
            Event::Failed(error) => self.error(error, out),
        }
    }

    /// Appends the end of a stream that had no error.
    pub(crate) fn end(&mut self, out: &mut Vec<u8>) {
        if self.failed {
            return;
        }
        if self.delivery.include_usage {
            out.extend_from_slice(&self.prefix);
            out.extend_from_slice(b"],\"usage\":");
            json(out, &Usage::new(self.head.prompt_tokens(), self.completion_tokens));
            if let Some(summary) = &self.first_summary {
                out.extend_from_slice(b",\"headstart\":");
                json(out, &Extension::from(summary));
            }
            out.extend_from_slice(b"}\n\n");
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// The first event of an answer, before its first text.
    fn open(&mut self, choice: u32, out: &mut Vec<u8>) {
        let Some(state) = self.choices.get_mut(choice as usize) else { return };
        if std::mem::replace(&mut state.opened, true) {
            return;
        }
        let chat = self.delivery.format == Format::Chat;
        if !chat && !self.delivery.return_token_ids {
            return;
        }
        let source = state.last;
        let ids = self.delivery.return_token_ids.then(|| self.head.prompt_ids.clone());
        let body = ChunkChoice {
            index: choice,
            delta: chat.then_some(Delta { role: Some("assistant"), content: Some("") }),
            text: (!chat).then_some(""),
            logprobs: None,
            finish_reason: None,
            source: source.as_str(),
            token_ids: None,
            prompt_token_ids: ids.as_deref().filter(|_| !chat),
        };
        self.chunk(&body, out, |out| {
            if let Some(ids) = &ids {
                out.extend_from_slice(b",\"prompt_token_ids\":");
                json(out, &**ids);
            }
        });
    }

    fn text(&mut self, choice: u32, piece: &Piece, out: &mut Vec<u8>) {
        self.open(choice, out);
        let Some(state) = self.choices.get_mut(choice as usize) else { return };
        state.last = piece.source;
        let ids = self.delivery.return_token_ids;
        if piece.text.is_empty() && !ids && !self.logprobs {
            return;
        }
        let logprobs = (self.logprobs && !piece.logprobs.is_empty()).then(|| {
            let format = self.delivery.format;
            Logprobs::new(format, &self.head.tokenizer, &piece.logprobs, &mut state.offset)
        });
        let chat = self.delivery.format == Format::Chat;
        let text = piece.text.as_str();
        let body = ChunkChoice {
            index: choice,
            delta: chat.then_some(Delta { role: None, content: Some(text) }),
            text: (!chat).then_some(text),
            logprobs,
            finish_reason: None,
            source: piece.source.as_str(),
            token_ids: ids.then_some(&piece.ids),
            prompt_token_ids: None,
        };
        self.chunk(&body, out, |_| {});
    }

    fn finished(
        &mut self,
        choice: u32,
        reason: FinishReason,
        completion_tokens: u32,
        summary: &Summary,
        out: &mut Vec<u8>,
    ) {
        self.open(choice, out);
        self.completion_tokens = self.completion_tokens.saturating_add(completion_tokens);
        if choice == 0 {
            self.first_summary = Some(summary.clone());
        }
        let Some(state) = self.choices.get(choice as usize) else { return };
        let chat = self.delivery.format == Format::Chat;
        let body = ChunkChoice {
            index: choice,
            delta: chat.then_some(Delta { role: None, content: None }),
            text: (!chat).then_some(""),
            logprobs: None,
            finish_reason: Some(reason.as_str()),
            source: state.last.as_str(),
            token_ids: self.delivery.return_token_ids.then_some(&[]),
            prompt_token_ids: None,
        };
        self.chunk(&body, out, |out| {
            out.extend_from_slice(b",\"headstart\":");
            json(out, &Extension::from(summary));
        });
    }

    fn error(&mut self, error: &Error, out: &mut Vec<u8>) {
        self.failed = true;
        out.extend_from_slice(b"data: ");
        json(out, &ErrorBody::new(error));
        out.extend_from_slice(b"\n\n");
    }

    /// Appends one event with one choice and what `more` adds after it.
    fn chunk(&self, choice: &ChunkChoice<'_>, out: &mut Vec<u8>, more: impl FnOnce(&mut Vec<u8>)) {
        out.extend_from_slice(&self.prefix);
        json(out, choice);
        out.push(b']');
        more(out);
        if self.delivery.include_usage {
            out.extend_from_slice(b",\"usage\":null");
        }
        out.extend_from_slice(b"}\n\n");
    }
}

/// Appends `value` as JSON. Writing into memory what has string keys only cannot fail.
fn json<T: Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) {
    let written = serde_json::to_writer(out, value);
    debug_assert!(written.is_ok(), "{written:?}");
}
