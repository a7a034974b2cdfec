//! From a `LoraConfig` to branches beside a model's linears, with their first values.

use std::collections::{HashMap, HashSet};
use std::fmt;

use lowrank_formats::peft::{
    LoraConfig, LoraPart, ModuleNames, TargetModules, lora_key, magnitude_key,
};
use lowrank_kernels::{fill_normal, fill_uniform};

use super::{Candidate, InitLoraWeights, candidates};
use crate::Error;
use crate::model::{Adapter, LowRankSite, ModelConfig};
use crate::random::mix;

/// What the targets matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Coverage {
    /// Each target with the number of modules it matched.
    pub targets: Vec<(String, usize)>,
    /// Modules adapted in all.
    pub modules: usize,
    /// Values trained.
    pub parameters: usize,
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let targets: Vec<_> = self
            .targets
            .iter()
            .map(|(target, n)| format!("{target} ×{n}"))
            .collect();
        write!(
            f,
            "{} modules adapted ({}), {} trainable parameters",
            self.modules,
            targets.join(", "),
            self.parameters
        )
    }
}

/// Puts a branch beside every linear that `lora` targets. Rows of tokens that it names are all zero, and so are magnitudes, until
/// [`Adapter::begin_magnitudes`]. Beginnings that are made of the weights ([`InitLoraWeights::Pissa`] and its like) are Gaussian here: the
/// weights are the method's to read.
///
/// # Errors
/// A target or a pattern that matches nothing; a fused linear targeted both whole and in parts; a rank larger than the
/// linear. Every problem is named.
pub fn inject(
    config: &ModelConfig,
    lora: &LoraConfig,
    init: InitLoraWeights,
    seed: u64,
) -> Result<(Adapter, Coverage), Error> {
    // What could not be read back must not be trained.
    let mut adapter = super::lay_out(config, lora)?;
    let chosen = choose(config, lora)?;
    for (index, sites) in chosen.iter().enumerate() {
        let (a, b) = (2 * index, 2 * index + 1);
        let (r, input) = adapter.params.shape(a);
        let kaiming = |fan_in: usize| 1.0 / (fan_in as f32).sqrt();
        let key = mix(seed, index as u64);
        match init {
            InitLoraWeights::Gaussian
            | InitLoraWeights::Pissa
            | InitLoraWeights::PissaNiter(_)
            | InitLoraWeights::Olora
            | InitLoraWeights::Loftq => {
                fill_normal(adapter.params.view_mut(a), 1.0 / r as f32, key);
            }
            InitLoraWeights::KaimingUniform | InitLoraWeights::Random => {
                let bound = kaiming(input);
                fill_uniform(adapter.params.view_mut(a), -bound, bound, key);
            }
        }
        if init == InitLoraWeights::Random {
            let bound = kaiming(r);
            fill_uniform(adapter.params.view_mut(b), -bound, bound, mix(key, 1));
        }
        debug_assert_eq!(adapter.names[a], lora_key(&sites.name, LoraPart::A));
    }
    let coverage = coverage(lora, &chosen, adapter.parameters());
    Ok((adapter, coverage))
}

/// Number of values that are trained in branches.
///
/// # Errors
/// As [`inject`].
pub fn parameters(config: &ModelConfig, lora: &LoraConfig) -> Result<usize, Error> {
    let size = |place: &Candidate| {
        let (input, output) = config.linear_shape(place.id.kind);
        let columns = place
            .part
            .map_or(output, |part| config.fused_columns(part).len());
        lora.rank_of(&place.name) * (input + columns)
    };
    let chosen = choose(config, lora)?;
    let magnitudes = magnitudes(lora, &chosen);
    let outputs = magnitudes.map(|place| config.linear_shape(place.id.kind).1);
    Ok(chosen.iter().map(size).sum::<usize>() + outputs.sum::<usize>())
}

/// The places whose modules have magnitudes: the first of each module, whose parts share them.
fn magnitudes<'a>(
    lora: &LoraConfig,
    chosen: &'a [Candidate],
) -> impl Iterator<Item = &'a Candidate> {
    let wanted = lora.use_dora;
    let others = std::iter::once(None).chain(chosen.iter().map(Some));
    let pairs = chosen.iter().zip(others);
    let firsts = pairs.filter(|(place, before)| before.is_none_or(|before| before.id != place.id));
    firsts.filter(move |_| wanted).map(|(place, _)| place)
}

/// The slots and branches for the chosen places, all zero: A of place i is slot 2i, B slot 2i + 1. Magnitudes lie behind these.
pub(super) fn lay_out(config: &ModelConfig, lora: &LoraConfig, chosen: &[Candidate]) -> Adapter {
    let mut params = Vec::new();
    let mut low_rank: HashMap<_, Vec<LowRankSite>> = HashMap::new();
    for (index, place) in chosen.iter().enumerate() {
        let (input, output) = config.linear_shape(place.id.kind);
        let columns = place
            .part
            .map_or(0..output, |part| config.fused_columns(part));
        let r = lora.rank_of(&place.name);
        params.extend([
            (lora_key(&place.name, LoraPart::A), (r, input)),
            (lora_key(&place.name, LoraPart::B), (columns.len(), r)),
        ]);
        low_rank.entry(place.id).or_default().push(LowRankSite {
            a: 2 * index,
            b: 2 * index + 1,
            scale: lora.scale_of(&place.name) as f32,
            out_offset: columns.start,
            dropout: lora.lora_dropout as f32,
        });
    }
    let mut by_linear = HashMap::new();
    for place in magnitudes(lora, chosen) {
        let (_, output) = config.linear_shape(place.id.kind);
        by_linear.insert(place.id, params.len());
        params.push((magnitude_key(&place.module), (1, output)));
    }
    Adapter {
        low_rank,
        magnitudes: by_linear,
        ..Adapter::new(params)
    }
}

