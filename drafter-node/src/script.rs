//! The draft as it is written, and what of it has gone to the base and to the router. Plain state,
//! no IO.

use headstart_engine::{Finish, TokenId};
use headstart_proto::v1;
use headstart_proto::{Error, ErrorCode};
use headstart_text::Detokenizer;

/// The router hears of so many tokens at once: what it does not know of a lost draft is written
/// again, and that is cheap.
const NEWS_TOKENS: usize = 8;

/// What the base gets next. Positions are in the drafter's tokens.
#[derive(Debug, PartialEq)]
pub enum Piece {
    /// More of the draft.
    Tokens {
        /// Of the first one.
        position: u32,
        /// At least one, or the text that a cut character left at the end.
        tokens: v1::DraftTokens,
    },
    /// The draft is over.
    End {
        /// Its length.
        position: u32,
        /// Why.
        finish: Finish,
    },
}

/// See the [module](self).
#[derive(Debug)]
pub struct Script {
    /// Set when the draft travels as text.
    detokenizer: Option<Detokenizer>,
    /// Tokens that went through here, the ones the base had before included.
    taken: u32,
    /// Those of them that the base has or that are on their way to it.
    sent: u32,
    waiting: v1::DraftTokens,
    end: Option<Finish>,
    /// Text of tokens sent before, set when the draft ends in the middle of a character.
    tail: String,
    /// Tokens that the router knows.
    told: u32,
    /// Tokens that it does not know yet.
    untold: Vec<TokenId>,
}

impl Script {
    /// An empty draft, which travels as text if there is a detokenizer.
    #[must_use]
    pub fn new(detokenizer: Option<Detokenizer>) -> Self {
        Self {
            detokenizer,
            taken: 0,
            sent: 0,
            waiting: v1::DraftTokens::default(),
            end: None,
            tail: String::new(),
            told: 0,
            untold: Vec::new(),
        }
    }

    /// Goes on with a draft that the router knows as `prefix`, and of which the base has the first
    /// `drafted` tokens.
    pub fn start(&mut self, drafted: u32, prefix: &[TokenId]) {
        self.sent = drafted;
        for &id in prefix {
            self.take(id);
        }
        self.told = self.taken;
    }

    /// Takes the draft's next token.
    pub fn push(&mut self, id: TokenId) {
        self.take(id);
        self.untold.push(id);
    }

    /// The draft is over.
    pub fn end(&mut self, finish: Finish) {
        self.end = Some(finish);
        if let Some(detokenizer) = &mut self.detokenizer {
            self.tail = detokenizer.finish();
        }
    }

