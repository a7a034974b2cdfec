//! Learning rates and weight decays by group; `scripts/goldens_groups.py` wrote what they come to.

use lowrank::data::Example;
use lowrank::train::{Groups, OptimizerState, TrainConfig, optimizer_step};
use lowrank::tuning::Method;
use lowrank::tuning::lora;
use serde_json::Value;

use crate::Case;
use crate::cases::goldens;

/// The settings of a case, but for what the steps' options say.
fn settings(case: &str) -> TrainConfig {
    let mut config = TrainConfig::new(Method::Lora, "", "", "");
    if case == "loraplus" {
        config.options.lora.loraplus_lr_ratio = Some(8.0);
        return config;
    }
    let owned = |pairs: [(&str, f64); 2]| pairs.map(|(key, x)| (key.to_owned(), x)).to_vec();
    config.lr_pattern = owned([("lora_B", 4.0), ("layers.1", 0.5)]);
    config.weight_decay_pattern = owned([("lora_magnitude_vector", 0.0), ("q_proj.lora_A", 0.5)]);
    config
}

#[test]
fn groups_match_pytorch_and_peft() {
    let text = std::fs::read_to_string(goldens().join("groups.json")).expect("the golden");
    let golden: Value = serde_json::from_str(&text).expect("JSON");
    for case in ["loraplus", "patterns"] {
        let expected = &golden[case];
        let mut run = Case::new(&goldens().join("llama"), |model| {
            let folder = goldens().join("llama/dora");
            lora::load(&folder, model.config())
                .expect("it loads")
                .adapter
        });
        let start: Vec<f32> = run.adapter.params.as_slice().to_vec();
        let mut state = OptimizerState::new(&run.adapter);
        state.groups = Groups::of(&settings(case), &run.adapter).expect("the patterns match");
        let mut options = Case::options(3e-3, 0.0, run.examples.len());
        options.weight_decay = 0.05;
        let rows: Vec<&Example> = run.examples.iter().collect();
        for step in 0..10 {
            let (model, adapter) = (&run.model, &mut run.adapter);
            let done = optimizer_step(model, adapter, &mut state, &rows, &options, &run.ws);
            let loss = done.expect("the step is finite").loss;
            let wanted = expected["losses"][step].as_f64().expect("a number");
            assert!(
                (loss - wanted).abs() < 1e-4 * wanted,
                "{case} {step}: {loss} {wanted}"
            );
        }
        let params = &run.adapter.params;
        for (slot, name) in run.adapter.names.iter().enumerate() {
            let range = params.range(slot);
            let pairs = params.as_slice()[range.clone()].iter().zip(&start[range]);
            let moved = pairs
                .map(|(x, y)| f64::from(x - y).powi(2))
                .sum::<f64>()
                .sqrt();
            let wanted = expected["moved"][name].as_f64().expect("a number");
            assert!(
                (moved - wanted).abs() < 1e-3 * wanted,
                "{case} {name}: {moved} {wanted}"
            );
        }
    }
}
