//! What holds on a model of real size. `LOWRANK_TEST_MODEL` names its folder; without it these tests pass and say so.

use std::path::Path;

use lowrank::base::{Base, Source};
use lowrank::data::{DataOptions, Dataset, Example, Split};
use lowrank::model::{Adapter, Recompute, Saving};
use lowrank::train::{
    OptimizerState, Silent, StepOptions, TrainConfig, accumulate, optimizer_step, prepare,
};
use lowrank::tuning::Method;
use lowrank::tuning::targets::Targets;
use lowrank::{ActivationDType, DType, Workspace};

fn model() -> Option<Base> {
    let Some(folder) = std::env::var_os("LOWRANK_TEST_MODEL") else {
        eprintln!("skipped: LOWRANK_TEST_MODEL names no model folder");
        return None;
    };
    let source = Source::find(&folder.to_string_lossy()).expect("a model");
    Some(source.load(DType::Bf16).expect("a model that loads"))
}

/// The built-in task's rows, written to a file that the loader reads.
fn rows(base: &Base, folder: &Path) -> Vec<Example> {
    let (_, files) = lowrank::base::BUILTIN_TASKS[0];
    let path = folder.join("train.jsonl");
    std::fs::write(&path, files[0].1).expect("a file");
    let options = DataOptions::default();
    let data = Dataset::load(&path, Split::File, &base.tokenizer, &options).expect("rows");
    data.examples.into_iter().take(8).collect()
}

fn options(batch_size: usize, saving: Saving) -> StepOptions<'static> {
    StepOptions {
        learning_rate: 0.0,
        betas: (0.9, 0.999),
        epsilon: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: 0.0,
        scoring: lowrank::train::Scoring::default(),
        batch_size,
        share_prompts: false,
        saving,
        seed: 1,
        pauses: lowrank::kernels::Pauses::NONE,
    }
}

fn gradients(base: &Base, adapter: &Adapter, rows: &[Example], saving: Saving) -> Vec<Vec<f32>> {
    let options = options(rows.len(), saving);
    let mut state = OptimizerState::new(adapter);
    let rows: Vec<&Example> = rows.iter().collect();
    let ws = Workspace::new();
    accumulate(
        &base.decoder,
        adapter,
        &mut state.grads,
        &rows,
        0,
        &options,
        &ws,
    )
    .expect("one adapter");
    (0..adapter.names.len())
        .map(|slot| state.grads.view(slot).to_vec())
        .collect()
}

#[test]
fn activations_kept_as_bf16_change_no_gradient_by_a_hundredth() {
    let Some(base) = model() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let rows = rows(&base, folder.path());
    let mut config = TrainConfig::new(Method::Lora, "", "", "");
    config.options.targets.target_modules = Some(Targets::Pattern("all-linear".to_owned()));
    let mut adapter = prepare(&config, &base.network(), &[], &mut Silent)
        .expect("an adapter")
        .adapter;
    // B ≠ 0, or A would have no gradient.
    let mut state = OptimizerState::new(&adapter);
    let few: Vec<&Example> = rows.iter().take(2).collect();
    for _ in 0..3 {
        let options = StepOptions {
            learning_rate: 1e-3,
            ..options(2, Saving::default())
        };
        let ws = Workspace::new();
        optimizer_step(&base.decoder, &mut adapter, &mut state, &few, &options, &ws)
            .expect("a step");
    }
    let with = |recompute, dtype| gradients(&base, &adapter, &rows, Saving { recompute, dtype });
    let exact = with(Recompute::None, ActivationDType::F32);
    for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
        let kept = with(recompute, ActivationDType::Bf16);
        let mut worst = (0.0, "");
        for ((kept, exact), name) in kept.iter().zip(&exact).zip(&adapter.names) {
            let square = |x: f32| f64::from(x) * f64::from(x);
            let norm = exact.iter().map(|&x| square(x)).sum::<f64>().sqrt();
            let off = kept.iter().zip(exact).map(|(a, b)| square(a - b));
            let off = off.sum::<f64>().sqrt() / norm;
            if off > worst.0 {
                worst = (off, name);
            }
        }
        eprintln!("{recompute}: at most {:.2e}, {}", worst.0, worst.1);
        assert!(worst.0 <= 1e-2, "{recompute}, {}: {:e}", worst.1, worst.0);
    }
}
