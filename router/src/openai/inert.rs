//! Fields of the OpenAI API that Headstart does not act on. Each is accepted only with the values
//! that leave the answer as it is; any other value is refused by name.

use headstart_proto::Error;
use serde_json::Value;

use super::fields::{Fields, refused};

/// A field, what it may be, and those values in words.
type Inert = (&'static str, fn(&Value) -> bool, &'static str);

/// For both endpoints.
const COMMON: &[Inert] = &[
    ("user", Value::is_string, "a string"),
    ("metadata", Value::is_object, "an object"),
    ("store", is_false, "false"),
    ("service_tier", |v| one_of(v, &["auto", "default"]), "\"auto\" or \"default\""),
    ("safety_identifier", Value::is_string, "a string"),
    ("prompt_cache_key", Value::is_string, "a string"),
    ("logit_bias", |v| v.as_object().is_some_and(|map| map.is_empty()), "an empty object"),
    ("best_of", |v| v.as_u64() == Some(1), "1"),
];

/// For chat completions.
const CHAT: &[Inert] = &[
    ("tools", is_empty_array, "an empty array"),
    ("tool_choice", |v| one_of(v, &["none"]), "\"none\""),
    ("functions", is_empty_array, "an empty array"),
    ("function_call", |v| one_of(v, &["none"]), "\"none\""),
    ("parallel_tool_calls", Value::is_boolean, "true or false"),
    ("response_format", is_text_format, "{\"type\": \"text\"}"),
    ("modalities", is_text_only, "[\"text\"]"),
    ("audio", never, "absent"),
    ("prediction", never, "absent"),
    ("reasoning_effort", never, "absent"),
    ("verbosity", never, "absent"),
    ("web_search_options", never, "absent"),
];

/// For completions.
const COMPLETION: &[Inert] =
    &[("echo", is_false, "false"), ("suffix", |v| v.as_str() == Some(""), "absent")];

fn is_false(value: &Value) -> bool {
    value.as_bool() == Some(false)
}

fn never(_: &Value) -> bool {
    false
}

fn one_of(value: &Value, names: &[&str]) -> bool {
    value.as_str().is_some_and(|text| names.contains(&text))
}

fn is_empty_array(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

fn is_text_only(value: &Value) -> bool {
    value.as_array().is_some_and(|items| items.len() == 1 && items[0].as_str() == Some("text"))
}

fn is_text_format(value: &Value) -> bool {
    value.as_object().is_some_and(|map| {
        map.len() == 1 && map.get("type").and_then(Value::as_str) == Some("text")
    })
}

/// Takes the inert fields of a chat completion.
pub(super) fn take_chat(fields: &mut Fields) -> Result<(), Error> {
    take(fields, COMMON)?;
    take(fields, CHAT)
}

/// Takes the inert fields of a completion.
pub(super) fn take_completion(fields: &mut Fields) -> Result<(), Error> {
    take(fields, COMMON)?;
    take(fields, COMPLETION)
}

fn take(fields: &mut Fields, table: &[Inert]) -> Result<(), Error> {
    for (name, harmless, allowed) in table {
        if fields.take(name).is_some_and(|value| !harmless(&value)) {
            let message = format!("{name} is not supported; it may only be {allowed}");
            return Err(refused(name, &message));
        }
    }
    Ok(())
}
