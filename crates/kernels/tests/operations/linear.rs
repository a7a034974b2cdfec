use std::ops::Range;

use lowrank_kernels::{
    BranchGradient, BranchOutput, ComputeDType, DType, Layout, LinearGradient, LinearOutput,
    LowRank, RowClasses, Tensor, Weight, Workspace, bias_backward, linear_backward_input,
    linear_backward_weight, linear_forward, linears_backward_input, linears_forward,
    low_rank_backward_hidden, low_rank_backward_input, low_rank_delta, low_rank_forward, reference,
};

use crate::common::{
    assert_close, check_gradient, dot, random, random_as, same_bits_on_any_threads, wide,
};

/// (tokens, inputs, outputs) around the sizes at which the paths and the pieces change.
const SHAPES: [(usize, usize, usize); 10] = [
    (1, 1, 1),
    (1, 130, 97),
    (2, 64, 33),
    (4, 515, 200),
    (7, 48, 96),
    (9, 37, 193),
    (33, 100, 5),
    (40, 520, 98),
    (150, 40, 140),
    (260, 24, 98),
];

fn weight(layout: Layout, inputs: usize, outputs: usize, dtype: DType) -> Tensor {
    match layout {
        Layout::OutIn => random_as(outputs, inputs, 2, dtype),
        Layout::InOut => random_as(inputs, outputs, 2, dtype),
    }
}

fn for_all(test: impl Fn(usize, usize, usize, Layout, DType)) {
    for (tokens, inputs, outputs) in SHAPES {
        for layout in [Layout::OutIn, Layout::InOut] {
            for dtype in [DType::F32, DType::Bf16] {
                test(tokens, inputs, outputs, layout, dtype);
            }
        }
    }
}

#[test]
fn forward_is_the_reference() {
    for_all(|tokens, inputs, outputs, layout, dtype| {
        let x = random(tokens, inputs, 1);
        let w = weight(layout, inputs, outputs, dtype);
        let bias = random_as(1, outputs, 3, dtype);
        for bias in [None, Some(&bias)] {
            let w_view = Weight {
                view: w.view(),
                layout,
            };
            let mut found = Vec::new();
            for first_generated in [0, tokens / 2, tokens] {
                let mut y = random(tokens, outputs, 4);
                let bias = bias.map(Tensor::view);
                let classes = RowClasses::generated_from(first_generated);
                linear_forward(y.view_mut(), x.view(), w_view, bias, classes);
                found.push(y);
            }
            let bias = bias.map(wide);
            let expected = reference::linear(
                &wide(&x),
                &wide(&w),
                bias.as_deref(),
                inputs,
                outputs,
                layout,
            );
            let name = format!("linear {tokens}x{inputs}x{outputs} {layout:?} {dtype}");
            for y in found {
                assert_close(&name, &y, &expected, 3e-6);
            }
        }
    });
}

#[test]
fn several_linears_are_each_alone() {
    let outputs = [70, 33, 5];
    let dtypes = [DType::Bf16, DType::F32, DType::Bf16];
    for tokens in [1, 3, 8, 11, 40] {
        for layout in [Layout::OutIn, Layout::InOut] {
            for bias_dtype in [DType::F32, DType::Bf16] {
                let x = random(tokens, 50, 1);
                let weights = [0, 1, 2].map(|i| weight(layout, 50, outputs[i], dtypes[i]));
                let weights = weights.each_ref().map(|w| Weight {
                    view: w.view(),
                    layout,
                });
                let bias = random_as(1, outputs[1], 3, bias_dtype);
                let biases = [None, Some(bias.view()), None];
                let mut found = outputs.map(|n| random(tokens, n, 4));
                let together = found.iter_mut().zip(weights).zip(biases);
                let together = together.map(|((y, w), bias)| LinearOutput {
                    y: y.view_mut(),
                    w,
                    bias,
                    branches: Vec::new(),
                });
                let classes = RowClasses::generated_from(tokens / 2);
                linears_forward(
                    x.view(),
                    together.collect(),
                    classes,
                    ComputeDType::F32,
                    &Workspace::new(),
                );
                for i in 0..3 {
                    let mut alone = random(tokens, outputs[i], 5);
                    let y = alone.view_mut();
                    linear_forward(y, x.view(), weights[i], biases[i], classes);
                    assert_eq!(found[i].to_vec(), alone.to_vec());
                }
            }
        }
    }
}

