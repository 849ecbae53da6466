//! A pulse between the processes of a model.
//!
//! The leader pings each follower over a connection of its own, and each answers, also while both
//! compute. Who is silent for too long, or closes, is lost: then every connection is closed and
//! whoever waits on one is free. A leader that ends says goodbye first.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::super::RankLost;
use super::link::said;

const PING: u8 = b'P';
const PONG: u8 = b'A';
const GOODBYE: u8 = b'B';

/// Pings in the time after which a silent process is lost.
const PINGS: u32 = 5;

/// Whether the processes of a model are all there, seen from one of them. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Pulse(Arc<State>);

#[derive(Debug, Default)]
struct State {
    lost: OnceLock<RankLost>,
    /// The leader said goodbye, or is the one who did.
    left: AtomicBool,
    /// Connections to be closed when a rank is lost.
    work: Mutex<Vec<TcpStream>>,
    watches: Mutex<Vec<TcpStream>>,
    /// All connections are closed, for good.
    closed: Mutex<bool>,
    closing: Condvar,
}

impl Pulse {
    /// The rank that was lost, if one was.
    #[must_use]
    pub fn lost(&self) -> Option<RankLost> {
        self.0.lost.get().cloned()
    }

    /// Whether the leader has said goodbye.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.left.load(Ordering::Acquire)
    }

    /// A rank is lost: closes every connection. Gives what was lost first.
    pub fn lose(&self, lost: RankLost) -> RankLost {
        let lost = self.0.lost.get_or_init(|| lost).clone();
        self.close();
        lost
    }

    /// The leader closed the work's connection: closes that alone, since what the leader has to say
    /// comes over the other one. Gives what was lost first.
    pub(super) fn lose_work(&self, lost: RankLost) -> RankLost {
        let lost = self.0.lost.get_or_init(|| lost).clone();
        shut(&self.0.work);
        lost
    }

    fn close(&self) {
        shut(&self.0.work);
        shut(&self.0.watches);
        *self.0.closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.closing.notify_all();
    }

    /// Waits until a rank is lost or the leader has left, or for so long.
    pub(crate) fn wait_for_end(&self, timeout: Duration) {
        let closed = self.0.closed.lock().unwrap_or_else(PoisonError::into_inner);
        // What counts is asked for by whoever waits.
        let _ = self.0.closing.wait_timeout_while(closed, timeout, |closed| !*closed);
    }

    /// Has `act` done, on a thread of its own, when a rank is lost or the leader has left.
    ///
    /// # Errors
    /// The system has no room for another thread.
    pub(crate) fn at_end(&self, act: impl FnOnce(&Self) + Send + 'static) -> io::Result<()> {
        let pulse = self.clone();
        let wait = move || {
            let mut closed = pulse.0.closed.lock().unwrap_or_else(PoisonError::into_inner);
            while !*closed {
                closed = pulse.0.closing.wait(closed).unwrap_or_else(PoisonError::into_inner);
            }
            drop(closed);
            act(&pulse);
        };
        std::thread::Builder::new().name("tp-end".into()).spawn(wait).map(drop)
    }

    /// Says goodbye to the followers: the model is not wanted any more. Their work's connections
    /// close after that.
    pub fn leave(&self) {
        if self.0.left.swap(true, Ordering::AcqRel) || self.0.lost.get().is_some() {
            return;
        }
        for mut stream in self.0.watches.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // A follower that does not hear it loses its leader instead.
            let _ = stream.write_all(&[GOODBYE]);
            let _ = stream.shutdown(Shutdown::Write);
        }
        self.close();
    }

    /// Closes `work` when a rank is lost.
    ///
    /// # Errors
    /// The system has no room for another handle.
    pub fn guard(&self, work: &TcpStream) -> io::Result<()> {
        let work = work.try_clone()?;
        self.0.work.lock().unwrap_or_else(PoisonError::into_inner).push(work);
        Ok(())
    }

    /// Watches a process whose first rank is `rank`; `leads` says whether this end leads.
    ///
    /// # Errors
    /// The system has no room for another handle or thread.
    pub fn watch(
        &self,
        stream: TcpStream,
        rank: usize,
        silence_max: Duration,
        leads: bool,
    ) -> io::Result<JoinHandle<()>> {
        let clone = stream.try_clone()?;
        self.0.watches.lock().unwrap_or_else(PoisonError::into_inner).push(clone);
        let interval = (silence_max / PINGS).max(Duration::from_millis(1));
        stream.set_read_timeout(Some(interval))?;
        stream.set_write_timeout(Some(silence_max.max(interval)))?;
        let pulse = self.clone();
        let watcher = Watcher { stream, silence_max, interval, leads };
        let watch = move || match watcher.run(&pulse) {
            Some(cause) => {
                pulse.lose(RankLost::new(rank, cause));
            }
            None => pulse.close(),
        };
        std::thread::Builder::new().name("tp-pulse".into()).spawn(watch)
    }
}

fn shut(streams: &Mutex<Vec<TcpStream>>) {
    for stream in streams.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        // It is gone already, or goes now.
        let _ = stream.shutdown(Shutdown::Both);
    }
}

struct Watcher<S> {
    /// Its reads end after `interval`.
    stream: S,
    silence_max: Duration,
    interval: Duration,
    leads: bool,
}

