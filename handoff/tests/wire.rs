//! Frames come back as they were, and no bytes make either side panic or allocate without bound.

use std::time::Duration;

use headstart_engine::{KvDtype, KvFormat, KvLayout, ModelHash};
use headstart_handoff::wire::{
    Hello, PageFrame, ReceiverFrame, SenderFrame, VERSION, WireError, read_receiver, read_sender,
    write_control, write_receiver,
};
use headstart_handoff::{Refusal, RefusalCode};
use headstart_proto::{Epoch, RequestId};
use proptest::prelude::*;
use tokio::runtime::Runtime;

const LAYOUT: KvLayout =
    KvLayout { page_size: 4, layers: 2, kv_heads: 3, head_dim: 2, dtype: KvDtype::F16, tp: 2 };

fn format() -> KvFormat {
    KvFormat { model: ModelHash([9; 32]), layout: LAYOUT }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime")
}

fn sender_bytes(frame: &SenderFrame) -> Vec<u8> {
    let mut bytes = Vec::new();
    runtime().block_on(write_control(&mut bytes, frame)).expect("memory");
    bytes
}

fn receiver_bytes(frame: &ReceiverFrame) -> Vec<u8> {
    let mut bytes = Vec::new();
    runtime().block_on(write_receiver(&mut bytes, frame)).expect("memory");
    bytes
}

fn read(mut bytes: &[u8]) -> Result<SenderFrame, WireError> {
    runtime().block_on(read_sender(&mut bytes, Some(&LAYOUT), Vec::new()))
}

fn page() -> SenderFrame {
    let data = (0..LAYOUT.page_bytes()).map(|byte| byte as u8).collect();
    let receiving = Duration::ZERO;
    SenderFrame::Page(PageFrame { position: 8, tokens: vec![1, 2, 3, 4], data, receiving })
}

/// Of three tokens.
fn last_page() -> SenderFrame {
    let SenderFrame::Page(page) = page() else { unreachable!() };
    SenderFrame::Page(PageFrame { position: 12, tokens: vec![5, 6, 7], ..page })
}

fn frames() -> Vec<SenderFrame> {
    vec![
        SenderFrame::Accept(format()),
        SenderFrame::Refuse(Refusal::new(RefusalCode::Mismatch, "ä".repeat(400))),
        SenderFrame::Alive,
        SenderFrame::End { pages: 7 },
        page(),
        last_page(),
    ]
}

fn hello() -> ReceiverFrame {
    let request_id = RequestId::new("r-1").expect("a valid id");
    ReceiverFrame::Hello(Hello { request_id, epoch: Epoch::FIRST, format: format() })
}

#[test]
fn frames_come_back() {
    for frame in frames() {
        let mut found = read(&sender_bytes(&frame)).expect("whole");
        if let SenderFrame::Page(page) = &mut found {
            page.receiving = Duration::ZERO;
        }
        assert_eq!(found, frame);
    }
    for frame in [hello(), ReceiverFrame::OtherVersion(VERSION + 1), ReceiverFrame::Done] {
        let bytes = receiver_bytes(&frame);
        assert_eq!(runtime().block_on(read_receiver(&mut &bytes[..])).expect("whole"), frame);
    }
}

#[test]
fn a_length_is_checked_before_a_byte_is_taken() {
    for kind in 0..=255u8 {
        for len in [0, 2000, u32::MAX] {
            let mut bytes = len.to_le_bytes().to_vec();
            bytes.push(kind);
            assert!(matches!(read(&bytes), Err(WireError::Malformed(_))), "{kind} {len}");
        }
    }
    let SenderFrame::Page(good) = page() else { unreachable!() };
    for tokens in [0, 5] {
        let bad = PageFrame { tokens: vec![1; tokens], ..good.clone() };
        let bytes = sender_bytes(&SenderFrame::Page(bad));
        assert!(matches!(read(&bytes), Err(WireError::Malformed(_))), "{tokens} tokens");
    }
    let mut early = &sender_bytes(&page())[..];
    let early = runtime().block_on(read_sender(&mut early, None, Vec::new()));
    assert!(matches!(early, Err(WireError::Malformed(_))), "a page before the handshake");
}

proptest! {
    #[test]
    fn a_changed_page_is_corrupt(at in 5usize..1000, bit in 0u8..8) {
        let mut bytes = sender_bytes(&page());
        let at = 5 + at % (bytes.len() - 5);
        bytes[at] ^= 1 << bit;
        prop_assert!(matches!(read(&bytes), Err(WireError::Corrupt)));
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = read(&bytes);
        let _ = runtime().block_on(read_receiver(&mut &bytes[..]));
    }

    /// Nearly right frames reach further into the parsers.
    #[test]
    fn any_change_is_read_without_a_panic(
        which in 0usize..7,
        changes in prop::collection::vec((0usize..600, any::<u8>()), 1..6),
        cut in 0usize..600,
    ) {
        let mut bytes = match frames().get(which) {
            Some(frame) => sender_bytes(frame),
            None => receiver_bytes(&hello()),
        };
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        bytes.truncate(bytes.len().min(cut.max(5)));
        let _ = read(&bytes);
        let _ = runtime().block_on(read_receiver(&mut &bytes[..]));
    }
}
