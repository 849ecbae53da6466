//! What may be tried again, when, and how often: pure functions over what happened.
//!
//! Three bounds hold. An answer whose first token is not out has few attempts; one that the client
//! reads is tried again until its time is over; and all of a router's requests share a budget, so
//! that a dying fleet is not beaten to death (the idea is linkerd's retry budget: retries are at most
//! a share of the recent requests, and a few a second anyway). A request that costs two nodes of a
//! tier at the same position is at fault itself: it is not passed on.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use headstart_cluster::Tier;
use headstart_proto::{Error, ErrorCode};

/// Attempts at an answer whose first token is not out.
const ATTEMPTS_MAX: u32 = 4;
/// Attempts that reached no node and do not count as such: a router that was paused finds all its
/// connections broken at once, and each of them fails one call before it is opened again.
const UNREACHED_MAX: u32 = 4;
/// Nodes of one tier that an answer may cost at one position.
const STRIKES_MAX: u32 = 2;
/// The first pause, when there is nowhere else to go; each one after it is twice as long.
const PAUSE_MIN: Duration = Duration::from_millis(25);
/// The longest one.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// What has failed of an answer since it last moved on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct History {
    /// Attempts, and looks for a node that found none.
    pub(crate) failures: u32,
    /// Those of them whose connection was broken before the node could take the request.
    unreached: u32,
    base_strikes: u32,
    drafter_strikes: u32,
}

/// What the failure of an attempt says about the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blame {
    /// Nothing: no connection to it stood.
    Unreached,
    /// It did not do what was asked, or there was none.
    Failed,
    /// It had taken the request, and was lost or broke down over it.
    Struck,
}

impl History {
    /// An attempt failed.
    pub(crate) fn failed(&mut self, tier: Tier, blame: Blame) {
        self.failures += 1;
        match (blame, tier) {
            (Blame::Unreached, _) => self.unreached += 1,
            (Blame::Failed, _) => {}
            (Blame::Struck, Tier::Base) => self.base_strikes += 1,
            (Blame::Struck, Tier::Drafter) => self.drafter_strikes += 1,
        }
    }

    fn attempts(self) -> u32 {
        self.failures - self.unreached.min(UNREACHED_MAX)
    }

    fn is_poison(self) -> bool {
        self.base_strikes.max(self.drafter_strikes) >= STRIKES_MAX
    }
}

/// What an answer is like when an attempt at it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Situation {
    /// The failure.
    pub(crate) code: ErrorCode,
    /// The client has tokens of the answer.
    pub(crate) begun: bool,
    /// A node that did not fail it could take it.
    pub(crate) elsewhere: bool,
    /// Its time is over.
    pub(crate) late: bool,
}

/// What becomes of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Another attempt, at once.
    Now,
    /// Another attempt, after a pause.
    After(Duration),
    /// The failure is the answer's end.
    Refuse,
    /// The request is at fault.
    Poison,
}

/// Decides. `jitter` in `[0, 1)` spreads the pauses.
pub(crate) fn decide(history: History, situation: Situation, jitter: f64) -> Verdict {
    let Situation { code, begun, elsewhere, late } = situation;
    if !may_be_tried_again(code) || late {
        return Verdict::Refuse;
    }
    if history.is_poison() {
        return Verdict::Poison;
    }
    if !begun {
        let full = code == ErrorCode::Overloaded && !elsewhere && history.failures <= 1;
        if history.attempts() >= ATTEMPTS_MAX || full {
            return Verdict::Refuse;
        }
    }
    if elsewhere { Verdict::Now } else { Verdict::After(pause(history.failures, jitter)) }
}

/// The pause after so many failures: exponential, and between a half and the whole of it.
pub(crate) fn pause(failures: u32, jitter: f64) -> Duration {
    let doublings = failures.saturating_sub(1).min(10);
    let whole = PAUSE_MIN.saturating_mul(1 << doublings).min(PAUSE_MAX);
    whole.mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0))
}

/// Whether another node may do what this one did not. A client's mistake is one everywhere.
fn may_be_tried_again(code: ErrorCode) -> bool {
    code.retryable() || code == ErrorCode::Internal
}

/// The error of a request that costs too many nodes.
pub(crate) fn poison(tier: Tier, position: u32, last: &Error) -> Error {
    let code = match last.code {
        // It is not to be sent again.
        ErrorCode::Unavailable => ErrorCode::Internal,
        code => code,
    };
    let message = format!(
        "the answer cost {STRIKES_MAX} {tier}s at position {position} and is not passed on: {}",
        last.message
    );
    Error::new(code, message)
}

/// Seconds that the budget looks back.
const WINDOW_SECONDS: u64 = 10;
/// Retries a second that are always allowed.
const RETRIES_A_SECOND: u64 = 10;
/// Retries for each hundred requests on top of that.
const RETRY_PERCENT: u64 = 20;

/// Requests and retries of one second.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    second: u64,
    requests: u64,
    retries: u64,
}

/// The retries that all requests share.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    slots: Mutex<[Slot; WINDOW_SECONDS as usize]>,
}

impl Budget {
    /// A request was taken, `now` after the router's start.
    pub(crate) fn request(&self, now: Duration) {
        self.with(now, |slots, at| slots[at].requests += 1);
    }

    /// Takes one retry, if there is one.
    pub(crate) fn take(&self, now: Duration) -> bool {
        self.with(now, |slots, at| {
            let oldest = (now.as_secs() + 1).saturating_sub(WINDOW_SECONDS);
            let recent = slots.iter().filter(|slot| slot.second >= oldest);
            let (requests, retries) = recent.fold((0, 0), |(requests, retries), slot| {
                (requests + slot.requests, retries + slot.retries)
            });
            let allowed = RETRIES_A_SECOND * WINDOW_SECONDS + requests * RETRY_PERCENT / 100;
            let taken = retries < allowed;
            slots[at].retries += u64::from(taken);
            taken
        })
    }

