//! IA3: factors in PEFT's files, from a run's settings to a merged model.

use std::fs;

use lowrank::base::{Base, Source};
use lowrank::merge::F32_LIMIT;
use lowrank::model::{Adapter, AdapterSet, Decoder};
use lowrank::report::inspect;
use lowrank::settings::TrainConfig;
use lowrank::train::{Outcome, evaluate};
use lowrank::tuning::targets::Targets;
use lowrank::tuning::{self, Loaded, Method};
use lowrank::{DType, Workspace};
use serde_json::{Value, json};

use super::common::{
    Place, assert_says, decoder, difference, failure, ids, logits, merge_f32, open, run, tensors,
};

fn names(list: &[&str]) -> Targets {
    Targets::Names(list.iter().map(ToString::to_string).collect())
}

fn trained(place: &Place, name: &str) -> (TrainConfig, Outcome, Loaded) {
    let config = place.config(Method::Ia3, name);
    let outcome = run(&config).expect("the run");
    let base = open(&place.path("model"));
    let loaded = tuning::load(&config.output, base.config()).expect("it loads");
    (config, outcome, loaded)
}

/// What these settings train, as the names of slots.
fn laid_out(
    model: &Decoder,
    target: Option<Targets>,
    feedforward: Option<Targets>,
) -> Result<Adapter, lowrank::Error> {
    let config = TrainConfig::new(Method::Ia3, "m", "d", "o").with_options(|options| {
        options.targets.target_modules = target;
        options.ia3.feedforward_modules = feedforward;
    });
    config.lay_out(model.config())
}

