//! Relative positions (DeBERTa): company, several adapters, dropout, numbers in bf16, files that lack a part, and what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lowrank::base::Source;
use lowrank::data::{Example, Label};
use lowrank::merge::{MergeOptions, merge};
use lowrank::model::families::read_config;
use lowrank::model::{
    Adapter, AdapterSet, Batch, Decoder, Pooling, Purpose, Recompute, Saving, Scored,
    VirtualTokens, Weights,
};
use lowrank::train::{
    OptimizerState, Scoring, StepOptions, TrainConfig, accumulate, batch_for, classified,
};
use lowrank::tuning::prefix::{self, Init, Kind, Options};
use lowrank::tuning::{self, Method, bitfit, full};
use lowrank::{DType, Workspace};
use lowrank_formats::checkpoint::{Checkpoint, StoredDType};
use lowrank_formats::hf_config::HfConfig;
use lowrank_formats::safetensors_writer::{TensorSpec, write_safetensors};
use serde_json::{Value, json};

use super::common::{
    adapter, all_linear, assert_says, difference, failure, ids, lora_config, run, tensors,
    write_tokenizer,
};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens_classifiers")
        .join(name)
}

const CLASSIFIER: Purpose = Purpose::SequenceClassifier { labels: 3 };

fn model(name: &str, purpose: Purpose) -> Arc<Decoder> {
    let weights = Weights::load_for(&golden(name), DType::F32, purpose);
    Decoder::new(weights.expect("the golden model loads"))
}

/// Ids of the golden models' vocabulary.
fn tokens(length: usize, seed: u32) -> Vec<u32> {
    ids(length, seed).iter().map(|id| id % 61).collect()
}

fn rows() -> Vec<Example> {
    let lengths = [14, 3, 30, 1, 9];
    let rows = lengths.iter().enumerate().map(|(n, length)| Example {
        ids: tokens(*length, n as u32),
        label: Some(Label::Class(n as u32 % 3)),
        line: n,
        ..Example::default()
    });
    rows.collect()
}

/// The hidden rows of a sequence by itself.
fn alone(model: &Decoder, adapter: Option<&Adapter>, row: &Example) -> Vec<f32> {
    let row = Example {
        label: None,
        ..row.clone()
    };
    let set: Vec<&Adapter> = adapter.into_iter().collect();
    let virtual_tokens = adapter.map(Adapter::virtual_tokens).unwrap_or_default();
    let mut batch = classified(model.config(), Pooling::Each, [&row], virtual_tokens);
    if adapter.is_some() {
        batch = batch.with_adapter(0);
    }
    let ws = Workspace::new();
    let forward = model.forward(&batch, AdapterSet::new(&set), &ws);
    let hidden = forward.hidden().to_vec();
    forward.finish();
    hidden
}

/// How many of the table's rows a batch computes depends on its longest sequence, and each adapter has its own. No bit may.
#[test]
fn a_sequence_has_the_bits_that_it_has_alone() {
    for name in ["deberta", "deberta_biased", "deberta_tokens"] {
        let model = model(name, Purpose::Features);
        let made = [
            adapter(&model, &all_linear(), 1),
            adapter(&model, &lora_config(&["query_proj", "value_proj"]), 2),
        ];
        let set: Vec<&Adapter> = made.iter().collect();
        let uses = [Some(1), None, Some(0), Some(1), None];
        let mut batch = Batch::bidirectional(VirtualTokens::default());
        for (row, adapter) in rows().iter().zip(uses) {
            let all: Vec<u32> = (0..row.ids.len() as u32).collect();
            let from = batch.tokens();
            batch.push_scored(&row.ids, &[], Scored::Tokens(&all), false);
            batch
                .adapters
                .extend(adapter.map(|adapter| (from..batch.tokens(), adapter)));
        }
        let ws = Workspace::new();
        let forward = model.forward(&batch, AdapterSet::new(&set), &ws);
        let together = forward.hidden().to_vec();
        let mut apart = Vec::new();
        for (row, adapter) in rows().iter().zip(uses) {
            apart.extend(alone(&model, adapter.map(|i| &made[i]), row));
        }
        assert!(together == apart, "{name}");
        forward.finish();
    }
}

fn options(batch_size: usize, saving: Saving) -> StepOptions<'static> {
    StepOptions {
        learning_rate: 0.0,
        betas: (0.9, 0.999),
        epsilon: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: 0.0,
        scoring: Scoring::default(),
        batch_size,
        share_prompts: false,
        saving,
        compute_dtype: lowrank::ComputeDType::F32,
        seed: 7,
        pauses: lowrank::kernels::Pauses::NONE,
    }
}

