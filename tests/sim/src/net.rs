//! A network inside the process: hosts, connections, latency, and everything that may go wrong.
//!
//! A connection is two pipes. A pipe carries pieces of bytes in order, each with the moment in which
//! it arrives; nothing arrives while the link is cut or either host is held, and it arrives after
//! that, as TCP's retransmissions would have it. What a dead host's kernel does (resetting
//! connections, or nothing at all) is the fault's choice.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::future::BoxFuture;
use headstart_service::net::{Dial, Dialer, Io, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use crate::random::Random;
use crate::trace::Trace;
use crate::wire::{Calls, News, Tap, Wire};

/// Where nodes listen, and where bases give KV away.
pub const NODE_PORT: u16 = 7000;
/// See [`NODE_PORT`].
pub const KV_PORT: u16 = 7100;
/// Bytes on their way in one direction of a connection at most: a socket's two buffers.
const WINDOW_BYTES: usize = 256 << 10;
/// The same of KV: pages here are small, and a receiver that is behind is to be felt.
const KV_WINDOW_BYTES: usize = 1 << 10;
/// Connections that wait to be accepted at most.
const BACKLOG: usize = 128;

/// A host's number in its world.
pub type HostId = usize;

/// The network. Clones share it.
#[derive(Clone)]
pub struct Net(Arc<Mutex<State>>);

struct State {
    seed: u64,
    /// Dials from one host to another so far.
    dials: BTreeMap<(HostId, HostId), u64>,
    trace: Trace,
    wire: Wire,
    /// By name; the index is the id.
    names: Vec<String>,
    hosts: Vec<Host>,
    cuts: BTreeSet<(HostId, HostId)>,
    slow: BTreeMap<(HostId, HostId), Duration>,
    /// Pieces of KV whose bits flip, in a thousand.
    corrupt: BTreeMap<(HostId, HostId), u64>,
    pipes: BTreeMap<u64, Pipe>,
    /// Dials that wait for the network to change.
    waiting: Vec<Waker>,
    next_pipe: u64,
}

#[derive(Default)]
struct Host {
    up: bool,
    held: bool,
    /// Its kernel says nothing: it has lost its power.
    silent: bool,
    listeners: BTreeMap<u16, mpsc::Sender<io::Result<Box<dyn Io>>>>,
}

struct Pipe {
    from: HostId,
    to: HostId,
    /// It carries KV.
    kv: bool,
    tap: Option<Tap>,
    queue: VecDeque<(Instant, Bytes)>,
    bytes: usize,
    /// Its own, so that what happens elsewhere at the same instant does not matter.
    random: Random,
    /// When the last piece arrives.
    last: Instant,
    /// The writer has ended: the reader finds the end then.
    ended: Option<Instant>,
    /// The reader is told then that the connection was reset.
    reset: Option<Instant>,
    /// The writer's or the reader's process is dead.
    writer_dead: bool,
    reader_dead: bool,
    writer_gone: bool,
    reader_gone: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net").finish_non_exhaustive()
    }
}

