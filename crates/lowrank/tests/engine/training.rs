//! What a run does and what its folder holds.

use std::fs;
use std::path::Path;

use lowrank::base::Source;
use lowrank::data::{DataOptions, Dataset, Split};
use lowrank::model::{AdapterSet, Decoder};
use lowrank::train::{SchedulerType, Start, TrainConfig, evaluate};
use lowrank::tuning::Method;
use lowrank::tuning::lora;
use lowrank::tuning::targets::Targets;
use lowrank::{DType, Workspace};
use lowrank_formats::peft::{LoraConfig, TargetModules};

use super::common::{
    Place, Watch, adapter, assert_says, failure, lora_config, metrics, open, run, tensors,
};

fn names(targets: &[&str]) -> Targets {
    Targets::Names(targets.iter().map(ToString::to_string).collect())
}

/// The loss on a place's held-out rows, computed apart from the run.
fn held_out_loss(place: &Place, model: &Decoder, folder: Option<&Path>) -> f64 {
    let tokenizer = Source::Folder(place.path("model"))
        .tokenizer()
        .expect("a tokenizer");
    let rows = Dataset::load(
        &place.path("data"),
        Split::Valid,
        &tokenizer,
        &DataOptions::default(),
    )
    .expect("the rows");
    let loaded = folder.map(|folder| lora::load(folder, model.config()).expect("the adapter"));
    let ws = Workspace::new();
    match &loaded {
        Some(loaded) => {
            let set = [&loaded.adapter];
            evaluate(model, AdapterSet::new(&set), Some(0), &rows.examples, &ws)
        }
        None => evaluate(model, AdapterSet::none(), None, &rows.examples, &ws),
    }
    .mean()
}

#[test]
fn a_lora_run_writes_its_folder() {
    let place = Place::new("llama");
    let mut config = place.config(Method::Lora, "run");
    config.save_steps = Some(4);
    let outcome = run(&config).expect("the run");
    let expected = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "report.html",
    ];
    assert_eq!(place.list("run"), expected);
    assert_eq!(
        place.list("run/checkpoints"),
        ["step-4", "step-8", "step-9"]
    );
    let in_checkpoint = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "trainer_state.json",
        "training_state.safetensors",
    ];
    assert_eq!(place.list("run/checkpoints/step-9"), in_checkpoint);

    let folder = place.path("run");
    let text = fs::read_to_string(folder.join("config.yaml")).expect("config.yaml");
    let mut read: TrainConfig = serde_saphyr::from_str(&text).expect("it reads back");
    let began = read.began.take().expect("when and where it began");
    assert_eq!(began.folder, std::env::current_dir().ok());
    assert_eq!(read, config);

    let peft = LoraConfig::read(&folder).expect("adapter_config.json");
    assert_eq!((peft.r, peft.lora_alpha, peft.lora_dropout), (4, 16.0, 0.2));
    assert_eq!(
        peft.target_modules,
        TargetModules::List(vec!["q_proj".into(), "v_proj".into()])
    );
    let model = open(&place.path("model"));
    let loss = held_out_loss(&place, &model, Some(&folder));
    assert_eq!(
        Some(loss),
        outcome.eval_loss,
        "what was saved is what was evaluated"
    );
    assert!(outcome.eval_loss < outcome.first_eval_loss, "{outcome:?}");
    assert_eq!(
        Some(held_out_loss(&place, &model, None)),
        outcome.first_eval_loss
    );
}

#[test]
fn metrics_have_the_documented_fields() {
    let place = Place::new("llama");
    run(&place.config(Method::Lora, "run")).expect("the run");
    let lines = metrics(&place.path("run"));
    let (evals, steps): (Vec<_>, Vec<_>) = lines
        .iter()
        .partition(|line| line.get("eval_loss").is_some());
    assert_eq!(steps.len(), 9);
    let at = |line: &serde_json::Value| line["step"].as_u64().expect("a step");
    // Before training, every second step, and at the end.
    assert_eq!(
        evals.iter().map(|line| at(line)).collect::<Vec<_>>(),
        [0, 2, 4, 6, 8, 9]
    );
    for line in evals {
        assert!(line.get("loss").is_none(), "{line}");
    }
    for (n, line) in steps.iter().enumerate() {
        let mut keys: Vec<&str> = line
            .as_object()
            .expect("an object")
            .keys()
            .map(String::as_str)
            .collect();
        keys.sort_unstable();
        let documented = [
            "epoch",
            "grad_norm",
            "learning_rate",
            "loss",
            "peak_rss",
            "step",
            "supervised_tokens",
            "tokens",
            "tokens_per_second",
        ];
        assert_eq!(keys, documented);
        assert_eq!(at(line), n as u64 + 1);
        let epoch = line["epoch"].as_f64().expect("a number");
        assert!((epoch - (n + 1) as f64 / 3.0).abs() < 1e-12, "{line}");
    }
}

