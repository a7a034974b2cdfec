//! Low-rank branches by themselves, and folding one into its weight.

use divan::Bencher;
use lowrank_kernels::{
    BranchOutput, ComputeDType, DType, Layout, LinearOutput, LowRank, RowClasses, Tensor, Weight,
    Workspace, linears_forward, low_rank_backward_hidden, low_rank_backward_input,
    low_rank_backward_weights, low_rank_delta, low_rank_forward, reference,
};

use crate::{HIDDEN, RANK, flops, random, wide};

const FLOPS: usize = 2 * RANK * (HIDDEN + HIDDEN);

fn factors() -> (Tensor, Tensor) {
    (random(RANK, HIDDEN), random(HIDDEN, RANK))
}

fn branch<'a>(a: &'a Tensor, b: &'a Tensor) -> LowRank<'a> {
    LowRank {
        a: a.view(),
        b: b.view(),
        scale: 2.0,
        out_offset: 0,
        dropout: None,
    }
}

#[divan::bench(args = [1, 256, 1024])]
fn forward(bencher: Bencher<'_, '_>, tokens: usize) {
    let (a, b) = factors();
    let x = random(tokens, HIDDEN);
    let (mut y, mut u) = (Tensor::zeros(tokens, HIDDEN), Tensor::zeros(tokens, RANK));
    let ws = Workspace::new();
    let classes = RowClasses::PROMPT;
    bencher.counter(flops(tokens * FLOPS)).bench_local(|| {
        let lr = branch(&a, &b);
        let (y, u) = (y.view_mut(), u.view_mut());
        low_rank_forward(y, u, x.view(), 0..tokens, &lr, classes, &ws);
    });
}

/// A linear with generated rows of so many adapters, one row each.
#[divan::bench(args = [1, 8, 32])]
fn generated(bencher: Bencher<'_, '_>, adapters: usize) {
    let w = Tensor::from_f32_as(
        HIDDEN,
        HIDDEN,
        &random(HIDDEN, HIDDEN).to_vec(),
        DType::Bf16,
    );
    let factors: Vec<_> = (0..adapters).map(|_| factors()).collect();
    let (x, mut y) = (random(adapters, HIDDEN), Tensor::zeros(adapters, HIDDEN));
    let mut hidden: Vec<Tensor> = (0..adapters).map(|_| Tensor::zeros(1, RANK)).collect();
    let ws = Workspace::new();
    let flops = flops(adapters * (2 * HIDDEN * HIDDEN + FLOPS));
    bencher.counter(flops).bench_local(|| {
        let branches = factors.iter().zip(&mut hidden).enumerate();
        let branches = branches.map(|(i, ((a, b), u))| BranchOutput {
            u: u.view_mut(),
            rows: i..i + 1,
            branch: branch(a, b),
        });
        let output = LinearOutput {
            y: y.view_mut(),
            w: Weight {
                view: w.view(),
                layout: Layout::OutIn,
            },
            bias: None,
            branches: branches.collect(),
        };
        let classes = RowClasses::GENERATED;
        linears_forward(x.view(), vec![output], classes, ComputeDType::F32, &ws);
    });
}

#[divan::bench(args = [256, 1024])]
fn backward(bencher: Bencher<'_, '_>, tokens: usize) {
    let (a, b) = factors();
    let (x, dy, u) = (
        random(tokens, HIDDEN),
        random(tokens, HIDDEN),
        random(tokens, RANK),
    );
    let (mut dx, mut da, mut db) = (
        Tensor::zeros(tokens, HIDDEN),
        Tensor::zeros(RANK, HIDDEN),
        Tensor::zeros(HIDDEN, RANK),
    );
    let mut du = random(tokens, RANK);
    bencher.counter(flops(2 * tokens * FLOPS)).bench_local(|| {
        let (lr, rows) = (branch(&a, &b), 0..tokens);
        low_rank_backward_hidden(du.view_mut(), dy.view(), rows.clone(), &lr);
        low_rank_backward_input(dx.view_mut(), du.view(), rows.clone(), &lr);
        let (da, db, saved) = (da.view_mut(), db.view_mut(), (u.view(), du.view()));
        low_rank_backward_weights(da, db, dy.view(), x.view(), saved, rows, &lr);
    });
}

#[divan::bench(args = [256])]
fn naive(bencher: Bencher<'_, '_>, tokens: usize) {
    let (a, b) = factors();
    let (x, a, b) = (wide(&random(tokens, HIDDEN)), wide(&a), wide(&b));
    bencher
        .counter(flops(tokens * FLOPS))
        .bench_local(|| reference::low_rank(&x, &a, &b, RANK, 2.0, None, 0));
}

/// The thin products alone: their sums run over the tokens.
#[divan::bench(args = [256, 1024])]
fn backward_weights(bencher: Bencher<'_, '_>, tokens: usize) {
    let (a, b) = factors();
    let (x, dy) = (random(tokens, HIDDEN), random(tokens, HIDDEN));
    let (u, du) = (random(tokens, RANK), random(tokens, RANK));
    let (mut da, mut db) = (a.clone(), b.clone());
    bencher.counter(flops(tokens * FLOPS)).bench_local(|| {
        let (lr, saved) = (branch(&a, &b), (u.view(), du.view()));
        let (da, db) = (da.view_mut(), db.view_mut());
        low_rank_backward_weights(da, db, dy.view(), x.view(), saved, 0..tokens, &lr);
    });
}

#[divan::bench(args = [256])]
fn backward_weights_naive(bencher: Bencher<'_, '_>, tokens: usize) {
    let (x, dy) = (wide(&random(tokens, HIDDEN)), wide(&random(tokens, HIDDEN)));
    let (u, du) = (wide(&random(tokens, RANK)), wide(&random(tokens, RANK)));
    let (mut da, mut db) = (vec![0.0; RANK * HIDDEN], vec![0.0; HIDDEN * RANK]);
    bencher.counter(flops(tokens * FLOPS)).bench_local(|| {
        for t in 0..tokens {
            for r in 0..RANK {
                for i in 0..HIDDEN {
                    da[r * HIDDEN + i] += du[t * RANK + r] * x[t * HIDDEN + i];
                    db[i * RANK + r] += 2.0 * dy[t * HIDDEN + i] * u[t * RANK + r];
                }
            }
        }
    });
}

#[divan::bench]
fn merge(bencher: Bencher<'_, '_>) {
    let (a, b) = factors();
    let mut delta = random(HIDDEN, HIDDEN);
    bencher
        .counter(flops(2 * RANK * HIDDEN * HIDDEN))
        .bench_local(|| {
            low_rank_delta(delta.view_mut(), a.view(), b.view(), 2.0, Layout::OutIn, 0);
        });
}

#[divan::bench]
fn merge_naive(bencher: Bencher<'_, '_>) {
    let (a, b) = factors();
    let (a, b) = (wide(&a), wide(&b));
    let mut delta = wide(&random(HIDDEN, HIDDEN));
    bencher
        .counter(flops(2 * RANK * HIDDEN * HIDDEN))
        .bench_local(|| {
            for (out, row) in delta.chunks_exact_mut(HIDDEN).enumerate() {
                for (i, delta) in row.iter_mut().enumerate() {
                    let terms = (0..RANK).map(|r| b[out * RANK + r] * a[r * HIDDEN + i]);
                    *delta += 2.0 * terms.sum::<f64>();
                }
            }
        });
}
