//! Where a draft meets the answer it begins.
//!
//! The router opens `Serve` on the base and `Draft` on a drafter at the same time, so the drafter's
//! handoff stream may come before or after the request it is for. Both are known by request id and
//! attempt epoch; a later epoch takes the place of an earlier one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use headstart_proto::v1::{DraftEncoding, DraftEnd};
use headstart_proto::{Epoch, Error, ErrorCode, RequestId};
use tokio::sync::{Notify, Semaphore, mpsc, watch};

/// Pieces of a draft that wait for their session at most.
const DRAFT_QUEUE: usize = 64;

/// What a drafter says.
#[derive(Clone, Debug, PartialEq)]
pub enum DraftInput {
    /// The stream is there.
    Open {
        /// The drafter's tokenizer.
        tokenizer_fingerprint: String,
        /// How the draft will come.
        encoding: DraftEncoding,
    },
    /// The next tokens, in the base's own vocabulary.
    Ids(Vec<u32>),
    /// The next text.
    Text(String),
    /// The draft is over.
    Ended,
}

/// The drafter's end of a meeting.
#[derive(Debug)]
pub struct Link {
    /// Takes the draft. Dropped before [`DraftInput::Ended`], it means that the drafter is lost.
    pub input: mpsc::Sender<DraftInput>,
    /// Set when the drafter is to stop; closed when the session is over.
    pub stop: watch::Receiver<Option<DraftEnd>>,
}

/// The session's end of a meeting. Dropping it gives the place up.
#[derive(Debug)]
pub struct Seat {
    /// The draft.
    pub input: mpsc::Receiver<DraftInput>,
    /// Tells the drafter to stop.
    pub stop: watch::Sender<Option<DraftEnd>>,
    id: RequestId,
    epoch: Epoch,
    place: Arc<Rendezvous>,
}

#[derive(Debug)]
struct Entry {
    epoch: Epoch,
    /// Until a drafter takes it.
    link: Option<Link>,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Rendezvous {
    entries: Mutex<HashMap<RequestId, Entry>>,
    opened: Notify,
    waiting: Semaphore,
}

impl Rendezvous {
    /// A place where at most `waiting` drafters wait for their sessions.
    #[must_use]
    pub fn new(waiting: usize) -> Arc<Self> {
        Arc::new(Self {
            entries: Mutex::default(),
            opened: Notify::new(),
            waiting: Semaphore::new(waiting),
        })
    }

    /// Opens a session's place.
    ///
    /// # Errors
    /// [`ErrorCode::StaleEpoch`] if the same or a later attempt has one.
    pub fn open(self: &Arc<Self>, id: &RequestId, epoch: Epoch) -> Result<Seat, Error> {
        let (input_sender, input) = mpsc::channel(DRAFT_QUEUE);
        let (stop, stop_receiver) = watch::channel(None);
        let link = Link { input: input_sender, stop: stop_receiver };
        let mut entries = self.lock();
        if let Some(entry) = entries.get(id)
            && entry.epoch >= epoch
        {
            return Err(stale(id, epoch, entry.epoch));
        }
        entries.insert(id.clone(), Entry { epoch, link: Some(link) });
        drop(entries);
        self.opened.notify_waiters();
        Ok(Seat { input, stop, id: id.clone(), epoch, place: Arc::clone(self) })
    }

