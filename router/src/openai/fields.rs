//! A JSON object taken apart field by field: each field is asked for by name and type, `null` is
//! the same as absent, and what nobody asked for is refused by name.

use headstart_proto::{Error, ErrorCode};
use serde_json::{Map, Value};

use crate::ask::{RealRange, check_integer};

/// The fields of one object that have not been taken yet.
#[derive(Debug)]
pub(crate) struct Fields {
    /// Put before a field's name in messages: empty, or `headstart.`.
    prefix: String,
    map: Map<String, Value>,
}

impl Fields {
    /// Parses a request body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, Error> {
        let text = std::str::from_utf8(body).map_err(|error| {
            let at = error.valid_up_to();
            bad(format!("the body must be UTF-8; the byte at offset {at} is not"))
        })?;
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Self { prefix: String::new(), map }),
            Ok(other) => {
                Err(bad(format!("the body must be a JSON object, found {}", describe(&other))))
            }
            Err(error) => Err(syntax_error(text, &error)),
        }
    }

    /// An object inside another; `name` is its full name.
    fn nested(name: &str, map: Map<String, Value>) -> Self {
        Self { prefix: format!("{name}."), map }
    }

    /// The object `value`, which messages call `name`.
    pub(crate) fn from_value(name: &str, value: Value) -> Result<Self, Error> {
        match value {
            Value::Object(map) => Ok(Self::nested(name, map)),
            other => Err(wrong_type(name, "an object", &other)),
        }
    }

    /// A field's full name.
    pub(crate) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    /// Takes a field, whatever its type; `null` counts as absent.
    pub(crate) fn take(&mut self, field: &str) -> Option<Value> {
        self.map.remove(field).filter(|value| !value.is_null())
    }

    /// Takes a field that must be there.
    pub(crate) fn require(&mut self, field: &str) -> Result<Value, Error> {
        self.take(field).ok_or_else(|| {
            let name = self.name(field);
            Error::invalid(&name, format!("{name} is required"))
        })
    }

    /// Takes a number in `range`.
    pub(crate) fn real(&mut self, field: &str, range: &RealRange) -> Result<Option<f32>, Error> {
        let Some(value) = self.take(field) else { return Ok(None) };
        let name = self.name(field);
        let number = value.as_f64().ok_or_else(|| wrong_type(&name, range.text(), &value))?;
        range.check(&name, number).map(Some)
    }

    /// Takes an integer in `low..=high`.
    pub(crate) fn integer(
        &mut self,
        field: &str,
        low: i128,
        high: i128,
    ) -> Result<Option<i128>, Error> {
        let Some(value) = self.take(field) else { return Ok(None) };
        let name = self.name(field);
        let number = value.as_i64().map(i128::from).or(value.as_u64().map(i128::from));
        let expected = || format!("an integer from {low} to {high}");
        let number = number.ok_or_else(|| wrong_type(&name, &expected(), &value))?;
        check_integer(&name, number, low, high).map(Some)
    }

    /// Takes an integer in `low..=high`, both of which fit 32 bits.
    pub(crate) fn small(&mut self, field: &str, low: u32, high: u32) -> Result<Option<u32>, Error> {
        let number = self.integer(field, low.into(), high.into())?;
        Ok(number.and_then(|number| u32::try_from(number).ok()))
    }

    /// Takes `true` or `false`.
    pub(crate) fn boolean(&mut self, field: &str) -> Result<Option<bool>, Error> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(wrong_type(&self.name(field), "true or false", &other)),
        }
    }

    /// Takes a string.
    pub(crate) fn string(&mut self, field: &str) -> Result<Option<String>, Error> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(&self.name(field), "a string", &other)),
        }
    }

    /// Takes an object.
    pub(crate) fn object(&mut self, field: &str) -> Result<Option<Self>, Error> {
        match self.take(field) {
            None => Ok(None),
            Some(value) => Self::from_value(&self.name(field), value).map(Some),
        }
    }

    /// Refuses, by name, the first field that is left and not `null`.
    pub(crate) fn finish(self) -> Result<(), Error> {
        match self.map.iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((field, _)) => {
                let name = format!("{}{}", self.prefix, shorten(field));
                Err(refused(&name, &format!("unknown field {name}")))
            }
        }
    }
}

/// A field that is understood or unknown, and in any case not served.
pub(crate) fn refused(name: &str, message: &str) -> Error {
    Error::new(ErrorCode::Unsupported, message).with_field(name)
}

