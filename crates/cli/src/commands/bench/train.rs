//! `lowrank bench train`.

use std::path::PathBuf;

use clap::{ArgMatches, Args};
use lowrank::base::{Network, purpose_for};
use lowrank::bench::{self, TrainOptions};
use lowrank::data::{DataOptions, Dataset, Example, Label, Split, TaskType};
use lowrank::model::{ModelConfig, Pooling, Purpose, Recompute, Saving};
use lowrank::plan::{Memory, StepFlops, Work};
use lowrank::train::{
    BaseDtype, ComputeFormat, Scoring, Silent, StepOptions, TrainConfig, check_task, prepare,
    purpose_of, split_columns,
};
use lowrank::tuning::Method;
use lowrank::units;
use serde::Serialize;

use super::{OpShare, Sharing, profile_table, shares};
use crate::commands::common::{BaseArgs, check_length, choose_split};
use crate::failure::Misuse;
use crate::output::Output;
use crate::settings::Flags;
use crate::settings::method::MethodArgs;
use crate::settings::values::at_most;
use crate::table::Facts;

/// Arguments of `lowrank bench train`.
#[derive(Debug, Args)]
#[command(mut_arg("add_tokens", |arg| arg.hide(true)))]
pub struct BenchTrainArgs {
    /// The model
    #[command(flatten)]
    pub base: BaseArgs,

    /// Rows to train on, in their order; without it, random tokens that all carry loss
    #[arg(long, value_name = "PATH", help_heading = "Work")]
    pub data: Option<PathBuf>,

    /// Names of the columns of a CSV or TSV file without a header, such as text,label
    #[arg(long, value_name = "NAMES", requires = "data", help_heading = "Work")]
    pub columns: Option<String>,

    /// What is trained for [default: what the rows teach; an encoder on random tokens is trained to classify]
    #[arg(long, value_name = "TASK", help_heading = "Work")]
    pub task_type: Option<TaskType>,

    /// Tokens of a row of random tokens
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 256,
        conflicts_with = "data",
        value_parser = at_most::<1_000_000>,
        help_heading = "Work"
    )]
    pub seq_length: usize,

    /// Rows of a step
    #[arg(long, value_name = "ROWS", default_value_t = 8, value_parser = at_most::<1_000_000>, help_heading = "Work")]
    pub batch_size: usize,

    /// Compute a prompt once for all rows of a step that have it, and put such rows side by side
    #[arg(long, requires = "data", help_heading = "Work")]
    pub share_prompts: bool,

    /// Steps that are timed
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = at_most::<1_000_000>, help_heading = "Work")]
    pub steps: usize,

    /// Steps before them that are not
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_most::<1_000_000>, help_heading = "Work")]
    pub warmup: usize,

    /// What is trained
    #[command(flatten)]
    pub trained: MethodArgs,

    /// What a block computes again in the backward
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "none",
        help_heading = "Work"
    )]
    pub recompute: Recompute,

    /// How the blocks keep what the backward reads [default: as the base is stored]
    #[arg(long, value_name = "DTYPE", help_heading = "Work")]
    pub saved_dtype: Option<BaseDtype>,

    /// How the factors of products are read [default: bf16 beside a base in bf16, else f32]
    #[arg(long, value_name = "DTYPE", help_heading = "Work")]
    pub compute_dtype: Option<ComputeFormat>,

    /// Say where the time went, operation by operation
    #[arg(long)]
    pub profile: bool,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Report {
    method: Method,
    base_dtype: String,
    /// What the matrices are kept in.
    weights: String,
    /// How factors were read, which is not what was asked for where this processor does not gain by it.
    compute_dtype: ComputeFormat,
    /// The kind of processor that was computed for, as `LOWRANK_CPU` names it.
    processor: &'static str,
    threads: usize,
    share_prompts: bool,
    trainable_parameters: usize,
    steps: usize,
    /// Tokens of all steps, none of them padding and each shared prompt once, over the time of all steps, optimizer included.
    tokens_per_second: f64,
    examples_per_second: f64,
    rows: usize,
    seconds_per_step: f64,
    work: Work,
    /// What the steps needed.
    flops: StepFlops,
    gflops: f64,
    /// The fastest of the step's own products alone, with factors read as the step reads them.
    peak_gflops: f64,
    /// All of a step's products alone, one after the other.
    products_gflops: f64,
    efficiency: f64,
    peak_rss: u64,
    recompute: Recompute,
    /// What the memory was predicted to be for the largest step.
    predicted: Memory,
    predicted_total: u64,
    losses: Vec<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    profile: Vec<OpShare>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sharing: Option<Sharing>,
}

