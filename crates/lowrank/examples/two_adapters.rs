//! Trains an adapter for each of two tasks, then continues a prompt with both, and with neither, in one batch. It writes
//! into the system's temporary folder.
//!
//! ```sh
//! cargo run -p lowrank --example two_adapters
//! ```

#![allow(clippy::print_stdout)]

use lowrank::base::{BUILTIN, Base, DType, write_builtin_task};
use lowrank::generate::{GenerateOptions, PromptIds, Workspace, generate};
use lowrank::model::AdapterSet;
use lowrank::train::{Start, TrainConfig, run};
use lowrank::tuning::{self, Method};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let base = Base::load(BUILTIN, DType::F32)?;
    let (tokenizer, mut adapters) = (&base.tokenizer, Vec::new());
    for task in ["cards", "report"] {
        let folder = std::env::temp_dir().join("lowrank-two-adapters").join(task);
        let (data, output) = (folder.join("data"), folder.join("adapter"));
        write_builtin_task(task, &data)?;
        let mut config = TrainConfig::new(Method::Lora, BUILTIN, data, &output);
        (config.max_steps, config.learning_rate) = (Some(10), 5e-3);
        run(&config, Start::Fresh { overwrite: true })?;
        adapters.push(tuning::load(&output, base.decoder.config())?.adapter);
    }

    let ids = tokenizer.encode("name: Emma | animal: goat | text:", false)?;
    let prompts = [None, Some(0), Some(1)].map(|adapter| PromptIds::new(ids.clone(), adapter));
    let options = GenerateOptions::greedy(24, tokenizer.stop_ids());
    let (set, ws) = ([&adapters[0], &adapters[1]], Workspace::new());
    let set = AdapterSet::new(&set);
    let made = generate(&base.decoder, set, &prompts, &options, &ws, |_, _| true);
    for (name, text) in ["neither", "cards", "report"].iter().zip(made) {
        println!("{name:>7}: {}", tokenizer.decode(&text.ids, true)?.trim());
    }
    Ok(())
}
