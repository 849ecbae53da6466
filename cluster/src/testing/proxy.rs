//! A TCP proxy whose line can be made slow, silent or broken.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What the line does with bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// It carries them.
    Open,
    /// It carries them after a while.
    Slow(Duration),
    /// It keeps them, and connections stand: the other side is paused or cut off.
    Silent,
    /// Connections break, and new ones are closed at once.
    Broken,
}

/// A proxy on loopback in front of one address. Dropping it breaks its connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    line: watch::Sender<Line>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// A proxy in front of `target` (`host:port`), which need not be there yet.
    ///
    /// # Errors
    /// When no port is free.
    pub async fn start(target: String) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (line, watched) = watch::channel(Line::Open);
        let task = tokio::spawn(accept(listener, target, watched));
        Ok(Self { address, line, task })
    }

    /// Where it listens.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Changes the line, for connections that stand and for new ones.
    pub fn set(&self, line: Line) {
        self.line.send_replace(line);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.line.send_replace(Line::Broken);
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, target: String, line: watch::Receiver<Line>) {
    while let Ok((client, _)) = listener.accept().await {
        let (target, line) = (target.clone(), line.clone());
        tokio::spawn(async move {
            let mut broken = line.clone();
            tokio::select! {
                _ = carry_both(client, target, line) => {}
                _ = broken.wait_for(|line| *line == Line::Broken) => {}
            }
        });
    }
}

async fn carry_both(
    client: TcpStream,
    target: String,
    mut line: watch::Receiver<Line>,
) -> io::Result<()> {
    line.wait_for(|line| *line != Line::Silent).await.map_err(io::Error::other)?;
    let server = TcpStream::connect(target).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (client_in, client_out) = client.into_split();
    let (server_in, server_out) = server.into_split();
    tokio::try_join!(
        carry(client_in, server_out, line.clone()),
        carry(server_in, client_out, line)
    )?;
    Ok(())
}

async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut line: watch::Receiver<Line>,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let count = from.read(&mut buffer).await?;
        let now = *line.borrow();
        if let Line::Slow(delay) = now {
            tokio::time::sleep(delay).await;
        }
        line.wait_for(|line| *line != Line::Silent).await.map_err(io::Error::other)?;
        if count == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..count]).await?;
    }
}
