//! Frames: a length, a kind, and what the kind says; integers little-endian.
//!
//! | from | frame | payload |
//! |---|---|---|
//! | receiver | `Hello` | magic, version, request id, epoch, the receiver's descriptor |
//! | sender | `Accept` | version, the sender's descriptor |
//! | sender | `Refuse` | code, message; the last frame |
//! | sender | `Page` | position, checksum, tokens, bytes: as many as the descriptor says; of a last page maybe fewer tokens |
//! | sender | `Alive` | nothing is ready, but more will come |
//! | sender | `End` | pages in all; nothing changes any more |
//! | receiver | `Done` | everything is taken; the last frame |
//!
//! A length is checked against what the kind may have before a byte is allocated. The checksum is
//! CRC-32 over position, tokens and bytes.

use std::time::Duration;

use bytes::Buf;
use headstart_engine::{KvDtype, KvFormat, KvLayout, ModelHash, TokenId};
use headstart_proto::{Epoch, RequestId};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

/// The version of this protocol.
pub const VERSION: u8 = 2;
const MAGIC: [u8; 4] = *b"HSKV";
/// Bytes of a frame without a page, at most.
const CONTROL_BYTES_MAX: usize = 1024;
/// Bytes of a page, at most.
const PAGE_BYTES_MAX: usize = 256 << 20;
const MESSAGE_BYTES_MAX: usize = 256;
/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: usize = 32 + 5 * 4 + 1;

/// Why a sender gives nothing (more).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalCode {
    /// It speaks another version.
    Version,
    /// Its pages are another model's, or of another dtype or shape.
    Mismatch,
    /// It has no pages of this attempt.
    NotFound,
    /// A later attempt has taken this one's place.
    StaleEpoch,
    /// Too many read.
    Busy,
    /// The lease has ended.
    Expired,
}

impl RefusalCode {
    const ALL: [(Self, u8, &'static str); 6] = [
        (Self::Version, 1, "version"),
        (Self::Mismatch, 2, "mismatch"),
        (Self::NotFound, 3, "not_found"),
        (Self::StaleEpoch, 4, "stale_epoch"),
        (Self::Busy, 5, "busy"),
        (Self::Expired, 6, "expired"),
    ];

    /// A stable snake_case name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(code, ..)| *code == self).map_or("unknown", |(.., name)| name)
    }
}

/// A sender's last word.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {message}", code.as_str())]
pub struct Refusal {
    /// Why.
    pub code: RefusalCode,
    /// In words.
    pub message: String,
}

impl Refusal {
    /// A refusal; a long message is cut.
    pub fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        let mut message = message.into();
        message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
        Self { code, message }
    }
}

/// What came is no frame, or none that may come here.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The stream broke or ended.
    #[error("the stream broke: {0}")]
    Io(#[from] std::io::Error),
    /// A frame is malformed.
    #[error("malformed frame: {0}")]
    Malformed(&'static str),
    /// A page's checksum is wrong.
    #[error("a page is corrupt")]
    Corrupt,
}

/// A receiver's first frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The request whose pages are wanted.
    pub request_id: RequestId,
    /// The attempt that computed them.
    pub epoch: Epoch,
    /// What the receiver's own pages are.
    pub format: KvFormat,
}

/// A frame from the receiver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReceiverFrame {
    /// See [`Hello`].
    Hello(Hello),
    /// Of another version, whatever else it says.
    OtherVersion(u8),
    /// Everything is taken.
    Done,
}

/// A frame from the sender.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SenderFrame {
    /// What the sender's pages are.
    Accept(KvFormat),
    /// The sender's last word.
    Refuse(Refusal),
    /// A page.
    Page(PageFrame),
    /// More will come.
    Alive,
    /// Nothing changes any more.
    End {
        /// Pages in all.
        pages: u32,
    },
}

/// A page with its tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageFrame {
    /// The position of its first token.
    pub position: usize,
    /// Its tokens, a page's size of them; of a sequence's last page maybe fewer.
    pub tokens: Vec<TokenId>,
    /// Its bytes, in the sender's layout.
    pub data: Vec<u8>,
    /// How long its bytes were on their way; zero in a frame to be sent.
    pub receiving: Duration,
}

const HELLO: u8 = 1;
const ACCEPT: u8 = 2;
const REFUSE: u8 = 3;
const PAGE: u8 = 4;
const ALIVE: u8 = 5;
const END: u8 = 6;
const DONE: u8 = 7;

/// Sends a receiver's frame.
///
/// # Errors
/// When the stream broke.
pub async fn write_receiver(
    stream: &mut (impl AsyncWrite + Unpin),
    frame: &ReceiverFrame,
) -> std::io::Result<()> {
    let (kind, payload) = match frame {
        ReceiverFrame::Hello(hello) => {
            let mut payload = Vec::from(MAGIC);
            payload.push(VERSION);
            let id = hello.request_id.as_str().as_bytes();
            payload.push(id.len() as u8);
            payload.extend(id);
            payload.extend(hello.epoch.get().to_le_bytes());
            put_format(&mut payload, &hello.format);
            (HELLO, payload)
        }
        ReceiverFrame::OtherVersion(version) => (HELLO, [&MAGIC[..], &[*version]].concat()),
        ReceiverFrame::Done => (DONE, Vec::new()),
    };
    write_frame(stream, kind, &payload).await
}

