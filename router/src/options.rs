//! What an operator may set about the router.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use headstart_proto::v1;
use headstart_service::channel::KeepAlive;
use headstart_service::net::Dialer;
use serde::Deserialize;

use crate::admission::ApiKeys;
use crate::ask::{ABOVE_ZERO_TO_ONE, DRAFT_TOKENS_MAX, TEMPERATURE, WINDOW_MAX};

/// How drafts travel from drafters to bases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Encoding {
    /// As token ids between equal tokenizers, else as text.
    #[default]
    Auto,
    /// As token ids; a drafter with another tokenizer than the base's is never used.
    Ids,
    /// As text, always.
    Text,
}

/// What happens to a request when no drafter is up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum OnNoDrafter {
    /// It is refused (503): no answer goes out that no drafter began.
    #[default]
    Reject,
    /// The base answers alone, unaligned, also after an empty draft.
    BaseOnly,
}

/// What happens to a request when no base is up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum OnNoBase {
    /// It is refused (503).
    #[default]
    Reject,
    /// The drafter answers alone. Not offered by this version: refused when the options are checked.
    DrafterOnly,
}

/// What happens when a draft ends by itself before the switch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum OnDraftComplete {
    /// The base goes on from the whole draft.
    #[default]
    Continue,
    /// The draft is the answer.
    Finish,
}

impl FromStr for Encoding {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "auto" => Ok(Self::Auto),
            "ids" => Ok(Self::Ids),
            "text" => Ok(Self::Text),
            _ => Err(format!("encoding must be auto, ids or text, found {name:?}")),
        }
    }
}

impl OnDraftComplete {
    /// As the base is told.
    pub(crate) const fn wire(self) -> v1::OnDraftComplete {
        match self {
            Self::Continue => v1::OnDraftComplete::Continue,
            Self::Finish => v1::OnDraftComplete::Finish,
        }
    }
}

/// Everything the router can be told, with defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterOptions {
    /// Default window of the switch rule, in base tokens.
    pub window: u32,
    /// Default threshold of the switch rule, in (0, 1].
    pub threshold: f32,
    /// Default for the longest draft, in the drafter's tokens.
    pub draft_tokens_max: u32,
    /// The drafters' temperature; 0 = greedy.
    pub draft_temperature: f32,
    /// How drafts travel.
    pub encoding: Encoding,
    /// When no drafter is up.
    pub on_no_drafter: OnNoDrafter,
    /// When no base is up.
    pub on_no_base: OnNoBase,
    /// When a draft ends by itself.
    pub on_draft_complete: OnDraftComplete,
    /// Answers in flight at once, whatever the nodes could hold; more wait. A request with `n` counts
    /// `n` times.
    pub in_flight_max: u32,
    /// Requests that wait for a place; more are refused with 429.
    pub queue_requests_max: u32,
    /// Tokens of the requests that wait, prompts and answers; more are refused with 429.
    pub queue_tokens_max: u64,
    /// How long a request waits for a place at most.
    pub queue_timeout: Duration,
    /// Bytes of an answer that may wait for its reader; a slower one is cut off.
    pub reader_bytes_max: usize,
    /// How long a client's connection may take no byte of what is there for it.
    pub write_timeout: Duration,
    /// Who may ask, and whose share a request uses; `None`: everybody may.
    pub api_keys: Option<Arc<ApiKeys>>,
    /// HTTP connections open at once; more wait in the listener's backlog.
    pub connections_max: u32,
    /// Threads that carry HTTP requests, each with connections of its own to every node. 0: requests
    /// run on the runtime that the router is started on, and so do all where connections are not TCP's.
    pub http_threads: u32,
    /// Longest request body, in bytes.
    pub body_bytes_max: usize,
    /// Tokenizer bundles kept.
    pub texts_max: usize,
    /// Until a connection to a node stands.
    pub connect_timeout: Duration,
    /// How soon a node that is paused or cut off is found.
    pub keep_alive: KeepAlive,
    /// Until a request's body has been read, or a tokenizer has been fetched.
    pub read_timeout: Duration,
    /// From the start of an answer to its first frame.
    pub first_frame_timeout: Duration,
    /// Between two frames of an answer.
    pub frame_timeout: Duration,
    /// For an answer that a node's loss interrupted to go on elsewhere.
    pub resume_timeout: Duration,
    /// For a whole request.
    pub request_timeout: Duration,
    /// For live requests to finish after the router was told to stop.
    pub drain_timeout: Duration,
    /// What the router draws by itself (seeds of requests that name none, pauses) depends on this;
    /// unset, on nothing.
    pub chance_seed: Option<u64>,
    /// How nodes are reached.
    pub dialer: Dialer,
}

