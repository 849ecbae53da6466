//! A thread that runs the engine, and the handles that talk to it.
//!
//! The thread drains its inbox between steps and sleeps when there is nothing to do; then whoever wants
//! pages copied uses the engine instead. Every queue is bounded: the inbox by its capacity, the requests
//! by the slots, a request's events by how many it can ever cause. Dropping a [`Generation`] aborts it:
//! its slot and pages are free at the next step boundary.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;

use crate::collective::hosts::Pulse;
use crate::core::pages::PagePool;
use crate::core::scheduler::SequenceId;
use crate::core::sequence::{Event, Request};
use crate::exchange::{Copy, CopyQueue, Export, ExportLog, Import};
use crate::executor::{Executor, ExecutorError, KvFormat, Limits, TokenId};
use crate::step::{Counters, Engine};

/// Page copies that wait for the next step boundary at most.
const COPY_QUEUE: usize = 64;
/// Bytes of pages that are copied between two steps while requests run.
const COPY_BYTES_A_STEP: usize = 4 << 20;
/// A step of at least so many tokens is a measure of the prefill rate.
const PREFILL_TOKENS_MIN: u64 = 32;
/// How long the thread rests when its requests wait for pages that others hold.
const STARVED_PAUSE: Duration = Duration::from_millis(1);

/// How an engine runs.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Requests at once; one more is refused.
    pub slots: usize,
    /// Tokens a step extends at most: more is better for prefill, fewer for the latency of others.
    pub step_tokens: usize,
    /// Commands that wait for the next step boundary at most.
    pub inbox: usize,
    /// Prompts whose answers drafters begin wait for the first draft token: for a drafter and a base
    /// that share their processor.
    pub wait_for_drafts: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { slots: 64, step_tokens: 512, inbox: 1024, wait_for_drafts: false }
    }
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// All slots are in use, or the inbox is full.
    #[error("all {slots} slots are in use")]
    Full {
        /// The engine's slots.
        slots: usize,
    },
    /// The request can never run here.
    #[error("{field}: {message}")]
    Invalid {
        /// The field of [`Request`] at fault.
        field: &'static str,
        /// What was expected.
        message: String,
    },
    /// The engine's thread has ended.
    #[error("the engine has stopped")]
    Stopped,
}

/// What an engine is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Requests it can run at once.
    pub slots: usize,
    /// Requests it is running.
    pub slots_used: usize,
    /// Tokens its KV pages hold.
    pub kv_tokens: usize,
    /// Tokens that the pages in use hold.
    pub kv_tokens_used: usize,
    /// What it did so far.
    pub counters: Counters,
    /// Tokens a second that steps with many of them computed lately; 0: there was none yet.
    pub prefill_tokens_per_second: u64,
}

/// What the thread is asked.
#[derive(Debug)]
pub(crate) enum Command {
    Submit(Box<Submission>),
    Draft(u64, Vec<TokenId>),
    EndDraft(u64),
    Export(u64, ExportLog),
    /// Looks at the abort flags.
    Wake,
}

#[derive(Debug)]
pub(crate) struct Submission {
    ticket: u64,
    request: Request,
    client: Client,
}

#[derive(Debug)]
struct Client {
    events: mpsc::Sender<Event>,
    aborted: Arc<AtomicBool>,
    _slot: OwnedSemaphorePermit,
}

struct Shared {
    limits: Limits,
    kv_format: Option<KvFormat>,
    /// Pages are given back outside the engine's thread as well.
    pool: PagePool,
    options: EngineOptions,
    slots: Arc<Semaphore>,
    tickets: AtomicU64,
    stats: Mutex<EngineStats>,
    /// The fatal error that ended it.
    failure: OnceLock<String>,
    pulse: Option<Pulse>,
}

/// A handle on a running engine. Clones share it; the thread ends when the last one is gone and the
/// last request is over.
#[derive(Clone)]
pub struct EngineHandle {
    inbox: mpsc::Sender<Command>,
    copies: CopyQueue,
    shared: Arc<Shared>,
}

