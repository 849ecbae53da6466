//! Threads that carry HTTP requests, each with a runtime of its own and connections of its own to the
//! nodes. All of a request's work is done where its client's connection lives, so that nothing on its
//! way wakes another thread. See `docs/adr/0015-lanes.md`.

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use headstart_service::net::{Io, Listener};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Handle};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::AbortOnDropHandle;

use crate::connection::{Connection, Seat};

/// Accepted connections that a lane has not taken over yet.
const HANDED_MAX: usize = 64;
/// Threads of a lane that render long prompts.
const BLOCKING_THREADS_MAX: usize = 16;
/// How soon a listener is asked again after it failed.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// The lane that this thread is, from 1; 0 is everybody else.
pub(crate) fn current() -> usize {
    CURRENT.get()
}

/// See the [module](self). Dropping it ends its threads and all that runs on them.
#[derive(Debug)]
pub(crate) struct Lanes {
    lanes: Vec<Lane>,
}

#[derive(Debug)]
struct Lane {
    runtime: Handle,
    /// Connections that were handed to it and live.
    connections: Arc<AtomicUsize>,
    _end: DropGuard,
}

/// A part of a door, and where to serve it.
pub(crate) struct Part {
    /// The lane's runtime, or the caller's where there are no lanes.
    pub(crate) runtime: Handle,
    /// The connections that come there.
    pub(crate) listener: Listener,
}

/// A door that was divided. Dropping it ends the accepting.
pub(crate) struct Door {
    /// At least one.
    pub(crate) parts: Vec<Part>,
    pub(crate) accepting: Option<AbortOnDropHandle<()>>,
}

impl Lanes {
    /// Starts so many lanes.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub(crate) fn start(count: usize) -> io::Result<Self> {
        let lanes = (1..=count).map(Lane::start).collect::<io::Result<_>>()?;
        Ok(Self { lanes })
    }

    /// Divides what comes to `listener` among the lanes, each connection to the lane that has the
    /// fewest. At most `connections_max` are open at once; more wait in the backlog. Each may take
    /// nothing for `write_timeout`. Without lanes, or where connections are not TCP's, all are served on
    /// the caller's runtime.
    pub(crate) fn divide(
        &self,
        listener: Listener,
        connections_max: usize,
        write_timeout: Duration,
    ) -> Door {
        let places = Arc::new(Semaphore::new(connections_max));
        let address = listener.local_addr();
        if self.lanes.is_empty() {
            return Door::whole(bounded(listener, places, write_timeout));
        }
        let listener = match listener.into_tcp() {
            Ok(listener) => listener,
            Err(listener) => return Door::whole(bounded(listener, places, write_timeout)),
        };
        let (mut parts, mut desks) = (Vec::new(), Vec::new());
        for lane in &self.lanes {
            let (sender, handed) = mpsc::channel::<Handed>(HANDED_MAX);
            let incoming = ReceiverStream::new(handed);
            let incoming = incoming.map(move |handed| handed.take_over(write_timeout));
            let runtime = lane.runtime.clone();
            parts.push(Part { runtime, listener: Listener::of(incoming, address) });
            desks.push(Desk { sender, connections: Arc::clone(&lane.connections) });
        }
        let accepting = AbortOnDropHandle::new(tokio::spawn(accept(listener, places, desks)));
        Door { parts, accepting: Some(accepting) }
    }
}

impl Lane {
    fn start(number: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(BLOCKING_THREADS_MAX)
            .thread_name(format!("lane-{number}-blocking"))
            .build()?;
        let (handle, end) = (runtime.handle().clone(), CancellationToken::new());
        let ended = end.clone();
        std::thread::Builder::new().name(format!("lane-{number}")).spawn(move || {
            CURRENT.set(number);
            runtime.block_on(ended.cancelled());
            runtime.shutdown_background();
        })?;
        Ok(Self { runtime: handle, connections: Arc::default(), _end: end.drop_guard() })
    }
}

impl Door {
    fn whole(listener: Listener) -> Self {
        let runtime = Handle::current();
        Self { parts: vec![Part { runtime, listener }], accepting: None }
    }
}

/// Where a lane's connections are handed over.
struct Desk {
    sender: mpsc::Sender<Handed>,
    connections: Arc<AtomicUsize>,
}

/// A connection on its way to a lane.
struct Handed {
    stream: std::net::TcpStream,
    seat: Seat,
}

impl Handed {
    /// Registers the connection with the runtime that it is to live on.
    fn take_over(self, write_timeout: Duration) -> io::Result<Box<dyn Io>> {
        let stream = TcpStream::from_std(self.stream)?;
        stream.set_nodelay(true)?;
        Ok(Box::new(Connection::new(stream, write_timeout, self.seat)))
    }
}

