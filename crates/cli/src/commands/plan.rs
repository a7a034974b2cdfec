//! `lowrank plan`.

mod ranks;

use std::path::PathBuf;

use clap::{ArgMatches, Args};
use lowrank::DType;
use lowrank::base::{Source, purpose_for};
use lowrank::data::TaskType;
use lowrank::model::{LoadIn, ModelConfig, Recompute, families};
use lowrank::plan::paper::Origin;
use lowrank::plan::{Estimate, Memory, Plan, PlanOptions, plan, presets};
use lowrank::settings::{BaseDtype, ComputeFormat, TrainConfig};
use lowrank::units::{decimal_bytes, grouped};

use self::ranks::RanksArgs;
use crate::failure::Misuse;
use crate::output::Output;
use crate::settings::Flags;
use crate::settings::method::MethodArgs;
use crate::settings::values::at_most;
use crate::table::{Align, Facts, Table, bold, dim};

const RUN: &str = "Run";

/// Arguments of `lowrank plan`.
#[derive(Debug, Args)]
#[command(mut_arg("add_tokens", |arg| arg.hide(true)))]
pub struct PlanArgs {
    /// The model: a folder in the Hugging Face layout, an id of the Hub, or builtin:tiny; only config.json is read
    #[arg(long, value_name = "MODEL", required_unless_present_any = ["preset", "config"])]
    pub model: Option<String>,

    /// A well-known model, of which nothing need be there: gpt2, gpt2-medium, gpt3-175b, llama-3-8b, smollm2-135m, …
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    pub preset: Option<String>,

    /// A config.json alone
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "preset"])]
    pub config: Option<PathBuf>,

    /// What is trained
    #[command(flatten)]
    pub trained: MethodArgs,

    /// What it is trained for [default: what config.json says; an encoder by itself is trained to classify]
    #[arg(long, value_name = "TASK", help_heading = RUN)]
    pub task_type: Option<TaskType>,

    /// Labels of a classifier [default: those that config.json names, or 2]
    #[arg(long, value_name = "N", value_parser = at_most::<1_000_000>, help_heading = RUN)]
    pub num_labels: Option<usize>,

    /// Rows computed at a time
    #[arg(long, value_name = "ROWS", default_value_t = 8, value_parser = at_most::<1_000_000>, help_heading = RUN)]
    pub batch_size: usize,

    /// Tokens of each row [default: 2048, or what the model takes where that is less]
    #[arg(long, value_name = "TOKENS", help_heading = RUN)]
    pub max_seq_length: Option<usize>,

    /// What a block computes again in the backward
    #[arg(long, value_name = "WHAT", default_value = "none", help_heading = RUN)]
    pub recompute: Recompute,

    /// How the weights are held
    #[arg(long, value_name = "DTYPE", default_value = "bf16", help_heading = RUN)]
    pub base_dtype: BaseDtype,

    /// Quantize the matrices of the blocks while they are loaded
    #[arg(long, value_name = "BITS", help_heading = RUN)]
    pub load_in: Option<LoadIn>,

    /// How the factors of products are read [default: bf16 beside a base in bf16, else f32]
    #[arg(long, value_name = "DTYPE", help_heading = RUN)]
    pub compute_dtype: Option<ComputeFormat>,

    /// How a file would hold the trained values; the adapters that `lowrank train` writes are f32
    #[arg(long, value_name = "DTYPE", default_value = "bf16", help_heading = RUN)]
    pub dtype: BaseDtype,

    /// Batches of an optimizer step [default: 1, or one for each rank]
    #[arg(long, value_name = "N", value_parser = at_most::<1_000_000>, help_heading = RUN)]
    pub gradient_accumulation_steps: Option<usize>,

    /// Several ranks
    #[command(flatten)]
    pub ranks: RanksArgs,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// A model that is not known, options that do not fit it.
pub fn run(args: &PlanArgs, matches: &ArgMatches) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    let (name, mut model) = model(args)?;
    if let Some(load_in) = args.load_in {
        load_in.mark(&mut model);
    }
    let options = PlanOptions {
        name: &name,
        model: &model,
        train: &train_config(args, matches, &model)?,
        recompute: args.recompute,
        file_dtype: DType::from(args.dtype),
    };
    let mut plan = plan(&options)?;
    plan.ranks = args
        .ranks
        .plan(&options, args.gradient_accumulation_steps)?;
    output.result(&plan, |output| text(&plan, output))
}

