//! Blocks that are made of numbers, against those that llama.cpp makes.

use std::path::Path;
use std::time::Instant;

use lowrank_kernels::{NumberFormat, Tensor, TensorError, engines, reference, with_engine};
use proptest::prelude::*;

/// Numbers of a row of the goldens.
const ROW: usize = 256;
/// The formats of the goldens, in their order.
const FORMATS: [NumberFormat; 8] = [
    NumberFormat::Q4_0,
    NumberFormat::Q8_0,
    NumberFormat::Q4K,
    NumberFormat::Q6K,
    NumberFormat::Q5_0,
    NumberFormat::Q4_1,
    NumberFormat::Q5_1,
    NumberFormat::Q5K,
];

fn quantized(format: NumberFormat, row: &[f32]) -> Result<Vec<u8>, TensorError> {
    let mut bytes = Vec::new();
    format.quantize(row, &mut bytes).map(|()| bytes)
}

fn numbers_of(bytes: &[u8]) -> Vec<f32> {
    let numbers = bytes.as_chunks().0.iter();
    numbers.map(|number| f32::from_le_bytes(*number)).collect()
}

/// Of `expected`, the blocks that are not those of the numbers.
fn differing(format: NumberFormat, numbers: &[f32], expected: &[u8]) -> Vec<usize> {
    let found = quantized(format, numbers).unwrap();
    assert_eq!(found.len(), expected.len(), "{format}");
    let size = format.bytes_for(1);
    let blocks = found.chunks(size).zip(expected.chunks(size));
    let blocks = blocks.enumerate().filter(|(_, (a, b))| a != b);
    blocks.map(|(i, _)| i).collect()
}

#[test]
fn blocks_are_those_of_llama_cpp() {
    let goldens = include_bytes!("goldens/quantize.bin");
    let of_row: usize = FORMATS.iter().map(|format| format.bytes_for(ROW)).sum();
    let rows = goldens.len() / (ROW * size_of::<f32>() + of_row);
    let (numbers, mut rest) = goldens.split_at(rows * ROW * size_of::<f32>());
    let numbers = numbers_of(numbers);
    for format in FORMATS {
        let (blocks, behind) = rest.split_at(format.bytes_for(numbers.len()));
        rest = behind;
        for engine in engines() {
            with_engine(engine, || {
                let differing = differing(format, &numbers, blocks);
                assert!(differing.is_empty(), "{format}, {engine:?}: {differing:?}");
            });
        }
    }
    assert!(rest.is_empty() && rows > 20);
}

/// What `scripts/goldens_quantize.py --model` wrote.
#[test]
fn blocks_of_a_model_are_those_of_llama_cpp() {
    let Some(folder) = std::env::var_os("LOWRANK_QUANTIZED") else {
        eprintln!("skipped: LOWRANK_QUANTIZED is not set");
        return;
    };
    let read = |name: &str| std::fs::read(Path::new(&folder).join(name)).unwrap();
    let numbers = numbers_of(&read("numbers.f32"));
    for format in FORMATS {
        let begin = Instant::now();
        let mut blocks = Vec::new();
        format.quantize(&numbers, &mut blocks).unwrap();
        let seconds = begin.elapsed().as_secs_f64();
        let differing = differing(format, &numbers, &read(&format.to_string()));
        eprintln!(
            "{format}: {} of {} blocks differ; {} numbers in {seconds:.2} s on one thread",
            differing.len(),
            numbers.len() / format.block_len(),
            numbers.len(),
        );
        assert!(differing.is_empty(), "{format}");
    }
}

#[test]
fn single_numbers_are_rounded_to_nearest() {
    // Halfway between two numbers of either format, and a half-precision number below the normal ones.
    let row = [
        1.0,
        -2.5,
        1.0 + 2.0_f32.powi(-8),
        1.0 + 2.0_f32.powi(-11),
        3e-6,
    ];
    let bf16 = row.map(|x| half::bf16::from_f32(x).to_f32());
    let f16 = row.map(|x| half::f16::from_f32(x).to_f32());
    for (format, expected) in [
        (NumberFormat::F32, row),
        (NumberFormat::Bf16, bf16),
        (NumberFormat::F16, f16),
    ] {
        let bytes = quantized(format, &row).unwrap();
        let tensor = Tensor::from_le_bytes(&bytes, format, 1, row.len()).unwrap();
        assert_eq!(tensor.to_vec(), expected, "{format}");
    }
}

/// A number is off by half a step at most, where steps follow the largest of a block.
#[test]
fn what_is_read_is_close_to_what_was_stored() {
    let row: Vec<f32> = (0..512)
        .map(|i| ((i * i) as f32 * 0.37).sin() * 3.0)
        .collect();
    for (format, most) in [
        (NumberFormat::Q4_0, 3.0 / 8.0),
        (NumberFormat::Q4_1, 3.1 / 15.0),
        (NumberFormat::Q5_0, 3.0 / 16.0),
        (NumberFormat::Q5_1, 3.1 / 31.0),
        (NumberFormat::Q5K, 3.3 / 31.0),
        (NumberFormat::Q8_0, 1.6 / 127.0),
        (NumberFormat::Q4K, 3.3 / 15.0),
        (NumberFormat::Q6K, 3.0 / 32.0),
    ] {
        let bytes = quantized(format, &row).unwrap();
        let tensor = Tensor::from_le_bytes(&bytes, format, 1, row.len()).unwrap();
        for (i, (found, x)) in tensor.to_vec().iter().zip(&row).enumerate() {
            assert!(
                (found - x).abs() <= most * 1.01,
                "{format} {i}: {found} {x}"
            );
        }
    }
}

