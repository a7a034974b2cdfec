//! Models and adapters that go out as files of other programs, and come back as they were.

use std::fs;
use std::path::{Path, PathBuf};

use lowrank::DType;
use lowrank::base::{BUILTIN, Source};
use lowrank::data::Example;
use lowrank::export::{ExportReport, FileType, own_rows, write_model};
use lowrank::formats::gguf_model::Shapes;
use lowrank::import::import_gguf;
use lowrank::lora_files::{ExportOptions, Form, LoraFile, LoraModule};
use lowrank::merge::gguf::{GgufMergeOptions, merge_gguf};
use lowrank::model::Purpose;
use lowrank_formats::checkpoint::StoredDType;
use lowrank_formats::gguf::Gguf;
use lowrank_formats::hf_config::HfConfig;
use serde_json::Value;

use super::common::{
    adapter as adapter_of, assert_says, difference, failure, golden, logits, lora_config,
};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens_gguf")
}

/// The names of the golden files, and the ids that their logits are of.
fn models() -> Vec<(String, Vec<u32>)> {
    let text = fs::read(goldens().join("models.json")).expect("the golden");
    let known: Value = serde_json::from_slice(&text).expect("JSON");
    let known = known.as_object().expect("models by name").iter();
    known
        .map(|(name, model)| {
            let ids = serde_json::from_value(model["ids"].clone()).expect("ids");
            (name.clone(), ids)
        })
        .collect()
}

pub(super) fn export(
    model: &Path,
    output: &Path,
    file_type: FileType,
) -> Result<ExportReport, lowrank::Error> {
    let source = Source::find(model.to_str().expect("a name"))?;
    let weights = source.weights_for(source.exact_dtype()?, Purpose::LanguageModel)?;
    write_model(
        &source,
        weights.config(),
        output,
        file_type,
        false,
        &|_| true,
        &mut own_rows(&weights),
    )
}

#[test]
fn a_folder_of_every_architecture_becomes_the_file_it_was_made_of() {
    let mut written = 0;
    for (name, ids) in models() {
        let place = tempfile::tempdir().expect("a temporary folder");
        let (folder, made) = (place.path().join("model"), place.path().join("made.gguf"));
        let original = goldens().join(format!("{name}.gguf"));
        import_gguf(&original, &folder, DType::F32, false).expect("a folder");
        let result = export(&folder, &made, FileType::F32);
        if ["llama_unigram", "llama_bytes"].contains(&name.as_str()) {
            let error = failure(result);
            assert_says(&error, &["it is of the kind Unigram"]);
            assert!(!made.exists());
            continue;
        }
        result.unwrap_or_else(|error| panic!("{name}: {error}"));
        let load = |path: &Path| {
            let source = Source::find(path.to_str().expect("a name"));
            source
                .and_then(|source| source.load(DType::F32))
                .expect("a model")
        };
        let (here, there) = (load(&original), load(&made));
        assert!(
            logits(&here.decoder, None, &ids) == logits(&there.decoder, None, &ids),
            "{name}"
        );
        assert_eq!(
            here.tokenizer.stop_ids(),
            there.tokenizer.stop_ids(),
            "{name}"
        );
        assert_eq!(
            here.tokenizer.chat_template(),
            there.tokenizer.chat_template(),
            "{name}"
        );
        // llama.cpp's own converter wrote the other one, so the order of rows is its.
        let (original, made) = (
            Gguf::open(&original).expect("a file"),
            Gguf::open(&made).expect("a file"),
        );
        for tensor in original
            .tensors()
            .iter()
            .filter(|tensor| tensor.kind.name() == "F32")
        {
            let Some(found) = made.tensor(&tensor.name) else {
                panic!("{name}: {} is not written", tensor.name);
            };
            let values = |gguf: &Gguf| gguf.f32s(&tensor.name).expect("floats");
            assert_eq!(found.shape, tensor.shape, "{name}: {}", tensor.name);
            assert!(
                difference(&values(&original), &values(&made)) < 1e-6,
                "{name}: {}",
                tensor.name
            );
        }
        written += 1;
    }
    assert!(written >= 16);
}

