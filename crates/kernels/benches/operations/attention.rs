//! Attention, whose tiles multiply in blocks, and a single query.

use divan::Bencher;
use divan::counter::ItemsCount;
use lowrank_kernels::{
    AttentionShape, ComputeDType, RowClasses, Segment, Tensor, Workspace, attention_backward,
    attention_forward, reference,
};

use crate::{flops, random, wide};

const SHAPE: AttentionShape = AttentionShape {
    heads: 9,
    kv_heads: 3,
    head_size: 64,
    scale: 0.125,
    softcap: None,
    window: None,
};

#[expect(
    clippy::single_range_in_vec_init,
    reason = "a list of one range of keys"
)]
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

const CASES: [(usize, ComputeDType); 8] = [
    (64, ComputeDType::F32),
    (256, ComputeDType::F32),
    (512, ComputeDType::F32),
    (1024, ComputeDType::F32),
    (64, ComputeDType::Bf16),
    (256, ComputeDType::Bf16),
    (512, ComputeDType::Bf16),
    (1024, ComputeDType::Bf16),
];

/// Of the half of the square that is needed.
fn needed(tokens: usize, products: usize) -> ItemsCount {
    flops(products * tokens * tokens * SHAPE.heads * SHAPE.head_size)
}

#[divan::bench(args = CASES)]
fn forward(bencher: Bencher<'_, '_>, (tokens, compute): (usize, ComputeDType)) {
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
            RowClasses::PROMPT,
            compute,
            &ws,
        );
    });
}

#[divan::bench(args = CASES)]
fn backward(bencher: Bencher<'_, '_>, (tokens, compute): (usize, ComputeDType)) {
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
        RowClasses::PROMPT,
        compute,
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
            compute,
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
            RowClasses::GENERATED,
            ComputeDType::F32,
            &ws,
        );
    });
}

#[divan::bench(args = [64, 512])]
fn naive(bencher: Bencher<'_, '_>, tokens: usize) {
    let (q, k, v, segments) = inputs(tokens, tokens);
    let (q, k, v) = (wide(&q), wide(&k), wide(&v));
    bencher
        .counter(needed(tokens, 2))
        .bench_local(|| reference::attention(&q, &k, &v, &segments, &SHAPE));
}

#[divan::bench(args = [64, 512])]
fn backward_naive(bencher: Bencher<'_, '_>, tokens: usize) {
    let (q, k, v, _) = inputs(tokens, tokens);
    let (q, k, v) = (wide(&q), wide(&k), wide(&v));
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    bencher.counter(needed(tokens, 5)).bench_local(|| {
        for query in 0..tokens {
            for head in 0..SHAPE.heads {
                let at = |row: usize| row * SHAPE.kv_heads + head / (SHAPE.heads / SHAPE.kv_heads);
                let size = SHAPE.head_size;
                let own = (query * SHAPE.heads + head) * size..;
                let (q, d_o) = (&q[own.clone()][..size], &q[own.clone()][..size]);
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                let rows = |x: &[f64], key: usize| x[at(key) * size..][..size].to_vec();
                let scale = f64::from(SHAPE.scale);
                let exps = (0..=query).map(|key| (scale * dot(q, &rows(&k, key))).exp());
                let exps: Vec<f64> = exps.collect();
                let sum: f64 = exps.iter().sum();
                let dp: Vec<f64> = (0..=query).map(|key| dot(d_o, &rows(&v, key))).collect();
                let delta = dot(&exps, &dp) / sum;
                for (key, (exp, dp)) in exps.iter().zip(&dp).enumerate() {
                    let p = exp / sum;
                    let ds = scale * p * (dp - delta);
                    for i in 0..size {
                        dq[own.start + i] += ds * k[at(key) * size + i];
                        dk[at(key) * size + i] += ds * q[i];
                        dv[at(key) * size + i] += p * d_o[i];
                    }
                }
            }
        }
    });
}
