//! The side that has the pages: serves one connection.

use std::collections::VecDeque;
use std::future::Future;

use headstart_engine::{Export, ExportView, KvFormat, KvLayout, Reading};
use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};
use tokio::time::{Instant, sleep_until, timeout};

use crate::layout::compatible;
use crate::lease::Leases;
use crate::transport::KvStream;
use crate::wire::{
    self, Hello, ReceiverFrame, Refusal, RefusalCode, SenderFrame, WireError, write_control,
};
use crate::{Times, pages_under_way};

/// How a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// What came is no frame, or the stream broke.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The receiver was told why it gets nothing (more).
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    /// The receiver took nothing for too long.
    #[error("the receiver has stalled")]
    Stalled,
}

/// Serves a receiver until it has everything, leaves, or the lease ends. `on_page` hears of each page
/// that is sent, with its bytes.
///
/// # Errors
/// [`ServeError`]; the receiver goes on with what it has. One that leaves when it has enough is an error
/// too.
pub async fn serve(
    stream: impl KvStream,
    leases: &Leases,
    format: KvFormat,
    times: Times,
    on_page: impl Fn(usize),
) -> Result<(), ServeError> {
    let (read, write) = tokio::io::split(stream);
    let mut connection = Connection { read, write, times, on_page };
    let ended = connection.run(leases, format).await;
    if let Err(ServeError::Refused(refusal)) = &ended {
        // A receiver that takes no last word does without.
        let _ = connection.control(SenderFrame::Refuse(refusal.clone())).await;
    }
    ended
}

struct Connection<S, P> {
    read: ReadHalf<S>,
    write: WriteHalf<S>,
    times: Times,
    on_page: P,
}

impl<S: AsyncRead + AsyncWrite + Unpin, P: Fn(usize)> Connection<S, P> {
    async fn run(&mut self, leases: &Leases, format: KvFormat) -> Result<(), ServeError> {
        let hello = self.hello().await?;
        if hello.format.model != format.model {
            let message = format!("the pages are those of model {}", format.model);
            return Err(Refusal::new(RefusalCode::Mismatch, message).into());
        }
        compatible(&format.layout, &hello.format.layout)
            .map_err(|error| Refusal::new(RefusalCode::Mismatch, error.to_string()))?;
        let patience = self.times.handshake;
        let opening = leases.open(&hello.request_id, hello.epoch, patience);
        let reader = tokio::select! {
            biased;
            reader = opening => reader?,
            // A receiver that leaves while it waits; it says nothing before it is answered.
            frame = wire::read_receiver(&mut self.read) => {
                frame?;
                return Err(WireError::Malformed("a frame before the answer").into());
            }
        };
        self.control(SenderFrame::Accept(format)).await?;
        let fence = reader.fence.clone();
        let following = self.follow(reader.export.clone(), &format.layout);
        tokio::select! {
            biased;
            () = fence.cancelled() => {
                Err(Refusal::new(RefusalCode::Expired, "the lease has ended").into())
            }
            followed = following => {
                followed?;
                reader.finish();
                Ok(())
            }
        }
    }

    async fn hello(&mut self) -> Result<Hello, ServeError> {
        let frame = timeout(self.times.handshake, wire::read_receiver(&mut self.read)).await;
        match frame.map_err(|_| ServeError::Stalled)?? {
            ReceiverFrame::Hello(hello) => Ok(hello),
            ReceiverFrame::OtherVersion(found) => {
                let message = format!("expected version {}, found {found}", wire::VERSION);
                Err(Refusal::new(RefusalCode::Version, message).into())
            }
            ReceiverFrame::Done => Err(WireError::Malformed("expected a greeting").into()),
        }
    }

