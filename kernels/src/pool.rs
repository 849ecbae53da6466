//! A small fork-join pool made for steps of a few microseconds.
//!
//! Workers spin for a moment after a job, then yield, then park, so the next matrix product of the
//! same step finds them awake while an idle pool costs nothing. A worker that is late (two pools may
//! share two cores) is never waited for: it can join a job only while tasks are left.
//!
//! Each thread takes the tasks of its own part of a job in ascending order, so that neighbouring
//! pieces of a matrix are one stream to the memory, then those that are left of the others' parts,
//! last ones first.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};

/// Rounds of `PAUSE` before a waiting worker starts to yield its core.
const SPIN_ROUNDS: u32 = 600;
/// Yields before a waiting worker parks.
const YIELD_ROUNDS: u32 = 60;

/// In [`Shared::state`]: the job takes helpers. The bits below count helpers inside, those above
/// count jobs.
const OPEN: u64 = 1 << 16;
const JOB: u64 = 1 << 17;
const INSIDE: u64 = OPEN - 1;

type Body = *const (dyn Fn(usize) + Sync);

struct Shared {
    state: AtomicU64,
    /// The tasks left of each thread's part.
    parts: Box<[Part]>,
    job: UnsafeCell<Body>,
    stop: AtomicBool,
    sleeping: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Tasks `first..end` as `end << 32 | first`, on a cache line of their own.
#[repr(align(128))]
struct Part(AtomicU64);

impl Part {
    fn set(&self, first: usize, end: usize) {
        self.0.store((end as u64) << 32 | first as u64, Ordering::Relaxed);
    }

    /// Takes one task: the first for the owner, the last for anybody else.
    fn take(&self, own: bool) -> Option<usize> {
        let mut part = self.0.load(Ordering::Relaxed);
        loop {
            let (first, end) = (part & u64::from(u32::MAX), part >> 32);
            if first >= end {
                return None;
            }
            let (task, left) = match own {
                true => (first, part + 1),
                false => (end - 1, part - (1 << 32)),
            };
            let order = Ordering::Relaxed;
            match self.0.compare_exchange_weak(part, left, order, order) {
                Ok(_) => return Some(task as usize),
                Err(now) => part = now,
            }
        }
    }
}

// SAFETY: `job` is written only by the thread that holds `ThreadPool::caller`, while the job is
// closed and nobody is inside (see `run`); it is read only by helpers that joined an open job. The
// state's release/acquire pair orders the two. The pointee is `Sync` and outlives the job.
unsafe impl Sync for Shared {}
// SAFETY: as above; the raw pointer is never used outside an open job.
unsafe impl Send for Shared {}

thread_local! {
    static IN_POOL: Cell<bool> = const { Cell::new(false) };
}

/// Threads that run the tasks of one job at a time, the caller among them.
///
/// Which thread runs which task is left open, so tasks must not depend on it.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
    caller: Mutex<()>,
}

impl ThreadPool {
    /// A pool of `threads` threads (at least one: the caller itself).
    pub fn new(threads: usize) -> Self {
        let nothing: &'static (dyn Fn(usize) + Sync) = &|_| {};
        let threads = threads.clamp(1, INSIDE as usize / 2);
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            parts: (0..threads).map(|_| Part(AtomicU64::new(0))).collect(),
            job: UnsafeCell::new(nothing),
            stop: AtomicBool::new(false),
            sleeping: AtomicUsize::new(0),
            panic: Mutex::new(None),
        });
        let spawn = |i: usize| {
            let shared = Arc::clone(&shared);
            let builder = thread::Builder::new().name(format!("kernel-{i}"));
            builder.spawn(move || shared.work(i)).ok()
        };
        // A thread that the system refuses is a slower pool, not an error.
        let workers: Vec<_> = (1..threads).filter_map(spawn).collect();
        let handles = workers.iter().map(|w| w.thread().clone()).collect();
        ThreadPool { shared, workers, handles, caller: Mutex::new(()) }
    }

    /// Threads that work on a job, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(0)` … `f(tasks - 1)`, each once, spread over the threads, and returns when all are
    /// done. A call from inside a task runs on the calling thread alone. A panic in a task is
    /// raised again here once every thread has left the job.
    ///
    /// # Panics
    /// If there are 2³² tasks or more.
    pub fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() || IN_POOL.get() {
            (0..tasks).for_each(f);
            return;
        }
        assert!(u32::try_from(tasks).is_ok(), "run: {tasks} tasks");
        let _caller = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; `run` does not return (nor unwind) before `close` has
        // seen every helper leave, and no helper can join afterwards.
        let body: Body = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Body>(f) };
        // SAFETY: the previous job is closed and empty and we hold `caller`: nobody reads `job`.
        unsafe { *shared.job.get() = body };
        let parts = shared.parts.len();
        for (i, part) in shared.parts.iter().enumerate() {
            part.set(i * tasks / parts, (i + 1) * tasks / parts);
        }
        let job = shared.state.load(Ordering::Relaxed) & !(JOB - 1);
        shared.state.store(job.wrapping_add(JOB) | OPEN, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) > 0 {
            self.handles.iter().for_each(Thread::unpark);
        }
        IN_POOL.set(true);
        let own = catch_unwind(AssertUnwindSafe(|| shared.take_tasks(f, 0)));
        IN_POOL.set(false);
        shared.close();
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        let helper = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = helper {
            resume_unwind(panic);
        }
    }

    /// Splits `data` into chunks of `chunk_len` (the last may be shorter) and calls
    /// `f(chunk index, chunk)` for each, spread over the threads.
    pub fn run_chunks<T: Send>(
        &self,
        data: &mut [T],
        chunk_len: usize,
        f: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        let (len, chunk_len) = (data.len(), chunk_len.max(1));
        let base = SendPtr(data.as_mut_ptr());
        self.run(len.div_ceil(chunk_len), &|i| {
            let start = i * chunk_len;
            let size = chunk_len.min(len - start);
            // SAFETY: chunks of different `i` are disjoint parts of `data`, which is borrowed
            // mutably for the whole of `run`, and every `i` is run once.
            let chunk = unsafe { std::slice::from_raw_parts_mut(base.at(start), size) };
            f(i, chunk);
        });
    }
}

