//! From training to merging, on a model that fits in a test.

use serde_json::Value;

use crate::support::{Lab, json_of, lowrank, stderr_of, strs, write};

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is not a number"))
}

fn metrics(lab: &Lab, run: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(lab.path(run).join("metrics.jsonl"))
        .expect("a run writes metrics.jsonl");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("a line of metrics is JSON"))
        .collect()
}

#[test]
fn train_evaluate_generate_inspect_and_merge() {
    let lab = Lab::new();
    let (model, data, run) = (lab.arg("model"), lab.arg("data"), lab.arg("run"));
    let outcome = json_of(&strs(
        &lab.train("run", &["--eval-steps", "3", "--learning-rate", "0.05"]),
    ));
    assert_eq!(outcome["steps"], 6);
    assert!(
        number(&outcome["eval_loss"]) < number(&outcome["first_eval_loss"]),
        "{outcome}"
    );
    for name in [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.yaml",
        "metrics.jsonl",
        "report.html",
    ] {
        assert!(lab.path("run").join(name).is_file(), "{name} is missing");
    }
    let lines = metrics(&lab, "run");
    assert_eq!(
        lines.iter().filter(|line| line["loss"].is_number()).count(),
        6
    );
    assert_eq!(
        lines
            .iter()
            .filter(|line| line["eval_loss"].is_number())
            .count(),
        3
    );

    let with = json_of(&[
        "eval",
        "--model",
        &model,
        "--adapter",
        &run,
        "--data",
        &data,
    ]);
    assert_eq!(with["rows"], 8);
    assert!(
        (number(&with["loss"]) - number(&outcome["eval_loss"])).abs() < 1e-6,
        "{with}"
    );
    let without = json_of(&["eval", "--model", &model, "--data", &data]);
    assert!(
        (number(&without["loss"]) - number(&outcome["first_eval_loss"])).abs() < 1e-6,
        "{without}"
    );

    let inspected = json_of(&["adapter", "inspect", &run]);
    assert_eq!(inspected["modules"].as_array().map(Vec::len), Some(4));
    assert_eq!(inspected["base_matches"], true);
    assert!(number(&inspected["modules"][0]["relative_change"]) > 0.0);

    let merged = lab.arg("merged");
    let report = json_of(&[
        "merge",
        "--model",
        &model,
        "--adapter",
        &run,
        "--output",
        &merged,
        "--data",
        &data,
    ]);
    assert!(number(&report["max_logit_difference"]) <= 1e-3, "{report}");
    assert_eq!(
        (&report["dtype"], &report["modules"]),
        (&Value::from("f32"), &Value::from(4))
    );
    let evaluate = |more: &[&str]| {
        let args = ["eval", "--data", &data, "--base-dtype", "f32"];
        number(&json_of(&[&args[..], more].concat())["loss"])
    };
    let difference =
        evaluate(&["--model", &merged]) - evaluate(&["--model", &model, "--adapter", &run]);
    assert!(difference.abs() < 1e-5, "{difference}");
    let text = stderr_of(
        &[
            "merge",
            "--model",
            &model,
            "--adapter",
            &run,
            "--output",
            &merged,
        ],
        1,
    );
    assert!(text.contains("already exists"), "{text}");
}

#[test]
fn generating_to_the_screen_and_as_json_is_the_same() {
    let lab = Lab::new();
    lowrank().args(lab.train("run", &[])).assert().success();
    let (model, run) = (lab.arg("model"), lab.arg("run"));
    let args = [
        "generate",
        "--model",
        &model,
        "--adapter",
        &run,
        "--prompt",
        "Number 3 is",
        "--max-new-tokens",
        "5",
    ];
    let assert = lowrank().args(args).assert().success();
    let shown = String::from_utf8(assert.get_output().stdout.clone()).expect("text is UTF-8");
    let report = json_of(&args);
    assert_eq!(
        report["generations"][0]["text"],
        shown.trim_end_matches('\n')
    );
    assert_eq!(report["generations"][0]["adapter"], "run");

    let (data, second) = (lab.arg("data"), format!("other={run}"));
    let report = json_of(&[
        "generate",
        "--model",
        &model,
        "--adapter",
        &run,
        "--adapter",
        &second,
        "--data",
        &data,
        "--limit",
        "3",
        "--max-new-tokens",
        "4",
    ]);
    let generations = report["generations"]
        .as_array()
        .expect("generations are a list");
    assert_eq!(generations.len(), 6);
    assert_eq!(generations[0]["text"], generations[1]["text"]);
    assert_eq!(generations[1]["adapter"], "other");
    assert!(generations[0]["reference"].is_string());
}

