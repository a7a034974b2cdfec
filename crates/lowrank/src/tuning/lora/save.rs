//! A LoRA as PEFT's folder: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! The parts of a fused linear become one LoRA of the whole: A's rows stacked, B block-sparse, r the sum of the parts'
//! ranks and alpha such that the scale stays. The file's metadata says how it was put together, so that training can go
//! on with the parts, and which base it belongs to.

use std::collections::BTreeMap;
use std::path::Path;

use lowrank_formats::checkpoint::StoredDType;
use lowrank_formats::peft::{
    ADAPTER_WEIGHTS, FUSED_PARTS, LoraConfig, LoraPart, TargetModules, lora_key,
};
use lowrank_formats::safetensors_writer::{TensorSpec, write_safetensors};
use lowrank_kernels::DType;

use super::{Candidate, candidates, initial};
use crate::Error;
use crate::model::{Adapter, LinearKind, LowRankSite, ModelConfig, families};
use crate::tuning::files::{BaseMark, saved_specs, task_type};

/// One module as it is saved.
struct SavedModule {
    name: String,
    rank: usize,
    scale: f32,
    a: Vec<f32>,
    b: Vec<f32>,
    input: usize,
    output: usize,
    parts: Vec<(&'static str, usize)>,
}

/// Writes the adapter's two files into `folder`.
///
/// # Errors
/// A file can't be written.
pub fn save(
    folder: &Path,
    config: &ModelConfig,
    lora: &LoraConfig,
    adapter: &Adapter,
    base: BaseMark,
) -> Result<(), Error> {
    let (lora, adapter) = initial::plain(lora, adapter);
    let (lora, adapter): (&LoraConfig, &Adapter) = (&lora, &adapter);
    let modules = saved_modules(config, adapter);
    let mut metadata = base.metadata();
    let parts: BTreeMap<_, _> = modules
        .iter()
        .filter(|m| !m.parts.is_empty())
        .map(|m| (&m.name, &m.parts))
        .collect();
    if !parts.is_empty() {
        metadata.insert(FUSED_PARTS.to_owned(), serde_json::json!(parts).to_string());
    }
    let spec = |name: String, shape: [usize; 2]| TensorSpec {
        name,
        dtype: StoredDType::F32,
        shape: shape.to_vec(),
    };
    let mut specs: Vec<_> = modules
        .iter()
        .flat_map(|m| {
            [
                spec(lora_key(&m.name, LoraPart::A), [m.rank, m.input]),
                spec(lora_key(&m.name, LoraPart::B), [m.output, m.rank]),
            ]
        })
        .collect();
    let mut magnitudes: Vec<usize> = adapter.magnitudes.values().copied().collect();
    magnitudes.sort_unstable();
    specs.extend(magnitudes.iter().map(|slot| TensorSpec {
        name: adapter.names[*slot].clone(),
        dtype: StoredDType::F32,
        shape: vec![adapter.params.shape(*slot).1],
    }));
    let rows: Vec<usize> = adapter
        .token_rows
        .tables()
        .map(|(_, rows)| rows.slot())
        .collect();
    specs.extend(rows.iter().map(|slot| {
        let (n, width) = adapter.params.shape(*slot);
        spec(adapter.names[*slot].clone(), [n, width])
    }));
    let others: Vec<usize> = magnitudes
        .into_iter()
        .chain(rows)
        .chain(adapter.saved.slots.clone())
        .collect();
    specs.extend(saved_specs(adapter));
    write_safetensors(
        &folder.join(ADAPTER_WEIGHTS),
        &specs,
        &metadata,
        |index, out| {
            let Some(module) = modules.get(index / 2) else {
                let slot = others[index - 2 * modules.len()];
                return out.write_all(&adapter.params.view(slot).to_le_bytes(DType::F32));
            };
            let values = if index % 2 == 0 { &module.a } else { &module.b };
            out.write_all(bytemuck::cast_slice(values))
        },
    )?;
    saved_config(config, lora, &modules, adapter).write(folder)?;
    Ok(())
}

fn saved_modules(config: &ModelConfig, adapter: &Adapter) -> Vec<SavedModule> {
    let by_id: Vec<Candidate> = candidates(config)
        .into_iter()
        .filter(|c| c.part.is_none())
        .collect();
    let mut modules = Vec::new();
    for place in by_id {
        let Some(sites) = adapter.low_rank.get(&place.id) else {
            continue;
        };
        let (input, output) = config.linear_shape(place.id.kind);
        let rank = sites
            .iter()
            .map(|site| adapter.params.shape(site.a).0)
            .sum();
        let scale = sites[0].scale;
        let mut a = Vec::with_capacity(rank * input);
        let mut b = vec![0.0; output * rank];
        let mut first = 0;
        for site in sites {
            a.extend(adapter.params.view(site.a).to_vec());
            let values = adapter.params.view(site.b).to_vec();
            let (rows, r) = adapter.params.shape(site.b);
            for (row, line) in values.chunks_exact(r).enumerate().take(rows) {
                let start = (site.out_offset + row) * rank + first;
                for (to, from) in b[start..start + r].iter_mut().zip(line) {
                    // One scale serves the whole module; parts with another carry the ratio in B.
                    *to = if site.scale == scale {
                        *from
                    } else {
                        from * (site.scale / scale)
                    };
                }
            }
            first += r;
        }
        let parts = parts_of(config, adapter, sites, output);
        modules.push(SavedModule {
            name: place.module,
            rank,
            scale,
            a,
            b,
            input,
            output,
            parts,
        });
    }
    modules
}

fn parts_of(
    config: &ModelConfig,
    adapter: &Adapter,
    sites: &[LowRankSite],
    output: usize,
) -> Vec<(&'static str, usize)> {
    if adapter.params.shape(sites[0].b).0 == output {
        return Vec::new();
    }
    sites
        .iter()
        .filter_map(|site| {
            let part = [LinearKind::Q, LinearKind::K, LinearKind::V]
                .into_iter()
                .find(|kind| config.fused_columns(*kind).start == site.out_offset)?;
            Some((families::fused_part(part)?, adapter.params.shape(site.a).0))
        })
        .collect()
}

/// The config that describes the saved modules: `lora` itself, unless parts were fused.
fn saved_config(
    model: &ModelConfig,
    lora: &LoraConfig,
    modules: &[SavedModule],
    adapter: &Adapter,
) -> LoraConfig {
    let mut config = lora.clone();
    config.peft_version = None;
    config.inference_mode = true;
    config.task_type = Some(task_type(model).to_owned());
    config.modules_to_save.clone_from(&adapter.saved.names);
    if modules.iter().all(|m| m.parts.is_empty()) {
        return config;
    }
    let alpha = |m: &SavedModule| {
        let rank = m.rank as f64;
        f64::from(m.scale) * if lora.use_rslora { rank.sqrt() } else { rank }
    };
    config.exclude_modules = None;
    config.layers_to_transform = None;
    config.layers_pattern = Vec::new();
    config.rank_pattern.clear();
    config.alpha_pattern.clear();
    config.r = modules[0].rank;
    config.lora_alpha = alpha(&modules[0]);
    let uniform = |m: &&SavedModule| m.rank == config.r && alpha(m) == config.lora_alpha;
    for module in modules.iter().filter(|m| !uniform(m)) {
        let key = module.name.replace('.', "\\.");
        config.rank_pattern.push((key.clone(), module.rank));
        config.alpha_pattern.push((key, alpha(module)));
    }
    // The shortest names that still mean these modules: what stands behind the layer's number.
    let mut names: Vec<String> = Vec::new();
    for module in modules {
        let tail = module
            .name
            .split('.')
            .skip_while(|part| part.parse::<usize>().is_err())
            .skip(1)
            .collect::<Vec<_>>()
            .join(".");
        if !names.contains(&tail) {
            names.push(tail);
        }
    }
    config.target_modules = TargetModules::List(names);
    let matched = candidates(model)
        .iter()
        .filter(|place| place.part.is_none() && config.matches(&place.name))
        .count();
    if matched != modules.len() {
        let names = modules.iter().map(|module| module.name.clone()).collect();
        config.target_modules = TargetModules::List(names);
    }
    config
}
