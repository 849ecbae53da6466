//! An older attempt is fenced: once a base has taken a draft of an answer, it takes none of an older
//! epoch, however late that one arrives.

use crate::run::Run;

/// The epochs of the drafts that a base takes of an answer only grow.
pub(super) fn check(run: &Run) -> Result<(), String> {
    for (index, (at, old)) in run.seen.accepted.iter().enumerate() {
        // What happens at one instant has no order.
        let before = run.seen.accepted[..index].iter().filter(|(before, _)| before < at);
        let newer = before.map(|(_, handoff)| handoff).find(|newer| {
            newer.base == old.base && newer.request_id == old.request_id && newer.epoch >= old.epoch
        });
        if let Some(newer) = newer {
            return Err(format!("at {at:?} {old:?} was taken after {newer:?}"));
        }
    }
    Ok(())
}
