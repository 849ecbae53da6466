//! Causal attention over paged keys and values: grouped queries, online softmax, optional sliding
//! window and logit soft cap.
//!
//! The keys of a query are reduced in blocks of 64 by absolute position, blocks are joined within
//! segments of [`SEGMENT`] positions and segments in ascending order. So a query's result does not
//! depend on the batch, on the threads, or on how its prompt was cut into calls.

mod kernel;
mod kv;
mod lanes;

pub use kv::{KvPool, KvShape, KvSlot};

use crate::ThreadPool;
use crate::pool::SendPtr;
use kernel::{Block, QUERIES, State};

/// Positions whose keys form one independent partial softmax.
pub(crate) const SEGMENT: usize = 256;

/// New tokens of one sequence within a batch.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSeq<'a> {
    /// The batch row of the first new token.
    pub row: usize,
    /// How many rows, one a token.
    pub rows: usize,
    /// The absolute position of the first new token. Keys and values of `0..start + rows` are in
    /// the pages (of a sliding window: those in reach).
    pub start: usize,
    /// The page table: position `p` is in `pages[p / page_size]`.
    pub pages: &'a [u32],
}

/// What [`paged_attention`] works on.
#[derive(Debug)]
pub struct AttentionArgs<'a> {
    /// Keys and values.
    pub kv: &'a KvPool,
    /// The layer.
    pub layer: usize,
    /// Query heads, a multiple of the KV heads; query head `h` reads KV head
    /// `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Queries, `[m][heads * head_dim]`.
    pub q: &'a [f32],
    /// The sequences; their rows do not overlap.
    pub seqs: &'a [AttentionSeq<'a>],
    /// What scores are multiplied with, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Scores become `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// A query at `p` sees keys at `p - window + 1 ..= p` only.
    pub window: Option<usize>,
    /// Results, `[m][heads * head_dim]`; rows of no sequence are left alone.
    pub out: &'a mut [f32],
}

/// A piece of work: up to [`QUERIES`] neighbouring rows of a sequence and some heads of one group.
#[derive(Clone, Copy)]
struct Task {
    seq: usize,
    first: usize,
    rows: usize,
    head: usize,
    heads: usize,
}

/// Attention of every row over its own sequence.
///
/// # Panics
/// If a shape does not fit: `heads`, the lengths of `q` and `out`, rows outside the batch or of two
/// sequences, a page table that is too short or names a page outside the pool.
// By value: the arguments hold the output's only reference.
#[allow(clippy::needless_pass_by_value)]
pub fn paged_attention(pool: &ThreadPool, args: AttentionArgs<'_>) {
    let shape = *args.kv.shape();
    let group = check(&args);
    let width = args.heads * shape.head_dim;
    let tasks = plan(pool, &args, group);
    let out = SendPtr(args.out.as_mut_ptr());
    let block_of = |t: &Task| Block {
        kv: args.kv,
        layer: args.layer,
        kv_head: t.head / group,
        pages: args.seqs[t.seq].pages,
        scale: args.scale,
        softcap: args.softcap,
        window: args.window.unwrap_or(usize::MAX),
        first: args.seqs[t.seq].start + t.first,
        rows: t.rows,
        heads: t.heads,
    };
    pool.run(tasks.len(), &|i| {
        let t = &tasks[i];
        let block = block_of(t);
        let row = args.seqs[t.seq].row + t.first;
        let q = &args.q[row * width + t.head * shape.head_dim..];
        let mut state = State::take();
        block.attend(q, width, &mut state);
        for r in 0..t.rows {
            for h in 0..t.heads {
                let at = (row + r) * width + (t.head + h) * shape.head_dim;
                // SAFETY: `check` found the row inside `out` and in no other sequence; tasks of a
                // sequence differ in rows or heads, so no other task writes here.
                let to = unsafe { std::slice::from_raw_parts_mut(out.at(at), shape.head_dim) };
                state.result(r * t.heads + h, to);
            }
        }
        state.give_back();
    });
}

fn check(args: &AttentionArgs<'_>) -> usize {
    let s = args.kv.shape();
    assert!(
        args.heads > 0 && s.kv_heads > 0 && args.heads.is_multiple_of(s.kv_heads),
        "{} heads over {} KV heads",
        args.heads,
        s.kv_heads
    );
    assert!(args.layer < s.layers, "layer {} of {}", args.layer, s.layers);
    assert_eq!(args.q.len(), args.out.len(), "attention: lengths of q and out");
    let m = args.q.len() / (args.heads * s.head_dim);
    let mut taken = vec![false; m];
    for seq in args.seqs {
        let end = seq.start + seq.rows;
        assert!(seq.pages.len() * s.page_size >= end, "page table ends before position {end}");
        let used = &seq.pages[..end.div_ceil(s.page_size)];
        assert!(used.iter().all(|p| (*p as usize) < s.pages), "page outside the pool");
        for row in &mut taken[seq.row..seq.row + seq.rows] {
            assert!(!std::mem::replace(row, true), "a row of two sequences");
        }
    }
    args.heads / s.kv_heads
}

/// Cuts the batch into tasks: whole head groups, or single heads where threads would have nothing.
fn plan(pool: &ThreadPool, args: &AttentionArgs<'_>, group: usize) -> Vec<Task> {
    let whole = (QUERIES / group).max(1);
    let blocks: usize = args.seqs.iter().map(|s| s.rows.div_ceil(whole)).sum();
    // Single heads read the same keys and values several times over.
    let few = blocks * args.kv.shape().kv_heads < pool.threads();
    let heads = if few || group > QUERIES { 1 } else { group };
    let rows = (QUERIES / heads).max(1);
    let mut tasks = Vec::new();
    for (seq, s) in args.seqs.iter().enumerate() {
        // The longest first: they end the job.
        for first in (0..s.rows).step_by(rows).rev() {
            for head in (0..args.heads).step_by(heads) {
                tasks.push(Task { seq, first, rows: rows.min(s.rows - first), head, heads });
            }
        }
    }
    tasks
}

#[cfg(test)]
mod tests;