/// The loss of a training pass over all rows, and the gradients, slot by slot.
fn gradients(model: &Decoder, adapter: &Adapter, saving: Saving) -> (f64, Vec<Vec<f32>>) {
    let mut state = OptimizerState::new(adapter);
    let all = rows();
    let all: Vec<&Example> = all.iter().collect();
    let (options, ws) = (options(all.len(), saving), Workspace::new());
    let (sums, _) =
        accumulate(model, adapter, &mut state.grads, &all, 0, &options, &ws).expect("one adapter");
    let slots = 0..adapter.names.len();
    let grads = slots.map(|slot| state.grads.view(slot).to_vec()).collect();
    (sums.loss, grads)
}

/// With dropout, the table's rows lose numbers of their own on their way through a branch. What is computed again loses the same.
#[test]
fn gradients_under_dropout_are_finite_differences() {
    let model = model("deberta", CLASSIFIER);
    let mut config = lora_config(&["query_proj", "key_proj"]);
    config.lora_dropout = 0.4;
    let mut made = adapter(&model, &config, 1);
    let (_, kept) = gradients(&model, &made, Saving::default());
    for recompute in [Recompute::Selective, Recompute::Full] {
        let saving = Saving {
            recompute,
            dtype: DType::F32,
        };
        assert!(gradients(&model, &made, saving).1 == kept, "{recompute}");
    }
    let norm = kept
        .iter()
        .flatten()
        .map(|g| f64::from(*g).powi(2))
        .sum::<f64>();
    let step = 2e-2 / norm.sqrt();
    let mut loss = |by: f64| {
        for (slot, grads) in kept.iter().enumerate() {
            let (rows, cols) = made.params.shape(slot);
            let values = made.params.view(slot).to_vec();
            let moved = values.iter().zip(grads);
            let moved = moved
                .map(|(x, g)| x + (by * f64::from(*g)) as f32)
                .collect();
            let moved = lowrank_kernels::Tensor::from_f32(rows, cols, moved);
            made.params.view_mut(slot).copy_from(moved.view());
        }
        gradients(&model, &made, Saving::default()).0
    };
    let above = loss(step);
    let below = loss(-2.0 * step);
    let slope = (above - below) / (2.0 * step);
    assert!(
        (slope - norm).abs() < 5e-3 * norm,
        "along the gradient the loss changes by {slope}, not by {norm}"
    );
}

/// The gradients of the table and its norm are those of full training, whatever else is trained.
#[test]
fn biases_have_the_gradients_of_full_training() {
    let model = model("deberta", CLASSIFIER);
    let (biases, all) = (
        bitfit::inject(model.weights()),
        full::inject(model.weights()),
    );
    let (_, found) = gradients(&model, &biases, Saving::default());
    let (_, expected) = gradients(&model, &all, Saving::default());
    assert!(
        biases
            .names
            .contains(&"deberta.encoder.LayerNorm.bias".to_owned())
    );
    assert!(
        all.names
            .contains(&"deberta.encoder.rel_embeddings.weight".to_owned())
    );
    for (name, found) in biases.names.iter().zip(&found) {
        let slot = all.slot(name).expect("a weight of the model");
        let off = difference(found, &expected[slot]);
        // A key's bias has none but for rounding.
        let is_key = name.contains("key_proj")
            && difference(found, &vec![0.0; found.len()]) == f64::INFINITY;
        assert!(off < 1e-4 || is_key, "{name}: {off:e}");
    }
}

#[test]
fn numbers_in_bf16_change_little() {
    let exact = model("deberta", CLASSIFIER);
    let weights = Weights::load_for(&golden("deberta"), DType::Bf16, CLASSIFIER);
    let rounded = Decoder::new(weights.expect("the golden model loads"));
    let none = Adapter::new(Vec::new());
    let logits = |model: &Decoder| {
        let batch = batch_for(model.config(), &rows(), VirtualTokens::default());
        let set = [&none];
        let ws = Workspace::new();
        model.classify(&batch, AdapterSet::new(&set), &ws).to_vec()
    };
    let off = difference(&logits(&rounded), &logits(&exact));
    assert!(off > 0.0 && off < 5e-2, "{off:e}");

    let made = adapter(&exact, &all_linear(), 1);
    let saving = |dtype| Saving {
        recompute: Recompute::None,
        dtype,
    };
    let (_, kept) = gradients(&rounded, &made, saving(DType::Bf16));
    let (_, wide) = gradients(&rounded, &made, saving(DType::F32));
    let kept: Vec<f32> = kept.into_iter().flatten().collect();
    let wide: Vec<f32> = wide.into_iter().flatten().collect();
    let off = difference(&kept, &wide);
    assert!(off > 0.0 && off < 5e-2, "{off:e}");
}

