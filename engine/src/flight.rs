//! Steps between the executor's taking them and their commit.

use std::collections::HashMap;

use crate::core::pages::Page;
use crate::core::scheduler::{Extend, SequenceId};
use crate::executor::{Executor, ExecutorError, Found, IN_FLIGHT_MAX, Probe, Row};

/// A step that the executor has taken.
#[derive(Debug)]
pub(crate) struct Flight {
    /// What it extends.
    pub(crate) extend: Vec<Extend>,
    /// What it asks, a list for each.
    pub(crate) probes: Vec<Vec<Probe>>,
    /// The pages that it writes. They are nobody else's as long as it may write them, whatever
    /// becomes of the sequence.
    pages: Vec<Page>,
    /// The place of each sequence's row.
    places: HashMap<SequenceId, usize>,
    result: FlightResult,
}

/// What the executor made of a step so far.
#[derive(Debug)]
pub(crate) enum FlightResult {
    /// It does not pipeline: this is all.
    Here(Vec<Vec<Found>>),
    /// It is to be collected.
    OnItsWay,
}

impl Flight {
    /// A step that was submitted, and writes `pages`.
    pub(crate) fn new(
        extend: Vec<Extend>,
        probes: Vec<Vec<Probe>>,
        pages: Vec<Page>,
        result: FlightResult,
    ) -> Self {
        let places = extend.iter().enumerate().map(|(place, extend)| (extend.id, place)).collect();
        Self { extend, probes, pages, places, result }
    }

    /// The place of a sequence's row in the batch.
    pub(crate) fn place(&self, id: SequenceId) -> Option<usize> {
        self.places.get(&id).copied()
    }

    /// Waits for what was found. From then on the step writes no page.
    ///
    /// # Errors
    /// [`ExecutorError`] when the device failed.
    pub(crate) fn collect(
        &mut self,
        executor: &mut dyn Executor,
    ) -> Result<Vec<Vec<Found>>, ExecutorError> {
        let found = match (&mut self.result, executor.pipeline()) {
            (FlightResult::OnItsWay, Some(pipeline)) => pipeline.collect(),
            (FlightResult::Here(found), _) => Ok(std::mem::take(found)),
            (FlightResult::OnItsWay, None) => {
                let message = "an executor that pipelined does not any more".to_owned();
                Err(ExecutorError { message, fatal: true })
            }
        };
        self.pages.clear();
        found
    }
}

/// Gives a batch to the executor.
///
/// # Errors
/// [`ExecutorError`]: it is not in flight.
pub(crate) fn submit(
    executor: &mut dyn Executor,
    rows: &[Row<'_>],
) -> Result<FlightResult, ExecutorError> {
    match executor.pipeline() {
        Some(pipeline) => pipeline.submit(rows).map(|()| FlightResult::OnItsWay),
        None => executor.execute(rows).map(FlightResult::Here),
    }
}

/// Steps that the executor can have at once.
pub(crate) fn flights_max(executor: &mut dyn Executor) -> usize {
    if executor.pipeline().is_some() { IN_FLIGHT_MAX } else { 1 }
}
