//! `lowrank adapter merge`.

use std::path::PathBuf;

use clap::Args;
use lowrank::fields::finite;
use lowrank::lora_files::{
    Combination, CombineOptions, CombineReport, FileDtype, MajoritySign, combine,
};
use lowrank::units;
use serde::Serialize;

use super::diff::{listed, short};
use crate::output::Output;
use crate::table::{Align, Facts, Table};

/// Arguments of `lowrank adapter merge`.
#[derive(Debug, Args)]
pub struct CombineArgs {
    /// The adapters' folders; LoRA of one model, with ranks, scales and modules of their own
    #[arg(value_name = "ADAPTER", required = true)]
    pub adapters: Vec<PathBuf>,

    /// The folder for the new adapter, which must not exist yet
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,

    /// How they are combined, by PEFT's names [default: cat, the exact sum]
    #[arg(
        long,
        value_name = "HOW",
        default_value = "cat",
        hide_default_value = true
    )]
    pub combine: Combination,

    /// A number for each adapter that its change is multiplied with, as 1,-0.5 [default: 1 for each]
    #[arg(
        long,
        value_name = "X,X",
        value_delimiter = ',',
        allow_hyphen_values = true,
        value_parser = finite::<f64>
    )]
    pub weights: Vec<f64>,

    /// The share of the numbers that stays, above 0 and at most 1 (ties, dare and magnitude_prune)
    #[arg(long, value_name = "SHARE", value_parser = finite::<f64>)]
    pub density: Option<f64>,

    /// How the sign at a place is elected (ties and dare_ties) [default: total]
    #[arg(long, value_name = "HOW")]
    pub majority_sign: Option<MajoritySign>,

    /// The rank that is kept (svd and names that end with it) [default: the adapters' largest]
    #[arg(long, value_name = "N")]
    pub svd_rank: Option<usize>,

    /// Limit the numbers of A and B to this quantile of them, above 0.5 and at most 1 (with SVD)
    #[arg(long, value_name = "SHARE", value_parser = finite::<f64>)]
    pub clamp: Option<f64>,

    /// Which random numbers are dropped (dare) [default: 0]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,

    /// How A and B are stored
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    pub dtype: FileDtype,

    /// Combine adapters of different base models or tasks
    #[arg(long)]
    pub force: bool,

    /// Replace an adapter in the output folder
    #[arg(long)]
    pub overwrite: bool,

    /// Threads to compute with [default: one a core]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Combined {
    /// The new adapter's folder.
    output: PathBuf,
    /// How its A and B are stored.
    dtype: FileDtype,
    /// The library's figures.
    #[serde(flatten)]
    report: CombineReport,
}

/// Runs the command.
///
/// # Errors
/// Adapters that cannot be combined in this way, or a folder that cannot be written.
pub(super) fn run(args: &CombineArgs) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    let report = combine(&CombineOptions {
        adapters: &args.adapters,
        weights: &args.weights,
        combination: args.combine,
        density: args.density,
        majority_sign: args.majority_sign,
        svd_rank: args.svd_rank,
        clamp: args.clamp,
        seed: args.seed,
        output: &args.output,
        dtype: args.dtype,
        overwrite: args.overwrite,
        force: args.force,
    })?;
    let combined = Combined {
        output: args.output.clone(),
        dtype: args.dtype,
        report,
    };
    output.result(&combined, |output| text(&combined, output))
}

fn text(combined: &Combined, output: &Output) -> String {
    let report = &combined.report;
    let mut facts = Facts::default();
    facts.add("combination", report.combination.name());
    for share in &report.adapters {
        facts.add(
            &share.adapter,
            format!("weight {}, {} modules", share.weight, share.modules),
        );
    }
    if !report.taken_over.is_empty() {
        facts.add("taken over as they are", listed(&report.taken_over));
    }
    facts.add("parameters", units::grouped(report.parameters));
    facts.add("‖ΔW‖", short(report.norm));
    facts.add("relative error", or_dash(report.relative_error));
    let mut table = Table::new([
        ("Module", Align::Left),
        ("ranks", Align::Right),
        ("r", Align::Right),
        ("‖ΔW‖", Align::Right),
        ("error", Align::Right),
    ]);
    for module in &report.modules {
        let ranks = module.ranks.iter();
        let ranks = ranks.map(|rank| rank.map_or("–".to_owned(), |rank| rank.to_string()));
        table.row([
            module.module.clone(),
            ranks.collect::<Vec<_>>().join(" · "),
            module.rank.to_string(),
            short(module.norm),
            or_dash(module.relative_error),
        ]);
    }
    let title = format!("written to {}", combined.output.display());
    let facts = facts.render(&title, output.color);
    format!("{facts}\n{}", table.render(output.width, output.color))
}

pub(super) fn or_dash(error: Option<f64>) -> String {
    error.map_or("–".to_owned(), short)
}

#[cfg(test)]
mod tests {
    use lowrank::lora_files::{AdapterShare, CombinedModule};

    use super::*;

    #[test]
    fn what_was_combined_is_shown() {
        let share = |adapter: &str, weight, modules| AdapterShare {
            adapter: adapter.to_owned(),
            weight,
            modules,
        };
        let module = |name: &str, ranks, rank, relative_error| CombinedModule {
            module: format!("model.layers.0.self_attn.{name}"),
            ranks,
            rank,
            norm: 1.5,
            relative_error,
        };
        let combined = Combined {
            output: "mixed".into(),
            dtype: FileDtype::F32,
            report: CombineReport {
                combination: Combination::Svd,
                adapters: vec![share("runs/a", 1.0, 1), share("runs/b", -0.5, 2)],
                modules: vec![
                    module("q_proj", vec![Some(8), Some(16)], 16, Some(0.0123)),
                    module("v_proj", vec![None, Some(16)], 16, None),
                ],
                taken_over: vec!["base_model.model.lm_head.weight".to_owned()],
                parameters: 36_864,
                norm: 2.12,
                relative_error: Some(0.01),
            },
        };
        let output = Output {
            json: false,
            color: false,
            width: 80,
        };
        insta::assert_snapshot!(text(&combined, &output), @r"
        written to mixed
        combination             svd
        runs/a                  weight 1, 1 modules
        runs/b                  weight -0.5, 2 modules
        taken over as they are  base_model.model.lm_head.weight
        parameters              36,864
        ‖ΔW‖                    2.12
        relative error          0.0100

        Module                            ranks   r  ‖ΔW‖   error
        model.layers.0.self_attn.q_proj  8 · 16  16  1.50  0.0123
        model.layers.0.self_attn.v_proj  – · 16  16  1.50       –
        ");
    }
}
