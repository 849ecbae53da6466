//! Every accepted request ends with the full right answer, or with one typed error that faults
//! justify: see [`super::excuses`].

use crate::client::End;
use crate::run::Run;

/// A whole answer equals the oracle's; an error has a cause.
pub(super) fn check(run: &Run) -> Result<(), String> {
    for (index, outcome) in run.outcomes.iter().enumerate() {
        let verdict = match outcome.end {
            End::Whole => whole(run, index),
            _ => super::excuses::excuse(run, outcome),
        };
        verdict.map_err(|why| format!("{why}\n  in {}", super::tell(run, index)))?;
    }
    Ok(())
}

fn whole(run: &Run, index: usize) -> Result<(), String> {
    for (seen, right) in run.outcomes[index].answers.iter().zip(&run.right[index]) {
        let end = seen.finished.as_ref().map(|end| (end.stopped, end.tokens as usize));
        let same = seen.ids == right.ids
            && seen.text == right.text
            && seen.logprobs == right.logprobs
            && end == Some((right.stopped, right.ids.len()));
        if !same {
            return Err(format!("a wrong answer\n  saw   {seen:?}\n  right {right:?}"));
        }
    }
    Ok(())
}
