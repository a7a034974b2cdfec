//! LoRA adapters of llama.cpp: a GGUF file of the type `adapter`, as its `convert_lora_to_gguf.py` writes it.
//!
//! Such a file has one alpha, and llama.cpp multiplies with alpha / r, where r is that of each module. Scales that do not follow from it
//! are folded into B. The rows of a B beside rows that the converter interleaves are interleaved in the same way.

use std::collections::BTreeMap;
use std::path::Path;

use lowrank_formats::FormatError;
use lowrank_formats::checkpoint::StoredDType;
use lowrank_formats::gguf::{GgmlType, Gguf, GgufSpec, GgufTensor, KeyValue, write_gguf};
use lowrank_formats::gguf_model::{Change, GgufWeight, Place, Shapes};
use lowrank_formats::peft::{LoraConfig, TargetModules};
use lowrank_kernels::Tensor;
use serde::Serialize;

use super::{LoraFile, LoraModule, check_fits, most_common, refuse_magnitudes, sort, stored_bytes};
use crate::Error;
use crate::model::stored::for_rows;

/// What was written.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Written {
    /// Modules.
    pub modules: usize,
    /// The alpha that the file says for all of them; `None` where it says none.
    pub alpha: Option<f64>,
    /// Modules whose scale is another one, which B was multiplied with.
    pub folded: usize,
}

/// Refuses what a format without a place for it would lose.
pub(super) fn refuse_others(file: &LoraFile, format: &str, mend: &str) -> Result<(), Error> {
    let names: Vec<&str> = file
        .others
        .iter()
        .map(|entry| {
            let name = entry.name.as_str();
            name.strip_prefix("base_model.model.").unwrap_or(name)
        })
        .collect();
    if names.is_empty() {
        return Ok(());
    }
    Err(Error::Settings(format!(
        "{format} holds LoRA matrices alone, and this adapter also has {}; {mend}",
        names.join(", ")
    )))
}

/// Writes an adapter for a model of these shapes. `name` is `general.name`.
///
/// # Errors
/// Modules that llama.cpp's model does not have, or that are of other shapes there; tensors that belong to no linear; a value that `dtype`
/// does not hold; a file that cannot be written.
pub fn write(
    file: &LoraFile,
    shapes: &Shapes,
    path: &Path,
    name: &str,
    dtype: StoredDType,
) -> Result<Written, Error> {
    let (form, mend) = ("an adapter of llama.cpp", "merge it, and export the model");
    refuse_others(file, form, mend)?;
    refuse_magnitudes(file, &format!("{form} holds LoRA matrices alone"), mend)?;
    let places: BTreeMap<String, Place> = (shapes.places().into_iter())
        .map(|place| (place.name.clone(), place))
        .collect();
    let alphas = file.modules.iter().map(|m| m.scale * m.rank() as f64);
    let alpha = most_common(alphas) as f32;
    let kind = match dtype {
        StoredDType::F16 => "F16",
        StoredDType::BF16 => "BF16",
        _ => "F32",
    };
    let kind =
        GgmlType::named(kind).ok_or_else(|| Error::Settings(format!("{kind} is not known")))?;
    let (mut specs, mut tensors, mut problems, mut folded) =
        (Vec::new(), Vec::new(), Vec::new(), 0);
    for module in &file.modules {
        let place = match place_of(&places, module, shapes) {
            Ok(place) => place,
            Err(problem) => {
                problems.push(problem);
                continue;
            }
        };
        let own = module.scale / (f64::from(alpha) / module.rank() as f64);
        let factor = own as f32;
        folded += usize::from(factor != 1.0);
        let b = moved(
            &module.b,
            |row, rows| place.change.source(row, rows),
            factor,
        );
        for (part, tensor) in [("a", module.a.clone()), ("b", b)] {
            let name = format!("{}.lora_{part}", place.gguf);
            check_fits(path, &name, &tensor, dtype)?;
            specs.push(GgufSpec {
                name,
                kind,
                shape: vec![tensor.rows(), tensor.cols()],
            });
            tensors.push(tensor);
        }
    }
    if !problems.is_empty() {
        return Err(Error::Tensors {
            path: path.to_path_buf(),
            problems,
        });
    }
    let text = |text: &str| KeyValue::String(text.to_owned());
    let keys = [
        ("general.architecture", text(shapes.architecture())),
        ("general.type", text("adapter")),
        ("adapter.type", text("lora")),
        ("adapter.lora.alpha", KeyValue::F32(alpha)),
        ("general.name", text(name)),
        ("general.file_type", KeyValue::U32(file_type(dtype))),
        ("general.quantization_version", KeyValue::U32(2)),
    ]
    .map(|(key, value)| (key.to_owned(), value));
    write_gguf(path, &keys, &specs, |index, out| {
        out.write_all(&stored_bytes(&tensors[index], dtype))
    })?;
    Ok(Written {
        modules: file.modules.len(),
        alpha: Some(f64::from(alpha)),
        folded,
    })
}

