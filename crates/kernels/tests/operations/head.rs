use lowrank_kernels::{
    ComputeDType, DType, Engine, HeadWeight, Layout, LogitScaling, OwnRows, Pauses, RowClasses,
    Tensor, Weight, Workspace, cross_entropy_forward_backward, engines, head_backward,
    head_log_probs, head_logits, head_own_logits, reference,
};

use crate::common::{
    assert_close, check_gradient, dot, random, random_as, rounded, same_bits_on_any_threads, wide,
    zeros_like,
};

/// (rows, hidden size, vocabulary).
const SHAPES: [(usize, usize, usize); 5] = [
    (1, 3, 5),
    (2, 33, 1030),
    (7, 64, 99),
    (40, 20, 515),
    (260, 6, 1050),
];

/// What is done with logits: nothing, a division, a cap that many of them come near to, both.
const SCALINGS: [LogitScaling; 4] = [
    LogitScaling::NONE,
    LogitScaling {
        divisor: 3.5,
        softcap: None,
    },
    LogitScaling {
        divisor: 1.0,
        softcap: Some(8.0),
    },
    LogitScaling {
        divisor: 0.7,
        softcap: Some(12.0),
    },
];

fn targets(rows: usize, vocabulary: usize) -> Vec<u32> {
    (0..rows).map(|i| (i * 31 % vocabulary) as u32).collect()
}

fn weight(w: &Tensor) -> Weight<'_> {
    Weight {
        view: w.view(),
        layout: Layout::OutIn,
    }
}

#[test]
fn logits_are_the_product() {
    for (rows, hidden, vocabulary) in SHAPES {
        for dtype in [DType::F32, DType::Bf16] {
            let h = random(rows, hidden, 1);
            let w = random_as(vocabulary, hidden, 2, dtype);
            let mut logits = random(rows, vocabulary, 3);
            head_logits(
                logits.view_mut(),
                h.view(),
                weight(&w),
                LogitScaling::NONE,
                RowClasses::PROMPT,
            );
            let expected = reference::linear(
                &wide(&h),
                &wide(&w),
                None,
                hidden,
                vocabulary,
                Layout::OutIn,
            );
            assert_close("logits", &logits, &expected, 3e-6);
        }
    }
}

struct LogProbs {
    log_prob: Vec<f64>,
    lse: Vec<f64>,
    mean: Vec<f64>,
    correct: Vec<bool>,
}

fn log_probs(h: &Tensor, w: &Tensor, scaling: LogitScaling, targets: &[u32]) -> LogProbs {
    let n = h.rows();
    let mut out = LogProbs {
        log_prob: vec![0.0; n],
        lse: vec![0.0; n],
        mean: vec![0.0; n],
        correct: vec![false; n],
    };
    head_log_probs(
        &mut out.log_prob,
        &mut out.lse,
        &mut out.mean,
        &mut out.correct,
        h.view(),
        weight(w),
        scaling,
        targets,
        &Workspace::new(),
    );
    out
}

#[test]
fn log_probs_are_the_reference() {
    let shapes = SHAPES.iter();
    for (&(rows, hidden, vocabulary), scaling) in
        shapes.flat_map(|shape| SCALINGS.map(|scaling| (shape, scaling)))
    {
        let h = random(rows, hidden, 1);
        let w = random_as(vocabulary, hidden, 2, DType::Bf16);
        let mut targets = targets(rows, vocabulary);
        // Some targets that are right.
        let mut logits = Tensor::zeros(rows, vocabulary);
        head_logits(
            logits.view_mut(),
            h.view(),
            weight(&w),
            scaling,
            RowClasses::PROMPT,
        );
        let best = lowrank_kernels::argmax_rows(logits.view());
        for i in (0..rows).step_by(3) {
            targets[i] = best[i] as u32;
        }
        let found = log_probs(&h, &w, scaling, &targets);
        let expected = reference::head(&wide(&h), &wide(&w), scaling, hidden, &targets);
        assert!(found.correct.iter().any(|&x| x));
        for (i, row) in expected.iter().enumerate() {
            let close = |found: f64, expected: f64| {
                assert!((found - expected).abs() < 2e-5, "{found} is not {expected}");
            };
            close(found.log_prob[i], row.log_prob);
            close(found.lse[i], row.lse);
            close(found.mean[i], row.mean_logit);
            assert_eq!(found.correct[i], row.correct);
        }
    }
}

#[test]
fn the_first_of_equal_logits_counts() {
    let h = Tensor::from_f32(2, 1, vec![1.0, 1.0]);
    let w = Tensor::from_f32(3, 1, vec![0.5, 2.0, 2.0]);
    let found = log_probs(&h, &w, LogitScaling::NONE, &[1, 2]);
    assert_eq!(found.correct, [true, false]);
}

