#![expect(
    clippy::single_range_in_vec_init,
    reason = "lists of one range of keys"
)]

use std::ops::Range;

use lowrank_kernels::{
    AttentionShape, ComputeDType, RowClasses, Segment, Tensor, Workspace, attention_backward,
    attention_forward, reference,
};

use proptest::collection::vec;
use proptest::prelude::*;

use crate::common::{
    assert_close, check_gradient, dot, random, rounded, same_bits_on_any_threads, wide, zeros_like,
};

#[derive(Debug)]
struct Case {
    name: &'static str,
    queries: usize,
    keys: usize,
    segments: Vec<Segment>,
    shape: AttentionShape,
}

fn segment_of(queries: Range<usize>, keys: Vec<Range<usize>>, causal: bool) -> Segment {
    Segment {
        queries,
        keys,
        causal,
    }
}

fn shape(heads: usize, kv_heads: usize, head_size: usize) -> AttentionShape {
    AttentionShape {
        heads,
        kv_heads,
        head_size,
        scale: 0.4,
        softcap: None,
        window: None,
    }
}

/// A cap that many scores come near to.
fn capped(shape: AttentionShape) -> AttentionShape {
    AttentionShape {
        softcap: Some(0.7),
        ..shape
    }
}

fn windowed(window: usize, shape: AttentionShape) -> AttentionShape {
    AttentionShape {
        window: Some(window),
        ..shape
    }
}

/// New queries of several caches.
fn generated_case() -> Case {
    Case {
        name: "caches in pieces and a window",
        queries: 4,
        keys: 700,
        segments: vec![
            segment_of(0..1, vec![0..300], true),
            segment_of(1..2, vec![690..700, 300..428, 428..556, 556..600], true),
            segment_of(2..3, vec![600..601], true),
            segment_of(3..4, vec![601..690], true),
        ],
        shape: windowed(200, shape(9, 3, 20)),
    }
}

fn cases() -> Vec<Case> {
    let mut cases = plain_cases();
    cases.extend(capped_cases());
    cases
}

fn capped_cases() -> Vec<Case> {
    vec![
        Case {
            name: "capped scores",
            queries: 200,
            keys: 210,
            segments: vec![segment_of(0..200, vec![200..210, 0..200], true)],
            shape: capped(windowed(150, shape(6, 2, 12))),
        },
        Case {
            name: "capped scores of a cache",
            queries: 2,
            keys: 310,
            segments: vec![
                segment_of(0..1, vec![0..300], true),
                segment_of(1..2, vec![300..310], true),
            ],
            shape: capped(shape(4, 2, 8)),
        },
        Case {
            name: "capped scores of so many keys that they are computed twice",
            queries: 3,
            keys: 2100,
            segments: vec![segment_of(0..3, vec![0..2100], true)],
            shape: capped(shape(1, 1, 2)),
        },
    ]
}

fn plain_cases() -> Vec<Case> {
    vec![
        generated_case(),
        Case {
            name: "a single query and key",
            queries: 1,
            keys: 1,
            segments: vec![segment_of(0..1, vec![0..1], true)],
            shape: shape(1, 1, 3),
        },
        Case {
            name: "a cache and one new query",
            queries: 1,
            keys: 300,
            segments: vec![segment_of(0..1, vec![0..300], true)],
            shape: shape(4, 2, 8),
        },
        Case {
            name: "causal across tiles",
            queries: 150,
            keys: 150,
            segments: vec![segment_of(0..150, vec![0..150], true)],
            shape: shape(2, 1, 5),
        },
        Case {
            name: "long enough to be cut in parts",
            queries: 600,
            keys: 610,
            segments: vec![segment_of(0..600, vec![600..610, 0..600], true)],
            shape: shape(2, 1, 2),
        },
        Case {
            name: "many segments on one prefix, cut in parts",
            queries: 520,
            keys: 520,
            segments: (0..13)
                .map(|i| segment_of(40 * i..40 * (i + 1), vec![0..5, 40 * i..40 * (i + 1)], true))
                .collect(),
            shape: shape(2, 1, 2),
        },
        Case {
            name: "full across tiles",
            queries: 70,
            keys: 270,
            segments: vec![segment_of(0..70, vec![0..270], false)],
            shape: shape(1, 1, 8),
        },
        Case {
            name: "grouped heads, packed segments and a gap",
            queries: 140,
            keys: 140,
            segments: vec![
                segment_of(0..5, vec![0..5], true),
                segment_of(5..6, vec![5..6], true),
                segment_of(6..100, vec![6..100], true),
                // Rows 100..110 belong to nobody.
                segment_of(110..140, vec![110..140], false),
            ],
            shape: shape(6, 2, 16),
        },
        Case {
            name: "a prefix shared by two segments",
            queries: 60,
            keys: 80,
            segments: vec![
                segment_of(0..20, vec![0..20, 20..40], true),
                segment_of(20..60, vec![0..20, 40..80], true),
            ],
            shape: shape(3, 3, 4),
        },
        Case {
            name: "a window in a causal segment",
            queries: 200,
            keys: 200,
            segments: vec![segment_of(0..200, vec![0..200], true)],
            shape: windowed(7, shape(2, 2, 4)),
        },
        Case {
            name: "a wide window over a cache in pieces",
            queries: 90,
            keys: 400,
            segments: vec![segment_of(0..90, vec![300..400, 0..160, 200..290], true)],
            shape: windowed(150, shape(2, 1, 4)),
        },
        Case {
            name: "a window both ways",
            queries: 150,
            keys: 150,
            segments: vec![segment_of(0..150, vec![0..150], false)],
            shape: windowed(30, shape(2, 1, 4)),
        },
        Case {
            name: "more heads in a group than rows of a tile",
            queries: 3,
            keys: 9,
            segments: vec![segment_of(0..3, vec![0..9], true)],
            shape: shape(150, 1, 2),
        },
    ]
}

