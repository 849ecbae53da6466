//! The header of a GGUF file (github.com/ggml-org/ggml, docs/gguf.md), versions 2 and 3.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::path::Path;

use super::dtype::DType;
use super::metadata::{Array, Value};
use super::{Metadata, TensorInfo};
use crate::FormatError;

const MAGIC: [u8; 4] = *b"GGUF";
const KEY_BYTES_MAX: u64 = 65_535;
const DIMS_MAX: u32 = 4;
const NESTING_MAX: usize = 4;
const ALIGNMENT_DEFAULT: u64 = 32;
/// A value takes at least its key's length, its type and one byte.
const ENTRY_BYTES_MIN: u64 = 8 + 4 + 1;
/// A tensor's record takes at least a name length, a dimension count, a dimension, a type, an offset.
const TENSOR_BYTES_MIN: u64 = 8 + 4 + 8 + 4 + 8;

/// Reads little-endian fields and knows how much of the file is left.
struct Cursor<'a, R> {
    reader: R,
    path: &'a Path,
    position: u64,
    len: u64,
}

impl<R: Read> Cursor<'_, R> {
    fn left(&self) -> u64 {
        self.len - self.position
    }

    fn bad(
        &self,
        field: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> FormatError {
        FormatError::invalid(self.path, field, expected, found)
    }

    /// Refuses a read of `bytes` that the file cannot hold.
    fn need(&self, field: &str, bytes: u64) -> Result<(), FormatError> {
        if bytes > self.left() {
            return Err(self.bad(
                field,
                format!("{bytes} more bytes from byte {}", self.position),
                format!("the end of the file after {}", self.left()),
            ));
        }
        Ok(())
    }

    fn fill(&mut self, field: &str, out: &mut [u8]) -> Result<(), FormatError> {
        self.need(field, out.len() as u64)?;
        self.reader
            .read_exact(out)
            .map_err(|e| FormatError::io(self.path, format!("read {field}"), e))?;
        self.position += out.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self, field: &str) -> Result<[u8; N], FormatError> {
        let mut out = [0; N];
        self.fill(field, &mut out)?;
        Ok(out)
    }

    fn u32(&mut self, field: &str) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.bytes(field)?))
    }

    fn u64(&mut self, field: &str) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.bytes(field)?))
    }

    /// A count of things that take at least `bytes_min` bytes each.
    fn count(&mut self, field: &str, bytes_min: u64) -> Result<usize, FormatError> {
        let count = self.u64(field)?;
        let fits = count.checked_mul(bytes_min).is_some_and(|bytes| bytes <= self.left());
        match usize::try_from(count) {
            Ok(n) if fits => Ok(n),
            _ => Err(self.bad(
                field,
                format!(
                    "at most {} (the file has {} bytes left)",
                    self.left() / bytes_min,
                    self.left()
                ),
                count.to_string(),
            )),
        }
    }

    fn string(&mut self, field: &str, bytes_max: u64) -> Result<String, FormatError> {
        let len = self.count(&format!("length of {field}"), 1)?;
        if len as u64 > bytes_max {
            return Err(self.bad(
                field,
                format!("at most {bytes_max} bytes"),
                format!("{len} bytes"),
            ));
        }
        let mut bytes = vec![0; len];
        self.fill(field, &mut bytes)?;
        String::from_utf8(bytes).map_err(|e| self.bad(field, "UTF-8", e.utf8_error().to_string()))
    }
}

/// The value types of GGUF.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Str,
    Array,
    U64,
    I64,
    F64,
}

const KINDS: [Kind; 13] = [
    Kind::U8,
    Kind::I8,
    Kind::U16,
    Kind::I16,
    Kind::U32,
    Kind::I32,
    Kind::F32,
    Kind::Bool,
    Kind::Str,
    Kind::Array,
    Kind::U64,
    Kind::I64,
    Kind::F64,
];

impl Kind {
    /// The least an element of this type takes in the file.
    fn bytes_min(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::Str => 8,
            Self::Array => 12,
        }
    }
}

