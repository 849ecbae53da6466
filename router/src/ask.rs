//! What a client asks for, checked: the one shape that both doors (HTTP and gRPC) hand to the core.

use headstart_proto::Error;
use headstart_text::Message;

use crate::admission::Class;

/// The header, or gRPC metadata, that says how soon a request is wanted.
pub(crate) const PRIORITY_HEADER: &str = "x-headstart-priority";
/// Most answers one request may ask for.
pub(crate) const CHOICES_MAX: u32 = 16;
/// Most stop strings one request may name.
pub(crate) const STOP_STRINGS_MAX: usize = 16;
/// Longest stop string, in bytes.
pub(crate) const STOP_BYTES_MAX: usize = 1024;
/// Most alternatives a request may see at each position.
pub(crate) const TOP_LOGPROBS_MAX: u32 = 20;
/// Widest window of the switch rule, in base tokens.
pub(crate) const WINDOW_MAX: u32 = 4096;
/// Longest draft a request may allow, in the drafter's tokens.
pub(crate) const DRAFT_TOKENS_MAX: u32 = 1_000_000;
/// Longest model or drafter name, in bytes.
pub(crate) const NAME_BYTES_MAX: usize = 256;

/// One checked request. Every number is finite and in its range; the lengths that depend on a
/// model (prompt, `max_tokens`) are checked once the model is known.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Ask {
    /// A base's name, or `base@drafter`.
    pub(crate) model: String,
    /// The drafter named beside the model name.
    pub(crate) drafter: Option<String>,
    /// The conversation, never empty, no message empty.
    pub(crate) messages: Vec<Message>,
    /// Tokens of the answer, at least 1; unset: what the context leaves.
    pub(crate) max_tokens: Option<u32>,
    /// How the base samples.
    pub(crate) sampling: SamplingParams,
    /// The client's stop strings, none empty.
    pub(crate) stop: Vec<String>,
    /// Answers wanted, 1 to [`CHOICES_MAX`].
    pub(crate) choices: u32,
    /// Set: log-probabilities are wanted, with so many alternatives.
    pub(crate) top_logprobs: Option<u32>,
    /// The switch rule's window, in base tokens.
    pub(crate) window: Option<u32>,
    /// The switch rule's threshold, in (0, 1].
    pub(crate) threshold: Option<f32>,
    /// Longest draft, in the drafter's tokens.
    pub(crate) draft_tokens_max: Option<u32>,
    /// How soon it is wanted; unset: as the request's header says, or interactive.
    pub(crate) class: Option<Class>,
}

/// How the base samples the continuation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct SamplingParams {
    /// 0 = greedy, up to 2.
    pub(crate) temperature: f32,
    /// Nucleus, (0, 1].
    pub(crate) top_p: f32,
    /// Most likely tokens kept; 0 = off.
    pub(crate) top_k: u32,
    /// Least share of the most likely token's probability, [0, 1].
    pub(crate) min_p: f32,
    /// Seed of the counter-based generator; unset: the router draws one.
    pub(crate) seed: Option<u64>,
    /// [-2, 2].
    pub(crate) presence_penalty: f32,
    /// [-2, 2].
    pub(crate) frequency_penalty: f32,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: None,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
        }
    }
}

/// The range of a real-valued field.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RealRange {
    low: f32,
    low_open: bool,
    high: f32,
    text: &'static str,
}

/// `temperature`.
pub(crate) const TEMPERATURE: RealRange =
    RealRange { low: 0.0, low_open: false, high: 2.0, text: "a number from 0 to 2" };
/// `top_p` and `threshold`.
pub(crate) const ABOVE_ZERO_TO_ONE: RealRange =
    RealRange { low: 0.0, low_open: true, high: 1.0, text: "a number above 0 and at most 1" };
/// `min_p`.
pub(crate) const ZERO_TO_ONE: RealRange =
    RealRange { low: 0.0, low_open: false, high: 1.0, text: "a number from 0 to 1" };
/// `presence_penalty` and `frequency_penalty`.
pub(crate) const PENALTY: RealRange =
    RealRange { low: -2.0, low_open: false, high: 2.0, text: "a number from -2 to 2" };

impl RealRange {
    /// What the range allows, in words.
    pub(crate) const fn text(&self) -> &'static str {
        self.text
    }

    /// Takes `value` when it is finite and in range.
    ///
    /// # Errors
    /// Invalid argument that names `field`, the range and the value.
    pub(crate) fn check(&self, field: &str, value: f64) -> Result<f32, Error> {
        #[allow(clippy::cast_possible_truncation)] // rounding to the wire's precision is meant
        let rounded = value as f32;
        let above = if self.low_open { rounded > self.low } else { rounded >= self.low };
        if above && value >= f64::from(self.low) && value <= f64::from(self.high) {
            return Ok(rounded);
        }
        Err(Error::invalid(field, format!("{field} must be {}, found {value}", self.text)))
    }
}

