//! `lowrank plan --ranks`: a step of several ranks.

use std::time::Duration;

use clap::Args;
use lowrank::fields::finite;
use lowrank::plan::{Network, PlanOptions, RankEstimate, RankPlan, Ranks, StepSize, plan_ranks};
use lowrank::tuning::Method;
use lowrank::units::{decimal_bytes, duration, grouped};

use super::MEMORY;
use crate::failure::Misuse;
use crate::output::Output;
use crate::settings::values::at_most;
use crate::table::{Align, Facts, Table, dim};

const RANKS: &str = "Several ranks";

/// Several ranks that train one run.
#[derive(Debug, Args)]
pub struct RanksArgs {
    /// Ranks that train together: also plan the time of a step, and the memory of a rank
    #[arg(long, value_name = "N", value_parser = at_most::<1_000_000>, help_heading = RANKS)]
    pub ranks: Option<usize>,

    /// The network between them, in gigabits a second: 1GbE, 10GbE, 100Gb, 25
    #[arg(long, value_name = "NETWORK", default_value = "10GbE", requires = "ranks", help_heading = RANKS)]
    pub network: String,

    /// Until a message arrives; TCP over Ethernet takes about 30 µs
    #[arg(
        long,
        value_name = "MICROSECONDS",
        value_parser = finite::<f64>,
        default_value_t = Network::ETHERNET_LATENCY * 1e6,
        requires = "ranks",
        help_heading = RANKS
    )]
    pub latency: f64,

    /// What a rank computes a second, in GFLOP/s; `lowrank bench train` measures it
    #[arg(long, value_name = "GFLOPS", value_parser = finite::<f64>, default_value_t = 1000.0, requires = "ranks", help_heading = RANKS)]
    pub gflops: f64,

    /// Tokens that a rank computes in a step [default: what the batches of a step have, over the ranks]
    #[arg(
        long,
        value_name = "TOKENS",
        requires = "ranks",
        conflicts_with = "gradient_accumulation_steps",
        value_parser = at_most::<1_000_000_000>,
        help_heading = RANKS
    )]
    pub tokens_per_rank: Option<usize>,

    /// Groups of ranks that the model's blocks are shared out over
    #[arg(
        long,
        value_name = "S",
        default_value_t = 1,
        requires = "ranks",
        value_parser = at_most::<1_000_000>,
        help_heading = RANKS
    )]
    pub pipeline_stages: usize,
}

impl RanksArgs {
    /// The plan of several ranks, if there are to be some. A step has so many micro-batches, or one for each rank.
    ///
    /// # Errors
    /// A network or a speed that is none; ranks that do not fit the model.
    pub fn plan(
        &self,
        options: &PlanOptions,
        micro_batches: Option<usize>,
    ) -> anyhow::Result<Option<RankPlan>> {
        let Some(ranks) = self.ranks else {
            return Ok(None);
        };
        let mut problems = Misuse::default();
        let network = self.network.parse::<Network>();
        if let Err(problem) = &network {
            problems.push(format!("--network {}: {problem}", self.network));
        }
        if self.latency < 0.0 {
            problems.push(format!(
                "--latency must be 0 or more microseconds, not {}",
                self.latency
            ));
        }
        if self.gflops <= 0.0 {
            problems.push(format!("--gflops must be above 0, not {}", self.gflops));
        }
        let network = Network {
            gigabits: network.map_or(0.0, |network| network.gigabits),
            latency: self.latency / 1e6,
        };
        let network = problems.or(network)?;
        let step = match self.tokens_per_rank {
            Some(tokens) => StepSize::TokensPerRank(tokens),
            None => StepSize::MicroBatches(micro_batches.unwrap_or(ranks)),
        };
        let ranks = Ranks {
            ranks,
            pipeline_stages: self.pipeline_stages,
            network,
            flops_per_second: self.gflops * 1e9,
            step,
        };
        Ok(Some(plan_ranks(options, &ranks)?))
    }
}

/// The plan of several ranks as text.
pub(super) fn text(plan: &RankPlan, method: Method, output: &Output) -> String {
    let mut facts = Facts::default();
    facts.add(
        "network",
        format!(
            "{} Gbit/s in each direction, latency {} µs",
            plan.network.gigabits,
            (plan.network.latency * 1e8).round() / 100.0
        ),
    );
    facts.add(
        "a rank",
        format!(
            "{} GFLOP/s, {} tokens a step",
            grouped((plan.flops_per_second / 1e9).round() as u64),
            grouped(plan.tokens_per_rank.round() as u64)
        ),
    );
    if plan.pipeline_stages > 1 {
        let (stages, replicas) = (plan.pipeline_stages, plan.ranks / plan.pipeline_stages);
        facts.add(
            "pipelines",
            format!(
                "{replicas} of {stages} stages, {} micro-batches each",
                plan.micro_batches
            ),
        );
    }
    let mut text = facts.render(
        &format!("{} ranks", grouped(plan.ranks as u64)),
        output.color,
    );
    text.push('\n');
    text.push_str(&sides(plan, method).render(output.width, output.color));
    text.push('\n');
    let mut note = "Step time is that of computing and of the network one after the other: 2(N-1)/N of the gradients' bytes, and 2(N-1) latencies.".to_owned();
    if plan.pipeline_stages > 1 {
        note.push_str(" N are the ranks of a stage.");
    }
    text.push_str(&dim(&note, output.color));
    text.push('\n');
    text
}