#[test]
fn a_full_run_writes_a_model() {
    for family in ["llama", "gpt2"] {
        let place = Place::new(family);
        let config = place.config(Method::Full, "run");
        let outcome = run(&config).expect("the run");
        let base = Source::find(&place.path("run").display().to_string())
            .and_then(|source| source.load(DType::F32))
            .expect("the run's folder is a model");
        assert_eq!(
            Some(held_out_loss(&place, &base.decoder, None)),
            outcome.eval_loss,
            "{family}"
        );
        assert!(outcome.eval_loss < outcome.first_eval_loss, "{outcome:?}");
        assert_eq!(outcome.trainable_parameters, outcome.base_parameters);
        for name in [
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        ] {
            let read = |folder: &str| fs::read(place.path(folder).join(name)).expect("the file");
            assert_eq!(read("run"), read("model"), "{name}");
        }
        assert!(!place.path("run").join("adapter_config.json").exists());
    }
}

/// The values of one key of every step.
fn column(run: &Path, key: &str) -> Vec<f64> {
    metrics(run)
        .iter()
        .filter(|line| line.get("loss").is_some())
        .filter_map(|line| line[key].as_f64())
        .collect()
}

#[test]
fn the_rate_follows_its_schedule_and_steps_take_all_rows() {
    let place = Place::new("llama");
    let mut config = place.config(Method::Lora, "linear");
    config.shuffle = false;
    run(&config).expect("the run");
    let close = |rates: Vec<f64>, expected: &[f64]| {
        assert_eq!(rates.len(), expected.len());
        for (rate, expected) in rates.iter().zip(expected) {
            assert!((rate / 1e-2 - expected).abs() < 1e-12, "{rates:?}");
        }
    };
    let falling: Vec<f64> = (0..7).map(|n| 1.0 - f64::from(n) / 7.0).collect();
    let linear = [&[0.0, 0.5], falling.as_slice()].concat();
    close(column(&place.path("linear"), "learning_rate"), &linear);

    // 4, 4 and 3 rows, the same in each epoch.
    let tokens = column(&place.path("linear"), "tokens");
    assert_eq!(tokens[..3], tokens[3..6]);
    let tokenizer = Source::Folder(place.path("model"))
        .tokenizer()
        .expect("a tokenizer");
    let rows = Dataset::load(
        &place.path("data"),
        Split::Train,
        &tokenizer,
        &DataOptions::default(),
    )
    .expect("rows");
    let lengths: Vec<usize> = rows.examples.iter().map(|row| row.ids.len()).collect();
    let sums: Vec<f64> = lengths
        .chunks(4)
        .map(|part| part.iter().sum::<usize>() as f64)
        .collect();
    assert_eq!(tokens[..3], sums);
    let supervised = column(&place.path("linear"), "supervised_tokens");
    assert_eq!(
        supervised[..3].iter().sum::<f64>(),
        rows.report.supervised_tokens as f64
    );

    // max_steps wins over the epochs, and the schedule ends there; a share of the steps is the warm-up.
    let config = TrainConfig {
        max_steps: Some(4),
        lr_scheduler_type: SchedulerType::Cosine,
        warmup_steps: 0,
        warmup_ratio: 0.3,
        ..place.config(Method::Lora, "cosine")
    };
    let outcome = run(&config).expect("the run");
    assert_eq!((outcome.steps, outcome.total_steps), (4, 4));
    close(
        column(&place.path("cosine"), "learning_rate"),
        &[0.0, 0.5, 1.0, 0.5],
    );

    // Half an epoch of 3 steps is 2.
    let config = TrainConfig {
        num_train_epochs: 0.5,
        ..place.config(Method::Lora, "half")
    };
    assert_eq!(run(&config).expect("the run").steps, 2);
    // More steps than the epochs have.
    let config = TrainConfig {
        num_train_epochs: 1.0,
        max_steps: Some(5),
        ..place.config(Method::Lora, "long")
    };
    assert_eq!(run(&config).expect("the run").steps, 5);
}