/// llama.cpp's number of a file of one type (`llama_ftype`).
pub(crate) fn file_type(dtype: StoredDType) -> u32 {
    match dtype {
        StoredDType::F16 => 1,
        StoredDType::BF16 => 32,
        _ => 0,
    }
}

fn place_of<'a>(
    places: &'a BTreeMap<String, Place>,
    module: &LoraModule,
    shapes: &Shapes,
) -> Result<&'a Place, String> {
    let name = &module.name;
    let Some(place) = places.get(&format!("{name}.weight")) else {
        return Err(format!(
            "{name} has no place in llama.cpp's {}",
            shapes.architecture()
        ));
    };
    let shape = [module.b.rows(), module.a.cols()];
    if place.shape != shape {
        return Err(format!(
            "{name} is adapted as {shape:?}, and the model's is {:?}: the adapter is for another model",
            place.shape
        ));
    }
    Ok(place)
}

/// A matrix whose row `to(i)` is row `i`, times `factor`.
fn moved(b: &Tensor, to: impl Fn(usize, usize) -> usize, factor: f32) -> Tensor {
    let (rows, cols) = (b.rows(), b.cols());
    let mut values = vec![0.0; rows * cols];
    for (row, line) in b.to_vec().chunks_exact(cols).enumerate() {
        let start = to(row, rows) * cols;
        for (to, from) in values[start..start + cols].iter_mut().zip(line) {
            *to = from * factor;
        }
    }
    Tensor::from_f32(rows, cols, values)
}

/// Reads an adapter for a model of these shapes, with the names that PEFT would give it.
///
/// # Errors
/// A file that is no such adapter, is damaged, or is of another architecture or for a model of other shapes; the message names the tensor or key.
pub fn read(path: &Path, shapes: &Shapes) -> Result<LoraFile, Error> {
    let gguf = Gguf::open(path)?;
    let alpha = check_keys(&gguf, shapes)?;
    let places: BTreeMap<String, Place> = (shapes.places().into_iter())
        .map(|place| (place.gguf.clone(), place))
        .collect();
    let mut pairs: BTreeMap<&str, [Option<&GgufTensor>; 2]> = BTreeMap::new();
    let mut problems = Vec::new();
    for tensor in gguf.tensors() {
        let pair = ["lora_a", "lora_b"].map(|part| {
            let stem = tensor.name.strip_suffix(part)?;
            stem.strip_suffix('.')
        });
        match pair
            .iter()
            .position(Option::is_some)
            .zip(pair.into_iter().flatten().next())
        {
            Some((part, stem)) => pairs.entry(stem).or_default()[part] = Some(tensor),
            None => problems.push(format!(
                "tensor `{}` is neither a lora_a nor a lora_b",
                tensor.name
            )),
        }
    }
    let mut modules = Vec::new();
    for (stem, pair) in pairs {
        let Some(place) = places.get(stem) else {
            problems.push(format!(
                "tensor `{stem}.lora_a` has no place in a {} of these shapes",
                shapes.architecture()
            ));
            continue;
        };
        match module(place, pair, alpha)? {
            Ok(module) => modules.push(module),
            Err(problem) => problems.push(problem),
        }
    }
    if modules.is_empty() && problems.is_empty() {
        problems.push("there is no tensor of a LoRA in it".to_owned());
    }
    if !problems.is_empty() {
        return Err(Error::Tensors {
            path: path.to_path_buf(),
            problems,
        });
    }
    Ok(from_modules(modules, Some(shapes.layers())))
}

