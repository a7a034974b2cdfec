//! `lowrank model export`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lowrank::base::Source;
use lowrank::export::{ExportReport, FileType, own_rows, write_model};
use lowrank::model::Purpose;
use lowrank::units;
use serde::Serialize;

use crate::commands::modelfile::{self, ModelfileArgs, WrittenModelfile};
use crate::output::Output;
use crate::table::Facts;

/// Whose file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum To {
    /// llama.cpp's and Ollama's
    Gguf,
}

/// Arguments of `lowrank model export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// A folder in the Hugging Face layout, a GGUF file, an id that was pulled, or builtin:tiny
    #[arg(value_name = "MODEL")]
    pub model: String,

    /// Whose file to write
    #[arg(long, value_name = "FORM", default_value = "gguf")]
    pub to: To,

    /// The file to write
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,

    /// How the weights are stored, as llama-quantize names it
    #[arg(
        long = "type",
        value_name = "TYPE",
        default_value = "BF16",
        ignore_case = true
    )]
    pub file_type: FileType,

    /// Ollama's file.
    #[command(flatten)]
    pub modelfile: ModelfileArgs,

    /// Replace the file, and the Modelfile beside it
    #[arg(long)]
    pub overwrite: bool,

    /// Threads to compute with [default: one a core]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Exported {
    /// The file.
    pub output: PathBuf,
    /// What is in it.
    #[serde(flatten)]
    pub report: ExportReport,
    /// Ollama's file, where one was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modelfile: Option<WrittenModelfile>,
}

/// Runs the command.
///
/// # Errors
/// A model that cannot be used or written so.
pub fn run(args: &ExportArgs) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    let To::Gguf = args.to;
    let beside = args.modelfile.beside(&args.output, args.overwrite)?;
    let source = Source::find(&args.model)?;
    let weights = source.weights_for(source.exact_dtype()?, Purpose::LanguageModel)?;
    let report = write_model(
        &source,
        weights.config(),
        &args.output,
        args.file_type,
        args.overwrite,
        &|_| true,
        &mut own_rows(&weights),
    )?;
    let exported = Exported {
        output: args.output.clone(),
        report,
        modelfile: match beside {
            Some(path) => {
                let from = modelfile::in_same_folder(&args.output);
                Some(modelfile::write(path, &from, None, &source.tokenizer()?)?)
            }
            None => None,
        },
    };
    output.result(&exported, |output| text(&exported, output))
}

fn text(exported: &Exported, output: &Output) -> String {
    let facts = facts(&exported.report, exported.modelfile.as_ref());
    facts.render(
        &format!("written to {}", exported.output.display()),
        output.color,
    )
}

/// What is in a GGUF file that was written.
pub fn facts(report: &ExportReport, modelfile: Option<&WrittenModelfile>) -> Facts {
    let mut facts = Facts::default();
    facts.add(
        "tensors",
        format!("{} ({})", report.tensors, report.types.join(", ")),
    );
    if report.instead > 0 {
        facts.add(
            "of another type",
            format!(
                "{}, whose columns do not fill blocks of 256",
                report.instead
            ),
        );
    }
    facts.add("size", units::bytes(report.bytes));
    facts.add(
        "chat template",
        if report.chat_template { "yes" } else { "none" },
    );
    facts.add("an answer ends with", report.ends.join(" or "));
    if let Some(modelfile) = modelfile {
        facts.add(
            "Ollama",
            format!("ollama create NAME -f {}", modelfile.path.display()),
        );
    }
    facts
}