/// A run whose first evaluation is the best.
fn worsening(place: &Place, name: &str) -> TrainConfig {
    place.write_contrary_valid();
    TrainConfig {
        warmup_steps: 0,
        lr_scheduler_type: SchedulerType::Constant,
        eval_steps: Some(1),
        ..place.config(Method::Lora, name)
    }
}

#[test]
fn old_checkpoints_go_and_the_best_stays() {
    let place = Place::new("llama");
    let mut config = place.config(Method::Lora, "plain");
    config.save_steps = Some(2);
    config.save_total_limit = Some(2);
    run(&config).expect("the run");
    assert_eq!(place.list("plain/checkpoints"), ["step-8", "step-9"]);

    let mut config = worsening(&place, "best");
    config.save_steps = Some(1);
    config.save_total_limit = Some(1);
    config.load_best_model_at_end = true;
    let outcome = run(&config).expect("the run");
    let losses: Vec<(u64, f64)> = metrics(&place.path("best"))
        .iter()
        .filter(|line| line["step"].as_u64() > Some(0))
        .filter_map(|line| Some((line["step"].as_u64()?, line.get("eval_loss")?.as_f64()?)))
        .collect();
    let (step, loss) = losses
        .iter()
        .copied()
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .expect("evaluations");
    assert!(step < 8, "training is meant to make it worse: {losses:?}");
    assert!((outcome.eval_loss.expect("an evaluation") - loss).abs() < 1e-12);
    assert_eq!(
        place.list("best/checkpoints"),
        [format!("step-{step}"), "step-9".to_owned()]
    );
    let read = |folder: &str| {
        fs::read(place.path(folder).join("adapter_model.safetensors")).expect("the adapter")
    };
    assert!(read("best") == read(&format!("best/checkpoints/step-{step}")));
    assert!(read("best") != read("best/checkpoints/step-9"));
    let card = fs::read_to_string(place.path("best").join("README.md")).expect("the card");
    assert_says(&card, &[&format!("{loss:.4}")]);
}

#[test]
fn training_stops_early() {
    let place = Place::new("llama");
    let mut config = worsening(&place, "run");
    config.early_stopping_patience = Some(2);
    let outcome = run(&config).expect("the run");
    assert!(outcome.stopped_early && outcome.steps < 9, "{outcome:?}");
    assert!(place.path("run").join("adapter_model.safetensors").exists());

    fs::remove_file(place.path("data").join("valid.jsonl")).expect("no held-out rows");
    let no_rows: &[&str] = &["valid.jsonl", "valid_data"];
    let never = &["needs eval_steps: without it the only evaluation is at the end"];
    for (key, words) in [
        ("eval_steps", no_rows),
        ("load_best_model_at_end", never),
        ("early_stopping_patience", never),
    ] {
        let mut config = place.config(Method::Lora, "refused");
        config.eval_steps = (key == "eval_steps").then_some(1);
        config.load_best_model_at_end = key == "load_best_model_at_end";
        config.early_stopping_patience = (key == "early_stopping_patience").then_some(1);
        let text = failure(run(&config));
        assert_says(&text, &[key]);
        assert_says(&text, words);
        assert!(!place.path("refused").exists());
    }
}

