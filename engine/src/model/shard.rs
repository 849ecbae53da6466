//! How a model is cut among tensor-parallel ranks (Megatron-LM, arXiv 1909.08053): attention by
//! heads, the MLP by its inner width, embedding and head by the vocabulary.
//!
//! Query, key, value, gate and up are cut by rows, output and down by columns, so that a rank's own
//! heads and its own part of the MLP need nothing of another rank, and the ranks' results are summed
//! once after attention and once after the MLP. Norms and whatever lies on the residual stream are
//! on every rank.

use std::fmt;
use std::ops::Range;

use super::config::ModelConfig;

/// One rank's place among the ranks of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Below `ranks`.
    pub rank: usize,
    /// At least 1.
    pub ranks: usize,
}

/// Why a model cannot be cut among so many ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyRanks {
    /// Ranks asked for.
    pub ranks: usize,
    /// The most that the model can be cut among.
    pub ranks_max: usize,
}

impl fmt::Display for TooManyRanks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ranks, ranks_max } = self;
        write!(f, "expected 1 to {ranks_max} tensor-parallel ranks for this model, found {ranks}")
    }
}

/// What of a model one rank holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Parts {
    /// Query heads; a multiple of the rank's key-value heads, in the model's order.
    pub(super) heads: Range<usize>,
    /// The key-value heads that those look at.
    pub(super) kv_heads: Range<usize>,
    /// Of the MLP's inner width.
    pub(super) mlp: Range<usize>,
    /// Tokens of the vocabulary.
    pub(super) vocab: Range<usize>,
}

impl Parts {
    /// The rank's own model: its own heads and its own part of the MLP's width.
    pub(super) fn config(&self, whole: &ModelConfig) -> ModelConfig {
        ModelConfig {
            heads: self.heads.len(),
            kv_heads: self.kv_heads.len(),
            intermediate_size: self.mlp.len(),
            ..whole.clone()
        }
    }
}

/// A part of one dimension of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) size: usize,
    pub(super) part: Range<usize>,
}

impl Cut {
    pub(super) fn all(size: usize) -> Self {
        Self { size, part: 0..size }
    }

    pub(super) fn of(size: usize, part: &Range<usize>) -> Self {
        Self { size, part: part.clone() }
    }

    /// The elements of heads `part` of `heads`, each `head_dim` wide.
    pub(super) fn heads(heads: usize, part: &Range<usize>, head_dim: usize) -> Self {
        Self { size: heads * head_dim, part: part.start * head_dim..part.end * head_dim }
    }

    /// Whether nothing is cut off.
    pub(super) fn is_all(&self) -> bool {
        self.part.len() == self.size
    }
}

/// The MLP and the vocabulary are cut at multiples of the largest of these that leaves each rank
/// one: the longest blocks of quantised weights, then the shorter ones, then what a GPU's kernels read
/// together, then anywhere.
const GRAINS: [usize; 5] = [256, 32, 16, 8, 1];

impl Shard {
    /// All of the model.
    pub const WHOLE: Self = Self { rank: 0, ranks: 1 };

    /// What this rank holds of a model.
    ///
    /// # Errors
    /// The model has fewer query heads, or another smaller size, than ranks.
    pub(super) fn parts(self, config: &ModelConfig) -> Result<Parts, TooManyRanks> {
        let ranks_max = config.heads.min(config.intermediate_size).min(config.vocab_size);
        if self.ranks == 0 || self.ranks > ranks_max || self.rank >= self.ranks {
            return Err(TooManyRanks { ranks: self.ranks, ranks_max });
        }
        let (heads, kv_heads) = self.heads(config.heads, config.kv_heads);
        Ok(Parts {
            heads,
            kv_heads,
            mlp: self.grains(config.intermediate_size),
            vocab: self.grains(config.vocab_size),
        })
    }