fn config_of(folder: &std::path::Path) -> Value {
    let text = fs::read_to_string(folder.join("adapter_config.json")).expect("the config");
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn a_run_learns_and_its_files_are_pefts() {
    for (family, targets, feedforward) in [
        (
            "llama3",
            json!(["k_proj", "v_proj", "down_proj"]),
            json!(["down_proj"]),
        ),
        (
            "qwen2",
            json!(["q_proj", "v_proj", "down_proj"]),
            json!(["down_proj"]),
        ),
        (
            "gpt2",
            json!(["c_attn", "mlp.c_proj"]),
            json!(["mlp.c_proj"]),
        ),
    ] {
        let place = Place::new(family);
        let (config, outcome, loaded) = trained(&place, "run");
        assert!(
            outcome.eval_loss < outcome.first_eval_loss,
            "{family}: {outcome:?}"
        );
        assert_eq!(loaded.config.method(), Method::Ia3);
        assert_eq!(loaded.adapter.parameters(), outcome.trainable_parameters);
        let base = open(&place.path("model"));
        assert!(loaded.config.is_pefts(base.config()));
        let rows = super::methods::held_out(&place);
        let set = [&loaded.adapter];
        let ws = Workspace::new();
        let sums = evaluate(&base, AdapterSet::new(&set), Some(0), &rows, &ws);
        assert!((sums.mean() - outcome.eval_loss.expect("held-out rows")).abs() < 1e-6);

        let written = config_of(&config.output);
        assert_eq!(written["peft_type"], "IA3");
        assert_eq!(written["target_modules"], targets, "{family}");
        assert_eq!(written["feedforward_modules"], feedforward, "{family}");
        assert_eq!(written["fan_in_fan_out"], family == "gpt2");
        let found = tensors(&config.output.join("adapter_model.safetensors"));
        assert!(
            found
                .iter()
                .all(|(name, _)| name.starts_with("base_model.model.") && name.ends_with(".ia3_l"))
        );
        let card = fs::read_to_string(config.output.join("README.md")).expect("the card");
        assert_says(&card, &["trained with IA3", "PeftModel", "lowrank merge"]);

        // Going on from what was saved begins where it ended.
        let mut further = config.clone();
        further.init_adapter = Some(config.output.clone());
        further.output = place.path("further");
        let again = run(&further).expect("it goes on");
        assert_eq!(again.first_eval_loss, outcome.eval_loss);
        further.method = Method::Lora;
        further.output = place.path("other");
        let text = failure(run(&further));
        assert_says(&text, &["was trained with IA3", "LoRA"]);
    }
}

#[test]
fn it_begins_with_the_base_unless_it_is_drawn() {
    let place = Place::new("gpt2");
    let begin = |from_one: bool| {
        let config = TrainConfig {
            max_steps: Some(1),
            learning_rate: 1e-30,
            ..place.config(Method::Ia3, &format!("run{from_one}"))
        };
        let config = config.with_options(|options| options.ia3.init_ia3_weights = from_one);
        run(&config).expect("the run");
        assert_eq!(config_of(&config.output)["init_ia3_weights"], from_one);
        tensors(&config.output.join("adapter_model.safetensors"))
    };
    assert!(
        begin(true)
            .iter()
            .all(|(_, values)| values.iter().all(|x| *x == 1.0))
    );
    let drawn: Vec<f32> = begin(false)
        .into_iter()
        .flat_map(|(_, values)| values)
        .collect();
    let mean = drawn.iter().sum::<f32>() / drawn.len() as f32;
    let square = drawn.iter().map(|x| x * x).sum::<f32>() / drawn.len() as f32;
    assert!(
        mean.abs() < 0.15 && (square - 1.0).abs() < 0.2,
        "{mean} {square}"
    );
}

#[test]
fn feedforward_modules_are_a_part_of_the_targets() {
    let model = decoder("gpt2");
    let inputs = |target: &[&str], feedforward: Option<Targets>| {
        let adapter = laid_out(&model, Some(names(target)), feedforward).expect("it fits");
        let mut found: Vec<String> = adapter
            .scaled
            .values()
            .filter_map(|site| Some(adapter.names[site.input?].clone()))
            .collect();
        found.sort();
        found
    };
    let mlp = |layer: usize| format!("base_model.model.transformer.h.{layer}.mlp.c_proj.ia3_l");
    assert_eq!(inputs(&["c_attn", "mlp.c_proj"], None), [mlp(0), mlp(1)]);
    // c_proj means the attention's, too; that one's output is scaled.
    assert_eq!(inputs(&["c_proj"], None), [mlp(0), mlp(1)]);
    assert_eq!(inputs(&["c_attn"], None), [""; 0]);
    assert_eq!(inputs(&["c_attn", "mlp.c_proj"], Some(names(&[]))), [""; 0]);
    assert_eq!(inputs(&["c_proj"], Some(names(&["c_proj"]))).len(), 4);
    let second = Targets::Pattern(r".*\.1\.mlp\.c_proj".to_owned());
    assert_eq!(inputs(&["c_proj"], Some(second)), [mlp(1)]);

    let refused = |target: &[&str], feedforward: Targets| {
        failure(laid_out(&model, Some(names(target)), Some(feedforward)))
    };
    let text = refused(&["c_attn"], names(&["mlp.c_proj"]));
    assert_says(&text, &["`mlp.c_proj` is not in target_modules (c_attn)"]);
    let text = refused(&["c_attn"], Targets::Pattern("(".to_owned()));
    assert_says(&text, &["feedforward_modules", "("]);
    let text = refused(&["c_attn"], Targets::Pattern(".*nothing".to_owned()));
    assert_says(&text, &["`.*nothing` matches no adapted module"]);
    let text = failure(laid_out(&model, Some(names(&["c_attn.q"])), None));
    assert_says(
        &text,
        &["IA3 scales transformer.h.0.attn.c_attn whole", "c_attn.q"],
    );
    let text = failure(laid_out(&model, Some(names(&["q_proj"])), None));
    assert_says(
        &text,
        &["`q_proj` matches no module", "this model's linears are"],
    );
}

#[test]
fn what_is_written_reads_back_where_the_default_is_no_part_of_the_list() {
    let place = Place::new("gpt2");
    let config = place.config(Method::Ia3, "run").with_options(|options| {
        options.targets.target_modules = Some(names(&["c_proj"]));
    });
    run(&config).expect("the run");
    // PEFT refuses a list that is no part of target_modules, and takes any pattern.
    assert_eq!(
        config_of(&config.output)["feedforward_modules"],
        r".*\.mlp\.c_proj"
    );
    let model = open(&place.path("model"));
    let loaded = tuning::load(&config.output, model.config()).expect("it loads");
    let inputs = loaded
        .adapter
        .scaled
        .values()
        .filter(|site| site.input.is_some());
    assert_eq!((inputs.count(), loaded.adapter.scaled.len()), (2, 4));
}

#[test]
fn factors_fold_into_weights_and_biases() {
    for family in ["qwen2", "gpt2"] {
        let place = Place::new(family);
        let (_, _, loaded) = trained(&place, "run");
        let source = Source::Folder(place.path("model"));
        let merged = place.path("merged");
        let passages = [ids(20, 1), ids(33, 2)];
        let report = merge_f32(&source, &loaded.adapter, &passages, &merged).expect("it merges");
        assert_eq!(report.modules, loaded.adapter.scaled.len());
        assert!(report.max_logit_difference < F32_LIMIT);
        let model = open(&place.path("model"));
        let with = logits(&model, Some(&loaded.adapter), &passages[0]);
        let alone = logits(&open(&merged), None, &passages[0]);
        assert!(difference(&with, &alone) < 1e-4, "{family}");
        assert!(
            difference(&with, &logits(&model, None, &passages[0])) > 1e-2,
            "{family}"
        );
    }
}

#[test]
fn inspection_lists_the_modules_with_their_change() {
    let place = Place::new("llama");
    let (config, outcome, loaded) = trained(&place, "run");
    let source = Source::Folder(place.path("model"));
    let base: Base = source.load(DType::F32).expect("the model");
    let report =
        inspect::adapter(&config.output, &loaded, &base.into_network()).expect("it is inspected");
    assert_eq!(report.options["feedforward_modules"], "down_proj");
    assert_eq!(report.modules.len(), 6);
    let parameters: u64 = report.modules.iter().map(|module| module.parameters).sum();
    assert_eq!(parameters, outcome.trainable_parameters as u64);
    for module in &report.modules {
        assert!(module.r.is_none() && module.scale.is_none(), "{module:?}");
        assert!(
            module.relative_change.is_some_and(|x| x > 0.0 && x < 1.0),
            "{module:?}"
        );
    }
}

#[test]
fn damaged_files_and_other_models_are_named() {
    let place = Place::new("llama");
    let (config, ..) = trained(&place, "run");
    let model = open(&place.path("model"));
    let whole = config_of(&config.output);
    let refused = |key: &str, value: Value| {
        let mut changed = whole.clone();
        changed[key] = value;
        let path = config.output.join("adapter_config.json");
        fs::write(&path, changed.to_string()).expect("written");
        failure(tuning::load(&config.output, model.config()).map(drop))
    };
    assert_says(
        &refused("modules_to_save", json!(["lm_head"])),
        &["base_model.model.lm_head.weight: missing"],
    );
    assert_says(
        &refused("task_type", json!("SEQ_CLS")),
        &["task_type", "CAUSAL_LM"],
    );
    assert_says(
        &refused("feedforward_modules", json!(7)),
        &["feedforward_modules"],
    );
    assert_says(&refused("target_modules", json!("(")), &["target_modules"]);
    assert_says(
        &refused("target_modules", json!(["query"])),
        &["query", "another model"],
    );
    // What asks for nothing, and what PEFT writes beside the options, is read over.
    for (key, value) in [
        (
            "auto_mapping",
            json!({"base_model_class": "LlamaForCausalLM"}),
        ),
        ("revision", json!("main")),
        ("ensure_weight_tying", json!(false)),
        ("new_list", json!([])),
        ("runtime_config", json!({"ephemeral_gpu_offload": false})),
    ] {
        let mut changed = whole.clone();
        changed[key] = value;
        let path = config.output.join("adapter_config.json");
        fs::write(&path, changed.to_string()).expect("written");
        tuning::load(&config.output, model.config()).expect(key);
    }
    assert_says(&refused("new_switch", json!(true)), &["new_switch"]);
    assert_says(
        &refused("peft_type", json!("IA4")),
        &["IA4", "LORA", "IA3", "PREFIX_TUNING"],
    );
    // Without feedforward modules, down_proj's factors would be its output's.
    let text = refused("feedforward_modules", json!([]));
    assert_says(&text, &["down_proj.ia3_l", "shape"]);
    fs::write(config.output.join("adapter_config.json"), whole.to_string()).expect("written");
    let text = failure(tuning::load(&config.output, decoder("gpt2").config()).map(drop));
    assert_says(&text, &["another model"]);
}
