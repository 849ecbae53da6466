//! Conversions between wire types and the engine's that both tiers need.

use headstart_engine::{Limits, Sampling, SubmitError};
use headstart_proto::v1;
use headstart_proto::{Error, ErrorCode};

/// Valid sampling parameters; what is not set takes its default, the temperature the given one.
///
/// # Errors
/// An error that names the field and what was expected.
pub fn sampling(wire: &v1::Sampling, temperature: f32) -> Result<Sampling, Error> {
    let within = |field: &str, value: Option<f32>, default: f32, low: f32, high: f32| {
        let value = value.unwrap_or(default);
        if (low..=high).contains(&value) {
            return Ok(value);
        }
        let message = format!("expected a number from {low} to {high}, found {value}");
        Err(Error::invalid(format!("sampling.{field}"), message))
    };
    Ok(Sampling {
        temperature: within("temperature", wire.temperature, temperature, 0.0, 100.0)?,
        top_p: within("top_p", wire.top_p, 1.0, f32::MIN_POSITIVE, 1.0)?,
        top_k: wire.top_k.unwrap_or(0) as usize,
        min_p: within("min_p", wire.min_p, 0.0, 0.0, 1.0)?,
        seed: wire.seed.unwrap_or(0),
        presence_penalty: within("presence_penalty", wire.presence_penalty, 0.0, -2.0, 2.0)?,
        frequency_penalty: within("frequency_penalty", wire.frequency_penalty, 0.0, -2.0, 2.0)?,
    })
}

/// Checks a prompt against the model's vocabulary.
///
/// # Errors
/// An error that names `prompt_ids`.
pub fn prompt(ids: Vec<u32>, limits: Limits) -> Result<Vec<u32>, Error> {
    if ids.is_empty() {
        return Err(Error::invalid("prompt_ids", "expected at least one id"));
    }
    match ids.iter().find(|&&id| id as usize >= limits.vocab_size) {
        Some(bad) => {
            let message = format!("expected ids below {}, found {bad}", limits.vocab_size);
            Err(Error::invalid("prompt_ids", message))
        }
        None => Ok(ids),
    }
}

/// Why the engine did not take a request.
#[must_use]
pub fn refused(error: SubmitError) -> Error {
    match error {
        SubmitError::Full { .. } => Error::new(ErrorCode::Overloaded, error.to_string()),
        SubmitError::Invalid { field, message } => Error::invalid(field, message),
        SubmitError::Stopped => Error::unavailable(error.to_string()),
    }
}

/// A step failed. An engine that is of no further use leaves with its node: another node may answer.
#[must_use]
pub fn failed(message: &str, fatal: bool) -> Error {
    match fatal {
        true => Error::unavailable(message),
        false => Error::internal(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_sampling_is_named() {
        let some = Some;
        let cases = [
            ("temperature", v1::Sampling { temperature: some(f32::NAN), ..Default::default() }),
            (
                "temperature",
                v1::Sampling { temperature: some(f32::INFINITY), ..Default::default() },
            ),
            ("top_p", v1::Sampling { top_p: some(0.0), ..Default::default() }),
            ("min_p", v1::Sampling { min_p: some(-0.1), ..Default::default() }),
            (
                "presence_penalty",
                v1::Sampling { presence_penalty: some(2.5), ..Default::default() },
            ),
            (
                "frequency_penalty",
                v1::Sampling { frequency_penalty: some(-3.0), ..Default::default() },
            ),
        ];
        for (field, wire) in cases {
            let error = sampling(&wire, 1.0).expect_err(field);
            assert_eq!(error.field, Some(format!("sampling.{field}")));
        }
        let default = sampling(&v1::Sampling::default(), 0.5).expect("valid");
        assert_eq!((default.temperature, default.top_p, default.top_k), (0.5, 1.0, 0));
    }
}
