//! Tokens that a run adds to its model: from their file to an adapter that brings them, and to a merged model that has them.

use std::fs;
use std::path::Path;

use lowrank::base::Source;
use lowrank::data::{DataOptions, Dataset, Split};
use lowrank::merge::F32_LIMIT;
use lowrank::model::{AdapterSet, WeightId};
use lowrank::settings::TrainConfig;
use lowrank::train::{Start, evaluate};
use lowrank::tuning::lora::TokenIndices;
use lowrank::tuning::{self, Method};
use lowrank::{DType, Workspace};
use serde_json::{Value, json};

use super::common::{
    Place, Watch, assert_says, difference, failure, logits, merge_f32, open, run, tensors,
};

/// Of the data; the last one is in the vocabulary.
const TOKENS: &str = "say\n and \nyes \nq\n";

/// The new tokens' ids. The model has 97 rows and the tokenizer 96 tokens, so that two of these three need rows of their own; the
/// class of Qwen's tokenizers adds an end of its own, so that all three do.
fn new_ids(family: &str) -> [u32; 3] {
    let first = if family == "qwen2" { 97 } else { 96 };
    [first, first + 1, first + 2]
}

fn config(place: &Place, name: &str) -> TrainConfig {
    let file = place.path("tokens.txt");
    fs::write(&file, TOKENS).expect("the tokens are written");
    place.config(Method::Lora, name).with_options(|options| {
        options.lora.add_tokens = Some(file);
    })
}

fn json_of(path: &Path) -> Value {
    let text = fs::read_to_string(path).expect("the file");
    serde_json::from_str(&text).expect("JSON")
}

fn source(place: &Place, run: &str) -> Source {
    let folder = place.path(run);
    let source = Source::Folder(place.path("model"));
    source.with_tokens_of(&[&folder]).expect("the tokens fit")
}

/// The held-out loss of a run's adapter, with the model and the tokenizer that it brings.
fn held_out_loss(place: &Place, run: &str) -> f64 {
    let base = source(place, run).load(DType::F32).expect("the model");
    let (data, options) = (place.path("data"), DataOptions::default());
    let rows = Dataset::load(&data, Split::Valid, &base.tokenizer, &options).expect("the rows");
    let ids = &rows.examples[0].ids;
    assert!(ids.iter().any(|id| *id > 96), "{ids:?}");
    let loaded = tuning::load(&place.path(run), base.decoder.config()).expect("it loads");
    let (set, ws) = ([&loaded.adapter], Workspace::new());
    let set = AdapterSet::new(&set);
    evaluate(&base.decoder, set, Some(0), &rows.examples, &ws).mean()
}

#[test]
fn a_run_brings_its_tokens_and_trains_their_rows_alone() {
    for family in ["qwen2", "llama", "gpt2"] {
        let ids = new_ids(family);
        let (first, rows) = (ids[0], ids[2] + 1);
        let indices = match family {
            "llama" => json!({"model.embed_tokens": ids, "lm_head": ids}),
            _ => json!(ids),
        };
        let place = Place::new(family);
        let config = config(&place, "run");
        let mut watch = Watch::default();
        let outcome = watch
            .train(&config, Start::Fresh { overwrite: false })
            .expect("the run");
        assert!(outcome.eval_loss < outcome.first_eval_loss, "{family}");
        let notes = watch.notes.join("\n");
        assert_says(
            &notes,
            &[
                "3 tokens of",
                &format!(
                    "are new, with the ids {first} to {}; the embedding has {rows} rows in place of 97",
                    ids[2]
                ),
                "keep their ids: \"q\" (84)",
            ],
        );
        let written = json_of(&config.output.join("adapter_config.json"));
        assert_eq!(written["trainable_token_indices"], indices, "{family}");
        let tokenizer = json_of(&config.output.join("tokenizer.json"));
        let listed = tokenizer["added_tokens"].as_array().expect("a list");
        let of = |text: &str| listed.iter().find(|token| token["content"] == text);
        assert_eq!(of("say").expect("it is there")["id"], first, "{family}");
        assert_eq!(of("q").expect("it is there")["id"], 84, "{family}");
        assert_eq!(listed.len() as u32, 3 + 4 + first - 96);
        let found = held_out_loss(&place, "run");
        let said = outcome.eval_loss.expect("held-out rows");
        assert!((found - said).abs() < 1e-6, "{family}: {found}, {said}");
        let card = fs::read_to_string(config.output.join("README.md")).expect("the card");
        assert_says(
            &card,
            &[
                "AutoTokenizer.from_pretrained(\"ADAPTER\")",
                "resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))",
            ],
        );

        // Going on from it, whose rows then are the adapter's, begins where it ended.
        let mut further = place.config(Method::Lora, "further");
        further.init_adapter = Some(config.output.clone());
        let again = run(&further).expect("it goes on");
        assert_eq!(again.first_eval_loss, outcome.eval_loss);
        assert!(further.output.join("tokenizer.json").exists());
    }
}

