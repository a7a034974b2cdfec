//! Safetensors files that are cut, contradict themselves or mean harm.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use lowrank_formats::checkpoint::{Checkpoint, StoredDType};
use lowrank_formats::{FormatError, TensorSpec, write_safetensors};
use proptest::prelude::*;

fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

fn open_bytes(bytes: &[u8]) -> Result<Checkpoint, FormatError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, bytes).unwrap();
    Checkpoint::open(&path)
}

/// Opening fails, and the message names the file and every one of `words`.
fn assert_refused(bytes: &[u8], words: &[&str]) {
    let message = open_bytes(bytes).expect_err("must be refused").to_string();
    for word in words.iter().chain(&["model.safetensors"]) {
        assert!(message.contains(word), "{message:?} does not say {word:?}");
    }
}

fn tensor(dtype: &str, shape: &str, start: u64, end: u64) -> String {
    format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
}

#[test]
fn an_honest_file_is_read() {
    let header = format!(
        r#"{{"__metadata__":{{"format":"pt"}},"a":{},"b":{},"empty":{}}}"#,
        tensor("F32", "[2,1]", 0, 8),
        tensor("I64", "[]", 8, 16),
        tensor("BF16", "[0,5]", 16, 16)
    );
    let mut data = [1.0f32.to_le_bytes(), (-2.5f32).to_le_bytes()].concat();
    data.extend(7i64.to_le_bytes());
    let checkpoint = open_bytes(&file_of(&header, &data)).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "empty"]);
    assert_eq!(checkpoint.total_bytes(), 16);
    assert_eq!(checkpoint.metadata()["format"], "pt");
    let a = checkpoint.get("a").unwrap();
    assert_eq!(
        (a.shape.as_slice(), a.to_f32().unwrap().as_slice()),
        (&[2, 1][..], &[1.0, -2.5][..])
    );
    a.bytes.release();
    assert_eq!(a.to_bf16().unwrap()[1].to_f32(), -2.5);
    let b = checkpoint.get("b").unwrap();
    assert_eq!((b.dtype.name(), b.len()), ("I64", 1));
    let message = b.to_f32().unwrap_err().to_string();
    assert!(
        message.contains("`b`") && message.contains("I64"),
        "{message}"
    );
    assert!(
        checkpoint
            .get("empty")
            .unwrap()
            .to_f32()
            .unwrap()
            .is_empty()
    );
}

