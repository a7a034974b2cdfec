//! Linears: frozen weights, with and without a branch, and few tokens.

use divan::Bencher;
use lowrank_kernels::{
    BranchGradient, BranchOutput, ComputeDType, DType, Layout, LinearGradient, LinearOutput,
    LowRank, RowClasses, Tensor, Weight, Workspace, linear_backward_input, linear_backward_weight,
    linear_forward, linears_backward_input, linears_forward, reference,
};

use crate::{HIDDEN, INNER, RANK, bf16, flops, random, wide};

const BRANCH_TOKENS: usize = 256;
const BRANCH_FLOPS: usize = 2 * BRANCH_TOKENS * (HIDDEN * INNER + RANK * (HIDDEN + INNER));

#[divan::bench(args = [1, 16, 64, 256, 1024])]
fn forward_bf16(bencher: Bencher<'_, '_>, tokens: usize) {
    forward(bencher, tokens, &bf16(INNER, HIDDEN), Layout::OutIn);
}

#[divan::bench(args = [1, 16, 64, 256, 1024])]
fn forward_f32(bencher: Bencher<'_, '_>, tokens: usize) {
    forward(bencher, tokens, &random(INNER, HIDDEN), Layout::OutIn);
}

#[divan::bench(args = [1, 2, 4, 8, 16, 64, 256])]
fn generated_bf16(bencher: Bencher<'_, '_>, tokens: usize) {
    let w = bf16(INNER, HIDDEN);
    forward_of(bencher, tokens, &w, Layout::OutIn, RowClasses::GENERATED);
}

#[divan::bench(args = [1, 2, 4, 8, 16, 64, 256])]
fn generated_f32(bencher: Bencher<'_, '_>, tokens: usize) {
    let w = random(INNER, HIDDEN);
    forward_of(bencher, tokens, &w, Layout::OutIn, RowClasses::GENERATED);
}

#[divan::bench(args = [1, 256])]
fn forward_in_out_bf16(bencher: Bencher<'_, '_>, tokens: usize) {
    forward(bencher, tokens, &bf16(HIDDEN, INNER), Layout::InOut);
}

fn forward(bencher: Bencher<'_, '_>, tokens: usize, w: &Tensor, layout: Layout) {
    forward_of(bencher, tokens, w, layout, RowClasses::PROMPT);
}

fn forward_of(
    bencher: Bencher<'_, '_>,
    tokens: usize,
    w: &Tensor,
    layout: Layout,
    classes: RowClasses,
) {
    let x = random(tokens, HIDDEN);
    let mut y = Tensor::zeros(tokens, INNER);
    let w = Weight {
        view: w.view(),
        layout,
    };
    bencher
        .counter(flops(2 * tokens * HIDDEN * INNER))
        .bench_local(|| linear_forward(y.view_mut(), x.view(), w, None, classes));
}

#[divan::bench(args = [
    (64, ComputeDType::F32), (256, ComputeDType::F32), (1024, ComputeDType::F32),
    (256, ComputeDType::Bf16x2), (1024, ComputeDType::Bf16x2),
])]
fn backward_input_bf16(bencher: Bencher<'_, '_>, (tokens, compute): (usize, ComputeDType)) {
    let w = bf16(INNER, HIDDEN);
    let dy = random(tokens, INNER);
    let mut dx = Tensor::zeros(tokens, HIDDEN);
    let w = Weight {
        view: w.view(),
        layout: Layout::OutIn,
    };
    bencher
        .counter(flops(2 * tokens * HIDDEN * INNER))
        .bench_local(|| linear_backward_input(dx.view_mut(), dy.view(), w, false, compute));
}

#[divan::bench(args = [1, 8, 64])]
fn naive(bencher: Bencher<'_, '_>, tokens: usize) {
    let (x, w) = (wide(&random(tokens, HIDDEN)), wide(&random(INNER, HIDDEN)));
    bencher
        .counter(flops(2 * tokens * HIDDEN * INNER))
        .bench_local(|| reference::linear(&x, &w, None, HIDDEN, INNER, Layout::OutIn));
}