/// Accepts for all lanes, for as long as one of them takes connections.
async fn accept(listener: TcpListener, places: Arc<Semaphore>, desks: Vec<Desk>) {
    loop {
        let place = Arc::clone(&places).acquire_owned().await.ok();
        let stream = loop {
            match listener.accept().await.and_then(|(stream, _)| stream.into_std()) {
                Ok(stream) => break stream,
                // An error such as too many open files passes.
                Err(_) => tokio::time::sleep(ACCEPT_RETRY).await,
            }
        };
        let fewest = desks.iter().min_by_key(|desk| desk.connections.load(Ordering::Relaxed));
        let Some(desk) = fewest else { return };
        let handed = Handed { stream, seat: Seat::new(place, Some(&desk.connections)) };
        if desk.sender.send(handed).await.is_err() {
            return;
        }
    }
}

/// The connections of `listener`, of which so many at once may be open.
fn bounded(listener: Listener, places: Arc<Semaphore>, write_timeout: Duration) -> Listener {
    let address = listener.local_addr();
    let incoming = futures::stream::unfold(listener.into_incoming(), move |mut incoming| {
        let places = Arc::clone(&places);
        async move {
            let place = places.acquire_owned().await.ok();
            let stream = incoming.next().await?.map(|stream| {
                let seat = Seat::new(place, None);
                Box::new(Connection::new(stream, write_timeout, seat)) as Box<dyn Io>
            });
            Some((stream, incoming))
        }
    });
    Listener::of(incoming, address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::task::JoinSet;

    /// Far beyond anything a test waits for.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Answers each connection with the number of the lane that it is on, and keeps it until it is
    /// closed.
    fn serve(door: Door) -> (JoinSet<()>, Option<AbortOnDropHandle<()>>) {
        let mut serving = JoinSet::new();
        for Part { runtime, listener } in door.parts {
            serving.spawn_on(
                async move {
                    let mut incoming = listener.into_incoming();
                    while let Some(Ok(mut stream)) = incoming.next().await {
                        tokio::spawn(async move {
                            stream.write_u8(u8::try_from(current()).unwrap()).await.unwrap();
                            stream.read_u8().await.unwrap_err();
                        });
                    }
                },
                &runtime,
            );
        }
        (serving, door.accepting)
    }

    async fn listener() -> (Listener, std::net::SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener.into(), address)
    }

    async fn ask(address: std::net::SocketAddr) -> (TcpStream, u8) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let lane = tokio::time::timeout(PATIENCE, stream.read_u8()).await.expect("is served");
        (stream, lane.unwrap())
    }

    #[tokio::test]
    async fn each_connection_goes_to_the_lane_with_the_fewest() {
        let ((listener, address), lanes) = (listener().await, Lanes::start(3).unwrap());
        let _serving = serve(lanes.divide(listener, 64, PATIENCE));
        let mut open = Vec::new();
        for _ in 0..6 {
            open.push(ask(address).await);
        }
        let numbers: Vec<u8> = open.iter().map(|(_, lane)| *lane).collect();
        assert_eq!(numbers, [1, 2, 3, 1, 2, 3]);
        // Two that end make room on their lane.
        open.retain(|(_, lane)| *lane != 2);
        while lanes.lanes[1].connections.load(Ordering::Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!((ask(address).await.1, current()), (2, 0));
    }

    #[tokio::test]
    async fn more_than_may_be_open_wait_for_a_place() {
        for count in [0, 2] {
            let ((listener, address), lanes) = (listener().await, Lanes::start(count).unwrap());
            let _serving = serve(lanes.divide(listener, 2, PATIENCE));
            let (first, _second) = (ask(address).await, ask(address).await);
            let mut third = TcpStream::connect(address).await.unwrap();
            let mut byte = [0];
            let early =
                tokio::time::timeout(Duration::from_millis(50), third.read(&mut byte)).await;
            assert!(early.is_err(), "with {count} lanes");
            drop(first);
            let read = tokio::time::timeout(PATIENCE, third.read(&mut byte)).await.expect("served");
            assert_eq!(read.unwrap(), 1);
        }
    }

    #[tokio::test]
    async fn what_runs_on_lanes_ends_with_them() {
        let ((listener, address), lanes) = (listener().await, Lanes::start(2).unwrap());
        let door = lanes.divide(listener, 2, PATIENCE);
        let _serving = serve(door);
        let (mut stream, _) = ask(address).await;
        drop(lanes);
        let ended = tokio::time::timeout(PATIENCE, stream.read_u8()).await.expect("is closed");
        ended.unwrap_err();
    }
}