impl EngineHandle {
    /// Starts an engine on a thread of its own.
    ///
    /// # Panics
    /// If the system cannot start a thread.
    #[must_use]
    pub fn start(executor: Box<dyn Executor>, options: EngineOptions) -> Self {
        let (handle, driver) = Self::with_driver(executor, options, false);
        std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || driver.run())
            .expect("the system can start a thread");
        handle
    }

    /// An engine without a thread: it runs in the returned future, which awaits `pace` before each
    /// step, for as long as a step is to take.
    pub fn start_paced<P, F>(
        executor: Box<dyn Executor>,
        options: EngineOptions,
        pace: P,
    ) -> (Self, impl Future<Output = ()> + Send)
    where
        P: FnMut() -> F + Send,
        F: Future<Output = ()> + Send,
    {
        let (handle, driver) = Self::with_driver(executor, options, true);
        (handle, driver.run_paced(pace))
    }

    fn with_driver(
        executor: Box<dyn Executor>,
        options: EngineOptions,
        paced: bool,
    ) -> (Self, Driver) {
        let (inbox, commands) = mpsc::channel(options.inbox.max(1));
        let (copies, copies_asked) = mpsc::channel(COPY_QUEUE);
        let (limits, kv_format) = (executor.limits(), executor.kv_format());
        let mut engine = Engine::new(executor, options.step_tokens);
        engine.wait_for_drafts(options.wait_for_drafts);
        let shared = Arc::new(Shared {
            limits,
            kv_format,
            pool: engine.pool().clone(),
            options,
            slots: Arc::new(Semaphore::new(options.slots)),
            tickets: AtomicU64::new(0),
            stats: Mutex::new(EngineStats {
                slots: options.slots,
                kv_tokens: limits.pages * limits.page_size,
                ..EngineStats::default()
            }),
            failure: OnceLock::new(),
            pulse: engine.pulse(),
        });
        let runner = Runner {
            engine,
            copies: copies_asked,
            clients: BTreeMap::new(),
            tickets: HashMap::new(),
            prefill_tokens_per_second: 0,
            working_since: None,
            paced,
            shared: Arc::clone(&shared),
        };
        let runner = Arc::new(Mutex::new(runner));
        let asleep = Arc::new(AtomicBool::new(true));
        let copies = CopyQueue {
            copies,
            inbox: inbox.clone(),
            asleep: Arc::clone(&asleep),
            runner: Arc::downgrade(&runner),
        };
        (Self { inbox, copies, shared }, Driver { runner, asleep, commands })
    }

    /// The model's limits.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.shared.limits
    }

    /// What its KV pages are to other engines; `None`: they cannot leave it.
    #[must_use]
    pub fn kv_format(&self) -> Option<KvFormat> {
        self.shared.kv_format
    }

    /// Takes pages in from another engine.
    #[must_use]
    pub fn import(&self) -> Import {
        let id = self.shared.tickets.fetch_add(1, Ordering::Relaxed);
        Import::new(id, self.copies.clone())
    }

    /// What the engine is doing; counters are those of the last step boundary.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        let mut stats = *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.kv_tokens_used = self.shared.pool.used() * self.shared.limits.page_size;
        stats.slots_used = stats.slots - self.shared.slots.available_permits().min(stats.slots);
        stats
    }

    /// Whether the engine's thread has ended.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.inbox.is_closed()
    }

    /// Why the engine is of no further use, if it is not: its thread has ended, or ranks in other
    /// processes are lost, which is known also while nothing runs.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        let lost = || self.shared.pulse.as_ref()?.lost().map(|lost| lost.to_string());
        let ended = || self.is_stopped().then(|| "its thread has ended".to_owned());
        self.shared.failure.get().cloned().or_else(lost).or_else(ended)
    }

    /// Lets the ranks in other processes go: their processes end as well.
    pub fn release(&self) {
        if let Some(pulse) = &self.shared.pulse {
            pulse.leave();
        }
    }

    /// Submits a request; answers at once.
    ///
    /// # Errors
    /// [`SubmitError`]: no slot, a request that can never run, or a stopped engine.
    pub fn submit(&self, request: Request) -> Result<Generation, SubmitError> {
        self.check(&request)?;
        let full = || SubmitError::Full { slots: self.shared.options.slots };
        let slot = Arc::clone(&self.shared.slots).try_acquire_owned().map_err(|_| full())?;
        // Each token of the answer causes at most a score and a write; a few events frame them.
        let (events, received) = mpsc::channel(2 * request.max_tokens + 8);
        let ticket = self.shared.tickets.fetch_add(1, Ordering::Relaxed);
        let aborted = Arc::new(AtomicBool::new(false));
        let client = Client { events, aborted: Arc::clone(&aborted), _slot: slot };
        let submission = Box::new(Submission { ticket, request, client });
        self.inbox.try_send(Command::Submit(submission)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => full(),
            mpsc::error::TrySendError::Closed(_) => SubmitError::Stopped,
        })?;
        let control = DraftSender { ticket, inbox: self.inbox.clone() };
        Ok(Generation { events: received, control, copies: self.copies.clone(), aborted })
    }

    fn check(&self, request: &Request) -> Result<(), SubmitError> {
        let Limits { vocab_size, context_length, page_size, pages } = self.shared.limits;
        let invalid = |field, message| Err(SubmitError::Invalid { field, message });
        if request.prompt.is_empty() {
            return invalid("prompt", "expected at least one token".into());
        }
        if let Some(id) = request.prompt.iter().find(|&&id| id as usize >= vocab_size) {
            return invalid("prompt", format!("expected token ids below {vocab_size}, found {id}"));
        }
        if request.max_tokens == 0 {
            return invalid("max_tokens", "expected at least 1".into());
        }
        let answer = &request.known.answer;
        if let Some(id) = answer.iter().find(|&&id| id as usize >= vocab_size) {
            return invalid("known", format!("expected token ids below {vocab_size}, found {id}"));
        }
        // A draft may fill the answer; one that is being written has a token left to write.
        let known_max = request.max_tokens - usize::from(request.draft.is_none());
        if answer.len() > known_max {
            let message = format!("expected at most {known_max} tokens, found {}", answer.len());
            return invalid("known", message);
        }
        if request.known.scores.iter().any(|score| score.is_nan()) {
            return invalid("known", "expected log-probabilities, found NaN".into());
        }
        let room = context_length.min(pages * page_size);
        if request.prompt.len().saturating_add(request.max_tokens) > room {
            let (prompt, max) = (request.prompt.len(), request.max_tokens);
            let message = format!("expected at most {room} tokens, found {prompt} + {max}");
            return invalid("max_tokens", message);
        }
        Ok(())
    }
}