struct Values {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do_: Tensor,
}

impl Values {
    fn of(case: &Case) -> Self {
        let (q_cols, k_cols) = (
            case.shape.heads * case.shape.head_size,
            case.shape.kv_heads * case.shape.head_size,
        );
        Self {
            q: random(case.queries, q_cols, 1),
            k: random(case.keys, k_cols, 2),
            v: random(case.keys, k_cols, 3),
            do_: random(case.queries, q_cols, 4),
        }
    }

    fn forward(&self, case: &Case) -> (Tensor, Tensor) {
        self.forward_of(case, RowClasses::PROMPT, ComputeDType::F32)
    }

    fn forward_of(
        &self,
        case: &Case,
        classes: RowClasses,
        compute: ComputeDType,
    ) -> (Tensor, Tensor) {
        let mut o = zeros_like(&self.q);
        let rows = vec![f32::NEG_INFINITY; case.queries * case.shape.heads];
        let mut lse = Tensor::from_f32(case.queries, case.shape.heads, rows);
        attention_forward(
            o.view_mut(),
            lse.view_mut(),
            self.q.view(),
            self.k.view(),
            self.v.view(),
            &case.segments,
            &case.shape,
            classes,
            compute,
            &Workspace::new(),
        );
        (o, lse)
    }

    /// dq, dk and dv.
    fn backward(&self, case: &Case, lse: &Tensor) -> [Tensor; 3] {
        self.backward_of(case, lse, ComputeDType::F32)
    }

    fn backward_of(&self, case: &Case, lse: &Tensor, compute: ComputeDType) -> [Tensor; 3] {
        let mut dq = random(self.q.rows(), self.q.cols(), 5);
        let mut dk = random(self.k.rows(), self.k.cols(), 6);
        let mut dv = random(self.v.rows(), self.v.cols(), 7);
        attention_backward(
            dq.view_mut(),
            dk.view_mut(),
            dv.view_mut(),
            self.do_.view(),
            self.q.view(),
            self.k.view(),
            self.v.view(),
            lse.view(),
            &case.segments,
            &case.shape,
            compute,
            &Workspace::new(),
        );
        [dq, dk, dv]
    }
}

#[test]
fn forward_is_the_reference() {
    for case in cases() {
        let values = Values::of(&case);
        let (expected, expected_lse) = reference::attention(
            &wide(&values.q),
            &wide(&values.k),
            &wide(&values.v),
            &case.segments,
            &case.shape,
        );
        let single = case.segments.iter().all(|s| s.queries.len() == 1);
        let mut found = vec![values.forward(&case)];
        found.extend(
            single.then(|| values.forward_of(&case, RowClasses::GENERATED, ComputeDType::F32)),
        );
        for (o, lse) in found {
            assert_close(case.name, &o, &expected, 3e-6);
            assert_close(case.name, &lse, &expected_lse, 3e-6);
        }
    }
}

/// ‖found - expected‖ / ‖expected‖.
fn error(found: &Tensor, expected: &[f64]) -> f64 {
    let (mut off, mut all) = (0.0, 0.0);
    for (found, expected) in found.to_vec().iter().zip(expected) {
        if expected.is_finite() {
            off += (f64::from(*found) - expected).powi(2);
            all += expected.powi(2);
        }
    }
    (off / f64::max(all, 1e-30)).sqrt()
}

