//! A run that was stopped or killed and goes on ends in the same bits as one that never stopped.

use std::fs;
use std::path::Path;

use lowrank::DType;
use lowrank::train::{Start, TrainConfig};
use lowrank::tuning::{Method, full};
use serde_json::Value;

use super::common::{Place, Watch, assert_says, failure, metrics, open, run, timeless};

fn assert_same_run(place: &Place, whole: &str, resumed: &str, method: Method) {
    let files: &[&str] = match method {
        Method::Full => &["model.safetensors", "config.json"],
        _ => &["adapter_model.safetensors", "adapter_config.json"],
    };
    for name in files {
        let read = |run: &str| fs::read(place.path(run).join(name)).expect("the file is there");
        assert!(read(whole) == read(resumed), "{name} differs");
    }
    let (a, b) = (place.path(whole), place.path(resumed));
    assert_eq!(timeless(&a), timeless(&b));
    let figures = |run: &Path| {
        let card = fs::read_to_string(run.join("README.md")).expect("a card");
        let (_, figures) = card.split_once("## Figures").expect("figures");
        let (figures, _) = figures.split_once("## Use").expect("how to use it");
        figures.to_owned()
    };
    assert_eq!(figures(&a), figures(&b));
}

fn stop_and_resume(config: &TrainConfig, after: u64) {
    let stopped = Watch::stopping_after(after)
        .train(config, Start::Fresh { overwrite: false })
        .expect("a run that is stopped is no failure");
    assert!(stopped.interrupted && stopped.steps == after && stopped.total_steps == 9);
    let finished = Watch::default()
        .train(config, Start::Resume)
        .expect("it goes on");
    assert!(!finished.interrupted && finished.steps == 9);
}

#[test]
fn a_stopped_run_goes_on_bit_for_bit() {
    for method in [
        Method::Lora,
        Method::Full,
        Method::Top,
        Method::Bitfit,
        Method::Adapter,
        Method::Ia3,
    ] {
        let place = Place::new("llama");
        let whole = run(&place.config(method, "whole")).expect("the run");
        assert_eq!(whole.steps, 9);
        // In the warm-up, at the end of an epoch, in the middle of the last one.
        for after in [1, 3, 8] {
            let name = format!("stopped{after}");
            stop_and_resume(&place.config(method, &name), after);
            assert_same_run(&place, "whole", &name, method);
        }
    }
}

#[test]
fn a_run_stopped_in_its_first_evaluation_begins_again() {
    let place = Place::new("llama");
    run(&place.config(Method::Lora, "whole")).expect("the run");
    let config = place.config(Method::Lora, "stopped");
    let stopped = Watch::stopped()
        .train(&config, Start::Fresh { overwrite: false })
        .expect("a run that is stopped is no failure");
    assert!(stopped.interrupted && stopped.steps == 0);
    assert!(!place.path("stopped").join("checkpoints").exists());
    Watch::default()
        .train(&config, Start::Resume)
        .expect("it begins");
    assert_same_run(&place, "whole", "stopped", Method::Lora);
}

#[test]
fn a_warmup_that_never_ends_is_named() {
    let place = Place::new("llama");
    for (warmup_steps, named) in [(9, true), (8, false)] {
        let config = TrainConfig {
            warmup_steps,
            ..place.config(Method::Lora, &format!("run{warmup_steps}"))
        };
        let mut watch = Watch::default();
        watch
            .train(&config, Start::Fresh { overwrite: false })
            .expect("the run");
        let found = watch
            .notes
            .iter()
            .any(|note| note.contains("the warm-up takes 9 steps and the run 9"));
        assert_eq!(found, named, "{:?}", watch.notes);
    }
}

