//! GGUF files that are right, and every way in which they may be wrong.

use std::path::Path;

use headstart_formats::gguf::{Array, DType, Gguf, Value};
use proptest::prelude::*;

/// A small GGUF writer: just enough to build files, right ones and wrong ones.
#[derive(Clone)]
struct Writer {
    version: u32,
    tensor_count: Option<u64>,
    entry_count: Option<u64>,
    entries: Vec<Vec<u8>>,
    tensors: Vec<(Vec<u8>, usize)>,
    alignment: usize,
}

fn string(text: &str) -> Vec<u8> {
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    out
}

impl Writer {
    fn new() -> Self {
        Self {
            version: 3,
            tensor_count: None,
            entry_count: None,
            entries: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
        }
    }

    fn raw(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        let mut entry = string(key);
        entry.extend(kind.to_le_bytes());
        entry.extend(value);
        self.entries.push(entry);
        self
    }

    fn str(self, key: &str, value: &str) -> Self {
        self.raw(key, 8, &string(value))
    }

    fn tensor(mut self, name: &str, dims: &[u64], dtype: u32, offset: u64, bytes: usize) -> Self {
        let mut info = string(name);
        info.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| info.extend(d.to_le_bytes()));
        info.extend(dtype.to_le_bytes());
        info.extend(offset.to_le_bytes());
        self.tensors.push((info, bytes));
        self
    }

    fn build(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.entry_count.unwrap_or(self.entries.len() as u64).to_le_bytes());
        self.entries.iter().for_each(|e| out.extend(e));
        self.tensors.iter().for_each(|t| out.extend(&t.0));
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        for (i, (_, bytes)) in self.tensors.iter().enumerate() {
            out.extend((0..*bytes).map(|b| (b + i) as u8));
            out.resize(out.len().next_multiple_of(self.alignment), 0);
        }
        out
    }
}

fn sample() -> Writer {
    let mut words = 8u32.to_le_bytes().to_vec();
    words.extend(2u64.to_le_bytes());
    words.extend(string("a"));
    words.extend(string("ß"));
    let mut nested = 9u32.to_le_bytes().to_vec();
    nested.extend(1u64.to_le_bytes());
    nested.extend(5u32.to_le_bytes());
    nested.extend(1u64.to_le_bytes());
    nested.extend((-3i32).to_le_bytes());
    Writer::new()
        .str("general.architecture", "llama")
        .raw("n", 4, &7u32.to_le_bytes())
        .raw("eps", 6, &1e-5f32.to_le_bytes())
        .raw("flag", 7, &[1])
        .raw("words", 9, &words)
        .raw("nested", 9, &nested)
        .tensor("a", &[4, 3], 0, 0, 48)
        .tensor("q", &[32, 2], 8, 64, 68)
}

fn error(bytes: &[u8]) -> String {
    Gguf::check(bytes, Path::new("m.gguf")).expect_err("a broken file was accepted").to_string()
}

#[track_caller]
fn assert_error(bytes: &[u8], parts: &[&str]) {
    let text = error(bytes);
    assert!(text.starts_with("m.gguf: "), "{text}");
    for part in parts {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

#[test]
fn a_right_file_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, sample().build()).unwrap();
    let file = Gguf::open(&path).unwrap();
    let meta = file.metadata();
    assert_eq!(meta.require_str("general.architecture").unwrap(), "llama");
    assert_eq!(meta.get_u32("n").unwrap(), Some(7));
    assert_eq!(meta.get_f32("eps").unwrap(), Some(1e-5));
    assert_eq!(meta.get_bool("flag").unwrap(), Some(true));
    assert_eq!(meta.get_str_array("words").unwrap().unwrap(), ["a", "ß"]);
    assert_eq!(
        meta.get("nested"),
        Some(&Value::Array(Array::Nested(vec![Array::Signed(vec![-3])])))
    );
    assert_eq!(meta.get_u32("absent").unwrap(), None);
    let error = meta.get_u32("flag").unwrap_err().to_string();
    assert!(error.contains("flag") && error.contains("the bool true"), "{error}");

    let info = file.tensor("a").unwrap();
    assert_eq!((info.dtype, info.shape.as_slice()), (DType::F32, [3, 4].as_slice()));
    let mut bytes = Vec::new();
    file.read("q", &mut bytes).unwrap();
    assert_eq!(bytes, (0..68).map(|b| b as u8 + 1).collect::<Vec<_>>());
    file.read_rows("a", 1..3, &mut bytes).unwrap();
    assert_eq!(bytes, (16..48).collect::<Vec<u8>>());
    assert!(file.read_rows("a", 2..4, &mut bytes).is_err());
    assert!(file.read("b", &mut bytes).is_err());
}

