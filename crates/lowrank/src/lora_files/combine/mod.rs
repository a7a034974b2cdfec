//! Several LoRA adapters as one, in the ways of PEFT's `add_weighted_adapter` (`peft/tuners/lora/model.py`).
//!
//! With ΔWᵢ = sᵢ·Bᵢ·Aᵢ, where sᵢ is lora_alpha/r or lora_alpha/√r as each adapter says, and weights wᵢ:
//!
//! | Combination | ΔW |
//! | --- | --- |
//! | `cat` | Σ wᵢ·ΔWᵢ to the bit of rounding; the rank is the sum of the ranks |
//! | `svd` | the best approximation of Σ wᵢ·ΔWᵢ of a given rank |
//! | `linear` | (Σ √\|wᵢsᵢ\|·Bᵢ)·(Σ ±√\|wᵢsᵢ\|·Aᵢ): one rank, and products of one adapter's B with another one's A |
//! | `ties`, `dare_linear`, `dare_ties`, `magnitude_prune` | as `linear`, A's and B's combined by [`arithmetic`] |
//! | the same with `_svd` | the ΔWᵢ combined by [`arithmetic`], then the best approximation of a given rank |
//!
//! The result has the scale 1 in every module (lora_alpha = r, without rsLoRA). PEFT keeps `use_rslora` of the first
//! adapter beside lora_alpha = r, so that its result is √r times too large there; here it is not.

mod agree;
mod arithmetic;
mod module;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;

use super::products::total;
use super::{FileDtype, LoraFile, LoraModule, folder, order, refuse_magnitudes};
use crate::Error;
use crate::names::{named, valued};
use agree::Named;
pub use arithmetic::MajoritySign;
use arithmetic::Sparsity;
use module::{Group, Made, Member, combine_module};

/// How adapters are combined; the names are those of PEFT's `combination_type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[cfg_attr(feature = "clap", value(rename_all = "snake_case"))]
pub enum Combination {
    /// A's below each other and B's side by side: the exact sum, of the sum of the ranks.
    #[default]
    Cat,
    /// The exact sum, cut to a rank by SVD.
    Svd,
    /// Sums of A's and of B's: quick, of one rank, and not the sum of the changes.
    Linear,
    /// As linear, of the largest numbers that have the elected sign (TIES).
    Ties,
    /// TIES of the whole changes, cut to a rank.
    TiesSvd,
    /// As linear, of random numbers (DARE).
    DareLinear,
    /// As ties, of random numbers (DARE).
    DareTies,
    /// DARE of the whole changes, cut to a rank.
    DareLinearSvd,
    /// DARE with elected signs of the whole changes, cut to a rank.
    DareTiesSvd,
    /// As linear, of the largest numbers.
    MagnitudePrune,
    /// The largest numbers of the whole changes, cut to a rank.
    MagnitudePruneSvd,
}

/// What the numbers of are combined.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// A's and B's in one.
    Cat,
    /// ΔW in its factors.
    Svd,
    /// A's with A's and B's with B's.
    Factors,
    /// ΔW as a whole.
    Whole,
}

impl Combination {
    /// PEFT's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cat => "cat",
            Self::Svd => "svd",
            Self::Linear => "linear",
            Self::Ties => "ties",
            Self::TiesSvd => "ties_svd",
            Self::DareLinear => "dare_linear",
            Self::DareTies => "dare_ties",
            Self::DareLinearSvd => "dare_linear_svd",
            Self::DareTiesSvd => "dare_ties_svd",
            Self::MagnitudePrune => "magnitude_prune",
            Self::MagnitudePruneSvd => "magnitude_prune_svd",
        }
    }

    fn form(self) -> Form {
        match self {
            Self::Cat => Form::Cat,
            Self::Svd => Form::Svd,
            Self::Linear
            | Self::Ties
            | Self::DareLinear
            | Self::DareTies
            | Self::MagnitudePrune => Form::Factors,
            Self::TiesSvd | Self::DareLinearSvd | Self::DareTiesSvd | Self::MagnitudePruneSvd => {
                Form::Whole
            }
        }
    }

    fn sparsity(self) -> Sparsity {
        match self {
            Self::Cat | Self::Svd | Self::Linear => Sparsity::All,
            Self::Ties | Self::TiesSvd | Self::MagnitudePrune | Self::MagnitudePruneSvd => {
                Sparsity::Largest
            }
            Self::DareLinear | Self::DareTies | Self::DareLinearSvd | Self::DareTiesSvd => {
                Sparsity::Random
            }
        }
    }

    fn elects(self) -> bool {
        matches!(
            self,
            Self::Ties | Self::TiesSvd | Self::DareTies | Self::DareTiesSvd
        )
    }

    fn has_svd(self) -> bool {
        matches!(self.form(), Form::Svd | Form::Whole)
    }
}

