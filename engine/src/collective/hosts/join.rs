//! How the processes of a model find together.
//!
//! A follower connects to the leader and says what it is: protocol, model, place. The leader answers
//! with the terms under which the model runs, or with a sentence that says why it does not take it.
//! A follower that was taken connects once more, for its [pulse](super::watch). That begins to beat
//! when all have come, so a follower counts the leader's silence from then on, and not while another
//! one still loads; until then it may go, and come again.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use socket2::{SockRef, TcpKeepalive};

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
            Err(_) => {
                door.forget_the_gone();
                return Err(JoinError::Missing { missing: door.missing(), timeout });
            }
        }
    }
    door.open()
}

impl Door {
    fn has(&self, host: usize) -> bool {
        self.arrived[host].as_ref().is_some_and(|arrived| arrived.pulse.is_some())
    }

    fn is_full(&self) -> bool {
        (1..self.arrived.len()).all(|host| self.has(host))
    }

    /// Frees the places of those who went away while they waited for the others.
    fn forget_the_gone(&mut self) {
        for (host, slot) in self.arrived.iter_mut().enumerate() {
            if let Some(gone) = slot.take_if(|arrived| is_closed(&arrived.work)) {
                tracing::warn!(host, address = %gone.address, "a tensor-parallel process went away");
            }
        }
    }

    fn missing(&self) -> String {
        let place = self.own.place;
        let away = (1..place.hosts).filter(|host| !self.has(*host));
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
            self.forget_the_gone();
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
            (_, Some(a)) => {
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
            stay_open(&work, self.terms.silence_max)?;
            pulse.guard(&work)?;
            pulse.watch(watched, ranks.start, self.terms.silence_max, true)?;
            peers.push(Peer { link: Link::new(work, ranks.start, pulse.clone()), ranks });
        }
        Ok((peers, pulse))
    }
}

