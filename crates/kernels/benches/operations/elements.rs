//! What is done to each element: activations, positions, formats, the optimizer.

use divan::Bencher;
use lowrank_kernels::{
    Activation, AdamW, RopeOrder, RopeTable, Tensor, activation_backward, activation_forward,
    adamw_step, convert, gated_backward, gated_forward, reference, rope_forward, scale_columns,
    scale_columns_backward,
};

use crate::{HIDDEN, INNER, bf16, flops, random, wide};

/// Those of MLPs, and of the adapter layers of bottlenecks.
const ACTIVATIONS: [Activation; 4] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
];

const TOKENS: usize = 256;
const COUNT: usize = TOKENS * INNER;

#[divan::bench(args = ACTIVATIONS)]
fn activation(bencher: Bencher<'_, '_>, act: Activation) {
    let x = random(TOKENS, INNER);
    let mut h = x.clone();
    bencher
        .counter(flops(COUNT))
        .bench_local(|| activation_forward(h.view_mut(), x.view(), act));
}

#[divan::bench(args = ACTIVATIONS)]
fn activation_slope(bencher: Bencher<'_, '_>, act: Activation) {
    let x = random(TOKENS, INNER);
    let mut dx = x.clone();
    bencher
        .counter(flops(COUNT))
        .bench_local(|| activation_backward(dx.view_mut(), x.view(), x.view(), act));
}

#[divan::bench(args = ACTIVATIONS)]
fn activation_naive(bencher: Bencher<'_, '_>, act: Activation) {
    let x = wide(&random(TOKENS, INNER));
    let mut h = x.clone();
    bencher.counter(flops(COUNT)).bench_local(|| {
        for (h, &x) in h.iter_mut().zip(&x) {
            *h = reference::activation(x, act);
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
    bencher.counter(flops(TOKENS * HIDDEN)).bench_local(|| {
        reference::rope(
            &x,
            &positions,
            &inv_freq,
            1.0,
            RopeOrder::Halves,
            2 * inv_freq.len(),
            HIDDEN,
        )
    });
}

const SETTINGS: AdamW = AdamW {
    lr: 1e-4,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.01,
    step: 3,
    grad_scale: 1.0,
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

#[divan::bench]
fn gated_silu_naive(bencher: Bencher<'_, '_>) {
    let (gate, up) = (wide(&random(TOKENS, INNER)), wide(&random(TOKENS, INNER)));
    bencher.counter(flops(COUNT)).bench_local(|| {
        let h = gate.iter().zip(&up);
        let h = h.map(|(&gate, up)| reference::activation(gate, Activation::Silu) * up);
        h.collect::<Vec<f64>>()
    });
}

#[divan::bench]
fn bf16_to_f32(bencher: Bencher<'_, '_>) {
    let from = bf16(TOKENS, INNER);
    let mut to = Tensor::zeros(TOKENS, INNER);
    bencher
        .counter(flops(COUNT))
        .bench_local(|| convert(&mut to, from.view()));
}

#[divan::bench]
fn bf16_to_f32_naive(bencher: Bencher<'_, '_>) {
    let from: Vec<half::bf16> = random(TOKENS, INNER)
        .to_vec()
        .into_iter()
        .map(half::bf16::from_f32)
        .collect();
    let mut to = vec![0.0; COUNT];
    bencher.counter(flops(COUNT)).bench_local(|| {
        for (to, from) in to.iter_mut().zip(&from) {
            *to = from.to_f32();
        }
    });
}

#[divan::bench]
fn f32_to_bf16(bencher: Bencher<'_, '_>) {
    let (from, mut to) = (random(TOKENS, INNER), bf16(TOKENS, INNER));
    bencher
        .counter(flops(COUNT))
        .bench_local(|| convert(&mut to, from.view()));
}

#[divan::bench]
fn f32_to_bf16_naive(bencher: Bencher<'_, '_>) {
    let from = random(TOKENS, INNER).to_vec();
    let mut to = vec![half::bf16::ZERO; COUNT];
    bencher.counter(flops(COUNT)).bench_local(|| {
        for (to, from) in to.iter_mut().zip(&from) {
            *to = half::bf16::from_f32(*from);
        }
    });
}

#[divan::bench]
fn scaled_columns(bencher: Bencher<'_, '_>) {
    let (mut x, l) = (random(TOKENS, INNER), random(1, INNER));
    bencher
        .counter(flops(COUNT))
        .bench_local(|| scale_columns(x.view_mut(), l.view()));
}

#[divan::bench]
fn scaled_columns_slope(bencher: Bencher<'_, '_>) {
    let (x, mut dl) = (random(TOKENS, INNER), random(1, INNER));
    bencher
        .counter(flops(2 * COUNT))
        .bench_local(|| scale_columns_backward(dl.view_mut(), x.view(), x.view()));
}

#[divan::bench]
fn scaled_columns_naive(bencher: Bencher<'_, '_>) {
    let (x, l) = (wide(&random(TOKENS, INNER)), wide(&random(1, INNER)));
    bencher
        .counter(flops(COUNT))
        .bench_local(|| reference::scale_columns(&x, &l));
}
