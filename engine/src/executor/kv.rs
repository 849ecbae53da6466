//! What a KV page looks like outside its executor, so that another one can take it over.

use std::fmt;
use std::ops::Range;

/// The type of a key's or value's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl KvDtype {
    /// Bytes of an element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// The layout of a KV page's bytes, little-endian:
/// `[rank][layer]{ keys [head][head_dim][page_size], values [head][page_size][head_dim] }`, where
/// a rank has the heads of [`KvLayout::heads`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvLayout {
    /// Tokens a page holds, at least 1.
    pub page_size: usize,
    /// Layers that keep keys and values, at least 1.
    pub layers: usize,
    /// KV heads a layer, over all ranks, at least 1.
    pub kv_heads: usize,
    /// Elements a head, at least 1.
    pub head_dim: usize,
    /// The type of an element.
    pub dtype: KvDtype,
    /// Tensor-parallel ranks, at least 1.
    pub tp: usize,
}

impl KvLayout {
    /// The KV heads that `rank` keeps: an even share of them, or, where there are fewer heads than
    /// ranks, one that neighbouring ranks keep as well.
    #[must_use]
    pub fn heads(&self, rank: usize) -> Range<usize> {
        if self.tp <= self.kv_heads {
            return even(self.kv_heads, self.tp, rank);
        }
        let shares = |head: &usize| even(self.tp, self.kv_heads, *head).contains(&rank);
        let head = (0..self.kv_heads).find(shares).unwrap_or(0);
        head..head + 1
    }

    /// Bytes of one head's keys, or values, of a page in one layer.
    #[must_use]
    pub fn head_bytes(&self) -> usize {
        self.head_dim * self.page_size * self.dtype.bytes()
    }

    /// Bytes of a page in one layer of `rank`.
    #[must_use]
    pub fn layer_bytes(&self, rank: usize) -> usize {
        2 * self.heads(rank).len() * self.head_bytes()
    }

    /// Bytes of a page.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        (0..self.tp).map(|rank| self.layers * self.layer_bytes(rank)).sum()
    }

    /// Bytes of keys and values that a token adds, each head counted once.
    #[must_use]
    pub fn token_bytes(&self) -> usize {
        2 * self.layers * self.kv_heads * self.head_dim * self.dtype.bytes()
    }
}

/// Part `index` of `size` things in `parts` parts, which differ by one at most, the larger first.
fn even(size: usize, parts: usize, index: usize) -> Range<usize> {
    let (each, more) = (size / parts, size % parts);
    let start = index * each + index.min(more);
    start..start + each + usize::from(index < more)
}

/// Names a model and the arithmetic it is run with: between equal hashes, the KV of the same tokens
/// is the same.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct ModelHash(pub [u8; 32]);

impl fmt::Display for ModelHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ModelHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModelHash({self})")
    }
}

/// Everything that decides whether one executor can use another's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvFormat {
    /// The model and its arithmetic.
    pub model: ModelHash,
    /// Where things are in a page.
    pub layout: KvLayout,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_share_the_heads_or_repeat_them() {
        let layout = |kv_heads, tp| KvLayout {
            page_size: 16,
            layers: 3,
            kv_heads,
            head_dim: 8,
            dtype: KvDtype::F16,
            tp,
        };
        let heads = |kv_heads, tp| -> Vec<Range<usize>> {
            (0..tp).map(|rank| layout(kv_heads, tp).heads(rank)).collect()
        };
        assert_eq!(heads(8, 2), [0..4, 4..8]);
        assert_eq!(heads(3, 2), [0..2, 2..3]);
        assert_eq!(heads(3, 4), [0..1, 0..1, 1..2, 2..3]);
        assert_eq!(heads(1, 2), [0..1, 0..1]);
        assert_eq!(heads(2, 4), [0..1, 0..1, 1..2, 1..2]);
        assert_eq!(layout(2, 1).page_bytes(), 3 * 2 * 2 * 16 * 8 * 2);
        assert_eq!(layout(2, 4).page_bytes(), 2 * layout(2, 1).page_bytes());
        assert_eq!(layout(2, 4).token_bytes() * 16, layout(2, 1).page_bytes());
    }
}
