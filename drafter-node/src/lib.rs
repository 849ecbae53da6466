//! The drafter-node: runs the small aligned model and writes the beginning of an answer.
//!
//! `Drafter.Draft` starts a [`draft`], the task that owns one draft and streams it to the base it
//! was told to; [`script`] is what of it has gone where. [`node`] is the whole: from its configuration, or on an engine that already runs.

pub mod bases;
pub mod config;
pub mod convert;
pub mod draft;
pub mod metrics;
pub mod node;
pub mod script;
pub mod service;

pub use headstart_node::HostOptions as DrafterOptions;
pub use node::start;
