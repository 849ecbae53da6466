//! The life of a token on one screen: plan → execute → commit.

use std::collections::BTreeMap;

use crate::core::pages::{Page, PagePool};
use crate::core::prefix::PrefixCache;
use crate::core::scheduler::{self, Budget, Demand, Plan, SequenceId};
use crate::core::sequence::{Event, Request, Sequence};
use crate::executor::{Executor, ExecutorError, Found, Limits, Probe, TokenId};

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
}

/// A model, its sequences and its KV pages. Plain state: the [runner](crate::runner) drives it.
pub struct Engine {
    executor: Box<dyn Executor>,
    limits: Limits,
    step_tokens: usize,
    pool: PagePool,
    prefixes: PrefixCache,
    sequences: BTreeMap<SequenceId, Sequence>,
    /// The last plan's oldest sequence without a page.
    starved: Option<SequenceId>,
    next_id: u64,
    counters: Counters,
}

impl Engine {
    /// An engine that extends at most `step_tokens ≥ 1` tokens a step.
    #[must_use]
    pub fn new(executor: Box<dyn Executor>, step_tokens: usize) -> Self {
        let limits = executor.limits();
        Self {
            executor,
            limits,
            step_tokens: step_tokens.max(1),
            pool: PagePool::new(limits.pages),
            prefixes: PrefixCache::new(limits.page_size),
            sequences: BTreeMap::new(),
            starved: None,
            next_id: 0,
            counters: Counters::default(),
        }
    }

    /// The KV pages.
    #[must_use]
    pub fn pool(&self) -> &PagePool {
        &self.pool
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

    /// Drops a sequence and frees its pages.
    pub fn remove(&mut self, id: SequenceId) {
        self.sequences.remove(&id);
    }

    /// Whether a step would find something to do.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.sequences.values().any(|sequence| sequence.work() > 0)
    }

    /// Runs one step and tells what came of it.
    ///
    /// # Errors
    /// [`ExecutorError`]: the step's sequences got [`Event::Failed`]; on a fatal one all did.
    pub fn step(&mut self) -> (Vec<(SequenceId, Event)>, Result<(), ExecutorError>) {
        self.reuse_prefixes();
        let plan = self.plan();
        self.starved = plan.starved;
        let probes = self.prepare(&plan);
        match self.execute(&plan, &probes) {
            Ok(found) => (self.commit(&plan, &probes, found), Ok(())),
            Err(error) => (self.fail(&plan, &error), Err(error)),
        }
    }

    /// Gives the sequences that this step may begin what the prefix cache has for them.
    fn reuse_prefixes(&mut self) {
        let mut budget = self.step_tokens;
        for (&id, sequence) in &mut self.sequences {
            if budget == 0 || self.starved.is_some_and(|starved| starved < id) {
                return;
            }
            let pages = self.prefixes.lookup(sequence.reusable());
            if !pages.is_empty() {
                sequence.reuse(pages, self.limits.page_size);
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
                work: sequence.work(),
                prefilling: sequence.is_prefilling(),
                computed: sequence.computed(),
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

    /// Moves pages as the plan says and asks each sequence what it wants to know.
    fn prepare(&mut self, plan: &Plan) -> Vec<Vec<Probe>> {
        for id in &plan.preempt {
            if let Some(sequence) = self.sequences.get_mut(id) {
                self.counters.tokens_preempted += sequence.computed() as u64;
                sequence.preempt();
            }
        }
        let mut probes = Vec::with_capacity(plan.extend.len());
        for extend in &plan.extend {
            let sequence = self.sequences.get_mut(&extend.id).expect("planned from this map");
            while sequence.pages.len() < extend.pages {
                let page = take_page(&self.pool, &mut self.prefixes);
                sequence.pages.push(page.expect("the plan counted the free pages"));
            }
            probes.push(sequence.probes(extend.tokens));
        }
        probes
    }

    fn execute(
        &mut self,
        plan: &Plan,
        probes: &[Vec<Probe>],
    ) -> Result<Vec<Vec<Found>>, ExecutorError> {
        let rows: Vec<_> = plan
            .extend
            .iter()
            .zip(probes)
            .map(|(extend, probes)| self.sequences[&extend.id].row(extend.tokens, probes))
            .collect();
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        self.counters.steps += 1;
        self.executor.execute(&rows)
    }

    fn commit(
        &mut self,
        plan: &Plan,
        probes: &[Vec<Probe>],
        found: Vec<Vec<Found>>,
    ) -> Vec<(SequenceId, Event)> {
        let mut events = Vec::new();
        for ((extend, probes), found) in plan.extend.iter().zip(probes).zip(found) {
            self.counters.tokens_extended += extend.tokens as u64;
            let sequence = self.sequences.get_mut(&extend.id).expect("planned from this map");
            let happened = sequence.commit(extend.tokens, probes, found);
            // A draft that was cut leaves pages that hold nothing.
            sequence.pages.truncate(sequence.computed().div_ceil(self.limits.page_size));
            self.prefixes.insert(sequence.settled(), &sequence.pages);
            events.extend(happened.into_iter().map(|event| (extend.id, event)));
            self.retire(extend.id);
        }
        events
    }

    fn fail(&mut self, plan: &Plan, error: &ExecutorError) -> Vec<(SequenceId, Event)> {
        let lost: Vec<SequenceId> = if error.fatal {
            self.sequences.keys().copied().collect()
        } else {
            plan.extend.iter().map(|extend| extend.id).collect()
        };
        lost.into_iter()
            .map(|id| {
                self.sequences.remove(&id);
                (id, Event::Failed { message: error.message.clone() })
            })
            .collect()
    }

    fn retire(&mut self, id: SequenceId) {
        if self.sequences.get(&id).is_some_and(Sequence::is_finished) {
            self.sequences.remove(&id);
        }
    }
}

/// A free page, or one that only the prefix cache holds.
fn take_page(pool: &PagePool, prefixes: &mut PrefixCache) -> Option<Page> {
    pool.take().or_else(|| if prefixes.evict_one() { pool.take() } else { None })
}
