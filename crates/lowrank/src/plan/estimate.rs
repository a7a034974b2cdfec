//! A method beside full fine-tuning: values, files, operations and memory.

use lowrank_kernels::{ComputeDType, DType};
use serde::Serialize;

use super::paper::{Claim, claims};
use super::{Memory, RankPlan, StepFlops, Work, step_flops, training_memory};
use crate::Error;
use crate::machine::available_memory;
use crate::model::{Adapter, Batch, ModelConfig, Recompute, Saving};
use crate::names::named;
use crate::settings::{ComputeFormat, TrainConfig};
use crate::tuning::Method;

/// What is planned.
#[derive(Clone, Copy, Debug)]
pub struct PlanOptions<'a> {
    /// What the model is called.
    pub name: &'a str,
    /// Its shapes.
    pub model: &'a ModelConfig,
    /// The run's settings: the method and its options, the base's dtype, batch size and row length.
    pub train: &'a TrainConfig,
    /// What the blocks compute again.
    pub recompute: Recompute,
    /// How the trained values would be stored in a file.
    pub file_dtype: DType,
}

impl<'a> PlanOptions<'a> {
    /// A run with these settings. Where the settings do not say what a block computes again, it is nothing; the trained
    /// values would be stored as f32, as [`train`](crate::train::train) writes them.
    pub fn new(name: &'a str, model: &'a ModelConfig, train: &'a TrainConfig) -> Self {
        Self {
            name,
            model,
            train,
            recompute: train.recompute.unwrap_or(Recompute::None),
            file_dtype: DType::F32,
        }
    }
}

/// A method beside full fine-tuning of the same model on the same rows.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Plan {
    /// What the model is called.
    pub model: String,
    /// Parameters of the model.
    pub parameters: u64,
    /// Outputs of its classifier, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<usize>,
    /// Rows of a batch.
    pub batch_size: usize,
    /// Batches of a step.
    pub micro_batches: usize,
    /// Tokens of a row.
    pub seq_length: usize,
    /// The work of a batch with the method. Of a language model every token but a row's first carries loss; a classifier reads of each
    /// row what it reads.
    pub work: Work,
    /// How weights are held that the files do not have in fewer bits.
    pub base_dtype: String,
    /// What the matrices are kept in.
    pub weights: String,
    /// How this processor reads the factors of products.
    pub compute_dtype: ComputeFormat,
    /// How the trained values would be stored in a file.
    pub file_dtype: String,
    /// What the blocks compute again.
    pub recompute: Recompute,
    /// The method.
    pub method: Estimate,
    /// Everything, with Adam.
    pub full: Estimate,
    /// Two ways to count the values of prefix tuning; with that method alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix: Option<PrefixCounts>,
    /// The same for several ranks ([`plan_ranks`](super::plan_ranks)), where somebody asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks: Option<RankPlan>,
    /// Memory that the machine has free.
    pub available_memory: Option<u64>,
    /// What Hu et al. (2021) say of this model, beside what their formulas give.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub paper: Vec<Claim>,
}

/// What a method takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Estimate {
    /// The method.
    pub method: Method,
    /// Values that are trained.
    pub trainable_parameters: u64,
    /// The model's parameters over those that are trained.
    pub reduction: f64,
    /// Bytes of the trained values in a file.
    pub file_bytes: u64,
    /// Operations of a batch's forward and backward.
    pub flops: StepFlops,
    /// The same over the batch's tokens.
    pub flops_per_token: f64,
    /// Bytes at the peak of training in this program, with f32 gradients and moments, from a file of the base's dtype.
    pub memory: Memory,
    /// All of them.
    pub peak_memory: u64,
}

/// The values of prefix tuning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PrefixCounts {
    /// L·d·(l_p + l_i) of the paper, or d·(l_p + l_i) for embeddings: an activation a layer and virtual token.
    pub paper: u64,
    /// 2·L·KV·D·n of PEFT, or d·n for embeddings: a key and a value a layer and virtual token. This is what is trained.
    pub peft: u64,
}