#[test]
fn a_run_with_shared_prompts_goes_on_bit_for_bit() {
    for method in [Method::Lora, Method::Full] {
        let place = Place::new("llama");
        place.write_rows_with_prompts(11, 3);
        let config = |name: &str| TrainConfig {
            share_prompts: true,
            batch_size: 4,
            gradient_accumulation_steps: 1,
            ..place.config(method, name)
        };
        run(&config("whole")).expect("the run");
        // In the middle of an epoch, and so of a prompt's rows, and at the end of one.
        for after in [1, 6, 8] {
            let name = format!("stopped{after}");
            stop_and_resume(&config(&name), after);
            assert_same_run(&place, "whole", &name, method);
        }
    }
}

#[test]
fn a_run_older_than_a_setting_goes_on() {
    let place = Place::new("llama");
    run(&place.config(Method::Lora, "whole")).expect("the run");
    let mut config = place.config(Method::Lora, "old");
    Watch::stopping_after(2)
        .train(&config, Start::Fresh { overwrite: false })
        .expect("stopped");
    let path = place.path("old").join("config.yaml");
    let text = fs::read_to_string(&path).expect("config.yaml");
    let without = text.replacen("share_prompts: false\n", "", 1);
    assert_ne!(without, text);
    fs::write(&path, without).expect("the file of an older version");

    config.share_prompts = true;
    let text = failure(Watch::default().train(&config, Start::Resume));
    assert_says(&text, &["share_prompts: false before, true now"]);
    config.share_prompts = false;
    Watch::default()
        .train(&config, Start::Resume)
        .expect("it goes on");
    assert_same_run(&place, "whole", "old", Method::Lora);
}

#[test]
fn a_run_stopped_twice_and_by_other_threads_ends_the_same() {
    let place = Place::new("qwen3");
    run(&place.config(Method::Lora, "whole")).expect("the run");
    let mut config = place.config(Method::Lora, "twice");
    Watch::stopping_after(2)
        .train(&config, Start::Fresh { overwrite: false })
        .expect("stopped");
    // What does not change the result may change.
    config.save_steps = Some(4);
    config.save_total_limit = Some(1);
    config.threads = Some(1);
    Watch::stopping_after(7)
        .train(&config, Start::Resume)
        .expect("stopped again");
    Watch::default()
        .train(&config, Start::Resume)
        .expect("it goes on");
    assert_same_run(&place, "whole", "twice", Method::Lora);
}

/// Turns a stopped run into one that was killed: its last checkpoint never came to be, lines were written after the
/// one before, the last of them torn, and a temporary folder stayed.
fn kill(place: &Place, run: &str, last: u64) {
    let folder = place.path(run);
    let checkpoints = folder.join("checkpoints");
    fs::remove_dir_all(checkpoints.join(format!("step-{last}"))).expect("the checkpoint");
    fs::create_dir_all(checkpoints.join(".step-9.k3Xp9q.tmp")).expect("a temporary folder");
    let path = folder.join("metrics.jsonl");
    let mut text = fs::read_to_string(&path).expect("the lines");
    text.push_str(r#"{"step":6,"epoch":2.0,"lo"#);
    fs::write(&path, text).expect("the torn line");
    fs::remove_file(folder.join("report.html")).expect("the report");
}

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    for method in [Method::Lora, Method::Full] {
        let place = Place::new("gpt2");
        run(&place.config(method, "whole")).expect("the run");
        let mut config = place.config(method, "killed");
        config.save_steps = Some(3);
        Watch::stopping_after(5)
            .train(&config, Start::Fresh { overwrite: false })
            .expect("stopped");
        kill(&place, "killed", 5);
        Watch::default()
            .train(&config, Start::Resume)
            .expect("it goes on");
        assert_same_run(&place, "whole", "killed", method);
    }
}

#[test]
fn a_run_killed_before_its_first_checkpoint_begins_again() {
    let place = Place::new("llama");
    run(&place.config(Method::Lora, "whole")).expect("the run");
    let config = place.config(Method::Lora, "early");
    Watch::stopping_after(2)
        .train(&config, Start::Fresh { overwrite: false })
        .expect("stopped");
    kill(&place, "early", 2);
    let mut watch = Watch::default();
    watch
        .train(&config, Start::Resume)
        .expect("it begins again");
    assert_says(&watch.notes.join("\n"), &["there is no checkpoint yet"]);
    assert_same_run(&place, "whole", "early", Method::Lora);
}

