//! Scaled dot-product attention over segments, without padding and without a T×T matrix.
//!
//! For a query head h and its key/value head, o = softmax(scale · q·kᵀ) · v over the keys that the
//! query sees; only the log-sum-exp of each query and head is saved. With a cap c, a score s is c · tanh(s / c) before the softmax.
//!
//! Everything here overwrites.

use std::ops::Range;

use crate::cpu;
use crate::profile::op;
use crate::types::attention::{AttentionShape, Segment, Sight};
use crate::types::classes::RowClasses;
use crate::types::compute::ComputeDType;
use crate::view::{View, ViewMut};
use crate::workspace::Workspace;

/// o = softmax(scale · q·kᵀ) · v for every segment and head.
///
/// o and q [Tq, H·D], lse [Tq, H] saved for the backward, k and v [Tk, KV·D]. o and lse are
/// overwritten in the rows of the segments; other rows are left as they are. A query that sees no
/// key gets zeros and an lse of -∞. The workspace is for devices that need temporaries here; this
/// one does not.
///
/// Queries of prompts multiply factors that are read as `compute` says; generated ones read f32.
///
/// A query's bits are those that it has alone, among queries of its class, as long as the keys that it sees come in the same
/// list of ranges; the last of these may be longer than it sees.
///
/// # Panics
/// If the shapes do not match, if a range does not lie within them, if segments share queries, or if a generated query is not alone
/// in its segment.
pub fn attention_forward(
    o: ViewMut<'_>,
    lse: ViewMut<'_>,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    segments: &[Segment],
    shape: &AttentionShape,
    classes: RowClasses,
    compute: ComputeDType,
    _ws: &Workspace,
) {
    let _op = op("attention forward", || 4.0 * seen_pairs(segments, shape));
    check(q, k, v, segments, shape);
    check_classes(segments, classes);
    o.assert_shape("the output of attention", q.rows(), q.cols());
    lse.assert_shape("lse", q.rows(), shape.heads);
    cpu::attention::attention_forward(o, lse, q, k, v, segments, shape, classes, compute);
}

/// The gradients of [`attention_forward`]; all three are overwritten.
///
/// dq, do_ and q [Tq, H·D], dk, dv, k and v [Tk, KV·D], lse [Tq, H] as the forward saved it.
/// Rows of no segment get zeros.
///
/// # Panics
/// If the shapes do not match, if a range does not lie within them, or if segments share queries.
pub fn attention_backward(
    dq: ViewMut<'_>,
    dk: ViewMut<'_>,
    dv: ViewMut<'_>,
    do_: View<'_>,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    lse: View<'_>,
    segments: &[Segment],
    shape: &AttentionShape,
    compute: ComputeDType,
    ws: &Workspace,
) {
    let _op = op("attention backward", || 10.0 * seen_pairs(segments, shape));
    check(q, k, v, segments, shape);
    let (q_rows, q_cols, k_rows, k_cols) = (q.rows(), q.cols(), k.rows(), k.cols());
    dq.assert_shape("dq", q_rows, q_cols);
    dk.assert_shape("dk", k_rows, k_cols);
    dv.assert_shape("dv", k_rows, k_cols);
    do_.assert_shape("the output gradient of attention", q_rows, q_cols);
    lse.assert_shape("lse", q_rows, shape.heads);
    cpu::attention::attention_backward(dq, dk, dv, do_, q, k, v, lse, segments, shape, compute, ws);
}

/// Multiplications of one product over everything that is seen: Σ keys seen, times heads, times D.
fn seen_pairs(segments: &[Segment], shape: &AttentionShape) -> f64 {
    let seen: usize = segments
        .iter()
        .map(|segment| {
            let sight = Sight::new(segment, shape);
            (0..segment.queries.len())
                .map(|i| sight.keys(i).len())
                .sum::<usize>()
        })
        .sum();
    (seen * shape.heads * shape.head_size) as f64
}

/// Panics unless each segment is of one class, and a generated one has one query.
fn check_classes(segments: &[Segment], classes: RowClasses) {
    for Segment { queries, .. } in segments.iter().filter(|s| !s.queries.is_empty()) {
        assert!(
            !classes.is_generated(queries.end - 1) || queries.len() == 1,
            "generated rows are one a sequence, but queries {queries:?} are of one segment"
        );
    }
}

/// Panics unless all shapes fit, all ranges lie within them, and no two segments share a query.
fn check(q: View<'_>, k: View<'_>, v: View<'_>, segments: &[Segment], shape: &AttentionShape) {
    assert!(
        shape.kv_heads > 0 && shape.heads > 0 && shape.heads.is_multiple_of(shape.kv_heads),
        "{} query heads cannot share {} key/value heads",
        shape.heads,
        shape.kv_heads
    );
    assert!(shape.head_size > 0, "heads have at least one element");
    assert!(shape.window != Some(0), "a window holds at least one key");
    q.assert_shape("q", q.rows(), shape.heads * shape.head_size);
    k.assert_shape("k", k.rows(), shape.kv_heads * shape.head_size);
    v.assert_shape("v", k.rows(), shape.kv_heads * shape.head_size);
    let mut starts: Vec<&Range<usize>> = Vec::with_capacity(segments.len());
    for segment in segments {
        let queries = &segment.queries;
        assert!(
            queries.start <= queries.end && queries.end <= q.rows(),
            "queries {queries:?} do not lie within the {} there are",
            q.rows()
        );
        for keys in &segment.keys {
            assert!(
                keys.start <= keys.end && keys.end <= k.rows(),
                "keys {keys:?} do not lie within the {} there are",
                k.rows()
            );
        }
        assert!(
            !segment.causal || segment.total_keys() >= queries.len(),
            "{} causal queries see only {} keys",
            queries.len(),
            segment.total_keys()
        );
        if !queries.is_empty() {
            starts.push(queries);
        }
    }
    starts.sort_unstable_by_key(|queries| queries.start);
    for pair in starts.windows(2) {
        assert!(
            pair[0].end <= pair[1].start,
            "segments share the queries from {} on",
            pair[1].start
        );
    }
}
