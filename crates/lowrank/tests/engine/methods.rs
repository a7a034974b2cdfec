//! The methods that LoRA is compared with: their gradients, files, merges, and what must be refused.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use lowrank::base::Source;
use lowrank::model::{Adapter, AdapterSet, Batch, Decoder, Recompute, Saving, Sublayer};
use lowrank::train::{OptimizerState, StepOptions, TrainConfig, accumulate};
use lowrank::tuning::{self, AdapterConfig, BaseMark, Method, adapter, bitfit, top};
use lowrank::{DType, Workspace};
use lowrank_kernels::{Tensor, add_assign, fill_normal};
use serde_json::Value;

use super::common::{
    FAMILIES, Place, all_linear, assert_says, decoder, difference, examples, failure, ids, logits,
    merge_f32, open, run,
};

const KINDS: [adapter::Kind; 3] = [
    adapter::Kind::Houlsby,
    adapter::Kind::Lin,
    adapter::Kind::Pfeiffer,
];

fn options(kind: adapter::Kind) -> adapter::Options {
    adapter::Options {
        kind,
        bottleneck: 5,
    }
}

/// Every method's adapter, its values moved away from where they begin.
fn all(model: &Decoder) -> Vec<(AdapterConfig, Adapter)> {
    let weights = model.weights();
    let mut all = Vec::new();
    for options in [
        top::Options::Layers(1),
        top::Options::Layers(2),
        top::Options::Head,
    ] {
        let adapter = top::inject(weights, options).expect("as many blocks");
        all.push((AdapterConfig::Top(options), adapter));
    }
    all.push((
        AdapterConfig::Bitfit(bitfit::Config),
        bitfit::inject(weights),
    ));
    for options in KINDS.map(options) {
        let adapter = adapter::inject(model.config(), options, 3).expect("it is narrow");
        all.push((AdapterConfig::Adapter(options), adapter));
    }
    for (n, (_, adapter)) in all.iter_mut().enumerate() {
        let mut noise = Tensor::zeros(1, adapter.parameters());
        fill_normal(noise.view_mut(), 0.1, n as u64);
        add_assign(adapter.params.flat_mut(), noise.view());
    }
    all
}

fn step_options(batch_size: usize, recompute: Recompute) -> StepOptions<'static> {
    StepOptions {
        learning_rate: 0.0,
        betas: (0.9, 0.999),
        epsilon: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: 0.0,
        scoring: lowrank::train::Scoring::default(),
        batch_size,
        share_prompts: false,
        saving: Saving {
            recompute,
            dtype: DType::F32,
        },
        compute_dtype: lowrank::ComputeDType::F32,
        seed: 7,
        pauses: lowrank::kernels::Pauses::NONE,
    }
}

/// The sum of the losses, and its gradient.
fn gradients(model: &Decoder, adapter: &Adapter, options: &StepOptions) -> (f64, Vec<f32>) {
    let mut state = OptimizerState::new(adapter);
    let rows = examples();
    let rows: Vec<_> = rows.iter().collect();
    let ws = Workspace::new();
    let (sums, _) =
        accumulate(model, adapter, &mut state.grads, &rows, 0, options, &ws).expect("one adapter");
    (sums.loss, state.grads.flat().to_vec())
}

/// Along random directions of every parameter: the change of the loss is the gradient's share of it.
#[test]
fn gradients_are_finite_differences() {
    for family in ["llama", "gpt2"] {
        let model = decoder(family);
        for (config, mut adapter) in all(&model) {
            let options = step_options(5, Recompute::None);
            let (_, gradient) = gradients(&model, &adapter, &options);
            let mut first = 0;
            for slot in 0..adapter.names.len() {
                let (rows, cols) = adapter.params.shape(slot);
                let own = &gradient[first..first + rows * cols];
                first += rows * cols;
                assert!(
                    own.iter().any(|g| *g != 0.0),
                    "{family}, {config:?}: {} gets no gradient",
                    adapter.names[slot]
                );
                // The direction of the gradient itself makes the change largest, against rounding.
                let norm = own.iter().map(|g| g * g).sum::<f32>().sqrt();
                let step = 2e-3_f32;
                let start = adapter.params.view(slot).to_vec();
                let mut loss_at = |way: f32| {
                    let moved = start
                        .iter()
                        .zip(own)
                        .map(|(x, g)| x + way * step * g / norm)
                        .collect();
                    let moved = Tensor::from_f32(rows, cols, moved);
                    adapter.params.view_mut(slot).copy_from(moved.view());
                    gradients(&model, &adapter, &options).0
                };
                let change = (loss_at(1.0) - loss_at(-1.0)) / (2.0 * f64::from(step));
                loss_at(0.0);
                let off = (change - f64::from(norm)).abs() / f64::from(norm);
                assert!(
                    off < 2e-2 || (change - f64::from(norm)).abs() < 2e-2,
                    "{family}, {config:?}, {}: {change:e}, gradient {norm:e}",
                    adapter.names[slot]
                );
            }
        }
    }
}