/// A file with PEFT's defaults around modules of a model that has so many layers, if that is known.
pub(super) fn from_modules(mut modules: Vec<LoraModule>, layers: Option<usize>) -> LoraFile {
    sort(&mut modules);
    let mut file = LoraFile {
        config: LoraConfig {
            inference_mode: true,
            task_type: Some("CAUSAL_LM".to_owned()),
            ..LoraConfig::default()
        },
        modules,
        others: Vec::new(),
        metadata: BTreeMap::new(),
    };
    file.config.target_modules = TargetModules::List(file.names_of_modules(layers));
    file.config = file.config_of_modules();
    file
}

/// Checks what kind of file it is; what comes of it is its alpha.
fn check_keys(gguf: &Gguf, shapes: &Shapes) -> Result<f64, FormatError> {
    let metadata = gguf.metadata();
    let field = |key: &str, accepted: &str| {
        let found = metadata.get(key);
        FormatError::Field {
            path: gguf.path().to_path_buf(),
            field: key.to_owned(),
            found: found.map_or_else(|| "is missing".to_owned(), |value| format!("is {value}")),
            accepted: accepted.to_owned(),
        }
    };
    for (key, expected) in [
        ("general.type", "adapter"),
        ("adapter.type", "lora"),
        ("general.architecture", shapes.architecture()),
    ] {
        if metadata.get_str(key) != Some(expected) {
            return Err(field(key, &format!("{expected:?}")));
        }
    }
    match metadata.get_f64("adapter.lora.alpha") {
        Some(alpha) if alpha.is_finite() => Ok(alpha),
        _ => Err(field("adapter.lora.alpha", "a finite number")),
    }
}

fn module(
    place: &Place,
    pair: [Option<&GgufTensor>; 2],
    alpha: f64,
) -> Result<Result<LoraModule, String>, Error> {
    let [Some(a), Some(b)] = pair else {
        return Ok(Err(format!(
            "{} has one of lora_a and lora_b alone",
            place.gguf
        )));
    };
    let rank = a.shape.first().copied().unwrap_or(0);
    let expected = [[rank, place.shape[1]], [place.shape[0], rank]];
    if rank == 0 || a.shape != expected[0] || b.shape != expected[1] {
        return Ok(Err(format!(
            "{}: lora_a {:?} and lora_b {:?} do not fit a weight {:?}",
            place.gguf, a.shape, b.shape, place.shape
        )));
    }
    let values = |tensor: &GgufTensor, change: Change| -> Result<Tensor, Error> {
        let weight = GgufWeight {
            name: tensor.name.clone(),
            tensor: tensor.clone(),
            change,
        };
        let mut values = Vec::with_capacity(tensor.len());
        for_rows(&weight, |row| {
            values.extend_from_slice(row);
            Ok(())
        })?;
        Ok(Tensor::from_f32(tensor.rows(), tensor.columns(), values))
    };
    Ok(Ok(LoraModule {
        name: place.name.trim_end_matches(".weight").to_owned(),
        a: values(a, Change::None)?,
        b: values(b, place.change)?,
        // llama.cpp takes an alpha of zero for none.
        scale: if alpha == 0.0 {
            1.0
        } else {
            alpha / rank as f64
        },
        magnitude: None,
    }))
}
