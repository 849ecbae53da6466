//! Safetensors files that are right, and every way in which they may lie.

use std::path::Path;

use headstart_formats::safetensors::{DType, SafetensorsDir, SafetensorsFile};
use proptest::prelude::*;

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend(data);
    out
}

const HEADER: &str = r#"{"__metadata__":{"format":"pt"},
    "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[16,28]},
    "a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;

fn sample() -> Vec<u8> {
    file(HEADER, &(0..28).collect::<Vec<u8>>())
}

#[track_caller]
fn assert_error(bytes: &[u8], parts: &[&str]) {
    let text = SafetensorsFile::check(bytes, Path::new("m.safetensors"))
        .expect_err("a broken file was accepted")
        .to_string();
    assert!(text.starts_with("m.safetensors: "), "{text}");
    for part in parts {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

#[test]
fn a_single_file_is_read() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), sample()).unwrap();
    let weights = SafetensorsDir::open(dir.path()).unwrap();
    let info = weights.tensor("b").unwrap();
    assert_eq!((info.dtype, info.shape.as_slice()), (DType::BF16, [2, 3].as_slice()));
    let mut bytes = Vec::new();
    weights.read("a", &mut bytes).unwrap();
    assert_eq!(bytes, (0..16).collect::<Vec<u8>>());
    weights.read_rows("b", 1..2, &mut bytes).unwrap();
    assert_eq!(bytes, (22..28).collect::<Vec<u8>>());
    assert!(weights.read("c", &mut bytes).is_err());
    assert!(weights.read_rows("b", 1..3, &mut bytes).is_err());
}

#[test]
fn shards_are_found_through_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    write("one.safetensors", &sample());
    let other = r#"{"c":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#;
    write("two.safetensors", &file(other, &[8, 9]));
    let index = |map: &str| format!(r#"{{"metadata":{{}},"weight_map":{{{map}}}}}"#);
    let open = || SafetensorsDir::open(dir.path());

    let good = index(r#""a":"one.safetensors","b":"one.safetensors","c":"two.safetensors""#);
    write("model.safetensors.index.json", good.as_bytes());
    let mut bytes = Vec::new();
    open().unwrap().read("c", &mut bytes).unwrap();
    assert_eq!(bytes, [8, 9]);

    let wrong = [
        (r#""a":"two.safetensors""#, "tensor a"),
        (r#""a":"../one.safetensors""#, "weight_map of a"),
        (r#""a":"three.safetensors""#, "three.safetensors"),
    ];
    for (map, part) in wrong {
        write("model.safetensors.index.json", index(map).as_bytes());
        let error = open().unwrap_err().to_string();
        assert!(error.contains(part), "{error:?} lacks {part:?}");
    }
    write("model.safetensors.index.json", b"[");
    assert!(open().unwrap_err().to_string().contains("weight_map"));
}

#[test]
fn a_directory_without_weights_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let error = SafetensorsDir::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("model.safetensors"), "{error}");
}

#[test]
fn any_cut_is_noticed() {
    let bytes = sample();
    for len in 0..bytes.len() {
        assert_error(&bytes[..len], &[]);
    }
    let mut longer = bytes;
    longer.push(0);
    assert_error(&longer, &["data", "28 bytes", "29 bytes"]);
}

#[test]
fn a_lying_header_size_is_refused() {
    for lie in [u64::MAX, 1 << 40, sample().len() as u64] {
        let mut bytes = sample();
        bytes[..8].copy_from_slice(&lie.to_le_bytes());
        assert_error(&bytes, &["header size", &lie.to_string()]);
    }
    let mut bytes = sample();
    bytes[0] -= 1;
    assert_error(&bytes, &["header", "JSON"]);
}

#[test]
fn lying_records_are_refused() {
    let data = [0; 16];
    let one = |record: &str| file(&format!(r#"{{"a":{record}}}"#), &data);
    let f32s = |shape: &str, offsets: &str| {
        one(&format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}"#))
    };
    assert!(SafetensorsFile::check(&f32s("[4]", "[0,16]"), Path::new("m")).is_ok());
    assert_error(&f32s("[5]", "[0,16]"), &["tensor a", "F32 [5]", "16 bytes"]);
    assert_error(&f32s("[3]", "[0,12]"), &["data", "12 bytes"]);
    assert_error(&f32s("[4]", "[4,20]"), &["tensor a", "from byte 0"]);
    assert_error(&f32s("[4]", "[16,0]"), &["tensor a"]);
    assert_error(&f32s("[5]", "[0,20]"), &["data", "20 bytes"]);
    assert_error(&f32s("[18446744073709551615,9]", "[0,16]"), &["tensor a"]);
    assert_error(&f32s("[-4]", "[0,16]"), &["header"]);
    assert_error(&one(r#"{"dtype":"F31","shape":[4],"data_offsets":[0,16]}"#), &["F31"]);
    assert_error(&file("[]", &data), &["object"]);
    let record = |range| format!(r#""a":{{"dtype":"U8","shape":[8],"data_offsets":{range}}}"#);
    let twice = format!("{{{},{}}}", record("[0,8]"), record("[8,16]"));
    assert_error(&file(&twice, &data), &["tensor a", "once"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn mutations_never_panic_and_keep_tensors_inside(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = sample();
        for (index, byte) in changes {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(tensors) = SafetensorsFile::check(&bytes, Path::new("m")) {
            for t in tensors.values() {
                prop_assert!(t.offset + t.bytes <= bytes.len() as u64);
            }
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        let _ = SafetensorsFile::check(&bytes, Path::new("m"));
    }
}
