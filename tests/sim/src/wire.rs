//! What goes over the wire, looked at in the moment in which it is written: some promises of the
//! protocol are kept or broken there, long before a client could see it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use headstart_engine::executor::TokenId;
use headstart_engine::executor::fake::FakeExecutor;
use headstart_engine::{KvFormat, KvLayout};
use headstart_handoff::wire::{SenderFrame, read_sender};
use headstart_proto::v1::{self, handoff_frame, handoff_reply};
use prost::Message;
use tokio::sync::broadcast;
use tokio::time::Instant;

use crate::net::HostId;

/// News that whoever listens may be behind by.
const NEWS: usize = 256;
/// What an HTTP/2 client says first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Something on the wire that a fault may wait for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// A base connects to another one's KV service.
    Transfer {
        /// Who has the pages.
        sender: HostId,
        /// Who wants them.
        receiver: HostId,
    },
    /// A drafter opens a handoff.
    Opened(Handoff),
    /// A base takes a drafter's draft.
    Accepted(Handoff),
}

/// A handoff, as it is known on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handoff {
    /// Whose draft.
    pub drafter: HostId,
    /// To whom.
    pub base: HostId,
    /// Of which answer.
    pub request_id: String,
    /// Its epoch.
    pub epoch: u64,
}

/// What was seen. Clones share it.
#[derive(Clone, Debug)]
pub struct Wire(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    start: Instant,
    news: broadcast::Sender<News>,
    accepted: Vec<(Duration, Handoff)>,
    pages: u64,
    wrong_pages: Vec<String>,
}

/// All that was seen in a run.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The handoffs that bases took, and when.
    pub accepted: Vec<(Duration, Handoff)>,
    /// KV pages that were sent.
    pub pages: u64,
    /// Those that were not the KV of their tokens.
    pub wrong_pages: Vec<String>,
}

impl Default for Wire {
    fn default() -> Self {
        let (news, _) = broadcast::channel(NEWS);
        Self(Arc::new(Mutex::new(State {
            start: Instant::now(),
            news,
            accepted: Vec::new(),
            pages: 0,
            wrong_pages: Vec::new(),
        })))
    }
}

impl Wire {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What will be seen from now on.
    #[must_use]
    pub fn news(&self) -> broadcast::Receiver<News> {
        self.lock().news.subscribe()
    }

    /// What was seen so far.
    #[must_use]
    pub fn seen(&self) -> Seen {
        let State { accepted, pages, wrong_pages, .. } = &*self.lock();
        Seen { accepted: accepted.clone(), pages: *pages, wrong_pages: wrong_pages.clone() }
    }

    pub(crate) fn tell(&self, news: News) {
        let mut state = self.lock();
        if let News::Accepted(handoff) = &news {
            let at = state.start.elapsed();
            state.accepted.push((at, handoff.clone()));
        }
        // Without faults that wait nobody listens.
        let _ = state.news.send(news);
    }

    fn page(&self, wrong: Option<String>) {
        let mut state = self.lock();
        state.pages += 1;
        state.wrong_pages.extend(wrong);
    }
}

/// Looks at one direction of a connection.
#[derive(Debug)]
pub(crate) enum Tap {
    /// Pages, from the one host to the other.
    Pages { buffer: Vec<u8>, format: Option<KvFormat>, tokens: Vec<TokenId>, names: String },
    /// What a drafter says to a base.
    Drafts { calls: Calls, drafter: HostId, base: HostId },
    /// What a base answers.
    Replies { calls: Calls, drafter: HostId, base: HostId },
}

impl Tap {
    /// Takes what is written.
    pub(crate) fn see(&mut self, bytes: &[u8], wire: &Wire) {
        match self {
            Self::Pages { buffer, format, tokens, names } => {
                buffer.extend_from_slice(bytes);
                while let Some(frame) = next_frame(buffer, format.map(|format| format.layout)) {
                    match frame {
                        SenderFrame::Accept(accepted) => *format = Some(accepted),
                        SenderFrame::Page(page) => {
                            tokens.truncate(page.position);
                            tokens.extend(&page.tokens);
                            let layout = format.map(|format| format.layout);
                            let right = layout
                                .is_some_and(|l| FakeExecutor::is_page(&l, tokens, &page.data));
                            let position = page.position;
                            let wrong =
                                (!right).then(|| format!("the page at {position}, {names}"));
                            wire.page(wrong);
                        }
                        _ => {}
                    }
                }
            }
            Self::Drafts { calls, drafter, base } => {
                for message in calls.messages(bytes) {
                    if let Ok(frame) = v1::HandoffFrame::decode(&*message)
                        && let Some(handoff_frame::Event::Open(_)) = frame.event
                    {
                        let (request_id, epoch) = (frame.request_id, frame.epoch);
                        let (drafter, base) = (*drafter, *base);
                        wire.tell(News::Opened(Handoff { drafter, base, request_id, epoch }));
                    }
                }
            }
            Self::Replies { calls, drafter, base } => {
                for message in calls.messages(bytes) {
                    if let Ok(reply) = v1::HandoffReply::decode(&*message)
                        && let Some(handoff_reply::Event::Accepted(_)) = reply.event
                    {
                        let (request_id, epoch) = (reply.request_id, reply.epoch);
                        let (drafter, base) = (*drafter, *base);
                        wire.tell(News::Accepted(Handoff { drafter, base, request_id, epoch }));
                    }
                }
            }
        }
    }
}

/// Takes the next whole KV frame out of `buffer`.
fn next_frame(buffer: &mut Vec<u8>, layout: Option<KvLayout>) -> Option<SenderFrame> {
    let len = u32::from_le_bytes(*buffer.first_chunk()?) as usize;
    let frame: Vec<u8> = (buffer.len() >= 4 + len).then(|| buffer.drain(..4 + len).collect())?;
    read_sender(&mut &frame[..], layout.as_ref(), Vec::new()).now_or_never()?.ok()
}

/// The gRPC messages in one direction of an HTTP/2 connection (RFC 9113, section 4.1).
#[derive(Debug, Default)]
pub(crate) struct Calls {
    buffer: Vec<u8>,
    /// By stream.
    streams: BTreeMap<u32, Vec<u8>>,
}

impl Calls {
    fn messages(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        const DATA: u8 = 0;
        const PADDED: u8 = 8;
        self.buffer.extend_from_slice(bytes);
        if self.buffer.starts_with(PREFACE) {
            self.buffer.drain(..PREFACE.len());
        } else if PREFACE.starts_with(&self.buffer) {
            return Vec::new();
        }
        let mut messages = Vec::new();
        while let Some(&[a, b, c, kind, flags, s0, s1, s2, s3]) = self.buffer.first_chunk() {
            let len = u32::from_be_bytes([0, a, b, c]) as usize;
            if self.buffer.len() < 9 + len {
                break;
            }
            let frame: Vec<u8> = self.buffer.drain(..9 + len).skip(9).collect();
            if kind == DATA && flags & PADDED == 0 {
                let stream = u32::from_be_bytes([s0, s1, s2, s3]);
                let said = self.streams.entry(stream).or_default();
                said.extend(frame);
                // A byte that says whether it is compressed, a length, and the message.
                while let Some(&[0, d, e, f, g]) = said.first_chunk() {
                    let len = u32::from_be_bytes([d, e, f, g]) as usize;
                    if said.len() < 5 + len {
                        break;
                    }
                    messages.push(said.drain(..5 + len).skip(5).collect());
                }
            }
        }
        messages
    }
}