/// Takes `value` when it lies in `low..=high`.
///
/// # Errors
/// Invalid argument that names `field`, the range and the value.
pub(crate) fn check_integer(
    field: &str,
    value: i128,
    low: i128,
    high: i128,
) -> Result<i128, Error> {
    if (low..=high).contains(&value) {
        return Ok(value);
    }
    let message = format!("{field} must be an integer from {low} to {high}, found {value}");
    Err(Error::invalid(field, message))
}

/// Checks the number of stop strings and each one's length.
///
/// # Errors
/// Invalid argument in `stop`.
pub(crate) fn check_stop(stop: &[String]) -> Result<(), Error> {
    let expected =
        format!("stop must be at most {STOP_STRINGS_MAX} strings of 1 to {STOP_BYTES_MAX} bytes");
    if stop.len() > STOP_STRINGS_MAX {
        return Err(Error::invalid("stop", format!("{expected}, found {} strings", stop.len())));
    }
    for (index, text) in stop.iter().enumerate() {
        if text.is_empty() || text.len() > STOP_BYTES_MAX {
            let found = format!("{expected}, found {} bytes in stop[{index}]", text.len());
            return Err(Error::invalid("stop", found));
        }
    }
    Ok(())
}

/// Checks a model's or drafter's name.
///
/// # Errors
/// Invalid argument in `field`.
pub(crate) fn check_name(field: &str, name: &str) -> Result<(), Error> {
    if (1..=NAME_BYTES_MAX).contains(&name.len()) {
        return Ok(());
    }
    let message =
        format!("{field} must be a name of 1 to {NAME_BYTES_MAX} bytes, found {}", name.len());
    Err(Error::invalid(field, message))
}

/// Reads a priority's name.
///
/// # Errors
/// Invalid argument in `field`.
pub(crate) fn check_priority(field: &str, name: &str) -> Result<Class, Error> {
    Class::from_name(name).ok_or_else(|| {
        let shown = &name[..name.floor_char_boundary(80)];
        Error::invalid(field, format!("{field} must be interactive or batch, found {shown:?}"))
    })
}

/// Checks one message's text.
///
/// # Errors
/// Invalid argument in `messages` for text that is empty or only white space.
pub(crate) fn check_content(index: usize, content: &str) -> Result<(), Error> {
    if content.trim().is_empty() {
        let message = format!("messages[{index}].content must not be empty");
        return Err(Error::invalid("messages", message));
    }
    Ok(())
}

/// Checks that there is a conversation.
///
/// # Errors
/// Invalid argument in `messages` when there is none.
pub(crate) fn check_messages(messages: &[Message]) -> Result<(), Error> {
    if messages.is_empty() {
        return Err(Error::invalid("messages", "messages must hold at least one message"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_take_their_ends_and_refuse_the_rest() {
        let cases: [(&RealRange, f64, bool); 14] = [
            (&TEMPERATURE, 0.0, true),
            (&TEMPERATURE, 2.0, true),
            (&TEMPERATURE, -0.001, false),
            (&TEMPERATURE, 2.001, false),
            (&TEMPERATURE, f64::NAN, false),
            (&TEMPERATURE, f64::INFINITY, false),
            (&TEMPERATURE, 1e300, false),
            (&ABOVE_ZERO_TO_ONE, 0.0, false),
            (&ABOVE_ZERO_TO_ONE, 1e-300, false),
            (&ABOVE_ZERO_TO_ONE, 1e-6, true),
            (&ABOVE_ZERO_TO_ONE, 1.0, true),
            (&ABOVE_ZERO_TO_ONE, 1.000_001, false),
            (&PENALTY, -2.0, true),
            (&PENALTY, f64::NEG_INFINITY, false),
        ];
        for (range, value, fits) in cases {
            let checked = range.check("field", value);
            assert_eq!(checked.is_ok(), fits, "{value} in {}", range.text());
            if let Err(error) = checked {
                assert_eq!(error.field.as_deref(), Some("field"));
                assert!(error.message.contains(range.text()), "{}", error.message);
            }
        }
    }

    #[test]
    fn stops_are_bounded() {
        assert!(check_stop(&vec!["x".to_owned(); 16]).is_ok());
        assert!(check_stop(&vec!["x".to_owned(); 17]).is_err());
        assert!(check_stop(&[String::new()]).is_err());
        assert!(check_stop(&["x".repeat(STOP_BYTES_MAX + 1)]).is_err());
    }
}
