//! The block formats of ggml: exact expansion to f32, and (for tests and tools) compression.
//!
//! Layouts follow `ggml-common.h`, arithmetic follows `ggml-quants.c` operation by operation.

mod k;
mod legacy;

pub(crate) use k::{q6_at, scale_min};
pub use legacy::quantise;

use crate::{DType, KernelError};
use half::{bf16, f16};

pub(crate) fn f16_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

/// Expands `bytes` of type `dtype` into `out`.
///
/// # Errors
/// [`KernelError`] when `out` is no whole number of blocks or `bytes` has another length.
pub fn dequantise(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<(), KernelError> {
    let expected = dtype.bytes_for(out.len())?;
    if bytes.len() != expected {
        return Err(KernelError::Length {
            what: "bytes of the data",
            expected,
            found: bytes.len(),
        });
    }
    let block: fn(&[u8], &mut [f32]) = match dtype {
        DType::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
            return Ok(());
        }
        DType::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
            return Ok(());
        }
        DType::BF16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
            return Ok(());
        }
        DType::Q8_0 => legacy::q8_0,
        DType::Q4_0 => legacy::q4_0,
        DType::Q4_1 => legacy::q4_1,
        DType::Q5_0 => legacy::q5_0,
        DType::Q5_1 => legacy::q5_1,
        DType::Q4_K => k::q4_k,
        DType::Q5_K => k::q5_k,
        DType::Q6_K => k::q6_k,
    };
    let blocks = bytes.chunks_exact(dtype.block_bytes());
    for (b, o) in blocks.zip(out.chunks_exact_mut(dtype.block_len())) {
        block(b, o);
    }
    Ok(())
}
