//! Where a draft meets the answer it begins.
//!
//! The router opens `Serve` on the base and `Draft` on a drafter at the same time, so the drafter's
//! handoff stream may come before or after the request it is for. A session is known by request id
//! and attempt epoch; a later attempt takes the place of an earlier one. A handoff names the attempt
//! it is for and an epoch of its own; a later handoff takes the place of an earlier one, so a drafter
//! that was lost can be followed by another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use headstart_proto::v1::{DraftEncoding, DraftEnd};
use headstart_proto::{Epoch, Error, ErrorCode, RequestId};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};

use crate::metrics::{Held, OPEN_REQUESTS};

/// Pieces of a draft that wait for their session at most.
const DRAFT_QUEUE: usize = 64;

/// What a drafter says.
#[derive(Clone, Debug, PartialEq)]
pub enum DraftInput {
    /// The next tokens, in the base's own vocabulary.
    Ids(Vec<u32>),
    /// The next text.
    Text {
        /// Of so many of the drafter's tokens. None: what a cut character left at the draft's end.
        count: u32,
        /// What became certain with them.
        text: String,
    },
    /// The draft is over.
    Ended,
}

/// A drafter that wants to hand a draft over.
#[derive(Clone, Debug, PartialEq)]
pub struct Handoff {
    /// The attempt the draft is for.
    pub serve_epoch: Epoch,
    /// The draft's own.
    pub epoch: Epoch,
    /// The drafter's tokenizer.
    pub tokenizer_fingerprint: String,
    /// How the draft will come.
    pub encoding: DraftEncoding,
}

/// The drafter's end of a meeting.
#[derive(Debug)]
pub struct Link {
    /// Takes the draft. Dropped before [`DraftInput::Ended`], it means that the drafter is lost.
    pub input: mpsc::Sender<DraftInput>,
    /// Set when the drafter is to stop; closed when the session is over.
    pub stop: watch::Receiver<Option<DraftEnd>>,
    /// The session's word: draft tokens it has, in the drafter's tokens, or why it takes none from
    /// this drafter. Closed: the drafter is to stop.
    pub welcome: oneshot::Receiver<Result<u32, Error>>,
}

/// A drafter that came. Dropping it tells the drafter to stop.
#[derive(Debug)]
pub struct Visitor {
    /// Who came.
    pub handoff: Handoff,
    /// Lets the drafter begin.
    pub welcome: oneshot::Sender<Result<u32, Error>>,
    /// What it will say.
    pub line: Line,
}

/// The session's end of a meeting. Dropping it tells the drafter to stop.
#[derive(Debug)]
pub struct Line {
    /// The draft.
    pub input: mpsc::Receiver<DraftInput>,
    /// Tells the drafter to stop.
    pub stop: watch::Sender<Option<DraftEnd>>,
}

/// A session's place. Dropping it gives the place up.
#[derive(Debug)]
pub struct Seat {
    id: RequestId,
    epoch: Epoch,
    arrived: Arc<Notify>,
    place: Arc<Rendezvous>,
}

#[derive(Debug)]
struct Entry {
    epoch: Epoch,
    /// The latest handoff's.
    handoff: Option<Epoch>,
    /// Until the session takes it.
    waiting: Option<Visitor>,
    arrived: Arc<Notify>,
    /// Set once no draft is wanted any more: what drafters are told.
    decided: Option<DraftEnd>,
    _held: Held,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Rendezvous {
    entries: Mutex<HashMap<RequestId, Entry>>,
    opened: Notify,
    waiting: Semaphore,
    waiting_max: usize,
}

impl Rendezvous {
    /// A place where at most `waiting` drafters wait for their sessions.
    #[must_use]
    pub fn new(waiting: usize) -> Arc<Self> {
        Arc::new(Self {
            entries: Mutex::default(),
            opened: Notify::new(),
            waiting: Semaphore::new(waiting),
            waiting_max: waiting,
        })
    }

    /// Sessions that have a place.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.lock().len()
    }

