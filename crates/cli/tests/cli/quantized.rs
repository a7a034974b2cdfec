//! Quantized folders, and `--load-in`.

use std::fs;

use lowrank::base::BUILTIN;

use crate::support::{Lab, json_of, lowrank, stderr_of, strs};

#[test]
fn a_model_is_quantized_and_trained_beside() {
    let lab = Lab::new();
    let (model, nf4) = (BUILTIN.to_owned(), lab.arg("nf4"));
    let quantize = [
        "model", "quantize", &model, "--type", "nf4", "--output", &nf4,
    ];
    let found = json_of(&quantize);
    let matrices = found["matrices"].as_u64().expect("matrices");
    assert!(matrices > 0, "{found}");
    let inspected = json_of(&["model", "inspect", &nf4]);
    assert!(inspected["dtypes"]["NF4"].as_u64().expect("bytes") > 0);

    let loss = |name: &str, flags: &[&str]| {
        let mut args = lab.train(name, &[]);
        let at = args
            .iter()
            .position(|arg| arg == "--model")
            .expect("a model");
        args[at + 1] = if flags.is_empty() {
            nf4.clone()
        } else {
            model.clone()
        };
        args.extend(flags.iter().map(|flag| (*flag).to_owned()));
        lowrank().args(strs(&args)).assert().success();
        let lines = fs::read_to_string(lab.path(name).join("metrics.jsonl")).expect("metrics");
        let mut lines = lines.lines().map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
            line["loss"].clone()
        });
        lines.find(serde_json::Value::is_number).expect("a loss")
    };
    // Quantized while it is loaded, it is the same model.
    assert_eq!(loss("beside", &[]), loss("loaded", &["--load-in", "4bit"]));
    assert_ne!(
        loss("eight", &["--load-in", "8bit"]),
        loss("whole", &["--load-in=4bit"])
    );

    for (args, words) in [
        (
            vec!["model", "quantize", &nf4, "--type", "FP4", "--output", "x"],
            "is quantized already",
        ),
        (
            vec![
                "generate",
                "--model",
                &nf4,
                "--prompt",
                "a",
                "--load-in",
                "4bit",
            ],
            "is quantized already",
        ),
        (
            vec!["generate", "--model", &nf4, "--prompt", "a", "--exact"],
            "NF4 and FP4 are none",
        ),
        (
            vec![
                "model", "quantize", &model, "--to", "gguf", "--type", "NF4", "--output", "x",
            ],
            "leave out --to",
        ),
        (
            vec![
                "model",
                "quantize",
                &model,
                "--to",
                "bitsandbytes",
                "--type",
                "Q8_0",
                "--output",
                "x",
            ],
            "NF4, FP4 and INT8",
        ),
    ] {
        let error = stderr_of(&args, 2);
        assert!(error.contains(words), "{error}");
    }
    // Nothing is replaced that nobody asked to replace.
    assert!(stderr_of(&quantize, 1).contains("already exists"));
}

#[test]
fn full_training_of_a_quantized_model_says_what_it_needs() {
    let lab = Lab::new();
    let (model, int8) = (BUILTIN, lab.arg("int8"));
    json_of(&[
        "model", "quantize", model, "--type", "INT8", "--output", &int8,
    ]);
    let mut args = lab.train("full", &["--method", "full"]);
    let at = args
        .iter()
        .position(|arg| arg == "--model")
        .expect("a model");
    args[at + 1] = int8;
    let output = lowrank().args(strs(&args)).output().expect("it runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(
        text.contains("quantized in the base are trained as f32 numbers"),
        "{text}"
    );
    let config = fs::read_to_string(lab.path("full").join("config.json")).expect("a config");
    assert!(!config.contains("quantization_config"), "{config}");
}

/// Every command that says what the weights are kept in says it of quantized ones, too.
#[test]
fn what_weights_are_kept_in_is_said() {
    let lab = Lab::new();
    let gguf = lab.arg("model.gguf");
    json_of(&[
        "model", "export", BUILTIN, "--type", "Q4_0", "--output", &gguf,
    ]);
    let of = |model: &str, flags: &[&str]| {
        let plan = ["plan", "--model", model];
        let planned = [&plan[..], flags].concat();
        let shown = lowrank().args(&planned).assert().success();
        let shown = String::from_utf8_lossy(&shown.get_output().stdout).into_owned();
        let kept = json_of(&planned)["weights"].clone();
        let kept = kept.as_str().expect("a text").to_owned();
        assert!(shown.contains(&format!("weights in {kept},")), "{shown}");
        let bench = |args: &[&str]| {
            let args = [&["bench"], args, &["--model", model], flags].concat();
            assert_eq!(json_of(&args)["weights"], *kept, "{args:?}");
        };
        bench(&["generate", "--prompt-tokens", "2", "--new-tokens", "2"]);
        bench(&[
            "train",
            "--steps",
            "1",
            "--warmup",
            "0",
            "--seq-length",
            "4",
        ]);
        bench(&["gemm", "--tokens", "2", "--repeats", "1"]);
        kept
    };
    assert_eq!(of(BUILTIN, &[]), "bf16");
    assert_eq!(of(BUILTIN, &["--load-in", "4bit"]), "NF4 (with bf16)");
    assert_eq!(of(&gguf, &[]), "Q4_0 (with Q8_0)");
    assert_eq!(of(&gguf, &["--base-dtype", "f32"]), "f32");

    let mut args = lab.train("run", &[]);
    args[2].clone_from(&gguf);
    let output = lowrank().args(strs(&args)).output().expect("it runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains(" in Q4_0 (with Q8_0), trained"), "{text}");
}

/// A model that the limit on addresses has no room for is refused before it is mapped, in a file as in a folder.
#[cfg(target_os = "linux")]
#[test]
fn a_model_beyond_the_limits_is_refused_before_it_is_loaded() {
    const LENGTH: u64 = 1 << 33;
    let lab = Lab::new();
    let gguf = lab.arg("model.gguf");
    json_of(&[
        "model", "export", BUILTIN, "--type", "Q4_0", "--output", &gguf,
    ]);
    // Nothing reads what is behind the tensors, and it takes no room on a disk.
    let grow = |path: &str| {
        let file = fs::OpenOptions::new().append(true).create(true).open(path);
        file.and_then(|file| file.set_len(LENGTH))
            .expect("the file grows");
    };
    grow(&gguf);
    grow(&lab.arg("model/more.safetensors"));
    for model in [gguf, lab.arg("model")] {
        let output = std::process::Command::new("bash")
            .args(["-c", "ulimit -v 4194304; exec \"$0\" \"$@\""])
            .arg(assert_cmd::cargo::cargo_bin("lowrank"))
            .args([
                "generate",
                "--threads",
                "1",
                "--prompt",
                "a",
                "--model",
                &model,
            ])
            .output()
            .expect("bash can be run");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}");
        let begin = format!("{model}: to load it takes about 8.");
        let end = "left; raise the limit, or use a smaller model";
        for words in [begin.as_str(), "ulimit -v) has ", end] {
            assert!(text.contains(words), "{text}");
        }
    }
}
