//! What PEFT does with the tensors of several adapters (`peft/utils/merge_utils.py`), numbers in f32.
//!
//! Each tensor is sparsified: the largest magnitudes stay (TIES; Yadav et al., 2023), or random numbers stay and are
//! divided by the share of them that does (DARE; Yu et al., 2024). Then either the weighted numbers are added, or a sign
//! is elected at every place, and the mean is taken of the weighted numbers that have it.

use crate::random::{hash, mix};

/// Which numbers of a tensor stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sparsity {
    /// All of them.
    All,
    /// Those of the largest magnitudes.
    Largest,
    /// Random ones, divided by the density.
    Random,
}

/// How the sign at a place is elected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum MajoritySign {
    /// The sign of the numbers' sum.
    #[default]
    Total,
    /// The sign that more of the numbers have.
    Frequency,
}

/// What is done with the tensors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arithmetic {
    pub(super) sparsity: Sparsity,
    /// The share of the numbers that stays, in (0, 1].
    pub(super) density: f64,
    /// `None`: the weighted numbers are added.
    pub(super) elect: Option<MajoritySign>,
    /// Where the random numbers of [`Sparsity::Random`] come from.
    pub(super) seed: u64,
}

impl Arithmetic {
    /// Combines tensors of one shape. `place` tells this use of random numbers from others.
    pub(super) fn apply(
        &self,
        mut tensors: Vec<Vec<f32>>,
        weights: &[f64],
        place: &str,
    ) -> Vec<f32> {
        for (index, tensor) in tensors.iter_mut().enumerate() {
            match self.sparsity {
                Sparsity::All => {}
                Sparsity::Largest => keep_largest(tensor, self.density),
                Sparsity::Random => {
                    let key = mix(mix(self.seed, hash(place.as_bytes())), index as u64);
                    keep_random(tensor, self.density, key);
                }
            }
        }
        let weights: Vec<f32> = weights.iter().map(|weight| *weight as f32).collect();
        let mut parts = tensors.into_iter();
        let mut first = parts.next().unwrap_or_default();
        let rest: Vec<Vec<f32>> = parts.collect();
        for (j, value) in first.iter_mut().enumerate() {
            let at = |index: usize, first: f32| match index {
                0 => first,
                _ => rest[index - 1][j],
            };
            let numbers = (0..weights.len()).map(|index| (at(index, *value), weights[index]));
            *value = match self.elect {
                None => numbers.map(|(number, weight)| number * weight).sum(),
                Some(method) => mean_of_elected(numbers, method),
            };
        }
        first
    }
}

/// The mean of the weighted numbers whose sign, before the weights, is the elected one. Where the sum is nought, that is plus.
fn mean_of_elected(numbers: impl Iterator<Item = (f32, f32)> + Clone, method: MajoritySign) -> f32 {
    let vote = numbers.clone().map(|(number, _)| match method {
        MajoritySign::Total => number,
        MajoritySign::Frequency => sign(number),
    });
    let elected = if vote.sum::<f32>() >= 0.0 { 1.0 } else { -1.0 };
    let (mut sum, mut count) = (0.0, 0.0_f32);
    for (number, weight) in numbers {
        if sign(number) == elected {
            sum += number * weight;
            count += 1.0;
        }
    }
    sum / count.max(1.0)
}

/// -1, 0 or 1.
fn sign(number: f32) -> f32 {
    if number == 0.0 { 0.0 } else { number.signum() }
}

/// Sets all but the ⌊density·n⌋ numbers of the largest magnitudes to nought; of equal ones the first stay.
fn keep_largest(tensor: &mut [f32], density: f64) {
    if density >= 1.0 {
        return;
    }
    let count = (density * tensor.len() as f64) as usize;
    if count == 0 {
        tensor.fill(0.0);
        return;
    }
    let mut magnitudes: Vec<f32> = tensor.iter().map(|value| value.abs()).collect();
    let (larger, threshold, _) =
        magnitudes.select_nth_unstable_by(count - 1, |one, other| other.total_cmp(one));
    let threshold = *threshold;
    let above = larger.iter().filter(|value| **value > threshold).count();
    let mut equal = count - above;
    for value in tensor {
        let magnitude = value.abs();
        let stays = magnitude > threshold || (magnitude == threshold && equal > 0);
        if magnitude == threshold {
            equal = equal.saturating_sub(1);
        }
        if !stays {
            *value = 0.0;
        }
    }
}

