//! Who runs, who waits and who is refused: plain state, driven with a clock that is handed in.
//!
//! Every request claims slots and KV tokens in a few pools: the router's own places, its base model's
//! nodes, the drafters. What fits runs. What does not waits, in one total order: interactive before
//! batch, and within a class by start-time fair queueing over the tokens of each tenant (Goyal, Vin and
//! Cheng, SIGCOMM 1996), so that a tenant who asks for much waits behind one who asks for little. A
//! queue that is full gives up whoever is last in that order.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use headstart_cluster::NodeRecord;
use tokio::time::Instant;

use super::Tenant;
use super::rate::Rate;

/// A waiting batch request is due once so many times its tokens of interactive requests went past
/// it: batch keeps a ninth of a cluster that is always full, and starves never.
const BATCH_AGES_AFTER: u64 = 8;
/// Requests that are looked at behind one that does not fit, in case they want other nodes.
const LOOK_AHEAD: usize = 64;
/// Bounds of the hint when to try again.
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// How soon a request is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Class {
    /// Somebody waits for it.
    #[default]
    Interactive,
    /// It takes what interactive requests leave.
    Batch,
}

impl Class {
    /// Both, the more urgent one first.
    pub(crate) const ALL: [Self; 2] = [Self::Interactive, Self::Batch];

    /// As clients write it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Batch => "batch",
        }
    }

    /// The class of this name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.as_str() == name)
    }
}

/// What requests compete for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Pool {
    /// Answers in this router.
    Router,
    /// The bases that serve this model.
    Base(Arc<str>),
    /// All drafters.
    Drafters,
    /// The drafters that serve this model.
    Drafter(Arc<str>),
}

/// How much of it there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    /// Answers at once.
    pub(crate) slots: u32,
    /// KV tokens of all answers together.
    pub(crate) tokens: u64,
}

impl Room {
    /// None.
    pub(crate) const EMPTY: Self = Self { slots: 0, tokens: 0 };

    /// One node's. One that does not tell what its KV cache holds bounds no tokens.
    pub(crate) fn of(record: &NodeRecord) -> Self {
        let tokens = if record.kv_tokens == 0 { u64::MAX } else { record.kv_tokens };
        Self { slots: record.slots, tokens }
    }

    /// Both together.
    pub(crate) fn and(self, other: Self) -> Self {
        let slots = self.slots.saturating_add(other.slots);
        Self { slots, tokens: self.tokens.saturating_add(other.tokens) }
    }

    /// What fits into each of them.
    pub(crate) fn lesser(self, other: Self) -> Self {
        Self { slots: self.slots.min(other.slots), tokens: self.tokens.min(other.tokens) }
    }
}

/// What a request takes of one pool. A claim on a pool that is not known is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) pool: Pool,
    pub(crate) slots: u32,
    pub(crate) tokens: u64,
}

/// A request before it is admitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Demand {
    pub(crate) class: Class,
    pub(crate) tenant: Tenant,
    /// What its tenant is charged.
    pub(crate) tokens: u64,
    pub(crate) claims: Vec<Claim>,
}

/// One request in the queue's books.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Ticket(u64);

/// Bounds of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Requests that wait at most.
    pub(crate) requests_max: usize,
    /// Their tokens together at most.
    pub(crate) tokens_max: u64,
    /// Whoever would wait longer than this is refused at once.
    pub(crate) wait_max: Duration,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Reason {
    /// The queue is full.
    Full,
    /// At the measured rate its turn would come too late.
    Late,
    /// It wants more answers at once than all nodes have slots.
    Never,
    /// It waited for too long.
    Expired,
}

impl Reason {
    /// As a metric's label.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Late => "late",
            Self::Never => "never",
            Self::Expired => "expired",
        }
    }
}

/// A refusal, and when it is worth another try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reason: Reason,
    pub(crate) class: Class,
    pub(crate) retry_after: Duration,
}

