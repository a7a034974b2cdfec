//! What may be written where, and what a failing write leaves.

use std::fs;
use std::io::Write as _;

use lowrank::train::Start;
use lowrank::tuning::Method;

use super::common::{Place, Watch, assert_says, failure, run};

#[test]
fn an_existing_run_is_replaced_only_when_told() {
    let place = Place::new("llama");
    let mut config = place.config(Method::Lora, "run");
    run(&config).expect("the run");
    let adapter = place.path("run").join("adapter_model.safetensors");
    let before = fs::read(&adapter).expect("the adapter");
    config.seed = 1;
    assert_says(
        &failure(run(&config)),
        &["run exists", "another output", "resume", "overwrite"],
    );
    assert!(fs::read(&adapter).expect("the adapter") == before);
    Watch::default()
        .train(&config, Start::Fresh { overwrite: true })
        .expect("it is replaced");
    assert!(fs::read(&adapter).expect("the adapter") != before);
}

#[test]
fn an_empty_folder_is_as_good_as_none() {
    let place = Place::new("llama");
    fs::create_dir(place.path("run")).expect("a folder");
    run(&place.config(Method::Lora, "run")).expect("the run");
}

#[test]
fn only_what_a_run_wrote_is_replaced() {
    let place = Place::new("llama");
    let overwrite = |name: &str| {
        let config = place.config(Method::Lora, name);
        Watch::default().train(&config, Start::Fresh { overwrite: true })
    };
    let write = |path: &str| fs::write(place.path(path), "mine").expect("a file");

    fs::create_dir(place.path("plain")).expect("a folder");
    write("plain/notes.txt");
    assert_says(
        &failure(overwrite("plain")),
        &["holds files and no run", "config.yaml"],
    );

    // A project whose own settings are in config.yaml.
    fs::create_dir(place.path("project")).expect("a folder");
    write("project/config.yaml");
    write("project/thesis.tex");
    assert_says(
        &failure(overwrite("project")),
        &["thesis.tex", "overwrite does not replace"],
    );
    assert!(place.path("project/thesis.tex").exists());

    // The output holds the model that is to be trained.
    run(&place.config(Method::Full, "trained")).expect("the run");
    let mut config = place.config(Method::Lora, "trained");
    config.model = place.path("trained").display().to_string();
    let text = failure(Watch::default().train(&config, Start::Fresh { overwrite: true }));
    assert_says(&text, &["is to be replaced", "is read from it"]);
    assert!(place.path("trained/model.safetensors").exists());

    // Data that can't be used leaves an earlier run alone.
    run(&place.config(Method::Lora, "run")).expect("the run");
    fs::write(place.path("data/train.jsonl"), "no json\n").expect("bad data");
    failure(overwrite("run"));
    assert!(place.path("run/adapter_model.safetensors").exists());
}

#[test]
fn a_file_in_the_way_is_named() {
    let place = Place::new("llama");
    fs::write(place.path("file"), "x").expect("a file");
    let text = failure(run(&place.config(Method::Lora, "file")));
    assert_says(&text, &["file is a file", "another output"]);
    let text = failure(run(&place.config(Method::Lora, "file/run")));
    assert_says(&text, &["file/run"]);
}

/// Where the child of the next test finds its run; without it the child does nothing.
#[cfg(unix)]
const CHILD: &str = "LOWRANK_TEST_LIMITED_RUN";

/// The child: resumes a run in a process that may not write large files, and prints what that gives.
#[cfg(unix)]
#[test]
fn a_run_under_a_file_size_limit() {
    let Some(folder) = std::env::var_os(CHILD) else {
        return;
    };
    let text =
        fs::read_to_string(std::path::Path::new(&folder).join("config.yaml")).expect("settings");
    let mut config: lowrank::train::TrainConfig = serde_saphyr::from_str(&text).expect("settings");
    config.save_steps = Some(4);
    let text = failure(Watch::default().train(&config, Start::Resume));
    writeln!(std::io::stdout(), "it failed: {text}").expect("the parent listens");
}

/// A checkpoint that can't be written whole, as on a full disk, leaves the one before, and the run can go on.
#[cfg(unix)]
#[test]
fn a_failing_checkpoint_leaves_the_one_before() {
    let place = Place::new("llama");
    let whole = place.config(Method::Full, "whole");
    run(&whole).expect("the run");
    let config = place.config(Method::Full, "run");
    Watch::stopping_after(2)
        .train(&config, Start::Fresh { overwrite: false })
        .expect("stopped");
    // 100 blocks are 50 or 100 KiB, as the shell counts; the state has 245. Ignored signals stay ignored in the child.
    let child = std::process::Command::new("sh")
        .args(["-c", r#"trap "" XFSZ; ulimit -f 100; exec "$@""#, "sh"])
        .arg(std::env::current_exe().expect("this program"))
        .args([
            "--exact",
            "output::a_run_under_a_file_size_limit",
            "--nocapture",
        ])
        .env(CHILD, place.path("run"))
        .output()
        .expect("a shell");
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&child.stderr)
    );
    assert_says(
        &said,
        &[
            "it failed: ",
            "training_state.safetensors",
            "checkpoints",
            "File too large",
        ],
    );
    assert_eq!(
        place.list("run/checkpoints"),
        ["step-2"],
        "nothing half-written stays"
    );

    Watch::default()
        .train(&config, Start::Resume)
        .expect("it goes on from step 2");
    let read = |run: &str| fs::read(place.path(run).join("model.safetensors")).expect("the model");
    assert!(read("run") == read("whole"));
}
