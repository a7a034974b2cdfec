//! The engine against PyTorch, transformers and PEFT; `scripts/goldens.py` writes what it is compared with.

mod beginnings;
mod cases;
mod classifiers;
mod common;
mod groups;

use std::collections::BTreeMap;
use std::path::Path;

use cases::{
    ADAPTERS, AdapterCase, IA3_ADAPTERS, METHODS, MODELS, PROMPT_ADAPTERS, TOKEN_ADAPTERS,
    method_folder,
};
use common::{Comparison, Golden};
use lowrank::DType;
use lowrank::data::Example;
use lowrank::generate::{GenerateOptions, Penalties, PromptIds, Sampling, generate};
use lowrank::model::{Adapter, AdapterSet, Batch, Decoder, Weights};
use lowrank::train::{OptimizerState, StepOptions, accumulate, optimizer_step};
use lowrank::tuning::lora::{self, InitLoraWeights};
use lowrank::tuning::{self, full};
use lowrank_formats::peft::{LoraConfig, PROMPT_EMBEDDINGS, TargetModules, join_prefix};
use lowrank_kernels::{Arena, Tensor, Workspace};

/// The goldens cover what the list of cases says: a file that lost its gradients would pass every comparison of them.
#[test]
fn the_goldens_are_complete() {
    for case in MODELS {
        let golden = Golden::in_folder(&case.folder());
        let weights = Golden::read(&case.folder().join("model.safetensors"));
        let names = |file: &Golden, prefix| -> Vec<String> {
            file.below(prefix)
                .map(|(name, _)| name.to_owned())
                .collect()
        };
        let rows = golden.rows();
        assert_eq!(rows.len(), 3, "{}", case.name);
        for (n, row) in rows.iter().enumerate() {
            assert_eq!(row.ids.len(), row.labels.len());
            assert_eq!(
                golden.values(&format!("logits.{n}")).shape,
                [row.ids.len(), 97]
            );
            assert!(!golden.greedy(n).is_empty());
        }
        let untied = weights.below("lm_head.").count() == 1;
        assert_eq!(untied, !case.tied, "{}", case.name);
        let tuned = if case.fully_tuned {
            names(&weights, "")
        } else {
            Vec::new()
        };
        assert_eq!(names(&golden, "grad."), tuned, "{}", case.name);
    }
    let prompts = PROMPT_ADAPTERS.into_iter();
    let others = prompts.chain(IA3_ADAPTERS).chain(TOKEN_ADAPTERS);
    for case in ADAPTERS.into_iter().chain(others) {
        let golden = Golden::in_folder(&case.folder());
        let pefts = Golden::read(&case.folder().join("adapter_model.safetensors"));
        let (name, prefix) = (case.name, if case.parts { "init." } else { "" });
        let start = if case.parts { &golden } else { &pefts };
        assert!(start.below(prefix).count() > 0, "{name}");
        for (key, values) in start.below(prefix) {
            assert_eq!(
                golden.values(&format!("grad.{key}")).shape,
                values.shape,
                "{name}"
            );
            assert_eq!(
                golden.values(&format!("final.{key}")).shape,
                values.shape,
                "{name}"
            );
        }
        assert_eq!(
            golden.below("grad.").count(),
            golden.below("final.").count(),
            "{name}"
        );
        assert_eq!(
            golden.below("smoothed.grad.").count() > 0,
            case.smoothed,
            "{name}"
        );
        assert_eq!(golden.values("losses").shape, [10], "{name}");
        assert_eq!(
            golden.values("losses").data[0].to_bits(),
            golden.scalar("loss").to_bits(),
            "{name}"
        );
        assert_eq!(
            golden.below("logits.").count(),
            Golden::in_folder(&case.model_folder()).rows().len(),
            "{name}"
        );
    }
}

#[test]
fn a_comparison_passes_what_is_close_enough() {
    let mut comparison = Comparison::new("close");
    comparison.values("tensor", &[1.0, -2.000_1], &[1.000_1, -2.0]);
    comparison.values("zeros", &[0.0], &[0.0]);
    comparison.scalar("scalar", 3.0, 3.0);
    comparison.finish();
}

