//! LoRA adapters as files, apart from any model: read from PEFT's folder, combined, pruned, and written for other programs.
//!
//! [`crate::tuning`] reads the same folder as an adapter of a model, to be computed with. Here no model is needed: a module is its name, A, B and a scale.

mod combine;
mod folder;
pub mod gguf;
pub mod loralib;
pub mod mlx;
mod products;
mod prune;
mod travel;

use std::collections::BTreeMap;
use std::path::Path;

use lowrank_formats::FormatError;
use lowrank_formats::checkpoint::{StoredDType, TensorEntry, check_finite};
use lowrank_formats::peft::{
    ADAPTER_WEIGHTS, LoraConfig, LoraPart, TargetModules, lora_key, magnitude_key,
    open_adapter_weights, parse_lora_key, parse_magnitude_key,
};
use lowrank_formats::safetensors_writer::{TensorSpec, write_safetensors};
use lowrank_kernels::{DType, Tensor};

use crate::Error;

pub use combine::{
    AdapterShare, Combination, CombineOptions, CombineReport, CombinedModule, MajoritySign, combine,
};
pub use gguf::Written;
pub use prune::{Keep, PruneOptions, PruneReport, PrunedModule, prune};
pub(crate) use travel::check_file;
pub use travel::{ExportOptions, Form, check_folder};

/// The files of an adapter's folder that this program writes.
pub const ADAPTER_FILES: &[&str] = &["adapter_config.json", ADAPTER_WEIGHTS, "README.md"];

/// A LoRA adapter as its files have it.
pub struct LoraFile {
    /// `adapter_config.json`. Ranks, alphas and targets are those of [`modules`](Self::modules), which count.
    pub config: LoraConfig,
    /// The adapted linears, sorted by layer and name.
    pub modules: Vec<LoraModule>,
    /// Tensors that belong to no linear: rows of tokens, and modules that are saved whole (PEFT's `modules_to_save`).
    pub others: Vec<TensorEntry>,
    /// What adapter_model.safetensors says beside the tensors.
    pub metadata: BTreeMap<String, String>,
}

/// What an adapter adds to one linear: scale · B·A, and with DoRA the norms of the sum's rows.
#[derive(Clone, Debug)]
pub struct LoraModule {
    /// The dotted name without PEFT's prefix, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// `lora_A`, f32 [r, in].
    pub a: Tensor,
    /// `lora_B`, f32 [out, r].
    pub b: Tensor,
    /// What B·A is multiplied with: alpha/r, or alpha/√r with rank-stabilised LoRA.
    pub scale: f64,
    /// `lora_magnitude_vector`, f32 [1, out]; there is one in every module with `use_dora`, and in none without.
    pub magnitude: Option<Tensor>,
}

impl LoraModule {
    /// The rank r.
    pub fn rank(&self) -> usize {
        self.a.rows()
    }

    /// Numbers in A, B and the magnitudes.
    pub fn parameters(&self) -> u64 {
        let magnitude = self.magnitude.as_ref().map_or(0, Tensor::len);
        (self.a.len() + self.b.len() + magnitude) as u64
    }
}

/// How A and B are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum FileDtype {
    /// 32 bits, which is exact.
    #[default]
    F32,
    /// 16 bits with f32's range.
    Bf16,
    /// 16 bits with more digits, and a largest number of 65504.
    F16,
}

impl From<FileDtype> for StoredDType {
    fn from(dtype: FileDtype) -> Self {
        match dtype {
            FileDtype::F32 => Self::F32,
            FileDtype::Bf16 => Self::BF16,
            FileDtype::F16 => Self::F16,
        }
    }
}

impl LoraFile {
    /// Reads a PEFT folder.
    ///
    /// # Errors
    /// Files that are missing, damaged or of another method; a module with one matrix alone, or with matrices of other ranks than
    /// adapter_config.json says; LoRA's tensors of something that is no linear, such as an embedding.
    pub fn read(folder: &Path) -> Result<Self, Error> {
        let config = LoraConfig::read(folder)?;
        let weights = open_adapter_weights(folder)?;
        let mut pairs: BTreeMap<String, [Option<TensorEntry>; 2]> = BTreeMap::new();
        let mut magnitudes: BTreeMap<String, TensorEntry> = BTreeMap::new();
        let (mut others, mut foreign) = (Vec::new(), Vec::new());
        for name in weights.names() {
            let Some(entry) = weights.find(name)? else {
                continue;
            };
            match parse_lora_key(name) {
                None if config.use_dora && parse_magnitude_key(name).is_some() => {
                    let module = parse_magnitude_key(name).unwrap_or_default();
                    magnitudes.insert(module.to_owned(), entry);
                }
                Some((module, part)) => {
                    pairs.entry(module.to_owned()).or_default()[usize::from(part == LoraPart::B)] =
                        Some(entry);
                }
                None if name.contains(".lora_") => {
                    foreign.push(format!(
                        "{name}: only lora_A and lora_B of linears are supported, and lora_magnitude_vector where use_dora is true"
                    ));
                }
                None => others.push(entry),
            }
        }
        let of_modules = pairs.values().flatten().flatten();
        check_finite(of_modules.chain(magnitudes.values()).chain(&others))?;
        let mut problems = foreign;
        let mut modules = Vec::new();
        for (name, pair) in pairs {
            match module(&config, &name, pair, magnitudes.remove(&name).as_ref()) {
                Ok(module) => modules.push(module),
                Err(problem) => problems.push(problem),
            }
        }
        let left = magnitudes.keys();
        problems
            .extend(left.map(|name| format!("{name} has magnitudes, but no lora_A and lora_B")));
        if modules.is_empty() && problems.is_empty() {
            problems.push("there is no tensor of a LoRA in it".to_owned());
        }
        if !problems.is_empty() {
            return Err(Error::Tensors {
                path: weights.path().to_path_buf(),
                problems,
            });
        }
        sort(&mut modules);
        Ok(Self {
            config,
            modules,
            others,
            metadata: weights.metadata().clone(),
        })
    }

