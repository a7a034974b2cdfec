//! Reductions to what a host reads.

use std::time::Instant;

use rayon::prelude::*;

use crate::cpu::parallel::ForEachPart;
use crate::cpu::simd::vectorize;
use crate::profile::region;
use crate::tensor::Tensor;
use crate::view::View;

/// Numbers that one partial sum covers.
const BLOCK: usize = 16 * 1024;

/// Lanes of a sum in f64.
const LANES: usize = 8;

pub(crate) fn sum_squares(x: View<'_>) -> f64 {
    let partial = x.f32s().par_chunks(BLOCK).map_parts(|x| {
        vectorize(
            #[inline(always)]
            || {
                let mut lanes = [0.0_f64; LANES];
                let mut chunks = x.chunks_exact(LANES);
                for chunk in &mut chunks {
                    for (sum, &x) in lanes.iter_mut().zip(chunk) {
                        *sum += f64::from(x) * f64::from(x);
                    }
                }
                let rest = chunks.remainder().iter();
                lanes.iter().sum::<f64>() + rest.map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()
            },
        )
    });
    partial.iter().sum::<f64>()
}

pub(crate) fn read_bandwidth(bytes: usize, repeats: usize) -> f64 {
    let mut buffer = Tensor::zeros(1, bytes / size_of::<f32>());
    // Memory that was never written need not be there.
    buffer.view_mut().fill(1.0);
    let numbers = buffer.view().f32s();
    let piece = numbers.len().div_ceil(rayon::current_num_threads()).max(1);
    let seconds = |_| {
        let begun = Instant::now();
        let sum: f32 = numbers.par_chunks(piece).map(stream).sum();
        std::hint::black_box(sum);
        begun.elapsed().as_secs_f64()
    };
    let best = (0..repeats.max(1))
        .map(seconds)
        .fold(f64::INFINITY, f64::min);
    size_of_val(numbers) as f64 / best
}

/// Reads numbers in their order, with as little else as possible.
fn stream(numbers: &[f32]) -> f32 {
    /// Enough sums that none waits for another.
    const SUMS: usize = 64;
    vectorize(
        #[inline(always)]
        || {
            let mut sums = [0.0_f32; SUMS];
            for chunk in numbers.as_chunks::<SUMS>().0 {
                for (sum, x) in sums.iter_mut().zip(chunk) {
                    *sum += x;
                }
            }
            sums.iter().sum()
        },
    )
}

pub(crate) fn all_finite(x: View<'_>) -> bool {
    let chunks = x.f32s().par_chunks(BLOCK);
    region(Some(chunks.len()), || chunks.all(chunk_is_finite))
}

pub(crate) fn first_non_finite(x: View<'_>) -> Option<usize> {
    let x = x.f32s();
    let block = x
        .par_chunks(BLOCK)
        .position_first(|chunk| !chunk_is_finite(chunk))?;
    let start = block * BLOCK;
    let within = x[start..].iter().position(|x| !x.is_finite())?;
    Some(start + within)
}

fn chunk_is_finite(chunk: &[f32]) -> bool {
    vectorize(
        #[inline(always)]
        || {
            // Without an early exit, so that the loop becomes vector code.
            let mut finite = true;
            for x in chunk {
                finite &= x.is_finite();
            }
            finite
        },
    )
}

pub(crate) fn argmax_rows(x: View<'_>) -> Vec<usize> {
    if x.rows() == 0 {
        return Vec::new();
    }
    assert!(x.cols() > 0, "rows without columns have no largest element");
    x.f32s().par_chunks(x.cols()).map_parts(argmax)
}

/// The position of the first of the largest numbers, zero if there is none; NaN is never the largest.
pub(crate) fn argmax(row: &[f32]) -> usize {
    /// Numbers that are looked at together.
    const TOGETHER: usize = 32;
    vectorize(
        #[inline(always)]
        || {
            let larger = |a: f32, b: f32| if b > a { b } else { a };
            let mut maxima = [f32::NEG_INFINITY; TOGETHER];
            let (chunks, rest) = row.as_chunks::<TOGETHER>();
            for chunk in chunks {
                for i in 0..TOGETHER {
                    maxima[i] = larger(maxima[i], chunk[i]);
                }
            }
            let max = maxima.iter().chain(rest).copied();
            let max = max.fold(f32::NEG_INFINITY, larger);
            let mut start = 0;
            for chunk in chunks {
                let mut found = false;
                for &x in chunk {
                    found |= x == max;
                }
                if found {
                    break;
                }
                start += TOGETHER;
            }
            let within = row[start..].iter().position(|&x| x == max);
            within.map_or(0, |within| start + within)
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_largest_is_found() {
        for len in [1, 5, 32, 33, 100] {
            let mut row: Vec<f32> = (0..len).map(|i| -((i % 7) as f32)).collect();
            assert_eq!(argmax(&row), 0);
            for at in 0..len {
                let before = std::mem::replace(&mut row[at], 2.0);
                row[len - 1] = 2.0;
                assert_eq!(argmax(&row), at);
                row[len - 1] = -1.0;
                row[at] = before;
            }
        }
        assert_eq!(
            argmax(&[f32::NAN, f32::NEG_INFINITY, 3.0, f32::NAN, 3.0]),
            2
        );
        assert_eq!(argmax(&[f32::NAN, f32::NEG_INFINITY]), 1);
        assert_eq!(argmax(&[f32::NAN]), 0);
    }

    #[test]
    fn memory_is_read_at_some_rate() {
        assert!(read_bandwidth(1 << 20, 2) > 0.0);
    }
}
