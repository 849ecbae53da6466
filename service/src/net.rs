//! Connections between processes, behind two narrow seams: who dials, and who listens. Both are TCP
//! unless somebody hands in another network.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::{BoxStream, Stream};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::server::TcpIncoming;

/// A connection: bytes both ways.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Io for T {}

/// Opens connections.
pub trait Dial: fmt::Debug + Send + Sync + 'static {
    /// Opens a connection to `address` (`host:port`). The caller sets the deadline.
    fn dial(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn Io>>>;
}

/// How a process reaches others: over TCP, or over a network that was handed in.
#[derive(Clone, Debug, Default)]
pub struct Dialer(Option<Arc<dyn Dial>>);

impl Dialer {
    /// A dialler over `network`.
    pub fn over(network: Arc<dyn Dial>) -> Self {
        Self(Some(network))
    }

    /// The network that was handed in; `None` is TCP.
    pub(crate) fn network(&self) -> Option<&Arc<dyn Dial>> {
        self.0.as_ref()
    }

    /// Opens a connection to `address` (`host:port`), over TCP with `TCP_NODELAY`. The caller sets
    /// the deadline.
    ///
    /// # Errors
    /// Nobody listens there, or the address is malformed.
    pub async fn dial(&self, address: &str) -> io::Result<Box<dyn Io>> {
        match &self.0 {
            Some(network) => network.dial(address).await,
            None => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                Ok(Box::new(stream))
            }
        }
    }
}

impl PartialEq for Dialer {
    /// The same network.
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Some(one), Some(two)) => Arc::ptr_eq(one, two),
            (one, two) => one.is_none() && two.is_none(),
        }
    }
}

/// Where a server takes connections from: a TCP listener, or another network's.
pub struct Listener {
    address: SocketAddr,
    source: Source,
}

enum Source {
    Tcp(TcpListener),
    Other(BoxStream<'static, io::Result<Box<dyn Io>>>),
}

impl Listener {
    /// A listener that takes what comes from `incoming`; `address` is what it calls itself.
    pub fn of<S>(incoming: S, address: SocketAddr) -> Self
    where
        S: Stream<Item = io::Result<Box<dyn Io>>> + Send + 'static,
    {
        Self { address, source: Source::Other(incoming.boxed()) }
    }

    /// Its own address.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The TCP listener that this is.
    ///
    /// # Errors
    /// The listener itself, when it is another network's.
    pub fn into_tcp(self) -> Result<TcpListener, Self> {
        match self.source {
            Source::Tcp(listener) => Ok(listener),
            source @ Source::Other(_) => Err(Self { source, ..self }),
        }
    }

    /// Connections as they come; TCP's get `TCP_NODELAY`. An error concerns the connection that it
    /// stands for.
    pub fn into_incoming(self) -> BoxStream<'static, io::Result<Box<dyn Io>>> {
        match self.source {
            Source::Tcp(listener) => TcpIncoming::from(listener)
                .with_nodelay(Some(true))
                .map(|stream| stream.map(|stream| Box::new(stream) as Box<dyn Io>))
                .boxed(),
            Source::Other(incoming) => incoming,
        }
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        // A listener that is bound has an address.
        let address = listener.local_addr().unwrap_or_else(|_| SocketAddr::from(([0; 4], 0)));
        Self { address, source: Source::Tcp(listener) }
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").field("address", &self.address).finish_non_exhaustive()
    }
}