/// Early stopping and the best checkpoint survive a stop.
#[test]
fn the_best_step_is_remembered() {
    let place = Place::new("llama");
    place.write_contrary_valid();
    let config = |name: &str| TrainConfig {
        eval_steps: Some(1),
        load_best_model_at_end: true,
        early_stopping_patience: Some(2),
        warmup_steps: 0,
        ..place.config(Method::Lora, name)
    };
    let whole = run(&config("whole")).expect("the run");
    assert!(
        whole.stopped_early,
        "training is meant to make it worse: {whole:?}"
    );
    let name = "stopped";
    let after = whole.steps - 1;
    Watch::stopping_after(after)
        .train(&config(name), Start::Fresh { overwrite: false })
        .expect("stopped");
    let resumed = Watch::default()
        .train(&config(name), Start::Resume)
        .expect("it goes on");
    assert_eq!((resumed.steps, resumed.stopped_early), (whole.steps, true));
    assert_eq!(resumed.eval_loss, whole.eval_loss);
    assert_same_run(&place, "whole", name, Method::Lora);
}

type Change = (&'static str, fn(&mut TrainConfig));

#[test]
fn a_setting_that_changes_the_result_is_refused_by_name() {
    let place = Place::new("llama");
    let config = place.config(Method::Lora, "run");
    Watch::stopping_after(2)
        .train(&config, Start::Fresh { overwrite: false })
        .expect("stopped");
    let changes: &[Change] = &[
        ("learning_rate: 0.01 before, 0.02 now", |c| {
            c.learning_rate = 0.02;
        }),
        ("batch_size: 2 before, 4 now", |c| c.batch_size = 4),
        ("gradient_accumulation_steps", |c| {
            c.gradient_accumulation_steps = 1;
        }),
        ("seed: 42 before, 43 now", |c| c.seed = 43),
        ("max_steps: null before, 20 now", |c| c.max_steps = Some(20)),
        ("r: 4 before, 8 now", |c| c.options.lora.r = 8),
        ("method", |c| c.method = Method::Full),
        ("lora_dropout", |c| c.options.lora.lora_dropout = 0.0),
        ("eval_steps", |c| c.eval_steps = None),
        ("base_dtype", |c| {
            c.base_dtype = lowrank::train::BaseDtype::Bf16;
        }),
    ];
    for (words, change) in changes {
        let mut changed = config.clone();
        change(&mut changed);
        let text = failure(Watch::default().train(&changed, Start::Resume));
        assert_says(&text, &["config.yaml", words]);
    }
    Watch::default()
        .train(&config, Start::Resume)
        .expect("nothing was lost by asking");
}

#[test]
fn other_data_or_another_base_is_refused() {
    let place = Place::new("llama");
    let config = place.config(Method::Lora, "run");
    Watch::stopping_after(2)
        .train(&config, Start::Fresh { overwrite: false })
        .expect("stopped");
    let resume = || Watch::default().train(&config, Start::Resume);

    let train = place.path("data").join("train.jsonl");
    let rows = fs::read_to_string(&train).expect("the rows");
    // As many rows and tokens as before: rows in another order, letters in another order.
    let mut lines: Vec<&str> = rows.lines().collect();
    lines.swap(0, 10);
    for changed in [lines.join("\n"), rows.replacen("yes", "yse", 1)] {
        fs::write(&train, changed).expect("other rows");
        let text = failure(resume());
        assert_says(&text, &["the training data changed", "11 rows"]);
    }
    fs::write(&train, &rows).expect("the rows");

    let valid = place.path("data").join("valid.jsonl");
    let held_out = fs::read_to_string(&valid).expect("the rows");
    place.write_rows("valid.jsonl", 4, 105);
    assert_says(&failure(resume()), &["the held-out data changed"]);
    fs::write(&valid, &held_out).expect("the rows");

    let weights = place.path("model").join("model.safetensors");
    let bytes = fs::read(&weights).expect("the model");
    let model = open(&place.path("model"));
    let mut other = full::inject(model.weights());
    other.params.view_mut(1).fill(0.5);
    full::save_weights(model.config(), &other, &place.path("model"), DType::F32).expect("another");
    assert_says(
        &failure(resume()),
        &["another base than the run began with"],
    );
    fs::write(&weights, bytes).expect("the model");
    resume().expect("everything is as it was");
}

/// Every file of a folder with its contents.
fn contents(folder: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            all.extend(contents(&path));
        } else {
            let bytes = fs::read(&path).expect("a file");
            all.push((path, bytes));
        }
    }
    all.sort();
    all
}

