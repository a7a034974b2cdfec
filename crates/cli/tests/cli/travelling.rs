//! `lowrank adapter export` and `import`, `model export`, and `merge --to gguf`: what they write, and misuse.

use std::fs;

use crate::support::{Lab, json_of, lowrank, stderr_of, strs, write};

/// A trained adapter of the built-in model.
fn trained() -> Lab {
    let lab = Lab::new();
    let args = lab.train("run", &["--r", "4"]);
    lowrank().args(strs(&args)).assert().success();
    lab
}

#[test]
fn an_adapter_goes_to_llama_cpp_and_back() {
    let lab = trained();
    let (run, file, back) = (lab.arg("run"), lab.arg("mine.gguf"), lab.arg("back"));
    let export = ["adapter", "export", &run, "--to", "gguf", "--output", &file];
    let found = json_of(&export);
    let modules = found["modules"].as_u64().expect("modules");
    assert!(
        modules > 0 && found["modelfile"]["has_template"] == true,
        "{found}"
    );
    let modelfile = fs::read_to_string(lab.path("Modelfile")).expect("a Modelfile");
    assert!(
        modelfile.contains("ADAPTER ./mine.gguf\nTEMPLATE"),
        "{modelfile}"
    );
    // Nothing is replaced that nobody asked to replace.
    let error = stderr_of(&export, 2);
    assert!(
        error.contains("Modelfile exists; give --no-modelfile"),
        "{error}"
    );
    let error = stderr_of(&[&export[..], &["--no-modelfile"]].concat(), 2);
    assert!(error.contains("mine.gguf exists"), "{error}");
    json_of(&[&export[..], &["--overwrite"]].concat());

    let error = stderr_of(&["adapter", "import", &file, "--output", &back], 2);
    assert!(error.contains("give --model"), "{error}");
    let model = lab.arg("model");
    let found = json_of(&[
        "adapter", "import", &file, "--model", &model, "--output", &back,
    ]);
    assert_eq!(
        (&found["from"], &found["modules"]),
        (&"gguf".into(), &modules.into())
    );
    let loss = |adapter: &str| {
        let data = lab.arg("data");
        json_of(&[
            "eval",
            "--model",
            &model,
            "--adapter",
            adapter,
            "--data",
            &data,
        ])["loss"]
            .clone()
    };
    assert_eq!(loss(&run), loss(&back));
}

#[test]
fn a_merge_into_a_gguf_file_is_judged_on_the_adapter_s_rows() {
    let lab = trained();
    let (run, model) = (lab.arg("run"), lab.arg("model"));
    let file = lab.arg("merged.gguf");
    let merge = [
        "merge",
        "--model",
        &model,
        "--adapter",
        &run,
        "--to",
        "gguf",
        "--type",
        "F32",
        "--no-modelfile",
    ];
    let found = json_of(&[&merge[..], &["--output", &file]].concat());
    assert!(
        (found["survived"].as_f64().expect("a share") - 1.0).abs() < 1e-3,
        "{found}"
    );
    assert!(found["rows"].as_u64() > Some(0), "{found}");
    let data = lab.arg("data");
    let loss = |args: &[&str]| {
        let loss =
            json_of(&[&["eval", "--data", &data, "--base-dtype", "f32"], args].concat())["loss"]
                .as_f64();
        loss.expect("a loss")
    };
    let (merged, beside) = (
        loss(&["--model", &file]),
        loss(&["--model", &model, "--adapter", &run]),
    );
    assert!((merged - beside).abs() < 1e-4, "{merged} {beside}");
    // Without rows nothing says whether the tune is still there.
    fs::remove_file(lab.path("run/config.yaml")).expect("a file");
    let error = stderr_of(
        &[&merge[..], &["--output", &lab.arg("other.gguf")]].concat(),
        2,
    );
    assert!(error.contains("give some with --data"), "{error}");
    let error = stderr_of(
        &[
            &merge[..],
            &["--dtype", "f32", "--output", &lab.arg("other.gguf")],
        ]
        .concat(),
        2,
    );
    assert!(error.contains("give --type for a GGUF file"), "{error}");
}

#[test]
fn what_cannot_be_exported_is_said() {
    let lab = Lab::new();
    let text = write(lab.path("").as_path(), "notes.txt", "no adapter");
    let out = lab.arg("out");
    let error = stderr_of(&["adapter", "import", &text, "--output", &out], 2);
    assert!(error.contains("notes.txt is no adapter"), "{error}");
    let error = stderr_of(
        &[
            "model",
            "export",
            "builtin:tiny",
            "--type",
            "Q3_K",
            "--output",
            &out,
        ],
        2,
    );
    assert!(error.contains("Q4_K_M"), "{error}");
    let file = lab.arg("tiny.gguf");
    let found = json_of(&[
        "model",
        "quantize",
        "builtin:tiny",
        "--type",
        "q8_0",
        "--output",
        &file,
    ]);
    assert_eq!(found["chat_template"], true);
    let found = json_of(&["model", "inspect", &file]);
    assert_eq!(found["family"], "llama", "{found}");
}
