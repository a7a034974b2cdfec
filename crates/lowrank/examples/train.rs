//! Trains a LoRA adapter on rows of one's own and watches the loss. It writes into the system's temporary folder.
//!
//! ```sh
//! cargo run -p lowrank --example train
//! ```

#![allow(clippy::print_stdout)]

use std::sync::atomic::AtomicBool;

use lowrank::base::BUILTIN;
use lowrank::train::{Event, Observer, Start, TrainConfig, train};
use lowrank::tuning::Method;

struct Watch;

impl Observer for Watch {
    fn event(&mut self, event: &Event) {
        if let Event::Step(step) = event {
            println!("step {:>2}  loss {:.3}", step.step, step.loss);
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::temp_dir().join("lowrank-train");
    let (data, output) = (folder.join("rows.jsonl"), folder.join("adapter"));
    std::fs::create_dir_all(&folder)?;
    let rows = ["Ada", "Ben", "Cleo", "Dov"]
        .map(|name| format!(r#"{{"prompt": "I am {name}.", "completion": " Hello, {name}!"}}"#));
    std::fs::write(&data, rows.join("\n"))?;

    let mut config = TrainConfig::new(Method::Lora, BUILTIN, data, output);
    (config.max_steps, config.learning_rate) = (Some(20), 5e-3);
    let start = Start::Fresh { overwrite: true };
    let outcome = train(&config, start, &mut Watch, &AtomicBool::new(false))?;
    println!("the adapter is in {}", outcome.output.display());
    Ok(())
}
