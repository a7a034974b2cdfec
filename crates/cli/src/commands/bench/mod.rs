//! `lowrank bench train`, `lowrank bench generate` and `lowrank bench gemm`.

pub mod gemm;
pub mod train;

use clap::Subcommand;
use lowrank::base::Base;

/// Commands that measure.
#[derive(Debug, Subcommand)]
pub enum BenchCommands {
    /// Time optimizer steps, and compare them with the matrix products that they are made of
    Train(train::BenchTrainArgs),
    /// Time the matrix products of a training step, each alone
    Gemm(gemm::BenchGemmArgs),
}

/// Runs a command.
///
/// # Errors
/// A model or data that cannot be used.
pub fn run(command: BenchCommands) -> anyhow::Result<()> {
    match command {
        BenchCommands::Train(args) => train::run(&args),
        BenchCommands::Gemm(args) => gemm::run(&args),
    }
}

/// Tokens that no text has in this order: every id is as likely.
fn random_ids(base: &Base, count: usize, seed: u64) -> Vec<u32> {
    let vocabulary = base.decoder.config().vocab_size as u64;
    let mut state = seed;
    (0..count)
        .map(|_| {
            // Steele, Lea and Flood's SplitMix64.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((mixed ^ (mixed >> 31)) % vocabulary) as u32
        })
        .collect()
}
