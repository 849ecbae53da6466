//! Matrix products `y[m][n] = x[m][k] · W[n][k]ᵀ`.
//!
//! Weights are cut into panels of [`PANEL`] output columns (rows of `W`), one a lane, so a product
//! needs no sums across lanes, and each panel is one contiguous stream.

mod activations;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod amx_add;
#[cfg(target_arch = "x86_64")]
mod amx_bf16;
#[cfg(target_arch = "x86_64")]
mod amx_one;
#[cfg(target_arch = "x86_64")]
mod amx_unit;
#[cfg(target_arch = "x86_64")]
mod amx_whole;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod float;
mod float_kernels;
#[cfg(target_arch = "x86_64")]
mod formats;
mod halves;
mod int;
mod packed;
mod plan;
#[cfg(target_arch = "x86_64")]
mod vnni;
#[cfg(target_arch = "x86_64")]
mod vnni_many;

use crate::buffer::Arena;
use crate::cpu::{Cpu, Isa};
use crate::pool::SendPtr;
use crate::{DType, KernelError, ThreadPool};
use float::FloatTiles;
use packed::{Kind, QuantTiles};

/// Output columns of a panel: the lanes of a 512-bit vector.
pub(crate) const PANEL: usize = 16;

/// A weight matrix `[rows][cols]`, repacked for products; see [`Matrix::matmul`].
pub struct Matrix {
    rows: usize,
    cols: usize,
    store: Store,
}

enum Store {
    Float(FloatTiles),
    Quant(QuantTiles),
}

/// Where results go: `[m][stride]`, shared by tasks that write different columns.
#[derive(Clone, Copy)]
pub(crate) struct Out {
    ptr: SendPtr<f32>,
    stride: usize,
}

impl Out {
    /// # Safety
    /// `row * stride + column` lies within the output.
    pub(crate) unsafe fn at(&self, row: usize, column: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.ptr.at(row * self.stride + column) }
    }
}

impl Matrix {
    /// Rows that are stored together: a matrix is filled in multiples of this.
    pub const ROWS: usize = PANEL;

