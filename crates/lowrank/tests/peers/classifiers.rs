//! Encoders and classifiers against PyTorch, transformers and PEFT; `scripts/goldens_classifiers.py` writes what they are compared
//! with.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lowrank::data::{Example, Label};
use lowrank::model::{
    Adapter, AdapterSet, Decoder, HeadKind, Pooling, Purpose, Recompute, Saving, VirtualTokens,
    Weights,
};
use lowrank::train::{
    OptimizerState, Scoring, StepOptions, accumulate, batch_for, classified, optimizer_step,
};
use lowrank::tuning::{self, full};
use lowrank::{DType, Workspace};
use lowrank_kernels::Arena;

use crate::common::{Comparison, Golden};

/// A model folder below `tests/goldens_classifiers`.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    labels: usize,
    of_tokens: bool,
    /// Whether the golden holds the gradient of every weight and the losses of full fine-tuning.
    fully_tuned: bool,
}

const fn case(name: &'static str) -> Case {
    Case {
        name,
        labels: 3,
        of_tokens: false,
        fully_tuned: false,
    }
}

const fn tuned(name: &'static str) -> Case {
    Case {
        fully_tuned: true,
        ..case(name)
    }
}

const fn of_tokens(name: &'static str) -> Case {
    Case {
        of_tokens: true,
        ..case(name)
    }
}

const CASES: [Case; 18] = [
    tuned("bert"),
    case("bert_several"),
    Case {
        labels: 1,
        ..case("bert_values")
    },
    of_tokens("bert_tokens"),
    tuned("roberta"),
    of_tokens("roberta_tokens"),
    case("xlm_roberta"),
    tuned("distilbert"),
    tuned("modernbert"),
    tuned("modernbert_mean"),
    of_tokens("modernbert_tokens"),
    tuned("deberta"),
    tuned("deberta_biased"),
    Case {
        fully_tuned: true,
        ..of_tokens("deberta_tokens")
    },
    tuned("gpt2"),
    of_tokens("gpt2_tokens"),
    case("llama"),
    Case {
        fully_tuned: true,
        ..of_tokens("llama_tokens")
    },
];

impl Case {
    fn folder(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/goldens_classifiers")
            .join(self.name)
    }

    fn purpose(&self) -> Purpose {
        let labels = self.labels;
        if self.of_tokens {
            Purpose::TokenClassifier { labels }
        } else {
            Purpose::SequenceClassifier { labels }
        }
    }

    fn model(&self, purpose: Purpose) -> Arc<Decoder> {
        let weights = Weights::load_for(&self.folder(), DType::F32, purpose);
        let weights = weights.expect("the golden model loads");
        assert_eq!(weights.new_names(), Vec::<String>::new(), "{}", self.name);
        Decoder::new(weights)
    }

    fn rows(&self) -> Vec<Example> {
        let golden = Golden::in_folder(&self.folder());
        let unsigned = |values: &[i32]| values.iter().map(|value| *value as u32).collect();
        (0..3)
            .map(|n| {
                let label = if golden.has(&format!("label.{n}")) {
                    let values = golden.values(&format!("label.{n}")).data.clone();
                    if self.labels == 1 {
                        Label::Values(values)
                    } else {
                        Label::Classes(values)
                    }
                } else {
                    let labels = golden.integers(&format!("label.{n}"));
                    if self.of_tokens {
                        let tags = (0..).zip(labels).filter(|(_, tag)| **tag >= 0);
                        Label::Tags(tags.map(|(at, tag)| (at, *tag as u32)).collect())
                    } else {
                        Label::Class(labels[0] as u32)
                    }
                };
                let types = golden.integers(&format!("types.{n}")).iter();
                let token_types: Vec<u8> = types.map(|kind| *kind as u8).collect();
                Example {
                    ids: unsigned(golden.integers(&format!("ids.{n}"))),
                    // A row of the first text alone needs none.
                    token_types: if token_types.contains(&1) {
                        token_types
                    } else {
                        Vec::new()
                    },
                    label: Some(label),
                    ..Example::default()
                }
            })
            .collect()
    }
}

fn options(learning_rate: f64, batch_size: usize, recompute: Recompute) -> StepOptions<'static> {
    StepOptions {
        learning_rate,
        betas: (0.9, 0.999),
        epsilon: 1e-8,
        weight_decay: 0.01,
        max_grad_norm: 0.0,
        scoring: Scoring::default(),
        batch_size,
        share_prompts: false,
        saving: Saving {
            recompute,
            ..Saving::default()
        },
        compute_dtype: lowrank::ComputeDType::F32,
        seed: 0,
        pauses: lowrank::kernels::Pauses::NONE,
    }
}

/// A model with what is trained, and the rows.
struct Run {
    model: Arc<Decoder>,
    adapter: Adapter,
    rows: Vec<Example>,
    ws: Workspace,
}

impl Run {
    fn logits(&self, comparison: &mut Comparison, golden: &Golden) {
        let set = [&self.adapter];
        for (n, row) in self.rows.iter().enumerate() {
            // A classifier of tokens gives logits of all of them where none has a label.
            let row = Example {
                label: None,
                ..row.clone()
            };
            let batch = batch_for(self.model.config(), [&row], self.adapter.virtual_tokens());
            let logits = self.model.classify(&batch, AdapterSet::new(&set), &self.ws);
            let name = format!("logits.{n}");
            comparison.values(&name, &logits.to_vec(), &golden.values(&name).data);
        }
    }

