//! GPT-2 quantized: a folder has its matrices as [in, out], and blocks have rows of [out, in].

use std::fs;
use std::path::{Path, PathBuf};

use lowrank::DType;
use lowrank::base::{BUILTIN_FILES, Network, Source};
use lowrank::export::FileType;
use lowrank::import::import_gguf;
use lowrank::kernels::{NumberFormat, Tensor};
use lowrank::model::families::read_config;
use lowrank::model::{
    Adapter, Decoder, Layout, LinearId, LinearKind, LoadIn, Part, Purpose, WeightId,
};
use lowrank::tuning::full::{inject, random_weights, save_weights};
use lowrank_formats::checkpoint::Checkpoint;
use lowrank_formats::hf_config::HfConfig;
use serde_json::json;
use tempfile::TempDir;

use super::common::{assert_says, difference, failure, ids, logits};
use super::exporting::export;
use super::gguf::{assert_computes_the_same, network};

const DOWN: WeightId = WeightId::Linear(
    LinearId {
        layer: 1,
        kind: LinearKind::Down,
    },
    Part::Weight,
);

/// A random GPT-2 whose rows are whole blocks of 256, with the built-in model's tokenizer.
fn plain() -> (TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("plain");
    fs::create_dir(&folder).unwrap();
    for (name, bytes) in BUILTIN_FILES {
        if !["config.json", "model.safetensors"].contains(name) {
            fs::write(folder.join(name), bytes).unwrap();
        }
    }
    let config = json!({
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 2048, "n_embd": 256, "n_inner": 512, "n_layer": 2,
        "n_head": 4, "n_positions": 64, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "bos_token_id": 0,
        "eos_token_id": 0,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let config = read_config(&HfConfig::read(&folder).unwrap()).unwrap();
    let mut adapter = inject(&random_weights(config.clone(), 0.1, 3).unwrap());
    // Biases and norms of their own.
    for (slot, (id, _)) in config.weights().iter().enumerate() {
        if id.is_vector() {
            let values = adapter.params.view_mut(slot);
            let shift = |(i, x): (usize, f32)| x + ((i * 7 + slot) as f32).sin() * 0.1;
            let moved = values.to_vec().into_iter().enumerate().map(shift).collect();
            let moved = Tensor::from_f32(1, values.cols(), moved);
            adapter.params.view_mut(slot).copy_from(moved.view());
        }
    }
    save_weights(&config, &adapter, &folder, DType::F32).unwrap();
    (place, folder)
}

fn copied_config(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
}

/// The numbers that a quantized model stands for, in a folder of f32.
fn widened(stored: &Decoder, plain: &Path, folder: &Path) -> Decoder {
    copied_config(plain, folder);
    let adapter: Adapter = inject(stored.weights());
    save_weights(stored.config(), &adapter, folder, DType::F32).unwrap();
    let exact = network(folder, DType::F32).unwrap();
    let exact = std::sync::Arc::into_inner(exact.decoder).expect("nothing else has it");
    assert_eq!(exact.config().layout, Layout::InOut);
    exact
}

fn loaded_in(folder: &Path, load_in: LoadIn) -> Network {
    let source = Source::find(folder.to_str().unwrap()).unwrap();
    let source = source.load_in(Some(load_in)).unwrap();
    let loaded = source.load_for(DType::Bf16, Purpose::LanguageModel, None, 0);
    loaded.unwrap()
}

#[test]
fn a_folder_is_quantized_while_it_is_loaded() {
    let (place, plain) = plain();
    let whole = network(&plain, DType::F32).unwrap().decoder;
    for (load_in, format, most) in [
        (LoadIn::FourBit, NumberFormat::Nf4, 0.4),
        (LoadIn::EightBit, NumberFormat::Int8, 0.02),
    ] {
        let stored = loaded_in(&plain, load_in).decoder;
        assert_eq!(stored.config().formats.get(&DOWN), Some(&format));
        assert_eq!(stored.weights().view(DOWN).rows(), 256);
        let bytes = stored.weights().bytes() as u64;
        assert_eq!(bytes, stored.config().weight_bytes(DType::Bf16));
        let folder = place.path().join(format.to_string());
        let exact = widened(&stored, &plain, &folder);
        assert_computes_the_same(&stored, &exact, &format.to_string());
        let ids = ids(40, 5);
        let off = difference(&logits(&exact, None, &ids), &logits(&whole, None, &ids));
        assert!(off < most && off > 1e-4, "{format}: {off}");
    }
}

#[test]
fn a_gguf_file_is_trained_beside_as_it_is() {
    let (place, plain) = plain();
    let whole = network(&plain, DType::F32).unwrap().decoder;
    for (file_type, format, most) in [
        (FileType::F32, NumberFormat::F32, 1e-5),
        (FileType::F16, NumberFormat::F16, 1e-2),
        (FileType::Q8_0, NumberFormat::Q8_0, 5e-2),
        (FileType::Q4_0, NumberFormat::Q4_0, 0.5),
        (FileType::Q5KS, NumberFormat::Q5K, 0.2),
        (FileType::Q6K, NumberFormat::Q6K, 0.1),
    ] {
        let file = place.path().join(format!("{format}.gguf"));
        export(&plain, &file, file_type).unwrap();
        let exact = network(&file, DType::F32).unwrap().decoder;
        let ids = ids(40, 5);
        let off = difference(&logits(&exact, None, &ids), &logits(&whole, None, &ids));
        assert!(off < most, "{format}: {off}");
        // As a folder its matrices lie the other way again.
        let folder = place.path().join(format.to_string());
        import_gguf(&file, &folder, DType::F32, false).unwrap();
        let imported = network(&folder, DType::F32).unwrap().decoder;
        assert_eq!(imported.config().layout, Layout::InOut);
        assert_computes_the_same(&exact, &imported, &format.to_string());
        if file_type == FileType::F32 {
            let (here, there) = (
                Checkpoint::open(&plain).unwrap(),
                Checkpoint::open(&folder).unwrap(),
            );
            for name in here.names() {
                let (here, there) = (here.get(name).unwrap(), there.get(name).unwrap());
                assert_eq!(here.shape, there.shape, "{name}");
                assert!(here.to_f32().unwrap() == there.to_f32().unwrap(), "{name}");
            }
            continue;
        }
        let stored = network(&file, DType::Bf16).unwrap().decoder;
        assert_eq!(stored.weights().view(DOWN).format(), format);
        let bytes = stored.weights().bytes() as u64;
        assert_eq!(bytes, stored.config().weight_bytes(DType::Bf16));
        // Positions are f32 in the file, and bf16 beside blocks.
        let folder = place.path().join(format!("{format}-widened"));
        let exact = widened(&stored, &plain, &folder);
        assert_computes_the_same(&stored, &exact, &format.to_string());
        // The file goes out again as it is.
        let again = place.path().join("again.gguf");
        export(&file, &again, file_type).unwrap();
        let again = network(&again, DType::Bf16).unwrap().decoder;
        assert!(logits(&again, None, &ids) == logits(&stored, None, &ids));
        fs::remove_file(place.path().join("again.gguf")).unwrap();
    }
}

#[test]
fn matrices_that_lie_the_other_way_are_not_saved_so() {
    let (_place, plain) = plain();
    let stored = loaded_in(&plain, LoadIn::FourBit).decoder;
    let mut config = lowrank::train::TrainConfig::new(lowrank::tuning::Method::Top, "", "", "");
    config.options.top.top_layers = Some(1);
    assert_says(
        &failure(config.lay_out(stored.config())),
        &["top", "quantized gpt2", "the other way"],
    );
}
