//! Encoding of text that is still growing: a token is given out as soon as no further text can change it.
//!
//! The stages are the tokenizer's own, each with a rule for what is certain:
//!
//! 1. **Added tokens** are found in the raw text, leftmost first, the longest. Text from the first place
//!    on that may still become one is held back ([`crate::added`]).
//! 2. **Normalisation.** `▁` for spaces is character by character. Under NFC the text before a character
//!    that begins a new normalisation segment (a starter that never combines with what precedes it) is
//!    final; that character itself is not, unless it never combines with what follows it either.
//! 3. **Pre-tokens** ([`Stream::pre_token`]). The known patterns look at most at the white-space run that
//!    follows a pre-token and the character behind it: with that the pre-token is final. An apostrophe
//!    may become a contraction of three characters (`'l` + `l`) and waits for one character more. A
//!    pre-token that is not final can only grow, as long as the text does not end in white
//!    space: every class of the patterns is a run that more of the same prolongs, and a contraction
//!    (`'` → `'ll`) contains what it replaces. White space at the end is held back.
//! 4. **Merging** within a pre-token that may grow ([`Stream::certain`]). Any contiguous part of the
//!    tokens of a piece is the encoding of its own bytes, because merges never cross a boundary that is
//!    there in the end. So whatever follows, the tokens begin with the encoding of `text[..b]`, where `b`
//!    is the end of the last token that ends within the text, and then `text[b..]` is empty or the
//!    beginning of a longer token. Certain is what the encodings for all those `b` have in common. That
//!    lets text without spaces stream, and a tokenizer that does not cut its text at all.

use std::sync::Arc;

use tokenizers::{NormalizedString, Normalizer};
use unicode_normalization::char::canonical_combining_class;
use unicode_normalization::{IsNormalized, is_nfc_quick};

use crate::TextError;
use crate::added::{AddedTokens, Found};
use crate::bpe::{Merges, Unit};
use crate::pipeline::{Pipeline, Prepend, Split};
use crate::vocab::Vocab;

/// An open piece that has grown this long without a certain token is looked at again only when it is a
/// quarter longer, so that the work stays linear in the text.
const OPEN_BYTES_EAGER: usize = 1024;
/// How far into a long pre-token the pattern's start is moved up behind the certain tokens.
const RESCAN_BYTES: usize = 256;
/// No contraction is longer, so what is longer and ends in a letter is a run of letters.
const CONTRACTION_CHARS: usize = 3;
/// Finished text is forgotten in steps of this size.
const FORGET_BYTES: usize = 4096;

/// What a stream needs of a tokenizer.
pub(crate) struct Encoder {
    pub(crate) pipeline: Pipeline,
    pub(crate) merges: Merges,
    pub(crate) added: AddedTokens,
    pub(crate) vocab: Arc<Vocab>,
    pub(crate) ignore_merges: bool,
}

/// Where in a text a stream begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// At its very start.
    Text,
    /// In its middle, at a place where two tokens meet for certain.
    Middle,
}

/// A text on its way through the stages.
#[derive(Clone)]
pub(crate) struct Stream {
    encoder: Arc<Encoder>,
    /// Raw text that may hold an added token.
    raw: String,
    /// Raw text of this stretch (between added tokens) that normalisation may still change.
    raw_tail: String,
    /// Whether nothing of this stretch has been normalised yet.
    at_stretch: bool,
    at_text: bool,
    /// Normalised text of this stretch.
    text: String,
    /// Where in `text` the first pre-token that is not final begins; the pattern is matched from here.
    scan: usize,
    /// Up to where in `text` tokens have been given out; not before `scan`.
    done: usize,
    /// Whether a part of the pre-token at `scan` has been given out.
    opened: bool,
    /// Where in `text` the next digit is, if one has been found, and how far was looked.
    digit: Option<usize>,
    digit_searched: usize,
    /// The length of the open piece when it was last looked at in vain.
    open_bytes: usize,
    unclear: bool,
}

