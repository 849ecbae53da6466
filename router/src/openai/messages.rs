//! The `messages` array.

use headstart_proto::Error;
use headstart_text::{Message, Role};
use serde_json::Value;

use super::fields::{Fields, refused, wrong_type};
use crate::ask::{check_content, check_messages};

/// Parses and checks `messages`. The order of roles is free: the conversation may end with any.
pub(super) fn parse(value: Value) -> Result<Vec<Message>, Error> {
    let Value::Array(items) = value else {
        return Err(wrong_type("messages", "an array of messages", &value));
    };
    let messages: Vec<Message> = items
        .into_iter()
        .enumerate()
        .map(|(index, item)| message(index, item))
        .collect::<Result<_, _>>()
        .map_err(|error| error.with_field("messages"))?;
    check_messages(&messages)?;
    Ok(messages)
}

fn message(index: usize, item: Value) -> Result<Message, Error> {
    let mut fields = Fields::from_value(&format!("messages[{index}]"), item)?;
    let role_name = fields.name("role");
    let role = match fields.require("role")? {
        Value::String(name) => role(&role_name, &name)?,
        other => return Err(wrong_type(&role_name, "a string", &other)),
    };
    let content_name = fields.name("content");
    let content = match fields.take("content") {
        None => String::new(),
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => join_parts(&content_name, parts)?,
        Some(other) => {
            return Err(wrong_type(&content_name, "a string or an array of text parts", &other));
        }
    };
    check_content(index, &content)?;
    // What a client sends back with an assistant's message when it had nothing to say there.
    for name in ["annotations", "tool_calls"] {
        if fields.take(name).is_some_and(|value| value.as_array().is_none_or(|a| !a.is_empty())) {
            let name = fields.name(name);
            return Err(refused(&name, &format!("{name} is not supported")));
        }
    }
    fields.finish()?;
    Ok(Message { role, content })
}

/// The role called `name`, in the field `field`.
pub(crate) fn role(field: &str, name: &str) -> Result<Role, Error> {
    match name {
        "system" => Ok(Role::System),
        "user" => Ok(Role::User),
        "assistant" => Ok(Role::Assistant),
        "developer" => {
            Err(refused(field, &format!("{field} \"developer\" is not supported; use \"system\"")))
        }
        "tool" | "function" => {
            Err(refused(field, &format!("{field} {name:?} is not supported: there are no tools")))
        }
        other => {
            let shown = &other[..other.floor_char_boundary(64)];
            let expected = "\"system\", \"user\" or \"assistant\"";
            Err(Error::invalid(field, format!("{field} must be {expected}, found {shown:?}")))
        }
    }
}

/// The text of content parts, joined by line breaks.
fn join_parts(name: &str, parts: Vec<Value>) -> Result<String, Error> {
    let mut joined = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        let mut fields = Fields::from_value(&format!("{name}[{index}]"), part)?;
        let kind = fields.string("type")?.unwrap_or_default();
        if kind != "text" {
            let name = fields.name("type");
            let shown = &kind[..kind.floor_char_boundary(64)];
            let message = format!("{name} must be \"text\", found {shown:?}");
            return Err(refused(&name, &message));
        }
        let text_name = fields.name("text");
        let text = fields.string("text")?;
        let text =
            text.ok_or_else(|| Error::invalid(&text_name, format!("{text_name} is required")))?;
        fields.finish()?;
        if index > 0 {
            joined.push('\n');
        }
        joined.push_str(&text);
    }
    Ok(joined)
}