impl<R: Read> Cursor<'_, R> {
    fn kind(&mut self, key: &str) -> Result<Kind, FormatError> {
        let id = self.u32(&format!("type of {key}"))?;
        KINDS.get(id as usize).copied().ok_or_else(|| {
            self.bad(&format!("type of {key}"), "a value type 0..=12", id.to_string())
        })
    }

    fn unsigned(&mut self, key: &str, kind: Kind) -> Result<u64, FormatError> {
        Ok(match kind {
            Kind::U8 => u64::from(self.bytes::<1>(key)?[0]),
            Kind::U16 => u64::from(u16::from_le_bytes(self.bytes(key)?)),
            Kind::U32 => u64::from(self.u32(key)?),
            _ => self.u64(key)?,
        })
    }

    fn signed(&mut self, key: &str, kind: Kind) -> Result<i64, FormatError> {
        Ok(match kind {
            Kind::I8 => i64::from(i8::from_le_bytes(self.bytes(key)?)),
            Kind::I16 => i64::from(i16::from_le_bytes(self.bytes(key)?)),
            Kind::I32 => i64::from(i32::from_le_bytes(self.bytes(key)?)),
            _ => i64::from_le_bytes(self.bytes(key)?),
        })
    }

    fn float(&mut self, key: &str, kind: Kind) -> Result<f64, FormatError> {
        Ok(match kind {
            Kind::F32 => f64::from(f32::from_le_bytes(self.bytes(key)?)),
            _ => f64::from_le_bytes(self.bytes(key)?),
        })
    }

    fn boolean(&mut self, key: &str) -> Result<bool, FormatError> {
        match self.bytes::<1>(key)?[0] {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.bad(key, "a bool, 0 or 1", other.to_string())),
        }
    }

    fn value(&mut self, key: &str) -> Result<Value, FormatError> {
        let kind = self.kind(key)?;
        Ok(match kind {
            Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => {
                Value::Unsigned(self.unsigned(key, kind)?)
            }
            Kind::I8 | Kind::I16 | Kind::I32 | Kind::I64 => Value::Signed(self.signed(key, kind)?),
            Kind::F32 | Kind::F64 => Value::Float(self.float(key, kind)?),
            Kind::Bool => Value::Bool(self.boolean(key)?),
            Kind::Str => Value::Str(self.string(key, u64::MAX)?),
            Kind::Array => Value::Array(self.array(key, 1)?),
        })
    }

    fn array(&mut self, key: &str, depth: usize) -> Result<Array, FormatError> {
        let kind = self.kind(key)?;
        let n = self.count(&format!("length of {key}"), kind.bytes_min())?;
        if kind == Kind::Array && depth == NESTING_MAX {
            return Err(self.bad(key, format!("at most {NESTING_MAX} nested arrays"), "more"));
        }
        // `n` elements are known to fit the rest of the file, so collecting them is bounded by it.
        Ok(match kind {
            Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => {
                Array::Unsigned((0..n).map(|_| self.unsigned(key, kind)).collect::<Result<_, _>>()?)
            }
            Kind::I8 | Kind::I16 | Kind::I32 | Kind::I64 => {
                Array::Signed((0..n).map(|_| self.signed(key, kind)).collect::<Result<_, _>>()?)
            }
            Kind::F32 | Kind::F64 => {
                Array::Float((0..n).map(|_| self.float(key, kind)).collect::<Result<_, _>>()?)
            }
            Kind::Bool => Array::Bool((0..n).map(|_| self.boolean(key)).collect::<Result<_, _>>()?),
            Kind::Str => {
                Array::Str((0..n).map(|_| self.string(key, u64::MAX)).collect::<Result<_, _>>()?)
            }
            Kind::Array => {
                Array::Nested((0..n).map(|_| self.array(key, depth + 1)).collect::<Result<_, _>>()?)
            }
        })
    }

    fn entries(&mut self, count: usize) -> Result<BTreeMap<String, Value>, FormatError> {
        let mut values = BTreeMap::new();
        for index in 0..count {
            let key = self.string(&format!("metadata key {index}"), KEY_BYTES_MAX)?;
            let value = self.value(&key)?;
            if values.contains_key(&key) {
                return Err(self.bad(&key, "a key that occurs once", "the key again"));
            }
            values.insert(key, value);
        }
        Ok(values)
    }

    /// One tensor's record. Its offset is checked later, once the data's start is known.
    fn tensor(&mut self, index: usize) -> Result<TensorInfo, FormatError> {
        let name = self.string(&format!("name of tensor {index}"), KEY_BYTES_MAX)?;
        let dims = self.u32(&format!("dimensions of tensor {name}"))?;
        if !(1..=DIMS_MAX).contains(&dims) {
            return Err(self.bad(
                &format!("dimensions of tensor {name}"),
                format!("1..={DIMS_MAX}"),
                dims.to_string(),
            ));
        }
        let mut shape = Vec::with_capacity(dims as usize);
        for _ in 0..dims {
            let dim = self.u64(&format!("shape of tensor {name}"))?;
            shape.push(usize::try_from(dim).ok().filter(|d| *d > 0).ok_or_else(|| {
                self.bad(&format!("shape of tensor {name}"), "positive sizes", dim.to_string())
            })?);
        }
        let id = self.u32(&format!("type of tensor {name}"))?;
        let offset = self.u64(&format!("offset of tensor {name}"))?;
        let dtype = DType::from_id(id).ok_or_else(|| {
            self.bad(
                &format!("type of tensor {name}"),
                "a known type (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K … Q6_K)",
                format!("type number {id}"),
            )
        })?;
        // The file lists the fastest dimension first; everywhere else here rows come first.
        shape.reverse();
        let bytes = tensor_bytes(dtype, &shape).ok_or_else(|| {
            self.bad(
                &format!("shape of tensor {name}"),
                format!("rows of whole {dtype} blocks ({} elements)", dtype.block_len()),
                format!("{shape:?}"),
            )
        })?;
        Ok(TensorInfo { name, dtype, shape, offset, bytes })
    }
}

