//! Responses, as structs that are serialised as they are.

use std::collections::BTreeMap;
use std::fmt::Write;

use headstart_proto::{Error, ErrorCode};
use headstart_text::Tokenizer;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::request::{Delivery, Format};
use crate::frames::{FinishReason, TokenLogprobs};
use crate::generate::Head;
use crate::outbox::{Event, Summary};

/// JSON has no infinity: what a log-probability of zero probability is written as.
const LOGPROB_MIN: f32 = -9999.0;

/// The OpenAI error body.
#[derive(Debug, Serialize)]
pub(crate) struct ErrorBody<'a> {
    error: ErrorFields<'a>,
}

#[derive(Debug, Serialize)]
struct ErrorFields<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: &'static str,
}

impl<'a> ErrorBody<'a> {
    pub(crate) fn new(error: &'a Error) -> Self {
        let kind = match error.code {
            ErrorCode::Overloaded => "rate_limit_error",
            code if code.http_status() < 500 => "invalid_request_error",
            _ => "server_error",
        };
        let code = match error.code {
            ErrorCode::ContextTooLong => "context_length_exceeded",
            ErrorCode::UnknownModel => "model_not_found",
            ErrorCode::Unauthenticated => "invalid_api_key",
            code => code.code(),
        };
        let param = error.field.as_deref();
        Self { error: ErrorFields { message: &error.message, r#type: kind, param, code } }
    }
}

/// Token counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
}

impl Usage {
    pub(crate) fn new(prompt_tokens: u32, completion_tokens: u32) -> Self {
        let total_tokens = prompt_tokens.saturating_add(completion_tokens);
        Self { prompt_tokens, completion_tokens, total_tokens }
    }
}

/// The `headstart` object of a response.
#[derive(Debug, Serialize)]
pub(crate) struct Extension<'a> {
    drafter: Option<&'a str>,
    base: &'a str,
    switched: bool,
    switch_index: Option<u32>,
    drafted_tokens: u32,
    kept_tokens: u32,
    window: u32,
    threshold: f32,
}

impl<'a> From<&'a Summary> for Extension<'a> {
    fn from(summary: &'a Summary) -> Self {
        Self {
            drafter: summary.drafter.as_deref(),
            base: &summary.base,
            switched: summary.switched,
            switch_index: summary.switch_index,
            drafted_tokens: summary.drafted_tokens,
            kept_tokens: summary.kept_tokens,
            window: summary.window,
            threshold: summary.threshold,
        }
    }
}

/// A choice's log-probabilities, in its endpoint's format.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Logprobs {
    Chat { content: Vec<ChatLogprob>, refusal: Option<()> },
    Completion(CompletionLogprobs),
}

#[derive(Debug, Serialize)]
pub(crate) struct ChatLogprob {
    #[serde(flatten)]
    token: ChatToken,
    top_logprobs: Vec<ChatToken>,
}

#[derive(Debug, Serialize)]
struct ChatToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

#[derive(Debug, Default, Serialize)]
pub(crate) struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<BTreeMap<String, f32>>,
    /// Where each token starts in the answer, in characters.
    text_offset: Vec<usize>,
}

impl Logprobs {
    /// Puts `positions` into `format`. `offset` counts the answer's characters from call to call.
    pub(crate) fn new(
        format: Format,
        tokenizer: &Tokenizer,
        positions: &[TokenLogprobs],
        offset: &mut usize,
    ) -> Self {
        match format {
            Format::Chat => {
                let content = positions.iter().map(|position| ChatLogprob {
                    token: chat_token(tokenizer, position.token),
                    top_logprobs: position.top.iter().map(|&t| chat_token(tokenizer, t)).collect(),
                });
                Self::Chat { content: content.collect(), refusal: None }
            }
            Format::Completion => {
                let mut all = CompletionLogprobs::default();
                for position in positions {
                    let token = lossy(tokenizer, position.token.0);
                    let top = position.top.iter();
                    all.text_offset.push(*offset);
                    *offset += token.chars().count();
                    all.tokens.push(token);
                    all.token_logprobs.push(finite(position.token.1));
                    all.top_logprobs
                        .push(top.map(|&(id, p)| (lossy(tokenizer, id), finite(p))).collect());
                }
                Self::Completion(all)
            }
        }
    }
}

fn chat_token(tokenizer: &Tokenizer, (id, logprob): (u32, f32)) -> ChatToken {
    let bytes = tokenizer.token_bytes(id);
    let token = String::from_utf8_lossy(&bytes).into_owned();
    ChatToken { token, logprob: finite(logprob), bytes }
}

fn lossy(tokenizer: &Tokenizer, id: u32) -> String {
    String::from_utf8_lossy(&tokenizer.token_bytes(id)).into_owned()
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob.max(LOGPROB_MIN) } else { LOGPROB_MIN }
}

/// One answer as it is collected for a response in one piece.
#[derive(Debug, Default)]
struct Collected {
    text: String,
    ids: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    end: Option<(FinishReason, u32, Summary)>,
}

/// Collects a request's events into one response body.
#[derive(Debug)]
pub(crate) struct Collector {
    choices: Vec<Collected>,
}

impl Collector {
    pub(crate) fn new(choices: u32) -> Self {
        Self { choices: (0..choices).map(|_| Collected::default()).collect() }
    }