/// A request under way. Dropping it aborts the request.
pub struct Generation {
    events: mpsc::Receiver<Event>,
    control: DraftSender,
    copies: CopyQueue,
    aborted: Arc<AtomicBool>,
}

impl Generation {
    /// The next event. `None` after the last one, or if the engine's thread died.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// An event that is there already.
    pub fn try_next(&mut self) -> Option<Event> {
        self.events.try_recv().ok()
    }

    /// Follows the request's KV pages, from what is computed by now. It takes the place of an
    /// earlier one.
    ///
    /// # Errors
    /// [`SubmitError::Stopped`]
    pub async fn export(&self) -> Result<Export, SubmitError> {
        let (log, mut export) = ExportLog::new(self.copies.clone());
        self.control.send(Command::Export(self.control.ticket, log)).await?;
        export.attached().await;
        Ok(export)
    }

    /// What gives this request its draft.
    #[must_use]
    pub fn draft(&self) -> DraftSender {
        self.control.clone()
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.aborted.store(true, Ordering::Release);
        // With a full inbox the thread is awake, and looks at the flag at its next step boundary.
        let _ = self.control.inbox.try_send(Command::Wake);
    }
}

/// Gives a reading request its draft. Tokens for a request that is over are dropped.
#[derive(Clone)]
pub struct DraftSender {
    ticket: u64,
    inbox: mpsc::Sender<Command>,
}