/// Runs the command.
///
/// # Errors
/// A model or data that cannot be used.
pub fn run(args: &BenchTrainArgs, matches: &ArgMatches) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    let report = measure(args, matches)?;
    output.result(&report, |output| text(&report, output))
}

fn measure(args: &BenchTrainArgs, matches: &ArgMatches) -> anyhow::Result<Report> {
    let mut problems = Misuse::default();
    problems.require(args.steps > 0, || "--steps must be 1 or greater".to_owned());
    problems.require(args.seq_length > 1, || {
        "--seq-length must be 2 or greater".to_owned()
    });
    let config = TrainConfig {
        batch_size: args.batch_size,
        share_prompts: args.share_prompts,
        base_dtype: args.base.base_dtype,
        compute_dtype: args.compute_dtype,
        ..args.trained.train_config(&args.base.model, matches)?
    };
    for problem in config.problems_as(&Flags) {
        problems.push(problem);
    }
    problems.or(())?;
    let (network, examples) = load(args, &config)?;
    let (source, model) = (&network.source, network.decoder.config());
    let longest = examples.iter().map(|e| e.ids.len()).max().unwrap_or(0);
    let planned = config.lay_out(model)?;
    check_length((source, model), &[&planned], longest, "give shorter rows")?;
    let mut adapter = prepare(&config, &network, &examples, &mut Silent)?.adapter;
    let compute_dtype = lowrank::ComputeDType::from(config.compute_format());
    let options = TrainOptions {
        steps: args.steps,
        warmup: args.warmup,
        profile: args.profile,
        step: StepOptions {
            learning_rate: config.learning_rate,
            betas: (config.adam_beta1, config.adam_beta2),
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
            max_grad_norm: config.max_grad_norm,
            scoring: Scoring::default(),
            batch_size: args.batch_size,
            share_prompts: args.share_prompts,
            saving: Saving {
                recompute: args.recompute,
                dtype: args.saved_dtype.unwrap_or(args.base.base_dtype).into(),
            },
            compute_dtype,
            seed: config.seed,
            pauses: lowrank::kernels::Pauses::NONE,
        },
    };
    let figures = bench::train(&network.decoder, &mut adapter, &examples, &options)?;
    let work = figures.work;
    let mean = |total: usize| (total as f64 / args.steps as f64).round() as usize;
    let step = (mean(work.tokens), mean(work.supervised_tokens));
    let formats = (args.base.base_dtype.into(), compute_dtype);
    let shapes = bench::gemm(network.decoder.config(), step, formats, 5);
    let seconds = figures.total_seconds();
    let gflops = figures.flops.total() / seconds / 1e9;
    let peak = bench::peak_gflops(&shapes);
    Ok(Report {
        method: args.trained.method,
        base_dtype: lowrank::DType::from(args.base.base_dtype).to_string(),
        weights: model.kept_in(args.base.base_dtype.into()),
        compute_dtype: config.compute_format().here(),
        processor: lowrank::kernels::engine_name(),
        threads: bench::threads(),
        share_prompts: args.share_prompts,
        trainable_parameters: adapter.parameters(),
        steps: args.steps,
        tokens_per_second: work.tokens as f64 / seconds,
        rows: figures.rows,
        examples_per_second: figures.rows as f64 / seconds,
        seconds_per_step: seconds / args.steps as f64,
        work,
        flops: figures.flops,
        gflops,
        peak_gflops: peak,
        products_gflops: bench::mean_gflops(&shapes),
        efficiency: gflops / peak,
        peak_rss: figures.peak_rss,
        recompute: args.recompute,
        predicted_total: figures.predicted.total(),
        predicted: figures.predicted,
        profile: shares(&figures.profile, args.steps, seconds),
        sharing: Sharing::of(&figures.regions, args.steps, seconds),
        losses: figures.losses,
    })
}

/// Tokens of all rows that are made at random, which lie in memory.
const MOST_TOKENS: usize = 1 << 30;

