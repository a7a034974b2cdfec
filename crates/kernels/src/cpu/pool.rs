//! Means of rows. There are few, so one thread computes them.

use std::ops::Range;

use crate::view::{View, ViewMut};

pub(crate) fn pool_forward(y: ViewMut<'_>, x: View<'_>, pools: &[Range<usize>]) {
    let cols = x.cols().max(1);
    for (y, pool) in y.into_f32s().chunks_exact_mut(cols).zip(pools) {
        y.fill(0.0);
        for x in x.f32s()[pool.start * cols..pool.end * cols].chunks_exact(cols) {
            for (y, x) in y.iter_mut().zip(x) {
                *y += x;
            }
        }
        let share = 1.0 / pool.len() as f32;
        for y in y.iter_mut() {
            *y *= share;
        }
    }
}

pub(crate) fn pool_backward(dx: ViewMut<'_>, dy: View<'_>, pools: &[Range<usize>]) {
    let cols = dy.cols().max(1);
    let dx = dx.into_f32s();
    dx.fill(0.0);
    for (dy, pool) in dy.f32s().chunks_exact(cols).zip(pools) {
        // y = Σ x / n, so dx += dy / n
        let share = 1.0 / pool.len() as f32;
        for dx in dx[pool.start * cols..pool.end * cols].chunks_exact_mut(cols) {
            for (dx, dy) in dx.iter_mut().zip(dy) {
                *dx += share * dy;
            }
        }
    }
}