impl DraftSender {
    /// Appends draft tokens, waiting for room in the inbox.
    ///
    /// # Errors
    /// [`SubmitError::Stopped`]
    pub async fn push(&self, tokens: Vec<TokenId>) -> Result<(), SubmitError> {
        self.send(Command::Draft(self.ticket, tokens)).await
    }

    /// Ends the draft.
    ///
    /// # Errors
    /// [`SubmitError::Stopped`]
    pub async fn end(&self) -> Result<(), SubmitError> {
        self.send(Command::EndDraft(self.ticket)).await
    }

    async fn send(&self, command: Command) -> Result<(), SubmitError> {
        self.inbox.send(command).await.map_err(|_| SubmitError::Stopped)
    }
}

/// The engine's thread, or the future in its place.
struct Driver {
    /// Others use it only while this is asleep.
    runner: Arc<Mutex<Runner>>,
    asleep: Arc<AtomicBool>,
    /// Closed last: who sees it closed finds the engine gone.
    commands: mpsc::Receiver<Command>,
}

impl Driver {
    fn run(mut self) {
        loop {
            if self.falls_asleep() {
                let Some(command) = self.commands.blocking_recv() else {
                    return;
                };
                self.wake_with(command);
            }
            if self.turn(None).is_break() {
                return;
            }
        }
    }

    async fn run_paced<F: Future<Output = ()>>(mut self, mut pace: impl FnMut() -> F) {
        loop {
            if self.falls_asleep() {
                let Some(command) = self.commands.recv().await else {
                    return;
                };
                self.wake_with(command);
            }
            let started = Instant::now();
            let works = self.runner().engine.has_work();
            if works {
                pace().await;
            }
            if self.turn(Some(started)).is_break() {
                return;
            }
        }
    }

    /// A lock that a copy's panic has poisoned ends [`Self::turn`].
    fn runner(&self) -> MutexGuard<'_, Runner> {
        self.runner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is nothing to do until a command comes.
    fn falls_asleep(&self) -> bool {
        let runner = self.runner();
        let idle = runner.is_idle();
        self.asleep.store(idle, Ordering::Release);
        idle
    }

    fn wake_with(&self, command: Command) {
        self.asleep.store(false, Ordering::Release);
        self.runner().apply(command);
    }

    /// Takes what was asked, and runs a step if there is something to do. Breaks on a fatal error.
    /// `started`: when the step began, if that was before now.
    fn turn(&mut self, started: Option<Instant>) -> ControlFlow<()> {
        // What a panic left is of no use.
        let Ok(mut runner) = self.runner.lock() else { return ControlFlow::Break(()) };
        while let Ok(command) = self.commands.try_recv() {
            runner.apply(command);
        }
        runner.turn(started)
    }
}

/// The engine and its clients.
pub(crate) struct Runner {
    engine: Engine,
    copies: mpsc::Receiver<Copy>,
    clients: BTreeMap<SequenceId, (u64, Client)>,
    tickets: HashMap<u64, SequenceId>,
    prefill_tokens_per_second: u64,
    /// When the executor was last known to begin a step, if it has one.
    working_since: Option<Instant>,
    /// Somebody else says how long steps take.
    paced: bool,
    shared: Arc<Shared>,
}

impl Runner {
    fn is_idle(&self) -> bool {
        !self.engine.has_work() && self.copies.is_empty()
    }

    /// As [`Driver::turn`], once the commands are taken.
    fn turn(&mut self, started: Option<Instant>) -> ControlFlow<()> {
        self.drop_aborted();
        self.copy_pages();
        if self.engine.has_work() {
            let (events, result) = self.step(started.unwrap_or_else(Instant::now));
            // Who hears of an event finds it counted.
            self.publish();
            self.deliver(events);
            if let Err(error) = result {
                tracing::error!(fatal = error.fatal, "a step failed: {error}");
                if error.fatal {
                    let _ = self.shared.failure.set(error.message);
                    return ControlFlow::Break(());
                }
            }
        }
        ControlFlow::Continue(())
    }

