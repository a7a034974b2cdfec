//! Rows of tokens that are an adapter's own: their gradients, their company in a batch, and their way from a run's settings to a merged
//! model.

use std::fs;
use std::path::Path;

use lowrank::base::{Base, Source};
use lowrank::generate::{GenerateOptions, Penalties, PromptIds, Sampling, generate};
use lowrank::merge::F32_LIMIT;
use lowrank::model::{Adapter, AdapterSet, Batch, Decoder, WeightId};
use lowrank::objective::{self, NextToken};
use lowrank::report::inspect;
use lowrank::settings::TrainConfig;
use lowrank::train::{OptimizerState, Start, batch_of, evaluate};
use lowrank::tuning::lora::{self, InitLoraWeights};
use lowrank::tuning::{self, BaseMark, Method};
use lowrank::{DType, Workspace};
use lowrank_formats::peft::{LoraConfig, TokenIndices};
use lowrank_kernels::{Tensor, fill_normal};
use serde_json::{Value, json};

use super::common::{
    FAMILIES, Place, Watch, adapter, all_linear, assert_says, decoder, difference, examples,
    failure, ids, logits, merge_f32, open, run, tensors,
};

fn tables(tables: &[(&str, &[u32])]) -> TokenIndices {
    let tables = tables
        .iter()
        .map(|(name, ids)| ((*name).to_owned(), ids.to_vec()));
    TokenIndices::Tables(tables.collect())
}

/// Random branches and rows.
fn with_rows(model: &Decoder, rows: TokenIndices, seed: u64) -> Adapter {
    let config = LoraConfig {
        trainable_token_indices: Some(rows),
        ..all_linear()
    };
    let mut made = adapter(model, &config, seed);
    let slots: Vec<usize> = made
        .token_rows
        .tables()
        .map(|(_, rows)| rows.slot())
        .collect();
    for slot in slots {
        fill_normal(made.params.view_mut(slot), 0.3, seed + slot as u64);
    }
    made
}

fn embedding(ids: &[u32]) -> TokenIndices {
    TokenIndices::Embedding(ids.to_vec())
}

/// The loss of the examples, and the gradient of all that is trained.
fn loss(model: &Decoder, trained: &Adapter) -> (f64, Vec<Vec<f32>>) {
    let rows = examples();
    let batch = batch_of(&rows, trained.virtual_tokens());
    let (set, ws) = ([trained], Workspace::new());
    let (set, labels) = (AdapterSet::new(&set), NextToken::of(&batch));
    let mut grads = OptimizerState::new(trained).grads;
    let options = lowrank::model::PassOptions::default();
    let sums =
        objective::loss_and_gradients(model, &batch, set, &labels, &mut grads, &options, &ws)
            .expect("one adapter");
    let evaluated = objective::loss(model, &batch, set, &labels, &ws);
    assert_eq!(sums.loss, evaluated.loss);
    let slots = 0..trained.names.len();
    (
        sums.loss,
        slots.map(|slot| grads.view(slot).to_vec()).collect(),
    )
}

#[test]
fn rows_have_the_gradient_of_their_finite_differences() {
    for family in FAMILIES {
        let model = decoder(family);
        // The ids of the first example, of which two are in others, too, and one that is nowhere.
        let first = ids(17, 0);
        let some = [first[1], first[9], 2, first[16]];
        let both = tables(&[
            ("lm_head", &some[1..]),
            (embedding_name(family), &some[..2]),
        ]);
        for rows in [embedding(&some), both] {
            let mut trained = with_rows(&model, rows.clone(), 5);
            let (_, gradients) = loss(&model, &trained);
            let slots: Vec<usize> = trained.token_rows.tables().map(|(_, r)| r.slot()).collect();
            for slot in slots {
                let gradient = &gradients[slot];
                let norm = gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
                assert!(norm > 1e-3, "{family}: {norm}");
                let start = trained.params.view(slot).to_vec();
                let (rows, cols) = trained.params.shape(slot);
                let step = 2e-3;
                let mut at = |way: f32| {
                    let moved = start.iter().zip(gradient);
                    let moved = moved.map(|(x, g)| x + way * step * g / norm).collect();
                    let moved = Tensor::from_f32(rows, cols, moved);
                    trained.params.view_mut(slot).copy_from(moved.view());
                    loss(&model, &trained).0
                };
                let change = (at(1.0) - at(-1.0)) / (2.0 * f64::from(step));
                at(0.0);
                let off = (change - f64::from(norm)).abs() / f64::from(norm);
                assert!(
                    off < 1e-2,
                    "{family} {rows} of {cols}: {change}, gradient {norm}"
                );
            }
        }
    }
}

