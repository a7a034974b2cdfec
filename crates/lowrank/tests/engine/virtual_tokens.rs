//! Virtual tokens: gradients, sharing, recomputing, the cache, files and runs.

use std::fs;

use lowrank::data::Example;
use lowrank::generate::{Finish, GenerateOptions, Penalties, PromptIds, Sampling, generate};
use lowrank::model::{Adapter, AdapterSet, Batch, Decoder, PassOptions, Recompute, Saving};
use lowrank::objective::{self, NextToken, loss_and_gradients};
use lowrank::train::{OptimizerState, Start, TrainConfig, batch_of, evaluate, shared_batch_of};
use lowrank::tuning::prefix::{self, Init, Kind, Options};
use lowrank::tuning::{self, AdapterConfig, BaseMark, Method};
use lowrank::{DType, Workspace};

use super::common::{
    FAMILIES, Place, Watch, adapter, all_linear, assert_says, decoder, difference, failure, golden,
    ids, logits_after, run, tensors,
};

const LAYER: Options = Options {
    kind: Kind::Layer,
    prefix: 3,
    infix: 0,
};
const PROMPT: Options = Options {
    kind: Kind::Embedding,
    prefix: 3,
    infix: 0,
};
const INFIX: Options = Options {
    kind: Kind::Embedding,
    prefix: 2,
    infix: 2,
};
const ONLY_INFIX: Options = Options {
    kind: Kind::Embedding,
    prefix: 0,
    infix: 2,
};
pub(crate) const ALL: [Options; 4] = [LAYER, PROMPT, INFIX, ONLY_INFIX];

/// Virtual tokens that are far from zero.
pub(crate) fn random(model: &Decoder, options: Options, seed: u64) -> Adapter {
    let mut made = prefix::inject(model, options, Init::Random, &[], seed).expect("it fits");
    lowrank_kernels::scale(made.params.flat_mut(), 0.5);
    made
}

#[test]
fn embeddings_that_begin_as_a_text_are_that_text() {
    for family in FAMILIES {
        let model = decoder(family);
        let (text, rest) = (ids(3, 1), ids(6, 2));
        let made = prefix::inject(&model, PROMPT, Init::Text, &text, 0).expect("it fits");
        let off = difference(
            &logits_after(&model, Some(&made), &rest, &[]),
            &logits_after(&model, None, &[text, rest].concat(), &[]),
        );
        assert!(off < 1e-5, "{family}: {off:e}");
    }
}

/// Rows of which some share their prompt.
fn rows() -> Vec<Example> {
    [(1, 6, 0, 4), (2, 3, 1, 5), (1, 6, 2, 7), (3, 0, 3, 6)]
        .map(|(prompt, prompt_len, row, completion)| {
            let ids = [ids(prompt_len, prompt), ids(completion, 50 + row)].concat();
            Example {
                supervised: (0..ids.len()).map(|i| i > 0 && i >= prompt_len).collect(),
                ids,
                line: row as usize,
                truncated: 0,
                prompt_len,
                ..Example::default()
            }
        })
        .into()
}

fn batch(made: &Adapter, rows: &[Example], share: bool) -> Batch {
    let rows: Vec<&Example> = rows.iter().collect();
    if share {
        shared_batch_of(&rows, made.virtual_tokens())
    } else {
        batch_of(rows.iter().copied(), made.virtual_tokens())
    }
}

fn loss(model: &Decoder, made: &Adapter, batch: &Batch) -> f64 {
    let set = [made];
    let set = AdapterSet::new(&set);
    objective::loss(model, batch, set, &NextToken::of(batch), &Workspace::new()).loss
}

