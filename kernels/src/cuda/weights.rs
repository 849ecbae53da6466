//! Weights on the device and products with them.

use super::batch::Staged;
use super::blas::Shape;
use super::device::{CudaError, Device};
use super::memory::Buffer;
use super::ops::Activations;
use crate::DType;

/// Rows of `x` up to which quantised weights are read in place; from there on they are expanded to
/// bf16, tile by tile, for the tensor cores. Expanding moves about eight times the bytes of a 4-bit
/// matrix, as much as reading it once for each eight rows.
const IN_PLACE_ROWS_MAX: usize = 32;
/// The same for bf16 weights, which need no expansion.
const BF16_IN_PLACE_ROWS_MAX: usize = 8;
/// Output columns of an expanded tile.
const TILE_ROWS: usize = 4096;

/// What the kernels are told of a matrix.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Planes {
    data: u64,
    blocks_total: u64,
    cols: u32,
    padding: u32,
}

/// A weight matrix `[rows][cols]` in one of the formats that kernels read in place.
#[derive(Debug)]
pub struct Weights {
    dtype: DType,
    rows: usize,
    cols: usize,
    data: Buffer<u8>,
}

/// Bytes of a block that go to each plane, in order: (first byte, bytes).
fn planes(dtype: DType) -> &'static [(usize, usize)] {
    match dtype {
        DType::Q8_0 => &[(2, 32), (0, 2)],
        DType::Q4_0 => &[(2, 16), (0, 2)],
        DType::Q4_1 => &[(4, 16), (0, 4)],
        DType::Q6_K => &[(0, 128), (128, 64), (192, 16), (208, 2)],
        DType::Q4_K => &[(0, 144)],
        DType::F32 => &[(0, 4)],
        _ => &[(0, 2)],
    }
}

/// Puts the parts of blocks side by side, part after part.
fn cut_into_planes(dtype: DType, bytes: &[u8]) -> Vec<u8> {
    let parts = planes(dtype);
    if parts.len() == 1 {
        return bytes.to_vec();
    }
    let mut out = Vec::with_capacity(bytes.len());
    for (first, len) in parts {
        for block in bytes.chunks_exact(dtype.block_bytes()) {
            out.extend_from_slice(&block[*first..first + len]);
        }
    }
    out
}

impl Weights {
    /// Whether kernels read this format in place. Others are to be expanded to bf16 first.
    #[must_use]
    pub fn reads(dtype: DType) -> bool {
        use DType::{BF16, F32, Q4_0, Q4_1, Q4_K, Q6_K, Q8_0};
        matches!(dtype, F32 | BF16 | Q8_0 | Q4_0 | Q4_1 | Q4_K | Q6_K)
    }

    /// Copies `bytes` (`[rows][cols]` in file order) to the device.
    ///
    /// # Errors
    /// [`CudaError`] for a format that is not read in place, rows that are not whole groups of 8 or
    /// blocks, another number of bytes, or too little memory.
    pub fn upload(
        device: &Device,
        dtype: DType,
        bytes: &[u8],
        rows: usize,
        cols: usize,
    ) -> Result<Self, CudaError> {
        Self::check(dtype, rows, cols, bytes.len())?;
        let data = device.upload(&cut_into_planes(dtype, bytes), "weights")?;
        Ok(Self { dtype, rows, cols, data })
    }

    fn check(dtype: DType, rows: usize, cols: usize, bytes: usize) -> Result<(), CudaError> {
        let refuse = |what: &str| Err(CudaError::new(format!("{dtype} [{rows}][{cols}]: {what}")));
        if !Self::reads(dtype) {
            return refuse("no kernel reads this format in place");
        }
        if rows == 0 || cols == 0 || (dtype != DType::F32 && !cols.is_multiple_of(8)) {
            return refuse("a row must be a whole number of 8 elements");
        }
        if rows > u32::MAX as usize || cols > u32::MAX as usize {
            return refuse("too large");
        }
        match dtype.bytes_for(cols).map(|row| row.checked_mul(rows)) {
            Ok(Some(expected)) if expected == bytes => Ok(()),
            _ => refuse("the bytes do not fit the shape"),
        }
    }

    /// Random bf16 weights in `-scale..scale`, made on the device.
    ///
    /// # Errors
    /// [`CudaError`]
    pub fn random_bf16(
        device: &Device,
        rows: usize,
        cols: usize,
        seed: u64,
        scale: f32,
    ) -> Result<Self, CudaError> {
        let bytes = rows * cols * 2;
        Self::check(DType::BF16, rows, cols, bytes)?;
        let data: Buffer<u8> = device.alloc(bytes, "weights")?;
        let launch = device.launch("fill_random_bf16").buffer(&data, 0);
        let launch = launch.value((rows * cols) as u64).value(seed).value(scale);
        // SAFETY: (bf16* to, u64 count, u64 seed, float scale); the buffer holds the count.
        unsafe { launch.run([1024, 1, 1], 256, 0)? };
        Ok(Self { dtype: DType::BF16, rows, cols, data })
    }