#[test]
fn a_chat_reads_lines_and_swaps_adapters() {
    let lab = Lab::new();
    lowrank().args(lab.train("run", &[])).assert().success();
    let talk = |input: &str| {
        let (model, run) = (lab.arg("model"), lab.arg("run"));
        let args = [
            "chat",
            "--model",
            &model,
            "--adapter",
            &run,
            "--max-new-tokens",
            "3",
        ];
        let assert = lowrank().args(args).write_stdin(input).assert().success();
        String::from_utf8(assert.get_output().stdout.clone()).expect("text is UTF-8")
    };
    assert_eq!(talk("hello\n").lines().count(), 1);
    assert!(talk("/adapters\n").contains("adapters: run; in use: run"));
    assert!(talk("/adapter none\n/adapters\n").contains("in use: none"));
}

#[test]
fn prompts_are_shared_on_request() {
    let lab = Lab::new();
    let row = |number: usize| {
        let prompt = format!("Name a number below {} and say why", 10 + number % 4);
        serde_json::json!({"prompt": prompt, "completion": format!(" {number}")}).to_string() + "\n"
    };
    let rows: String = (0..32).map(row).collect();
    write(&lab.path("data"), "train.jsonl", rows);
    let train = |run: &str, more: &[&str]| {
        let assert = lowrank().args(lab.train(run, more)).assert().success();
        let text = String::from_utf8(assert.get_output().stderr.clone()).expect("UTF-8");
        let tokens = metrics(&lab, run);
        let tokens = tokens.iter().filter_map(|line| line["tokens"].as_u64());
        (text, tokens.sum::<u64>())
    };
    let (quiet, alone) = train("alone", &[]);
    assert!(!quiet.contains("sharing prompts"), "{quiet}");
    let (said, shared) = train("shared", &["--share-prompts", "--save-steps", "3"]);
    assert!(
        said.contains("sharing prompts: 32 rows have 4 distinct prompts"),
        "{said}"
    );
    assert!(2 * shared < alone, "{shared} of {alone} tokens");
    let config = std::fs::read_to_string(lab.path("shared").join("config.yaml"))
        .expect("a run writes config.yaml");
    assert!(config.contains("share_prompts: true"), "{config}");
    let text = stderr_of(
        &[
            "train",
            "--resume",
            "--output",
            &lab.arg("shared"),
            "--share-prompts=false",
        ],
        2,
    );
    assert!(
        text.contains("share_prompts: true before, false now"),
        "{text}"
    );

    let (model, data) = (lab.arg("model"), lab.arg("data"));
    let bench = [
        "bench", "train", "--model", &model, "--steps", "2", "--warmup", "0",
    ];
    let bench = [&bench[..], &["--data", &data]].concat();
    let alone = json_of(&bench);
    let shared = json_of(&[&bench[..], &["--share-prompts"]].concat());
    assert_eq!(shared["rows"], alone["rows"]);
    assert_eq!(
        (&alone["share_prompts"], &shared["share_prompts"]),
        (&false.into(), &true.into())
    );
    let tokens = |report: &Value| number(&report["work"]["tokens"]);
    assert!(2.0 * tokens(&shared) < tokens(&alone), "{shared}");
    let random = ["bench", "train", "--model", &model, "--share-prompts"];
    assert!(stderr_of(&random, 2).contains("--data"));
}

