//! Every accepted request ends with the full right answer, or with one typed error that a fault
//! explains. The store is never such a fault: it is off the path of tokens.

use headstart_proto::ErrorCode;

use crate::client::{End, Outcome};
use crate::run::Run;

/// A whole answer equals the oracle's; an error has a cause.
pub(super) fn check(run: &Run) -> Result<(), String> {
    for (index, outcome) in run.outcomes.iter().enumerate() {
        let verdict = match &outcome.end {
            End::Whole => whole(run, index),
            End::Failed(code, message) => failed(run, outcome, *code, message),
            End::Broken(_) if super::disturbed(run, outcome) => Ok(()),
            End::Broken(_) => Err("the connection broke though nothing was wrong".to_owned()),
            End::HungUp | End::Hung | End::Vanished => Ok(()),
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

/// Which errors a client may see, and when.
fn failed(run: &Run, outcome: &Outcome, code: ErrorCode, message: &str) -> Result<(), String> {
    match code {
        // Nodes are small on purpose.
        ErrorCode::Overloaded if !outcome.healed => Ok(()),
        ErrorCode::Unavailable
        | ErrorCode::Draining
        | ErrorCode::DeadlineExceeded
        | ErrorCode::NoDrafter
        | ErrorCode::NoBase
        | ErrorCode::UnknownModel
            if super::disturbed(run, outcome) =>
        {
            Ok(())
        }
        // Faults took two nodes from it at the same position: it is taken for a request that kills.
        ErrorCode::Internal
            if message.contains("is not passed on") && super::disturbed(run, outcome) =>
        {
            Ok(())
        }
        // Nodes whose records expired are not there for new requests.
        ErrorCode::NoDrafter | ErrorCode::NoBase | ErrorCode::UnknownModel
            if super::cut_off(run, outcome) =>
        {
            Ok(())
        }
        code => Err(format!("an error that nothing explains: {code}")),
    }
}
