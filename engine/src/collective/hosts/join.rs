//! How the processes of a model find together.
//!
//! A follower connects to the leader and says what it is: protocol, model, place. The leader answers
//! with the terms under which the model runs, or with a sentence that says why it does not take it.
//! A follower that was taken connects once more, for its [pulse](super::watch).

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use super::Place;
use super::group::Peer;
use super::link::Link;
use super::watch::Pulse;
use crate::executor::ModelHash;

/// Grows with every change of the frames, or of what the ranks compute together.
const PROTOCOL: u16 = 2;
const MAGIC: [u8; 4] = *b"HSTP";
/// `[magic][protocol u16]`, the same in every protocol.
const GREETING_BYTES: usize = 6;
/// `[purpose u8][ranks u32][hosts u32][host u32][session u64][model 32][on GPUs u8]`
const HELLO_BYTES: usize = 54;
/// `[session u64][page_size u32][chunk_tokens u32][kv_tokens u64][silence_ms u32]`
const TERMS_BYTES: usize = 28;
/// Bytes of the sentence that refuses.
const REFUSAL_BYTES_MAX: usize = 1024;

const WORK: u8 = 0;
const PULSE: u8 = 1;
const TAKEN: u8 = 0;
const REFUSED: u8 = 1;

/// How long a connection may take to say what it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// The pause between two looks for followers, and the first between two for the leader, each of which
/// is twice as long as the one before.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// The longest pause between two looks for the leader.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(1);

/// What a process shows of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its place among the others.
    pub place: Place,
    /// The model, and how its weights are kept.
    pub model: ModelHash,
    /// Whether its ranks are on GPUs, which sum among themselves.
    pub on_gpus: bool,
}

/// What the leader decides for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Positions a KV page holds.
    pub page_size: usize,
    /// Tokens that go through the layers together.
    pub chunk_tokens: usize,
    /// Positions that the KV pool holds.
    pub kv_tokens: usize,
    /// A process that is silent for so long is lost.
    pub silence_max: Duration,
}

/// Why the processes did not find together.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The leader does not take this process.
    #[error("the leader at {leader} refused this process: {reason}")]
    Refused {
        /// Where it is.
        leader: String,
        /// Its own words.
        reason: String,
    },
    /// The followers did not come in time.
    #[error("tensor-parallel {missing} did not join within {timeout:?}")]
    Missing {
        /// Which.
        missing: String,
        /// How long they had.
        timeout: Duration,
    },
    /// The leader was not there in time.
    #[error("no leader took this process within {timeout:?}: {cause}")]
    NoLeader {
        /// How long it had.
        timeout: Duration,
        /// The last thing seen.
        cause: String,
    },
    /// The system refused.
    #[error("waiting for tensor-parallel hosts: {0}")]
    Io(#[from] io::Error),
}

/// A follower's end.
#[derive(Debug)]
pub struct Joined {
    /// The work.
    pub link: Link,
    /// Whether the leader is there.
    pub pulse: Pulse,
    /// Ends when the leader has left or is lost.
    pub watching: JoinHandle<()>,
    /// What the leader decided.
    pub terms: Terms,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hello {
    purpose: u8,
    session: u64,
    member: Member,
}

impl Hello {
    fn bytes(&self) -> Vec<u8> {
        let mut out = greeting();
        out.push(self.purpose);
        let Member { place, model, on_gpus } = self.member;
        for size in [place.ranks, place.hosts, place.host] {
            out.extend(u32::try_from(size).unwrap_or(u32::MAX).to_le_bytes());
        }
        out.extend(self.session.to_le_bytes());
        out.extend(model.0);
        out.push(u8::from(on_gpus));
        out
    }

    fn of(bytes: &[u8; HELLO_BYTES]) -> Self {
        let mut model = [0; 32];
        model.copy_from_slice(&bytes[21..53]);
        let place = Place { ranks: size(bytes, 1), hosts: size(bytes, 5), host: size(bytes, 9) };
        let member = Member { place, model: ModelHash(model), on_gpus: bytes[53] != 0 };
        Self { purpose: bytes[0], session: word(bytes, 13), member }
    }
}

fn size(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]) as usize
}

fn word(bytes: &[u8], at: usize) -> u64 {
    (size(bytes, at) as u64) | ((size(bytes, at + 4) as u64) << 32)
}

fn greeting() -> Vec<u8> {
    [&MAGIC[..], &PROTOCOL.to_le_bytes()].concat()
}

/// Reads a greeting: the protocol that the other end speaks.
fn greeted(stream: &mut TcpStream) -> io::Result<u16> {
    let mut bytes = [0; GREETING_BYTES];
    stream.read_exact(&mut bytes)?;
    if bytes[..4] != MAGIC {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no tensor-parallel rank"));
    }
    Ok(u16::from_le_bytes([bytes[4], bytes[5]]))
}

fn answer(stream: &mut TcpStream, taken: u8, body: &[u8]) -> io::Result<()> {
    let mut out = greeting();
    out.push(taken);
    out.extend(u16::try_from(body.len()).unwrap_or(u16::MAX).to_le_bytes());
    out.extend(body);
    stream.write_all(&out)
}

