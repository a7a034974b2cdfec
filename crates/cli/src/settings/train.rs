//! What the settings of a training come to: [`resolve`] checks all of them and what they mean together.

mod checks;

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::{Args, Command, FromArgMatches};
use lowrank::settings::TrainConfig;
use serde_json::{Map, Value};

use super::{Layered, object};
use crate::failure::Misuse;

/// Settings that have been checked; everything that can be decided without the model and the data is.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// Where the run is written.
    pub output: PathBuf,
    /// Every setting under its key, as `config.yaml` holds them.
    pub values: Map<String, Value>,
    /// Keys that the user gave, rather than left to their defaults.
    pub given: BTreeSet<String>,
}

/// A command that takes every setting, and nothing else.
pub fn command() -> Command {
    TrainConfig::augment_args(Command::new("train"))
}

/// The defaults; what has none is a placeholder.
pub fn defaults() -> TrainConfig {
    let matches = command().try_get_matches_from(["train"]);
    matches
        .and_then(|matches| TrainConfig::from_arg_matches(&matches))
        .expect("the defaults are values of their settings")
}

/// Checks every setting and the combinations of them.
///
/// # Errors
/// With every problem that was found, those of the layers included.
pub fn resolve(mut layered: Layered) -> Result<Resolved, Misuse> {
    let mut problems = layered.problems.clone();
    layered.adopt_adapter(&mut problems);
    for problem in layered.settings.problems_as(&layered) {
        problems.push(problem);
    }
    layered.check_method(&mut problems);
    layered.check_paths(&mut problems);
    let mut settings = layered.settings;
    if !layered.given.contains("learning_rate") {
        settings.learning_rate = settings.method.learning_rate();
    }
    let values = object(&settings).unwrap_or_else(|problem| {
        problems.push(problem);
        Map::new()
    });
    problems.or(Resolved {
        output: settings.output,
        values,
        given: layered.given,
    })
}

#[cfg(test)]
mod tests {
    use lowrank::tuning::lora::InitLoraWeights;
    use lowrank::tuning::targets::Targets;

    use super::super::{File, layer};
    use super::*;

    fn layered(flags: &[&str], yaml: &str) -> Layered {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.yaml");
        std::fs::write(&path, yaml).unwrap();
        let matches = command().get_matches_from([&["train"], flags].concat());
        let parsed = TrainConfig::from_arg_matches(&matches).unwrap();
        layer(parsed, &matches, vec![File::read(&path).unwrap()])
    }

    fn problems(flags: &[&str], yaml: &str) -> String {
        super::resolve(layered(flags, yaml))
            .unwrap_err()
            .to_string()
    }

