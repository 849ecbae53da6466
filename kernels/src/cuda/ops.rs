//! Steps over activations: norms, rotation, attention, gates.

use super::batch::Staged;
use super::device::{CudaError, Device};
use super::memory::Buffer;

/// Positions whose keys one block of decode attention reduces; `SPLIT` of attention.cu.
pub const SPLIT: usize = 128;
/// Query heads of a group that such a block takes; `GROUP` of attention.cu.
const GROUP: usize = 8;
/// Query rows of an extend block; `QUERY_ROWS` of attention.cu.
const QUERY_ROWS: usize = 64;

/// What activations, keys and values are kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Single precision: for comparisons with the CPU, and batch-invariant.
    F32,
    /// bf16, with sums in single precision.
    Bf16,
}

/// Values in one of the precisions.
#[derive(Debug)]
pub enum Activations {
    /// Single precision.
    F32(Buffer<f32>),
    /// The upper half of a single.
    Bf16(Buffer<u16>),
}

impl Activations {
    /// `len` values.
    ///
    /// # Errors
    /// [`CudaError`]
    pub fn new(
        device: &Device,
        precision: Precision,
        len: usize,
        what: &str,
    ) -> Result<Self, CudaError> {
        Ok(match precision {
            Precision::F32 => Self::F32(device.alloc(len, what)?),
            Precision::Bf16 => Self::Bf16(device.alloc(len, what)?),
        })
    }

    /// Values.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(b) => b.len(),
            Self::Bf16(b) => b.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their precision.
    #[must_use]
    pub fn precision(&self) -> Precision {
        match self {
            Self::F32(_) => Precision::F32,
            Self::Bf16(_) => Precision::Bf16,
        }
    }

    fn pick(&self, f32: &'static str, bf16: &'static str) -> &'static str {
        match self {
            Self::F32(_) => f32,
            Self::Bf16(_) => bf16,
        }
    }
}

impl super::launch::Launch<'_> {
    /// A pointer to activations, from an element on.
    fn activations(self, x: &Activations, at: usize) -> Self {
        match x {
            Activations::F32(b) => self.buffer(b, at),
            Activations::Bf16(b) => self.buffer(b, at),
        }
    }
}

/// Sizes of a KV pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvDims {
    /// Layers.
    pub layers: usize,
    /// KV heads a layer.
    pub kv_heads: usize,
    /// Elements a head: even, a multiple of 4, at most 256.
    pub head_dim: usize,
    /// Positions a page, a multiple of 16.
    pub page_size: usize,
    /// Pages.
    pub pages: usize,
}

impl KvDims {
    /// Elements of a page, all layers.
    #[must_use]
    pub fn page_len(&self) -> usize {
        2 * self.layers * self.kv_heads * self.page_size * self.head_dim
    }
}

/// Keys and values of all sequences in pages:
/// `[page][layer][keys, values][kv_head][slot][head_dim]`.
#[derive(Debug)]
pub struct KvCache {
    data: Activations,
    dims: KvDims,
}

/// `KvLayout` of prelude.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
struct KvLayout {
    layers: u32,
    layer: u32,
    kv_heads: u32,
    page_size: u32,
    head_dim: u32,
}

impl KvCache {
    /// A pool of pages of unknown content.
    ///
    /// # Errors
    /// [`CudaError`] for sizes that the kernels cannot work with, or too little memory.
    pub fn new(device: &Device, dims: KvDims, precision: Precision) -> Result<Self, CudaError> {
        let KvDims { layers, kv_heads, head_dim, page_size, pages } = dims;
        if head_dim == 0 || !head_dim.is_multiple_of(4) || head_dim > 256 {
            let message = format!("a head size of {head_dim} is no multiple of 4 up to 256");
            return Err(CudaError::new(message));
        }
        if page_size == 0 || !page_size.is_multiple_of(16) {
            return Err(CudaError::new(format!("a page of {page_size} is no multiple of 16")));
        }
        let len = [2, layers, kv_heads, page_size, head_dim, pages]
            .iter()
            .try_fold(1usize, |a, b| a.checked_mul(*b))
            .ok_or_else(|| CudaError::new(format!("a KV pool of {pages} pages")))?;
        Ok(Self { data: Activations::new(device, precision, len, "keys and values")?, dims })
    }

    /// The pool's sizes.
    #[must_use]
    pub fn dims(&self) -> KvDims {
        self.dims
    }

