//! The head and the loss on it.

use divan::Bencher;
use lowrank_kernels::{
    ComputeDType, Layout, LogitScaling, Pauses, RowClasses, Tensor, Weight, Workspace,
    cross_entropy_forward_backward, head_logits, reference,
};

use crate::{HIDDEN, bf16, flops, random, wide};

const VOCABULARY: usize = 8192;

#[divan::bench(args = [16, 256])]
fn cross_entropy_bf16(bencher: Bencher<'_, '_>, rows: usize) {
    let (h, w) = (random(rows, HIDDEN), bf16(VOCABULARY, HIDDEN));
    let targets = vec![3; rows];
    let mut dh = Tensor::zeros(rows, HIDDEN);
    let ws = Workspace::new();
    let w = Weight {
        view: w.view(),
        layout: Layout::OutIn,
    };
    bencher
        .counter(flops(4 * rows * HIDDEN * VOCABULARY))
        .bench_local(|| {
            cross_entropy_forward_backward(
                Some(dh.view_mut()),
                None,
                h.view(),
                w,
                LogitScaling::NONE,
                &targets,
                0.0,
                ComputeDType::F32,
                Pauses::NONE,
                &ws,
            )
        });
}

#[divan::bench(args = [1, 4])]
fn logits_bf16(bencher: Bencher<'_, '_>, rows: usize) {
    let (h, w) = (random(rows, HIDDEN), bf16(VOCABULARY, HIDDEN));
    let mut logits = Tensor::zeros(rows, VOCABULARY);
    let w = Weight {
        view: w.view(),
        layout: Layout::OutIn,
    };
    bencher
        .counter(flops(2 * rows * HIDDEN * VOCABULARY))
        .bench_local(|| {
            head_logits(
                logits.view_mut(),
                h.view(),
                w,
                LogitScaling::NONE,
                RowClasses::GENERATED,
            );
        });
}

#[divan::bench(args = [1, 16])]
fn naive(bencher: Bencher<'_, '_>, rows: usize) {
    let (h, w) = (
        wide(&random(rows, HIDDEN)),
        wide(&random(VOCABULARY, HIDDEN)),
    );
    bencher
        .counter(flops(2 * rows * HIDDEN * VOCABULARY))
        .bench_local(|| reference::head(&h, &w, LogitScaling::NONE, HIDDEN, &vec![3; rows]));
}

#[divan::bench(args = [16])]
fn cross_entropy_naive(bencher: Bencher<'_, '_>, rows: usize) {
    let (h, w) = (
        wide(&random(rows, HIDDEN)),
        wide(&random(VOCABULARY, HIDDEN)),
    );
    let mut dh = vec![0.0; rows * HIDDEN];
    bencher
        .counter(flops(4 * rows * HIDDEN * VOCABULARY))
        .bench_local(|| {
            let logits = reference::linear(&h, &w, None, HIDDEN, VOCABULARY, Layout::OutIn);
            let rows = logits.chunks_exact(VOCABULARY);
            let mut loss = 0.0;
            for (logits, dh) in rows.zip(dh.chunks_exact_mut(HIDDEN)) {
                let sum: f64 = logits.iter().map(|x| x.exp()).sum();
                loss += sum.ln() - logits[3];
                dh.fill(0.0);
                for (token, (logit, w)) in logits.iter().zip(w.chunks_exact(HIDDEN)).enumerate() {
                    let slope = logit.exp() / sum - f64::from(u8::from(token == 3));
                    for (dh, w) in dh.iter_mut().zip(w) {
                        *dh += slope * w;
                    }
                }
            }
            loss
        });
}
