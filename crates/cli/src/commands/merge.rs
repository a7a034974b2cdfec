//! `lowrank merge`, into a folder, and into a GGUF file in [`gguf`].

pub mod gguf;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lowrank::DType;
use lowrank::data::{
    BadRow, DataOptions, Dataset, Split, TaskType, Tokenizer, Unlabelled, UnlabelledOptions,
    UnlabelledRow, split_file,
};
use lowrank::export::FileType;
use lowrank::merge::{MergeOptions, MergeReport, PASSAGES};
use lowrank::model::Purpose;
use lowrank::train::{BaseDtype, split_columns};
use lowrank::tuning;
use lowrank::units;
use serde::Serialize;

use super::common::{choose_split, warn_of_other_base};
use super::modelfile::ModelfileArgs;
use super::with_adapter::{self, Plan};
use crate::failure::Misuse;
use crate::output::Output;
use crate::table::Facts;

/// Rows of `--data` that the merge is proved on, and tokens of each.
const PROOF_ROWS: usize = 8;
const PROOF_TOKENS: usize = 256;
/// Where in a folder those rows are looked for.
const PROOF_SPLITS: [Split; 3] = [Split::Test, Split::Valid, Split::Train];

/// What a merge is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum To {
    /// A folder in the Hugging Face layout
    Folder,
    /// A GGUF file of llama.cpp, which may be quantized
    Gguf,
}

/// Arguments of `lowrank merge`.
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// The model: a folder in the Hugging Face layout, an id of the Hub, or builtin:tiny
    #[arg(long, value_name = "MODEL")]
    pub model: String,

    /// The adapter to fold in
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,

    /// The folder or file for the merged model, which must not exist yet
    #[arg(long, value_name = "PATH")]
    pub output: PathBuf,

    /// What is written
    #[arg(long, value_name = "FORM", default_value = "folder")]
    pub to: To,

    /// How the weights of a GGUF file are stored, as llama-quantize names it
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

    /// How the merged weights are stored [default: as the model's are]
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<BaseDtype>,

    /// Compare logits on these rows instead of on built-in passages; judge a GGUF file on them instead of on the adapter's own
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,

    /// Names of the columns of a CSV or TSV file without a header, such as text,label
    #[arg(long, value_name = "NAMES", requires = "data")]
    pub columns: Option<String>,

    /// Keep the result even where its logits are too far off
    #[arg(long)]
    pub force: bool,

    /// Replace a model in the output folder
    #[arg(long)]
    pub overwrite: bool,

    /// Threads to compute with [default: one a core]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What was merged.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Merged {
    /// The folder that was written.
    pub output: PathBuf,
    /// How the weights are stored.
    pub dtype: BaseDtype,
    /// The library's figures.
    #[serde(flatten)]
    pub report: MergeReport,
}

/// Runs the command.
///
/// # Errors
/// A model or adapter that cannot be used, or a result that is too far off.
pub fn run(args: &MergeArgs) -> anyhow::Result<()> {
    if args.to == To::Gguf {
        if args.dtype.is_some() {
            return Err(Misuse::new("--dtype is of a folder; give --type for a GGUF file").into());
        }
        return gguf::run(args);
    }
    let output = Output::detect(args.json);
    let merged = merge(args)?;
    output.result(&merged, |output| text(&merged, output))
}

/// The call into the library.
fn merge(args: &MergeArgs) -> anyhow::Result<Merged> {
    let plan = with_adapter::plan(&args.model, Some(&args.adapter))?;
    let source = &plan.source;
    let config = source.model_config_for(plan.purpose)?;
    let loaded = tuning::load(&args.adapter, &config)?;
    tracing::info!("{}: {}", args.adapter.display(), loaded.coverage);
    let passages = passages(args, &plan)?;
    // f16 goes to bf16, the 16-bit type that is written here.
    let stored = BaseDtype::from(source.stored_dtype()?);
    if loaded.base_fingerprint.is_some() {
        let weights = source.weights_for(stored.into(), plan.purpose)?;
        warn_of_other_base(&args.adapter, &loaded, &weights, source);
    }
    let dtype = args.dtype.unwrap_or(stored);
    let report = lowrank::merge::merge(&MergeOptions {
        source,
        purpose: plan.purpose,
        labels: plan.labels.as_ref(),
        adapter: &loaded.adapter,
        passages: &passages,
        output: &args.output,
        dtype: DType::from(dtype),
        overwrite: args.overwrite,
        force: args.force,
    })?;
    Ok(Merged {
        output: args.output.clone(),
        dtype,
        report,
    })
}

