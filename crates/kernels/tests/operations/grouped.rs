//! The matrices of GPTQ and AWQ, against what their own packages read.

use lowrank_kernels::{FourBitOrder, Grouped, NumberFormat, TensorError};

const OUTS: usize = 32;
const INPUTS: usize = 64;
const GROUPS: usize = 2;

/// A matrix of the goldens.
struct Golden {
    order: FourBitOrder,
    words: &'static [u8],
    zeros: &'static [u8],
    scales: Vec<f32>,
    groups: Vec<usize>,
    numbers: Vec<f32>,
}

impl Golden {
    fn all() -> Vec<Self> {
        let mut rest: &[u8] = include_bytes!("../goldens/grouped.bin");
        let mut bytes = |count: usize| {
            let (bytes, behind) = rest.split_at(count);
            rest = behind;
            bytes
        };
        let orders = [FourBitOrder::Awq, FourBitOrder::Gptq, FourBitOrder::Gptq];
        let all = orders.map(|order| Self {
            order,
            words: bytes(OUTS * INPUTS / 2),
            zeros: bytes(GROUPS * OUTS / 2),
            scales: (bytes(2 * GROUPS * OUTS).as_chunks().0.iter())
                .map(|half| half::f16::from_le_bytes(*half).to_f32())
                .collect(),
            groups: (bytes(4 * INPUTS).as_chunks().0.iter())
                .map(|group| u32::from_le_bytes(*group) as usize)
                .collect(),
            numbers: (bytes(4 * OUTS * INPUTS).as_chunks().0.iter())
                .map(|number| f32::from_le_bytes(*number))
                .collect(),
        });
        assert!(rest.is_empty());
        all.into()
    }

    fn matrix(&self) -> Grouped<'_> {
        Grouped {
            order: self.order,
            words: self.words,
            zeros: self.zeros,
            less_one: self.order == FourBitOrder::Gptq,
            scales: &self.scales,
            groups: &self.groups,
            outs: OUTS,
        }
    }
}

#[test]
fn numbers_are_those_of_their_packages() {
    for (at, golden) in Golden::all().iter().enumerate() {
        let matrix = golden.matrix();
        matrix.check().unwrap();
        let numbers = (0..OUTS * INPUTS).map(|i| matrix.number(i / INPUTS, i % INPUTS));
        assert!(numbers.eq(golden.numbers.iter().copied()), "matrix {at}");
        // Inputs in another order have no blocks.
        assert_eq!(Grouped::has_blocks(&golden.groups, &golden.scales), at != 2);
        let blocks = matrix.matrix().unwrap();
        assert_eq!(blocks.is_some(), at != 2);
        if let Some(blocks) = blocks {
            assert_eq!(blocks.format(), NumberFormat::Int4);
            assert_eq!(blocks.to_vec(), golden.numbers, "matrix {at}");
        }
    }
}

#[test]
fn zeros_of_zero_are_read_with_their_borrow() {
    let golden = &Golden::all()[1];
    // The zeros 0, 3, 1, 1, …, less one each, as one number less another.
    let word = 0x1111_1130_u32.wrapping_sub(0x1111_1111).to_le_bytes();
    let zeros = [word.as_slice(), &golden.zeros[4..]].concat();
    let matrix = Grouped {
        zeros: &zeros,
        ..golden.matrix()
    };
    for (out, zero) in [0.0, 3.0, 1.0].into_iter().enumerate() {
        let stored = golden.matrix().number(out, 0) / golden.scales[out];
        let other = matrix.number(out, 0) / golden.scales[out];
        let own = f32::from(golden.zeros[out / 2] >> (4 * (out % 2)) & 15) + 1.0;
        assert!((other - (stored + own - zero)).abs() < 1e-4, "output {out}");
    }
}

#[test]
fn damaged_matrices_are_errors() {
    for golden in &Golden::all() {
        let whole = golden.matrix();
        let short = Grouped {
            words: &whole.words[4..],
            ..whole
        };
        assert!(matches!(short.matrix(), Err(TensorError::Length { .. })));
        let short = Grouped {
            zeros: &whole.zeros[4..],
            ..whole
        };
        assert!(matches!(short.matrix(), Err(TensorError::Scales { .. })));
        let short = Grouped {
            scales: &whole.scales[1..],
            ..whole
        };
        assert!(matches!(short.matrix(), Err(TensorError::Scales { .. })));
        let beyond = [&golden.groups[1..], &[GROUPS]].concat();
        let beyond = Grouped {
            groups: &beyond,
            ..whole
        };
        assert!(matches!(beyond.matrix(), Err(TensorError::Scales { .. })));
    }
}
