//! The life of a token on one screen: plan → submit → collect → commit.
//!
//! An executor that pipelines has the next step before the last one is collected, so it works while
//! the host commits, tells, listens and plans. That step extends what is certain whatever the one in
//! flight finds ([`Sequence::work`]), and is not planned while that would hold anybody back, or cost
//! pages that the commit may give. A sequence that is over by its commit had a row too many: nothing
//! comes of it. With any other executor each step is collected before the next one is planned.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::collective::hosts::Pulse;
use crate::core::pages::{Page, PagePool};
use crate::core::prefix::{PrefixCache, followers};
use crate::core::scheduler::{self, Budget, Demand, Extend, Plan, SequenceId};
use crate::core::sequence::{Event, Request, Sequence};
use crate::exchange::{ExportLog, ExportedPage, ImportError, Imported, IncomingPage};
use crate::executor::{Executor, ExecutorError, Found, KvFormat, Limits, TokenId};
use crate::flight::{self, Flight};

/// What an engine has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Steps executed.
    pub steps: u64,
    /// Tokens extended: prompt, draft and written ones.
    pub tokens_extended: u64,
    /// Tokens whose KV was found in the prefix cache.
    pub tokens_reused: u64,
    /// Tokens whose KV was given up to make room.
    pub tokens_preempted: u64,
    /// Draft tokens that were extended and then cut from the answer.
    pub tokens_cut: u64,
    /// Tokens that went through the model for sequences that were over by then; they are not among
    /// the extended ones. None, unless steps are pipelined.
    pub tokens_overrun: u64,
}

/// A model, its sequences and its KV pages. Plain state: the [runner](crate::runner) drives it.
pub struct Engine {
    executor: Box<dyn Executor>,
    limits: Limits,
    step_tokens: usize,
    waits_for_drafts: bool,
    pool: PagePool,
    prefixes: PrefixCache,
    sequences: BTreeMap<SequenceId, Sequence>,
    /// The last plan's oldest sequence without a page.
    starved: Option<SequenceId>,
    /// Sequences whose beginning an older one is computing.
    followers: BTreeSet<SequenceId>,
    next_id: u64,
    counters: Counters,
    /// Who follows the sequences' pages.
    exports: BTreeMap<SequenceId, ExportLog>,
    imports: BTreeMap<u64, Imported>,
    /// The steps that the executor has, oldest first.
    flights: VecDeque<Flight>,
    flights_max: usize,
}

impl Engine {
    /// An engine that extends at most `step_tokens ≥ 1` tokens a step.
    #[must_use]
    pub fn new(mut executor: Box<dyn Executor>, step_tokens: usize) -> Self {
        let limits = executor.limits();
        Self {
            flights: VecDeque::new(),
            flights_max: flight::flights_max(&mut *executor),
            executor,
            limits,
            step_tokens: step_tokens.max(1),
            waits_for_drafts: false,
            pool: PagePool::new(limits.pages),
            prefixes: PrefixCache::new(limits.page_size),
            sequences: BTreeMap::new(),
            starved: None,
            followers: BTreeSet::new(),
            next_id: 0,
            counters: Counters::default(),
            exports: BTreeMap::new(),
            imports: BTreeMap::new(),
        }
    }

    /// Whether a prompt whose answer somebody else begins is left alone until its first draft token
    /// is here. Where both share a processor, that token comes sooner.
    pub fn wait_for_drafts(&mut self, wait: bool) {
        self.waits_for_drafts = wait;
    }

    /// Tokens of `sequence` that can be extended now.
    fn work(&self, sequence: &Sequence) -> usize {
        if self.waits_for_drafts && sequence.awaits_draft() { 0 } else { sequence.work() }
    }

    /// The KV pages.
    #[must_use]
    pub fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// What its pages are to other engines; `None`: they cannot leave it.
    #[must_use]
    pub fn kv_format(&self) -> Option<KvFormat> {
        self.executor.kv_format()
    }

    /// Whether all ranks of its executor are there, where some are in other processes.
    #[must_use]
    pub fn pulse(&self) -> Option<Pulse> {
        self.executor.pulse()
    }