fn gradients(model: &Decoder, made: &Adapter, batch: &Batch, recompute: Recompute) -> Vec<f32> {
    let mut grads = OptimizerState::new(made).grads;
    let options = PassOptions {
        saving: Saving {
            recompute,
            dtype: DType::F32,
        },
        ..PassOptions::default()
    };
    let set = [made];
    let set = AdapterSet::new(&set);
    let (labels, ws) = (NextToken::of(batch), Workspace::new());
    loss_and_gradients(model, batch, set, &labels, &mut grads, &options, &ws).expect("one adapter");
    grads.flat().to_vec()
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for family in ["llama", "gpt2"] {
        let model = decoder(family);
        for options in ALL {
            let mut made = random(&model, options, 3);
            for share in [false, true] {
                let batch = batch(&made, &rows(), share);
                let grads = gradients(&model, &made, &batch, Recompute::None);
                let again = gradients(&model, &made, &batch, Recompute::Full);
                assert!(again == grads, "{family} {options:?}: recomputed");
                let largest = grads.iter().fold(0.0_f32, |size, g| size.max(g.abs()));
                for at in (0..grads.len()).step_by(7) {
                    let value = made.params.flat().to_vec()[at];
                    let mut at_step = |step: f32| {
                        let mut flat = made.params.flat().to_vec();
                        flat[at] = value + step;
                        made.params.flat_mut().copy_from_f32(&flat);
                        loss(&model, &made, &batch)
                    };
                    let slope = (at_step(1e-2) - at_step(-1e-2)) / 2e-2;
                    at_step(0.0);
                    let off = (slope - f64::from(grads[at])).abs();
                    assert!(
                        off <= 5e-3 * f64::from(largest),
                        "{family} {options:?} {at}: {} and {slope}",
                        grads[at]
                    );
                }
            }
        }
    }
}

#[test]
fn sharing_prompts_and_packing_change_nothing() {
    for family in FAMILIES {
        let model = decoder(family);
        for options in ALL {
            let made = random(&model, options, 4);
            let rows = rows();
            let whole = batch(&made, &rows, false);
            let expected = gradients(&model, &made, &whole, Recompute::None);
            let shared = batch(&made, &rows, true);
            assert_eq!(whole.real_tokens(), 37);
            assert_eq!(shared.real_tokens(), 37 - 6);
            let grads = gradients(&model, &made, &shared, Recompute::Selective);
            assert!(difference(&grads, &expected) < 1e-5, "{family} {options:?}");
            let mut sum = vec![0.0; expected.len()];
            let mut alone = 0.0;
            for row in &rows {
                let one = batch(&made, std::slice::from_ref(row), false);
                alone += loss(&model, &made, &one);
                let grads = gradients(&model, &made, &one, Recompute::None);
                sum.iter_mut().zip(grads).for_each(|(sum, g)| *sum += g);
            }
            assert!(difference(&sum, &expected) < 1e-5, "{family} {options:?}");
            let set = [&made];
            let evaluated = evaluate(
                &model,
                AdapterSet::new(&set),
                Some(0),
                &rows,
                &Workspace::new(),
            );
            assert!((evaluated.loss - alone).abs() < 1e-5 * alone);
        }
    }
}

/// Keys and values of real tokens, or their embeddings, are the tokens themselves.
#[test]
fn text_makes_virtual_tokens_of_real_ones() {
    for family in FAMILIES {
        let model = decoder(family);
        let (text, own) = (ids(3, 1), ids(9, 2));
        let plain = super::common::logits(&model, None, &[&text[..], &own].concat());
        for options in [LAYER, PROMPT] {
            let made = prefix::inject(&model, options, Init::Text, &text, 0).expect("it fits");
            let mut batch = Batch::with_virtual(made.virtual_tokens());
            let first = batch.tokens();
            batch.push(&own, &[]);
            let rows: Vec<u32> = (first as u32..batch.tokens() as u32).collect();
            let set = [&made];
            let logits = model
                .logits(
                    &batch.with_adapter(0),
                    AdapterSet::new(&set),
                    &rows,
                    None,
                    &Workspace::new(),
                )
                .to_vec();
            let expected = &plain[plain.len() - logits.len()..];
            assert!(difference(&logits, expected) < 1e-5, "{family} {options:?}");
        }
    }
}