impl Default for RouterOptions {
    fn default() -> Self {
        Self {
            window: 6,
            threshold: 0.8,
            draft_tokens_max: 512,
            draft_temperature: 0.0,
            encoding: Encoding::Auto,
            on_no_drafter: OnNoDrafter::Reject,
            on_no_base: OnNoBase::Reject,
            on_draft_complete: OnDraftComplete::Continue,
            in_flight_max: 1024,
            queue_requests_max: 1024,
            queue_tokens_max: 2 << 20,
            queue_timeout: Duration::from_secs(10),
            reader_bytes_max: 1 << 20,
            write_timeout: Duration::from_secs(60),
            api_keys: None,
            connections_max: 8192,
            http_threads: 0,
            body_bytes_max: 4 << 20,
            texts_max: 32,
            connect_timeout: Duration::from_secs(3),
            keep_alive: KeepAlive::CLUSTER,
            read_timeout: Duration::from_secs(30),
            first_frame_timeout: Duration::from_secs(120),
            frame_timeout: Duration::from_secs(120),
            resume_timeout: Duration::from_secs(60),
            request_timeout: Duration::from_secs(1800),
            drain_timeout: Duration::from_secs(30),
            chance_seed: None,
            dialer: Dialer::default(),
        }
    }
}

/// Threads that carry HTTP requests where nobody says how many, at most: each has a connection to every
/// node, and one carries thousands of streams a second.
const HTTP_THREADS_DEFAULT_MAX: u32 = 8;

impl RouterOptions {
    /// How many threads carry HTTP requests in a router that has the machine for itself.
    #[must_use]
    pub fn http_threads_of_cores() -> u32 {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        u32::try_from(cores).unwrap_or(u32::MAX).min(HTTP_THREADS_DEFAULT_MAX)
    }

    /// Checks every value.
    ///
    /// # Errors
    /// A sentence that names the field, what it may be and what it is.
    pub fn validate(&self) -> Result<(), String> {
        ABOVE_ZERO_TO_ONE
            .check("threshold", self.threshold.into())
            .and_then(|_| TEMPERATURE.check("draft_temperature", self.draft_temperature.into()))
            .map_err(|error| error.message)?;
        integer("window", self.window.into(), 1, WINDOW_MAX.into())?;
        integer("draft_tokens_max", self.draft_tokens_max.into(), 1, DRAFT_TOKENS_MAX.into())?;
        integer("in_flight_max", self.in_flight_max.into(), 1, 1 << 20)?;
        integer("queue_requests_max", self.queue_requests_max.into(), 0, 1 << 20)?;
        integer("queue_tokens_max", self.queue_tokens_max, 1, 1 << 40)?;
        integer("reader_bytes_max", self.reader_bytes_max as u64, 4096, 1 << 30)?;
        integer("connections_max", self.connections_max.into(), 1, 1 << 20)?;
        integer("http_threads", self.http_threads.into(), 0, 256)?;
        integer("body_bytes_max", self.body_bytes_max as u64, 1024, 1 << 30)?;
        integer("texts_max", self.texts_max as u64, 2, 4096)?;
        let timeouts = [
            ("connect_timeout", self.connect_timeout),
            ("ping_interval", self.keep_alive.interval),
            ("ping_timeout", self.keep_alive.timeout),
            ("read_timeout", self.read_timeout),
            ("first_frame_timeout", self.first_frame_timeout),
            ("frame_timeout", self.frame_timeout),
            ("queue_timeout", self.queue_timeout),
            ("write_timeout", self.write_timeout),
            ("resume_timeout", self.resume_timeout),
            ("request_timeout", self.request_timeout),
        ];
        for (field, timeout) in timeouts {
            if timeout.is_zero() || timeout > Duration::from_secs(7 * 24 * 3600) {
                return Err(format!(
                    "{field} must be above 0 and at most 7 days, found {timeout:?}"
                ));
            }
        }
        if self.on_no_base == OnNoBase::DrafterOnly {
            return Err("on_no_base = drafter_only is not available: drafters stream to bases \
                        only, so an answer without a base cannot be served; use reject"
                .into());
        }
        Ok(())
    }
}

fn integer(field: &str, value: u64, low: u64, high: u64) -> Result<(), String> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(format!("{field} must be an integer from {low} to {high}, found {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_sound_and_bad_values_are_named() {
        let default = RouterOptions::default;
        assert_eq!(default().validate(), Ok(()));
        let cases = [
            ("window", RouterOptions { window: 0, ..default() }),
            ("threshold", RouterOptions { threshold: 1.5, ..default() }),
            ("threshold", RouterOptions { threshold: f32::NAN, ..default() }),
            ("draft_temperature", RouterOptions { draft_temperature: -1.0, ..default() }),
            ("draft_tokens_max", RouterOptions { draft_tokens_max: 0, ..default() }),
            ("in_flight_max", RouterOptions { in_flight_max: 0, ..default() }),
            ("body_bytes_max", RouterOptions { body_bytes_max: 0, ..default() }),
            ("queue_timeout", RouterOptions { queue_timeout: Duration::ZERO, ..default() }),
            ("queue_tokens_max", RouterOptions { queue_tokens_max: 0, ..default() }),
            ("reader_bytes_max", RouterOptions { reader_bytes_max: 1, ..default() }),
            ("frame_timeout", RouterOptions { frame_timeout: Duration::ZERO, ..default() }),
            ("on_no_base", RouterOptions { on_no_base: OnNoBase::DrafterOnly, ..default() }),
        ];
        for (field, options) in cases {
            let message = options.validate().unwrap_err();
            assert!(message.starts_with(field), "{field}: {message}");
        }
    }
}
