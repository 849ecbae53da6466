//! Errors on the wire: a small closed set of codes, and the one table that says what each looks
//! like over gRPC and HTTP, whether a retry may help and who is at fault.

use std::fmt;
use std::time::Duration;

use prost::Message;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

use crate::v1::ErrorDetail;

/// The trailer that carries an [`ErrorDetail`] on every failed call.
pub const ERROR_TRAILER: &str = "headstart-error-bin";

/// Longest message that is sent or taken over, in bytes; longer ones are cut.
pub const MESSAGE_BYTES_MAX: usize = 1024;

/// Longest trailer that is looked at, in bytes.
const TRAILER_BYTES_MAX: usize = 4096;

/// Longest retry hint that is believed.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);

/// What went wrong, as far as a caller can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ErrorCode {
    /// A field is missing, malformed or out of its range.
    InvalidArgument,
    /// A field or value is understood and not offered.
    Unsupported,
    /// The prompt, or the prompt and what was asked for, is longer than the context.
    ContextTooLong,
    /// The body or message is larger than is accepted.
    TooLarge,
    /// No such base model.
    UnknownModel,
    /// No such drafter.
    UnknownDrafter,
    /// No such path, method, tokenizer or request.
    NotFound,
    /// The two ends disagree about a tokenizer or a model.
    Mismatch,
    /// A frame of an older attempt.
    StaleEpoch,
    /// A frame that the protocol does not allow here: a gap, another request's, out of order.
    Protocol,
    /// The caller's API key is missing or not known.
    Unauthenticated,
    /// The caller read its answer so slowly that too much of it waited.
    SlowReader,
    /// Every queue and slot is taken.
    Overloaded,
    /// No drafter is up for this model.
    NoDrafter,
    /// No base is up for this model.
    NoBase,
    /// The node is going away and takes no new work.
    Draining,
    /// The node, or one behind it, cannot be reached or went away.
    Unavailable,
    /// A deadline passed.
    DeadlineExceeded,
    /// The caller went away.
    Cancelled,
    /// A defect or a broken device.
    Internal,
}

/// One row of the table of errors.
struct Facts {
    code: &'static str,
    http: u16,
    grpc: Code,
    retryable: bool,
    client_fault: bool,
}

impl ErrorCode {
    /// Every code.
    pub const ALL: [Self; 20] = [
        Self::InvalidArgument,
        Self::Unsupported,
        Self::ContextTooLong,
        Self::TooLarge,
        Self::UnknownModel,
        Self::UnknownDrafter,
        Self::NotFound,
        Self::Mismatch,
        Self::StaleEpoch,
        Self::Protocol,
        Self::Unauthenticated,
        Self::SlowReader,
        Self::Overloaded,
        Self::NoDrafter,
        Self::NoBase,
        Self::Draining,
        Self::Unavailable,
        Self::DeadlineExceeded,
        Self::Cancelled,
        Self::Internal,
    ];

    /// The table. Everything else here reads it.
    #[rustfmt::skip]
    const fn facts(self) -> Facts {
        const fn row(
            code: &'static str, http: u16, grpc: Code, retryable: bool, client_fault: bool,
        ) -> Facts {
            Facts { code, http, grpc, retryable, client_fault }
        }
        match self {
            //                                code               http  grpc                      retry  client
            Self::InvalidArgument  => row("invalid_argument",   400, Code::InvalidArgument,    false, true),
            Self::Unsupported      => row("unsupported",        400, Code::InvalidArgument,    false, true),
            Self::ContextTooLong   => row("context_too_long",   400, Code::InvalidArgument,    false, true),
            Self::TooLarge         => row("too_large",          413, Code::OutOfRange,         false, true),
            Self::UnknownModel     => row("unknown_model",      404, Code::NotFound,           false, true),
            Self::UnknownDrafter   => row("unknown_drafter",    404, Code::NotFound,           false, true),
            Self::NotFound         => row("not_found",          404, Code::NotFound,           false, true),
            Self::Mismatch         => row("mismatch",           409, Code::FailedPrecondition, false, false),
            Self::StaleEpoch       => row("stale_epoch",        409, Code::Aborted,            false, false),
            Self::Protocol         => row("protocol",           502, Code::DataLoss,           true,  false),
            Self::Unauthenticated  => row("unauthenticated",    401, Code::Unauthenticated,    false, true),
            Self::SlowReader       => row("slow_reader",        408, Code::Aborted,            false, true),
            Self::Overloaded       => row("overloaded",         429, Code::ResourceExhausted,  true,  false),
            Self::NoDrafter        => row("no_drafter",         503, Code::Unavailable,        true,  false),
            Self::NoBase           => row("no_base",            503, Code::Unavailable,        true,  false),
            Self::Draining         => row("draining",           503, Code::Unavailable,        true,  false),
            Self::Unavailable      => row("unavailable",        503, Code::Unavailable,        true,  false),
            Self::DeadlineExceeded => row("deadline_exceeded",  504, Code::DeadlineExceeded,   true,  false),
            Self::Cancelled        => row("cancelled",          499, Code::Cancelled,          false, true),
            Self::Internal         => row("internal",           500, Code::Internal,           false, false),
        }
    }