#[test]
fn a_file_goes_out_as_it_is_and_in_other_types() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let original = place.path().join("original.gguf");
    export(Path::new(BUILTIN), &original, FileType::F32).expect("a file");
    let types = [
        (FileType::F32, 1e-6),
        (FileType::F16, 1e-2),
        (FileType::Bf16, 0.1),
        (FileType::Q8_0, 0.3),
        (FileType::Q5KM, 1.5),
        (FileType::Q5KS, 1.5),
        (FileType::Q5_1, 1.5),
        (FileType::Q4KM, 3.0),
        (FileType::Q4_1, 5.0),
        (FileType::Q4_0, 5.0),
        (FileType::Q6K, 1.0),
    ];
    let load = |path: &Path| {
        let source = Source::find(path.to_str().expect("a name"));
        source
            .and_then(|source| source.load(DType::F32))
            .expect("a model")
    };
    let ids = [1, 2, 3, 4, 5, 6];
    let expected = logits(&load(&original).decoder, None, &ids);
    for (file_type, most) in types {
        let made = place.path().join(format!("{file_type:?}.gguf"));
        let report = export(&original, &made, file_type).expect("a file");
        let off = difference(&logits(&load(&made).decoder, None, &ids), &expected);
        assert!(off <= most, "{file_type:?}: {off}");
        // Metadata are the source's own, but for the type.
        let (here, there) = (
            Gguf::open(&original).expect("a file"),
            Gguf::open(&made).expect("a file"),
        );
        assert_eq!(report.tensors, here.tensors().len());
        for (key, value) in here.metadata().iter() {
            assert!(
                key == "general.file_type" || there.metadata().get(key) == Some(value),
                "{key}"
            );
        }
        // The same type again copies every block.
        let again = place.path().join(format!("{file_type:?}-again.gguf"));
        export(&made, &again, file_type).expect("a file");
        let again = Gguf::open(&again).expect("a file");
        for (one, other) in there.tensors().iter().zip(again.tensors()) {
            assert_eq!(
                (&one.name, one.kind.name()),
                (&other.name, other.kind.name())
            );
            assert!(
                one.bytes.as_ref() == other.bytes.as_ref(),
                "{file_type:?}: {}",
                one.name
            );
        }
        assert_says(&failure(export(&original, &made, file_type)), &["exists"]);
    }
}

/// ΔW of a module.
fn delta(module: &LoraModule) -> Vec<f32> {
    let (a, b) = (module.a.to_vec(), module.b.to_vec());
    let (rank, inputs) = (module.a.rows(), module.a.cols());
    let mut delta = Vec::new();
    for row in b.chunks(rank) {
        for column in 0..inputs {
            let sum: f64 = (0..rank)
                .map(|k| f64::from(row[k]) * f64::from(a[k * inputs + column]))
                .sum();
            delta.push((sum * module.scale) as f32);
        }
    }
    delta
}

fn llama() -> Shapes {
    let config = HfConfig::read(&golden("llama")).expect("config.json");
    Shapes::of_config(&config).expect("a model that llama.cpp has")
}

fn adapter(name: &str) -> (PathBuf, LoraFile) {
    let folder = golden("llama").join(name);
    let file = LoraFile::read(&folder).expect("an adapter");
    (folder, file)
}

#[test]
fn adapters_come_back_from_every_form() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let shapes = llama();
    for name in ["all_linear", "patterns"] {
        let (folder, mut file) = adapter(name);
        // Scales that no single alpha gives.
        file.modules[0].scale *= 3.0;
        for form in [Form::Gguf, Form::Mlx, Form::Loralib, Form::Peft] {
            let output = place.path().join(format!("{name}-{form:?}"));
            let written = file
                .export(&ExportOptions {
                    from: &folder,
                    form,
                    output: &output,
                    dtype: StoredDType::F32,
                    shapes: Some(&shapes),
                    name: "mine",
                    overwrite: false,
                })
                .expect("a file");
            assert_eq!(written.modules, file.modules.len());
            let (found, back) = LoraFile::import(&output, Some(&shapes), None).expect("an adapter");
            assert_eq!(found, form);
            assert_eq!(back.modules.len(), file.modules.len());
            for (here, there) in file.modules.iter().zip(&back.modules) {
                assert_eq!(here.name, there.name, "{form:?}");
                let off = difference(&delta(here), &delta(there));
                assert!(off < 1e-6, "{form:?} {}: {off}", here.name);
            }
            // What comes back is PEFT's folder again, with the same ranks and scales.
            let again = place.path().join(format!("{name}-{form:?}-again"));
            fs::create_dir(&again).expect("a folder");
            back.write(&again, StoredDType::F32).expect("a folder");
            let again = LoraFile::read(&again).expect("an adapter");
            for (here, there) in file.modules.iter().zip(&again.modules) {
                let off = difference(&delta(here), &delta(there));
                assert!(off < 1e-6, "{form:?} {}: {off}", here.name);
            }
        }
    }
}

