//! Normalisation of rows.

pub(crate) mod layer;
pub(crate) mod rms;