    /// One matrix of the rows of all, if they are of one format and width. The parts can be dropped.
    ///
    /// # Errors
    /// [`CudaError`]
    pub fn joined(device: &Device, parts: &[&Weights]) -> Result<Option<Self>, CudaError> {
        let Some(first) = parts.first() else { return Ok(None) };
        let (dtype, cols) = (first.dtype, first.cols);
        if parts.iter().any(|p| (p.dtype, p.cols) != (dtype, cols)) {
            return Ok(None);
        }
        let rows = parts.iter().map(|p| p.rows).sum();
        let bytes = parts.iter().map(|p| p.bytes()).sum();
        let mut data = device.alloc(bytes, "weights")?;
        let mut to = 0;
        // Each plane is joined on its own.
        let mut plane = vec![0; parts.len()];
        for (_, len) in planes(dtype) {
            for (part, from) in parts.iter().zip(&mut plane) {
                let bytes = part.blocks() * len;
                device.copy(&part.data, *from, &mut data, to, bytes)?;
                *from += bytes;
                to += bytes;
            }
        }
        Ok(Some(Self { dtype, rows, cols, data }))
    }

    /// Output columns.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input elements.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The format.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes on the device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    fn blocks(&self) -> usize {
        self.rows * (self.cols / self.dtype.block_len())
    }

    fn planes(&self) -> Planes {
        Planes {
            data: self.data.address(0),
            blocks_total: self.blocks() as u64,
            cols: self.cols as u32,
            padding: 0,
        }
    }
}

/// The kernels of a format.
struct Names {
    matvec: [&'static str; 4],
    embed: &'static str,
    expand: &'static str,
}

macro_rules! names {
    ($format:literal) => {
        Names {
            matvec: [
                concat!("matvec_", $format, "_1"),
                concat!("matvec_", $format, "_2"),
                concat!("matvec_", $format, "_4"),
                concat!("matvec_", $format, "_8"),
            ],
            embed: concat!("embed_", $format),
            expand: concat!("expand_", $format),
        }
    };
}

fn names(dtype: DType) -> Names {
    match dtype {
        DType::F32 => names!("F32"),
        DType::Q8_0 => names!("Q8_0"),
        DType::Q4_0 => names!("Q4_0"),
        DType::Q4_1 => names!("Q4_1"),
        DType::Q4_K => names!("Q4_K"),
        DType::Q6_K => names!("Q6_K"),
        _ => names!("BF16"),
    }
}

impl Device {
    /// `out[row] = w[token of the row] * scale`, `out` `[rows][cols]`. `w` is of the tokens from
    /// `start` on; the rows of others get zeros.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If `out` is too small.
    pub fn embed(
        &self,
        w: &Weights,
        start: usize,
        batch: &Staged,
        scale: f32,
        out: &mut Buffer<f32>,
    ) -> Result<(), CudaError> {
        assert!(start + w.rows <= batch.vocab && out.len() >= batch.rows * w.cols, "embed: shapes");
        if !w.cols.is_multiple_of(8) {
            let message = format!("an embedding of {} elements is not in groups of 8", w.cols);
            return Err(CudaError::new(message));
        }
        // SAFETY: the layout of `Planes`, whose buffer is kept.
        let launch = unsafe { self.launch(names(w.dtype).embed).bytes(&w.planes()) }.uses(&w.data);
        let launch = launch.buffer(&batch.data, 0).value(start as u32).value(w.rows as u32);
        let launch = launch.buffer(out, 0).value(scale);
        // SAFETY: (Planes w, u32* tokens, u32 start, u32 rows, float* out, float scale); there is
        // room for the batch.
        unsafe { launch.run([batch.rows, 1, 1], 128, 0) }
    }

