//! A and B that begin with a part of the weight: what the layer computes at the start, what is saved, and runs that go on.

use std::fs;
use std::path::{Path, PathBuf};

use lowrank::base::{BUILTIN, Source};
use lowrank::data::{DataOptions, Dataset, Example, Split};
use lowrank::export::{FileType, own_rows, write_model};
use lowrank::import::import_gguf;
use lowrank::merge::{delta, merged_weight};
use lowrank::model::{AdapterSet, Decoder, LoadIn, Part, Purpose, WeightId};
use lowrank::train::{Silent, Start, TrainConfig, evaluate, prepare};
use lowrank::tuning::Method;
use lowrank::tuning::lora::{self, InitLoraWeights, TokenIndices};
use lowrank::tuning::targets::Targets;
use lowrank::{DType, Workspace};
use lowrank_formats::peft::LoraConfig;

use super::common::{Place, Watch, assert_says, failure, open, run, timeless};

const ALL: [InitLoraWeights; 3] = [
    InitLoraWeights::Pissa,
    InitLoraWeights::PissaNiter(2),
    InitLoraWeights::Olora,
];

fn valid_rows(place: &Place) -> Vec<Example> {
    let tokenizer = Source::Folder(place.path("model")).tokenizer();
    let tokenizer = tokenizer.expect("a tokenizer");
    let options = DataOptions::default();
    let rows = Dataset::load(&place.path("data"), Split::Valid, &tokenizer, &options);
    rows.expect("the rows").examples
}

fn loss_of(place: &Place, model: &Decoder, folder: Option<&Path>) -> f64 {
    let (rows, ws) = (valid_rows(place), Workspace::new());
    let loaded = folder.map(|folder| lora::load(folder, model.config()).expect("the adapter"));
    match &loaded {
        Some(loaded) => {
            let set = [&loaded.adapter];
            evaluate(model, AdapterSet::new(&set), Some(0), &rows, &ws)
        }
        None => evaluate(model, AdapterSet::none(), None, &rows, &ws),
    }
    .mean()
}

fn config(place: &Place, init: InitLoraWeights, targets: &[&str], run: &str) -> TrainConfig {
    let mut config = place.config(Method::Lora, run);
    config.options.lora.init_lora_weights = init;
    config.options.targets.target_modules = Some(Targets::Names(
        targets.iter().map(ToString::to_string).collect(),
    ));
    config
}

/// Families whose weights lie otherwise: rows for outputs, columns for outputs, several linears in one.
const PLACES: [(&str, &[&str]); 4] = [
    ("llama", &["q_proj", "v_proj", "down_proj"]),
    ("gpt2", &["c_attn", "c_fc"]),
    ("gpt2", &["c_attn.q", "c_attn.v", "c_proj"]),
    ("phi3", &["qkv_proj", "gate_up_proj"]),
];

#[test]
fn a_run_begins_with_the_loss_of_the_base_and_is_saved_for_it() {
    for (family, targets) in PLACES {
        let place = Place::new(family);
        let model = open(&place.path("model"));
        let base = loss_of(&place, &model, None);
        for init in ALL {
            let name = format!("{init}");
            let outcome = run(&config(&place, init, targets, &name)).expect("the run");
            let first = outcome.first_eval_loss.expect("a loss of the start");
            assert!(
                (first - base).abs() < 1e-5,
                "{family} {init}: {first} {base}"
            );
            let last = outcome.eval_loss.expect("a loss of the end");
            assert!((last - base).abs() > 1e-3, "{family} {init}: it learns");
            let saved = loss_of(&place, &model, Some(&place.path(&name)));
            assert!(
                (saved - last).abs() < 1e-5,
                "{family} {init}: {saved} {last}"
            );
            let written = LoraConfig::read(&place.path(&name)).expect("adapter_config.json");
            assert_eq!(written.init_lora_weights, true);
        }
    }
}

