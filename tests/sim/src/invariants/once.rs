//! No token comes twice, none is missing, none is out of order: whatever became of a request, what
//! its client saw is the beginning of the right answer.

use crate::run::Run;

/// Positions follow each other, and tokens, their log-probabilities and the text are prefixes of
/// what is right.
pub(super) fn check(run: &Run) -> Result<(), String> {
    for (index, outcome) in run.outcomes.iter().enumerate() {
        for (seen, right) in outcome.answers.iter().zip(&run.right[index]) {
            let tell = |what: &str| {
                let request = super::tell(run, index);
                Err(format!("{what}\n  saw   {seen:?}\n  right {right:?}\n  in {request}"))
            };
            if seen.positions.iter().any(|(named, expected)| named != expected) {
                return tell("a position that does not follow");
            }
            if !right.ids.starts_with(&seen.ids) {
                return tell("tokens that are no beginning of the answer");
            }
            if !right.text.starts_with(&seen.text) {
                return tell("text that is no beginning of the answer");
            }
            if !right.logprobs.starts_with(&seen.logprobs) {
                return tell("log-probabilities that are no beginning of the answer");
            }
            if seen.after_end {
                return tell("a frame after the last one");
            }
        }
    }
    Ok(())
}
