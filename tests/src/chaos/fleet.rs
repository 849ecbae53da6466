//! The cluster's processes: each can be killed, paused, asked to stop and started again.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use headstart_proto::v1::{DrainRequest, InfoRequest, InfoResponse, node_client::NodeClient};
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};
use tonic::transport::Endpoint;

use super::client::{Doors, get};
use super::network::{Network, Place};
use super::requests::MODEL;

/// How long a process may take to be ready.
const READY_WITHIN: Duration = Duration::from_secs(120);
/// How long a process that drains may take to end: its own deadline, and some.
const DRAINED_WITHIN: Duration = Duration::from_secs(60);
/// How long a node or router may take over a question about itself.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(50);

/// What a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Membership.
    Etcd,
    /// The front door.
    Router,
    /// Writes the beginnings.
    Drafter,
    /// Writes the rest.
    Base,
}

/// One process of the cluster.
#[derive(Debug)]
pub struct Part {
    /// Its name, which is also its node id.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Where it lives.
    pub place: Place,
    /// Where it answers: a node's gRPC, a router's HTTP, etcd's clients.
    pub address: SocketAddr,
    /// A router's gRPC.
    grpc: Option<SocketAddr>,
    program: PathBuf,
    arguments: Vec<String>,
    log: PathBuf,
    child: Mutex<Option<Child>>,
    ends: std::sync::Mutex<Ends>,
}

/// When a process was last away: what breaks then is nobody's fault.
#[derive(Clone, Copy, Debug, Default)]
struct Ends {
    killed: Option<Instant>,
    /// It was asked to stop and has not ended.
    stopping: bool,
    /// It was asked to stop, has ended, or is not ready again.
    down: bool,
    up_since: Option<Instant>,
}

/// What the fleet is made of.
#[derive(Clone, Debug)]
pub struct Shape {
    /// The model of both tiers.
    pub model: PathBuf,
    /// Routers.
    pub routers: usize,
    /// Drafters.
    pub drafters: usize,
    /// Bases; with `split`, the last two are a pair of `score` and `decode`.
    pub bases: usize,
    /// Whether two bases split their roles.
    pub split: bool,
    /// How drafts travel.
    pub encoding: String,
    /// Where the binaries are.
    pub binaries: PathBuf,
    /// Where logs and etcd's data go.
    pub folder: PathBuf,
}

/// The cluster.
#[derive(Debug)]
pub struct Fleet {
    /// What it runs on.
    pub network: Network,
    /// etcd first, then routers, drafters, bases.
    pub parts: Vec<Part>,
}

/// The lease of a node's record, short so that it runs out while a node is paused.
pub const LEASE: Duration = Duration::from_secs(3);

impl Fleet {
    /// Starts everything and waits until it serves.
    ///
    /// # Errors
    /// What could not be started.
    pub async fn start(shape: &Shape) -> io::Result<Self> {
        let mut network = Network::new()?;
        let mut parts = vec![etcd(&mut network, shape)?];
        let endpoint = parts[0].address.to_string();
        for index in 1..=shape.routers {
            parts.push(router(&mut network, shape, &format!("r{index}"), &endpoint)?);
        }
        for index in 1..=shape.drafters {
            let name = format!("d{index}");
            parts.push(node(&mut network, shape, Kind::Drafter, &name, &endpoint, "")?);
        }
        for index in 1..=shape.bases {
            let role = match shape.bases - index {
                1 if shape.split => "--role score",
                0 if shape.split => "--role decode",
                _ => "",
            };
            let name = format!("b{index}");
            parts.push(node(&mut network, shape, Kind::Base, &name, &endpoint, role)?);
        }
        let fleet = Self { network, parts };
        fleet.etcd().wipe()?;
        // etcd and the nodes first: a router is ready once it sees both tiers.
        for part in fleet.parts.iter().filter(|part| part.kind != Kind::Router) {
            part.start().await?;
            if part.kind == Kind::Etcd {
                part.ready().await?;
            }
        }
        for part in fleet.of(Kind::Router) {
            part.start().await?;
        }
        fleet.ready().await?;
        Ok(fleet)
    }

    /// Waits until every part answers.
    ///
    /// # Errors
    /// The first that does not.
    pub async fn ready(&self) -> io::Result<()> {
        for part in &self.parts {
            part.ready().await?;
        }
        Ok(())
    }

