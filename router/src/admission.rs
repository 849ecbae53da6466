//! Admission: the router takes no more than its nodes can hold, in slots and in KV tokens of each
//! tier; a bounded number waits, and the rest is told at once when to come back. All of it happens
//! before a prompt is tokenised, on an estimate that is corrected afterwards.

mod keys;
mod queue;
mod rate;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use headstart_cluster::{BaseRole, NodeRecord};
use headstart_proto::{Error, ErrorCode};
use headstart_text::Message;
use tokio::sync::oneshot;

pub use keys::ApiKeys;
pub(crate) use keys::{Callers, Tenant};
use queue::{Claim, Demand, Limits, Pool, Queue, Refusal, Room, Ticket, Verdict};
pub(crate) use queue::{Class, Reason};

use crate::metrics::Metrics;
use crate::options::RouterOptions;
use crate::route::{Candidate, Snapshot};

/// Bytes of text that are taken for a token before it is tokenised: English has about four.
const BYTES_PER_TOKEN: u64 = 4;
/// Tokens around each message in a prompt.
const TOKENS_PER_MESSAGE: u64 = 8;
/// Length of an answer without `max_tokens`, in tokens, until answers were seen.
const ANSWER_TOKENS_INITIAL: u64 = 256;
/// A new answer changes the expected length by one part in so many.
const ANSWER_MEMORY: u64 = 32;

/// Who asks, and how urgently, as far as the connection says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    /// Whose share the request uses.
    pub(crate) tenant: Tenant,
    /// What the request's header says; its body wins.
    pub(crate) class: Option<Class>,
}

/// What is known of a request when it asks for admission.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) caller: Caller,
    pub(crate) class: Class,
    pub(crate) choices: u32,
    pub(crate) messages: &'a [Message],
    /// Tokens of each answer, where the client said it.
    pub(crate) max_tokens: Option<u32>,
    /// The longest draft.
    pub(crate) draft_tokens_max: u32,
    /// The base it would go to now.
    pub(crate) base: &'a NodeRecord,
    /// The drafter's name where the client chose one; `None` inside where any will do, `None`
    /// outside where none takes part.
    pub(crate) drafter: Option<Option<&'a str>>,
    /// Tokens a sequence on the drafter can hold.
    pub(crate) drafter_context: u32,
}

/// The queue, shared by all requests.
#[derive(Debug)]
pub(crate) struct Admission {
    inner: Mutex<Inner>,
    wait_max: Duration,
    metrics: Metrics,
}

#[derive(Debug)]
struct Inner {
    queue: Queue,
    waiters: HashMap<Ticket, oneshot::Sender<Result<(), Refusal>>>,
    /// The running mean of answers' lengths, times [`ANSWER_MEMORY`].
    answer_tokens_sum: u64,
    closed: bool,
}

impl Inner {
    /// Tokens that an answer usually has.
    fn expected(&self) -> u64 {
        (self.answer_tokens_sum / ANSWER_MEMORY).max(1)
    }
}

impl Admission {
    /// An admission that knows no nodes yet.
    pub(crate) fn new(options: &RouterOptions, metrics: Metrics) -> Arc<Self> {
        let limits = Limits {
            requests_max: options.queue_requests_max as usize,
            tokens_max: options.queue_tokens_max,
            wait_max: options.queue_timeout,
        };
        let queue = Queue::new(limits, Instant::now());
        let inner = Inner {
            queue,
            waiters: HashMap::new(),
            answer_tokens_sum: ANSWER_TOKENS_INITIAL * ANSWER_MEMORY,
            closed: false,
        };
        Arc::new(Self { inner: Mutex::new(inner), wait_max: options.queue_timeout, metrics })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows the nodes: what they hold together is what is admitted.
    pub(crate) fn resize(&self, snapshot: &Snapshot<'_>, in_flight_max: u32) {
        let mut inner = self.lock();
        let verdicts = inner.queue.resize(rooms(snapshot, in_flight_max), Instant::now());
        self.tell(&mut inner, verdicts);
    }

    /// Requests that wait or run.
    pub(crate) fn held(&self) -> usize {
        self.lock().queue.len()
    }

    /// Admits nobody any more. Those that wait are told to go elsewhere.
    pub(crate) fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        inner.waiters.clear();
    }

    /// Waits for the request's turn. Cancel safe: a request that is dropped leaves the queue.
    ///
    /// # Errors
    /// [`ErrorCode::Overloaded`] with a hint when the queue is full, the turn would come too late, or
    /// did; [`ErrorCode::Draining`] after [`Self::close`].
    pub(crate) async fn admit(self: &Arc<Self>, request: &Request<'_>) -> Result<Permit, Error> {
        let (permit, verdict) = self.arrive(request)?;
        let Some(verdict) = verdict else { return Ok(permit.running()) };
        let begun = Instant::now();
        let outcome = tokio::time::timeout(self.wait_max, verdict).await;
        let refusal = match outcome {
            Ok(Ok(Ok(()))) => {
                self.metrics.waited(request.class, begun.elapsed());
                return Ok(permit.running());
            }
            Ok(Ok(Err(refusal))) => refusal,
            Ok(Err(_)) => return Err(draining()),
            Err(_) => self.lock().queue.expired(request.class),
        };
        Err(self.refused(refusal))
    }

