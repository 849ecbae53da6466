//! What the tokens of a step are and where their keys and values lie, checked, on the device.

use super::device::{CudaError, Device};
use super::memory::Buffer;
use super::pinned::Pinned;

/// New tokens of one sequence, neighbours in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// The batch row of the first.
    pub row: u32,
    /// How many.
    pub rows: u32,
    /// The absolute position of the first.
    pub start: u32,
    /// Which page table.
    pub table: u32,
}

/// A step's tokens, as the host has them.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids, one a row.
    pub tokens: Vec<u32>,
    /// Absolute positions, one a row.
    pub positions: Vec<u32>,
    /// The page table of each row.
    pub row_tables: Vec<u32>,
    /// Page tables, `[tables][table_stride]`; what a table does not use is 0.
    pub tables: Vec<u32>,
    /// Entries of a table.
    pub table_stride: usize,
    /// Rows whose attention is computed one by one.
    pub singles: Vec<u32>,
    /// Sequences whose attention is computed on tensor cores.
    pub sequences: Vec<Sequence>,
    /// Rows whose logits are wanted, each once.
    pub probes: Vec<u32>,
    /// The token whose logit is reported at each probe; `u32::MAX` for none.
    pub targets: Vec<u32>,
    /// Rows whose token is not known here, each with its place among the tokens that were kept
    /// ([`Device::take_tokens`]).
    pub pending: Vec<(u32, u32)>,
}

impl Batch {
    /// Rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Panics if a kernel would reach outside its buffers.
    fn check(&self, vocab: usize, pages: usize, page_size: usize) {
        let rows = self.rows();
        assert!(rows > 0 && self.positions.len() == rows && self.row_tables.len() == rows);
        assert!(self.tokens.iter().all(|t| (*t as usize) < vocab), "batch: a token");
        assert!(self.table_stride > 0 && self.tables.len().is_multiple_of(self.table_stride));
        assert!(self.tables.iter().all(|p| (*p as usize) < pages), "batch: a page");
        let tables = self.tables.len() / self.table_stride;
        let positions_max = self.table_stride * page_size;
        assert!(self.row_tables.iter().all(|t| (*t as usize) < tables), "batch: a table");
        let within = |p: &u32| (*p as usize) < positions_max;
        assert!(self.positions.iter().all(within), "batch: a position past its table");
        assert!(self.singles.iter().all(|r| (*r as usize) < rows), "batch: a single row");
        for s in &self.sequences {
            assert!(s.rows > 0 && (s.table as usize) < tables, "batch: a sequence's table");
            assert!((s.row + s.rows) as usize <= rows, "batch: a sequence's rows");
            assert!(within(&(s.start + s.rows - 1)), "batch: a sequence past its table");
        }
        let mut seen = vec![false; rows];
        for probe in &self.probes {
            assert!(!std::mem::replace(&mut seen[*probe as usize], true), "batch: a probe twice");
        }
        assert_eq!(self.probes.len(), self.targets.len(), "batch: probes and targets");
        assert!(self.pending.iter().all(|p| (p.0 as usize) < rows), "batch: a pending row");
    }
}

/// A batch on the device. Its parts lie in one buffer, in an order and at places that depend on
/// their lengths only, so that a recorded graph finds those of another batch of the same shape.
#[derive(Debug)]
pub struct Staged {
    pub(super) data: Buffer<u32>,
    pub(super) rows: usize,
    pub(super) positions: usize,
    pub(super) row_tables: usize,
    pub(super) singles: (usize, usize),
    pub(super) sequences: (usize, usize),
    pub(super) probes: (usize, usize),
    pub(super) targets: usize,
    pub(super) tables: usize,
    pub(super) table_stride: usize,
    pending: (usize, usize),
    /// One more than the last place that a pending row names.
    pending_places: usize,
    /// Query rows of the longest sequence, and the longest row.
    pub(super) sequence_rows_max: usize,
    pub(super) position_max: usize,
    /// What the batch was checked against.
    pub(super) pages: usize,
    pub(super) page_size: usize,
    pub(super) vocab: usize,
}

