//! What a training would need, from shapes alone: nothing is loaded.
//!
//! ```sh
//! cargo run -p lowrank --example plan
//! ```

#![allow(clippy::print_stdout)]

use lowrank::base::{BUILTIN, Source};
use lowrank::plan::{PlanOptions, plan, presets};
use lowrank::train::TrainConfig;
use lowrank::units::{bytes, grouped};

fn main() -> Result<(), lowrank::Error> {
    let mut config = TrainConfig {
        max_seq_length: 256,
        ..TrainConfig::default()
    };
    for (name, model) in [
        (BUILTIN, Source::find(BUILTIN)?.model_config()?),
        ("smollm2-135m", presets::config("smollm2-135m")?),
        ("llama-3-8b", presets::config("llama-3-8b")?),
    ] {
        for rank in [4, 64] {
            config.options.lora.r = rank;
            let plan = plan(&PlanOptions::new(name, &model, &config))?;
            println!(
                "{name}, rank {rank}: {} trained values, {} of memory; all of them: {}",
                grouped(plan.method.trainable_parameters),
                bytes(plan.method.peak_memory),
                bytes(plan.full.peak_memory)
            );
        }
    }
    Ok(())
}
