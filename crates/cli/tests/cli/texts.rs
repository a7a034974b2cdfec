//! Beam search and text metrics.

use std::fs;

use predicates::str::contains;

use crate::support::{Lab, json_of, lowrank, stderr_of, write};

const METRICS: [&str; 2] = ["--metrics", "bleu,nist,rouge-l,meteor,cider"];

#[test]
fn texts_are_generated_scored_written_and_scored_again() {
    let lab = Lab::new();
    let (model, out) = (lab.arg("model"), lab.arg("texts.jsonl"));
    // Three meanings, one of them with two references that are not neighbours.
    let rows = write(
        &lab.path("data"),
        "test.jsonl",
        "{\"prompt\": \"One is\", \"completion\": \" odd.\"}\n\
         {\"prompt\": \"Two is\", \"completion\": \" even.\"}\n\
         {\"prompt\": \"One is\", \"completion\": \" not even.\"}\n\
         {\"prompt\": \"Six is\", \"completion\": \" even.\"}\n",
    );
    let data = lab.arg("data");
    let decoding = [
        "--max-new-tokens",
        "6",
        "--num-beams",
        "3",
        "--length-penalty",
        "0.9",
        "--no-repeat-ngram-size",
        "2",
        "--predictions",
        &out,
    ];
    let args = ["eval", "--model", &model, "--data", &data];
    let report = json_of(&[&args[..], &METRICS, &decoding].concat());
    assert_eq!(
        (report["meanings"].as_u64(), report["references"].as_u64()),
        (Some(3), Some(4))
    );
    for metric in ["bleu", "nist", "rouge-l", "meteor", "cider"] {
        assert!(report["metrics"][metric].is_number(), "{report}");
    }
    assert!(
        report["meteor_matches"]
            .as_str()
            .expect("a note")
            .contains("without WordNet")
    );
    let lines = fs::read_to_string(&out).expect("the predictions");
    let first: serde_json::Value =
        serde_json::from_str(lines.lines().next().expect("a line")).expect("JSON");
    assert_eq!(first["prompt"], "One is");
    assert_eq!(
        first["references"],
        serde_json::json!(["odd.", "not even."])
    );

    let again = json_of(&[&["eval", "--from-predictions", &out][..], &METRICS].concat());
    assert_eq!(again["metrics"], report["metrics"]);
    assert!(again["unfinished"].is_null());
    // The file is not replaced.
    let text = stderr_of(&[&args[..], &METRICS, &decoding].concat(), 2);
    assert!(text.contains("is there already"), "{text}");

    // The same texts come from generate.
    let made = json_of(
        &[
            &["generate", "--model", &model, "--data", &rows][..],
            &decoding[..8],
        ]
        .concat(),
    );
    let text = made["generations"][0]["text"].as_str().expect("a text");
    assert_eq!(first["prediction"], text.trim());
    let limited = json_of(
        &[
            &args[..],
            &["--metrics", "bleu", "--limit", "1", "--max-new-tokens", "2"],
        ]
        .concat(),
    );
    assert_eq!(limited["references"], 2);
}