    /// The parts of one kind.
    pub fn of(&self, kind: Kind) -> impl Iterator<Item = &Part> {
        self.parts.iter().filter(move |part| part.kind == kind)
    }

    /// etcd.
    #[must_use]
    pub fn etcd(&self) -> &Part {
        &self.parts[0]
    }

    /// Every router's doors.
    #[must_use]
    pub fn doors(&self) -> Vec<Doors> {
        let doors = |part: &Part| {
            Some(Doors { router: part.name.clone(), http: part.address, grpc: part.grpc? })
        };
        self.of(Kind::Router).filter_map(doors).collect()
    }

    /// Whether this part was killed after `since`.
    #[must_use]
    pub fn was_killed(&self, name: &str, since: Instant) -> bool {
        self.ends(name).killed.is_some_and(|killed| killed >= since)
    }

    /// Whether this part was stopping, gone or starting at some time after `since`.
    #[must_use]
    pub fn was_down(&self, name: &str, since: Instant) -> bool {
        let ends = self.ends(name);
        ends.down || ends.up_since.is_some_and(|up| up >= since)
    }

    fn ends(&self, name: &str) -> Ends {
        let part = self.parts.iter().find(|part| part.name == name);
        part.map_or(Ends::default(), Part::ends)
    }

    /// What still holds slots, pages or requests, though nobody asks for anything: one line each,
    /// empty when nothing is left. Waits for it until `deadline`.
    pub async fn leaks(&self, within: Duration) -> Vec<String> {
        let deadline = Instant::now() + within;
        loop {
            let mut leaks = Vec::new();
            for part in &self.parts {
                let held = part.gauges().await.into_iter().filter(|&(_, value)| value != 0.0);
                leaks.extend(held.map(|(what, value)| format!("{}: {what}: {value}", part.name)));
            }
            if leaks.is_empty() || Instant::now() > deadline {
                return leaks;
            }
            sleep(POLL * 4).await;
        }
    }

    /// Asks everything to stop, etcd last, and gives those that did not end well.
    pub async fn stop(self) -> Vec<String> {
        let mut unclean = Vec::new();
        for part in self.parts[1..].iter() {
            if let Err(error) = part.drain(false).await {
                unclean.push(format!("{}: {error}", part.name));
            }
        }
        self.etcd().kill().await;
        unclean
    }
}

fn etcd(network: &mut Network, shape: &Shape) -> io::Result<Part> {
    let place = network.place("etcd")?;
    let (client, peer) = (place.port(2379)?, place.port(2380)?);
    let url = |port: u16| format!("http://{}:{port}", place.ip);
    let data = shape.folder.join("etcd-data");
    let cluster = format!("etcd={}", url(peer));
    let arguments = [
        ["--name", "etcd"],
        ["--log-level", "error"],
        ["--data-dir", &data.to_string_lossy()],
        ["--listen-client-urls", &url(client)],
        ["--advertise-client-urls", &url(client)],
        ["--listen-peer-urls", &url(peer)],
        ["--initial-advertise-peer-urls", &url(peer)],
        ["--initial-cluster", &cluster],
    ];
    let mut arguments: Vec<String> = arguments.as_flattened().iter().map(|&it| it.into()).collect();
    arguments.push("--unsafe-no-fsync".into());
    let address = SocketAddr::from((place.ip, client));
    Ok(Part::new("etcd", Kind::Etcd, place, address, "etcd".into(), arguments, &shape.folder))
}

fn router(network: &mut Network, shape: &Shape, name: &str, etcd: &str) -> io::Result<Part> {
    let place = network.place(name)?;
    let http = SocketAddr::from((place.ip, place.port(8080)?));
    let grpc = SocketAddr::from((place.ip, place.port(50051)?));
    let encoding = &shape.encoding;
    let arguments = format!(
        "--http {http} --grpc {grpc} --etcd {etcd} --encoding {encoding} --etcd-timeout 2s \
         --connect-timeout 1s --first-frame-timeout 10s --frame-timeout 5s --request-timeout 3m \
         --ping-interval 2s --ping-timeout 4s"
    );
    let arguments = arguments.split_whitespace().map(str::to_owned).collect();
    let program = shape.binaries.join("headstart-router");
    let part = Part::new(name, Kind::Router, place, http, program, arguments, &shape.folder);
    Ok(Part { grpc: Some(grpc), ..part })
}