/// Plans a run. Nothing is loaded, and nothing as large as the model is allocated.
///
/// # Errors
/// Options that do not fit the model; rows that are longer than it takes.
pub fn plan(options: &PlanOptions) -> Result<Plan, Error> {
    let (model, train) = (options.model, options.train);
    let adapter = laid_out(options, train)?;
    let everything = TrainConfig {
        method: Method::Full,
        init_adapter: None,
        ..train.clone()
    };
    let prefix = train
        .method
        .paper_parameters(&train.options, model)
        .map(|paper| PrefixCounts {
            paper: paper as u64,
            peft: adapter.parameters() as u64,
        });
    Ok(Plan {
        model: options.name.to_owned(),
        parameters: model.parameters() as u64,
        labels: model.classifier().map(|classifier| classifier.labels),
        batch_size: train.batch_size,
        micro_batches: train.gradient_accumulation_steps,
        seq_length: train.max_seq_length,
        work: work(options, &adapter),
        base_dtype: DType::from(train.base_dtype).to_string(),
        weights: model.kept_in(train.base_dtype.into()),
        compute_dtype: train.compute_format().here(),
        file_dtype: options.file_dtype.to_string(),
        recompute: options.recompute,
        method: estimate(options, train.method, &adapter),
        full: estimate(options, Method::Full, &everything.lay_out(model)?),
        prefix,
        ranks: None,
        available_memory: available_memory(),
        paper: claims(options.name),
    })
}

/// Where in the model the trained values of these settings stand, which may be those of another method than the options'.
///
/// # Errors
/// Options that do not fit the model; rows that are longer than it takes.
pub(super) fn laid_out(options: &PlanOptions, train: &TrainConfig) -> Result<Adapter, Error> {
    let limit = options.model.longest_sequence();
    if let Some(problem) = train.problems().first() {
        return Err(Error::Settings(problem.clone()));
    }
    let adapter = train.lay_out(options.model)?;
    let length = train
        .max_seq_length
        .saturating_add(adapter.virtual_tokens().total());
    if length > limit {
        return Err(Error::Settings(format!(
            "rows of {length} tokens are too long: {} was made for {limit}; lower {max_seq_length}",
            options.name,
            max_seq_length = named("max_seq_length")
        )));
    }
    Ok(adapter)
}

/// The work of the largest piece that a batch is computed in, and how many pieces there are.
pub(super) fn piece(options: &PlanOptions, adapter: &Adapter) -> (Work, usize) {
    let (model, rows) = (options.model, options.train.batch_size);
    let (length, tokens) = (options.train.max_seq_length, adapter.virtual_tokens());
    let all = rows * (length + tokens.prefix + tokens.infix);
    let of_piece = rows.div_ceil(Batch::pieces(model, adapter.parameters(), all));
    let work = Work::planned(model, of_piece, length, tokens);
    (work, rows.div_ceil(of_piece.max(1)))
}

/// The work of a batch.
pub(super) fn work(options: &PlanOptions, adapter: &Adapter) -> Work {
    let (rows, length) = (options.train.batch_size, options.train.max_seq_length);
    Work::planned(options.model, rows, length, adapter.virtual_tokens())
}

