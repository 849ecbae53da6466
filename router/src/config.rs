//! The command line, environment and file of `headstart-router`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser};
use headstart_service::channel::KeepAlive;
use headstart_service::config::{CommonOptions, ConfigError, duration};

use crate::admission::ApiKeys;
use crate::options::{Encoding, OnDraftComplete, OnNoBase, OnNoDrafter, RouterOptions};

/// The front door of a Headstart cluster: OpenAI-compatible HTTP, and gRPC
#[derive(Clone, Debug, Parser)]
#[command(name = "headstart-router", version)]
pub struct RouterConfig {
    /// Options of every binary.
    #[command(flatten)]
    pub common: CommonOptions,
    /// Where HTTP is served
    #[arg(long, env = "HEADSTART_HTTP", value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    pub http: SocketAddr,
    /// Where gRPC is served
    #[arg(long, env = "HEADSTART_GRPC", value_name = "ADDRESS", default_value = "127.0.0.1:50051")]
    pub grpc: SocketAddr,
    /// etcd endpoints, separated by commas
    #[arg(
        long,
        env = "HEADSTART_ETCD",
        value_name = "ENDPOINTS",
        value_delimiter = ',',
        default_value = "127.0.0.1:2379"
    )]
    pub etcd: Vec<String>,
    /// How long etcd may take to answer
    #[arg(long, env = "HEADSTART_ETCD_TIMEOUT", value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub etcd_timeout: Duration,
    /// The cluster's name: nodes and routers of the same name find each other
    #[arg(long, env = "HEADSTART_CLUSTER", value_name = "NAME", default_value = "default")]
    pub cluster: String,
    /// Threads that carry HTTP requests, each with connections of its own to every node [default: one a
    /// core, at most 8]
    #[arg(long, env = "HEADSTART_HTTP_THREADS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub http_threads: Option<u32>,
    /// What the router does.
    #[command(flatten)]
    pub router: RouterFlags,
}

impl RouterConfig {
    /// The router's options, checked.
    ///
    /// # Errors
    /// A value out of its range, named.
    pub fn options(&self) -> Result<RouterOptions, ConfigError> {
        let http_threads = self.http_threads.unwrap_or_else(RouterOptions::http_threads_of_cores);
        Ok(RouterOptions { http_threads, ..self.router.options()? })
    }
}