#[test]
fn a_finished_run_is_left_alone() {
    for method in [Method::Lora, Method::Full] {
        let place = Place::new("llama");
        let config = place.config(method, "run");
        let whole = run(&config).expect("the run");
        let before = contents(&place.path("run"));
        let mut watch = Watch::default();
        let again = watch.train(&config, Start::Resume).expect("no failure");
        assert!(again.already_finished && !again.interrupted, "{again:?}");
        assert_eq!(
            (again.steps, again.total_steps, again.trainable_parameters),
            (whole.steps, whole.total_steps, whole.trainable_parameters)
        );
        assert_eq!(again.train_loss, whole.train_loss);
        assert_eq!(again.first_eval_loss, whole.first_eval_loss);
        assert_eq!(again.eval_loss, whole.eval_loss);
        let words = ["is finished (9 of 9 steps)", "overwrite"];
        assert_says(&watch.notes.join("\n"), &words);
        assert!(contents(&place.path("run")) == before);
        // Not even the rows are needed.
        fs::remove_dir_all(place.path("data")).expect("gone");
        let again = Watch::default().train(&config, Start::Resume);
        assert!(again.expect("no failure").already_finished);
    }
    // Without what it was for, it is not finished.
    let place = Place::new("llama");
    let config = place.config(Method::Lora, "run");
    run(&config).expect("the run");
    fs::write(place.path("run").join("adapter_model.safetensors"), "x").expect("damage");
    let again = Watch::default()
        .train(&config, Start::Resume)
        .expect("the run");
    assert!(!again.already_finished && again.steps == 9);
}

#[test]
fn a_run_that_stopped_early_is_finished() {
    let place = Place::new("llama");
    place.write_contrary_valid();
    for save_steps in [None, Some(1)] {
        let name = format!("run{}", save_steps.is_some());
        let config = TrainConfig {
            eval_steps: Some(1),
            save_steps,
            early_stopping_patience: Some(2),
            warmup_steps: 0,
            ..place.config(Method::Lora, &name)
        };
        let whole = run(&config).expect("the run");
        assert!(whole.stopped_early && whole.steps < 9, "{whole:?}");
        let before = contents(&place.path(&name));
        let again = Watch::default()
            .train(&config, Start::Resume)
            .expect("no failure");
        assert!(again.already_finished && again.stopped_early, "{again:?}");
        assert_eq!(again.steps, whole.steps);
        assert!(contents(&place.path(&name)) == before);
    }
    // Killed between its last checkpoint and its end: no further step.
    let config = TrainConfig {
        eval_steps: Some(1),
        save_steps: Some(1),
        early_stopping_patience: Some(2),
        warmup_steps: 0,
        ..place.config(Method::Lora, "runtrue")
    };
    let before = metrics(&place.path("runtrue")).len();
    fs::remove_file(place.path("runtrue").join("README.md")).expect("the card");
    let again = Watch::default()
        .train(&config, Start::Resume)
        .expect("it ends");
    assert!(again.stopped_early && !again.already_finished);
    assert_eq!(metrics(&place.path("runtrue")).len(), before);
}