    /// Whether [`Self::end`] was called.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.end.is_some()
    }

    /// Whether there is something for the base.
    #[must_use]
    pub fn has_piece(&self) -> bool {
        self.waiting.count > 0 || self.end.is_some()
    }

    /// What the base gets next: everything that waits, a cut character's rest alone, then the end.
    ///
    /// # Errors
    /// [`ErrorCode::Protocol`] when the draft ended before what the base has of it.
    pub fn next_piece(&mut self) -> Result<Piece, Error> {
        let position = self.sent;
        if self.waiting.count > 0 {
            let tokens = std::mem::take(&mut self.waiting);
            self.sent = self.sent.saturating_add(tokens.count);
            return Ok(Piece::Tokens { position, tokens });
        }
        if self.taken < self.sent {
            let (taken, sent) = (self.taken, self.sent);
            let message = format!("the base has {sent} draft tokens, and there are only {taken}");
            return Err(Error::new(ErrorCode::Protocol, message));
        }
        if !self.tail.is_empty() {
            let text = std::mem::take(&mut self.tail);
            let tokens = v1::DraftTokens { count: 0, ids: Vec::new(), text };
            return Ok(Piece::Tokens { position, tokens });
        }
        Ok(Piece::End { position, finish: self.end.unwrap_or(Finish::Stop) })
    }

    /// Draft tokens that the base has or that are on their way to it.
    #[must_use]
    pub fn sent(&self) -> u32 {
        self.sent
    }

    /// Whether there is enough to tell the router.
    #[must_use]
    pub fn has_news(&self) -> bool {
        self.untold.len() >= NEWS_TOKENS
    }

    /// What the router does not know yet.
    pub fn news(&mut self) -> Vec<TokenId> {
        let ids = std::mem::take(&mut self.untold);
        self.told = self.told.saturating_add(u32::try_from(ids.len()).unwrap_or(u32::MAX));
        ids
    }

    /// Tokens that the router knows.
    #[must_use]
    pub fn told(&self) -> u32 {
        self.told
    }

    fn take(&mut self, id: TokenId) {
        let text = self.detokenizer.as_mut().map(|detokenizer| detokenizer.push(id));
        let new = self.taken >= self.sent;
        self.taken = self.taken.saturating_add(1);
        if !new {
            return;
        }
        self.waiting.count += 1;
        match text {
            Some(text) => self.waiting.text.push_str(&text),
            None => self.waiting.ids.push(id),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use headstart_text::ModelText;
    use proptest::prelude::*;

    use super::*;

    fn tokens(piece: Piece) -> (u32, Vec<u32>) {
        match piece {
            Piece::Tokens { position, tokens } => (position, tokens.ids),
            end @ Piece::End { .. } => panic!("{end:?}"),
        }
    }

    #[test]
    fn a_draft_goes_on_from_what_the_base_has() {
        // The router knows less than the base, as much, and more.
        for (prefix, drafted, expected) in [(2, 4, 4), (3, 3, 3), (5, 1, 1), (0, 0, 0)] {
            let draft: Vec<u32> = (10..20).collect();
            let mut script = Script::new(None);
            script.start(drafted, &draft[..prefix]);
            draft[prefix..].iter().for_each(|&id| script.push(id));
            script.end(Finish::Stop);
            let (position, ids) = tokens(script.next_piece().expect("sound"));
            assert_eq!((position, &ids[..]), (expected, &draft[expected as usize..]));
            let end = Piece::End { position: 10, finish: Finish::Stop };
            assert_eq!(script.next_piece().expect("sound"), end);
            assert_eq!((script.told() as usize, script.news()), (prefix, draft[prefix..].to_vec()));
            assert_eq!(script.told(), 10);
        }
        let mut script = Script::new(None);
        script.start(3, &[1]);
        script.end(Finish::Stop);
        assert_eq!(script.next_piece().expect_err("too short").code, ErrorCode::Protocol);
    }

    proptest! {
        /// However often a draft changes hands, the base gets its text once.
        #[test]
        fn text_is_said_once(
            ids in prop::collection::vec(3u32..259, 1..30),
            cuts in prop::collection::vec((0usize..30, 0usize..30), 0..4),
        ) {
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/stories260k");
            let text = ModelText::load(&root).expect("the fixture is whole");
            let tokenizer = text.tokenizer();
            let (mut heard, mut drafted) = (String::new(), 0);
            for (cut, known) in cuts {
                let mut script = Script::new(Some(Detokenizer::new(tokenizer)));
                let known = known.min(ids.len());
                script.start(drafted, &ids[..known]);
                ids[known..cut.min(ids.len()).max(known)].iter().for_each(|&id| script.push(id));
                if script.has_piece() {
                    let Ok(Piece::Tokens { position, tokens }) = script.next_piece() else {
                        panic!("tokens wait");
                    };
                    prop_assert_eq!(position, drafted);
                    heard.push_str(&tokens.text);
                    drafted += tokens.count;
                }
            }
            let mut script = Script::new(Some(Detokenizer::new(tokenizer)));
            script.start(drafted, &[]);
            ids.iter().for_each(|&id| script.push(id));
            script.end(Finish::Length);
            while let Piece::Tokens { tokens, .. } = script.next_piece().expect("sound") {
                heard.push_str(&tokens.text);
            }
            prop_assert_eq!(heard, tokenizer.decode(&ids));
        }
    }
}
