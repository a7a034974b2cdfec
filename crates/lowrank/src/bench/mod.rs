//! Measurements: how fast training, generating and the matrix products under them are on this machine.
//!
//! Times mean nothing alone. Each function therefore returns the rate of the machine's own matrix product, or of its
//! memory, from the same run, to divide by.

mod gemm;
mod generate;
mod train;

pub use gemm::{GemmFigures, gemm, mean_gflops, peak_gflops};
pub use generate::{GenerateFigures, generate, memory_bandwidth};
pub use lowrank_kernels::OpCost;
pub use train::{TrainFigures, TrainOptions, train};

/// Threads that everything computes with.
pub fn threads() -> usize {
    rayon::current_num_threads()
}