fn loss(
    h: &[f64],
    w: &[f64],
    scaling: LogitScaling,
    hidden: usize,
    targets: &[u32],
    smoothing: f64,
) -> Vec<f64> {
    let rows = reference::head(h, w, scaling, hidden, targets);
    rows.iter().map(|row| row.loss(smoothing)).collect()
}

#[test]
fn cross_entropy_is_the_reference_with_its_gradients() {
    for (rows, hidden, vocabulary) in SHAPES {
        let smoothings = SCALINGS
            .iter()
            .flat_map(|&scaling| [(0.0_f32, scaling), (0.125, scaling)]);
        for (smoothing, scaling) in smoothings {
            let h = random(rows, hidden, 1);
            let w = random(vocabulary, hidden, 2);
            let targets = targets(rows, vocabulary);
            let (mut dh, mut dw) = (random(rows, hidden, 3), zeros_like(&w));
            let result = cross_entropy_forward_backward(
                Some(dh.view_mut()),
                Some(dw.view_mut()),
                h.view(),
                weight(&w),
                scaling,
                &targets,
                smoothing,
                ComputeDType::F32,
                Pauses::NONE,
                &Workspace::new(),
            );
            let (hs, ws, smooth) = (wide(&h), wide(&w), f64::from(smoothing));
            let total = |h: &[f64], w: &[f64]| {
                loss(h, w, scaling, hidden, &targets, smooth)
                    .iter()
                    .sum::<f64>()
            };
            let expected = total(&hs, &ws);
            assert!((result.loss_sum - expected).abs() < 1e-5 * expected);
            let rows = reference::head(&hs, &ws, scaling, hidden, &targets);
            assert_eq!(
                result.correct,
                rows.iter().filter(|row| row.correct).count()
            );
            check_gradient("dh", &h, &dh, 1e-5, |h| total(h, &ws));
            check_gradient("dw", &w, &dw, 1e-5, |w| total(&hs, w));

            let only_loss = cross_entropy_forward_backward(
                None,
                None,
                h.view(),
                weight(&w),
                scaling,
                &targets,
                smoothing,
                ComputeDType::F32,
                Pauses::NONE,
                &Workspace::new(),
            );
            assert_eq!(only_loss, result);
        }
    }
}

/// Whether this processor rounds the factors of products where it may.
fn rounds() -> bool {
    #[cfg(target_arch = "x86_64")]
    let engine = Engine::Avx512Bf16;
    #[cfg(target_arch = "aarch64")]
    let engine = Engine::NeonBf16;
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    engines().contains(&engine)
}

/// The loss is that of the rounded hidden rows; the gradient is that of a product with rounded factors, too.
#[test]
fn rounded_factors_have_the_loss_of_what_they_are_rounded_to() {
    for (rows, hidden, vocabulary) in [(3, 128, 257), (37, 160, 1100), (260, 136, 2050)] {
        for smoothing in [0.0_f32, 0.125] {
            let h = random(rows, hidden, 1);
            let w = random_as(vocabulary, hidden, 2, DType::Bf16);
            let targets = targets(rows, vocabulary);
            let run = |compute, trained: bool| {
                let (mut dh, mut dw) = (random(rows, hidden, 3), zeros_like(&w));
                let result = cross_entropy_forward_backward(
                    Some(dh.view_mut()),
                    trained.then(|| dw.view_mut()),
                    h.view(),
                    weight(&w),
                    LogitScaling::NONE,
                    &targets,
                    smoothing,
                    compute,
                    Pauses::NONE,
                    &Workspace::new(),
                );
                (result, wide(&dh))
            };
            let (result, dh) = run(ComputeDType::Bf16, false);
            let read = if rounds() { rounded(&h, 1.0) } else { wide(&h) };
            let smooth = f64::from(smoothing);
            let expected = loss(
                &read,
                &wide(&w),
                LogitScaling::NONE,
                hidden,
                &targets,
                smooth,
            );
            let expected = expected.iter().sum::<f64>();
            assert!((result.loss_sum - expected).abs() < 1e-5 * expected);
            let (_, exact) = run(ComputeDType::F32, false);
            let difference: Vec<f64> = dh.iter().zip(&exact).map(|(a, b)| a - b).collect();
            let off = (dot(&difference, &difference) / dot(&exact, &exact)).sqrt();
            assert!(off < 2e-2, "{off:e}");
            // With the gradient of the weight, gradients of logits stay f32 until a product reads them.
            let (trained, of_trained) = run(ComputeDType::Bf16, true);
            assert_eq!(trained, result);
            assert_eq!(of_trained, dh);
        }
    }
}

