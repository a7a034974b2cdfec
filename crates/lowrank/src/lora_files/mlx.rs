//! LoRA adapters of mlx-lm: `adapters.safetensors` and `adapter_config.json`.
//!
//! Its matrices are the transposes of PEFT's, `lora_a` [in, r] and `lora_b` [r, out], and what they make is multiplied with one `scale`, which is alpha / r
//! already. Every module has the same rank: smaller ones are filled up with zeros, which add nothing. With DoRA (`fine_tune_type` "dora") each has its
//! magnitudes `m` \[out\], too.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lowrank_formats::checkpoint::{StoredDType, TensorEntry, check_finite};
use lowrank_formats::safetensors_writer::{TensorSpec, write_safetensors};
use lowrank_formats::{Checkpoint, FormatError, HfConfig, atomic};
use lowrank_kernels::Tensor;
use serde_json::{Map, Value, json};

use super::gguf::{Written, from_modules, refuse_others};
use super::{LoraFile, LoraModule, check_fits, magnitude_of, most_common, stored_bytes};
use crate::Error;

/// The weights of an adapter of mlx-lm.
pub const MLX_WEIGHTS: &str = "adapters.safetensors";
/// Its configuration, which has the name of PEFT's.
pub const MLX_CONFIG: &str = "adapter_config.json";

/// What `fine_tune_type` says of an adapter with and without magnitudes.
const LORA: &str = "lora";
const DORA: &str = "dora";
/// The name of a module's magnitudes.
const MAGNITUDE: &str = "m";

/// Writes mlx-lm's two files into a folder, which exists.
///
/// # Errors
/// Tensors that belong to no linear; modules outside of the blocks, which mlx-lm does not adapt; a value that `dtype` does not hold; a file
/// that cannot be written.
pub fn write(file: &LoraFile, folder: &Path, dtype: StoredDType) -> Result<Written, Error> {
    refuse_others(
        file,
        "an adapter of mlx-lm",
        "merge it, and use the model, which mlx-lm reads",
    )?;
    let path = folder.join(MLX_WEIGHTS);
    let mut keys = BTreeSet::new();
    let mut problems = Vec::new();
    for module in &file.modules {
        match in_layer(&module.name) {
            Some((_, key)) => drop(keys.insert(key)),
            None => problems.push(format!(
                "{} is in no block, and mlx-lm adapts the linears of blocks alone; merge the adapter, and use the model",
                module.name
            )),
        }
    }
    if !problems.is_empty() {
        return Err(Error::Tensors { path, problems });
    }
    let rank = file.modules.iter().map(LoraModule::rank).max().unwrap_or(1);
    let scale = most_common(file.modules.iter().map(|module| module.scale));
    let mut specs = Vec::new();
    let mut tensors = Vec::new();
    let mut folded = 0;
    for module in &file.modules {
        let factor = (module.scale / scale) as f32;
        folded += usize::from(factor != 1.0);
        let a = transposed(&module.a, (module.a.cols(), rank), 1.0);
        let b = transposed(&module.b, (rank, module.b.rows()), factor);
        for (part, tensor) in [("a", a), ("b", b)] {
            let name = format!("{}.lora_{part}", mlx_name(&module.name));
            check_fits(&path, &name, &tensor, dtype)?;
            specs.push(TensorSpec {
                name,
                dtype,
                shape: vec![tensor.rows(), tensor.cols()],
            });
            tensors.push(tensor);
        }
        if let Some(magnitude) = &module.magnitude {
            let name = format!("{}.{MAGNITUDE}", mlx_name(&module.name));
            check_fits(&path, &name, magnitude, dtype)?;
            specs.push(TensorSpec {
                name,
                dtype,
                shape: vec![magnitude.cols()],
            });
            tensors.push(magnitude.clone());
        }
    }
    write_safetensors(&path, &specs, &BTreeMap::new(), |index, out| {
        out.write_all(&stored_bytes(&tensors[index], dtype))
    })?;
    let config = json!({
        "fine_tune_type": if file.config.use_dora { DORA } else { LORA },
        "lora_parameters": {
            "dropout": file.config.lora_dropout,
            "keys": keys,
            "rank": rank,
            "scale": scale,
        },
        "model": file.config.base_model_name_or_path,
        // All of them.
        "num_layers": -1,
    });
    atomic::write_file(&folder.join(MLX_CONFIG), |out| {
        out.write_all(format!("{config:#}\n").as_bytes())
    })?;
    Ok(Written {
        modules: file.modules.len(),
        alpha: Some(scale * rank as f64),
        folded,
    })
}

/// The layer of a module, and its name in there.
fn in_layer(name: &str) -> Option<(usize, String)> {
    let parts: Vec<&str> = name.split('.').collect();
    let at = parts
        .iter()
        .position(|part| part.parse::<usize>().is_ok())?;
    let key = parts[at + 1..].join(".");
    (!key.is_empty()).then_some((parts[at].parse().ok()?, key))
}

/// mlx-lm calls GPT-2's blocks otherwise than transformers does.
fn mlx_name(name: &str) -> String {
    name.strip_prefix("transformer.h.")
        .map_or_else(|| name.to_owned(), |rest| format!("model.h.{rest}"))
}

fn peft_name(name: &str) -> String {
    name.strip_prefix("model.h.")
        .map_or_else(|| name.to_owned(), |rest| format!("transformer.h.{rest}"))
}

/// The transpose, times `factor`, with zeros up to a shape.
fn transposed(from: &Tensor, (rows, cols): (usize, usize), factor: f32) -> Tensor {
    let mut values = vec![0.0; rows * cols];
    for (i, line) in from.to_vec().chunks_exact(from.cols()).enumerate() {
        for (j, value) in line.iter().enumerate() {
            values[j * cols + i] = value * factor;
        }
    }
    Tensor::from_f32(rows, cols, values)
}

