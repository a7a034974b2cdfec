//! `lowrank adapter export` and `lowrank adapter import`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use lowrank::base::Source;
use lowrank::formats::atomic;
use lowrank::formats::gguf_model::Shapes;
use lowrank::lora_files::{ADAPTER_FILES, ExportOptions, FileDtype, Form, LoraFile, Written};
use lowrank::tuning;
use serde::Serialize;

use crate::commands::modelfile::{self, ModelfileArgs, WrittenModelfile};
use crate::output::Output;
use crate::table::Facts;
use lowrank::fields::finite;

/// Whose files are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum To {
    /// llama.cpp's adapter, a GGUF file
    Gguf,
    /// mlx-lm's folder
    Mlx,
    /// loralib's names in a safetensors file
    Loralib,
    /// PEFT's folder, with nothing else in it
    Peft,
}

/// Arguments of `lowrank adapter export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The adapter's folder
    #[arg(value_name = "ADAPTER")]
    pub adapter: PathBuf,

    /// Whose files to write
    #[arg(long, value_name = "FORM")]
    pub to: To,

    /// The file to write, or the folder for mlx and peft
    #[arg(long, value_name = "PATH")]
    pub output: PathBuf,

    /// The model it belongs to [default: the one that adapter_config.json names]
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,

    /// How the values are stored
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    pub dtype: FileDtype,

    /// Ollama's file.
    #[command(flatten)]
    pub modelfile: ModelfileArgs,

    /// Replace what is at the output, and the Modelfile beside it
    #[arg(long)]
    pub overwrite: bool,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `lowrank adapter import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// A GGUF file of llama.cpp, a folder of mlx-lm or PEFT, or a safetensors file with loralib's names
    #[arg(value_name = "ADAPTER")]
    pub adapter: PathBuf,

    /// The folder to write, as PEFT's
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,

    /// The model it belongs to, which a GGUF file needs and the others are checked against
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,

    /// loralib's lora_alpha, where the file does not say it
    #[arg(long, value_name = "ALPHA", value_parser = finite::<f64>)]
    pub alpha: Option<f64>,

    /// How the values are stored
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    pub dtype: FileDtype,

    /// Replace an adapter in the output folder
    #[arg(long)]
    pub overwrite: bool,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What was exported.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Exported {
    output: PathBuf,
    #[serde(flatten)]
    written: Written,
    bytes: u64,
    /// Ollama's file, where one was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    modelfile: Option<WrittenModelfile>,
}

/// What was imported.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Imported {
    from: Form,
    output: PathBuf,
    modules: usize,
    /// Smallest and largest rank.
    ranks: [usize; 2],
    parameters: u64,
}

/// Runs `adapter export`.
///
/// # Errors
/// An adapter or model that cannot be used, or an output that cannot be written.
pub fn export(args: &ExportArgs) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    let file = LoraFile::read(&args.adapter)?;
    let exported = match args.to {
        To::Gguf => to_gguf(args, &file)?,
        to => {
            let form = match to {
                To::Gguf => Form::Gguf,
                To::Mlx => Form::Mlx,
                To::Loralib => Form::Loralib,
                To::Peft => Form::Peft,
            };
            let written = file.export(&options(args, form, None))?;
            finished(args, written, None)?
        }
    };
    output.result(&exported, |output| shown(args, &exported, output))
}

fn options<'a>(args: &'a ExportArgs, form: Form, shapes: Option<&'a Shapes>) -> ExportOptions<'a> {
    let name = args.adapter.file_name().and_then(|name| name.to_str());
    ExportOptions {
        from: &args.adapter,
        form,
        output: &args.output,
        dtype: args.dtype.into(),
        shapes,
        name: name.unwrap_or("adapter"),
        overwrite: args.overwrite,
    }
}

fn to_gguf(args: &ExportArgs, file: &LoraFile) -> anyhow::Result<Exported> {
    let name = super::base_name(&args.adapter, args.model.as_deref())?;
    let source = super::find_base(&name, args.model.is_some())?;
    let shapes = Shapes::of_config(&source.config()?)?;
    let beside = args.modelfile.beside(&args.output, args.overwrite)?;
    let written = file.export(&options(args, Form::Gguf, Some(&shapes)))?;
    let Some(beside) = beside else {
        return finished(args, written, None);
    };
    // An absolute path holds wherever Ollama is called.
    let from = std::fs::canonicalize(&name).unwrap_or_else(|_| PathBuf::from(&name));
    let made = modelfile::write(
        beside,
        &from.to_string_lossy(),
        Some(&args.output),
        &source.tokenizer()?,
    )?;
    finished(args, written, Some(made))
}

fn finished(
    args: &ExportArgs,
    written: Written,
    modelfile: Option<WrittenModelfile>,
) -> anyhow::Result<Exported> {
    Ok(Exported {
        output: args.output.clone(),
        written,
        bytes: bytes_of(&args.output)?,
        modelfile,
    })
}

/// Bytes of a file, or of the files of a folder.
fn bytes_of(path: &Path) -> std::io::Result<u64> {
    if path.is_file() {
        return Ok(std::fs::metadata(path)?.len());
    }
    let mut sum = 0;
    for entry in std::fs::read_dir(path)? {
        sum += entry?.metadata()?.len();
    }
    Ok(sum)
}

fn shown(args: &ExportArgs, exported: &Exported, output: &Output) -> String {
    let mut facts = Facts::default();
    let modules = exported.written.modules;
    facts.add("modules", modules.to_string());
    if let Some(alpha) = exported.written.alpha {
        facts.add("alpha", format!("{}", alpha as f32));
    }
    if exported.written.folded > 0 {
        facts.add(
            "folded into B",
            format!(
                "{} of {modules} modules, whose scale is another one",
                exported.written.folded
            ),
        );
    }
    facts.add(
        "written",
        format!(
            "{}, {}",
            args.output.display(),
            lowrank::units::bytes(exported.bytes)
        ),
    );
    match args.to {
        To::Gguf => facts.add(
            "use it",
            format!("llama-cli -m MODEL.gguf --lora {}", args.output.display()),
        ),
        To::Mlx => facts.add(
            "use it",
            format!(
                "mlx_lm.generate --model MODEL --adapter-path {}",
                args.output.display()
            ),
        ),
        To::Loralib => facts.add(
            "use it",
            "model.load_state_dict(safetensors.torch.load_file(FILE), strict=False)",
        ),
        To::Peft => {}
    }
    if let Some(modelfile) = &exported.modelfile {
        let path = &modelfile.path;
        facts.add(
            "Ollama",
            format!("ollama create NAME -f {}", path.display()),
        );
    }
    facts.render("Exported", output.color)
}

/// Runs `adapter import`.
///
/// # Errors
/// Files that cannot be read or do not fit the model, or an output that cannot be written.
pub fn import(args: &ImportArgs) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    let source = args.model.as_deref().map(Source::find).transpose()?;
    let shapes = match &source {
        // A GGUF file alone asks for it, and not every family is llama.cpp's.
        Some(source) if args.adapter.is_file() => Shapes::of_config(&source.config()?).ok(),
        _ => None,
    };
    let (from, mut file) = LoraFile::import(&args.adapter, shapes.as_ref(), args.alpha)?;
    if let Some(model) = &args.model {
        file.config.base_model_name_or_path = Some(model.clone());
    }
    lowrank::lora_files::check_folder(&args.output, args.overwrite, ADAPTER_FILES)?;
    atomic::write_folder(&args.output, args.overwrite, |folder| {
        file.write(folder, args.dtype.into())?;
        if let Some(source) = &source {
            tuning::load(folder, &source.model_config()?)?;
        }
        Ok::<_, lowrank::Error>(())
    })?;
    let ranks = || {
        file.modules
            .iter()
            .map(lowrank::lora_files::LoraModule::rank)
    };
    let imported = Imported {
        from,
        output: args.output.clone(),
        modules: file.modules.len(),
        ranks: [ranks().min().unwrap_or(0), ranks().max().unwrap_or(0)],
        parameters: file
            .modules
            .iter()
            .map(|m| (m.a.len() + m.b.len()) as u64)
            .sum(),
    };
    output.result(&imported, |output| {
        let mut facts = Facts::default();
        facts.add(
            "read",
            format!(
                "{}, an adapter of {}",
                args.adapter.display(),
                match from {
                    Form::Gguf => "llama.cpp",
                    Form::Mlx => "mlx-lm",
                    Form::Loralib => "loralib",
                    Form::Peft => "PEFT",
                }
            ),
        );
        let [least, most] = imported.ranks;
        let r = if least == most {
            format!("r {most}")
        } else {
            format!("r {least} to {most}")
        };
        facts.add("modules", format!("{}, {r}", imported.modules));
        facts.add("parameters", lowrank::units::grouped(imported.parameters));
        facts.add("written", args.output.display().to_string());
        facts.render("Imported", output.color)
    })
}