    fn with<T>(&self, now: Duration, f: impl FnOnce(&mut [Slot], usize) -> T) -> T {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let second = now.as_secs();
        let at = (second % WINDOW_SECONDS) as usize;
        if slots[at].second != second {
            slots[at] = Slot { second, ..Slot::default() };
        }
        f(&mut *slots, at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table() {
        use ErrorCode::{
            DeadlineExceeded, Draining, Internal, InvalidArgument, NoBase, Overloaded, Protocol,
            Unavailable,
        };
        use Verdict::{After, Now, Poison, Refuse};
        let after = |ms| After(Duration::from_millis(ms));
        #[rustfmt::skip]
        let cases = [
            // failure         begun  elsewhere late   failures strikes  verdict
            (Unavailable,      false, true,     false, 1,       0,       Now),
            (Unavailable,      false, false,    false, 1,       0,       after(25)),
            (Unavailable,      false, true,     false, 3,       1,       Now),
            (Unavailable,      false, true,     false, 4,       0,       Refuse),
            (Unavailable,      true,  true,     false, 4,       0,       Now),
            (Unavailable,      true,  false,    false, 3,       0,       after(100)),
            (Unavailable,      true,  false,    false, 90,      0,       after(1000)),
            (Unavailable,      true,  true,     true,  1,       0,       Refuse),
            (Unavailable,      true,  true,     false, 2,       2,       Poison),
            (Internal,         true,  true,     false, 1,       1,       Now),
            (Internal,         false, true,     false, 2,       2,       Poison),
            (Protocol,         true,  true,     false, 1,       1,       Now),
            (DeadlineExceeded, true,  false,    false, 1,       1,       after(25)),
            (Draining,         true,  true,     false, 1,       0,       Now),
            (NoBase,           true,  false,    false, 2,       0,       after(50)),
            (Overloaded,       false, true,     false, 1,       0,       Now),
            (Overloaded,       false, false,    false, 1,       0,       Refuse),
            (Overloaded,       false, false,    false, 2,       0,       after(50)),
            (Overloaded,       true,  false,    false, 1,       0,       after(25)),
            (InvalidArgument,  true,  true,     false, 1,       0,       Refuse),
        ];
        for (code, begun, elsewhere, late, failures, base_strikes, expected) in cases {
            let history = History { failures, base_strikes, ..History::default() };
            let situation = Situation { code, begun, elsewhere, late };
            let verdict = decide(history, situation, 1.0);
            assert_eq!(verdict, expected, "{code}, {failures} failures, begun: {begun}");
        }
    }

    #[test]
    fn strikes_are_counted_by_tier() {
        let mut history = History::default();
        history.failed(Tier::Base, Blame::Struck);
        history.failed(Tier::Drafter, Blame::Struck);
        history.failed(Tier::Base, Blame::Failed);
        history.failed(Tier::Base, Blame::Unreached);
        assert!(!history.is_poison());
        history.failed(Tier::Drafter, Blame::Struck);
        assert!(history.is_poison());
        assert_eq!((history.failures, history.attempts()), (5, 4));
    }

    /// A router goes on after a pause in which every node gave its connection up: the stream of the
    /// first one breaks, the calls to the other two bases and to the drafters as well, and then all
    /// are there again.
    #[test]
    fn connections_that_are_all_broken_at_once_do_not_end_an_answer() {
        use Blame::{Failed, Struck, Unreached};
        use Verdict::{Now, Refuse};
        let after = |ms| Verdict::After(Duration::from_millis(ms));
        let broken = |elsewhere| Situation {
            code: ErrorCode::Unavailable,
            begun: false,
            elsewhere,
            late: false,
        };
        let mut history = History::default();
        for (tier, blame, elsewhere, verdict) in [
            (Tier::Base, Struck, true, Now),
            (Tier::Base, Unreached, true, Now),
            (Tier::Base, Unreached, false, after(100)),
            (Tier::Drafter, Unreached, true, Now),
            (Tier::Drafter, Unreached, false, after(400)),
            // Nodes that stay away end it all the same, and so do nodes that fail.
            (Tier::Base, Unreached, false, after(800)),
            (Tier::Base, Failed, true, Now),
            (Tier::Base, Unreached, true, Refuse),
        ] {
            history.failed(tier, blame);
            assert_eq!(decide(history, broken(elsewhere), 1.0), verdict, "{history:?}");
        }
    }

    #[test]
    fn pauses_are_spread() {
        assert_eq!(pause(1, 0.0), Duration::from_micros(12_500));
        assert_eq!(pause(3, 0.5), Duration::from_millis(75));
        assert_eq!(pause(u32::MAX, 2.0), PAUSE_MAX);
    }

    #[test]
    fn the_budget_is_a_share_of_recent_requests_and_a_minimum() {
        let budget = Budget::default();
        let at = Duration::from_secs;
        let taken = |second| (0..10_000).take_while(|_| budget.take(at(second))).count();
        assert_eq!(taken(100), 100, "the minimum");
        assert!(!budget.take(at(109)), "still within the window");
        assert_eq!(taken(110), 100);
        (0..1000).for_each(|_| budget.request(at(111)));
        assert_eq!(taken(111), 200, "a share of the requests");
        assert_eq!(taken(119), 0);
        assert_eq!(taken(120), 100, "the retries of second 110 are forgotten");
        assert_eq!(taken(131), 100, "and so are the requests");
    }
}
