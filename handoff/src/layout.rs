//! From one page layout to another: other page sizes, other tensor-parallel degrees.
//!
//! Between layouts of the same model and dtype an element keeps its bits; it only moves. Heads that
//! several ranks keep are read from the first of them and written to all.

use headstart_engine::{KvLayout, TokenId};

/// Why pages of one layout cannot become pages of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected} {what}, found {found}")]
pub struct LayoutMismatch {
    /// What differs.
    pub what: &'static str,
    /// The receiver's.
    pub expected: usize,
    /// The sender's.
    pub found: usize,
}

/// Whether pages of `from` can become pages of `to`.
///
/// # Errors
/// [`LayoutMismatch`] names the first difference that no re-laying bridges.
pub fn compatible(from: &KvLayout, to: &KvLayout) -> Result<(), LayoutMismatch> {
    let sizes = |layout: &KvLayout| {
        [
            ("layers", layout.layers),
            ("KV heads", layout.kv_heads),
            ("elements a head", layout.head_dim),
            ("bytes an element", layout.dtype.bytes()),
            // f16 and bf16 have the same size.
            ("as dtype", layout.dtype as usize),
        ]
    };
    for ((what, found), (_, expected)) in sizes(from).into_iter().zip(sizes(to)) {
        if found != expected {
            return Err(LayoutMismatch { what, expected, found });
        }
    }
    Ok(())
}

/// The rank that keeps a head first, and the head's place in it.
fn place(layout: &KvLayout, head: usize) -> (usize, usize) {
    (0..layout.tp)
        .find_map(|rank| {
            let heads = layout.heads(rank);
            heads.contains(&head).then(|| (rank, head - heads.start))
        })
        .unwrap_or((0, 0))
}

/// Where the bytes of `rank` begin in a page.
fn rank_start(layout: &KvLayout, rank: usize) -> usize {
    (0..rank).map(|rank| layout.layers * layout.layer_bytes(rank)).sum()
}

/// Copies the KV of `count` tokens, from slot `from_slot` of `source` on to slot `to_slot` of
/// `target` on. The slices are pages of [`compatible`] layouts.
///
/// # Panics
/// If a slice is no page of its layout, or the slots are not all in it.
pub fn copy_slots(
    (from, source, from_slot): (&KvLayout, &[u8], usize),
    (to, target, to_slot): (&KvLayout, &mut [u8], usize),
    count: usize,
) {
    assert!(from_slot + count <= from.page_size && to_slot + count <= to.page_size, "slots");
    assert!(source.len() == from.page_bytes() && target.len() == to.page_bytes(), "pages");
    let element = from.dtype.bytes();
    let row = from.head_dim * element;
    for rank in 0..to.tp {
        let to_rank = rank_start(to, rank);
        let heads = to.heads(rank);
        for (index, head) in heads.clone().enumerate() {
            let (source_rank, source_index) = place(from, head);
            let from_rank = rank_start(from, source_rank);
            let source_heads = from.heads(source_rank).len();
            for layer in 0..from.layers {
                let from_layer = from_rank + layer * from.layer_bytes(source_rank);
                let to_layer = to_rank + layer * to.layer_bytes(rank);
                let from_keys = from_layer + source_index * from.head_bytes();
                let to_keys = to_layer + index * to.head_bytes();
                for dim in 0..from.head_dim {
                    let a = from_keys + (dim * from.page_size + from_slot) * element;
                    let b = to_keys + (dim * to.page_size + to_slot) * element;
                    let bytes = count * element;
                    target[b..b + bytes].copy_from_slice(&source[a..a + bytes]);
                }
                let from_values = from_layer + (source_heads + source_index) * from.head_bytes();
                let to_values = to_layer + (heads.len() + index) * to.head_bytes();
                let a = from_values + from_slot * row;
                let b = to_values + to_slot * row;
                let bytes = count * row;
                target[b..b + bytes].copy_from_slice(&source[a..a + bytes]);
            }
        }
    }
}

/// A page in the receiver's layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelaidPage {
    /// Its index; 0 holds the first positions.
    pub index: usize,
    /// Its tokens, a page's size of them; of the last page maybe fewer.
    pub tokens: Vec<TokenId>,
    /// Its bytes.
    pub data: Vec<u8>,
}

