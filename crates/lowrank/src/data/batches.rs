//! The order in which an epoch visits the examples.

/// A permutation of `0..n` that depends on `seed` and `epoch` alone.
///
/// Resuming in the middle of an epoch needs no saved generator: the order is computed again and entered at the saved
/// position. Without `shuffle` it is `0, 1, …, n - 1`.
///
/// The generator is SplitMix64 (Steele, Lea and Flood, 2014): a counter advanced by the golden ratio's odd fraction
/// and scrambled by two multiply-xorshift rounds. It is all integer arithmetic on 64 bits, so every platform gives the
/// same order. The permutation is Fisher and Yates' (Durstenfeld's form, from the last place down), each place drawn
/// by multiplying into the range and refusing the few values that would make some places likelier (Lemire, 2019).
pub fn epoch_order(n: usize, seed: u64, epoch: u64, shuffle: bool) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    if shuffle {
        // Scrambled once more, the epoch starts a stream that has nothing to do with that of seed + 1.
        let mut random = SplitMix64(SplitMix64(seed).next() ^ SplitMix64(!epoch).next());
        for last in (1..n).rev() {
            order.swap(last, random.below(last as u64 + 1) as usize);
        }
    }
    order
}

struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A value below `bound`, each equally likely.
    fn below(&mut self, bound: u64) -> u64 {
        let uneven = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next()) * u128::from(bound);
            if product as u64 >= uneven {
                return (product >> 64) as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_splitmix64() {
        // The published outputs for the state 1234567.
        let mut random = SplitMix64(1_234_567);
        let first: Vec<u64> = (0..5).map(|_| random.next()).collect();
        assert_eq!(
            first,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423,
                4_593_380_528_125_082_431,
                16_408_922_859_458_223_821
            ]
        );
    }

    #[test]
    fn an_order_is_a_permutation_and_depends_on_seed_and_epoch() {
        let order = epoch_order(1000, 42, 0, true);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        assert_eq!(order, epoch_order(1000, 42, 0, true));
        assert_ne!(order, epoch_order(1000, 42, 1, true));
        assert_ne!(order, epoch_order(1000, 43, 0, true));
        assert_ne!(
            epoch_order(1000, 42, 1, true),
            epoch_order(1000, 43, 0, true)
        );
        assert_eq!(epoch_order(4, 42, 0, false), [0, 1, 2, 3]);
        assert_eq!(epoch_order(0, 1, 0, true), Vec::<usize>::new());
        assert_eq!(epoch_order(1, 1, 0, true), [0]);
    }

    #[test]
    fn every_permutation_is_equally_likely() {
        let mut counts = std::collections::HashMap::new();
        for epoch in 0..12_000 {
            *counts
                .entry(epoch_order(4, 7, epoch, true))
                .or_insert(0_u32) += 1;
        }
        assert_eq!(counts.len(), 24);
        // 500 expected each; the chi-square of 23 degrees of freedom stays under 49.7 in 99.9 % of the cases.
        let chi: f64 = counts
            .values()
            .map(|&n| (f64::from(n) - 500.0).powi(2) / 500.0)
            .sum();
        assert!(chi < 49.7, "chi-square {chi}");
    }
}
