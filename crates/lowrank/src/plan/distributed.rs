//! What a step takes when several ranks train one run.
//!
//! ```text
//! T = C + 2·(N − 1)/N·B/β + 2·(N − 1)·α
//! ```
//! N ranks; C a rank's share of the operations over its speed; B the bytes of the gradients, 4 a trained value; β the network's bytes
//! a second in each direction, and α its latency. The gradients are exchanged in slices, each rank sums and updates one, and the
//! values are gathered: the bytes are those of a ring all-reduce. Nothing of that is assumed to overlap with computing.
//!
//! With S pipeline stages, N = R·S, the ranks of a stage exchange its values among R, and a pipeline needs M + S − 1 turns for M
//! micro-batches. A turn is the largest stage's time, and the rows that go to the next stage and the gradients that come back.

use std::str::FromStr;

use lowrank_kernels::ComputeDType;
use serde::Serialize;

use super::estimate::{laid_out, piece, work};
use super::flops::{block_flops, head_flops};
use super::memory::{RankPart, rank_memory};
use super::{Memory, PlanOptions, Work};
use crate::Error;
use crate::model::{Adapter, Saving, Stage, split, stages_of_slots};
use crate::names::named;
use crate::settings::TrainConfig;
use crate::tuning::Method;

/// A network between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Network {
    /// Gigabits a second, in each direction.
    pub gigabits: f64,
    /// Seconds until a message arrives.
    pub latency: f64,
}

impl Network {
    /// What a message between two processes over TCP takes on Ethernet, about: 30 µs.
    pub const ETHERNET_LATENCY: f64 = 30e-6;

    /// Seconds for so many bytes in so many messages.
    fn seconds(&self, bytes: f64, messages: usize) -> f64 {
        bytes * 8.0 / (self.gigabits * 1e9) + messages as f64 * self.latency
    }
}

impl FromStr for Network {
    type Err = String;

    /// Reads `10GbE`, `100Gb` or `25`: gigabits a second, with the latency of Ethernet.
    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let unit = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        let number = &text[..text.len() - unit.len()];
        let unit = unit.trim();
        if unit == "GB" {
            return Err(format!(
                "GB are gigabytes, and networks are named in gigabits: {number}Gb"
            ));
        }
        let known = ["", "gbe", "gb", "gbit", "gbps", "gbit/s", "gb/s"];
        let gigabits = number.parse::<f64>().ok();
        match gigabits.filter(|gigabits| gigabits.is_finite() && *gigabits > 0.0) {
            Some(gigabits) if known.contains(&unit.to_ascii_lowercase().as_str()) => Ok(Self {
                gigabits,
                latency: Self::ETHERNET_LATENCY,
            }),
            _ => Err("expected gigabits a second, such as 10GbE, 100Gb or 25".to_owned()),
        }
    }
}

/// Ranks that train one run, and what is between them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ranks {
    /// How many there are.
    pub ranks: usize,
    /// Over how many of them the blocks are shared out; with 1 each has the whole model.
    pub pipeline_stages: usize,
    /// The network.
    pub network: Network,
    /// Operations a second that a rank reaches in training.
    pub flops_per_second: f64,
    /// What a step computes.
    pub step: StepSize,
}

/// How much a step computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepSize {
    /// So many micro-batches in all.
    MicroBatches(usize),
    /// So many tokens for each rank.
    TokensPerRank(usize),
}

/// A step of several ranks, for the method and for full fine-tuning.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RankPlan {
    /// Ranks.
    pub ranks: usize,
    /// Stages that the blocks are shared out over.
    pub pipeline_stages: usize,
    /// The network between the ranks.
    pub network: Network,
    /// Operations a second that a rank is assumed to reach.
    pub flops_per_second: f64,
    /// Tokens of a step over the ranks.
    pub tokens_per_rank: f64,
    /// Micro-batches of a pipeline in a step, or of a rank where there are no stages; of the busiest.
    pub micro_batches: usize,
    /// The method.
    pub method: RankEstimate,
    /// Everything, with Adam.
    pub full: RankEstimate,
}

