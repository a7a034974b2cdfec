//! Damaged and mismatched files: one clear paragraph that names what is wrong, and no panic.

use std::path::Path;

use crate::support::{Lab, config, lowrank, safetensors, stderr_of, strs, tensors, write};

/// The message of a training that fails with `code`; it must name all `parts` and be no panic.
fn training_fails(lab: &Lab, more: &[&str], code: i32, parts: &[&str]) {
    let text = stderr_of(&strs(&lab.train("failed", more)), code);
    let message = text.split("error: ").last().unwrap_or_default();
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in:\n{text}");
    }
    assert!(!text.contains("panicked"), "{text}");
    assert!(
        !lab.path("failed")
            .join("adapter_model.safetensors")
            .exists()
    );
}

fn replace(lab: &Lab, name: &str, content: impl AsRef<[u8]>) {
    write(&lab.path("model"), name, content);
}

/// What `eval` of the lab's model with the run's adapter says as it fails.
fn evaluated_with_run(lab: &Lab) -> String {
    let (model, run, data) = (lab.arg("model"), lab.arg("run"), lab.arg("data"));
    let args = [
        "eval",
        "--model",
        &model,
        "--adapter",
        &run,
        "--data",
        &data,
    ];
    stderr_of(&args, 1)
}

#[test]
fn weights_that_are_missing_or_damaged() {
    let lab = Lab::new();
    let whole = safetensors(&tensors(16));
    std::fs::remove_file(lab.path("model").join("model.safetensors")).expect("the file is there");
    training_fails(&lab, &[], 1, &["model.safetensors"]);
    replace(&lab, "model.safetensors", &whole[..whole.len() / 2]);
    training_fails(&lab, &[], 1, &["model.safetensors"]);
    replace(&lab, "model.safetensors", &whole[..5]);
    training_fails(&lab, &[], 1, &["model.safetensors"]);
    replace(
        &lab,
        "model.safetensors",
        [&[0xff; 8][..], &whole[8..]].concat(),
    );
    training_fails(&lab, &[], 1, &["model.safetensors", "header"]);
    replace(&lab, "model.safetensors", "");
    training_fails(&lab, &[], 1, &["model.safetensors"]);
}

#[test]
fn weights_of_another_shape() {
    let lab = Lab::new();
    let mut wrong = tensors(16);
    wrong[0].1 = vec![2048, 8];
    wrong.pop();
    replace(&lab, "model.safetensors", safetensors(&wrong));
    let missing = "model.layers.1.mlp.down_proj.weight";
    training_fails(
        &lab,
        &[],
        1,
        &[
            "model.embed_tokens.weight",
            "[2048, 8]",
            "[2048, 16]",
            missing,
        ],
    );
}

#[test]
fn a_config_that_is_not_supported() {
    let lab = Lab::new();
    replace(&lab, "config.json", "{");
    training_fails(&lab, &[], 1, &["config.json"]);
    for (key, value) in [("model_type", "mamba"), ("hidden_act", "swoosh")] {
        let mut config = config(16);
        config[key] = value.into();
        replace(&lab, "config.json", config.to_string());
        training_fails(&lab, &[], 1, &["config.json", key, value]);
    }
}

#[test]
fn targets_that_match_nothing() {
    let lab = Lab::new();
    training_fails(&lab, &["--target-modules", "q_proj,query"], 2, &["query"]);
    training_fails(&lab, &["--target-modules", ".*nothing.*"], 2, &["nothing"]);
    training_fails(&lab, &["--target-modules", "(q_proj"], 2, &["(q_proj"]);
    training_fails(&lab, &["--rank-pattern", "nothing=4"], 2, &["nothing"]);
}

#[test]
fn rows_that_cannot_be_used() {
    let lab = Lab::new();
    let good = r#"{"prompt": "a", "completion": " b"}"#;
    let cases: [(&[u8], &[&str]); 7] = [
        (b"", &["train.jsonl", "empty"]),
        (
            b"{\"prompt\": \"a\", \"completion\": ",
            &["train.jsonl", "line 1", "JSON"],
        ),
        (
            b"{\"prompt\": \"a\", \"completion\": \" \xff\"}",
            &["train.jsonl", "line 1", "UTF-8"],
        ),
        (b"[1, 2]", &["train.jsonl"]),
        (
            b"{\"question\": \"a\"}",
            &["train.jsonl", "line 1", "question"],
        ),
        (
            b"{\"prompt\": 1, \"completion\": \"b\"}",
            &["train.jsonl", "line 1", "prompt"],
        ),
        (
            br#"{"messages": [{"role": "user", "content": "only asked"}]}"#,
            &["train.jsonl", "line 1"],
        ),
    ];
    for (bytes, parts) in cases {
        write(&lab.path("data"), "train.jsonl", bytes);
        training_fails(&lab, &[], 1, parts);
    }
    write(
        &lab.path("data"),
        "train.jsonl",
        format!("{good}\nnot a row\n{good}\n"),
    );
    training_fails(&lab, &[], 1, &["train.jsonl", "line 2"]);
    let assert = lowrank()
        .args(lab.train("skipped", &["--on-bad-row", "skip"]))
        .assert()
        .success();
    let text = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    assert!(
        text.contains("1 rows were skipped") && text.contains("line 2"),
        "{text}"
    );
}

