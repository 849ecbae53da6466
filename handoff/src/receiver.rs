//! The side that goes on: pulls pages into its engine's prefix cache.

use std::collections::VecDeque;
use std::time::Duration;

use headstart_engine::{Import, ImportError, KvFormat, Writing};
use headstart_proto::{Epoch, RequestId};
use tokio::io::{AsyncRead, BufReader};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::layout::{RelaidPage, Relay};
use crate::transport::KvTransport;
use crate::wire::{self, Hello, ReceiverFrame, Refusal, SenderFrame, WireError};
use crate::{Times, pages_under_way};

/// Bytes that are read ahead of a frame.
const HEAD_BYTES: usize = 4 << 10;

/// Whose pages are wanted, and where they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// `host:port` of the sender's KV service.
    pub address: String,
    /// The request.
    pub request_id: RequestId,
    /// The attempt that computes them.
    pub epoch: Epoch,
}

/// Why a pull ended before the sender's end. What is whole stays.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The sender could not be reached.
    #[error("connect: {0}")]
    Connect(std::io::Error),
    /// The sender gives nothing (more).
    #[error("the sender refused: {0}")]
    Refused(#[from] Refusal),
    /// What came is no frame, the stream broke, or a page is corrupt.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Nothing came for too long.
    #[error("the sender has stalled")]
    Stalled,
    /// The engine takes no more.
    #[error(transparent)]
    Engine(#[from] ImportError),
    /// The sender's pages do not fit.
    #[error("the sender's pages do not fit: {0}")]
    Mismatch(String),
}

impl PullError {
    /// A stable snake_case name.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Connect(_) => "connect",
            Self::Refused(refusal) => refusal.code.as_str(),
            Self::Wire(WireError::Corrupt) => "corrupt",
            Self::Wire(WireError::Io(_)) => "broken",
            Self::Wire(WireError::Malformed(_)) => "malformed",
            Self::Stalled => "stalled",
            Self::Engine(ImportError::NoRoom) => "no_room",
            Self::Engine(_) => "engine",
            Self::Mismatch(_) => "mismatch",
        }
    }
}

/// How far a pull has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Tokens whose KV is in the engine.
    pub tokens: usize,
    /// Bytes of pages received.
    pub bytes: u64,
    /// Time during which pages came.
    pub receiving: Duration,
    /// Nothing more comes.
    pub over: bool,
}

/// Pulls `source`'s pages into `import`, whose engine's pages are `format`, until the sender says
/// that nothing changes any more. `progress` is told of each page.
///
/// # Errors
/// [`PullError`]
pub async fn pull(
    transport: &dyn KvTransport,
    source: &Source,
    format: KvFormat,
    import: &Import,
    progress: &watch::Sender<Progress>,
    times: Times,
) -> Result<(), PullError> {
    let pulled = Pull { format, import, progress, times }.run(transport, source).await;
    progress.send_modify(|progress| progress.over = true);
    pulled
}

struct Pull<'a> {
    format: KvFormat,
    import: &'a Import,
    progress: &'a watch::Sender<Progress>,
    times: Times,
}

