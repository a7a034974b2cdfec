//! DoRA: magnitudes beside A and B, from gradients to files.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use lowrank::base::Source;
use lowrank::data::Example;
use lowrank::formats::gguf_model::Shapes;
use lowrank::lora_files::{
    CombineOptions, ExportOptions, FileDtype, Form, Keep, LoraFile, PruneOptions, combine, prune,
};
use lowrank::model::{Adapter, AdapterSet, Decoder, Recompute, VirtualTokens, WeightId, Weights};
use lowrank::objective::{self, NextToken};
use lowrank::train::{Start, batch_of};
use lowrank::tuning::Method;
use lowrank::tuning::lora;
use lowrank::{DType, Workspace};
use lowrank_formats::checkpoint::{Checkpoint, StoredDType};
use lowrank_formats::hf_config::HfConfig;
use lowrank_formats::peft::LoraConfig;
use lowrank_kernels::{NumberFormat, Tensor, fill_uniform};

use super::common::{
    Place, Watch, adapter, all_linear, assert_says, decoder, difference, examples, failure, golden,
    ids, logits, lora_config, merge_f32, open, run, tensors, timeless,
};
use super::gradients::gradients_saving;
use super::scales::gradients;

fn dora(config: LoraConfig) -> LoraConfig {
    LoraConfig {
        use_dora: true,
        ..config
    }
}

/// An adapter whose A, B and magnitudes are all random.
pub(crate) fn made(model: &Decoder, config: LoraConfig, seed: u64) -> Adapter {
    let mut made = adapter(model, &dora(config), seed);
    made.begin_magnitudes(model.weights());
    let slots: Vec<usize> = made.magnitudes.values().copied().collect();
    for slot in slots {
        let values = made.params.view(slot).to_vec();
        let mut factors = Tensor::zeros(1, values.len());
        fill_uniform(factors.view_mut(), 0.7, 1.3, seed + slot as u64);
        let moved = values.iter().zip(factors.to_vec()).map(|(m, f)| m * f);
        made.params
            .view_mut(slot)
            .copy_from_f32(&moved.collect::<Vec<_>>());
    }
    made
}

fn loss(model: &Decoder, made: &Adapter, rows: &[Example]) -> f64 {
    let batch = batch_of(rows, VirtualTokens::default());
    let set = [made];
    let (set, ws) = (AdapterSet::new(&set), Workspace::new());
    objective::loss(model, &batch, set, &NextToken::of(&batch), &ws).loss
}

#[test]
fn magnitudes_that_begin_change_nothing() {
    for family in ["llama", "qwen2", "gpt2"] {
        let model = decoder(family);
        let config = dora(all_linear());
        let (mut made, coverage) =
            lora::inject(model.config(), &config, lora::InitLoraWeights::Gaussian, 5)
                .expect("the targets are there");
        made.begin_magnitudes(model.weights());
        assert_eq!(coverage.parameters, made.parameters());
        let counted = lora::parameters(model.config(), &config).expect("the targets are there");
        assert_eq!(counted, made.parameters());
        let text = ids(20, 4);
        let found = logits(&model, Some(&made), &text);
        assert!(difference(&found, &logits(&model, None, &text)) < 1e-5);
        // With B ≠ 0 from the start they are the norms of the sum.
        let mut random = adapter(&model, &config, 3);
        random.begin_magnitudes(model.weights());
        let plain = adapter(&model, &all_linear(), 3);
        let found = logits(&model, Some(&random), &text);
        assert!(
            difference(&found, &logits(&model, Some(&plain), &text)) < 1e-5,
            "{family}"
        );
    }
}