    /// Writes PEFT's two files into a folder, which exists. The config says the modules' ranks and scales, with patterns where they
    /// differ.
    ///
    /// # Errors
    /// A file that cannot be written; with `dtype` of 16 bits, a value that it does not hold.
    pub fn write(&self, folder: &Path, dtype: StoredDType) -> Result<(), Error> {
        let path = folder.join(ADAPTER_WEIGHTS);
        let mut specs = Vec::new();
        for module in &self.modules {
            for (part, tensor) in [(LoraPart::A, &module.a), (LoraPart::B, &module.b)] {
                specs.push(TensorSpec {
                    name: lora_key(&module.name, part),
                    dtype,
                    shape: vec![tensor.rows(), tensor.cols()],
                });
            }
            specs.extend(module.magnitude.iter().map(|magnitude| TensorSpec {
                name: magnitude_key(&module.name),
                dtype,
                shape: vec![magnitude.cols()],
            }));
        }
        specs.extend(self.others.iter().map(|entry| TensorSpec {
            name: entry.name.clone(),
            dtype: entry.dtype,
            shape: entry.shape.clone(),
        }));
        let tensors: Vec<&Tensor> = self.tensors().collect();
        for (spec, tensor) in specs.iter().zip(&tensors) {
            check_fits(&path, &spec.name, tensor, dtype)?;
        }
        write_safetensors(&path, &specs, &self.metadata, |index, out| {
            match tensors.get(index) {
                Some(tensor) => out.write_all(&stored_bytes(tensor, dtype)),
                None => out.write_all(self.others[index - tensors.len()].bytes.as_ref()),
            }
        })?;
        self.config_of_modules().write(folder)?;
        Ok(())
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.modules
            .iter()
            .flat_map(|module| [Some(&module.a), Some(&module.b), module.magnitude.as_ref()])
            .flatten()
    }

    /// The config with the ranks, alphas and targets of the modules as they are now. What it said of targets is kept where it still
    /// means these modules.
    pub fn config_of_modules(&self) -> LoraConfig {
        let alpha = |module: &LoraModule| {
            let rank = module.rank() as f64;
            module.scale
                * if self.config.use_rslora {
                    rank.sqrt()
                } else {
                    rank
                }
        };
        let says = |config: &LoraConfig| {
            self.modules.iter().all(|module| {
                let name = &module.name;
                config.rank_of(name) == module.rank() && close(config.alpha_of(name), alpha(module))
            })
        };
        let mut config = self.config.clone();
        if !says(&config) {
            let r = most_common(self.modules.iter().map(LoraModule::rank));
            let first = most_common(self.modules.iter().map(alpha));
            config.rank_pattern.clear();
            config.alpha_pattern.clear();
            (config.r, config.lora_alpha) = (r, first);
            for module in &self.modules {
                let key = module.name.replace('.', "\\.");
                if module.rank() != r {
                    config.rank_pattern.push((key.clone(), module.rank()));
                }
                if !close(alpha(module), first) {
                    config.alpha_pattern.push((key, alpha(module)));
                }
            }
        }
        if !self.modules.iter().all(|m| config.matches(&m.name)) {
            let names = self.names_of_modules(None);
            config.target_modules = TargetModules::List(names);
            config.exclude_modules = None;
            config.layers_to_transform = None;
            config.layers_pattern = Vec::new();
        }
        config
    }
}

impl LoraFile {
    /// Names that mean these modules and no others: what stands behind the layer's number where each of the model's `layers` has the
    /// same modules, else whole names.
    fn names_of_modules(&self, layers: Option<usize>) -> Vec<String> {
        let whole = || self.modules.iter().map(|m| m.name.clone()).collect();
        let mut of_layers: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for module in &self.modules {
            let parts: Vec<&str> = module.name.split('.').collect();
            let Some(at) = parts.iter().position(|part| part.parse::<u64>().is_ok()) else {
                return whole();
            };
            let layer = of_layers.entry(parts[..=at].join(".")).or_default();
            layer.push(parts[at + 1..].join("."));
        }
        match of_layers.values().next() {
            Some(first)
                if Some(of_layers.len()) == layers
                    && of_layers.values().all(|names| names == first) =>
            {
                first.clone()
            }
            _ => whole(),
        }
    }
}

