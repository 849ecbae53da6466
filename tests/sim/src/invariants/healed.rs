//! Once nothing is wrong any more, nothing fails any more.

use crate::client::End;
use crate::run::Run;

/// Every request of the healing phase gets its whole answer, unless its client hung up.
pub(super) fn check(run: &Run) -> Result<(), String> {
    for (index, outcome) in run.outcomes.iter().enumerate().filter(|(_, o)| o.healed) {
        if !super::is_whole(outcome) && outcome.end != End::HungUp {
            return Err(super::tell(run, index));
        }
    }
    Ok(())
}
