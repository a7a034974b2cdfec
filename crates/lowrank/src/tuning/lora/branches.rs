//! A and B as an adapter's files hold them, without the model that they belong to.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use lowrank_formats::checkpoint::{Checkpoint, check_finite};
use lowrank_formats::peft::{
    BASE_FINGERPRINT, LoraConfig, LoraPart, TOKEN_ROWS, lora_key, open_adapter_weights,
    parse_lora_key, read_adapter_config,
};

use super::load::{Stacked, WHOLE, fused_parts};
use crate::Error;

/// The most values of A or B of one module; an untrusted file cannot ask for more.
const MOST_VALUES: usize = 1 << 31;

/// The branch beside one module, or beside one part of a fused one.
#[derive(Clone, Debug, PartialEq)]
pub struct Branch {
    /// The module, with `.q`, `.k` or `.v` behind it for a part.
    pub name: String,
    /// The module of the model that it stands beside.
    pub module: String,
    /// The module's outputs that it writes.
    pub outputs: Range<usize>,
    /// Width of the module's input.
    pub inputs: usize,
    /// r
    pub rank: usize,
    /// What B·A is multiplied with.
    pub scale: f64,
    /// A [r, in], row by row.
    pub a: Vec<f32>,
    /// B [outputs, r], row by row.
    pub b: Vec<f32>,
}

/// All branches of an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Branches {
    /// In the order of their layers.
    pub branches: Vec<Branch>,
    /// Fingerprint of the base that it was trained on, where this program wrote it.
    pub base_fingerprint: Option<String>,
}

/// Whether a tensor is of one of the modules that are saved as a whole, or within one.
fn is_saved(name: &str, modules: &[String]) -> bool {
    let name = format!(".{name}");
    modules
        .iter()
        .any(|module| name.contains(&format!(".{module}.")))
}

/// Reads the branches of a PEFT LoRA folder.
///
/// # Errors
/// Files that are missing or damaged, a feature that is not supported, an A without its B, shapes that do not fit each other, and
/// values that are not finite. Every problem is named.
pub fn branches(folder: &Path) -> Result<Branches, Error> {
    let raw = read_adapter_config(folder)?;
    if let Some(kind) = raw.opt_str("peft_type")?.filter(|kind| *kind != "LORA") {
        return Err(raw
            .unsupported(
                "peft_type",
                format!("LORA: A and B of two LoRA adapters are compared, and {kind} has none"),
            )
            .into());
    }
    let config = LoraConfig::read(folder)?;
    if config.use_dora {
        return Err(raw
            .unsupported(
                "use_dora",
                "false: A and B of two LoRA adapters are compared, and with DoRA they are not all that changes a weight",
            )
            .into());
    }
    let weights = open_adapter_weights(folder)?;
    let entries: Vec<_> = weights
        .names()
        .filter_map(|name| weights.get(name))
        .collect();
    check_finite(&entries)?;
    let parts = fused_parts(&weights)?;
    let mut problems = Vec::new();
    let mut modules = BTreeSet::new();
    for name in weights.names() {
        match parse_lora_key(name) {
            Some((module, _)) => {
                modules.insert(module.to_owned());
            }
            // A module that was trained as a whole has no branch.
            None if is_saved(name, &config.modules_to_save) => {}
            // They are compared with nothing.
            None if name.ends_with(TOKEN_ROWS) => {}
            None => problems.push(format!("{name}: not an A or a B of LoRA")),
        }
    }
    if modules.is_empty() && problems.is_empty() {
        problems.push("the file holds no A and no B".to_owned());
    }
    for module in parts.keys().filter(|module| !modules.contains(*module)) {
        problems.push(format!(
            "metadata names parts of {module}, which is not adapted; {WHOLE}"
        ));
    }
    let mut branches = Vec::new();
    for module in modules {
        let read =
            read_module(&weights, &config, &module).and_then(|whole| match parts.get(&module) {
                None => Ok(vec![whole]),
                Some(pieces) => split(&whole, pieces),
            });
        match read {
            Ok(read) => branches.extend(read),
            Err(problem) => problems.push(problem),
        }
    }
    if !problems.is_empty() {
        return Err(Error::Tensors {
            path: weights.path().to_path_buf(),
            problems,
        });
    }
    branches.sort_by(|one, other| by_layer(&one.name).cmp(&by_layer(&other.name)));
    Ok(Branches {
        branches,
        base_fingerprint: weights.metadata().get(BASE_FINGERPRINT).cloned(),
    })
}

/// A name's words, with numbers as numbers: layer 2 stands before layer 10.
fn by_layer(name: &str) -> Vec<(u64, &str)> {
    name.split('.')
        .map(|word| word.parse().map_or((0, word), |number| (number, "")))
        .collect()
}

fn read_module(weights: &Checkpoint, config: &LoraConfig, module: &str) -> Result<Branch, String> {
    let matrix = |part| {
        let name = lora_key(module, part);
        let entry = weights
            .get(&name)
            .ok_or_else(|| format!("{name}: missing"))?;
        let &[rows, cols] = entry.shape.as_slice() else {
            return Err(format!("{name}: shape {:?} is not a matrix", entry.shape));
        };
        if rows == 0 || cols == 0 || rows.saturating_mul(cols) > MOST_VALUES {
            return Err(format!("{name}: shape [{rows}, {cols}] cannot be used"));
        }
        let values = entry.to_f32().map_err(|error| error.to_string())?;
        Ok(((rows, cols), values))
    };
    let ((rank, inputs), a) = matrix(LoraPart::A)?;
    let ((outputs, b_rank), b) = matrix(LoraPart::B)?;
    if rank != b_rank || rank != config.rank_of(module) {
        return Err(format!(
            "{module}: A is [{rank}, {inputs}], B is [{outputs}, {b_rank}], and r is {}",
            config.rank_of(module)
        ));
    }
    Ok(Branch {
        name: module.to_owned(),
        module: module.to_owned(),
        outputs: 0..outputs,
        inputs,
        rank,
        scale: config.scale_of(module),
        a,
        b,
    })
}

/// The parts of a fused module, whose outputs are those of q, k and v in thirds, as GPT-2's are.
fn split(whole: &Branch, pieces: &[(String, usize)]) -> Result<Vec<Branch>, String> {
    let wrong = || {
        format!(
            "{}: the metadata's parts {pieces:?} do not fit r {} and {} outputs; {WHOLE}",
            whole.name, whole.rank, whole.outputs.end
        )
    };
    let ranks = pieces
        .iter()
        .try_fold(0_usize, |sum, (_, r)| sum.checked_add(*r));
    if ranks != Some(whole.rank) || !whole.outputs.end.is_multiple_of(3) {
        return Err(wrong());
    }
    let third = whole.outputs.end / 3;
    let stacked = Stacked {
        a: whole.a.clone(),
        b: whole.b.clone(),
        rank: whole.rank,
    };
    let mut first = 0;
    let mut parts = Vec::new();
    for (suffix, rank) in pieces {
        let index = ["q", "k", "v"].iter().position(|part| part == suffix);
        let index = index.filter(|_| *rank > 0).ok_or_else(wrong)?;
        let outputs = index * third..(index + 1) * third;
        let (a, b) = stacked.piece(first..first + rank, outputs.clone());
        parts.push(Branch {
            name: format!("{}.{suffix}", whole.name),
            rank: *rank,
            outputs,
            a,
            b,
            ..whole.clone()
        });
        first += rank;
    }
    Ok(parts)
}
