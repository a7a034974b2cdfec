//! `lowrank compare`: runs that are made once, sizes that a budget decides, tables and files.

use std::path::Path;

use serde_json::Value;

use super::support::{Lab, json_of, lowrank, stderr_of, write};

/// Two methods on the lab's model and rows; `more` are lines of the file, `methods` its list.
fn file(lab: &Lab, more: &str, methods: &str) -> String {
    let text = format!(
        "title: Two of them\nmodel: {}\ndata: {}\n{more}\nmethods:\n{methods}",
        lab.arg("model"),
        lab.arg("data")
    );
    write(&lab.path("."), "two.yaml", text)
}

const SHORT: &str = "train: {max_steps: 4, batch_size: 4, eval_steps: 2}\nsweep: {max_steps: 2}\n\
    texts: {metrics: [bleu, rouge-l], limit: 2, max_new_tokens: 3}\n\
    cost: {steps: 2, prompt_tokens: 4, new_tokens: 2}\nseeds: [1, 2]\n";

const TWO: &str = "  - {name: 'LoRA, q', method: lora, target_modules: q_proj, r: 2, learning_rate: [1e-3, 1e30]}\n\
    \x20 - {name: full, method: full, seeds: [7]}\n";

fn finished(folder: &Path, piece: &str) -> Value {
    let text = std::fs::read_to_string(folder.join("runs").join(piece)).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn methods_are_compared_once() {
    let lab = Lab::new();
    let config = file(&lab, SHORT, TWO);
    let out = lab.path("out");
    let args = [
        "compare",
        &config,
        "--output",
        &lab.arg("out"),
        "--threads",
        "1",
    ];
    let found = json_of(&args);

    let methods = found["methods"].as_array().unwrap();
    assert_eq!(methods.len(), 2);
    let (lora, full) = (&methods[0], &methods[1]);
    // Two layers of a 16 × 16 projection: 2 · 2 · (16 + 16) values.
    assert_eq!(lora["trainable_parameters"], 128);
    assert_eq!(lora["learning_rate"], 1e-3, "the other rate does not train");
    assert_eq!(lora["sweep"].as_array().unwrap().len(), 2);
    assert_eq!(lora["runs"].as_array().unwrap().len(), 2);
    assert_eq!(lora["loss"]["seeds"], 2);
    assert_eq!(full["loss"]["deviation"], Value::Null);
    let of_runs = lora["runs"].as_array().unwrap().iter();
    let mean = of_runs
        .map(|run| run["loss"].as_f64().unwrap())
        .sum::<f64>()
        / 2.0;
    assert!((lora["loss"]["mean"].as_f64().unwrap() - mean).abs() < 1e-12);
    for method in methods {
        let run = &method["runs"][0];
        assert_eq!(run["training"].as_array().unwrap().len(), 4);
        let curve = run["validation"].as_array().unwrap();
        assert_eq!(
            curve
                .iter()
                .map(|point| point[0].as_u64().unwrap())
                .collect::<Vec<_>>(),
            [0, 2, 4]
        );
        assert!(run["metrics"]["bleu"].is_number());
        let cost = &method["cost"];
        assert!(cost["tokens_per_second"].as_f64().unwrap() > 0.0);
        assert!(cost["milliseconds_per_token"].as_f64().unwrap() > 0.0);
        assert_eq!(cost["mergeable"], true);
        assert_eq!(cost["switch_bytes"], method["checkpoint_bytes"]);
    }
    // Seeds differ in what they draw, so in what comes of them.
    assert_ne!(lora["runs"][0]["loss"], lora["runs"][1]["loss"]);
    assert!(found["base"]["loss"].as_f64().unwrap() > 0.0);

    // The loss is that of `eval` on what was kept; the whole model was not kept.
    let adapter = out.join("runs/lora-q/seed-1").display().to_string();
    let (model, data) = (lab.arg("model"), lab.arg("data"));
    let again = json_of(&[
        "eval",
        "--model",
        &model,
        "--adapter",
        &adapter,
        "--data",
        &data,
    ]);
    assert_eq!(again["loss"], lora["runs"][0]["loss"]);
    assert!(!out.join("runs/full/seed-7").exists());

    for name in ["comparison.json", "comparison.csv", "comparison.html"] {
        assert!(out.join(name).metadata().unwrap().len() > 100, "{name}");
    }

    // Nothing is made again; a piece that is deleted is.
    let piece = out.join("runs/full/seed-7.json");
    let before = std::fs::read(&piece).unwrap();
    std::fs::remove_file(&piece).unwrap();
    let said = lowrank().args(args).assert().success();
    let said = String::from_utf8(said.get_output().stderr.clone()).unwrap();
    assert_eq!(said.matches("training with").count(), 1, "{said}");
    let (before, after): (Value, Value) = (
        serde_json::from_slice(&before).unwrap(),
        finished(&out, "full/seed-7.json"),
    );
    assert_eq!(
        after["result"]["run"]["loss"],
        before["result"]["run"]["loss"]
    );

    // With other settings the old pieces are not taken for the new ones.
    let other = file(&lab, &SHORT.replace("max_steps: 4", "max_steps: 5"), TWO);
    let text = stderr_of(&["compare", &other, "--output", &lab.arg("out")], 1);
    assert!(text.contains("max_steps: 4 before, 5 now"), "{text}");
}

#[test]
fn a_budget_decides_sizes_before_anything_runs() {
    let lab = Lab::new();
    let methods = "  - {name: a, method: lora, target_modules: [q_proj, v_proj]}\n\
        \x20 - {name: b, method: adapter}\n  - {name: c, method: prefix, seeds: [1]}\n\
        \x20 - {name: d, method: full}\n  - {name: e, method: lora, r: 3}\n  - {name: f, method: lora, budget: 300}\n";
    let config = file(&lab, "budget: 2%", methods);
    let out = lab.arg("out");
    let args = ["compare", &config, "--output", &out, "--dry-run"];
    let plan = json_of(&args);
    let parameters = 2048 * 16 + 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32 + 2 * 16) + 16;
    let budget = 0.02 * f64::from(parameters);
    let methods = plan["methods"].as_array().unwrap();
    // The distance to the budget is at most half of what one more of the size adds.
    for (method, each) in methods.iter().zip([2 * (32 + 24), 4 * 33, 2 * 2 * 8]) {
        let values = method["trainable_parameters"].as_f64().unwrap();
        assert!((values - budget).abs() <= f64::from(each) / 2.0, "{method}");
    }
    assert_eq!(
        methods[0]["options"]["lora_alpha"].as_f64(),
        Some(2.0 * methods[0]["options"]["r"].as_f64().unwrap())
    );
    assert_eq!(methods[3]["trainable_parameters"], parameters);
    assert_eq!(methods[4]["options"]["r"], 3);
    assert_eq!(methods[5]["trainable_parameters"], 336);
    assert!(!lab.path("out").exists());
    lowrank().args(args).assert().success();
}