#[test]
fn the_cache_holds_virtual_tokens_of_several_adapters() {
    let greedy = GenerateOptions {
        no_repeat_ngram_size: 0,
        penalties: Penalties::NONE,
        logit_bias: Vec::new(),
        max_new_tokens: 8,
        sampling: Sampling::default(),
        stop_ids: Vec::new(),
    };
    for family in FAMILIES {
        let model = decoder(family);
        let mut all: Vec<Adapter> = ALL.iter().map(|o| random(&model, *o, 5)).collect();
        all.push(adapter(&model, &all_linear(), 1));
        let set: Vec<&Adapter> = all.iter().collect();
        let prompts: Vec<PromptIds> = [None, Some(0), Some(1), Some(2), Some(3), Some(4), Some(0)]
            .into_iter()
            .enumerate()
            .map(|(n, adapter)| PromptIds {
                ids: ids(3 + 2 * n, n as u32),
                adapter,
            })
            .collect();
        let ws = Workspace::new();
        let made = generate(
            &model,
            AdapterSet::new(&set),
            &prompts,
            &greedy,
            &ws,
            |_, _| true,
        );
        for (prompt, made) in prompts.iter().zip(&made) {
            let used = prompt.adapter.map(|index| set[index]);
            let expected = from_scratch(&model, used, &prompt.ids, 8);
            assert_eq!(made.ids, expected, "{family} {:?}", prompt.adapter);
        }
    }
}

/// Greedy decoding without a cache.
fn from_scratch(model: &Decoder, made: Option<&Adapter>, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut all = Vec::new();
    for _ in 0..count {
        let logits = logits_after(model, made, prompt, &all);
        let best = (0..logits.len()).fold(0, |b, id| if logits[id] > logits[b] { id } else { b });
        all.push(best as u32);
    }
    all
}

#[test]
fn virtual_tokens_take_room_of_the_context() {
    let model = decoder("gpt2");
    assert_eq!(model.config().max_position_embeddings, 40);
    let greedy = GenerateOptions {
        no_repeat_ngram_size: 0,
        penalties: Penalties::NONE,
        logit_bias: Vec::new(),
        max_new_tokens: 10,
        sampling: Sampling::default(),
        stop_ids: Vec::new(),
    };
    for options in ALL {
        let made = random(&model, options, 5);
        let set = [&made];
        let taken = made.virtual_tokens().total();
        let one = |length: usize| {
            let prompt = PromptIds {
                ids: ids(length, 0),
                adapter: Some(0),
            };
            generate(
                &model,
                AdapterSet::new(&set),
                &[prompt],
                &greedy,
                &Workspace::new(),
                |_, _| true,
            )
            .remove(0)
        };
        let full = one(40 - taken - 2);
        assert_eq!((full.ids.len(), full.finish), (3, Finish::ContextFull));
        assert_eq!(one(41 - taken).finish, Finish::ContextFull);
        assert!(one(41 - taken).ids.is_empty());
    }
    let too_many = Options {
        prefix: 40,
        ..LAYER
    };
    let error = failure(prefix::inject(&model, too_many, Init::Zero, &[], 0).map(drop));
    assert_says(&error, &["num_virtual_tokens 40", "made for 40"]);
}

#[test]
fn folders_are_read_again() {
    for family in ["llama", "gpt2"] {
        let model = decoder(family);
        for options in ALL {
            let folder = tempfile::tempdir().expect("a folder");
            let made = random(&model, options, 6);
            let config = AdapterConfig::Prefix(options);
            let mark = BaseMark {
                name: "base",
                fingerprint: "f",
                labels: None,
            };
            tuning::save(folder.path(), model.config(), &config, &made, mark).expect("saved");
            let loaded = tuning::load(folder.path(), model.config()).expect("loaded");
            assert_eq!(loaded.config, config);
            assert_eq!(loaded.base_fingerprint.as_deref(), Some("f"));
            let values = |adapter: &Adapter| adapter.params.flat().to_vec();
            assert_eq!(values(&loaded.adapter), values(&made));
            assert_eq!(
                prefix::parameters(model.config(), &options),
                made.parameters()
            );
            let other = decoder("mistral");
            let error = failure(tuning::load(folder.path(), other.config()).map(drop));
            assert_says(&error, &["adapter for another model?"]);
        }
    }
}

