//! Which errors a client may see, and which faults justify them. Nothing else does.
//!
//! | the client sees | because |
//! |---|---|
//! | a broken connection, `draining` | its router crashed, was held, or drained |
//! | `no_drafter`, `no_base` by the router | no node of that tier could be found |
//! | what a node said last: `unavailable`, `deadline_exceeded`, `draining`, `no_base` by a drafter, `no_drafter` by a base | no drafter and base could be found that reach each other; or the four attempts at a first token were used up by three nodes that were lost, or by one and by full ones |
//! | `deadline_exceeded` by the router | no drafter and base could be found that reach each other |
//! | `internal`, "is not passed on" | two nodes of that tier were lost |
//! | `overloaded` | as many others ask as a node has slots |
//!
//! A node *cannot be found* while it is down, held or draining, while it is cut off from the store,
//! while the link between it and the request's router is cut or slow, and for [`AFTERMATH`] after
//! that; nobody can by a router that was started again while the store was away or late. A store
//! that is away or late takes nobody else away; nor do links between nodes of one tier, or what
//! corrupts KV.

use std::time::Duration;

use headstart_proto::ErrorCode;

use crate::client::{End, Outcome};
use crate::net::HostId;
use crate::plan::{Fault, FaultKind, Kind};
use crate::run::Run;

/// How long after its end a fault is felt: until keep-alives have found the last connection that it
/// broke (3 s), and the slowest probe has found the node again (6.25 s and a second for its answer).
pub(super) const AFTERMATH: Duration = Duration::from_secs(11);

/// Whether faults justify how a request ended.
///
/// # Errors
/// In words, why not.
pub(super) fn excuse(run: &Run, outcome: &Outcome) -> Result<(), String> {
    let unexplained = |what: &str| Err(format!("nothing explains {what}"));
    match &outcome.end {
        End::Whole | End::HungUp | End::Hung | End::Vanished => Ok(()),
        End::Broken(_) if router_lost(run, outcome) => Ok(()),
        End::Broken(why) => unexplained(&format!("a broken connection: {why}")),
        End::Failed(code, message) => {
            let excused = match code {
                ErrorCode::Draining if router_lost(run, outcome) => true,
                // What a node said last of those that were tried.
                ErrorCode::Draining
                | ErrorCode::NoDrafter
                | ErrorCode::NoBase
                | ErrorCode::Unavailable
                | ErrorCode::DeadlineExceeded
                    if message.starts_with("drafter ") || message.starts_with("base ") =>
                {
                    no_pair(run, outcome) || has_no_attempt_left(run, outcome)
                }
                ErrorCode::NoDrafter => tier_lost(run, outcome, Kind::Drafter),
                ErrorCode::NoBase => tier_lost(run, outcome, Kind::Base),
                ErrorCode::DeadlineExceeded => no_pair(run, outcome),
                ErrorCode::Internal if message.contains("is not passed on") => {
                    let drafters = message.contains("cost 2 drafters");
                    let tier = if drafters { Kind::Drafter } else { Kind::Base };
                    losses(run, outcome, tier) >= 2
                }
                ErrorCode::Overloaded => !outcome.healed && is_crowded(run, outcome),
                _ => false,
            };
            if excused { Ok(()) } else { unexplained(&format!("{code}: {message}")) }
        }
    }
}

/// The client's router went away, or could not be reached.
fn router_lost(run: &Run, outcome: &Outcome) -> bool {
    let router = outcome.ask.router;
    felt(run, outcome).any(|fault| match fault.kind {
        FaultKind::Crash { host, .. } | FaultKind::Hold { host } | FaultKind::Drain { host } => {
            host == router
        }
        _ => false,
    })
}

/// At some time during the request no drafter and base could be found that reach each other.
fn no_pair(run: &Run, outcome: &Outcome) -> bool {
    knows_nobody(run, outcome)
        || at_some_time(run, outcome, |faults| {
            let lost = |node| faults.iter().any(|fault| takes(fault, node, outcome.ask.router));
            let mut pairs = run
                .plan
                .hosts(Kind::Drafter)
                .flat_map(|drafter| run.plan.hosts(Kind::Base).map(move |base| (drafter, base)));
            pairs.all(|(drafter, base)| {
                let apart = || faults.iter().any(|fault| parts(fault, drafter, base));
                lost(drafter) || lost(base) || apart()
            })
        })
}