#[test]
fn what_cannot_be_compared_is_said_at_once() {
    let lab = Lab::new();
    let output = lab.arg("out");
    let said = |more: &str, methods: &str| {
        let config = file(&lab, more, methods);
        stderr_of(&["compare", &config, "--output", &output], 2)
    };
    let text = said(
        "texts: {metrics: [blue]}",
        "  - {method: lora, rank: 4}\n  - {name: x, method: full, r: 4}\n  - {name: X, method: full, seed: 3}\n\
         \x20 - {name: v, method: full, budget: 1%}\n  - {name: z, method: lora, r: 2, budget: 1%}\n\
         \x20 - {name: w, method: lora, learning_rate: [1e-3, 1e-3]}\n",
    );
    for words in [
        "method 1: rank (in two.yaml): this setting is called `r` here",
        "x: r (in two.yaml) does nothing with the method full",
        "X: seed is not a method's to decide",
        "v: a budget decides nothing for full fine-tuning",
        "z: r and a budget are both given",
        "w: learning_rate must be a number greater than 0, or a list of different ones",
        "texts: invalid value 'blue' for '--metrics <METRICS>'",
    ] {
        assert!(text.contains(words), "{words} is not in\n{text}");
    }
    assert!(said("seed: 1", "  - {method: lora}\n").contains("unknown field `seed`"));
    assert!(
        said("budget: 1G", "  - {method: lora}\n").contains("a budget is a share such as 0.2%")
    );
    assert!(said("", "  []\n").contains("lists no methods"));
    let twins = said(
        "",
        "  - {name: a b, method: lora}\n  - {name: a-b, method: full}\n",
    );
    assert!(twins.contains("two methods are called a b"), "{twins}");
    // One file of rows is all trained on; measuring on it would say nothing.
    let rows = lab.path("data").join("train.jsonl").display().to_string();
    let config = file(&lab, "", "  - {name: a, method: lora}\n");
    let args = ["compare", &config, "--data", &rows, "--output", &output];
    let text = stderr_of(&args, 2);
    assert!(text.contains("no rows to compare methods on"), "{text}");
    std::fs::remove_file(lab.path("data").join("valid.jsonl")).unwrap();
    let text = said(
        "",
        "  - {name: a, method: lora, learning_rate: [1e-3, 1e-4]}\n",
    );
    assert!(text.contains("compared on validation rows"), "{text}");
    let config = file(&lab, "", "  - {name: a, method: lora}\n");
    let text = stderr_of(&["compare", &config, "--output", &output, "--only", "b"], 2);
    assert!(
        text.contains("no method is called b; there are a"),
        "{text}"
    );
    assert!(!lab.path("out").exists());
}