fn embedding_name(family: &str) -> &'static str {
    if family == "gpt2" {
        "wte"
    } else {
        "embed_tokens"
    }
}

/// The rows of a table that no one trains have the values that they had, so an adapter with the base's rows is one without.
#[test]
fn the_bases_own_rows_change_nothing() {
    for family in ["llama", "qwen2", "gemma2", "gpt2"] {
        let model = decoder(family);
        let some = ids(9, 3);
        let mut some: Vec<u32> = some[..6].to_vec();
        some.sort_unstable();
        some.dedup();
        let mut made = with_rows(&model, embedding(&some), 1);
        let plain = adapter(&model, &all_linear(), 1);
        let table = model.weights().view(WeightId::Embedding);
        let slot = made.token_rows.embedding.as_ref().expect("rows").slot();
        for (place, id) in some.iter().enumerate() {
            let from = table.slice_rows(*id as usize..*id as usize + 1);
            let mut to = made.params.view_mut(slot).slice_rows(place..place + 1);
            to.copy_from(from);
        }
        let sequence = ids(30, 3);
        let off = difference(
            &logits(&model, Some(&made), &sequence),
            &logits(&model, Some(&plain), &sequence),
        );
        assert!(off < 1e-6, "{family}: {off:e}");
    }
}

#[test]
fn each_row_of_a_batch_has_its_own_adapters_rows_to_the_bit() {
    for family in ["llama", "qwen2", "granite", "gpt2"] {
        let model = decoder(family);
        let some = ids(11, 0);
        let one = with_rows(&model, embedding(&some[..3]), 1);
        let two = with_rows(&model, embedding(&[some[1], some[5], 7]), 2);
        let set = [&one, &two];
        let rows = [
            (11, Some(0)),
            (7, None),
            (23, Some(1)),
            (2, None),
            (16, Some(0)),
        ];
        let mut batch = Batch::default();
        let mut expected = Vec::new();
        for &(length, used) in &rows {
            let ids = ids(length, 0);
            let start = batch.tokens();
            batch.push(&ids, &[]);
            if let Some(index) = used {
                batch.adapters.push((start..start + length, index));
            }
            expected.extend(logits(&model, used.map(|index| set[index]), &ids));
        }
        let all: Vec<u32> = (0..batch.tokens() as u32).collect();
        let together = model.logits(&batch, AdapterSet::new(&set), &all, None, &Workspace::new());
        assert!(together.to_vec() == expected, "{family}");

        let prompts: Vec<PromptIds> = rows
            .iter()
            .map(|&(length, adapter)| PromptIds {
                ids: ids(length, 0),
                adapter,
            })
            .collect();
        let options = GenerateOptions {
            max_new_tokens: 10,
            sampling: Sampling::default(),
            no_repeat_ngram_size: 0,
            penalties: Penalties::NONE,
            logit_bias: Vec::new(),
            stop_ids: Vec::new(),
        };
        let ws = Workspace::new();
        let set = AdapterSet::new(&set);
        let made = generate(&model, set, &prompts, &options, &ws, |_, _| true);
        for (prompt, made) in prompts.iter().zip(&made) {
            let alone = [prompt.clone()];
            let alone = generate(&model, set, &alone, &options, &ws, |_, _| true);
            assert_eq!(alone[0].ids, made.ids, "{family}");
        }
    }
}

fn config(place: &Place, name: &str, rows: &TokenIndices) -> TrainConfig {
    place.config(Method::Lora, name).with_options(|options| {
        options.lora.trainable_token_indices = Some(rows.clone());
    })
}

fn written(folder: &Path) -> Value {
    let text = fs::read_to_string(folder.join("adapter_config.json")).expect("the config");
    serde_json::from_str(&text).expect("JSON")
}

const ROWS: &str = "token_adapter.trainable_tokens_delta";

/// 'a', 'n' and 'y' of the data, and the end of a text.
const IDS: [u32; 4] = [68, 81, 92, 2];

