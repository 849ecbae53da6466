//! Fail closed: no answer without a draft, and no drafter's token behind a base's.

use crate::run::Run;

/// Every answer that has tokens begins with a drafter's, and as many as the rule keeps.
pub(super) fn check(run: &Run) -> Result<(), String> {
    for (index, outcome) in run.outcomes.iter().enumerate() {
        for (seen, right) in outcome.answers.iter().zip(&run.right[index]) {
            let expected = (0..seen.drafted.len()).map(|position| position < right.kept);
            if !seen.drafted.iter().copied().eq(expected) {
                let (drafted, kept) = (&seen.drafted, right.kept);
                let request = super::tell(run, index);
                return Err(format!(
                    "expected {kept} drafted tokens, saw {drafted:?} in {request}"
                ));
            }
        }
    }
    Ok(())
}