/// With the norms held fixed, as they are between optimizer steps.
#[test]
fn gradients_are_finite_differences() {
    let rows = examples();
    for (family, config) in [
        ("llama", all_linear()),
        ("qwen2", all_linear()),
        ("gpt2", all_linear()),
        ("gpt2", lora_config(&["c_attn.q", "c_attn.v", "c_proj"])),
    ] {
        let model = decoder(family);
        let mut made = made(&model, config, 3);
        let found = gradients(&model, &made, &rows, Recompute::None).1;
        for recompute in [Recompute::Selective, Recompute::Full] {
            let again = gradients(&model, &made, &rows, recompute).1;
            assert!(difference(&found, &again) < 1e-5, "{family} {recompute}");
        }
        let mut first = 0;
        for slot in 0..made.names.len() {
            let (height, width) = made.params.shape(slot);
            let own = &found[first..first + height * width];
            first += own.len();
            let norm = own.iter().map(|g| g * g).sum::<f32>().sqrt();
            let name = made.names[slot].clone();
            assert!(norm > 0.0, "{family}: {name} gets no gradient");
            let start = made.params.view(slot).to_vec();
            let mut at = |way: f32| {
                let moved = start.iter().zip(own);
                let moved: Vec<f32> = moved.map(|(x, g)| x + way * 2e-3 * g / norm).collect();
                made.params.view_mut(slot).copy_from_f32(&moved);
                loss(&model, &made, &rows)
            };
            let change = (at(1.0) - at(-1.0)) / 4e-3;
            at(0.0);
            let off = (change - f64::from(norm)).abs();
            assert!(
                off < 2e-2 * f64::from(norm).max(1.0),
                "{family}, {name}: {change:e}, gradient {norm:e}"
            );
        }
    }
}

/// Where a magnitude is nought, the output tells nothing of what its gradient is computed from.
#[test]
fn magnitudes_of_nought_have_gradients() {
    let (model, rows) = (decoder("llama"), examples());
    let mut made = made(&model, all_linear(), 3);
    let slots: Vec<usize> = made.magnitudes.values().copied().collect();
    for &slot in &slots {
        let mut values = made.params.view(slot).to_vec();
        values[1] = 0.0;
        made.params.view_mut(slot).copy_from_f32(&values);
    }
    let exact = gradients_saving(&model, &made, Recompute::None, DType::F32);
    let rounded = gradients_saving(&model, &made, Recompute::Selective, DType::Bf16);
    assert!(rounded.iter().flatten().all(|g| g.is_finite()));
    let mut some = 0.0_f32;
    for slot in slots {
        let mut values = made.params.view(slot).to_vec();
        let mut at = |m: f32| {
            values[1] = m;
            made.params.view_mut(slot).copy_from_f32(&values);
            let summed = loss(&model, &made, &rows);
            values[1] = 0.0;
            made.params.view_mut(slot).copy_from_f32(&values);
            summed
        };
        let change = (at(0.02) - at(-0.02)) / 0.04;
        let (name, found) = (&made.names[slot], exact[slot][1]);
        let off = (change - f64::from(found)).abs();
        assert!(
            off < 2e-2 * f64::from(found.abs()).max(0.1),
            "{name}: {change:e} {found:e}"
        );
        some = some.max(found.abs());
    }
    assert!(some > 0.1, "some of them matter: {some}");
}

#[test]
fn norms_follow_values_when_they_are_forgotten() {
    let model = decoder("llama");
    let mut made = made(&model, all_linear(), 3);
    let text = ids(20, 4);
    let before = logits(&model, Some(&made), &text);
    let site = made.low_rank.values().next().expect("a branch")[0].clone();
    let values: Vec<f32> = made.params.view(site.b).to_vec();
    let moved: Vec<f32> = values.iter().map(|x| 3.0 * x).collect();
    made.params.view_mut(site.b).copy_from_f32(&moved);
    let stale = logits(&model, Some(&made), &text);
    made.forget_norms();
    let fresh = logits(&model, Some(&made), &text);
    assert!(difference(&stale, &fresh) > 1e-4);
    made.params.view_mut(site.b).copy_from_f32(&values);
    made.forget_norms();
    assert_eq!(logits(&model, Some(&made), &text), before);
}

/// Rows of DoRA, of LoRA and of no adapter in one batch are what each is alone.
#[test]
fn rows_of_other_adapters_have_no_magnitudes() {
    let model = decoder("qwen2");
    let (made, other) = (
        made(&model, all_linear(), 3),
        adapter(&model, &all_linear(), 9),
    );
    let rows = examples();
    let (set, ws) = ([&made, &other], Workspace::new());
    let set = AdapterSet::new(&set);
    let hidden = |adapters: &[(usize, Option<usize>)]| {
        let chosen = adapters.iter().map(|(row, _)| &rows[*row]);
        let mut batch = batch_of(chosen, VirtualTokens::default());
        batch.adapters.clear();
        let mut start = 0;
        for (row, adapter) in adapters {
            let range = start..start + rows[*row].ids.len();
            start = range.end;
            batch.adapters.extend(adapter.map(|index| (range, index)));
        }
        let every: Vec<u32> = (0..start as u32).collect();
        let found = model.logits(&batch, set, &every, None, &ws);
        found.to_vec()
    };
    let whole = hidden(&[(0, Some(0)), (1, None), (2, Some(1))]);
    let parts = [
        hidden(&[(0, Some(0))]),
        hidden(&[(1, None)]),
        hidden(&[(2, Some(1))]),
    ]
    .concat();
    assert!(whole == parts, "a row's bits depend on other rows");
}

