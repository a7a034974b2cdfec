//! Each operation beside its naive reference, at the sizes of a small transformer.
//!
//! The references are f64 and run on one thread; they say what the fast paths are worth, not what
//! another library does.

#![expect(
    clippy::wildcard_imports,
    reason = "each group uses most of the same names"
)]
#![expect(
    clippy::single_range_in_vec_init,
    reason = "a list of one range of keys"
)]

use divan::Bencher;
use divan::counter::ItemsCount;
use lowrank_kernels::{
    Activation, AdamW, AttentionShape, DType, Layout, LowRank, RopeTable, Segment, Tensor, Weight,
    Workspace, activation_forward, adamw_step, attention_backward, attention_forward,
    cross_entropy_forward_backward, fill_normal, gated_backward, gated_forward, head_logits,
    linear_backward_input, linear_forward, low_rank_backward_hidden, low_rank_backward_input,
    low_rank_backward_weights, low_rank_forward, reference, rms_norm_backward, rms_norm_forward,
    rope_forward,
};

const HIDDEN: usize = 576;
const INNER: usize = 1536;
const RANK: usize = 8;
const VOCABULARY: usize = 8192;
const SHAPE: AttentionShape = AttentionShape {
    heads: 9,
    kv_heads: 3,
    head_size: 64,
    scale: 0.125,
    window: None,
};

fn main() {
    divan::main();
}

fn random(rows: usize, cols: usize) -> Tensor {
    let mut tensor = Tensor::zeros(rows, cols);
    fill_normal(tensor.view_mut(), 1.0, (rows * 31 + cols) as u64);
    tensor
}

fn bf16(rows: usize, cols: usize) -> Tensor {
    Tensor::from_f32_as(rows, cols, &random(rows, cols).to_vec(), DType::Bf16)
}

fn wide(tensor: &Tensor) -> Vec<f64> {
    tensor.to_vec().into_iter().map(f64::from).collect()
}

fn flops(n: usize) -> ItemsCount {
    ItemsCount::new(n)
}

#[divan::bench_group(sample_count = 10)]
mod linear {
    use super::*;

    #[divan::bench(args = [1, 4, 16, 64, 256, 1024])]
    fn forward_bf16(bencher: Bencher<'_, '_>, tokens: usize) {
        forward(bencher, tokens, &bf16(INNER, HIDDEN), Layout::OutIn);
    }

    #[divan::bench(args = [1, 4, 16, 64, 256, 1024])]
    fn forward_f32(bencher: Bencher<'_, '_>, tokens: usize) {
        forward(bencher, tokens, &random(INNER, HIDDEN), Layout::OutIn);
    }

    #[divan::bench(args = [1, 256])]
    fn forward_in_out_bf16(bencher: Bencher<'_, '_>, tokens: usize) {
        forward(bencher, tokens, &bf16(HIDDEN, INNER), Layout::InOut);
    }

    fn forward(bencher: Bencher<'_, '_>, tokens: usize, w: &Tensor, layout: Layout) {
        let x = random(tokens, HIDDEN);
        let mut y = Tensor::zeros(tokens, INNER);
        let w = Weight {
            view: w.view(),
            layout,
        };
        bencher
            .counter(flops(2 * tokens * HIDDEN * INNER))
            .bench_local(|| linear_forward(y.view_mut(), x.view(), w, None));
    }

    #[divan::bench(args = [64, 256, 1024])]
    fn backward_input_bf16(bencher: Bencher<'_, '_>, tokens: usize) {
        let w = bf16(INNER, HIDDEN);
        let dy = random(tokens, INNER);
        let mut dx = Tensor::zeros(tokens, HIDDEN);
        let w = Weight {
            view: w.view(),
            layout: Layout::OutIn,
        };
        bencher
            .counter(flops(2 * tokens * HIDDEN * INNER))
            .bench_local(|| linear_backward_input(dx.view_mut(), dy.view(), w, false));
    }

    #[divan::bench(args = [4])]
    fn naive(bencher: Bencher<'_, '_>, tokens: usize) {
        let (x, w) = (wide(&random(tokens, HIDDEN)), wide(&random(INNER, HIDDEN)));
        bencher
            .counter(flops(2 * tokens * HIDDEN * INNER))
            .bench_local(|| reference::linear(&x, &w, None, HIDDEN, INNER, Layout::OutIn));
    }
}

