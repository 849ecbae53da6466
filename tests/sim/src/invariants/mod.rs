//! What must hold in every world, one invariant a file.

mod drafted;
mod ended;
mod given_back;
mod healed;
mod once;
mod right;
mod whole;

use crate::client::{End, Outcome};
use crate::plan::FaultKind;
use crate::run::Run;

/// How long after its end a fault may still be felt: until keep-alives have found the last
/// connection that it broke.
const AFTERMATH: std::time::Duration = std::time::Duration::from_secs(25);

/// An invariant: its name, and what of a run breaks it.
pub type Invariant = (&'static str, fn(&Run) -> Result<(), String>);

/// All of them.
pub const ALL: [Invariant; 7] = [
    ("ended", ended::check),
    ("once", once::check),
    ("drafted", drafted::check),
    ("right", right::check),
    ("healed", healed::check),
    ("given_back", given_back::check),
    ("whole", whole::check),
];

/// The invariants that a run breaks, each with the first way in which it does.
#[must_use]
pub fn broken(run: &Run) -> Vec<(&'static str, String)> {
    ALL.iter().filter_map(|(name, check)| check(run).err().map(|why| (*name, why))).collect()
}

/// Whether something else than the store was wrong while a request ran, or shortly before.
fn disturbed(run: &Run, outcome: &Outcome) -> bool {
    run.plan.faults.iter().any(|fault| {
        let of_store = matches!(
            fault.kind,
            FaultKind::StoreAway | FaultKind::StoreLate { .. } | FaultKind::StoreCut { .. }
        );
        let over = fault.at + fault.lasts + AFTERMATH;
        !of_store && fault.at <= outcome.ended && outcome.started <= over
    })
}

/// Whether a node's record may have been missing when a request came.
fn cut_off(run: &Run, outcome: &Outcome) -> bool {
    run.plan.faults.iter().any(|fault| {
        let over = fault.at + fault.lasts + AFTERMATH;
        let cut = matches!(fault.kind, FaultKind::StoreCut { .. });
        cut && fault.at <= outcome.started && outcome.started <= over
    })
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
