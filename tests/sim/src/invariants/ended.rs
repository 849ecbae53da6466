//! Every request ends in its time: with its answer, or with one error.

use crate::client::End;
use crate::run::Run;

/// No request hangs, and none ends without a word.
pub(super) fn check(run: &Run) -> Result<(), String> {
    for (index, outcome) in run.outcomes.iter().enumerate() {
        if matches!(outcome.end, End::Hung | End::Vanished) {
            return Err(super::tell(run, index));
        }
    }
    Ok(())
}