#[divan::bench_group(sample_count = 10)]
mod low_rank {
    use super::*;

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
        bencher.counter(flops(tokens * FLOPS)).bench_local(|| {
            let lr = branch(&a, &b);
            low_rank_forward(y.view_mut(), u.view_mut(), x.view(), 0..tokens, &lr, &ws);
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
}

#[divan::bench_group(sample_count = 10)]
mod attention {
    use super::*;

    fn inputs(queries: usize, keys: usize) -> (Tensor, Tensor, Tensor, Vec<Segment>) {
        let segment = Segment {
            queries: 0..queries,
            keys: vec![0..keys],
            causal: true,
        };
        let size = SHAPE.head_size;
        (
            random(queries, SHAPE.heads * size),
            random(keys, SHAPE.kv_heads * size),
            random(keys, SHAPE.kv_heads * size),
            vec![segment],
        )
    }

    /// Of the half of the square that is needed.
    fn needed(tokens: usize, products: usize) -> ItemsCount {
        flops(products * tokens * tokens * SHAPE.heads * SHAPE.head_size)
    }

    #[divan::bench(args = [64, 256, 1024])]
    fn forward(bencher: Bencher<'_, '_>, tokens: usize) {
        let (q, k, v, segments) = inputs(tokens, tokens);
        let (mut o, mut lse) = (q.clone(), Tensor::zeros(tokens, SHAPE.heads));
        let ws = Workspace::new();
        bencher.counter(needed(tokens, 2)).bench_local(|| {
            attention_forward(
                o.view_mut(),
                lse.view_mut(),
                q.view(),
                k.view(),
                v.view(),
                &segments,
                &SHAPE,
                &ws,
            );
        });
    }

    #[divan::bench(args = [64, 256, 1024])]
    fn backward(bencher: Bencher<'_, '_>, tokens: usize) {
        let (q, k, v, segments) = inputs(tokens, tokens);
        let (mut o, mut lse) = (q.clone(), Tensor::zeros(tokens, SHAPE.heads));
        let ws = Workspace::new();
        attention_forward(
            o.view_mut(),
            lse.view_mut(),
            q.view(),
            k.view(),
            v.view(),
            &segments,
            &SHAPE,
            &ws,
        );
        let (mut dq, mut dk, mut dv) = (q.clone(), k.clone(), v.clone());
        bencher.counter(needed(tokens, 5)).bench_local(|| {
            attention_backward(
                dq.view_mut(),
                dk.view_mut(),
                dv.view_mut(),
                q.view(),
                q.view(),
                k.view(),
                v.view(),
                lse.view(),
                &segments,
                &SHAPE,
                &ws,
            );
        });
    }

    #[divan::bench(args = [64, 1024])]
    fn one_query(bencher: Bencher<'_, '_>, keys: usize) {
        let (q, k, v, segments) = inputs(1, keys);
        let (mut o, mut lse) = (q.clone(), Tensor::zeros(1, SHAPE.heads));
        let ws = Workspace::new();
        bencher.bench_local(|| {
            attention_forward(
                o.view_mut(),
                lse.view_mut(),
                q.view(),
                k.view(),
                v.view(),
                &segments,
                &SHAPE,
                &ws,
            );
        });
    }

    #[divan::bench(args = [64])]
    fn naive(bencher: Bencher<'_, '_>, tokens: usize) {
        let (q, k, v, segments) = inputs(tokens, tokens);
        let (q, k, v) = (wide(&q), wide(&k), wide(&v));
        bencher
            .counter(needed(tokens, 2))
            .bench_local(|| reference::attention(&q, &k, &v, &segments, &SHAPE));
    }
}

#[divan::bench_group(sample_count = 10)]
mod head {
    use super::*;

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
                    &targets,
                    0.0,
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
            .bench_local(|| head_logits(logits.view_mut(), h.view(), w));
    }

    #[divan::bench(args = [1])]
    fn naive(bencher: Bencher<'_, '_>, rows: usize) {
        let (h, w) = (
            wide(&random(rows, HIDDEN)),
            wide(&random(VOCABULARY, HIDDEN)),
        );
        bencher
            .counter(flops(2 * rows * HIDDEN * VOCABULARY))
            .bench_local(|| reference::head(&h, &w, HIDDEN, &vec![3; rows]));
    }
}

#[divan::bench_group(sample_count = 20)]
mod norm {
    use super::*;

    const TOKENS: usize = 512;

    #[divan::bench]
    fn rms_forward(bencher: Bencher<'_, '_>) {
        let (x, weight) = (random(TOKENS, HIDDEN), random(1, HIDDEN));
        let (mut y, mut rstd) = (x.clone(), Tensor::zeros(TOKENS, 1));
        bencher.counter(flops(TOKENS * HIDDEN)).bench_local(|| {
            rms_norm_forward(
                y.view_mut(),
                rstd.view_mut(),
                x.view(),
                weight.view(),
                1e-5,
                1,
            );
        });
    }