#[test]
fn any_cut_is_noticed() {
    let bytes = sample().build();
    // The last bytes are padding, which a file may lack.
    for len in 0..bytes.len() - 28 {
        error(&bytes[..len]);
    }
}

#[test]
fn magic_and_version() {
    let mut bytes = sample().build();
    bytes[0] = b'X';
    assert_error(&bytes, &["magic", "XGUF"]);
    let mut old = sample();
    old.version = 1;
    assert_error(&old.build(), &["version", "2 or 3", "version 1"]);
    old.version = 3u32.swap_bytes();
    assert_error(&old.build(), &["version", "big-endian"]);
}

#[test]
fn absurd_counts_allocate_nothing() {
    let mut file = sample();
    file.tensor_count = Some(u64::MAX / 40);
    assert_error(&file.build(), &["tensor count", "at most"]);
    let mut file = sample();
    file.entry_count = Some(1 << 60);
    assert_error(&file.build(), &["metadata count", "at most"]);
    let mut array = 10u32.to_le_bytes().to_vec();
    array.extend((1u64 << 61).to_le_bytes());
    assert_error(&Writer::new().raw("big", 9, &array).build(), &["length of big"]);
    assert_error(&Writer::new().raw("s", 8, &u64::MAX.to_le_bytes()).build(), &["length of s"]);
}

#[test]
fn deep_nesting_is_refused() {
    let mut array = Vec::new();
    for _ in 0..50 {
        array.extend(9u32.to_le_bytes());
        array.extend(1u64.to_le_bytes());
    }
    array.extend([0; 64]);
    assert_error(&Writer::new().raw("deep", 9, &array).build(), &["deep", "nested"]);
}

#[test]
fn values_that_are_not() {
    assert_error(&Writer::new().raw("b", 7, &[2]).build(), &["b", "bool", "2"]);
    assert_error(&Writer::new().raw("k", 13, &[0; 64]).build(), &["type of k", "13"]);
    let twice = Writer::new().str("k", "a").str("k", "b");
    assert_error(&twice.build(), &["k", "once"]);
    let mut bad_utf8 = 1u64.to_le_bytes().to_vec();
    bad_utf8.push(0xff);
    assert_error(&Writer::new().raw("t", 8, &bad_utf8).build(), &["t", "UTF-8"]);
    let odd = Writer::new().raw("general.alignment", 4, &24u32.to_le_bytes());
    assert_error(&odd.build(), &["general.alignment", "power of two"]);
}

#[test]
fn tensors_that_cannot_be() {
    let with = |dims: &[u64], dtype, offset| sample().tensor("t", dims, dtype, offset, 64).build();
    assert_error(&with(&[8], 0, 1 << 40), &["offset of tensor t"]);
    assert_error(&with(&[8], 0, u64::MAX - 31), &["offset of tensor t"]);
    assert_error(&with(&[8], 0, 33), &["offset of tensor t", "multiple of 32"]);
    assert_error(&with(&[8], 0, 0), &["offset of tensor", "does not use"]);
    assert_error(&with(&[8], 4, 160), &["type of tensor t", "type number 4"]);
    assert_error(&with(&[31], 8, 160), &["shape of tensor t", "Q8_0"]);
    assert_error(&with(&[u64::MAX, 4], 24, 160), &["shape of tensor t"]);
    assert_error(&with(&[0, 4], 0, 160), &["shape of tensor t"]);
    assert_error(&with(&[1; 5], 0, 160), &["dimensions of tensor t"]);
    let twice = sample().tensor("a", &[8], 0, 160, 64);
    assert_error(&twice.build(), &["tensor a", "once"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes_never_panic(tail in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(&tail);
        let _ = Gguf::check(&bytes, Path::new("m.gguf"));
        let _ = Gguf::check(&tail, Path::new("m.gguf"));
    }

    #[test]
    fn mutations_never_panic_and_keep_tensors_inside(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<Option<prop::sample::Index>>(),
    ) {
        let mut bytes = sample().build();
        for (index, byte) in changes {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok((_, tensors)) = Gguf::check(&bytes, Path::new("m.gguf")) {
            for t in tensors {
                prop_assert!(t.offset + t.bytes <= bytes.len() as u64);
            }
        }
    }
}