/// Turns a stream of pages in one layout into pages of another. What is no full page yet waits,
/// for more or for the end.
#[derive(Debug)]
pub struct Relay {
    from: KvLayout,
    to: KvLayout,
    /// Tokens taken so far.
    taken: usize,
    tokens: Vec<TokenId>,
    page: Vec<u8>,
}

impl Relay {
    /// A relay between [`compatible`] layouts.
    ///
    /// # Errors
    /// [`LayoutMismatch`]
    pub fn new(from: KvLayout, to: KvLayout) -> Result<Self, LayoutMismatch> {
        compatible(&from, &to)?;
        Ok(Self { from, to, taken: 0, tokens: Vec::new(), page: Vec::new() })
    }

    /// Whether pages stay as they are.
    #[must_use]
    pub fn is_identity(&self) -> bool {
        self.from == self.to
    }

    /// Takes the source page that begins at `position`, and gives the pages that it completes. A
    /// position before the end takes back what was there; one in the middle of a target page that
    /// was given already is refused with `None`, as one that leaves a gap is.
    ///
    /// A source page with fewer tokens than the others is the last one.
    ///
    /// # Panics
    /// If `data` or `tokens` are not a source page's.
    pub fn push(
        &mut self,
        position: usize,
        tokens: Vec<TokenId>,
        data: Vec<u8>,
    ) -> Option<Vec<RelaidPage>> {
        assert!((1..=self.from.page_size).contains(&tokens.len()), "tokens of a source page");
        assert_eq!(data.len(), self.from.page_bytes(), "bytes of a source page");
        if position > self.taken || !position.is_multiple_of(self.from.page_size) {
            return None;
        }
        if self.is_identity() {
            self.taken = position + tokens.len();
            if tokens.len() < self.to.page_size {
                (self.tokens, self.page) = (tokens, data);
                return Some(Vec::new());
            }
            self.tokens.clear();
            return Some(vec![RelaidPage { index: position / self.from.page_size, tokens, data }]);
        }
        self.rewind(position)?;
        let mut full = Vec::new();
        let mut done = 0;
        while done < tokens.len() {
            let slot = self.taken % self.to.page_size;
            let count = (self.to.page_size - slot).min(tokens.len() - done);
            self.page.resize(self.to.page_bytes(), 0);
            copy_slots((&self.from, &data, done), (&self.to, &mut self.page, slot), count);
            self.tokens.extend_from_slice(&tokens[done..done + count]);
            self.taken += count;
            done += count;
            if self.tokens.len() == self.to.page_size {
                full.push(RelaidPage {
                    index: self.taken / self.to.page_size - 1,
                    tokens: std::mem::take(&mut self.tokens),
                    data: std::mem::take(&mut self.page),
                });
            }
        }
        Some(full)
    }

    /// What is left when nothing more comes: a page that is not full.
    pub fn rest(&mut self) -> Option<RelaidPage> {
        let (tokens, data) = (std::mem::take(&mut self.tokens), std::mem::take(&mut self.page));
        let index = self.taken / self.to.page_size;
        (!tokens.is_empty()).then_some(RelaidPage { index, tokens, data })
    }