fn tensor_bytes(dtype: DType, shape: &[usize]) -> Option<u64> {
    let (cols, outer) = shape.split_last()?;
    let rows = outer.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim))?;
    u64::try_from(dtype.row_bytes(*cols)?.checked_mul(rows)?).ok()
}

/// Metadata and checked tensor records of the `len` bytes behind `reader`.
pub(super) fn parse(
    reader: impl Read,
    len: u64,
    path: &Path,
) -> Result<(Metadata, Vec<TensorInfo>), FormatError> {
    let mut cursor = Cursor { reader, path, position: 0, len };
    let magic: [u8; 4] = cursor.bytes("magic")?;
    if magic != MAGIC {
        return Err(cursor.bad(
            "magic",
            "\"GGUF\"",
            format!("{:?}", magic.escape_ascii().to_string()),
        ));
    }
    let version = cursor.u32("version")?;
    if !(2..=3).contains(&version) {
        let swapped = version.swap_bytes();
        let found = if (2..=3).contains(&swapped) {
            format!("version {swapped} in big-endian order")
        } else {
            format!("version {version}")
        };
        return Err(cursor.bad("version", "2 or 3, little-endian", found));
    }
    let tensors = cursor.count("tensor count", TENSOR_BYTES_MIN)?;
    let entries = cursor.count("metadata count", ENTRY_BYTES_MIN)?;
    let metadata = Metadata::new(path, cursor.entries(entries)?);
    let infos: Vec<TensorInfo> =
        (0..tensors).map(|i| cursor.tensor(i)).collect::<Result<_, _>>()?;
    let alignment = metadata.get_u64("general.alignment")?.unwrap_or(ALIGNMENT_DEFAULT);
    if !alignment.is_power_of_two() || !(8..=1 << 20).contains(&alignment) {
        return Err(metadata.error("general.alignment", "a power of two of at least 8"));
    }
    let data_start = cursor.position.next_multiple_of(alignment);
    let infos = place(infos, data_start, alignment, len, path)?;
    Ok((metadata, infos))
}

/// Makes offsets absolute and refuses tensors that leave the file or share bytes.
fn place(
    mut infos: Vec<TensorInfo>,
    data_start: u64,
    alignment: u64,
    len: u64,
    path: &Path,
) -> Result<Vec<TensorInfo>, FormatError> {
    let mut names = HashSet::new();
    for info in &mut infos {
        let bad = |expected: String, found: String| {
            FormatError::invalid(path, format!("offset of tensor {}", info.name), expected, found)
        };
        if !names.insert(info.name.clone()) {
            let field = format!("tensor {}", info.name);
            return Err(FormatError::invalid(path, field, "a name that occurs once", "it again"));
        }
        if !info.offset.is_multiple_of(alignment) {
            return Err(bad(format!("a multiple of {alignment}"), info.offset.to_string()));
        }
        let start = info.offset.checked_add(data_start);
        let end = start.and_then(|s| s.checked_add(info.bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= len => info.offset = start,
            _ => {
                return Err(bad(
                    format!("{} bytes inside the file's {len}", info.bytes),
                    format!("offset {} after the header's {data_start} bytes", info.offset),
                ));
            }
        }
    }
    let mut order: Vec<&TensorInfo> = infos.iter().collect();
    order.sort_by_key(|info| info.offset);
    for pair in order.windows(2) {
        if pair[0].offset + pair[0].bytes > pair[1].offset {
            return Err(FormatError::invalid(
                path,
                format!("offset of tensor {}", pair[1].name),
                format!("bytes that tensor {} does not use", pair[0].name),
                format!("byte {} of the file", pair[1].offset),
            ));
        }
    }
    Ok(infos)
}