    /// Whole groups of query heads where there are as many groups as ranks; otherwise several ranks
    /// share a group, and each holds the group's key-value head.
    fn heads(self, heads: usize, kv_heads: usize) -> (Range<usize>, Range<usize>) {
        let group = heads / kv_heads;
        if self.ranks <= kv_heads {
            let kv = even(kv_heads, self.ranks, self.rank);
            return (kv.start * group..kv.end * group, kv);
        }
        // Group `g` has the ranks `shared(g)`; none gets more ranks than it has heads, since there
        // are no more ranks than heads and both are dealt out evenly.
        let shared = |g| even(self.ranks, kv_heads, g);
        let kv = (0..kv_heads).find(|&g| shared(g).contains(&self.rank)).unwrap_or(0);
        let within = even(group, shared(kv).len(), self.rank - shared(kv).start);
        (kv * group + within.start..kv * group + within.end, kv..kv + 1)
    }

    fn grains(self, size: usize) -> Range<usize> {
        let fits = |grain: &usize| size.is_multiple_of(*grain) && size / grain >= self.ranks;
        let grain = GRAINS.into_iter().find(fits).unwrap_or(1);
        let part = even(size / grain, self.ranks, self.rank);
        part.start * grain..part.end * grain
    }
}

/// Part `index` of `size` things in `parts` parts, which differ by one at most, the larger first.
fn even(size: usize, parts: usize, index: usize) -> Range<usize> {
    let (each, more) = (size / parts, size % parts);
    let start = index * each + index.min(more);
    start..start + each + usize::from(index < more)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn heads_table() {
        // heads, kv_heads, ranks => query heads / key-value heads of each rank
        let cases = [
            (8, 4, 2, "0..4/0..2 4..8/2..4"),
            (9, 3, 2, "0..6/0..2 6..9/2..3"),
            (9, 3, 4, "0..2/0..1 2..3/0..1 3..6/1..2 6..9/2..3"),
            (12, 2, 4, "0..3/0..1 3..6/0..1 6..9/1..2 9..12/1..2"),
            (4, 1, 4, "0..1/0..1 1..2/0..1 2..3/0..1 3..4/0..1"),
        ];
        for (heads, kv_heads, ranks, expected) in cases {
            let of = |rank| {
                let (q, kv) = Shard { rank, ranks }.heads(heads, kv_heads);
                format!("{q:?}/{kv:?}")
            };
            let found: Vec<String> = (0..ranks).map(of).collect();
            assert_eq!(found.join(" "), expected, "{heads} heads, {kv_heads}, {ranks} ranks");
        }
    }

    #[test]
    fn widths_are_cut_at_blocks_where_they_can_be() {
        let mlp = |size, rank, ranks| Shard { rank, ranks }.grains(size);
        assert_eq!((mlp(1536, 0, 4), mlp(1536, 3, 4)), (0..512, 1280..1536));
        assert_eq!((mlp(320, 0, 4), mlp(320, 3, 4)), (0..96, 256..320));
        assert_eq!((mlp(48, 0, 4), mlp(48, 3, 4)), (0..16, 40..48));
        assert_eq!((mlp(7, 0, 2), mlp(7, 1, 2)), (0..4, 4..7));
    }

    proptest! {
        /// Every query head and every unit belongs to one rank, and sees its own key-value head.
        #[test]
        fn ranks_share_everything(
            kv_heads in 1usize..9, group in 1usize..9, mlp in 1usize..5000, ranks in 1usize..17,
        ) {
            let heads = kv_heads * group;
            prop_assume!(ranks <= heads && ranks <= mlp);
            let (mut next_head, mut next_unit) = (0, 0);
            for rank in 0..ranks {
                let shard = Shard { rank, ranks };
                let (q, kv) = shard.heads(heads, kv_heads);
                prop_assert!(q.start == next_head && !q.is_empty());
                prop_assert!(q.len().is_multiple_of(kv.len()));
                let each = q.len() / kv.len();
                for (i, head) in q.clone().enumerate() {
                    prop_assert_eq!(kv.start + i / each, head / group);
                }
                next_head = q.end;
                let units = shard.grains(mlp);
                prop_assert!(units.start == next_unit && !units.is_empty());
                next_unit = units.end;
            }
            prop_assert_eq!((next_head, next_unit), (heads, mlp));
        }
    }
}