#[test]
fn lies_are_refused_by_name() {
    let four = [0u8; 4];
    let one = |entry: String| format!(r#"{{"liar":{entry}}}"#);
    assert_refused(&[], &["is empty"]);
    assert_refused(&[9; 7], &["7 bytes"]);
    assert_refused(&u64::MAX.to_le_bytes(), &["not a safetensors file"]);
    assert_refused(&200_000_000u64.to_le_bytes(), &["not a safetensors file"]);
    assert_refused(&1000u64.to_le_bytes(), &["truncated"]);
    assert_refused(&file_of("", &[]), &["not valid"]);
    assert_refused(&file_of("[]", &[]), &["not valid"]);
    assert_refused(&file_of("{}  x", &[]), &["not valid"]);
    assert_refused(&file_of("{\"a\":", &[]), &["not valid"]);
    assert_refused(&file_of("{\"a\":\"\u{7f}\"}", &[]), &["`a`"]);
    assert_refused(&file_of(r#"{"__metadata__":{"n":1}}"#, &[]), &["not valid"]);
    let entry = |shape, start, end| tensor("F32", shape, start, end);
    for header in [
        one(tensor("F33", "[1]", 0, 4)),
        one(entry("[-1]", 0, 4)),
        one(entry("[1.5]", 0, 4)),
        one(entry("[2]", 0, 4)),
        one(entry("[1]", 4, 0)),
        one(entry("[1]", 4, 8)),
        one(entry("[1]", 0, 8)),
        one(entry("[1000]", 0, 4000)),
        one(entry("[18446744073709551615,2]", 0, 4)),
        one(entry("[4611686018427387905]", 0, 4)),
        one(entry("[1,1,1,1,1,1,1,1,1]", 0, 4)),
        one(tensor("F4", "[3]", 0, 2)),
        one(r#"{"dtype":"F32","shape":[1]}"#.into()),
        format!(r#"{{"liar":{0},"liar":{0}}}"#, entry("[1]", 0, 4)),
    ] {
        assert_refused(&file_of(&header, &four), &["liar"]);
    }
    // Two tensors over the same bytes, a hole between two, bytes that belong to none.
    let two = |s, e| {
        format!(
            r#"{{"a":{},"b":{}}}"#,
            entry("[1]", 0, 4),
            entry("[1]", s, e)
        )
    };
    assert_refused(&file_of(&two(0, 4), &four), &["not a valid"]);
    assert_refused(&file_of(&two(8, 12), &[0; 12]), &["not a valid"]);
    assert_refused(
        &file_of(&two(4, 8), &[0; 12]),
        &["4 bytes", "belong to none"],
    );
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let header = format!(r#"{{"a":{}}}"#, tensor("F32", "[3]", 0, 12));
    let bytes = file_of(&header, &[0; 12]);
    open_bytes(&bytes).unwrap();
    for length in 0..bytes.len() {
        assert!(
            open_bytes(&bytes[..length]).is_err(),
            "cut to {length} bytes"
        );
    }
}

fn shard(folder: &Path, name: &str, tensors: &[&str]) {
    let specs: Vec<_> = tensors
        .iter()
        .map(|name| TensorSpec {
            name: (*name).into(),
            dtype: StoredDType::F32,
            shape: vec![1],
        })
        .collect();
    write_safetensors(&folder.join(name), &specs, &BTreeMap::new(), |i, out| {
        out.write_all(&(i as f32).to_le_bytes())
    })
    .unwrap();
}

fn index(folder: &Path, entries: &[(&str, &str)]) {
    let map: BTreeMap<_, _> = entries.iter().copied().collect();
    let index = serde_json::json!({ "metadata": { "total_size": 8 }, "weight_map": map });
    fs::write(
        folder.join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
}

#[test]
fn shards_are_read_and_their_faults_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let open = || Checkpoint::open(folder);
    let message = || open().unwrap_err().to_string();

    fs::write(folder.join("pytorch_model.bin"), "").unwrap();
    assert!(message().contains("pytorch_model.bin"), "{}", message());

    shard(folder, "1.safetensors", &["a", "b"]);
    shard(folder, "2.safetensors", &["c"]);
    index(
        folder,
        &[
            ("a", "1.safetensors"),
            ("b", "1.safetensors"),
            ("c", "2.safetensors"),
        ],
    );
    assert_eq!(open().unwrap().names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(open().unwrap().get("b").unwrap().to_f32().unwrap(), [1.0]);

    index(folder, &[("a", "1.safetensors"), ("d", "2.safetensors")]);
    assert!(
        message().contains("`d`") && message().contains("2.safetensors"),
        "{}",
        message()
    );
    index(folder, &[("a", "1.safetensors"), ("z", "9.safetensors")]);
    assert!(
        message().contains("9.safetensors") && message().contains("`z`"),
        "{}",
        message()
    );
    for outside in ["../1.safetensors", "/etc/passwd", "", ".."] {
        index(folder, &[("a", outside)]);
        assert!(
            message().contains("not the name of a file in this folder"),
            "{}",
            message()
        );
    }
    shard(folder, "3.safetensors", &["a"]);
    index(
        folder,
        &[
            ("a", "1.safetensors"),
            ("c", "2.safetensors"),
            ("b", "3.safetensors"),
        ],
    );
    assert!(
        message().contains("`a`") && message().contains("1.safetensors"),
        "{}",
        message()
    );
    fs::write(folder.join("model.safetensors.index.json"), "{}").unwrap();
    assert!(message().contains("weight_map"), "{}", message());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = open_bytes(&bytes);
    }

    #[test]
    fn a_damaged_header_never_panics(at in 0usize..130, byte in any::<u8>()) {
        let header = format!(
            r#"{{"a":{},"b":{}}}"#,
            tensor("F32", "[1,1]", 0, 4),
            tensor("BF16", "[2]", 4, 8)
        );
        let mut bytes = file_of(&header, &[0; 8]);
        let at = at % bytes.len();
        bytes[at] = byte;
        // Whatever is still accepted holds what it says.
        if let Ok(checkpoint) = open_bytes(&bytes) {
            for name in checkpoint.names() {
                let entry = checkpoint.get(name).unwrap();
                if let Ok(values) = entry.to_f32() {
                    prop_assert_eq!(values.len(), entry.len());
                }
            }
        }
    }
}