    /// Bytes of a page, all layers.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.dims.page_len() * self.data.pick("4444", "22").len()
    }

    fn layout(&self, layer: usize) -> KvLayout {
        let KvDims { layers, kv_heads, head_dim, page_size, .. } = self.dims;
        assert!(layer < layers, "layer {layer} of {layers}");
        KvLayout {
            layers: layers as u32,
            layer: layer as u32,
            kv_heads: kv_heads as u32,
            page_size: page_size as u32,
            head_dim: head_dim as u32,
        }
    }
}

/// Which rows a norm is of.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// The first so many.
    First(usize),
    /// The probes `from..from + count` of a batch.
    Probes(&'a Staged, usize, usize),
}

/// Rotation and what comes before it.
#[derive(Debug)]
pub struct Rope<'a> {
    /// Query heads.
    pub heads: usize,
    /// Bias of queries, keys and values, end to end.
    pub bias: Option<&'a Buffer<f32>>,
    /// Norm weights of a query head and a key head.
    pub norms: Option<(&'a Buffer<f32>, &'a Buffer<f32>)>,
    /// Epsilon of those norms.
    pub eps: f32,
}

/// How attention is computed.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// What scores are multiplied with.
    pub scale: f32,
    /// `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// Positions that a token sees, its own included.
    pub window: Option<usize>,
}

/// `AttentionArgs` of attention.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct AttentionArgs {
    heads: u32,
    table_stride: u32,
    window: u32,
    scale: f32,
    cap: f32,
}

/// The activation of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `x · sigmoid(x)`.
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
}

impl Device {
    /// `residual += delta`, then `out[i] = rms_norm(residual of row i) * weight`.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If a shape does not fit.
    pub fn add_rms_norm(
        &self,
        residual: &mut Buffer<f32>,
        delta: Option<&Buffer<f32>>,
        weight: &Buffer<f32>,
        eps: f32,
        rows: Rows<'_>,
        out: &mut Activations,
    ) -> Result<(), CudaError> {
        let width = weight.len();
        let (count, reach) = match rows {
            Rows::First(count) => (count, count),
            Rows::Probes(batch, from, count) => {
                assert!(from + count <= batch.probes.1, "add_rms_norm: probes");
                (count, batch.rows)
            }
        };
        assert!(residual.len() >= reach * width, "add_rms_norm: residual");
        assert!(delta.is_none_or(|d| d.len() >= reach * width), "add_rms_norm: delta");
        assert!(out.len() >= count * width, "add_rms_norm: output");
        let name = out.pick("add_rms_norm_f32", "add_rms_norm_bf16");
        let launch = self.launch(name).buffer(residual, 0).maybe(delta).buffer(weight, 0);
        let launch = match rows {
            Rows::First(_) => launch.value(0u64),
            Rows::Probes(batch, from, _) => launch.buffer(&batch.data, batch.probes.0 + from),
        };
        let launch = launch.activations(out, 0).value(width as u32).value(eps);
        // SAFETY: (float* residual, float* delta, float* weight, u32* rows, T* out, u32 width,
        // float eps); sizes checked, probes are rows of the batch.
        unsafe { launch.run([count, 1, 1], 256, 0) }
    }

    /// `x[r] += bias` for `rows` rows.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If a shape does not fit.
    pub fn add_bias(
        &self,
        x: &mut Buffer<f32>,
        bias: &Buffer<f32>,
        rows: usize,
    ) -> Result<(), CudaError> {
        let count = rows * bias.len();
        assert!(x.len() >= count, "add_bias: shapes");
        let launch = self.launch("add_bias").buffer(x, 0).buffer(bias, 0);
        let launch = launch.value(bias.len() as u32).value(count as u64);
        // SAFETY: (float* x, float* bias, u32 width, u64 count); sizes checked.
        unsafe { launch.run([count.div_ceil(256), 1, 1], 256, 0) }
    }

    /// `x = cap * tanh(x / cap)` for the first `count` values.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If there are fewer.
    pub fn softcap(&self, x: &mut Buffer<f32>, cap: f32, count: usize) -> Result<(), CudaError> {
        assert!(x.len() >= count, "softcap: shapes");
        let launch = self.launch("softcap").buffer(x, 0).value(cap).value(count as u64);
        // SAFETY: (float* x, float cap, u64 count); sizes checked.
        unsafe { launch.run([count.div_ceil(256), 1, 1], 256, 0) }
    }

