//! Deterministic simulation of a whole cluster: the real router, drafter and base services with the
//! fake executor, on one thread, in virtual time, over a simulated network.
//!
//! A [`plan`] is drawn from a seed: hosts, requests, faults. A [`run`] lets it happen in a [`world`]
//! whose processes talk over [`net`], whose [`wire`] is looked at, and register in [`store`]. An [`oracle`] knows the right
//! answers, and [`invariants`] says what must hold. The same seed gives the same run, which a
//! [`trace`] proves.

pub mod client;
pub mod invariants;
pub mod net;
pub mod oracle;
pub mod plan;
pub mod random;
pub mod run;
pub mod store;
pub mod trace;
pub mod wire;
pub mod world;

use std::path::Path;

use headstart_text::ModelText;

/// The text side of both models: the smallest fixture.
///
/// # Panics
/// If the repository lacks it.
#[must_use]
pub fn fixture() -> ModelText {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/stories260k");
    ModelText::load(&folder).expect("the fixture is whole")
}