    fn gradients(
        &self,
        comparison: &mut Comparison,
        golden: &Golden,
        batch_size: usize,
        recompute: Recompute,
    ) {
        let mut state = OptimizerState::new(&self.adapter);
        let rows: Vec<&Example> = self.rows.iter().collect();
        let (sums, _) = accumulate(
            &self.model,
            &self.adapter,
            &mut state.grads,
            &rows,
            0,
            &options(0.0, batch_size, recompute),
            &self.ws,
        )
        .expect("one adapter");
        comparison.scalar("loss", sums.mean() as f32, golden.scalar("loss"));
        let mut values = named(&self.adapter, &state.grads);
        for value in values.iter_mut().flat_map(|(_, values)| values) {
            *value /= sums.weight as f32;
        }
        let squares = values.iter().flat_map(|(_, values)| values);
        let norm = squares.map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        comparison.scalar("grad_norm", norm as f32, golden.scalar("grad_norm"));
        // That of a key's bias is zero but for rounding.
        let least = 1e-3 * f64::from(golden.scalar("grad_norm"));
        for (name, expected) in golden.below("grad.") {
            let found = find(&values, name).unwrap_or_default();
            comparison.values_of_size(&format!("grad.{name}"), found, &expected.data, least);
        }
    }

    fn train(&mut self, comparison: &mut Comparison, golden: &Golden, learning_rate: f64) {
        let mut state = OptimizerState::new(&self.adapter);
        let rows: Vec<&Example> = self.rows.iter().collect();
        let options = options(learning_rate, rows.len(), Recompute::None);
        let losses: Vec<f32> = (0..10)
            .map(|_| {
                let (model, adapter) = (&self.model, &mut self.adapter);
                let done = optimizer_step(model, adapter, &mut state, &rows, &options, &self.ws);
                done.expect("the step is finite").loss as f32
            })
            .collect();
        comparison.values("losses", &losses, &golden.values("losses").data);
        let values = named(&self.adapter, &self.adapter.params);
        comparison.below(golden, "final.", |name| find(&values, name));
    }
}

fn named(adapter: &Adapter, arena: &Arena) -> Vec<(String, Vec<f32>)> {
    let slots = (0..arena.slots()).map(|slot| arena.view(slot).to_vec());
    adapter.names.iter().cloned().zip(slots).collect()
}

fn find<'a>(values: &'a [(String, Vec<f32>)], name: &str) -> Option<&'a [f32]> {
    let found = values.iter().find(|(known, _)| known == name)?;
    Some(&found.1)
}

#[test]
fn hidden_states_match_transformers() {
    for case in CASES {
        let golden = Golden::in_folder(&case.folder());
        let mut comparison = Comparison::new(format!("{} hidden", case.name));
        let model = case.model(Purpose::Features);
        assert_eq!(model.config().head, HeadKind::None);
        let ws = Workspace::new();
        for (n, row) in case.rows().iter().enumerate() {
            let row = Example {
                label: None,
                ..row.clone()
            };
            let batch = classified(
                model.config(),
                Pooling::Each,
                [&row],
                VirtualTokens::default(),
            );
            let forward = model.forward(&batch, AdapterSet::none(), &ws);
            let name = format!("hidden.{n}");
            let hidden = forward.hidden().to_vec();
            comparison.values(&name, &hidden, &golden.values(&name).data);
            forward.finish();
        }
        comparison.finish();
    }
}

#[test]
fn classifiers_match_transformers() {
    for case in CASES {
        let golden = Golden::in_folder(&case.folder());
        let mut comparison = Comparison::new(case.name);
        let model = case.model(case.purpose());
        let mut run = Run {
            adapter: full::inject(model.weights()),
            model,
            rows: case.rows(),
            ws: Workspace::new(),
        };
        run.logits(&mut comparison, &golden);
        if case.fully_tuned {
            for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
                run.gradients(&mut comparison, &golden, 3, recompute);
            }
            run.gradients(&mut comparison, &golden, 1, Recompute::None);
            run.train(&mut comparison, &golden, 1e-3);
        }
        comparison.finish();
    }
}

/// Every model's LoRA, and the prompt tuning and IA3 of those that have one.
fn adapters() -> impl Iterator<Item = (Case, &'static str)> {
    CASES.into_iter().flat_map(|case| {
        let kinds = ["lora", "prompt", "ia3"].into_iter();
        kinds
            .filter(|kind| *kind == "lora" || case.folder().join(kind).exists())
            .map(|kind| (case, kind))
            .collect::<Vec<_>>()
    })
}

#[test]
fn adapters_of_classifiers_match_peft() {
    assert_eq!(adapters().count(), CASES.len() + 5);
    for (case, kind) in adapters() {
        let folder = case.folder().join(kind);
        let golden = Golden::in_folder(&folder);
        let mut comparison = Comparison::new(format!("{}/{kind}", case.name));
        let model = case.model(case.purpose());
        let loaded = tuning::load(&folder, model.config()).expect("PEFT's adapter loads");
        let count = golden.below("grad.").count();
        assert_eq!(loaded.adapter.names.len(), count, "{}", case.name);
        let mut run = Run {
            adapter: loaded.adapter,
            model,
            rows: case.rows(),
            ws: Workspace::new(),
        };
        run.logits(&mut comparison, &golden);
        for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
            run.gradients(&mut comparison, &golden, 3, recompute);
        }
        run.gradients(&mut comparison, &golden, 1, Recompute::None);
        run.train(&mut comparison, &golden, 1e-2);
        comparison.finish();
    }
}