/// What the model is called, and its shapes.
fn model(args: &PlanArgs) -> anyhow::Result<(String, ModelConfig)> {
    if args.num_labels == Some(0) {
        return Err(Misuse::new("--num-labels is 0; a classifier has one label at least").into());
    }
    let purpose = |raw: &_| purpose_for(raw, args.task_type, args.num_labels);
    Ok(match (&args.preset, &args.config) {
        (Some(name), _) => {
            let purpose = purpose(&presets::raw(name)?)?;
            (name.clone(), presets::config_for(name, purpose)?)
        }
        (None, Some(file)) => {
            let raw = families::read_raw(file)?;
            let config = families::read_config_for(&raw, purpose(&raw)?);
            let config = config.map_err(lowrank::Error::from)?;
            (file.display().to_string(), config)
        }
        (None, None) => {
            let name = args.model.clone().unwrap_or_default();
            let source = Source::find(&name)?.load_in(args.load_in)?;
            let purpose = purpose(&source.config()?)?;
            (name, source.shapes_for(purpose)?)
        }
    })
}

fn train_config(
    args: &PlanArgs,
    matches: &ArgMatches,
    model: &ModelConfig,
) -> anyhow::Result<TrainConfig> {
    let config = TrainConfig {
        batch_size: args.batch_size,
        gradient_accumulation_steps: args.gradient_accumulation_steps.unwrap_or(1),
        max_seq_length: args
            .max_seq_length
            .unwrap_or_else(|| default_length(&args.trained, model)),
        base_dtype: args.base_dtype,
        compute_dtype: args.compute_dtype,
        ..args.trained.train_config("", matches)?
    };
    let mut problems = Misuse::default();
    for problem in config.problems_as(&Flags) {
        problems.push(problem);
    }
    Ok(problems.or(config)?)
}

/// As long as rows are by default, virtual tokens included, where the model takes that.
fn default_length(trained: &MethodArgs, model: &ModelConfig) -> usize {
    let before = trained.method.positions(&trained.options);
    let room = model.max_position_embeddings.saturating_sub(before);
    room.clamp(1, 2048)
}

fn text(plan: &Plan, output: &Output) -> String {
    let mut facts = Facts::default();
    facts.add("parameters", grouped(plan.parameters));
    if let Some(labels) = plan.labels {
        facts.add(
            "classifier",
            format!("{labels} labels, trained with every method"),
        );
    }
    facts.add(
        "batch",
        format!(
            "{} rows of {} tokens, weights in {}, factors read as {}, recompute {}",
            plan.batch_size, plan.seq_length, plan.weights, plan.compute_dtype, plan.recompute
        ),
    );
    if plan.micro_batches > 1 {
        let batches = format!(
            "{} batches, whose gradients are added pairwise",
            plan.micro_batches
        );
        facts.add("step", batches);
    }
    if let Some(free) = plan.available_memory {
        facts.add("this machine", format!("{} free", decimal_bytes(free)));
    }
    let mut text = facts.render(&plan.model, output.color);
    text.push('\n');
    text.push_str(&sides(plan).render(output.width, output.color));
    if let Some(ranks) = &plan.ranks {
        text.push('\n');
        text.push_str(&ranks::text(ranks, plan.method.method, output));
    }
    if let Some(prefix) = plan.prefix {
        let mut facts = Facts::default();
        facts.add(
            "an activation a layer and token, L·d·(l_p + l_i)",
            grouped(prefix.paper),
        );
        facts.add(
            "a key and a value, 2·L·kv_dim·n, as in PEFT",
            grouped(prefix.peft),
        );
        text.push('\n');
        text.push_str(&facts.render(
            "Two ways to count a prefix; the second is trained",
            output.color,
        ));
    }
    if !plan.paper.is_empty() {
        text.push('\n');
        text.push_str(&bold(
            "What the LoRA paper says of this model",
            output.color,
        ));
        text.push('\n');
        text.push_str(&paper(plan).render(output.width, output.color));
    }
    text.push('\n');
    let note =
        "Memory is this program's, with gradients and Adam's moments in f32; MB are 10⁶ bytes.";
    text.push_str(&dim(note, output.color));
    text.push('\n');
    text
}