    /// The angles of the batch's positions: `table[row]` gets cosines, then sines.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If `table` is too small.
    pub fn rope_table(
        &self,
        batch: &Staged,
        inverse_frequencies: &Buffer<f32>,
        table: &mut Buffer<f32>,
    ) -> Result<(), CudaError> {
        let half = inverse_frequencies.len();
        assert!(table.len() >= batch.rows * 2 * half, "rope_table: shapes");
        let launch = self.launch("rope_table").buffer(&batch.data, batch.positions);
        let launch = launch.buffer(inverse_frequencies, 0).buffer(table, 0).value(half as u32);
        // SAFETY: (u32* positions, float* inverse_frequencies, float* table, u32 half).
        unsafe { launch.run([batch.rows, 1, 1], 128, 0) }
    }

    /// From `qkv` (`[rows][(heads + 2 * kv_heads) * head_dim]`): queries to `q`, rotated; keys,
    /// rotated, and values to their pages.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If a shape does not fit.
    #[allow(clippy::too_many_arguments)]
    pub fn rope_write(
        &self,
        qkv: &Buffer<f32>,
        rope: &Rope<'_>,
        table: &Buffer<f32>,
        batch: &Staged,
        layer: usize,
        kv: &mut KvCache,
        q: &mut Activations,
    ) -> Result<(), CudaError> {
        let KvDims { kv_heads, head_dim, page_size, pages, .. } = kv.dims;
        let width = (rope.heads + 2 * kv_heads) * head_dim;
        assert!(qkv.len() >= batch.rows * width, "rope_write: input");
        assert!(q.len() >= batch.rows * rope.heads * head_dim, "rope_write: queries");
        assert!(table.len() >= batch.rows * head_dim, "rope_write: table");
        assert!(rope.bias.is_none_or(|b| b.len() == width), "rope_write: bias");
        let norms =
            |n: (&Buffer<f32>, &Buffer<f32>)| n.0.len() == head_dim && n.1.len() == head_dim;
        assert!(rope.norms.is_none_or(norms), "rope_write: norms");
        assert_eq!((batch.page_size, batch.pages), (page_size, pages), "rope_write: pool");
        assert_eq!(kv.data.precision(), q.precision(), "rope_write: precision");
        let launch = self.launch(q.pick("rope_write_float", "rope_write_bf16"));
        let launch = launch.buffer(qkv, 0).maybe(rope.bias);
        let launch = launch.maybe(rope.norms.map(|n| n.0)).maybe(rope.norms.map(|n| n.1));
        let launch = launch.buffer(table, 0).buffer(&batch.data, batch.positions);
        let launch = launch.buffer(&batch.data, batch.row_tables);
        let launch = launch.buffer(&batch.data, batch.tables);
        let launch = launch.activations(q, 0).activations(&kv.data, 0);
        // SAFETY: the kernel's layout, five u32.
        let launch = unsafe { launch.bytes(&kv.layout(layer)) };
        let launch =
            launch.value(rope.heads as u32).value(batch.table_stride as u32).value(rope.eps);
        // SAFETY: (float* qkv, float* bias, float* q_norm, float* k_norm, float* table,
        // u32* positions, u32* row_tables, u32* tables, T* q, T* pool, KvLayout, u32 heads,
        // u32 table_stride, float eps); sizes checked, positions and pages with the batch.
        unsafe { launch.run([batch.rows, 1, 1], 128, 0) }
    }

    /// Attention of the batch's single rows and sequences. `parts` is room for the partial sums of
    /// single rows.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If a shape does not fit.
    #[allow(clippy::too_many_arguments)]
    pub fn attend(
        &self,
        how: &Attention,
        q: &Activations,
        kv: &KvCache,
        layer: usize,
        batch: &Staged,
        parts: &mut Buffer<f32>,
        out: &mut Activations,
    ) -> Result<(), CudaError> {
        let KvDims { kv_heads, head_dim, page_size, pages, .. } = kv.dims;
        let width = how.heads * head_dim;
        assert!(how.heads.is_multiple_of(kv_heads), "attend: heads");
        assert!(q.len() >= batch.rows * width && out.len() >= batch.rows * width, "attend: sizes");
        assert_eq!((batch.page_size, batch.pages), (page_size, pages), "attend: pool");
        let precisions = (q.precision(), out.precision());
        assert_eq!(precisions, (kv.data.precision(), kv.data.precision()), "attend: precision");
        let args = AttentionArgs {
            heads: how.heads as u32,
            table_stride: batch.table_stride as u32,
            window: how.window.map_or(0, |w| u32::try_from(w).unwrap_or(u32::MAX)),
            scale: how.scale,
            cap: how.softcap.unwrap_or(0.0),
        };
        self.attend_singles(args, q, kv, layer, batch, parts, out)?;
        self.attend_sequences(args, q, kv, layer, batch, out)
    }

