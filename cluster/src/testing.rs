//! A real etcd on loopback, and lines that fail, for tests.

mod proxy;

use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

pub use proxy::{Line, Proxy};

/// How long etcd may take to elect itself.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How often a start is tried: a free port may be taken before etcd binds it.
const START_ATTEMPTS: usize = 3;

/// An `etcd` process with a data folder of its own; it is killed when this is dropped.
#[derive(Debug)]
pub struct EtcdServer {
    client_port: u16,
    peer_port: u16,
    data: TempDir,
    process: Option<Child>,
}

impl EtcdServer {
    /// Starts etcd on free ports and waits until it answers.
    ///
    /// # Errors
    /// When there is no `etcd` program (Debian package `etcd-server`) or it does not come up.
    pub async fn start() -> io::Result<Self> {
        let mut last = io::Error::other("etcd was never started");
        for _ in 0..START_ATTEMPTS {
            let mut server = Self {
                client_port: free_port()?,
                peer_port: free_port()?,
                data: tempfile::tempdir()?,
                process: None,
            };
            match server.resume().await {
                Ok(()) => return Ok(server),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(error),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// The client endpoint, `127.0.0.1:port`.
    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.client_port)
    }

    /// Kills the process; the data stays.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Pauses the process (SIGSTOP), or lets it go on (SIGCONT).
    ///
    /// # Errors
    /// When there is no process, or no `kill` program.
    pub fn set_paused(&self, paused: bool) -> io::Result<()> {
        let process = self.process.as_ref().ok_or_else(|| io::Error::other("etcd does not run"))?;
        let signal = if paused { "-STOP" } else { "-CONT" };
        let status = Command::new("kill").args([signal, &process.id().to_string()]).status()?;
        if status.success() { Ok(()) } else { Err(io::Error::other("kill failed")) }
    }

    /// Kills the process and forgets its data.
    ///
    /// # Errors
    /// When no new data folder can be made.
    pub fn wipe(&mut self) -> io::Result<()> {
        self.kill();
        self.data = tempfile::tempdir()?;
        Ok(())
    }

    /// Starts the process again, on the same ports.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn resume(&mut self) -> io::Result<()> {
        self.kill();
        self.process = Some(self.spawn()?);
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if let Some(process) = &mut self.process
                && let Some(status) = process.try_wait()?
            {
                return Err(io::Error::other(format!("etcd ended with {status}")));
            }
            if self.answers().await {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(io::Error::other("etcd did not answer in time"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn answers(&self) -> bool {
        if TcpStream::connect((Ipv4Addr::LOCALHOST, self.client_port)).is_err() {
            return false;
        }
        let probe = async {
            let mut client = etcd_client::Client::connect([self.endpoint()], None).await?;
            client.get("headstart-probe", None).await
        };
        matches!(tokio::time::timeout(Duration::from_secs(2), probe).await, Ok(Ok(_)))
    }

    fn spawn(&self) -> io::Result<Child> {
        let client = format!("http://127.0.0.1:{}", self.client_port);
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        Command::new("etcd")
            .args(["--name", "test", "--log-level", "error", "--unsafe-no-fsync"])
            .arg("--data-dir")
            .arg(self.data.path().join("data"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("test={peer}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => io::Error::new(
                    error.kind(),
                    "etcd not found: install etcd-server (apt-get install etcd-server) or run make setup",
                ),
                _ => error,
            })
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A port that is free now.
fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}