/// The places that a config targets, in the model's order.
pub(in crate::tuning) fn choose(
    config: &ModelConfig,
    lora: &LoraConfig,
) -> Result<Vec<Candidate>, Error> {
    let all = candidates(config);
    let whole: HashSet<&str> = all
        .iter()
        .filter(|c| c.part.is_none() && lora.matches(&c.name))
        .map(|c| c.name.as_str())
        .collect();
    let mut problems = Vec::new();
    let mut chosen = Vec::new();
    for place in &all {
        let taken = match (place.part, &lora.target_modules) {
            (None, _) => whole.contains(place.name.as_str()),
            (Some(_), TargetModules::AllLinear) => false,
            // A pattern such as `.*attn.*` means the module and not its parts beside it.
            (Some(_), TargetModules::Regex(_)) => {
                !whole.contains(place.module.as_str()) && lora.matches(&place.name)
            }
            (Some(_), TargetModules::List(_)) => lora.matches(&place.name),
        };
        if taken {
            if place.part.is_some() && whole.contains(place.module.as_str()) {
                problems.push(format!(
                    "{} is targeted whole and in the part {}; choose one",
                    place.module, place.name
                ));
            }
            chosen.push(place.clone());
        }
    }
    if let TargetModules::List(names) = &lora.target_modules {
        for name in names
            .iter()
            .filter(|name| !chosen.iter().any(|place| matches_entry(&place.name, name)))
        {
            problems.push(format!("target_modules: `{name}` matches no module"));
        }
    } else if chosen.is_empty() {
        problems.push(format!(
            "target_modules: {} matches no module",
            lora.target_modules
        ));
    }
    problems.extend(unmatched_exclusions(lora, &all));
    problems.extend(unmatched_patterns(lora, &chosen));
    for place in &chosen {
        let (r, (input, output)) = (
            lora.rank_of(&place.name),
            config.linear_shape(place.id.kind),
        );
        let output = place
            .part
            .map_or(output, |part| config.fused_columns(part).len());
        if r > input.min(output) {
            problems.push(format!(
                "{}: r {r} is larger than the module ([{output}, {input}])",
                place.name
            ));
        }
    }
    if problems.is_empty() {
        return Ok(chosen);
    }
    let mut known: Vec<_> = all
        .iter()
        .filter(|c| c.id.layer == 0)
        .filter_map(|c| c.name.split_once(".0.").map(|(_, tail)| tail.to_owned()))
        .collect();
    known.dedup();
    problems.push(format!("this model's linears are {}", known.join(", ")));
    Err(Error::Settings(problems.join("\n")))
}

fn matches_entry(module: &str, entry: &str) -> bool {
    module
        .strip_suffix(entry)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Names of modules to leave out that no linear of the model has.
fn unmatched_exclusions(lora: &LoraConfig, all: &[Candidate]) -> Vec<String> {
    let each: Vec<(String, ModuleNames)> = match &lora.exclude_modules {
        None => Vec::new(),
        Some(ModuleNames::Regex(regex)) => vec![(regex.clone(), ModuleNames::Regex(regex.clone()))],
        Some(ModuleNames::List(names)) => names
            .iter()
            .map(|name| (name.clone(), ModuleNames::List(vec![name.clone()])))
            .collect(),
    };
    each.into_iter()
        .filter_map(|(shown, names)| {
            let only = LoraConfig {
                target_modules: TargetModules::AllLinear,
                exclude_modules: Some(names),
                ..LoraConfig::default()
            };
            let excludes = all.iter().any(|place| !only.matches(&place.name));
            (!excludes).then(|| format!("exclude_modules: `{shown}` matches no module"))
        })
        .collect()
}

fn unmatched_patterns(lora: &LoraConfig, chosen: &[Candidate]) -> Vec<String> {
    let unmatched = |field: &str, key: &str, only: &LoraConfig| {
        let used = chosen.iter().any(|place| {
            if field == "rank_pattern" {
                only.rank_of(&place.name) == usize::MAX
            } else {
                only.alpha_of(&place.name).is_infinite()
            }
        });
        (!used).then(|| format!("{field}: `{key}` matches no adapted module"))
    };
    let mut problems = Vec::new();
    for (key, _) in &lora.rank_pattern {
        let only = LoraConfig {
            rank_pattern: vec![(key.clone(), usize::MAX)],
            ..lora.clone()
        };
        problems.extend(unmatched("rank_pattern", key, &only));
    }
    for (key, _) in &lora.alpha_pattern {
        let only = LoraConfig {
            alpha_pattern: vec![(key.clone(), f64::INFINITY)],
            ..lora.clone()
        };
        problems.extend(unmatched("alpha_pattern", key, &only));
    }
    problems
}

pub(in crate::tuning) fn coverage(
    lora: &LoraConfig,
    chosen: &[Candidate],
    parameters: usize,
) -> Coverage {
    let targets = match &lora.target_modules {
        TargetModules::List(names) => names
            .iter()
            .map(|name| {
                (
                    name.clone(),
                    chosen
                        .iter()
                        .filter(|place| matches_entry(&place.name, name))
                        .count(),
                )
            })
            .collect(),
        other => vec![(other.to_string(), chosen.len())],
    };
    Coverage {
        targets,
        modules: chosen.len(),
        parameters,
    }
}
