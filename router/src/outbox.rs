//! Between the task that owns a request and the client's writer. The task never waits for a slow
//! client; what waits is merged, so the box holds at most a few entries a choice, and bounded in
//! bytes: when more would wait, the answer is over and everything that waits is dropped.

use std::collections::VecDeque;
#[cfg(test)]
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures::task::AtomicWaker;
use headstart_proto::Error;
use tokio::sync::Notify;

use crate::answer::Piece;
use crate::frames::FinishReason;

/// What became of the draft, as clients see it. Counts are in the base's tokens.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Summary {
    /// The drafter's model name; `None` where no drafter took part.
    pub(crate) drafter: Option<Arc<str>>,
    /// The base's model name.
    pub(crate) base: Arc<str>,
    /// The threshold was reached.
    pub(crate) switched: bool,
    /// Index of the last draft token that was kept, once that was decided.
    pub(crate) switch_index: Option<u32>,
    /// Draft tokens that the base received.
    pub(crate) drafted_tokens: u32,
    /// Draft tokens in the answer.
    pub(crate) kept_tokens: u32,
    /// The window in force.
    pub(crate) window: u32,
    /// The threshold in force.
    pub(crate) threshold: f32,
}

/// What happens in a request, in the order in which the client hears of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event {
    /// More of an answer.
    Text {
        /// The answer's index.
        choice: u32,
        /// What was added.
        piece: Piece,
    },
    /// An answer is complete.
    Finished {
        /// The answer's index.
        choice: u32,
        /// Why it ended.
        reason: FinishReason,
        /// Its tokens.
        completion_tokens: u32,
        /// What became of its draft.
        summary: Summary,
    },
    /// The request failed; the last event.
    Failed(Error),
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Event>,
    /// Bytes of what waits.
    bytes: usize,
    overflowed: bool,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    bytes_max: usize,
    waker: AtomicWaker,
    overflow: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The task's end. Dropping it ends the stream.
#[derive(Debug)]
pub(crate) struct Outbox(Arc<Shared>);

/// The client's end.
#[derive(Debug)]
pub(crate) struct Inbox(Arc<Shared>);

/// A new box, in which at most `bytes_max` wait for the reader.
pub(crate) fn outbox(bytes_max: usize) -> (Outbox, Inbox) {
    let shared = Arc::new(Shared { bytes_max, ..Shared::default() });
    (Outbox(Arc::clone(&shared)), Inbox(shared))
}

impl Outbox {
    /// Adds an event; text that waits for the same answer from the same source takes it in. In a
    /// box that overflowed, only [`Event::Failed`] finds place.
    pub(crate) fn push(&self, event: Event) {
        let mut state = self.0.lock();
        if state.overflowed && !matches!(event, Event::Failed(_)) {
            return;
        }
        state.bytes = state.bytes.saturating_add(bytes(&event));
        if state.bytes > self.0.bytes_max && !matches!(event, Event::Failed(_)) {
            state.overflowed = true;
            state.waiting = VecDeque::new();
            drop(state);
            self.0.overflow.notify_one();
            return;
        }
        if let Some(rest) = merge(&mut state.waiting, event) {
            state.waiting.push_back(rest);
        }
        drop(state);
        self.0.waker.wake();
    }

    /// Waits until more would wait than may. The reader is then to be told with [`Event::Failed`].
    pub(crate) async fn overflowed(&self) {
        while !self.0.lock().overflowed {
            self.0.overflow.notified().await;
        }
    }
}

/// About the memory an event takes.
fn bytes(event: &Event) -> usize {
    let Event::Text { piece, .. } = event else { return 0 };
    let logprobs: usize = piece
        .logprobs
        .iter()
        .map(|logprob| size_of_val(logprob) + size_of_val(&logprob.top[..]))
        .sum();
    piece.text.len() + size_of_val(&piece.ids[..]) + logprobs
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.waker.wake();
    }
}

