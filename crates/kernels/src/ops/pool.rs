//! Means of rows, as a classifier reads them.

use std::ops::Range;

use crate::cpu;
use crate::profile::op;
use crate::view::{View, ViewMut};

/// Row n of y is the mean of the rows `pools[n]` of x, overwritten; x [T, C], y [pools, C].
///
/// # Panics
/// If the shapes do not match, or a pool is empty or does not lie within x.
pub fn pool_forward(y: ViewMut<'_>, x: View<'_>, pools: &[Range<usize>]) {
    let _op = op("pool forward", || 0.0);
    y.assert_shape("the means of rows", pools.len(), x.cols());
    check(pools, x.rows());
    cpu::pool::pool_forward(y, x, pools);
}

/// The gradient of [`pool_forward`], overwritten; dx [T, C], dy [pools, C]. Rows in no pool get zeros.
///
/// # Panics
/// As [`pool_forward`].
pub fn pool_backward(dx: ViewMut<'_>, dy: View<'_>, pools: &[Range<usize>]) {
    let _op = op("pool backward", || 0.0);
    dy.assert_shape("the gradient of means of rows", pools.len(), dx.cols());
    check(pools, dx.rows());
    cpu::pool::pool_backward(dx, dy, pools);
}

fn check(pools: &[Range<usize>], rows: usize) {
    for pool in pools {
        assert!(
            pool.start < pool.end && pool.end <= rows,
            "rows {pool:?} are none of the {rows} there are"
        );
    }
}
