//! Tensors from either format, as rows of bytes with a kernel's element type.

use std::ops::Range;
use std::path::Path;

use headstart_formats::gguf::{self, Gguf};
use headstart_formats::safetensors::{self, SafetensorsDir};
use headstart_kernels::DType;

use super::error::LoadError;

/// The weights of a model, unread.
pub(super) enum Source {
    Gguf(Gguf),
    Dir(SafetensorsDir),
}

/// A tensor's record.
pub(super) struct Record {
    pub(super) dtype: DType,
    /// All dimensions but the last taken together; 1 for a vector.
    pub(super) rows: usize,
}

const SUPPORTED: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K";

fn gguf_dtype(dtype: gguf::DType) -> Option<DType> {
    Some(match dtype {
        gguf::DType::F32 => DType::F32,
        gguf::DType::F16 => DType::F16,
        gguf::DType::BF16 => DType::BF16,
        gguf::DType::Q8_0 => DType::Q8_0,
        gguf::DType::Q4_0 => DType::Q4_0,
        gguf::DType::Q4_1 => DType::Q4_1,
        gguf::DType::Q5_0 => DType::Q5_0,
        gguf::DType::Q5_1 => DType::Q5_1,
        gguf::DType::Q4_K => DType::Q4_K,
        gguf::DType::Q5_K => DType::Q5_K,
        gguf::DType::Q6_K => DType::Q6_K,
        _ => return None,
    })
}

fn safetensors_dtype(dtype: safetensors::DType) -> Option<DType> {
    match dtype {
        safetensors::DType::F32 => Some(DType::F32),
        safetensors::DType::F16 => Some(DType::F16),
        safetensors::DType::BF16 => Some(DType::BF16),
        _ => None,
    }
}

impl Source {
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Gguf(file) => file.path(),
            Self::Dir(dir) => dir.path(),
        }
    }

    /// Bytes of all tensors.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Gguf(file) => file.tensors().iter().map(|t| t.bytes).sum(),
            Self::Dir(dir) => dir.names().filter_map(|n| dir.tensor(n)).map(|t| t.bytes).sum(),
        }
    }

    /// The record of a tensor that must be there and of a supported type.
    pub(super) fn record(&self, name: &str, expected: &[usize]) -> Result<Record, LoadError> {
        let (dtype, shape, written) = match self {
            Self::Gguf(file) => match file.tensor(name) {
                None => (None, None, String::new()),
                Some(t) => (gguf_dtype(t.dtype), Some(&t.shape), t.dtype.to_string()),
            },
            Self::Dir(dir) => match dir.tensor(name) {
                None => (None, None, String::new()),
                Some(t) => (safetensors_dtype(t.dtype), Some(&t.shape), format!("{:?}", t.dtype)),
            },
        };
        let Some(shape) = shape else {
            return Err(LoadError::tensor(self.path(), name, format!("{expected:?}"), "nothing"));
        };
        if shape.as_slice() != expected {
            let (expected, found) = (format!("{expected:?}"), format!("{shape:?}"));
            return Err(LoadError::tensor(self.path(), name, expected, found));
        }
        let Some(dtype) = dtype else {
            let field = format!("type of tensor {name}");
            return Err(LoadError::unsupported(self.path(), field, written, SUPPORTED));
        };
        let rows = shape[..shape.len().saturating_sub(1)].iter().product();
        Ok(Record { dtype, rows })
    }

    /// Reads rows of a tensor into `out`, which is resized to fit.
    pub(super) fn read_rows(
        &self,
        name: &str,
        rows: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), LoadError> {
        match self {
            Self::Gguf(file) => file.read_rows(name, rows, out)?,
            Self::Dir(dir) => dir.read_rows(name, rows, out)?,
        }
        Ok(())
    }
}
