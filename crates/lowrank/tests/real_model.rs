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
use lowrank::{ComputeDType, DType, Workspace};

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
        compute_dtype: ComputeDType::F32,
        seed: 1,
        pauses: lowrank::kernels::Pauses::NONE,
    }
}

fn gradients(
    base: &Base,
    adapter: &Adapter,
    rows: &[Example],
    saving: Saving,
    compute_dtype: ComputeDType,
) -> Vec<Vec<f32>> {
    let options = StepOptions {
        compute_dtype,
        ..options(rows.len(), saving)
    };
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
fn what_is_rounded_changes_gradients_little() {
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
    let with = |recompute, dtype, compute| {
        gradients(&base, &adapter, &rows, Saving { recompute, dtype }, compute)
    };
    let exact = with(Recompute::None, DType::F32, ComputeDType::F32);
    for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
        for compute in [ComputeDType::F32, ComputeDType::Bf16x2, ComputeDType::Bf16] {
            let found = with(recompute, DType::Bf16, compute);
            let off = Off::new(&found, &exact);
            eprintln!("{recompute}, factors {compute:?}: {off:?}");
            if compute == ComputeDType::Bf16 {
                // PyTorch's autocast of this model: whole 3e-2, the tensor in the middle 3e-2, the worst 9e-2.
                assert!(off.whole <= 2e-2 && off.median <= 2e-2 && off.most <= 0.2);
            } else {
                assert!(off.most <= 1e-2);
            }
        }
    }
}

/// ‖found - exact‖ / ‖exact‖ of gradients.
#[derive(Debug)]
struct Off {
    whole: f64,
    median: f64,
    most: f64,
}

impl Off {
    fn new(found: &[Vec<f32>], exact: &[Vec<f32>]) -> Self {
        let square = |x: f32| f64::from(x) * f64::from(x);
        let squares = found.iter().zip(exact).map(|(found, exact)| {
            let off = found.iter().zip(exact).map(|(a, b)| square(a - b));
            (
                off.sum::<f64>(),
                exact.iter().map(|&x| square(x)).sum::<f64>(),
            )
        });
        let squares: Vec<(f64, f64)> = squares.collect();
        let mut each: Vec<f64> = squares
            .iter()
            .map(|(off, all)| (off / all).sqrt())
            .collect();
        each.sort_by(f64::total_cmp);
        let (off, all) = squares
            .iter()
            .fold((0.0, 0.0), |sum, (off, all)| (sum.0 + off, sum.1 + all));
        Self {
            whole: (off / all).sqrt(),
            median: each[each.len() / 2],
            most: each[each.len() - 1],
        }
    }
}
