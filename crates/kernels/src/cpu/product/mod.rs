//! Matrix products.
//!
//! [`multiply`](mod@multiply) cuts outputs for threads and chooses by the engine and the terms who multiplies a piece: [`amx`], [`panels`] or
//! [`fallback`]. [`few`] multiplies generated rows, and [`turned`] those of low-rank branches by their second factors.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod blocks;
pub(crate) mod cut;
pub(crate) mod fallback;
pub(crate) mod few;
pub(crate) mod layout;
pub(crate) mod mat;
pub(crate) mod multiply;
#[cfg(target_arch = "aarch64")]
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "no operation asks for products in bf16 yet")
)]
pub(crate) mod neon_bf16;
pub(crate) mod pack;
pub(crate) mod panels;
pub(crate) mod rows;
pub(crate) mod term;
pub(crate) mod turned;
pub(crate) mod vectors;
