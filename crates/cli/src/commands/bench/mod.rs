//! `lowrank bench train`, `bench generate`, `bench serve`, `bench gemm` and `bench comm`.

pub mod comm;
pub mod gemm;
pub mod generate;
pub mod serve;
pub mod train;

use clap::{ArgMatches, Subcommand};
use lowrank::bench::{OpCost, RegionCost};
use serde::Serialize;

use crate::output::Output;
use crate::table::{Align, Facts, Table};

/// Commands that measure.
#[derive(Debug, Subcommand)]
pub enum BenchCommands {
    /// Time optimizer steps, and compare them with the matrix products that they are made of
    Train(train::BenchTrainArgs),
    /// Time reading prompts and making tokens, and compare it with how fast memory is read
    Generate(generate::BenchGenerateArgs),
    /// Ask a running server, and time its answers
    Serve(serve::BenchServeArgs),
    /// Time the matrix products of a training step, each alone
    Gemm(gemm::BenchGemmArgs),
    /// Time what the ranks of an MPI job exchange: mpirun -n 2 lowrank bench comm
    Comm(comm::BenchCommArgs),
}

/// Runs a command.
///
/// # Errors
/// A model or data that cannot be used.
pub fn run(command: BenchCommands, matches: &ArgMatches) -> anyhow::Result<()> {
    match command {
        BenchCommands::Train(args) => train::run(&args, matches),
        BenchCommands::Generate(args) => generate::run(&args),
        BenchCommands::Serve(args) => serve::run(&args),
        BenchCommands::Gemm(args) => gemm::run(&args),
        BenchCommands::Comm(args) => comm::run(&args),
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

/// What of a round threads share.
#[derive(Debug, Serialize)]
struct Sharing {
    /// Parallel regions; at the end of each, threads wait for each other.
    regions: f64,
    /// Share of the time outside of them.
    serial_share: f64,
    /// How many times as fast more threads would be if waiting for each other took no time, and memory were as fast for
    /// all: told only where one thread was measured. From four on they are teams of two, each with rows of its own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    speedups: Vec<Speedup>,
}

#[derive(Debug, Serialize)]
struct Speedup {
    threads: usize,
    /// How many times as many rows a step has.
    rows: usize,
    times: f64,
}

impl Sharing {
    /// Of `rounds` rounds that took `seconds` together.
    fn of(costs: &[RegionCost], rounds: usize, seconds: f64) -> Option<Self> {
        if costs.is_empty() {
            return None;
        }
        let within: f64 = costs.iter().map(|region| region.time.as_secs_f64()).sum();
        let serial = (seconds - within).max(0.0);
        let speedup = |threads: usize| {
            let team = threads.min(2);
            let shared: f64 = costs.iter().map(|r| r.seconds_on(team)).sum();
            let teams = threads / team;
            Speedup {
                threads,
                rows: teams,
                times: teams as f64 * seconds / (serial + shared),
            }
        };
        let alone = lowrank::bench::threads() == 1;
        Some(Self {
            regions: costs.iter().map(|region| region.count).sum::<u64>() as f64 / rounds as f64,
            serial_share: serial / seconds,
            speedups: if alone {
                [2, 16, 64, 128].map(speedup).into()
            } else {
                Vec::new()
            },
        })
    }

    fn add_to(&self, facts: &mut Facts) {
        facts.add(
            "parallel regions",
            format!(
                "{:.0}; {:.2} % of the time outside of them",
                self.regions,
                100.0 * self.serial_share
            ),
        );
        for Speedup {
            threads,
            rows,
            times,
        } in &self.speedups
        {
            let of_rows = match rows {
                1 => String::new(),
                _ => format!(", with {rows} times the rows"),
            };
            facts.add(
                &format!("{threads} threads, at most"),
                format!("{times:.1} times as fast{of_rows}"),
            );
        }
    }
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