#[test]
fn a_merge_is_the_adapter_beside_its_base() {
    for (family, config) in [
        ("llama", all_linear()),
        ("qwen2", all_linear()),
        ("gpt2", all_linear()),
        ("gpt2", lora_config(&["c_attn.q", "c_attn.v"])),
    ] {
        let place = Place::new(family);
        let source = Source::Folder(place.path("model"));
        let model = open(&place.path("model"));
        let made = made(&model, config, 3);
        let text = ids(20, 4);
        let expected = logits(&model, Some(&made), &text);
        assert!(difference(&expected, &logits(&model, None, &text)) > 1e-2);
        let output = place.path("merged");
        merge_f32(&source, &made, std::slice::from_ref(&text), &output).expect("the merge");
        let merged = logits(&open(&output), None, &text);
        assert!(difference(&expected, &merged) < 1e-5, "{family}");
        fs::remove_dir_all(&output).expect("the folder");
    }
}

/// A base in blocks is what it is widened to.
#[test]
fn a_base_in_blocks_is_its_numbers() {
    let place = Place::new("llama");
    let whole = open(&place.path("model"));
    let config = whole.config().clone();
    let stored = |blocks: bool| -> Arc<Decoder> {
        let all = config.weights().into_iter().map(|(id, (rows, cols))| {
            let values = whole.weights().view(id).to_vec();
            let format = NumberFormat::Q8_0;
            if !matches!(id, WeightId::Linear(..)) || rows == 1 || cols % format.block_len() != 0 {
                return (id, Tensor::from_f32(rows, cols, values));
            }
            let mut bytes = Vec::new();
            for row in values.chunks_exact(cols) {
                format.quantize(row, &mut bytes).expect("numbers");
            }
            let quantized = Tensor::from_le_bytes(&bytes, format, rows, cols).expect("blocks");
            if blocks {
                (id, quantized)
            } else {
                (id, Tensor::from_f32(rows, cols, quantized.to_vec()))
            }
        });
        let all = all.collect();
        Decoder::new(Weights::from_tensors(config.clone(), all, DType::F32).expect("the model"))
    };
    let (blocks, numbers) = (stored(true), stored(false));
    let made = made(&numbers, all_linear(), 3);
    let text = ids(20, 4);
    let expected = logits(&numbers, Some(&made), &text);
    // The norms are those of the base that is computed with.
    assert!(difference(&expected, &logits(&blocks, Some(&made), &text)) < 1e-5);
}

#[test]
fn a_run_is_saved_loaded_and_resumed() {
    for (family, targets) in [("llama", "q_proj,down_proj"), ("gpt2", "c_attn.q,c_attn.v")] {
        let place = Place::new(family);
        let config = |run: &str| {
            let mut config = place.config(Method::Lora, run);
            config.options.lora.lora_dropout = 0.0;
            config.options.lora.use_dora = true;
            config.options.targets.target_modules = Some(targets.parse().expect("targets"));
            config
        };
        let whole = config("whole");
        let outcome = run(&whole).expect("the run");
        assert!(outcome.eval_loss < outcome.first_eval_loss);
        // The file is PEFT's.
        let file = Checkpoint::open(&place.path("whole").join("adapter_model.safetensors"));
        let file = file.expect("the file opens");
        let magnitudes = file
            .names()
            .filter(|name| name.ends_with(".lora_magnitude_vector"));
        let magnitudes: Vec<_> = magnitudes.collect();
        assert!(!magnitudes.is_empty());
        for name in magnitudes {
            assert_eq!(file.get(name).expect("a listed tensor").shape.len(), 1);
        }
        let model = open(&place.path("model"));
        let loaded = lora::load(&place.path("whole"), model.config()).expect("it loads");
        assert!(loaded.config.use_dora);
        assert_eq!(
            loaded.adapter.magnitudes.len(),
            if family == "gpt2" { 2 } else { 4 }
        );
        // Saved again it is the same to the byte.
        let again = place.path("again");
        fs::create_dir(&again).expect("a folder");
        let mark = lowrank::tuning::BaseMark {
            name: "x",
            fingerprint: loaded.base_fingerprint.as_deref().unwrap_or_default(),
            labels: None,
        };
        lora::save(
            &again,
            model.config(),
            &loaded.config,
            &loaded.adapter,
            mark,
        )
        .expect("it is saved");
        let name = "adapter_model.safetensors";
        assert_eq!(
            tensors(&again.join(name)),
            tensors(&place.path("whole").join(name))
        );
        // Stopped and resumed it has the same bits.
        let part = config("part");
        let mut watch = Watch::stopping_after(4);
        watch
            .train(&part, Start::Fresh { overwrite: false })
            .expect("the first part");
        Watch::default()
            .train(&part, Start::Resume)
            .expect("the rest");
        assert_eq!(
            timeless(&place.path("part")),
            timeless(&place.path("whole"))
        );
        let name = "adapter_model.safetensors";
        assert_eq!(
            tensors(&place.path("part").join(name)),
            tensors(&place.path("whole").join(name))
        );
    }
}