/// The model as the rows need it, and the rows.
fn load(args: &BenchTrainArgs, config: &TrainConfig) -> anyhow::Result<(Network, Vec<Example>)> {
    let source = args.base.source()?;
    let dtype = args.base.base_dtype.into();
    let likely = purpose_for(&source.config()?, args.task_type, None)?;
    if likely == Purpose::Features {
        let message = "--task-type FEATURE_EXTRACTION: nothing trains it; give SEQ_CLS, TOKEN_CLS or CAUSAL_LM";
        return Err(Misuse::new(message).into());
    }
    let model = source.model_config_for(likely)?;
    let Some(data) = &args.data else {
        let examples = random_rows(args, &model)?;
        return Ok((source.load_for(dtype, likely, None, config.seed)?, examples));
    };
    let split = choose_split(data, None, &[Split::Train])?;
    let options = DataOptions {
        max_seq_length: config.row_length(&model),
        task: args.task_type,
        columns: args.columns.as_deref().map(split_columns),
        ..DataOptions::default()
    };
    let tokenizer = source.tokenizer()?;
    let rows = Dataset::load(data, split, &tokenizer, &options)?;
    drop(tokenizer);
    lowrank::kernels::release_freed_memory();
    check_task(config, rows.labels.as_ref())?;
    let purpose = purpose_of(rows.kind.task(), rows.labels.as_ref());
    let network = source.load_for(dtype, purpose, rows.labels, config.seed)?;
    Ok((network, rows.examples))
}

/// Rows of random tokens: all but the first of a row carry loss, or a label does that is anything.
fn random_rows(args: &BenchTrainArgs, model: &ModelConfig) -> anyhow::Result<Vec<Example>> {
    let rows = (args.steps + args.warmup) * args.batch_size;
    if rows.saturating_mul(args.seq_length) > MOST_TOKENS {
        return Err(Misuse::new(format!(
            "{rows} rows of {} tokens are more than the {MOST_TOKENS} tokens that are made for a measurement; lower --steps, --batch-size or --seq-length",
            args.seq_length
        ))
        .into());
    }
    let label = |row: usize| {
        let classifier = model.classifier()?;
        let class = |at: usize| (at % classifier.labels) as u32;
        Some(if classifier.pooling == Pooling::Each {
            let tags = (0..args.seq_length).map(|at| (at as u32, class(row + at)));
            Label::Tags(tags.collect())
        } else {
            Label::Class(class(row))
        })
    };
    Ok((0..rows)
        .map(|row| {
            let label = label(row);
            let supervised = match label {
                Some(_) => Vec::new(),
                None => (0..args.seq_length).map(|i| i > 0).collect(),
            };
            Example {
                ids: bench::random_ids(model.vocab_size, args.seq_length, row as u64),
                supervised,
                label,
                line: row + 1,
                prompt_len: 1,
                ..Example::default()
            }
        })
        .collect())
}

fn text(report: &Report, output: &Output) -> String {
    let mut facts = Facts::default();
    facts.add(
        "tokens a second",
        format!("{:.1}", report.tokens_per_second),
    );
    facts.add(
        "rows a second",
        format!("{:.2}", report.examples_per_second),
    );
    facts.add(
        "a step",
        format!(
            "{:.3} s, {} rows, {} tokens, {} of them supervised",
            report.seconds_per_step,
            report.rows / report.steps,
            report.work.tokens / report.steps,
            report.work.supervised_tokens / report.steps
        ),
    );
    facts.add(
        "needed",
        format!(
            "{:.1} GFLOP a step: {:.1} GFLOP/s",
            report.flops.total() / report.steps as f64 / 1e9,
            report.gflops
        ),
    );
    facts.add(
        "the step's products alone",
        format!(
            "{:.1} GFLOP/s, the fastest {:.1} (factors read as {} on {})",
            report.products_gflops, report.peak_gflops, report.compute_dtype, report.processor
        ),
    );
    facts.add(
        "reached",
        format!("{:.1} % of the fastest", 100.0 * report.efficiency),
    );
    facts.add(
        "peak memory",
        format!(
            "{}, predicted {}",
            units::bytes(report.peak_rss),
            units::bytes(report.predicted_total)
        ),
    );
    facts.add("weights in", report.weights.clone());
    facts.add("threads", report.threads.to_string());
    if let Some(sharing) = &report.sharing {
        sharing.add_to(&mut facts);
    }
    let mut text = facts.render("", output.color);
    if !report.profile.is_empty() {
        text.push('\n');
        text.push_str(&profile_table(&report.profile, "ms a step", output));
    }
    text
}
