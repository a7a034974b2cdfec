//! `lowrank adapter merge` and `lowrank adapter prune`: what they write, and misuse.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{Lab, json_of, lowrank, stderr_of, strs};

/// An adapter of the library's goldens.
fn golden(name: &str) -> String {
    let library = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let folder: PathBuf = library.join("lowrank/tests/goldens_combine").join(name);
    folder.display().to_string()
}

#[test]
fn weights_may_be_negative() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (one, other) = (golden("plain"), golden("narrow"));
    let run = |output: &str, weights: &[&str]| {
        let output = path(output);
        let args = ["adapter", "merge", &one, &other, "--output", &output];
        json_of(&[&args[..], weights].concat())
    };
    let first = run("first", &["--weights=-1,0.5"]);
    let weights: Vec<&Value> = (0..2).map(|n| &first["adapters"][n]["weight"]).collect();
    assert_eq!(weights, [-1.0, 0.5]);
    assert_eq!(first["combination"], "cat");
    let modules = first["modules"].as_array().unwrap();
    let q = modules
        .iter()
        .find(|m| m["module"].as_str().unwrap().ends_with("q_proj"));
    let q = q.expect("both adapt it");
    assert_eq!(
        (&q["ranks"], &q["rank"]),
        (&serde_json::json!([4, 2]), &6.into())
    );
    assert!(first["relative_error"].as_f64().unwrap() < 1e-6);
    let second = run("second", &["--weights", "-1,0.5"]);
    assert_eq!(first["modules"], second["modules"]);
}

#[test]
fn what_training_wrote_is_combined_pruned_and_read() {
    let lab = Lab::new();
    for (output, seed) in [("one", "1"), ("two", "2")] {
        let args = lab.train(output, &["--seed", seed, "--r", "4"]);
        lowrank().args(strs(&args)).assert().success();
    }
    let (one, two, both) = (lab.arg("one"), lab.arg("two"), lab.arg("both"));
    let merge = ["adapter", "merge", &one, &two, "--output", &both];
    let half = [
        "--weights",
        "0.5,0.5",
        "--combine",
        "svd",
        "--svd-rank",
        "3",
    ];
    let text = lowrank().args(merge).args(half).assert().success();
    let text = String::from_utf8(text.get_output().stdout.clone()).unwrap();
    for words in ["svd", "weight 0.5, 4 modules", "4 · 4", "relative error"] {
        assert!(text.contains(words), "{text}");
    }
    let small = lab.arg("small");
    let prune = [
        "adapter", "prune", &both, "--output", &small, "--rank", "1", "--dtype", "bf16",
    ];
    let pruned = json_of(&prune);
    assert_eq!(
        (
            &pruned["modules"][0]["rank_before"],
            &pruned["modules"][0]["rank"]
        ),
        (&3.into(), &1.into())
    );
    let model = lab.arg("model");
    let seen = json_of(&["adapter", "inspect", &small, "--model", &model]);
    assert_eq!(seen["base_matches"], true);
    assert_eq!(seen["modules"][0]["r"], 1);
    // Half of an adapter twice is the adapter.
    let (same, data) = (lab.arg("same"), lab.arg("data"));
    json_of(&[
        "adapter",
        "merge",
        &one,
        &one,
        "--weights=0.5,0.5",
        "--output",
        &same,
    ]);
    let loss = |adapter: &str| {
        let found = json_of(&[
            "eval",
            "--model",
            &model,
            "--adapter",
            adapter,
            "--data",
            &data,
        ]);
        found["loss"].as_f64().unwrap()
    };
    assert!(
        (loss(&one) - loss(&same)).abs() < 1e-4,
        "{} {}",
        loss(&one),
        loss(&same)
    );
}

#[test]
fn misuse_of_merging() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out").display().to_string();
    let (plain, narrow) = (golden("plain"), golden("narrow"));
    let fails = |more: &[&str]| {
        let args = ["adapter", "merge", &plain, &narrow, "--output", &out];
        let text = stderr_of(&[&args[..], more].concat(), 2);
        assert!(!folder.path().join("out").exists());
        text
    };
    for (more, words) in [
        (
            &["--weights", "1"][..],
            &["--weights says 1 numbers for 2 adapters"][..],
        ),
        (&["--weights", "1,nan"], &["--weights", "finite number"]),
        (&["--combine", "ties"], &["`ties`", "--density 0.5"]),
        (
            &["--combine", "average"],
            &["average", "magnitude_prune_svd"],
        ),
        (
            &["--density", "0.5"],
            &["--density does nothing with `cat`"],
        ),
        (
            &["--combine", "dare_ties", "--density", "1.5"],
            &["--density is 1.5"],
        ),
        (
            &["--combine", "linear"],
            &["q_proj: rank 4 in", "2 in", "--combine"],
        ),
        (&["--svd-rank", "3"], &["--svd-rank does nothing"]),
    ] {
        let text = fails(more);
        for word in words {
            assert!(text.contains(word), "{more:?}: {text}");
        }
    }
    let text = stderr_of(&["adapter", "merge", "--output", &out], 2);
    assert!(text.contains("<ADAPTER>"), "{text}");
}

#[test]
fn misuse_of_pruning() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out").display().to_string();
    let plain = golden("plain");
    for (more, words) in [
        (&[][..], &["--rank", "--error"][..]),
        (
            &["--rank", "2", "--error", "0.1"],
            &["--rank", "--error", "cannot be used with"],
        ),
        (
            &["--rank", "4"],
            &["nothing would be pruned", "greater than 4", "--rank"],
        ),
        (&["--error", "2"], &["--error is 2"]),
    ] {
        let args = ["adapter", "prune", &plain, "--output", &out];
        let text = stderr_of(&[&args[..], more].concat(), 2);
        for word in words {
            assert!(text.contains(word), "{more:?}: {text}");
        }
    }
    assert!(!folder.path().join("out").exists());
}