#[test]
fn new_rows_begin_as_the_mean() {
    let place = Place::new("llama");
    let config = TrainConfig {
        max_steps: Some(1),
        learning_rate: 1e-30,
        ..config(&place, "run")
    };
    run(&config).expect("the run");
    let model = open(&place.path("model"));
    let found = tensors(&config.output.join("adapter_model.safetensors"));
    for (name, id) in [
        ("lm_head", WeightId::Head),
        ("model.embed_tokens", WeightId::Embedding),
    ] {
        let table = model.weights().view(id).to_vec();
        let rows: Vec<&[f32]> = table.chunks(32).collect();
        let mean: Vec<f32> = (0..32)
            .map(|column| rows.iter().map(|row| row[column]).sum::<f32>() / 97.0)
            .collect();
        let name = format!("base_model.model.{name}.token_adapter.trainable_tokens_delta");
        let (_, values) = found
            .iter()
            .find(|(found, _)| *found == name)
            .expect("rows");
        // The spare row is used as it is.
        assert_eq!(values[..32], *rows[96]);
        assert!(difference(&values[32..64], &mean) < 1e-5);
        assert_eq!(values[32..64], values[64..]);
    }
}

#[test]
fn a_stopped_run_goes_on_without_the_file() {
    let place = Place::new("qwen2");
    run(&config(&place, "whole")).expect("the run");
    let stopped = config(&place, "stopped");
    Watch::stopping_after(4)
        .train(&stopped, Start::Fresh { overwrite: false })
        .expect("it stops");
    fs::remove_file(place.path("tokens.txt")).expect("the file is gone");
    let checkpoint = place.path("stopped/checkpoints/step-4/tokenizer.json");
    let written = fs::read(place.path("stopped/tokenizer.json")).expect("the tokenizer");
    assert!(written == fs::read(checkpoint).expect("the checkpoint's"));
    Watch::default()
        .train(&stopped, Start::Resume)
        .expect("it goes on");
    for name in [
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
    ] {
        let read = |run: &str| fs::read(place.path(run).join(name)).expect("the file");
        assert!(read("whole") == read("stopped"), "{name}");
    }
}

