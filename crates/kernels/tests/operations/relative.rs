use std::ops::Range;

use lowrank_kernels::{
    RelativeGradients, RelativePositions, RelativeSegment, RelativeShape, Tensor, View, Workspace,
    reference, relative_attention_backward, relative_attention_forward,
};

use proptest::prelude::*;

use crate::common::{
    assert_close, check_gradient, dot, random, same_bits_on_any_threads, wide, zeros_like,
};

#[derive(Debug)]
struct Case {
    name: &'static str,
    rows: usize,
    segments: Vec<RelativeSegment>,
    heads: usize,
    size: usize,
    /// Of the distances of the longest segment.
    places: Vec<u32>,
    /// Rows of the positions.
    positions: usize,
    /// Whether there are positions as keys, and as queries.
    terms: (bool, bool),
}

fn segment(rows: Range<usize>, first: usize) -> RelativeSegment {
    RelativeSegment { rows, first }
}

/// Every distance has its own place up to `span`, and beyond it shares the last one.
fn clamped(longest: usize, span: usize) -> Vec<u32> {
    let longest = longest as i64;
    let place = |distance: i64| (distance + span as i64).clamp(0, 2 * span as i64 - 1) as u32;
    (1 - longest..longest).map(place).collect()
}

fn cases() -> Vec<Case> {
    let both = (true, true);
    let whole = |name, rows, span, (heads, size), terms| Case {
        name,
        rows,
        segments: vec![segment(0..rows, 0)],
        heads,
        size,
        places: clamped(rows, span),
        positions: 2 * span,
        terms,
    };
    vec![
        whole("a single row", 1, 2, (1, 3), both),
        whole("a few rows", 7, 16, (2, 4), both),
        whole("more than a tile of queries", 150, 24, (2, 5), both),
        whole("more positions than are reached", 20, 40, (3, 16), both),
        whole("positions as keys alone", 70, 9, (1, 8), (true, false)),
        whole("positions as queries alone", 70, 9, (1, 8), (false, true)),
        whole("no positions", 70, 9, (1, 8), (false, false)),
        whole("as many heads as tasks", 30, 6, (17, 2), both),
        Case {
            name: "packed segments, a gap, and positions of their own",
            rows: 130,
            segments: vec![
                segment(0..5, 12),
                segment(5..6, 0),
                segment(6..6, 0),
                segment(6..90, 0),
                segment(100..112, 12),
                segment(112..130, 12),
            ],
            heads: 3,
            size: 6,
            places: clamped(100, 6),
            positions: 24,
            terms: both,
        },
        Case {
            name: "places in no order",
            rows: 9,
            segments: vec![segment(0..4, 0), segment(4..9, 0)],
            heads: 1,
            size: 4,
            places: vec![3, 3, 7, 1, 0, 2, 9, 2, 5],
            positions: 11,
            terms: both,
        },
    ]
}

struct Values {
    /// q, k and v, and the positions as keys and as queries.
    inputs: [Tensor; 5],
    do_: Tensor,
}

impl Values {
    fn of(case: &Case) -> Self {
        let cols = case.heads * case.size;
        let rows = |i: usize| if i < 3 { case.rows } else { case.positions };
        Self {
            inputs: std::array::from_fn(|i| random(rows(i), cols, 1 + i as u64)),
            do_: random(case.rows, cols, 9),
        }
    }
}