    #[allow(clippy::too_many_arguments)]
    fn attend_singles(
        &self,
        args: AttentionArgs,
        q: &Activations,
        kv: &KvCache,
        layer: usize,
        batch: &Staged,
        parts: &mut Buffer<f32>,
        out: &mut Activations,
    ) -> Result<(), CudaError> {
        let KvDims { kv_heads, head_dim, page_size, .. } = kv.dims;
        let heads = args.heads as usize;
        // As many splits as the tables reach, so that a graph serves every batch of its shape.
        let splits = (batch.table_stride * page_size).div_ceil(SPLIT);
        let one = heads * splits * (head_dim + 2);
        let at_once = (parts.len() / one).min(u16::MAX as usize);
        assert!(at_once > 0 || batch.singles.1 == 0, "attend: no room for one row's parts");
        for first in (0..batch.singles.1).step_by(at_once.max(1)) {
            let count = at_once.min(batch.singles.1 - first);
            let stats = count * heads * splits * head_dim;
            let items = batch.singles.0 + first;
            let chunks = (heads / kv_heads).div_ceil(GROUP);
            let launch = self.launch(q.pick("attend_split_float", "attend_split_bf16"));
            let launch = launch.activations(q, 0).activations(&kv.data, 0);
            // SAFETY: the kernels' layouts, five numbers of four bytes each.
            let launch = unsafe { launch.bytes(&kv.layout(layer)).bytes(&args) };
            let launch = launch.buffer(&batch.data, items).buffer(&batch.data, batch.positions);
            let launch = launch.buffer(&batch.data, batch.row_tables);
            let launch = launch.buffer(&batch.data, batch.tables);
            let launch = launch.buffer(parts, 0).buffer(parts, stats);
            // SAFETY: (T* q, T* pool, KvLayout, AttentionArgs, u32* items, u32* positions,
            // u32* row_tables, u32* tables, float* part, float* stats); the parts have room for
            // the rows, and rows, positions and pages were checked with the batch.
            unsafe { launch.run([splits, kv_heads * chunks, count], 128, 0)? };
            let launch = self.launch(q.pick("join_splits_float", "join_splits_bf16"));
            let launch = launch.buffer(parts, 0).buffer(parts, stats);
            let launch = launch.buffer(&batch.data, items).buffer(&batch.data, batch.positions);
            let launch = launch.activations(out, 0).value(splits as u32).value(head_dim as u32);
            // SAFETY: (float* part, float* stats, u32* items, u32* positions, T* out, u32 splits,
            // u32 dim); as above.
            unsafe { launch.run([heads, count, 1], 64, 0)? };
        }
        Ok(())
    }

    fn attend_sequences(
        &self,
        args: AttentionArgs,
        q: &Activations,
        kv: &KvCache,
        layer: usize,
        batch: &Staged,
        out: &mut Activations,
    ) -> Result<(), CudaError> {
        if batch.sequences.1 == 0 {
            return Ok(());
        }
        let KvDims { kv_heads, head_dim, .. } = kv.dims;
        let Some((name, keys)) = extend_kernel(head_dim) else {
            panic!("attend: sequences of heads of {head_dim}; see `extends`");
        };
        assert_eq!(q.precision(), Precision::Bf16, "attend: sequences are computed in bf16");
        let shared = (QUERY_ROWS + 2 * keys) * (head_dim + 8) * 2;
        let group = args.heads as usize / kv_heads;
        let tiles = (batch.sequence_rows_max * group).div_ceil(QUERY_ROWS);
        let launch = self.launch(name).activations(q, 0).activations(&kv.data, 0);
        // SAFETY: the kernels' layouts, five numbers of four bytes each.
        let launch = unsafe { launch.bytes(&kv.layout(layer)).bytes(&args) };
        let launch = launch.buffer(&batch.data, batch.sequences.0);
        let launch = launch.buffer(&batch.data, batch.tables).activations(out, 0);
        // SAFETY: (bf16* q, bf16* pool, KvLayout, AttentionArgs, u32* seqs, u32* tables,
        // bf16* out); rows, positions and pages were checked with the batch.
        unsafe { launch.run([tiles, kv_heads, batch.sequences.1], 128, shared) }
    }

