//! The router, a cluster's only door: OpenAI-compatible HTTP and gRPC in front, drafters and bases
//! behind.
//!
//! A request's way through: a door (`http` or `service`) parses it into an `Ask`; the core picks a
//! base and a drafter (`route`), renders both prompts (`texts`, `prompts`), and starts one task that
//! owns the request (`generate`). For each answer the task opens one `attempt`, passes the base's frames
//! through a gate (`frames`), turns tokens into text (`answer`) and puts that into the client's box
//! (`outbox`). The router holds no model weights and never links the engine.

mod admission;
mod answer;
mod ask;
mod attempt;
mod config;
mod convert;
mod frames;
mod generate;
mod http;
mod metrics;
mod nodes;
mod openai;
mod options;
mod outbox;
mod prompts;
mod route;
mod server;
mod service;
mod suspicion;
mod texts;

pub use admission::ApiKeys;
pub use config::RouterConfig;
pub use options::{Encoding, OnDraftComplete, OnNoBase, OnNoDrafter, RouterOptions};
pub use server::{RunningRouter, start};
