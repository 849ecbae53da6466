//! The fake as an executor that pipelines: a batch is computed when it is collected, at the latest
//! moment that the contract allows. What the contract forbids is an error.

use std::collections::VecDeque;

use super::FakeExecutor;
use crate::core::pages::PageId;
use crate::core::sampling::Sampling;
use crate::executor::{ExecutorError, Found, IN_FLIGHT_MAX, Pipeline, Probe, Row, TokenId};

/// The batches in flight.
#[derive(Clone, Debug, Default)]
pub(super) struct Queue {
    /// Oldest first; those that are computed come before those that are not.
    batches: VecDeque<Batch>,
    /// What the rows of the last batch that was computed sampled.
    sampled: Vec<Option<TokenId>>,
    /// Whether each row of the last batch submitted samples at its last probe.
    samples: Vec<bool>,
}

#[derive(Clone, Debug)]
enum Batch {
    Waiting(Vec<OwnedRow>),
    Done(Result<Vec<Vec<Found>>, String>),
}

#[derive(Clone, Debug)]
struct OwnedRow {
    context: Vec<TokenId>,
    start: usize,
    pages: Vec<PageId>,
    answer_start: usize,
    probes: Vec<Probe>,
    sampling: Sampling,
    pending: Option<usize>,
}

impl OwnedRow {
    fn new(row: &Row<'_>) -> Self {
        Self {
            context: row.context.to_vec(),
            start: row.start,
            pages: row.pages.to_vec(),
            answer_start: row.answer_start,
            probes: row.probes.to_vec(),
            sampling: row.sampling.clone(),
            pending: row.pending,
        }
    }

    fn row(&self) -> Row<'_> {
        Row {
            context: &self.context,
            start: self.start,
            pages: &self.pages,
            answer_start: self.answer_start,
            probes: &self.probes,
            sampling: &self.sampling,
            pending: None,
        }
    }

    fn end(&self) -> usize {
        self.context.len() + usize::from(self.pending.is_some())
    }

    /// Whether `row` is the same sequence's next one.
    fn goes_on_in(&self, row: &Row<'_>) -> bool {
        row.start == self.end() && row.context.starts_with(&self.context)
    }
}

fn refused(message: String) -> ExecutorError {
    ExecutorError { message, fatal: false }
}

impl Pipeline for FakeExecutor {
    fn submit(&mut self, rows: &[Row<'_>]) -> Result<(), ExecutorError> {
        if self.queue.batches.len() == IN_FLIGHT_MAX {
            return Err(refused(format!("{IN_FLIGHT_MAX} batches are in flight")));
        }
        self.options.limits.check_behind(rows, &self.queue.samples)?;
        for (index, row) in rows.iter().enumerate() {
            self.check_pages(row).map_err(|what| refused(format!("row {index}: {what}")))?;
        }
        let samples = |row: &Row<'_>| row.probes.last().is_some_and(|probe| probe.sample);
        self.queue.samples = rows.iter().map(samples).collect();
        self.queue.batches.push_back(Batch::Waiting(rows.iter().map(OwnedRow::new).collect()));
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Vec<Found>>, ExecutorError> {
        let Some(batch) = self.queue.batches.pop_front() else {
            return Err(refused("nothing is in flight".into()));
        };
        match batch {
            Batch::Waiting(rows) => self.compute(rows),
            Batch::Done(result) => result.map_err(refused),
        }
    }
}

impl FakeExecutor {
    /// A page that a row in flight writes belongs to that row's sequence.
    fn check_pages(&self, row: &Row<'_>) -> Result<(), String> {
        let page_size = self.options.limits.page_size;
        let written = |pages: &[PageId], start: usize, end: usize| {
            pages[start / page_size..end.div_ceil(page_size)].to_vec()
        };
        let own = written(row.pages, row.start, row.end());
        for batch in &self.queue.batches {
            let Batch::Waiting(rows) = batch else { continue };
            for other in rows.iter().filter(|other| !other.goes_on_in(row)) {
                let others = written(&other.pages, other.start, other.end());
                if let Some(page) = own.iter().find(|page| others.contains(page)) {
                    return Err(format!("page {} is written in flight", page.0));
                }
            }
        }
        Ok(())
    }

    /// Computes what is in flight: what comes next comes behind it.
    pub(super) fn catch_up(&mut self) {
        for index in 0..self.queue.batches.len() {
            if let Batch::Waiting(rows) = &mut self.queue.batches[index] {
                let rows = std::mem::take(rows);
                let done = self.compute(rows).map_err(|error| error.message);
                self.queue.batches[index] = Batch::Done(done);
            }
        }
    }

    fn compute(&mut self, mut rows: Vec<OwnedRow>) -> Result<Vec<Vec<Found>>, ExecutorError> {
        for row in &mut rows {
            if let Some(before) = row.pending.take() {
                // What a batch that failed did not sample is any token.
                let sampled = self.queue.sampled.get(before).copied().flatten();
                row.context.push(sampled.unwrap_or_default());
            }
        }
        let rows: Vec<Row<'_>> = rows.iter().map(OwnedRow::row).collect();
        let found = self.extend(&rows);
        let sampled = |found: &Vec<Found>| found.last()?.sampled.map(|scored| scored.token);
        self.queue.sampled = found.iter().flatten().map(sampled).collect();
        found
    }
}
