//! `lowrank bench gemm`.

use std::fmt::Write as _;

use clap::Args;
use lowrank::ComputeDType;
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
    /// Of the weights that are multiplied.
    base_dtype: String,
    /// What the model's matrices are kept in.
    weights: String,
    threads: usize,
    /// With factors read as f32.
    f32: Products,
    /// With factors rounded to bf16, if this processor multiplies that faster.
    bf16: Option<Products>,
    /// The kind of processor that was computed for, as `LOWRANK_CPU` names it.
    processor: &'static str,
    /// Bytes a second that all threads together read from memory.
    read_bandwidth: f64,
}

/// All products of a step.
#[derive(Serialize)]
struct Products {
    shapes: Vec<GemmFigures>,
    peak_gflops: f64,
    mean_gflops: f64,
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
        ("--tokens", Some(args.tokens)),
        ("--supervised-tokens", args.supervised_tokens),
        ("--repeats", Some(args.repeats)),
    ] {
        problems.require(count != Some(0), || format!("{flag} must be 1 or greater"));
    }
    problems.require(supervised <= args.tokens, || {
        format!(
            "--supervised-tokens are some of --tokens, so {} at most",
            args.tokens
        )
    });
    problems.or(())?;
    let base = args.base.load(&[])?;
    let work = (args.tokens, supervised);
    let dtype = lowrank::DType::from(args.base.base_dtype);
    let products = |compute| {
        let shapes = bench::gemm(base.decoder.config(), work, (dtype, compute), args.repeats);
        Products {
            peak_gflops: bench::peak_gflops(&shapes),
            mean_gflops: bench::mean_gflops(&shapes),
            shapes,
        }
    };
    let report = Report {
        base_dtype: dtype.to_string(),
        weights: base.decoder.config().kept_in(dtype),
        threads: bench::threads(),
        f32: products(ComputeDType::F32),
        bf16: (ComputeDType::Bf16.here() == ComputeDType::Bf16)
            .then(|| products(ComputeDType::Bf16)),
        processor: lowrank::kernels::engine_name(),
        read_bandwidth: bench::memory_bandwidth(),
    };
    output.result(&report, |output| text(&report, output))
}

fn text(report: &Report, output: &Output) -> String {
    let mut columns = vec![
        ("product", Align::Left),
        ("tokens", Align::Right),
        ("in", Align::Right),
        ("out", Align::Right),
        ("f32 forward", Align::Right),
        ("backward", Align::Right),
    ];
    if report.bf16.is_some() {
        columns.extend([("bf16 forward", Align::Right), ("backward", Align::Right)]);
    }
    let mut table = Table::new(columns);
    for (i, shape) in report.f32.shapes.iter().enumerate() {
        let mut row = vec![
            shape.name.clone(),
            shape.tokens.to_string(),
            shape.inputs.to_string(),
            shape.outputs.to_string(),
        ];
        let rounded = report.bf16.as_ref().map(|products| &products.shapes[i]);
        for shape in std::iter::once(shape).chain(rounded) {
            row.push(format!("{:.1}", shape.forward_gflops));
            row.push(format!("{:.1}", shape.backward_gflops));
        }
        table.row(row);
    }
    let mut weights = format!("{} weights", report.base_dtype);
    if report.weights != report.base_dtype {
        let _ = write!(weights, " (the model's are in {})", report.weights);
    }
    let mut text = format!(
        "{}\nGFLOP/s on {}; {weights}, {} {}\n",
        table.render(output.width, output.color),
        report.processor,
        report.threads,
        if report.threads == 1 {
            "thread"
        } else {
            "threads"
        }
    );
    let rounded = report.bf16.as_ref().map(|products| ("bf16", products));
    for (name, products) in std::iter::once(("f32", &report.f32)).chain(rounded) {
        let _ = writeln!(
            text,
            "factors read as {name}: best {:.1} GFLOP/s, all of a step's {:.1} GFLOP/s",
            products.peak_gflops, products.mean_gflops
        );
    }
    if report.bf16.is_none() {
        text.push_str(
            "this processor does not multiply bf16 faster, so training reads factors as f32\n",
        );
    }
    let _ = write!(text, "memory {:.1} GB/s", report.read_bandwidth / 1e9);
    text
}