#[test]
fn dropout_is_refused_beside_magnitudes() {
    let place = Place::new("llama");
    let mut config = place.config(Method::Lora, "run");
    config.options.lora.use_dora = true;
    assert_says(&failure(run(&config)), &["lora_dropout", "use_dora"]);
    config.options.lora.lora_dropout = 0.0;
    run(&config).expect("the run");
    let mut next = place.config(Method::Lora, "next");
    next.init_adapter = Some(place.path("run"));
    let text = failure(run(&next));
    assert_says(&text, &["lora_dropout", "use_dora"]);
    next.options.lora.lora_dropout = 0.0;
    run(&next).expect("it goes on");
}

/// An adapter that PEFT made, for every program that reads adapters.
#[test]
fn files_carry_magnitudes_or_refuse_them() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let folder = golden("llama").join("dora");
    let file = LoraFile::read(&folder).expect("an adapter");
    assert!(file.modules.iter().all(|module| module.magnitude.is_some()));
    let config = HfConfig::read(&golden("llama")).expect("config.json");
    let shapes = Shapes::of_config(&config).expect("a model that llama.cpp has");
    let export = |form, output: &Path| {
        file.export(&ExportOptions {
            from: &folder,
            form,
            output,
            dtype: StoredDType::F32,
            shapes: Some(&shapes),
            name: "mine",
            overwrite: false,
        })
    };
    for form in [Form::Mlx, Form::Peft] {
        let output = place.path().join(format!("{form:?}"));
        export(form, &output).expect("a folder");
        let (found, back) = LoraFile::import(&output, None, None).expect("an adapter");
        assert_eq!(found, form);
        assert!(back.config.use_dora);
        let again = place.path().join(format!("{form:?}-again"));
        fs::create_dir(&again).expect("a folder");
        back.write(&again, StoredDType::F32).expect("the files");
        let (one, other) = (decoder("llama"), ids(20, 4));
        let load = |folder: &Path| lora::load(folder, one.config()).expect("it loads").adapter;
        let expected = logits(&one, Some(&load(&folder)), &other);
        assert!(difference(&expected, &logits(&one, Some(&load(&again)), &other)) < 1e-6);
    }
    for form in [Form::Gguf, Form::Loralib] {
        let output = place.path().join("x");
        let words = [
            "holds LoRA matrices alone",
            "use_dora",
            "model.layers.0.self_attn.q_proj",
        ];
        assert_says(&failure(export(form, &output)), &words);
        assert!(!output.exists());
    }
    let output = place.path().join("y");
    let pruned = PruneOptions {
        adapter: &folder,
        keep: Keep::Rank(1),
        output: &output,
        dtype: FileDtype::F32,
        overwrite: false,
    };
    let folders = [folder.clone()];
    for text in [
        failure(prune(&pruned)),
        failure(combine(&CombineOptions::new(&folders, &output))),
    ] {
        assert_says(&text, &["use_dora", "model.layers.1.mlp.down_proj"]);
    }
    assert_says(&failure(lora::branches(&folder)), &["use_dora"]);
}
