//! `lowrank bench train`, `lowrank bench generate` and `lowrank bench gemm`.

pub mod gemm;
pub mod generate;
pub mod train;

use clap::{ArgMatches, Subcommand};
use lowrank::bench::OpCost;
use serde::Serialize;

use crate::output::Output;
use crate::table::{Align, Table};

/// Commands that measure.
#[derive(Debug, Subcommand)]
pub enum BenchCommands {
    /// Time optimizer steps, and compare them with the matrix products that they are made of
    Train(train::BenchTrainArgs),
    /// Time reading prompts and making tokens, and compare it with how fast memory is read
    Generate(generate::BenchGenerateArgs),
    /// Time the matrix products of a training step, each alone
    Gemm(gemm::BenchGemmArgs),
}

/// Runs a command.
///
/// # Errors
/// A model or data that cannot be used.
pub fn run(command: BenchCommands, matches: &ArgMatches) -> anyhow::Result<()> {
    match command {
        BenchCommands::Train(args) => train::run(&args, matches),
        BenchCommands::Generate(args) => generate::run(&args),
        BenchCommands::Gemm(args) => gemm::run(&args),
    }
}

/// What an operation took of a round: of a step, or of a pass.
#[derive(Debug, Serialize)]
struct OpShare {
    operation: &'static str,
    calls: f64,
    milliseconds: f64,
    share: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    gflops: Option<f64>,
}

/// The shares of operations in `rounds` rounds that took `seconds` together.
fn shares(profile: &[OpCost], rounds: usize, seconds: f64) -> Vec<OpShare> {
    let rounds = rounds as f64;
    profile
        .iter()
        .map(|op| {
            let time = op.time.as_secs_f64();
            OpShare {
                operation: op.name,
                calls: op.calls as f64 / rounds,
                milliseconds: 1e3 * time / rounds,
                share: time / seconds,
                gflops: (op.flops > 0.0).then(|| op.flops / time / 1e9),
            }
        })
        .collect()
}

/// Operations, the dearest first; `time` is the heading of the time of a round.
fn profile_table(shares: &[OpShare], time: &str, output: &Output) -> String {
    let mut table = Table::new([
        ("operation", Align::Left),
        ("calls", Align::Right),
        (time, Align::Right),
        ("share", Align::Right),
        ("GFLOP/s", Align::Right),
    ]);
    for op in shares {
        table.row([
            op.operation.to_owned(),
            format!("{:.0}", op.calls),
            format!("{:.2}", op.milliseconds),
            format!("{:.1} %", 100.0 * op.share),
            op.gflops.map_or_else(String::new, |g| format!("{g:.1}")),
        ]);
    }
    table.render(output.width, output.color)
}