#[test]
#[should_panic(expected = "far: 4 of 5 differ")]
fn a_comparison_lists_every_difference() {
    let mut comparison = Comparison::new("far");
    comparison.values("same", &[1.0], &[1.0]);
    comparison.values("different", &[1.0, 2.001], &[1.0, 2.0]);
    comparison.values("not a number", &[f32::NAN, 2.0], &[1.0, 2.0]);
    comparison.values("not zero", &[1e-9], &[0.0]);
    comparison.values("shorter", &[1.0], &[1.0, 2.0]);
    comparison.finish();
}

#[test]
#[should_panic(
    expected = "grad.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: not computed"
)]
fn a_comparison_misses_no_tensor() {
    let case = ADAPTERS
        .iter()
        .find(|case| case.name == "q_v")
        .expect("the case is listed");
    let golden = Golden::in_folder(&case.folder());
    let mut comparison = Comparison::new("missing");
    comparison.scalar("loss", golden.scalar("loss"), golden.scalar("loss"));
    comparison.below(&golden, "grad.", |_| None);
    comparison.finish();
}

/// A base, its examples, and an adapter with the name that the goldens give each of its slots.
struct Case {
    model: std::sync::Arc<Decoder>,
    examples: Vec<Example>,
    adapter: Adapter,
    ws: Workspace,
}

impl Case {
    fn new(folder: &Path, adapter: impl FnOnce(&Decoder) -> Adapter) -> Self {
        let weights = Weights::load(folder, DType::F32).expect("the golden model loads");
        let model = Decoder::new(weights);
        let examples = Golden::in_folder(folder)
            .rows()
            .into_iter()
            .map(|row| Example {
                supervised: row.labels.iter().map(Option::is_some).collect(),
                ids: row.ids,
                line: 0,
                truncated: 0,
                prompt_len: 0,
                ..Example::default()
            })
            .collect();
        let adapter = adapter(&model);
        Self {
            model,
            examples,
            adapter,
            ws: Workspace::new(),
        }
    }

