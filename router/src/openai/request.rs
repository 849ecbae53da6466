//! Request bodies into [`Ask`]s.

use headstart_proto::Error;
use headstart_text::{Message, Role};
use serde_json::Value;

use super::fields::{Fields, refused, wrong_type};
use super::{inert, messages};
use crate::admission::Class;
use crate::ask::{
    ABOVE_ZERO_TO_ONE, Ask, CHOICES_MAX, DRAFT_TOKENS_MAX, PENALTY, SamplingParams, TEMPERATURE,
    TOP_LOGPROBS_MAX, WINDOW_MAX, ZERO_TO_ONE, check_content, check_name, check_priority,
    check_stop,
};

/// Which endpoint a request came through, and so the format of its response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

/// How the client wants its answer delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Delivery {
    pub(crate) format: Format,
    /// Server-sent events rather than one body.
    pub(crate) stream: bool,
    /// A last event with the usage.
    pub(crate) include_usage: bool,
    /// Token ids beside the text.
    pub(crate) return_token_ids: bool,
}

/// Parses and checks a request body for `format`.
pub(crate) fn parse(format: Format, body: &[u8]) -> Result<(Ask, Delivery), Error> {
    let mut fields = Fields::parse(body)?;
    let model = model(&mut fields)?;
    let messages = match format {
        Format::Chat => messages::parse(fields.require("messages")?)?,
        Format::Completion => prompt(fields.require("prompt")?)?,
    };
    let max_tokens = max_tokens(&mut fields, format)?;
    let sampling = sampling(&mut fields)?;
    let stop = stop(&mut fields)?;
    let choices = fields.small("n", 1, CHOICES_MAX)?.unwrap_or(1);
    let top_logprobs = logprobs(&mut fields, format)?;
    let delivery = delivery(&mut fields, format)?;
    let extension = extension(&mut fields)?;
    match format {
        Format::Chat => inert::take_chat(&mut fields)?,
        Format::Completion => inert::take_completion(&mut fields)?,
    }
    fields.finish()?;
    let ask = Ask {
        model,
        drafter: extension.drafter,
        messages,
        max_tokens,
        sampling,
        stop,
        choices,
        top_logprobs,
        window: extension.window,
        threshold: extension.threshold,
        draft_tokens_max: extension.draft_tokens_max,
        class: extension.class,
    };
    Ok((ask, delivery))
}

fn model(fields: &mut Fields) -> Result<String, Error> {
    match fields.require("model")? {
        Value::String(name) => check_name("model", &name).map(|()| name),
        other => Err(wrong_type("model", "a string", &other)),
    }
}

/// The prompt of a completion: one user message.
fn prompt(value: Value) -> Result<Vec<Message>, Error> {
    let expected = "a string or an array of one string";
    let content = match value {
        Value::String(text) => text,
        Value::Array(mut items) if items.len() == 1 && items[0].is_string() => match items.pop() {
            Some(Value::String(text)) => text,
            _ => String::new(),
        },
        other => return Err(wrong_type("prompt", expected, &other)),
    };
    check_content(0, &content).map_err(|_| Error::invalid("prompt", "prompt must not be empty"))?;
    Ok(vec![Message { role: Role::User, content }])
}

fn max_tokens(fields: &mut Fields, format: Format) -> Result<Option<u32>, Error> {
    let old = fields.small("max_tokens", 1, u32::MAX)?;
    if format == Format::Completion {
        return Ok(old);
    }
    let new = fields.small("max_completion_tokens", 1, u32::MAX)?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(Error::invalid(
            "max_tokens",
            format!(
                "max_tokens ({old}) and max_completion_tokens ({new}) must be equal when both are given"
            ),
        )),
        _ => Ok(new.or(old)),
    }
}

fn sampling(fields: &mut Fields) -> Result<SamplingParams, Error> {
    let default = SamplingParams::default();
    // -1, as in vLLM, is another way to write "off".
    let top_k = fields.integer("top_k", -1, u32::MAX.into())?.unwrap_or(0);
    let seed = fields.integer("seed", i64::MIN.into(), u64::MAX.into())?;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // any 64 bits are a seed
    let seed = seed.map(|seed| seed as u64);
    Ok(SamplingParams {
        temperature: fields.real("temperature", &TEMPERATURE)?.unwrap_or(default.temperature),
        top_p: fields.real("top_p", &ABOVE_ZERO_TO_ONE)?.unwrap_or(default.top_p),
        top_k: u32::try_from(top_k).unwrap_or(0),
        min_p: fields.real("min_p", &ZERO_TO_ONE)?.unwrap_or(default.min_p),
        seed,
        presence_penalty: fields.real("presence_penalty", &PENALTY)?.unwrap_or(0.0),
        frequency_penalty: fields.real("frequency_penalty", &PENALTY)?.unwrap_or(0.0),
    })
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, Error> {
    let expected = "a string or an array of strings";
    let stop = match fields.take("stop") {
        None => Vec::new(),
        Some(Value::String(text)) => vec![text],
        Some(Value::Array(items)) => items
            .into_iter()
            .map(|item| match item {
                Value::String(text) => Ok(text),
                other => Err(wrong_type("stop", expected, &other)),
            })
            .collect::<Result<_, _>>()?,
        Some(other) => return Err(wrong_type("stop", expected, &other)),
    };
    check_stop(&stop)?;
    Ok(stop)
}

fn logprobs(fields: &mut Fields, format: Format) -> Result<Option<u32>, Error> {
    if format == Format::Completion {
        return fields.small("logprobs", 0, TOP_LOGPROBS_MAX);
    }
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.small("top_logprobs", 0, TOP_LOGPROBS_MAX)?;
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => {
            Err(Error::invalid("top_logprobs", "top_logprobs needs logprobs to be true"))
        }
    }
}

fn delivery(fields: &mut Fields, format: Format) -> Result<Delivery, Error> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let mut include_usage = false;
    if let Some(mut options) = fields.object("stream_options")? {
        if !stream {
            let message = "stream_options needs stream to be true";
            return Err(Error::invalid("stream_options", message));
        }
        include_usage = options.boolean("include_usage")?.unwrap_or(false);
        // Padding against traffic analysis: it is never added, and adds nothing to the answer.
        options.boolean("include_obfuscation")?;
        options.finish()?;
    }
    let return_token_ids = fields.boolean("return_token_ids")?.unwrap_or(false);
    Ok(Delivery { format, stream, include_usage, return_token_ids })
}

/// The `headstart` object.
#[derive(Default)]
struct Extension {
    window: Option<u32>,
    threshold: Option<f32>,
    draft_tokens_max: Option<u32>,
    drafter: Option<String>,
    class: Option<Class>,
}

fn extension(fields: &mut Fields) -> Result<Extension, Error> {
    let Some(mut fields) = fields.object("headstart")? else { return Ok(Extension::default()) };
    let priority = fields.string("priority")?;
    let class = priority.map(|name| check_priority("headstart.priority", &name)).transpose()?;
    let extension = Extension {
        window: fields.small("window", 1, WINDOW_MAX)?,
        threshold: fields.real("threshold", &ABOVE_ZERO_TO_ONE)?,
        draft_tokens_max: fields.small("draft_tokens_max", 1, DRAFT_TOKENS_MAX)?,
        drafter: fields.string("drafter")?,
        class,
    };
    if let Some(name) = &extension.drafter {
        check_name("headstart.drafter", name)?;
    }
    fields
        .finish()
        .map_err(|error| refused(error.field.as_deref().unwrap_or("headstart"), &error.message))?;
    Ok(extension)
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
