//! Folds an adapter into its base's weights: a model that needs no adapter, proved to compute the same. It writes into the
//! system's temporary folder.
//!
//! ```sh
//! cargo run -p lowrank --example merge
//! ```

#![allow(clippy::print_stdout)]

use lowrank::base::{BUILTIN, Base, DType, write_builtin_task};
use lowrank::merge::{MergeOptions, merge, passages};
use lowrank::train::{Start, TrainConfig, run};
use lowrank::tuning::{self, Method};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::temp_dir().join("lowrank-merge");
    let (data, output) = (folder.join("report"), folder.join("adapter"));
    write_builtin_task("report", &data)?;
    let mut config = TrainConfig::new(Method::Lora, BUILTIN, data, &output);
    config.max_steps = Some(5);
    run(&config, Start::Fresh { overwrite: true })?;

    let base = Base::load(BUILTIN, DType::F32)?;
    let adapter = tuning::load(&output, base.decoder.config())?.adapter;
    let (text, merged) = (passages(&base.tokenizer)?, folder.join("merged"));
    let mut options = MergeOptions::new(&base.source, &adapter, &text, &merged);
    options.overwrite = true;
    let report = merge(&options)?;
    println!("linears          {}", report.modules);
    println!("logits differ by {:.1e}", report.max_logit_difference);
    println!("the model is in  {}", merged.display());
    Ok(())
}