    fn options(
        learning_rate: f64,
        label_smoothing: f64,
        batch_size: usize,
    ) -> StepOptions<'static> {
        StepOptions {
            learning_rate,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay: 0.01,
            max_grad_norm: 0.0,
            scoring: lowrank::train::Scoring {
                label_smoothing: label_smoothing as f32,
                ..Default::default()
            },
            batch_size,
            share_prompts: false,
            saving: lowrank::model::Saving::default(),
            compute_dtype: lowrank::ComputeDType::F32,
            seed: 0,
            pauses: lowrank::kernels::Pauses::NONE,
        }
    }

    fn logits(&self, comparison: &mut Comparison, golden: &Golden, with_adapter: bool) {
        let set = [&self.adapter];
        let adapters = if with_adapter {
            AdapterSet::new(&set)
        } else {
            AdapterSet::none()
        };
        for (n, example) in self.examples.iter().enumerate() {
            let mut batch = Batch::default();
            if with_adapter {
                batch = Batch::with_virtual(self.adapter.virtual_tokens());
            }
            batch.push(&example.ids, &example.supervised);
            if with_adapter {
                batch = batch.with_adapter(0);
            }
            let first = batch.tokens() - example.ids.len();
            let rows: Vec<u32> = (first as u32..batch.tokens() as u32).collect();
            let logits = self.model.logits(&batch, adapters, &rows, None, &self.ws);
            comparison.values(
                &format!("logits.{n}"),
                &logits.to_vec(),
                &golden.values(&format!("logits.{n}")).data,
            );
        }
    }

    fn greedy(&self, golden: &Golden, with_adapter: bool) {
        let set = [&self.adapter];
        let adapters = if with_adapter {
            AdapterSet::new(&set)
        } else {
            AdapterSet::none()
        };
        // All rows together in one batch, then each alone: the cache must not mix them.
        let prompts: Vec<PromptIds> = self
            .examples
            .iter()
            .map(|example| PromptIds {
                ids: example.ids.clone(),
                adapter: with_adapter.then_some(0),
            })
            .collect();
        let options = GenerateOptions {
            max_new_tokens: 12,
            sampling: Sampling::default(),
            no_repeat_ngram_size: 0,
            penalties: Penalties::NONE,
            logit_bias: Vec::new(),
            stop_ids: Vec::new(),
        };
        let together = generate(
            &self.model,
            adapters,
            &prompts,
            &options,
            &self.ws,
            |_, _| true,
        );
        for (n, prompt) in prompts.iter().enumerate() {
            let expected = golden.greedy(n);
            let alone = generate(
                &self.model,
                adapters,
                std::slice::from_ref(prompt),
                &options,
                &self.ws,
                |_, _| true,
            );
            assert_eq!(
                together[n].ids[..expected.len()],
                expected,
                "row {n} in a batch"
            );
            assert_eq!(alone[0].ids[..expected.len()], expected, "row {n} alone");
        }
    }

    /// Loss and gradients of the mean, with the rows in micro-batches of `batch_size`.
    fn gradients(
        &self,
        comparison: &mut Comparison,
        golden: &Golden,
        prefix: &str,
        smoothing: f64,
        batch_size: usize,
    ) {
        let mut state = OptimizerState::new(&self.adapter);
        let rows: Vec<&Example> = self.examples.iter().collect();
        let options = Self::options(0.0, smoothing, batch_size);
        let (sums, _) = accumulate(
            &self.model,
            &self.adapter,
            &mut state.grads,
            &rows,
            0,
            &options,
            &self.ws,
        )
        .expect("one adapter");
        comparison.scalar(
            &format!("{prefix}loss"),
            sums.mean() as f32,
            golden.scalar(&format!("{prefix}loss")),
        );
        let mut values = self.tensors(&state.grads);
        for value in values.values_mut().flatten() {
            *value /= sums.tokens as f32;
        }
        let norm = values
            .values()
            .flatten()
            .map(|g| f64::from(*g).powi(2))
            .sum::<f64>()
            .sqrt();
        comparison.scalar(
            &format!("{prefix}grad_norm"),
            norm as f32,
            golden.scalar(&format!("{prefix}grad_norm")),
        );
        comparison.below(golden, &format!("{prefix}grad."), |name| {
            values.get(name).map(Vec::as_slice)
        });
    }

    /// An arena's slots under the names that PEFT saves them with: keys and values of a prefix are one tensor.
    fn tensors(&self, arena: &Arena) -> BTreeMap<String, Vec<f32>> {
        let slots = (0..arena.slots()).map(|slot| arena.view(slot).to_vec());
        if self.adapter.virtual_tokens().keys > 0 {
            let parts: Vec<_> = slots.collect();
            let joined = join_prefix(&parts, arena.shape(0).0);
            return BTreeMap::from([(PROMPT_EMBEDDINGS.to_owned(), joined)]);
        }
        self.adapter.names.iter().cloned().zip(slots).collect()
    }

    /// Ten steps of AdamW over all rows.
    fn train(&mut self, comparison: &mut Comparison, golden: &Golden, learning_rate: f64) {
        let mut state = OptimizerState::new(&self.adapter);
        let options = Self::options(learning_rate, 0.0, self.examples.len());
        let rows: Vec<&Example> = self.examples.iter().collect();
        let losses: Vec<f32> = (0..10)
            .map(|_| {
                let done = optimizer_step(
                    &self.model,
                    &mut self.adapter,
                    &mut state,
                    &rows,
                    &options,
                    &self.ws,
                );
                done.expect("the step is finite").loss as f32
            })
            .collect();
        comparison.values("losses", &losses, &golden.values("losses").data);
        let values = self.tensors(&self.adapter.params);
        comparison.below(golden, "final.", |name| values.get(name).map(Vec::as_slice));
    }
}

#[test]
fn base_models_match_transformers() {
    for case in MODELS {
        let mut comparison = Comparison::new(case.name);
        let golden = Golden::in_folder(&case.folder());
        let mut run = Case::new(&case.folder(), |model| full::inject(model.weights()));
        run.logits(&mut comparison, &golden, false);
        run.greedy(&golden, false);
        if case.fully_tuned {
            run.gradients(&mut comparison, &golden, "", 0.0, 3);
            run.gradients(&mut comparison, &golden, "", 0.0, 1);
            run.train(&mut comparison, &golden, 1e-3);
        }
        comparison.finish();
    }
}

