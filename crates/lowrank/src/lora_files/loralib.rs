//! LoRA matrices with the names of loralib's `lora_state_dict`, in a safetensors file.
//!
//! loralib saves what PyTorch pickles; safetensors is what can be read without running code. `lora_A` is [r, in] and `lora_B` [out, r],
//! beside `weight` in its layer. A fused q, k and v (`MergedLinear`) has an A of r rows for each part that is adapted, and a B of r columns.
//! The program that loads it says r and alpha itself; the file's metadata repeats them.

use std::collections::BTreeMap;
use std::path::Path;

use lowrank_formats::checkpoint::{StoredDType, TensorEntry, check_finite};
use lowrank_formats::peft::FUSED_PARTS;
use lowrank_formats::safetensors_writer::{TensorSpec, write_safetensors};
use lowrank_formats::{Checkpoint, Format, FormatError};
use lowrank_kernels::Tensor;

use super::gguf::{Written, from_modules, refuse_others};
use super::{LoraFile, LoraModule, check_fits, most_common, refuse_magnitudes, stored_bytes};
use crate::Error;

/// Metadata: what loralib's layers are to be made with.
const ALPHA: &str = "lora_alpha";
const RANK: &str = "r";

/// The parts of a fused linear, in its order.
const PARTS: [&str; 3] = ["q", "k", "v"];

/// Parts of fused linears that are adapted, with their ranks, by module.
type Parts = BTreeMap<String, Vec<(String, usize)>>;

/// A matrix by its name in the file.
type Named = (String, Tensor);

/// Writes the file.
///
/// # Errors
/// Tensors that belong to no linear; parts of a fused linear with ranks of their own; a value that `dtype` does not hold; a file that cannot be
/// written.
pub fn write(file: &LoraFile, path: &Path, dtype: StoredDType) -> Result<Written, Error> {
    let (form, mend) = (
        "a state dict of loralib's layers",
        "export it as PEFT's folder",
    );
    refuse_others(file, form, mend)?;
    refuse_magnitudes(file, &format!("{form} holds LoRA matrices alone"), mend)?;
    let parts: Parts = match file.metadata.get(FUSED_PARTS) {
        None => Parts::new(),
        Some(text) => serde_json::from_str(text).map_err(|error| {
            Error::Settings(format!(
                "metadata `{FUSED_PARTS}` is not what this program writes ({error})"
            ))
        })?,
    };
    // The rank that loralib's layer is made with: of each part, where there are some.
    let rank = |module: &LoraModule| match parts.get(&module.name) {
        Some(parts) if !parts.is_empty() => parts[0].1,
        _ => module.rank(),
    };
    let r = most_common(file.modules.iter().map(rank));
    let alpha = most_common(file.modules.iter().map(|m| m.scale * rank(m) as f64));
    let (mut tensors, mut problems, mut folded): (Vec<Named>, _, _) = (Vec::new(), Vec::new(), 0);
    for module in &file.modules {
        let factor = (module.scale / (alpha / rank(module) as f64)) as f32;
        folded += usize::from(factor != 1.0);
        let b = match parts.get(&module.name) {
            None => Ok(module.b.clone()),
            Some(parts) => stacked(module, parts),
        };
        match b {
            Ok(b) => {
                let values = b.to_vec().into_iter().map(|value| value * factor).collect();
                let b = Tensor::from_f32(b.rows(), b.cols(), values);
                tensors.push((format!("{}.lora_A", module.name), module.a.clone()));
                tensors.push((format!("{}.lora_B", module.name), b));
            }
            Err(problem) => problems.push(problem),
        }
    }
    if !problems.is_empty() {
        return Err(Error::Tensors {
            path: path.to_path_buf(),
            problems,
        });
    }
    let mut specs = Vec::new();
    for (name, tensor) in &tensors {
        check_fits(path, name, tensor, dtype)?;
        specs.push(TensorSpec {
            name: name.clone(),
            dtype,
            shape: vec![tensor.rows(), tensor.cols()],
        });
    }
    let metadata = BTreeMap::from([
        (ALPHA.to_owned(), alpha.to_string()),
        (RANK.to_owned(), r.to_string()),
    ]);
    write_safetensors(path, &specs, &metadata, |index, out| {
        out.write_all(&stored_bytes(&tensors[index].1, dtype))
    })?;
    Ok(Written {
        modules: file.modules.len(),
        alpha: Some(alpha),
        folded,
    })
}

/// The B of a `MergedLinear`, [parts · out/3, r], from the block-sparse one of the whole, [out, parts · r].
fn stacked(module: &LoraModule, parts: &[(String, usize)]) -> Result<Tensor, String> {
    let name = &module.name;
    let r = parts.first().map_or(0, |(_, r)| *r);
    let (rows, columns) = (module.b.rows(), module.b.cols());
    if parts.iter().any(|(_, other)| *other != r) || r * parts.len() != columns {
        return Err(format!(
            "{name}: its parts have ranks of their own, and loralib's MergedLinear has one"
        ));
    }
    if rows % PARTS.len() != 0 {
        return Err(format!("{name}: {rows} outputs are not three equal parts"));
    }
    let (of_part, values) = (rows / PARTS.len(), module.b.to_vec());
    let mut stacked = Vec::with_capacity(parts.len() * of_part * r);
    for (index, (part, _)) in parts.iter().enumerate() {
        let Some(place) = PARTS.iter().position(|known| known == part) else {
            return Err(format!("{name}: it has no part {part:?}"));
        };
        for row in place * of_part..(place + 1) * of_part {
            let start = row * columns + index * r;
            stacked.extend_from_slice(&values[start..start + r]);
        }
    }
    Ok(Tensor::from_f32(parts.len() * of_part, r, stacked))
}