impl Stream {
    pub(crate) fn new(encoder: &Arc<Encoder>, start: Start) -> Self {
        Self {
            encoder: encoder.clone(),
            raw: String::new(),
            raw_tail: String::new(),
            at_stretch: start == Start::Text,
            at_text: start == Start::Text,
            text: String::new(),
            scan: 0,
            done: 0,
            opened: false,
            digit: None,
            digit_searched: 0,
            open_bytes: 0,
            unclear: false,
        }
    }

    /// Whether something came up that only the whole text can decide; no more tokens are given out.
    pub(crate) fn unclear(&self) -> bool {
        self.unclear
    }

    /// Takes more text and appends the tokens that are certain now.
    pub(crate) fn push(&mut self, text: &str, out: &mut Vec<u32>) -> Result<(), TextError> {
        self.raw.push_str(text);
        self.find_added(false, out)
    }

    /// Appends all tokens that are left; no more text comes.
    pub(crate) fn close(&mut self, out: &mut Vec<u32>) -> Result<(), TextError> {
        self.find_added(true, out)?;
        if self.unclear {
            return Ok(());
        }
        self.close_stretch(out)
    }

    /// After something unclear: appends the tokens of the text before it as if it ended there, and
    /// returns the text from there on.
    pub(crate) fn close_before_unclear(&mut self, out: &mut Vec<u32>) -> Result<String, TextError> {
        self.close_stretch(out)?;
        Ok(std::mem::take(&mut self.raw))
    }

    /// Stage 1.
    fn find_added(&mut self, closed: bool, out: &mut Vec<u32>) -> Result<(), TextError> {
        let raw = std::mem::take(&mut self.raw);
        let mut from = 0;
        while !self.unclear {
            match self.encoder.clone().added.find(&raw[from..], closed) {
                Found::TextTo(end) => {
                    self.normalise(&raw[from..from + end], out)?;
                    from += end;
                    break;
                }
                Found::Unclear(start) => {
                    self.normalise(&raw[from..from + start], out)?;
                    from += start;
                    self.unclear = true;
                }
                Found::Token { start, end, id } => {
                    self.normalise(&raw[from..from + start], out)?;
                    self.close_stretch(out)?;
                    out.push(id);
                    self.begin_stretch();
                    from += end;
                }
            }
        }
        self.raw.push_str(&raw[from..]);
        Ok(())
    }

    fn begin_stretch(&mut self) {
        self.at_stretch = true;
        self.at_text = false;
    }

    fn close_stretch(&mut self, out: &mut Vec<u32>) -> Result<(), TextError> {
        let tail = std::mem::take(&mut self.raw_tail);
        let tail = self.normalised(&tail)?;
        self.append(&tail);
        self.advance(true, out);
        self.text.clear();
        self.scan = 0;
        self.done = 0;
        self.opened = false;
        self.digit = None;
        self.digit_searched = 0;
        self.open_bytes = 0;
        Ok(())
    }

    /// Stage 2.
    fn normalise(&mut self, raw: &str, out: &mut Vec<u32>) -> Result<(), TextError> {
        if raw.is_empty() {
            return Ok(());
        }
        if self.encoder.pipeline.nfc {
            self.raw_tail.push_str(raw);
            let ready = match self.raw_tail.chars().next_back() {
                Some(last) if never_combines(last) => self.raw_tail.len(),
                _ => {
                    let last = self.raw_tail.char_indices().rev().find(|(_, c)| begins_segment(*c));
                    last.map_or(0, |(i, _)| i)
                }
            };
            let keep = self.raw_tail.split_off(ready);
            let ready = std::mem::replace(&mut self.raw_tail, keep);
            let ready = self.normalised(&ready)?;
            self.append(&ready);
        } else {
            self.append(raw);
        }
        self.advance(false, out);
        Ok(())
    }

    fn normalised(&self, raw: &str) -> Result<String, TextError> {
        if !self.encoder.pipeline.nfc || is_nfc_quick(raw.chars()) == IsNormalized::Yes {
            return Ok(raw.to_owned());
        }
        // The tokenizer's own normaliser, whose Unicode version may not be ours.
        let mut text = NormalizedString::from(raw);
        let normaliser = tokenizers::normalizers::unicode::NFC;
        normaliser.normalize(&mut text).map_err(|e| TextError::Encode(e.to_string()))?;
        Ok(text.get().to_owned())
    }