fn sides(plan: &Plan) -> Table {
    let title = plan.method.method.title();
    let mut table = Table::new([
        ("", Align::Left),
        (title, Align::Right),
        ("full, Adam", Align::Right),
    ]);
    let mut row = |name: &str, value: &dyn Fn(&Estimate) -> String| {
        table.row([name.to_owned(), value(&plan.method), value(&plan.full)]);
    };
    row("trained parameters", &|side| {
        grouped(side.trainable_parameters)
    });
    row("times fewer", &|side| times(side.reduction));
    row(&format!("file ({})", plan.file_dtype), &|side| {
        decimal_bytes(side.file_bytes)
    });
    row("operations a token", &|side| {
        operations(side.flops_per_token)
    });
    row("peak memory", &|side| decimal_bytes(side.peak_memory));
    for (name, bytes) in MEMORY {
        row(name, &|side| decimal_bytes(bytes(&side.memory)));
    }
    table
}

/// A line of a table of memory: its name, and the bytes that it tells.
type MemoryLine = (&'static str, fn(&Memory) -> u64);

/// What the peak of memory is made of, below it.
const MEMORY: [MemoryLine; 7] = [
    ("  frozen weights", |memory| memory.weights),
    ("  trained values", |memory| memory.trained),
    ("  gradients", |memory| memory.gradients),
    ("  optimizer", |memory| memory.optimizer),
    ("  activations", |memory| memory.activations),
    ("  working space", |memory| memory.working),
    ("  program", |memory| memory.process),
];

fn paper(plan: &Plan) -> Table {
    let mut table = Table::new([
        ("Figure", Align::Left),
        ("Paper", Align::Left),
        ("Its formula", Align::Left),
        ("", Align::Left),
    ]);
    for claim in &plan.paper {
        let origin = match claim.origin {
            Origin::Arithmetic => "follows",
            Origin::DoesNotAddUp => "does not add up",
            Origin::Software => "measured",
        };
        table.row([
            claim.what.as_str(),
            claim.paper.as_str(),
            claim.here.as_str(),
            origin,
        ]);
    }
    table
}

fn times(reduction: f64) -> String {
    if reduction < 100.0 {
        format!("{reduction:.1}")
    } else {
        grouped(reduction.round() as u64)
    }
}

fn operations(value: f64) -> String {
    let (scaled, unit) = match value {
        ..1e9 => (value / 1e6, "M"),
        ..1e12 => (value / 1e9, "G"),
        _ => (value / 1e12, "T"),
    };
    format!("{scaled:.2} {unit}FLOP")
}

#[cfg(test)]
mod tests {
    use clap::Command;

    use lowrank::tuning::Method;
    use lowrank::tuning::targets::Targets;

    use super::*;
    use crate::settings::train::command;

    /// A run that is planned without flags is the run that is trained without them.
    #[test]
    fn what_train_has_too_has_its_defaults() {
        let planned = PlanArgs::augment_args(Command::new("plan"));
        let trained = command();
        let mut shared = 0;
        for arg in planned.get_arguments() {
            let others = trained.get_arguments().find(|a| a.get_id() == arg.get_id());
            let Some(other) = others else { continue };
            shared += 1;
            // One asks for a length, the other for the longest that is kept; and a run finds its own way to save memory.
            // And a run says its model, where the default is a placeholder.
            // Several ranks have a batch each.
            let differs = [
                "max_seq_length",
                "recompute",
                "model",
                "gradient_accumulation_steps",
            ];
            if !differs.contains(&arg.get_id().as_str()) {
                assert_eq!(
                    arg.get_default_values(),
                    other.get_default_values(),
                    "{}",
                    arg.get_id()
                );
            }
        }
        assert!(shared > 12, "{shared}");
    }

    fn shown(preset: &str, train: &TrainConfig, width: usize) -> String {
        let model = presets::config(preset).unwrap();
        let options = PlanOptions {
            name: preset,
            model: &model,
            train,
            recompute: lowrank::model::Recompute::None,
            file_dtype: DType::Bf16,
        };
        let mut plan = plan(&options).unwrap();
        // What this machine is like is not in the snapshots.
        plan.available_memory = Some(16_000_000_000);
        plan.compute_dtype = ComputeFormat::Bf16;
        let output = Output {
            json: false,
            color: false,
            width,
        };
        text(&plan, &output)
    }

    fn lora(r: usize, targets: &[&str]) -> TrainConfig {
        let names = targets.iter().map(ToString::to_string).collect();
        let mut config = TrainConfig::new(Method::Lora, "", "", "");
        config.options.lora.r = r;
        config.options.targets.target_modules = Some(Targets::Names(names));
        config
    }

    #[test]
    fn a_method_stands_beside_full_training() {
        let text = shown("gpt3-175b", &lora(4, &["q_proj", "v_proj"]), 120);
        insta::assert_snapshot!(text, @r#"
        gpt3-175b
        parameters    174,604,259,328
        batch         8 rows of 2048 tokens, weights in bf16, factors read as bf16, recompute none
        this machine  16.0 GB free

                                    LoRA       full, Adam
        trained parameters    18,874,368  174,604,259,328
        times fewer                9,251              1.0
        file (bf16)              37.7 MB         349.2 GB
        operations a token  711.96 GFLOP       1.06 TFLOP
        peak memory             409.8 GB           3.3 TB
          frozen weights        349.2 GB          0 bytes
          trained values         75.5 MB         698.4 GB
          gradients             302.0 MB         698.4 GB
          optimizer             151.0 MB           1.4 TB
          activations            58.1 GB         503.1 GB
          working space           2.0 GB          15.3 GB
          program                18.9 MB          18.9 MB

        What the LoRA paper says of this model
        Figure                            Paper              Its formula
        LoRA, r 4 on q and v              18.9 M parameters  18.87 M                            follows
        fewer trained parameters          10,000 times       9251 times                         does not add up
        checkpoint of everything, 16 bit  350 GB             349 GB                             follows
        checkpoint of that LoRA, 16 bit   35 MB              37.7 MB                            does not add up
        training, everything and LoRA     1.2 TB and 350 GB  349 GB for the weights at 16 bit   measured
        speed of training                 25 % faster        at most 50 %: 4 operations, not 6  measured

        Memory is this program's, with gradients and Adam's moments in f32; MB are 10⁶ bytes.
        "#);
    }

    #[test]
    fn a_narrow_terminal_gets_lines() {
        let train = TrainConfig {
            max_seq_length: 512,
            ..TrainConfig::new(Method::Prefix, "", "", "")
        };
        let text = shown("smollm2-135m", &train, 40);
        insta::assert_snapshot!(text, @r#"
        smollm2-135m
        parameters    134,515,008
        batch         8 rows of 512 tokens, weights in bf16, factors read as bf16, recompute none
        this machine  16.0 GB free

        trained parameters
        prefix tuning: 230,400
        full, Adam: 134,515,008

        times fewer
        prefix tuning: 584
        full, Adam: 1.0

        file (bf16)
        prefix tuning: 460.8 kB
        full, Adam: 269.0 MB

        operations a token
        prefix tuning: 593.90 MFLOP
        full, Adam: 859.70 MFLOP

        peak memory
        prefix tuning: 539.2 MB
        full, Adam: 4.0 GB

          frozen weights
        prefix tuning: 269.1 MB
        full, Adam: 0 bytes

          trained values
        prefix tuning: 921.6 kB
        full, Adam: 538.1 MB

          gradients
        prefix tuning: 3.7 MB
        full, Adam: 538.1 MB

          optimizer
        prefix tuning: 1.8 MB
        full, Adam: 1.1 GB

          activations
        prefix tuning: 190.3 MB
        full, Adam: 1.7 GB

          working space
        prefix tuning: 54.5 MB
        full, Adam: 207.0 MB

          program
        prefix tuning: 18.9 MB
        full, Adam: 18.9 MB

        Two ways to count a prefix; the second is trained
        an activation a layer and token, L·d·(l_p + l_i)  345,600
        a key and a value, 2·L·kv_dim·n, as in PEFT       230,400

        Memory is this program's, with gradients and Adam's moments in f32; MB are 10⁶ bytes.
        "#);
    }

    #[test]
    fn figures_have_units() {
        assert_eq!(
            (times(1.0), times(9251.4)),
            ("1.0".to_owned(), "9,251".to_owned())
        );
        let cases = [
            (5e8, "500.00 MFLOP"),
            (1.5e9, "1.50 GFLOP"),
            (2e12, "2.00 TFLOP"),
        ];
        for (value, text) in cases {
            assert_eq!(operations(value), text);
        }
    }
}