    /// Enters the request: its permit, and what to wait for where it is not admitted at once.
    #[allow(clippy::type_complexity)] // a permit, and perhaps a verdict to come
    fn arrive(
        self: &Arc<Self>,
        request: &Request<'_>,
    ) -> Result<(Permit, Option<oneshot::Receiver<Result<(), Refusal>>>), Error> {
        let mut inner = self.lock();
        if inner.closed {
            return Err(draining());
        }
        let sizes = Sizes::estimated(request, inner.expected());
        let demand = Demand {
            class: request.class,
            tenant: request.caller.tenant.clone(),
            tokens: sizes.total(),
            claims: sizes.claims(request.choices),
        };
        let (ticket, mut verdicts) = inner.queue.arrive(demand, Instant::now());
        let own = verdicts.iter().position(|(other, _)| *other == ticket);
        let own = own.map(|index| verdicts.swap_remove(index).1);
        self.tell(&mut inner, verdicts);
        let receiver = match own {
            Some(Ok(())) => {
                self.metrics.waited(request.class, Duration::ZERO);
                None
            }
            Some(Err(refusal)) => {
                drop(inner);
                return Err(self.refused(refusal));
            }
            None => {
                let (sender, receiver) = oneshot::channel();
                inner.waiters.insert(ticket, sender);
                Some(receiver)
            }
        };
        drop(inner);
        let permit = Permit {
            admission: Arc::clone(self),
            ticket,
            choices: request.choices,
            sizes: Mutex::new(sizes),
            running: false,
        };
        Ok((permit, receiver))
    }

    /// Tells those whose turn has come, and those who lost their place.
    fn tell(&self, inner: &mut Inner, verdicts: Vec<Verdict>) {
        for (ticket, verdict) in verdicts {
            if let Some(waiter) = inner.waiters.remove(&ticket) {
                // Whoever is gone gives its place back by itself.
                let _ = waiter.send(verdict);
            }
        }
        for class in Class::ALL {
            let (requests, tokens) = inner.queue.waiting(class);
            self.metrics.queue(class, requests, tokens);
        }
    }

    fn refused(&self, refusal: Refusal) -> Error {
        self.metrics.refused(refusal.class, refusal.reason);
        let message = match refusal.reason {
            Reason::Full => "too many requests wait already",
            Reason::Late => "so much waits already that this request's turn would come too late",
            Reason::Never => "more answers are asked for at once than there are places",
            Reason::Expired => "the request's turn did not come in time",
        };
        Error::new(ErrorCode::Overloaded, message).with_retry_after(refusal.retry_after)
    }
}

fn draining() -> Error {
    Error::new(ErrorCode::Draining, "the router is shutting down")
}

/// A request's place, from its arrival on; dropping it gives the place back.
#[derive(Debug)]
pub(crate) struct Permit {
    admission: Arc<Admission>,
    ticket: Ticket,
    choices: u32,
    sizes: Mutex<Sizes>,
    running: bool,
}

impl Permit {
    fn running(mut self) -> Self {
        self.admission.metrics.in_flight(f64::from(self.choices));
        self.running = true;
        self
    }

    /// Replaces the estimate by what tokenising found.
    pub(crate) fn correct(
        &self,
        base_prompt: usize,
        drafter_prompt: Option<usize>,
        max_tokens: u32,
    ) {
        self.change(|sizes, expected| {
            let answer =
                if sizes.open_ended { expected.min(max_tokens.into()) } else { max_tokens.into() };
            sizes.base_tokens = base_prompt as u64 + answer;
            if let Some(prompt) = drafter_prompt {
                sizes.drafter_tokens = sizes.draft(prompt as u64);
            }
        });
    }

    /// One answer's draft is decided: its drafter is free.
    pub(crate) fn draft_decided(&self) {
        self.change(|sizes, _| sizes.drafts_live = sizes.drafts_live.saturating_sub(1));
    }

    /// An answer of so many tokens is complete: the length that is expected of the next ones follows.
    pub(crate) fn answered(&self, tokens: u32) {
        let mut inner = self.admission.lock();
        inner.answer_tokens_sum += u64::from(tokens);
        inner.answer_tokens_sum -= inner.answer_tokens_sum / ANSWER_MEMORY;
    }

    fn change(&self, change: impl FnOnce(&mut Sizes, u64)) {
        let mut inner = self.admission.lock();
        let mut sizes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut sizes, inner.expected());
        let verdicts = inner.queue.correct(self.ticket, sizes.total(), sizes.claims(self.choices));
        self.admission.tell(&mut inner, verdicts);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut inner = self.admission.lock();
        inner.waiters.remove(&self.ticket);
        let verdicts = inner.queue.leave(self.ticket, Instant::now());
        self.admission.tell(&mut inner, verdicts);
        if self.running {
            self.admission.metrics.in_flight(-f64::from(self.choices));
        }
    }
}