    fn append(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        let pipeline = &self.encoder.pipeline;
        if self.at_stretch {
            let marked = text.starts_with([' ', '▁']);
            let prepend = match pipeline.prepend {
                Prepend::Never => false,
                Prepend::Always => true,
                Prepend::Unless => !marked,
                Prepend::UnlessFirst => !marked && self.at_text,
            };
            if prepend {
                self.text.push('▁');
            }
            self.at_stretch = false;
            self.at_text = false;
        }
        if pipeline.metaspace {
            self.text.extend(text.chars().map(|c| if c == ' ' { '▁' } else { c }));
        } else {
            self.text.push_str(text);
        }
    }

    /// Stages 3 and 4.
    fn advance(&mut self, closed: bool, out: &mut Vec<u32>) {
        let by_pattern = matches!(self.encoder.pipeline.split, Split::Pattern { .. });
        let len = if closed || !by_pattern { self.text.len() } else { self.text.trim_end().len() };
        while self.scan < len {
            let (end, last) = self.pre_token(len);
            if closed || !last {
                self.finish_pre_token(end, out);
                continue;
            }
            self.open_pre_token(end, out);
            break;
        }
        if self.scan > FORGET_BYTES {
            self.forget();
        }
    }

    /// Where the pre-token at `scan` ends, and whether more text may change that.
    fn pre_token(&mut self, len: usize) -> (usize, bool) {
        let encoder = self.encoder.clone();
        let (regex, digits_apart) = match &encoder.pipeline.split {
            Split::Whole => return (len, true),
            Split::Metaspace => {
                let rest = &self.text[self.scan..len];
                let next = rest.char_indices().skip(1).find(|(_, c)| *c == '▁');
                return next.map_or((len, true), |(i, _)| (self.scan + i, false));
            }
            Split::Pattern { regex, digits_apart } => (regex, *digits_apart),
        };
        let mut limit = len;
        if digits_apart {
            match self.next_digit() {
                Some(at) if at == self.scan => {
                    let digit = self.text[at..].chars().next().map_or(1, char::len_utf8);
                    return (at + digit, false);
                }
                Some(at) => limit = at.min(len),
                None => {}
            }
        }
        let found = regex.find_iter(&self.text[self.scan..limit]).next();
        // A text that the pattern does not match is one pre-token up to where it does.
        let end = match found {
            Some((0, end)) if end > 0 => self.scan + end,
            Some((start, _)) if start > 0 => self.scan + start,
            _ => limit,
        };
        (end, self.may_change(end, len))
    }

    fn may_change(&self, end: usize, len: usize) -> bool {
        let ahead = usize::from(self.text[self.scan..].starts_with('\''));
        self.text[end..len].trim_start().chars().nth(ahead).is_none()
    }

    fn next_digit(&mut self) -> Option<usize> {
        if self.digit.is_none_or(|at| at < self.scan) {
            let from = self.digit_searched.max(self.scan);
            self.digit = self.text[from..].find(char::is_numeric).map(|i| from + i);
            self.digit_searched = self.digit.unwrap_or(self.text.len());
        }
        self.digit
    }

    fn finish_pre_token(&mut self, end: usize, out: &mut Vec<u32>) {
        if self.done < end {
            let piece = &self.text.as_bytes()[self.done..end];
            let whole = self.encoder.ignore_merges && !self.opened;
            match whole.then(|| self.encoder.vocab.exact(piece)).flatten() {
                Some(id) => out.push(id),
                None => out.extend(self.encoder.merges.encode(piece).iter().map(|unit| unit.id)),
            }
        }
        self.done = end;
        self.scan = end;
        self.opened = false;
        self.open_bytes = 0;
    }

