//! The loss on held-out rows, without and with an adapter. It writes into the system's temporary folder.
//!
//! ```sh
//! cargo run -p lowrank --example evaluate
//! ```

#![allow(clippy::print_stdout)]

use lowrank::base::{BUILTIN, Base, DType, write_builtin_task};
use lowrank::data::{DataOptions, Dataset, Split};
use lowrank::generate::Workspace;
use lowrank::model::AdapterSet;
use lowrank::train::{Start, TrainConfig, evaluate, run};
use lowrank::tuning::{self, Method};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::temp_dir().join("lowrank-evaluate");
    let (data, output) = (folder.join("cards"), folder.join("adapter"));
    write_builtin_task("cards", &data)?;
    let mut config = TrainConfig::new(Method::Lora, BUILTIN, &data, &output);
    (config.max_steps, config.learning_rate) = (Some(10), 5e-3);
    run(&config, Start::Fresh { overwrite: true })?;

    let base = Base::load(BUILTIN, DType::F32)?;
    let adapter = tuning::load(&output, base.decoder.config())?.adapter;
    let options = DataOptions::default();
    let rows = Dataset::load(&data, Split::Test, &base.tokenizer, &options)?.examples;
    let (set, ws) = ([&adapter], Workspace::new());
    let alone = evaluate(&base.decoder, AdapterSet::none(), None, &rows, &ws);
    let adapted = evaluate(&base.decoder, AdapterSet::new(&set), Some(0), &rows, &ws);
    println!("the base alone    {:.3}", alone.mean());
    println!("with the adapter  {:.3}", adapted.mean());
    Ok(())
}