/// A branch beside a linear, on some rows and columns or all, is the linear and then the branch, with few tokens and many.
#[test]
fn branches_go_with_their_linear() {
    for (tokens, rows, columns) in [
        (5, 1..4, 9..42),
        (40, 0..40, 9..42),
        (130, 7..123, 9..42),
        (130, 0..130, 0..140),
    ] {
        for rank in [4, 8, 20] {
            for first_generated in [0, tokens / 2, tokens] {
                let classes = RowClasses::generated_from(first_generated);
                for (compute, tolerance) in
                    [(ComputeDType::F32, 1e-5), (ComputeDType::Bf16x2, 4e-5)]
                {
                    let how = (classes, compute, tolerance);
                    branch_goes_with_its_linear(tokens, &rows, &columns, rank, how);
                }
            }
        }
    }
}

fn branch_goes_with_its_linear(
    tokens: usize,
    rows: &Range<usize>,
    columns: &Range<usize>,
    rank: usize,
    (classes, compute, tolerance): (RowClasses, ComputeDType, f64),
) {
    let (inputs, outputs, ws) = (150, 140, Workspace::new());
    let (x, w) = (
        random(tokens, inputs, 1),
        random_as(outputs, inputs, 2, DType::Bf16),
    );
    let (a, b) = (random(rank, inputs, 3), random(columns.len(), rank, 4));
    let branch = LowRank {
        a: a.view(),
        b: b.view(),
        scale: 1.75,
        out_offset: columns.start,
        dropout: None,
    };
    let w = Weight {
        view: w.view(),
        layout: Layout::OutIn,
    };
    let (mut y, mut u) = (random(tokens, outputs, 5), random(rows.len(), rank, 6));
    let output = LinearOutput {
        y: y.view_mut(),
        w,
        bias: None,
        branches: vec![BranchOutput {
            u: u.view_mut(),
            rows: rows.clone(),
            branch,
        }],
    };
    linears_forward(x.view(), vec![output], classes, compute, &ws);
    let (mut alone, mut u_alone) = (random(tokens, outputs, 7), random(rows.len(), rank, 8));
    linear_forward(alone.view_mut(), x.view(), w, None, classes);
    low_rank_forward(
        alone.view_mut(),
        u_alone.view_mut(),
        x.view(),
        rows.clone(),
        &branch,
        classes,
        &ws,
    );
    assert_close("y", &y, &wide(&alone), tolerance);
    assert_close("u", &u, &wide(&u_alone), tolerance);

    let dy = random(tokens, outputs, 9);
    let mut du = random(rows.len(), rank, 10);
    low_rank_backward_hidden(du.view_mut(), dy.view(), rows.clone(), &branch);
    let mut dx = random(tokens, inputs, 11);
    let gradient = LinearGradient {
        dy: dy.view(),
        w,
        branches: vec![BranchGradient {
            du: du.view(),
            rows: rows.clone(),
            a: a.view(),
        }],
    };
    linears_backward_input(dx.view_mut(), &[gradient], compute);
    let mut alone = random(tokens, inputs, 12);
    linear_backward_input(alone.view_mut(), dy.view(), w, false, ComputeDType::F32);
    low_rank_backward_input(alone.view_mut(), du.view(), rows.clone(), &branch);
    assert_close("dx", &dx, &wide(&alone), tolerance);
}