    const WHOLE: [&str; 6] = [
        "--model",
        "builtin:tiny",
        "--data",
        ".",
        "--output",
        "runs/x",
    ];

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let yaml = "learning_rate: 1e-4\nr: 4\ntarget_modules: [q_proj]\nrank_pattern: {b: 2, a: 3}\nshuffle: false\n\
                    init_lora_weights: true\nmax_steps: 50\nwarmup_steps: 7\n";
        let s = layered(
            &["--r", "2", "--num-train-epochs", "1", "--warmup-ratio=0.1"],
            yaml,
        );
        assert_eq!(s.problems.problems(), [""; 0]);
        let s = s.settings;
        assert_eq!(
            (s.options.lora.r, s.learning_rate, s.batch_size),
            (2, 1e-4, 8)
        );
        assert_eq!(
            s.options.targets.target_modules,
            Some(Targets::Names(vec!["q_proj".to_string()]))
        );
        assert_eq!(
            s.options.lora.rank_pattern,
            [("b".to_string(), 2), ("a".to_string(), 3)]
        );
        assert_eq!(
            (s.shuffle, s.options.lora.init_lora_weights),
            (false, InitLoraWeights::KaimingUniform)
        );
        assert_eq!((s.max_steps, s.num_train_epochs), (None, 1.0));
        assert_eq!((s.warmup_steps, s.warmup_ratio), (0, 0.1));
    }

    #[test]
    fn switches_can_be_turned_off_again() {
        let yaml = "use_rslora: true\nshuffle: false\ntrain_on_prompt: true";
        let s = layered(&["--use-rslora=false", "--no-shuffle=false"], yaml).settings;
        assert_eq!(
            (s.options.lora.use_rslora, s.shuffle, s.train_on_prompt),
            (false, true, true)
        );
        let s = layered(&["--use-rslora", "--no-shuffle"], "").settings;
        assert_eq!((s.options.lora.use_rslora, s.shuffle), (true, false));
    }

    #[test]
    fn what_was_resolved_reads_back_as_the_same() {
        let flags = [
            &WHOLE[..],
            &[
                "--rank-pattern",
                "a.*=2",
                "--max-steps=9",
                "--init-lora-weights=false",
            ],
        ]
        .concat();
        let resolved = super::resolve(layered(&flags, "")).unwrap();
        let yaml = serde_saphyr::to_string(&resolved.values).unwrap();
        let again = super::resolve(layered(&[], &yaml)).unwrap();
        assert_eq!(again.values, resolved.values);
        assert_eq!(resolved.given.len(), 6);
    }

    #[test]
    fn the_method_decides_the_learning_rate() {
        let rate = |flags: &[&str]| {
            let resolved = super::resolve(layered(&[&WHOLE, flags].concat(), "")).unwrap();
            resolved.values["learning_rate"].as_f64().unwrap()
        };
        assert_eq!(rate(&[]), 2e-4);
        assert_eq!(rate(&["--method=full"]), 2e-5);
        assert_eq!(rate(&["--method=full", "--learning-rate=1"]), 1.0);
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        insta::assert_snapshot!(problems(
            &["--batch-size=0", "--data=nowhere"],
            "lora_dropout: 1\nlearning_rate: fast\nlearing_rate: 1\niters: 100\nseed: -1\nuse_rslora: 3\nwandb: x\n\
             early_stopping_patience: 2\ntarget_modules: []\n",
        ), @r#"
        13 problems with the settings:
          - learning_rate (in run.yaml): got string "fast", expected a number
          - learing_rate (in run.yaml) is not a setting; did you mean learning_rate?
          - iters (in run.yaml): this setting is called `max_steps` here; it counts optimizer steps, each over batch_size × gradient_accumulation_steps rows
          - seed (in run.yaml): got the number `-1`, expected a whole number
          - use_rslora (in run.yaml): got the number `3`, expected true or false
          - wandb (in run.yaml) is not a setting; `lowrank train --help` lists them
          - lora_dropout (in run.yaml) must be at least 0 and less than 1, not 1
          - --batch-size must be 1 or greater, not 0
          - early_stopping_patience (in run.yaml) needs --eval-steps: without it the only evaluation is at the end
          - target_modules (in run.yaml) names no module
          - --model is missing: give a model folder, an id of the Hugging Face Hub, or builtin:tiny
          - --output is missing: give the folder to write the adapter to
          - --data: nowhere does not exist
        "#);
    }

    #[test]
    fn settings_that_would_do_nothing_are_refused() {
        let text = problems(
            &[&WHOLE[..], &["--method=full", "--r=4"]].concat(),
            "lora_alpha: 3\nlora_dropout: 0\n",
        );
        insta::assert_snapshot!(text, @r#"
        2 problems with the settings:
          - --r does nothing with the method full; leave it out
          - lora_alpha (in run.yaml) does nothing with the method full; leave it out
        "#);
    }

    #[test]
    fn prompts_are_shared_within_a_batch() {
        let text = problems(
            &[&WHOLE[..], &["--share-prompts"]].concat(),
            "batch_size: 1\ngradient_accumulation_steps: 8\n",
        );
        insta::assert_snapshot!(
            text,
            @"--share-prompts needs a --batch-size of 2 or more: a prompt is shared by rows of a batch"
        );
        let flags = [&WHOLE[..], &["--share-prompts"]].concat();
        let resolved = super::resolve(layered(&flags, "")).unwrap();
        assert_eq!(resolved.values["share_prompts"], true);
    }

    #[test]
    fn an_adapter_to_start_from_decides() {
        let folder = tempfile::tempdir().unwrap();
        let config = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": ["v_proj", "q_proj"],
            "rank_pattern": {"k": 2}, "exclude_modules": null}"#;
        std::fs::write(folder.path().join("adapter_config.json"), config).unwrap();
        let path = folder.path().display().to_string();
        let flags = |more: &[&str]| {
            [&WHOLE[..], &["--init-adapter", &path], more]
                .concat()
                .join("\n")
        };
        let resolve = |flags: String| {
            super::resolve(layered(&flags.split('\n').collect::<Vec<_>>(), ""))
                .map_err(|error| error.to_string())
        };
        let values = resolve(flags(&["--target-modules", "q_proj,v_proj"]))
            .unwrap()
            .values;
        assert_eq!(
            (&values["r"], &values["lora_alpha"]),
            (&Value::from(4), &Value::from(32.0))
        );
        assert_eq!(
            values["target_modules"],
            serde_json::json!(["v_proj", "q_proj"])
        );
        assert_eq!(values["rank_pattern"], serde_json::json!({"k": 2}));
        let text = resolve(flags(&["--r=8", "--use-rslora"])).unwrap_err();
        insta::assert_snapshot!(text, @r#"
        2 problems with the settings:
          - --r is 8, and the adapter to start from has 4, which cannot be changed; leave it out
          - --use-rslora is true, and the adapter to start from has false, which cannot be changed; leave it out
        "#);
    }

    #[test]
    fn numbers_must_be_usable() {
        for value in [".nan", ".inf", "-.INF", "1e999"] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("run.yaml");
            std::fs::write(&path, format!("r: 4\nlearning_rate: {value}\n")).unwrap();
            let text = File::read(&path).unwrap_err().to_string();
            let expected =
                format!("line 2 (`learning_rate: {value}`): {value} is not a finite number");
            assert!(text.ends_with(&expected), "{text}");
        }
        for value in ["nan", "\"inf\""] {
            let text = problems(&WHOLE, &format!("learning_rate: {value}"));
            assert!(text.starts_with("learning_rate (in run.yaml): got string"));
        }
        let flags = [
            "--adam-epsilon=1e-60",
            "--adam-beta2=0.9999999999",
            "--lora-alpha=1e300",
        ];
        insta::assert_snapshot!(problems(&[&WHOLE[..], &flags].concat(), ""), @r"
        3 problems with the settings:
          - --lora-alpha must be greater than 0, and no larger than 3.4e38, the largest 32-bit number; it is 1e300
          - --adam-beta2 must be at least 0 and less than 1, not 0.9999999999, which is 1 as a 32-bit number
          - --adam-epsilon must be greater than 0, not 1e-60, which is 0 as a 32-bit number
        ");
    }

    #[test]
    fn files_that_are_no_settings_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.yaml");
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            File::read(&path)
                .map(|file| file.values.len())
                .map_err(|error| error.to_string())
        };
        assert_eq!(read(b""), Ok(0));
        assert_eq!(read(b"# nothing yet\n"), Ok(0));
        assert_eq!(read(b"{\"r\": 4}"), Ok(1));
        assert!(
            read(b"- r\n")
                .unwrap_err()
                .contains("must hold lines of the form `key: value`")
        );
        assert!(read(b"r: [1\n").unwrap_err().contains("is not valid YAML"));
        assert!(
            read(b"r: 1\nr: 2\n")
                .unwrap_err()
                .contains("is not valid YAML")
        );
        assert!(read(b"r: \xff\n").unwrap_err().contains("is not UTF-8"));
        assert!(
            File::read(&folder.path().join("none.yaml"))
                .unwrap_err()
                .to_string()
                .contains("cannot read")
        );
    }
}