/// At some time during the request no node of a tier could be found.
fn tier_lost(run: &Run, outcome: &Outcome, tier: Kind) -> bool {
    knows_nobody(run, outcome)
        || at_some_time(run, outcome, |faults| {
            let lost = |node| faults.iter().any(|fault| takes(fault, node, outcome.ask.router));
            run.plan.hosts(tier).all(lost)
        })
}

/// Whether something holds for the faults that are felt at some time during a request.
fn at_some_time(run: &Run, outcome: &Outcome, holds: impl Fn(&[&Fault]) -> bool) -> bool {
    // If there is such a time, the beginning of the request or of a fault is one.
    let begins = felt(run, outcome).map(|fault| fault.at.max(outcome.started));
    begins.chain([outcome.started]).any(|time| {
        let now = |fault: &&Fault| fault.at <= time && time <= fault.at + fault.lasts + AFTERMATH;
        holds(&felt(run, outcome).filter(now).collect::<Vec<_>>())
    })
}

/// The router was started again while the store told it nothing, or late.
fn knows_nobody(run: &Run, outcome: &Outcome) -> bool {
    let router = outcome.ask.router;
    let restarted = felt(run, outcome).any(|fault| {
        let kind = &fault.kind;
        matches!(kind, FaultKind::Crash { host, .. } | FaultKind::Drain { host } if *host == router)
    });
    let untold =
        |fault: &Fault| matches!(fault.kind, FaultKind::StoreAway | FaultKind::StoreLate { .. });
    restarted && felt(run, outcome).any(untold)
}

/// A request whose first token is not out has four attempts. A node that is lost costs one, and two
/// while nobody knows that it is; one of each tier that is full costs one as well.
fn has_no_attempt_left(run: &Run, outcome: &Outcome) -> bool {
    let begun = outcome.answers.iter().all(|answer| !answer.ids.is_empty());
    let lost: usize =
        [Kind::Drafter, Kind::Base].into_iter().map(|tier| losses(run, outcome, tier)).sum();
    !begun && lost >= if is_crowded(run, outcome) { 1 } else { 3 }
}

/// How often nodes of a tier were lost to a request, or could not reach one of the other tier.
fn losses(run: &Run, outcome: &Outcome, tier: Kind) -> usize {
    let router = outcome.ask.router;
    let other = if tier == Kind::Base { Kind::Drafter } else { Kind::Base };
    let hits = |fault: &Fault, node| {
        takes(fault, node, router) || run.plan.hosts(other).any(|other| parts(fault, node, other))
    };
    let lost = |node| felt(run, outcome).filter(|fault| hits(fault, node)).count();
    run.plan.hosts(tier).map(lost).sum()
}

/// Faults that a request may have felt.
fn felt<'a>(run: &'a Run, outcome: &'a Outcome) -> impl Iterator<Item = &'a Fault> {
    run.faults.iter().filter(|fault| {
        fault.at <= outcome.ended && outcome.started <= fault.at + fault.lasts + AFTERMATH
    })
}

/// Whether a fault takes a node away from the requests of a router.
fn takes(fault: &Fault, node: HostId, router: HostId) -> bool {
    match fault.kind {
        FaultKind::Crash { host, .. } | FaultKind::Drain { host } => host == node,
        // A router that is held reaches nobody.
        FaultKind::Hold { host } => host == node || host == router,
        // Its record expires.
        FaultKind::StoreCut { host } => host == node,
        _ => parts(fault, node, router),
    }
}

/// Whether a fault is between two hosts.
fn parts(fault: &Fault, one: HostId, two: HostId) -> bool {
    match fault.kind {
        FaultKind::Partition { from, to, .. } | FaultKind::Slow { from, to, .. } => {
            (from, to) == (one, two) || (from, to) == (two, one)
        }
        _ => false,
    }
}

/// Whether nodes may be full: others ask at the same time, or did until a moment ago.
fn is_crowded(run: &Run, outcome: &Outcome) -> bool {
    let others = run.outcomes.iter().filter(|other| {
        !std::ptr::eq(*other, outcome)
            && other.started <= outcome.ended
            && outcome.started <= other.ended + AFTERMATH
    });
    let others: u32 = others.map(|other| other.ask.choices).sum();
    others + outcome.ask.choices > run.plan.slots as u32
}