    /// Drafters that wait for their sessions.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting_max - self.waiting.available_permits()
    }

    /// Opens a session's place. With `decided` no draft is wanted: drafters are told that.
    ///
    /// # Errors
    /// [`ErrorCode::StaleEpoch`] if the same or a later attempt has one.
    pub fn open(
        self: &Arc<Self>,
        id: &RequestId,
        epoch: Epoch,
        decided: Option<DraftEnd>,
    ) -> Result<Seat, Error> {
        let arrived = Arc::new(Notify::new());
        let (handoff, waiting, _held) = (None, None, Held::new(OPEN_REQUESTS));
        let entry =
            Entry { epoch, handoff, waiting, arrived: Arc::clone(&arrived), decided, _held };
        let mut entries = self.lock();
        if let Some(entry) = entries.get(id)
            && entry.epoch >= epoch
        {
            return Err(stale(id, epoch, entry.epoch));
        }
        let earlier = entries.insert(id.clone(), entry);
        drop(entries);
        if let Some(earlier) = earlier {
            earlier.arrived.notify_one();
        }
        self.opened.notify_waiters();
        Ok(Seat { id: id.clone(), epoch, arrived, place: Arc::clone(self) })
    }

    /// Joins a drafter to its session, which may open a little later.
    ///
    /// # Errors
    /// [`ErrorCode::StaleEpoch`] for an earlier attempt or handoff, [`ErrorCode::Overloaded`] if too
    /// many wait, [`ErrorCode::NotFound`] if no session opens in time.
    pub async fn join(
        &self,
        id: &RequestId,
        handoff: &Handoff,
        patience: Duration,
    ) -> Result<Link, Error> {
        if let Some(link) = self.try_join(id, handoff)? {
            return Ok(link);
        }
        let _place = self.waiting.try_acquire().map_err(|_| {
            Error::new(ErrorCode::Overloaded, "too many drafters wait for their requests")
        })?;
        let joined = async {
            loop {
                let mut opened = std::pin::pin!(self.opened.notified());
                opened.as_mut().enable();
                if let Some(link) = self.try_join(id, handoff)? {
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

    fn try_join(&self, id: &RequestId, handoff: &Handoff) -> Result<Option<Link>, Error> {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(id) else {
            return Ok(None);
        };
        if entry.epoch > handoff.serve_epoch {
            return Err(stale(id, handoff.serve_epoch, entry.epoch));
        }
        if entry.epoch < handoff.serve_epoch {
            return Ok(None);
        }
        if let Some(latest) = entry.handoff.filter(|&latest| latest >= handoff.epoch)
            && !cfg!(feature = "sabotage-epoch")
        {
            return Err(stale(id, handoff.epoch, latest));
        }
        entry.handoff = Some(handoff.epoch);
        let (input, receiver) = mpsc::channel(DRAFT_QUEUE);
        let (stop, stopped) = watch::channel(entry.decided);
        let (welcome, welcomed) = oneshot::channel();
        if entry.decided.is_none() {
            // A visitor that still waits is dropped, and so told to stop.
            let handoff = handoff.clone();
            let line = Line { input: receiver, stop };
            entry.waiting = Some(Visitor { handoff, welcome, line });
            entry.arrived.notify_one();
        }
        Ok(Some(Link { input, stop: stopped, welcome: welcomed }))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RequestId, Entry>> {
        // Every critical section leaves the map whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// The latest drafter that came and was not taken yet. Cancel safe.
    ///
    /// # Errors
    /// [`ErrorCode::StaleEpoch`] once a later attempt has taken the place.
    pub async fn visitor(&self) -> Result<Visitor, Error> {
        loop {
            {
                let mut entries = self.place.lock();
                match entries.get_mut(&self.id) {
                    Some(entry) if entry.epoch == self.epoch => {
                        if let Some(visitor) = entry.waiting.take() {
                            return Ok(visitor);
                        }
                    }
                    Some(entry) => return Err(stale(&self.id, self.epoch, entry.epoch)),
                    None => {}
                }
            }
            self.arrived.notified().await;
        }
    }

    /// No draft is wanted any more: drafters that wait, and those that come, are told `reason`.
    pub fn decide(&self, reason: DraftEnd) {
        let mut entries = self.place.lock();
        if let Some(entry) = entries.get_mut(&self.id).filter(|entry| entry.epoch == self.epoch) {
            entry.decided = Some(reason);
            if let Some(visitor) = entry.waiting.take() {
                visitor.line.stop.send_replace(Some(reason));
            }
        }
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

    fn handoff(serve: u64, own: u64) -> Handoff {
        Handoff {
            serve_epoch: epoch(serve),
            epoch: epoch(own),
            tokenizer_fingerprint: String::new(),
            encoding: DraftEncoding::Ids,
        }
    }

    #[tokio::test]
    async fn either_side_may_come_first() {
        let place = Rendezvous::new(4);
        let seat = place.open(&id(), epoch(1), None).expect("opens");
        let link = place.join(&id(), &handoff(1, 1), PATIENCE).await.expect("joins");
        let mut visitor = seat.visitor().await.expect("came");
        link.input.send(DraftInput::Ended).await.expect("the seat is there");
        assert_eq!(visitor.line.input.recv().await, Some(DraftInput::Ended));
        drop(seat);

        let id = id();
        let early = handoff(1, 1);
        let (link, seat) = tokio::join!(place.join(&id, &early, PATIENCE), async {
            tokio::task::yield_now().await;
            place.open(&id, epoch(1), None)
        });
        assert!(link.is_ok() && seat.is_ok());
    }

    #[tokio::test]
    async fn a_later_attempt_takes_the_place_of_an_earlier_one() {
        let place = Rendezvous::new(4);
        let first = place.open(&id(), epoch(1), None).expect("opens");
        let second = place.open(&id(), epoch(2), None).expect("takes the place");
        let told = first.visitor().await.expect_err("the first one is told");
        assert_eq!(told.code, ErrorCode::StaleEpoch);
        drop(first);
        let code = |result: Result<Link, Error>| result.expect_err("refused").code;
        assert_eq!(code(place.join(&id(), &handoff(1, 9), PATIENCE).await), ErrorCode::StaleEpoch);
        let again = place.open(&id(), epoch(2), None).expect_err("open already");
        assert_eq!(again.code, ErrorCode::StaleEpoch);
        assert!(place.join(&id(), &handoff(2, 2), PATIENCE).await.is_ok());
        drop(second);
        assert!(place.lock().is_empty());
    }

    #[tokio::test]
    async fn a_later_handoff_takes_the_place_of_an_earlier_one() {
        let place = Rendezvous::new(4);
        let seat = place.open(&id(), epoch(1), None).expect("opens");
        let mut first = place.join(&id(), &handoff(1, 1), PATIENCE).await.expect("joins");
        let _second = place.join(&id(), &handoff(1, 3), PATIENCE).await.expect("joins");
        assert!(first.stop.changed().await.is_err(), "the first one is told");
        assert_eq!(seat.visitor().await.expect("came").handoff.epoch, epoch(3));
        for old in [2, 3] {
            let late = place.join(&id(), &handoff(1, old), PATIENCE).await;
            assert_eq!(late.expect_err("refused").code, ErrorCode::StaleEpoch);
        }
        seat.decide(DraftEnd::Switched);
        let late = place.join(&id(), &handoff(1, 4), PATIENCE).await.expect("is told");
        assert_eq!(*late.stop.borrow(), Some(DraftEnd::Switched));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever_and_only_so_many_wait() {
        let (place, id) = (Rendezvous::new(1), id());
        let (early, other) = (handoff(1, 1), handoff(2, 2));
        let (one, two) =
            tokio::join!(place.join(&id, &early, PATIENCE), place.join(&id, &other, PATIENCE));
        assert_eq!(one.expect_err("no session").code, ErrorCode::NotFound);
        assert_eq!(two.expect_err("no room").code, ErrorCode::Overloaded);
    }
}