/// What a request takes.
#[derive(Clone, Debug)]
struct Sizes {
    base: Arc<str>,
    /// Of each answer: prompt and answer.
    base_tokens: u64,
    choices: u64,
    /// The client named no `max_tokens`: the usual length is expected.
    open_ended: bool,
    drafter: Option<Option<Arc<str>>>,
    /// Of each draft: prompt and draft.
    drafter_tokens: u64,
    draft_tokens: u64,
    drafter_context: u64,
    /// Drafts that are not decided yet.
    drafts_live: u32,
}

impl Sizes {
    fn estimated(request: &Request<'_>, expected: u64) -> Self {
        let context = u64::from(request.base.context_length);
        let text = |message: &Message| {
            TOKENS_PER_MESSAGE + (message.content.len() as u64).div_ceil(BYTES_PER_TOKEN)
        };
        let prompt = request.messages.iter().map(text).sum::<u64>().min(context);
        let answer = request.max_tokens.map_or(expected, u64::from);
        let mut sizes = Self {
            base: request.base.model.as_str().into(),
            base_tokens: (prompt + answer).min(context),
            choices: request.choices.into(),
            open_ended: request.max_tokens.is_none(),
            drafter: request.drafter.map(|named| named.map(Into::into)),
            drafter_tokens: 0,
            draft_tokens: request.draft_tokens_max.into(),
            drafter_context: request.drafter_context.into(),
            drafts_live: if request.drafter.is_some() { request.choices } else { 0 },
        };
        sizes.drafter_tokens = sizes.draft(prompt);
        sizes
    }

    /// What a draft takes of a drafter.
    fn draft(&self, prompt: u64) -> u64 {
        (prompt + self.draft_tokens).min(self.drafter_context)
    }

    /// What the tenant is charged.
    fn total(&self) -> u64 {
        self.base_tokens * self.choices
    }

    fn claims(&self, choices: u32) -> Vec<Claim> {
        let mut claims = vec![
            Claim { pool: Pool::Router, slots: choices, tokens: 0 },
            Claim {
                pool: Pool::Base(Arc::clone(&self.base)),
                slots: choices,
                tokens: self.total(),
            },
        ];
        if let (Some(named), live @ 1..) = (&self.drafter, self.drafts_live) {
            let tokens = self.drafter_tokens * u64::from(live);
            let mut claim = |pool| claims.push(Claim { pool, slots: live, tokens });
            claim(Pool::Drafters);
            if let Some(name) = named {
                claim(Pool::Drafter(Arc::clone(name)));
            }
        }
        claims
    }
}

/// What there is, by pool: the nodes that take new work and are believed to be well, or all of
/// them while none is.
fn rooms(snapshot: &Snapshot<'_>, in_flight_max: u32) -> HashMap<Pool, Room> {
    let router = Room { slots: in_flight_max, tokens: u64::MAX };
    let mut rooms = HashMap::from([(Pool::Router, router)]);
    let mut bases = HashMap::<&str, Roles>::new();
    for record in serving(&snapshot.bases) {
        bases.entry(&record.model).or_default().add(record);
    }
    rooms.extend(bases.into_iter().map(|(model, roles)| (Pool::Base(model.into()), roles.room())));
    for record in serving(&snapshot.drafters) {
        for pool in [Pool::Drafters, Pool::Drafter(record.model.as_str().into())] {
            let room = rooms.entry(pool).or_insert(Room::EMPTY);
            *room = room.and(Room::of(record));
        }
    }
    rooms
}

/// The nodes that count.
fn serving<'a>(nodes: &[Candidate<'a>]) -> Vec<&'a NodeRecord> {
    let live = || nodes.iter().filter(|node| !node.record.draining);
    let is_well = |model: &str| {
        live().any(|other| other.record.model == model && other.suspected_for.is_none())
    };
    let counts =
        |node: &&Candidate<'_>| node.suspected_for.is_none() || !is_well(&node.record.model);
    live().filter(counts).map(|node| node.record).collect()
}

/// What the bases of one model hold, by what they do of an answer.
#[derive(Clone, Copy, Debug)]
struct Roles {
    unified: Room,
    score: Room,
    decode: Room,
}

impl Default for Roles {
    fn default() -> Self {
        Self { unified: Room::EMPTY, score: Room::EMPTY, decode: Room::EMPTY }
    }
}

impl Roles {
    fn add(&mut self, record: &NodeRecord) {
        let room = match record.base_role {
            BaseRole::Unified => &mut self.unified,
            BaseRole::Score => &mut self.score,
            BaseRole::Decode => &mut self.decode,
        };
        *room = room.and(Room::of(record));
    }

    /// What they hold together. An answer that one base reads and another one writes takes a place
    /// on both; where one kind of them is missing and nobody else is there, the other one does it all.
    fn room(self) -> Room {
        let Self { unified, score, decode } = self;
        let pairs = score.lesser(decode);
        if unified.slots == 0 && pairs.slots == 0 {
            return score.and(decode);
        }
        unified.and(pairs)
    }
}

#[cfg(test)]
#[path = "admission/tests.rs"]
mod tests;