#[test]
fn micro_batches_and_recomputing_change_nothing() {
    for family in FAMILIES {
        let model = decoder(family);
        for (config, adapter) in all(&model) {
            let (_, whole) = gradients(&model, &adapter, &step_options(5, Recompute::None));
            for recompute in [Recompute::Selective, Recompute::Full] {
                let (_, again) = gradients(&model, &adapter, &step_options(5, recompute));
                assert!(again == whole, "{family}, {config:?}, {recompute}");
            }
            let (_, parts) = gradients(&model, &adapter, &step_options(2, Recompute::None));
            let off = difference(&parts, &whole);
            assert!(off < 1e-5, "{family}, {config:?}: {off:e}");
        }
    }
}

#[test]
fn what_begins_changes_nothing() {
    for family in FAMILIES {
        let model = decoder(family);
        let plain = logits(&model, None, &ids(20, 4));
        let weights = model.weights();
        let mut begun = vec![
            top::inject(weights, top::Options::Head).expect("a head"),
            top::inject(weights, top::Options::Layers(2)).expect("two blocks"),
            bitfit::inject(weights),
        ];
        begun.extend(
            KINDS.map(|kind| {
                adapter::inject(model.config(), options(kind), 1).expect("it is narrow")
            }),
        );
        for adapter in begun {
            let off = difference(&logits(&model, Some(&adapter), &ids(20, 4)), &plain);
            assert!(off < 1e-6, "{family}: {off:e}");
        }
    }
}

fn save(folder: &Path, model: &Decoder, config: &AdapterConfig, adapter: &Adapter) {
    let base = BaseMark {
        name: "base",
        fingerprint: "print",
        labels: None,
    };
    tuning::save(folder, model.config(), config, adapter, base).expect("saved");
}

#[test]
fn a_saved_adapter_loads_as_it_was() {
    for family in FAMILIES {
        let model = decoder(family);
        for (config, adapter) in all(&model) {
            let folder = tempfile::tempdir().expect("a folder");
            save(folder.path(), &model, &config, &adapter);
            let loaded = tuning::load(folder.path(), model.config()).expect("it loads");
            assert_eq!(loaded.config, config);
            assert_eq!(loaded.base_fingerprint.as_deref(), Some("print"));
            assert_eq!(
                tuning::base_of(folder.path()).expect("a config").as_deref(),
                Some("base")
            );
            assert_eq!(loaded.adapter.names, adapter.names);
            assert_eq!(loaded.adapter.replaced, adapter.replaced);
            assert_eq!(loaded.adapter.bottleneck, adapter.bottleneck);
            assert!(
                loaded.adapter.params.flat().to_vec() == adapter.params.flat().to_vec(),
                "{family}, {config:?}"
            );
        }
    }
}

#[test]
fn parameters_are_counted_without_an_adapter() {
    for family in FAMILIES {
        let model = decoder(family);
        for (config, adapter) in all(&model) {
            let counted = match &config {
                AdapterConfig::Top(options) => top::parameters(model.config(), options),
                AdapterConfig::Bitfit(_) => bitfit::parameters(model.config()),
                AdapterConfig::Adapter(options) => adapter::parameters(model.config(), options),
                _ => unreachable!("no other is made here"),
            };
            assert_eq!(counted, adapter.parameters(), "{family}, {config:?}");
        }
    }
    // Table 3 of Hu et al. (2021): GPT-2 medium with 11.09 M of Lin's adapters.
    let mut medium = decoder("gpt2").config().clone();
    (medium.hidden_size, medium.num_hidden_layers) = (1024, 24);
    let lin = adapter::Options {
        kind: adapter::Kind::Lin,
        bottleneck: 224,
    };
    assert_eq!(adapter::parameters(&medium, &lin), 11_089_152);
}

fn config_of(folder: &Path) -> Value {
    let text = fs::read(folder.join("config.json")).expect("config.json");
    serde_json::from_slice(&text).expect("JSON")
}