/// A follower whose work's connection is there.
struct Arrived {
    work: TcpStream,
    pulse: Option<TcpStream>,
    address: String,
}

/// The leader while it waits.
struct Door {
    own: Member,
    terms: Terms,
    session: u64,
    /// By host; the leader's own place stays empty.
    arrived: Vec<Option<Arrived>>,
}

/// Waits on `listener` until every other process of the model has joined.
///
/// # Errors
/// [`JoinError::Missing`] names the ranks that did not come within `timeout`.
pub fn gather(
    listener: &TcpListener,
    own: &Member,
    terms: Terms,
    timeout: Duration,
) -> Result<(Vec<Peer>, Pulse), JoinError> {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let session = since_epoch.map_or(0, |since| since.as_nanos() as u64);
    let arrived = (0..own.place.hosts).map(|_| None).collect();
    let mut door = Door { own: *own, terms, session, arrived };
    let deadline = Instant::now() + timeout;
    listener.set_nonblocking(true)?;
    while !door.is_full() {
        match listener.accept() {
            Ok((stream, address)) => {
                if let Err(error) = door.admit(stream, &address.to_string()) {
                    tracing::warn!(%address, "a tensor-parallel rank did not join: {error}");
                }
            }
            // Nobody is waiting, or somebody went away while waiting.
            Err(_) if Instant::now() < deadline => std::thread::sleep(RETRY_PAUSE),
            Err(_) => return Err(JoinError::Missing { missing: door.missing(), timeout }),
        }
    }
    door.open()
}

impl Door {
    fn is_full(&self) -> bool {
        let complete = |slot: &Option<Arrived>| slot.as_ref().is_some_and(|a| a.pulse.is_some());
        self.arrived[1..].iter().all(complete)
    }

    fn missing(&self) -> String {
        let place = self.own.place;
        let away = (1..place.hosts).filter(|host| self.arrived[*host].is_none());
        let ranks: Vec<String> =
            away.flat_map(|h| place.ranks_of(h)).map(|r| r.to_string()).collect();
        format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, ranks.join(", "))
    }

    /// Takes a connection, or refuses it; an error is for the leader's log.
    fn admit(&mut self, mut stream: TcpStream, address: &str) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(HELLO_TIMEOUT))?;
        stream.set_write_timeout(Some(HELLO_TIMEOUT))?;
        let protocol = greeted(&mut stream)?;
        let refused = if protocol == PROTOCOL {
            let mut hello = [0; HELLO_BYTES];
            stream.read_exact(&mut hello)?;
            let hello = Hello::of(&hello);
            match (self.objection(&hello), hello.purpose) {
                (Some(objection), _) => objection,
                (None, PULSE) => {
                    answer(&mut stream, TAKEN, &[])?;
                    if let Some(arrived) = &mut self.arrived[hello.member.place.host] {
                        arrived.pulse = Some(stream);
                    }
                    return Ok(());
                }
                (None, _) => {
                    answer(&mut stream, TAKEN, &self.terms())?;
                    let address = address.to_owned();
                    let arrived = Arrived { work: stream, pulse: None, address };
                    self.arrived[hello.member.place.host] = Some(arrived);
                    return Ok(());
                }
            }
        } else {
            format!("it speaks protocol {protocol}, the leader {PROTOCOL}: run the same version")
        };
        answer(&mut stream, REFUSED, refused.as_bytes())?;
        Err(io::Error::new(io::ErrorKind::PermissionDenied, refused))
    }

    /// What speaks against a process.
    fn objection(&self, hello: &Hello) -> Option<String> {
        let Member { place, model, on_gpus } = hello.member;
        let own = self.own.place;
        if place.ranks != own.ranks || place.hosts != own.hosts {
            return Some(format!(
                "it has --tp {} and --tp-hosts {}, the leader {} and {}",
                place.ranks, place.hosts, own.ranks, own.hosts
            ));
        }
        if place.host == 0 || place.host >= own.hosts {
            return Some(format!("there is no follower {} of {}", place.host, own.hosts));
        }
        if model != self.own.model {
            return Some(format!(
                "it has another model, or keeps its weights otherwise: {}, the leader {}",
                short(model),
                short(self.own.model)
            ));
        }
        if on_gpus != self.own.on_gpus {
            let device = |on_gpus| if on_gpus { "cuda" } else { "cpu" };
            return Some(format!(
                "it has --device {}, the leader {}",
                device(on_gpus),
                device(self.own.on_gpus)
            ));
        }
        let slot = &self.arrived[place.host];
        match (hello.purpose, slot) {
            (PULSE, Some(a)) if hello.session == self.session && a.pulse.is_none() => None,
            (PULSE, _) => Some("it did not ask for work first".to_owned()),
            (_, Some(a)) if !is_closed(&a.work) => {
                Some(format!("--tp-host-rank {} is taken by {}", place.host, a.address))
            }
            _ => None,
        }
    }

    fn terms(&self) -> Vec<u8> {
        let Terms { page_size, chunk_tokens, kv_tokens, silence_max } = self.terms;
        let small = |size: usize| u32::try_from(size).unwrap_or(u32::MAX).to_le_bytes();
        let mut out = self.session.to_le_bytes().to_vec();
        out.extend(small(page_size));
        out.extend(small(chunk_tokens));
        out.extend((kv_tokens as u64).to_le_bytes());
        out.extend(small(silence_max.as_millis().try_into().unwrap_or(usize::MAX)));
        out
    }

    fn open(self) -> Result<(Vec<Peer>, Pulse), JoinError> {
        let pulse = Pulse::default();
        let mut peers = Vec::new();
        for (host, arrived) in self.arrived.into_iter().enumerate() {
            let Some(Arrived { work, pulse: Some(watched), .. }) = arrived else { continue };
            let ranks = self.own.place.ranks_of(host);
            work.set_read_timeout(None)?;
            work.set_write_timeout(None)?;
            pulse.guard(&work)?;
            pulse.watch(watched, ranks.start, self.terms.silence_max, true)?;
            peers.push(Peer { link: Link::new(work, ranks.start, pulse.clone()), ranks });
        }
        Ok((peers, pulse))
    }
}

