//! KV pages on their way from the engine that computed them to the one that goes on.
//!
//! The receiver pulls. It connects over a [`transport`], says whose KV it wants and what its own
//! pages look like ([`wire`]), and gets pages, each with its tokens and a checksum, also those that
//! are computed while it listens ([`sender`], [`receiver`]). Full ones go into its prefix cache; from
//! there on they are like any cached prefix. The last one waits for the request that goes on. A
//! [`lease`] keeps the sender's pages until they were read or its time is over. Pages of another size or tensor-parallel degree are re-laid on the way
//! ([`layout`]). Whether waiting for a page is worth it is decided by [`rates`].
//!
//! Nothing that goes wrong here can change an answer: it leaves a shorter cached prefix.

pub mod layout;
pub mod lease;
pub mod rates;
pub mod receiver;
pub mod sender;
pub mod transport;
pub mod wire;

use std::time::Duration;

use headstart_engine::KvLayout;
pub use lease::{Leases, Offer};
pub use receiver::{Progress, PullError, Source, pull};
pub use sender::serve;
pub use transport::{InMemory, KvStream, KvTransport, Tcp};
pub use wire::{Refusal, RefusalCode};

/// Bytes of pages under way between a connection and its engine, which copies about as many between two
/// steps.
const BYTES_UNDER_WAY: usize = 4 << 20;

/// Pages under way between a connection and its engine, at most.
fn pages_under_way(layout: &KvLayout) -> usize {
    // One is sent or comes, the next is copied, and one has some slack; small ones are not to fill the
    // engine's queue.
    (BYTES_UNDER_WAY / layout.page_bytes().max(1)).clamp(3, 16)
}

/// How long either side waits for the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// For a connection, and for the other side's part of the handshake.
    pub handshake: Duration,
    /// For the other side to take or send anything at all.
    pub stall: Duration,
    /// A sender that has nothing to send says so after this long; shorter than `stall`.
    pub alive: Duration,
    /// How long pages are kept for a reader once their request is over here.
    pub lease: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(5),
            stall: Duration::from_secs(3),
            alive: Duration::from_millis(500),
            lease: Duration::from_secs(10),
        }
    }
}