    /// `y[i][at + r] = x[i] · w[r]` for the first `m` rows of `x`; rows of `y` are `stride` apart.
    /// `tile` is room for expanded weights.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If a shape does not fit, or weights and activations are of different precision.
    #[allow(clippy::too_many_arguments)]
    pub fn matmul(
        &self,
        w: &Weights,
        x: &Activations,
        m: usize,
        y: &mut Buffer<f32>,
        stride: usize,
        at: usize,
        tile: &mut Tile,
    ) -> Result<(), CudaError> {
        assert!(m > 0 && x.len() >= m * w.cols, "matmul: input");
        assert!(at + w.rows <= stride && y.len() >= m * stride, "matmul: output");
        let x = match x {
            Activations::F32(x) => {
                assert_eq!(w.dtype, DType::F32, "matmul: f32 activations want f32 weights");
                return self.matmul_f32(w, x, m, y, stride, at);
            }
            Activations::Bf16(x) => x,
        };
        assert_ne!(w.dtype, DType::F32, "matmul: f32 weights want f32 activations");
        let limit = if w.dtype == DType::BF16 { BF16_IN_PLACE_ROWS_MAX } else { IN_PLACE_ROWS_MAX };
        if m <= limit {
            return self.matvec(w, x, m, y, stride, at);
        }
        if w.dtype == DType::BF16 {
            let shape = Shape { m, n: w.rows, k: w.cols, stride };
            return self.multiply(shape, (&w.data, 0), x, (y, at));
        }
        let rows_max = (tile.data.len() / (2 * w.cols)).min(TILE_ROWS);
        assert!(rows_max > 0, "matmul: no room for an expanded row");
        for first in (0..w.rows).step_by(rows_max) {
            let n = rows_max.min(w.rows - first);
            self.expand(w, first, n, &mut tile.data)?;
            let shape = Shape { m, n, k: w.cols, stride };
            self.multiply(shape, (&tile.data, 0), x, (y, at + first))?;
        }
        Ok(())
    }

    fn matmul_f32(
        &self,
        w: &Weights,
        x: &Buffer<f32>,
        m: usize,
        y: &mut Buffer<f32>,
        stride: usize,
        at: usize,
    ) -> Result<(), CudaError> {
        let launch = self.launch("matmul_f32").buffer(&w.data, 0).buffer(x, 0);
        let launch = launch.value(m as u32).value(w.rows as u32).value(w.cols as u32);
        let launch = launch.buffer(y, at).value(stride as u32);
        // SAFETY: (float* w, float* x, u32 m, u32 n, u32 k, float* y, u32 y_stride); `matmul`
        // checked the sizes.
        unsafe { launch.run([w.rows.div_ceil(32), m.div_ceil(32), 1], 256, 0) }
    }

    fn matvec(
        &self,
        w: &Weights,
        x: &Buffer<u16>,
        m: usize,
        y: &mut Buffer<f32>,
        stride: usize,
        at: usize,
    ) -> Result<(), CudaError> {
        let (index, rows) = match m {
            1 => (0, 1),
            2 => (1, 2),
            3 | 4 => (2, 4),
            _ => (3, 8),
        };
        // SAFETY: the layout of `Planes`, whose buffer is kept.
        let launch = unsafe { self.launch(names(w.dtype).matvec[index]).bytes(&w.planes()) };
        let launch = launch.uses(&w.data).buffer(x, 0).value(m as u32).value(w.rows as u32);
        let launch = launch.buffer(y, at).value(stride as u32);
        // SAFETY: (Planes w, bf16* x, u32 m, u32 rows, float* y, u32 y_stride); `matmul` checked
        // the sizes.
        unsafe { launch.run([w.rows.div_ceil(4), m.div_ceil(rows), 1], 128, 0) }
    }

    /// The rows `first..first + n` of `w` as bf16.
    pub(super) fn expand(
        &self,
        w: &Weights,
        first: usize,
        n: usize,
        out: &mut Buffer<u8>,
    ) -> Result<(), CudaError> {
        assert!(first + n <= w.rows && out.len() >= 2 * n * w.cols, "expand: shapes");
        // SAFETY: the layout of `Planes`, whose buffer is kept.
        let launch = unsafe { self.launch(names(w.dtype).expand).bytes(&w.planes()) };
        let launch = launch.uses(&w.data).value(first as u32).buffer(out, 0);
        // SAFETY: (Planes w, u32 row0, bf16* out); sizes checked.
        unsafe { launch.run([n, 1, 1], 128, 0) }
    }
}

/// Room for the expanded rows of one matrix at a time.
#[derive(Debug)]
pub struct Tile {
    data: Buffer<u8>,
}

impl Tile {
    /// Room for rows of `cols` elements; small if nothing will be expanded.
    ///
    /// # Errors
    /// [`CudaError`]
    pub fn new(device: &Device, cols: usize, expands: bool) -> Result<Self, CudaError> {
        let rows = if expands { TILE_ROWS } else { 1 };
        Ok(Self { data: device.alloc(2 * rows * cols, "expanded weights")? })
    }
}