/// Whether this processor rounds the factors of attention where it may.
#[cfg(target_arch = "x86_64")]
fn rounds() -> bool {
    lowrank_kernels::engines().contains(&lowrank_kernels::Engine::Avx512Bf16)
}

#[cfg(not(target_arch = "x86_64"))]
fn rounds() -> bool {
    false
}

/// The log-sum-exp is that of the rounded factors; the rest has weights and score gradients that are rounded, too.
#[test]
fn rounded_factors_change_little() {
    for case in cases() {
        let values = Values::of(&case);
        let (o, lse) = values.forward_of(&case, RowClasses::PROMPT, ComputeDType::Bf16);
        let (mut q, mut k, mut v) = (wide(&values.q), wide(&values.k), wide(&values.v));
        let mut shape = case.shape;
        if rounds() {
            q = rounded(&values.q, shape.scale);
            (k, v) = (rounded(&values.k, 1.0), rounded(&values.v, 1.0));
            shape.scale = 1.0;
        }
        let (expected, expected_lse) = reference::attention(&q, &k, &v, &case.segments, &shape);
        assert_close(case.name, &lse, &expected_lse, 1e-5);
        let off = error(&o, &expected);
        assert!(off < 4e-3, "{}: {off:e}", case.name);
        let (_, exact_lse) = values.forward(&case);
        let exact = values.backward(&case, &exact_lse);
        let found = values.backward_of(&case, &lse, ComputeDType::Bf16);
        for (name, (found, exact)) in ["dq", "dk", "dv"].iter().zip(found.iter().zip(&exact)) {
            let (size, off) = (wide(exact), error(found, &wide(exact)));
            // With one key there is nothing to learn, and what is left is rounding.
            let nothing = size.iter().all(|x| x.abs() < 1e-5);
            assert!(nothing || off < 1.5e-2, "{}, {name}: {off:e}", case.name);
        }
    }
}

#[test]
fn gradients_are_finite_differences() {
    for case in cases() {
        let values = Values::of(&case);
        let (_, lse) = values.forward(&case);
        let [dq, dk, dv] = values.backward(&case, &lse);
        let (q, k, v) = (wide(&values.q), wide(&values.k), wide(&values.v));
        let g = wide(&values.do_);
        let loss = |q: &[f64], k: &[f64], v: &[f64]| {
            dot(
                &g,
                &reference::attention(q, k, v, &case.segments, &case.shape).0,
            )
        };
        if case.keys > 1 {
            check_gradient(case.name, &values.q, &dq, 1e-5, |q| loss(q, &k, &v));
            check_gradient(case.name, &values.k, &dk, 1e-5, |k| loss(&q, k, &v));
        }
        check_gradient(case.name, &values.v, &dv, 1e-5, |v| loss(&q, &k, v));
    }
}

/// Segments of a few queries each, after one prefix or none, causal or not, with or without a gap.
fn any_case() -> impl Strategy<Value = Case> {
    let segment = (0..90_usize, any::<bool>(), any::<bool>(), 0..3_usize);
    let heads = (1..4_usize, 1..4_usize, 1..10_usize);
    let window = proptest::option::of(1..100_usize);
    let softcap = proptest::option::of(0.3..2.0_f32);
    (vec(segment, 1..4), heads, 1..40_usize, (window, softcap)).prop_map(
        |(parts, (kv_heads, group, head_size), prefix, (window, softcap))| {
            let mut segments = Vec::new();
            let mut at = prefix;
            for (count, with_prefix, causal, gap) in parts {
                let own = at..at + count;
                let keys = if with_prefix {
                    vec![0..prefix, own.clone()]
                } else {
                    vec![own.clone()]
                };
                segments.push(segment_of(own, keys, causal));
                at += count + gap;
            }
            Case {
                name: "any",
                queries: at,
                keys: at,
                segments,
                shape: AttentionShape {
                    window,
                    softcap,
                    ..shape(kv_heads * group, kv_heads, head_size)
                },
            }
        },
    )
}

