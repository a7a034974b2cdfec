//! Folders that bitsandbytes, GPTQ or AWQ quantized, and models that are quantized while they are loaded.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lowrank::DType;
use lowrank::base::{Network, Source};
use lowrank::bench::write_random_gguf;
use lowrank::export::{FolderType, FourBitKind, write_quantized_folder};
use lowrank::import::import_weights;
use lowrank::kernels::NumberFormat;
use lowrank::model::{LinearId, LinearKind, LoadIn, Part, Purpose, WeightId};
use lowrank_formats::checkpoint::{Checkpoint, StoredDType};
use lowrank_formats::gguf::Gguf;
use lowrank_formats::safetensors_writer::{TensorSpec, write_safetensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::common::{assert_says, failure};
use super::gguf::{assert_computes_the_same, network, small};

/// Type, shape and bytes by name.
type Tensors = BTreeMap<String, (StoredDType, Vec<usize>, Vec<u8>)>;

/// What is done to them.
type Damage<'a> = &'a dyn Fn(&mut Tensors);

const NF4: FolderType = FolderType::FourBit(FourBitKind::Nf4);
const UP: WeightId = WeightId::Linear(
    LinearId {
        layer: 1,
        kind: LinearKind::Up,
    },
    Part::Weight,
);
const UP_NAME: &str = "model.layers.1.mlp.up_proj.weight";

/// A small model in bf16.
fn plain() -> (TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let (file, folder) = (place.path().join("model.gguf"), place.path().join("plain"));
    write_random_gguf(&file, &small(), &|_, _| "BF16").unwrap();
    fs::create_dir(&folder).unwrap();
    import_weights(&Gguf::open(&file).unwrap(), &folder, DType::Bf16).unwrap();
    (place, folder)
}

fn source(folder: &Path) -> Source {
    Source::find(folder.to_str().unwrap()).unwrap()
}

fn loaded_in(folder: &Path, load_in: LoadIn) -> Network {
    let source = source(folder).load_in(Some(load_in)).unwrap();
    let network = source.load_for(DType::Bf16, Purpose::LanguageModel, None, 0);
    network.unwrap()
}

/// The files' tensors, by name.
fn tensors(folder: &Path) -> Tensors {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let names = checkpoint.names();
    names
        .map(|name| {
            let entry = checkpoint.get(name).unwrap();
            let bytes = entry.bytes.as_ref().to_vec();
            (name.to_owned(), (entry.dtype, entry.shape, bytes))
        })
        .collect()
}

fn write_tensors(folder: &Path, tensors: &Tensors) {
    let all: Vec<_> = tensors.iter().collect();
    let specs: Vec<TensorSpec> = (all.iter())
        .map(|(name, (dtype, shape, _))| TensorSpec {
            name: (*name).clone(),
            dtype: *dtype,
            shape: shape.clone(),
        })
        .collect();
    let file = folder.join("model.safetensors");
    write_safetensors(&file, &specs, &BTreeMap::new(), |index, out| {
        out.write_all(&all[index].1.2)
    })
    .unwrap();
}

fn set_quantization(folder: &Path, quantization: Value) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["quantization_config"] = quantization;
    fs::write(&path, config.to_string()).unwrap();
}

