//! Everything the router measures. Label values come from closed sets.

use std::time::Duration;

use tokio::time::Instant;

use headstart_cluster::{BaseRole, Tier};
use headstart_proto::ErrorCode;
use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};

use crate::admission::{Class, Reason};
use crate::frames::Source;
use crate::route::{Candidate, Snapshot};

/// Nodes this router knows, by `tier`, `role` (a base's; a drafter's is `draft`) and `state`: `up`,
/// `suspected`, `draining`.
const NODES: &str = "headstart_router_nodes";
/// Requests that ended, by `outcome`: `ok`, or an error code.
const REQUESTS: &str = "headstart_router_requests_total";
/// From a request's arrival to its first token, all answers together.
const TTFT: &str = "headstart_router_ttft_seconds";
/// Between two runs of tokens of one answer, divided by the tokens.
const ITL: &str = "headstart_router_itl_seconds";
/// Tokens of answers, by `source`.
const TOKENS: &str = "headstart_router_tokens_total";
/// Switch index of answers whose draft was decided.
const SWITCH_INDEX: &str = "headstart_router_switch_index";
/// Requests whose draft was decided, by `by`: `threshold` or `draft_end`.
const SWITCHES: &str = "headstart_router_switches_total";
/// Answers in flight.
const IN_FLIGHT: &str = "headstart_router_in_flight";
/// Requests that wait to be admitted, by `class`.
const QUEUE_DEPTH: &str = "headstart_router_queue_requests";
/// Their tokens, by `class`.
const QUEUE_TOKENS: &str = "headstart_router_queue_tokens";
/// From a request's arrival until it was admitted, by `class`.
const QUEUE_WAIT: &str = "headstart_router_queue_wait_seconds";
/// Requests that were refused for overload, by `class` and `reason`: `full`, `late`, `never`,
/// `expired`.
const REFUSED: &str = "headstart_router_refused_total";

/// Attempts at answers, by `tier`.
const ATTEMPTS: &str = "headstart_router_attempts_total";
/// Attempts that failed or were moved, by `tier`, `phase` and `cause`.
const FAILOVERS: &str = "headstart_router_failovers_total";
/// From the loss of a node to the answer's next token.
const FAILOVER: &str = "headstart_router_failover_seconds";
/// Retries that the budget had no room for.
const RETRIES_REFUSED: &str = "headstart_router_retries_refused_total";

/// Handles to every metric, resolved once.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    ttft: Histogram,
    itl: Histogram,
    drafter_tokens: Counter,
    base_tokens: Counter,
    switch_index: Histogram,
    by_threshold: Counter,
    by_draft_end: Counter,
    in_flight: Gauge,
    queues: [QueueMetrics; 2],
}

/// Handles of one class.
#[derive(Clone, Debug)]
struct QueueMetrics {
    requests: Gauge,
    tokens: Gauge,
    wait: Histogram,
}

impl QueueMetrics {
    fn new(class: Class) -> Self {
        let class = class.as_str();
        Self {
            requests: gauge!(QUEUE_DEPTH, "class" => class),
            tokens: gauge!(QUEUE_TOKENS, "class" => class),
            wait: histogram!(QUEUE_WAIT, "class" => class),
        }
    }
}

impl Metrics {
    /// Describes and resolves them in the process's registry.
    pub(crate) fn new() -> Self {
        describe_gauge!(NODES, "Nodes that are known, by tier, role and state");
        describe_counter!(REQUESTS, "Requests that ended, by outcome");
        describe_histogram!(TTFT, "Seconds from a request's arrival to its first token");
        describe_histogram!(ITL, "Seconds between two tokens of an answer");
        describe_counter!(TOKENS, "Tokens of answers, by source");
        describe_histogram!(SWITCH_INDEX, "Index of the last draft token that was kept");
        describe_counter!(SWITCHES, "Drafts that were decided, by what decided them");
        describe_gauge!(IN_FLIGHT, "Answers in flight");
        describe_gauge!(QUEUE_DEPTH, "Requests that wait to be admitted, by class");
        describe_gauge!(QUEUE_TOKENS, "Tokens of the requests that wait, by class");
        describe_histogram!(QUEUE_WAIT, "Seconds from a request's arrival until it was admitted");
        describe_counter!(REFUSED, "Requests refused for overload, by class and reason");
        describe_counter!(ATTEMPTS, "Attempts at answers, by tier");
        describe_counter!(
            FAILOVERS,
            "Attempts that failed or moved, by tier, phase (start, draft, write) and cause"
        );
        describe_histogram!(FAILOVER, "Seconds from a node's loss to the answer's next token");
        describe_counter!(RETRIES_REFUSED, "Retries that the budget had no room for");
        Self {
            ttft: histogram!(TTFT),
            itl: histogram!(ITL),
            drafter_tokens: counter!(TOKENS, "source" => "drafter"),
            base_tokens: counter!(TOKENS, "source" => "base"),
            switch_index: histogram!(SWITCH_INDEX),
            by_threshold: counter!(SWITCHES, "by" => "threshold"),
            by_draft_end: counter!(SWITCHES, "by" => "draft_end"),
            in_flight: gauge!(IN_FLIGHT),
            queues: Class::ALL.map(QueueMetrics::new),
        }
    }