#[test]
fn gradients_are_finite_differences() {
    for_all(|tokens, inputs, outputs, layout, dtype| {
        let x = random(tokens, inputs, 1);
        let w = weight(layout, inputs, outputs, dtype);
        let bias = random(1, outputs, 3);
        let dy = random(tokens, outputs, 5);
        let (xs, ws, bs, g) = (wide(&x), wide(&w), wide(&bias), wide(&dy));
        let name = format!("{tokens}x{inputs}x{outputs} {layout:?} {dtype}");
        let loss = |x: &[f64], w: &[f64], b: &[f64]| {
            dot(
                &g,
                &reference::linear(x, w, Some(b), inputs, outputs, layout),
            )
        };
        let w_view = Weight {
            view: w.view(),
            layout,
        };
        let mut dx = random(tokens, inputs, 6);
        linear_backward_input(dx.view_mut(), dy.view(), w_view, false, ComputeDType::F32);
        check_gradient(&format!("dx {name}"), &x, &dx, 1e-5, |x| loss(x, &ws, &bs));

        // Adding a gradient to itself doubles it.
        let once = wide(&dx);
        linear_backward_input(dx.view_mut(), dy.view(), w_view, true, ComputeDType::F32);
        let twice: Vec<f64> = once.iter().map(|x| 2.0 * x).collect();
        assert_close(&format!("accumulated dx {name}"), &dx, &twice, 1e-6);

        let mut dw = Tensor::zeros(w.rows(), w.cols());
        linear_backward_weight(
            dw.view_mut(),
            dy.view(),
            x.view(),
            layout,
            ComputeDType::F32,
        );
        check_gradient(&format!("dw {name}"), &w, &dw, 1e-5, |w| loss(&xs, w, &bs));
        let once = wide(&dw);
        linear_backward_weight(
            dw.view_mut(),
            dy.view(),
            x.view(),
            layout,
            ComputeDType::F32,
        );
        let twice: Vec<f64> = once.iter().map(|x| 2.0 * x).collect();
        assert_close(&format!("accumulated dw {name}"), &dw, &twice, 1e-6);

        let mut db = Tensor::zeros(1, outputs);
        bias_backward(db.view_mut(), dy.view());
        check_gradient(&format!("db {name}"), &bias, &db, 1e-5, |b| {
            loss(&xs, &ws, b)
        });
    });
}

/// On processors that are faster with two bf16 numbers, and on others, which ignore the choice.
#[test]
fn two_parts_lose_little() {
    for_all(|tokens, inputs, outputs, layout, dtype| {
        let x = random(tokens, inputs, 1);
        let w = weight(layout, inputs, outputs, dtype);
        let dy = random(tokens, outputs, 5);
        let w_view = Weight {
            view: w.view(),
            layout,
        };
        let gradients = |compute| {
            let mut dx = Tensor::zeros(tokens, inputs);
            linear_backward_input(dx.view_mut(), dy.view(), w_view, false, compute);
            let mut dw = Tensor::zeros(w.rows(), w.cols());
            linear_backward_weight(dw.view_mut(), dy.view(), x.view(), layout, compute);
            [dx, dw]
        };
        let [exact, two] = [ComputeDType::F32, ComputeDType::Bf16x2].map(gradients);
        let name = format!("{tokens}x{inputs}x{outputs} {layout:?} {dtype}");
        for (name, (exact, two)) in ["dx", "dw"]
            .map(|which| format!("{which} {name}"))
            .iter()
            .zip(exact.iter().zip(&two))
        {
            assert_close(name, two, &wide(exact), 3e-5);
        }
    });
}

#[test]
fn bits_do_not_depend_on_threads() {
    for_all(|tokens, inputs, outputs, layout, dtype| {
        let x = random(tokens, inputs, 1);
        let w = weight(layout, inputs, outputs, dtype);
        let dy = random(tokens, outputs, 5);
        same_bits_on_any_threads(|| {
            let w_view = Weight {
                view: w.view(),
                layout,
            };
            let mut y = Tensor::zeros(tokens, outputs);
            let classes = RowClasses::generated_from(tokens / 2);
            linear_forward(y.view_mut(), x.view(), w_view, None, classes);
            let mut db = Tensor::zeros(1, outputs);
            bias_backward(db.view_mut(), dy.view());
            let mut all = vec![y, db];
            for compute in [ComputeDType::F32, ComputeDType::Bf16x2] {
                let mut dx = Tensor::zeros(tokens, inputs);
                linear_backward_input(dx.view_mut(), dy.view(), w_view, false, compute);
                let mut dw = Tensor::zeros(w.rows(), w.cols());
                linear_backward_weight(dw.view_mut(), dy.view(), x.view(), layout, compute);
                all.extend([dx, dw]);
            }
            all
        });
    });
}