/// What is combined, how, and where to. An option that a combination does not have must be `None`.
#[derive(Clone, Debug)]
pub struct CombineOptions<'a> {
    /// The adapters' folders.
    pub adapters: &'a [PathBuf],
    /// A weight for each, negative to subtract one; empty: all 1.
    pub weights: &'a [f64],
    /// How.
    pub combination: Combination,
    /// The share of the numbers that stays, in (0, 1]; of TIES, DARE and `magnitude_prune`, which need it.
    pub density: Option<f64>,
    /// How signs are elected, of TIES and `dare_ties`; `None`: [`MajoritySign::Total`].
    pub majority_sign: Option<MajoritySign>,
    /// The rank of `svd` and the others with SVD; `None`: the largest rank of the adapters, module by module.
    pub svd_rank: Option<usize>,
    /// PEFT's `svd_clamp`: limits the numbers of A and B to this quantile of them, in (0.5, 1].
    ///
    /// PEFT takes the quantile of the numbers as they are, though the sign of every pair of vectors is arbitrary; here each
    /// number counts with both signs.
    pub clamp: Option<f64>,
    /// Which random numbers DARE drops; `None`: 0. They are not those of PyTorch.
    pub seed: Option<u64>,
    /// The folder of the new adapter.
    pub output: &'a Path,
    /// How its A and B are stored.
    pub dtype: FileDtype,
    /// Whether an adapter in the folder is replaced.
    pub overwrite: bool,
    /// Whether adapters of different bases or for different tasks are combined.
    pub force: bool,
}

impl<'a> CombineOptions<'a> {
    /// The sum of adapters in a new folder.
    pub fn new(adapters: &'a [PathBuf], output: &'a Path) -> Self {
        Self {
            adapters,
            weights: &[],
            combination: Combination::default(),
            density: None,
            majority_sign: None,
            svd_rank: None,
            clamp: None,
            seed: None,
            output,
            dtype: FileDtype::default(),
            overwrite: false,
            force: false,
        }
    }
}

/// What a combination came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CombineReport {
    /// How it was made.
    pub combination: Combination,
    /// Of what.
    pub adapters: Vec<AdapterShare>,
    /// The adapted linears, in the order of their layers.
    pub modules: Vec<CombinedModule>,
    /// Tensors that are one adapter's own, or the same in all that have them: rows of tokens, and modules that are saved as a whole.
    pub taken_over: Vec<String>,
    /// Numbers in the A's and B's.
    pub parameters: u64,
    /// ‖ΔW‖_F over all modules.
    pub norm: f64,
    /// [`CombinedModule::relative_error`] over all modules.
    pub relative_error: Option<f64>,
}

/// One of the adapters.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AdapterShare {
    /// Its folder.
    pub adapter: String,
    /// Its weight.
    pub weight: f64,
    /// Linears that it adapts.
    pub modules: usize,
}

/// One linear of the result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CombinedModule {
    /// Its name.
    pub module: String,
    /// The rank in each adapter; `None` where one does not adapt it.
    pub ranks: Vec<Option<usize>>,
    /// The rank in the result.
    pub rank: usize,
    /// ‖ΔW‖_F of what was written.
    pub norm: f64,
    /// How far what was written is from what it stands for, relative to that. `cat`, `svd` and `linear` stand for Σ wᵢ·ΔWᵢ, and the others with SVD
    /// for the ΔW before it is cut. `None`: for the others, and where there is nothing to be far from.
    pub relative_error: Option<f64>,
}

