//! `lowrank merge --to gguf`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use lowrank::data::{DataOptions, Dataset, Example, Tokenizer};
use lowrank::export::FileType;
use lowrank::merge::gguf::{GgufMergeOptions, GgufMergeReport, merge_gguf};
use lowrank::model::Purpose;
use lowrank::train::split_columns;
use lowrank::tuning;
use serde::{Deserialize, Serialize};

use super::{MergeArgs, PROOF_SPLITS, PROOF_TOKENS};
use crate::commands::common::choose_split;
use crate::commands::model::export::facts;
use crate::commands::modelfile::{self, WrittenModelfile};
use crate::commands::with_adapter;
use crate::failure::Misuse;
use crate::output::Output;
use crate::table::{Align, Table};

/// Rows that the merge is judged on.
const ROWS: usize = 32;

/// What was merged.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Merged {
    /// The file that was written.
    pub output: PathBuf,
    /// How its weights are stored.
    #[serde(rename = "type")]
    pub file_type: FileType,
    /// Where the rows are from.
    pub data: PathBuf,
    /// How many there were.
    pub rows: usize,
    /// The library's figures.
    #[serde(flatten)]
    pub report: GgufMergeReport,
    /// Ollama's file, where one was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modelfile: Option<WrittenModelfile>,
}

/// What a run's config.yaml says of its rows.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OwnRows {
    data: Option<PathBuf>,
    valid_data: Option<PathBuf>,
    columns: Option<Vec<String>>,
    train_on_prompt: bool,
}

/// Runs the command.
///
/// # Errors
/// A model or adapter that cannot be used, or a tune that does not survive the type.
pub fn run(args: &MergeArgs) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    let beside = args.modelfile.beside(&args.output, args.overwrite)?;
    let plan = with_adapter::plan(&args.model, Some(&args.adapter))?;
    if plan.purpose != Purpose::LanguageModel {
        return Err(Misuse::new(
            "--to gguf: this adapter's model is no language model, and llama.cpp's files of classifiers are not written; leave --to out",
        )
        .into());
    }
    let loaded = tuning::load(&args.adapter, &plan.source.model_config()?)?;
    let tokenizer = plan.tokenizer()?;
    let (data, rows) = rows(args, &tokenizer)?;
    tracing::info!(
        "{}: judged on {} rows of {}",
        args.adapter.display(),
        rows.len(),
        data.display()
    );
    let report = merge_gguf(&GgufMergeOptions {
        source: &plan.source,
        adapter: &loaded.adapter,
        rows: &rows,
        ends: tokenizer.stop_ids(),
        output: &args.output,
        file_type: args.file_type,
        overwrite: args.overwrite,
        force: args.force,
    })?;
    let modelfile = match beside {
        Some(path) => {
            let from = modelfile::in_same_folder(&args.output);
            Some(modelfile::write(path, &from, None, &tokenizer)?)
        }
        None => None,
    };
    let merged = Merged {
        output: args.output.clone(),
        file_type: args.file_type,
        data,
        rows: rows.len(),
        report,
        modelfile,
    };
    output.result(&merged, |output| text(&merged, output))
}

/// The rows to judge on: those of `--data`, or the adapter's own, held out where there are some.
fn rows(args: &MergeArgs, tokenizer: &Tokenizer) -> anyhow::Result<(PathBuf, Vec<Example>)> {
    let own = own_rows(&args.adapter)?;
    let named = [args.data.clone(), own.valid_data, own.data];
    let mut named = named.into_iter().flatten();
    let Some(data) = named.find(|path| path.exists()) else {
        return Err(Misuse::new(format!(
            "--to gguf: the merge is judged on rows of the adapter's task, and {}; give some with --data",
            match &args.data {
                Some(path) => format!("{} is not there", path.display()),
                None => format!("those of {}/config.yaml are not there", args.adapter.display()),
            }
        ))
        .into());
    };
    let options = DataOptions {
        max_seq_length: PROOF_TOKENS,
        columns: args.columns.as_deref().map(split_columns).or(own.columns),
        train_on_prompt: own.train_on_prompt,
        ..DataOptions::default()
    };
    let split = choose_split(&data, None, &PROOF_SPLITS)?;
    let loaded = Dataset::load(&data, split, tokenizer, &options)?;
    let rows = loaded
        .examples
        .into_iter()
        .filter(|row| row.supervised_tokens() > 0);
    Ok((data, rows.take(ROWS).collect()))
}

fn own_rows(adapter: &Path) -> anyhow::Result<OwnRows> {
    let path = adapter.join("config.yaml");
    match std::fs::read_to_string(&path) {
        Ok(text) => serde_saphyr::from_str(&text).with_context(|| path.display().to_string()),
        Err(_) => Ok(OwnRows::default()),
    }
}

fn text(merged: &Merged, output: &Output) -> String {
    let report = &merged.report;
    let mut facts = facts(&report.file, merged.modelfile.as_ref());
    facts.add(
        "ΔW that is left",
        format!("{:.1} %", 100.0 * report.survived),
    );
    facts.add(
        "loss",
        format!(
            "{:.4} without the adapter, {:.4} with it, {:.4} merged{}",
            report.base_loss,
            report.adapter_loss,
            report.merged_loss,
            report.lost_gain.map_or_else(String::new, |lost| format!(
                " ({:.1} % of the gain is lost)",
                100.0 * lost.max(0.0)
            ))
        ),
    );
    let [same, all] = report.greedy;
    facts.add("greedy tokens", format!("{same} of {all} are the same"));
    facts.add(
        "logits",
        format!(
            "differ by {:.2e} at most, {:.2e} root mean square",
            report.max_logit_difference, report.rms_logit_difference
        ),
    );
    facts.add(
        "judged on",
        format!("{} rows of {}", merged.rows, merged.data.display()),
    );
    if !report.loss_of_tune().is_empty() {
        facts.add(
            "kept because of --force",
            report.loss_of_tune().join(", and "),
        );
    }
    let mut table = Table::new([
        ("Module", Align::Left),
        ("‖ΔW‖", Align::Right),
        ("left", Align::Right),
    ]);
    for module in &report.modules {
        table.row([
            module.module.clone(),
            format!("{:.3}", module.norm),
            format!("{:.1} %", 100.0 * module.survived),
        ]);
    }
    let heading = format!("written to {}", merged.output.display());
    format!(
        "{}\n{}",
        table.render(output.width, output.color),
        facts.render(&heading, output.color)
    )
}