impl Staged {
    /// Room for batches of up to `words` numbers in all ([`Staged::words_for`]), for a vocabulary
    /// and a KV pool of these sizes.
    ///
    /// # Errors
    /// [`CudaError`]
    pub fn new(
        device: &Device,
        words: usize,
        vocab: usize,
        pages: usize,
        page_size: usize,
    ) -> Result<Self, CudaError> {
        Ok(Self {
            data: device.alloc(words, "batches")?,
            rows: 0,
            positions: 0,
            row_tables: 0,
            singles: (0, 0),
            sequences: (0, 0),
            probes: (0, 0),
            targets: 0,
            tables: 0,
            table_stride: 1,
            pending: (0, 0),
            pending_places: 0,
            sequence_rows_max: 0,
            position_max: 0,
            pages,
            page_size,
            vocab,
        })
    }

    /// Numbers that a batch of so many rows with tables of `table_stride` needs at most.
    #[must_use]
    pub fn words_for(rows: usize, table_stride: usize) -> usize {
        rows * (12 + table_stride)
    }

    /// Numbers that batches may have.
    #[must_use]
    pub fn words(&self) -> usize {
        self.data.len()
    }

    /// Rows of the batch.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows whose logits are wanted.
    #[must_use]
    pub fn probes(&self) -> usize {
        self.probes.1
    }

    /// Puts a batch in place of the last one, by way of `host`, which holds [`Self::words`].
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If the batch contradicts itself, reaches outside vocabulary or pool, or has no room.
    pub fn stage(
        &mut self,
        device: &Device,
        batch: &Batch,
        host: &mut Pinned<u32>,
    ) -> Result<(), CudaError> {
        batch.check(self.vocab, self.pages, self.page_size);
        let words = host.wait_for()?;
        let mut used = 0;
        let mut put = |part: &[u32]| {
            let at = used;
            used += part.len();
            words[at..used].copy_from_slice(part);
            at
        };
        put(&batch.tokens);
        self.rows = batch.rows();
        self.positions = put(&batch.positions);
        self.row_tables = put(&batch.row_tables);
        self.singles = (put(&batch.singles), batch.singles.len());
        let flat: Vec<u32> =
            batch.sequences.iter().flat_map(|s| [s.row, s.rows, s.start, s.table]).collect();
        self.sequences = (put(&flat), batch.sequences.len());
        self.probes = (put(&batch.probes), batch.probes.len());
        self.targets = put(&batch.targets);
        self.tables = put(&batch.tables);
        let flat: Vec<u32> = batch.pending.iter().flat_map(|p| [p.0, p.1]).collect();
        self.pending = (put(&flat), batch.pending.len());
        self.pending_places = batch.pending.iter().map(|p| p.1 as usize + 1).max().unwrap_or(0);
        self.table_stride = batch.table_stride;
        self.sequence_rows_max = batch.sequences.iter().map(|s| s.rows as usize).max().unwrap_or(0);
        self.position_max = batch.positions.iter().copied().max().unwrap_or(0) as usize;
        device.write_pinned(&mut self.data, 0, host, used)
    }
}

impl Device {
    /// Puts tokens that [`Device::ask`] kept in the place of those that the batch does not know.
    /// What is no token, after logits that were not finite, becomes 0.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If the batch names a place that `kept` does not have.
    pub fn take_tokens(&self, batch: &mut Staged, kept: &Buffer<u32>) -> Result<(), CudaError> {
        let (at, count) = batch.pending;
        assert!(batch.pending_places <= kept.len(), "take_tokens: a place");
        let launch = self.launch("take_tokens").buffer(&batch.data, 0).buffer(&batch.data, at);
        let launch = launch.value(count as u32).buffer(kept, 0).value(batch.vocab as u32);
        // SAFETY: (u32* tokens, u32* pairs, u32 count, u32* kept, u32 vocab); rows were checked when
        // the batch was staged, places above.
        unsafe { launch.run([count.div_ceil(128), 1, 1], 128, 0) }
    }
}