#[test]
fn adapters_match_peft() {
    for case in ADAPTERS {
        let mut comparison = Comparison::new(format!("{}/{}", case.model, case.name));
        let golden = Golden::in_folder(&case.folder());
        let mut run = Case::new(&case.model_folder(), |model| {
            let loaded = lora::load(&case.folder(), model.config()).expect("PEFT's adapter loads");
            if !case.parts {
                return loaded.adapter;
            }
            // The parts that PEFT's stacked adapter was made from.
            let r = golden
                .below("init.")
                .find(|(name, _)| name.ends_with("lora_A.weight"))
                .expect("there is an A")
                .1
                .shape[0];
            let parts = LoraConfig {
                r,
                lora_alpha: loaded.config.scale_of("transformer.h.0.attn.c_attn") * r as f64,
                target_modules: TargetModules::List(vec!["c_attn.q".into(), "c_attn.v".into()]),
                ..LoraConfig::default()
            };
            let (mut adapter, _) =
                lora::inject(model.config(), &parts, InitLoraWeights::Gaussian, 0)
                    .expect("the parts are there");
            for slot in 0..adapter.names.len() {
                let values = golden.values(&format!("init.{}", adapter.names[slot]));
                let start = Tensor::from_f32(values.shape[0], values.shape[1], values.data.clone());
                adapter.params.view_mut(slot).copy_from(start.view());
            }
            adapter
        });
        run.logits(&mut comparison, &golden, true);
        run.greedy(&golden, true);
        run.gradients(&mut comparison, &golden, "", 0.0, 3);
        // Micro-batches of one row: the sum is the big batch's.
        run.gradients(&mut comparison, &golden, "", 0.0, 1);
        if case.smoothed {
            run.gradients(&mut comparison, &golden, "smoothed.", 0.1, 2);
        }
        run.train(&mut comparison, &golden, 1e-2);
        comparison.finish();
    }
}

/// `scripts/goldens_methods.py` wrote each method out in PyTorch.
#[test]
fn other_methods_match_pytorch() {
    for model in MODELS
        .iter()
        .filter(|case| ["llama", "gpt2"].contains(&case.name))
    {
        for (method, learning_rate) in METHODS {
            let folder = method_folder(model.name, method);
            let golden = Golden::in_folder(&folder);
            let mut comparison = Comparison::new(format!("{}/{method}", model.name));
            let mut run = Case::new(&model.folder(), |model| {
                let loaded = tuning::load(&folder, model.config()).expect("the adapter loads");
                loaded.adapter
            });
            assert_eq!(
                golden.below("grad.").count(),
                run.adapter.names.len(),
                "every gradient of {}/{method}",
                model.name
            );
            run.logits(&mut comparison, &golden, true);
            run.greedy(&golden, true);
            run.gradients(&mut comparison, &golden, "", 0.0, 3);
            run.gradients(&mut comparison, &golden, "", 0.0, 1);
            run.train(&mut comparison, &golden, learning_rate);
            comparison.finish();
        }
    }
}

#[test]
fn prefix_and_prompt_tuning_match_peft() {
    PROMPT_ADAPTERS.iter().for_each(matches_peft);
}

#[test]
fn ia3_matches_peft() {
    IA3_ADAPTERS.iter().for_each(matches_peft);
}

#[test]
fn rows_of_tokens_match_peft() {
    TOKEN_ADAPTERS.iter().for_each(matches_peft);
}

/// Holds an adapter that any method's reader loads against what PEFT computed with it.
fn matches_peft(case: &AdapterCase) {
    let mut comparison = Comparison::new(format!("{}/{}", case.model, case.name));
    let golden = Golden::in_folder(&case.folder());
    let mut run = Case::new(&case.model_folder(), |model| {
        let loaded = tuning::load(&case.folder(), model.config());
        loaded.expect("PEFT's adapter loads").adapter
    });
    run.logits(&mut comparison, &golden, true);
    run.greedy(&golden, true);
    run.gradients(&mut comparison, &golden, "", 0.0, 3);
    run.gradients(&mut comparison, &golden, "", 0.0, 1);
    run.train(&mut comparison, &golden, 1e-2);
    comparison.finish();
}
