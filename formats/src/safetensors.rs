//! Safetensors (github.com/huggingface/safetensors, README "Format"): one file, or several with an
//! index.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::{FormatError, io};

const HEADER_BYTES_MAX: u64 = 100_000_000;
const INDEX_BYTES_MAX: u64 = 100_000_000;
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// How a tensor's elements are stored.
#[allow(missing_docs)] // the format's own names
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
pub enum DType {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    BOOL,
    #[serde(rename = "F8_E4M3")]
    F8E4M3,
    #[serde(rename = "F8_E5M2")]
    F8E5M2,
}

impl DType {
    /// Bytes an element.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::I8 | Self::U8 | Self::BOOL | Self::F8E4M3 | Self::F8E5M2 => 1,
        }
    }
}

/// One tensor's record, checked against the file's length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// How its elements are stored.
    pub dtype: DType,
    /// Rows first; the last dimension is contiguous.
    pub shape: Vec<usize>,
    /// Where it starts, in bytes from the start of its file.
    pub offset: u64,
    /// Its size in bytes.
    pub bytes: u64,
}

impl TensorInfo {
    /// Rows, all dimensions but the last taken together (1 for a vector).
    #[must_use]
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, outer)| outer.iter().product())
    }
}

#[derive(Deserialize)]
struct RawInfo {
    dtype: DType,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The header as written: names in order, so that a name given twice is seen.
struct RawHeader(Vec<(String, RawInfo)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Checks the header's length field against the file's: (header bytes, data start).
fn header_span(prefix: [u8; 8], len: u64, path: &Path) -> Result<(usize, u64), FormatError> {
    let header = u64::from_le_bytes(prefix);
    let max = HEADER_BYTES_MAX.min(len.saturating_sub(8));
    if header > max {
        return Err(FormatError::invalid(
            path,
            "header size",
            format!("at most {max} bytes"),
            format!("{header} bytes"),
        ));
    }
    Ok((header as usize, 8 + header))
}

/// Checks every record: sizes match shapes, tensors follow each other and fill the file.
fn parse_header(
    json: &[u8],
    data_start: u64,
    len: u64,
    path: &Path,
) -> Result<BTreeMap<String, TensorInfo>, FormatError> {
    let bad = |field: String, expected: String, found: String| {
        FormatError::invalid(path, field, expected, found)
    };
    let RawHeader(mut raw) = serde_json::from_slice(json)
        .map_err(|e| bad("header".into(), "a JSON object of tensors".into(), e.to_string()))?;
    raw.sort_by_key(|(_, info)| info.data_offsets);
    let mut tensors = BTreeMap::new();
    let mut next = 0;
    for (name, info) in raw {
        let (start, end) = info.data_offsets;
        let field = format!("tensor {name}");
        if start != next || end < start {
            return Err(bad(
                format!("{field} data_offsets"),
                format!("a range from byte {next}, where the tensor before it ends"),
                format!("[{start}, {end}]"),
            ));
        }
        let expected = info
            .shape
            .iter()
            .try_fold(info.dtype.bytes(), |n, dim| n.checked_mul(*dim))
            .and_then(|n| u64::try_from(n).ok());
        if expected != Some(end - start) {
            return Err(bad(
                format!("{field} data_offsets"),
                format!("the size of {:?} {:?}", info.dtype, info.shape),
                format!("{} bytes", end - start),
            ));
        }
        next = end;
        let Some(offset) = data_start.checked_add(start) else {
            return Err(bad(field, "an offset inside the file".into(), start.to_string()));
        };
        let record =
            TensorInfo { dtype: info.dtype, shape: info.shape, offset, bytes: end - start };
        if tensors.insert(name, record).is_some() {
            return Err(bad(field, "a name that occurs once".into(), "it again".into()));
        }
    }
    if next != len - data_start {
        return Err(bad(
            "data".into(),
            format!("{next} bytes, as the header says"),
            format!("{} bytes", len - data_start),
        ));
    }
    Ok(tensors)
}

/// One open safetensors file.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    tensors: BTreeMap<String, TensorInfo>,
}

impl SafetensorsFile {
    /// Opens a file and reads its header; tensors are read on demand.
    ///
    /// # Errors
    /// The file cannot be read, or its header does not describe exactly its bytes.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let (file, len) = io::open(path)?;
        let mut bytes = Vec::new();
        if len < 8 {
            let found = format!("{len} bytes");
            return Err(FormatError::invalid(path, "header size", "8 bytes", found));
        }
        io::read_at(&file, path, "header size", 0, 8, &mut bytes)?;
        let prefix = bytes.as_slice().try_into().unwrap_or_default();
        let (header_bytes, data_start) = header_span(prefix, len, path)?;
        io::read_at(&file, path, "header", 8, header_bytes, &mut bytes)?;
        let tensors = parse_header(&bytes, data_start, len, path)?;
        Ok(Self { path: path.to_owned(), file, tensors })
    }

