//! A LoRA adapter of lower ranks: the truncated SVD of every ΔW, with the error that it makes.
//!
//! Of all matrices of rank k the first k directions of the SVD are closest to ΔW (Eckart and Young, 1936). A and B alone are
//! decomposed, never ΔW as a whole.

use std::path::Path;

use lowrank_formats::peft::FUSED_PARTS;
use rayon::prelude::*;
use serde::Serialize;

use super::folder::{self, rounded};
use super::products::{difference_norm, fits, split, tensor, total};
use super::{FileDtype, LoraFile, LoraModule, refuse_magnitudes};
use crate::Error;
use crate::names::named;
use crate::svd::{decompose_product, matrix, product_norm};

/// How much of a module stays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Keep {
    /// This rank at most.
    Rank(usize),
    /// The smallest rank with which ‖ΔW − ΔW'‖/‖ΔW‖ is this at most, in [0, 1); rounding to 16 bits comes on top.
    Error(f64),
}

/// What is pruned, and where to.
#[derive(Clone, Debug)]
pub struct PruneOptions<'a> {
    /// The adapter's folder.
    pub adapter: &'a Path,
    /// How much of it stays.
    pub keep: Keep,
    /// The folder of the new adapter.
    pub output: &'a Path,
    /// How its A and B are stored.
    pub dtype: FileDtype,
    /// Whether an adapter in the folder is replaced.
    pub overwrite: bool,
}

/// What pruning came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PruneReport {
    /// The folder that was read.
    pub adapter: String,
    /// The adapted linears, in the order of their layers.
    pub modules: Vec<PrunedModule>,
    /// Numbers in the A's and B's before.
    pub parameters_before: u64,
    /// Numbers in the A's and B's that were written.
    pub parameters: u64,
    /// ‖ΔW‖_F over all modules, before.
    pub norm: f64,
    /// ‖ΔW − ΔW'‖/‖ΔW‖ over all modules; `None` where ΔW is nought.
    pub relative_error: Option<f64>,
}

/// One linear.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PrunedModule {
    /// Its name.
    pub module: String,
    /// The rank before.
    pub rank_before: usize,
    /// The rank that was written.
    pub rank: usize,
    /// ‖ΔW‖_F before.
    pub norm: f64,
    /// ‖ΔW − ΔW'‖/‖ΔW‖, ΔW' being what was written; `None` where ΔW is nought.
    pub relative_error: Option<f64>,
}

/// Prunes an adapter and writes the result as a PEFT folder. Modules that need not be pruned keep their A and B, and every
/// module keeps its scale.
///
/// # Errors
/// A rank of nought or an error outside of its range; an adapter that is damaged, or of which nothing would be pruned; an output
/// that exists (without `overwrite`) or must not be replaced.
pub fn prune(options: &PruneOptions) -> Result<PruneReport, Error> {
    match options.keep {
        Keep::Rank(0) => {
            return Err(Error::Settings(format!(
                "{} is 0; it must be 1 or greater",
                named("rank")
            )));
        }
        Keep::Error(error) if !(0.0..1.0).contains(&error) => {
            return Err(Error::Settings(format!(
                "{} is {error}; it must be at least 0 and less than 1",
                named("error")
            )));
        }
        _ => {}
    }
    folder::check_output(options.output, options.overwrite, &[options.adapter])?;
    folder::write(
        options.output,
        options.overwrite,
        options.dtype.into(),
        || {
            let mut file = LoraFile::read(options.adapter)?;
            let what = "pruning brings A·B alone to a lower rank";
            refuse_magnitudes(&file, what, "train with a smaller r")?;
            let beside = folder::tokenizer_files(&[(options.adapter, &file)])?;
            let report = pruned(&mut file, options)?;
            Ok((file, beside, report))
        },
    )
}

