//! Loops of activations, compiled once for each function.

use rayon::prelude::*;

use crate::cpu::parallel::ForEachPart;
use crate::cpu::simd::{exp, tanh, vectorize};
use crate::types::activation::Activation;
use crate::view::{OutputMut, View};

/// Numbers that a task takes; each costs an exponential.
const BLOCK: usize = 2 * 1024;

pub(crate) fn activation_forward(h: OutputMut<'_>, x: View<'_>, act: Activation) {
    with_function(act, Forward { h, x });
}

pub(crate) fn activation_backward(dx: OutputMut<'_>, dh: View<'_>, x: View<'_>, act: Activation) {
    with_function(act, Backward { dx, dh, x });
}

pub(crate) fn gated_forward(h: OutputMut<'_>, gate: View<'_>, up: View<'_>, act: Activation) {
    with_function(act, GatedForward { h, gate, up });
}

pub(crate) fn gated_backward(
    dgate: OutputMut<'_>,
    dup: OutputMut<'_>,
    dh: View<'_>,
    gate: View<'_>,
    up: View<'_>,
    act: Activation,
) {
    with_function(
        act,
        GatedBackward {
            dgate,
            dup,
            dh,
            gate,
            up,
        },
    );
}

/// A function and its derivative at once: they share the exponential.
trait Function: Copy + Sync {
    fn value(x: f32) -> f32;
    /// act(x) and act'(x).
    fn both(x: f32) -> (f32, f32);
}

/// A loop over elements that is compiled once for each function.
trait Loop {
    fn run<F: Function>(self);
}

fn with_function(act: Activation, work: impl Loop) {
    match act {
        Activation::Silu => work.run::<Silu>(),
        Activation::Gelu => work.run::<Gelu>(),
        Activation::GeluTanh => work.run::<GeluTanh>(),
        Activation::Relu => work.run::<Relu>(),
        Activation::Tanh => work.run::<Tanh>(),
    }
}

struct Forward<'a> {
    h: OutputMut<'a>,
    x: View<'a>,
}

impl Loop for Forward<'_> {
    fn run<F: Function>(self) {
        let chunks = self.h.par_chunks_mut(BLOCK).enumerate();
        chunks.for_each_part(|(i, h)| {
            let part = i * BLOCK..i * BLOCK + h.len();
            self.x.with_part(part, |x| {
                h.write(|h| {
                    vectorize(
                        #[inline(always)]
                        || {
                            for (h, &x) in h.iter_mut().zip(x) {
                                *h = F::value(x);
                            }
                        },
                    );
                });
            });
        });
    }
}

struct Backward<'a> {
    dx: OutputMut<'a>,
    dh: View<'a>,
    x: View<'a>,
}

impl Loop for Backward<'_> {
    fn run<F: Function>(self) {
        // h = act(x)
        let chunks = self.dx.par_chunks_mut(BLOCK);
        let chunks = chunks.zip(self.dh.f32s().par_chunks(BLOCK)).enumerate();
        chunks.for_each_part(|(i, (dx, dh))| {
            let part = i * BLOCK..i * BLOCK + dx.len();
            self.x.with_part(part, |x| {
                dx.write(|dx| {
                    vectorize(
                        #[inline(always)]
                        || {
                            for ((dx, dh), &x) in dx.iter_mut().zip(dh).zip(x) {
                                *dx = dh * F::both(x).1;
                            }
                        },
                    );
                });
            });
        });
    }
}

struct GatedForward<'a> {
    h: OutputMut<'a>,
    gate: View<'a>,
    up: View<'a>,
}

impl Loop for GatedForward<'_> {
    fn run<F: Function>(self) {
        let chunks = self.h.par_chunks_mut(BLOCK).enumerate();
        chunks.for_each_part(|(i, h)| {
            let part = i * BLOCK..i * BLOCK + h.len();
            self.gate.with_part(part.clone(), |gate| {
                self.up.with_part(part, |up| {
                    h.write(|h| {
                        vectorize(
                            #[inline(always)]
                            || {
                                for ((h, &gate), up) in h.iter_mut().zip(gate).zip(up) {
                                    *h = F::value(gate) * up;
                                }
                            },
                        );
                    });
                });
            });
        });
    }
}