/// The products of a step: a frozen weight with a branch of trained ones as another term of the same sum.
#[divan::bench(args = [DType::Bf16, DType::F32])]
fn forward_with_branch(bencher: Bencher<'_, '_>, dtype: DType) {
    let w = Tensor::from_f32_as(INNER, HIDDEN, &random(INNER, HIDDEN).to_vec(), dtype);
    let (a, b) = (random(RANK, HIDDEN), random(INNER, RANK));
    let x = random(BRANCH_TOKENS, HIDDEN);
    let mut y = Tensor::zeros(BRANCH_TOKENS, INNER);
    let mut u = Tensor::zeros(BRANCH_TOKENS, RANK);
    let ws = Workspace::new();
    bencher.counter(flops(BRANCH_FLOPS)).bench_local(|| {
        let output = LinearOutput {
            y: y.view_mut(),
            w: Weight {
                view: w.view(),
                layout: Layout::OutIn,
            },
            bias: None,
            branches: vec![BranchOutput {
                u: u.view_mut(),
                rows: 0..BRANCH_TOKENS,
                branch: LowRank {
                    a: a.view(),
                    b: b.view(),
                    scale: 2.0,
                    out_offset: 0,
                    dropout: None,
                },
            }],
        };
        let classes = RowClasses::PROMPT;
        linears_forward(x.view(), vec![output], classes, ComputeDType::F32, &ws);
    });
}

#[divan::bench(args = [DType::Bf16, DType::F32])]
fn backward_input_with_branch(bencher: Bencher<'_, '_>, dtype: DType) {
    let w = Tensor::from_f32_as(INNER, HIDDEN, &random(INNER, HIDDEN).to_vec(), dtype);
    let (a, du) = (random(RANK, HIDDEN), random(BRANCH_TOKENS, RANK));
    let dy = random(BRANCH_TOKENS, INNER);
    let mut dx = Tensor::zeros(BRANCH_TOKENS, HIDDEN);
    bencher.counter(flops(BRANCH_FLOPS)).bench_local(|| {
        let gradient = LinearGradient {
            dy: dy.view(),
            w: Weight {
                view: w.view(),
                layout: Layout::OutIn,
            },
            branches: vec![BranchGradient {
                du: du.view(),
                rows: 0..BRANCH_TOKENS,
                a: a.view(),
            }],
        };
        linears_backward_input(dx.view_mut(), &[gradient], ComputeDType::F32);
    });
}

#[divan::bench]
fn forward_with_branch_naive(bencher: Bencher<'_, '_>) {
    let (x, w) = (
        wide(&random(BRANCH_TOKENS, HIDDEN)),
        wide(&random(INNER, HIDDEN)),
    );
    let (a, b) = (wide(&random(RANK, HIDDEN)), wide(&random(INNER, RANK)));
    bencher.counter(flops(BRANCH_FLOPS)).bench_local(|| {
        let y = reference::linear(&x, &w, None, HIDDEN, INNER, Layout::OutIn);
        let branch = reference::low_rank(&x, &a, &b, RANK, 2.0, None, 0);
        y.iter()
            .zip(&branch)
            .map(|(y, b)| y + b)
            .collect::<Vec<f64>>()
    });
}

/// The gradient of a trained weight, as it is and in two parts.
#[divan::bench(args = [ComputeDType::F32, ComputeDType::Bf16x2])]
fn backward_weight(bencher: Bencher<'_, '_>, compute: ComputeDType) {
    let (dy, x) = (random(BRANCH_TOKENS, INNER), random(BRANCH_TOKENS, HIDDEN));
    let mut dw = Tensor::zeros(INNER, HIDDEN);
    bencher
        .counter(flops(2 * BRANCH_TOKENS * HIDDEN * INNER))
        .bench_local(|| {
            linear_backward_weight(dw.view_mut(), dy.view(), x.view(), Layout::OutIn, compute);
        });
}
