//! `lowrank eval`.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use clap::{ArgMatches, Args};
use lowrank::Workspace;
use lowrank::base::Base;
use lowrank::data::{Dataset, Split};
use lowrank::ranks::Ranks;
use lowrank::train::{evaluate_on, evaluate_rows};
use lowrank::tuning::Loaded;
use lowrank::units;
use serde::Serialize;

use super::common::{BaseArgs, RowsArgs, adapter_set, check_length, load_adapter, not_finite};
use super::eval_classes;
use super::eval_text::{self, TextArgs};
use crate::failure::Misuse;
use crate::output::Output;
use crate::progress::{self, Mode};
use crate::ranks::{Job, RanksArgs, quietly};
use crate::table::Facts;

/// Arguments of `lowrank eval`.
#[derive(Debug, Args)]
#[command(
    mut_arg("model", |arg| arg.required(false).required_unless_present("from_predictions")),
    mut_arg("data", |arg| arg.required(false).required_unless_present("from_predictions"))
)]
pub struct EvalArgs {
    /// The model
    #[command(flatten)]
    pub base: Option<BaseArgs>,

    /// An adapter's folder
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,

    /// The rows; of a folder, test.jsonl where there is one, else valid.jsonl
    #[command(flatten)]
    pub rows: Option<RowsArgs>,

    /// Whether texts are scored instead of the loss
    #[command(flatten)]
    pub text: TextArgs,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EvalReport {
    /// Mean nats a supervised token.
    pub loss: f64,
    /// e to the loss.
    pub perplexity: f64,
    /// Share of supervised tokens that the model ranks first.
    pub accuracy: f64,
    /// Tokens that the loss is the mean of.
    pub supervised_tokens: usize,
    /// Rows that were evaluated.
    pub rows: usize,
    /// The file that the rows came from.
    pub data: PathBuf,
    /// Rows of it that were cut at the greatest length.
    pub truncated_rows: usize,
    /// Rows of it that could not be used.
    pub skipped_rows: usize,
    /// Tokens a second, prompts included.
    pub tokens_per_second: f64,
}

/// Runs the command.
///
/// # Errors
/// A model, adapter or data that cannot be used.
pub fn run(args: &EvalArgs, matches: &ArgMatches, progress: Mode) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    let job = Job::join(&RanksArgs::default(), "eval")?;
    let threads = matches.try_get_one::<usize>("threads").ok().flatten();
    job.start_threads(threads.copied())?;
    let ranks = job.ranks()?;
    if ranks.are_several() {
        return evaluate_on_ranks(&job, &ranks, args, &output);
    }
    if !args.text.metrics.is_empty() {
        let report = eval_text::evaluate(args, progress)?;
        return output.result(&report, |_| eval_text::text(&report));
    }
    if let Some(report) = eval_classes::evaluate(args, progress)? {
        return output.result(&report, |output| eval_classes::text(&report, output.width));
    }
    let report = evaluate(args, progress, None)?;
    output.result(&report, |_| text(&report))
}

/// The loss, of whose passes each rank of a job computes a share.
fn evaluate_on_ranks(
    job: &Job,
    ranks: &Ranks<'_>,
    args: &EvalArgs,
    output: &Output,
) -> anyhow::Result<()> {
    let is_text = !args.text.metrics.is_empty();
    let classes = is_text || eval_classes::is_for(args)?;
    if classes {
        return Err(job.said_by_first(Misuse::new(
            "several ranks share out the loss of a language model alone; score texts and classifiers with one process, without mpirun or srun",
        )));
    }
    let report = evaluate(args, Mode::Quiet, Some((job, ranks)))?;
    if ranks.is_first() {
        output.result(&report, |_| text(&report))?;
    }
    Ok(())
}