struct GatedBackward<'a> {
    dgate: OutputMut<'a>,
    dup: OutputMut<'a>,
    dh: View<'a>,
    gate: View<'a>,
    up: View<'a>,
}

impl Loop for GatedBackward<'_> {
    fn run<F: Function>(self) {
        // h = act(gate) · up
        let chunks = self.dgate.par_chunks_mut(BLOCK);
        let chunks = chunks.zip(self.dup.par_chunks_mut(BLOCK));
        let chunks = chunks.zip(self.dh.f32s().par_chunks(BLOCK)).enumerate();
        chunks.for_each_part(|(i, ((dgate, dup), dh))| {
            let part = i * BLOCK..i * BLOCK + dh.len();
            self.gate.with_part(part.clone(), |gate| {
                self.up.with_part(part, |up| {
                    dgate.write(|dgate| {
                        dup.write(|dup| {
                            vectorize(
                                #[inline(always)]
                                || {
                                    let grads = dgate.iter_mut().zip(dup);
                                    for (((dgate, dup), dh), (&gate, up)) in
                                        grads.zip(dh).zip(gate.iter().zip(up))
                                    {
                                        let (value, slope) = F::both(gate);
                                        *dgate = dh * up * slope;
                                        *dup = dh * value;
                                    }
                                },
                            );
                        });
                    });
                });
            });
        });
    }
}

#[derive(Clone, Copy)]
struct Silu;

impl Function for Silu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x / (1.0 + exp(-x))
    }

    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        let sigmoid = 1.0 / (1.0 + exp(-x));
        let value = x * sigmoid;
        (value, sigmoid + value * (1.0 - sigmoid))
    }
}

#[derive(Clone, Copy)]
struct Gelu;

impl Gelu {
    /// Φ(x), with a relative error of about 1e-6 in the left tail: half of erfc(|x|/√2) by the
    /// Chebyshev fit of "Numerical Recipes", section 6.2.
    #[inline(always)]
    fn phi(x: f32) -> f32 {
        const COEFFICIENTS: [f32; 9] = [
            -0.822_152_23,
            1.488_515_9,
            -1.135_204,
            0.278_868_07,
            -0.186_288_06,
            0.096_784_18,
            0.374_091_96,
            1.000_023_7,
            -1.265_512_2,
        ];
        let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
        let t = 1.0 / (1.0 + 0.5 * z);
        let mut p = 0.170_872_77;
        for c in COEFFICIENTS {
            p = p * t + c;
        }
        let tail = 0.5 * t * exp(p - z * z);
        if x > 0.0 { 1.0 - tail } else { tail }
    }
}

impl Function for Gelu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * Self::phi(x)
    }

    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        // 1 / √(2π)
        const DENSITY: f32 = 0.398_942_3;
        let phi = Self::phi(x);
        (x * phi, phi + x * DENSITY * exp(-0.5 * x * x))
    }
}

#[derive(Clone, Copy)]
struct GeluTanh;

impl GeluTanh {
    const CUBIC: f32 = 0.044_715;
    /// 2·√(2/π).
    const SLOPE: f32 = 1.595_769;

    /// (1 + tanh(√(2/π)·(x + 0.044715·x³))) / 2, which is a sigmoid of twice the argument.
    #[inline(always)]
    fn gate(x: f32) -> f32 {
        let inner = Self::SLOPE * (x + Self::CUBIC * x * x * x);
        1.0 / (1.0 + exp(-inner))
    }
}

impl Function for GeluTanh {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * Self::gate(x)
    }

    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        let gate = Self::gate(x);
        let inner_slope = Self::SLOPE * (1.0 + 3.0 * Self::CUBIC * x * x);
        (x * gate, gate + x * gate * (1.0 - gate) * inner_slope)
    }
}

#[derive(Clone, Copy)]
struct Relu;

impl Function for Relu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        // Not `max`, which would turn NaN into zero.
        if x < 0.0 { 0.0 } else { x }
    }

    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        (Self::value(x), if x > 0.0 { 1.0 } else { 0.0 })
    }
}

#[derive(Clone, Copy)]
struct Tanh;

impl Function for Tanh {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        tanh(x)
    }

    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        let value = Self::value(x);
        (value, 1.0 - value * value)
    }
}