/// The beginning of a hash, to tell two apart.
fn short(model: ModelHash) -> String {
    model.to_string().chars().take(12).collect()
}

fn is_closed(stream: &TcpStream) -> bool {
    let looked = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
    let blocking = stream.set_nonblocking(false);
    let waits = matches!(&looked, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
    blocking.is_err() || !(waits || matches!(looked, Ok(1)))
}

/// Joins the leader, whose address `find` looks up before each try.
///
/// # Errors
/// [`JoinError::Refused`], at once; [`JoinError::NoLeader`] when none was there within `timeout`.
pub fn join(
    find: &mut dyn FnMut() -> Result<String, String>,
    member: &Member,
    timeout: Duration,
) -> Result<Joined, JoinError> {
    let deadline = Instant::now() + timeout;
    let mut pause = RETRY_PAUSE;
    loop {
        let cause = match find() {
            Ok(leader) => match attempt(&leader, member, deadline) {
                Ok(joined) => return Ok(joined),
                Err(Attempt::Refused(reason)) => return Err(JoinError::Refused { leader, reason }),
                Err(Attempt::Failed(error)) => format!("{leader}: {error}"),
            },
            Err(cause) => cause,
        };
        if Instant::now() >= deadline {
            return Err(JoinError::NoLeader { timeout, cause });
        }
        std::thread::sleep(pause);
        pause = (2 * pause).min(RETRY_PAUSE_MAX);
    }
}

enum Attempt {
    Refused(String),
    Failed(io::Error),
}

impl From<io::Error> for Attempt {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

fn attempt(leader: &str, member: &Member, deadline: Instant) -> Result<Joined, Attempt> {
    let hello = Hello { purpose: WORK, session: 0, member: *member };
    let (work, terms) = say(leader, &hello, deadline)?;
    if terms.len() != TERMS_BYTES {
        return Err(io::Error::from(io::ErrorKind::InvalidData).into());
    }
    let session = word(&terms, 0);
    let (watched, _) = say(leader, &Hello { purpose: PULSE, session, ..hello }, deadline)?;
    let kv_tokens = usize::try_from(word(&terms, 16)).unwrap_or(usize::MAX);
    let silence_max = Duration::from_millis(size(&terms, 24) as u64);
    let (page_size, chunk_tokens) = (size(&terms, 8), size(&terms, 12));
    let terms = Terms { page_size, chunk_tokens, kv_tokens, silence_max };
    let pulse = Pulse::default();
    work.set_read_timeout(None)?;
    work.set_write_timeout(None)?;
    pulse.guard(&work)?;
    let watching = pulse.watch(watched, 0, silence_max, false)?;
    Ok(Joined { link: Link::new(work, 0, pulse.clone()), pulse, watching, terms })
}

/// Says what this process is, and waits for the answer: a leader that still loads takes its time.
fn say(leader: &str, hello: &Hello, deadline: Instant) -> Result<(TcpStream, Vec<u8>), Attempt> {
    let mut refused = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let mut connected = None;
    for address in leader.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, HELLO_TIMEOUT) {
            Ok(stream) => {
                connected = Some(stream);
                break;
            }
            Err(error) => refused = error,
        }
    }
    let mut stream = connected.ok_or(refused)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(HELLO_TIMEOUT))?;
    let left = deadline.saturating_duration_since(Instant::now()).max(HELLO_TIMEOUT);
    stream.set_read_timeout(Some(left))?;
    stream.write_all(&hello.bytes())?;
    greeted(&mut stream)?;
    let mut head = [0; 3];
    stream.read_exact(&mut head)?;
    let len = usize::from(u16::from_le_bytes([head[1], head[2]]));
    if len > REFUSAL_BYTES_MAX {
        return Err(io::Error::from(io::ErrorKind::InvalidData).into());
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    match head[0] {
        TAKEN => Ok((stream, body)),
        _ => Err(Attempt::Refused(String::from_utf8_lossy(&body).into_owned())),
    }
}