    #[divan::bench]
    fn rms_backward(bencher: Bencher<'_, '_>) {
        let (x, weight) = (random(TOKENS, HIDDEN), random(1, HIDDEN));
        let (mut dx, rstd) = (x.clone(), random(TOKENS, 1));
        bencher.counter(flops(TOKENS * HIDDEN)).bench_local(|| {
            rms_norm_backward(
                dx.view_mut(),
                None,
                x.view(),
                x.view(),
                rstd.view(),
                weight.view(),
                1,
                true,
            );
        });
    }

    #[divan::bench]
    fn rms_naive(bencher: Bencher<'_, '_>) {
        let (x, weight) = (wide(&random(TOKENS, HIDDEN)), wide(&random(1, HIDDEN)));
        bencher
            .counter(flops(TOKENS * HIDDEN))
            .bench_local(|| reference::rms_norm(&x, &weight, 1e-5));
    }
}

#[divan::bench_group(sample_count = 20)]
mod elements {
    use super::*;

    const TOKENS: usize = 256;
    const COUNT: usize = TOKENS * INNER;

    #[divan::bench(args = [Activation::Silu, Activation::Gelu, Activation::GeluTanh])]
    fn activation(bencher: Bencher<'_, '_>, act: Activation) {
        let x = random(TOKENS, INNER);
        let mut h = x.clone();
        bencher
            .counter(flops(COUNT))
            .bench_local(|| activation_forward(h.view_mut(), x.view(), act));
    }

    #[divan::bench]
    fn activation_naive(bencher: Bencher<'_, '_>) {
        let x = wide(&random(TOKENS, INNER));
        let mut h = x.clone();
        bencher.counter(flops(COUNT)).bench_local(|| {
            for (h, &x) in h.iter_mut().zip(&x) {
                *h = reference::activation(x, Activation::Silu);
            }
        });
    }

    #[divan::bench]
    fn gated_silu_forward(bencher: Bencher<'_, '_>) {
        let (gate, up) = (random(TOKENS, INNER), random(TOKENS, INNER));
        let mut h = up.clone();
        bencher.counter(flops(COUNT)).bench_local(|| {
            gated_forward(h.view_mut(), gate.view(), up.view(), Activation::Silu);
        });
    }

    #[divan::bench]
    fn gated_silu_backward(bencher: Bencher<'_, '_>) {
        let (gate, up) = (random(TOKENS, INNER), random(TOKENS, INNER));
        let (mut dgate, mut dup) = (up.clone(), up.clone());
        bencher.counter(flops(COUNT)).bench_local(|| {
            gated_backward(
                dgate.view_mut(),
                dup.view_mut(),
                up.view(),
                gate.view(),
                up.view(),
                Activation::Silu,
            );
        });
    }

    #[divan::bench]
    fn rope(bencher: Bencher<'_, '_>) {
        let inv_freq: Vec<f32> = (0..32).map(|i| 0.7_f32.powi(i)).collect();
        let table = RopeTable::new(&inv_freq, 1.0, TOKENS);
        let positions: Vec<u32> = (0..TOKENS as u32).collect();
        let mut x = random(TOKENS, HIDDEN);
        bencher
            .counter(flops(TOKENS * HIDDEN))
            .bench_local(|| rope_forward(x.view_mut(), &positions, &table, 64));
    }

    #[divan::bench]
    fn rope_naive(bencher: Bencher<'_, '_>) {
        let inv_freq: Vec<f32> = (0..32).map(|i| 0.7_f32.powi(i)).collect();
        let positions: Vec<u32> = (0..TOKENS as u32).collect();
        let x = wide(&random(TOKENS, HIDDEN));
        bencher
            .counter(flops(TOKENS * HIDDEN))
            .bench_local(|| reference::rope(&x, &positions, &inv_freq, 1.0, HIDDEN));
    }

    const SETTINGS: AdamW = AdamW {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        step: 3,
    };

    #[divan::bench]
    fn adamw(bencher: Bencher<'_, '_>) {
        let grads = random(1, COUNT);
        let (mut values, mut m, mut v) = (grads.clone(), grads.clone(), Tensor::zeros(1, COUNT));
        bencher.counter(flops(COUNT)).bench_local(|| {
            adamw_step(
                values.view_mut(),
                grads.view(),
                m.view_mut(),
                v.view_mut(),
                &SETTINGS,
            );
        });
    }

    #[divan::bench]
    fn adamw_naive(bencher: Bencher<'_, '_>) {
        let grads = wide(&random(1, COUNT));
        let (mut values, mut m, mut v) = (grads.clone(), grads.clone(), vec![0.0; COUNT]);
        bencher.counter(flops(COUNT)).bench_local(|| {
            for i in 0..COUNT {
                reference::adamw(&mut values[i], grads[i], &mut m[i], &mut v[i], &SETTINGS);
            }
        });
    }
}
