//! Who may read which request's pages, and for how long.
//!
//! A session *offers* its pages; dropping the [`Offer`] ends the lease. A session that is over, but
//! whose answer goes on elsewhere, gives its offer time with [`Offer::until_pulled`]. However a lease
//! ends, it is fenced first: readers are told and no new one comes in. The pages are free when the
//! last reader has let go of them, never before.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use headstart_engine::Export;
use headstart_proto::{Epoch, RequestId};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::wire::{Refusal, RefusalCode};

#[derive(Debug)]
struct Lease {
    epoch: Epoch,
    export: Export,
    fence: CancellationToken,
    pulls: watch::Sender<Pulls>,
}

/// What became of a lease's readers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Pulls {
    /// One has everything.
    whole: bool,
    /// So many have left.
    left: usize,
}

/// See the [module](self). Clones share the table.
#[derive(Clone, Debug)]
pub struct Leases {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    leases: Mutex<HashMap<RequestId, Lease>>,
    offered: Notify,
    /// Readers at once, those that wait for an offer included.
    readers: Semaphore,
    readers_max: usize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<RequestId, Lease>> {
        // Every critical section leaves the map whole.
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Leases {
    /// A table that serves at most `readers` at once.
    #[must_use]
    pub fn new(readers: usize) -> Self {
        let shared = Shared {
            leases: Mutex::default(),
            offered: Notify::new(),
            readers: Semaphore::new(readers),
            readers_max: readers,
        };
        Self { shared: Arc::new(shared) }
    }

    /// Leases that run.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shared.lock().len()
    }

    /// Readers that are here, those that wait for an offer included.
    #[must_use]
    pub fn readers(&self) -> usize {
        self.shared.readers_max - self.shared.readers.available_permits()
    }

    /// Whether no lease runs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Offers the pages of an attempt. A later attempt takes the place of an earlier one, whose
    /// readers are told; an earlier one is not offered: `None`.
    #[must_use]
    pub fn offer(&self, id: &RequestId, epoch: Epoch, export: Export) -> Option<Offer> {
        let (sender, pulls) = watch::channel(Pulls::default());
        let lease = Lease { epoch, export, fence: CancellationToken::new(), pulls: sender };
        let mut leases = self.shared.lock();
        let earlier = match leases.entry(id.clone()) {
            Entry::Occupied(entry) if entry.get().epoch >= epoch => return None,
            Entry::Occupied(mut entry) => Some(entry.insert(lease)),
            Entry::Vacant(entry) => {
                entry.insert(lease);
                None
            }
        };
        drop(leases);
        if let Some(earlier) = earlier {
            earlier.fence.cancel();
        }
        self.shared.offered.notify_waiters();
        Some(Offer { id: id.clone(), epoch, pulls, leases: self.clone() })
    }

    /// Lets a reader in, waiting for the offer if it has not come yet.
    ///
    /// # Errors
    /// [`RefusalCode::NotFound`] if no offer comes in time, [`RefusalCode::StaleEpoch`] if a later
    /// attempt has taken its place, [`RefusalCode::Busy`] if too many read.
    pub async fn open(
        &self,
        id: &RequestId,
        epoch: Epoch,
        patience: Duration,
    ) -> Result<Reader<'_>, Refusal> {
        let busy = |_| Refusal::new(RefusalCode::Busy, "too many readers");
        let permit = self.shared.readers.try_acquire().map_err(busy)?;
        let offered = async {
            loop {
                let mut offered = std::pin::pin!(self.shared.offered.notified());
                offered.as_mut().enable();
                if let Some(found) = self.find(id, epoch)? {
                    return Ok(found);
                }
                offered.await;
            }
        };
        let (export, fence, pulls) =
            tokio::time::timeout(patience, offered).await.unwrap_or_else(|_| {
                let message = format!("no KV of request {id} attempt {epoch} is offered");
                Err(Refusal::new(RefusalCode::NotFound, message))
            })?;
        Ok(Reader { export, fence, pulls, _permit: permit })
    }