#[test]
fn merged_weights_have_the_adapters_logits() {
    for family in ["llama", "llama3", "qwen2", "gpt2"] {
        let place = Place::new(family);
        let base = open(&place.path("model"));
        let source = Source::Folder(place.path("model"));
        for (n, (config, adapter)) in all(&base).into_iter().enumerate() {
            let output = place.path(&format!("merged{n}"));
            let passages = [ids(20, 1), ids(33, 2)];
            let merged = merge_f32(&source, &adapter, &passages, &output);
            if matches!(config, AdapterConfig::Adapter(_)) {
                let text = failure(merged);
                assert_says(
                    &text,
                    &["adapter layers cannot be merged", "beside its model"],
                );
                assert!(!output.exists());
                continue;
            }
            let report = merged.expect("the merge");
            assert_eq!(report.modules, adapter.replaced.len());
            let merged = open(&output);
            let off = difference(
                &logits(&merged, None, &ids(24, 9)),
                &logits(&base, Some(&adapter), &ids(24, 9)),
            );
            assert!(off < 1e-6, "{family}, {config:?}: {off:e}");
            let (before, after) = (config_of(&place.path("model")), config_of(&output));
            let head = config == AdapterConfig::Top(top::Options::Head);
            if head {
                assert_eq!(after["tie_word_embeddings"], false, "{family}");
            } else {
                let key = "tie_word_embeddings";
                assert_eq!(after.get(key), before.get(key), "{family}");
            }
            if config.method() == Method::Bitfit && family.starts_with("llama") {
                assert_eq!(after["attention_bias"], true);
                assert_eq!(after["mlp_bias"], true);
            }
        }
    }
    // transformers has no Mistral with biases.
    let place = Place::new("mistral");
    let adapter = bitfit::inject(open(&place.path("model")).weights());
    let text = failure(merge_f32(
        &Source::Folder(place.path("model")),
        &adapter,
        &[ids(9, 1)],
        &place.path("merged"),
    ));
    assert_says(&text, &["biases cannot be merged", "mistral"]);
}

/// Rows of a batch that use different adapters, or none, have the logits that each has alone.
#[test]
fn rows_use_their_own_adapter_layers() {
    for family in ["llama", "gpt2"] {
        let model = decoder(family);
        let mut adapters: Vec<Adapter> = all(&model)
            .into_iter()
            .filter(|(config, _)| config.method() == Method::Adapter)
            .map(|(_, adapter)| adapter)
            .collect();
        adapters.push(super::common::adapter(&model, &all_linear(), 5));
        let set: Vec<&Adapter> = adapters.iter().collect();
        let mut batch = Batch::default();
        let mut expected = Vec::new();
        for (n, adapter) in set.iter().copied().map(Some).chain([None]).enumerate() {
            let ids = ids(7 + n, n as u32);
            let start = batch.tokens();
            batch.push(&ids, &[]);
            if adapter.is_some() {
                batch.adapters.push((start..batch.tokens(), n));
            }
            expected.extend(logits(&model, adapter, &ids));
        }
        let rows: Vec<u32> = (0..batch.tokens() as u32).collect();
        let ws = Workspace::new();
        let together = model.logits(&batch, AdapterSet::new(&set), &rows, None, &ws);
        let off = difference(&together.to_vec(), &expected);
        assert!(off < 1e-5, "{family}: {off:e}");
    }
}

#[test]
fn runs_of_every_method_learn_and_are_loaded() {
    for family in ["llama3", "gpt2"] {
        let place = Place::new(family);
        let base = open(&place.path("model"));
        for (n, change) in [
            |_: &mut TrainConfig| {},
            |config: &mut TrainConfig| config.options.top.head_only = true,
            |config: &mut TrainConfig| config.method = Method::Bitfit,
            |config: &mut TrainConfig| config.method = Method::Adapter,
        ]
        .into_iter()
        .enumerate()
        {
            let mut config = place.config(Method::Top, &format!("run{n}"));
            config.options.adapter.bottleneck = 4;
            change(&mut config);
            let outcome = run(&config).expect("the run");
            let (before, after) = (outcome.first_eval_loss, outcome.eval_loss);
            assert!(after < before, "{family}, {:?}: {outcome:?}", config.method);
            let loaded = tuning::load(&config.output, base.config()).expect("it loads");
            assert_eq!(loaded.config.method(), config.method);
            assert_eq!(loaded.adapter.parameters(), outcome.trainable_parameters);
            let set = [&loaded.adapter];
            let rows = held_out(&place);
            let sums = lowrank::train::evaluate(
                &base,
                AdapterSet::new(&set),
                Some(0),
                &rows,
                &Workspace::new(),
            );
            assert!((sums.mean() - after.expect("held-out rows")).abs() < 1e-6);

            // Going on from what was saved begins where it ended.
            let mut further = config.clone();
            further.init_adapter = Some(config.output.clone());
            further.output = place.path(&format!("further{n}"));
            let again = run(&further).expect("it goes on");
            assert!((again.first_eval_loss.unwrap_or(9.9) - after.unwrap_or(0.0)).abs() < 1e-6);
            further.method = Method::Lora;
            further.output = place.path(&format!("other{n}"));
            let text = failure(run(&further));
            assert_says(&text, &["init_adapter", "the same method"]);
        }
    }
}

