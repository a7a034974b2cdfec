//! The operations that a model may call.

pub(crate) mod activation;
pub(crate) mod elementwise;
pub(crate) mod embedding;
pub(crate) mod head;
pub(crate) mod linear;
pub(crate) mod low_rank;
pub(crate) mod measure;
pub(crate) mod merge;
pub(crate) mod norm;
pub(crate) mod optimizer;
pub(crate) mod rope;
