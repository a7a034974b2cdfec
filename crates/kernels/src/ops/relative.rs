//! Attention whose scores know how far a key is from a query: disentangled attention (He et al., "DeBERTa", 2020).
//!
//! ```text
//! s(i, j) = scale · (q_i·k_j + q_i·kr[b(i - j)] + k_j·qr[b(i - j)])
//! o_i = Σ softmax(s(i, ·))_j · v_j
//! ```
//! The rows of a segment all see each other. b says which row of the positions stands for a distance; either of the two terms may be
//! absent. Only the log-sum-exp of each query and head is saved.
//!
//! Everything here overwrites.

use std::ops::Range;

use crate::cpu;
use crate::profile::op;
use crate::types::relative::{
    RelativeGradients, RelativePositions, RelativeSegment, RelativeShape,
};
use crate::view::{View, ViewMut};
use crate::workspace::Workspace;

/// o = softmax(s) · v for every segment and head.
///
/// o, q, k and v [T, H·D], the positions [S, H·D], lse [T, H] saved for the backward. o and lse are overwritten in the rows of the
/// segments; other rows are left as they are. The workspace is for devices that need temporaries here; this one does not.
///
/// The bits of a segment are those that it has alone.
///
/// # Panics
/// If the shapes do not match, if a range or a place does not lie within them, or if segments share rows.
pub fn relative_attention_forward(
    o: ViewMut<'_>,
    lse: ViewMut<'_>,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    positions: RelativePositions<'_>,
    segments: &[RelativeSegment],
    shape: &RelativeShape<'_>,
    _ws: &Workspace,
) {
    let _op = op("relative attention forward", || {
        2.0 * (2 + terms(positions)) as f64 * pairs(segments, shape)
    });
    check(q, k, v, positions, segments, shape);
    o.assert_shape("the output of attention", q.rows(), q.cols());
    lse.assert_shape("lse", q.rows(), shape.heads);
    cpu::attention::relative_attention_forward(o, lse, q, k, v, positions, segments, shape);
}

/// The gradients of [`relative_attention_forward`]; all are overwritten.
///
/// dq, dk, dv, `do_`, q, k and v [T, H·D], the positions and their gradients [S, H·D], lse [T, H] as the forward saved it. Rows of no
/// segment get zeros.
///
/// # Panics
/// As the forward; if a position has no gradient, or a gradient no position.
pub fn relative_attention_backward(
    dq: ViewMut<'_>,
    dk: ViewMut<'_>,
    dv: ViewMut<'_>,
    d_positions: RelativeGradients<'_>,
    do_: View<'_>,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    positions: RelativePositions<'_>,
    lse: View<'_>,
    segments: &[RelativeSegment],
    shape: &RelativeShape<'_>,
    ws: &Workspace,
) {
    let _op = op("relative attention backward", || {
        2.0 * (5 + 3 * terms(positions)) as f64 * pairs(segments, shape)
    });
    check(q, k, v, positions, segments, shape);
    let (rows, cols) = (q.rows(), q.cols());
    for (name, gradient) in [("dq", &dq), ("dk", &dk), ("dv", &dv)] {
        gradient.assert_shape(name, rows, cols);
    }
    do_.assert_shape("the output gradient of attention", rows, cols);
    lse.assert_shape("lse", rows, shape.heads);
    for (name, gradient, position) in [
        ("keys", &d_positions.keys, positions.keys),
        ("queries", &d_positions.queries, positions.queries),
    ] {
        match (gradient, position) {
            (None, None) => {}
            (Some(gradient), Some(position)) => {
                gradient.assert_shape(
                    "the gradient of positions",
                    position.rows(),
                    position.cols(),
                );
            }
            _ => panic!("positions as {name} and their gradient go together"),
        }
    }
    cpu::attention::relative_attention_backward(
        dq,
        dk,
        dv,
        d_positions,
        do_,
        q,
        k,
        v,
        positions,
        lse,
        segments,
        shape,
        ws,
    );
}

/// Terms of a score beside q·k.
fn terms(positions: RelativePositions<'_>) -> usize {
    usize::from(positions.keys.is_some()) + usize::from(positions.queries.is_some())
}

/// Multiplications of one product over all pairs of rows.
fn pairs(segments: &[RelativeSegment], shape: &RelativeShape<'_>) -> f64 {
    let pairs: usize = segments.iter().map(|s| s.rows.len() * s.rows.len()).sum();
    (pairs * shape.heads * shape.head_size) as f64
}

/// Panics unless all shapes fit, all ranges and places lie within them, and no two segments share a row.
fn check(
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    positions: RelativePositions<'_>,
    segments: &[RelativeSegment],
    shape: &RelativeShape<'_>,
) {
    assert!(
        shape.heads > 0 && shape.head_size > 0,
        "there is at least one head of at least one element"
    );
    let cols = shape.heads * shape.head_size;
    q.assert_shape("q", q.rows(), cols);
    k.assert_shape("k", q.rows(), cols);
    v.assert_shape("v", q.rows(), cols);
    let mut held = usize::MAX;
    for positions in [positions.keys, positions.queries].into_iter().flatten() {
        positions.assert_shape("relative positions", positions.rows(), cols);
        held = held.min(positions.rows());
    }
    let mut starts: Vec<&Range<usize>> = Vec::with_capacity(segments.len());
    for RelativeSegment { rows, first } in segments {
        assert!(
            rows.start <= rows.end && rows.end <= q.rows(),
            "rows {rows:?} do not lie within the {} there are",
            q.rows()
        );
        if rows.is_empty() {
            continue;
        }
        assert!(
            rows.len() <= shape.reach(),
            "a segment of {} rows, and places for {}",
            rows.len(),
            shape.reach()
        );
        let last = shape.of(rows.len()).iter().max().copied().unwrap_or(0);
        assert!(
            first.saturating_add(last as usize) < held,
            "place {last} behind row {first} does not lie within the {held} positions there are"
        );
        starts.push(rows);
    }
    starts.sort_unstable_by_key(|rows| rows.start);
    for pair in starts.windows(2) {
        assert!(
            pair[0].end <= pair[1].start,
            "segments share the rows from {} on",
            pair[1].start
        );
    }
}