#[test]
fn quantized_folders_are_trained_beside_as_they_are() {
    let (place, plain) = plain();
    let unquantized = network(&plain, DType::Bf16).unwrap().decoder;
    for (name, folder_type, format, load_in) in [
        ("NF4", NF4, NumberFormat::Nf4, Some(LoadIn::FourBit)),
        (
            "FP4",
            FolderType::FourBit(FourBitKind::Fp4),
            NumberFormat::Fp4,
            None,
        ),
        (
            "INT8",
            FolderType::EightBit,
            NumberFormat::Int8,
            Some(LoadIn::EightBit),
        ),
    ] {
        let folder = place.path().join(name);
        let report = write_quantized_folder(
            &source(&plain),
            Purpose::LanguageModel,
            folder_type,
            &folder,
            false,
        );
        assert_eq!(report.unwrap().matrices, 2 * 7);
        let stored = network(&folder, DType::Bf16).unwrap().decoder;
        let exact = network(&folder, DType::F32).unwrap().decoder;
        assert_eq!(stored.config().formats.get(&UP), Some(&format));
        let bytes = stored.weights().bytes() as u64;
        assert_eq!(bytes, stored.config().weight_bytes(DType::Bf16));
        assert!(bytes < unquantized.weights().bytes() as u64);
        assert_eq!(
            stored.weights().view(WeightId::Embedding).to_vec(),
            exact.weights().view(WeightId::Embedding).to_vec()
        );
        assert_computes_the_same(&stored, &exact, name);

        // Not more than half a step of the type away from what was quantized.
        let (found, was) = (
            exact.weights().view(UP).to_vec(),
            unquantized.weights().view(UP).to_vec(),
        );
        let largest = was.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        let step = if folder_type == FolderType::EightBit {
            0.6 / 127.0
        } else {
            0.2
        };
        let off = found.iter().zip(&was).map(|(a, b)| (a - b).abs());
        assert!(off.fold(0.0, f32::max) < step * largest, "{name}");

        if let Some(load_in) = load_in {
            let loaded = loaded_in(&plain, load_in).decoder;
            assert_eq!(loaded.config().formats, stored.config().formats);
            for (id, _) in stored.config().weights() {
                let (found, expected) = (loaded.weights().view(id), stored.weights().view(id));
                assert!(found.to_vec() == expected.to_vec(), "{name}, {id:?}");
            }
        }
    }
}

#[test]
fn what_is_quantized_is_not_quantized_again() {
    let (place, plain) = plain();
    let folder = place.path().join("nf4");
    let quantize = |from: &Path, to: &Path| {
        write_quantized_folder(&source(from), Purpose::LanguageModel, NF4, to, false)
    };
    quantize(&plain, &folder).unwrap();
    let words = ["is quantized"];
    assert_says(
        &failure(source(&folder).load_in(Some(LoadIn::FourBit))),
        &words,
    );
    assert_says(
        &failure(quantize(&folder, &place.path().join("again"))),
        &words,
    );
    let gguf = place.path().join("model.gguf");
    assert_says(
        &failure(source(&gguf).load_in(Some(LoadIn::EightBit))),
        &words,
    );
    assert!(quantize(&plain, &folder).is_err(), "a folder that exists");
}

