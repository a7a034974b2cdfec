//! Every readable storage type and every kind of key, against the `gguf` package.

use lowrank_formats::gguf::{Gguf, GgufArray, GgufValue};
use lowrank_formats::{Checkpoint, FormatError};

use crate::golden;

#[test]
fn every_readable_type_dequantizes_bit_for_bit() {
    let gguf = Gguf::open(&golden("quants.gguf")).unwrap();
    let expected = Checkpoint::open(&golden("quants.safetensors")).unwrap();
    assert_eq!(gguf.tensors().len(), 11);
    for tensor in gguf.tensors() {
        let values = gguf.dequantize(&tensor.name).unwrap();
        let expected = expected.get(&tensor.name).unwrap();
        assert_eq!(tensor.shape, expected.shape);
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(
            bits(&values),
            bits(&expected.to_f32().unwrap()),
            "{}",
            tensor.name
        );

        // One row alone is that row of the whole.
        let mut row = vec![0.0; tensor.columns()];
        gguf.dequantize_rows(tensor, 1..2, &mut row).unwrap();
        assert_eq!(
            bits(&row),
            bits(&values[tensor.columns()..2 * tensor.columns()])
        );
    }
}

#[test]
fn rows_outside_a_tensor_are_refused() {
    let gguf = Gguf::open(&golden("quants.gguf")).unwrap();
    let tensor = gguf.tensor("Q4_K").unwrap();
    for (rows, length) in [
        (2..4, 1024),
        (0..1, 511),
        (0..1, 1024),
        (3..3, 1),
        (usize::MAX - 1..usize::MAX, 512),
    ] {
        let error = gguf
            .dequantize_rows(tensor, rows, &mut vec![0.0; length])
            .unwrap_err();
        assert!(matches!(error, FormatError::Tensor { tensor, .. } if tensor == "Q4_K"));
    }
    let error = gguf.dequantize("nothing").unwrap_err().to_string();
    assert!(
        error.contains("`nothing`") && error.contains("quants.gguf"),
        "{error}"
    );
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
    assert_eq!(strings, ["a", "", "Ġb"]);
    assert_eq!(metadata.get_i64_array("key.ints"), Some(vec![1, -2, 3]));
    // A getter of another type, or of a negative number as a size, finds nothing.
    assert_eq!(metadata.get_u64("key.i8"), None);
    assert_eq!(metadata.get_u32("key.u64"), None);
    assert_eq!(metadata.get_str("key.u8"), None);
}