/// Combines adapters and writes the result as a PEFT folder.
///
/// # Errors
/// Options that the combination does not have or that are out of range; adapters that are damaged or do not belong together;
/// ranks that differ, where the combination needs one; tensors that are not LoRA's and differ; an output that exists (without
/// `overwrite`) or must not be replaced; a result that is not finite.
pub fn combine(options: &CombineOptions) -> Result<CombineReport, Error> {
    let weights = check(options)?;
    let folders: Vec<&Path> = options.adapters.iter().map(PathBuf::as_path).collect();
    folder::check_output(options.output, options.overwrite, &folders)?;
    let dtype = options.dtype.into();
    folder::write(options.output, options.overwrite, dtype, || {
        let files = folders
            .iter()
            .map(|folder| LoraFile::read(folder))
            .collect::<Result<Vec<_>, _>>()?;
        for (folder, file) in folders.iter().zip(&files) {
            let what = format!(
                "{}: A and B of LoRA adapters can be combined",
                folder.display()
            );
            refuse_magnitudes(
                file,
                &what,
                "merge the adapters into the model one after the other",
            )?;
        }
        let adapters: Vec<Named> = folders.iter().copied().zip(&files).collect();
        let (file, report) = combined(&adapters, &weights, options)?;
        Ok((file, folder::tokenizer_files(&adapters)?, report))
    })
}

/// Checks the options; returns a weight for each adapter.
fn check(options: &CombineOptions) -> Result<Vec<f64>, Error> {
    let (combination, name) = (options.combination, options.combination.name());
    let mut problems = Vec::new();
    let count = options.adapters.len();
    if count == 0 {
        problems.push("there is no adapter to combine".to_owned());
    }
    let weights = match options.weights {
        [] => vec![1.0; count],
        weights => weights.to_vec(),
    };
    if weights.len() != count {
        problems.push(format!(
            "{} says {} numbers for {count} adapters; give one for each, in their order",
            named("weights"),
            weights.len()
        ));
    }
    let sparse = combination.sparsity() != Sparsity::All;
    let mut has = |given: bool, wanted: bool, key: &str| {
        if given && !wanted {
            problems.push(format!(
                "{} does nothing with `{name}`; leave it out",
                named(key)
            ));
        }
    };
    has(options.density.is_some(), sparse, "density");
    has(
        options.majority_sign.is_some(),
        combination.elects(),
        "majority_sign",
    );
    has(
        options.svd_rank.is_some(),
        combination.has_svd(),
        "svd_rank",
    );
    has(options.clamp.is_some(), combination.has_svd(), "clamp");
    has(
        options.seed.is_some(),
        combination.sparsity() == Sparsity::Random,
        "seed",
    );
    if sparse && options.density.is_none() {
        problems.push(format!(
            "`{name}` needs the share of the numbers that stays; give {}",
            valued("density", "0.5")
        ));
    }
    if let Some(density) = options.density.filter(|d| !(*d > 0.0 && *d <= 1.0)) {
        problems.push(format!(
            "{} is {density}; it must be greater than 0 and at most 1",
            named("density")
        ));
    }
    if options.svd_rank == Some(0) {
        problems.push(format!(
            "{} is 0; it must be 1 or greater",
            named("svd_rank")
        ));
    }
    if let Some(clamp) = options.clamp.filter(|c| !(*c > 0.5 && *c <= 1.0)) {
        problems.push(format!(
            "{} is {clamp}; it must be greater than 0.5 and at most 1",
            named("clamp")
        ));
    }
    if let Some(weight) = weights.iter().find(|weight| !weight.is_finite()) {
        problems.push(format!(
            "{} has {weight}, which is not finite",
            named("weights")
        ));
    }
    if problems.is_empty() {
        return Ok(weights);
    }
    Err(Error::Settings(problems.join("\n")))
}