#[test]
fn backward_with_coefficients_is_finite_differences() {
    for scaling in SCALINGS {
        backward_is_finite_differences(scaling);
    }
}

fn backward_is_finite_differences(scaling: LogitScaling) {
    let (rows, hidden, vocabulary) = (130, 20, 515);
    let h = random(rows, hidden, 1);
    let w = random(vocabulary, hidden, 2);
    let targets = targets(rows, vocabulary);
    let coef = random(1, rows, 5).to_vec();
    let lse = log_probs(&h, &w, scaling, &targets).lse;
    let (mut dh, mut dw) = (random(rows, hidden, 3), zeros_like(&w));
    head_backward(
        dh.view_mut(),
        Some(dw.view_mut()),
        h.view(),
        weight(&w),
        scaling,
        &targets,
        &lse,
        &coef,
        0.125,
        ComputeDType::F32,
        &Workspace::new(),
    );
    let coef: Vec<f64> = coef.into_iter().map(f64::from).collect();
    let (hs, ws) = (wide(&h), wide(&w));
    let total = |h: &[f64], w: &[f64]| dot(&coef, &loss(h, w, scaling, hidden, &targets, 0.125));
    check_gradient("dh", &h, &dh, 1e-5, |h| total(h, &ws));
    check_gradient("dw", &w, &dw, 1e-5, |w| total(&hs, w));
}

/// Own rows are what the same rows of the weight would be, for the hidden rows that they are given for.
#[test]
fn own_rows_stand_in_for_rows_of_the_weight() {
    for (rows, hidden, vocabulary) in SHAPES {
        for scaling in SCALINGS {
            let h = random(rows, hidden, 1);
            let w = random(vocabulary, hidden, 2);
            let targets = targets(rows, vocabulary);
            // Of the first half of the rows, with a target among them.
            let half = 0..rows.div_ceil(2);
            let ids = [vocabulary as u32 - 1, targets[0]];
            let values = random(ids.len(), hidden, 4);
            let mut changed = random(vocabulary, hidden, 2);
            for (i, id) in ids.iter().enumerate() {
                let to = *id as usize..*id as usize + 1;
                let from = values.view().slice_rows(i..i + 1);
                changed.view_mut().slice_rows(to).copy_from(from);
            }
            let run = |rows: std::ops::Range<usize>, w: HeadWeight<'_>, shape: (usize, usize)| {
                let mut dh = random(rows.len(), hidden, 3);
                let mut dw = Tensor::zeros(shape.0, shape.1);
                let result = cross_entropy_forward_backward(
                    Some(dh.view_mut()),
                    Some(dw.view_mut()),
                    h.view().slice_rows(rows.clone()),
                    w,
                    scaling,
                    &targets[rows],
                    0.125,
                    ComputeDType::F32,
                    Pauses::NONE,
                    &Workspace::new(),
                );
                (result, dh, dw)
            };
            let own = [OwnRows {
                rows: half.clone(),
                ids: &ids,
                values: values.view(),
            }];
            let with_own = HeadWeight {
                weight: weight(&w),
                own: &own,
            };
            let (found, dh, dw) = run(0..rows, with_own, (ids.len(), hidden));
            let whole = (vocabulary, hidden);
            let (first, dh_first, dw_first) = run(half.clone(), weight(&changed).into(), whole);
            let (second, dh_second, _) = run(half.end..rows, weight(&w).into(), whole);
            let expected = first.loss_sum + second.loss_sum;
            assert!((found.loss_sum - expected).abs() < 1e-5 * expected);
            assert_eq!(found.correct, first.correct + second.correct);
            let close = |found: &[f32], expected: &[f32]| {
                let size = expected.iter().fold(1e-3, |size: f32, x| size.max(x.abs()));
                assert_eq!(found.len(), expected.len());
                for (found, expected) in found.iter().zip(expected) {
                    assert!(
                        (found - expected).abs() < 1e-5 * size,
                        "{found}, {expected}"
                    );
                }
            };
            close(
                &dh.to_vec(),
                &[dh_first.to_vec(), dh_second.to_vec()].concat(),
            );
            for (i, id) in ids.iter().enumerate() {
                let id = *id as usize;
                let found = dw.view().slice_rows(i..i + 1).to_vec();
                close(&found, &dw_first.view().slice_rows(id..id + 1).to_vec());
            }
        }
    }
}