#[test]
fn rows_of_q_and_k_are_interleaved_for_llama_cpp() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let (shapes, (folder, file)) = (llama(), adapter("all_linear"));
    let output = place.path().join("mine.gguf");
    file.export(&ExportOptions {
        from: &folder,
        form: Form::Gguf,
        output: &output,
        dtype: StoredDType::F32,
        shapes: Some(&shapes),
        name: "mine",
        overwrite: false,
    })
    .expect("a file");
    let gguf = Gguf::open(&output).expect("a file");
    let metadata = gguf.metadata();
    assert_eq!(metadata.get_str("general.type"), Some("adapter"));
    assert_eq!(metadata.get_str("adapter.type"), Some("lora"));
    let config = HfConfig::read(&golden("llama")).expect("config.json");
    let heads = config.usize("num_attention_heads").expect("heads");
    let q = (file.modules.iter())
        .find(|module| module.name.ends_with("layers.0.self_attn.q_proj"))
        .expect("q_proj");
    let (rows, rank) = (q.b.rows(), q.rank());
    let (values, stored) = (
        q.b.to_vec(),
        gguf.f32s("blk.0.attn_q.weight.lora_b").expect("B"),
    );
    // llama.cpp's permute: reshape(heads, 2, d/2, r), swap the middle axes.
    let half = rows / heads / 2;
    for head in 0..heads {
        for (part, i) in (0..2).flat_map(|part| (0..half).map(move |i| (part, i))) {
            let from = (head * 2 + part) * half + i;
            let to = (head * half + i) * 2 + part;
            assert_eq!(values[from * rank..][..rank], stored[to * rank..][..rank]);
        }
    }
    let a = gguf.f32s("blk.0.attn_q.weight.lora_a").expect("A");
    assert_eq!(a, q.a.to_vec());
}

#[test]
fn what_a_form_cannot_hold_is_named() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let shapes = llama();
    let (folder, file) = adapter("tokens");
    let export = |file: &LoraFile, form, output: &Path| {
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
    for form in [Form::Gguf, Form::Mlx, Form::Loralib] {
        let output = place.path().join("x");
        let error = failure(export(&file, form, &output));
        assert_says(&error, &["holds LoRA matrices alone", "embed_tokens"]);
        assert!(!output.exists());
    }
    // An adapter of another model.
    let (_, mut other) = adapter("all_linear");
    other.modules[0].name = "model.layers.99.self_attn.q_proj".to_owned();
    let error = failure(export(&other, Form::Gguf, &place.path().join("y")));
    assert_says(&error, &["layers.99.self_attn.q_proj has no place"]);
    let (_, mut large) = adapter("all_linear");
    let b = large.modules[0].b.clone();
    let values = b.to_vec().into_iter().map(|_| 1e6).collect();
    large.modules[0].b = lowrank::Tensor::from_f32(b.rows(), b.cols(), values);
    let error = large
        .write(place.path(), StoredDType::F16)
        .unwrap_err()
        .to_string();
    assert_says(&error, &["1000000 does not fit in F16"]);
}

#[test]
fn a_merge_into_blocks_says_what_is_left() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let source = Source::find(BUILTIN).expect("a model");
    // An adapter of this model, with values of its own.
    let base = source.clone().load(DType::F32).expect("a model");
    let values = adapter_of(&base.decoder, &lora_config(&["q_proj", "down_proj"]), 3);
    let row = |ids: Vec<u32>| Example {
        supervised: (0..ids.len()).map(|at| at > 2).collect(),
        token_types: Vec::new(),
        label: None,
        line: 1,
        truncated: 0,
        prompt_len: 3,
        ids,
    };
    let rows = [row(vec![1, 2, 3, 4, 5, 6, 7]), row(vec![3, 1, 4, 1, 5, 9])];
    let merge = |file_type, output: &Path, force| {
        merge_gguf(&GgufMergeOptions {
            source: &source,
            adapter: &values,
            rows: &rows,
            ends: &[],
            output,
            file_type,
            overwrite: false,
            force,
        })
    };
    let whole = place.path().join("f32.gguf");
    let report = merge(FileType::F32, &whole, false).expect("a file");
    assert!((report.survived - 1.0).abs() < 1e-4, "{}", report.survived);
    assert!(
        report.max_logit_difference < 1e-3,
        "{}",
        report.max_logit_difference
    );
    assert_eq!(report.greedy[0], report.greedy[1]);
    // What is on disk is what was judged.
    let merged = Source::find(whole.to_str().expect("a name")).expect("a model");
    let merged = merged.load(DType::F32).expect("a model");
    let ids = [1, 2, 3, 4];
    let off = difference(
        &logits(&merged.decoder, None, &ids),
        &logits(&base.decoder, Some(&values), &ids),
    );
    assert!(off < 1e-3, "{off}");
    let coarse = place.path().join("q4.gguf");
    let report = merge(FileType::Q4_0, &coarse, true).expect("kept by force");
    assert!(
        report.survived < 0.999 && report.survived > 0.3,
        "{}",
        report.survived
    );
    assert!(report.modules.iter().all(|module| module.norm > 0.0));
}