#[test]
fn damaged_folders_are_refused() {
    let model = decoder("llama");
    for (case, tensor_problem) in [("prefix", "[5, 64]"), ("prompt", "[6, 32]")] {
        let from = golden("llama").join(case);
        let folder = tempfile::tempdir().expect("a folder");
        let copy = |name: &str| {
            fs::copy(from.join(name), folder.path().join(name)).expect("a copy");
        };
        copy("adapter_config.json");
        let load = || failure(tuning::load(folder.path(), model.config()).map(drop));
        assert_says(&load(), &["adapter_model.safetensors"]);
        copy("adapter_model.safetensors");
        let text = fs::read_to_string(from.join("adapter_config.json")).expect("a config");
        let expect = |change: (&str, &str), words: &[&str]| {
            let changed = text.replacen(change.0, change.1, 1);
            assert_ne!(changed, text, "{change:?}");
            fs::write(folder.path().join("adapter_config.json"), changed).expect("written");
            assert_says(&load(), words);
        };
        let n = &tensor_problem[1..2];
        let count = format!("\"num_virtual_tokens\": {n}");
        expect(
            (&count, "\"num_virtual_tokens\": 4"),
            &[
                "adapter_model.safetensors",
                "prompt_embeddings",
                tensor_problem,
            ],
        );
        expect(
            (&count, "\"num_virtual_tokens\": 64"),
            &[
                "adapter_config.json",
                "`num_virtual_tokens` is 64",
                "no room",
            ],
        );
        expect(
            (&count, "\"num_virtual_tokens\": -1"),
            &["`num_virtual_tokens` is -1"],
        );
        expect(
            ("\"num_layers\": 2", "\"num_layers\": 3"),
            &["`num_layers` is 3", "another model"],
        );
        expect(
            ("\"token_dim\": ", "\"token_dim\": 9"),
            &["`token_dim` is 9", "another model"],
        );
        expect(
            (
                "\"task_type\"",
                "\"prefix_projection\": true, \"task_type\"",
            ),
            &["`prefix_projection` is true"],
        );
    }
}

#[test]
fn a_resumed_run_is_the_run_that_never_stopped() {
    for (family, kind, infix) in [
        ("llama", Kind::Layer, 0),
        ("gpt2", Kind::Embedding, 2),
        ("llama", Kind::Embedding, 0),
    ] {
        let place = Place::new(family);
        let config = |name: &str| {
            let mut config = place.config(Method::Prefix, name);
            config.options.prefix.prefix_kind = kind;
            config.options.prefix.num_virtual_tokens = 4;
            config.options.prefix.infix_tokens = infix;
            config.save_steps = Some(2);
            config
        };
        let whole = run(&config("whole")).expect("the run");
        assert!(
            whole.eval_loss < whole.first_eval_loss,
            "{family}: it learns"
        );
        let mut first = Watch::stopping_after(3);
        first
            .train(&config("parts"), Start::Fresh { overwrite: false })
            .expect("the first part");
        let words = "which begin as the first";
        assert_says(&first.notes.join("\n"), &[words]);
        Watch::default()
            .train(&config("parts"), Start::Resume)
            .expect("the second part");
        let read = |name: &str| tensors(&place.path(name).join("adapter_model.safetensors"));
        assert_eq!(read("whole"), read("parts"), "{family}");

        // The folder can be the start of another run.
        let next = TrainConfig {
            init_adapter: Some(place.path("whole")),
            max_steps: Some(1),
            ..config("next")
        };
        run(&next).expect("a run that goes on");
        let card = fs::read_to_string(place.path("whole").join("README.md")).expect("a card");
        assert_eq!(card.contains("PeftModel"), infix == 0);
        assert!(!card.contains("lowrank merge"));
    }
}

#[test]
fn rows_must_leave_room_for_virtual_tokens() {
    let place = Place::new("gpt2");
    let mut config = place.config(Method::Prefix, "run");
    config.options.prefix.num_virtual_tokens = 35;
    let text = failure(run(&config));
    assert_says(
        &text,
        &["made for 40, 35 of them virtual", "max_seq_length: 5"],
    );
    assert!(!place.path("run").exists());
}
