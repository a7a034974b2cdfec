//! Going on with a run: on another day, from another folder, with files that moved or were damaged.

use std::fs;
use std::path::Path;

use super::support::{Lab, lowrank, strs, write};

/// A run of six steps that was killed after the fourth.
fn killed_run(lab: &Lab, output: &str, more: &[&str]) {
    let more = [&["--save-steps=2"][..], more].concat();
    lowrank()
        .args(lab.train(output, &more))
        .current_dir(lab.path(""))
        .assert()
        .success();
    fs::remove_dir_all(lab.path(output).join("checkpoints/step-6")).expect("a checkpoint");
    fs::remove_file(lab.path(output).join("adapter_config.json")).expect("an adapter");
}

/// What a resumed run says.
fn resume(lab: &Lab, output: &str, folder: &Path, more: &[&str], code: i32) -> String {
    let assert = lowrank()
        .args(["train", "--resume", "--output", &lab.arg(output)])
        .args(more)
        .current_dir(folder)
        .assert()
        .code(code);
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

fn adapter(lab: &Lab, run: &str) -> Vec<u8> {
    fs::read(lab.path(run).join("adapter_model.safetensors")).expect("an adapter")
}

#[test]
fn a_template_that_writes_the_date_keeps_that_of_the_beginning() {
    let lab = Lab::new();
    let template = "{% for m in messages %}{{ m.role + strftime_now(' %H:%M:%S ') + m.content + '<|endoftext|>' }}{% endfor %}";
    write(&lab.path("model"), "chat_template.jinja", template);
    let row = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}"#;
    write(
        &lab.path("data"),
        "train.jsonl",
        format!("{row}\n").repeat(8),
    );
    write(&lab.path("data"), "valid.jsonl", format!("{row}\n"));
    killed_run(&lab, "run", &[]);
    let before = adapter(&lab, "run");
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let text = resume(&lab, "run", &lab.path(""), &[], 0);
    assert!(text.contains("resuming after step 4"), "{text}");
    assert!(adapter(&lab, "run") == before);

    // A run older than the record goes on as it did: with today's date, which is another one.
    let config = lab.path("run/config.yaml");
    let yaml = fs::read_to_string(&config).expect("config.yaml");
    let (old, _) = yaml.split_once("began:").expect("a record");
    fs::write(&config, old).expect("config.yaml");
    fs::remove_file(lab.path("run/README.md")).expect("a card");
    let text = resume(&lab, "run", &lab.path(""), &[], 2);
    assert!(text.contains("the training data changed"), "{text}");
    assert!(text.contains("--init-adapter"), "{text}");
}

#[test]
fn a_run_is_found_from_another_folder_and_with_moved_files() {
    let lab = Lab::new();
    let elsewhere = tempfile::tempdir().expect("a folder");
    let relative = |lab: &Lab| -> Vec<String> {
        let base = format!("{}/", lab.arg("").trim_end_matches('/'));
        let args = lab.train("run", &["--save-steps=2"]);
        args.iter().map(|arg| arg.replace(&base, "")).collect()
    };
    let args = relative(&lab);
    assert!(args.contains(&"data".to_owned()), "{args:?}");
    let killed = || {
        let _ = fs::remove_dir_all(lab.path("run"));
        lowrank()
            .args(strs(&args))
            .current_dir(lab.path(""))
            .assert()
            .success();
        fs::remove_dir_all(lab.path("run/checkpoints/step-6")).expect("a checkpoint");
        fs::remove_file(lab.path("run/README.md")).expect("a card");
    };
    let config = || fs::read_to_string(lab.path("run/config.yaml")).expect("config.yaml");

    killed();
    let (before, yaml) = (adapter(&lab, "run"), config());
    resume(&lab, "run", elsewhere.path(), &[], 0);
    assert!(adapter(&lab, "run") == before);
    assert_eq!(config(), yaml, "what was typed still leads there");

    // Moved, and said where to.
    killed();
    let data = elsewhere.path().join("rows");
    fs::rename(lab.path("data"), &data).expect("moved");
    let text = resume(&lab, "run", elsewhere.path(), &[], 2);
    for word in [
        "data (in config.yaml): data is neither",
        "where the run began",
        "--data",
    ] {
        assert!(text.contains(word), "{text}");
    }
    resume(&lab, "run", elsewhere.path(), &["--data=rows"], 0);
    assert!(adapter(&lab, "run") == before);
    let shown = format!("data: {}", data.display());
    assert!(config().contains(&shown), "{}", config());

    // Other contents are refused.
    fs::remove_dir_all(lab.path("run/checkpoints/step-6")).expect("a checkpoint");
    fs::remove_file(lab.path("run/README.md")).expect("a card");
    let rows = data.join("train.jsonl");
    let text = fs::read_to_string(&rows).expect("rows");
    fs::write(&rows, text.replace("odd", "even")).expect("rows");
    let text = resume(&lab, "run", elsewhere.path(), &[], 2);
    assert!(text.contains("the training data changed"), "{text}");
}