    /// Parses bytes in memory, header only: what [`SafetensorsFile::open`] checks.
    ///
    /// # Errors
    /// The header does not describe exactly the bytes. `path` is the name that errors give them.
    pub fn check(bytes: &[u8], path: &Path) -> Result<BTreeMap<String, TensorInfo>, FormatError> {
        let len = bytes.len() as u64;
        let Some(prefix) = bytes.first_chunk::<8>() else {
            let found = format!("{len} bytes");
            return Err(FormatError::invalid(path, "header size", "8 bytes", found));
        };
        let (header_bytes, data_start) = header_span(*prefix, len, path)?;
        parse_header(&bytes[8..8 + header_bytes], data_start, len, path)
    }
}

/// All tensors of a model directory.
#[derive(Debug)]
pub struct SafetensorsDir {
    dir: PathBuf,
    files: Vec<SafetensorsFile>,
    by_name: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl SafetensorsDir {
    /// Opens `model.safetensors.index.json` with the files it names, or `model.safetensors`.
    ///
    /// # Errors
    /// Neither is there, a file cannot be read or is malformed, or index and files disagree.
    pub fn open(dir: &Path) -> Result<Self, FormatError> {
        let index_path = dir.join(INDEX);
        if !index_path.exists() {
            let single = dir.join(SINGLE);
            if !single.exists() {
                let expected = format!("{SINGLE} or {INDEX}");
                return Err(FormatError::invalid(dir, "weights", expected, "neither"));
            }
            let file = SafetensorsFile::open(&single)?;
            let by_name = file.tensors.keys().map(|name| (name.clone(), 0)).collect();
            return Ok(Self { dir: dir.to_owned(), files: vec![file], by_name });
        }
        let bytes = io::read_small(&index_path, INDEX_BYTES_MAX)?;
        let index: Index = serde_json::from_slice(&bytes).map_err(|e| {
            FormatError::invalid(&index_path, "index", "an object with a weight_map", e.to_string())
        })?;
        let mut files: Vec<SafetensorsFile> = Vec::new();
        let mut opened: HashMap<String, usize> = HashMap::new();
        let mut by_name = HashMap::new();
        for (tensor, name) in index.weight_map {
            let number = match opened.get(&name) {
                Some(number) => *number,
                None => {
                    plain_name(&name, &tensor, &index_path)?;
                    files.push(SafetensorsFile::open(&dir.join(&name))?);
                    opened.insert(name.clone(), files.len() - 1);
                    files.len() - 1
                }
            };
            if !files[number].tensors.contains_key(&tensor) {
                let path = files[number].path.clone();
                let expected = format!("a tensor, as {INDEX} says");
                return Err(FormatError::invalid(
                    path,
                    format!("tensor {tensor}"),
                    expected,
                    "nothing",
                ));
            }
            by_name.insert(tensor, number);
        }
        Ok(Self { dir: dir.to_owned(), files, by_name })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// All tensor names, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// The record of a tensor.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).and_then(|i| self.files[*i].tensors.get(name))
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
        let Some((file, info)) = self
            .by_name
            .get(name)
            .map(|i| &self.files[*i])
            .and_then(|f| f.tensors.get(name).map(|info| (f, info)))
        else {
            return Err(FormatError::invalid(&self.dir, field, "a tensor", "nothing"));
        };
        if rows.start > rows.end || rows.end > info.rows() {
            let expected = format!("rows within 0..{}", info.rows());
            return Err(FormatError::invalid(&file.path, field, expected, format!("{rows:?}")));
        }
        let row_bytes = info.bytes as usize / info.rows().max(1);
        let start = info.offset + (rows.start * row_bytes) as u64;
        io::read_at(&file.file, &file.path, &field, start, rows.len() * row_bytes, out)
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

/// An index may only name files of its own directory.
fn plain_name(name: &str, tensor: &str, index: &Path) -> Result<(), FormatError> {
    if Path::new(name).file_name().and_then(|n| n.to_str()) == Some(name) {
        return Ok(());
    }
    let field = format!("weight_map of {tensor}");
    Err(FormatError::invalid(index, field, "a file name of this directory", format!("{name:?}")))
}
