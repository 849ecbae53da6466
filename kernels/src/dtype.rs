//! Element types of weights and the errors of this crate.

use std::fmt;

/// How the elements of a matrix are stored. The block formats are those of ggml.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    BF16,
    /// 32 signed bytes and an f16 scale.
    Q8_0,
    /// 32 nibbles (offset 8) and an f16 scale.
    Q4_0,
    /// 32 nibbles, an f16 scale and an f16 minimum.
    Q4_1,
    /// 32 five-bit values (offset 16) and an f16 scale.
    Q5_0,
    /// 32 five-bit values, an f16 scale and an f16 minimum.
    Q5_1,
    /// 256 nibbles in 8 groups with 6-bit scales and minima, two f16 super-scales.
    Q4_K,
    /// 256 five-bit values in 8 groups with 6-bit scales and minima, two f16 super-scales.
    Q5_K,
    /// 256 six-bit values (offset 32) in 16 groups with 8-bit scales, one f16 super-scale.
    Q6_K,
}

impl DType {
    /// Elements in one block; 1 for the plain types.
    pub const fn block_len(self) -> usize {
        match self {
            DType::F32 | DType::F16 | DType::BF16 => 1,
            DType::Q8_0 | DType::Q4_0 | DType::Q4_1 | DType::Q5_0 | DType::Q5_1 => 32,
            DType::Q4_K | DType::Q5_K | DType::Q6_K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::Q8_0 => 34,
            DType::Q4_0 => 18,
            DType::Q4_1 => 20,
            DType::Q5_0 => 22,
            DType::Q5_1 => 24,
            DType::Q4_K => 144,
            DType::Q5_K => 176,
            DType::Q6_K => 210,
        }
    }

    /// Bytes of `elements` elements.
    ///
    /// # Errors
    /// [`KernelError::Partial`] when `elements` is no whole number of blocks, or overflows.
    pub fn bytes_for(self, elements: usize) -> Result<usize, KernelError> {
        if !elements.is_multiple_of(self.block_len()) {
            return Err(KernelError::Partial { dtype: self, elements });
        }
        (elements / self.block_len())
            .checked_mul(self.block_bytes())
            .ok_or(KernelError::Partial { dtype: self, elements })
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Why data handed to a kernel was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelError {
    /// The element count is not a whole number of blocks.
    Partial {
        /// The type asked for.
        dtype: DType,
        /// The element count that does not fit it.
        elements: usize,
    },
    /// The data has another length than its shape says.
    Length {
        /// What was measured.
        what: &'static str,
        /// The length the shape asks for.
        expected: usize,
        /// The length found.
        found: usize,
    },
    /// A shape that no kernel can work on.
    Shape {
        /// What is wrong with it.
        what: &'static str,
        /// The offending figure.
        found: usize,
    },
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KernelError::Partial { dtype, elements } => write!(
                f,
                "{elements} elements are no whole number of {dtype} blocks of {}",
                dtype.block_len()
            ),
            KernelError::Length { what, expected, found } => {
                write!(f, "{what}: expected {expected}, found {found}")
            }
            KernelError::Shape { what, found } => write!(f, "{what}: found {found}"),
        }
    }
}

impl std::error::Error for KernelError {}