#[test]
fn settings_that_are_younger_than_a_run_are_what_they_were() {
    let lab = Lab::new();
    killed_run(&lab, "run", &[]);
    let config = lab.path("run/config.yaml");
    let yaml = fs::read_to_string(&config).expect("config.yaml");
    assert!(yaml.contains("compute_dtype: null"), "{yaml}");
    fs::write(&config, yaml.replace("compute_dtype: null\n", "")).expect("config.yaml");
    let text = resume(&lab, "run", &lab.path(""), &[], 0);
    assert!(text.contains("resuming after step 4"), "{text}");
}

#[test]
fn another_kind_of_processor_is_told() {
    let lab = Lab::new();
    killed_run(&lab, "run", &[]);
    let state = lab.path("run/checkpoints/step-4/trainer_state.json");
    let json = fs::read_to_string(&state).expect("a state");
    let mut json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    json["computed"] = serde_json::json!({"processor": "z80", "compute_dtype": "bf16"});
    fs::write(&state, json.to_string()).expect("a state");
    let text = resume(&lab, "run", &lab.path(""), &[], 0);
    let warning = "until now factors were read as bf16 on z80, and from here on as";
    assert!(text.contains(warning), "{text}");
    // The last checkpoint was written by this one.
    let last = lab.path("run/checkpoints/step-6/trainer_state.json");
    let last = fs::read_to_string(last).expect("a state");
    assert!(!last.contains("z80"), "{last}");
    let card = fs::read_to_string(lab.path("run/README.md")).expect("a card");
    assert!(card.contains("| computed | "), "{card}");
}

#[test]
fn an_adapter_to_start_from_is_not_needed_again() {
    let lab = Lab::new();
    lowrank().args(lab.train("first", &[])).assert().success();
    let first = lab.arg("first");
    killed_run(&lab, "run", &["--init-adapter", &first]);
    let before = adapter(&lab, "run");
    fs::remove_dir_all(&first).expect("gone");
    resume(&lab, "run", &lab.path(""), &[], 0);
    assert!(adapter(&lab, "run") == before);
}

#[test]
fn damage_beside_the_checkpoint_is_reported_and_passed_over() {
    let lab = Lab::new();
    killed_run(&lab, "run", &[]);
    let before = adapter(&lab, "run");
    let metrics = lab.path("run/metrics.jsonl");
    let text = fs::read_to_string(&metrics).expect("metrics");
    let whole = text.lines().count();
    fs::write(&metrics, format!("garbage\n{text}half a li")).expect("metrics");
    for name in ["README.md", "report.html"] {
        fs::remove_file(lab.path("run").join(name)).expect(name);
    }
    let text = resume(&lab, "run", &lab.path(""), &[], 0);
    assert!(
        text.contains("metrics.jsonl, line 1 is not a line of metrics") && text.contains("dropped"),
        "{text}"
    );
    assert!(adapter(&lab, "run") == before);
    let text = fs::read_to_string(&metrics).expect("metrics");
    assert_eq!(text.lines().count(), whole);

    fs::remove_dir_all(lab.path("run/checkpoints/step-6")).expect("a checkpoint");
    fs::remove_file(&metrics).expect("metrics");
    fs::remove_file(lab.path("run/README.md")).expect("a card");
    resume(&lab, "run", &lab.path(""), &[], 0);
    assert!(adapter(&lab, "run") == before);
}

#[test]
fn a_damaged_checkpoint_is_moved_aside() {
    let lab = Lab::new();
    killed_run(&lab, "run", &[]);
    let before = adapter(&lab, "run");
    let newest = lab.path("run/checkpoints/step-4/training_state.safetensors");
    fs::write(&newest, "damaged").expect("a checkpoint");
    let text = resume(&lab, "run", &lab.path(""), &["--save-total-limit=1"], 0);
    assert!(text.contains("resuming after step 2 of 6"), "{text}");
    assert!(
        text.contains("step-4 cannot be used and is moved to"),
        "{text}"
    );
    assert!(lab.path("run/checkpoints/damaged-step-4").is_dir());
    assert!(adapter(&lab, "run") == before);
    // None is left that can be used.
    let last = lab.path("run/checkpoints/step-6/trainer_state.json");
    fs::write(&last, "{").expect("a checkpoint");
    fs::remove_file(lab.path("run/README.md")).expect("a card");
    let text = resume(&lab, "run", &lab.path(""), &[], 1);
    assert!(
        text.contains("no checkpoint of") && text.contains("step-6"),
        "{text}"
    );
}
