//! The order in which an epoch visits the examples, and which of them share a prompt.

use std::collections::HashMap;

use super::Example;

/// Numbers of the examples that have the same prompt, ascending, a group for each prompt; groups in the order of their
/// first example.
///
/// An example whose prompt is shorter than two tokens is a group of its own: a beginning token alone is no prompt, and
/// sharing it would save next to nothing.
pub fn prompt_groups<'e>(examples: impl IntoIterator<Item = &'e Example>) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut group_of: HashMap<&[u32], usize> = HashMap::new();
    for (number, example) in examples.into_iter().enumerate() {
        let new = groups.len();
        let group = if example.prompt().len() < 2 {
            new
        } else {
            *group_of.entry(example.prompt()).or_insert(new)
        };
        if group == new {
            groups.push(Vec::new());
        }
        groups[group].push(number);
    }
    groups
}

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
        SplitMix64::of(seed, epoch).shuffle(&mut order);
    }
    order
}

/// The same for examples that stay beside the others of their group: a permutation of the groups, one after the other,
/// each permuted in itself. Without `shuffle` it is the groups as they are.
///
/// Where every group is one example, this is [`epoch_order`].
pub fn grouped_epoch_order(
    groups: &[Vec<usize>],
    seed: u64,
    epoch: u64,
    shuffle: bool,
) -> Vec<usize> {
    let mut groups = groups.to_vec();
    if shuffle {
        let mut random = SplitMix64::of(seed, epoch);
        random.shuffle(&mut groups);
        for group in &mut groups {
            random.shuffle(group);
        }
    }
    groups.concat()
}

struct SplitMix64(u64);

impl SplitMix64 {
    /// The stream of an epoch. Scrambled once more, the epoch has nothing to do with the same one of seed + 1.
    fn of(seed: u64, epoch: u64) -> Self {
        Self(Self(seed).next() ^ Self(!epoch).next())
    }

    fn shuffle<T>(&mut self, order: &mut [T]) {
        for last in (1..order.len()).rev() {
            order.swap(last, self.below(last as u64 + 1) as usize);
        }
    }

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

    fn example(ids: &[u32], prompt_len: usize) -> Example {
        Example {
            ids: ids.to_vec(),
            supervised: (0..ids.len()).map(|i| i >= prompt_len).collect(),
            line: 1,
            truncated: 0,
            prompt_len,
            ..Example::default()
        }
    }

    #[test]
    fn examples_with_the_same_prompt_are_a_group() {
        let examples = [
            example(&[1, 2, 3], 2),
            example(&[1, 2, 3, 4], 3), // the same ids, and another prompt
            example(&[1, 9, 3], 2),
            example(&[1, 2, 7, 8], 2),
            example(&[1, 5], 1),
            example(&[1, 6], 1),
            example(&[5], 0),
            example(&[1, 2, 3], 3), // nothing after the prompt
            example(&[1, 2, 3], 2),
        ];
        let expected: &[&[usize]] = &[&[0, 3, 8], &[1, 7], &[2], &[4], &[5], &[6]];
        assert_eq!(prompt_groups(&examples), expected);
        assert_eq!(prompt_groups([]), Vec::<Vec<usize>>::new());
    }

    #[test]
    fn a_grouped_order_is_a_permutation_that_keeps_groups_together() {
        // Groups of 1, 2, …, 9 examples, dealt out so that none lies together.
        let mut groups: Vec<Vec<usize>> = vec![Vec::new(); 9];
        let mut number = 0;
        for round in 0..9 {
            for group in &mut groups[round..] {
                group.push(number);
                number += 1;
            }
        }
        let group_of = |example: &usize| {
            let found = groups.iter().position(|group| group.contains(example));
            found.expect("each is in a group")
        };
        let order = grouped_epoch_order(&groups, 42, 0, true);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..45).collect::<Vec<_>>());
        let runs: Vec<_> = order
            .chunk_by(|a, b| group_of(a) == group_of(b))
            .map(|run| group_of(&run[0]))
            .collect();
        assert_eq!(runs.len(), 9, "no group is split: {runs:?}");
        assert!(!runs.is_sorted(), "the groups are shuffled: {runs:?}");
        let within = order.chunk_by(|a, b| group_of(a) == group_of(b));
        assert!(
            within.filter(|run| !run.is_sorted()).count() > 4,
            "so are the examples in them: {order:?}"
        );
        assert_eq!(order, grouped_epoch_order(&groups, 42, 0, true));
        assert_ne!(order, grouped_epoch_order(&groups, 42, 1, true));
        assert_ne!(order, grouped_epoch_order(&groups, 43, 0, true));
        assert_eq!(grouped_epoch_order(&groups, 42, 0, false), groups.concat());
    }

    #[test]
    fn groups_of_one_are_in_the_order_without_groups() {
        let groups: Vec<Vec<usize>> = (0..50).map(|number| vec![number]).collect();
        for shuffle in [true, false] {
            assert_eq!(
                grouped_epoch_order(&groups, 7, 3, shuffle),
                epoch_order(50, 7, 3, shuffle)
            );
        }
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
