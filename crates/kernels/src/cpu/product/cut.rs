//! How outputs are cut into pieces for threads.

use std::ops::Range;

/// Rows of a block are a multiple of this, except in the last one.
const ROW_STEP: usize = 48;

/// A block of an output that one task computes.
pub(crate) struct Piece {
    pub(crate) job: usize,
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
}

/// What decides how outputs are cut: times of a piece for each inner index, in that of a row of a product of 16 columns.
#[derive(Clone, Copy)]
pub(crate) struct Costs {
    /// Of a column of the right factor, which is put in order.
    pub(crate) pack: f64,
    /// Of a row of the left one, which is read.
    pub(crate) read: f64,
    /// Widths that a strip of columns can have.
    pub(crate) strips: &'static [usize],
}

/// Cuts outputs into pieces for so many threads.
pub(crate) fn cut(sizes: &[(usize, usize)], threads: usize, costs: Costs) -> Vec<Piece> {
    let rows = sizes.iter().map(|size| size.0).max().unwrap_or(0);
    let mut best = (f64::INFINITY, costs.strips[0], rows.max(1));
    for &strip in costs.strips {
        for chunks in 1..=threads {
            let block = rows.div_ceil(chunks).next_multiple_of(ROW_STEP).max(1);
            let cost = |down: usize, across: usize| {
                let (down, across) = (down as f64, across as f64);
                down * across / 16.0 + across * costs.pack + down * costs.read
            };
            let (mut all, mut largest, mut count) = (0.0, 0.0, 0_usize);
            for &(rows, cols) in sizes {
                let tasks = rows.div_ceil(block) * cols.div_ceil(strip);
                let task = cost(block.min(rows), strip.min(cols));
                all += task * tasks as f64;
                if task > largest {
                    (largest, count) = (task, 0);
                }
                if task == largest {
                    count += tasks;
                }
            }
            // The last task of another thread is waited for.
            let waves = (count.div_ceil(threads) as f64 * largest).max(all / threads as f64);
            let time = waves + 0.1 * largest;
            if time < best.0 {
                best = (time, strip, block);
            }
        }
    }
    let (_, strip, block) = best;
    pieces_of(sizes, (block, strip))
}

/// Cuts outputs into pieces of so many rows and columns.
pub(crate) fn pieces_of(sizes: &[(usize, usize)], (block, strip): (usize, usize)) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (job, &(rows, cols)) in sizes.iter().enumerate() {
        for col in (0..cols).step_by(strip) {
            for row in (0..rows).step_by(block) {
                pieces.push(Piece {
                    job,
                    rows: row..(row + block).min(rows),
                    cols: col..(col + strip).min(cols),
                });
            }
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    const COSTS: Costs = Costs {
        pack: 0.5,
        read: 0.25,
        strips: &[288, 192, 144, 128, 96, 64, 48, 32, 16],
    };

    #[test]
    fn pieces_cover_each_output_once() {
        for threads in [1, 2, 3, 16, 64] {
            for sizes in [
                vec![(472, 576), (472, 192)],
                vec![(33, 49_152)],
                vec![(5, 7), (1, 1)],
            ] {
                let mut seen: Vec<Vec<bool>> =
                    sizes.iter().map(|s| vec![false; s.0 * s.1]).collect();
                for piece in cut(&sizes, threads, COSTS) {
                    for row in piece.rows {
                        for col in piece.cols.clone() {
                            let place = &mut seen[piece.job][row * sizes[piece.job].1 + col];
                            assert!(!*place, "twice");
                            *place = true;
                        }
                    }
                }
                assert!(
                    seen.iter().flatten().all(|seen| *seen),
                    "{sizes:?} on {threads}"
                );
            }
        }
    }
}
