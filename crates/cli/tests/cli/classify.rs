//! From rows with labels to a classifier, with a tiny BERT whose vocabulary is a few words.

use std::fs;
use std::path::Path;

use predicates::prelude::*;
use serde_json::Value;

use super::support::lowrank;

const WORDS: [&str; 10] = [
    "good", "great", "lovely", "fine", "bad", "dull", "awful", "poor", "film", "play",
];

/// The golden BERT with a tokenizer of its own, and rows whose first word decides.
pub(super) fn place(folder: &Path) {
    let golden =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../lowrank/tests/goldens_classifiers/bert");
    let model = folder.join("model");
    fs::create_dir(&model).unwrap();
    let config = fs::read_to_string(golden.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    // It is a base here, whose classifier is still to be trained.
    config["architectures"] = serde_json::json!(["BertModel"]);
    config["id2label"] = Value::Null;
    config["label2id"] = Value::Null;
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    let weights = model.join("model.safetensors");
    fs::copy(golden.join("model.safetensors"), weights).unwrap();
    let mut vocabulary: Vec<String> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        .iter()
        .chain(&WORDS)
        .map(ToString::to_string)
        .collect();
    while vocabulary.len() < 61 {
        vocabulary.push(format!("w{}", vocabulary.len()));
    }
    fs::write(model.join("vocab.txt"), vocabulary.join("\n")).unwrap();
    fs::write(
        model.join("tokenizer_config.json"),
        r#"{"tokenizer_class": "BertTokenizer", "do_lower_case": true}"#,
    )
    .unwrap();
    let data = folder.join("data");
    fs::create_dir(&data).unwrap();
    let rows = |from: usize| {
        let mut text = String::from("text,label\n");
        for n in from..from + 32 {
            let (word, other) = (WORDS[n % 8], WORDS[8 + n / 8 % 2]);
            let label = if n % 8 < 4 { "positive" } else { "negative" };
            text.push_str(&[word, " ", other, ",", label, "\n"].concat());
        }
        text
    };
    fs::write(data.join("train.csv"), rows(0)).unwrap();
    fs::write(data.join("valid.csv"), rows(3)).unwrap();
}

/// Gives the golden a head of another task, whose name is as long.
pub(super) fn headless(folder: &Path) {
    rename(folder, "\"classifier.", "\"qa_outputs.");
}

/// Names tensors anew, as long as before.
fn rename(folder: &Path, old: &str, new: &str) {
    let file = folder.join("model/model.safetensors");
    let mut weights = fs::read(&file).unwrap();
    let (old, new) = (old.as_bytes(), new.as_bytes());
    assert_eq!(old.len(), new.len());
    for at in 0..weights.len() - old.len() {
        if weights[at..].starts_with(old) {
            weights[at..at + new.len()].copy_from_slice(new);
        }
    }
    fs::write(file, weights).unwrap();
}

pub(super) fn train(folder: &Path, output: &str, more: &[&str]) {
    let path = |name: &str| folder.join(name).display().to_string();
    lowrank()
        .args(["train", "--model", &path("model"), "--data", &path("data")])
        .args(["--output", &path(output)])
        .args(if more.contains(&"--max-steps") {
            &[][..]
        } else {
            &["--num-train-epochs", "12"]
        })
        .args(more)
        .assert()
        .success();
}

/// What was trained can be looked at, and merged it needs no adapter.
fn is_inspected_and_merged(folder: &Path) {
    let path = |name: &str| folder.join(name).display().to_string();
    let report = super::support::json_of(&[
        "adapter",
        "inspect",
        &path("run"),
        "--model",
        &path("model"),
    ]);
    assert_eq!(
        report["labels"],
        serde_json::json!(["negative", "positive"])
    );
    let modules = report["modules"].as_array().unwrap();
    let saved = modules.iter().find(|m| m["module"] == "classifier.weight");
    assert_eq!(saved.unwrap()["parameters"], 48, "{report}");

    // Merged, it is a whole classifier that needs no adapter and says the names.
    for dtype in ["f32", "bf16"] {
        let merged = path(&format!("merged-{dtype}"));
        let report = super::support::json_of(&[
            "merge",
            "--model",
            &path("model"),
            "--adapter",
            &path("run"),
            "--dtype",
            dtype,
            "--output",
            &merged,
        ]);
        let off = report["max_logit_difference"].as_f64().unwrap();
        assert!(off <= report["limit"].as_f64().unwrap(), "{report}");
        let judged =
            super::support::json_of(&["eval", "--model", &merged, "--data", &path("data")]);
        assert_eq!(judged["accuracy"], 1.0, "{judged}");
        let config = fs::read_to_string(Path::new(&merged).join("config.json")).unwrap();
        let config: Value = serde_json::from_str(&config).unwrap();
        assert_eq!(
            config["architectures"],
            serde_json::json!(["BertForSequenceClassification"])
        );
        assert_eq!(config["id2label"]["1"], "positive");
    }
}

#[test]
fn rows_of_a_table_make_a_classifier() {
    let folder = tempfile::tempdir().unwrap();
    place(folder.path());
    let path = |name: &str| folder.path().join(name).display().to_string();
    // The golden's labels are three, and the rows have two.
    lowrank()
        .args(["train", "--model", &path("model"), "--data", &path("data")])
        .args(["--output", &path("run")])
        .assert()
        .failure()
        .stderr(predicate::str::contains(
            "has 3 labels, and the rows have 2",
        ));
    train(
        folder.path(),
        "other",
        &["--new-classifier", "--max-steps", "2"],
    );
    headless(folder.path());

    train(folder.path(), "run", &["--learning-rate", "1e-2"]);
    let judged = super::support::json_of(&[
        "eval",
        "--model",
        &path("model"),
        "--adapter",
        &path("run"),
        "--data",
        &path("data"),
    ]);
    assert_eq!(judged["accuracy"], 1.0, "{judged}");
    assert_eq!(judged["confusion"]["positive"]["positive"], 16, "{judged}");
    let said = lowrank()
        .args([
            "classify",
            "--model",
            &path("model"),
            "--adapter",
            &path("run"),
            "--json",
        ])
        .write_stdin("great film\nawful play\n")
        .assert()
        .success();
    let said = String::from_utf8(said.get_output().stdout.clone()).unwrap();
    let labels: Vec<Value> = said
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["label"].clone())
        .collect();
    assert_eq!(labels, ["positive", "negative"]);
    let config = fs::read_to_string(folder.path().join("run/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["task_type"], "SEQ_CLS");
    assert_eq!(
        config["modules_to_save"],
        serde_json::json!(["classifier", "score"])
    );

    is_inspected_and_merged(folder.path());

    // Full training writes a whole classifier, whose config.json has the names.
    train(
        folder.path(),
        "whole",
        &["--method", "full", "--learning-rate", "1e-2"],
    );
    lowrank()
        .args(["classify", "--model", &path("whole"), "--text", "dull play"])
        .assert()
        .success()
        .stdout(predicate::str::starts_with("negative\t"));
}

#[test]
fn what_is_no_classifier_is_told_so() {
    let folder = tempfile::tempdir().unwrap();
    place(folder.path());
    let path = |name: &str| folder.path().join(name).display().to_string();
    lowrank()
        .args(["generate", "--model", &path("model"), "--prompt", "good"])
        .assert()
        .failure()
        .stderr(predicate::str::contains("an encoder does not write text"));
    lowrank()
        .args(["classify", "--model", &path("model"), "--text", "good"])
        .assert()
        .code(2)
        .stderr(predicate::str::contains("is no classifier"));
    lowrank()
        .args(["eval", "--model", &path("model"), "--data", &path("data")])
        .assert()
        .code(2)
        .stderr(predicate::str::contains("is no classifier"));
    lowrank()
        .args(["plan", "--model", &path("model"), "--num-labels", "0"])
        .assert()
        .code(2)
        .stderr(predicate::str::contains("one label at least"));
    let vectors = lowrank()
        .args(["embed", "--model", &path("model"), "--text", "good film"])
        .assert()
        .success();
    let vector: Value = serde_json::from_slice(&vectors.get_output().stdout).unwrap();
    let vector = vector["embedding"].as_array().unwrap();
    let square: f64 = vector.iter().map(|x| x.as_f64().unwrap().powi(2)).sum();
    assert!(
        vector.len() == 24 && (square - 1.0).abs() < 1e-5,
        "{square}"
    );
    let data = folder.path().join("data/valid.csv");
    let text = fs::read_to_string(&data).unwrap();
    fs::write(&data, text.replacen("positive", "unheard-of", 1)).unwrap();
    lowrank()
        .args(["train", "--model", &path("model"), "--data", &path("data")])
        .args(["--output", &path("run")])
        .assert()
        .failure()
        .stderr(predicate::str::contains("unheard-of").and(predicate::str::contains("line")));
}

#[test]
fn settings_that_mean_nothing_to_labels_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    place(folder.path());
    headless(folder.path());
    let path = |name: &str| folder.path().join(name).display().to_string();
    for (args, key) in [
        (&["--share-prompts"][..], "share_prompts"),
        (&["--train-on-prompt"][..], "train_on_prompt"),
        (
            &[
                "--method",
                "prefix",
                "--prefix-kind",
                "embedding",
                "--infix-tokens",
                "2",
            ][..],
            "infix_tokens",
        ),
    ] {
        lowrank()
            .args(["train", "--model", &path("model"), "--data", &path("data")])
            .args(["--output", &path("run")])
            .args(args)
            .assert()
            .failure()
            .stderr(predicate::str::contains(key).and(predicate::str::contains("leave")));
        assert!(!folder.path().join("run/adapter_config.json").exists());
    }
}

#[test]
fn an_adapter_goes_on_with_other_labels() {
    let folder = tempfile::tempdir().unwrap();
    place(folder.path());
    headless(folder.path());
    let path = |name: &str| folder.path().join(name).display().to_string();
    train(folder.path(), "two", &["--learning-rate", "1e-2"]);
    // As many labels as before; what was learned is there from the first step on.
    let (two, three) = (path("two"), path("three"));
    train(
        folder.path(),
        "again",
        &["--init-adapter", &two, "--max-steps", "1"],
    );
    let data = folder.path().join("data/train.csv");
    let rows = fs::read_to_string(&data).unwrap();
    fs::write(&data, rows.replacen("positive", "mixed", 3)).unwrap();
    lowrank()
        .args(["train", "--model", &path("model"), "--data", &path("data")])
        .args(["--output", &three, "--init-adapter", &two])
        .assert()
        .code(2)
        .stderr(predicate::str::contains(
            "has 2 labels, and the rows have 3",
        ));
    let more = ["--init-adapter", &two, "--new-classifier"];
    train(folder.path(), "three", &more);
    lowrank()
        .args(["classify", "--model", &path("model"), "--adapter", &three])
        .args(["--text", "dull play", "--json"])
        .assert()
        .success()
        .stdout(predicate::str::contains("mixed"));
}

#[test]
fn a_head_that_the_base_lacks_is_trained_and_saved() {
    let folder = tempfile::tempdir().unwrap();
    place(folder.path());
    headless(folder.path());
    // As in the files of a masked language model, which has no pooler.
    rename(folder.path(), "\"bert.pooler.", "\"qa_outputs.x");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let rate = ["--learning-rate", "1e-2"];
    train(folder.path(), "run", &rate);
    let (model, run) = (path("model"), path("run"));
    let config = fs::read_to_string(folder.path().join("run/adapter_config.json")).unwrap();
    assert!(config.contains("\"pooler\""), "{config}");
    let of_run = [
        "--model",
        &model,
        "--adapter",
        &run,
        "--data",
        &path("data"),
    ];
    let judged = super::support::json_of(&[&["eval"][..], &of_run].concat());
    assert!(judged["accuracy"].as_f64().unwrap() > 0.9, "{judged}");
    let merged = path("merged");
    let merge = ["merge", "--model", &model, "--adapter", &run, "--output"];
    lowrank().args(merge).arg(&merged).assert().success();
    let again = super::support::json_of(&["eval", "--model", &merged, "--data", &path("data")]);
    assert_eq!(again["accuracy"], judged["accuracy"], "{again}");
}

#[test]
fn a_trained_classifier_keeps_the_order_of_its_labels() {
    let folder = tempfile::tempdir().unwrap();
    place(folder.path());
    headless(folder.path());
    let path = |name: &str| folder.path().join(name).display().to_string();
    let full = ["--method", "full", "--learning-rate", "1e-2"];
    train(folder.path(), "whole", &full);
    // The same classifier with its labels the other way round.
    let file = folder.path().join("whole/model.safetensors");
    let config = folder.path().join("whole/config.json");
    let text = fs::read_to_string(&config).unwrap();
    let mut value: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["id2label"]["0"], "negative");
    value["id2label"] = serde_json::json!({"0": "positive", "1": "negative"});
    value["label2id"] = serde_json::json!({"positive": 0, "negative": 1});
    fs::write(&config, value.to_string()).unwrap();
    fs::remove_dir_all(folder.path().join("model")).unwrap();
    fs::rename(folder.path().join("whole"), folder.path().join("model")).unwrap();
    assert!(!file.exists());
    // It is wrong on every row, and goes on from there: nothing is learned at this rate.
    let still = ["--learning-rate", "1e-12", "--max-steps", "1"];
    train(folder.path(), "still", &still);
    let judge = |run: &str| {
        super::support::json_of(&[
            "eval",
            "--model",
            &path("model"),
            "--adapter",
            &path(run),
            "--data",
            &path("data"),
        ])
    };
    assert_eq!(judge("still")["accuracy"], 0.0);

    // Other labels are refused, by their names, for a model and for an adapter.
    for split in ["train.csv", "valid.csv"] {
        let data = folder.path().join("data").join(split);
        let rows = fs::read_to_string(&data).unwrap();
        fs::write(&data, rows.replace("negative", "dreary")).unwrap();
    }
    let refused = |more: &[&str]| {
        lowrank()
            .args(["train", "--model", &path("model"), "--data", &path("data")])
            .args(["--output", &path("refused")])
            .args(more)
            .assert()
            .code(2)
            .stderr(predicate::str::contains(
                "labels are positive, negative, and those of the rows are dreary, positive",
            ));
    };
    refused(&[]);
    refused(&["--init-adapter", &path("still")]);
    let anew = ["--new-classifier", "--learning-rate", "1e-2"];
    train(folder.path(), "anew", &anew);
    assert_eq!(judge("anew")["accuracy"], 1.0);
}