/// The options of the router itself, for every command that runs one.
#[derive(Clone, Debug, Args)]
pub struct RouterFlags {
    /// Default window of the switch rule, in base tokens
    #[arg(
        long,
        env = "HEADSTART_WINDOW",
        value_name = "W",
        default_value_t = 6,
        help_heading = "Decoding"
    )]
    pub window: u32,
    /// Default threshold of the switch rule, above 0 and at most 1
    #[arg(
        long,
        env = "HEADSTART_THRESHOLD",
        value_name = "G",
        default_value_t = 0.8,
        help_heading = "Decoding"
    )]
    pub threshold: f32,
    /// Default for the longest draft, in the drafter's tokens
    #[arg(
        long,
        env = "HEADSTART_DRAFT_TOKENS_MAX",
        value_name = "N",
        default_value_t = 512,
        help_heading = "Decoding"
    )]
    pub draft_tokens_max: u32,
    /// The drafters' temperature, 0 to 2; 0 is greedy
    #[arg(
        long,
        env = "HEADSTART_DRAFT_TEMPERATURE",
        value_name = "T",
        default_value_t = 0.0,
        help_heading = "Decoding"
    )]
    pub draft_temperature: f32,
    /// How drafts travel: ids between equal tokenizers and text otherwise, or one of them always
    #[arg(long, env = "HEADSTART_ENCODING", value_enum, default_value_t = Encoding::Auto, help_heading = "Decoding")]
    pub encoding: Encoding,
    /// When no drafter is up: refuse, or let the base answer alone and unaligned
    #[arg(long, env = "HEADSTART_ON_NO_DRAFTER", value_enum, default_value_t = OnNoDrafter::Reject, help_heading = "Decoding")]
    pub on_no_drafter: OnNoDrafter,
    /// When no base is up: refuse (drafter_only is not available in this version)
    #[arg(long, env = "HEADSTART_ON_NO_BASE", value_enum, default_value_t = OnNoBase::Reject, help_heading = "Decoding")]
    pub on_no_base: OnNoBase,
    /// When a draft ends by itself: the base continues, or the draft is the answer
    #[arg(long, env = "HEADSTART_ON_DRAFT_COMPLETE", value_enum, default_value_t = OnDraftComplete::Continue, help_heading = "Decoding")]
    pub on_draft_complete: OnDraftComplete,
    /// Answers in flight at once, whatever the nodes could hold; more wait
    #[arg(
        long,
        env = "HEADSTART_IN_FLIGHT_MAX",
        value_name = "N",
        default_value_t = 1024,
        help_heading = "Admission"
    )]
    pub in_flight_max: u32,
    /// Requests that wait for a place; more are refused with 429
    #[arg(
        long,
        env = "HEADSTART_QUEUE_REQUESTS_MAX",
        value_name = "N",
        default_value_t = 1024,
        help_heading = "Admission"
    )]
    pub queue_requests_max: u32,
    /// Tokens of the requests that wait for a place; more are refused with 429
    #[arg(long, env = "HEADSTART_QUEUE_TOKENS_MAX", value_name = "N", default_value_t = 2 << 20, help_heading = "Admission")]
    pub queue_tokens_max: u64,
    /// How long a request waits for a place at most; then it is refused with 429
    #[arg(long, env = "HEADSTART_QUEUE_TIMEOUT", value_name = "TIME", default_value = "10s", value_parser = duration, help_heading = "Admission")]
    pub queue_timeout: Duration,
    /// Bytes of an answer that may wait for a slow reader; then the reader is cut off
    #[arg(long, env = "HEADSTART_READER_BYTES_MAX", value_name = "N", default_value_t = 1 << 20, help_heading = "Admission")]
    pub reader_bytes_max: usize,
    /// How long a client may take no byte of what is there for it
    #[arg(long, env = "HEADSTART_WRITE_TIMEOUT", value_name = "TIME", default_value = "1m", value_parser = duration, help_heading = "Admission")]
    pub write_timeout: Duration,
    /// A file of name=key lines: only these API keys are served, and share fairly by their names [default: everybody is served]
    #[arg(long, env = "HEADSTART_API_KEYS", value_name = "FILE", help_heading = "Admission")]
    pub api_keys: Option<PathBuf>,
    /// HTTP connections open at once; more wait to be accepted
    #[arg(
        long,
        env = "HEADSTART_CONNECTIONS_MAX",
        value_name = "N",
        default_value_t = 8192,
        help_heading = "Admission"
    )]
    pub connections_max: u32,
    /// Longest request body, in bytes
    #[arg(long, env = "HEADSTART_BODY_BYTES_MAX", value_name = "N", default_value_t = 4 << 20, help_heading = "Admission")]
    pub body_bytes_max: usize,
    /// Until a connection to a node stands
    #[arg(long, env = "HEADSTART_CONNECT_TIMEOUT", value_name = "TIME", default_value = "3s", value_parser = duration, help_heading = "Times")]
    pub connect_timeout: Duration,
    /// A connection to a node is pinged after so long without traffic
    #[arg(long, env = "HEADSTART_PING_INTERVAL", value_name = "TIME", default_value = "1s", value_parser = duration, help_heading = "Times")]
    pub ping_interval: Duration,
    /// A connection to a node is dead after so long without an answer to a ping
    #[arg(long, env = "HEADSTART_PING_TIMEOUT", value_name = "TIME", default_value = "2s", value_parser = duration, help_heading = "Times")]
    pub ping_timeout: Duration,
    /// Until a request's body, or a tokenizer from a node, has arrived
    #[arg(long, env = "HEADSTART_READ_TIMEOUT", value_name = "TIME", default_value = "30s", value_parser = duration, help_heading = "Times")]
    pub read_timeout: Duration,
    /// From the start of an answer to its first token
    #[arg(long, env = "HEADSTART_FIRST_FRAME_TIMEOUT", value_name = "TIME", default_value = "2m", value_parser = duration, help_heading = "Times")]
    pub first_frame_timeout: Duration,
    /// Between two frames of an answer
    #[arg(long, env = "HEADSTART_FRAME_TIMEOUT", value_name = "TIME", default_value = "2m", value_parser = duration, help_heading = "Times")]
    pub frame_timeout: Duration,
    /// For an answer that a node's loss interrupted to go on elsewhere
    #[arg(long, env = "HEADSTART_RESUME_TIMEOUT", value_name = "TIME", default_value = "60s", value_parser = duration, help_heading = "Times")]
    pub resume_timeout: Duration,
    /// For a whole request
    #[arg(long, env = "HEADSTART_REQUEST_TIMEOUT", value_name = "TIME", default_value = "30m", value_parser = duration, help_heading = "Times")]
    pub request_timeout: Duration,
    /// How long live requests may take to finish when the router is asked to stop
    #[arg(long, env = "HEADSTART_DRAIN_TIMEOUT", value_name = "TIME", default_value = "30s", value_parser = duration, help_heading = "Times")]
    pub drain_timeout: Duration,
}

