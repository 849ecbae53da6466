//! How two nodes reach each other: TCP, or memory in tests. Another one (RDMA, a proxy) is another
//! [`KvTransport`]; everything above it asks for no more than a stream of bytes.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// A stream of bytes in both directions.
pub trait KvStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> KvStream for T {}

/// Opens streams to other nodes' KV services.
pub trait KvTransport: Send + Sync {
    /// Connects to the service at `address`.
    ///
    /// # Errors
    /// When nobody answers there.
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn KvStream>>>;
}

/// TCP.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tcp;

impl KvTransport for Tcp {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn KvStream>>> {
        Box::pin(async move {
            let stream = TcpStream::connect(address).await?;
            // Pages are large and frames are whole: there is nothing to gather.
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn KvStream>)
        })
    }
}

/// Bytes under way in memory, at most.
const DUPLEX_BYTES: usize = 64 << 10;
/// Connections that wait to be accepted, at most.
const BACKLOG: usize = 64;

/// A network within the process. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct InMemory {
    listeners: Arc<Mutex<HashMap<String, mpsc::Sender<DuplexStream>>>>,
}

impl InMemory {
    /// Listens at `address`; the accepted ends arrive in the channel.
    #[must_use]
    pub fn listen(&self, address: &str) -> mpsc::Receiver<DuplexStream> {
        let (sender, accepted) = mpsc::channel(BACKLOG);
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.insert(address.to_owned(), sender);
        accepted
    }
}

impl KvTransport for InMemory {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn KvStream>>> {
        let listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        let listener = listeners.get(address).cloned();
        Box::pin(async move {
            let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
            let (near, far) = tokio::io::duplex(DUPLEX_BYTES);
            listener.ok_or_else(refused)?.send(far).await.map_err(|_| refused())?;
            Ok(Box::new(near) as Box<dyn KvStream>)
        })
    }
}
