//! A client's HTTP connection.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Sleep;

/// A connection's place among all, and on its lane.
pub(crate) struct Seat {
    _place: Option<OwnedSemaphorePermit>,
    lane: Option<Arc<AtomicUsize>>,
}

impl Seat {
    /// One that holds `place`, and is counted among those of a lane, where there are lanes.
    pub(crate) fn new(
        place: Option<OwnedSemaphorePermit>,
        lane: Option<&Arc<AtomicUsize>>,
    ) -> Self {
        if let Some(lane) = lane {
            lane.fetch_add(1, Ordering::Relaxed);
        }
        Self { _place: place, lane: lane.cloned() }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(lane) = &self.lane {
            lane.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// A client's connection. It holds its place until it is closed, and breaks when the client takes
/// nothing for too long.
pub(crate) struct Connection<S> {
    stream: S,
    write_timeout: Duration,
    /// When a write that waits is given up.
    stalled: Option<Pin<Box<Sleep>>>,
    _seat: Seat,
}

impl<S> Connection<S> {
    pub(crate) fn new(stream: S, write_timeout: Duration, seat: Seat) -> Self {
        Self { stream, write_timeout, stalled: None, _seat: seat }
    }

    /// Watches the time of a write that has to wait.
    fn watch<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let timeout = self.write_timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        stalled.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.watch(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, buffers);
        self.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn a_client_that_takes_nothing_loses_its_connection() {
        let (stream, _silent) = tokio::io::duplex(64);
        let seat = Seat::new(None, None);
        let mut connection = Connection::new(stream, Duration::from_millis(50), seat);
        // More than the pipe takes.
        let error = connection.write_all(&[0; 65]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