/// The work's connection is quiet while nobody asks, perhaps for hours, and the pulse is another one:
/// what lies between keeps no quiet connection for ever.
fn stay_open(work: &TcpStream, silence_max: Duration) -> io::Result<()> {
    work.set_read_timeout(None)?;
    work.set_write_timeout(None)?;
    // The system counts in seconds.
    let time = silence_max.max(Duration::from_secs(1));
    SockRef::from(work).set_tcp_keepalive(&TcpKeepalive::new().with_time(time).with_interval(time))
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
    // The first beat, which is left to whoever watches.
    if watched.peek(&mut [0])? == 0 {
        let gone = "it went away while it waited for the other ranks";
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, gone).into());
    }
    let kv_tokens = usize::try_from(word(&terms, 16)).unwrap_or(usize::MAX);
    let silence_max = Duration::from_millis(size(&terms, 24) as u64);
    let (page_size, chunk_tokens) = (size(&terms, 8), size(&terms, 12));
    let terms = Terms { page_size, chunk_tokens, kv_tokens, silence_max };
    let pulse = Pulse::default();
    stay_open(&work, silence_max)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};

    const PATIENCE: Duration = Duration::from_secs(120);
    /// Who comes back too early does so at once: a right run only waits this out.
    const MOMENT: Duration = Duration::from_millis(300);

    fn member(host: usize) -> Member {
        let place = Place { ranks: 3, hosts: 3, host };
        Member { place, model: ModelHash([7; 32]), on_gpus: false }
    }

    type Gathered = Receiver<Result<Pulse, JoinError>>;

    /// A leader that waits for two others, and where it is.
    fn leader(timeout: Duration) -> (String, Gathered) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let address = listener.local_addr().expect("bound").to_string();
        let (tell, told) = channel();
        let silence_max = PATIENCE;
        let terms = Terms { page_size: 16, chunk_tokens: 8, kv_tokens: 64, silence_max };
        std::thread::spawn(move || {
            let gathered = gather(&listener, &member(0), terms, timeout);
            tell.send(gathered.map(|(_, pulse)| pulse))
        });
        (address, told)
    }

    fn follower(address: &str, host: usize) -> Receiver<Result<Joined, JoinError>> {
        let (address, (tell, told)) = (address.to_owned(), channel());
        std::thread::spawn(move || {
            let joined = join(&mut || Ok(address.clone()), &member(host), PATIENCE);
            // A failed test listens no more.
            let _ = tell.send(joined);
        });
        told
    }

    /// A process that says what it is, so far that it is waited with.
    fn process(address: &str, host: usize, with_pulse: bool) -> Vec<TcpStream> {
        let hello = Hello { purpose: WORK, session: 0, member: member(host) };
        let deadline = Instant::now() + PATIENCE;
        let said = |hello| say(address, hello, deadline).ok().expect("it is taken");
        let (work, terms) = said(&hello);
        let pulse = Hello { purpose: PULSE, session: word(&terms, 0), ..hello };
        std::iter::once(work).chain(with_pulse.then(|| said(&pulse).0)).collect()
    }

    #[test]
    fn nobody_begins_before_the_last_has_come() {
        let (address, gathered) = leader(PATIENCE);
        let early = follower(&address, 1);
        assert!(matches!(early.recv_timeout(MOMENT), Err(RecvTimeoutError::Timeout)));
        let late = follower(&address, 2);
        let pulse = gathered.recv().expect("ends").expect("all have come");
        let joined = [early, late].map(|f| f.recv().expect("ends").expect("it is taken"));
        pulse.leave();
        for Joined { watching, pulse, .. } in joined {
            watching.join().expect("ends");
            assert!(pulse.is_over() && pulse.lost().is_none());
        }
    }

    #[test]
    fn who_goes_while_it_waits_may_come_again() {
        let (address, gathered) = leader(PATIENCE);
        drop(process(&address, 1, true));
        let other = follower(&address, 2);
        assert!(matches!(gathered.recv_timeout(MOMENT), Err(RecvTimeoutError::Timeout)));
        let again = follower(&address, 1);
        let _pulse = gathered.recv().expect("ends").expect("all have come");
        for joined in [other, again] {
            joined.recv().expect("ends").expect("it is taken");
        }
    }

    #[test]
    fn who_came_by_half_or_went_is_missing() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let connection = || {
            let there = TcpStream::connect(listener.local_addr().expect("bound"));
            (listener.accept().expect("connected").0, there.expect("connects"))
        };
        let arrived = |work, pulse| Some(Arrived { work, pulse, address: String::new() });
        let ((work, other_end), (pulse, _beats)) = (connection(), connection());
        let (half, _waits) = connection();
        let silence_max = PATIENCE;
        let terms = Terms { page_size: 16, chunk_tokens: 8, kv_tokens: 64, silence_max };
        let arrived = vec![None, arrived(work, Some(pulse)), arrived(half, None)];
        let mut door = Door { own: member(0), terms, session: 1, arrived };
        door.forget_the_gone();
        assert_eq!(door.missing(), "rank 2");
        drop(other_end);
        while door.has(1) {
            door.forget_the_gone();
        }
        assert_eq!(door.missing(), "ranks 1, 2");
    }

    #[test]
    fn a_quiet_connection_is_kept_open() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let work = TcpStream::connect(listener.local_addr().expect("bound")).expect("connects");
        stay_open(&work, Duration::from_millis(300)).expect("the system can");
        let socket = SockRef::from(&work);
        assert!(socket.keepalive().expect("known"));
        assert_eq!(socket.tcp_keepalive_time().expect("known"), Duration::from_secs(1));
    }

    #[test]
    fn another_leader_is_found_after_one_that_gave_up() {
        let (first, gave_up) = leader(MOMENT);
        let (second, gathered) = leader(PATIENCE);
        let mut leaders = [first, second.clone()].into_iter();
        let other = follower(&second, 2);
        let mut find = move || Ok(leaders.next().unwrap_or_else(|| second.clone()));
        let joining = std::thread::spawn(move || join(&mut find, &member(1), PATIENCE));
        gave_up.recv().expect("ends").expect_err("not everyone came");
        let _pulse = gathered.recv().expect("ends").expect("all have come");
        joining.join().expect("no panic").expect("it is taken");
        other.recv().expect("ends").expect("it is taken");
    }
}