    /// Joins a drafter to its session, which may open a little later.
    ///
    /// # Errors
    /// [`ErrorCode::StaleEpoch`] for an earlier attempt, [`ErrorCode::Protocol`] for a second
    /// drafter, [`ErrorCode::Overloaded`] if too many wait, [`ErrorCode::NotFound`] if no session
    /// opens in time.
    pub async fn join(
        &self,
        id: &RequestId,
        epoch: Epoch,
        patience: Duration,
    ) -> Result<Link, Error> {
        if let Some(link) = self.try_join(id, epoch)? {
            return Ok(link);
        }
        let _place = self.waiting.try_acquire().map_err(|_| {
            Error::new(ErrorCode::Overloaded, "too many drafters wait for their requests")
        })?;
        let joined = async {
            loop {
                let mut opened = std::pin::pin!(self.opened.notified());
                opened.as_mut().enable();
                if let Some(link) = self.try_join(id, epoch)? {
                    return Ok(link);
                }
                opened.await;
            }
        };
        tokio::time::timeout(patience, joined).await.unwrap_or_else(|_| {
            let message = format!("no request {id} was opened within {patience:?}");
            Err(Error::new(ErrorCode::NotFound, message).with_field("request_id"))
        })
    }

    fn try_join(&self, id: &RequestId, epoch: Epoch) -> Result<Option<Link>, Error> {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(id) else {
            return Ok(None);
        };
        if entry.epoch > epoch {
            return Err(stale(id, epoch, entry.epoch));
        }
        if entry.epoch < epoch {
            return Ok(None);
        }
        let taken = || Error::new(ErrorCode::Protocol, format!("request {id} has a drafter"));
        entry.link.take().ok_or_else(taken).map(Some)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RequestId, Entry>> {
        // Every critical section leaves the map whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut entries = self.place.lock();
        if entries.get(&self.id).is_some_and(|entry| entry.epoch == self.epoch) {
            entries.remove(&self.id);
        }
    }
}

fn stale(id: &RequestId, epoch: Epoch, current: Epoch) -> Error {
    let message = format!("request {id} is at attempt {current}, this is attempt {epoch}");
    Error::new(ErrorCode::StaleEpoch, message).with_field("epoch")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn id() -> RequestId {
        RequestId::new("r1").expect("a valid id")
    }

    fn epoch(n: u64) -> Epoch {
        Epoch::new(n).expect("a valid epoch")
    }

    #[tokio::test]
    async fn either_side_may_come_first() {
        let place = Rendezvous::new(4);
        let mut seat = place.open(&id(), epoch(1)).expect("opens");
        let link = place.join(&id(), epoch(1), PATIENCE).await.expect("joins");
        link.input.send(DraftInput::Ended).await.expect("the seat is there");
        assert_eq!(seat.input.recv().await, Some(DraftInput::Ended));
        drop(seat);

        let id = id();
        let (link, seat) = tokio::join!(place.join(&id, epoch(1), PATIENCE), async {
            tokio::task::yield_now().await;
            place.open(&id, epoch(1))
        });
        assert!(link.is_ok() && seat.is_ok());
    }

    #[tokio::test]
    async fn a_later_attempt_takes_the_place_of_an_earlier_one() {
        let place = Rendezvous::new(4);
        let mut first = place.open(&id(), epoch(1)).expect("opens");
        let second = place.open(&id(), epoch(2)).expect("takes the place");
        assert_eq!(first.input.recv().await, None, "the first one is told");
        drop(first);
        let code = |result: Result<Link, Error>| result.expect_err("refused").code;
        assert_eq!(code(place.join(&id(), epoch(1), PATIENCE).await), ErrorCode::StaleEpoch);
        assert_eq!(
            place.open(&id(), epoch(2)).expect_err("open already").code,
            ErrorCode::StaleEpoch
        );
        assert!(place.join(&id(), epoch(2), PATIENCE).await.is_ok());
        assert_eq!(code(place.join(&id(), epoch(2), PATIENCE).await), ErrorCode::Protocol);
        drop(second);
        assert!(place.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever_and_only_so_many_wait() {
        let (place, id) = (Rendezvous::new(1), id());
        let (one, two) =
            tokio::join!(place.join(&id, epoch(1), PATIENCE), place.join(&id, epoch(2), PATIENCE));
        assert_eq!(one.expect_err("no session").code, ErrorCode::NotFound);
        assert_eq!(two.expect_err("no room").code, ErrorCode::Overloaded);
    }
}