fn node(
    network: &mut Network,
    shape: &Shape,
    kind: Kind,
    name: &str,
    etcd: &str,
    role: &str,
) -> io::Result<Part> {
    let place = network.place(name)?;
    let address = SocketAddr::from((place.ip, place.port(7000)?));
    let lease = LEASE.as_secs();
    let arguments = format!(
        "--name {MODEL} --node-id {name} --threads 1 --slots 16 --kv-tokens 8192 --listen {address} \
         --etcd {etcd} --etcd-timeout 2s --lease-ttl {lease}s --handoff-timeout 5s \
         --drain-timeout 30s --ping-interval 2s --ping-timeout 4s {role}"
    );
    let model = ["--model".to_owned(), shape.model.to_string_lossy().into_owned()];
    let arguments = arguments.split_whitespace().map(str::to_owned).chain(model).collect();
    let program = match kind {
        Kind::Drafter => "headstart-drafter",
        _ => "headstart-base",
    };
    let program = shape.binaries.join(program);
    Ok(Part::new(name, kind, place, address, program, arguments, &shape.folder))
}

impl Part {
    fn new(
        name: &str,
        kind: Kind,
        place: Place,
        address: SocketAddr,
        program: PathBuf,
        arguments: Vec<String>,
        folder: &Path,
    ) -> Self {
        let log = folder.join(format!("{name}.log"));
        let (name, child, ends) = (name.to_owned(), Mutex::default(), std::sync::Mutex::default());
        Self { name, kind, place, address, grpc: None, program, arguments, log, child, ends }
    }

    fn ends(&self) -> Ends {
        *self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, change: impl FnOnce(&mut Ends)) {
        change(&mut self.ends.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Starts the process; it is not ready yet.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn start(&self) -> io::Result<()> {
        *self.child.lock().await = Some(self.spawn()?);
        Ok(())
    }

    fn spawn(&self) -> io::Result<Child> {
        let log: File = OpenOptions::new().create(true).append(true).open(&self.log)?;
        let mut command = Command::from(self.place.command(&self.program));
        command
            .args(&self.arguments)
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true);
        command
            .spawn()
            .map_err(|error| io::Error::other(format!("start {}: {error}", self.program.display())))
    }

    /// Starts it again if it has ended though nobody ended it. Gives how it ended, and its last
    /// words.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn revive(&self) -> io::Result<Option<String>> {
        if self.ends().stopping {
            return Ok(None);
        }
        let mut child = self.child.lock().await;
        let Some(status) = child.as_mut().map_or(Ok(None), Child::try_wait)? else {
            return Ok(None);
        };
        let log = std::fs::read_to_string(&self.log)?;
        let words = log.lines().next_back().unwrap_or_default();
        *child = Some(self.spawn()?);
        Ok(Some(format!("{status}: {words}")))
    }