    /// The stable name, in snake case.
    pub const fn code(self) -> &'static str {
        self.facts().code
    }

    /// The code with this name.
    pub fn from_code(code: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.code() == code)
    }

    /// The HTTP status.
    pub const fn http_status(self) -> u16 {
        self.facts().http
    }

    /// The gRPC status.
    pub const fn grpc_code(self) -> Code {
        self.facts().grpc
    }

    /// The same request may succeed later or elsewhere.
    pub const fn retryable(self) -> bool {
        self.facts().retryable
    }

    /// The caller must change the request.
    pub const fn client_fault(self) -> bool {
        self.facts().client_fault
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

/// A typed error, as it crosses every edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What went wrong.
    pub code: ErrorCode,
    /// For people: what was expected and what was found.
    pub message: String,
    /// The request field at fault.
    pub field: Option<String>,
    /// When a retry may succeed.
    pub retry_after: Option<Duration>,
}

impl Error {
    /// An error; those of overload and absence hint at a retry after one second.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let hint = matches!(code.http_status(), 429 | 503).then_some(Duration::from_secs(1));
        Self { code, message: message.into(), field: None, retry_after: hint }
    }

    /// [`ErrorCode::InvalidArgument`] in `field`.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidArgument, message).with_field(field)
    }

    /// [`ErrorCode::Internal`].
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal, message)
    }

    /// [`ErrorCode::Unavailable`].
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Unavailable, message)
    }

    /// Names the request field at fault.
    #[must_use]
    pub fn with_field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }

    /// Says when a retry may succeed.
    #[must_use]
    pub fn with_retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// The HTTP `Retry-After` value, in whole seconds rounded up and at least 1.
    pub fn retry_after_secs(&self) -> Option<u64> {
        let after = self.retry_after?;
        Some((after.as_secs() + u64::from(after.subsec_nanos() > 0)).max(1))
    }

    /// Reads the error behind a gRPC status: its trailer where it has a sound one, else what the
    /// status itself says. A connection that broke is [`ErrorCode::Unavailable`], whatever its code.
    pub fn from_status(status: &Status) -> Self {
        if let Some(detail) = read_trailer(status) {
            return detail;
        }
        let broken = std::error::Error::source(status).is_some();
        let code = match status.code() {
            _ if broken => ErrorCode::Unavailable,
            Code::InvalidArgument => ErrorCode::InvalidArgument,
            Code::Unimplemented => ErrorCode::Unsupported,
            Code::OutOfRange => ErrorCode::TooLarge,
            Code::NotFound => ErrorCode::NotFound,
            Code::FailedPrecondition => ErrorCode::Mismatch,
            Code::Aborted => ErrorCode::StaleEpoch,
            Code::DataLoss => ErrorCode::Protocol,
            Code::ResourceExhausted => ErrorCode::Overloaded,
            Code::Unauthenticated => ErrorCode::Unauthenticated,
            Code::Unavailable => ErrorCode::Unavailable,
            Code::DeadlineExceeded => ErrorCode::DeadlineExceeded,
            Code::Cancelled => ErrorCode::Cancelled,
            _ => ErrorCode::Internal,
        };
        let message = match status.message() {
            "" => format!("gRPC status {:?}", status.code()),
            message => cut(message).to_owned(),
        };
        Self::new(code, message)
    }
}

/// The longest prefix of `text` of at most [`MESSAGE_BYTES_MAX`] bytes.
fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(MESSAGE_BYTES_MAX)]
}

fn read_trailer(status: &Status) -> Option<Error> {
    let value = status.metadata().get_bin(ERROR_TRAILER)?;
    if value.as_encoded_bytes().len() > TRAILER_BYTES_MAX * 2 {
        return None;
    }
    let detail = ErrorDetail::decode(value.to_bytes().ok()?).ok()?;
    let code = ErrorCode::from_code(&detail.code)?;
    let retry_after =
        detail.retry_after_ms.map(|ms| Duration::from_millis(ms.into()).min(RETRY_AFTER_MAX));
    Some(Error {
        code,
        message: cut(&detail.message).to_owned(),
        field: detail.field.map(|field| cut(&field).to_owned()),
        retry_after,
    })
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

impl std::error::Error for Error {}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let detail = ErrorDetail {
            code: error.code.code().to_owned(),
            message: cut(&error.message).to_owned(),
            field: error.field.as_deref().map(|field| cut(field).to_owned()),
            retry_after_ms: error
                .retry_after
                .map(|after| u32::try_from(after.as_millis()).unwrap_or(u32::MAX)),
        };
        let mut status = Self::new(error.code.grpc_code(), detail.message.clone());
        let value = MetadataValue::from_bytes(&detail.encode_to_vec());
        status.metadata_mut().insert_bin(ERROR_TRAILER, value);
        status
    }
}

