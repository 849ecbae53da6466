//! The gRPC door's messages, to and from the core's types.

use headstart_proto::{Error, v1};
use headstart_text::Message;

use crate::ask::{
    ABOVE_ZERO_TO_ONE, Ask, CHOICES_MAX, DRAFT_TOKENS_MAX, PENALTY, RealRange, SamplingParams,
    TEMPERATURE, TOP_LOGPROBS_MAX, WINDOW_MAX, ZERO_TO_ONE, check_content, check_integer,
    check_messages, check_name, check_stop,
};
use crate::frames::{FinishReason, Source, TokenLogprobs};
use crate::generate::Head;
use crate::openai::role;
use crate::outbox::{Event, Summary};
use crate::route::ModelEntry;

impl TryFrom<v1::GenerateRequest> for Ask {
    type Error = Error;

    fn try_from(request: v1::GenerateRequest) -> Result<Self, Error> {
        check_name("model", &request.model)?;
        if let Some(drafter) = &request.drafter {
            check_name("drafter", drafter)?;
        }
        let messages = request.messages.into_iter().enumerate().map(|(index, message)| {
            let role = role(&format!("messages[{index}].role"), &message.role)?;
            check_content(index, &message.content)?;
            Ok(Message { role, content: message.content })
        });
        let messages = messages
            .collect::<Result<Vec<_>, Error>>()
            .map_err(|error| error.with_field("messages"))?;
        check_messages(&messages)?;
        check_stop(&request.stop)?;
        let threshold = real("threshold", request.threshold, &ABOVE_ZERO_TO_ONE)?;
        Ok(Self {
            model: request.model,
            drafter: request.drafter,
            messages,
            max_tokens: within("max_tokens", request.max_tokens, 1, u32::MAX)?,
            sampling: sampling(&request.sampling.unwrap_or_default())?,
            stop: request.stop,
            choices: within("n", request.n, 1, CHOICES_MAX)?.unwrap_or(1),
            top_logprobs: within("top_logprobs", request.top_logprobs, 0, TOP_LOGPROBS_MAX)?,
            window: within("window", request.window, 1, WINDOW_MAX)?,
            threshold,
            draft_tokens_max: within(
                "draft_tokens_max",
                request.draft_tokens_max,
                1,
                DRAFT_TOKENS_MAX,
            )?,
            class: None,
        })
    }
}

fn sampling(sampling: &v1::Sampling) -> Result<SamplingParams, Error> {
    let default = SamplingParams::default();
    let field = |name: &str| format!("sampling.{name}");
    let get = |name, value, range| real(&field(name), value, range);
    let presence = get("presence_penalty", sampling.presence_penalty, &PENALTY)?;
    let frequency = get("frequency_penalty", sampling.frequency_penalty, &PENALTY)?;
    Ok(SamplingParams {
        temperature: get("temperature", sampling.temperature, &TEMPERATURE)?
            .unwrap_or(default.temperature),
        top_p: get("top_p", sampling.top_p, &ABOVE_ZERO_TO_ONE)?.unwrap_or(default.top_p),
        top_k: sampling.top_k.unwrap_or(default.top_k),
        min_p: get("min_p", sampling.min_p, &ZERO_TO_ONE)?.unwrap_or(default.min_p),
        seed: sampling.seed,
        presence_penalty: presence.unwrap_or(default.presence_penalty),
        frequency_penalty: frequency.unwrap_or(default.frequency_penalty),
    })
}

fn real(field: &str, value: Option<f32>, range: &RealRange) -> Result<Option<f32>, Error> {
    value.map(|value| range.check(field, value.into())).transpose()
}

fn within(field: &str, value: Option<u32>, low: u32, high: u32) -> Result<Option<u32>, Error> {
    if let Some(value) = value {
        check_integer(field, value.into(), low.into(), high.into())?;
    }
    Ok(value)
}

/// Turns a request's events into frames.
#[derive(Debug)]
pub(crate) struct FrameWriter {
    request_id: String,
    prompt_tokens: u32,
}

impl FrameWriter {
    /// The writer, and the first frame.
    pub(crate) fn new(head: &Head) -> (Self, v1::GenerateFrame) {
        let writer =
            Self { request_id: head.request_id.to_string(), prompt_tokens: head.prompt_tokens() };
        let started = v1::GenerateStarted {
            model: head.model.as_ref().into(),
            base: head.base.as_ref().into(),
            drafter: head.drafter.as_deref().unwrap_or_default().into(),
            prompt_ids: head.prompt_ids.to_vec(),
        };
        let first = writer.frame(0, 0, v1::generate_frame::Event::Started(started));
        (writer, first)
    }