#[test]
fn what_cannot_be_stored_is_named() {
    let mut bytes = vec![7];
    for format in NumberFormat::ALL {
        let len = format.block_len();
        if !format.has_quantizer() {
            let error = format.quantize(&vec![1.0; len], &mut bytes).unwrap_err();
            assert_eq!(error, TensorError::NoQuantizer { format });
            continue;
        }
        let (mut row, at) = (vec![0.5; 3 * len], 2 * len);
        for value in [
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            3.4e38,
            -1e30,
            1e14,
            1e10,
        ] {
            row[at] = value;
            // Their scales, or the numbers themselves, have the exponents of f32.
            let widest = matches!(
                format,
                NumberFormat::F32 | NumberFormat::Bf16 | NumberFormat::Nf4 | NumberFormat::Fp4
            );
            if widest && value.is_finite() && value.abs() < 3.39e38 {
                continue;
            }
            match format.quantize(&row, &mut bytes) {
                Err(TensorError::Number {
                    at: found,
                    value: of_error,
                    ..
                }) => assert_eq!(
                    (found, of_error.to_bits()),
                    (at, value.to_bits()),
                    "{format}"
                ),
                Ok(()) if widest && format != NumberFormat::Bf16 => bytes.truncate(1),
                other => panic!("{format}, {value}: {other:?}"),
            }
        }
        if len > 1 {
            let found = len + 1;
            let error = format.quantize(&row[..found], &mut bytes).unwrap_err();
            assert_eq!(error, TensorError::PartOfBlock { format, found });
        }
        assert_eq!(bytes, [7], "{format}");
    }
    let error = quantized(NumberFormat::Q4K, &[0.0; 320]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a row of 320 numbers is not made of whole blocks of Q4_K, which have 256 numbers each"
    );
    let error = quantized(NumberFormat::Q2K, &[0.0; 256]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "numbers cannot be quantized to Q2_K; they can be to f32, bf16, f16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, NF4, FP4"
    );
    let error = quantized(NumberFormat::F16, &[0.0, 7e4]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "number 1 of the row is 70000, which cannot be stored as f16"
    );
}

/// The numbers of a matrix on every engine, against the reference; NaN is NaN.
fn check_widening(format: NumberFormat, bytes: &[u8]) {
    let unit = format.bytes_for(1);
    let bytes = &bytes[..bytes.len() / unit * unit];
    let cols = bytes.len() / unit * format.block_len();
    let expected = reference::widened(format, bytes);
    let stored = Tensor::from_le_bytes(bytes, format, 1, cols).unwrap();
    for engine in engines() {
        let found = with_engine(engine, || stored.to_vec());
        assert_eq!(found.len(), expected.len());
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!(
                found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(),
                "{format}, {engine:?}, number {i}: {found} is not {expected}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_are_blocks(bytes in proptest::collection::vec(any::<u8>(), 0..1200)) {
        for format in NumberFormat::ALL {
            check_widening(format, &bytes);
        }
    }

    /// Scales that are zero, infinite, NaN or below the normal numbers come more often than by chance.
    #[test]
    fn blocks_of_one_byte_are_blocks(byte in any::<u8>()) {
        for format in NumberFormat::ALL {
            check_widening(format, &[byte; 420]);
        }
    }

    /// Any numbers make blocks of finite numbers, or an error; no error where they are below 2.
    #[test]
    fn any_numbers_are_stored_or_refused(row in proptest::collection::vec(any::<u32>(), 256)) {
        let any: Vec<f32> = row.iter().map(|bits| f32::from_bits(*bits)).collect();
        let small: Vec<f32> = row.iter().map(|bits| f32::from_bits(bits & !(1 << 30))).collect();
        for format in NumberFormat::ALL.into_iter().filter(|format| format.has_quantizer()) {
            let small = quantized(format, &small).unwrap();
            for bytes in [quantized(format, &any).unwrap_or_default(), small] {
                let numbers = reference::widened(format, &bytes);
                prop_assert!(numbers.iter().all(|x| x.is_finite()), "{format}");
            }
        }
    }
}

#[test]
fn bytes_of_another_size_are_refused() {
    for format in NumberFormat::ALL {
        let (unit, len) = (format.bytes_for(1), format.block_len());
        for (bytes, rows, cols) in [
            (0, 1, len),
            (unit - 1, 1, len),
            (unit + 1, 1, len),
            (2 * unit - 1, 1, 2 * len),
            (unit, 2, len),
            (unit, 0, len),
            (unit, usize::MAX, 2),
            (2 * unit, 4, len / 2),
        ] {
            if cols == 0 {
                continue;
            }
            let error = Tensor::from_le_bytes(&vec![0; bytes], format, rows, cols).unwrap_err();
            assert!(
                matches!(
                    error,
                    TensorError::Length { .. }
                        | TensorError::TooLarge { .. }
                        | TensorError::PartOfBlock { .. }
                ),
                "{format}: {error}"
            );
        }
    }
}