/// What was decided about a request.
pub(crate) type Verdict = (Ticket, Result<(), Refusal>);

/// A place in the order of one class: the virtual time at which the request starts, then its age.
type Rank = (u64, Ticket);

#[derive(Debug)]
struct Waiting {
    tokens: u64,
    claims: Vec<Claim>,
}

#[derive(Debug, Default)]
struct Line {
    waiting: BTreeMap<Rank, Waiting>,
    tokens: u64,
    /// The start of the request that was admitted last.
    virtual_time: u64,
    /// When each tenant's last request ends, in virtual time; those that have ended are forgotten.
    ends: HashMap<Tenant, u64>,
}

impl Line {
    fn push(&mut self, ticket: Ticket, demand: Demand) -> Rank {
        let ended = self.virtual_time;
        if self.ends.len() > 2 * self.waiting.len() + 64 {
            self.ends.retain(|_, end| *end > ended);
        }
        let end = self.ends.entry(demand.tenant).or_default();
        let start = ended.max(*end);
        *end = start.saturating_add(demand.tokens);
        let rank = (start, ticket);
        self.tokens += demand.tokens;
        self.waiting.insert(rank, Waiting { tokens: demand.tokens, claims: demand.claims });
        rank
    }

    fn remove(&mut self, rank: Rank) -> Option<Waiting> {
        let waiting = self.waiting.remove(&rank)?;
        self.tokens -= waiting.tokens;
        Some(waiting)
    }

    fn after(&self, rank: Option<Rank>) -> Option<(Rank, &Waiting)> {
        let from = rank.map_or(Bound::Unbounded, Bound::Excluded);
        self.waiting.range((from, Bound::Unbounded)).next().map(|(rank, it)| (*rank, it))
    }
}

#[derive(Debug, Default)]
struct Used {
    slots: u32,
    tokens: u64,
}

/// Where a ticket is.
#[derive(Debug)]
enum Entry {
    Waiting(Class, Rank),
    Running { tokens: u64, claims: Vec<Claim> },
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Queue {
    limits: Limits,
    rooms: HashMap<Pool, Room>,
    used: HashMap<Pool, Used>,
    lines: [Line; 2],
    entries: HashMap<Ticket, Entry>,
    /// Tokens of interactive requests that went past waiting batch requests.
    passed_tokens: u64,
    rate: Rate,
    next_ticket: u64,
}

impl Queue {
    /// An empty queue, and no pools.
    pub(crate) fn new(limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            rooms: HashMap::new(),
            used: HashMap::new(),
            lines: Default::default(),
            entries: HashMap::new(),
            passed_tokens: 0,
            rate: Rate::new(now),
            next_ticket: 0,
        }
    }

    /// Requests of `class` that wait, and their tokens.
    pub(crate) fn waiting(&self, class: Class) -> (usize, u64) {
        let line = &self.lines[class as usize];
        (line.waiting.len(), line.tokens)
    }

    fn is_contended(&self) -> bool {
        self.lines.iter().any(|line| !line.waiting.is_empty())
    }

    /// Requests that wait or run.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Takes the pools as they are now. What runs goes on, fitting or not.
    pub(crate) fn resize(&mut self, rooms: HashMap<Pool, Room>, now: Instant) -> Vec<Verdict> {
        self.rate.pass(now, self.is_contended());
        self.rooms = rooms;
        self.used.retain(|_, used| used.slots > 0 || used.tokens > 0);
        self.dispatch()
    }

    /// Takes a request. The verdict on it is among those returned, unless it waits.
    pub(crate) fn arrive(&mut self, demand: Demand, now: Instant) -> (Ticket, Vec<Verdict>) {
        self.rate.pass(now, self.is_contended());
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        let class = demand.class;
        let never = |claim: &Claim| {
            self.rooms.get(&claim.pool).is_some_and(|room| claim.slots > room.slots)
        };
        if demand.claims.iter().any(never) {
            return (ticket, vec![(ticket, Err(self.refusal(Reason::Never, class, 0)))]);
        }
        let rank = self.lines[class as usize].push(ticket, demand);
        self.entries.insert(ticket, Entry::Waiting(class, rank));
        let mut verdicts = self.dispatch();
        if matches!(self.entries.get(&ticket), Some(Entry::Waiting(..))) {
            self.bound(ticket, class, rank, &mut verdicts);
        }
        (ticket, verdicts)
    }