    /// `out[r][i] = act(x[r][i]) * x[r][width + i]`, after adding `bias` (`[2 * width]`) to `x`.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If a shape does not fit.
    pub fn gate(
        &self,
        gate: Gate,
        x: &Buffer<f32>,
        bias: Option<&Buffer<f32>>,
        rows: usize,
        width: usize,
        out: &mut Activations,
    ) -> Result<(), CudaError> {
        let count = rows * width;
        assert!(x.len() >= 2 * count && out.len() >= count, "gate: shapes");
        assert!(bias.is_none_or(|b| b.len() == 2 * width), "gate: bias");
        let name = match gate {
            Gate::Silu => out.pick("silu_mul_f32", "silu_mul_bf16"),
            Gate::GeluTanh => out.pick("gelu_tanh_mul_f32", "gelu_tanh_mul_bf16"),
        };
        let launch = self.launch(name).buffer(x, 0).maybe(bias).activations(out, 0);
        let launch = launch.value(width as u32).value(count as u64);
        // SAFETY: (float* x, float* bias, T* out, u32 width, u64 count); sizes checked.
        unsafe { launch.run([count.div_ceil(256), 1, 1], 256, 0) }
    }

    /// Copies pages of the pool to `out`, end to end (`[pages][page_bytes]`).
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If a page is not in the pool or `out` is too small.
    pub fn gather_pages(
        &self,
        kv: &KvCache,
        pages: &[u32],
        out: &mut Buffer<u8>,
    ) -> Result<(), CudaError> {
        assert!(out.len() >= pages.len() * kv.page_bytes(), "gather_pages: output");
        self.copy_pages(kv, pages, out, true)
    }

    /// The reverse of [`Device::gather_pages`].
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If a page is not in the pool or `from` is too small.
    pub fn scatter_pages(
        &self,
        kv: &mut KvCache,
        pages: &[u32],
        from: &Buffer<u8>,
    ) -> Result<(), CudaError> {
        assert!(from.len() >= pages.len() * kv.page_bytes(), "scatter_pages: input");
        self.copy_pages(kv, pages, from, false)
    }

    fn copy_pages(
        &self,
        kv: &KvCache,
        pages: &[u32],
        staging: &Buffer<u8>,
        gather: bool,
    ) -> Result<(), CudaError> {
        assert!(pages.iter().all(|p| (*p as usize) < kv.dims.pages), "a page outside the pool");
        let list = self.upload(pages, "a list of pages")?;
        let launch = self.launch("copy_pages");
        let launch = match gather {
            true => launch.activations(&kv.data, 0).buffer(&list, 0).buffer(staging, 0).value(0u64),
            false => {
                launch.buffer(staging, 0).value(0u64).activations(&kv.data, 0).buffer(&list, 0)
            }
        };
        let launch = launch.value(kv.page_bytes() as u64);
        let stripes = kv.page_bytes().div_ceil(16 * 256).min(64);
        // SAFETY: (u8* from, u32* from_pages, u8* to, u32* to_pages, u64 bytes); pages checked, a
        // page is a multiple of 16 bytes.
        unsafe { launch.run([stripes, pages.len(), 1], 256, 0)? };
        // The list must stay until it was read.
        self.synchronize()
    }

    /// Reads `bytes` of memory once, and nothing else: for measuring.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If the buffer is smaller.
    pub fn read_memory(
        &self,
        from: &Buffer<u8>,
        bytes: usize,
        sink: &mut Buffer<u32>,
    ) -> Result<(), CudaError> {
        assert!(from.len() >= bytes && !sink.is_empty(), "read_memory: sizes");
        let launch = self.launch("read_memory").buffer(from, 0).value((bytes / 16) as u64);
        let launch = launch.buffer(sink, 0);
        let blocks = self.multiprocessors() as usize * 16;
        // SAFETY: (u8* from, u64 words, u32* sink); sizes checked.
        unsafe { launch.run([blocks, 1, 1], 256, 0) }
    }
}

/// The extend kernel of a head size and the keys of its tiles.
fn extend_kernel(head_dim: usize) -> Option<(&'static str, usize)> {
    match head_dim {
        64 => Some(("extend_64", 64)),
        96 => Some(("extend_96", 64)),
        128 => Some(("extend_128", 64)),
        256 => Some(("extend_256", 32)),
        _ => None,
    }
}

impl KvCache {
    /// Whether new tokens of a sequence can be computed together on tensor cores; if not, they are
    /// singles.
    #[must_use]
    pub fn extends(&self) -> bool {
        self.data.precision() == Precision::Bf16 && extend_kernel(self.dims.head_dim).is_some()
    }
}