#[test]
fn an_adapter_is_trained_further_as_it_is() {
    let place = Place::new("llama");
    let mut first = place.config(Method::Lora, "first");
    first.options.targets.target_modules = Some(names(&["k_proj", "down_proj"]));
    first.options.lora.lora_alpha = 6.0;
    let earlier = run(&first).expect("the run");
    let mut second = place.config(Method::Lora, "second");
    second.init_adapter = Some(place.path("first"));
    second.options.lora.r = 2;
    second.options.lora.lora_alpha = 99.0;
    let later = run(&second).expect("the run");
    assert_eq!(later.first_eval_loss, earlier.eval_loss);
    assert_eq!(later.trainable_parameters, earlier.trainable_parameters);
    let config = LoraConfig::read(&place.path("second")).expect("the config");
    assert_eq!((config.r, config.lora_alpha), (4, 6.0));
    let keys = |run: &str| {
        tensors(&place.path(run).join("adapter_model.safetensors"))
            .into_iter()
            .map(|(name, _)| name)
            .collect::<Vec<_>>()
    };
    assert_eq!(keys("second"), keys("first"));
    let text = failure(run(&TrainConfig {
        method: Method::Full,
        ..second
    }));
    assert_says(&text, &["output", "second", "exists"]);
    let full = TrainConfig {
        init_adapter: Some(place.path("first")),
        ..place.config(Method::Full, "full")
    };
    assert_says(&failure(run(&full)), &["init_adapter", "merge"]);
}

#[test]
fn parts_of_a_fused_linear_are_trained_alone() {
    let place = Place::new("gpt2");
    let mut config = place.config(Method::Lora, "parts");
    config.options.targets.target_modules = Some(names(&["c_attn.q", "c_attn.v"]));
    config.options.lora.use_rslora = true;
    let mut watch = Watch::default();
    let outcome = watch
        .train(&config, Start::Fresh { overwrite: false })
        .expect("the run");
    // 2 layers × 2 parts × (A 4×32 + B 32×4)
    assert_eq!(watch.trainable_parameters, 1024);
    let saved = tensors(&place.path("parts").join("adapter_model.safetensors"));
    assert_eq!(saved.len(), 4);
    for (name, values) in &saved {
        assert!(name.contains(".attn.c_attn.lora_"), "{name}");
        assert_eq!(
            values.len(),
            8 * if name.contains("lora_A") { 32 } else { 96 }
        );
        if name.contains("lora_B") {
            let k = &values[32 * 8..64 * 8];
            assert!(k.iter().all(|x| *x == 0.0), "k is not adapted");
        }
    }
    let model = open(&place.path("model"));
    let loss = held_out_loss(&place, &model, Some(&place.path("parts")));
    assert_eq!(Some(loss), outcome.eval_loss);

    let further = TrainConfig {
        init_adapter: Some(place.path("parts")),
        ..place.config(Method::Lora, "further")
    };
    let mut watch = Watch::default();
    let later = watch
        .train(&further, Start::Fresh { overwrite: false })
        .expect("the run");
    assert_eq!(watch.trainable_parameters, 1024);
    assert_eq!(later.first_eval_loss, outcome.eval_loss);
    assert_says(
        &watch.notes.join("\n"),
        &["4 modules adapted", "c_attn.q ×1"],
    );
}