/// Reads mlx-lm's folder, with the names that PEFT would give it.
///
/// # Errors
/// Files that are missing or damaged; another method than LoRA; a module with one matrix alone, or with matrices that do not fit each other.
pub fn read(folder: &Path) -> Result<LoraFile, Error> {
    let config_path = folder.join(MLX_CONFIG);
    let map = read_config(&config_path)?;
    let config = HfConfig::from_map(&config_path, map);
    match config.opt_str("fine_tune_type")? {
        None | Some(LORA | DORA) => {}
        Some(_) => {
            let accepted = format!("\"{LORA}\" and \"{DORA}\"");
            return Err(config.unsupported("fine_tune_type", accepted).into());
        }
    }
    let has_magnitudes = config.opt_str("fine_tune_type")? == Some(DORA);
    let Some(parameters) = config.opt_object("lora_parameters")? else {
        return Err(config
            .unsupported("lora_parameters", "an object with rank and scale")
            .into());
    };
    let scale = parameters.f64("scale")?;
    let weights = Checkpoint::open(&folder.join(MLX_WEIGHTS))?;
    let mut pairs: BTreeMap<String, [Option<TensorEntry>; 2]> = BTreeMap::new();
    let mut magnitudes: BTreeMap<String, TensorEntry> = BTreeMap::new();
    let mut problems = Vec::new();
    for name in weights.names() {
        let of_magnitudes = name.strip_suffix(MAGNITUDE);
        let of_magnitudes = of_magnitudes.and_then(|stem| stem.strip_suffix('.'));
        if let Some(module) = of_magnitudes.filter(|_| has_magnitudes) {
            magnitudes.extend(weights.find(name)?.map(|entry| (peft_name(module), entry)));
            continue;
        }
        let stem = ["a", "b"].map(|part| name.strip_suffix(&format!(".lora_{part}")));
        match stem {
            [Some(module), None] => {
                pairs.entry(peft_name(module)).or_default()[0] = weights.find(name)?;
            }
            [None, Some(module)] => {
                pairs.entry(peft_name(module)).or_default()[1] = weights.find(name)?;
            }
            _ => problems.push(format!("tensor `{name}` is neither a lora_a nor a lora_b")),
        }
    }
    check_finite(
        pairs
            .values()
            .flatten()
            .flatten()
            .chain(magnitudes.values()),
    )?;
    let mut modules = Vec::new();
    for (name, pair) in pairs {
        let magnitude = magnitudes.remove(&name);
        if has_magnitudes && magnitude.is_none() {
            problems.push(format!("{name} has no magnitudes, `{MAGNITUDE}`"));
        }
        match module(name, pair, scale).and_then(|module| with(module, magnitude)) {
            Ok(module) => modules.push(module),
            Err(problem) => problems.push(problem),
        }
    }
    let left = magnitudes.keys();
    problems.extend(left.map(|name| format!("{name} has magnitudes, but no lora_a and lora_b")));
    if modules.is_empty() && problems.is_empty() {
        problems.push("there is no tensor of a LoRA in it".to_owned());
    }
    if !problems.is_empty() {
        return Err(Error::Tensors {
            path: weights.path().to_path_buf(),
            problems,
        });
    }
    let mut file = from_modules(modules, None);
    file.config.use_dora = has_magnitudes;
    file.config.base_model_name_or_path = config.opt_str("model")?.map(str::to_owned);
    file.config.lora_dropout = parameters.opt_f64("dropout")?.unwrap_or(0.0);
    Ok(file)
}

fn read_config(path: &Path) -> Result<Map<String, Value>, FormatError> {
    let text = std::fs::read_to_string(path).map_err(|error| FormatError::Missing {
        path: path.to_path_buf(),
        problem: format!(
            "cannot be read ({error}); an adapter of mlx-lm is a folder with {MLX_CONFIG} and {MLX_WEIGHTS}"
        ),
    })?;
    serde_json::from_str(&text).map_err(|error| FormatError::Malformed {
        path: path.to_path_buf(),
        problem: format!("is not a JSON object ({error})"),
    })
}

fn module(name: String, pair: [Option<TensorEntry>; 2], scale: f64) -> Result<LoraModule, String> {
    let [Some(a), Some(b)] = pair else {
        return Err(format!("{name} has one of lora_a and lora_b alone"));
    };
    let (&[input, r], &[b_rows, output]) = (a.shape.as_slice(), b.shape.as_slice()) else {
        return Err(format!(
            "{name}: lora_a {:?} and lora_b {:?} are no matrices",
            a.shape, b.shape
        ));
    };
    if r != b_rows || r == 0 {
        return Err(format!(
            "{name}: lora_a {:?} and lora_b {:?} are not of one rank",
            a.shape, b.shape
        ));
    }
    let values = |entry: &TensorEntry| entry.to_f32().map_err(|error| error.to_string());
    let a = Tensor::from_f32(input, r, values(&a)?);
    let b = Tensor::from_f32(r, output, values(&b)?);
    Ok(LoraModule {
        name,
        a: transposed(&a, (r, input), 1.0),
        b: transposed(&b, (output, r), 1.0),
        scale,
        magnitude: None,
    })
}

/// The module with its magnitudes, where there are some.
fn with(module: LoraModule, magnitude: Option<TensorEntry>) -> Result<LoraModule, String> {
    let magnitude = match magnitude {
        None => None,
        Some(entry) => Some(magnitude_of(&module.name, &entry, module.b.rows())?),
    };
    Ok(LoraModule {
        magnitude,
        ..module
    })
}
