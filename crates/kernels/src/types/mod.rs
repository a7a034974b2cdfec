//! What operations take and give beside matrices.

pub(crate) mod activation;
pub(crate) mod attention;
pub(crate) mod classes;
pub(crate) mod compute;
pub(crate) mod head;
pub(crate) mod linear;
pub(crate) mod low_rank;
pub(crate) mod optimizer;
pub(crate) mod pauses;
pub(crate) mod relative;
pub(crate) mod rope;