#[test]
fn virtual_tokens_are_rows_and_not_keys() {
    let model = model("deberta", Purpose::Features);
    let of = |kind| Options {
        kind,
        prefix: 2,
        infix: 0,
    };
    let made = prefix::inject(&model, of(Kind::Embedding), Init::Text, &tokens(2, 8), 0);
    let made = made.expect("embeddings have distances");
    let row = &rows()[0];
    let text = Example {
        ids: [tokens(2, 8), row.ids.clone()].concat(),
        ..row.clone()
    };
    let hidden = alone(&model, None, &text);
    let behind = &hidden[2 * model.config().hidden_size..];
    let off = difference(&alone(&model, Some(&made), row), behind);
    assert!(off < 1e-6, "{off:e}");

    let text = failure(prefix::inject(
        &model,
        of(Kind::Layer),
        Init::Random,
        &[],
        0,
    ));
    assert_says(
        &text,
        &[
            "prefix_kind layer",
            "deberta-v2",
            "use prefix_kind embedding",
        ],
    );
}

/// A copy of a golden model with a tokenizer and labelled texts, for a run.
pub(crate) struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new(name: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let place = Self { folder };
        let model = place.path("model");
        fs::create_dir(&model).expect("a folder for the model");
        for file in ["config.json", "model.safetensors"] {
            fs::copy(golden(name).join(file), model.join(file)).expect("the golden model");
        }
        write_tokenizer(&model, 61);
        fs::create_dir(place.path("data")).expect("a folder for the data");
        let rows = (0..12).map(|n| {
            let text = [
                "A GOOD ONE",
                "A BAD ONE, AND LONGER THAN THIRTY TWO TOKENS",
                "SO SO",
            ][n % 3];
            let label = ["good", "bad", "so"][n % 3];
            json!({"text": text, "label": label}).to_string()
        });
        let rows: Vec<String> = rows.collect();
        fs::write(place.path("data").join("train.jsonl"), rows.join("\n")).expect("the rows");
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn config(&self, method: Method, output: &str) -> TrainConfig {
        let mut config = TrainConfig {
            learning_rate: 1e-2,
            batch_size: 4,
            base_dtype: lowrank::train::BaseDtype::F32,
            ..TrainConfig::new(
                method,
                self.path("model").display().to_string(),
                self.path("data"),
                self.path(output),
            )
        };
        config.options.lora.r = 2;
        config
    }

    /// Rewrites the model's tensors without those whose names say so, and with more vectors.
    fn change(&self, drops: impl Fn(&str) -> bool, more: &[(&str, usize)]) {
        let path = self.path("model").join("model.safetensors");
        let checkpoint = Checkpoint::open(&path).expect("the weights");
        let kept = checkpoint.names().filter(|name| !drops(name)).map(|name| {
            let entry = checkpoint.get(name).expect("a listed tensor");
            let values = entry.to_f32().expect("floats");
            (name.to_owned(), entry.shape, values)
        });
        let more = more.iter();
        let more = more.map(|(name, len)| ((*name).to_owned(), vec![*len], vec![0.5; *len]));
        let all: Vec<_> = kept.chain(more).collect();
        let specs = all.iter().map(|(name, shape, _)| TensorSpec {
            name: name.clone(),
            dtype: StoredDType::F32,
            shape: shape.clone(),
        });
        let specs: Vec<TensorSpec> = specs.collect();
        drop(checkpoint);
        write_safetensors(&path, &specs, &BTreeMap::new(), |i, out| {
            let mut values = all[i].2.iter();
            values.try_for_each(|value| out.write_all(&value.to_le_bytes()))
        })
        .expect("the weights are written");
    }
}