/// The call into the library.
fn evaluate(
    args: &EvalArgs,
    progress: Mode,
    ranks: Option<(&Job, &Ranks<'_>)>,
) -> anyhow::Result<EvalReport> {
    let read = read(args);
    let Read {
        base,
        adapter,
        data,
    } = match ranks {
        Some((job, _)) => job.agree(read)?,
        None => read?,
    };
    let adapters: Vec<_> = adapter.iter().map(|loaded| &loaded.adapter).collect();
    let bar = progress::counter(progress, data.examples.len() as u64, "rows");
    let begun = Instant::now();
    let (set, used) = (adapter_set(&adapters), adapter.as_ref().map(|_| 0));
    let ws = Workspace::new();
    let sums = match ranks {
        Some((_, ranks)) => {
            let found = evaluate_on(ranks, &base.decoder, set, used, &data.examples, &ws);
            found.map_err(quietly)?
        }
        None => evaluate_rows(&base.decoder, set, used, &data.examples, &ws, |rows| {
            bar.inc(rows as u64);
            ControlFlow::Continue(())
        }),
    };
    let seconds = begun.elapsed().as_secs_f64();
    bar.finish_and_clear();
    let loss = sums.mean();
    if !loss.is_finite() {
        let name = args.adapter.as_ref().map(|one| one.display().to_string());
        return Err(not_finite("the loss", &base, name.as_deref()));
    }
    Ok(EvalReport {
        loss,
        perplexity: loss.exp(),
        accuracy: sums.correct as f64 / sums.tokens as f64,
        supervised_tokens: sums.tokens,
        rows: data.examples.len(),
        data: data.report.path,
        truncated_rows: data.report.truncated_rows,
        skipped_rows: data.report.skipped.len(),
        tokens_per_second: data.report.tokens as f64 / seconds,
    })
}

/// What an evaluation reads.
struct Read {
    base: Base,
    adapter: Option<Loaded>,
    data: Dataset,
}

fn read(args: &EvalArgs) -> anyhow::Result<Read> {
    let (Some(base), Some(rows)) = (&args.base, &args.rows) else {
        return Err(Misuse::new("--model and --data must be given").into());
    };
    let base = base.load(args.adapter.as_deref().as_slice())?;
    let adapter = args
        .adapter
        .as_ref()
        .map(|folder| load_adapter(folder, &base))
        .transpose()?;
    let data = rows.load(&base.tokenizer, &[Split::Test, Split::Valid])?;
    tracing::info!("{}", data.report);
    let adapters: Vec<_> = adapter.iter().map(|loaded| &loaded.adapter).collect();
    let mend = "cut rows with --max-seq-length";
    check_length(
        (&base.source, base.decoder.config()),
        &adapters,
        data.report.longest,
        mend,
    )?;
    Ok(Read {
        base,
        adapter,
        data,
    })
}

fn text(report: &EvalReport) -> String {
    let mut facts = Facts::default();
    facts.add(
        "loss",
        format!("{:.4} nats a supervised token", report.loss),
    );
    facts.add("perplexity", format!("{:.4}", report.perplexity));
    facts.add("accuracy", format!("{:.2} %", 100.0 * report.accuracy));
    facts.add(
        "supervised tokens",
        units::grouped(report.supervised_tokens as u64),
    );
    facts.add(
        "rows",
        format!(
            "{} of {}",
            units::grouped(report.rows as u64),
            report.data.display()
        ),
    );
    if report.truncated_rows > 0 {
        facts.add("cut rows", report.truncated_rows.to_string());
    }
    if report.skipped_rows > 0 {
        facts.add("skipped rows", report.skipped_rows.to_string());
    }
    facts.render("", false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_the_promised_keys() {
        let report = EvalReport {
            loss: 1.0,
            perplexity: 1f64.exp(),
            accuracy: 0.5,
            supervised_tokens: 1234,
            rows: 10,
            data: "data/test.jsonl".into(),
            truncated_rows: 0,
            skipped_rows: 2,
            tokens_per_second: 100.0,
        };
        let json = serde_json::to_value(&report).unwrap();
        for key in [
            "loss",
            "perplexity",
            "accuracy",
            "supervised_tokens",
            "rows",
        ] {
            assert!(json[key].is_number(), "{key}");
        }
        insta::assert_snapshot!(text(&report), @r#"
        loss               1.0000 nats a supervised token
        perplexity         2.7183
        accuracy           50.00 %
        supervised tokens  1,234
        rows               10 of data/test.jsonl
        skipped rows       2
        "#);
    }
}