    /// The frame of `event`.
    pub(crate) fn write(&self, event: Event) -> Result<v1::GenerateFrame, Error> {
        match event {
            Event::Failed(error) => Err(error),
            Event::Text { choice, piece } => {
                let text = v1::GeneratedText {
                    source: match piece.source {
                        Source::Drafter => v1::Source::Drafter.into(),
                        Source::Base => v1::Source::Base.into(),
                    },
                    text: piece.text,
                    ids: piece.ids,
                    logprobs: piece.logprobs.into_iter().map(position).collect(),
                };
                let event = v1::generate_frame::Event::Text(text);
                Ok(self.frame(choice, piece.position, event))
            }
            Event::Finished { choice, reason, completion_tokens, summary } => {
                let finished = v1::GenerateFinished {
                    reason: match reason {
                        FinishReason::Stop => v1::FinishReason::Stop.into(),
                        FinishReason::Length => v1::FinishReason::Length.into(),
                    },
                    prompt_tokens: self.prompt_tokens,
                    completion_tokens,
                    draft: Some(draft_summary(&summary)),
                };
                let event = v1::generate_frame::Event::Finished(finished);
                Ok(self.frame(choice, completion_tokens, event))
            }
        }
    }

    fn frame(
        &self,
        choice: u32,
        position: u32,
        event: v1::generate_frame::Event,
    ) -> v1::GenerateFrame {
        let request_id = self.request_id.clone();
        v1::GenerateFrame { request_id, epoch: 1, choice, position, event: Some(event) }
    }
}

fn position(position: TokenLogprobs) -> v1::PositionLogprobs {
    let entry = |(id, logprob)| v1::TokenLogprob { id, logprob };
    v1::PositionLogprobs {
        token: Some(entry(position.token)),
        top: position.top.into_iter().map(entry).collect(),
    }
}

fn draft_summary(summary: &Summary) -> v1::DraftSummary {
    v1::DraftSummary {
        drafter: summary.drafter.as_deref().unwrap_or_default().into(),
        base: summary.base.as_ref().into(),
        switched: summary.switched,
        switch_index: summary.switch_index,
        drafted_tokens: summary.drafted_tokens,
        kept_tokens: summary.kept_tokens,
        window: summary.window,
        threshold: summary.threshold,
    }
}

impl From<ModelEntry> for v1::Model {
    fn from(entry: ModelEntry) -> Self {
        let tier = if entry.pair { v1::NodeTier::Pair } else { v1::NodeTier::Base };
        Self {
            id: entry.id,
            tier: tier.into(),
            nodes: entry.nodes,
            context_length: entry.context_length,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> v1::GenerateRequest {
        let message = v1::Message { role: "user".into(), content: "hi".into() };
        v1::GenerateRequest { model: "b".into(), messages: vec![message], ..Default::default() }
    }

    #[test]
    fn a_bare_request_takes_the_defaults() {
        let ask = Ask::try_from(request()).unwrap();
        assert_eq!(ask.sampling, SamplingParams::default());
        assert_eq!((ask.choices, ask.max_tokens, ask.top_logprobs), (1, None, None));
    }

    #[test]
    fn bad_fields_are_refused_by_name() {
        type Spoil = fn(&mut v1::GenerateRequest);
        fn sampling(request: &mut v1::GenerateRequest) -> &mut v1::Sampling {
            request.sampling.get_or_insert_default()
        }
        let cases: [(&str, Spoil); 13] = [
            ("model", |r| r.model.clear()),
            ("messages", |r| r.messages.clear()),
            ("messages", |r| r.messages[0].role = "tool".into()),
            ("messages", |r| r.messages[0].content = " ".into()),
            ("max_tokens", |r| r.max_tokens = Some(0)),
            ("n", |r| r.n = Some(17)),
            ("top_logprobs", |r| r.top_logprobs = Some(21)),
            ("window", |r| r.window = Some(0)),
            ("threshold", |r| r.threshold = Some(f32::NAN)),
            ("draft_tokens_max", |r| r.draft_tokens_max = Some(0)),
            ("stop", |r| r.stop = vec![String::new()]),
            ("sampling.temperature", |r| sampling(r).temperature = Some(f32::INFINITY)),
            ("sampling.top_p", |r| sampling(r).top_p = Some(0.0)),
        ];
        for (field, spoil) in cases {
            let mut request = request();
            spoil(&mut request);
            let error = Ask::try_from(request).expect_err(field);
            assert_eq!(error.field.as_deref(), Some(field), "{}", error.message);
            assert_eq!(error.code.http_status(), 400);
        }
    }
}
