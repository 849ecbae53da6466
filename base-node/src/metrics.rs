//! The base-node's metrics.

use std::time::Duration;

use headstart_engine::{Decision, EngineStats};
use metrics::{counter, gauge, histogram};

/// Registers every metric's description.
pub fn describe() {
    use metrics::{describe_counter, describe_gauge, describe_histogram};
    describe_counter!("headstart_base_requests_started_total", "Requests that came in.");
    describe_counter!(
        "headstart_base_requests_total",
        "Requests that ended, by outcome: stop, length, moved, cancelled, or an error code."
    );
    describe_counter!(
        "headstart_base_draft_received_total",
        "Draft tokens received, in the drafters' tokens."
    );
    describe_counter!(
        "headstart_base_draft_kept_total",
        "Draft tokens kept, in the base's tokens."
    );
    describe_counter!(
        "headstart_base_drafts_total",
        "Drafts decided, by end: switched (a window reached the threshold) or complete."
    );
    describe_counter!("headstart_base_written_total", "Tokens the base wrote.");
    describe_histogram!(
        "headstart_base_handoff_seconds",
        "From the decision on a draft to the base's first own token."
    );
    describe_gauge!("headstart_base_slots", "Requests the engine runs at once.");
    describe_gauge!("headstart_base_slots_used", "Requests the engine is running.");
    describe_gauge!("headstart_base_kv_tokens", "Tokens the KV pages hold.");
    describe_gauge!("headstart_base_kv_tokens_used", "Tokens that the KV pages in use hold.");
    describe_gauge!(
        "headstart_base_tokens_extended",
        "Tokens the engine computed since its start."
    );
    describe_gauge!(
        "headstart_base_tokens_reused",
        "Tokens whose KV the engine found in its prefix cache since its start."
    );
    describe_gauge!(
        "headstart_base_tokens_cut",
        "Draft tokens that the engine computed and a switch then cut, since its start."
    );
}

/// A request came in.
pub fn request_started() {
    counter!("headstart_base_requests_started_total").increment(1);
}

/// A request ended.
pub fn request_ended(outcome: &'static str) {
    counter!("headstart_base_requests_total", "outcome" => outcome).increment(1);
}

/// Draft tokens came in.
pub fn draft_received(tokens: u32) {
    counter!("headstart_base_draft_received_total").increment(u64::from(tokens));
}

/// A draft was decided.
pub fn draft_decided(decision: Decision) {
    let end = if decision.switched { "switched" } else { "complete" };
    counter!("headstart_base_drafts_total", "end" => end).increment(1);
    counter!("headstart_base_draft_kept_total").increment(decision.kept as u64);
}

/// The base wrote a token.
pub fn token_written() {
    counter!("headstart_base_written_total").increment(1);
}

/// The base's first own token came `after` the decision.
pub fn handoff(after: Duration) {
    histogram!("headstart_base_handoff_seconds").record(after.as_secs_f64());
}

/// The engine's state, at the time of a scrape.
pub fn engine(stats: EngineStats) {
    gauge!("headstart_base_slots").set(stats.slots as f64);
    gauge!("headstart_base_slots_used").set(stats.slots_used as f64);
    gauge!("headstart_base_kv_tokens").set(stats.kv_tokens as f64);
    gauge!("headstart_base_kv_tokens_used").set(stats.kv_tokens_used as f64);
    gauge!("headstart_base_tokens_extended").set(stats.counters.tokens_extended as f64);
    gauge!("headstart_base_tokens_reused").set(stats.counters.tokens_reused as f64);
    gauge!("headstart_base_tokens_cut").set(stats.counters.tokens_cut as f64);
}
