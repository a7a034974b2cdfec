//! `lowrank bench generate`.

use std::path::{Path, PathBuf};

use clap::Args;
use lowrank::bench::{self, GenerateFigures};
use lowrank::model::Adapter;
use lowrank::train::peak_rss;
use lowrank::units;
use serde::Serialize;

use super::{OpShare, profile_table, shares};
use crate::commands::common::{BaseArgs, ExactArgs, check_length, load_adapter};
use crate::failure::Misuse;
use crate::output::Output;
use crate::settings::values::at_most;
use crate::table::{Align, Facts, Table};

/// Arguments of `lowrank bench generate`.
#[derive(Debug, Args)]
pub struct BenchGenerateArgs {
    /// The model
    #[command(flatten)]
    pub base: BaseArgs,

    /// How exactly tokens are generated
    #[command(flatten)]
    pub exact: ExactArgs,

    /// An adapter in PEFT's layout that the prompts use; several are used in turn
    #[arg(long, value_name = "DIR")]
    pub adapter: Vec<PathBuf>,

    /// Tokens of a prompt; they are random
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Work")]
    pub prompt_tokens: usize,

    /// New tokens for each prompt
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Work")]
    pub new_tokens: usize,

    /// Prompts that are continued together, measured beside one alone
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_most::<65_536>, help_heading = "Work")]
    pub batch_size: usize,

    /// Say where the time of the largest batch went, operation by operation
    #[arg(long)]
    pub profile: bool,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    base_dtype: String,
    /// What the matrices are kept in.
    weights: String,
    threads: usize,
    adapters: usize,
    prompt_tokens: usize,
    new_tokens: usize,
    /// One prompt, and then the batch if it is larger.
    batches: Vec<BatchReport>,
    /// New tokens a second of the batch over those of one prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    batch_gain: Option<f64>,
    /// Bytes a second that all threads together read from memory.
    read_bandwidth: f64,
    peak_rss: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    profile: Vec<OpShare>,
}

/// A pass makes one token for each prompt; figures are those of the median pass.
#[derive(Debug, Serialize)]
struct BatchReport {
    batch_size: usize,
    prefill_tokens_per_second: f64,
    tokens_per_second: f64,
    milliseconds_per_pass: f64,
    /// Bytes that a pass must read: all weights, and the keys and values of the tokens before.
    bytes_per_pass: f64,
    bytes_per_second: f64,
    /// Of the bandwidth.
    share: f64,
}

/// Runs the command.
///
/// # Errors
/// A model or an adapter that cannot be used.
pub fn run(args: &BenchGenerateArgs) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    let report = measure(args)?;
    output.result(&report, |output| text(&report, output))
}

fn measure(args: &BenchGenerateArgs) -> anyhow::Result<Report> {
    let mut problems = Misuse::default();
    problems.require(args.prompt_tokens > 0, || {
        "--prompt-tokens must be 1 or greater".to_owned()
    });
    problems.require(args.new_tokens > 1, || {
        "--new-tokens must be 2 or greater".to_owned()
    });
    problems.require(args.batch_size > 0, || {
        "--batch-size must be 1 or greater".to_owned()
    });
    problems.or(())?;
    let folders: Vec<&Path> = args.adapter.iter().map(PathBuf::as_path).collect();
    let base = args.base.load(&folders)?;
    args.exact.apply(&base)?;
    let loaded = folders.iter().map(|folder| load_adapter(folder, &base));
    let loaded = loaded.collect::<anyhow::Result<Vec<_>>>()?;
    let adapters: Vec<&Adapter> = loaded.iter().map(|loaded| &loaded.adapter).collect();
    let longest = args.prompt_tokens.saturating_add(args.new_tokens);
    check_length(
        (&base.source, base.decoder.config()),
        &adapters,
        longest,
        "ask for fewer",
    )?;
    let mut sizes = vec![1];
    if args.batch_size > 1 {
        sizes.push(args.batch_size);
    }
    let figures: Vec<GenerateFigures> = sizes
        .iter()
        .map(|&size| {
            let prompts: Vec<Vec<u32>> = (0..size)
                .map(|row| {
                    bench::random_ids(
                        base.decoder.config().vocab_size,
                        args.prompt_tokens,
                        row as u64,
                    )
                })
                .collect();
            let profile = args.profile && size == args.batch_size;
            bench::generate(&base.decoder, &adapters, &prompts, args.new_tokens, profile)
        })
        .collect();
    // What measures the bandwidth takes memory of its own.
    let peak_rss = peak_rss();
    let bandwidth = bench::memory_bandwidth();
    let profile = figures.iter().rfind(|f| !f.profile.is_empty());
    let profile = profile.map_or_else(Vec::new, |f| {
        let seconds = f.pass_seconds.iter().sum();
        shares(&f.profile, f.pass_seconds.len(), seconds)
    });
    let batches: Vec<BatchReport> = figures
        .iter()
        .map(|f| BatchReport {
            batch_size: f.prompts,
            prefill_tokens_per_second: (f.prompts * args.prompt_tokens) as f64 / f.prefill_seconds,
            tokens_per_second: f.tokens_per_second(),
            milliseconds_per_pass: 1e3 * f.median_pass(),
            bytes_per_pass: f.pass_bytes,
            bytes_per_second: f.bytes_per_second(),
            share: f.bytes_per_second() / bandwidth,
        })
        .collect();
    Ok(Report {
        base_dtype: lowrank::DType::from(args.base.base_dtype).to_string(),
        weights: (base.decoder.config()).kept_in(args.base.base_dtype.into()),
        threads: bench::threads(),
        adapters: adapters.len(),
        prompt_tokens: args.prompt_tokens,
        new_tokens: args.new_tokens,
        batch_gain: match batches.as_slice() {
            [one, batch] => Some(batch.tokens_per_second / one.tokens_per_second),
            _ => None,
        },
        batches,
        read_bandwidth: bandwidth,
        peak_rss,
        profile,
    })
}

fn text(report: &Report, output: &Output) -> String {
    let mut table = Table::new([
        ("prompts", Align::Right),
        ("prompt tokens/s", Align::Right),
        ("new tokens/s", Align::Right),
        ("ms a pass", Align::Right),
        ("MB a pass", Align::Right),
        ("GB/s", Align::Right),
        ("of bandwidth", Align::Right),
    ]);
    for batch in &report.batches {
        table.row([
            batch.batch_size.to_string(),
            format!("{:.0}", batch.prefill_tokens_per_second),
            format!("{:.1}", batch.tokens_per_second),
            format!("{:.2}", batch.milliseconds_per_pass),
            format!("{:.1}", batch.bytes_per_pass / 1e6),
            format!("{:.1}", batch.bytes_per_second / 1e9),
            format!("{:.0} %", 100.0 * batch.share),
        ]);
    }
    let mut facts = Facts::default();
    facts.add(
        "memory is read at",
        format!("{:.1} GB/s", report.read_bandwidth / 1e9),
    );
    if let Some(gain) = report.batch_gain {
        facts.add("the batch makes", format!("{gain:.2} times the tokens"));
    }
    facts.add("peak memory", units::bytes(report.peak_rss));
    facts.add("weights in", report.weights.clone());
    facts.add("threads", report.threads.to_string());
    let mut text = table.render(output.width, output.color);
    text.push('\n');
    text.push_str(&facts.render("", output.color));
    if !report.profile.is_empty() {
        text.push('\n');
        text.push_str(&profile_table(&report.profile, "ms a pass", output));
    }
    text
}
