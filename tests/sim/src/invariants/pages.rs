//! Pages are never freed while they are read: what goes over the wire as the KV of some tokens is
//! just that.

use crate::run::Run;

/// No page held anything else than the KV of its tokens.
pub(super) fn check(run: &Run) -> Result<(), String> {
    match run.seen.wrong_pages.as_slice() {
        [] => Ok(()),
        wrong => Err(format!("not the KV of its tokens: {}", wrong.join(", "))),
    }
}