/// Values against the reference, and all gradients along one random direction.
fn check_against_reference(case: &Case) {
    let values = Values::of(case);
    let (o, lse) = values.forward(case);
    let inputs = [&values.q, &values.k, &values.v].map(wide);
    let run = |inputs: &[Vec<f64>; 3]| {
        let [q, k, v] = inputs;
        reference::attention(q, k, v, &case.segments, &case.shape)
    };
    let (expected, expected_lse) = run(&inputs);
    assert_close("o", &o, &expected, 3e-6);
    assert_close("lse", &lse, &expected_lse, 3e-6);

    let gradients = values.backward(case, &lse).map(|grad| wide(&grad));
    let direction: [Vec<f64>; 3] =
        std::array::from_fn(|i| wide(&random(1, inputs[i].len(), 8 + i as u64)));
    let g = wide(&values.do_);
    let loss = |t: f64| {
        let moved = std::array::from_fn(|i| {
            let pairs = inputs[i].iter().zip(&direction[i]);
            pairs.map(|(x, by)| x + t * by).collect()
        });
        dot(&g, &run(&moved).0)
    };
    let slope = (loss(1e-5) - loss(-1e-5)) / 2e-5;
    let pairs = gradients.iter().zip(&direction);
    let found: f64 = pairs.map(|(grad, by)| dot(grad, by)).sum();
    let size: f64 = gradients.iter().map(|grad| dot(grad, grad)).sum();
    assert!(
        (slope - found).abs() <= 1e-5 * size.sqrt().max(1.0),
        "the loss changes by {slope}, but the gradient says {found}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 40,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_segments_are_the_reference(case in any_case()) {
        check_against_reference(&case);
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    for case in cases() {
        let values = Values::of(&case);
        for compute in [ComputeDType::F32, ComputeDType::Bf16] {
            same_bits_on_any_threads(|| {
                let (o, lse) = values.forward_of(&case, RowClasses::PROMPT, compute);
                let [dq, dk, dv] = values.backward_of(&case, &lse, compute);
                vec![o, lse, dq, dk, dv]
            });
        }
    }
}

#[test]
fn packed_segments_do_not_see_each_other() {
    let heads = shape(2, 1, 8);
    let case = Case {
        name: "packed",
        queries: 90,
        keys: 90,
        segments: vec![
            segment_of(0..40, vec![0..40], true),
            segment_of(40..90, vec![40..90], true),
        ],
        shape: heads,
    };
    let values = Values::of(&case);
    let (o, lse) = values.forward(&case);
    // Whatever the first segment holds, the second gives the same bits.
    let mut changed = Values::of(&case);
    for tensor in [&mut changed.q, &mut changed.k, &mut changed.v] {
        tensor.view_mut().slice_rows(0..40).fill(1e3);
    }
    let (other, other_lse) = changed.forward(&case);
    let after = |tensor: &Tensor| tensor.view().slice_rows(40..90).to_vec();
    assert_eq!(after(&o), after(&other));
    assert_eq!(after(&lse), after(&other_lse));
}

#[test]
fn large_scores_do_not_overflow() {
    let mut case = cases().remove(2);
    case.shape.scale = 1e4;
    let values = Values::of(&case);
    let (o, lse) = values.forward(&case);
    assert!(o.to_vec().iter().all(|x| x.is_finite()));
    assert!(lse.to_vec().iter().all(|x| x.is_finite()));
    let gradients = values.backward(&case, &lse);
    assert!(
        gradients
            .iter()
            .all(|grad| grad.to_vec().iter().all(|x| x.is_finite()))
    );
}

#[test]
fn a_query_without_keys_gets_zeros() {
    for (queries, classes) in [
        (1, RowClasses::GENERATED),
        (1, RowClasses::PROMPT),
        (20, RowClasses::PROMPT),
    ] {
        let case = Case {
            name: "no keys",
            queries,
            keys: 4,
            segments: vec![segment_of(0..queries, vec![], false)],
            shape: shape(1, 1, 4),
        };
        let values = Values::of(&case);
        let (o, lse) = values.forward_of(&case, classes, ComputeDType::F32);
        assert!(o.to_vec().iter().all(|&x| x == 0.0));
        assert!(lse.to_vec().iter().all(|&x| x == f32::NEG_INFINITY));
        let gradients = values.backward(&case, &lse);
        assert!(
            gradients
                .iter()
                .all(|grad| grad.to_vec().iter().all(|&x| x == 0.0))
        );
    }
}

#[test]
#[should_panic(expected = "generated rows are one a sequence")]
fn a_generated_query_is_alone_in_its_segment() {
    let case = Case {
        name: "two at once",
        queries: 3,
        keys: 8,
        segments: vec![segment_of(0..3, vec![0..8], true)],
        shape: shape(1, 1, 4),
    };
    Values::of(&case).forward_of(&case, RowClasses::generated_from(2), ComputeDType::F32);
}

#[test]
#[should_panic(expected = "segments share the queries from 3 on")]
fn segments_must_not_share_queries() {
    let case = Case {
        name: "overlap",
        queries: 8,
        keys: 8,
        segments: vec![
            segment_of(0..4, vec![0..4], true),
            segment_of(3..8, vec![3..8], true),
        ],
        shape: shape(1, 1, 4),
    };
    Values::of(&case).forward(&case);
}
