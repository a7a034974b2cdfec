//! What factors that are rounded to bf16 change, on the built-in model, which is wide enough for the products that round.

use std::path::Path;

use lowrank::base::{Base, Source};
use lowrank::data::{DataOptions, Dataset, Example, Split};
use lowrank::model::{Adapter, Saving};
use lowrank::train::{
    OptimizerState, Silent, StepOptions, TrainConfig, accumulate, optimizer_step, prepare,
};
use lowrank::tuning::Method;
use lowrank::tuning::targets::Targets;
use lowrank::{ComputeDType, DType, Workspace};

pub(crate) fn base() -> Base {
    let source = Source::find("builtin:tiny").expect("the built-in model");
    source.load(DType::Bf16).expect("a model that loads")
}

pub(crate) fn rows(base: &Base, folder: &Path) -> Vec<Example> {
    let (_, files) = lowrank::base::BUILTIN_TASKS[0];
    let path = folder.join("train.jsonl");
    std::fs::write(&path, files[0].1).expect("a file");
    let options = DataOptions::default();
    let data = Dataset::load(&path, Split::File, &base.tokenizer, &options).expect("rows");
    data.examples
}

pub(crate) fn options(compute_dtype: ComputeDType) -> StepOptions<'static> {
    StepOptions {
        learning_rate: 1e-3,
        betas: (0.9, 0.999),
        epsilon: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: 1.0,
        scoring: lowrank::train::Scoring::default(),
        batch_size: 4,
        share_prompts: false,
        saving: Saving {
            dtype: DType::F32,
            ..Saving::default()
        },
        compute_dtype,
        seed: 1,
        pauses: lowrank::kernels::Pauses::NONE,
    }
}

/// An adapter beside all linears, and the losses of the steps that trained it.
fn trained(
    base: &Base,
    rows: &[Example],
    steps: usize,
    compute: ComputeDType,
) -> (Adapter, Vec<f64>) {
    let mut config = TrainConfig::new(Method::Lora, "", "", "");
    config.options.targets.target_modules = Some(Targets::Pattern("all-linear".to_owned()));
    let mut adapter = prepare(&config, &base.network(), &[], &mut Silent)
        .expect("an adapter")
        .adapter;
    let (mut state, ws) = (OptimizerState::new(&adapter), Workspace::new());
    let losses = (0..steps).map(|step| {
        let rows: Vec<&Example> = rows.iter().cycle().skip(4 * step).take(4).collect();
        let options = options(compute);
        optimizer_step(
            &base.decoder,
            &mut adapter,
            &mut state,
            &rows,
            &options,
            &ws,
        )
        .expect("a step")
        .loss
    });
    let losses = losses.collect();
    (adapter, losses)
}

fn gradients(
    base: &Base,
    adapter: &Adapter,
    rows: &[Example],
    compute: ComputeDType,
) -> Vec<Vec<f32>> {
    let (mut state, ws) = (OptimizerState::new(adapter), Workspace::new());
    let rows: Vec<&Example> = rows.iter().take(8).collect();
    let options = options(compute);
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
fn rounded_factors_change_gradients_and_losses_little() {
    let folder = tempfile::tempdir().expect("a folder");
    let base = base();
    let rows = rows(&base, folder.path());
    let (adapter, exact_losses) = trained(&base, &rows, 100, ComputeDType::F32);
    let (_, losses) = trained(&base, &rows, 100, ComputeDType::Bf16);
    for (step, (found, exact)) in losses.iter().zip(&exact_losses).enumerate() {
        let off = (found - exact).abs() / exact;
        assert!(off < 1e-2, "step {step}: {found} and {exact}");
    }
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let off = (mean(&losses) / mean(&exact_losses) - 1.0).abs();
    assert!(off < 1e-3, "the mean of the losses is off by {off:e}");
    let exact = gradients(&base, &adapter, &rows, ComputeDType::F32);
    let found = gradients(&base, &adapter, &rows, ComputeDType::Bf16);
    for ((found, exact), name) in found.iter().zip(&exact).zip(&adapter.names) {
        let square = |x: f32| f64::from(x) * f64::from(x);
        let norm = exact.iter().map(|&x| square(x)).sum::<f64>().sqrt();
        let off = found.iter().zip(exact).map(|(a, b)| square(a - b));
        let off = off.sum::<f64>().sqrt() / norm;
        assert!(off <= 2e-2, "{name}: {off:e}");
    }
}
