//! Other routers, from their Python packages: installed once into a virtual environment in the
//! user's cache, and run over the stub worker.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::ValueEnum;

use crate::bench::child::{Job, Running};
use crate::bench::client::Client;
use crate::bench::steps::Steps;
use crate::failure::Failure;
use crate::models::Cancel;
use crate::models::cache::{self, PullLock};

/// The folder in the cache.
const FOLDER: &str = "router-peers";
/// A router may take so long until it answers through the worker.
const READY_WITHIN: Duration = Duration::from_secs(60);
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// Another router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum Peer {
    /// The vLLM project's router
    VllmRouter,
    /// The SGLang project's router
    SglangRouter,
}

impl Peer {
    /// The Python package, with the version that is measured.
    pub(super) const fn package(self) -> &'static str {
        match self {
            Self::VllmRouter => "vllm-router==0.1.17",
            Self::SglangRouter => "sglang-router==0.3.2",
        }
    }

    /// Its short name.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::VllmRouter => "vllm-router",
            Self::SglangRouter => "sglang-router",
        }
    }

    /// The command that routes from `port` to the one worker.
    fn command(self, bin: &Path, port: u16, metrics_port: u16, worker: &str) -> Command {
        let mut command = Command::new(bin.join(self.name()));
        let worker = format!("http://{worker}");
        let (port, metrics_port) = (port.to_string(), metrics_port.to_string());
        match self {
            Self::VllmRouter => command.args(["--log-level", "warning"]),
            Self::SglangRouter => command.args(["launch", "--log-level", "warn"]),
        };
        command.args(["--host", "127.0.0.1", "--port", &port, "--policy", "round_robin"]);
        command.args(["--prometheus-port", &metrics_port, "--prometheus-host", "127.0.0.1"]);
        command.args(["--worker-urls", &worker]);
        command
    }
}

/// Where the peers are installed.
#[derive(Debug)]
pub(super) struct Peers {
    bin: PathBuf,
    words: PathBuf,
}

/// A peer that runs, until it is dropped.
#[derive(Debug)]
pub(super) struct RunningPeer {
    /// `host:port`
    pub(super) address: String,
    _process: Running,
}

impl Peers {
    /// Installs the packages where they are not yet.
    ///
    /// # Errors
    /// When Python or pip is missing, or a package cannot be had.
    pub(super) fn install(peers: &[Peer], cancel: &Cancel) -> Result<Self, Failure> {
        let models = cache::folder()?;
        let parent = models.parent().unwrap_or(&models);
        let folder = parent.join(FOLDER);
        let installed = Self { bin: folder.join("bin"), words: folder.join("output") };
        let _lock = PullLock::acquire(parent, FOLDER, cancel)?;
        std::fs::create_dir_all(&installed.words).map_err(|error| {
            Failure::Failed(format!("cannot create {}: {error}", installed.words.display()))
        })?;
        let all: Vec<&str> = peers.iter().map(|peer| peer.package()).collect();
        let missing = all.iter().any(|package| !installed.has(package));
        if missing {
            let _steps = Steps::start(&format!("installing {}", all.join(" and ")), 0);
            let log = installed.words.join("install.log");
            let mut make = Command::new("python3");
            make.args(["-m", "venv"]).arg(&folder);
            let job = |command| {
                let (out, err) = (log.clone(), log.clone());
                Job { doing: "installing the other routers", command, out, err }
            };
            job(make).run(cancel, &mut |_| ())?;
            let mut pip = Command::new(installed.bin.join("python"));
            pip.args(["-m", "pip", "install", "--quiet", "--only-binary", ":all:"]).args(&all);
            pip.env("PIP_DISABLE_PIP_VERSION_CHECK", "1").env("PIP_NO_INPUT", "1");
            job(pip).run(cancel, &mut |_| ())?;
            for package in &all {
                let marked = File::create(installed.mark(package)).map(drop);
                marked
                    .map_err(|error| Failure::Failed(format!("cannot mark {package}: {error}")))?;
            }
        }
        Ok(installed)
    }

    fn mark(&self, package: &str) -> PathBuf {
        self.words.join(format!("{package}.installed"))
    }

    fn has(&self, package: &str) -> bool {
        self.mark(package).is_file()
    }

    /// Starts `peer` over the worker at `worker` and waits until it answers `body`.
    ///
    /// # Errors
    /// When it cannot be run, or does not answer in time.
    pub(super) async fn start(
        &self,
        peer: Peer,
        worker: &str,
        body: &Bytes,
    ) -> Result<RunningPeer, Failure> {
        let (port, metrics_port) = (free_port()?, free_port()?);
        let log = self.words.join(format!("{}.log", peer.name()));
        let failed = |reason: String| {
            let log = log.display();
            Failure::Failed(format!("{} failed: {reason} (all it said: {log})", peer.name()))
        };
        let out = File::create(&log).map_err(|error| failed(error.to_string()))?;
        let err = out.try_clone().map_err(|error| failed(error.to_string()))?;
        let mut command = peer.command(&self.bin, port, metrics_port, worker);
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        let child = command.spawn().map_err(|error| failed(error.to_string()))?;
        let mut process = Running::new(child);
        let address = format!("127.0.0.1:{port}");
        let (mut client, begun) = (Client::new(&*address), Instant::now());
        loop {
            match client.post("/v1/chat/completions", body.clone(), READY_WITHIN).await {
                Ok(_) => return Ok(RunningPeer { address, _process: process }),
                Err(error) if begun.elapsed() > READY_WITHIN => {
                    return Err(failed(format!("it does not answer: {error}")));
                }
                Err(_) if process.has_ended() => return Err(failed("it ended".to_owned())),
                Err(_) => tokio::time::sleep(ASK_AGAIN).await,
            }
        }
    }
}

/// A loopback port that nobody listens on now.
fn free_port() -> Result<u16, Failure> {
    let bound = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    bound
        .map(|address| address.port())
        .map_err(|error| Failure::Failed(format!("loopback has no free port: {error}")))
}
