//! What computes on processors: the engines below the operations.

pub(crate) mod attention;
pub(crate) mod engine;
pub(crate) mod parallel;
#[cfg(target_arch = "x86_64")]
pub(crate) mod processor;
pub(crate) mod product;
pub(crate) mod scratch;
pub(crate) mod simd;
