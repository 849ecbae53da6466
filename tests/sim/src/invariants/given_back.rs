//! Once nothing is asked any more, everything is given back: slots, pages, sessions, places at the
//! rendezvous and on nodes, KV leases with their readers, pulls, requests; and once everything has
//! stopped, no task and no connection is left.

use crate::run::Run;

/// Nothing leaks.
pub(super) fn check(run: &Run) -> Result<(), String> {
    if run.leaks.is_empty() { Ok(()) } else { Err(run.leaks.join(", ")) }
}