/// As the released files are: heads of pretraining, a table of absolute positions, and neither pooler nor classifier.
#[test]
fn a_pooler_that_the_files_lack_is_trained_and_saved() {
    let place = Place::new("deberta");
    let of_head = |name: &str| name.starts_with("pooler.") || name.starts_with("classifier.");
    let more = [
        ("deberta.embeddings.position_embeddings.weight", 24),
        ("lm_predictions.lm_head.bias", 61),
        ("mask_predictions.dense.bias", 24),
    ];
    place.change(of_head, &more);
    let config = place.config(Method::Lora, "run");
    let outcome = run(&config).expect("the training");
    // Branches of rank 2 beside two linears of two blocks, the pooler and the classifier.
    let expected = 2 * 2 * 2 * (24 + 24) + (24 * 24 + 24) + 3 * (24 + 1);
    assert_eq!(outcome.trainable_parameters, expected);
    let text = fs::read_to_string(place.path("run").join("adapter_config.json")).expect("a config");
    let saved: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(
        saved["modules_to_save"],
        json!(["classifier", "score", "pooler"])
    );
    assert_eq!(saved["target_modules"], json!(["query_proj", "value_proj"]));
    let names: Vec<String> = tensors(&place.path("run").join("adapter_model.safetensors"))
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert!(
        names.contains(&"base_model.model.pooler.dense.weight".to_owned()),
        "{names:?}"
    );

    let source = Source::find(&place.path("model").display().to_string()).expect("the model");
    let shapes = source.model_config_for(CLASSIFIER).expect("its config");
    assert_eq!(source.shapes_for(CLASSIFIER).expect("its shapes"), shapes);
    let loaded = tuning::load(&place.path("run"), &shapes).expect("the adapter");
    let weights =
        Weights::load_for(&place.path("model"), DType::F32, CLASSIFIER).expect("the model");
    assert_eq!(weights.new_names().len(), 4);
    assert_eq!(weights.untrained(Some(&loaded.adapter)), None);

    // What is merged needs no adapter, and is a whole classifier.
    let merged = place.path("merged");
    let report = merge(&MergeOptions {
        source: &source,
        purpose: CLASSIFIER,
        labels: None,
        adapter: &loaded.adapter,
        passages: &[tokens(20, 1)],
        output: &merged,
        dtype: DType::F32,
        overwrite: false,
        force: false,
    });
    report.expect("the merge");
    let merged = Weights::load_for(&merged, DType::F32, CLASSIFIER).expect("the merged model");
    assert_eq!(merged.new_names(), Vec::<String>::new());
    let (merged, base) = (Decoder::new(merged), Decoder::new(weights));
    let logits = |model: &Decoder, adapter: &Adapter| {
        let batch = batch_for(model.config(), &rows(), VirtualTokens::default());
        let set = [adapter];
        model
            .classify(&batch, AdapterSet::new(&set), &Workspace::new())
            .to_vec()
    };
    let none = Adapter::new(Vec::new());
    let off = difference(&logits(&merged, &none), &logits(&base, &loaded.adapter));
    assert!(off < 1e-5, "{off:e}");
}

/// Nothing counts positions, so texts are as long as they are: 44 tokens, where config.json says 32.
#[test]
fn rows_are_not_cut_at_positions_that_nothing_counts() {
    let longest = |name: &str| {
        let place = Place::new(name);
        let mut config = place.config(Method::Lora, "run");
        config.max_seq_length = 40;
        let model = Source::find(&config.model).expect("the model");
        let shapes = model.model_config_for(CLASSIFIER).expect("its config");
        config.row_length(&shapes)
    };
    assert_eq!(longest("deberta"), 40);
    assert_eq!(longest("deberta_biased"), 32);
    let place = Place::new("deberta");
    run(&place.config(Method::Lora, "run")).expect("the training");
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let read = |field: &str, value: Value| {
        let text = fs::read(golden("deberta").join("config.json")).expect("config.json");
        let mut map: serde_json::Map<String, Value> = serde_json::from_slice(&text).expect("JSON");
        map.insert(field.to_owned(), value);
        read_config(&HfConfig::from_map(Path::new("config.json"), map))
    };
    for (field, value) in [
        ("conv_kernel_size", json!(3)),
        ("share_att_key", json!(false)),
        ("share_att_key", Value::Null),
        ("embedding_size", json!(12)),
        ("pooler_hidden_size", json!(12)),
        ("attention_head_size", json!(4)),
        ("type_vocab_size", json!(1)),
        ("pos_att_type", json!(["c2p", "p2p"])),
        ("pos_att_type", json!([])),
        ("pos_att_type", Value::Null),
        ("pos_att_type", json!(3)),
        ("position_buckets", json!(1)),
        ("position_buckets", json!(22)),
        ("hidden_act", json!("tanhshrink")),
    ] {
        let text = match read(field, value.clone()) {
            Ok(_) => panic!("{field} {value} has to be refused"),
            Err(error) => error.to_string(),
        };
        assert_says(&text, &[field]);
    }
    let text = read("relative_attention", json!(false)).expect_err("a norm that nothing reads");
    assert_says(&text.to_string(), &["norm_rel_ebd"]);
    for (field, value) in [
        ("pos_att_type", json!("C2P | p2c")),
        ("position_buckets", json!(20)),
        ("position_buckets", json!(-1)),
        ("max_relative_positions", json!(-1)),
        ("conv_kernel_size", json!(0)),
        ("embedding_size", json!(24)),
        ("type_vocab_size", json!(0)),
    ] {
        read(field, value).unwrap_or_else(|error| panic!("{field}: {error}"));
    }
}
