//! The base-node: reads a draft along, takes over, and writes the rest of the answer.
//!
//! `Serve` opens a [`session`], the task that owns one answer; `Handoff` brings it its draft, and
//! the [`rendezvous`] is where the two meet; [`reading`] makes the draft the base's own tokens, and
//! [`answer`] decides what may leave the node and when.
//! [`node`] is the whole: from its configuration, or on an engine that already runs.

pub mod answer;
pub mod config;
pub mod convert;
pub mod gate;
pub mod kv;
pub mod metrics;
pub mod node;
pub mod reading;
pub mod rendezvous;
pub mod service;
pub mod session;

pub use headstart_node::HostOptions as BaseOptions;
pub use kv::KvOptions;
pub use node::{start, start_watched};
pub use service::Holdings;