/// What a step takes of a rank.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RankEstimate {
    /// Seconds of computing, if every rank did the same.
    pub compute_seconds: f64,
    /// Seconds in which ranks wait for others that have more to do, or for the pipeline to fill and to drain.
    pub idle_seconds: f64,
    /// Seconds for rows and gradients between the stages of a pipeline.
    pub pipeline_seconds: f64,
    /// Seconds for gradients and trained values.
    pub exchange_seconds: f64,
    /// All of them.
    pub step_seconds: f64,
    /// Computing over all.
    pub efficiency: f64,
    /// Bytes of the gradients that are exchanged, those of the largest stage.
    pub gradient_bytes: u64,
    /// Bytes of gradients and trained values that a rank sends in a step, and receives.
    pub sent_bytes: u64,
    /// Blocks of each stage.
    pub blocks: Vec<usize>,
    /// The stage that takes most memory, counted from 0.
    pub largest_stage: usize,
    /// Bytes of a rank of that stage.
    pub memory: Memory,
    /// All of them.
    pub peak_memory: u64,
}

/// Plans a step of several ranks.
///
/// # Errors
/// Options that do not fit the model; stages that do not divide the ranks or are more than the blocks; a rank's tokens that are less
/// than a batch's.
pub fn plan_ranks(options: &PlanOptions, ranks: &Ranks) -> Result<RankPlan, Error> {
    let (n, stages) = (ranks.ranks, ranks.pipeline_stages);
    let layers = options.model.num_hidden_layers;
    let problem = if n == 0 || stages == 0 {
        Some("there must be one rank and one pipeline stage at least".to_owned())
    } else if !n.is_multiple_of(stages) {
        Some(format!(
            "{n} ranks are no multiple of {stages} pipeline stages"
        ))
    } else if stages > layers {
        Some(format!(
            "{stages} pipeline stages are more than the {layers} blocks of {}",
            options.name
        ))
    } else {
        None
    };
    if let Some(problem) = problem {
        return Err(Error::Settings(problem));
    }
    let adapter = laid_out(options, options.train)?;
    let batch = work(options, &adapter).tokens;
    let replicas = n / stages;
    let (micro_batches, tokens_per_rank) = match ranks.step {
        StepSize::MicroBatches(all) => {
            let all = all.max(1);
            (all.div_ceil(replicas), all as f64 * batch as f64 / n as f64)
        }
        StepSize::TokensPerRank(tokens) => {
            let of_pipeline = tokens.saturating_mul(stages);
            if of_pipeline < batch {
                return Err(Error::Settings(format!(
                    "{tokens} tokens a rank are less than the {batch} of a batch; lower {batch_size} or {max_seq_length}",
                    batch_size = named("batch_size"),
                    max_seq_length = named("max_seq_length")
                )));
            }
            (of_pipeline.div_ceil(batch), tokens as f64)
        }
    };
    let everything = TrainConfig {
        method: Method::Full,
        init_adapter: None,
        ..options.train.clone()
    };
    let side = |adapter: &Adapter| {
        let step = Step {
            options,
            adapter,
            ranks,
            work: work(options, adapter),
            micro_batches,
            tokens_per_rank,
        };
        step.estimate()
    };
    Ok(RankPlan {
        ranks: n,
        pipeline_stages: stages,
        network: ranks.network,
        flops_per_second: ranks.flops_per_second,
        tokens_per_rank,
        micro_batches,
        method: side(&adapter),
        full: side(&everything.lay_out(options.model)?),
    })
}

/// A step with one method.
struct Step<'a> {
    options: &'a PlanOptions<'a>,
    adapter: &'a Adapter,
    ranks: &'a Ranks,
    /// Of a micro-batch.
    work: Work,
    /// Of a pipeline.
    micro_batches: usize,
    tokens_per_rank: f64,
}

