//! The router, a cluster's only door: OpenAI-compatible HTTP and gRPC in front, drafters and bases
//! behind.
//!
//! A request's way through: a door (`http` or `service`) parses it into an `Ask`; the core picks a
//! base and a drafter (`route`), renders both prompts (`texts`, `prompts`), and starts one task that
//! owns the request (`generate`). Each answer has a `course`: it opens an `attempt` at a base and a
//! drafter, passes the base's frames through a gate (`frames`), keeps what is certain (`progress`),
//! and opens another attempt when a node is lost and `retry` allows it. The task turns tokens into
//! text (`answer`) and puts that into the client's box (`outbox`). The router holds no model weights
//! and never links the engine.

mod admission;
mod answer;
mod ask;
mod attempt;
mod chance;
mod config;
mod connection;
mod convert;
mod course;
mod frames;
mod generate;
mod http;
mod lanes;
mod metrics;
mod nodes;
mod openai;
mod options;
mod outbox;
mod progress;
mod prompts;
mod retry;
mod route;
mod server;
mod service;
mod suspicion;
#[cfg(feature = "testing")]
pub mod testing;
mod texts;

pub use admission::ApiKeys;
pub use config::{RouterConfig, RouterFlags};
pub use options::{Encoding, OnDraftComplete, OnNoBase, OnNoDrafter, RouterOptions};
pub use server::{RunningRouter, start};