#[test]
fn the_merged_model_has_the_tokens() {
    for (family, dtype) in [
        ("qwen2", DType::F32),
        ("llama", DType::F32),
        ("llama", DType::Bf16),
        ("gpt2", DType::F32),
    ] {
        let place = Place::new(family);
        run(&config(&place, "run")).expect("the run");
        let source = source(&place, "run");
        let base = source.clone().load(DType::F32).expect("the model");
        let loaded = tuning::load(&place.path("run"), base.decoder.config()).expect("it loads");
        let sequence = base
            .tokenizer
            .encode("say 3 and yes yes q", false)
            .expect("ids");
        let ids = new_ids(family);
        assert!(
            sequence.contains(&ids[2]),
            "{family}: {sequence:?}, {ids:?}"
        );
        let merged = place.path("merged");
        let passages = [sequence.clone()];
        if dtype == DType::F32 {
            let report = merge_f32(&source, &loaded.adapter, &passages, &merged);
            assert!(report.expect("it merges").max_logit_difference < F32_LIMIT);
        } else {
            let options = lowrank::merge::MergeOptions {
                source: &source,
                purpose: lowrank::model::Purpose::LanguageModel,
                labels: None,
                adapter: &loaded.adapter,
                passages: &passages,
                output: &merged,
                dtype,
                overwrite: false,
                force: true,
            };
            lowrank::merge::merge(&options).expect("it merges");
        }
        assert_eq!(
            json_of(&merged.join("config.json"))["vocab_size"],
            ids[2] + 1
        );
        let alone = Source::Folder(merged)
            .load(DType::F32)
            .expect("it is a model");
        assert_eq!(alone.decoder.config().vocab_size, ids[2] as usize + 1);
        let again = alone.tokenizer.encode("say 3 and yes yes q", false);
        assert_eq!(again.expect("ids"), sequence, "{family}");
        let with = logits(&base.decoder, Some(&loaded.adapter), &sequence);
        let off = difference(&with, &logits(&alone.decoder, None, &sequence));
        let limit = if dtype == DType::F32 { 1e-4 } else { 5e-2 };
        assert!(off < limit, "{family}: {off:e}");
    }
}

#[test]
fn adapters_that_bring_other_tokens_do_not_go_together() {
    let place = Place::new("llama");
    run(&config(&place, "run")).expect("the run");
    run(&config(&place, "same")).expect("the run");
    run(&place.config(Method::Lora, "plain")).expect("the run");
    let (one, same, plain) = (place.path("run"), place.path("same"), place.path("plain"));
    let model = || Source::Folder(place.path("model"));
    let both = model().with_tokens_of(&[&one, &same]).expect("they fit");
    assert_eq!(both.new_ids(), new_ids("llama"));
    assert_eq!(model().with_tokens_of(&[&plain]).expect("it fits"), model());
    let text = failure(model().with_tokens_of(&[&one, &plain]));
    assert_says(
        &text,
        &["do not bring the same tokens", "use each by itself"],
    );

    // Of another model, whose tokenizer has a token more.
    super::common::write_tokenizer(&place.path("model"), 97);
    let text = failure(model().with_tokens_of(&[&one]));
    assert_says(
        &text,
        &[
            "tokenizer.json",
            "has the id 96 there, and 97",
            "another model",
        ],
    );
}

#[test]
fn what_cannot_be_added_is_named() {
    let place = Place::new("llama");
    let good = config(&place, "run");
    let file = place.path("tokens.txt");
    let refused = |text: &str| {
        fs::write(&file, text).expect("written");
        failure(run(&good))
    };
    assert_says(&refused(""), &["tokens.txt", "holds no token"]);
    assert_says(&refused("new\n\n"), &["tokens.txt", "line 2 is blank"]);
    assert_says(&refused("new\nnew\n"), &["tokens.txt", "line 2 is \"new\""]);
    assert_says(
        &refused("a\nb\n"),
        &["tokens.txt", "all of these tokens already"],
    );
    assert!(!good.output.exists());
    fs::write(&file, TOKENS).expect("written");
    let mut both = good.clone();
    both.options.lora.trainable_token_indices = Some(TokenIndices::Embedding(vec![1]));
    assert_says(
        &failure(run(&both)),
        &["add_tokens", "trainable_token_indices"],
    );
    let model = open(&place.path("model"));
    let text = failure(good.lay_out(model.config()));
    assert_says(&text, &["add_tokens", "is for train alone"]);
    fs::remove_file(&file).expect("it is gone");
    assert_says(&failure(run(&good)), &["tokens.txt", "cannot be read"]);
    fs::write(&file, TOKENS).expect("written");
    fs::remove_file(place.path("model/tokenizer.json")).expect("it is gone");
    fs::write(place.path("model/vocab.txt"), "[PAD]\n[UNK]\n").expect("written");
    assert_says(&failure(run(&good)), &["tokenizer.json", "is missing"]);
}