/// ‖ΔW‖ is nought at the start whatever scales the branches have, and each of them has some of the weight.
#[test]
fn nothing_is_changed_at_the_start_whatever_the_scale() {
    let place = Place::new("llama");
    let network = Source::Folder(place.path("model"))
        .load(DType::F32)
        .expect("the model")
        .into_network();
    for use_rslora in [false, true] {
        for init in ALL {
            let mut config = config(&place, init, &["q_proj", "v_proj"], "run");
            config.options.lora.use_rslora = use_rslora;
            config.options.lora.rank_pattern = vec![("v_proj".to_owned(), 6)];
            config.options.lora.alpha_pattern = vec![("layers.0.*q_proj".to_owned(), 5.0)];
            let mut watch = Silent;
            let trained = prepare(&config, &network, &valid_rows(&place), &mut watch);
            let trained = trained.expect("first values");
            for id in trained.adapter.low_rank.keys() {
                let change = delta(&network.decoder, &trained.adapter, *id);
                let most = change
                    .to_vec()
                    .into_iter()
                    .fold(0.0_f32, |m, x| m.max(x.abs()));
                assert!(most < 1e-5, "{init} {id:?}: {most}");
            }
            assert!(!trained.adapter.does_nothing());
            // What is saved before the first step changes nothing either.
            let folder = place.path("saved");
            drop(fs::remove_dir_all(&folder));
            fs::create_dir(&folder).expect("a folder");
            let config = trained.config.expect("a config");
            let mark = lowrank::tuning::BaseMark::default();
            let model = network.decoder.config();
            lowrank::tuning::save(&folder, model, &config, &trained.adapter, mark).expect("saved");
            let loaded = lora::load(&folder, model).expect("loaded");
            for (id, sites) in &loaded.adapter.low_rank {
                let change = delta(&network.decoder, &loaded.adapter, *id);
                let most = change
                    .to_vec()
                    .into_iter()
                    .fold(0.0_f32, |m, x| m.max(x.abs()));
                assert!(most < 1e-5, "{init} {id:?}: {most}");
                let before = &trained.adapter.low_rank[id][0];
                assert_eq!(sites[0].scale, before.scale);
                let (r, twice) = (
                    trained.adapter.params.shape(before.a).0,
                    loaded.adapter.params.shape(sites[0].a).0,
                );
                assert_eq!(twice, 2 * r);
            }
        }
    }
}

#[test]
fn a_stopped_run_goes_on_bit_for_bit() {
    for init in ALL.into_iter().chain([InitLoraWeights::Loftq]) {
        let place = Place::new("llama");
        let loftq = (init == InitLoraWeights::Loftq).then(|| builtin_folder(&place));
        let config = |name: &str| {
            let mut config = config(&place, init, &["q_proj", "down_proj"], name);
            config.options.lora.trainable_token_indices =
                Some(TokenIndices::Embedding(vec![5, 40]));
            if let Some(folder) = &loftq {
                config.model = folder.display().to_string();
                config.load_in = Some(LoadIn::FourBit);
            }
            config
        };
        run(&config("whole")).expect("the run");
        for after in [1, 8] {
            let name = format!("stopped{after}");
            let config = config(&name);
            let stopped = Watch::stopping_after(after)
                .train(&config, Start::Fresh { overwrite: false })
                .expect("a run that is stopped is no failure");
            assert!(stopped.interrupted);
            Watch::default()
                .train(&config, Start::Resume)
                .expect("it goes on");
            for file in ["adapter_model.safetensors", "adapter_config.json"] {
                let read = |run: &str| fs::read(place.path(run).join(file)).expect("the file");
                assert!(read("whole") == read(&name), "{init}: {file} differs");
            }
            assert_eq!(timeless(&place.path("whole")), timeless(&place.path(&name)));
        }
    }
}

/// What was saved is LoRA of twice the rank, which a run can start from.
#[test]
fn another_run_starts_from_what_was_saved() {
    let place = Place::new("llama");
    let first = config(
        &place,
        InitLoraWeights::Pissa,
        &["q_proj", "v_proj"],
        "first",
    );
    let outcome = run(&first).expect("the run");
    let mut second = place.config(Method::Lora, "second");
    second.init_adapter = Some(place.path("first"));
    let went_on = run(&second).expect("the second run");
    let (end, start) = (outcome.eval_loss, went_on.first_eval_loss);
    let apart = end.expect("a loss") - start.expect("a loss");
    assert!(apart.abs() < 1e-5, "{apart}");
    assert_eq!(
        went_on.trainable_parameters,
        2 * outcome.trainable_parameters
    );
}

fn export(model: &str, output: &Path, file_type: FileType) {
    let source = Source::find(model).expect("the model");
    let weights = source.weights_for(DType::F32, Purpose::LanguageModel);
    let weights = weights.expect("its weights");
    let rows = &mut own_rows(&weights);
    let config = weights.config();
    write_model(&source, config, output, file_type, false, &|_| true, rows).expect("written");
}

/// The built-in model in a folder.
pub(crate) fn builtin_folder(place: &Place) -> PathBuf {
    let (numbers, folder) = (place.path("full.gguf"), place.path("full"));
    export(BUILTIN, &numbers, FileType::F32);
    import_gguf(&numbers, &folder, DType::F32, false).expect("a folder");
    folder
}

/// The same, and as a GGUF file in blocks of 4 bits.
fn quantized(place: &Place) -> (PathBuf, PathBuf) {
    let (folder, blocks) = (builtin_folder(place), place.path("q4.gguf"));
    export(folder.to_str().expect("a name"), &blocks, FileType::Q4_0);
    (folder, blocks)
}