    /// The request is over, or its client is gone.
    pub(crate) fn leave(&mut self, ticket: Ticket, now: Instant) -> Vec<Verdict> {
        let contended = self.is_contended();
        self.rate.pass(now, contended);
        match self.entries.remove(&ticket) {
            Some(Entry::Waiting(class, rank)) => {
                self.lines[class as usize].remove(rank);
            }
            Some(Entry::Running { tokens, claims }) => {
                self.give_back(&claims);
                if contended {
                    self.rate.add(tokens);
                }
            }
            None => return Vec::new(),
        }
        self.dispatch()
    }

    /// What a running request really takes, now that it is known: `claims` replaces what it had.
    pub(crate) fn correct(
        &mut self,
        ticket: Ticket,
        tokens: u64,
        claims: Vec<Claim>,
    ) -> Vec<Verdict> {
        let Some(Entry::Running { tokens: had_tokens, claims: had }) =
            self.entries.get_mut(&ticket)
        else {
            return Vec::new();
        };
        *had_tokens = tokens;
        let old = std::mem::replace(had, claims.clone());
        self.give_back(&old);
        self.take(&claims);
        self.dispatch()
    }

    /// Whoever waits and is still there gets this refusal when its time is over.
    pub(crate) fn expired(&self, class: Class) -> Refusal {
        self.refusal(Reason::Expired, class, 0)
    }

