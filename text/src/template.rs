//! Chat templates: Jinja, as `transformers` renders it (`utils/chat_template_utils.py`).

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter};

use crate::{Message, TextError};

/// No template in use is near this.
pub(crate) const TEMPLATE_BYTES_MAX: usize = 1 << 20;
/// Steps that one rendering may take.
const FUEL: u64 = 20_000_000;
/// How much longer than its messages a prompt may be.
const EXTRA_BYTES_MAX: usize = 4 << 20;
/// How often each message may appear in its prompt.
const COPIES_MAX: usize = 16;
const NAME: &str = "chat_template";

/// The special tokens that a template may name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateTokens {
    /// `bos_token`.
    pub bos_token: Option<String>,
    /// `eos_token`.
    pub eos_token: Option<String>,
    /// `unk_token`.
    pub unk_token: Option<String>,
    /// `pad_token`.
    pub pad_token: Option<String>,
}

/// A model's chat template. Cheap to clone.
#[derive(Clone)]
pub struct ChatTemplate {
    source: Arc<str>,
    tokens: TemplateTokens,
    environment: Arc<Environment<'static>>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("bytes", &self.source.len())
            .field("tokens", &self.tokens)
            .finish()
    }
}

/// What `raise_exception` said.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

impl ChatTemplate {
    /// A template from its source.
    ///
    /// # Errors
    /// It is too long, or no Jinja.
    pub fn new(source: &str, tokens: TemplateTokens) -> Result<Self, TextError> {
        if source.len() > TEMPLATE_BYTES_MAX {
            let message =
                format!("{} bytes long, at most {TEMPLATE_BYTES_MAX} are read", source.len());
            return Err(TextError::Template(message));
        }
        let mut environment = environment();
        environment
            .add_template_owned(NAME, plain_generation_blocks(source))
            .map_err(|e| TextError::Template(describe(&e)))?;
        Ok(Self { source: source.into(), tokens, environment: Arc::new(environment) })
    }

    /// The template's source.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The special tokens that it may name.
    #[must_use]
    pub fn tokens(&self) -> &TemplateTokens {
        &self.tokens
    }

    /// The prompt that asks for the assistant's next turn.
    ///
    /// # Errors
    /// [`TextError::Messages`] with the template's own words if it raises an exception;
    /// [`TextError::Template`] if it fails otherwise, or makes far too long a prompt.
    pub fn render(&self, messages: &[Message]) -> Result<String, TextError> {
        let template =
            self.environment.get_template(NAME).map_err(|e| TextError::Template(describe(&e)))?;
        let values = context! {
            messages => Value::from_serialize(messages),
            add_generation_prompt => true,
            tools => Value::from(()),
            documents => Value::from(()),
            ..self.special_tokens()
        };
        let content: usize = messages.iter().map(|message| message.content.len()).sum();
        let bytes_max = content.saturating_mul(COPIES_MAX).saturating_add(EXTRA_BYTES_MAX);
        let mut prompt = Bounded { bytes: Vec::new(), bytes_max };
        template.render_captured_to(values, &mut prompt).map_err(|e| match raised(&e) {
            Some(message) => TextError::Messages(message),
            None => TextError::Template(describe(&e)),
        })?;
        String::from_utf8(prompt.bytes).map_err(|e| TextError::Template(e.to_string()))
    }

    /// The special tokens that there are; one that is not there is undefined, as in `transformers`.
    fn special_tokens(&self) -> Value {
        let tokens = [
            ("bos_token", &self.tokens.bos_token),
            ("eos_token", &self.tokens.eos_token),
            ("unk_token", &self.tokens.unk_token),
            ("pad_token", &self.tokens.pad_token),
        ];
        let set = tokens.into_iter().filter_map(|(name, token)| token.as_ref().map(|t| (name, t)));
        Value::from_iter(set.map(|(name, token)| (name, token.clone())))
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    environment.add_function("strftime_now", |format: String| {
        if format.len() > DATE_FORMAT_BYTES_MAX {
            let message = format!("strftime_now: expected at most {DATE_FORMAT_BYTES_MAX} bytes");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        Ok(strftime(&format, SystemTime::now()))
    });
    environment.add_filter("tojson", to_json);
    environment
}

fn raised(error: &Error) -> Option<String> {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref::<Raised>() {
            return Some(message.clone());
        }
        source = cause.source();
    }
    None
}

fn describe(error: &Error) -> String {
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    match error.detail() {
        Some(detail) => format!("{}: {detail}{line}", error.kind()),
        None => format!("{}{line}", error.kind()),
    }
}

/// A prompt while it is written; one that grows without end is refused.
struct Bounded {
    bytes: Vec<u8>,
    bytes_max: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + piece.len() > self.bytes_max {
            return Err(io::Error::other(format!(
                "the prompt is longer than {} bytes",
                self.bytes_max
            )));
        }
        self.bytes.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `{% generation %}` marks the assistant's text for training and changes nothing in a prompt.
fn plain_generation_blocks(source: &str) -> String {
    let mut plain = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        plain.push_str(before);
        rest = tag;
        let Some(end) = tag[2..].find("%}").map(|end| end + 2) else { break };
        let inside = &tag[2..end];
        let word = inside.trim_matches(['-', '+']).trim();
        let instead = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => word,
        };
        if instead == word {
            plain.push_str(&tag[..end + 2]);
        } else {
            plain.push_str(&format!("{{%{}%}}", inside.replace(word, &format!(" {instead} "))));
        }
        rest = &tag[end + 2..];
    }
    plain.push_str(rest);
    plain
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // `transformers` takes these too; the defaults are what templates ask for.
    for name in ["ensure_ascii", "sort_keys", "separators"] {
        let _: Option<Value> = options.get(name)?;
    }
    options.assert_all_used()?;
    let mut json = Vec::new();
    let written = match indent {
        Some(spaces) => {
            let indent = " ".repeat(spaces.min(16));
            let formatter = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, OneLine)),
    };
    written.map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    let json = String::from_utf8_lossy(&json).into_owned();
    Ok(Value::from_safe_string(json))
}

/// JSON as Python writes it on one line: a space after each comma and colon.
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Longest format of a date: no date is written with more, and each byte may become several.
const DATE_FORMAT_BYTES_MAX: usize = 1024;

/// Python's `strftime`, in UTC, for the directives that dates in prompts are written with; any other is
/// left as it is.
fn strftime(format: &str, time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let days = seconds / 86_400;
    let (year, month, day) = civil_date(days);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (month_name, weekday) = (MONTHS[month as usize - 1], WEEKDAYS[(days % 7) as usize]);
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => text.push_str(&year.to_string()),
            Some('y') => text.push_str(&format!("{:02}", year % 100)),
            Some('m') => text.push_str(&format!("{month:02}")),
            Some('d') => text.push_str(&format!("{day:02}")),
            Some('B') => text.push_str(month_name),
            Some('b') => text.push_str(&month_name[..3]),
            Some('A') => text.push_str(weekday),
            Some('a') => text.push_str(&weekday[..3]),
            Some('H') => text.push_str(&format!("{hour:02}")),
            Some('I') => text.push_str(&format!("{:02}", (hour + 11) % 12 + 1)),
            Some('p') => text.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('M') => text.push_str(&format!("{minute:02}")),
            Some('S') => text.push_str(&format!("{second:02}")),
            Some('%') => text.push('%'),
            Some(other) => text.extend(['%', other]),
            None => text.push('%'),
        }
    }
    text
}

/// Year, month and day of a number of days since 1970-01-01 (Howard Hinnant, "chrono-compatible
/// low-level date algorithms", `civil_from_days`).
fn civil_date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests;
