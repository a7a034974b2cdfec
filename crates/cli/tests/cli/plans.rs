//! `lowrank plan` and `lowrank adapter diff`, as they are typed.

use super::support::{Lab, json_of, lowrank, stderr_of, strs, write};

#[test]
fn gpt3_is_planned_in_the_papers_figures() {
    let args = "plan --preset gpt3-175b --method lora --r 4 --target-modules q_proj,v_proj";
    let args: Vec<&str> = args.split(' ').collect();
    let plan = json_of(&args);
    assert_eq!(plan["method"]["trainable_parameters"], 18_874_368);
    assert_eq!(plan["method"]["file_bytes"], 37_748_736);
    assert_eq!(plan["full"]["method"], "full");
    assert_eq!(plan["paper"][3]["origin"], "does_not_add_up");
    let shown = lowrank().args(&args).assert().success();
    let shown = String::from_utf8(shown.get_output().stdout.clone()).unwrap();
    for words in [
        "18,874,368",
        "37.7 MB",
        "349.2 GB",
        "does not add up",
        "measured",
    ] {
        assert!(shown.contains(words), "{words} is not in\n{shown}");
    }
}

#[test]
fn a_model_is_planned_from_its_config_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = write(
        folder.path(),
        "config.json",
        super::support::config(16).to_string(),
    );
    let args = [
        "plan",
        "--config",
        &file,
        "--max-seq-length",
        "64",
        "--method",
    ];
    for method in ["lora", "full", "top", "bitfit", "adapter", "prefix", "ia3"] {
        let args = [&args[..], &[method]].concat();
        let mut args = args.clone();
        if method == "adapter" {
            args.extend(["--bottleneck", "4"]);
        }
        let plan = json_of(&args);
        assert_eq!(plan["method"]["method"], method);
        assert_eq!(plan["prefix"].is_object(), method == "prefix");
    }
}

#[test]
fn several_ranks_are_planned() {
    let args = "plan --preset smollm2-135m --batch-size 8 --max-seq-length 512 --ranks 4 --network 10GbE --gflops 3400";
    let args: Vec<&str> = args.split(' ').collect();
    let ranks = &json_of(&args)["ranks"];
    assert_eq!(ranks["tokens_per_rank"], 4096.0);
    assert_eq!(ranks["method"]["gradient_bytes"], 1_843_200);
    // The figures of docs/distributed.md.
    let percent = |side: &str| 100.0 * ranks[side]["efficiency"].as_f64().unwrap();
    assert!((percent("method") - 99.7).abs() < 0.05, "{ranks}");
    assert!((percent("full") - 61.6).abs() < 0.05, "{ranks}");
    assert!(json_of(&["plan", "--preset", "gpt2"])["ranks"].is_null());
}

#[test]
fn what_cannot_be_planned_says_why() {
    let cases: [(&[&str], &str); 10] = [
        (
            &["--preset", "gpt2", "--ranks", "2", "--network", "100GB"],
            "--network 100GB: GB are gigabytes, and networks are named in gigabits: 100Gb",
        ),
        (&["--preset", "gpt2", "--network", "10GbE"], "--ranks <N>"),
        (
            &["--preset", "gpt2", "--ranks", "4", "--pipeline-stages", "3"],
            "4 ranks are no multiple of 3 pipeline stages",
        ),
        (&["--preset", "gpt5"], "known are gpt2, gpt2-medium"),
        (
            &["--preset", "gpt2", "--method", "full", "--r", "4"],
            "--r does nothing with the method full",
        ),
        (
            &["--preset", "gpt2", "--target-modules", "q_proj"],
            "matches no module",
        ),
        (
            &["--preset", "gpt2", "--max-seq-length", "4096"],
            "too long: gpt2 was made for 1024",
        ),
        (
            &["--preset", "gpt2", "--batch-size", "0"],
            "--batch-size must be 1 or greater, not 0",
        ),
        (&["--preset", "gpt2", "--model", "x"], "cannot be used with"),
        (&[], "--model <MODEL>"),
    ];
    for (args, words) in cases {
        let text = stderr_of(&[&["plan"][..], args].concat(), 2);
        assert!(text.contains(words), "{words} is not in\n{text}");
    }
}

#[test]
fn two_adapters_are_compared_and_drawn() {
    let lab = Lab::new();
    for (run, seed) in [("one", "1"), ("two", "2")] {
        let args = lab.train(run, &["--r", "2", "--seed", seed]);
        lowrank().args(strs(&args)).assert().success();
    }
    let (one, two, model) = (lab.arg("one"), lab.arg("two"), lab.arg("model"));
    let svg = lab.arg("diff.svg");
    let args = [
        "adapter", "diff", &one, &two, "--model", &model, "--output", &svg,
    ];
    let report = json_of(&args);
    assert_eq!(report["same_base"], true);
    assert_eq!(report["modules"].as_array().unwrap().len(), 4);
    assert!(report["modules"][0]["first"]["weight"]["amplification"].is_number());
    let picture = std::fs::read_to_string(&svg).unwrap();
    assert!(picture.starts_with("<svg") && picture.ends_with("</svg>\n"));
    // What is there is kept unless asked.
    let text = stderr_of(&args, 2);
    assert!(text.contains("--overwrite to replace"), "{text}");
    lowrank().args(args).arg("--overwrite").assert().success();
    let text = stderr_of(&["adapter", "diff", &one, &two, "--output", "x.png"], 2);
    assert!(text.contains("ends in .svg"), "{text}");
    let text = stderr_of(&["adapter", "diff", &one, &lab.arg("data")], 1);
    assert!(text.contains("adapter_config.json"), "{text}");
}
