//! What must hold in every world, one invariant a file.

mod drafted;
mod ended;
mod excuses;
mod fenced;
mod given_back;
mod healed;
mod once;
mod pages;
mod right;
mod whole;

use crate::client::{End, Outcome};
use crate::run::Run;

/// An invariant: its name, and what of a run breaks it.
pub type Invariant = (&'static str, fn(&Run) -> Result<(), String>);

/// All of them.
pub const ALL: [Invariant; 9] = [
    ("ended", ended::check),
    ("once", once::check),
    ("drafted", drafted::check),
    ("right", right::check),
    ("fenced", fenced::check),
    ("pages", pages::check),
    ("healed", healed::check),
    ("given_back", given_back::check),
    ("whole", whole::check),
];

/// The invariants that a run breaks, each with the first way in which it does.
#[must_use]
pub fn broken(run: &Run) -> Vec<(&'static str, String)> {
    ALL.iter().filter_map(|(name, check)| check(run).err().map(|why| (*name, why))).collect()
}

/// A request, told shortly.
fn tell(run: &Run, index: usize) -> String {
    let Outcome { ask, end, started, ended, .. } = &run.outcomes[index];
    format!("request at {started:?} until {ended:?}, {end:?}: {ask:?}")
}

/// Whether the whole answer is owed.
fn is_whole(outcome: &Outcome) -> bool {
    outcome.end == End::Whole
}
