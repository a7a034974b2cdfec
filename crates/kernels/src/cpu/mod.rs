//! What computes on processors: the engines below the operations.

pub(crate) mod attention;
pub(crate) mod engine;
pub(crate) mod parallel;
pub(crate) mod product;
pub(crate) mod scratch;
pub(crate) mod simd;