/// Alphas that were multiplied with a rank and divided by it again.
fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-12 * a.abs().max(b.abs())
}

/// The value that occurs most often; of several, the first.
fn most_common<T: Copy + PartialEq + From<u8>>(values: impl Iterator<Item = T>) -> T {
    let mut counts: Vec<(T, usize)> = Vec::new();
    for value in values {
        match counts.iter_mut().find(|(known, _)| *known == value) {
            Some((_, count)) => *count += 1,
            None => counts.push((value, 1)),
        }
    }
    let most = counts.iter().map(|(_, count)| *count).max();
    let first = counts.iter().find(|(_, count)| Some(*count) == most);
    first.map_or_else(|| T::from(1), |(value, _)| *value)
}

/// Layers by their number, then names.
pub(crate) fn sort(modules: &mut [LoraModule]) {
    modules.sort_by_cached_key(|module| order(&module.name));
}

/// What modules are sorted by.
fn order(name: &str) -> Vec<(u64, String)> {
    let part = |part: &str| (part.parse().unwrap_or(u64::MAX), part.to_owned());
    name.split('.').map(part).collect()
}

fn module(
    config: &LoraConfig,
    name: &str,
    pair: [Option<TensorEntry>; 2],
    magnitude: Option<&TensorEntry>,
) -> Result<LoraModule, String> {
    let [Some(a), Some(b)] = pair else {
        return Err(format!("{name} has one of lora_A and lora_B alone"));
    };
    let r = config.rank_of(name);
    let (&[a_rows, input], &[output, b_columns]) = (a.shape.as_slice(), b.shape.as_slice()) else {
        return Err(format!(
            "{name}: lora_A {:?} and lora_B {:?} are no matrices",
            a.shape, b.shape
        ));
    };
    if a_rows != r || b_columns != r {
        return Err(format!(
            "{name}: lora_A {:?} and lora_B {:?} are not of rank {r}, which adapter_config.json says",
            a.shape, b.shape
        ));
    }
    let values = |entry: &TensorEntry| entry.to_f32().map_err(|error| error.to_string());
    Ok(LoraModule {
        name: name.to_owned(),
        a: Tensor::from_f32(r, input, values(&a)?),
        b: Tensor::from_f32(output, r, values(&b)?),
        scale: config.scale_of(name),
        magnitude: match magnitude {
            Some(entry) => Some(magnitude_of(name, entry, output)?),
            None if config.use_dora => {
                return Err(format!(
                    "{name} has no lora_magnitude_vector, and use_dora is true"
                ));
            }
            None => None,
        },
    })
}

/// A module's magnitudes [1, out].
fn magnitude_of(name: &str, entry: &TensorEntry, outputs: usize) -> Result<Tensor, String> {
    if entry.shape != [outputs] {
        return Err(format!(
            "{name}: the magnitudes {:?} are not those of {outputs} outputs",
            entry.shape
        ));
    }
    let values = entry.to_f32().map_err(|error| error.to_string())?;
    Ok(Tensor::from_f32(1, outputs, values))
}

/// Refuses an adapter with magnitudes for what is right for sums of matrices alone.
fn refuse_magnitudes(file: &LoraFile, what: &str, mend: &str) -> Result<(), Error> {
    let modules = file.modules.iter();
    let names: Vec<&str> = (modules.filter(|module| module.magnitude.is_some()))
        .map(|module| module.name.as_str())
        .collect();
    if names.is_empty() {
        return Ok(());
    }
    Err(Error::Settings(format!(
        "{what}, and this adapter (use_dora) also has magnitudes of {}; {mend}",
        names.join(", ")
    )))
}

/// A tensor's values as a file has them.
pub(crate) fn stored_bytes(tensor: &Tensor, dtype: StoredDType) -> Vec<u8> {
    match dtype {
        StoredDType::F16 => {
            let halves = tensor.to_vec().into_iter().map(half::f16::from_f32);
            halves.flat_map(half::f16::to_le_bytes).collect()
        }
        StoredDType::BF16 => tensor.to_le_bytes(DType::Bf16).into_owned(),
        _ => tensor.to_le_bytes(DType::F32).into_owned(),
    }
}

/// Refuses values that a type of 16 bits makes infinite.
pub(crate) fn check_fits(
    path: &Path,
    name: &str,
    tensor: &Tensor,
    dtype: StoredDType,
) -> Result<(), FormatError> {
    let fits = |value: f32| match dtype {
        StoredDType::F16 => half::f16::from_f32(value).is_finite(),
        StoredDType::BF16 => half::bf16::from_f32(value).is_finite(),
        _ => value.is_finite(),
    };
    match tensor.to_vec().into_iter().find(|value| !fits(*value)) {
        None => Ok(()),
        Some(value) => Err(FormatError::tensor(
            path,
            name,
            format!("{value} does not fit in {}; write f32", dtype.name()),
        )),
    }
}