/// A rate that makes the values useless at its second step: the first has rate 0.
fn exploding(place: &Place, name: &str) -> TrainConfig {
    TrainConfig {
        learning_rate: 1e38,
        warmup_steps: 4,
        eval_steps: None,
        save_steps: Some(1),
        ..place.config(Method::Lora, name)
    }
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run() {
    let place = Place::new("llama");
    fs::remove_file(place.path("data").join("valid.jsonl")).expect("no held-out rows");
    let text = failure(run(&exploding(&place, "run")));
    // The checkpoint of step 2 holds the values that failed.
    assert_says(
        &text,
        &[
            "step 3",
            "learning rate (",
            "warmup_steps",
            "last good checkpoint",
            "step-1",
        ],
    );
    assert!(!text.contains("step-2"), "{text}");
    assert!(!place.path("run").join("adapter_model.safetensors").exists());
    assert_eq!(place.list("run/checkpoints"), ["step-1", "step-2"]);
    lora::load(
        &place.path("run/checkpoints/step-1"),
        open(&place.path("model")).config(),
    )
    .expect("it is whole");

    // The last step's values are not used by any step after it.
    let mut config = exploding(&place, "last");
    config.max_steps = Some(2);
    let text = failure(run(&config));
    assert_says(
        &text,
        &[
            "after step 2 the training loss is",
            "learning rate",
            "step-1",
        ],
    );
    assert!(
        !place
            .path("last")
            .join("adapter_model.safetensors")
            .exists()
    );

    place.write_rows("valid.jsonl", 4, 100);
    let mut config = exploding(&place, "evaluated");
    config.eval_steps = Some(1);
    let text = failure(run(&config));
    assert_says(
        &text,
        &[
            "after step 2 the held-out loss is",
            "learning rate",
            "step-1",
        ],
    );
}

#[test]
fn an_adapter_of_extreme_values_is_not_blamed_on_the_rate() {
    let place = Place::new("llama");
    let model = open(&place.path("model"));
    for value in [f32::NAN, 1e38] {
        let expected: &[&str] = if value.is_nan() {
            &[
                "broken",
                "q_proj.lora_A.weight`: the value at [0, 0] is NaN",
            ]
        } else {
            &[
                "nothing has been trained yet",
                "adapter",
                "no checkpoint was written",
            ]
        };
        let config = lora_config(&["q_proj"]);
        let mut broken = adapter(&model, &config, 1);
        broken.params.view_mut(0).fill(value);
        broken.params.view_mut(1).fill(value);
        let folder = place.path("broken");
        fs::create_dir_all(&folder).expect("a folder");
        lora::save(
            &folder,
            model.config(),
            &config,
            &broken,
            lowrank::tuning::BaseMark::default(),
        )
        .expect("saved");
        for (held_out, name) in [(true, "with"), (false, "without")] {
            if held_out {
                place.write_rows("valid.jsonl", 4, 100);
            } else {
                fs::remove_file(place.path("data").join("valid.jsonl")).expect("no held-out rows");
            }
            let mut config = place.config(Method::Lora, &format!("{name}{value}"));
            config.init_adapter = Some(folder.clone());
            config.eval_steps = None;
            let text = failure(run(&config));
            assert_says(&text, expected);
            assert!(!text.contains("learning rate"), "{text}");
            assert!(!config.output.join("adapter_model.safetensors").exists());
        }
    }
}

#[test]
fn a_run_that_no_budget_fits_is_refused_and_leaves_nothing() {
    let place = Place::new("llama");
    let train_within = |budget: Option<u64>, name: &str| {
        let config = TrainConfig {
            memory_budget: budget,
            max_steps: Some(1),
            ..place.config(Method::Lora, name)
        };
        let result = run(&config).map(|_| ()).map_err(|error| error.to_string());
        assert_eq!(config.output.exists(), result.is_ok(), "{result:?}");
        result
    };
    assert_eq!(train_within(None, "free"), Ok(()));
    assert_eq!(train_within(Some(1 << 40), "much"), Ok(()));
    // Too little for the weights, and then for what the smallest pass computes.
    let error = train_within(Some(1 << 20), "little").unwrap_err();
    for word in ["memory_budget is 1.0 MiB", "for the weights", "base_dtype"] {
        assert!(error.contains(word), "{error}");
    }
    let budgets = (0_u64..).map(|i| (17 << 20) + (i << 13));
    let errors = budgets.map_while(|budget| train_within(Some(budget), "little").err());
    let error = errors.last().unwrap_or_default();
    for word in ["memory_budget is", "batch_size", "recompute full"] {
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn impossible_settings_are_named_together() {
    let place = Place::new("llama");
    let mut config = TrainConfig {
        batch_size: 0,
        gradient_accumulation_steps: 0,
        learning_rate: f64::NAN,
        num_train_epochs: -1.0,
        max_steps: Some(0),
        ..place.config(Method::Lora, "run")
    };
    config.options.lora.r = 0;
    config.options.lora.lora_dropout = 1.0;
    let words = [
        "batch_size",
        "gradient_accumulation_steps",
        "r must",
        "learning_rate",
        "num_train_epochs",
        "lora_dropout",
        "max_steps",
    ];
    assert_says(&failure(run(&config)), &words);
    assert!(!place.path("run").exists());
}

#[test]
fn rows_longer_than_the_context_are_refused() {
    let place = Place::new("gpt2");
    let long = format!(
        "{{\"prompt\":\"{}\",\"completion\":\"yes\"}}\n",
        "x".repeat(60)
    );
    fs::write(place.path("data").join("train.jsonl"), long).expect("a long row");
    let text = failure(run(&place.config(Method::Lora, "run")));
    assert_says(&text, &["made for 40", "max_seq_length: 40"]);
}