fn sides(plan: &RankPlan, method: Method) -> Table {
    let mut table = Table::new([
        ("", Align::Left),
        (method.title(), Align::Right),
        ("full, Adam", Align::Right),
    ]);
    let mut row = |name: &str, value: &dyn Fn(&RankEstimate) -> String| {
        table.row([name.to_owned(), value(&plan.method), value(&plan.full)]);
    };
    let pipelined = plan.pipeline_stages > 1;
    row("gradients to exchange", &|side| {
        decimal_bytes(side.gradient_bytes)
    });
    row("a rank sends", &|side| decimal_bytes(side.sent_bytes));
    row("time of a step", &|side| seconds(side.step_seconds));
    row("  computing", &|side| seconds(side.compute_seconds));
    let waits = |side: &RankEstimate| side.idle_seconds > 1e-6 * side.step_seconds;
    if pipelined || waits(&plan.method) || waits(&plan.full) {
        row("  idle", &|side| seconds(side.idle_seconds));
    }
    if pipelined {
        row("  between stages", &|side| seconds(side.pipeline_seconds));
    }
    row("  exchange", &|side| seconds(side.exchange_seconds));
    row("efficiency", &|side| {
        format!("{:.1} %", side.efficiency * 100.0)
    });
    if pipelined {
        row("blocks of the stages", &|side| blocks(&side.blocks));
        row("largest stage", &|side| {
            (side.largest_stage + 1).to_string()
        });
    }
    row("peak memory of a rank", &|side| {
        decimal_bytes(side.peak_memory)
    });
    for (name, bytes) in MEMORY {
        row(name, &|side| decimal_bytes(bytes(&side.memory)));
    }
    table
}

fn seconds(seconds: f64) -> String {
    Duration::try_from_secs_f64(seconds).map_or("more than can be told".to_owned(), duration)
}

/// `8, 8, 7`, or `3 × 8, 7` where neighbours are alike.
fn blocks(blocks: &[usize]) -> String {
    let runs = blocks.chunk_by(|a, b| a == b);
    let runs = runs.map(|run| match run {
        [one] => one.to_string(),
        many => format!("{} × {}", many.len(), many[0]),
    });
    runs.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use lowrank::plan::presets;
    use lowrank::settings::TrainConfig;

    use super::*;

    fn shown(preset: &str, ranks: usize, pipeline_stages: usize) -> String {
        let model = presets::config(preset).unwrap();
        let train = TrainConfig {
            max_seq_length: 512,
            ..TrainConfig::new(Method::Lora, "", "", "")
        };
        let options = PlanOptions::new(preset, &model, &train);
        let args = RanksArgs {
            ranks: Some(ranks),
            network: "10GbE".to_owned(),
            latency: 30.0,
            gflops: 1000.0,
            tokens_per_rank: None,
            pipeline_stages,
        };
        let plan = args.plan(&options, None).unwrap().unwrap();
        let output = Output {
            json: false,
            color: false,
            width: 120,
        };
        text(&plan, Method::Lora, &output)
    }

    #[test]
    fn a_step_of_four_ranks() {
        insta::assert_snapshot!(shown("smollm2-135m", 4, 1), @r#"
        4 ranks
        network  10 Gbit/s in each direction, latency 30 µs
        a rank   1,000 GFLOP/s, 4,096 tokens a step

                                   LoRA  full, Adam
        gradients to exchange    1.8 MB    538.1 MB
        a rank sends             2.8 MB    807.1 MB
        time of a step            2.4 s       4.2 s
          computing               2.4 s       3.5 s
          exchange              2.39 ms      646 ms
        efficiency               99.9 %      84.5 %
        peak memory of a rank  543.9 MB      3.4 GB
          frozen weights       269.1 MB     0 bytes
          trained values         1.8 MB    538.1 MB
          gradients              8.3 MB    739.7 MB
          optimizer            921.6 kB    269.0 MB
          activations          190.4 MB      1.7 GB
          working space         54.5 MB    207.0 MB
          program               18.9 MB     18.9 MB

        Step time is that of computing and of the network one after the other: 2(N-1)/N of the gradients' bytes, and 2(N-1) latencies.
        "#);
    }

    #[test]
    fn a_pipeline_of_four_stages() {
        insta::assert_snapshot!(shown("llama-3-8b", 8, 4), @r#"
        8 ranks
        network    10 Gbit/s in each direction, latency 30 µs
        a rank     1,000 GFLOP/s, 4,096 tokens a step
        pipelines  2 of 4 stages, 4 micro-batches each

                                      LoRA   full, Adam
        gradients to exchange       3.8 MB       9.1 GB
        a rank sends                3.8 MB       9.1 GB
        time of a step          2 min 23 s   5 min 48 s
          computing              2 min 4 s    3 min 6 s
          idle                        18 s   2 min 34 s
          between stages            472 ms       752 ms
          exchange                 3.13 ms        7.3 s
        efficiency                  86.8 %       53.3 %
        blocks of the stages   8, 2 × 9, 6  8, 2 × 9, 6
        largest stage                    1            1
        peak memory of a rank       6.3 GB      65.1 GB
          frozen weights            4.5 GB      0 bytes
          trained values            3.4 MB       9.1 GB
          gradients                23.9 MB      31.9 GB
          optimizer                 3.4 MB       9.1 GB
          activations               1.6 GB      14.0 GB
          working space           134.2 MB       1.1 GB
          program                  18.9 MB      18.9 MB

        Step time is that of computing and of the network one after the other: 2(N-1)/N of the gradients' bytes, and 2(N-1) latencies. N are the ranks of a stage.
        "#);
    }

    #[test]
    fn like_neighbours_are_counted() {
        assert_eq!(blocks(&[8, 8, 7]), "2 × 8, 7");
        assert_eq!(blocks(&[30]), "30");
    }
}
