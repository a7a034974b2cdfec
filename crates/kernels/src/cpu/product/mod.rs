//! Matrix products.
//!
//! [`multiply`](mod@multiply) cuts outputs for threads and chooses by the engine and the terms who multiplies a piece: [`bf16`], `neon_bf16`,
//! [`panels`] or [`fallback`]. [`few`] multiplies generated rows, and [`turned`] those of low-rank branches by their second factors.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod bf16;
pub(crate) mod blocks;
pub(crate) mod cut;
pub(crate) mod fallback;
pub(crate) mod few;
pub(crate) mod integers;
pub(crate) mod layout;
pub(crate) mod mat;
pub(crate) mod multiply;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon_bf16;
pub(crate) mod pack;
pub(crate) mod panels;
pub(crate) mod rows;
pub(crate) mod term;
pub(crate) mod turned;
pub(crate) mod vectors;
