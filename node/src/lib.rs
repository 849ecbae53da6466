//! What drafter-nodes and base-nodes do alike: load a model, run its engine, join the cluster.
//!
//! A tier adds its gRPC services and its metrics; everything else about a node is here and in
//! [`headstart_service::node`].

pub mod convert;
pub mod host;
pub mod load;
pub mod ranks;

pub use host::{AddServices, Host, HostOptions, Tiered, run, start};
pub use load::load;
