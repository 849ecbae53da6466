//! The ids that travel in every frame, checked once at the edge.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorCode};

/// A string or number is not a valid id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind}: expected {expected}, found {found}")]
pub struct IdError {
    /// The id's kind, as the wire names it: `request_id`, `node_id`, `epoch`, `position`.
    pub kind: &'static str,
    /// What a valid id looks like.
    pub expected: &'static str,
    /// What was there (shortened).
    pub found: String,
}

impl IdError {
    fn new(kind: &'static str, expected: &'static str, found: &str) -> Self {
        let mut found = format!("{:?}", found.chars().take(80).collect::<String>());
        found.shrink_to_fit();
        Self { kind, expected, found }
    }
}

impl From<IdError> for Error {
    fn from(error: IdError) -> Self {
        Self::new(ErrorCode::InvalidArgument, error.to_string()).with_field(error.kind)
    }
}

/// Longest request or node id, in bytes.
pub const ID_BYTES_MAX: usize = 64;

fn is_id(text: &str) -> bool {
    let bytes = text.as_bytes();
    let plain = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':');
    (1..=ID_BYTES_MAX).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes.iter().all(plain)
}

macro_rules! string_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        ///
        /// One to 64 ASCII letters, digits, `-`, `_`, `.` or `:`, starting with a letter or digit.
        /// Cheap to clone.
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks `text`.
            ///
            /// # Errors
            /// [`IdError`] when it is not a valid id.
            pub fn new(text: &str) -> Result<Self, IdError> {
                if is_id(text) {
                    Ok(Self(text.into()))
                } else {
                    Err(IdError::new(
                        $kind,
                        "1 to 64 letters, digits, '-', '_', '.' or ':', first a letter or digit",
                        text,
                    ))
                }
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                Self::new(&text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0.as_ref().to_owned()
            }
        }
    };
}

string_id!(
    /// One request of one client, through all its attempts.
    RequestId,
    "request_id"
);
string_id!(
    /// One node of the cluster; it survives the node's restarts.
    NodeId,
    "node_id"
);

impl RequestId {
    /// A new id that sorts by the time it was made (UUID version 7).
    pub fn generate() -> Self {
        Self(uuid::Uuid::now_v7().to_string().into())
    }
}

/// An attempt at a request: it grows with every retry, and frames of an older one are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Epoch(u64);

impl Epoch {
    /// The first attempt.
    pub const FIRST: Self = Self(1);

    /// Checks a number from the wire, where 0 means that the field was left out.
    ///
    /// # Errors
    /// [`IdError`] for 0.
    pub fn new(number: u64) -> Result<Self, IdError> {
        if number == 0 {
            return Err(IdError::new("epoch", "a number from 1", "0"));
        }
        Ok(Self(number))
    }

    /// The number on the wire.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The next attempt.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Epoch {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let number = text.parse().map_err(|_| IdError::new("epoch", "a number from 1", text))?;
        Self::new(number)
    }
}

impl TryFrom<u64> for Epoch {
    type Error = IdError;
    fn try_from(number: u64) -> Result<Self, IdError> {
        Self::new(number)
    }
}

impl From<Epoch> for u64 {
    fn from(epoch: Epoch) -> Self {
        epoch.0
    }
}

/// The index of a token in a draft or an answer, counted from 0.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Position(u32);

impl Position {
    /// The first token.
    pub const ZERO: Self = Self(0);

    /// A position from the wire.
    pub const fn new(index: u32) -> Self {
        Self(index)
    }

    /// The number on the wire.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The position `tokens` further on, or `None` past `u32::MAX`.
    pub fn checked_add(self, tokens: usize) -> Option<Self> {
        u32::try_from(tokens).ok().and_then(|tokens| self.0.checked_add(tokens)).map(Self)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Position {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        text.parse().map(Self).map_err(|_| IdError::new("position", "a number from 0", text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn string_ids_round_trip(text in "[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}") {
            let request: RequestId = text.parse().unwrap();
            prop_assert_eq!(request.to_string(), text.as_str());
            let node: NodeId = text.parse().unwrap();
            prop_assert_eq!(node.to_string().parse::<NodeId>().unwrap(), node);
        }

        #[test]
        fn any_text_is_taken_whole_or_refused(text in ".{0,80}") {
            if let Ok(id) = RequestId::new(&text) {
                prop_assert_eq!(id.as_str(), text.as_str());
                prop_assert!(text.is_ascii() && text.len() <= ID_BYTES_MAX && !text.contains('/'));
            }
        }

        #[test]
        fn numbers_round_trip(number: u64, index: u32) {
            prop_assert_eq!(Epoch::new(number).is_ok(), number != 0);
            if let Ok(epoch) = Epoch::new(number) {
                prop_assert_eq!(epoch.to_string().parse::<Epoch>().unwrap(), epoch);
            }
            let position = Position::new(index);
            prop_assert_eq!(position.to_string().parse::<Position>().unwrap(), position);
        }
    }

    #[test]
    fn bad_ids_are_refused_by_name() {
        for text in ["", "-a", "a/b", "a b", "é", &"x".repeat(65)] {
            let error = RequestId::new(text).unwrap_err();
            assert_eq!(error.kind, "request_id", "{text:?}");
        }
        assert_eq!("0".parse::<Epoch>().unwrap_err().kind, "epoch");
        assert_eq!("-1".parse::<Position>().unwrap_err().kind, "position");
        let error = Error::from(NodeId::new("a b").unwrap_err());
        assert_eq!(error.field.as_deref(), Some("node_id"));
    }

    #[test]
    fn positions_and_epochs_do_not_overflow() {
        assert_eq!(Position::new(u32::MAX).checked_add(1), None);
        assert_eq!(Position::new(2).checked_add(3), Some(Position::new(5)));
        assert_eq!(Epoch::new(u64::MAX).unwrap().next().get(), u64::MAX);
        assert!(Epoch::FIRST.next() > Epoch::FIRST);
    }

    #[test]
    fn generated_request_ids_are_valid_and_distinct() {
        let (a, b) = (RequestId::generate(), RequestId::generate());
        assert_ne!(a, b);
        assert_eq!(RequestId::new(a.as_str()).unwrap(), a);
    }
}