fn estimate(options: &PlanOptions, method: Method, adapter: &Adapter) -> Estimate {
    let (model, train) = (options.model, options.train);
    let work = work(options, adapter);
    let trained = adapter.parameters() as u64;
    let saving = Saving {
        recompute: options.recompute,
        dtype: train.base_dtype.into(),
    };
    let (of_piece, pieces) = piece(options, adapter);
    let pieces = pieces * train.gradient_accumulation_steps;
    let base_dtype = train.base_dtype.into();
    // Plans are the same on every machine: for threads that make one team, and attention in f32.
    let compute = ComputeDType::F32;
    let memory = training_memory(
        model, adapter, base_dtype, 0, of_piece, pieces, 1, saving, compute,
    );
    let flops = step_flops(model, adapter, work);
    Estimate {
        method,
        trainable_parameters: trained,
        reduction: model.parameters() as f64 / trained as f64,
        file_bytes: options.file_dtype.bytes_for(adapter.parameters()) as u64,
        flops,
        flops_per_token: flops.total() / work.tokens as f64,
        memory,
        peak_memory: memory.total(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Purpose;
    use crate::plan::presets;
    use crate::tuning::prefix::Kind;
    use crate::tuning::targets::Targets;

    fn planned(preset: &str, train: &TrainConfig) -> Result<Plan, Error> {
        let bare = presets::config(preset).unwrap();
        let model = if bare.causal {
            bare
        } else {
            let purpose = Purpose::SequenceClassifier { labels: 3 };
            presets::config_for(preset, purpose).unwrap()
        };
        plan(&PlanOptions {
            name: preset,
            model: &model,
            train,
            recompute: Recompute::None,
            file_dtype: DType::Bf16,
        })
    }

    fn train(method: Method) -> TrainConfig {
        TrainConfig {
            batch_size: 2,
            max_seq_length: 512,
            ..TrainConfig::new(method, "m", "", "")
        }
    }

    #[test]
    fn gpt3_is_planned_without_its_memory() {
        let mut lora = train(Method::Lora);
        lora.options.lora.r = 4;
        let names = Targets::Names(vec!["q_proj".into(), "v_proj".into()]);
        lora.options.targets.target_modules = Some(names);
        let plan = planned("gpt3-175b", &lora).unwrap();
        assert_eq!(plan.method.trainable_parameters, 18_874_368);
        assert!((9_200.0..9_400.0).contains(&plan.method.reduction));
        assert_eq!(plan.method.file_bytes, 37_748_736);
        assert!((348e9..351e9).contains(&(plan.full.file_bytes as f64)));
        assert!(plan.full.memory.optimizer > 1 << 40);
        assert!(plan.method.memory.optimizer < 1 << 28);
        // Two thirds of the operations in the blocks: 4 instead of 6 a weight and token.
        let ratio = plan.method.flops.linears / plan.full.flops.linears;
        assert!((ratio - 2.0 / 3.0).abs() < 0.01, "{ratio}");
        assert!(!plan.paper.is_empty());
    }

    #[test]
    fn every_method_is_planned_for_every_preset() {
        for preset in presets::NAMES {
            for method in Method::ALL {
                let mut train = TrainConfig {
                    max_seq_length: 256,
                    ..train(method)
                };
                if presets::config(preset).unwrap().relative.is_some() {
                    // Keys that are no rows have no place there.
                    train.options.prefix.prefix_kind = Kind::Embedding;
                }
                let plan = planned(preset, &train).unwrap();
                let (found, full) = (plan.method, plan.full);
                assert!(found.trainable_parameters > 0, "{preset} {method:?}");
                assert!(found.trainable_parameters <= full.trainable_parameters);
                assert!(found.flops.total() <= full.flops.total() * 1.1);
                assert_eq!(plan.prefix.is_some(), method == Method::Prefix);
            }
        }
    }

    #[test]
    fn computing_again_takes_less_memory() {
        let model = presets::config("smollm2-135m").unwrap();
        let train = train(Method::Lora);
        let [none, selective, full] =
            [Recompute::None, Recompute::Selective, Recompute::Full].map(|recompute| {
                let options = PlanOptions {
                    name: "m",
                    model: &model,
                    train: &train,
                    recompute,
                    file_dtype: DType::F32,
                };
                plan(&options).unwrap().method.memory.activations
            });
        assert!(none > selective && selective > full);
    }

    #[test]
    fn rows_that_are_too_long_are_refused() {
        let long = TrainConfig {
            max_seq_length: 1020,
            ..train(Method::Prefix)
        };
        let text = planned("gpt2", &long).unwrap_err().to_string();
        assert!(text.contains("1040 tokens are too long"), "{text}");
    }
}
