//! The inference engine that drafter-nodes and base-nodes share.
//!
//! One operation does it all: *extend*. A step gives each chosen sequence new tokens and says at
//! which positions it wants results; prefill, scoring a draft, and decoding differ in nothing else.
//! [`step`] shows the whole life of a token; [`core`] holds the decisions, free of IO;
//! [`executor`] is the seam to the device; [`runner`] gives it all a thread and an inbox;
//! [`exchange`] is how KV pages leave one engine and enter another.

pub mod collective;
pub mod core;
pub mod exchange;
pub mod executor;
mod flight;
pub mod model;
pub mod runner;
pub mod step;

pub use crate::core::sampling::Sampling;
pub use crate::core::sequence::{Decision, DraftPolicy, Event, Finish, Judged, Known, Request};
pub use exchange::{Export, ExportView, ExportedPage, Import, ImportError, Reading, Writing};
pub use executor::{Executor, KvDtype, KvFormat, KvLayout, Limits, ModelHash, Scored, TokenId};
pub use runner::{EngineHandle, EngineOptions, EngineStats, Generation, SubmitError};