    /// A request ended: `None` is success.
    pub(crate) fn ended(&self, error: Option<ErrorCode>) {
        counter!(REQUESTS, "outcome" => error.map_or("ok", ErrorCode::code)).increment(1);
    }

    /// A request was refused for overload.
    pub(crate) fn refused(&self, class: Class, reason: Reason) {
        let (class, reason) = (class.as_str(), reason.as_str());
        counter!(REFUSED, "class" => class, "reason" => reason).increment(1);
    }

    /// The nodes that are known now.
    #[allow(clippy::cast_precision_loss)] // gauges are floats
    pub(crate) fn nodes(&self, snapshot: &Snapshot<'_>) {
        let set = |tier: Tier, role: &'static str, nodes: &[&Candidate<'_>]| {
            for state in ["up", "suspected", "draining"] {
                let count = nodes.iter().filter(|node| node.state() == state).count();
                gauge!(NODES, "tier" => tier.as_str(), "role" => role, "state" => state)
                    .set(count as f64);
            }
        };
        for role in [BaseRole::Unified, BaseRole::Score, BaseRole::Decode] {
            let has_role = |node: &&Candidate<'_>| node.record.base_role == role;
            let bases: Vec<_> = snapshot.bases.iter().filter(has_role).collect();
            set(Tier::Base, role.as_str(), &bases);
        }
        set(Tier::Drafter, "draft", &snapshot.drafters.iter().collect::<Vec<_>>());
    }

    /// What waits in `class` now.
    #[allow(clippy::cast_precision_loss)] // gauges are floats
    pub(crate) fn queue(&self, class: Class, requests: usize, tokens: u64) {
        let queue = &self.queues[class as usize];
        queue.requests.set(requests as f64);
        queue.tokens.set(tokens as f64);
    }

    /// A request was admitted after so long.
    pub(crate) fn waited(&self, class: Class, wait: Duration) {
        self.queues[class as usize].wait.record(wait);
    }

    /// Answers started (above 0) or ended (below).
    pub(crate) fn in_flight(&self, change: f64) {
        self.in_flight.increment(change);
    }

    /// The first token of a request that arrived at `arrived`.
    pub(crate) fn first_token(&self, arrived: Instant) {
        self.ttft.record(arrived.elapsed());
    }

    /// `tokens` more tokens from `source`, `gap` after those before.
    pub(crate) fn tokens(&self, source: Source, tokens: usize, gap: Option<Duration>) {
        let count = u32::try_from(tokens).unwrap_or(u32::MAX).max(1);
        match source {
            Source::Drafter => self.drafter_tokens.increment(tokens as u64),
            Source::Base => self.base_tokens.increment(tokens as u64),
        }
        if let Some(gap) = gap {
            self.itl.record_many(gap / count, count as usize);
        }
    }

    /// A node of `tier` was asked for an answer or a draft.
    pub(crate) fn attempt(&self, tier: Tier) {
        counter!(ATTEMPTS, "tier" => tier.as_str()).increment(1);
    }

    /// An attempt failed or was moved.
    pub(crate) fn failover(&self, tier: Tier, phase: &'static str, cause: &'static str) {
        counter!(FAILOVERS, "tier" => tier.as_str(), "phase" => phase, "cause" => cause)
            .increment(1);
    }

    /// An answer that was interrupted goes on.
    pub(crate) fn went_on(&self, after: Duration) {
        histogram!(FAILOVER).record(after);
    }

    /// The budget had no room for a retry.
    pub(crate) fn retry_refused(&self) {
        counter!(RETRIES_REFUSED).increment(1);
    }

    /// A draft was decided.
    pub(crate) fn switched(&self, by_threshold: bool, kept_tokens: u32) {
        match by_threshold {
            true => self.by_threshold.increment(1),
            false => self.by_draft_end.increment(1),
        }
        if let Some(index) = kept_tokens.checked_sub(1) {
            self.switch_index.record(index);
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}