/// Changes the JSON of a checkpoint's trainer_state.json.
fn change_state(checkpoint: &Path, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let path = checkpoint.join("trainer_state.json");
    let text = fs::read_to_string(&path).expect("a state");
    let mut state: Value = serde_json::from_str(&text).expect("JSON");
    change(state.as_object_mut().expect("an object"));
    fs::write(&path, state.to_string()).expect("a state");
}

#[test]
fn what_is_recomputed_stays_as_it_was() {
    let place = Place::new("llama");
    let config = TrainConfig {
        base_dtype: lowrank::train::BaseDtype::Bf16,
        save_steps: Some(2),
        ..place.config(Method::Lora, "run")
    };
    Watch::stopping_after(4)
        .train(&config, Start::Fresh { overwrite: false })
        .expect("stopped");
    let checkpoint = place.path("run/checkpoints/step-4");
    // As on a machine with less memory.
    change_state(&checkpoint, |state| {
        assert_eq!(state["recompute"], "none");
        state["recompute"] = "selective".into();
    });
    let small = TrainConfig {
        memory_budget: Some(19_000_000),
        ..config.clone()
    };
    let text = failure(Watch::default().train(&small, Start::Resume));
    assert_says(
        &text,
        &[
            "memory_budget is 18.1 MiB",
            "resume with more memory",
            "recompute: full",
        ],
    );
    let mut watch = Watch::stopping_after(6);
    watch.train(&config, Start::Resume).expect("stopped again");
    assert_says(&watch.notes.join("\n"), &["recompute selective)"]);

    // Another choice can be made, and is kept from then on.
    let full = TrainConfig {
        recompute: Some(lowrank::model::Recompute::Full),
        ..config.clone()
    };
    let mut watch = Watch::stopping_after(8);
    watch.train(&full, Start::Resume).expect("stopped again");
    let words = ["recompute was selective until now and is full from here on"];
    assert_says(&watch.notes.join("\n"), &words);
    let yaml = fs::read_to_string(place.path("run/config.yaml")).expect("config.yaml");
    assert_says(&yaml, &["recompute: full"]);
    // A checkpoint of an older version has none of it.
    for name in ["recompute", "base_mark", "state_hash"] {
        change_state(&place.path("run/checkpoints/step-8"), |state| {
            assert!(state.remove(name).is_some(), "{name}");
        });
    }
    Watch::default()
        .train(&config, Start::Resume)
        .expect("it ends");
}