#[test]
fn a_run_trains_these_rows_alone_and_its_files_are_pefts() {
    for (family, table) in [
        ("llama", "model.embed_tokens"),
        ("qwen2", "model.embed_tokens"),
        ("gpt2", "transformer.wte"),
    ] {
        let place = Place::new(family);
        let config = config(&place, "run", &embedding(&IDS));
        let outcome = run(&config).expect("the run");
        assert!(outcome.eval_loss < outcome.first_eval_loss, "{family}");
        let plain = run(&place.config(Method::Lora, "plain")).expect("the run");
        let more = outcome.trainable_parameters - plain.trainable_parameters;
        assert_eq!(more, IDS.len() * 32);

        let (found, other) = (config.output.clone(), place.path("plain"));
        let file = |folder: &Path| folder.join("adapter_model.safetensors");
        let (found, other) = (tensors(&file(&found)), tensors(&file(&other)));
        assert_eq!(found.len(), other.len() + 1);
        let name = format!("base_model.model.{table}.{ROWS}");
        let (_, values) = found
            .iter()
            .find(|(found, _)| *found == name)
            .expect("rows");
        let model = open(&place.path("model"));
        let base = model.weights().view(WeightId::Embedding);
        for (row, id) in values.chunks(32).zip(IDS) {
            let base = base.slice_rows(id as usize..id as usize + 1).to_vec();
            // The end is a target alone, which an untied head's frozen row predicts.
            let trained = id != 2 || family != "llama";
            let moved = difference(row, &base) > 1e-3;
            assert_eq!(moved, trained, "{family}: {id}");
        }
        assert_eq!(
            written(&config.output)["trainable_token_indices"],
            json!(IDS)
        );
        assert_eq!(
            written(&place.path("plain"))["trainable_token_indices"],
            Value::Null
        );

        let loaded = tuning::load(&config.output, model.config()).expect("it loads");
        assert_says(&loaded.coverage, &[&format!("4 rows of {table}")]);
        assert_eq!(loaded.adapter.parameters(), outcome.trainable_parameters);
        let rows = super::methods::held_out(&place);
        let (set, ws) = ([&loaded.adapter], Workspace::new());
        let sums = evaluate(&model, AdapterSet::new(&set), Some(0), &rows, &ws);
        assert!((sums.mean() - outcome.eval_loss.expect("held-out rows")).abs() < 1e-6);
        // What is planned is what is trained.
        let laid_out = config.lay_out(model.config()).expect("it fits");
        assert_eq!(laid_out.parameters(), outcome.trainable_parameters);

        // Going on from what was saved begins where it ended.
        let mut further = place.config(Method::Lora, "further");
        further.init_adapter = Some(config.output.clone());
        let again = run(&further).expect("it goes on");
        assert_eq!(again.first_eval_loss, outcome.eval_loss);
        assert_eq!(
            written(&further.output)["trainable_token_indices"],
            json!(IDS)
        );
    }
}

#[test]
fn it_begins_with_the_bases_rows() {
    let place = Place::new("llama");
    let both = tables(&[("embed_tokens", &IDS), ("lm_head", &IDS[1..])]);
    let config = TrainConfig {
        max_steps: Some(1),
        learning_rate: 1e-30,
        ..config(&place, "run", &both)
    };
    run(&config).expect("the run");
    let found = tensors(&config.output.join("adapter_model.safetensors"));
    let model = open(&place.path("model"));
    for (table, id, ids) in [
        ("model.embed_tokens", WeightId::Embedding, &IDS[..]),
        ("lm_head", WeightId::Head, &IDS[1..]),
    ] {
        let name = format!("base_model.model.{table}.{ROWS}");
        let (_, values) = found
            .iter()
            .find(|(found, _)| *found == name)
            .expect("rows");
        let base = model.weights().view(id);
        let base = ids
            .iter()
            .flat_map(|id| base.slice_rows(*id as usize..*id as usize + 1).to_vec());
        assert_eq!(*values, base.collect::<Vec<_>>(), "{table}");
    }
}

#[test]
fn a_stopped_run_goes_on_bit_for_bit() {
    for (family, rows) in [
        ("qwen2", embedding(&IDS)),
        (
            "llama",
            tables(&[("lm_head", &IDS), ("embed_tokens", &IDS[..1])]),
        ),
    ] {
        let place = Place::new(family);
        run(&config(&place, "whole", &rows)).expect("the run");
        let stopped = config(&place, "stopped", &rows);
        Watch::stopping_after(4)
            .train(&stopped, Start::Fresh { overwrite: false })
            .expect("it stops");
        Watch::default()
            .train(&stopped, Start::Resume)
            .expect("it goes on");
        for name in ["adapter_model.safetensors", "adapter_config.json"] {
            let read = |run: &str| fs::read(place.path(run).join(name)).expect("the file");
            assert!(read("whole") == read("stopped"), "{family}: {name}");
        }
    }
}

