//! NF4 and FP4, against what bitsandbytes makes.

use std::path::Path;

use lowrank_kernels::{
    EightBit, FourBit, FourBitParts, NestedParts, NestedScales, NumberFormat, Tensor, TensorError,
    eight_bits,
};

const ROWS: usize = 5;
const COLS: usize = 192;
const FORMATS: [NumberFormat; 2] = [NumberFormat::Nf4, NumberFormat::Fp4];

/// What is left of the goldens.
struct Goldens(&'static [u8]);

impl Goldens {
    fn bytes(&mut self, count: usize) -> &'static [u8] {
        let (bytes, rest) = self.0.split_at(count);
        self.0 = rest;
        bytes
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        floats(self.bytes(4 * count))
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let numbers = bytes.as_chunks().0.iter();
    numbers.map(|number| f32::from_le_bytes(*number)).collect()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

/// The values of a format: what a scale of 1 makes of each place.
fn values(format: NumberFormat) -> Vec<f32> {
    let mut block = vec![0; format.bytes_for(1)];
    block[..4].copy_from_slice(&1.0_f32.to_le_bytes());
    for (place, byte) in block[4..20].iter_mut().enumerate() {
        *byte = place as u8;
    }
    let tensor = Tensor::from_le_bytes(&block, format, 1, 64).unwrap();
    tensor.to_vec()[..16].to_vec()
}

fn quantized(format: NumberFormat, numbers: &[f32], rows: usize) -> Vec<f32> {
    let mut bytes = Vec::new();
    format.quantize(numbers, &mut bytes).unwrap();
    let tensor = Tensor::from_le_bytes(&bytes, format, rows, numbers.len() / rows);
    tensor.unwrap().to_vec()
}

#[test]
fn four_bits_are_those_of_bitsandbytes() {
    let mut goldens = Goldens(include_bytes!("../goldens/bitsandbytes.bin"));
    let numbers = goldens.floats(ROWS * COLS);
    for format in FORMATS {
        let map = values(format);
        for (block, nested) in [(64, false), (128, false), (64, true)] {
            let packed = goldens.bytes(ROWS * COLS / 2);
            let count = (ROWS * COLS).div_ceil(block);
            let scales = if nested {
                let bytes = goldens.bytes(count);
                let (map, scales) = (goldens.floats(256), goldens.floats(1));
                let nested = NestedScales {
                    bytes,
                    map: &map,
                    scales: &scales,
                    block: 256,
                    offset: goldens.floats(1)[0],
                };
                nested.widened().unwrap()
            } else {
                goldens.floats(count)
            };
            let expected = goldens.floats(ROWS * COLS);
            let stored = FourBit {
                format,
                packed,
                map: &map,
                scales: &scales,
                block,
            };
            let found = stored.matrix(ROWS, COLS).unwrap();
            assert_eq!(
                bits(&found.to_vec()),
                bits(&expected),
                "{format} in blocks of {block}, nested: {nested}"
            );
            if block == 64 && nested {
                // What lowrank itself makes of the numbers.
                let mut blocks = Vec::new();
                format.quantize(&numbers, &mut blocks).unwrap();
                let parts = FourBitParts::of(&blocks);
                assert_eq!(parts.packed, packed);
                let own = NestedParts::of(&parts.scales).widened().unwrap();
                for (own, scale) in own.iter().zip(&scales) {
                    assert!((own - scale).abs() <= 1e-6 * scale, "{own}, {scale}");
                }
            }
            if block == 64 && !nested {
                let found = quantized(format, &numbers, ROWS);
                assert_eq!(bits(&found), bits(&expected), "{format}, quantized");
            }
        }
    }
    let bytes = goldens.bytes(700);
    let (scales, offset) = (goldens.floats(3), goldens.floats(1)[0]);
    // The map of the last matrix: it is always the same.
    let map = nested_map();
    let nested = NestedScales {
        bytes,
        map: &map,
        scales: &scales,
        block: 256,
        offset,
    };
    let expected = goldens.floats(700);
    assert_eq!(bits(&nested.widened().unwrap()), bits(&expected));
    assert!(goldens.0.is_empty());
}

#[test]
fn the_values_of_bytes_are_those_of_bitsandbytes() {
    assert_eq!(bits(&lowrank_kernels::nested_map()), bits(&nested_map()));
}

#[test]
fn eight_bits_are_shares_of_the_largest() {
    let row: Vec<f32> = (0..128_i16).map(|i| f32::from(i - 64) / 100.0).collect();
    let (numbers, largest) = eight_bits(&row).unwrap();
    assert_eq!(largest, half::f16::from_f32(-0.64).to_f32().abs());
    let stored = EightBit {
        numbers: &numbers,
        scales: &[largest],
    };
    let matrix = stored.matrix(1, 128).unwrap().to_vec();
    for (i, (found, x)) in matrix.iter().zip(&row).enumerate() {
        assert!(
            (found - x).abs() <= 0.5 * largest / 127.0 + 4e-4,
            "{found} {x}"
        );
        assert_eq!(found.to_bits(), stored.number(i).to_bits());
    }
    assert_eq!(eight_bits(&[0.0; 3]).unwrap(), (vec![0; 3], 0.0));
    assert_eq!(eight_bits(&[1.0, 7e4]), Err(1));
    let short = EightBit {
        numbers: &numbers[1..],
        scales: &[largest],
    };
    assert!(matches!(
        short.matrix(1, 128),
        Err(TensorError::Length { .. })
    ));
    assert!(matches!(
        stored.matrix(1, 96),
        Err(TensorError::PartOfBlock { .. })
    ));
}

/// The map of nested scales, from the first matrix with double quantization.
fn nested_map() -> Vec<f32> {
    let mut goldens = Goldens(include_bytes!("../goldens/bitsandbytes.bin"));
    let numbers = ROWS * COLS;
    goldens.bytes(4 * numbers);
    for block in [64, 128] {
        goldens.bytes(numbers / 2 + 4 * numbers.div_ceil(block) + 4 * numbers);
    }
    goldens.bytes(numbers / 2 + numbers / 64);
    goldens.floats(256)
}

/// What `scripts/goldens_bnb.py --model` wrote.
#[test]
fn four_bits_of_a_model_are_those_of_bitsandbytes() {
    let Some(folder) = std::env::var_os("LOWRANK_FOUR_BIT") else {
        eprintln!("skipped: LOWRANK_FOUR_BIT is not set");
        return;
    };
    let read = |name: &str| floats(&std::fs::read(Path::new(&folder).join(name)).unwrap());
    let numbers = read("numbers.f32");
    for format in FORMATS {
        let expected = read(&format.to_string().to_lowercase());
        let found = quantized(format, &numbers, 1);
        let differing = found.iter().zip(&expected);
        let differing = differing.filter(|(a, b)| a.to_bits() != b.to_bits());
        let differing = differing.count();
        eprintln!("{format}: {differing} of {} numbers differ", numbers.len());
        assert!(differing == 0 && found.len() == expected.len());
    }
}

#[test]
fn damaged_four_bits_are_errors() {
    let map = values(NumberFormat::Nf4);
    let good = FourBit {
        format: NumberFormat::Nf4,
        packed: &[0; 128],
        map: &map,
        scales: &[1.0; 4],
        block: 64,
    };
    assert!(good.matrix(2, 128).is_ok() && good.matrix(4, 64).is_ok());
    assert!(good.matrix(0, 128).is_err() && good.matrix(2, 64).is_err());
    let message = |stored: FourBit<'_>, cols| stored.matrix(2, cols).unwrap_err().to_string();
    let mut other = map.clone();
    other[3] = -0.4;
    for (stored, cols, expected) in [
        (
            FourBit {
                map: &other,
                ..good
            },
            128,
            "the values of the numbers are not those of NF4",
        ),
        (
            FourBit { map: &[], ..good },
            128,
            "the values of the numbers are not those of NF4",
        ),
        (
            FourBit {
                format: NumberFormat::Fp4,
                ..good
            },
            128,
            "the values of the numbers are not those of FP4",
        ),
        (
            FourBit {
                format: NumberFormat::Q4_0,
                ..good
            },
            128,
            "the values of the numbers are not those of Q4_0",
        ),
        (
            good,
            96,
            "a row of 96 numbers is not made of whole blocks of NF4, which have 64 numbers each",
        ),
        (
            FourBit { block: 32, ..good },
            128,
            "32 numbers of NF4 share a scale; it can be 64, 128, 256, 512, 1024, 2048 or 4096",
        ),
        (
            FourBit { block: 0, ..good },
            128,
            "0 numbers of NF4 share a scale; it can be 64, 128, 256, 512, 1024, 2048 or 4096",
        ),
        (
            FourBit {
                packed: &[0; 127],
                ..good
            },
            128,
            "2x128 in NF4 needs 128 bytes, but 127 were given",
        ),
        (
            FourBit {
                scales: &[1.0; 3],
                ..good
            },
            128,
            "4 scales are needed, but 3 were given",
        ),
        (
            FourBit { block: 128, ..good },
            128,
            "2 scales are needed, but 4 were given",
        ),
    ] {
        assert_eq!(message(stored, cols), expected);
    }
    let error = good.matrix(usize::MAX, 128).unwrap_err();
    assert!(matches!(error, TensorError::TooLarge { .. }));
}

#[test]
fn damaged_nested_scales_are_errors() {
    let nested = NestedScales {
        bytes: &[0; 257],
        map: &[0.5; 256],
        scales: &[2.0, 4.0],
        block: 256,
        offset: 1.0,
    };
    assert_eq!(nested.widened().unwrap()[255..], [2.0, 3.0]);
    for nested in [
        NestedScales {
            map: &[0.5; 255],
            ..nested
        },
        NestedScales {
            scales: &[2.0],
            ..nested
        },
        NestedScales { block: 0, ..nested },
    ] {
        assert!(matches!(nested.widened(), Err(TensorError::Scales { .. })));
    }
}