/// A row's logits are those that it has alone, be it a prompt's or a generated one.
#[test]
fn own_rows_do_not_depend_on_company() {
    let (rows, hidden, vocabulary) = (37, 48, 131);
    let h = random(rows, hidden, 1);
    let w = random(vocabulary, hidden, 2);
    let (values, ids) = (random(3, hidden, 4), [5, 130, 0]);
    let logits = |rows: std::ops::Range<usize>, own: std::ops::Range<usize>, classes| {
        let mut logits = Tensor::zeros(rows.len(), vocabulary);
        let h = h.view().slice_rows(rows);
        let own = [OwnRows {
            rows: own,
            ids: &ids,
            values: values.view(),
        }];
        let (scaling, ws) = (LogitScaling::NONE, Workspace::new());
        head_logits(logits.view_mut(), h, weight(&w), scaling, classes);
        head_own_logits(logits.view_mut(), h, &own, scaling, classes, &ws);
        logits
    };
    let together = logits(0..rows, 4..30, RowClasses::generated_from(20));
    for row in 0..rows {
        let class = if row < 20 {
            RowClasses::PROMPT
        } else {
            RowClasses::GENERATED
        };
        let own = if (4..30).contains(&row) { 0..1 } else { 0..0 };
        let alone = logits(row..row + 1, own, class).to_vec();
        let found = together.view().slice_rows(row..row + 1).to_vec();
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&found), bits(&alone), "row {row}");
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    for (rows, hidden, vocabulary) in SHAPES {
        let h = random(rows, hidden, 1);
        let w = random_as(vocabulary, hidden, 2, DType::Bf16);
        let targets = targets(rows, vocabulary);
        same_bits_on_any_threads(|| {
            let (mut dh, mut dw) = (zeros_like(&h), Tensor::zeros(vocabulary, hidden));
            let result = cross_entropy_forward_backward(
                Some(dh.view_mut()),
                Some(dw.view_mut()),
                h.view(),
                weight(&w),
                LogitScaling {
                    divisor: 2.0,
                    softcap: Some(3.0),
                },
                &targets,
                0.1,
                ComputeDType::F32,
                Pauses::NONE,
                &Workspace::new(),
            );
            let bits = result.loss_sum.to_bits();
            let halves = vec![
                f32::from_bits(bits as u32),
                f32::from_bits((bits >> 32) as u32),
            ];
            vec![dh, dw, Tensor::from_f32(1, 2, halves)]
        });
    }
}

#[test]
fn no_rows_have_no_loss() {
    let w = random(5, 3, 1);
    let result = cross_entropy_forward_backward(
        None,
        None,
        Tensor::zeros(0, 3).view(),
        weight(&w),
        LogitScaling::NONE,
        &[],
        0.0,
        ComputeDType::F32,
        Pauses::NONE,
        &Workspace::new(),
    );
    assert_eq!((result.loss_sum, result.correct), (0.0, 0));
}

#[test]
#[should_panic(expected = "target 5 is past the vocabulary of 5")]
fn a_target_past_the_vocabulary_is_refused() {
    let w = random(5, 3, 1);
    log_probs(&random(1, 3, 2), &w, LogitScaling::NONE, &[5]);
}

#[test]
fn pauses_change_no_bit() {
    let (rows, hidden, vocabulary) = (75, 128, 70_000);
    for (dtype, compute) in [
        (DType::F32, ComputeDType::F32),
        (DType::Bf16, ComputeDType::F32),
        (DType::Bf16, ComputeDType::Bf16x2),
        (DType::Bf16, ComputeDType::Bf16),
    ] {
        let h = random(rows, hidden, 1);
        let w = random_as(vocabulary, hidden, 2, dtype);
        let targets = targets(rows, vocabulary);
        let run = |pauses: Pauses<'_>, trained: bool| {
            let mut dh = zeros_like(&h);
            let mut dw = Tensor::zeros(vocabulary, hidden);
            let result = cross_entropy_forward_backward(
                Some(dh.view_mut()),
                trained.then(|| dw.view_mut()),
                h.view(),
                weight(&w),
                LogitScaling::NONE,
                &targets,
                0.1,
                compute,
                pauses,
                &Workspace::new(),
            );
            let bits = |tensor: &Tensor| {
                let values = tensor.to_vec().into_iter();
                values.map(f32::to_bits).collect::<Vec<_>>()
            };
            (result.loss_sum.to_bits(), bits(&dh), bits(&dw))
        };
        for trained in [false, true] {
            let count = std::sync::atomic::AtomicUsize::new(0);
            let work = || {
                count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            };
            let found = run(Pauses::with(&work), trained);
            assert!(found == run(Pauses::NONE, trained), "{dtype} {compute:?}");
            // Before, and around each chunk: ten of 8 rows at most, or one where a gradient of the head is a sum.
            let expected = if trained { 3 } else { 21 };
            assert_eq!(count.into_inner(), expected);
        }
    }
}