impl Net {
    /// A network of hosts that are all up.
    #[must_use]
    pub fn new(names: Vec<String>, mut random: Random, trace: Trace, wire: Wire) -> Self {
        let hosts = names.iter().map(|_| Host { up: true, ..Host::default() }).collect();
        Self(Arc::new(Mutex::new(State {
            seed: random.bits(),
            dials: BTreeMap::new(),
            trace,
            wire,
            names,
            hosts,
            cuts: BTreeSet::new(),
            slow: BTreeMap::new(),
            corrupt: BTreeMap::new(),
            pipes: BTreeMap::new(),
            waiting: Vec::new(),
            next_pipe: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How `host` reaches others.
    #[must_use]
    pub fn dialer(&self, host: HostId) -> Dialer {
        Dialer::over(Arc::new(HostDialer { net: self.clone(), host }))
    }

    /// Listens on a port of `host`, in the place of whoever listened there.
    #[must_use]
    pub fn listen(&self, host: HostId, port: u16) -> Listener {
        let (connections, accepted) = mpsc::channel(BACKLOG);
        self.lock().hosts[host].listeners.insert(port, connections);
        let address = SocketAddr::from(([10, 0, 0, host as u8], port));
        // Who stops to accept would make tonic's server end by itself: nobody does.
        let incoming = ReceiverStream::new(accepted).chain(futures::stream::pending());
        Listener::of(incoming, address)
    }

    /// Cuts or mends the link from one host to another, in that direction.
    pub fn cut(&self, from: HostId, to: HostId, cut: bool) {
        self.change(|state| {
            if cut {
                state.cuts.insert((from, to))
            } else {
                state.cuts.remove(&(from, to))
            };
        });
    }

    /// Adds so much latency to the link from one host to another.
    pub fn slow(&self, from: HostId, to: HostId, latency: Duration) {
        self.change(|state| {
            state.slow.insert((from, to), latency);
        });
    }

    /// Flips a bit of so many of a thousand pieces of KV between two hosts.
    pub fn corrupt(&self, from: HostId, to: HostId, permille: u64) {
        self.change(|state| {
            state.corrupt.insert((from, to), permille);
            state.corrupt.insert((to, from), permille);
        });
    }

    /// Holds a host or lets it go: nothing arrives there and nothing leaves it.
    pub fn hold(&self, host: HostId, held: bool) {
        self.change(|state| state.hosts[host].held = held);
    }

    /// Mends every link.
    pub fn mend(&self) {
        self.change(|state| {
            state.cuts.clear();
            state.slow.clear();
            state.corrupt.clear();
            state.hosts.iter_mut().for_each(|host| host.held = false);
        });
    }

    /// Ends what runs on a host. Its kernel resets its connections, or, when `silent`, says nothing
    /// until the host is up again.
    pub fn crash(&self, host: HostId, silent: bool) {
        self.change(|state| {
            let State { hosts, pipes, slow, .. } = state;
            hosts[host] = Host { silent, held: hosts[host].held, ..Host::default() };
            for pipe in pipes.values_mut() {
                if pipe.from == host {
                    pipe.writer_dead = true;
                    if !silent && pipe.reset.is_none() {
                        let after = latency(&mut pipe.random, slow, pipe.from, pipe.to);
                        pipe.reset = Some(Instant::now() + after);
                    }
                }
                if pipe.to == host {
                    pipe.reader_dead = true;
                }
            }
        });
    }

    /// The host is up again; whoever still holds a connection to what ran there is told.
    pub fn restart(&self, host: HostId) {
        self.change(|state| {
            state.hosts[host].up = true;
            state.hosts[host].silent = false;
            for pipe in state.pipes.values_mut().filter(|pipe| pipe.from == host) {
                if pipe.writer_dead && pipe.reset.is_none() {
                    pipe.reset = Some(Instant::now());
                }
            }
        });
    }

    /// Connections that either end still holds.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.lock().pipes.len().div_ceil(2)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        let mut wakers = std::mem::take(&mut state.waiting);
        for pipe in state.pipes.values_mut() {
            wakers.extend(pipe.reader.take());
            wakers.extend(pipe.writer.take());
        }
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    async fn connect(self, from: HostId, address: String) -> io::Result<Box<dyn Io>> {
        let (name, port) = address.rsplit_once(':').unwrap_or((&address, "0"));
        let port = port.parse().map_err(|_| io::ErrorKind::InvalidInput)?;
        let (to, random, after) = {
            let mut state = self.lock();
            let to = state.names.iter().position(|known| known == name);
            let to = to.ok_or(io::ErrorKind::NotFound)?;
            let State { seed, dials, slow, .. } = &mut *state;
            let dial = dials.entry((from, to)).or_default();
            *dial += 1;
            let mut random = Random::new(*seed ^ (*dial << 16) ^ ((from as u64) << 8) ^ to as u64);
            let after = latency(&mut random, slow, from, to) + latency(&mut random, slow, to, from);
            (to, random, after)
        };
        sleep(after).await;
        poll_fn(|cx| {
            let mut state = self.lock();
            if state.blocked(from, to) || state.blocked(to, from) || state.hosts[to].silent {
                state.waiting.push(cx.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(state.open(&self, (from, to, port), random.clone()))
        })
        .await
    }
}

impl State {
    fn blocked(&self, from: HostId, to: HostId) -> bool {
        self.hosts[from].held || self.hosts[to].held || self.cuts.contains(&(from, to))
    }

    fn open(
        &mut self,
        net: &Net,
        (from, to, port): (HostId, HostId, u16),
        mut random: Random,
    ) -> io::Result<Box<dyn Io>> {
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        let listener = self.hosts[to].listeners.get(&port).cloned().ok_or_else(refused)?;
        let place = listener.try_reserve().map_err(|_| refused())?;
        let (there, back) = (self.next_pipe, self.next_pipe + 1);
        self.next_pipe += 2;
        let kv = port == KV_PORT;
        let taps = self.taps(from, to, port);
        self.pipes.insert(there, Pipe { kv, tap: taps.0, ..Pipe::new(from, to, random.fork()) });
        self.pipes.insert(back, Pipe { kv, tap: taps.1, ..Pipe::new(to, from, random) });
        if kv {
            self.wire.tell(News::Transfer { sender: to, receiver: from });
        }
        place.send(Ok(Box::new(Stream::new(net, there, back))));
        let numbers = [1, from as u64, to as u64];
        self.trace.add(&numbers, format_args!("{} dials {}", self.names[from], self.names[to]));
        Ok(Box::new(Stream::new(net, back, there)))
    }

    /// What looks at both directions of a connection.
    fn taps(&self, from: HostId, to: HostId, port: u16) -> (Option<Tap>, Option<Tap>) {
        let (dials, accepts) = (&self.names[from], &self.names[to]);
        if port == KV_PORT {
            let names = format!("{accepts} -> {dials}");
            let (buffer, format, tokens) = (Vec::new(), None, Vec::new());
            return (None, Some(Tap::Pages { buffer, format, tokens, names }));
        }
        if port == NODE_PORT && dials.starts_with("drafter-") {
            let (drafter, base) = (from, to);
            let calls = Calls::default;
            let replies = Tap::Replies { calls: calls(), drafter, base };
            return (Some(Tap::Drafts { calls: calls(), drafter, base }), Some(replies));
        }
        (None, None)
    }

    /// Writes `bytes` into a pipe.
    fn write(&mut self, id: u64, bytes: &[u8], cx: &Context<'_>) -> Poll<io::Result<usize>> {
        let State { slow, corrupt, wire, pipes, .. } = self;
        let Some(pipe) = pipes.get_mut(&id) else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        if pipe.writer_dead || (pipe.reader_gone && !pipe.reader_dead) || pipe.ended.is_some() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let window = if pipe.kv { KV_WINDOW_BYTES } else { WINDOW_BYTES };
        let room = window.saturating_sub(pipe.bytes).min(bytes.len());
        if room == 0 {
            pipe.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let after = latency(&mut pipe.random, slow, pipe.from, pipe.to);
        let arrives = pipe.last.max(Instant::now() + after);
        pipe.last = arrives;
        pipe.bytes += room;
        if let Some(tap) = &mut pipe.tap {
            tap.see(&bytes[..room], wire);
        }
        let mut piece = bytes[..room].to_vec();
        let flips = corrupt.get(&(pipe.from, pipe.to)).filter(|_| pipe.kv);
        if flips.is_some_and(|permille| pipe.random.within(0..1000) < *permille) {
            let byte = pipe.random.index(room);
            piece[byte] ^= 1 << pipe.random.index(8);
        }
        pipe.queue.push_back((arrives, Bytes::from(piece)));
        if let Some(reader) = pipe.reader.take() {
            reader.wake();
        }
        Poll::Ready(Ok(room))
    }

    /// Reads from a pipe; when something comes later, says when.
    fn read(
        &mut self,
        id: u64,
        buffer: &mut ReadBuf<'_>,
        cx: &Context<'_>,
    ) -> Result<Poll<io::Result<()>>, Instant> {
        let Some((from, to)) = self.pipes.get(&id).map(|pipe| (pipe.from, pipe.to)) else {
            return Ok(Poll::Ready(Ok(())));
        };
        let blocked = self.blocked(from, to);
        let State { pipes, trace, names, .. } = self;
        let Some(pipe) = pipes.get_mut(&id) else { return Ok(Poll::Ready(Ok(()))) };
        if pipe.reader_dead {
            return Ok(Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into())));
        }
        pipe.reader = Some(cx.waker().clone());
        if blocked {
            return Ok(Poll::Pending);
        }
        let now = Instant::now();
        if pipe.reset.is_some_and(|reset| reset <= now) {
            return Ok(Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())));
        }
        let Some((arrives, piece)) = pipe.queue.front_mut() else {
            return match pipe.ended.into_iter().chain(pipe.reset).min() {
                Some(end) if end <= now => Ok(Poll::Ready(Ok(()))),
                Some(end) => Err(end),
                None => Ok(Poll::Pending),
            };
        };
        if *arrives > now {
            return Err(*arrives);
        }
        let taken = piece.len().min(buffer.remaining());
        buffer.put_slice(&piece[..taken]);
        piece.advance(taken);
        if piece.is_empty() {
            pipe.queue.pop_front();
            // Lengths depend on the wall clock (HTTP has dates), so they are no part of the hash.
            let numbers = [2, from as u64, to as u64];
            trace.add(&numbers, format_args!("{} -> {}", names[from], names[to]));
        }
        pipe.bytes -= taken;
        if let Some(writer) = pipe.writer.take() {
            writer.wake();
        }
        Ok(Poll::Ready(Ok(())))
    }

    /// The writer of a pipe ends.
    fn end(&mut self, id: u64) {
        let State { slow, pipes, .. } = self;
        if let Some(pipe) = pipes.get_mut(&id)
            && pipe.ended.is_none()
            && !pipe.writer_dead
        {
            let after = latency(&mut pipe.random, slow, pipe.from, pipe.to);
            let arrives = Instant::now() + after;
            pipe.ended = Some(pipe.last.max(arrives));
            if let Some(reader) = pipe.reader.take() {
                reader.wake();
            }
        }
    }

    /// One end of a pipe is dropped.
    fn leave(&mut self, id: u64, change: impl FnOnce(&mut Pipe)) {
        if let Some(pipe) = self.pipes.get_mut(&id) {
            change(pipe);
            if pipe.reader_gone && pipe.writer_gone {
                self.pipes.remove(&id);
            }
        }
    }
}

/// How long a piece takes: a fraction of a millisecond to a few, and what the link adds.
fn latency(
    random: &mut Random,
    slow: &BTreeMap<(HostId, HostId), Duration>,
    from: HostId,
    to: HostId,
) -> Duration {
    let usual = random.millis(0..2) + Duration::from_micros(100);
    usual + slow.get(&(from, to)).copied().unwrap_or_default()
}

impl Pipe {
    fn new(from: HostId, to: HostId, random: Random) -> Self {
        Self {
            from,
            to,
            kv: false,
            tap: None,
            queue: VecDeque::new(),
            bytes: 0,
            random,
            last: Instant::now(),
            ended: None,
            reset: None,
            writer_dead: false,
            reader_dead: false,
            writer_gone: false,
            reader_gone: false,
            reader: None,
            writer: None,
        }
    }
}

#[derive(Debug)]
struct HostDialer {
    net: Net,
    host: HostId,
}

impl Dial for HostDialer {
    fn dial(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn Io>>> {
        Box::pin(self.net.clone().connect(self.host, address.to_owned()))
    }
}

/// One end of a connection.
struct Stream {
    net: Net,
    reads: u64,
    writes: u64,
    /// Until the next piece arrives.
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Stream {
    fn new(net: &Net, reads: u64, writes: u64) -> Self {
        Self { net: net.clone(), reads, writes, sleep: None }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let stream = self.get_mut();
        loop {
            let read = stream.net.lock().read(stream.reads, buffer, cx);
            let later = match read {
                Ok(now) => return now,
                Err(later) => later,
            };
            match &mut stream.sleep {
                Some(sleep) if sleep.deadline() == later => {}
                Some(sleep) => sleep.as_mut().reset(later),
                empty => *empty = Some(Box::pin(sleep_until(later))),
            }
            if let Some(sleep) = &mut stream.sleep
                && sleep.as_mut().poll(cx).is_pending()
            {
                return Poll::Pending;
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.net.lock().write(self.writes, bytes, cx)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.net.lock().end(self.writes);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut state = self.net.lock();
        state.end(self.writes);
        state.leave(self.writes, |pipe| pipe.writer_gone = true);
        let mut writer = None;
        state.leave(self.reads, |pipe| {
            pipe.reader_gone = true;
            pipe.bytes -=
                std::mem::take(&mut pipe.queue).iter().map(|(_, p)| p.len()).sum::<usize>();
            writer = pipe.writer.take();
        });
        drop(state);
        if let Some(writer) = writer {
            writer.wake();
        }
    }
}