#[test]
fn an_adapter_for_another_model() {
    let lab = Lab::new();
    lowrank().args(lab.train("run", &[])).assert().success();
    replace(&lab, "config.json", config(32).to_string());
    replace(&lab, "model.safetensors", safetensors(&tensors(32)));
    let (model, data) = (lab.arg("model"), lab.arg("data"));
    let text = evaluated_with_run(&lab);
    for part in ["adapter_model.safetensors", "lora_A", "[8, 16]", "[8, 32]"] {
        assert!(text.contains(part), "`{part}` is not in:\n{text}");
    }
    let text = stderr_of(
        &[
            "eval",
            "--model",
            &model,
            "--adapter",
            &model,
            "--data",
            &data,
        ],
        2,
    );
    assert!(text.contains("is a whole model, not an adapter"), "{text}");
}

#[test]
fn outputs_that_cannot_be_written() {
    let lab = Lab::new();
    write(&lab.path("data"), "file", "");
    let output = lab.arg("data/file/run");
    let mut args = lab.train("x", &[]);
    let position = args
        .iter()
        .position(|arg| arg.ends_with("/x"))
        .expect("the output is an argument");
    args[position] = output;
    let text = stderr_of(&strs(&args), 1);
    assert!(text.contains("file/run"), "{text}");
}

/// A disk that fills up is imitated by a limit on the size of files, which makes writes fail in the same place.
#[cfg(unix)]
#[test]
fn the_earlier_checkpoint_survives_a_write_that_fails() {
    let lab = Lab::new();
    lowrank()
        .args(lab.train("run", &["--save-steps", "2", "--max-seq-length", "64"]))
        .assert()
        .success();
    let checkpoints = |run: &Path| {
        let mut names: Vec<String> = std::fs::read_dir(run.join("checkpoints"))
            .expect("the run has checkpoints")
            .map(|entry| {
                entry
                    .expect("a folder can be listed")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        names.sort();
        names
    };
    // As one that was killed after step 5.
    std::fs::remove_dir_all(lab.path("run/checkpoints/step-6")).expect("a checkpoint");
    std::fs::remove_file(lab.path("run/README.md")).expect("a card");
    let before = checkpoints(&lab.path("run"));
    // Going on from step 4 of 6 with a checkpoint after step 5, which does not fit.
    let script = "trap '' XFSZ; ulimit -f 2; exec \"$0\" \"$@\"";
    let output = std::process::Command::new("bash")
        .args(["-c", script])
        .arg(assert_cmd::cargo::cargo_bin("lowrank"))
        .args([
            "train",
            "--resume",
            "--save-steps",
            "1",
            "--output",
            &lab.arg("run"),
        ])
        .output()
        .expect("bash can be run");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("error: ") && text.contains("run"), "{text}");
    assert_eq!(checkpoints(&lab.path("run")), before, "{text}");
    lowrank()
        .args(["train", "--resume", "--output", &lab.arg("run")])
        .assert()
        .success();
}

#[test]
fn adapter_tensors_under_other_names_are_told_as_such() {
    let lab = Lab::new();
    lowrank().args(lab.train("run", &[])).assert().success();
    let path = lab.path("run/adapter_model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
    let header = header.replace("lora_A.weight", "lora_A.default.weight");
    let header = header.replace("lora_B.weight", "lora_B.default.weight");
    let renamed = [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        &bytes[8 + length..],
    ];
    std::fs::write(&path, renamed.concat()).unwrap();
    let text = evaluated_with_run(&lab);
    for part in [
        "have other names than",
        "lora_A.default.weight",
        "lora_A.weight is read",
    ] {
        assert!(text.contains(part), "`{part}` is not in:\n{text}");
    }
    for part in ["missing", "another model"] {
        assert!(!text.contains(part), "`{part}` is in:\n{text}");
    }
}

#[test]
fn what_would_have_to_be_downloaded_is_told_so() {
    let lab = Lab::new();
    let (model, data) = (lab.arg("model"), lab.arg("data"));
    let id = "nobody/some-thing";
    let text = stderr_of(&["eval", "--model", &model, "--data", id], 2);
    assert!(text.contains("data sets are not downloaded"), "{text}");
    let text = stderr_of(
        &["eval", "--model", &model, "--data", &data, "--adapter", id],
        2,
    );
    assert!(text.contains("adapters are not downloaded"), "{text}");
    let text = stderr_of(
        &[
            "train",
            "--model",
            &model,
            "--data",
            id,
            "--output",
            &lab.arg("x"),
        ],
        2,
    );
    assert!(text.contains("are not downloaded here"), "{text}");
}

#[test]
fn counts_of_a_bench_are_bounded() {
    let lab = Lab::new();
    let model = lab.arg("model");
    let text = stderr_of(
        &[
            "bench",
            "gemm",
            "--model",
            &model,
            "--tokens",
            "9223372036854775807",
        ],
        2,
    );
    assert!(
        text.contains("expected a whole number of 65536 at most"),
        "{text}"
    );
    let text = stderr_of(
        &[
            "bench",
            "gemm",
            "--model",
            &model,
            "--tokens",
            "0",
            "--repeats",
            "0",
        ],
        2,
    );
    assert!(text.contains("--tokens must be 1 or greater"), "{text}");
    assert!(text.contains("--repeats must be 1 or greater"), "{text}");
}
