//! The connection that carries the work of two processes: frames in strict order.
//!
//! A frame is `[u32 length][u8 kind][length bytes]`, little-endian. Whoever receives knows which
//! kind comes next and how long it can be, so nothing else is taken.

use std::io::{self, Read, Write};
use std::net::TcpStream;

use super::super::RankLost;
use super::watch::Pulse;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Leader to follower: a step's plan.
    Plan = 1,
    /// Follower to leader: a rank's values of a sum.
    Part = 2,
    /// Leader to follower: the sum.
    Sum = 3,
    /// Follower to leader: what a rank found.
    Found = 4,
    /// Leader to follower: a page is wanted.
    Read = 5,
    /// Follower to leader: that page, of all its ranks.
    Page = 6,
    /// Leader to follower: a page to be overwritten.
    Write = 7,
    /// Leader to follower: the id of the group in which their GPUs sum.
    Group = 8,
}

impl Kind {
    const ALL: [Self; 8] = [
        Self::Plan,
        Self::Part,
        Self::Sum,
        Self::Found,
        Self::Read,
        Self::Page,
        Self::Write,
        Self::Group,
    ];

    fn of(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

const HEADER_BYTES: usize = 5;

/// One end of a connection. Buffers are kept from frame to frame.
#[derive(Debug)]
pub struct Link {
    stream: TcpStream,
    /// The first rank at the other end.
    rank: usize,
    pulse: Pulse,
    frame: Vec<u8>,
    received: Vec<u8>,
}

impl Link {
    /// A link to the process whose first rank is `rank`. What breaks it is told to `pulse`.
    #[must_use]
    pub fn new(stream: TcpStream, rank: usize, pulse: Pulse) -> Self {
        Self { stream, rank, pulse, frame: Vec::new(), received: Vec::new() }
    }

    /// The first rank at the other end.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Everything failed; this is why. What the pulse knows already is nearer to the cause.
    fn broken(&self, cause: &str) -> RankLost {
        self.pulse.lose(RankLost::new(self.rank, cause))
    }

    /// The connection ended. A leader that leaves says so over the pulse's, which therefore stays
    /// open where it is the leader that closed.
    fn ended(&self, error: &io::Error) -> RankLost {
        if self.rank == 0 && is_closed(error) {
            return self.pulse.lose_work(RankLost::new(self.rank, said(error)));
        }
        self.broken(&said(error))
    }

    /// Sends one frame, which `write` appends to its argument.
    ///
    /// # Errors
    /// [`RankLost`]: the other end is gone, or the frame is too long to be told.
    pub fn send(&mut self, kind: Kind, write: impl FnOnce(&mut Vec<u8>)) -> Result<(), RankLost> {
        self.frame.clear();
        self.frame.extend([0, 0, 0, 0, kind as u8]);
        write(&mut self.frame);
        let Ok(len) = u32::try_from(self.frame.len() - HEADER_BYTES) else {
            return Err(self.broken("a frame for it is too long"));
        };
        self.frame[..4].copy_from_slice(&len.to_le_bytes());
        self.stream.write_all(&self.frame).map_err(|error| self.ended(&error))
    }

    /// Receives a frame of one of `kinds`, of at most `len_max` bytes.
    ///
    /// # Errors
    /// [`RankLost`]: the other end is gone, or sent something else.
    pub fn receive(&mut self, kinds: &[Kind], len_max: usize) -> Result<(Kind, &[u8]), RankLost> {
        let mut header = [0; HEADER_BYTES];
        if let Err(error) = self.stream.read_exact(&mut header) {
            return Err(self.ended(&error));
        }
        let len = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let Some(kind) = Kind::of(header[4]).filter(|kind| kinds.contains(kind)) else {
            return Err(self.broken("it sent a frame out of order"));
        };
        if len > len_max {
            return Err(self.broken("it sent a frame that is too long"));
        }
        self.received.resize(len, 0);
        if let Err(error) = self.stream.read_exact(&mut self.received) {
            return Err(self.ended(&error));
        }
        Ok((kind, &self.received))
    }

    /// The other end sent what cannot be understood.
    pub fn malformed(&self) -> RankLost {
        self.broken("it sent a malformed frame")
    }

    /// Receives exactly `values.len()` numbers in a frame of `kind`, and gives each to `take` with
    /// the value at its place.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub fn receive_floats(
        &mut self,
        kind: Kind,
        values: &mut [f32],
        take: impl Fn(&mut f32, f32),
    ) -> Result<(), RankLost> {
        let (_, bytes) = self.receive(&[kind], size_of_val(values))?;
        if bytes.len() != size_of_val(values) {
            return Err(self.malformed());
        }
        for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(4)) {
            take(value, f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
        }
        Ok(())
    }
}

/// Appends numbers, little-endian.
pub fn put_floats(out: &mut Vec<u8>, values: &[f32]) {
    out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

/// What an error says of the other end.
pub(super) fn said(error: &io::Error) -> String {
    match is_closed(error) {
        true => "its process has closed the connection".to_owned(),
        false => format!("its connection failed: {error}"),
    }
}

fn is_closed(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
    )
}
