//! An executor whose batches are looked at.

use std::sync::{Arc, Mutex};

use headstart_engine::Limits;
use headstart_engine::executor::{Executor, ExecutorError, Found, Pipeline, Row};

/// What was seen of an executor's batches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    pub in_flight: usize,
    pub in_flight_max: usize,
    pub batches: usize,
    pub pending_rows: usize,
}

/// Passes batches on, and counts them. They must be submitted.
pub struct Watched<E> {
    inner: E,
    seen: Arc<Mutex<Seen>>,
}

impl<E: Executor> Watched<E> {
    pub fn new(inner: E) -> (Box<Self>, Arc<Mutex<Seen>>) {
        let seen = Arc::<Mutex<Seen>>::default();
        (Box::new(Self { inner, seen: Arc::clone(&seen) }), seen)
    }

    fn pipelining(&mut self) -> &mut dyn Pipeline {
        self.inner.pipeline().expect("it pipelines")
    }
}

impl<E: Executor> Executor for Watched<E> {
    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn execute(&mut self, _: &[Row<'_>]) -> Result<Vec<Vec<Found>>, ExecutorError> {
        panic!("batches are submitted")
    }

    fn pipeline(&mut self) -> Option<&mut dyn Pipeline> {
        Some(self)
    }
}

impl<E: Executor> Pipeline for Watched<E> {
    fn submit(&mut self, rows: &[Row<'_>]) -> Result<(), ExecutorError> {
        self.pipelining().submit(rows)?;
        let mut seen = self.seen.lock().expect("nobody panicked");
        seen.batches += 1;
        seen.in_flight += 1;
        seen.in_flight_max = seen.in_flight_max.max(seen.in_flight);
        seen.pending_rows += rows.iter().filter(|row| row.pending.is_some()).count();
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Vec<Found>>, ExecutorError> {
        self.seen.lock().expect("nobody panicked").in_flight -= 1;
        self.pipelining().collect()
    }
}
