//! `lowrank data preview`.

use clap::{Args, Subcommand};
use lowrank::base::Source;
use lowrank::data::{DataReport, Split, preview_json, render_preview};
use serde::Serialize;
use serde_json::Value;

use super::common::RowsArgs;
use crate::output::Output;

/// Commands about data.
#[derive(Debug, Subcommand)]
pub enum DataCommands {
    /// Show the first rows as tokens, labels and mask, exactly as training will see them
    Preview(PreviewArgs),
}

/// Arguments of `lowrank data preview`.
#[derive(Debug, Args)]
pub struct PreviewArgs {
    /// The model whose tokenizer and chat template are used: a folder, an id that was pulled, or builtin:tiny
    #[arg(long, value_name = "MODEL")]
    pub model: String,

    /// The rows; of a folder, train.jsonl
    #[command(flatten)]
    pub rows: RowsArgs,

    /// How many rows to show
    #[arg(
        long = "rows",
        value_name = "N",
        default_value_t = 3,
        help_heading = "Data"
    )]
    pub count: usize,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Preview<'a> {
    report: &'a DataReport,
    examples: Value,
}

/// Runs the command.
///
/// # Errors
/// A tokenizer or data that cannot be used.
pub fn run(command: DataCommands) -> anyhow::Result<()> {
    let DataCommands::Preview(args) = command;
    let output = Output::detect(args.json);
    let tokenizer = Source::find(&args.model)?.tokenizer()?;
    let data = args.rows.load_for(
        &tokenizer,
        &[Split::Train, Split::Valid, Split::Test],
        None,
        None,
    )?;
    let shown = &data.examples[..args.count.min(data.examples.len())];
    let preview = Preview {
        report: &data.report,
        examples: preview_json(shown, &tokenizer, data.labels.as_ref()),
    };
    output.result(&preview, |output| {
        format!(
            "{}\n\n{}",
            data.report,
            render_preview(
                shown,
                &tokenizer,
                data.labels.as_ref(),
                output.color,
                output.width
            )
        )
    })
}