/// Reads such a file. `alpha` is loralib's `lora_alpha`, where the file's metadata does not say it.
///
/// # Errors
/// A file that is damaged or pickled, no alpha, a module with one matrix alone, or with matrices that do not fit each other.
pub fn read(path: &Path, alpha: Option<f64>) -> Result<LoraFile, Error> {
    if let Some(format @ (Format::Torch | Format::Pickle)) = Format::of_file(path) {
        return Err(FormatError::Malformed {
            path: path.to_path_buf(),
            problem: format!(
                "is {format}, which can run code and is never loaded here; where you trust its source, write it as safetensors: python -c \
                 \"import torch, safetensors.torch as s; s.save_file({{k: v.contiguous() for k, v in torch.load('{0}', map_location='cpu', \
                 weights_only=True).items() if 'lora_' in k}}, '{0}.safetensors')\"",
                path.display()
            ),
        }
        .into());
    }
    let weights = Checkpoint::open(path)?;
    let said = weights
        .metadata()
        .get(ALPHA)
        .and_then(|text| text.parse().ok());
    let Some(alpha) = alpha.or(said).filter(|alpha| alpha.is_finite()) else {
        return Err(Error::Settings(format!(
            "{} does not say which lora_alpha its layers had; give {}",
            path.display(),
            crate::names::named("alpha")
        )));
    };
    let mut pairs: BTreeMap<&str, [Option<TensorEntry>; 2]> = BTreeMap::new();
    let mut problems = Vec::new();
    for name in weights.names() {
        let stem = ["A", "B"].map(|part| name.strip_suffix(&format!(".lora_{part}")));
        match stem {
            [Some(module), None] => pairs.entry(module).or_default()[0] = weights.find(name)?,
            [None, Some(module)] => pairs.entry(module).or_default()[1] = weights.find(name)?,
            _ => problems.push(format!("tensor `{name}` is neither a lora_A nor a lora_B")),
        }
    }
    check_finite(pairs.values().flatten().flatten())?;
    let (mut modules, mut parts) = (Vec::new(), Parts::new());
    for (name, pair) in pairs {
        match module(name, pair, alpha, &mut parts) {
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
    let mut file = from_modules(modules, None);
    if !parts.is_empty() {
        let text = serde_json::json!(parts).to_string();
        file.metadata.insert(FUSED_PARTS.to_owned(), text);
    }
    Ok(file)
}

fn module(
    name: &str,
    pair: [Option<TensorEntry>; 2],
    alpha: f64,
    parts: &mut Parts,
) -> Result<LoraModule, String> {
    let [Some(a), Some(b)] = pair else {
        return Err(format!("{name} has one of lora_A and lora_B alone"));
    };
    let fits = || {
        format!(
            "{name}: lora_A {:?} and lora_B {:?} do not fit each other",
            a.shape, b.shape
        )
    };
    let (&[a_rows, input], &[b_rows, r]) = (a.shape.as_slice(), b.shape.as_slice()) else {
        return Err(fits());
    };
    if r == 0 || a_rows == 0 || a_rows % r != 0 {
        return Err(fits());
    }
    let values = |entry: &TensorEntry| entry.to_f32().map_err(|error| error.to_string());
    let (a_values, b_values) = (values(&a)?, values(&b)?);
    let enabled: &[&str] = match a_rows / r {
        1 => &[],
        // As in the paper; the file does not say which two.
        2 => &["q", "v"],
        3 => &PARTS,
        _ => return Err(fits()),
    };
    let b = if enabled.is_empty() {
        Tensor::from_f32(b_rows, r, b_values)
    } else {
        if b_rows % enabled.len() != 0 {
            return Err(fits());
        }
        let of_part = b_rows / enabled.len();
        let (rows, columns) = (PARTS.len() * of_part, enabled.len() * r);
        let mut whole = vec![0.0; rows * columns];
        for (index, part) in enabled.iter().enumerate() {
            let place = PARTS.iter().position(|known| known == part).unwrap_or(0);
            for row in 0..of_part {
                let to = (place * of_part + row) * columns + index * r;
                let from = (index * of_part + row) * r;
                whole[to..to + r].copy_from_slice(&b_values[from..from + r]);
            }
        }
        let said = enabled.iter().map(|part| ((*part).to_owned(), r)).collect();
        parts.insert(name.to_owned(), said);
        Tensor::from_f32(rows, columns, whole)
    };
    Ok(LoraModule {
        name: name.to_owned(),
        a: Tensor::from_f32(a_rows, input, a_values),
        b,
        scale: alpha / r as f64,
        magnitude: None,
    })
}