#[test]
fn perfect_texts_score_as_such() {
    let folder = tempfile::tempdir().expect("there is room for a temporary folder");
    let line = |text: &str| {
        serde_json::json!({"prompt": "", "prediction": text, "references": ["Other.", text]})
            .to_string()
            + "\n"
    };
    let texts = line("The Mill is a pub.") + &line("Blue Spice, by the river, is cheap.");
    let file = write(folder.path(), "texts.jsonl", texts);
    let args = ["eval", "--from-predictions", &file, "--lowercase"];
    let assert = lowrank().args(args).args(METRICS).assert().success();
    let shown = String::from_utf8(assert.get_output().stdout.clone()).expect("text is UTF-8");
    let shown = shown.replace(&file, "FILE");
    insta::assert_snapshot!(shown, @r#"
    BLEU     100.0000
    NIST     4.1255
    ROUGE-L  1.0000
    METEOR   0.9986  (words and Porter stems, without WordNet's synonyms)
    CIDEr    5.0000
    tokens   13a, lower case
    texts    2 with 4 references, of FILE
    "#);
}

#[test]
fn text_metrics_that_cannot_be_are_refused() {
    let lab = Lab::new();
    let (model, data) = (lab.arg("model"), lab.arg("data"));
    let eval = ["eval", "--model", &model, "--data", &data];
    for (flags, expected) in [
        (&["--num-beams", "4"][..], "--metrics"),
        (&["--metrics", "rouge"], "possible values"),
        (
            &["--metrics", "bleu", "--max-seq-length", "9"],
            "cannot be used with",
        ),
        (
            &["--metrics", "bleu", "--from-predictions", "x"],
            "cannot be used with",
        ),
        (
            &["--metrics", "bleu", "--num-beams", "0"],
            "must be 1 or greater",
        ),
        (
            &["--metrics", "bleu", "--limit", "0"],
            "--limit must be 1 or greater",
        ),
        (
            &[
                "--metrics",
                "bleu",
                "--num-beams",
                "1",
                "--length-penalty",
                "2",
            ],
            "does nothing",
        ),
        (
            &["--metrics", "bleu", "--predictions", "no/such/folder"],
            "no folder no/such",
        ),
    ] {
        let text = stderr_of(&[&eval[..], flags].concat(), 2);
        assert!(text.contains(expected), "{flags:?}: {text}");
    }
    let text = stderr_of(&["eval", "--metrics", "bleu"], 2);
    assert!(text.contains("--model <MODEL>"), "{text}");
    let text = stderr_of(
        &[
            "eval",
            "--metrics",
            "bleu",
            "--from-predictions",
            "none.jsonl",
        ],
        2,
    );
    assert!(text.contains("there is no file none.jsonl"), "{text}");
    let bad = write(&lab.path("data"), "texts.jsonl", "{\"prompt\": \"a\"}\n");
    let text = stderr_of(
        &["eval", "--metrics", "bleu", "--from-predictions", &bad],
        1,
    );
    assert!(text.contains("line 1: missing field"), "{text}");
    let bare = write(&lab.path("data"), "bare.jsonl", "{\"prompt\": \"a\"}\n");
    let text = stderr_of(
        &[
            "eval",
            "--model",
            &model,
            "--data",
            &bare,
            "--metrics",
            "bleu",
        ],
        1,
    );
    assert!(text.contains("line 1: the row has no answer"), "{text}");
}

#[test]
fn beams_do_not_go_with_draws() {
    let generate = ["generate", "--model", "builtin:tiny", "--prompt", "x"];
    for (flags, expected) in [
        (
            &["--num-beams", "2", "--temperature", "0.7"][..],
            "leave one of them out",
        ),
        (&["--num-beams", "0"], "--num-beams must be 1 or greater"),
        (
            &["--length-penalty", "0.9"],
            "does nothing without --num-beams",
        ),
        (
            &["--num-beams", "2", "--length-penalty", "inf"],
            "expected a finite number",
        ),
    ] {
        lowrank()
            .args(generate)
            .args(flags)
            .assert()
            .code(2)
            .stderr(contains(expected));
    }
}

#[test]
fn numbers_that_are_not_finite_are_an_error_wherever_they_come_out() {
    let lab = Lab::new();
    lowrank().args(lab.train("run", &[])).assert().success();
    let large = "model.norm.weight";
    let mut file = std::fs::read(lab.path("model/model.safetensors")).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
    let at = |which| header[large]["data_offsets"][which].as_u64().unwrap() as usize;
    for value in file[8 + length..][at(0)..at(1)].chunks_mut(4) {
        value.copy_from_slice(&3.4e38f32.to_le_bytes());
    }
    std::fs::write(lab.path("model/model.safetensors"), file).unwrap();
    let (model, run, data) = (lab.arg("model"), lab.arg("run"), lab.arg("data"));
    let prompt = ["generate", "--prompt", "Number 3 is"];
    let commands: &[&[&str]] = &[
        &["eval", "--data", &data],
        &["eval", "--data", &data, "--json"],
        &["eval", "--data", &data, "--metrics", "bleu"],
        &prompt,
        &[&prompt[..], &["--json"]].concat(),
        &[&prompt[..], &["--temperature", "1"]].concat(),
        &[&prompt[..], &["--num-beams", "2"]].concat(),
    ];
    for command in commands {
        let base = [command, &["--model", &model, "--base-dtype", "f32"][..]].concat();
        let text = stderr_of(&base, 1);
        assert!(text.contains("is not finite (NaN or infinite)"), "{text}");
        assert!(!text.contains("with the adapter"), "{text}");
        let text = stderr_of(&[&base[..], &["--adapter", &run]].concat(), 1);
        assert!(text.contains("with the adapter"), "{text}");
        assert!(text.contains("run it without the adapter"), "{text}");
    }
}