pub(super) fn held_out(place: &Place) -> Vec<lowrank::data::Example> {
    let source = Source::Folder(place.path("model"));
    lowrank::data::Dataset::load(
        &place.path("data"),
        lowrank::data::Split::Valid,
        &source.tokenizer().expect("a tokenizer"),
        &lowrank::data::DataOptions::default(),
    )
    .expect("the rows")
    .examples
}

#[test]
fn options_that_do_not_fit_are_named() {
    let model = decoder("llama");
    let text = failure(top::inject(model.weights(), top::Options::Layers(3)));
    assert_says(&text, &["top_layers is 3", "2 blocks"]);
    let wide = adapter::Options {
        kind: adapter::Kind::Lin,
        bottleneck: 33,
    };
    let text = failure(adapter::inject(model.config(), wide, 0));
    assert_says(&text, &["bottleneck is 33", "32"]);
}

#[test]
fn damaged_folders_name_the_file_and_the_field() {
    let model: Arc<Decoder> = decoder("llama");
    let changes: [(usize, &str, Value, &[&str]); 9] = [
        (0, "top_layers", 3.into(), &["`top_layers` is 3", "1 to 2"]),
        (0, "top_layers", "all".into(), &["`top_layers` is \"all\""]),
        (
            0,
            "head_only",
            true.into(),
            &["`top_layers`", "nothing beside"],
        ),
        (
            0,
            "lora_alpha",
            3.into(),
            &["`lora_alpha` is 3", "only the keys"],
        ),
        (3, "bias", "all".into(), &["`bias`", "only the keys"]),
        (
            4,
            "adapter_kind",
            "other".into(),
            &["`adapter_kind`", "houlsby, lin, pfeiffer"],
        ),
        (4, "adapter_kind", Value::Null, &["`adapter_kind` is null"]),
        (
            4,
            "bottleneck",
            1_000_000.into(),
            &["`bottleneck` is 1000000", "1 to the model's 32"],
        ),
        (
            4,
            "bottleneck",
            6.into(),
            &["down.weight: shape [5, 32], the model needs [6, 32]"],
        ),
    ];
    let all = all(&model);
    for (index, key, value, words) in changes {
        let folder = tempfile::tempdir().expect("a folder");
        let (config, adapter) = &all[index];
        save(folder.path(), &model, config, adapter);
        let path = folder.path().join("adapter_config.json");
        let text = fs::read(&path).expect("the config");
        let mut map: Value = serde_json::from_slice(&text).expect("JSON");
        map[key] = value;
        fs::write(&path, map.to_string()).expect("written");
        let text = failure(tuning::load(folder.path(), model.config()));
        assert_says(&text, words);
        assert!(text.contains("adapter_"), "the file is named: {text}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    save(folder.path(), &model, &all[3].0, &all[3].1);
    let text = failure(tuning::load(folder.path(), decoder("gpt2").config()));
    assert_says(&text, &["adapter_model.safetensors", "another model"]);
    fs::remove_file(folder.path().join("adapter_model.safetensors")).expect("it was there");
    let text = failure(tuning::load(folder.path(), model.config()));
    assert_says(&text, &["adapter_model.safetensors"]);
}

/// A head or adapter layers behind the last MLP leave the blocks below them alone.
#[test]
fn backward_goes_no_further_than_needed() {
    use lowrank::model::Reach;
    let model = decoder("llama");
    let reach = |index: usize| {
        let (_, adapter) = &all(&model)[index];
        [0, 1].map(|layer| adapter.reach(layer))
    };
    assert_eq!(reach(0), [Reach::Nothing, Reach::Attention]);
    assert_eq!(reach(1), [Reach::Attention, Reach::Input]);
    assert_eq!(reach(2), [Reach::Nothing, Reach::Nothing]);
    assert_eq!(reach(3), [Reach::Attention, Reach::Input]);
    assert_eq!(reach(4), [Reach::AttentionBottleneck, Reach::Input]);
    assert_eq!(reach(6), [Reach::MlpBottleneck, Reach::Input]);
    let (_, houlsby) = &all(&model)[4];
    assert!(houlsby.bottleneck.contains_key(&(1, Sublayer::Attention)));
}
