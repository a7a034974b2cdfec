//! Any bytes as numbers of every format: what is read of them on every engine is what the reference reads. Any numbers: every format that
//! has a quantizer stores them as finite numbers, or says why not.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lowrank_kernels::{NumberFormat, Tensor, engines, reference, with_engine};

fuzz_target!(|data: &[u8]| {
    for format in NumberFormat::ALL {
        let (unit, block) = (format.bytes_for(1), format.block_len());
        let units = data.len() / unit;
        let bytes = &data[..units * unit];
        let expected = reference::widened(format, bytes);
        let stored = Tensor::from_le_bytes(bytes, format, 1, units * block).expect("whole blocks");
        for engine in engines() {
            let found = with_engine(engine, || stored.to_vec());
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                let same = found.to_bits() == expected.to_bits();
                assert!(same || found.is_nan() && expected.is_nan(), "{format}, {engine:?}");
            }
        }
        let damaged = data.len() - bytes.len();
        let whole = Tensor::from_le_bytes(data, format, 1, units * block);
        assert_eq!(whole.is_ok(), damaged == 0);

        let numbers = reference::widened(NumberFormat::F32, data);
        let row = &numbers[..numbers.len() / block * block];
        let mut stored = Vec::new();
        match format.quantize(row, &mut stored) {
            Ok(()) => {
                assert_eq!(stored.len(), format.bytes_for(row.len()));
                let numbers = reference::widened(format, &stored);
                assert!(numbers.iter().all(|x| x.is_finite()), "{format}");
            }
            Err(_) => assert!(stored.is_empty()),
        }
    }
});