    /// Waits until it answers; a node that took up its work, a router that sees both tiers.
    ///
    /// # Errors
    /// When it ended, or takes too long.
    pub async fn ready(&self) -> io::Result<()> {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            if self.is_ready().await {
                self.note(|ends| {
                    if std::mem::take(&mut ends.down) {
                        ends.up_since = Some(Instant::now());
                    }
                });
                return Ok(());
            }
            let ended = self.child.lock().await.as_mut().map_or(Ok(None), Child::try_wait)?;
            if let Some(status) = ended {
                return Err(io::Error::other(format!("{} ended: {status}", self.name)));
            }
            if Instant::now() > deadline {
                return Err(io::Error::other(format!("{} is not ready in time", self.name)));
            }
            sleep(POLL).await;
        }
    }

    async fn is_ready(&self) -> bool {
        match self.kind {
            Kind::Etcd => matches!(get(self.address, "/health").await, Ok((200, _))),
            Kind::Router => matches!(get(self.address, "/ready").await, Ok((200, _))),
            Kind::Drafter | Kind::Base => self.info().await.is_ok(),
        }
    }

    /// What a node says about itself.
    ///
    /// # Errors
    /// When it does not say anything.
    pub async fn info(&self) -> Result<InfoResponse, String> {
        let ask = async {
            let mut client = self.node().await?;
            client.info(InfoRequest {}).await.map_err(|status| status.to_string())
        };
        let answer = timeout(ANSWER_WITHIN, ask).await.map_err(|_| "no answer".to_owned())??;
        Ok(answer.into_inner())
    }

    async fn node(&self) -> Result<NodeClient<tonic::transport::Channel>, String> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address));
        let endpoint = endpoint.map_err(|error| error.to_string())?.connect_timeout(ANSWER_WITHIN);
        let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
        Ok(NodeClient::new(channel))
    }

    /// What it holds for requests: a name and a number each. One that does not say holds unknown
    /// things.
    pub async fn gauges(&self) -> Vec<(&'static str, f64)> {
        const UNKNOWN: (&str, f64) = ("does not say what it holds", 1.0);
        match self.kind {
            Kind::Etcd => Vec::new(),
            Kind::Router => match get(self.address, "/metrics").await {
                Ok((200, text)) => {
                    let gauge = |line: &str| {
                        line.strip_prefix("headstart_router_in_flight ")?.trim().parse::<f64>().ok()
                    };
                    let in_flight = text.lines().find_map(gauge).unwrap_or_default();
                    vec![("answers in flight", in_flight)]
                }
                _ => vec![UNKNOWN],
            },
            Kind::Drafter | Kind::Base => match self.info().await {
                Ok(info) => {
                    let kv = info.kv_tokens_used as f64;
                    vec![("slots used", f64::from(info.slots_used)), ("KV tokens used", kv)]
                }
                Err(_) => vec![UNKNOWN],
            },
        }
    }

    /// Resident memory, in bytes; `None` when it does not run.
    pub async fn resident_bytes(&self) -> Option<u64> {
        let pid = self.child.lock().await.as_ref()?.id()?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
    }

    /// SIGKILL, and waits for its end.
    pub async fn kill(&self) {
        let mut child = self.child.lock().await;
        self.note(|ends| {
            ends.killed = Some(Instant::now());
            ends.down = true;
        });
        if let Some(mut child) = child.take() {
            let _ = child.kill().await;
        }
        self.note(|ends| ends.killed = Some(Instant::now()));
    }

    /// Sends a signal by its name.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn signal(&self, signal: &str) -> io::Result<()> {
        let pid = self.child.lock().await.as_ref().and_then(Child::id);
        let pid = pid.ok_or_else(|| io::Error::other(format!("{} does not run", self.name)))?;
        let sent = Command::new("kill").arg(format!("-{signal}")).arg(pid.to_string()).status();
        match sent.await?.success() {
            true => Ok(()),
            false => Err(io::Error::other(format!("SIG{signal} to {}", self.name))),
        }
    }

    /// Asks it to stop, by SIGTERM or by the `Drain` call, and waits for exit code 0.
    ///
    /// # Errors
    /// When it does not end in time, or ends with another code.
    pub async fn drain(&self, by_call: bool) -> io::Result<()> {
        self.note(|ends| {
            ends.stopping = true;
            ends.down = true;
        });
        let drained = self.end(by_call).await;
        self.note(|ends| ends.stopping = false);
        drained
    }

    async fn end(&self, by_call: bool) -> io::Result<()> {
        let mut child = self.child.lock().await;
        if child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(Some(_)))) {
            // It ended by itself a moment ago (no etcd when it started), and leaves nothing to drain.
            *child = None;
            return Ok(());
        }
        drop(child);
        if by_call {
            let mut node = self.node().await.map_err(io::Error::other)?;
            node.drain(DrainRequest {}).await.map_err(io::Error::other)?;
        } else {
            self.signal("TERM").await?;
        }
        let mut child = self.child.lock().await;
        let Some(mut running) = child.take() else { return Ok(()) };
        match timeout(DRAINED_WITHIN, running.wait()).await.map(|status| status.map(|it| it.code()))
        {
            Ok(Ok(Some(0))) => Ok(()),
            Ok(code) => Err(io::Error::other(format!("exit code {:?}", code?))),
            Err(_) => {
                let _ = running.kill().await;
                Err(io::Error::other("it did not end within its drain deadline"))
            }
        }
    }

    /// Forgets etcd's data; it must not run.
    ///
    /// # Errors
    /// When the data cannot be removed.
    pub fn wipe(&self) -> io::Result<()> {
        let data = self.log.with_file_name("etcd-data");
        if data.exists() { std::fs::remove_dir_all(data) } else { Ok(()) }
    }
}
