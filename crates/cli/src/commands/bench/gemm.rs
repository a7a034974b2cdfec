//! `lowrank bench gemm`.

use clap::Args;
use lowrank::bench::{self, GemmFigures};
use serde::Serialize;

use crate::commands::common::BaseArgs;
use crate::failure::Misuse;
use crate::output::Output;
use crate::settings::values::at_most;
use crate::table::{Align, Table};

/// Arguments of `lowrank bench gemm`.
#[derive(Debug, Args)]
pub struct BenchGemmArgs {
    /// The model whose shapes are measured
    #[command(flatten)]
    pub base: BaseArgs,

    /// Tokens of a step
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = at_most::<65_536>)]
    pub tokens: usize,

    /// Tokens of them that carry loss [default: all]
    #[arg(long, value_name = "N", value_parser = at_most::<65_536>)]
    pub supervised_tokens: Option<usize>,

    /// Take the best of so many
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = at_most::<1_000_000>)]
    pub repeats: usize,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Report {
    base_dtype: String,
    threads: usize,
    shapes: Vec<GemmFigures>,
    peak_gflops: f64,
    mean_gflops: f64,
    /// Bytes a second that all threads together read from memory.
    read_bandwidth: f64,
}

/// Runs the command.
///
/// # Errors
/// A model that cannot be used.
pub fn run(args: &BenchGemmArgs) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    let supervised = args.supervised_tokens.unwrap_or(args.tokens);
    let mut problems = Misuse::default();
    for (flag, count) in [
        ("--tokens", args.tokens),
        ("--supervised-tokens", supervised),
        ("--repeats", args.repeats),
    ] {
        problems.require(count > 0, || format!("{flag} must be 1 or greater"));
    }
    problems.or(())?;
    let base = args.base.load(&[])?;
    let work = (args.tokens, supervised);
    let dtype = lowrank::DType::from(args.base.base_dtype);
    let shapes = bench::gemm(base.decoder.config(), work, dtype, args.repeats);
    let report = Report {
        base_dtype: dtype.to_string(),
        threads: bench::threads(),
        peak_gflops: bench::peak_gflops(&shapes),
        mean_gflops: bench::mean_gflops(&shapes),
        read_bandwidth: bench::memory_bandwidth(),
        shapes,
    };
    output.result(&report, |output| text(&report, output))
}

fn text(report: &Report, output: &Output) -> String {
    let mut table = Table::new([
        ("product", Align::Left),
        ("tokens", Align::Right),
        ("in", Align::Right),
        ("out", Align::Right),
        ("forward GFLOP/s", Align::Right),
        ("backward GFLOP/s", Align::Right),
    ]);
    for shape in &report.shapes {
        table.row([
            shape.name.clone(),
            shape.tokens.to_string(),
            shape.inputs.to_string(),
            shape.outputs.to_string(),
            format!("{:.1}", shape.forward_gflops),
            format!("{:.1}", shape.backward_gflops),
        ]);
    }
    format!(
        "{}\n{} weights, {} {}: best {:.1} GFLOP/s, all of a step's {:.1} GFLOP/s; memory {:.1} GB/s",
        table.render(output.width, output.color),
        report.base_dtype,
        report.threads,
        if report.threads == 1 {
            "thread"
        } else {
            "threads"
        },
        report.peak_gflops,
        report.mean_gflops,
        report.read_bandwidth / 1e9
    )
}