impl Case {
    fn shape(&self) -> RelativeShape<'_> {
        RelativeShape {
            heads: self.heads,
            head_size: self.size,
            scale: 0.4,
            places: &self.places,
        }
    }

    fn positions<'a>(&self, [.., keys, queries]: &'a [Tensor; 5]) -> RelativePositions<'a> {
        RelativePositions {
            keys: self.terms.0.then(|| keys.view()),
            queries: self.terms.1.then(|| queries.view()),
        }
    }

    fn forward(&self, values: &Values) -> (Tensor, Tensor) {
        let [q, k, v, ..] = &values.inputs;
        let mut o = zeros_like(q);
        let rows = vec![f32::NEG_INFINITY; self.rows * self.heads];
        let mut lse = Tensor::from_f32(self.rows, self.heads, rows);
        relative_attention_forward(
            o.view_mut(),
            lse.view_mut(),
            q.view(),
            k.view(),
            v.view(),
            self.positions(&values.inputs),
            &self.segments,
            &self.shape(),
            &Workspace::new(),
        );
        (o, lse)
    }

    /// The gradients of all inputs; of absent positions zeros.
    fn backward(&self, values: &Values, lse: &Tensor) -> [Tensor; 5] {
        let mut grads: [Tensor; 5] = std::array::from_fn(|i| {
            let input = &values.inputs[i];
            let is_there = [true, true, true, self.terms.0, self.terms.1][i];
            if is_there {
                random(input.rows(), input.cols(), 20 + i as u64)
            } else {
                zeros_like(input)
            }
        });
        let [dq, dk, dv, d_keys, d_queries] = &mut grads;
        let [q, k, v, ..] = &values.inputs;
        relative_attention_backward(
            dq.view_mut(),
            dk.view_mut(),
            dv.view_mut(),
            RelativeGradients {
                keys: self.terms.0.then(|| d_keys.view_mut()),
                queries: self.terms.1.then(|| d_queries.view_mut()),
            },
            values.do_.view(),
            q.view(),
            k.view(),
            v.view(),
            self.positions(&values.inputs),
            lse.view(),
            &self.segments,
            &self.shape(),
            &Workspace::new(),
        );
        grads
    }

    fn reference(&self, inputs: &[Vec<f64>; 5]) -> (Vec<f64>, Vec<f64>) {
        let [q, k, v, keys, queries] = inputs;
        reference::relative_attention(
            [q, k, v],
            self.terms.0.then_some(keys),
            self.terms.1.then_some(queries),
            &self.segments,
            &self.shape(),
        )
    }
}

fn all_wide(tensors: &[Tensor; 5]) -> [Vec<f64>; 5] {
    std::array::from_fn(|i| wide(&tensors[i]))
}

#[test]
fn forward_is_the_reference() {
    for case in cases() {
        let values = Values::of(&case);
        let (o, lse) = case.forward(&values);
        let (expected, expected_lse) = case.reference(&all_wide(&values.inputs));
        assert_close(case.name, &o, &expected, 3e-6);
        assert_close(case.name, &lse, &expected_lse, 3e-6);
    }
}

