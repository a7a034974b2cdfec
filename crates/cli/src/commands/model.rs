//! `lowrank model import`, `lowrank model pull` and `lowrank model inspect`; [`export`].

pub mod export;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use indicatif::ProgressBar;
use lowrank::base::Source;
use lowrank::hub;
use lowrank::import::{ImportReport, import_gguf};
use lowrank::report::inspect::{self, ModelReport, TensorReport};
use lowrank::train::BaseDtype;
use lowrank::units;
use serde::Serialize;

use crate::output::Output;
use crate::progress::{self, Mode};
use crate::table::{Align, Facts, Table};

/// Commands about models.
#[derive(Debug, Subcommand)]
pub enum ModelCommands {
    /// Write a GGUF file as a folder in the Hugging Face layout
    Import(ImportArgs),
    /// Write a model as a GGUF file for llama.cpp and Ollama, quantized if wanted
    #[command(visible_alias = "quantize")]
    Export(export::ExportArgs),
    /// Fetch a model from the Hugging Face Hub into its cache
    Pull(PullArgs),
    /// Show a model's family, shapes, element types and parameters
    Inspect(InspectArgs),
}

/// Arguments of `lowrank model import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The GGUF file
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// The folder to write
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,

    /// How the weights are stored; quantized ones become the values they stand for
    #[arg(long, value_name = "DTYPE", default_value = "bf16")]
    pub dtype: BaseDtype,

    /// Replace a model in the output folder
    #[arg(long)]
    pub overwrite: bool,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `lowrank model pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// The model's id, owner/name
    #[arg(value_name = "ID")]
    pub id: String,

    /// A branch, tag or commit
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `lowrank model inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A folder in the Hugging Face layout, an id that was pulled, or builtin:tiny
    #[arg(value_name = "MODEL")]
    pub model: String,

    /// List every tensor of every layer, not one line for all layers
    #[arg(long)]
    pub tensors: bool,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// A model that cannot be fetched or read.
pub fn run(command: ModelCommands, progress: Mode) -> anyhow::Result<()> {
    match command {
        ModelCommands::Import(args) => import(&args),
        ModelCommands::Export(args) => export::run(&args),
        ModelCommands::Pull(args) => pull(&args, progress),
        ModelCommands::Inspect(args) => {
            let output = Output::detect(args.json);
            let report = inspect::model(&Source::find(&args.model)?)?;
            output.result(&report, |output| text(&report, args.tensors, output))
        }
    }
}

#[derive(Serialize)]
struct Imported<'a> {
    output: &'a Path,
    #[serde(flatten)]
    report: ImportReport,
}

fn import(args: &ImportArgs) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    tracing::info!("importing {}", args.file.display());
    let report = import_gguf(&args.file, &args.output, args.dtype.into(), args.overwrite)?;
    let imported = Imported {
        output: &args.output,
        report,
    };
    output.result(&imported, |output| {
        let report = &imported.report;
        let mut facts = Facts::default();
        facts.add(
            "tensors",
            format!("{} ({})", report.tensors, report.types.join(", ")),
        );
        facts.add("weights", units::bytes(report.bytes));
        facts.add(
            "chat template",
            if report.chat_template { "yes" } else { "none" },
        );
        facts.render(
            &format!("written to {}", args.output.display()),
            output.color,
        )
    })
}

#[derive(Serialize)]
struct Pulled<'a> {
    model: &'a str,
    folder: PathBuf,
}

fn pull(args: &PullArgs, progress: Mode) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    let folder = hub::pull(&args.id, args.revision.as_deref(), |_| Download {
        mode: progress,
        bar: ProgressBar::hidden(),
    })?;
    let pulled = Pulled {
        model: &args.id,
        folder,
    };
    output.result(&pulled, |_| {
        format!(
            "{}\nuse it with --model {}",
            pulled.folder.display(),
            args.id
        )
    })
}

/// A file on its way.
struct Download {
    mode: Mode,
    bar: ProgressBar,
}

impl hub::Progress for Download {
    fn init(&mut self, size: usize, name: &str) {
        self.bar = progress::bytes(self.mode, size as u64, name.to_string());
    }

    fn update(&mut self, size: usize) {
        self.bar.inc(size as u64);
    }