#[test]
fn a_run_that_fails_leaves_the_others() {
    let lab = Lab::new();
    let methods = "  - {name: good, method: bitfit}\n  - {name: bad, method: full, learning_rate: 1e30}\n\
        \x20 - {name: worse, method: full, learning_rate: [1e30, 1e31]}\n";
    let config = file(&lab, SHORT, methods);
    let args = [
        "compare",
        &config,
        "--output",
        &lab.arg("out"),
        "--stages",
        "sweep,train",
        "--json",
    ];
    let assert = lowrank().args(args).assert().code(1);
    let output = assert.get_output();
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["methods"][0]["missing_runs"], 0);
    assert_eq!(found["methods"][1]["missing_runs"], 2);
    assert_eq!(found["methods"][1]["loss"], Value::Null);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("4 of the runs failed"), "{said}");
    assert!(
        said.contains("worse, training with seed 2: no learning rate of worse trains"),
        "{said}"
    );
    assert!(
        said.contains("bad, training with seed 1: step 2: the loss is"),
        "{said}"
    );
}

/// A learning rate that could not be tried is not one that diverges: what stopped it may be mended.
#[test]
fn only_what_diverges_counts_as_diverged() {
    let lab = Lab::new();
    let diverges = lab.train("run", &["--method", "full", "--learning-rate", "1e30"]);
    lowrank().args(diverges).assert().code(3);

    let methods = "  - {name: a, method: lora, r: 2, learning_rate: [1e-3, 2e-3]}\n";
    let config = file(&lab, SHORT, methods);
    let args = [
        "compare",
        &config,
        "--output",
        &lab.arg("out"),
        "--stages",
        "sweep",
        "--json",
    ];
    let weights = lab.path("model").join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    let assert = lowrank().args(args).assert().code(1);
    let said = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    assert!(said.contains("2 of the runs failed"), "{said}");
    assert!(!lab.path("out/runs/a/rate-1e-3.json").exists());
    std::fs::write(&weights, whole).unwrap();
    let found = json_of(&args[..args.len() - 1]);
    let tried = found["methods"][0]["sweep"].as_array().unwrap();
    assert_eq!(tried.len(), 2);
    assert!(tried.iter().all(|pair| pair[1].is_number()), "{tried:?}");
}

#[test]
fn the_shipped_files_are_sound() {
    let lab = Lab::new();
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let mut seen = 0;
    for entry in std::fs::read_dir(configs).unwrap() {
        let path = entry.unwrap().path();
        let config = path.display().to_string();
        seen += 1;
        // Those of classifiers need an encoder and rows with labels.
        if ["sst2.yaml", "spam.yaml"]
            .iter()
            .any(|name| path.ends_with(name))
        {
            continue;
        }
        let (data, out) = (lab.arg("data"), lab.arg("out"));
        let args = [
            "compare",
            &config,
            "--model",
            "builtin:tiny",
            "--data",
            &data,
            "--output",
            &out,
            "--dry-run",
        ];
        let plan = json_of(&args);
        assert!(
            plan["methods"].as_array().unwrap().len() >= 7,
            "{}",
            path.display()
        );
    }
    assert_eq!(seen, 5);
}

#[test]
fn a_comparison_names_the_key_that_is_wrong() {
    let lab = Lab::new();
    let said = |line: &str| {
        let yaml = format!(
            "model: {}\ndata: {}\n{line}\nmethods: [{{method: lora, r: 2, learning_rate: 1e-3}}]\n",
            lab.arg("model"),
            lab.arg("data")
        );
        let config = write(&lab.path(""), "wrong.yaml", yaml);
        stderr_of(&["compare", &config, "--output", &lab.arg("compared")], 2)
    };
    let text = said("seeds: [-1]");
    assert!(
        text.contains("seeds must be a list of whole numbers"),
        "{text}"
    );
    let text = said("train: {output: x, max_steps: 1}");
    assert!(text.contains("train: output cannot be set"), "{text}");
}
