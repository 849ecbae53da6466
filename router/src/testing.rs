//! The router's parsers, for tests that feed them from outside.

use headstart_proto::{Epoch, Error, RequestId, v1};

use crate::ask::Ask;
use crate::frames::FrameGate;
use crate::openai::request::{Format, parse};

/// Parses the body of a chat completion.
///
/// # Errors
/// What the client would be told.
pub fn parse_chat(body: &[u8]) -> Result<(), Error> {
    parse(Format::Chat, body).map(drop)
}

/// Parses the body of a completion.
///
/// # Errors
/// What the client would be told.
pub fn parse_completion(body: &[u8]) -> Result<(), Error> {
    parse(Format::Completion, body).map(drop)
}

/// Checks a gRPC request.
///
/// # Errors
/// What the client would be told.
pub fn check_generate(request: v1::GenerateRequest) -> Result<(), Error> {
    Ask::try_from(request).map(drop)
}

/// Lets the frames of a base through the gate of request `r`, attempt 1.
///
/// # Errors
/// Why the base's stream would be given up.
pub fn admit_frames(frames: impl IntoIterator<Item = v1::ServeFrame>) -> Result<(), Error> {
    let policy = v1::DraftPolicy { window: 6, threshold: 0.8, ..v1::DraftPolicy::default() };
    let id = RequestId::new("r")?;
    let mut gate = FrameGate::new(id, Epoch::FIRST, 64, Some(&policy), true);
    for frame in frames {
        gate.admit(frame)?;
    }
    Ok(())
}
