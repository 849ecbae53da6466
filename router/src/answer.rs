//! Putting one answer together: base token ids in, text out. Stop strings work over the whole
//! answer, so text may be held back across tokens and across the switch; what comes out is still
//! cut by source, in order.

use std::collections::VecDeque;

use headstart_text::{Detokenizer, StopMatcher, Tokenizer};

use crate::frames::{Source, TokenLogprobs, TokenRun};

/// Part of an answer, all from one source. Text may be empty (its characters are still held back),
/// and so may the tokens (text that was held back, given out now).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Piece {
    /// Who wrote it.
    pub(crate) source: Source,
    /// Index in the answer of the first token here (of the next one, if there is none).
    pub(crate) position: u32,
    /// The text that is certain now.
    pub(crate) text: String,
    /// The tokens that arrived.
    pub(crate) ids: Vec<u32>,
    /// Empty, or one for each id.
    pub(crate) logprobs: Vec<TokenLogprobs>,
}

/// One answer under construction.
#[derive(Debug)]
pub(crate) struct Answer {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    /// Text that went into the stop matcher and has not come out: who wrote it, and its bytes.
    waiting: VecDeque<(Source, usize)>,
    tokens: u32,
    drafter_tokens: u32,
    /// Who wrote the last token.
    last: Source,
}

impl Answer {
    /// An empty answer in the base's tokens, which ends at any of `stops`. `first` is who begins it.
    pub(crate) fn new(tokenizer: &Tokenizer, stops: Vec<String>, first: Source) -> Self {
        Self {
            detokenizer: Detokenizer::new(tokenizer),
            stop: StopMatcher::new(stops),
            waiting: VecDeque::new(),
            tokens: 0,
            drafter_tokens: 0,
            last: first,
        }
    }

    /// Tokens of the answer so far.
    pub(crate) fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Those of them that a drafter wrote.
    pub(crate) fn drafter_tokens(&self) -> u32 {
        self.drafter_tokens
    }

    /// A stop string is complete; the answer ends before it.
    pub(crate) fn stopped(&self) -> bool {
        self.stop.stopped()
    }

    /// Takes more tokens and appends what is certain to `out`. Tokens after the one that completes
    /// a stop string are left out.
    pub(crate) fn push(&mut self, mut run: TokenRun, out: &mut Vec<Piece>) {
        let start = out.len();
        let mut taken = 0;
        for &id in &run.ids {
            taken += 1;
            let text = self.detokenizer.push(id);
            self.text(run.source, &text, run.position, out);
            if self.stop.stopped() {
                break;
            }
        }
        run.ids.truncate(taken);
        run.logprobs.truncate(taken);
        let count = u32::try_from(taken).unwrap_or(u32::MAX);
        self.tokens = run.position.saturating_add(count);
        if run.source == Source::Drafter {
            self.drafter_tokens = self.tokens;
        }
        self.last = run.source;
        // The tokens travel with their own source's text, or alone while that is held back.
        if out.len() == start || out[out.len() - 1].source != run.source {
            out.push(empty(run.source, run.position));
        }
        if let Some(piece) = out.last_mut() {
            piece.ids = run.ids;
            piece.logprobs = run.logprobs;
        }
    }

    /// Ends the answer: appends what was still held back to `out`.
    pub(crate) fn finish(&mut self, out: &mut Vec<Piece>) {
        let rest = self.detokenizer.finish();
        self.text(self.last, &rest, self.tokens, out);
        let held = self.stop.finish();
        self.release(&held, self.tokens, out);
    }

    /// Takes text of `source` and appends what became certain to `out`.
    fn text(&mut self, source: Source, text: &str, position: u32, out: &mut Vec<Piece>) {
        if text.is_empty() {
            return;
        }
        match self.waiting.back_mut() {
            Some((last, bytes)) if *last == source => *bytes += text.len(),
            _ => self.waiting.push_back((source, text.len())),
        }
        let certain = self.stop.push(text).text;
        self.release(&certain, position, out);
    }

    /// Appends `text`, the oldest waiting text, to `out`, cut by source.
    fn release(&mut self, mut text: &str, position: u32, out: &mut Vec<Piece>) {
        while !text.is_empty() {
            let Some((source, bytes)) = self.waiting.front_mut() else { return };
            let (source, taken) = (*source, text.len().min(*bytes));
            *bytes -= taken;
            if *bytes == 0 {
                self.waiting.pop_front();
            }
            let (now, later) = text.split_at(taken);
            match out.last_mut() {
                Some(piece) if piece.source == source && piece.ids.is_empty() => {
                    piece.text.push_str(now);
                }
                _ => out.push(Piece { text: now.to_owned(), ..empty(source, position) }),
            }
            text = later;
        }
    }
}

fn empty(source: Source, position: u32) -> Piece {
    Piece { source, position, text: String::new(), ids: Vec::new(), logprobs: Vec::new() }
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