/// Sets each number to nought with a probability of 1 - density, and divides the others by the density.
fn keep_random(tensor: &mut [f32], density: f64, key: u64) {
    if density >= 1.0 {
        return;
    }
    let divisor = density as f32;
    for (j, value) in tensor.iter_mut().enumerate() {
        let drawn = (mix(key, j as u64) >> 11) as f64 / (1_u64 << 53) as f64;
        *value = if drawn < density {
            *value / divisor
        } else {
            0.0
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arithmetic(sparsity: Sparsity, density: f64, elect: Option<MajoritySign>) -> Arithmetic {
        Arithmetic {
            sparsity,
            density,
            elect,
            seed: 3,
        }
    }

    #[test]
    fn the_largest_magnitudes_stay() {
        let mut values = vec![0.5, -3.0, 1.0, 1.0, -1.0, 0.25, 2.0];
        // ⌊0.6 · 7⌋ = 4: two of the three of magnitude 1, the first ones.
        keep_largest(&mut values, 0.6);
        assert_eq!(values, [0.0, -3.0, 1.0, 1.0, 0.0, 0.0, 2.0]);
        keep_largest(&mut values, 0.1);
        assert_eq!(values, [0.0; 7]);
        let mut whole = vec![0.0, -1.0];
        keep_largest(&mut whole, 1.0);
        assert_eq!(whole, [0.0, -1.0]);
    }

    #[test]
    fn random_numbers_keep_their_mean() {
        const COUNT: usize = 40_000;
        let sparse = arithmetic(Sparsity::Random, 0.25, None);
        let ones = || vec![vec![1.0_f32; COUNT]];
        let found = sparse.apply(ones(), &[2.0], "a");
        let kept = found.iter().filter(|value| **value != 0.0).count() as f64;
        // Four standard deviations of a share of 40,000 draws.
        assert!((kept / COUNT as f64 - 0.25).abs() < 4.0 * (0.25_f64 * 0.75 / COUNT as f64).sqrt());
        assert!(found.iter().all(|value| [0.0, 8.0].contains(value)));
        assert_eq!(found, sparse.apply(ones(), &[2.0], "a"), "the seed decides");
        assert_ne!(found, sparse.apply(ones(), &[2.0], "b"));
        let other = Arithmetic { seed: 4, ..sparse };
        assert_ne!(found, other.apply(ones(), &[2.0], "a"));
        // Adapters draw each for itself.
        let two = sparse.apply([ones(), ones()].concat(), &[1.0, 1.0], "a");
        assert!(two.contains(&4.0) && two.contains(&8.0));
    }

    #[test]
    fn signs_are_elected_before_the_weights() {
        let tensors = || {
            vec![
                vec![3.0, 1.0, 0.0],
                vec![-1.0, -1.0, 0.0],
                vec![-1.0, 2.0, 4.0],
            ]
        };
        let weights = [2.0, 4.0, -1.0];
        let total = arithmetic(Sparsity::All, 1.0, Some(MajoritySign::Total));
        // Sums 1, 2 and 4: plus everywhere. At the second place two agree, and the mean is of those.
        assert_eq!(total.apply(tensors(), &weights, ""), [6.0, 0.0, -4.0]);
        let frequency = arithmetic(Sparsity::All, 1.0, Some(MajoritySign::Frequency));
        assert_eq!(frequency.apply(tensors(), &weights, ""), [-1.5, 0.0, -4.0]);
        let tie = total.apply(vec![vec![1.0], vec![-1.0]], &[5.0, 7.0], "");
        assert_eq!(tie, [5.0], "a tie is plus");
    }
}