fn combined(
    adapters: &[Named],
    weights: &[f64],
    options: &CombineOptions,
) -> Result<(LoraFile, CombineReport), Error> {
    let agreed = agree::agree(adapters, options.force)?;
    let groups = groups(adapters, weights);
    if options.combination.form() == Form::Factors {
        check_ranks(adapters, &groups, options.combination)?;
    }
    let make = |group: &Group| combine_module(group, options);
    let made: Vec<Made> = match options.combination.form() {
        // Matrices as large as a weight: one module at a time, whose products have all threads.
        Form::Whole => groups.iter().map(make).collect::<Result<_, _>>()?,
        _ => groups.par_iter().map(make).collect::<Result<_, _>>()?,
    };
    let squares = made.iter().map(|made| made.squares);
    let relative_error = total(squares);
    let (modules, reports): (Vec<LoraModule>, Vec<CombinedModule>) = made
        .into_iter()
        .map(|made| (made.module, made.report))
        .unzip();
    let report = CombineReport {
        combination: options.combination,
        adapters: adapters
            .iter()
            .zip(weights)
            .map(|((folder, file), weight)| AdapterShare {
                adapter: folder.display().to_string(),
                weight: *weight,
                modules: file.modules.len(),
            })
            .collect(),
        taken_over: agreed
            .others
            .iter()
            .map(|entry| entry.name.clone())
            .collect(),
        parameters: modules.iter().map(LoraModule::parameters).sum(),
        norm: reports.iter().map(|m| m.norm.powi(2)).sum::<f64>().sqrt(),
        relative_error,
        modules: reports,
    };
    let file = LoraFile {
        config: agreed.config,
        modules,
        others: agreed.others,
        metadata: agreed.metadata,
    };
    Ok((file, report))
}

/// The modules of all, sorted by layer and name.
fn groups<'a>(adapters: &[Named<'a>], weights: &[f64]) -> Vec<Group<'a>> {
    let mut groups: BTreeMap<Vec<(u64, String)>, Group> = BTreeMap::new();
    for (index, ((_, file), weight)) in adapters.iter().zip(weights).enumerate() {
        for module in &file.modules {
            let group = groups.entry(order(&module.name)).or_insert_with(|| Group {
                name: &module.name,
                members: adapters.iter().map(|_| None).collect(),
            });
            group.members[index] = Some(Member {
                module,
                weight: *weight,
            });
        }
    }
    groups.into_values().collect()
}

/// # Errors
/// Modules whose ranks differ, all of which are named.
fn check_ranks(
    adapters: &[Named],
    groups: &[Group],
    combination: Combination,
) -> Result<(), Error> {
    const SHOWN: usize = 3;
    let differ = |group: &&Group| {
        let mut ranks = group.present().map(|member| member.module.rank());
        let first = ranks.next();
        ranks.any(|rank| Some(rank) != first)
    };
    let lines: Vec<String> = groups
        .iter()
        .filter(differ)
        .map(|group| {
            let each = group
                .members
                .iter()
                .zip(adapters)
                .filter_map(|(member, (folder, _))| {
                    Some(format!(
                        "{} in {}",
                        member.as_ref()?.module.rank(),
                        folder.display()
                    ))
                });
            format!(
                "{}: rank {}",
                group.name,
                each.collect::<Vec<_>>().join(", ")
            )
        })
        .collect();
    if lines.is_empty() {
        return Ok(());
    }
    let mut shown: Vec<String> = lines.iter().take(SHOWN).cloned().collect();
    if lines.len() > SHOWN {
        shown.push(format!("and {} more", lines.len() - SHOWN));
    }
    let shown = shown.join("\n  ");
    let name = combination.name();
    let whole = match combination {
        Combination::Linear => String::new(),
        _ => format!(", or `{name}_svd`"),
    };
    Err(Error::Settings(format!(
        "`{name}` adds numbers of A's and of B's, which then must have one rank, and these have not:\n  {shown}\n\
         use `cat` or `svd`{whole} ({})",
        named("combine")
    )))
}