impl<S: Read + Write> Watcher<S> {
    /// Runs until the other end is lost, and says why, or until the goodbye.
    ///
    /// Silence is counted in reads that found nothing, not by the clock: a process that was paused
    /// itself has what was sent meanwhile still to read, whichever read the pause fell into.
    fn run(mut self, pulse: &Pulse) -> Option<String> {
        let mut silent_reads = 0;
        let mut due = Instant::now();
        loop {
            if self.leads && Instant::now() >= due && !pulse.is_over() {
                due = Instant::now() + self.interval;
                if let Err(error) = self.stream.write_all(&[PING]) {
                    return (!pulse.is_over()).then(|| said(&error));
                }
            }
            let mut word = [0];
            match self.stream.read(&mut word) {
                Ok(0) if pulse.is_over() => return None,
                Ok(0) => return Some(said(&io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => {
                    silent_reads = 0;
                    match (word[0], self.leads) {
                        (PONG, true) => {}
                        (PING, false) => {
                            if let Err(error) = self.stream.write_all(&[PONG]) {
                                return Some(said(&error));
                            }
                        }
                        (GOODBYE, false) => {
                            pulse.0.left.store(true, Ordering::Release);
                            return None;
                        }
                        _ => return Some("it sent what is no pulse".to_owned()),
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_timeout(&error) => silent_reads += 1,
                Err(error) => return (!pulse.is_over()).then(|| said(&error)),
            }
            if silent_reads >= PINGS {
                let silent = format!("its process was silent for {:?}", self.silence_max);
                return (!pulse.is_over()).then_some(silent);
            }
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::super::link::{Kind, Link};
    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let one = TcpStream::connect(listener.local_addr().expect("bound")).expect("connects");
        (one, listener.accept().expect("connected").0)
    }

    const SILENCE_MAX: Duration = Duration::from_millis(500);

    #[test]
    fn a_goodbye_is_no_loss() {
        let (one, two) = pair();
        let (leader, follower) = (Pulse::default(), Pulse::default());
        let leading = leader.watch(one, 1, Duration::from_secs(60), true).expect("a thread");
        let following = follower.watch(two, 0, Duration::from_secs(60), false).expect("a thread");
        leader.leave();
        following.join().expect("ends");
        leading.join().expect("ends");
        assert!(follower.is_over());
        assert_eq!((leader.lost(), follower.lost()), (None, None));
    }

    #[test]
    fn a_goodbye_is_heard_behind_the_end_of_the_work() {
        let (one, two) = pair();
        let (work, others) = pair();
        let (leader, follower) = (Pulse::default(), Pulse::default());
        let leading = leader.watch(one, 1, Duration::from_secs(60), true).expect("a thread");
        let following = follower.watch(two, 0, Duration::from_secs(60), false).expect("a thread");
        follower.guard(&others).expect("a handle");
        let mut link = Link::new(others, 0, follower.clone());
        drop(work);
        let lost = link.receive(&[Kind::Plan], 0).expect_err("it is closed");
        assert!(lost.cause.contains("closed"), "{lost}");
        leader.leave();
        following.join().expect("ends");
        leading.join().expect("ends");
        assert!(follower.is_over());
    }

    #[test]
    fn who_is_silent_is_lost_and_who_waits_is_freed() {
        let (one, _silent) = pair();
        let (mut work, _other) = pair();
        let pulse = Pulse::default();
        pulse.guard(&work).expect("a handle");
        let watching = pulse.watch(one, 3, SILENCE_MAX, true).expect("a thread");
        assert_eq!(work.read(&mut [0]).ok(), Some(0), "closed");
        watching.join().expect("ends");
        let lost = pulse.lost().expect("was lost").to_string();
        assert!(lost.contains("rank 3") && lost.contains("silent for 500ms"), "{lost}");
    }

    /// Gives what it is told, one word a read, and then ends. Nothing to read is found at leisure.
    struct Script(std::vec::IntoIter<Option<u8>>);

    impl Read for Script {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            match self.0.next() {
                Some(Some(word)) => {
                    out[0] = word;
                    Ok(1)
                }
                Some(None) => {
                    std::thread::sleep(Duration::from_millis(2));
                    Err(io::ErrorKind::WouldBlock.into())
                }
                None => Ok(0),
            }
        }
    }

    impl Write for Script {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_pause_of_its_own_is_nobodys_silence() {
        let nothing = |reads: usize| vec![None; reads];
        let heard = |words: Vec<Option<u8>>| {
            let (silence_max, interval) = (Duration::from_millis(1), Duration::ZERO);
            let stream = Script(words.into_iter());
            Watcher { stream, silence_max, interval, leads: false }.run(&Pulse::default())
        };
        let few = || nothing(PINGS as usize - 1);
        let (closed, ping) = (said(&io::ErrorKind::UnexpectedEof.into()), vec![Some(PING)]);
        // Each read that finds nothing is longer than the silence that is allowed.
        assert_eq!(heard(few()), Some(closed.clone()));
        assert_eq!(heard([few(), ping.clone(), few()].concat()), Some(closed));
        let silent = heard([ping, nothing(PINGS as usize)].concat()).expect("lost");
        assert_eq!(silent, "its process was silent for 1ms");
    }

    #[test]
    fn who_closes_is_lost_at_once() {
        let (one, two) = pair();
        let pulse = Pulse::default();
        let watching = pulse.watch(one, 2, Duration::from_secs(60), true).expect("a thread");
        drop(two);
        watching.join().expect("ends");
        let lost = pulse.lost().expect("was lost");
        assert_eq!((lost.rank, lost.cause.contains("closed")), (2, true));
    }
}
