//! What computes on processors: below each operation its loops or products, and the engines that multiply.
//!
//! A function with the name of an operation does what that says; the shapes were checked there.

pub(crate) mod activation;
pub(crate) mod attention;
pub(crate) mod elementwise;
pub(crate) mod embedding;
pub(crate) mod engine;
pub(crate) mod factors;
pub(crate) mod head;
pub(crate) mod linear;
pub(crate) mod low_rank;
pub(crate) mod magnitude;
pub(crate) mod measure;
pub(crate) mod merge;
pub(crate) mod norm;
pub(crate) mod optimizer;
pub(crate) mod parallel;
pub(crate) mod pool;
#[cfg(target_arch = "x86_64")]
pub(crate) mod processor;
pub(crate) mod product;
pub(crate) mod rope;
pub(crate) mod scratch;
pub(crate) mod simd;
pub(crate) mod teams;