/// Sends a sender's frame that is no page.
///
/// # Errors
/// When the stream broke.
pub async fn write_control(
    stream: &mut (impl AsyncWrite + Unpin),
    frame: &SenderFrame,
) -> std::io::Result<()> {
    let mut payload = Vec::new();
    let kind = match frame {
        SenderFrame::Accept(format) => {
            payload.push(VERSION);
            put_format(&mut payload, format);
            ACCEPT
        }
        SenderFrame::Refuse(refusal) => {
            let code = RefusalCode::ALL.iter().find(|(code, ..)| *code == refusal.code);
            payload.push(code.map_or(0, |(_, number, _)| *number));
            payload.extend(refusal.message.as_bytes());
            REFUSE
        }
        SenderFrame::Alive => ALIVE,
        SenderFrame::End { pages } => {
            payload.extend(pages.to_le_bytes());
            END
        }
        SenderFrame::Page(page) => {
            return write_page(stream, page.position, &page.tokens, &page.data).await;
        }
    };
    write_frame(stream, kind, &payload).await
}

/// Sends a page.
///
/// # Errors
/// When the stream broke.
pub async fn write_page(
    stream: &mut (impl AsyncWrite + Unpin),
    position: usize,
    tokens: &[TokenId],
    data: &[u8],
) -> std::io::Result<()> {
    let mut head = Vec::with_capacity(16 + 4 * tokens.len());
    let len = 1 + 4 + 4 + 4 * tokens.len() + data.len();
    head.extend((len as u32).to_le_bytes());
    head.push(PAGE);
    head.extend((position as u32).to_le_bytes());
    head.extend(checksum(position, tokens, data).to_le_bytes());
    tokens.iter().for_each(|token| head.extend(token.to_le_bytes()));
    // In one go: a head alone would wake the receiver for nothing.
    stream.write_all_buf(&mut Buf::chain(head.as_slice(), data)).await?;
    stream.flush().await
}

async fn write_frame(
    stream: &mut (impl AsyncWrite + Unpin),
    kind: u8,
    payload: &[u8],
) -> std::io::Result<()> {
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.extend((1 + payload.len() as u32).to_le_bytes());
    frame.push(kind);
    frame.extend(payload);
    stream.write_all(&frame).await?;
    stream.flush().await
}

/// Reads a receiver's frame.
///
/// # Errors
/// [`WireError`]
pub async fn read_receiver(
    stream: &mut (impl AsyncRead + Unpin),
) -> Result<ReceiverFrame, WireError> {
    let (kind, len) = read_head(stream).await?;
    let payload = read_payload(stream, len, CONTROL_BYTES_MAX).await?;
    match kind {
        HELLO => parse_hello(&payload),
        DONE if payload.is_empty() => Ok(ReceiverFrame::Done),
        _ => Err(WireError::Malformed("no receiver's frame")),
    }
}

/// Reads a sender's frame. `layout` is that of its pages, once it is known; until then no page may
/// come. `buffer` becomes the page's bytes.
///
/// # Errors
/// [`WireError`]
pub async fn read_sender(
    stream: &mut (impl AsyncRead + Unpin),
    layout: Option<&KvLayout>,
    buffer: Vec<u8>,
) -> Result<SenderFrame, WireError> {
    let (kind, len) = read_head(stream).await?;
    if kind == PAGE {
        let layout = layout.ok_or(WireError::Malformed("a page before the handshake"))?;
        return read_page(stream, len, layout, buffer).await;
    }
    let payload = read_payload(stream, len, CONTROL_BYTES_MAX).await?;
    let mut rest = Rest(&payload);
    match kind {
        ACCEPT => {
            if rest.byte()? != VERSION {
                return Err(WireError::Malformed("another version"));
            }
            let format = rest.format()?;
            rest.end()?;
            Ok(SenderFrame::Accept(format))
        }
        REFUSE => {
            let number = rest.byte()?;
            let known = RefusalCode::ALL.iter().find(|(_, other, _)| *other == number);
            let (code, ..) = known.ok_or(WireError::Malformed("an unknown refusal"))?;
            let message = std::str::from_utf8(rest.0);
            let message = message.map_err(|_| WireError::Malformed("a message that is no text"))?;
            Ok(SenderFrame::Refuse(Refusal::new(*code, message)))
        }
        ALIVE => rest.end().map(|()| SenderFrame::Alive),
        END => {
            let pages = rest.u32()?;
            rest.end()?;
            Ok(SenderFrame::End { pages })
        }
        _ => Err(WireError::Malformed("no sender's frame")),
    }
}

/// Reads a frame's kind and the length of its payload.
async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> Result<(u8, usize), WireError> {
    let mut head = [0; 5];
    stream.read_exact(&mut head).await?;
    let [a, b, c, d, kind] = head;
    match u32::from_le_bytes([a, b, c, d]) {
        0 => Err(WireError::Malformed("an empty frame")),
        len => Ok((kind, len as usize - 1)),
    }
}