/// Token ids that the merge is proved on.
fn passages(args: &MergeArgs, plan: &Plan) -> anyhow::Result<Vec<Vec<u32>>> {
    let tokenizer = plan.tokenizer()?;
    if plan.purpose == Purpose::LanguageModel {
        return language_passages(args, &tokenizer);
    }
    let options = UnlabelledOptions {
        task: plan.task().unwrap_or(TaskType::FeatureExtraction),
        max_seq_length: PROOF_TOKENS,
        columns: args.columns.as_deref().map(split_columns),
        batch_rows: PROOF_ROWS,
    };
    let rows: Vec<UnlabelledRow> = if let Some(data) = &args.data {
        let split = choose_split(data, None, &PROOF_SPLITS)?;
        let path = split_file(data, split)?.unwrap_or_else(|| data.clone());
        let first = Unlabelled::open(&path, &tokenizer, options)?.next();
        let rows = first.transpose()?.unwrap_or_default().into_iter();
        let rows: Result<_, _> = rows.collect();
        rows.map_err(|bad: BadRow| {
            anyhow::anyhow!("{}, line {}: {}", path.display(), bad.line, bad.reason)
        })?
    } else {
        let rows = PASSAGES
            .iter()
            .map(|text| UnlabelledRow::of_text(&tokenizer, text, None, &options));
        rows.collect::<Result<_, _>>()?
    };
    Ok(rows.into_iter().map(|row| row.example.ids).collect())
}

/// The same for a language model.
fn language_passages(args: &MergeArgs, tokenizer: &Tokenizer) -> anyhow::Result<Vec<Vec<u32>>> {
    let Some(data) = &args.data else {
        return Ok(lowrank::merge::passages(tokenizer)?);
    };
    let options = DataOptions {
        max_seq_length: PROOF_TOKENS,
        columns: args.columns.as_deref().map(split_columns),
        ..DataOptions::default()
    };
    let split = choose_split(data, None, &PROOF_SPLITS)?;
    let rows = Dataset::load(data, split, tokenizer, &options)?;
    Ok(rows
        .examples
        .into_iter()
        .take(PROOF_ROWS)
        .map(|example| example.ids)
        .collect())
}

fn text(merged: &Merged, output: &Output) -> String {
    let report = &merged.report;
    let dtype = match merged.dtype {
        BaseDtype::F32 => "f32",
        BaseDtype::Bf16 => "bf16",
    };
    let mut facts = Facts::default();
    facts.add("merged modules", report.modules.to_string());
    facts.add(
        "weights",
        format!("{} as {dtype}", units::bytes(report.bytes)),
    );
    let forced = if report.is_faithful() {
        ""
    } else {
        ", kept because of --force"
    };
    let (difference, limit) = (report.max_logit_difference, report.limit);
    facts.add(
        "largest logit difference",
        format!("{difference:.2e} (limit {limit:.2e}{forced})"),
    );
    if let Some(rounding) = report.rounding_difference {
        facts.add("rounding the base alone", format!("{rounding:.2e}"));
    }
    facts.add(
        "compared on",
        format!("{} tokens", units::grouped(report.tokens as u64)),
    );
    facts.render(
        &format!("written to {}", merged.output.display()),
        output.color,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_are_shown() {
        let merged = Merged {
            output: "merged".into(),
            dtype: BaseDtype::Bf16,
            report: MergeReport {
                modules: 60,
                tokens: 180,
                max_logit_difference: 0.5,
                rounding_difference: Some(0.1),
                limit: 0.4,
                bytes: 269_030_016,
            },
        };
        let output = Output {
            json: false,
            color: false,
            width: 80,
        };
        insta::assert_snapshot!(text(&merged, &output), @r#"
        written to merged
        merged modules            60
        weights                   256.6 MiB as bf16
        largest logit difference  5.00e-1 (limit 4.00e-1, kept because of --force)
        rounding the base alone   1.00e-1
        compared on               180 tokens
        "#);
    }
}
