//! Attention with terms of relative positions, of a head of DeBERTa-v3's size.

use divan::Bencher;
use divan::counter::ItemsCount;
use lowrank_kernels::{
    RelativeGradients, RelativePositions, RelativeSegment, RelativeShape, Tensor, Workspace,
    reference, relative_attention_backward, relative_attention_forward,
};

use crate::{flops, random, wide};

const HEADS: usize = 12;
const SIZE: usize = 64;
/// Half of the rows of positions.
const SPAN: usize = 256;

/// Every distance has its own place up to the span.
fn places(tokens: usize) -> Vec<u32> {
    let (tokens, span) = (tokens as i64, SPAN as i64);
    (1 - tokens..tokens)
        .map(|distance| (distance + span).clamp(0, 2 * span - 1) as u32)
        .collect()
}

fn shape(places: &[u32]) -> RelativeShape<'_> {
    RelativeShape {
        heads: HEADS,
        head_size: SIZE,
        scale: 0.07,
        places,
    }
}

fn segment(tokens: usize) -> Vec<RelativeSegment> {
    vec![RelativeSegment {
        rows: 0..tokens,
        first: 0,
    }]
}

/// q, k and v, and the positions as keys and as queries.
fn inputs(tokens: usize) -> [Tensor; 5] {
    [tokens, tokens, tokens, 2 * SPAN, 2 * SPAN].map(|rows| random(rows, HEADS * SIZE))
}

fn positions([.., keys, queries]: &[Tensor; 5]) -> RelativePositions<'_> {
    RelativePositions {
        keys: Some(keys.view()),
        queries: Some(queries.view()),
    }
}

fn needed(tokens: usize, products: usize) -> ItemsCount {
    flops(2 * products * tokens * tokens * HEADS * SIZE)
}

#[divan::bench(args = [64, 256, 512])]
fn forward(bencher: Bencher<'_, '_>, tokens: usize) {
    let (inputs, places, segments) = (inputs(tokens), places(tokens), segment(tokens));
    let [q, k, v, ..] = &inputs;
    let (mut o, mut lse) = (q.clone(), Tensor::zeros(tokens, HEADS));
    let ws = Workspace::new();
    bencher.counter(needed(tokens, 4)).bench_local(|| {
        relative_attention_forward(
            o.view_mut(),
            lse.view_mut(),
            q.view(),
            k.view(),
            v.view(),
            positions(&inputs),
            &segments,
            &shape(&places),
            &ws,
        );
    });
}

#[divan::bench(args = [64, 256, 512])]
fn backward(bencher: Bencher<'_, '_>, tokens: usize) {
    let (inputs, places, segments) = (inputs(tokens), places(tokens), segment(tokens));
    let [q, k, v, ..] = &inputs;
    let (mut o, mut lse) = (q.clone(), Tensor::zeros(tokens, HEADS));
    let ws = Workspace::new();
    relative_attention_forward(
        o.view_mut(),
        lse.view_mut(),
        q.view(),
        k.view(),
        v.view(),
        positions(&inputs),
        &segments,
        &shape(&places),
        &ws,
    );
    let mut grads = inputs.clone();
    let [dq, dk, dv, d_keys, d_queries] = &mut grads;
    bencher.counter(needed(tokens, 11)).bench_local(|| {
        relative_attention_backward(
            dq.view_mut(),
            dk.view_mut(),
            dv.view_mut(),
            RelativeGradients {
                keys: Some(d_keys.view_mut()),
                queries: Some(d_queries.view_mut()),
            },
            q.view(),
            q.view(),
            k.view(),
            v.view(),
            positions(&inputs),
            lse.view(),
            &segments,
            &shape(&places),
            &ws,
        );
    });
}

#[divan::bench(args = [64, 256])]
fn naive(bencher: Bencher<'_, '_>, tokens: usize) {
    let (inputs, places, segments) = (inputs(tokens), places(tokens), segment(tokens));
    let [q, k, v, keys, queries] = inputs.map(|input| wide(&input));
    bencher.counter(needed(tokens, 4)).bench_local(|| {
        reference::relative_attention(
            [&q, &k, &v],
            Some(&keys),
            Some(&queries),
            &segments,
            &shape(&places),
        )
    });
}