impl Step<'_> {
    fn estimate(&self) -> RankEstimate {
        let config = self.options.model;
        let stages = self.ranks.pipeline_stages;
        let replicas = self.ranks.ranks / stages;
        let costs = self.block_costs();
        // The number of stages was checked.
        let places = split(config, self.adapter, stages).unwrap_or_default();
        let cost = |place: &Stage| costs[place.blocks.clone()].iter().sum::<f64>();
        let dearest = places.iter().map(cost).fold(0.0, f64::max);
        let all: f64 = costs.iter().sum();

        // Seconds of a token, and of the micro-batches as they would be were they all equal.
        let a_token = all / self.work.tokens as f64 / self.ranks.flops_per_second;
        let compute_seconds = self.tokens_per_rank * a_token;
        let turns = (self.pieces() + stages - 1) as f64;
        let tokens = self.tokens_of_a_turn();
        let turn = tokens * a_token * dearest / all;
        let idle_seconds = (turns * turn - compute_seconds).max(0.0);
        let pipeline_seconds = if stages == 1 {
            0.0
        } else {
            let rows = 4.0 * tokens * config.hidden_size as f64;
            turns * self.ranks.network.seconds(2.0 * rows, 2)
        };

        let trained = self.trained_of(&places);
        let most = trained.iter().copied().max().unwrap_or(0);
        let gradient_bytes = 4 * most as u64;
        let sent = 2.0 * (replicas - 1) as f64 / replicas as f64 * gradient_bytes as f64;
        let network = self.ranks.network;
        let exchange_seconds = network.seconds(sent, 2 * (replicas - 1));
        let step_seconds = compute_seconds + idle_seconds + pipeline_seconds + exchange_seconds;
        let memories = (0..places.len()).map(|stage| {
            let above = places.len() - stage;
            self.memory(&places[stage], trained[stage], above, replicas)
        });
        // Of equals the first.
        let (largest_stage, memory) = memories
            .enumerate()
            .reduce(|most, next| {
                if next.1.total() > most.1.total() {
                    next
                } else {
                    most
                }
            })
            .unwrap_or_default();
        RankEstimate {
            compute_seconds,
            idle_seconds,
            pipeline_seconds,
            exchange_seconds,
            step_seconds,
            efficiency: compute_seconds / step_seconds,
            gradient_bytes,
            sent_bytes: sent.round() as u64,
            blocks: places.iter().map(|place| place.blocks.len()).collect(),
            largest_stage,
            memory,
            peak_memory: memory.total(),
        }
    }

    /// Trained values that each stage has.
    fn trained_of(&self, places: &[Stage]) -> Vec<usize> {
        let mut trained = vec![0; places.len()];
        let stages = stages_of_slots(self.options.model, self.adapter, places);
        for (slot, stages) in stages.into_iter().enumerate() {
            let (rows, cols) = self.adapter.params.shape(slot);
            for stage in stages {
                trained[stage] += rows * cols;
            }
        }
        trained
    }

    /// Operations of a micro-batch by block; what stands behind the last is the last's.
    fn block_costs(&self) -> Vec<f64> {
        let (config, layers) = (self.options.model, self.options.model.num_hidden_layers);
        let block = |layer| block_flops(config, self.adapter, self.work, layer).total();
        let mut costs: Vec<f64> = (0..layers).map(block).collect();
        if let Some(last) = costs.last_mut() {
            *last += block(layers) + head_flops(config, self.adapter, self.work);
        }
        costs
    }

    /// Tokens of a micro-batch, of which a pipeline has so many.
    fn tokens_of_a_turn(&self) -> f64 {
        match self.ranks.step {
            StepSize::MicroBatches(_) => {
                self.work.tokens as f64 / piece(self.options, self.adapter).1 as f64
            }
            StepSize::TokensPerRank(tokens) => {
                (tokens * self.ranks.pipeline_stages) as f64 / self.pieces() as f64
            }
        }
    }

    /// Pieces of micro-batches that a pipeline computes, or a rank where there are no stages; the busiest one.
    fn pieces(&self) -> usize {
        let (_, of_batch) = piece(self.options, self.adapter);
        match self.ranks.step {
            StepSize::MicroBatches(all) => {
                let replicas = self.ranks.ranks / self.ranks.pipeline_stages;
                (all.max(1) * of_batch).div_ceil(replicas)
            }
            StepSize::TokensPerRank(_) => self.micro_batches * of_batch,
        }
    }

    /// What a rank of a stage takes that has so many trained values, and `above` stages from it on.
    fn memory(&self, stage: &Stage, trained: usize, above: usize, replicas: usize) -> Memory {
        let (config, adapter) = (self.options.model, self.adapter);
        let (work, _) = piece(self.options, adapter);
        let train = self.options.train;
        let saving = Saving {
            recompute: self.options.recompute,
            dtype: train.base_dtype.into(),
        };
        let part = RankPart {
            stage,
            trained,
            replicas,
            stages_left: above,
            teams: 1,
        };
        let dtype = train.base_dtype.into();
        let pieces = self.pieces();
        let compute = ComputeDType::F32;
        rank_memory(
            config, adapter, part, dtype, 0, work, pieces, saving, compute,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{plan, presets};

    const TERA: f64 = 1e12;

    fn ranks(ranks: usize, pipeline_stages: usize, step: StepSize) -> Ranks {
        Ranks {
            ranks,
            pipeline_stages,
            network: "10GbE".parse().unwrap(),
            flops_per_second: TERA,
            step,
        }
    }

    fn planned(preset: &str, rows: usize, ranks: &Ranks) -> Result<RankPlan, Error> {
        let model = presets::config(preset).unwrap();
        let train = TrainConfig {
            batch_size: rows,
            max_seq_length: 512,
            ..TrainConfig::new(Method::Lora, "m", "", "")
        };
        plan_ranks(&PlanOptions::new(preset, &model, &train), ranks)
    }

    fn assert_near(found: f64, wanted: f64) {
        let off = (found - wanted).abs() / wanted.abs().max(f64::MIN_POSITIVE);
        assert!(off < 1e-9, "{found} is not {wanted}");
    }

    #[test]
    fn networks_are_gigabits() {
        for (text, gigabits) in [
            ("10GbE", 10.0),
            ("100Gb", 100.0),
            ("25", 25.0),
            ("1GbE", 1.0),
            ("2.5 gbit/s", 2.5),
        ] {
            let network: Network = text.parse().unwrap();
            assert_near(network.gigabits, gigabits);
            assert_near(network.latency, 30e-6);
        }
        for text in [
            "", "GbE", "0", "-1", "10MbE", "1e3", "inf", "10 Gb E", "1.2.3",
        ] {
            assert!(text.parse::<Network>().is_err(), "{text}");
        }
        let text = "100GB".parse::<Network>().unwrap_err();
        assert!(text.ends_with("100Gb"), "{text}");
    }

    #[test]
    fn a_step_is_its_formula() {
        let plan = planned("smollm2-135m", 8, &ranks(4, 1, StepSize::MicroBatches(4))).unwrap();
        assert_near(plan.tokens_per_rank, 4096.0);
        assert_eq!(plan.micro_batches, 1);
        for side in [&plan.method, &plan.full] {
            let bytes = side.gradient_bytes as f64;
            let exchange = 2.0 * 0.75 * bytes / 1.25e9 + 6.0 * 30e-6;
            assert_near(side.exchange_seconds, exchange);
            assert_near(side.step_seconds, side.compute_seconds + exchange);
            assert!(side.idle_seconds < 1e-9 * side.step_seconds);
            assert_eq!(side.sent_bytes, (1.5 * bytes) as u64);
        }
        assert_eq!(plan.method.gradient_bytes, 4 * 460_800);
        assert_eq!(plan.full.gradient_bytes, 4 * 134_515_008);
    }

    #[test]
    fn a_rank_alone_is_the_plan_without_ranks() {
        let model = presets::config("smollm2-135m").unwrap();
        for method in Method::ALL {
            let mut train = TrainConfig {
                max_seq_length: 256,
                ..TrainConfig::new(method, "m", "", "")
            };
            train.gradient_accumulation_steps = 4;
            let options = PlanOptions::new("m", &model, &train);
            let alone = plan(&options).unwrap();
            let rank = plan_ranks(&options, &ranks(1, 1, StepSize::MicroBatches(4))).unwrap();
            for (alone, rank) in [(alone.method, rank.method), (alone.full, rank.full)] {
                assert_eq!(alone.memory, rank.memory, "{method:?}");
                assert_near(rank.compute_seconds, 4.0 * alone.flops.total() / TERA);
                assert_near(rank.efficiency, 1.0);
            }
        }
    }

    #[test]
    fn ranks_without_a_micro_batch_wait() {
        let step = StepSize::MicroBatches(6);
        let plan = planned("smollm2-135m", 8, &ranks(4, 1, step)).unwrap();
        assert_eq!(plan.micro_batches, 2);
        // 1.5 micro-batches a rank on average, and two on the busiest; those of LoRA are cut into pieces.
        assert_near(plan.full.idle_seconds, plan.full.compute_seconds / 3.0);
        assert!(plan.full.efficiency < 0.75);
        assert_near(plan.method.idle_seconds, 0.0);
    }

    #[test]
    fn tokens_of_a_rank_make_micro_batches() {
        let step = StepSize::TokensPerRank(8192);
        let by_tokens = planned("smollm2-135m", 8, &ranks(4, 1, step)).unwrap();
        let step = StepSize::MicroBatches(8);
        let by_batches = planned("smollm2-135m", 8, &ranks(4, 1, step)).unwrap();
        assert_eq!(by_tokens.micro_batches, 2);
        assert_eq!(by_tokens.method.memory, by_batches.method.memory);
        assert_near(by_tokens.full.step_seconds, by_batches.full.step_seconds);
        let few = planned(
            "smollm2-135m",
            8,
            &ranks(4, 1, StepSize::TokensPerRank(4095)),
        );
        let text = few.unwrap_err().to_string();
        assert!(text.contains("less than the 4096 of a batch"), "{text}");
    }

    #[test]
    fn stages_have_what_is_theirs() {
        let step = StepSize::MicroBatches(8);
        let one = planned("llama-3-8b", 1, &ranks(4, 1, step)).unwrap();
        let four = planned("llama-3-8b", 1, &ranks(4, 4, step)).unwrap();
        assert_eq!(four.micro_batches, 8);
        let (one, four) = (one.method, four.method);
        assert_eq!(four.blocks.iter().sum::<usize>(), 32);
        // The head is worth some blocks.
        assert!(four.blocks[3] < four.blocks[0]);
        assert!(four.memory.weights < one.memory.weights / 3);
        assert!(four.gradient_bytes < one.gradient_bytes / 3);
        // A pipeline of one replica exchanges nothing, and has no one to divide moments with.
        assert_near(four.exchange_seconds + 1.0, 1.0);
        assert_eq!(four.memory.optimizer, 2 * four.memory.trained);
        assert_eq!(one.memory.optimizer, one.memory.trained / 2);
        // Eleven turns for eight micro-batches.
        assert!(four.idle_seconds / four.compute_seconds > 3.0 / 8.0 - 1e-9);
        assert!(four.pipeline_seconds > 0.0);
    }

    #[test]
    fn ranks_that_do_not_fit_are_refused() {
        let step = StepSize::MicroBatches(4);
        for (n, stages, words) in [
            (4, 3, "4 ranks are no multiple of 3 pipeline stages"),
            (0, 1, "one rank"),
            (4, 0, "one pipeline stage"),
            (64, 64, "64 pipeline stages are more than the 30 blocks"),
        ] {
            let refused = planned("smollm2-135m", 8, &ranks(n, stages, step));
            let text = refused.unwrap_err().to_string();
            assert!(text.contains(words), "{text}");
        }
    }
}