async fn read_payload(
    stream: &mut (impl AsyncRead + Unpin),
    len: usize,
    len_max: usize,
) -> Result<Vec<u8>, WireError> {
    if len > len_max {
        return Err(WireError::Malformed("a frame that is too long"));
    }
    let mut payload = vec![0; len];
    stream.read_exact(&mut payload).await?;
    Ok(payload)
}

async fn read_page(
    stream: &mut (impl AsyncRead + Unpin),
    len: usize,
    layout: &KvLayout,
    mut data: Vec<u8>,
) -> Result<SenderFrame, WireError> {
    let page_bytes = layout.page_bytes();
    let head_bytes = len.saturating_sub(page_bytes);
    let count = head_bytes.saturating_sub(8) / 4;
    if head_bytes != 8 + 4 * count || !(1..=layout.page_size).contains(&count) {
        return Err(WireError::Malformed("a page of another size"));
    }
    let head = read_payload(stream, head_bytes, head_bytes).await?;
    let mut rest = Rest(&head);
    let position = rest.u32()? as usize;
    let sum = rest.u32()?;
    let tokens = (0..count).map(|_| rest.u32()).collect::<Result<Vec<_>, _>>()?;
    data.resize(page_bytes, 0);
    let started = Instant::now();
    stream.read_exact(&mut data).await?;
    let receiving = started.elapsed();
    if checksum(position, &tokens, &data) != sum {
        return Err(WireError::Corrupt);
    }
    Ok(SenderFrame::Page(PageFrame { position, tokens, data, receiving }))
}

fn checksum(position: usize, tokens: &[TokenId], data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&(position as u32).to_le_bytes());
    let tokens: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    hasher.update(&tokens);
    hasher.update(data);
    hasher.finalize()
}

fn put_format(out: &mut Vec<u8>, format: &KvFormat) {
    let KvLayout { page_size, layers, kv_heads, head_dim, dtype, tp } = format.layout;
    let before = out.len();
    out.extend(format.model.0);
    for number in [page_size, layers, kv_heads, head_dim, tp] {
        out.extend(u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
    }
    out.push(match dtype {
        KvDtype::F32 => 0,
        KvDtype::F16 => 1,
        KvDtype::Bf16 => 2,
    });
    debug_assert_eq!(out.len() - before, DESCRIPTOR_BYTES);
}

fn parse_hello(payload: &[u8]) -> Result<ReceiverFrame, WireError> {
    let mut rest = Rest(payload);
    if rest.bytes::<4>()? != MAGIC {
        return Err(WireError::Malformed("no KV receiver"));
    }
    let version = rest.byte()?;
    if version != VERSION {
        return Ok(ReceiverFrame::OtherVersion(version));
    }
    let id_len = usize::from(rest.byte()?);
    let id = std::str::from_utf8(rest.take(id_len)?).ok();
    let request_id = id.and_then(|id| RequestId::new(id).ok());
    let request_id = request_id.ok_or(WireError::Malformed("no request id"))?;
    let epoch = Epoch::new(u64::from_le_bytes(rest.bytes()?));
    let epoch = epoch.map_err(|_| WireError::Malformed("no epoch"))?;
    let format = rest.format()?;
    rest.end()?;
    Ok(ReceiverFrame::Hello(Hello { request_id, epoch, format }))
}

/// What is left of a payload.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let cut = self.0.split_at_checked(count);
        let (taken, rest) = cut.ok_or(WireError::Malformed("a frame that is too short"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8, WireError> {
        self.bytes::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn end(&self) -> Result<(), WireError> {
        match self.0 {
            [] => Ok(()),
            _ => Err(WireError::Malformed("a frame that is too long")),
        }
    }

    fn format(&mut self) -> Result<KvFormat, WireError> {
        let model = ModelHash(self.bytes()?);
        // No layout comes near these; they keep products of sizes inside a `usize`.
        let mut size = |max: u32| match self.u32()? {
            number if (1..=max).contains(&number) => Ok(number as usize),
            _ => Err(WireError::Malformed("a descriptor beyond all bounds")),
        };
        let (page_size, layers) = (size(4096)?, size(4096)?);
        let (kv_heads, head_dim, tp) = (size(4096)?, size(4096)?, size(1024)?);
        let dtype = match self.byte()? {
            0 => KvDtype::F32,
            1 => KvDtype::F16,
            2 => KvDtype::Bf16,
            _ => return Err(WireError::Malformed("an unknown dtype")),
        };
        let layout = KvLayout { page_size, layers, kv_heads, head_dim, dtype, tp };
        let head_bytes = layout.head_bytes();
        let heads = 2 * layers * kv_heads.max(tp);
        if head_bytes.checked_mul(heads).is_none_or(|bytes| bytes > PAGE_BYTES_MAX) {
            return Err(WireError::Malformed("pages beyond all bounds"));
        }
        Ok(KvFormat { model, layout })
    }
}
