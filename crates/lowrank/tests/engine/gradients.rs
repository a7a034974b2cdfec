//! Sums of gradients do not depend on how rows are put into micro-batches, and dropout acts in training alone.

use lowrank::data::Example;
use lowrank::model::{Adapter, AdapterSet, Batch, Decoder, Recompute, Saving, VirtualTokens};
use lowrank::objective::{self, LossSum, NextToken};
use lowrank::train::{OptimizerState, StepOptions, accumulate, batch_of, evaluate};
use lowrank::tuning::full;
use lowrank::{DType, Workspace};

use super::common::{FAMILIES, adapter, all_linear, decoder, difference, examples};
use super::dora;

pub(crate) fn options(batch_size: usize, label_smoothing: f64) -> StepOptions<'static> {
    StepOptions {
        learning_rate: 0.0,
        betas: (0.9, 0.999),
        epsilon: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: 0.0,
        scoring: lowrank::train::Scoring {
            label_smoothing: label_smoothing as f32,
            ..Default::default()
        },
        batch_size,
        share_prompts: false,
        saving: Saving::default(),
        compute_dtype: lowrank::ComputeDType::F32,
        seed: 7,
        pauses: lowrank::kernels::Pauses::NONE,
    }
}

pub(crate) fn gradients(
    model: &Decoder,
    adapter: &Adapter,
    rows: &[Example],
    step: u64,
    options: &StepOptions,
) -> (LossSum, Vec<Vec<f32>>) {
    let mut state = OptimizerState::new(adapter);
    let rows: Vec<&Example> = rows.iter().collect();
    let ws = Workspace::new();
    let (sums, tokens) = accumulate(model, adapter, &mut state.grads, &rows, step, options, &ws)
        .expect("one adapter");
    assert_eq!(tokens, rows.iter().map(|row| row.ids.len()).sum::<usize>());
    let grads = (0..adapter.names.len())
        .map(|slot| state.grads.view(slot).to_vec())
        .collect();
    (sums, grads)
}

#[test]
fn micro_batches_sum_to_the_big_batch() {
    for family in FAMILIES {
        let model = decoder(family);
        let rows = examples();
        for trained in [
            adapter(&model, &all_linear(), 1),
            full::inject(model.weights()),
        ] {
            for smoothing in [0.0, 0.1] {
                let (loss, whole) = gradients(&model, &trained, &rows, 0, &options(5, smoothing));
                assert!(whole.iter().flatten().any(|g| *g != 0.0));
                for batch_size in [1, 2, 3] {
                    let (parts_loss, parts) =
                        gradients(&model, &trained, &rows, 0, &options(batch_size, smoothing));
                    assert_eq!(parts_loss.tokens, loss.tokens);
                    let off = (parts_loss.loss - loss.loss).abs() / loss.loss;
                    assert!(off < 1e-6, "{family}: the losses differ by {off:e}");
                    for ((a, b), name) in parts.iter().zip(&whole).zip(&trained.names) {
                        let off = difference(a, b);
                        assert!(off <= 1e-5, "{family} in {batch_size}s, {name}: {off:e}");
                    }
                }
            }
        }
    }
}

/// Gradients with what the blocks keep left to `recompute` and `dtype`.
pub(crate) fn gradients_saving(
    model: &Decoder,
    adapter: &Adapter,
    recompute: Recompute,
    dtype: DType,
) -> Vec<Vec<f32>> {
    let mut options = options(5, 0.0);
    options.saving = Saving { recompute, dtype };
    gradients(model, adapter, &examples(), 0, &options).1
}

#[test]
fn what_is_computed_again_is_what_was_kept() {
    for family in FAMILIES {
        let model = decoder(family);
        let mut dropping = all_linear();
        dropping.lora_dropout = 0.2;
        for trained in [
            adapter(&model, &all_linear(), 1),
            adapter(&model, &dropping, 2),
            dora::made(&model, all_linear(), 3),
            full::inject(model.weights()),
        ] {
            let kept = gradients_saving(&model, &trained, Recompute::None, DType::F32);
            for recompute in [Recompute::Selective, Recompute::Full] {
                let again = gradients_saving(&model, &trained, recompute, DType::F32);
                assert!(again == kept, "{family}, {recompute}");
            }
        }
    }
}