fn loftq_config(place: &Place, model: &Path, weights: &Path) -> TrainConfig {
    let mut config = config(
        place,
        InitLoraWeights::Loftq,
        &["q_proj", "down_proj"],
        "loftq",
    );
    config.model = model.display().to_string();
    config.options.lora.loftq_weights = Some(weights.to_path_buf());
    config
}

#[test]
fn loftq_brings_a_quantized_base_nearer_to_its_model() {
    let place = Place::new("llama");
    let (folder, blocks) = quantized(&place);
    let config = loftq_config(&place, &blocks, &folder);
    let load = |path: &Path| {
        let source = Source::find(path.to_str().expect("a name")).expect("the model");
        source
            .load_for(DType::Bf16, Purpose::LanguageModel, None, 0)
            .expect("it loads")
    };
    let (base, exact) = (load(&blocks), open(&folder));
    let trained = prepare(&config, &base, &[], &mut Silent).expect("first values");
    assert!(trained.adapter.initial.is_none(), "nothing is taken off");
    for id in trained.adapter.low_rank.keys() {
        let weight = WeightId::Linear(*id, Part::Weight);
        let exact = exact.weights().view(weight).to_vec();
        let apart = |values: Vec<f32>| {
            let squares = values
                .iter()
                .zip(&exact)
                .map(|(x, y)| f64::from(x - y).powi(2));
            squares.sum::<f64>().sqrt()
        };
        let stored = base.decoder.weights().view(weight);
        let before = apart(stored.to_vec());
        let after = apart(merged_weight(&base.decoder, &trained.adapter, *id).to_vec());
        // Rounding is like noise, whose largest singular value is √rows + √columns. Four of them are taken away; a tenth less will do.
        let (rows, cols) = (stored.rows() as f64, stored.cols() as f64);
        let share = 4.0 * (rows.sqrt() + cols.sqrt()).powi(2) / (rows * cols);
        assert!(
            before > 0.0 && after < (1.0 - 0.9 * share).sqrt() * before,
            "{id:?}: {before} {after}"
        );
    }
    run(&config).expect("the run");
    let written = LoraConfig::read(&place.path("loftq")).expect("adapter_config.json");
    assert_eq!((written.r, written.lora_alpha), (4, 16.0));
    assert_eq!(written.init_lora_weights, true);
}

/// The model that is quantized while it is loaded is the one that it was made of.
#[test]
fn loftq_finds_the_model_that_it_is_loaded_from() {
    let place = Place::new("llama");
    let folder = builtin_folder(&place);
    let first = |weights: Option<&Path>, load_in| {
        let mut config = loftq_config(&place, &folder, &folder);
        config.options.lora.loftq_weights = weights.map(Path::to_path_buf);
        config.load_in = Some(load_in);
        config.check().expect("nothing is missing");
        let source = Source::Folder(folder.clone()).load_in(config.load_in);
        let base = source.expect("a plain folder").load(DType::Bf16);
        let network = base.expect("it loads").into_network();
        let trained = prepare(&config, &network, &[], &mut Silent).expect("first values");
        trained.adapter.params.flat().to_vec()
    };
    let found = first(None, LoadIn::FourBit);
    assert!(found == first(Some(&folder), LoadIn::FourBit));
    assert!(found != first(None, LoadIn::EightBit), "less is lost");
}

#[test]
fn loftq_says_what_it_lacks() {
    let place = Place::new("llama");
    let (folder, blocks) = quantized(&place);
    let fails = |config: &TrainConfig| failure(run(config));
    let exact = loftq_config(&place, &folder, &folder);
    assert_says(&fails(&exact), &["none of the adapted modules", "GGUF"]);
    let mut config = loftq_config(&place, &blocks, &folder);
    config.options.lora.loftq_weights = None;
    assert_says(&fails(&config), &["loftq", "loftq_weights", "load_in"]);
    let nowhere = place.path("nowhere");
    let config = loftq_config(&place, &blocks, &nowhere);
    assert_says(&fails(&config), &["nowhere is not a folder"]);
    let other = place.path("model");
    let config = loftq_config(&place, &blocks, &other);
    assert_says(&fails(&config), &["the model that was quantized?"]);
    let mut config = self::config(&place, InitLoraWeights::Pissa, &["q_proj"], "run");
    config.options.lora.loftq_weights = Some(folder.clone());
    assert_says(&fails(&config), &["loftq_weights", "alone"]);
    config.options.lora.loftq_weights = None;
    config.init_adapter = Some(folder);
    assert_says(
        &fails(&config),
        &["init_adapter", "init_lora_weights: pissa"],
    );
}
