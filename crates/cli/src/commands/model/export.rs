//! `lowrank model export`.

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use lowrank::base::Source;
use lowrank::export::{
    ExportReport, FileType, FolderReport, FolderType, FourBitKind, own_rows, write_model,
    write_quantized_folder,
};
use lowrank::model::Purpose;
use lowrank::units;
use serde::Serialize;

use crate::commands::modelfile::{self, ModelfileArgs, WrittenModelfile};
use crate::failure::Misuse;
use crate::output::Output;
use crate::table::Facts;

/// Whose file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum To {
    /// llama.cpp's and Ollama's file
    Gguf,
    /// A folder as transformers saves it with bitsandbytes
    Bitsandbytes,
}

/// How the weights are stored, and so whose form it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportType {
    /// Of a GGUF file.
    File(FileType),
    /// Of a folder.
    Folder(FolderType),
}

/// The types of folders.
const FOLDER_TYPES: [(&str, FolderType); 3] = [
    ("NF4", FolderType::FourBit(FourBitKind::Nf4)),
    ("FP4", FolderType::FourBit(FourBitKind::Fp4)),
    ("INT8", FolderType::EightBit),
];

/// Reads a type by its name; the help lists them.
fn export_type() -> impl TypedValueParser<Value = ExportType> {
    let of_files = FileType::value_variants().iter();
    let of_files = of_files.filter_map(FileType::to_possible_value);
    let of_folders = [
        "4.1 bits, bitsandbytes'",
        "4.1 bits, floats",
        "8 bits, bitsandbytes'",
    ];
    let of_folders = FOLDER_TYPES.iter().zip(of_folders);
    let of_folders = of_folders.map(|((name, _), help)| PossibleValue::new(*name).help(help));
    PossibleValuesParser::new(of_files.chain(of_folders)).map(|name| {
        let folder = FOLDER_TYPES
            .iter()
            .find(|(known, _)| name.eq_ignore_ascii_case(known));
        match folder {
            Some((_, folder)) => ExportType::Folder(*folder),
            None => ExportType::File(FileType::from_str(&name, true).unwrap_or(FileType::Bf16)),
        }
    })
}

/// Arguments of `lowrank model export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// A folder in the Hugging Face layout, a GGUF file, an id that was pulled, or builtin:tiny
    #[arg(value_name = "MODEL")]
    pub model: String,

    /// Whose form to write [default: what the type is of]
    #[arg(long, value_name = "FORM")]
    pub to: Option<To>,

    /// The GGUF file to write, or bitsandbytes' folder
    #[arg(long, value_name = "PATH")]
    pub output: PathBuf,

    /// How the weights are stored, as llama-quantize and bitsandbytes name it [default: BF16, or NF4 for bitsandbytes]
    #[arg(
        long = "type",
        value_name = "TYPE",
        ignore_case = true,
        value_parser = export_type()
    )]
    pub file_type: Option<ExportType>,

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
    let file_type = match chosen(args)? {
        ExportType::File(file_type) => file_type,
        ExportType::Folder(folder_type) => return quantize(args, folder_type, &output),
    };
    let beside = args.modelfile.beside(&args.output, args.overwrite)?;
    let source = Source::find(&args.model)?;
    let weights = source.weights_for(source.exact_dtype()?, Purpose::LanguageModel)?;
    let report = write_model(
        &source,
        weights.config(),
        &args.output,
        file_type,
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

/// The type, which has to be one of the form.
fn chosen(args: &ExportArgs) -> Result<ExportType, Misuse> {
    let default = match args.to {
        None | Some(To::Gguf) => ExportType::File(FileType::Bf16),
        Some(To::Bitsandbytes) => ExportType::Folder(FOLDER_TYPES[0].1),
    };
    let chosen = args.file_type.unwrap_or(default);
    match (args.to, chosen) {
        (Some(To::Gguf), ExportType::Folder(_)) => Err(Misuse::new(
            "--type is one of bitsandbytes' folders, and --to is gguf; leave out --to",
        )),
        (Some(To::Bitsandbytes), ExportType::File(_)) => Err(Misuse::new(
            "--type is one of GGUF files, and --to is bitsandbytes, whose types are NF4, FP4 and INT8",
        )),
        _ => Ok(chosen),
    }
}

/// A folder that was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Quantized {
    output: PathBuf,
    #[serde(flatten)]
    report: FolderReport,
}

fn quantize(args: &ExportArgs, folder_type: FolderType, output: &Output) -> anyhow::Result<()> {
    let source = Source::find(&args.model)?;
    let purpose = source.purpose()?.0;
    let report =
        write_quantized_folder(&source, purpose, folder_type, &args.output, args.overwrite)?;
    let quantized = Quantized {
        output: args.output.clone(),
        report,
    };
    output.result(&quantized, |output| {
        let mut facts = Facts::default();
        facts.add("matrices", quantized.report.matrices.to_string());
        facts.add(
            "as they were",
            format!("{} tensors", quantized.report.others),
        );
        facts.add("size", units::bytes(quantized.report.bytes));
        let title = format!("written to {}", quantized.output.display());
        facts.render(&title, output.color)
    })
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