fn pruned(file: &mut LoraFile, options: &PruneOptions) -> Result<PruneReport, Error> {
    let sum = |modules: &[LoraModule]| modules.iter().map(LoraModule::parameters).sum();
    let before: u64 = sum(&file.modules);
    let made: Vec<(PrunedModule, [f64; 2])> = file
        .modules
        .par_iter_mut()
        .map(|module| prune_module(module, options))
        .collect::<Result<_, _>>()?;
    let (modules, squares): (Vec<PrunedModule>, Vec<[f64; 2]>) = made.into_iter().unzip();
    if modules
        .iter()
        .all(|module| module.rank == module.rank_before)
    {
        let most = modules
            .iter()
            .map(|module| module.rank_before)
            .max()
            .unwrap_or(0);
        return Err(Error::Settings(format!(
            "{}: nothing would be pruned: {}",
            options.adapter.display(),
            match options.keep {
                Keep::Rank(_) => format!(
                    "no module's rank is greater than {most}; give a smaller {}",
                    named("rank")
                ),
                Keep::Error(_) => format!(
                    "without its weakest direction every module is further off than that; give a larger {}",
                    named("error")
                ),
            }
        )));
    }
    file.metadata.remove(FUSED_PARTS);
    Ok(PruneReport {
        adapter: options.adapter.display().to_string(),
        parameters_before: before,
        parameters: sum(&file.modules),
        norm: modules.iter().map(|m| m.norm.powi(2)).sum::<f64>().sqrt(),
        relative_error: total(squares.into_iter().map(Some)),
        modules,
    })
}

/// Prunes a module in place. Also the squares of the distance from what it was, and of the norm of that.
///
/// # Errors
/// Numbers that f32 does not hold once they are scaled.
fn prune_module(
    module: &mut LoraModule,
    options: &PruneOptions,
) -> Result<(PrunedModule, [f64; 2]), Error> {
    let (a, b) = (matrix(&module.a), matrix(&module.b) * module.scale);
    if !fits(&b) {
        // An SVD of infinite numbers would not end.
        return Err(Error::Settings(format!(
            "{}, {}: lora_B times the scale {} is larger than f32 holds; lower lora_alpha in adapter_config.json",
            options.adapter.display(),
            module.name,
            module.scale
        )));
    }
    let (rank_before, norm) = (module.rank(), product_norm(&b, &a));
    let found = decompose_product(&b, &a, 1.0);
    let rank = match options.keep {
        Keep::Rank(rank) => rank,
        Keep::Error(error) => rank_for(&found.values, error),
    };
    let (mut new_a, mut new_b) = (module.a.clone(), module.b.clone());
    if rank < rank_before {
        let (right, mut left) = split(&found, rank, [b.nrows(), a.ncols()]);
        if module.scale != 0.0 {
            left /= module.scale;
        }
        (new_a, new_b) = (tensor(&right), tensor(&left));
    }
    let dtype = options.dtype.into();
    module.a = rounded(new_a, dtype);
    module.b = rounded(new_b, dtype);
    let error = if rank >= rank_before && options.dtype == FileDtype::F32 {
        0.0
    } else {
        let (kept_a, kept_b) = (matrix(&module.a), matrix(&module.b) * module.scale);
        difference_norm((&b, &a), (&kept_b, &kept_a))
    };
    let squares = [error.powi(2), norm.powi(2)];
    let report = PrunedModule {
        module: module.name.clone(),
        rank_before,
        rank: module.rank(),
        norm,
        relative_error: total([Some(squares)].into_iter()),
    };
    Ok((report, squares))
}

/// The smallest rank, one at least, without whose further values the rest is within the error.
fn rank_for(values: &[f64], error: f64) -> usize {
    let all: f64 = values.iter().map(|value| value * value).sum();
    let mut left = 0.0;
    let mut rank = values.len();
    while rank > 1 {
        left += values[rank - 1].powi(2);
        if left > error * error * all {
            break;
        }
        rank -= 1;
    }
    rank.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_rank_within_an_error() {
        // Without the last: √(1/26) = 0.196; without the last two: √(10/26) = 0.620.
        let values = [4.0, 3.0, 1.0];
        assert_eq!(rank_for(&values, 0.0), 3);
        assert_eq!(rank_for(&values, 0.19), 3);
        assert_eq!(rank_for(&values, 0.2), 2);
        assert_eq!(rank_for(&values, 0.62), 2);
        assert_eq!(rank_for(&values, 0.63), 1);
        assert_eq!(rank_for(&values, 0.99), 1);
        assert_eq!(rank_for(&[], 0.5), 1);
    }
}