impl Pull<'_> {
    async fn run(&self, transport: &dyn KvTransport, source: &Source) -> Result<(), PullError> {
        let connecting = timeout(self.times.handshake, transport.connect(&source.address)).await;
        let stream = connecting.map_err(|_| PullError::Stalled)?.map_err(PullError::Connect)?;
        let (read, mut write) = tokio::io::split(stream);
        // A frame's head, and what comes with it, in one go; pages go past the buffer.
        let mut read = BufReader::with_capacity(HEAD_BYTES, read);
        let hello = Hello {
            request_id: source.request_id.clone(),
            epoch: source.epoch,
            format: self.format,
        };
        let hello = ReceiverFrame::Hello(hello);
        let greeting = wire::write_receiver(&mut write, &hello);
        let greeted = timeout(self.times.handshake, greeting).await;
        greeted.map_err(|_| PullError::Stalled)?.map_err(WireError::from)?;
        // The sender may wait as long itself for the request to begin.
        let patience = 2 * self.times.handshake;
        let answer = timeout(patience, wire::read_sender(&mut read, None, Vec::new())).await;
        let theirs = match answer.map_err(|_| PullError::Stalled)?? {
            SenderFrame::Accept(theirs) => theirs,
            SenderFrame::Refuse(refusal) => return Err(refusal.into()),
            _ => return Err(WireError::Malformed("expected an answer to the greeting").into()),
        };
        if theirs.model != self.format.model {
            return Err(PullError::Mismatch(format!("they are model {}'s", theirs.model)));
        }
        self.take_pages(&mut read, &theirs).await?;
        let done = wire::write_receiver(&mut write, &ReceiverFrame::Done);
        // A sender that is gone already has nothing to give up.
        let _ = timeout(self.times.stall, done).await;
        Ok(())
    }

    async fn take_pages(
        &self,
        read: &mut (impl AsyncRead + Unpin),
        theirs: &KvFormat,
    ) -> Result<(), PullError> {
        let relay = Relay::new(theirs.layout, self.format.layout);
        let relay = relay.map_err(|error| PullError::Mismatch(error.to_string()))?;
        let mut taken = Taken { pull: self, relay, writing: VecDeque::new(), spare: Vec::new() };
        loop {
            let buffer = taken.spare.pop().unwrap_or_default();
            let frame = wire::read_sender(read, Some(&theirs.layout), buffer);
            let mut frame = std::pin::pin!(timeout(self.times.stall, frame));
            let frame = loop {
                tokio::select! {
                    frame = &mut frame => break frame,
                    settled = taken.settle(0), if !taken.writing.is_empty() => settled?,
                }
            };
            let frame = match frame {
                Ok(Ok(frame)) => frame,
                broken => {
                    // What came before is whole.
                    taken.settle(0).await?;
                    return Err(match broken {
                        Ok(Err(error)) => error.into(),
                        _ => PullError::Stalled,
                    });
                }
            };
            match frame {
                SenderFrame::Page(page) => taken.page(page).await?,
                SenderFrame::Alive => {}
                SenderFrame::End { .. } => return taken.end().await,
                SenderFrame::Refuse(refusal) => {
                    taken.settle(0).await?;
                    return Err(refusal.into());
                }
                SenderFrame::Accept(_) => {
                    return Err(WireError::Malformed("a second answer to the greeting").into());
                }
            }
        }
    }
}

/// Pages between the stream and the engine.
struct Taken<'a> {
    pull: &'a Pull<'a>,
    relay: Relay,
    /// With the tokens that are in the cache once it is written.
    writing: VecDeque<(Writing, usize)>,
    spare: Vec<Vec<u8>>,
}

impl Taken<'_> {
    async fn page(&mut self, page: wire::PageFrame) -> Result<(), PullError> {
        let (bytes, receiving) = (page.data.len() as u64, page.receiving);
        self.pull.progress.send_modify(|progress| {
            progress.bytes += bytes;
            progress.receiving += receiving;
        });
        let relaid = self.relay.push(page.position, page.tokens, page.data);
        let relaid = relaid.ok_or(WireError::Malformed("a page out of order"))?;
        for page in relaid {
            self.write(page).await?;
        }
        Ok(())
    }

    async fn end(&mut self) -> Result<(), PullError> {
        if let Some(rest) = self.relay.rest() {
            self.write(rest).await?;
        }
        self.settle(0).await
    }

    async fn write(&mut self, page: RelaidPage) -> Result<(), PullError> {
        let layout = &self.pull.format.layout;
        let tokens = page.index * layout.page_size + page.tokens.len();
        let writing = self.pull.import.write(page.index, page.tokens, page.data).await?;
        self.writing.push_back((writing, tokens));
        self.settle(pages_under_way(layout) - 1).await
    }

    /// Waits until no more than `left` pages are on their way, and takes the buffers of those that have
    /// arrived. Cancel safe.
    async fn settle(&mut self, left: usize) -> Result<(), PullError> {
        while self.writing.len() > left
            || self.writing.front().is_some_and(|(writing, _)| writing.is_done())
        {
            let Some((writing, tokens)) = self.writing.front_mut() else { return Ok(()) };
            let tokens = *tokens;
            let buffer = timeout(self.pull.times.stall, writing.done()).await;
            self.writing.pop_front();
            self.spare.push(buffer.map_err(|_| PullError::Stalled)??);
            self.pull.progress.send_modify(|progress| progress.tokens = tokens);
        }
        Ok(())
    }
}