    /// A matrix without values yet, all of whose rows are to be filled, beside the others of `arena`.
    ///
    /// # Errors
    /// [`KernelError`] if a row is no whole number of blocks or the matrix is beyond the address
    /// space.
    pub fn zeros(
        arena: &Arena,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> Result<Self, KernelError> {
        Self::file_bytes(dtype, rows, cols)?;
        Ok(Self::unfilled(Some(arena), dtype, rows, cols))
    }

    fn unfilled(arena: Option<&Arena>, dtype: DType, rows: usize, cols: usize) -> Self {
        let store = match Kind::of(dtype) {
            Some(kind) => Store::Quant(QuantTiles::zeros(arena, kind, rows, cols)),
            None => Store::Float(FloatTiles::zeros(arena, dtype, rows, cols)),
        };
        Matrix { rows, cols, store }
    }

    /// Bytes of `[rows][cols]` in a file.
    fn file_bytes(dtype: DType, rows: usize, cols: usize) -> Result<usize, KernelError> {
        let partial = KernelError::Partial { dtype, elements: usize::MAX };
        rows.checked_mul(dtype.bytes_for(cols)?).ok_or(partial)
    }

    /// Repacks whole rows of the matrix's type, in file order, into it from row `first` on.
    ///
    /// # Errors
    /// [`KernelError::Length`] if `bytes` is no whole number of rows.
    ///
    /// # Panics
    /// If `first` is no multiple of [`Matrix::ROWS`], or rows lie outside the matrix.
    pub fn fill(
        &mut self,
        pool: &ThreadPool,
        first: usize,
        bytes: &[u8],
    ) -> Result<(), KernelError> {
        let row_bytes = self.dtype().bytes_for(self.cols)?;
        let rows = bytes.len() / row_bytes.max(1);
        if rows * row_bytes != bytes.len() {
            let (what, expected, found) = ("bytes of rows", rows * row_bytes, bytes.len());
            return Err(KernelError::Length { what, expected, found });
        }
        self.check_rows(first, rows);
        match &mut self.store {
            Store::Float(t) => t.fill(pool, first, bytes),
            Store::Quant(t) => t.fill(pool, first, bytes),
        }
        Ok(())
    }

    /// Stores whole rows in an F32 or BF16 matrix from row `first` on.
    ///
    /// # Panics
    /// If the matrix has another type, `data` is no whole number of rows, `first` is no multiple of
    /// [`Matrix::ROWS`], or rows lie outside the matrix.
    pub fn fill_f32(&mut self, pool: &ThreadPool, first: usize, data: &[f32]) {
        let (cols, rows) = (self.cols, data.len() / self.cols.max(1));
        assert_eq!(data.len(), rows * cols, "fill_f32: data of {rows} x {cols}");
        self.check_rows(first, rows);
        match &mut self.store {
            Store::Float(t) if matches!(t.dtype(), DType::F32 | DType::BF16) => {
                let row =
                    |r: usize, out: &mut [f32]| out.copy_from_slice(&data[r * cols..][..cols]);
                t.fill_with(pool, first, rows, &row);
            }
            _ => panic!("fill_f32: storage {}", self.dtype()),
        }
    }

    fn check_rows(&self, first: usize, rows: usize) {
        assert!(first.is_multiple_of(Self::ROWS), "fill: from row {first} on");
        assert!(
            first + rows <= self.rows,
            "fill: rows {first} to {} of {}",
            first + rows,
            self.rows
        );
    }

    /// Stores `data` (`[rows][cols]`) as `storage`.
    ///
    /// # Panics
    /// If `data` has another length, or `storage` is neither `F32` nor `BF16`.
    pub fn from_f32(
        pool: &ThreadPool,
        data: &[f32],
        rows: usize,
        cols: usize,
        storage: DType,
    ) -> Self {
        assert_eq!(data.len(), rows * cols, "from_f32: data of {rows} x {cols}");
        assert!(matches!(storage, DType::F32 | DType::BF16), "from_f32: storage {storage}");
        let mut matrix = Self::unfilled(None, storage, rows, cols);
        matrix.fill_f32(pool, 0, data);
        matrix
    }

    /// Repacks `bytes` of type `dtype`, `[rows][cols]` in file order. The type is kept.
    ///
    /// # Errors
    /// [`KernelError`] if a row is no whole number of blocks or `bytes` has another length.
    pub fn from_bytes(
        dtype: DType,
        bytes: &[u8],
        rows: usize,
        cols: usize,
    ) -> Result<Self, KernelError> {
        Self::from_bytes_with(&ThreadPool::new(1), dtype, bytes, rows, cols)
    }

    /// [`Matrix::from_bytes`], spread over a pool.
    ///
    /// # Errors
    /// As [`Matrix::from_bytes`].
    pub fn from_bytes_with(
        pool: &ThreadPool,
        dtype: DType,
        bytes: &[u8],
        rows: usize,
        cols: usize,
    ) -> Result<Self, KernelError> {
        let (expected, found) = (Self::file_bytes(dtype, rows, cols)?, bytes.len());
        if found != expected {
            return Err(KernelError::Length { what: "bytes of the matrix", expected, found });
        }
        let mut matrix = Self::unfilled(None, dtype, rows, cols);
        matrix.fill(pool, 0, bytes)?;
        Ok(matrix)
    }

    /// Output columns.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input elements.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The type of the stored elements.
    pub fn dtype(&self) -> DType {
        match &self.store {
            Store::Float(t) => t.dtype(),
            Store::Quant(t) => t.dtype(),
        }
    }

    /// Bytes held, padding included.
    pub fn bytes(&self) -> usize {
        match &self.store {
            Store::Float(t) => t.bytes(),
            Store::Quant(t) => t.bytes(),
        }
    }

    /// Expands row `row` into `out` (`[cols]`), exactly.
    ///
    /// # Panics
    /// If `row` is out of range or `out` has another length.
    pub fn row_f32(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.cols, "row_f32: output length");
        match &self.store {
            Store::Float(t) => t.row_f32(row, out),
            Store::Quant(t) => t.row_f32(row, out),
        }
    }

    /// `y[m][rows] = x[m][cols] · Wᵀ`.
    ///
    /// # Panics
    /// If `x` or `y` has another length.
    pub fn matmul(&self, pool: &ThreadPool, x: &[f32], m: usize, y: &mut [f32]) {
        matmul_group(pool, x, m, &mut [(self, y)]);
    }
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Matrix({} x {}, {})", self.rows, self.cols, self.dtype())
    }
}

/// Several products over one input (query, key and value; gate and up), in one go: the input is
/// prepared once and the threads are started once. Same bits as [`Matrix::matmul`] one by one.
///
/// # Panics
/// If an output has another length than `m * rows`, or `x` than `m * cols` of any matrix.
pub fn matmul_group(
    pool: &ThreadPool,
    x: &[f32],
    m: usize,
    products: &mut [(&Matrix, &mut [f32])],
) {
    run_group(Cpu::get().isa, pool, x, m, products);
}

/// [`matmul_group`] on a given instruction set, at most the processor's.
fn run_group(
    isa: Isa,
    pool: &ThreadPool,
    x: &[f32],
    m: usize,
    products: &mut [(&Matrix, &mut [f32])],
) {
    for (w, y) in products.iter() {
        assert_eq!(x.len(), m * w.cols, "matmul: input of {m} rows for {w:?}");
        assert_eq!(y.len(), m * w.rows, "matmul: output of {m} rows for {w:?}");
    }
    if products.iter().any(|(w, _)| w.cols == 0) {
        // Sums of nothing.
        products.iter_mut().for_each(|(_, y)| y.fill(0.0));
        return;
    }
    if m == 0 {
        return;
    }
    plan::run(isa, pool, x, m, products);
}

#[cfg(test)]
mod tests;
