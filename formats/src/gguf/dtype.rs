//! Element types of GGUF tensors (ggml `ggml_type`, `ggml-common.h` for the block layouts).

/// How a tensor's elements are stored: `block_len` elements of a row share `block_bytes` bytes.
#[allow(non_camel_case_types, missing_docs)] // ggml's own names
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    F16,
    BF16,
    F64,
    I8,
    I16,
    I32,
    I64,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q8_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_K,
}

/// (id in the file, type, name, elements a block, bytes a block)
const TABLE: [(u32, DType, &str, usize, usize); 20] = [
    (0, DType::F32, "F32", 1, 4),
    (1, DType::F16, "F16", 1, 2),
    (2, DType::Q4_0, "Q4_0", 32, 18),
    (3, DType::Q4_1, "Q4_1", 32, 20),
    (6, DType::Q5_0, "Q5_0", 32, 22),
    (7, DType::Q5_1, "Q5_1", 32, 24),
    (8, DType::Q8_0, "Q8_0", 32, 34),
    (9, DType::Q8_1, "Q8_1", 32, 36),
    (10, DType::Q2_K, "Q2_K", 256, 84),
    (11, DType::Q3_K, "Q3_K", 256, 110),
    (12, DType::Q4_K, "Q4_K", 256, 144),
    (13, DType::Q5_K, "Q5_K", 256, 176),
    (14, DType::Q6_K, "Q6_K", 256, 210),
    (15, DType::Q8_K, "Q8_K", 256, 292),
    (24, DType::I8, "I8", 1, 1),
    (25, DType::I16, "I16", 1, 2),
    (26, DType::I32, "I32", 1, 4),
    (27, DType::I64, "I64", 1, 8),
    (28, DType::F64, "F64", 1, 8),
    (30, DType::BF16, "BF16", 1, 2),
];

impl DType {
    /// The type with this number in a GGUF file.
    #[must_use]
    pub fn from_id(id: u32) -> Option<Self> {
        TABLE.iter().find(|row| row.0 == id).map(|row| row.1)
    }

    fn row(self) -> &'static (u32, DType, &'static str, usize, usize) {
        // Every variant has its row; a test walks them all.
        TABLE.iter().find(|row| row.1 == self).unwrap_or(&TABLE[0])
    }

    /// ggml's name of the type.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Elements a block.
    #[must_use]
    pub fn block_len(self) -> usize {
        self.row().3
    }

    /// Bytes a block.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        self.row().4
    }

    /// Bytes of a row of `cols` elements; `None` where `cols` is no whole number of blocks or the
    /// product overflows.
    #[must_use]
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_finds_itself() {
        for (id, dtype, name, len, bytes) in TABLE {
            assert_eq!(DType::from_id(id), Some(dtype));
            assert_eq!((dtype.name(), dtype.block_len(), dtype.block_bytes()), (name, len, bytes));
            assert_eq!(format!("{dtype:?}"), name);
        }
        assert_eq!(DType::from_id(4), None);
    }

    #[test]
    fn rows_are_whole_blocks() {
        assert_eq!(DType::Q4_K.row_bytes(512), Some(288));
        assert_eq!(DType::Q4_K.row_bytes(500), None);
        assert_eq!(DType::F64.row_bytes(usize::MAX), None);
    }
}