#[test]
fn activations_kept_as_bf16_change_gradients_little() {
    for family in FAMILIES {
        let model = decoder(family);
        for trained in [
            adapter(&model, &all_linear(), 1),
            dora::made(&model, all_linear(), 3),
            full::inject(model.weights()),
        ] {
            let exact = gradients_saving(&model, &trained, Recompute::None, DType::F32);
            for recompute in [Recompute::None, Recompute::Selective] {
                let kept = gradients_saving(&model, &trained, recompute, DType::Bf16);
                assert!(kept != exact, "nothing was rounded");
                for ((kept, exact), name) in kept.iter().zip(&exact).zip(&trained.names) {
                    let square = |x: f32| f64::from(x) * f64::from(x);
                    let norm = exact.iter().map(|&x| square(x)).sum::<f64>().sqrt();
                    let off = kept.iter().zip(exact).map(|(a, b)| square(a - b));
                    let off = off.sum::<f64>().sqrt();
                    // Rows of 32 numbers average little; tests/real_model.rs has the figure for a real width.
                    assert!(
                        off <= 2e-2 * norm + 1e-7,
                        "{family}, {recompute}, {name}: {off:e} of {norm:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn packed_rows_have_the_loss_of_each_row() {
    for family in FAMILIES {
        let model = decoder(family);
        let trained = adapter(&model, &all_linear(), 1);
        let set = [&trained];
        let (set, ws) = (AdapterSet::new(&set), Workspace::new());
        let rows = examples();
        let loss = |batch: Batch| objective::loss(&model, &batch, set, &NextToken::of(&batch), &ws);
        let packed = loss(batch_of(&rows, VirtualTokens::default()));
        let mut alone = LossSum::default();
        for row in &rows {
            alone.add(loss(batch_of([row], VirtualTokens::default())));
        }
        assert_eq!(packed.tokens, alone.tokens);
        assert_eq!(packed.correct, alone.correct);
        let off = (packed.loss - alone.loss).abs() / alone.loss;
        assert!(off < 1e-6, "{family}: {off:e}");
        let evaluated = evaluate(&model, set, Some(0), &rows, &ws);
        assert_eq!(evaluated, packed, "{family}");
    }
}

#[test]
fn dropout_acts_in_training_alone_and_follows_its_key() {
    let model = decoder("llama");
    let rows = examples();
    let plain = adapter(&model, &all_linear(), 1);
    let mut config = all_linear();
    config.lora_dropout = 0.3;
    let dropped = adapter(&model, &config, 1);
    let options = options(2, 0.0);

    let (first, first_grads) = gradients(&model, &dropped, &rows, 3, &options);
    let (again, again_grads) = gradients(&model, &dropped, &rows, 3, &options);
    assert_eq!(first.loss.to_bits(), again.loss.to_bits());
    assert_eq!(first_grads, again_grads);
    let (other_step, _) = gradients(&model, &dropped, &rows, 4, &options);
    assert_ne!(first.loss.to_bits(), other_step.loss.to_bits());
    let (without, _) = gradients(&model, &plain, &rows, 3, &options);
    assert_ne!(first.loss.to_bits(), without.loss.to_bits());

    let ws = Workspace::new();
    let loss = |adapter: &Adapter| {
        let set = [adapter];
        evaluate(&model, AdapterSet::new(&set), Some(0), &rows, &ws).loss
    };
    assert_eq!(loss(&dropped).to_bits(), loss(&plain).to_bits());
}

/// Each micro-batch must draw masks of its own, or two equal rows would lose the same inputs.
#[test]
fn micro_batches_draw_different_masks() {
    let model = decoder("llama");
    let mut config = all_linear();
    config.lora_dropout = 0.3;
    let dropped = adapter(&model, &config, 1);
    let row = examples().swap_remove(0);
    let twice = [row.clone(), row.clone()];
    let options = options(1, 0.0);
    let (one, _) = gradients(&model, &dropped, &twice[..1], 0, &options);
    let (two, _) = gradients(&model, &dropped, &twice, 0, &options);
    assert_ne!(two.loss, 2.0 * one.loss);
}