#[test]
fn rows_are_written_into_the_merged_model() {
    for (family, rows, tied) in [
        ("llama", embedding(&IDS), false),
        ("llama", tables(&[("lm_head", &IDS)]), false),
        ("qwen2", embedding(&IDS), true),
        // The head's rows are others than the embedding's: the two are taken apart.
        (
            "qwen2",
            tables(&[("lm_head", &IDS), ("embed_tokens", &[68])]),
            false,
        ),
        ("qwen2", tables(&[("lm_head", &IDS)]), false),
        ("gpt2", embedding(&IDS), true),
        ("gemma2", embedding(&IDS), true),
    ] {
        let place = Place::new(family);
        let model = open(&place.path("model"));
        let made = with_rows(&model, rows.clone(), 3);
        let source = Source::Folder(place.path("model"));
        let merged = place.path("merged");
        let sequence: Vec<u32> = IDS.iter().copied().chain(ids(20, 1)).collect();
        let report =
            merge_f32(&source, &made, std::slice::from_ref(&sequence), &merged).expect("it merges");
        let tables = made.token_rows.tables().count();
        assert_eq!(report.modules, made.low_rank.len() + tables);
        assert!(report.max_logit_difference < F32_LIMIT);
        let alone = open(&merged);
        assert_eq!(
            alone.config().tie_word_embeddings,
            tied,
            "{family} {rows:?}"
        );
        let with = logits(&model, Some(&made), &sequence);
        let off = difference(&with, &logits(&alone, None, &sequence));
        assert!(off < 1e-4, "{family} {rows:?}: {off:e}");
        let plain = with_rows(&model, embedding(&[96]), 3);
        let without = logits(&model, Some(&plain), &sequence);
        assert!(difference(&with, &without) > 1e-2, "{family} {rows:?}");
    }
}

/// Parts of a fused linear and modules that are saved as a whole stand beside them in the file.
#[test]
fn rows_come_back_beside_fused_parts_and_saved_modules() {
    let place = Place::new("gpt2");
    let config = config(&place, "run", &embedding(&IDS)).with_options(|options| {
        let names = |list: &[&str]| {
            lowrank::tuning::targets::Targets::Names(list.iter().map(ToString::to_string).collect())
        };
        options.targets.target_modules = Some(names(&["c_attn.q", "c_attn.v", "c_fc"]));
        options.saved.modules_to_save = Some(names(&["ln_f"]));
    });
    let outcome = run(&config).expect("the run");
    let model = open(&place.path("model"));
    let loaded = tuning::load(&config.output, model.config()).expect("it loads");
    assert_eq!(loaded.adapter.parameters(), outcome.trainable_parameters);
    let rows = super::methods::held_out(&place);
    let (set, ws) = ([&loaded.adapter], Workspace::new());
    let sums = evaluate(&model, AdapterSet::new(&set), Some(0), &rows, &ws);
    assert!((sums.mean() - outcome.eval_loss.expect("held-out rows")).abs() < 1e-6);
}

#[test]
fn inspection_lists_the_rows_with_their_change() {
    let place = Place::new("qwen2");
    let config = config(&place, "run", &embedding(&IDS));
    let outcome = run(&config).expect("the run");
    let source = Source::Folder(place.path("model"));
    let base: Base = source.load(DType::F32).expect("the model");
    let base = base.into_network();
    let loaded = tuning::load(&config.output, base.decoder.config()).expect("it loads");
    let report = inspect::adapter(&config.output, &loaded, &base).expect("it is inspected");
    assert_eq!(report.options["trainable_token_indices"], json!(IDS));
    let parameters: u64 = report.modules.iter().map(|module| module.parameters).sum();
    assert_eq!(parameters, outcome.trainable_parameters as u64);
    let rows = report.modules.iter().find(|m| m.module.ends_with(ROWS));
    let rows = rows.expect("the rows are listed");
    assert_eq!(rows.parameters, 4 * 32);
    assert!(rows.relative_change.is_some_and(|x| x > 0.0 && x < 1.0));
}

