//! Measurements: how fast training, generating and the matrix products under them are on this machine.
//!
//! Times mean nothing alone. Each function therefore returns the rate of the machine's own matrix product, or of its
//! memory, from the same run, to divide by.

use lowrank_kernels::CounterRng;

mod gemm;
mod generate;
mod random_gguf;
mod train;

pub use gemm::{GemmFigures, gemm, mean_gflops, peak_gflops};
pub use generate::{GenerateFigures, generate, memory_bandwidth};
pub use lowrank_kernels::{OpCost, RegionCost};
pub use random_gguf::{q4_k_m, write_random_gguf};
pub use train::{TrainFigures, TrainOptions, train};

/// Threads that everything computes with.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Tokens that no text has in this order: every id is as likely.
pub fn random_ids(vocab_size: usize, count: usize, seed: u64) -> Vec<u32> {
    let mut random = CounterRng::new(seed);
    (0..count)
        .map(|_| random.below(vocab_size as u64) as u32)
        .collect()
}