    /// Sends pages as they are computed, up to the end, and waits until all are taken.
    async fn follow(&mut self, mut export: Export, layout: &KvLayout) -> Result<(), ServeError> {
        // The serials of the pages that the receiver has.
        let mut has: Vec<u64> = Vec::new();
        let mut alive = Instant::now() + self.times.alive;
        let mut withheld = None;
        loop {
            let view = export.view();
            let same = has.iter().zip(&view.pages).take_while(|(has, page)| **has == page.serial());
            has.truncate(same.count());
            if let Some(next) = view.pages.get(has.len()) {
                // Only a page that cannot be read is still there after it was not given.
                if withheld == Some(next.serial()) {
                    return Err(gone());
                }
                withheld = Some(next.serial());
                self.send_pages(&export, &view, layout, &mut has).await?;
                alive = Instant::now() + self.times.alive;
                continue;
            }
            if view.ended {
                let pages = has.len() as u32;
                self.control(SenderFrame::End { pages }).await?;
                return self.done().await;
            }
            tokio::select! {
                changed = export.changed() => if !changed { return Err(gone()) },
                frame = wire::read_receiver(&mut self.read) => {
                    frame?;
                    return Err(WireError::Malformed("a frame before the end").into());
                }
                () = sleep_until(alive) => {
                    self.control(SenderFrame::Alive).await?;
                    alive = Instant::now() + self.times.alive;
                }
            }
        }
    }

    /// Sends the pages of `view` that the receiver has not. Stops early at one that was taken back,
    /// or when a page it has may have been: the next view says what is left.
    async fn send_pages(
        &mut self,
        export: &Export,
        view: &ExportView,
        layout: &KvLayout,
        has: &mut Vec<u64>,
    ) -> Result<(), ServeError> {
        let mut reading: VecDeque<Reading> = VecDeque::new();
        let mut spare: Vec<Vec<u8>> = Vec::new();
        let (mut next, ahead) = (has.len(), pages_under_way(layout));
        loop {
            if reading.is_empty() {
                let Some(page) = view.pages.get(next) else { return Ok(()) };
                let buffer = spare.pop().unwrap_or_default();
                reading.push_back(export.read(page.clone(), buffer).await);
                next += 1;
            }
            // An engine that computes copies between two steps what was asked until then.
            while reading.len() < ahead
                && !export.engine_sleeps()
                && let Some(page) = view.pages.get(next)
                && let Some(read) = export.read_later(page.clone(), spare.pop().unwrap_or_default())
            {
                reading.push_back(read);
                next += 1;
            }
            let Some(first) = reading.pop_front() else { return Ok(()) };
            let Some(data) = first.done().await else { return Ok(()) };
            let page = &view.pages[has.len()];
            let position = has.len() * layout.page_size;
            let written = wire::write_page(&mut self.write, position, page.tokens(), &data);
            in_time(written, self.times).await?;
            (self.on_page)(data.len());
            has.push(page.serial());
            spare.push(data);
        }
    }

    async fn done(&mut self) -> Result<(), ServeError> {
        let frame = timeout(self.times.stall, wire::read_receiver(&mut self.read)).await;
        match frame.map_err(|_| ServeError::Stalled)?? {
            ReceiverFrame::Done => Ok(()),
            _ => Err(WireError::Malformed("expected the receiver's last frame").into()),
        }
    }

    async fn control(&mut self, frame: SenderFrame) -> Result<(), ServeError> {
        in_time(write_control(&mut self.write, &frame), self.times).await
    }
}

/// The engine gives nothing more; what it gave was sent.
fn gone() -> ServeError {
    Refusal::new(RefusalCode::Expired, "the pages are gone").into()
}

async fn in_time(
    write: impl Future<Output = std::io::Result<()>>,
    times: Times,
) -> Result<(), ServeError> {
    match timeout(times.stall, write).await {
        Ok(written) => Ok(written.map_err(WireError::from)?),
        Err(_) => Err(ServeError::Stalled),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use headstart_engine::Request;

    /// A request with a prompt of four tokens.
    pub(crate) fn request() -> Request {
        Request {
            prompt: vec![10, 11, 12, 13],
            max_tokens: 8,
            sampling: Default::default(),
            stop_tokens: Vec::new().into(),
            top_logprobs: 0,
            draft: None,
            known: Default::default(),
        }
    }
}