    fn finish(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn text(report: &ModelReport, every_tensor: bool, output: &Output) -> String {
    let mut facts = Facts::default();
    facts.add("family", report.family);
    facts.add("parameters", units::grouped(report.parameters));
    let dtypes = report
        .dtypes
        .iter()
        .map(|(dtype, bytes)| format!("{} of {dtype}", units::bytes(*bytes)));
    facts.add("weights", dtypes.collect::<Vec<_>>().join(", "));
    for (name, value) in &report.shapes {
        facts.add(name, value.to_string());
    }
    facts.add(
        "tie_word_embeddings",
        report.tie_word_embeddings.to_string(),
    );
    facts.add(
        "tokenizer",
        report
            .tokenizer_tokens
            .map_or("none".to_string(), |tokens| format!("{tokens} tokens")),
    );
    facts.add(
        "chat template",
        if report.chat_template { "yes" } else { "none" },
    );
    facts.add("LoRA's default targets", report.default_targets.join(", "));
    let mut table = Table::new([
        ("Tensor", Align::Left),
        ("Shape", Align::Right),
        ("Type", Align::Left),
        ("Parameters", Align::Right),
    ]);
    for (name, tensor, count) in rows(&report.tensors, every_tensor) {
        let shape: Vec<String> = tensor.shape.iter().map(ToString::to_string).collect();
        let values = tensor.shape.iter().product::<usize>() as u64 * count;
        table.row([
            name,
            shape.join(" × "),
            tensor.dtype.clone(),
            units::grouped(values),
        ]);
    }
    let facts = facts.render(&report.model, output.color);
    format!("{facts}\n{}", table.render(output.width, output.color))
}

/// The tensors of a table: name, one tensor and how many are like it. Tensors that differ in their layer alone share a
/// row, `model.layers.{0–29}.mlp.up_proj.weight`, in the order of the first of them.
fn rows(tensors: &[TensorReport], every: bool) -> Vec<(String, &TensorReport, u64)> {
    if every {
        return tensors
            .iter()
            .map(|tensor| (tensor.name.clone(), tensor, 1))
            .collect();
    }
    let mut groups: BTreeMap<_, Vec<(usize, &TensorReport)>> = BTreeMap::new();
    for tensor in tensors {
        let (pattern, layer) = without_layer(&tensor.name);
        groups
            .entry((pattern, &tensor.shape, &tensor.dtype))
            .or_default()
            .push((layer, tensor));
    }
    let rows = groups.into_iter().map(|((pattern, ..), members)| {
        let layers = || members.iter().map(|(layer, _)| *layer);
        let (low, high) = (layers().min().unwrap_or(0), layers().max().unwrap_or(0));
        let range = if low == high {
            low.to_string()
        } else {
            format!("{{{low}–{high}}}")
        };
        (
            pattern.replacen('\0', &range, 1),
            members[0].1,
            members.len() as u64,
        )
    });
    rows.collect()
}

/// The name with a NUL for its layer's number, and the number.
fn without_layer(name: &str) -> (String, usize) {
    let parts: Vec<&str> = name.split('.').collect();
    match parts
        .iter()
        .enumerate()
        .find_map(|(index, part)| Some((index, part.parse::<usize>().ok()?)))
    {
        Some((index, layer)) => {
            let mut parts = parts;
            parts[index] = "\0";
            (parts.join("."), layer)
        }
        None => (name.to_string(), 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_share_rows() {
        let tensor = |name: &str, shape: &[usize]| TensorReport {
            name: name.to_string(),
            shape: shape.to_vec(),
            dtype: "BF16".to_string(),
        };
        let report = ModelReport {
            model: "models/tiny".to_string(),
            family: "llama",
            parameters: 1_234_567,
            bytes: 2_469_134,
            dtypes: BTreeMap::from([("BF16".to_string(), 2_469_134)]),
            shapes: vec![("num_hidden_layers", 2), ("hidden_size", 64)],
            tie_word_embeddings: true,
            tokenizer_tokens: Some(1000),
            chat_template: false,
            default_targets: vec!["q_proj", "v_proj"],
            tensors: vec![
                tensor("model.embed_tokens.weight", &[1000, 64]),
                tensor("model.layers.0.mlp.up_proj.weight", &[256, 64]),
                tensor("model.layers.1.mlp.up_proj.weight", &[256, 64]),
                tensor("model.norm.weight", &[64]),
            ],
        };
        let output = Output {
            json: false,
            color: false,
            width: 100,
        };
        insta::assert_snapshot!(text(&report, false, &output), @r#"
        models/tiny
        family                  llama
        parameters              1,234,567
        weights                 2.4 MiB of BF16
        num_hidden_layers       2
        hidden_size             64
        tie_word_embeddings     true
        tokenizer               1000 tokens
        chat template           none
        LoRA's default targets  q_proj, v_proj

        Tensor                                     Shape  Type  Parameters
        model.embed_tokens.weight              1000 × 64  BF16      64,000
        model.layers.{0–1}.mlp.up_proj.weight   256 × 64  BF16      32,768
        model.norm.weight                             64  BF16          64
        "#);
        assert_eq!(rows(&report.tensors, true).len(), 4);
    }
}