impl From<&Status> for Error {
    fn from(status: &Status) -> Self {
        Self::from_status(status)
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Self::from_status(&status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_distinct_snake_case_names_and_sound_facts() {
        for code in ErrorCode::ALL {
            assert_eq!(ErrorCode::from_code(code.code()), Some(code));
            assert!(code.code().bytes().all(|b| b.is_ascii_lowercase() || b == b'_'));
            assert!((400..600).contains(&code.http_status()));
            assert_ne!(code.grpc_code(), Code::Ok);
            assert!(!(code.retryable() && code.client_fault()), "{code}");
        }
        assert_eq!(ErrorCode::from_code("nonsense"), None);
    }

    #[test]
    fn errors_round_trip_through_a_status() {
        for code in ErrorCode::ALL {
            let error = Error::new(code, "temperature: expected 0 to 2, found -1 – ünïcode")
                .with_field("temperature")
                .with_retry_after(Duration::from_millis(1500));
            let status = Status::from(error.clone());
            assert_eq!(status.code(), code.grpc_code());
            assert_eq!(status.message(), error.message);
            assert_eq!(Error::from_status(&status), error);
        }
    }

    #[test]
    fn overload_and_absence_always_carry_a_hint() {
        assert_eq!(Error::new(ErrorCode::NoDrafter, "").retry_after_secs(), Some(1));
        assert_eq!(Error::new(ErrorCode::Overloaded, "").retry_after_secs(), Some(1));
        assert_eq!(Error::new(ErrorCode::Internal, "").retry_after_secs(), None);
        let late = Error::internal("").with_retry_after(Duration::from_millis(2001));
        assert_eq!(late.retry_after_secs(), Some(3));
    }

    #[test]
    fn foreign_statuses_map_by_their_code() {
        let cases = [
            (Code::Unavailable, ErrorCode::Unavailable),
            (Code::ResourceExhausted, ErrorCode::Overloaded),
            (Code::InvalidArgument, ErrorCode::InvalidArgument),
            (Code::Unknown, ErrorCode::Internal),
            (Code::Unimplemented, ErrorCode::Unsupported),
        ];
        for (grpc, code) in cases {
            assert_eq!(Error::from_status(&Status::new(grpc, "m")).code, code);
        }
        assert!(!Error::from_status(&Status::new(Code::Internal, "")).message.is_empty());
    }

    #[test]
    fn a_broken_connection_is_unavailable() {
        let broken = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        let status = Status::from_error(Box::new(broken));
        assert_eq!(Error::from_status(&status).code, ErrorCode::Unavailable);
    }

    #[test]
    fn a_hostile_trailer_is_ignored_or_cut() {
        let with = |bytes: &[u8]| {
            let mut status = Status::new(Code::NotFound, "plain");
            status.metadata_mut().insert_bin(ERROR_TRAILER, MetadataValue::from_bytes(bytes));
            Error::from_status(&status)
        };
        assert_eq!(with(b"\xff\xff\xff").code, ErrorCode::NotFound);
        assert_eq!(with(&[0x12, 0xff, 0xff, 0xff, 0xff, 0x0f]).message, "plain");
        let unknown = ErrorDetail { code: "new_code".into(), ..ErrorDetail::default() };
        assert_eq!(with(&unknown.encode_to_vec()).code, ErrorCode::NotFound);
        let long = ErrorDetail {
            code: "internal".into(),
            message: "é".repeat(900),
            retry_after_ms: Some(u32::MAX),
            field: None,
        };
        let error = with(&long.encode_to_vec());
        assert!(error.message.len() <= MESSAGE_BYTES_MAX);
        assert_eq!(error.retry_after, Some(RETRY_AFTER_MAX));
        let huge = ErrorDetail { message: "x".repeat(100_000), ..long };
        assert_eq!(with(&huge.encode_to_vec()).message, "plain");
    }

    #[test]
    fn a_long_message_is_cut_before_it_is_sent() {
        let status = Status::from(Error::internal("ä".repeat(5000)));
        assert!(status.message().len() <= MESSAGE_BYTES_MAX);
        assert_eq!(Error::from_status(&status).code, ErrorCode::Internal);
    }
}
