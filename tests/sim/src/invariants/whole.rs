//! A cluster comes up by itself, and it is whole again by itself once nothing is wrong.

use crate::run::Run;

/// Every process was up, every node registered and every router ready, before and after the faults.
pub(super) fn check(run: &Run) -> Result<(), String> {
    match run.whole {
        (true, true) => Ok(()),
        (false, _) => Err("the cluster did not come up".into()),
        (true, false) => Err("the cluster did not become whole again".into()),
    }
}
