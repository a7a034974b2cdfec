//! The method prefix from training to generating, and what it refuses.

use crate::support::{Lab, json_of, lowrank, stderr_of, strs};

#[test]
fn virtual_tokens_are_trained_used_and_not_merged() {
    let lab = Lab::new();
    let (model, data) = (lab.arg("model"), lab.arg("data"));
    let base = json_of(&[
        "eval", "--model", &model, "--data", &data, "--split", "valid",
    ]);
    for (run, more, parameters) in [
        ("layer", &["--num-virtual-tokens", "3"][..], None),
        (
            "prompt",
            &[
                "--prefix-kind=embedding",
                "--num-virtual-tokens=4",
                "--prefix-init=vocab",
            ],
            Some("prompt_embeddings"),
        ),
        (
            "infix",
            &[
                "--prefix-kind=embedding",
                "--num-virtual-tokens=2",
                "--infix-tokens=2",
                "--share-prompts",
            ],
            Some("infix_embeddings"),
        ),
    ] {
        let flags = [&["--method", "prefix", "--learning-rate", "0.05"], more].concat();
        let outcome = json_of(&strs(&lab.train(run, &flags)));
        let folder = lab.arg(run);
        let with = json_of(&[
            "eval",
            "--model",
            &model,
            "--adapter",
            &folder,
            "--data",
            &data,
            "--split",
            "valid",
        ]);
        assert_ne!(with["loss"], base["loss"], "{run}");
        for beams in ["1", "3"] {
            let text = json_of(&[
                "generate",
                "--model",
                &model,
                "--adapter",
                &folder,
                "--prompt",
                "a",
                "--max-new-tokens",
                "3",
                "--num-beams",
                beams,
            ]);
            assert!(text.to_string().contains("new_tokens"), "{text}");
        }
        let seen = json_of(&["adapter", "inspect", &folder, "--model", &model]);
        assert_eq!(seen["method"], "prefix");
        assert_eq!(seen["parameters"], outcome["trainable_parameters"]);
        if let Some(name) = parameters {
            assert!(seen["modules"].to_string().contains(name), "{seen}");
        }
        let error = stderr_of(
            &[
                "merge",
                "--model",
                &model,
                "--adapter",
                &folder,
                "--output",
                &lab.arg("merged"),
            ],
            2,
        );
        assert!(error.contains("virtual tokens cannot be merged"), "{error}");
    }
    // What begins from an adapter takes its kind and numbers.
    let next = lab.train(
        "next",
        &["--method=prefix", "--init-adapter", &lab.arg("prompt")],
    );
    lowrank().args(&next).assert().success();
    let yaml = std::fs::read_to_string(lab.path("next").join("config.yaml")).expect("settings");
    assert!(
        yaml.contains("prefix_kind: embedding") && yaml.contains("num_virtual_tokens: 4"),
        "{yaml}"
    );
}

#[test]
fn settings_that_do_not_fit_are_refused() {
    let lab = Lab::new();
    let refuse = |flags: &[&str], words: &str| {
        let error = stderr_of(&strs(&lab.train("run", flags)), 2);
        assert!(error.contains(words), "{error}");
        assert!(!lab.path("run").exists());
    };
    refuse(
        &["--method=prefix", "--infix-tokens=2"],
        "--infix-tokens goes with --prefix-kind embedding",
    );
    refuse(
        &["--method=prefix", "--num-virtual-tokens=0"],
        "--num-virtual-tokens must be 1 or greater",
    );
    refuse(
        &["--method=prefix", "--r=2"],
        "--r does nothing with the method prefix",
    );
    refuse(
        &["--num-virtual-tokens=5"],
        "--num-virtual-tokens does nothing with the method lora",
    );
    refuse(
        &["--method=prefix", "--num-virtual-tokens=100000"],
        "leave no room for text",
    );
}