    fn find(&self, id: &RequestId, epoch: Epoch) -> Result<Option<Found>, Refusal> {
        let leases = self.shared.lock();
        let Some(lease) = leases.get(id).filter(|lease| lease.epoch >= epoch) else {
            return Ok(None);
        };
        if lease.epoch > epoch {
            let message = format!("request {id} is at attempt {}", lease.epoch);
            return Err(Refusal::new(RefusalCode::StaleEpoch, message));
        }
        Ok(Some((lease.export.clone(), lease.fence.clone(), lease.pulls.clone())))
    }

    /// Fences a lease, and gives its pages up.
    fn end(&self, id: &RequestId, epoch: Epoch) {
        let mut leases = self.shared.lock();
        if leases.get(id).is_some_and(|lease| lease.epoch == epoch)
            && let Some(lease) = leases.remove(id)
        {
            drop(leases);
            #[cfg(feature = "sabotage-fence")]
            lease.export.free();
            #[cfg(not(feature = "sabotage-fence"))]
            lease.fence.cancel();
        }
    }
}

type Found = (Export, CancellationToken, watch::Sender<Pulls>);

/// Pages on offer. Dropping it ends the lease.
#[derive(Debug)]
pub struct Offer {
    id: RequestId,
    epoch: Epoch,
    pulls: watch::Receiver<Pulls>,
    leases: Leases,
}

impl Offer {
    /// Keeps the pages until a reader has all of them, one leaves, or `time` is over, then ends the
    /// lease. Returns whether they were read.
    pub async fn until_pulled(mut self, time: Duration) -> bool {
        let before = self.pulls.borrow().left;
        let pulled = self.pulls.wait_for(|pulls| pulls.whole || pulls.left > before);
        matches!(tokio::time::timeout(time, pulled).await, Ok(Ok(pulls)) if pulls.whole)
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        self.leases.end(&self.id, self.epoch);
    }
}

/// A reader's hold on a lease: while it lives, so do the pages.
#[derive(Debug)]
pub struct Reader<'a> {
    /// The pages.
    pub export: Export,
    /// Cancelled when the lease has ended.
    pub fence: CancellationToken,
    pulls: watch::Sender<Pulls>,
    _permit: tokio::sync::SemaphorePermit<'a>,
}

impl Reader<'_> {
    /// The reader has everything.
    pub fn finish(self) {
        self.pulls.send_modify(|pulls| pulls.whole = true);
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.pulls.send_modify(|pulls| pulls.left += 1);
    }
}

#[cfg(test)]
mod tests {
    use headstart_engine::executor::fake::{FakeExecutor, FakeOptions};
    use headstart_engine::{DraftPolicy, EngineHandle, EngineOptions, Request};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn engine() -> EngineHandle {
        EngineHandle::start(
            Box::new(FakeExecutor::new(FakeOptions::default())),
            EngineOptions::default(),
        )
    }

    /// The pages of a request that is over: two full ones, and one with eight tokens.
    async fn pages(engine: &EngineHandle) -> Export {
        // It waits for its draft until it is followed.
        let policy = DraftPolicy {
            window: 6,
            threshold: 0.8,
            continue_complete: true,
            continue_empty: true,
            moves_on: false,
        };
        let request = Request {
            prompt: (10..50).collect(),
            max_tokens: 1,
            draft: Some(policy),
            ..crate::sender::tests::request()
        };
        let mut generation = engine.submit(request).expect("a slot");
        let export = generation.export().await.expect("runs");
        generation.draft().end().await.expect("runs");
        while generation.next().await.is_some() {}
        export
    }

    fn id() -> RequestId {
        RequestId::new("r").expect("a valid id")
    }

    fn epoch(n: u64) -> Epoch {
        Epoch::new(n).expect("a valid epoch")
    }