/// What a message says of damage, and how to do it to a checkpoint.
type Damage = (&'static str, fn(&Path));

#[test]
fn a_checkpoint_whose_values_changed_is_not_used() {
    let place = Place::new("llama");
    run(&place.config(Method::Lora, "whole")).expect("the run");
    let config = TrainConfig {
        save_steps: Some(2),
        ..place.config(Method::Lora, "run")
    };
    let damages: [Damage; 4] = [
        ("its values are not those that were written", |folder| {
            let path = folder.join("training_state.safetensors");
            let mut bytes = fs::read(&path).expect("the state");
            let last = bytes.len() - 1;
            bytes[last - 70] ^= 1;
            fs::write(&path, bytes).expect("damage");
        }),
        // Of an older version, which has no hash.
        ("training_state.safetensors", |folder| {
            change_state(folder, |state| drop(state.remove("state_hash")));
            let path = folder.join("training_state.safetensors");
            let mut bytes = fs::read(&path).expect("the state");
            let last = bytes.len() - 4;
            bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
            fs::write(&path, bytes).expect("damage");
        }),
        ("it is of step 40, and the run has 9", |folder| {
            change_state(folder, |state| drop(state.insert("step".into(), 40.into())));
            fs::rename(folder, folder.with_file_name("step-40")).expect("renamed");
        }),
        ("the folder is called step-4", |folder| {
            change_state(folder, |state| drop(state.insert("step".into(), 3.into())));
        }),
    ];
    for (words, damage) in damages {
        drop(fs::remove_dir_all(place.path("run")));
        Watch::stopping_after(4)
            .train(&config, Start::Fresh { overwrite: false })
            .expect("stopped");
        damage(&place.path("run/checkpoints/step-4"));
        let mut watch = Watch::default();
        watch.train(&config, Start::Resume).expect("it goes on");
        let said = ["resuming after step 2 of 9", "is moved to", words];
        assert_says(&watch.notes.join("\n"), &said);
        assert_same_run(&place, "whole", "run", Method::Lora);
    }
}

#[test]
fn any_other_base_is_refused() {
    let place = Place::new("llama");
    let config = place.config(Method::Lora, "run");
    Watch::stopping_after(2)
        .train(&config, Start::Fresh { overwrite: false })
        .expect("stopped");
    let model = place.path("model");
    let files = ["config.json", "model.safetensors"].map(|name| {
        let path = model.join(name);
        let bytes = fs::read(&path).expect("the model");
        (path, bytes)
    });
    let refused = |words: &[&str]| {
        let text = failure(Watch::default().train(&config, Start::Resume));
        assert_says(
            &text,
            &["this is another base than the run began with", "model"],
        );
        assert_says(&text, words);
        assert!(!text.contains("delete"), "{text}");
        for (path, bytes) in &files {
            fs::write(path, bytes).expect("the model");
        }
    };
    let eps = |json: &mut Value| json["rms_norm_eps"] = 0.01.into();
    let theta = |json: &mut Value| json["rope_parameters"]["rope_theta"] = 123.0.into();
    let act = |json: &mut Value| json["hidden_act"] = "gelu".into();
    let changes: [&dyn Fn(&mut Value); 3] = [&eps, &theta, &act];
    for change in changes {
        let mut json: Value = serde_json::from_slice(&files[0].1).expect("JSON");
        change(&mut json);
        fs::write(&files[0].0, json.to_string()).expect("another");
        refused(&["its config.json says otherwise"]);
    }
    // One weight of one tensor.
    let mut bytes = files[1].1.clone();
    let last = bytes.len() - 8;
    bytes[last] ^= 1;
    fs::write(&files[1].0, bytes).expect("another");
    refused(&["its weights differ"]);
    // Of another shape.
    let other = Place::new("qwen3");
    for (path, _) in &files {
        let name = path.file_name().expect("a name");
        fs::copy(other.path("model").join(name), path).expect("another");
    }
    refused(&["fingerprint"]);
    Watch::default()
        .train(&config, Start::Resume)
        .expect("everything is as it was");
}

#[test]
fn there_must_be_a_run_to_resume() {
    let place = Place::new("llama");
    for name in ["nowhere", "data"] {
        let text =
            failure(Watch::default().train(&place.config(Method::Lora, name), Start::Resume));
        assert_says(
            &text,
            &["config.yaml", "no run to resume", "leave out resume"],
        );
    }
    // A damaged checkpoint is named.
    let config = place.config(Method::Lora, "run");
    Watch::stopping_after(2)
        .train(&config, Start::Fresh { overwrite: false })
        .expect("stopped");
    let checkpoint = place.path("run").join("checkpoints/step-2");
    let state = checkpoint.join("training_state.safetensors");
    let bytes = fs::read(&state).expect("the state");
    fs::write(&state, &bytes[..bytes.len() / 2]).expect("half of it");
    let text = failure(Watch::default().train(&config, Start::Resume));
    assert_says(&text, &["step-2", "training_state.safetensors"]);
    fs::write(&state, &bytes).expect("the state");
    fs::write(checkpoint.join("trainer_state.json"), "{").expect("half of it");
    let text = failure(Watch::default().train(&config, Start::Resume));
    assert_says(
        &text,
        &["trainer_state.json", "step-2", "to begin again, delete"],
    );
}