#[test]
fn every_bench_measures_something() {
    let lab = Lab::new();
    let (model, out) = (lab.arg("model"), lab.arg("tuned"));
    let gemm = json_of(&[
        "bench",
        "gemm",
        "--model",
        &model,
        "--tokens",
        "40",
        "--repeats",
        "1",
    ]);
    for compute in ["f32", "bf16"] {
        // A processor that does not multiply bf16 faster has no second rate.
        let rounds = !["portable", "avx2", "avx512", "neon"]
            .map(Value::from)
            .contains(&gemm["processor"]);
        assert_eq!(gemm[compute].is_null(), compute == "bf16" && !rounds);
        if gemm[compute].is_null() {
            continue;
        }
        let (peak, mean) = (&gemm[compute]["peak_gflops"], &gemm[compute]["mean_gflops"]);
        assert!(number(peak) >= number(mean) && number(mean) > 0.0);
    }
    assert!(number(&gemm["read_bandwidth"]) > 0.0);
    lowrank().args(lab.train("tuned", &[])).assert().success();
    let generate = json_of(&[
        "bench",
        "generate",
        "--model",
        &model,
        "--prompt-tokens",
        "4",
        "--new-tokens",
        "4",
        "--batch-size",
        "2",
        "--adapter",
        &out,
        "--profile",
    ]);
    assert_eq!(generate["adapters"], 1);
    assert!(number(&generate["batch_gain"]) > 0.0);
    let operations = generate["profile"].as_array().expect("a profile");
    assert!(
        operations
            .iter()
            .any(|op| op["operation"] == "low-rank forward")
    );
    let train = |flags: &str| -> Vec<String> {
        let line = format!(
            "bench train --model {model} --steps 1 --warmup 0 --seq-length 6 --batch-size 2 --method {flags}"
        );
        line.split(' ').map(String::from).collect()
    };
    // Keys and values of 8 numbers in each of two layers, or embeddings of 16.
    for (flags, parameters) in [
        ("prefix --num-virtual-tokens 3", 2 * 2 * 8 * 3),
        (
            "prefix --prefix-kind embedding --num-virtual-tokens 2 --infix-tokens 1",
            3 * 16,
        ),
    ] {
        let report = json_of(&strs(&train(flags)));
        assert_eq!(report["trainable_parameters"], parameters, "{flags}");
    }
    for (flags, words) in [
        ("full --r 2", "--r does nothing with the method full"),
        ("lora --r 0", "--r must be from 1 to 65536, not 0"),
        (
            "adapter --bottleneck 0",
            "--bottleneck must be 1 or greater, not 0",
        ),
        (
            "top --head-only --top-layers 1",
            "--head-only trains the output projection alone, so leave --top-layers out",
        ),
        ("prefix --num-virtual-tokens 9999", "leave no room for text"),
        ("prefix --num-virtual-tokens 125", "tokens are too many"),
    ] {
        let text = stderr_of(&strs(&train(flags)), 2);
        assert!(text.contains(words), "{flags}: {text}");
    }
}

#[test]
fn an_earlier_run_is_kept_replaced_or_continued() {
    let lab = Lab::new();
    lowrank()
        .args(lab.train("run", &["--save-steps", "2"]))
        .assert()
        .success();
    let text = stderr_of(&strs(&lab.train("run", &[])), 2);
    assert!(
        text.contains("exists") && text.contains("--resume") && text.contains("--overwrite"),
        "{text}"
    );
    let text = stderr_of(
        &strs(&lab.train("run", &["--resume", "--learning-rate", "1"])),
        2,
    );
    assert!(text.contains("learning_rate"), "{text}");
    lowrank()
        .args(lab.train("run", &["--overwrite", "--seed", "1"]))
        .assert()
        .success();
    assert_eq!(
        metrics(&lab, "run")
            .iter()
            .filter(|line| line["loss"].is_number())
            .count(),
        6
    );
}

