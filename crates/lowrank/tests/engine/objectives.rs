//! What scores a pass is not the decoder's business: another objective than the language model's takes the same path.

use lowrank::Workspace;
use lowrank::model::{Adapter, AdapterSet, Batch, Decoder, PassOptions, Top};
use lowrank::objective::{self, Gradients, LossSum, NextToken, Objective, loss_and_gradients};
use lowrank::train::{OptimizerState, batch_of};
use lowrank_kernels::{Tensor, View, head_backward, head_log_probs};

use crate::common::{FAMILIES, adapter, all_linear, decoder, examples};

/// Σ over pairs of neighbouring rows of (log p(target of one) - log p(target of the other))²: as a preference loss, its gradient
/// has a coefficient for every row that depends on other rows.
struct Pairs<'a> {
    targets: &'a [u32],
}

impl Objective for Pairs<'_> {
    fn score(
        &self,
        top: &Top<'_>,
        hidden: View<'_>,
        gradients: Option<Gradients<'_>>,
        ws: &Workspace,
    ) -> LossSum {
        let (n, head) = (hidden.rows(), top.head());
        let (mut log_probs, mut lse) = (vec![0.0; n], vec![0.0; n]);
        let (mut means, mut correct) = (vec![0.0; n], vec![false; n]);
        head_log_probs(
            &mut log_probs,
            &mut lse,
            &mut means,
            &mut correct,
            hidden,
            head.weight(),
            head.scaling,
            self.targets,
            ws,
        );
        let (mut loss, mut coefficients) = (0.0, vec![0.0_f32; n]);
        for i in (0..n - 1).step_by(2) {
            let apart = log_probs[i] - log_probs[i + 1];
            loss += apart * apart;
            // The kernel's coefficients are those of -log p.
            coefficients[i] = -2.0 * apart as f32;
            coefficients[i + 1] = 2.0 * apart as f32;
        }
        if let Some(Gradients {
            dh: Some(dh),
            trained,
        }) = gradients
        {
            head_backward(
                dh,
                head.slot.map(|slot| trained.view_mut(slot)),
                hidden,
                head.weight(),
                head.scaling,
                self.targets,
                &lse,
                &coefficients,
                0.0,
                head.compute_dtype,
                ws,
            );
        }
        LossSum {
            loss,
            correct: 0,
            tokens: self.targets.len(),
            weight: self.targets.len() as f64,
        }
    }
}

fn pairs(model: &Decoder, trained: &Adapter, batch: &Batch) -> (f64, Vec<f32>) {
    let (set, ws) = ([trained], Workspace::new());
    let set = AdapterSet::new(&set);
    let labels = Pairs {
        targets: &batch.targets,
    };
    let mut grads = OptimizerState::new(trained).grads;
    let options = PassOptions::default();
    let sums = loss_and_gradients(model, batch, set, &labels, &mut grads, &options, &ws);
    let evaluated = objective::loss(model, batch, set, &labels, &ws);
    let sums = sums.expect("one adapter");
    assert!((sums.loss - evaluated.loss).abs() < 1e-9 * evaluated.loss.abs());
    (sums.loss, grads.flat().to_vec())
}

#[test]
fn another_objective_has_the_gradient_of_its_finite_differences() {
    for family in FAMILIES {
        let model = decoder(family);
        let mut trained = adapter(&model, &all_linear(), 5);
        let rows = examples();
        let batch = batch_of(&rows, trained.virtual_tokens());
        let (_, gradient) = pairs(&model, &trained, &batch);
        let norm = gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
        let (start, step) = (trained.params.flat().to_vec(), 1e-3);
        let mut at = |way: f32| {
            let moved = start.iter().zip(&gradient);
            let moved = moved.map(|(x, g)| x + way * step * g / norm).collect();
            let moved = Tensor::from_f32(1, start.len(), moved);
            trained.params.flat_mut().copy_from(moved.view());
            pairs(&model, &trained, &batch).0
        };
        let change = (at(1.0) - at(-1.0)) / (2.0 * f64::from(step));
        let off = (change - f64::from(norm)).abs() / f64::from(norm);
        assert!(off < 1e-2, "{family}: {change}, gradient {norm}");
    }
}

#[test]
fn a_gradient_pass_refuses_rows_of_an_adapter_that_is_not_trained() {
    let model = decoder("llama");
    let (trained, other) = (
        adapter(&model, &all_linear(), 1),
        adapter(&model, &all_linear(), 2),
    );
    let rows = examples();
    let mut batch = batch_of(&rows, trained.virtual_tokens());
    let tokens = batch.tokens();
    batch.adapters = vec![(0..tokens - 3, 0), (tokens - 3..tokens, 1)];
    let (set, ws) = ([&trained, &other], Workspace::new());
    let set = AdapterSet::new(&set);
    let labels = NextToken::of(&batch);
    let mut grads = OptimizerState::new(&trained).grads;
    let options = PassOptions::default();
    let refused = loss_and_gradients(&model, &batch, set, &labels, &mut grads, &options, &ws)
        .expect_err("rows of another adapter");
    assert_eq!((refused.rows.len(), refused.adapter), (3, 1));
    assert!(grads.flat().to_vec().iter().all(|g| *g == 0.0));
    // Without gradients every row may have its own adapter.
    let mixed = objective::loss(&model, &batch, set, &labels, &ws);
    let alone = objective::loss(&model, &batch.clone().with_adapter(0), set, &labels, &ws);
    assert!(mixed.loss.is_finite() && mixed.loss != alone.loss);
}