#[test]
fn nothing_in_gives_nothing_or_the_bias_out() {
    let w = random(5, 3, 1);
    let w = Weight {
        view: w.view(),
        layout: Layout::OutIn,
    };
    let mut none = Tensor::zeros(0, 5);
    let x = Tensor::zeros(0, 3);
    for classes in [RowClasses::PROMPT, RowClasses::GENERATED] {
        linear_forward(none.view_mut(), x.view(), w, None, classes);
    }
    linear_backward_input(
        Tensor::zeros(0, 3).view_mut(),
        none.view(),
        w,
        false,
        ComputeDType::F32,
    );
    let mut db = Tensor::zeros(1, 5);
    bias_backward(db.view_mut(), none.view());
    assert_eq!(db.to_vec(), [0.0; 5]);
}

#[test]
#[should_panic(expected = "the input of a linear is 2x4, but must be 2x3")]
fn a_wrong_shape_is_named() {
    let w = random(5, 3, 1);
    let w = Weight {
        view: w.view(),
        layout: Layout::OutIn,
    };
    linear_forward(
        Tensor::zeros(2, 5).view_mut(),
        Tensor::zeros(2, 4).view(),
        w,
        None,
        RowClasses::PROMPT,
    );
}

#[test]
fn merging_is_the_branch_as_a_matrix() {
    let (inputs, outputs, rank, offset, scale) = (70, 9, 4, 3, 1.75);
    let (a, b) = (random(rank, inputs, 1), random(outputs, rank, 2));
    let x = random(6, inputs, 3);
    let all = offset + outputs + 2;
    let branch = reference::low_rank(&wide(&x), &wide(&a), &wide(&b), rank, scale, None, 0);
    for layout in [Layout::OutIn, Layout::InOut] {
        let base = weight(layout, inputs, all, DType::F32);
        let mut merged = base.clone();
        low_rank_delta(
            merged.view_mut(),
            a.view(),
            b.view(),
            scale as f32,
            layout,
            offset,
        );
        let run = |w: &Tensor| reference::linear(&wide(&x), &wide(w), None, inputs, all, layout);
        let mut expected = run(&base);
        for (i, y) in expected.iter_mut().enumerate() {
            let column = i % all;
            if (offset..offset + outputs).contains(&column) {
                *y += branch[i / all * outputs + column - offset];
            }
        }
        let found = run(&merged);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-4, "{found} is not {expected}");
        }
    }
}

#[test]
fn factors_that_are_rounded_before_give_the_same_bits() {
    let narrow = |x: &Tensor| Tensor::from_f32_as(x.rows(), x.cols(), &x.to_vec(), DType::Bf16);
    for (tokens, inputs, outputs) in [(40, 520, 98), (33, 100, 5), (64, 256, 96)] {
        for layout in [Layout::OutIn, Layout::InOut] {
            let w = weight(layout, inputs, outputs, DType::Bf16);
            let w = Weight {
                view: w.view(),
                layout,
            };
            let ws = Workspace::new();
            let forward = |x: &Tensor| {
                let mut y = random(tokens, outputs, 4);
                let output = LinearOutput {
                    y: y.view_mut(),
                    w,
                    bias: None,
                    branches: Vec::new(),
                };
                let compute = ComputeDType::Bf16;
                linears_forward(x.view(), vec![output], RowClasses::PROMPT, compute, &ws);
                y.to_vec()
            };
            let backward = |dy: &Tensor| {
                let mut dx = random(tokens, inputs, 5);
                let back = LinearGradient {
                    dy: dy.view(),
                    w,
                    branches: Vec::new(),
                };
                linears_backward_input(dx.view_mut(), &[back], ComputeDType::Bf16);
                dx.to_vec()
            };
            let (x, dy) = (random(tokens, inputs, 1), random(tokens, outputs, 2));
            let (x, dy) = (narrow(&x), narrow(&dy));
            // In f32 they are rounded again, which changes nothing, or read as they are.
            let same = |x: &Tensor| Tensor::from_f32(x.rows(), x.cols(), x.to_vec());
            assert_eq!(forward(&x), forward(&same(&x)), "{layout:?}");
            assert_eq!(backward(&dy), backward(&same(&dy)), "{layout:?}");
        }
    }
}
