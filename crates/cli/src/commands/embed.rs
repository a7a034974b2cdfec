//! `lowrank embed`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use lowrank::Workspace;
use lowrank::classify::embed;
use lowrank::data::TaskType;
use lowrank::model::{Pooling, Purpose};
use lowrank::tuning;
use serde_json::json;

use super::common::{BaseArgs, check_is_adapter, warn_of_other_base};
use super::texts::TextsArgs;
use crate::output::not_written;

/// Arguments of `lowrank embed`.
#[derive(Debug, Args)]
pub struct EmbedArgs {
    /// The model
    #[command(flatten)]
    pub base: BaseArgs,

    /// An adapter that was trained for it (task_type FEATURE_EXTRACTION)
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,

    /// What is given a vector
    #[command(flatten)]
    pub texts: TextsArgs,

    /// Which hidden states a vector is made of
    #[arg(long, value_name = "HOW", default_value = "mean")]
    pub pooling: PoolingArg,

    /// Leave vectors as long as they are, in place of making them as long as one
    #[arg(long)]
    pub no_normalize: bool,

    /// Print a JSON object a row, as it does in any case
    #[arg(long)]
    pub json: bool,
}

/// Which hidden states a vector is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PoolingArg {
    /// The mean of all tokens
    Mean,
    /// The first token, the one that stands for the whole text in encoders
    Cls,
    /// The last token
    Last,
}

/// Runs the command. It prints a JSON object a row.
///
/// # Errors
/// A model, adapter or data that cannot be used.
pub fn run(args: &EmbedArgs) -> anyhow::Result<()> {
    let source = args.base.source()?;
    let tokenizer = Arc::new(source.tokenizer()?);
    let network = source.load_for(args.base.base_dtype.into(), Purpose::Features, None, 0)?;
    let model = &network.decoder;
    let adapter = match &args.adapter {
        None => None,
        Some(folder) => {
            check_is_adapter(folder)?;
            let loaded = tuning::load(folder, model.config())?;
            warn_of_other_base(folder, &loaded, model.weights(), &network.source);
            Some(loaded.adapter)
        }
    };
    let pooling = match args.pooling {
        PoolingArg::Mean => Pooling::Mean,
        PoolingArg::Cls => Pooling::First,
        PoolingArg::Last => Pooling::Last,
    };
    let most = model.config().longest_sequence();
    let ws = Workspace::new();
    let task = TaskType::FeatureExtraction;
    args.texts.for_each_batch(&tokenizer, task, most, |rows| {
        let examples: Vec<_> = rows.iter().map(|row| row.example.clone()).collect();
        let normalize = !args.no_normalize;
        let vectors = embed(model, adapter.as_ref(), &examples, pooling, normalize, &ws);
        let mut out = io::stdout().lock();
        for (row, vector) in rows.into_iter().zip(vectors) {
            let mut said = json!({"line": row.example.line, "text": row.text});
            if let Some(pair) = row.pair {
                said["text_pair"] = pair.into();
            }
            if row.example.truncated > 0 {
                said["cut_tokens"] = row.example.truncated.into();
            }
            said["embedding"] = json!(vector);
            writeln!(out, "{said}").map_err(not_written)?;
        }
        out.flush().map_err(not_written)
    })
}
