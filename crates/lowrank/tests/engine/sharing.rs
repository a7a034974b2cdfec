//! Rows with the same prompt compute it once, and training is the same.

use std::fs;
use std::path::Path;

use lowrank::Workspace;
use lowrank::data::Example;
use lowrank::model::{Adapter, AdapterSet, Decoder, PassOptions};
use lowrank::objective::{self, LossSum, NextToken, loss_and_gradients};
use lowrank::train::{OptimizerState, Start, TrainConfig, batch_of, shared_batch_of};
use lowrank::tuning::{Method, full};
use serde_json::Value;

use super::common::{
    FAMILIES, Place, Watch, adapter, all_linear, assert_says, decoder, failure, golden, ids,
    metrics, open, run, tensors,
};

/// A row of a prompt, `prompt_len` tokens that depend on `prompt`, and a completion that depends on `row`.
fn example(prompt: u32, prompt_len: usize, row: u32, completion: usize) -> Example {
    let ids = [ids(prompt_len, prompt), ids(completion, 50 + row)].concat();
    Example {
        supervised: (0..ids.len()).map(|i| i > 0 && i >= prompt_len).collect(),
        ids,
        line: row as usize,
        truncated: 0,
        prompt_len,
        ..Example::default()
    }
}

/// Rows of four prompts, dealt out; one is a row's own, one ends where the row does.
fn examples() -> Vec<Example> {
    vec![
        example(1, 21, 0, 7),
        example(2, 2, 1, 1),
        example(1, 21, 2, 15),
        example(3, 9, 3, 4),
        example(2, 2, 4, 19),
        example(1, 21, 5, 1),
        example(4, 6, 6, 0),
        example(4, 6, 7, 3),
        example(1, 21, 8, 7),
    ]
}

fn gradients(
    model: &Decoder,
    trained: &Adapter,
    rows: &[&Example],
    share: bool,
    smoothing: f32,
) -> (LossSum, Vec<Vec<f32>>) {
    let batch = if share {
        shared_batch_of(rows, trained.virtual_tokens())
    } else {
        batch_of(rows.iter().copied(), trained.virtual_tokens())
    };
    let tokens: usize = rows.iter().map(|row| row.ids.len()).sum();
    // Four rows have the first prompt, two the second and two the fourth.
    let saved = if share { 3 * 21 + 2 + 6 } else { 0 };
    assert_eq!(batch.tokens(), tokens - saved);
    let mut grads = OptimizerState::new(trained).grads;
    let (set, ws) = ([trained], Workspace::new());
    let set = AdapterSet::new(&set);
    let labels = NextToken {
        label_smoothing: smoothing,
        ..NextToken::of(&batch)
    };
    let options = PassOptions::default();
    let sums = loss_and_gradients(model, &batch, set, &labels, &mut grads, &options, &ws)
        .expect("one adapter");
    let evaluated = objective::loss(model, &batch, set, &NextToken::of(&batch), &ws);
    assert_eq!(
        (evaluated.correct, evaluated.tokens),
        (sums.correct, sums.tokens)
    );
    let slots = 0..trained.names.len();
    (sums, slots.map(|slot| grads.view(slot).to_vec()).collect())
}

/// |a - b| / |b|, with |x| the root of the sum of squares.
fn relative_norm(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    if difference == 0.0 {
        return 0.0;
    }
    difference / norm(&mut b.iter().map(|b| f64::from(*b)))
}

fn assert_shared_is_exact(name: &str, model: &Decoder, rows: &[Example]) {
    let rows: Vec<&Example> = rows.iter().collect();
    for trained in [
        adapter(model, &all_linear(), 1),
        full::inject(model.weights()),
    ] {
        for smoothing in [0.0, 0.1] {
            let (loss, alone) = gradients(model, &trained, &rows, false, smoothing);
            let (shared_loss, shared) = gradients(model, &trained, &rows, true, smoothing);
            assert_eq!(shared_loss.tokens, loss.tokens);
            assert_eq!(shared_loss.correct, loss.correct);
            let off = (shared_loss.loss - loss.loss).abs() / loss.loss;
            assert!(off < 1e-6, "{name}: the losses differ by {off:e}");
            for ((a, b), slot) in shared.iter().zip(&alone).zip(&trained.names) {
                assert!(b.iter().any(|g| *g != 0.0), "{name}, {slot}: all zero");
                let off = relative_norm(a, b);
                assert!(off <= 1e-5, "{name}, {slot}: {off:e}");
            }
        }
    }
}

#[test]
fn losses_and_gradients_are_those_of_rows_that_share_nothing() {
    for family in FAMILIES {
        assert_shared_is_exact(family, &decoder(family), &examples());
    }
}

/// A label in the prompt is there for every row that has the prompt, and rows need not agree on it.
#[test]
fn labels_in_the_prompt_count_for_each_row() {
    let mut rows = examples();
    for (n, row) in rows.iter_mut().enumerate() {
        for (i, label) in row.supervised.iter_mut().enumerate().skip(1) {
            *label = n != 3 && (n != 2 || i % 3 == 0);
        }
    }
    for family in ["llama", "gpt2"] {
        assert_shared_is_exact(family, &decoder(family), &rows);
    }
}