/// What a classifier reads is embedded with the adapter's rows, too; it has no head for them.
#[test]
fn an_encoder_of_texts_reads_them() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens_classifiers/bert");
    let purpose = lowrank::model::Purpose::SequenceClassifier { labels: 3 };
    let Ok(weights) = lowrank::model::Weights::load_for(&folder, DType::F32, purpose) else {
        panic!("the golden classifier loads")
    };
    let model = Decoder::new(weights);
    let made = with_rows(&model, embedding(&[5, 7]), 1);
    assert!(made.token_rows.head.is_none());
    let name = &made.names[made.token_rows.embedding.as_ref().expect("rows").slot()];
    assert_eq!(
        *name,
        format!("base_model.model.bert.embeddings.word_embeddings.{ROWS}")
    );
    let plain = adapter(&model, &all_linear(), 1);
    let vectors = |adapter: &Adapter, ids: &[u32]| {
        let mut batch = Batch::bidirectional(adapter.virtual_tokens());
        batch.push(ids, &vec![true; ids.len()]);
        batch.supervised = (0..ids.len() as u32).collect();
        batch.pools.push(0..ids.len());
        let (set, ws) = ([adapter], Workspace::new());
        let batch = batch.with_adapter(0);
        model.pooled(&batch, AdapterSet::new(&set), &ws).to_vec()
    };
    let with = [5, 9, 7, 11];
    assert!(difference(&vectors(&made, &with), &vectors(&plain, &with)) > 1e-3);
    let without = [6, 9, 8, 11];
    assert_eq!(vectors(&made, &without), vectors(&plain, &without));
}

fn refused(family: &str, rows: TokenIndices) -> String {
    let config = LoraConfig {
        trainable_token_indices: Some(rows),
        ..all_linear()
    };
    let model = decoder(family);
    failure(lora::inject(
        model.config(),
        &config,
        InitLoraWeights::Random,
        0,
    ))
}

#[test]
fn bad_rows_are_named() {
    let text = refused("llama", embedding(&[5, 97, 100]));
    assert_says(
        &text,
        &[
            "trainable_token_indices: 97 is past the model's 97 tokens; give ids from 0 to 96",
            "100 is past",
        ],
    );
    assert_says(&refused("llama", embedding(&[5, 5])), &["5 is named twice"]);
    assert_says(
        &refused("llama", embedding(&[])),
        &["trainable_token_indices"],
    );
    let text = refused("llama", tables(&[("wte", &[1])]));
    assert_says(
        &text,
        &[
            "`wte` is no table of tokens",
            "model.embed_tokens and lm_head",
        ],
    );
    let text = refused("llama", tables(&[("embed_tokens", &[1]), ("tokens", &[2])]));
    assert_says(&text, &["`tokens` is a second name for model.embed_tokens"]);

    let place = Place::new("llama");
    let mut twice = config(&place, "run", &embedding(&IDS));
    twice.options.saved.modules_to_save = Some(lowrank::tuning::targets::Targets::Names(vec![
        "embed_tokens".to_owned(),
    ]));
    assert_says(
        &failure(run(&twice)),
        &[
            "model.embed_tokens.weight is trained as a whole",
            "give one of the two",
        ],
    );
}

#[test]
fn damaged_files_are_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let model = decoder("llama");
    let made = with_rows(&model, embedding(&[5, 7]), 1);
    let config = LoraConfig {
        trainable_token_indices: Some(embedding(&[5, 7])),
        ..all_linear()
    };
    let base = BaseMark::default();
    lora::save(folder.path(), model.config(), &config, &made, base).expect("saved");
    let whole = written(folder.path());
    let read = |value: Value| {
        let mut changed = whole.clone();
        changed["trainable_token_indices"] = value;
        let path = folder.path().join("adapter_config.json");
        fs::write(path, changed.to_string()).expect("written");
        failure(tuning::load(folder.path(), model.config()).map(drop))
    };
    assert_says(
        &read(json!([5, 700])),
        &["adapter_config.json", "700 is past"],
    );
    assert_says(
        &read(json!([5, 5])),
        &["adapter_config.json", "5 is named twice"],
    );
    assert_says(
        &read(json!([5, -1])),
        &["`trainable_token_indices` is [5,-1]"],
    );
    assert_says(&read(json!([5])), &[ROWS, "shape [2, 32]", "[1, 32]"]);
    assert_says(&read(Value::Null), &[ROWS, "no adapted module"]);
    assert_says(
        &read(json!({"lm_head": [5, 7]})),
        &["lm_head.token_adapter", "missing"],
    );
    // An adapter of another width.
    fs::write(folder.path().join("adapter_config.json"), whole.to_string()).expect("written");
    let text = failure(tuning::load(folder.path(), decoder("mistral").config()).map(drop));
    assert_says(&text, &["another model"]);
}