    /// What was done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Takes a request that fits the executor's limits.
    pub fn add(&mut self, request: Request) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, Sequence::new(request));
        id
    }

    /// Gives draft tokens to a sequence. An unknown one is finished already: nothing happens.
    pub fn push_draft(&mut self, id: SequenceId, draft: &[TokenId]) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.push_draft(draft);
        }
    }

    /// Ends a sequence's draft.
    pub fn end_draft(&mut self, id: SequenceId) -> Vec<(SequenceId, Event)> {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return Vec::new();
        };
        let events = sequence.end_draft();
        self.retire(id);
        events.into_iter().map(|event| (id, event)).collect()
    }

    /// Drops a sequence and frees its pages, but for those that a step in flight writes.
    pub fn remove(&mut self, id: SequenceId) {
        let sequence = self.sequences.remove(&id);
        if let (Some(log), Some(sequence)) = (self.exports.remove(&id), sequence) {
            log.end_after(sequence.computed_tokens(), &sequence.pages, self.limits.page_size);
        }
    }

    /// Lets `log` follow a sequence's pages; it takes the place of one that did.
    pub(crate) fn export(&mut self, id: SequenceId, log: ExportLog) {
        match self.sequences.get(&id) {
            Some(sequence) => {
                log.update(sequence.computed_tokens(), &sequence.pages, self.limits.page_size);
                if let Some(old) = self.exports.insert(id, log) {
                    old.end();
                }
            }
            None => log.end(),
        }
    }

    /// Copies an exported page. `None`: it was taken back.
    pub(crate) fn read_page(&mut self, page: &ExportedPage, buffer: &mut Vec<u8>) -> bool {
        let Some(id) = page.readable() else { return false };
        self.executor
            .read_page(id, buffer)
            .inspect_err(|error| tracing::warn!(%error, "a KV page could not be read"))
            .is_ok()
    }

    /// Takes a page in: into the prefix cache, unless it is there already or not full, and into the
    /// hold of its import.
    ///
    /// # Errors
    /// See [`ImportError`].
    pub(crate) fn write_page(&mut self, page: &IncomingPage) -> Result<(), ImportError> {
        let page_size = self.limits.page_size;
        let fresh = || Imported::new(Arc::clone(&page.dropped));
        let import = self.imports.entry(page.import).or_insert_with(fresh);
        let full = page.tokens.len() == page_size;
        if page.tokens.is_empty() || page.tokens.len() > page_size {
            return Err(ImportError::Size);
        }
        let parent = import.cut(page.index).ok_or(ImportError::Gap)?;
        if full && let Some((node, cached)) = self.prefixes.behind(parent, &page.tokens) {
            import.pages.push((node, cached));
            return Ok(());
        }
        // Each request may need a page at any moment.
        if self.pool.free() + self.pool.idle() <= self.sequences.len() {
            return Err(ImportError::NoRoom);
        }
        let free = take_page(&self.pool, &mut self.prefixes).ok_or(ImportError::NoRoom)?;
        self.executor.write_page(free.id(), &page.data).map_err(|error| {
            tracing::warn!(%error, "a KV page could not be written");
            ImportError::Failed
        })?;
        if full {
            let node = self.prefixes.add(parent, &page.tokens, &free);
            import.pages.push((node, free));
        } else {
            import.last = Some((page.tokens.clone(), free));
        }
        Ok(())
    }

    /// Gives up what imports hold that are over.
    pub(crate) fn drop_imports(&mut self) {
        self.imports.retain(|_, import| !import.dropped.load(Ordering::Acquire));
    }

    /// Gives up what all imports hold: it is only a hint, and requests need the room. Returns
    /// whether there was anything.
    fn release_imports(&mut self) -> bool {
        let held =
            self.imports.values().any(|import| !import.pages.is_empty() || import.last.is_some());
        self.imports.clear();
        held
    }

    /// Whether a step would find something to do.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.is_in_flight() || self.sequences.values().any(|sequence| self.work(sequence) > 0)
    }

    /// Whether the executor has a step.
    #[must_use]
    pub fn is_in_flight(&self) -> bool {
        !self.flights.is_empty()
    }

    /// Gives the executor what it can take, and tells what came of the oldest step that it has.
    ///
    /// # Errors
    /// [`ExecutorError`]: the step's sequences got [`Event::Failed`]; on a fatal one all did.
    pub fn step(&mut self) -> (Vec<(SequenceId, Event)>, Result<(), ExecutorError>) {
        while self.flights.len() < self.flights_max
            && let Some(plan) = self.plan_next()
        {
            if let Err(error) = self.submit(&plan) {
                return (self.fail(&plan.extend, &error), Err(error));
            }
        }
        let Some(mut flight) = self.flights.pop_front() else {
            return (Vec::new(), Ok(()));
        };
        self.counters.steps += 1;
        match flight.collect(&mut *self.executor) {
            Ok(found) => (self.commit(&flight, found), Ok(())),
            Err(error) => (self.fail(&flight.extend, &error), Err(error)),
        }
    }

    /// The next step with something to extend, if it need not wait for those in flight. Takes the
    /// pages that it preempts.
    fn plan_next(&mut self) -> Option<Plan> {
        let ahead = self.is_in_flight();
        if ahead && self.sequences.values().any(Sequence::is_held) {
            return None;
        }
        self.reuse_prefixes();
        let mut plan = self.plan();
        if plan.starved.is_some() || !plan.preempt.is_empty() {
            if ahead {
                return None;
            }
            if self.release_imports() {
                plan = self.plan();
            }
        }
        self.starved = plan.starved;
        self.preempt(&plan.preempt);
        (!plan.extend.is_empty()).then_some(plan)
    }

    /// Gives the sequences that this step may begin what the prefix cache has for them.
    fn reuse_prefixes(&mut self) {
        // One that waits for its draft keeps nobody waiting for its prompt.
        let awaits = |sequence: &Sequence| self.waits_for_drafts && sequence.awaits_draft();
        let all = self.sequences.iter().filter(|(_, sequence)| !awaits(sequence));
        let all = all.map(|(&id, sequence)| (id, sequence));
        self.followers = followers(all, self.limits.page_size);
        let mut budget = self.step_tokens;
        for (&id, sequence) in &mut self.sequences {
            if self.followers.contains(&id) {
                continue;
            }
            if budget == 0 || self.starved.is_some_and(|starved| starved < id) {
                return;
            }
            if self.waits_for_drafts && sequence.awaits_draft() {
                continue;
            }
            let tokens = sequence.reusable();
            let mut pages = self.prefixes.lookup(tokens);
            let mut computed = pages.len() * self.limits.page_size;
            let (before, rest) = (pages.last(), &tokens[computed..]);
            let imports = self.imports.values_mut();
            let lasts = imports.map(|import| (import.last_holds(before, rest), &mut import.last));
            if let Some((count @ 1.., last)) = lasts.max_by_key(|(count, _)| *count) {
                pages.extend(last.take().map(|(_, page)| page));
                computed += count;
            }
            if !pages.is_empty() {
                sequence.reuse(pages, computed);
                self.counters.tokens_reused += sequence.computed() as u64;
            }
            budget = budget.saturating_sub(sequence.work());
        }
    }

    fn plan(&self) -> Plan {
        let demands: Vec<Demand> = self
            .sequences
            .iter()
            .map(|(&id, sequence)| Demand {
                id,
                work: if self.followers.contains(&id) { 0 } else { self.work(sequence) },
                prefilling: sequence.is_prefilling(),
                computed: sequence.sent(),
                pages: sequence.pages.len(),
                exclusive: sequence.pages.exclusive(),
            })
            .collect();
        let budget = Budget {
            step_tokens: self.step_tokens,
            page_size: self.limits.page_size,
            free_pages: self.pool.free() + self.pool.idle(),
        };
        scheduler::plan(&demands, budget)
    }

    fn preempt(&mut self, ids: &[SequenceId]) {
        for id in ids {
            if let Some(sequence) = self.sequences.get_mut(id) {
                self.counters.tokens_preempted += sequence.computed() as u64;
                sequence.preempt();
            }
        }
    }

    /// Gives the sequences their pages, asks each what it wants to know, and hands the step over.
    fn submit(&mut self, plan: &Plan) -> Result<(), ExecutorError> {
        let page_size = self.limits.page_size;
        let mut probes = Vec::with_capacity(plan.extend.len());
        for extend in &plan.extend {
            let sequence = self.sequences.get_mut(&extend.id).expect("planned from this map");
            while sequence.pages.len() < extend.pages {
                let page = take_page(&self.pool, &mut self.prefixes);
                sequence.pages.push(page.expect("the plan counted the free pages"));
            }
            probes.push(sequence.probes(extend.tokens));
        }
        let before = self.flights.back();
        let (mut rows, mut written) = (Vec::with_capacity(plan.extend.len()), Vec::new());
        for (extend, probes) in plan.extend.iter().zip(&probes) {
            let sequence = &self.sequences[&extend.id];
            let before = before.and_then(|flight| flight.place(extend.id));
            let row = sequence.row(extend.tokens, probes, before);
            let pages = row.start / page_size..row.end().div_ceil(page_size);
            written.extend_from_slice(&sequence.pages.pages()[pages]);
            rows.push(row);
        }
        let result = flight::submit(&mut *self.executor, &rows)?;
        for (extend, probes) in plan.extend.iter().zip(&probes) {
            let sequence = self.sequences.get_mut(&extend.id).expect("planned from this map");
            sequence.send(extend.tokens, probes);
        }
        self.flights.push_back(Flight::new(plan.extend.clone(), probes, written, result));
        Ok(())
    }

    fn commit(&mut self, flight: &Flight, found: Vec<Vec<Found>>) -> Vec<(SequenceId, Event)> {
        let page_size = self.limits.page_size;
        let mut events = Vec::new();
        for ((extend, probes), found) in flight.extend.iter().zip(&flight.probes).zip(found) {
            let Some(sequence) = self.sequences.get_mut(&extend.id) else {
                self.counters.tokens_overrun += extend.tokens as u64;
                continue;
            };
            self.counters.tokens_extended += extend.tokens as u64;
            let extended = sequence.computed() + extend.tokens;
            let happened = sequence.commit(extend.tokens, probes, found);
            self.counters.tokens_cut += extended.saturating_sub(sequence.computed()) as u64;
            // A draft that was cut leaves pages that hold nothing.
            sequence.pages.truncate(sequence.sent().div_ceil(page_size));
            self.prefixes.insert(sequence.settled(), &sequence.pages);
            follow(&mut self.exports, extend.id, sequence, page_size);
            events.extend(happened.into_iter().map(|event| (extend.id, event)));
            self.retire(extend.id);
        }
        events
    }

    /// The sequences of a step are lost; all of them, if the executor is.
    fn fail(&mut self, step: &[Extend], error: &ExecutorError) -> Vec<(SequenceId, Event)> {
        let mut lost: Vec<SequenceId> = if error.fatal {
            self.flights.clear();
            self.sequences.keys().copied().collect()
        } else {
            step.iter().map(|extend| extend.id).collect()
        };
        lost.retain(|id| self.sequences.contains_key(id));
        lost.into_iter()
            .map(|id| {
                self.remove(id);
                (id, Event::Failed { message: error.message.clone(), fatal: error.fatal })
            })
            .collect()
    }

    fn retire(&mut self, id: SequenceId) {
        if self.sequences.get(&id).is_some_and(Sequence::is_finished) {
            self.remove(id);
        }
    }
}

/// Tells whoever follows a sequence's pages what is computed now.
fn follow(
    exports: &mut BTreeMap<SequenceId, ExportLog>,
    id: SequenceId,
    sequence: &Sequence,
    page_size: usize,
) {
    let Some(log) = exports.get(&id) else { return };
    if log.is_abandoned() {
        exports.remove(&id);
    } else {
        log.update(sequence.computed_tokens(), &sequence.pages, page_size);
    }
}

/// A free page, or one that only the prefix cache holds.
fn take_page(pool: &PagePool, prefixes: &mut PrefixCache) -> Option<Page> {
    pool.take().or_else(|| if prefixes.evict_one() { pool.take() } else { None })
}