/// A field of the wrong type.
pub(crate) fn wrong_type(name: &str, expected: &str, found: &Value) -> Error {
    Error::invalid(name, format!("{name} must be {expected}, found {}", describe(found)))
}

fn bad(message: String) -> Error {
    Error::new(ErrorCode::InvalidArgument, message)
}

/// A value in a few words, for error messages.
fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => format!("the string {:?}", shorten(text)),
        Value::Array(items) => format!("an array of {}", items.len()),
        Value::Object(_) => "an object".into(),
    }
}

fn shorten(text: &str) -> &str {
    &text[..text.floor_char_boundary(64)]
}

/// Explains malformed JSON. `NaN` and the infinities, which some clients write, and numbers
/// too large for a double are reported with the field that holds them.
fn syntax_error(text: &str, error: &serde_json::Error) -> Error {
    let offset = offset_of(text, error.line(), error.column());
    if let Some((field, found)) = bad_number(text, offset) {
        let message = format!("{field} must be a finite number, found {found}");
        return Error::invalid(field, message);
    }
    bad(format!("the body is not valid JSON: {error}"))
}

/// The byte offset of a 1-based line and column (in bytes).
fn offset_of(text: &str, line: usize, column: usize) -> usize {
    let before: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    (before + column.saturating_sub(1)).min(text.len())
}

/// The key and the literal, when the text near `offset` is the number-like value of a key.
fn bad_number(text: &str, offset: usize) -> Option<(String, String)> {
    let bytes = text.as_bytes();
    let literal = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.');
    let mut start = offset.min(bytes.len());
    while start > 0 && literal(&bytes[start - 1]) {
        start -= 1;
    }
    let length = bytes[start..].iter().take_while(|b| literal(b)).count();
    let found = text.get(start..start + length)?;
    let bare = found.trim_start_matches(['+', '-']);
    let number = bare.starts_with(|c: char| c.is_ascii_digit()) && bare.parse::<f64>().is_ok();
    let special = ["nan", "infinity", "inf"].iter().any(|name| bare.eq_ignore_ascii_case(name));
    if !number && !special {
        return None;
    }
    let key = text.get(..start)?.trim_end().strip_suffix(':')?.trim_end().strip_suffix('"')?;
    let key = &key[key.rfind('"')? + 1..];
    Some((shorten(key).to_owned(), shorten(found).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ask::TEMPERATURE;

    #[test]
    fn broken_bodies_say_what_is_wrong() {
        let cases: [(&[u8], &str); 9] = [
            (b"", "not valid JSON"),
            (b"{", "not valid JSON"),
            (b"[]", "must be a JSON object, found an array of 0"),
            (b"{\"model\": \"\xff\"}", "must be UTF-8; the byte at offset 11"),
            (b"{\"temperature\": NaN}", "temperature must be a finite number, found NaN"),
            (b"{\"top_p\": -Infinity}", "top_p must be a finite number, found -Infinity"),
            (b"{\"a\": 1,\n \"top_p\" : 1e999}", "top_p must be a finite number, found 1e999"),
            (b"{\"a\": nope}", "not valid JSON"),
            (b"{\"a\": 1} x", "not valid JSON"),
        ];
        for (body, expected) in cases {
            let error = Fields::parse(body).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidArgument);
            assert!(error.message.contains(expected), "{}: {}", expected, error.message);
        }
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_crash() {
        let body = format!("{{\"a\": {}", "[".repeat(100_000));
        assert!(Fields::parse(body.as_bytes()).is_err());
    }

    #[test]
    fn fields_are_typed_and_leftovers_named() {
        let mut fields = Fields::parse(
            br#"{"n": 2.5, "temperature": "hot", "flag": 1, "odd": 1, "null": null}"#,
        )
        .unwrap();
        let error = fields.integer("n", 1, 16).unwrap_err();
        assert_eq!(error.message, "n must be an integer from 1 to 16, found 2.5");
        let error = fields.real("temperature", &TEMPERATURE).unwrap_err();
        assert!(error.message.contains("found the string \"hot\""));
        assert!(fields.boolean("flag").is_err());
        assert_eq!(fields.real("missing", &TEMPERATURE).unwrap(), None);
        let error = fields.finish().unwrap_err();
        assert_eq!(error.message, "unknown field odd");
        assert_eq!(error.field.as_deref(), Some("odd"));
    }
}
