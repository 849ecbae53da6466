//! Bounded reads.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::FormatError;

/// Opens a regular file and tells its length in bytes.
pub(crate) fn open(path: &Path) -> Result<(File, u64), FormatError> {
    let file = File::open(path).map_err(|e| FormatError::io(path, "open", e))?;
    let metadata = file.metadata().map_err(|e| FormatError::io(path, "open", e))?;
    if !metadata.is_file() {
        return Err(FormatError::invalid(path, "file", "a regular file", "something else"));
    }
    Ok((file, metadata.len()))
}

/// Fills `out` (resized to `len`) from `offset`. The caller has checked that the file is that long.
pub(crate) fn read_at(
    file: &File,
    path: &Path,
    what: &str,
    offset: u64,
    len: usize,
    out: &mut Vec<u8>,
) -> Result<(), FormatError> {
    out.resize(len, 0);
    file.read_exact_at(out, offset).map_err(|e| FormatError::io(path, format!("read {what}"), e))
}

/// The whole of a small file; a longer one than `bytes_max` is refused before it is read.
pub(crate) fn read_small(path: &Path, bytes_max: u64) -> Result<Vec<u8>, FormatError> {
    let (file, len) = open(path)?;
    if len > bytes_max {
        return Err(FormatError::invalid(
            path,
            "file size",
            format!("at most {bytes_max} bytes"),
            format!("{len} bytes"),
        ));
    }
    let mut bytes = Vec::new();
    file.take(bytes_max).read_to_end(&mut bytes).map_err(|e| FormatError::io(path, "read", e))?;
    Ok(bytes)
}