impl Inbox {
    /// [`Self::poll_recv`], awaited.
    #[cfg(test)]
    pub(crate) async fn recv(&mut self) -> Option<VecDeque<Event>> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// Everything that waits, at least one event; ready with `None` after the last one.
    pub(crate) fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<VecDeque<Event>>> {
        self.0.waker.register(cx.waker());
        let mut state = self.0.lock();
        if !state.waiting.is_empty() {
            state.bytes = 0;
            return Poll::Ready(Some(std::mem::take(&mut state.waiting)));
        }
        if state.closed { Poll::Ready(None) } else { Poll::Pending }
    }
}

/// Merges `event` into the last waiting event of its answer where both are text of one source;
/// otherwise hands it back.
fn merge(waiting: &mut VecDeque<Event>, event: Event) -> Option<Event> {
    let Event::Text { choice, piece } = event else { return Some(event) };
    let last = waiting.iter_mut().rev().find(|event| match event {
        Event::Text { choice: other, .. } | Event::Finished { choice: other, .. } => {
            *other == choice
        }
        Event::Failed(_) => true,
    });
    match last {
        Some(Event::Text { piece: held, .. }) if held.source == piece.source => {
            if held.ids.is_empty() {
                held.position = piece.position;
            }
            held.text.push_str(&piece.text);
            held.ids.extend(piece.ids);
            held.logprobs.extend(piece.logprobs);
            None
        }
        _ => Some(Event::Text { choice, piece }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frames::Source;

    fn text(choice: u32, source: Source, position: u32, text: &str) -> Event {
        let ids = vec![position];
        let piece = Piece { source, position, text: text.into(), ids, logprobs: vec![] };
        Event::Text { choice, piece }
    }

    #[tokio::test]
    async fn what_waits_is_merged_by_choice_and_source() {
        let (outbox, mut inbox) = outbox(1 << 20);
        outbox.push(text(0, Source::Drafter, 0, "a"));
        outbox.push(text(1, Source::Drafter, 0, "x"));
        outbox.push(text(0, Source::Drafter, 1, "b"));
        outbox.push(text(0, Source::Base, 2, "c"));
        outbox.push(text(1, Source::Drafter, 1, "y"));
        outbox.push(text(0, Source::Base, 3, "d"));
        let events: Vec<_> = inbox.recv().await.unwrap().into();
        let mut merged = Vec::new();
        for event in events {
            let Event::Text { choice, piece } = event else { panic!("text only") };
            merged.push((choice, piece.source, piece.position, piece.text, piece.ids));
        }
        assert_eq!(
            merged,
            [
                (0, Source::Drafter, 0, "ab".into(), vec![0, 1]),
                (1, Source::Drafter, 0, "xy".into(), vec![0, 1]),
                (0, Source::Base, 2, "cd".into(), vec![2, 3]),
            ]
        );
        outbox.push(text(0, Source::Base, 4, "e"));
        drop(outbox);
        assert_eq!(inbox.recv().await.unwrap().len(), 1);
        assert!(inbox.recv().await.is_none());
    }
    #[tokio::test]
    async fn a_reader_that_falls_too_far_behind_hears_of_it_and_nothing_else() {
        use headstart_proto::ErrorCode;
        let (outbox, mut inbox) = outbox(100);
        for index in 0..10 {
            outbox.push(text(0, Source::Base, index, "0123456789"));
            assert_eq!(inbox.recv().await.unwrap().len(), 1, "a reader that keeps up has no limit");
        }
        for index in 10..17 {
            outbox.push(text(0, Source::Base, index, "0123456789"));
        }
        assert!(futures::FutureExt::now_or_never(outbox.overflowed()).is_none(), "7 × 14 bytes");
        outbox.push(text(0, Source::Base, 17, "0123456789"));
        outbox.overflowed().await;
        outbox.push(text(0, Source::Base, 18, "more"));
        let failed = Event::Failed(Error::new(ErrorCode::SlowReader, "too slow"));
        outbox.push(failed.clone());
        drop(outbox);
        assert_eq!(inbox.recv().await.unwrap(), [failed]);
        assert!(inbox.recv().await.is_none());
    }
}
