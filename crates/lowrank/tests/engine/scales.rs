//! Factors of a linear's columns, which an adapter's table may hold beside its branches.

use std::collections::HashMap;
use std::fs;

use lowrank::base::Source;
use lowrank::data::Example;
use lowrank::model::{
    Adapter, AdapterSet, Decoder, PassOptions, Recompute, Saving, ScaleSite, VirtualTokens,
};
use lowrank::objective::{self, NextToken, loss_and_gradients};
use lowrank::train::{OptimizerState, batch_of};
use lowrank::{DType, Workspace};
use lowrank_kernels::{Layout, Tensor, fill_uniform};

use super::common::{
    Place, adapter, all_linear, decoder, difference, examples, ids, logits, merge_f32, open,
};

/// Factors near 1 of every linear's input and output, beside branches at every linear.
fn scaled(model: &Decoder, with_branches: bool) -> Adapter {
    let branches = with_branches.then(|| adapter(model, &all_linear(), 3));
    let mut params: Vec<_> = branches.iter().flat_map(named).collect();
    let mut table = HashMap::new();
    for id in model.config().linears() {
        let (inputs, outputs) = model.config().linear_shape(id.kind);
        let at = params.len();
        params.push((format!("{id:?} in"), (1, inputs)));
        params.push((format!("{id:?} out"), (1, outputs)));
        let (input, output) = (Some(at), Some(at + 1));
        table.insert(id, ScaleSite { input, output });
    }
    let mut made = Adapter::new(params);
    made.scaled = table;
    fill_uniform(made.params.flat_mut(), 0.6, 1.4, 11);
    if let Some(branches) = branches {
        for slot in 0..branches.names.len() {
            let values = branches.params.view(slot);
            made.params.view_mut(slot).copy_from(values);
        }
        made.low_rank = branches.low_rank;
    }
    made
}

fn named(adapter: &Adapter) -> Vec<(String, (usize, usize))> {
    let slots = adapter.names.iter().enumerate();
    slots
        .map(|(slot, name)| (name.clone(), adapter.params.shape(slot)))
        .collect()
}

/// The loss of rows as one batch, and its gradient, all slots one after the other.
pub(super) fn gradients(
    model: &Decoder,
    made: &Adapter,
    rows: &[Example],
    recompute: Recompute,
) -> (f64, Vec<f32>) {
    let batch = batch_of(rows, VirtualTokens::default());
    let (set, ws) = ([made], Workspace::new());
    let set = AdapterSet::new(&set);
    let mut grads = OptimizerState::new(made).grads;
    let options = PassOptions {
        saving: Saving {
            recompute,
            dtype: DType::F32,
        },
        ..PassOptions::default()
    };
    let labels = NextToken::of(&batch);
    let sums = loss_and_gradients(model, &batch, set, &labels, &mut grads, &options, &ws);
    (sums.expect("one adapter").loss, grads.flat().to_vec())
}

#[test]
fn factors_have_the_gradients_of_finite_differences() {
    let rows = examples();
    for family in ["llama", "qwen2", "gpt2"] {
        let model = decoder(family);
        for with_branches in [false, true] {
            let mut made = scaled(&model, with_branches);
            let (_, gradient) = gradients(&model, &made, &rows, Recompute::None);
            for recompute in [Recompute::Selective, Recompute::Full] {
                let (_, again) = gradients(&model, &made, &rows, recompute);
                assert!(difference(&gradient, &again) < 1e-5, "{family} {recompute}");
            }
            let mut first = 0;
            for slot in 0..made.names.len() {
                let (height, width) = made.params.shape(slot);
                let own = &gradient[first..first + height * width];
                first += own.len();
                let norm = own.iter().map(|g| g * g).sum::<f32>().sqrt();
                assert!(
                    norm > 0.0,
                    "{family}: {} gets no gradient",
                    made.names[slot]
                );
                let start = made.params.view(slot).to_vec();
                let mut at = |way: f32| {
                    let moved = start.iter().zip(own);
                    let moved = moved.map(|(x, g)| x + way * 2e-3 * g / norm).collect();
                    let moved = Tensor::from_f32(height, width, moved);
                    made.params.view_mut(slot).copy_from(moved.view());
                    let batch = batch_of(&rows, VirtualTokens::default());
                    let set = [&made];
                    let (set, ws) = (AdapterSet::new(&set), Workspace::new());
                    objective::loss(&model, &batch, set, &NextToken::of(&batch), &ws).loss
                };
                let change = (at(1.0) - at(-1.0)) / 4e-3;
                at(0.0);
                let off = (change - f64::from(norm)).abs();
                assert!(
                    off < 2e-2 * f64::from(norm).max(1.0),
                    "{family}, {}: {change:e}, gradient {norm:e}",
                    made.names[slot]
                );
            }
        }
    }
}

#[test]
fn rows_of_other_adapters_are_not_scaled() {
    let model = decoder("llama");
    let (made, other) = (scaled(&model, true), adapter(&model, &all_linear(), 9));
    let rows = examples();
    let (set, ws) = ([&made, &other], Workspace::new());
    let set = AdapterSet::new(&set);
    let loss_of = |adapters: &[Option<usize>]| {
        let mut batch = batch_of(&rows[..adapters.len()], VirtualTokens::default());
        batch.adapters.clear();
        let mut start = 0;
        for (row, adapter) in rows.iter().zip(adapters) {
            let range = start..start + row.ids.len();
            start = range.end;
            batch.adapters.extend(adapter.map(|index| (range, index)));
        }
        objective::loss(&model, &batch, set, &NextToken::of(&batch), &ws).loss
    };
    let whole = loss_of(&[Some(0), None, Some(1)]);
    let single = |index: usize, adapter| {
        let mut batch = batch_of([&rows[index]], VirtualTokens::default());
        batch.adapters = Option::map(adapter, |a| (0..rows[index].ids.len(), a))
            .into_iter()
            .collect();
        objective::loss(&model, &batch, set, &NextToken::of(&batch), &ws).loss
    };
    let parts = single(0, Some(0)) + single(1, None) + single(2, Some(1));
    assert!((whole - parts).abs() < 1e-5 * parts, "{whole} {parts}");
}

#[test]
fn factors_are_merged_into_weights_and_biases() {
    for family in ["llama", "qwen2", "gpt2"] {
        let place = Place::new(family);
        let source = Source::Folder(place.path("model"));
        let model = open(&place.path("model"));
        assert_eq!(model.config().layout == Layout::InOut, family == "gpt2");
        let made = scaled(&model, true);
        let text = ids(20, 4);
        let expected = logits(&model, Some(&made), &text);
        assert!(difference(&expected, &logits(&model, None, &text)) > 1e-2);
        let output = place.path("merged");
        let passages = [text.clone()];
        merge_f32(&source, &made, &passages, &output).expect("the merge");
        let merged = logits(&open(&output), None, &text);
        assert!(difference(&expected, &merged) < 1e-5, "{family}");
        fs::remove_dir_all(&output).expect("the folder");
    }
}
