//! Norms.

use divan::Bencher;
use lowrank_kernels::{
    Tensor, layer_norm_backward, layer_norm_forward, reference, rms_norm_backward, rms_norm_forward,
};

use crate::{HIDDEN, flops, random, wide};

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
            0.0,
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
            0.0,
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
        .bench_local(|| reference::rms_norm(&x, &weight, 0.0, 1e-5));
}

#[divan::bench]
fn layer_forward(bencher: Bencher<'_, '_>) {
    let (x, weight) = (random(TOKENS, HIDDEN), random(1, HIDDEN));
    let mut y = x.clone();
    let (mut mean, mut rstd) = (Tensor::zeros(TOKENS, 1), Tensor::zeros(TOKENS, 1));
    bencher.counter(flops(TOKENS * HIDDEN)).bench_local(|| {
        layer_norm_forward(
            y.view_mut(),
            mean.view_mut(),
            rstd.view_mut(),
            x.view(),
            weight.view(),
            Some(weight.view()),
            1e-5,
        );
    });
}

#[divan::bench]
fn layer_backward(bencher: Bencher<'_, '_>) {
    let (x, weight) = (random(TOKENS, HIDDEN), random(1, HIDDEN));
    let (mut dx, mean, rstd) = (x.clone(), random(TOKENS, 1), random(TOKENS, 1));
    bencher.counter(flops(TOKENS * HIDDEN)).bench_local(|| {
        layer_norm_backward(
            dx.view_mut(),
            None,
            None,
            x.view(),
            x.view(),
            mean.view(),
            rstd.view(),
            weight.view(),
            true,
        );
    });
}

#[divan::bench]
fn layer_naive(bencher: Bencher<'_, '_>) {
    let (x, weight) = (wide(&random(TOKENS, HIDDEN)), wide(&random(1, HIDDEN)));
    bencher
        .counter(flops(TOKENS * HIDDEN))
        .bench_local(|| reference::layer_norm(&x, &weight, Some(&weight), 1e-5));
}
