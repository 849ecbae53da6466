//! GGUF files, versions 2 and 3, little-endian.

mod dtype;
mod header;
mod metadata;

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use dtype::DType;
pub use metadata::{Array, Metadata, Value};

use crate::{FormatError, io};

/// One tensor's record: what it is and where it lies. Checked against the file's length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, `blk.0.attn_q.weight`.
    pub name: String,
    /// How its elements are stored.
    pub dtype: DType,
    /// Rows first: a matrix is `[rows, cols]` with `cols` contiguous (the file lists them reversed).
    pub shape: Vec<usize>,
    /// Where it starts, in bytes from the start of the file.
    pub offset: u64,
    /// Its size in bytes.
    pub bytes: u64,
}

impl TensorInfo {
    /// Elements of a row (the last dimension).
    #[must_use]
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }

    /// Rows, all outer dimensions taken together.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(0, |(_, outer)| outer.iter().product())
    }
}

/// An open GGUF file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

impl Gguf {
    /// Opens a file and reads its header; tensors are read on demand.
    ///
    /// # Errors
    /// The file cannot be read, or is not a whole and consistent GGUF file.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let (file, len) = io::open(path)?;
        let (metadata, tensors) = header::parse(BufReader::new(&file), len, path)?;
        let by_name = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(Self { path: path.to_owned(), file, metadata, tensors, by_name })
    }

    /// Parses bytes in memory, header only: what [`Gguf::open`] checks.
    ///
    /// # Errors
    /// The bytes are not a whole and consistent GGUF file. `path` is the name that errors give it.
    pub fn check(bytes: &[u8], path: &Path) -> Result<(Metadata, Vec<TensorInfo>), FormatError> {
        header::parse(bytes, bytes.len() as u64, path)
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its metadata.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Its tensors, in the file's order.
    #[must_use]
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The record of a tensor.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|i| &self.tensors[*i])
    }

    /// Reads some rows of a tensor into `out`, which is resized to fit.
    ///
    /// # Errors
    /// The tensor or the rows are not there, or the file cannot be read.
    pub fn read_rows(
        &self,
        name: &str,
        rows: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), FormatError> {
        let field = format!("tensor {name}");
        let info = self
            .tensor(name)
            .ok_or_else(|| FormatError::invalid(&self.path, &field, "a tensor", "nothing"))?;
        if rows.start > rows.end || rows.end > info.rows() {
            return Err(FormatError::invalid(
                &self.path,
                &field,
                format!("rows within 0..{}", info.rows()),
                format!("{rows:?}"),
            ));
        }
        // The header was checked: rows × row_bytes is the tensor's size, which the file holds.
        let row_bytes = info.bytes as usize / info.rows().max(1);
        let start = info.offset + (rows.start * row_bytes) as u64;
        io::read_at(&self.file, &self.path, &field, start, rows.len() * row_bytes, out)
    }

    /// Reads a whole tensor into `out`, which is resized to fit.
    ///
    /// # Errors
    /// The tensor is not there, or the file cannot be read.
    pub fn read(&self, name: &str, out: &mut Vec<u8>) -> Result<(), FormatError> {
        let rows = self.tensor(name).map_or(0, TensorInfo::rows);
        self.read_rows(name, 0..rows, out)
    }
}