    fn rewind(&mut self, position: usize) -> Option<()> {
        let start = self.taken - self.tokens.len();
        if position >= start {
            self.tokens.truncate(position - start);
        } else if position.is_multiple_of(self.to.page_size) {
            self.tokens.clear();
        } else {
            return None;
        }
        self.taken = position;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use headstart_engine::KvDtype;
    use proptest::prelude::*;

    use super::*;

    fn layout(page_size: usize, tp: usize, kv_heads: usize) -> KvLayout {
        KvLayout { page_size, layers: 2, kv_heads, head_dim: 3, dtype: KvDtype::F16, tp }
    }

    /// The two bytes of an element, from all that tells it apart.
    fn element(token: usize, layer: usize, value: bool, head: usize, dim: usize) -> [u8; 2] {
        let place = ((layer * 2 + usize::from(value)) * 16 + head) * 4 + dim;
        ((token * 251 + place * 31) as u16).to_le_bytes()
    }

    /// The page that holds the tokens from `first` on, straight from the layout's description.
    fn page(layout: &KvLayout, first: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for rank in 0..layout.tp {
            for layer in 0..layout.layers {
                for head in layout.heads(rank) {
                    for dim in 0..layout.head_dim {
                        for slot in 0..layout.page_size {
                            bytes.extend(element(first + slot, layer, false, head, dim));
                        }
                    }
                }
                for head in layout.heads(rank) {
                    for slot in 0..layout.page_size {
                        for dim in 0..layout.head_dim {
                            bytes.extend(element(first + slot, layer, true, head, dim));
                        }
                    }
                }
            }
        }
        assert_eq!(bytes.len(), layout.page_bytes());
        bytes
    }

    fn tokens(first: usize, count: usize) -> Vec<TokenId> {
        (first..first + count).map(|token| token as TokenId).collect()
    }

    #[test]
    fn what_differs_is_named() {
        let base = layout(16, 1, 4);
        let cases = [
            (KvLayout { layers: 3, ..base }, Some("layers")),
            (KvLayout { kv_heads: 5, ..base }, Some("KV heads")),
            (KvLayout { head_dim: 4, ..base }, Some("elements a head")),
            (KvLayout { dtype: KvDtype::F32, ..base }, Some("bytes an element")),
            (KvLayout { dtype: KvDtype::Bf16, ..base }, Some("as dtype")),
            (KvLayout { page_size: 3, tp: 4, ..base }, None),
        ];
        for (other, what) in cases {
            assert_eq!(compatible(&other, &base).err().map(|error| error.what), what);
        }
    }

    #[test]
    fn a_gap_and_a_step_back_into_a_page_that_is_out_are_refused() {
        let (from, to) = (layout(2, 1, 1), layout(4, 1, 1));
        let mut relay = Relay::new(from, to).expect("compatible");
        let mut push = |at| relay.push(at, tokens(at, 2), page(&from, at)).map(|pages| pages.len());
        assert_eq!(push(2), None, "a gap");
        assert_eq!([push(0), push(2), push(4)], [Some(0), Some(1), Some(0)]);
        assert_eq!(push(4), Some(0), "what is not out yet is taken back");
        assert_eq!(push(2), None, "the first two tokens of its page are gone");
        assert_eq!([push(0), push(2)], [Some(0), Some(1)], "whole pages are taken back");
    }

    proptest! {
        /// Pages that arrive are byte for byte what the other layout would have had, and come back
        /// as they were.
        #[test]
        fn every_layout_becomes_every_other(
            (from_size, to_size) in (1usize..20, 1usize..20),
            (from_tp, to_tp) in (
                prop::sample::select(vec![1usize, 2, 4]),
                prop::sample::select(vec![1usize, 2, 4]),
            ),
            kv_heads in 1usize..9,
            pages in 0usize..6,
            rest in 0usize..20,
        ) {
            let from = layout(from_size, from_tp, kv_heads);
            let to = layout(to_size, to_tp, kv_heads);
            let mut there = Relay::new(from, to).expect("compatible");
            let mut back = Relay::new(to, from).expect("compatible");
            let mut arrived = 0;
            let mut returned = 0;
            let known = pages * from_size + rest % from_size;
            for first in (0..known).step_by(from_size) {
                let count = from_size.min(known - first);
                let out = there.push(first, tokens(first, count), page(&from, first));
                for relaid in out.expect("in order") {
                    prop_assert_eq!(relaid.index, arrived);
                    let first = arrived * to_size;
                    prop_assert_eq!(&relaid.tokens, &tokens(first, to_size));
                    prop_assert_eq!(&relaid.data, &page(&to, first));
                    arrived += 1;
                    let out = back.push(first, relaid.tokens, relaid.data).expect("in order");
                    for again in out {
                        let first = returned * from_size;
                        prop_assert_eq!(&again.data, &page(&from, first));
                        returned += 1;
                    }
                }
            }
            prop_assert_eq!(arrived, known / to_size);
            let last = there.rest();
            prop_assert_eq!(last.is_some(), !known.is_multiple_of(to_size));
            if let Some(last) = last {
                let first = arrived * to_size;
                prop_assert_eq!(last.index, arrived);
                prop_assert_eq!(&last.tokens, &tokens(first, known - first));
                // Back in the other layout it is the same, as far as it goes.
                let count = known - first;
                let (mut one, mut two) = (vec![0; to.page_bytes()], vec![0; to.page_bytes()]);
                copy_slots((&to, &last.data, 0), (&to, &mut one, 0), count);
                copy_slots((&to, &page(&to, first), 0), (&to, &mut two, 0), count);
                prop_assert_eq!(one, two);
            }
            prop_assert_eq!(there.rest(), None);
            prop_assert_eq!(returned, arrived * to_size / from_size);
        }
    }
}