    /// The pages in use, once the engine has told.
    async fn used(engine: &EngineHandle, expected: usize) {
        for _ in 0..2_000 {
            // A request makes the engine publish; its own pages are free again when it is over.
            let request = Request { max_tokens: 1, ..crate::sender::tests::request() };
            let mut probe = engine.submit(request).expect("a slot");
            while probe.next().await.is_some() {}
            drop(probe);
            if engine.stats().kv_tokens_used == expected {
                return;
            }
        }
        assert_eq!(engine.stats().kv_tokens_used, expected);
    }

    #[tokio::test]
    async fn a_lease_that_ends_is_fenced_and_its_pages_stay_while_they_are_read() {
        let engine = engine();
        let leases = Leases::new(4);
        let offer = leases.offer(&id(), epoch(1), pages(&engine).await).expect("the first");
        let reader = leases.open(&id(), epoch(1), PATIENCE).await.expect("there");
        used(&engine, 48).await;
        drop(offer);
        assert!(reader.fence.is_cancelled() && leases.is_empty());
        let late = leases.open(&id(), epoch(1), Duration::ZERO).await.expect_err("over");
        assert_eq!(late.code, RefusalCode::NotFound);
        used(&engine, 48).await;
        drop(reader);
        used(&engine, 0).await;
    }

    #[tokio::test]
    async fn a_later_attempt_takes_the_place_of_an_earlier_one() {
        let engine = engine();
        let leases = Leases::new(4);
        let first = leases.offer(&id(), epoch(1), pages(&engine).await).expect("the first");
        let reader = leases.open(&id(), epoch(1), PATIENCE).await.expect("there");
        let second = leases.offer(&id(), epoch(2), pages(&engine).await);
        assert!(second.is_some() && reader.fence.is_cancelled());
        assert!(leases.offer(&id(), epoch(2), pages(&engine).await).is_none());
        let stale = leases.open(&id(), epoch(1), PATIENCE).await.expect_err("over");
        assert_eq!(stale.code, RefusalCode::StaleEpoch);
        drop(first);
        assert_eq!(leases.len(), 1, "the earlier offer's end is not the later one's");
    }

    #[tokio::test]
    async fn a_reader_may_come_first_and_only_so_many_come() {
        let engine = engine();
        let leases = Leases::new(1);
        let (id, export) = (id(), pages(&engine).await);
        let (reader, offer) = tokio::join!(leases.open(&id, epoch(1), PATIENCE), async {
            tokio::task::yield_now().await;
            leases.offer(&id, epoch(1), export)
        });
        let reader = reader.expect("let in");
        let busy = leases.open(&id, epoch(1), PATIENCE).await.expect_err("full");
        assert_eq!(busy.code, RefusalCode::Busy);
        let offer = offer.expect("the first");
        let kept = tokio::spawn(offer.until_pulled(PATIENCE));
        reader.finish();
        assert!(kept.await.expect("no panic"), "it was read");
        assert!(leases.is_empty());
    }

    #[tokio::test]
    async fn pages_are_not_kept_for_a_reader_that_left() {
        let engine = engine();
        let leases = Leases::new(4);
        let offer = leases.offer(&id(), epoch(1), pages(&engine).await).expect("the first");
        drop(leases.open(&id(), epoch(1), PATIENCE).await.expect("there"));
        let reader = leases.open(&id(), epoch(1), PATIENCE).await.expect("the lease still runs");
        let kept = tokio::spawn(offer.until_pulled(PATIENCE));
        tokio::task::yield_now().await;
        assert!(!kept.is_finished(), "only who leaves from now on counts");
        drop(reader);
        assert!(!kept.await.expect("no panic"));
        assert!(leases.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_keeps_pages_for_ever() {
        let engine = engine();
        let leases = Leases::new(1);
        let offer = leases.offer(&id(), epoch(1), pages(&engine).await).expect("the first");
        assert!(!offer.until_pulled(PATIENCE).await);
        assert!(leases.is_empty());
    }
}
