//! Byte-pair merging of one piece of text, as the `tokenizers` crate does it, but for text that is still
//! growing: no cache, no whole-word shortcut, and with the tokens' lengths.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use crate::TextError;
use crate::spec::{DecoderKind, Spec};
use crate::vocab::{chars_of_bytes, fallback_byte};

/// A token and the bytes of text that it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unit {
    pub(crate) id: u32,
    pub(crate) bytes: usize,
}

/// The merges of a tokenizer, and the tokens that they start from.
#[derive(Debug)]
pub(crate) struct Merges {
    /// (left, right) → (rank, merged).
    pairs: HashMap<(u32, u32), (u32, u32)>,
    /// The tokens of single bytes. A byte without one leaves no trace in a byte-level model's tokens.
    bytes: Vec<Option<u32>>,
    /// The tokens of one character; none for a byte-level model, which starts from bytes.
    chars: Option<HashMap<char, u32>>,
}

impl Merges {
    /// The merges; none when text can become the "unknown" token.
    pub(crate) fn new(spec: &Spec) -> Result<Option<Self>, TextError> {
        let ids: HashMap<&str, u32> =
            spec.vocab.iter().map(|(text, id)| (text.as_str(), *id)).collect();
        let id_of = |text: &str| {
            ids.get(text).copied().ok_or_else(|| {
                TextError::tokenizer(
                    "model.merges",
                    "tokens of the vocabulary",
                    format!("{text:?}"),
                )
            })
        };
        let mut pairs = HashMap::with_capacity(spec.merges.len());
        for (rank, (left, right)) in spec.merges.iter().enumerate() {
            let merged = id_of(&format!("{left}{right}"))?;
            pairs.insert((id_of(left)?, id_of(right)?), (rank as u32, merged));
        }
        let byte_level = spec.decoder == DecoderKind::ByteLevel;
        let bytes: Vec<Option<u32>> = if byte_level {
            chars_of_bytes().iter().map(|c| ids.get(c.to_string().as_str()).copied()).collect()
        } else {
            (0..=255_u8).map(|byte| ids.get(format!("<{byte:#04X}>").as_str()).copied()).collect()
        };
        let all_text = match byte_level {
            true => spec.unk_token.is_none() && !spec.byte_fallback,
            false => spec.byte_fallback && bytes.iter().all(Option::is_some),
        };
        if !all_text {
            return Ok(None);
        }
        let chars = (!byte_level).then(|| one_char_tokens(&ids));
        Ok(Some(Self { pairs, bytes, chars }))
    }

    /// Whether tokens end at characters' ends only, but for bytes that stand for themselves.
    pub(crate) fn by_char(&self) -> bool {
        self.chars.is_some()
    }

    /// Whether some of these bytes have no token.
    pub(crate) fn loses(&self, piece: &[u8]) -> bool {
        piece.iter().any(|&byte| self.bytes[usize::from(byte)].is_none())
    }

    /// The tokens of a piece, given as bytes (valid UTF-8 unless the model is byte-level).
    pub(crate) fn encode(&self, piece: &[u8]) -> Vec<Unit> {
        let mut word = Word::new(self.symbols(piece));
        word.merge_all(&self.pairs);
        word.into_units()
    }

    fn symbols(&self, piece: &[u8]) -> Vec<Unit> {
        let byte = |&byte: &u8| self.bytes[usize::from(byte)].map(|id| Unit { id, bytes: 1 });
        let Some(chars) = &self.chars else { return piece.iter().filter_map(byte).collect() };
        let Ok(text) = std::str::from_utf8(piece) else {
            return piece.iter().filter_map(byte).collect();
        };
        let mut symbols = Vec::with_capacity(text.len());
        for c in text.chars() {
            match chars.get(&c) {
                Some(&id) => symbols.push(Unit { id, bytes: c.len_utf8() }),
                None => {
                    symbols.extend(c.encode_utf8(&mut [0; 4]).as_bytes().iter().filter_map(byte))
                }
            }
        }
        symbols
    }
}

fn one_char_tokens(ids: &HashMap<&str, u32>) -> HashMap<char, u32> {
    let one = |text: &str| {
        let mut chars = text.chars();
        chars.next().filter(|_| chars.next().is_none())
    };
    let tokens = ids.iter().filter(|(text, _)| fallback_byte(text).is_none());
    tokens.filter_map(|(text, id)| one(text).map(|c| (c, *id))).collect()
}

#[derive(Clone, Copy, Debug)]
struct Symbol {
    unit: Unit,
    prev: Option<usize>,
    next: Option<usize>,
    gone: bool,
}

/// A piece while it is merged: a linked list over a vector.
struct Word {
    symbols: Vec<Symbol>,
}

impl Word {
    fn new(units: Vec<Unit>) -> Self {
        let last = units.len().saturating_sub(1);
        let symbol = |(i, unit): (usize, Unit)| Symbol {
            unit,
            prev: i.checked_sub(1),
            next: (i < last).then_some(i + 1),
            gone: false,
        };
        Self { symbols: units.into_iter().enumerate().map(symbol).collect() }
    }

    /// Merges the lowest rank first, the leftmost of equal rank. An entry of the queue whose pair has
    /// changed meanwhile still counts if the new pair merges to the same token, as in the
    /// `tokenizers` crate.
    fn merge_all(&mut self, pairs: &HashMap<(u32, u32), (u32, u32)>) {
        let mut queue = BinaryHeap::with_capacity(self.symbols.len());
        for left in 0..self.symbols.len() {
            self.enqueue(left, pairs, &mut queue);
        }
        while let Some(Reverse((_, left, merged))) = queue.pop() {
            let Symbol { gone: false, next: Some(right), .. } = self.symbols[left] else {
                continue;
            };
            let pair = (self.symbols[left].unit.id, self.symbols[right].unit.id);
            if pairs.get(&pair).is_none_or(|&(_, id)| id != merged) {
                continue;
            }
            let after = self.symbols[right].next;
            let bytes = self.symbols[right].unit.bytes;
            self.symbols[right].gone = true;
            self.symbols[left].unit =
                Unit { id: merged, bytes: self.symbols[left].unit.bytes + bytes };
            self.symbols[left].next = after;
            if let Some(after) = after {
                self.symbols[after].prev = Some(left);
            }
            if let Some(before) = self.symbols[left].prev {
                self.enqueue(before, pairs, &mut queue);
            }
            self.enqueue(left, pairs, &mut queue);
        }
    }

    fn enqueue(
        &self,
        left: usize,
        pairs: &HashMap<(u32, u32), (u32, u32)>,
        queue: &mut BinaryHeap<Reverse<(u32, usize, u32)>>,
    ) {
        let Some(right) = self.symbols[left].next else { return };
        let pair = (self.symbols[left].unit.id, self.symbols[right].unit.id);
        if let Some(&(rank, merged)) = pairs.get(&pair) {
            queue.push(Reverse((rank, left, merged)));
        }
    }

    fn into_units(self) -> Vec<Unit> {
        self.symbols.into_iter().filter(|symbol| !symbol.gone).map(|symbol| symbol.unit).collect()
    }
}