/// Words of four bits that look random.
fn words(count: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    (0..4 * count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

/// A folder with matrices as GPTQ or AWQ stores them, of random words. Of the first layer GPTQ's inputs are in another order.
fn write_grouped(folder: &Path, awq: bool, group: usize) {
    let mut all = tensors(folder);
    let matrices: Vec<String> = (all.keys())
        .filter(|name| name.ends_with("_proj.weight"))
        .cloned()
        .collect();
    for (seed, name) in matrices.into_iter().enumerate() {
        let (_, shape, _) = all.remove(&name).unwrap();
        let (outs, inputs) = (shape[0], shape[1]);
        let groups = inputs / group;
        let module = name.strip_suffix("weight").unwrap();
        let i32s = StoredDType::Other("I32");
        let (rows, cols) = if awq {
            (inputs, outs / 8)
        } else {
            (inputs / 8, outs)
        };
        all.insert(
            format!("{module}qweight"),
            (i32s, vec![rows, cols], words(rows * cols, seed as u32)),
        );
        all.insert(
            format!("{module}qzeros"),
            (i32s, vec![groups, outs / 8], words(groups * outs / 8, 99)),
        );
        let scales = (0..groups * outs).flat_map(|i| {
            let scale = 1e-3 * (1.0 + (i as f32).sin().abs());
            half::f16::from_f32(scale).to_le_bytes()
        });
        all.insert(
            format!("{module}scales"),
            (StoredDType::F16, vec![groups, outs], scales.collect()),
        );
        if !awq {
            let order = (0..inputs).flat_map(|i| {
                let i = if name.contains(".0.") {
                    i * 7 % inputs
                } else {
                    i
                };
                ((i / group) as i32).to_le_bytes()
            });
            all.insert(
                format!("{module}g_idx"),
                (i32s, vec![inputs], order.collect()),
            );
        }
    }
    write_tensors(folder, &all);
    let method = if awq { "awq" } else { "gptq" };
    set_quantization(
        folder,
        json!({"quant_method": method, "bits": 4, "group_size": group}),
    );
}

#[test]
fn grouped_folders_are_trained_beside_as_they_are() {
    for (awq, group) in [(true, 128), (true, 64), (false, 128), (false, 32)] {
        let (_place, folder) = plain();
        write_grouped(&folder, awq, group);
        let stored = network(&folder, DType::Bf16).unwrap().decoder;
        let exact = network(&folder, DType::F32).unwrap().decoder;
        assert_eq!(stored.config().formats.get(&UP), Some(&NumberFormat::Int4));
        let first = WeightId::Linear(
            LinearId {
                layer: 0,
                kind: LinearKind::Up,
            },
            Part::Weight,
        );
        // In another order they are held as the numbers that they stand for, which bf16 rounds.
        assert_eq!(stored.config().formats.contains_key(&first), awq);
        let bytes = stored.weights().bytes() as u64;
        assert_eq!(bytes, stored.config().weight_bytes(DType::Bf16));
        if awq {
            assert_computes_the_same(&stored, &exact, "AWQ");
        } else {
            let (found, wide) = (
                stored.weights().view(UP).to_vec(),
                exact.weights().view(UP).to_vec(),
            );
            assert_eq!(found, wide);
            let (found, wide) = (
                stored.weights().view(first).to_vec(),
                exact.weights().view(first).to_vec(),
            );
            let rounded = wide.iter().map(|x| half::bf16::from_f32(*x).to_f32());
            assert!(found.iter().copied().eq(rounded));
        }
    }
}

#[test]
fn damaged_quantized_folders_are_named() {
    let (place, plain) = plain();
    let folder = place.path().join("nf4");
    write_quantized_folder(&source(&plain), Purpose::LanguageModel, NF4, &folder, false).unwrap();
    let whole = tensors(&folder);
    let state = format!("{UP_NAME}.quant_state.bitsandbytes__nf4");
    let absmax = format!("{UP_NAME}.absmax");
    let nested = format!("{UP_NAME}.nested_absmax");
    let cases: [(Damage<'_>, &[&str]); 6] = [
        (
            &|all| drop(all.remove(&absmax)),
            &[UP_NAME, ".absmax", "is missing"],
        ),
        (&|all| drop(all.remove(&state)), &[UP_NAME]),
        (
            &|all| {
                let state = all.get_mut(&state).unwrap();
                state.2[0] = b'x';
            },
            &[".quant_state", "is not JSON"],
        ),
        (
            &|all| {
                let (_, shape, bytes) = all.get_mut(&absmax).unwrap();
                shape[0] -= 1;
                bytes.pop();
            },
            &[".absmax", "needs U8"],
        ),
        (
            &|all| {
                let bytes = &mut all.get_mut(&nested).unwrap().2;
                bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
            },
            &[".nested_absmax", "NaN"],
        ),
        (
            &|all| {
                let map = all.get_mut(&format!("{UP_NAME}.quant_map")).unwrap();
                map.2[..4].copy_from_slice(&(-2.0_f32).to_le_bytes());
            },
            &[UP_NAME, "not those of NF4"],
        ),
    ];
    for (damage, words) in cases {
        let mut all = whole.clone();
        damage(&mut all);
        write_tensors(&folder, &all);
        assert_says(&failure(network(&folder, DType::Bf16)), words);
    }
    let (_place, folder) = self::plain();
    write_grouped(&folder, false, 128);
    let whole = tensors(&folder);
    let module = UP_NAME.strip_suffix("weight").unwrap();
    for (part, words) in [
        ("scales", "is missing"),
        ("qzeros", "is missing"),
        ("g_idx", "names a group"),
    ] {
        let mut all = whole.clone();
        if part == "g_idx" {
            all.get_mut(&format!("{module}{part}")).unwrap().2[..4].fill(0x7f);
        } else {
            all.remove(&format!("{module}{part}"));
        }
        write_tensors(&folder, &all);
        assert_says(
            &failure(network(&folder, DType::Bf16)),
            &[module, part, words],
        );
    }
    set_quantization(&folder, json!({"quant_method": "gptq", "bits": 3}));
    assert_says(
        &failure(network(&folder, DType::Bf16)),
        &["quantization_config.bits", "is 3", "accepted: 4"],
    );
}
