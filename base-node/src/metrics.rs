//! The base-node's metrics.

use std::time::Duration;

use headstart_engine::{Decision, EngineStats};
use metrics::{counter, gauge, histogram};

/// Requests that wait for a draft or may still be sent one.
pub const OPEN_REQUESTS: &str = "headstart_base_open_requests";
/// Handoffs under way.
pub const HANDOFFS: &str = "headstart_base_handoffs";
/// Pulls of KV that are under way, or whose request has not come yet.
pub const KV_PULLS: &str = "headstart_base_kv_pulls_held";
/// Leases of KV that run.
pub const KV_LEASES: &str = "headstart_base_kv_leases_held";

/// One of what a gauge counts, for as long as it lives.
#[derive(Debug)]
pub struct Held(&'static str);

impl Held {
    /// One more.
    #[must_use]
    pub fn new(gauge: &'static str) -> Self {
        gauge!(gauge).increment(1.0);
        Self(gauge)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        gauge!(self.0).decrement(1.0);
    }
}

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
    describe_counter!(
        "headstart_base_kv_pulls_total",
        "Pulls of KV from other bases, by outcome: whole, or why they ended before."
    );
    describe_counter!("headstart_base_kv_received_bytes_total", "Bytes of KV pages received.");
    describe_counter!("headstart_base_kv_sent_bytes_total", "Bytes of KV pages sent.");
    describe_counter!(
        "headstart_base_kv_moved_total",
        "Tokens of resumed requests whose KV came from another base."
    );
    describe_counter!(
        "headstart_base_kv_recomputed_total",
        "Tokens of resumed requests whose KV was to be had elsewhere, but was computed anew."
    );
    describe_counter!(
        "headstart_base_kv_leases_total",
        "Leases of requests that moved away, by end: pulled, expired, or cancelled."
    );
    describe_gauge!(OPEN_REQUESTS, "Requests that drafters may come for.");
    describe_gauge!(HANDOFFS, "Drafts that are coming in.");
    describe_gauge!(
        KV_PULLS,
        "Pulls of KV from other bases that run or whose request has not come yet."
    );
    describe_gauge!(KV_LEASES, "Leases of KV for other bases that run.");
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
    describe_gauge!(
        "headstart_base_tokens_overrun",
        "Tokens, beside the computed ones, that a GPU had in work when their answers ended, since the engine's start."
    );
}

/// A request ended.
pub fn request_ended(outcome: &'static str) {
    counter!("headstart_base_requests_total", "outcome" => outcome).increment(1);
}

/// A request that no session owns yet. Dropped before one does, it was cancelled.
#[derive(Debug)]
pub struct Arriving(());

impl Arriving {
    /// A request came in.
    #[must_use]
    pub fn new() -> Self {
        counter!("headstart_base_requests_started_total").increment(1);
        Self(())
    }

    /// A session owns it from here.
    pub fn taken(self) {
        std::mem::forget(self);
    }

    /// It was refused.
    pub fn refused(self, code: &'static str) {
        self.taken();
        request_ended(code);
    }
}

impl Default for Arriving {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        request_ended("cancelled");
    }
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
    gauge!("headstart_base_tokens_overrun").set(stats.counters.tokens_overrun as f64);
}

/// A pull of KV ended: whole, or with an error's code.
pub fn kv_pulled(outcome: &'static str, bytes: u64) {
    counter!("headstart_base_kv_pulls_total", "outcome" => outcome).increment(1);
    counter!("headstart_base_kv_received_bytes_total").increment(bytes);
}

/// A page of KV was sent to another base.
pub fn kv_sent(bytes: usize) {
    counter!("headstart_base_kv_sent_bytes_total").increment(bytes as u64);
}

/// A request goes on here, with so many tokens' KV from another base.
pub fn kv_resumed(moved_tokens: usize, recomputed_tokens: usize) {
    counter!("headstart_base_kv_moved_total").increment(moved_tokens as u64);
    counter!("headstart_base_kv_recomputed_total").increment(recomputed_tokens as u64);
}

/// The lease of a request that moved away ended: `pulled`, `expired` or `cancelled`.
pub fn kv_lease_ended(end: &'static str) {
    counter!("headstart_base_kv_leases_total", "end" => end).increment(1);
}