    /// Runs a step that has `started` then, or with the one before it, and looks at the clock after it.
    fn step(&mut self, started: Instant) -> (Vec<(SequenceId, Event)>, Result<(), ExecutorError>) {
        let started = self.working_since.take().unwrap_or(started);
        let before = self.engine.counters();
        let result = self.engine.step();
        self.working_since = self.engine.is_in_flight().then(Instant::now);
        let after = self.engine.counters();
        let tokens = after.tokens_extended - before.tokens_extended;
        if tokens >= PREFILL_TOKENS_MIN {
            let rate = (tokens as f64 / started.elapsed().as_secs_f64().max(1e-9)) as u64;
            let old = self.prefill_tokens_per_second;
            self.prefill_tokens_per_second = if old == 0 { rate } else { old - old / 4 + rate / 4 };
        }
        if after.steps == before.steps && result.0.is_empty() && !self.paced {
            std::thread::sleep(STARVED_PAUSE);
        }
        result
    }

    /// Copies pages that were asked for, and says whether that was all of them. Where parts of pages are
    /// in other processes it takes long, and is left to the engine's own thread.
    pub(crate) fn copy_while_asleep(&mut self) -> bool {
        if self.shared.pulse.is_none() {
            self.copy_pages();
        }
        self.copies.is_empty()
    }

    /// Copies pages that leave or come in; few of them, since requests may wait for their next step.
    fn copy_pages(&mut self) {
        let mut bytes = 0;
        for _ in 0..COPY_QUEUE {
            if bytes >= COPY_BYTES_A_STEP {
                break;
            }
            let Ok(copy) = self.copies.try_recv() else { break };
            match copy {
                Copy::Read { page, mut buffer, reply } => {
                    let read = self.engine.read_page(&page, &mut buffer);
                    bytes += buffer.len();
                    drop(page);
                    let _ = reply.send(read.then_some(buffer));
                }
                Copy::Write { page, reply } => {
                    bytes += page.data.len();
                    let written = self.engine.write_page(&page);
                    let _ = reply.send(written.map(|()| page.data));
                }
            }
        }
        self.engine.drop_imports();
    }

    fn apply(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => {
                let Submission { ticket, request, client } = *submission;
                let id = self.engine.add(request);
                self.tickets.insert(ticket, id);
                self.clients.insert(id, (ticket, client));
            }
            Command::Draft(ticket, tokens) => {
                if let Some(&id) = self.tickets.get(&ticket) {
                    self.engine.push_draft(id, &tokens);
                }
            }
            Command::EndDraft(ticket) => {
                if let Some(&id) = self.tickets.get(&ticket) {
                    let events = self.engine.end_draft(id);
                    self.deliver(events);
                }
            }
            Command::Export(ticket, log) => match self.tickets.get(&ticket) {
                Some(&id) => self.engine.export(id, log),
                None => log.end(),
            },
            Command::Wake => {}
        }
    }

    fn deliver(&mut self, events: Vec<(SequenceId, Event)>) {
        for (id, event) in events {
            let Some((_, client)) = self.clients.get(&id) else {
                continue;
            };
            let last = matches!(event, Event::Finished { .. } | Event::Failed { .. });
            let gone = client.events.try_send(event).is_err();
            if last || gone {
                self.drop_client(id);
            }
        }
    }

    fn drop_aborted(&mut self) {
        let aborted: Vec<SequenceId> = self
            .clients
            .iter()
            .filter(|(_, (_, client))| client.aborted.load(Ordering::Acquire))
            .map(|(&id, _)| id)
            .collect();
        for id in aborted {
            self.drop_client(id);
        }
    }

    /// Forgets a request: its pages are freed before its slot.
    fn drop_client(&mut self, id: SequenceId) {
        self.engine.remove(id);
        if let Some((ticket, _client)) = self.clients.remove(&id) {
            self.tickets.remove(&ticket);
        }
    }

    fn publish(&self) {
        let mut stats = self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.counters = self.engine.counters();
        stats.prefill_tokens_per_second = self.prefill_tokens_per_second;
    }
}
