//! Every kind of key and every storage type that is read, as the `gguf` package writes them.

use lowrank_formats::Checkpoint;
use lowrank_formats::gguf::{Gguf, GgufArray, GgufValue, READABLE};

use crate::golden;

#[test]
fn every_readable_type_is_known() {
    let gguf = Gguf::open(&golden("quants.gguf")).unwrap();
    let values = Checkpoint::open(&golden("quants.safetensors")).unwrap();
    assert_eq!(gguf.tensors().len(), READABLE.len());
    for tensor in gguf.tensors() {
        assert!(READABLE.contains(&tensor.kind.name()) && tensor.kind.is_readable());
        assert_eq!(tensor.name, tensor.kind.name());
        assert_eq!(tensor.shape, values.get(&tensor.name).unwrap().shape);
        let blocks = tensor.bytes.as_ref().len() / tensor.kind.block_bytes();
        assert_eq!(blocks * tensor.kind.block_len(), tensor.len());
    }
    assert_eq!(gguf.f32s("F32").unwrap().len(), 3 * 512);
    for (name, words) in [
        ("Q4_K", "is stored as Q4_K"),
        ("nothing", "is not in this file"),
    ] {
        let error = gguf.f32s(name).unwrap_err().to_string();
        assert!(
            error.contains(words) && error.contains("quants.gguf"),
            "{error}"
        );
    }
}

#[test]
fn every_kind_of_key_is_read() {
    let gguf = Gguf::open(&golden("quants.gguf")).unwrap();
    let metadata = gguf.metadata();
    assert_eq!(metadata.get_str("general.architecture"), Some("quants"));
    for (key, value) in [
        ("key.u8", GgufValue::Unsigned(200)),
        ("key.i8", GgufValue::Signed(-100)),
        ("key.u16", GgufValue::Unsigned(60000)),
        ("key.i16", GgufValue::Signed(-30000)),
        ("key.u32", GgufValue::Unsigned(4_000_000_000)),
        ("key.i32", GgufValue::Signed(-2_000_000_000)),
        ("key.u64", GgufValue::Unsigned(1 << 63)),
        ("key.i64", GgufValue::Signed(-(1 << 62))),
        ("key.f32", GgufValue::Float(f64::from(0.1f32))),
        ("key.f64", GgufValue::Float(0.1)),
        ("key.bool", GgufValue::Bool(true)),
        ("key.string", GgufValue::String("größer ▁".into())),
        (
            "key.ints",
            GgufValue::Array(GgufArray::Signed(vec![1, -2, 3])),
        ),
        (
            "key.floats",
            GgufValue::Array(GgufArray::Float(vec![0.5, -1.5])),
        ),
        (
            "key.bools",
            GgufValue::Array(GgufArray::Bool(vec![true, false])),
        ),
    ] {
        assert_eq!(metadata.get(key), Some(&value), "{key}");
    }
    let strings = metadata.get_str_array("key.strings").unwrap();
    assert!(strings.iter().eq(["a", "", "Ġb"]));
    assert_eq!(strings.len(), 3);
    assert_eq!(metadata.get_i64_array("key.ints"), Some(vec![1, -2, 3]));
    // A getter of another type, or of a negative number as a size, finds nothing.
    assert_eq!(metadata.get_u64("key.i8"), None);
    assert_eq!(metadata.get_u32("key.u64"), None);
    assert_eq!(metadata.get_str("key.u8"), None);
}