impl RouterFlags {
    /// The checked options of the router itself.
    ///
    /// # Errors
    /// A value out of its range, named.
    pub fn options(&self) -> Result<RouterOptions, ConfigError> {
        let options = RouterOptions {
            window: self.window,
            threshold: self.threshold,
            draft_tokens_max: self.draft_tokens_max,
            draft_temperature: self.draft_temperature,
            encoding: self.encoding,
            on_no_drafter: self.on_no_drafter,
            on_no_base: self.on_no_base,
            on_draft_complete: self.on_draft_complete,
            in_flight_max: self.in_flight_max,
            queue_requests_max: self.queue_requests_max,
            queue_tokens_max: self.queue_tokens_max,
            queue_timeout: self.queue_timeout,
            reader_bytes_max: self.reader_bytes_max,
            write_timeout: self.write_timeout,
            api_keys: self.api_keys.as_deref().map(read_keys).transpose()?,
            connections_max: self.connections_max,
            body_bytes_max: self.body_bytes_max,
            connect_timeout: self.connect_timeout,
            keep_alive: KeepAlive { interval: self.ping_interval, timeout: self.ping_timeout },
            read_timeout: self.read_timeout,
            first_frame_timeout: self.first_frame_timeout,
            frame_timeout: self.frame_timeout,
            resume_timeout: self.resume_timeout,
            request_timeout: self.request_timeout,
            drain_timeout: self.drain_timeout,
            ..RouterOptions::default()
        };
        options
            .validate()
            .map_err(|message| ConfigError::Invalid { field: field_of(&message), message })?;
        Ok(options)
    }
}

/// Reads the file of API keys.
fn read_keys(path: &Path) -> Result<Arc<ApiKeys>, ConfigError> {
    let keys = ApiKeys::read(path).map(Arc::new);
    keys.map_err(|message| ConfigError::Invalid { field: "api-keys", message })
}

/// The flag that a message of [`RouterOptions::validate`] starts with.
fn field_of(message: &str) -> &'static str {
    const FIELDS: [(&str, &str); 21] = [
        ("window", "window"),
        ("threshold", "threshold"),
        ("draft_tokens_max", "draft-tokens-max"),
        ("draft_temperature", "draft-temperature"),
        ("on_no_base", "on-no-base"),
        ("in_flight_max", "in-flight-max"),
        ("queue_requests_max", "queue-requests-max"),
        ("queue_tokens_max", "queue-tokens-max"),
        ("queue_timeout", "queue-timeout"),
        ("reader_bytes_max", "reader-bytes-max"),
        ("write_timeout", "write-timeout"),
        ("connections_max", "connections-max"),
        ("body_bytes_max", "body-bytes-max"),
        ("connect_timeout", "connect-timeout"),
        ("ping_interval", "ping-interval"),
        ("ping_timeout", "ping-timeout"),
        ("read_timeout", "read-timeout"),
        ("first_frame_timeout", "first-frame-timeout"),
        ("frame_timeout", "frame-timeout"),
        ("resume_timeout", "resume-timeout"),
        ("request_timeout", "request-timeout"),
    ];
    let found = FIELDS.iter().find(|(name, _)| message.starts_with(name));
    found.map_or("config", |(_, flag)| flag)
}

#[cfg(test)]
mod tests {
    use super::*;
    use headstart_service::config::parse_from;

    fn parse(args: &[&str]) -> Result<RouterOptions, ConfigError> {
        let args = std::iter::once("headstart-router").chain(args.iter().copied());
        parse_from::<RouterConfig>(args)?.options()
    }

    #[test]
    fn the_command_lines_defaults_are_the_librarys_but_for_the_threads() {
        let http_threads = RouterOptions::http_threads_of_cores();
        let expected = RouterOptions { http_threads, ..RouterOptions::default() };
        assert_eq!(parse(&[]).unwrap(), expected);
    }

    #[test]
    fn flags_arrive_and_bad_ones_are_named() {
        let options = parse(&["--on-no-drafter", "base_only", "--encoding=text", "--window=3"]);
        let options = options.unwrap();
        assert_eq!(options.on_no_drafter, OnNoDrafter::BaseOnly);
        assert_eq!((options.encoding, options.window), (Encoding::Text, 3));
        assert_eq!(parse(&["--http-threads=3"]).unwrap().http_threads, 3);
        for (field, flag) in [
            ("--window", "--window=0"),
            ("--threshold", "--threshold=1.5"),
            ("--on-no-base", "--on-no-base=drafter_only"),
            ("--encoding", "--encoding=both"),
            ("--http", "--http=nowhere"),
            ("--frame-timeout", "--frame-timeout=-1"),
            ("--queue-timeout", "--queue-timeout=0"),
            ("--queue-tokens-max", "--queue-tokens-max=0"),
            ("--api-keys", "--api-keys=/nowhere/keys"),
            ("--http-threads", "--http-threads=0"),
        ] {
            let message = parse(&[flag]).expect_err(flag).to_string();
            assert!(message.contains(field), "{flag}: {message}");
        }
    }
}