#[cfg(unix)]
#[test]
fn a_run_that_was_stopped_goes_on_to_the_same_bits() {
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    let lab = Lab::new();
    let steps = [
        "--max-steps=1500",
        "--warmup-steps=3",
        "--lora-dropout=0.1",
        "--save-total-limit=1",
    ];
    let args: Vec<String> = lab
        .train("whole", &steps)
        .into_iter()
        .filter(|arg| !["--max-steps", "6"].contains(&arg.as_str()))
        .collect();
    lowrank().args(&args).assert().success();

    let stopped: Vec<String> = args
        .iter()
        .map(|arg| arg.replace("/whole", "/stopped"))
        .collect();
    let child = std::process::Command::new(assert_cmd::cargo::cargo_bin("lowrank"))
        .args(&stopped)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let begun = Instant::now();
    let lines = || {
        std::fs::read_to_string(lab.path("stopped").join("metrics.jsonl"))
            .map_or(0, |text| text.lines().count())
    };
    while lines() < 5 {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "no step was taken within a minute"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    let pid = child.id().to_string();
    let kill = std::process::Command::new("kill")
        .args(["-INT", &pid])
        .status()
        .expect("kill can be run");
    assert!(kill.success());
    let output = child.wait_with_output().expect("the program ends");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{text}");
    assert!(
        text.contains("finishing this step") && text.contains("--resume"),
        "{text}"
    );
    assert!(lines() < 1500, "the run was over before it was stopped");

    lowrank()
        .args(["train", "--resume", "--output", &lab.arg("stopped")])
        .assert()
        .success();
    let read = |run: &str| {
        std::fs::read(lab.path(run).join("adapter_model.safetensors"))
            .expect("a run writes its adapter")
    };
    assert!(read("whole") == read("stopped"), "the adapters differ");
    let losses = |run: &str| {
        metrics(&lab, run)
            .iter()
            .map(|line| line["loss"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(losses("whole"), losses("stopped"));
}

#[test]
fn every_other_method_goes_from_training_to_merging() {
    let lab = Lab::new();
    let (model, data) = (lab.arg("model"), lab.arg("data"));
    let methods: [(&str, &[&str], bool); 5] = [
        ("top", &["--method=top", "--top-layers=1"], true),
        ("head", &["--method=top", "--head-only"], true),
        ("bitfit", &["--method=bitfit"], true),
        ("ia3", &["--method=ia3"], true),
        (
            "adapter",
            &["--method=adapter", "--adapter-kind=lin", "--bottleneck=4"],
            false,
        ),
    ];
    for (name, flags, merges) in methods {
        let run = lab.arg(name);
        let outcome = json_of(&strs(&lab.train(
            name,
            &[flags, &["--eval-steps=6", "--learning-rate=0.01"]].concat(),
        )));
        assert!(
            number(&outcome["eval_loss"]) < number(&outcome["first_eval_loss"]),
            "{name}: {outcome}"
        );
        let with = json_of(&[
            "eval",
            "--model",
            &model,
            "--adapter",
            &run,
            "--data",
            &data,
        ]);
        let off = number(&with["loss"]) - number(&outcome["eval_loss"]);
        assert!(off.abs() < 1e-6, "{name}: {with}");
        let inspected = json_of(&["adapter", "inspect", &run]);
        assert_eq!(inspected["parameters"], outcome["trainable_parameters"]);
        let generate = [
            "generate",
            "--model",
            &model,
            "--adapter",
            &run,
            "--prompt",
            "Number 3 is",
        ];
        json_of(&[&generate[..], &["--max-new-tokens", "3"]].concat());

        let merged = lab.arg(&format!("{name}-merged"));
        let merge = [
            "merge",
            "--model",
            &model,
            "--adapter",
            &run,
            "--output",
            &merged,
        ];
        if !merges {
            let text = stderr_of(&merge, 2);
            assert!(text.contains("cannot be merged"), "{text}");
            continue;
        }
        json_of(&merge);
        // The trained values are f32; with a bf16 base the merged ones would be rounded.
        let exact = |model: &str, more: &[&str]| {
            let eval = [
                "eval",
                "--model",
                model,
                "--data",
                &data,
                "--base-dtype=f32",
            ];
            number(&json_of(&[&eval[..], more].concat())["loss"])
        };
        let off = exact(&merged, &[]) - exact(&model, &["--adapter", &run]);
        assert!(off.abs() < 1e-5, "{name}: {off:e}");
    }
    // Replaced weights act on every row.
    let (top, layers) = (lab.arg("top"), lab.arg("adapter"));
    let both = ["--adapter", &top, "--adapter", &layers];
    let generate = ["generate", "--model", &model, "--prompt", "x"];
    let text = stderr_of(&[&generate[..], &both].concat(), 2);
    assert!(text.contains("beside another adapter"), "{text}");
}

#[test]
fn rows_are_read_from_standard_input() {
    let lab = Lab::new();
    let rows = std::fs::read(lab.path("data").join("valid.jsonl")).expect("the rows");
    let (model, file) = (lab.arg("model"), lab.arg("data/valid.jsonl"));
    let expected = json_of(&["eval", "--model", &model, "--data", &file]);
    let output = lowrank()
        .args(["eval", "--model", &model, "--data", "-", "--json"])
        .write_stdin(rows.clone())
        .assert()
        .success();
    let found: Value = serde_json::from_slice(&output.get_output().stdout).expect("one JSON value");
    assert_eq!(found["loss"], expected["loss"]);
    assert_eq!(found["data"], "/dev/stdin");
    let train = |output: &str, valid: &[&str]| {
        let mut args = lab.train(output, valid);
        let data = args.iter_mut().skip_while(|arg| *arg != "--data").nth(1);
        *data.expect("a value") = "-".into();
        args
    };
    lowrank()
        .args(train("piped", &["--valid-data", &file]))
        .write_stdin(rows)
        .assert()
        .success();
    // A table with a header is known in a pipe too.
    lowrank()
        .args(train("table", &["--valid-data", &file]))
        .write_stdin("prompt,completion\n\"a, b\", c\n")
        .assert()
        .success();
    for (valid, input, expected) in [
        (&[][..], "", "/dev/stdin: is empty: it holds no rows"),
        (
            &["--valid-data", "/dev/stdin"],
            "{}",
            "are both standard input",
        ),
        (&[], "a,b\n1,2\n", "/dev/stdin: is CSV"),
    ] {
        let assert = lowrank()
            .args(train("refused", valid))
            .write_stdin(input)
            .assert()
            .failure();
        let text = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn what_a_prompt_gets_does_not_depend_on_the_others() {
    let texts = |prompts: &[&str]| -> Vec<String> {
        let mut args = vec!["generate", "--model=builtin:tiny", "--max-new-tokens=8"];
        args.extend(["--temperature=1", "--seed=7"]);
        args.extend(prompts.iter().flat_map(|prompt| ["--prompt", prompt]));
        let report = json_of(&args);
        let all = report["generations"].as_array().expect("texts");
        let text = |one: &Value| one["text"].as_str().expect("a text").to_owned();
        all.iter().map(text).collect()
    };
    let prompts = ["The capital of", "Once upon", "A ship and", "Once upon"];
    let together = texts(&prompts);
    for (prompt, text) in prompts.iter().zip(&together) {
        assert_eq!(&texts(&[prompt])[0], text, "{prompt}");
    }
    assert_eq!(together[1], together[3]);
    assert_ne!(together[0], together[1]);
    let more: Vec<&str> = std::iter::repeat_n("Once upon", 17)
        .chain(["A ship and"])
        .collect();
    assert_eq!(texts(&more)[17], together[2], "behind the first part, too");
}

#[test]
fn only_lora_adapters_are_compared_with_each_other() {
    let lab = Lab::new();
    lowrank()
        .args(lab.train("factors", &["--method=ia3"]))
        .assert()
        .success();
    let folder = lab.arg("factors");
    let text = stderr_of(&["adapter", "diff", &folder, &folder], 1);
    assert!(text.contains("IA3 has none"), "{text}");
    assert!(!text.contains("remove it"), "{text}");
}

#[test]
fn a_whole_model_has_the_loss_that_is_reported() {
    let lab = Lab::new();
    let args = lab.train(
        "whole",
        &["--method=full", "--base-dtype=bf16", "--learning-rate=1e-2"],
    );
    let outcome = json_of(&strs(&args));
    let model = lab.arg("whole");
    let judged = json_of(&[
        "eval",
        "--model",
        &model,
        "--data",
        &lab.arg("data"),
        "--split=valid",
    ]);
    let (said, found) = (outcome["eval_loss"].as_f64(), judged["loss"].as_f64());
    let off = (said.expect("a loss") - found.expect("a loss")).abs();
    assert!(off < 1e-4, "{said:?} {found:?}");
}
