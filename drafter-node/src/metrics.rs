//! The drafter-node's metrics.

use headstart_engine::EngineStats;
use metrics::{counter, gauge};

/// Registers every metric's description.
pub fn describe() {
    use metrics::{describe_counter, describe_gauge};
    describe_counter!("headstart_drafter_requests_started_total", "Drafts that were asked for.");
    describe_counter!(
        "headstart_drafter_requests_total",
        "Drafts that ended, by outcome: eos, length, switched, aborted, cancelled, or an error code."
    );
    describe_counter!("headstart_drafter_tokens_total", "Draft tokens sent.");
    describe_gauge!("headstart_drafter_slots", "Drafts the engine runs at once.");
    describe_gauge!("headstart_drafter_slots_used", "Drafts the engine is running.");
    describe_gauge!("headstart_drafter_kv_tokens", "Tokens the KV pages hold.");
    describe_gauge!("headstart_drafter_kv_tokens_used", "Tokens that the KV pages in use hold.");
    describe_gauge!(
        "headstart_drafter_tokens_extended",
        "Tokens the engine computed since its start."
    );
}

/// A draft was asked for.
pub fn request_started() {
    counter!("headstart_drafter_requests_started_total").increment(1);
}

/// A draft ended.
pub fn request_ended(outcome: &'static str) {
    counter!("headstart_drafter_requests_total", "outcome" => outcome).increment(1);
}

/// Draft tokens were sent.
pub fn tokens_sent(tokens: usize) {
    counter!("headstart_drafter_tokens_total").increment(tokens as u64);
}

/// The engine's state, at the time of a scrape.
pub fn engine(stats: EngineStats) {
    gauge!("headstart_drafter_slots").set(stats.slots as f64);
    gauge!("headstart_drafter_slots_used").set(stats.slots_used as f64);
    gauge!("headstart_drafter_kv_tokens").set(stats.kv_tokens as f64);
    gauge!("headstart_drafter_kv_tokens_used").set(stats.kv_tokens_used as f64);
    gauge!("headstart_drafter_tokens_extended").set(stats.counters.tokens_extended as f64);
}