    /// Takes an event.
    pub(crate) fn push(&mut self, event: Event) -> Result<(), Error> {
        match event {
            Event::Failed(error) => return Err(error),
            Event::Text { choice, piece } => {
                if let Some(collected) = self.choices.get_mut(choice as usize) {
                    collected.text.push_str(&piece.text);
                    collected.ids.extend(piece.ids);
                    collected.logprobs.extend(piece.logprobs);
                }
            }
            Event::Finished { choice, reason, completion_tokens, summary } => {
                if let Some(collected) = self.choices.get_mut(choice as usize) {
                    collected.end = Some((reason, completion_tokens, summary));
                }
            }
        }
        Ok(())
    }

    /// The body, once there are no more events.
    pub(crate) fn body(
        &self,
        head: &Head,
        delivery: Delivery,
        logprobs: bool,
    ) -> Result<Vec<u8>, Error> {
        let mut tokens = 0u32;
        let mut choices = Vec::with_capacity(self.choices.len());
        let mut first = None;
        for (index, collected) in self.choices.iter().enumerate() {
            let Some((reason, completion_tokens, summary)) = &collected.end else {
                return Err(Error::internal("an answer ended without its last event"));
            };
            tokens = tokens.saturating_add(*completion_tokens);
            first.get_or_insert(summary);
            choices.push(choice(head, delivery, logprobs, index, collected, *reason, summary));
        }
        let response = Response {
            id: Id(head, delivery.format),
            object: delivery.format.object(false),
            created: head.created,
            model: &head.model,
            choices,
            usage: Usage::new(head.prompt_tokens(), tokens),
            prompt_token_ids: delivery.return_token_ids.then_some(&*head.prompt_ids),
            headstart: first.map(Extension::from),
        };
        serde_json::to_vec(&response)
            .map_err(|error| Error::internal(format!("write the response: {error}")))
    }
}

fn choice<'a>(
    head: &'a Head,
    delivery: Delivery,
    logprobs: bool,
    index: usize,
    collected: &'a Collected,
    reason: FinishReason,
    summary: &'a Summary,
) -> Choice<'a> {
    let logprobs = logprobs
        .then(|| Logprobs::new(delivery.format, &head.tokenizer, &collected.logprobs, &mut 0));
    let body = match delivery.format {
        Format::Chat => Body::Message(AssistantMessage {
            role: "assistant",
            content: &collected.text,
            refusal: None,
        }),
        Format::Completion => Body::Text(&collected.text),
    };
    let in_choice = delivery.return_token_ids && delivery.format == Format::Completion;
    Choice {
        index,
        body,
        logprobs,
        finish_reason: reason.as_str(),
        token_ids: delivery.return_token_ids.then_some(&collected.ids),
        prompt_token_ids: in_choice.then_some(&*head.prompt_ids),
        headstart: summary.into(),
    }
}

impl Format {
    /// The `object` of a response or of a chunk.
    pub(crate) const fn object(self, chunk: bool) -> &'static str {
        match (self, chunk) {
            (Self::Chat, false) => "chat.completion",
            (Self::Chat, true) => "chat.completion.chunk",
            (Self::Completion, _) => "text_completion",
        }
    }
}

/// A response's id.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Id<'a>(pub(crate) &'a Head, pub(crate) Format);

impl Serialize for Id<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let prefix = match self.1 {
            Format::Chat => "chatcmpl",
            Format::Completion => "cmpl",
        };
        serializer.collect_str(&format_args!("{prefix}-{}", self.0.request_id))
    }
}

#[derive(Debug, Serialize)]
struct Response<'a> {
    id: Id<'a>,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice<'a>>,
    usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    headstart: Option<Extension<'a>>,
}

#[derive(Debug, Serialize)]
struct Choice<'a> {
    index: usize,
    #[serde(flatten)]
    body: Body<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    headstart: Extension<'a>,
}

#[derive(Debug)]
enum Body<'a> {
    Message(AssistantMessage<'a>),
    Text(&'a str),
}

impl Serialize for Body<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1))?;
        match self {
            Self::Message(message) => map.serialize_entry("message", message)?,
            Self::Text(text) => map.serialize_entry("text", text)?,
        }
        map.end()
    }
}

#[derive(Debug, Serialize)]
struct AssistantMessage<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

/// The list of models, or one of them.
pub(crate) fn models_body(entries: &[crate::route::ModelEntry], started: u64) -> String {
    let mut body = String::from(r#"{"object":"list","data":["#);
    for (index, entry) in entries.iter().enumerate() {
        let comma = if index > 0 { "," } else { "" };
        let _ = write!(body, "{comma}{}", model_body(entry, started));
    }
    body.push_str("]}");
    body
}

/// One model.
pub(crate) fn model_body(entry: &crate::route::ModelEntry, started: u64) -> String {
    #[derive(Serialize)]
    struct Model<'a> {
        id: &'a str,
        object: &'static str,
        created: u64,
        owned_by: &'static str,
        max_model_len: u32,
        nodes: u32,
    }
    let model = Model {
        id: &entry.id,
        object: "model",
        created: started,
        owned_by: "headstart",
        max_model_len: entry.context_length,
        nodes: entry.nodes,
    };
    serde_json::to_string(&model).unwrap_or_default()
}