    /// Admits whoever fits, in order. One that does not fit keeps those behind it from the pools it
    /// waits for, so that it is not overtaken for ever by smaller ones.
    fn dispatch(&mut self) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        let mut full: Vec<Pool> = Vec::new();
        let mut last: [Option<Rank>; 2] = [None, None];
        let mut skipped = 0;
        while skipped < LOOK_AHEAD
            && let Some((class, rank)) = self.next(last)
        {
            last[class as usize] = Some(rank);
            let line = &self.lines[class as usize];
            let Some(claims) = line.waiting.get(&rank).map(|waiting| &waiting.claims) else {
                break;
            };
            if claims.iter().any(|claim| full.contains(&claim.pool)) {
                skipped += 1;
                continue;
            }
            let lacking: Vec<Pool> = claims
                .iter()
                .filter(|claim| !self.fits(claim))
                .map(|claim| claim.pool.clone())
                .collect();
            if lacking.is_empty() {
                self.start(class, rank);
                verdicts.push((rank.1, Ok(())));
            } else {
                full.extend(lacking);
                skipped += 1;
            }
        }
        verdicts
    }

    /// The next in order after those that were looked at.
    fn next(&self, last: [Option<Rank>; 2]) -> Option<(Class, Rank)> {
        let [interactive, batch] =
            Class::ALL.map(|class| self.lines[class as usize].after(last[class as usize]));
        match (interactive, batch) {
            (Some((rank, _)), None) => Some((Class::Interactive, rank)),
            (None, Some((rank, _))) => Some((Class::Batch, rank)),
            (Some((urgent, _)), Some((rank, waiting))) => {
                let due = self.passed_tokens >= waiting.tokens.saturating_mul(BATCH_AGES_AFTER);
                Some(if due { (Class::Batch, rank) } else { (Class::Interactive, urgent) })
            }
            (None, None) => None,
        }
    }

    fn start(&mut self, class: Class, rank: Rank) {
        let line = &mut self.lines[class as usize];
        line.virtual_time = line.virtual_time.max(rank.0);
        let Some(Waiting { tokens, claims }) = line.remove(rank) else { return };
        match class {
            Class::Batch => {
                let due = tokens.saturating_mul(BATCH_AGES_AFTER);
                self.passed_tokens = self.passed_tokens.saturating_sub(due);
            }
            Class::Interactive if self.waiting(Class::Batch).0 > 0 => self.passed_tokens += tokens,
            Class::Interactive => {}
        }
        if self.waiting(Class::Batch).0 == 0 {
            self.passed_tokens = 0;
        }
        self.take(&claims);
        self.entries.insert(rank.1, Entry::Running { tokens, claims });
    }

    /// Whether there is room. Tokens that no pool could ever hold must only find it empty.
    fn fits(&self, claim: &Claim) -> bool {
        let Some(room) = self.rooms.get(&claim.pool) else { return true };
        let (slots, tokens) = self.used.get(&claim.pool).map_or((0, 0), |u| (u.slots, u.tokens));
        slots + claim.slots <= room.slots && tokens + claim.tokens.min(room.tokens) <= room.tokens
    }

    fn take(&mut self, claims: &[Claim]) {
        for claim in claims {
            let used = self.used.entry(claim.pool.clone()).or_default();
            used.slots += claim.slots;
            used.tokens += claim.tokens;
        }
    }

    fn give_back(&mut self, claims: &[Claim]) {
        for claim in claims {
            if let Some(used) = self.used.get_mut(&claim.pool) {
                used.slots = used.slots.saturating_sub(claim.slots);
                used.tokens = used.tokens.saturating_sub(claim.tokens);
            }
        }
    }

    /// Keeps the queue within its bounds after `ticket` came, and refuses it if it came too late.
    fn bound(&mut self, ticket: Ticket, class: Class, rank: Rank, verdicts: &mut Vec<Verdict>) {
        let over = |queue: &Self| {
            let [(requests, tokens), (more, more_tokens)] =
                Class::ALL.map(|class| queue.waiting(class));
            requests + more > queue.limits.requests_max
                || tokens + more_tokens > queue.limits.tokens_max
        };
        while over(self) {
            let last = Class::ALL.into_iter().rev().find_map(|class| {
                let (rank, _) = self.lines[class as usize].waiting.last_key_value()?;
                Some((class, *rank))
            });
            let Some((class, rank)) = last else { return };
            self.refuse(class, rank, Reason::Full, verdicts);
        }
        if self.entries.contains_key(&ticket)
            && self.expected_wait(class, rank).is_some_and(|wait| wait > self.limits.wait_max)
        {
            self.refuse(class, rank, Reason::Late, verdicts);
        }
    }

    fn refuse(&mut self, class: Class, rank: Rank, reason: Reason, verdicts: &mut Vec<Verdict>) {
        let tokens = self.lines[class as usize].remove(rank).map_or(0, |waiting| waiting.tokens);
        self.entries.remove(&rank.1);
        verdicts.push((rank.1, Err(self.refusal(reason, class, tokens))));
    }

    /// How long until the turn of `rank` comes, at the rate at which the cluster works when it is
    /// full.
    fn expected_wait(&self, class: Class, rank: Rank) -> Option<Duration> {
        let line = &self.lines[class as usize];
        let before = match class {
            Class::Interactive => 0,
            Class::Batch => self.lines[Class::Interactive as usize].tokens,
        };
        let whole = self.rate.time_for(before + line.tokens)?;
        if whole <= self.limits.wait_max {
            return Some(whole);
        }
        let ahead: u64 = line.waiting.range(..rank).map(|(_, waiting)| waiting.tokens).sum();
        self.rate.time_for(before + ahead)
    }

    /// A refusal of a request of so many tokens: try again when what waits now, and it, are done.
    fn refusal(&self, reason: Reason, class: Class, tokens: u64) -> Refusal {
        let waiting: u64 = self.lines.iter().map(|line| line.tokens).sum();
        let wait = self.rate.time_for(waiting + tokens).unwrap_or_default();
        Refusal { reason, class, retry_after: wait.clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX) }
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
