//! The entry of an open handoff: which of a drafter's frames are part of its draft.

use headstart_proto::v1::{self, handoff_frame};
use headstart_proto::{Epoch, Error, ErrorCode, RequestId};

use crate::rendezvous::DraftInput;

/// What is expected of the frames of one handoff.
#[derive(Debug)]
pub struct DraftGate {
    id: RequestId,
    epoch: Epoch,
    position: u32,
}

impl DraftGate {
    /// A gate for the draft `epoch` of a request, of which `position` tokens are known, in the
    /// drafter's tokens.
    #[must_use]
    pub fn new(id: RequestId, epoch: Epoch, position: u32) -> Self {
        Self { id, epoch, position }
    }

    /// The request.
    #[must_use]
    pub fn id(&self) -> &RequestId {
        &self.id
    }

    /// The draft.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Draft tokens received, in the drafter's tokens.
    #[must_use]
    pub fn position(&self) -> u32 {
        self.position
    }

    /// Takes a frame: what it brings, or `None` for tokens that were seen already.
    ///
    /// # Errors
    /// A frame of another request or attempt, or one that leaves a gap, breaks the handoff.
    pub fn admit(&mut self, frame: v1::HandoffFrame) -> Result<Option<DraftInput>, Error> {
        if frame.request_id != self.id.as_str() || frame.epoch != self.epoch.get() {
            return Err(broken(format!(
                "expected frames of request {} attempt {}, found {} attempt {}",
                self.id, self.epoch, frame.request_id, frame.epoch
            )));
        }
        if frame.position > self.position {
            let (expected, found) = (self.position, frame.position);
            return Err(broken(format!("expected draft position {expected}, found {found}")));
        }
        match frame.event {
            Some(handoff_frame::Event::Tokens(_)) if frame.position < self.position => Ok(None),
            Some(handoff_frame::Event::Tokens(v1::DraftTokens { count, ids, text })) => {
                if !ids.is_empty() && ids.len() != count as usize {
                    return Err(broken(format!("expected {count} draft ids, found {}", ids.len())));
                }
                self.position = self.position.saturating_add(count);
                Ok(Some(if ids.is_empty() {
                    DraftInput::Text { count, text }
                } else {
                    DraftInput::Ids(ids)
                }))
            }
            Some(handoff_frame::Event::Ended(_)) => Ok(Some(DraftInput::Ended)),
            Some(handoff_frame::Event::Open(_)) | None => {
                Err(broken("expected draft tokens or the draft's end"))
            }
        }
    }
}

/// The drafter broke the protocol.
fn broken(message: impl Into<String>) -> Error {
    Error::new(ErrorCode::Protocol, message.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(position: u32, count: u32, ids: &[u32]) -> v1::HandoffFrame {
        let tokens = v1::DraftTokens { count, ids: ids.to_vec(), text: String::new() };
        let event = Some(handoff_frame::Event::Tokens(tokens));
        v1::HandoffFrame { request_id: "r".into(), epoch: 2, position, event }
    }

    #[test]
    fn a_draft_has_no_gap_and_nothing_twice() {
        let id = || RequestId::new("r").expect("an id");
        let epoch = Epoch::new(2).expect("an epoch");
        let mut gate = DraftGate::new(id(), epoch, 3);
        assert_eq!(gate.admit(tokens(0, 3, &[1, 2, 3])).unwrap(), None, "seen already");
        assert_eq!(gate.admit(tokens(3, 2, &[4, 5])).unwrap(), Some(DraftInput::Ids(vec![4, 5])));
        assert_eq!(gate.position(), 5);
        let foreign = v1::HandoffFrame { request_id: "other".into(), ..tokens(5, 1, &[6]) };
        let older = v1::HandoffFrame { epoch: 1, ..tokens(5, 1, &[6]) };
        let empty = v1::HandoffFrame { event: None, ..tokens(5, 1, &[6]) };
        for bad in [tokens(6, 1, &[6]), tokens(5, 2, &[6]), foreign, older, empty] {
            let mut gate = DraftGate::new(id(), epoch, 5);
            assert_eq!(gate.admit(bad).unwrap_err().code, ErrorCode::Protocol);
        }
    }
}