    fn open_pre_token(&mut self, end: usize, out: &mut Vec<u32>) {
        let bytes = end - self.done;
        let eager = bytes < OPEN_BYTES_EAGER || bytes >= self.open_bytes + self.open_bytes / 4;
        if bytes == 0 || !eager {
            return;
        }
        let units = self.certain(end);
        self.open_bytes = if units.is_empty() { bytes } else { 0 };
        for unit in units {
            out.push(unit.id);
            self.done += unit.bytes;
            self.opened = true;
        }
        self.move_scan(end);
    }

    /// The tokens of the open piece that any continuation begins with.
    fn certain(&self, end: usize) -> Vec<Unit> {
        let encoder = &self.encoder;
        let piece = &self.text.as_bytes()[self.done..end];
        let could_be_whole = encoder.ignore_merges
            && !self.opened
            && (encoder.vocab.has_longer(piece) || encoder.vocab.exact(piece).is_some());
        let unlike_its_tokens = !encoder.merges.by_char() && encoder.merges.loses(piece);
        if could_be_whole || unlike_its_tokens || encoder.vocab.has_longer(piece) {
            return Vec::new();
        }
        let mut units = encoder.merges.encode(piece);
        let mut common = units.len();
        let from = piece.len().saturating_sub(encoder.vocab.key_bytes_max());
        for cut in from.max(1)..piece.len() {
            let at_char = !encoder.merges.by_char() || self.text.is_char_boundary(self.done + cut);
            if at_char && encoder.vocab.has_longer(&piece[cut..]) {
                let other = encoder.merges.encode(&piece[..cut]);
                common = units.iter().zip(&other).take(common).take_while(|(a, b)| a == b).count();
            }
            if common == 0 {
                break;
            }
        }
        units.truncate(common);
        self.whole_chars(units)
    }

    /// Leaves out, from the end, fallback bytes of a character that are not all there.
    fn whole_chars(&self, mut units: Vec<Unit>) -> Vec<Unit> {
        let mut at = self.done + units.iter().map(|unit| unit.bytes).sum::<usize>();
        while self.encoder.merges.by_char() && !self.text.is_char_boundary(at) {
            let Some(unit) = units.pop() else { break };
            at -= unit.bytes;
        }
        units
    }

    /// Moves the pattern's start up to the certain tokens, where that cannot change what it matches.
    fn move_scan(&mut self, end: usize) {
        if !matches!(self.encoder.pipeline.split, Split::Pattern { .. }) {
            self.scan = self.done;
            return;
        }
        if self.done - self.scan < RESCAN_BYTES {
            return;
        }
        let mut to = self.done;
        while !self.text.is_char_boundary(to) {
            to -= 1;
        }
        let long = self.text[self.scan..to].chars().nth(CONTRACTION_CHARS).is_some();
        if long && self.encoder.pipeline.same_run.find_iter(&self.text[to..end]).next().is_some() {
            self.scan = to;
        }
    }

    fn forget(&mut self) {
        self.text.drain(..self.scan);
        self.done -= self.scan;
        self.digit = self.digit.and_then(|at| at.checked_sub(self.scan));
        self.digit_searched = self.digit_searched.saturating_sub(self.scan);
        self.scan = 0;
    }
}

/// Whether NFC never joins this character to, or moves it before, what precedes it.
fn begins_segment(c: char) -> bool {
    canonical_combining_class(c) == 0 && is_nfc_quick(std::iter::once(c)) == IsNormalized::Yes
}

/// Whether NFC leaves this character as it is, whatever stands around it. Of ASCII, letters and three
/// signs are the first part of composed characters (`≮`, `≠`, `≯`); ideographs are of none.
fn never_combines(c: char) -> bool {
    let composes = c.is_ascii_alphabetic() || matches!(c, '<' | '=' | '>');
    c.is_ascii() && !composes || matches!(c, '\u{4e00}'..='\u{9fff}')
}

impl Encoder {
    /// Whether two tokens always meet between a letter and a space.
    pub(crate) fn splits_at_spaces(&self) -> bool {
        match self.pipeline.split {
            Split::Pattern { .. } | Split::Metaspace => true,
            Split::Whole => !self.vocab.has_inner_metaspace(),
        }
    }
}