impl std::fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ThreadPool({})", self.threads())
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for w in self.workers.drain(..) {
            w.thread().unpark();
            // A worker never panics outside `catch_unwind`; nothing is left to do if it did.
            let _ = w.join();
        }
    }
}

impl Shared {
    fn take_tasks(&self, f: &(dyn Fn(usize) + Sync), own: usize) {
        let all = self.parts.len();
        while let Some(task) = self.parts[own].take(true) {
            f(task);
        }
        for other in (own + 1..all).chain(0..own) {
            while let Some(task) = self.parts[other].take(false) {
                f(task);
            }
        }
    }

    /// Ends the job for newcomers and waits for the helpers inside.
    fn close(&self) {
        // A panicked caller leaves tasks over; nobody shall start them.
        self.parts.iter().for_each(|part| part.set(0, 0));
        let mut state = self.state.fetch_and(!OPEN, Ordering::SeqCst);
        let mut round = 0u32;
        while state & INSIDE != 0 {
            round += 1;
            if round < SPIN_ROUNDS {
                std::hint::spin_loop()
            } else {
                thread::yield_now()
            }
            state = self.state.load(Ordering::Acquire);
        }
    }

    fn work(&self, own: usize) {
        IN_POOL.set(true);
        let mut seen = 0;
        while let Some(job) = self.wait(seen) {
            seen = job;
            // SAFETY: we joined an open job: `job` was written before it opened and stays until we
            // leave.
            let body = unsafe { *self.job.get() };
            // SAFETY: the caller keeps the closure alive until the last helper has left.
            let f = unsafe { &*body };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.take_tasks(f, own))) {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// Joins the next job after `seen` and returns its number; `None` when the pool is dropped.
    fn wait(&self, seen: u64) -> Option<u64> {
        let mut round = 0u32;
        loop {
            let state = self.state.load(Ordering::Acquire);
            let job = state / JOB;
            if state & OPEN != 0 && job != seen {
                let joined = state + 1;
                let order = (Ordering::AcqRel, Ordering::Relaxed);
                if self.state.compare_exchange(state, joined, order.0, order.1).is_ok() {
                    return Some(job);
                }
                continue;
            }
            if self.stop.load(Ordering::Acquire) {
                return None;
            }
            round += 1;
            if round < SPIN_ROUNDS {
                std::hint::spin_loop();
            } else if round < SPIN_ROUNDS + YIELD_ROUNDS {
                thread::yield_now();
            } else {
                self.sleep(seen);
                round = 0;
            }
        }
    }

    fn sleep(&self, seen: u64) {
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        loop {
            // Checked after `sleeping` was raised, so a job opened later sees us and unparks.
            let state = self.state.load(Ordering::SeqCst);
            let open = state & OPEN != 0 && state / JOB != seen;
            if open || self.stop.load(Ordering::SeqCst) {
                break;
            }
            thread::park();
        }
        self.sleeping.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A pointer that tasks of one job share; each task touches its own part only.
#[derive(Clone, Copy)]
pub(crate) struct SendPtr<T>(pub(crate) *mut T);

// SAFETY: whoever makes one promises that concurrent tasks use disjoint parts.
unsafe impl<T: Send> Send for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SendPtr<T> {}

impl<T> SendPtr<T> {
    /// The address `offset` elements on.
    ///
    /// # Safety
    /// `offset` lies within the allocation.
    pub(crate) unsafe fn at(&self, offset: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in 1..5 {
            let pool = ThreadPool::new(threads);
            for tasks in [0, 1, 2, 3, 17, 1000] {
                for _ in 0..50 {
                    let hits: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, &|i| {
                        hits[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn wakes_after_parking_and_nests() {
        let pool = ThreadPool::new(3);
        for _ in 0..5 {
            thread::sleep(std::time::Duration::from_millis(3));
            let sum = AtomicUsize::new(0);
            pool.run(10, &|i| {
                pool.run(3, &|j| {
                    sum.fetch_add(i * j, Ordering::Relaxed);
                });
            });
            assert_eq!(sum.load(Ordering::Relaxed), 45 * 3);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = ThreadPool::new(2);
        for bad in [0, 7, 63] {
            let run = || pool.run(64, &|i| assert_ne!(i, bad, "task {bad}"));
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
            let count = AtomicUsize::new(0);
            pool.run(64, &|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.load(Ordering::Relaxed), 64);
        }
    }

    #[test]
    fn callers_take_turns() {
        let pool = ThreadPool::new(2);
        thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..200 {
                        let mut data = [0u32; 37];
                        pool.run_chunks(&mut data, 5, &|i, c| c.fill(i as u32 + 1));
                        assert!(data.iter().enumerate().all(|(j, &v)| v == j as u32 / 5 + 1));
                    }
                });
            }
        });
    }
}