#[test]
fn names_without_a_classifier_bind_nobody() {
    let folder = tempfile::tempdir().unwrap();
    place(folder.path());
    headless(folder.path());
    let file = folder.path().join("model/config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    config["architectures"] = serde_json::json!(["BertForSequenceClassification"]);
    config["id2label"] = serde_json::json!({"0": "spam", "1": "ham"});
    config["label2id"] = serde_json::json!({"spam": 0, "ham": 1});
    fs::write(&file, config.to_string()).unwrap();
    train(folder.path(), "run", &["--max-steps", "1"]);
}

#[cfg(unix)]
#[test]
fn rows_of_a_pipe_are_answered_as_they_come() {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::process::{Command, Stdio};

    let folder = tempfile::tempdir().unwrap();
    place(folder.path());
    headless(folder.path());
    train(folder.path(), "run", &["--max-steps", "1"]);
    let mut child = Command::new(env!("CARGO_BIN_EXE_lowrank"))
        .arg("classify")
        .arg("--model")
        .arg(folder.path().join("model"))
        .arg("--adapter")
        .arg(folder.path().join("run"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut rows = child.stdin.take().unwrap();
    let mut answers = BufReader::new(child.stdout.take().unwrap()).lines();
    for text in ["good film", "dull play"] {
        writeln!(rows, "{text}").unwrap();
        let answer = answers.next().unwrap().unwrap();
        assert!(answer.ends_with(text), "{answer}");
    }
    drop(rows);
    assert!(child.wait().unwrap().success());

    // A device without room is told.
    if Path::new("/dev/full").exists() {
        let adapter = folder.path().join("run").display().to_string();
        let model = folder.path().join("model").display().to_string();
        for command in [
            &["classify", "--model", &model, "--adapter", &adapter][..],
            &["embed", "--model", &model],
        ] {
            let full = fs::OpenOptions::new().write(true).open("/dev/full");
            let output = Command::new(env!("CARGO_BIN_EXE_lowrank"))
                .args(command)
                .args(["--text", "good film"])
                .stdout(full.unwrap())
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(
                !output.status.success() && said.contains("cannot write to standard output"),
                "{command:?}: {said}"
            );
        }
    }
}

#[test]
fn a_classifiers_run_is_resumed_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    place(folder.path());
    headless(folder.path());
    let args = [
        "--max-steps",
        "12",
        "--save-steps",
        "4",
        "--class-weights",
        "balanced",
    ];
    train(folder.path(), "whole", &args);
    train(folder.path(), "cut", &args);
    // As after a kill behind step 8.
    for gone in [
        "checkpoints/step-12",
        "adapter_model.safetensors",
        "report.html",
    ] {
        let gone = folder.path().join("cut").join(gone);
        if gone.is_dir() {
            fs::remove_dir_all(gone).unwrap();
        } else {
            fs::remove_file(gone).unwrap();
        }
    }
    train(folder.path(), "cut", &[&args[..], &["--resume"]].concat());
    let values = |run: &str| fs::read(folder.path().join(run).join("adapter_model.safetensors"));
    assert_eq!(values("whole").unwrap(), values("cut").unwrap());
    // Once more there is nothing to do, and the folder says what was done.
    let (model, data, output) = (
        folder.path().join("model"),
        folder.path().join("data"),
        folder.path().join("cut"),
    );
    let again = [
        "train",
        "--model",
        model.to_str().unwrap(),
        "--data",
        data.to_str().unwrap(),
    ];
    let again = [
        &again[..],
        &["--output", output.to_str().unwrap(), "--resume"],
        &args,
    ]
    .concat();
    let outcome = super::support::json_of(&again);
    assert_eq!(outcome["already_finished"], true, "{outcome}");
    // Ranks of two blocks' query and value, and the classifier.
    assert_eq!(
        outcome["trainable_parameters"],
        2 * 2 * 8 * 48 + 2 * 25,
        "{outcome}"
    );
}

#[test]
fn classifiers_are_planned_and_timed() {
    let folder = tempfile::tempdir().unwrap();
    place(folder.path());
    headless(folder.path());
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (model, data) = (path("model"), path("data"));
    let planned = |more: &[&str]| {
        let args = ["plan", "--model", &model, "--max-seq-length", "16"];
        super::support::json_of(&[&args, more].concat())
    };
    let report = planned(&[]);
    assert_eq!(
        (&report["labels"], &report["work"]["supervised_tokens"]),
        (&2.into(), &8.into())
    );
    let report = planned(&["--task-type", "TOKEN_CLS", "--num-labels", "5"]);
    assert_eq!(
        (&report["labels"], &report["work"]["supervised_tokens"]),
        (&5.into(), &128.into())
    );

    let bench = [
        "bench", "train", "--model", &model, "--steps", "2", "--warmup", "0",
    ];
    lowrank()
        .args(bench)
        .args(["--data", &data, "--share-prompts"])
        .assert()
        .code(2)
        .stderr(predicate::str::contains("share_prompts goes with prompts"));
    for (more, supervised) in [
        (&["--data", &data][..], 16),
        (&["--seq-length", "12"], 16),
        (&["--seq-length", "12", "--task-type", "TOKEN_CLS"], 192),
    ] {
        let report = super::support::json_of(&[&bench[..], more].concat());
        assert_eq!(report["work"]["supervised_tokens"], supervised, "{report}");
    }
}

#[test]
fn a_decoder_without_padding_classifies() {
    let folder = tempfile::tempdir().unwrap();
    place(folder.path());
    let path = |name: &str| folder.path().join(name).display().to_string();
    let run = path("run");
    // Rows of different lengths share its batches, and no token fills them up.
    let outcome = super::support::json_of(&[
        "train",
        "--model=builtin:tiny",
        "--data",
        &path("data"),
        "--output",
        &run,
        "--max-steps=40",
        "--learning-rate=5e-3",
    ]);
    let (before, after) = (&outcome["first_eval_loss"], &outcome["eval_loss"]);
    assert!(
        after.as_f64().unwrap() < 0.5 * before.as_f64().unwrap(),
        "{outcome}"
    );
    let judged = super::support::json_of(&[
        "eval",
        "--model=builtin:tiny",
        "--adapter",
        &run,
        "--data",
        &path("data"),
    ]);
    assert_eq!(judged["accuracy"], 1.0, "{judged}");
    let config = fs::read_to_string(folder.path().join("run/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["task_type"], "SEQ_CLS");
}

#[test]
fn rows_longer_than_the_positions_are_cut_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    place(folder.path());
    headless(folder.path());
    let path = |name: &str| folder.path().join(name).display().to_string();
    let data = folder.path().join("data/train.csv");
    let mut rows = fs::read_to_string(&data).unwrap();
    rows.push_str("good ".repeat(300).trim());
    rows.push_str(",positive\n");
    fs::write(&data, rows).unwrap();
    for method in ["lora", "prefix"] {
        lowrank()
            .args(["train", "--model", &path("model"), "--data", &path("data")])
            .args([
                "--output",
                &path(method),
                "--max-steps",
                "2",
                "--method",
                method,
            ])
            .args(if method == "prefix" {
                &["--num-virtual-tokens=4"][..]
            } else {
                &[]
            })
            .assert()
            .success()
            .stderr(predicate::str::contains("1 row was cut at"));
    }
    let text = "good ".repeat(300);
    lowrank()
        .args(["embed", "--model", &path("model"), "--text", &text])
        .assert()
        .success();
}

#[test]
fn classifiers_are_compared() {
    let folder = tempfile::tempdir().unwrap();
    place(folder.path());
    headless(folder.path());
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (model, data, out) = (path("model"), path("data"), path("out"));
    let config = |more: &str| {
        let text = format!(
            "model: {model}\ndata: {data}\ntrain: {{max_steps: 8, batch_size: 8}}\ncost: {{steps: 2, prompt_tokens: 4}}\n{more}\n\
             methods:\n  - {{method: lora, r: 2, learning_rate: 1e-2}}\n\
             \x20 - {{method: top, head_only: true, learning_rate: [1e-3, 1e-2]}}\n  - {{method: full}}\n"
        );
        let file = folder.path().join("compare.yaml");
        fs::write(&file, text).unwrap();
        file.display().to_string()
    };
    let file = config("");
    let found = super::support::json_of(&["compare", &file, "--output", &out, "--threads", "1"]);
    assert_eq!(found["unit"], "row", "{found}");
    assert_eq!(
        found["metrics"],
        serde_json::json!(["accuracy", "f1_macro", "matthews"])
    );
    assert_eq!(found["base"]["loss"], Value::Null);
    let methods = found["methods"].as_array().unwrap();
    // The classifier of two labels: [2, 24] and its bias.
    let trained: Vec<_> = methods
        .iter()
        .map(|method| method["trainable_parameters"].as_u64().unwrap())
        .collect();
    assert_eq!(trained[..2], [2 * 2 * 2 * 48 + 50, 50], "{trained:?}");
    for method in methods {
        let accuracy = &method["scores"]["accuracy"]["mean"];
        assert!(
            (0.0..=1.0).contains(&accuracy.as_f64().unwrap()),
            "{method}"
        );
        assert!(method["cost"]["milliseconds_per_token"].as_f64().unwrap() > 0.0);
    }
    let page = fs::read_to_string(folder.path().join("out/comparison.html")).unwrap();
    assert!(page.contains("a row, batch 1") && !page.contains("nats a token"));

    for (more, words) in [
        ("texts: {metrics: [bleu]}", "leave texts out"),
        ("metrics: [bleu]", "have no bleu; there are accuracy"),
    ] {
        let file = config(more);
        lowrank()
            .args(["compare", &file, "--output", &out])
            .assert()
            .code(2)
            .stderr(predicate::str::contains(words));
    }
}

#[test]
fn the_shipped_comparisons_of_classifiers_are_sound() {
    let folder = tempfile::tempdir().unwrap();
    place(folder.path());
    headless(folder.path());
    let path = |name: &str| folder.path().join(name).display().to_string();
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    for name in ["sst2.yaml", "spam.yaml"] {
        // The ranks and lengths are for a larger model than the tests' own.
        let text = fs::read_to_string(configs.join(name)).unwrap();
        let text = text
            .replace("r: 64", "r: 12")
            .replace("max_seq_length: 128", "max_seq_length: 16");
        let text = text.replace("prompt_tokens: 128", "prompt_tokens: 16");
        let config = folder.path().join(name);
        fs::write(&config, text).unwrap();
        let plan = super::support::json_of(&[
            "compare",
            config.to_str().unwrap(),
            "--model",
            &path("model"),
            "--data",
            &path("data"),
            "--output",
            &path("out"),
            "--dry-run",
        ]);
        assert_eq!(plan["methods"].as_array().unwrap().len(), 7, "{plan}");
    }
}
