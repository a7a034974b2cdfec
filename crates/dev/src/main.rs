//! The commands of `cargo dev`.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};
use lowrank::bench::{q4_k_m, write_random_gguf};
use lowrank::plan::presets;
use lowrank_dev::{builtin, corpus, edges, pretrain, tidy};

/// Regenerates what the repository holds, and checks that it is in order.
#[derive(Parser)]
#[command(name = "cargo dev")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Writes the built-in model's configuration, tokenizer and tasks; the weights come from `builtin-model`
    BuiltinData {
        /// Write nothing; fail when a file is not what would be written
        #[arg(long)]
        check: bool,
    },
    /// Pretrains the built-in model and writes its weights
    BuiltinModel {
        /// The run's folder
        #[arg(long, default_value = "target/builtin-model")]
        output: PathBuf,
        /// Optimizer steps
        #[arg(long, default_value_t = 8000)]
        steps: u64,
        /// Go on with the run in that folder
        #[arg(long)]
        resume: bool,
    },
    /// Prints documents of the corpus that the built-in model learns from
    Corpus {
        /// Which corpus
        #[arg(long, default_value_t = 42)]
        seed: u64,
        /// How many documents
        #[arg(long, default_value_t = 10)]
        count: u64,
        /// Stories alone
        #[arg(long)]
        stories: bool,
    },
    /// Writes a GGUF file of random blocks with the shapes of a preset, to measure with
    RandomGguf {
        /// A preset of `lowrank plan`, of the family llama
        #[arg(long)]
        preset: String,
        /// How matrices are stored: a type of ggml, or its mix Q4_K_M
        #[arg(long = "type", default_value = "Q4_K_M")]
        kind: String,
        /// The file
        #[arg(long)]
        output: PathBuf,
    },
    /// Checks tracked files for machine paths, unfinished work, length, and dependencies without a reason
    Tidy,
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::RandomGguf {
            preset,
            kind,
            output,
        } => random_gguf(&preset, &kind, &output),
        Command::BuiltinData { check } => builtin::update(&root()?, check),
        Command::BuiltinModel {
            output,
            steps,
            resume,
        } => pretrain::pretrain(&root()?, &output, steps, resume),
        Command::Corpus {
            seed,
            count,
            stories,
        } => {
            let documents: Box<dyn Iterator<Item = String>> = if stories {
                Box::new((0..count).map(|index| corpus::story(seed.wrapping_add(index))))
            } else {
                Box::new(corpus::corpus(seed, count))
            };
            print(documents)
        }
        Command::Tidy => {
            let mut complaints = tidy::complaints(&root()?)?;
            complaints.extend(edges::complaints(&root()?)?);
            if complaints.is_empty() {
                return Ok(());
            }
            bail!("the repository is not tidy:\n  {}", complaints.join("\n  "));
        }
    }
}

/// Prints documents with the end token after each, until the reader has gone.
fn print(documents: impl Iterator<Item = String>) -> Result<()> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let write = || -> std::io::Result<()> {
        for document in documents {
            writeln!(out, "{document}{}", corpus::END_OF_TEXT)?;
        }
        out.flush()
    };
    match write() {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot print the corpus")
        }
        _ => Ok(()),
    }
}

/// The root of the repository, from the current folder upwards.
fn root() -> Result<PathBuf> {
    let here = std::env::current_dir().context("cannot read the current folder")?;
    let root = here
        .ancestors()
        .find(|folder| folder.join("crates/dev/Cargo.toml").is_file());
    root.map(PathBuf::from)
        .context("this is not the repository of lowrank; change into it and try again")
}

fn random_gguf(preset: &str, kind: &str, output: &Path) -> Result<()> {
    let config = presets::config(preset)?;
    let layers = config.num_hidden_layers;
    write_random_gguf(output, &config, &|layer, name| match kind {
        "Q4_K_M" => q4_k_m(layers, layer, name),
        kind => kind,
    })?;
    Ok(())
}