/// A window reaches from a completion into the shared prompt, or no longer does.
#[test]
fn sliding_windows_count_the_shared_prompt() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let from = golden("mistral");
    fs::copy(
        from.join("model.safetensors"),
        folder.path().join("model.safetensors"),
    )
    .expect("the golden model");
    let text = fs::read_to_string(from.join("config.json")).expect("its config");
    for window in [3, 10] {
        let set = format!("\"sliding_window\": {window}");
        let windowed = text.replacen("\"sliding_window\": null", &set, 1);
        assert_ne!(windowed, text);
        fs::write(folder.path().join("config.json"), windowed).expect("a config");
        let model = open(folder.path());
        assert_eq!(model.config().layers[0].window, Some(window));
        assert_shared_is_exact("mistral with a window", &model, &examples());
    }
}

/// The numbers under a key of the lines that have it.
fn column(run: &Path, key: &str) -> Vec<f64> {
    let lines = metrics(run);
    let values = lines.iter().filter_map(|line| line.get(key));
    values.filter_map(Value::as_f64).collect()
}

/// A run without dropout, so that sharing changes nothing but the rounding.
fn config(place: &Place, name: &str, share: bool) -> TrainConfig {
    let mut config = place.config(Method::Lora, name);
    config.share_prompts = share;
    config.batch_size = 5;
    config.gradient_accumulation_steps = 2;
    config.options.lora.lora_dropout = 0.0;
    config
}

/// The most that a value of two runs' adapters differs.
fn largest_difference(place: &Place, a: &str, b: &str) -> f32 {
    let read = |run: &str| tensors(&place.path(run).join("adapter_model.safetensors"));
    let (a, b) = (read(a), read(b));
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().zip(&b).flat_map(|(a, b)| a.1.iter().zip(&b.1));
    pairs.fold(0.0, |largest, (a, b)| (a - b).abs().max(largest))
}

#[test]
fn a_run_that_shares_is_the_run_over_the_same_order() {
    let place = Place::new("llama");
    place.write_rows_with_prompts(23, 4);
    let kept = |name, share| TrainConfig {
        shuffle: false,
        ..config(&place, name, share)
    };
    let mut watch = Watch::default();
    watch
        .train(&kept("shared", true), Start::Fresh { overwrite: false })
        .expect("the run");
    let notes = watch.notes.join("\n");
    assert_says(
        &notes,
        &["sharing prompts: 23 rows have 4 distinct prompts"],
    );

    // Without shuffling, rows come by the first appearance of their prompt.
    let data = place.path("data").join("train.jsonl");
    let text = fs::read_to_string(&data).expect("the rows");
    let rows: Vec<&str> = text.lines().collect();
    let sorted: Vec<&str> = (0..4)
        .flat_map(|prompt| rows.iter().skip(prompt).step_by(4).copied())
        .collect();
    fs::write(&data, sorted.join("\n")).expect("the rows in order");
    run(&kept("alone", false)).expect("the run");

    let (shared, alone) = (place.path("shared"), place.path("alone"));
    for key in ["loss", "grad_norm", "eval_loss"] {
        let (a, b) = (column(&shared, key), column(&alone, key));
        assert_eq!(a.len(), b.len());
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() <= 1e-4 * b.abs(), "{key}: {a} and {b}");
        }
    }
    assert!(largest_difference(&place, "shared", "alone") < 1e-3);
    let supervised = "supervised_tokens";
    assert_eq!(column(&shared, supervised), column(&alone, supervised));
    // 23 rows in steps of 10 are 3 steps a pass.
    let pass = |run: &Path| column(run, "tokens")[..3].iter().sum::<f64>();
    let words = format!(
        "computes {} tokens instead of {}",
        pass(&shared),
        pass(&alone)
    );
    assert_says(&notes, &[&words]);
    assert!(pass(&shared) < 0.7 * pass(&alone), "{words}");
}

#[test]
fn rows_with_the_same_prompt_are_shuffled_together() {
    let place = Place::new("llama");
    place.write_rows_with_prompts(40, 4);
    run(&config(&place, "run", true)).expect("the run");
    // Ten rows a prompt in two batches of five: each computes its prompt once, in every epoch.
    let saved = column(&place.path("run"), "tokens");
    let alone = config(&place, "alone", false);
    run(&alone).expect("the run");
    let (prompt, batches) = (13.0 + 1.0, 8.0);
    let total = |tokens: &[f64], epoch: usize| tokens[4 * epoch..][..4].iter().sum::<f64>();
    let all = column(&place.path("alone"), "tokens");
    for epoch in 0..3 {
        let expected = total(&all, epoch) - prompt * (40.0 - batches);
        assert_eq!(total(&saved, epoch), expected);
    }
    let losses = column(&place.path("run"), "loss");
    assert_ne!(losses[0], column(&place.path("alone"), "loss")[0]);
}

/// Where no two rows share a prompt, the run is told so, and is bit for bit the run without.
#[test]
fn sharing_nothing_is_said_and_changes_nothing() {
    let place = Place::new("gpt2");
    let mut watch = Watch::default();
    watch
        .train(
            &config(&place, "shared", true),
            Start::Fresh { overwrite: false },
        )
        .expect("the run");
    let words = "share_prompts saves nothing here: 11 rows have 11 distinct prompts";
    assert_says(&watch.notes.join("\n"), &[words]);
    run(&config(&place, "alone", false)).expect("the run");
    assert_eq!(largest_difference(&place, "shared", "alone"), 0.0);

    let text = failure(run(&TrainConfig {
        batch_size: 1,
        ..config(&place, "one", true)
    }));
    assert_says(&text, &["share_prompts needs a batch_size of 2 or more"]);
    assert!(!place.path("one").exists());
}