#[test]
fn gradients_are_finite_differences() {
    for case in cases() {
        let values = Values::of(&case);
        let (_, lse) = case.forward(&values);
        let grads = case.backward(&values, &lse);
        let inputs = all_wide(&values.inputs);
        let g = wide(&values.do_);
        let is_there = [
            case.rows > 1,
            case.rows > 1,
            true,
            case.terms.0 && case.rows > 1,
            case.terms.1 && case.rows > 1,
        ];
        for i in (0..5).filter(|&i| is_there[i]) {
            let name = format!("{}, input {i}", case.name);
            check_gradient(&name, &values.inputs[i], &grads[i], 1e-5, |x| {
                let mut moved = inputs.clone();
                moved[i] = x.to_vec();
                dot(&g, &case.reference(&moved).0)
            });
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    for case in cases() {
        let values = Values::of(&case);
        same_bits_on_any_threads(|| {
            let (o, lse) = case.forward(&values);
            let mut all = vec![o];
            all.extend(case.backward(&values, &lse));
            all.push(lse);
            all
        });
    }
}

/// Segments of random lengths with random places.
fn any_case() -> impl Strategy<Value = Case> {
    let lengths = proptest::collection::vec((0..90_usize, 0..3_usize, 0..4_usize), 1..5);
    let terms = (any::<bool>(), any::<bool>());
    (lengths, (1..4_usize, 1..10_usize), terms, 1..30_u32).prop_flat_map(
        |(lengths, (heads, size), terms, reached)| {
            let longest = lengths.iter().map(|(length, ..)| *length).max();
            let count = 2 * longest.unwrap_or(0).max(1) - 1;
            proptest::collection::vec(0..reached, count).prop_map(move |places| {
                let (mut segments, mut at) = (Vec::new(), 0);
                for (length, gap, first) in &lengths {
                    segments.push(segment(at..at + length, *first));
                    at += length + gap;
                }
                Case {
                    name: "any",
                    rows: at,
                    segments,
                    heads,
                    size,
                    places,
                    positions: reached as usize + 4,
                    terms,
                }
            })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 40,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Values against the reference, and all gradients along one random direction.
    #[test]
    fn any_segments_are_the_reference(case in any_case()) {
        let values = Values::of(&case);
        let inputs = all_wide(&values.inputs);
        let (o, lse) = case.forward(&values);
        let (expected, expected_lse) = case.reference(&inputs);
        assert_close("o", &o, &expected, 3e-6);
        assert_close("lse", &lse, &expected_lse, 3e-6);

        let grads = all_wide(&case.backward(&values, &lse));
        let direction: [Vec<f64>; 5] =
            std::array::from_fn(|i| wide(&random(1, inputs[i].len(), 30 + i as u64)));
        let g = wide(&values.do_);
        let loss = |t: f64| {
            let moved = std::array::from_fn(|i| {
                let pairs = inputs[i].iter().zip(&direction[i]);
                pairs.map(|(x, by)| x + t * by).collect()
            });
            dot(&g, &case.reference(&moved).0)
        };
        let slope = (loss(1e-5) - loss(-1e-5)) / 2e-5;
        let found: f64 = grads.iter().zip(&direction).map(|(grad, by)| dot(grad, by)).sum();
        let norm: f64 = grads.iter().map(|grad| dot(grad, grad)).sum();
        assert!(
            (slope - found).abs() <= 1e-5 * norm.sqrt().max(1.0),
            "the loss changes by {slope}, but the gradient says {found}"
        );
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let case = &cases()[2];
    let mut values = Values::of(case);
    for tensor in &mut values.inputs[..2] {
        let large: Vec<f32> = tensor.to_vec().iter().map(|x| 300.0 * x).collect();
        *tensor = Tensor::from_f32(tensor.rows(), tensor.cols(), large);
    }
    let is_finite = |tensor: &Tensor| tensor.to_vec().iter().all(|x| x.is_finite());
    let (o, lse) = case.forward(&values);
    assert!(is_finite(&o) && is_finite(&lse));
    assert!(case.backward(&values, &lse).iter().all(is_finite));
}

#[test]
fn rows_of_no_segment_are_left_as_they_are() {
    let case = Case {
        segments: vec![segment(0..5, 0)],
        ..cases().remove(1)
    };
    let values = Values::of(&case);
    let (_, lse) = case.forward(&values);
    let behind = |tensor: &Tensor| {
        let view: View<'_> = tensor.view();
        view.slice_rows(5..view.rows()).to_vec()
    };
    assert!(behind(&lse).iter().all(|x| *x == f32::NEG_INFINITY));
    let grads = case.backward(&values, &lse);
    for grad in &grads[..3] {
        assert!(behind(grad).iter().all(|x| *x == 0.0));
    }
}

#[test]
#[should_panic(expected = "segments share the rows from 3 on")]
fn segments_must_not_share_rows() {
    let case = Case {
        segments: vec![segment(0..4, 0), segment(3..7, 0)],
        ..cases().remove(1)
    };
    case.forward(&Values::of(&case));
}

#[test]
#[should_panic(expected = "does not lie within the 32 positions there are")]
fn places_must_lie_within_the_positions() {
    let case = Case {
        segments: vec![segment(0..7, 20)],
        ..cases().remove(1)
    };
    case.forward(&Values::of(&case));
}

#[test]
#[should_panic(expected = "a segment of 7 rows, and places for 3")]
fn a_segment_must_not_be_longer_than_its_places_say() {
    let case = Case {
        places: clamped(3, 16),
        ..cases().remove(1)
    };
    case.forward(&Values::of(&case));
}
