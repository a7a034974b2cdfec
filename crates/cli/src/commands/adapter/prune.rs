//! `lowrank adapter prune`.

use std::path::PathBuf;

use clap::{ArgGroup, Args};
use lowrank::fields::finite;
use lowrank::lora_files::{FileDtype, Keep, PruneOptions, PruneReport, prune};
use lowrank::units;
use serde::Serialize;

use super::diff::short;
use super::merge::or_dash;
use crate::output::Output;
use crate::table::{Align, Facts, Table};

/// Arguments of `lowrank adapter prune`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("keep").required(true)))]
pub struct PruneArgs {
    /// The adapter's folder
    #[arg(value_name = "ADAPTER")]
    pub adapter: PathBuf,

    /// The folder for the new adapter, which must not exist yet
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,

    /// The greatest rank that a module keeps
    #[arg(long, value_name = "N", group = "keep")]
    pub rank: Option<usize>,

    /// Give each module the smallest rank with which ‖ΔW − ΔW'‖/‖ΔW‖ is at most this, from 0 to below 1
    #[arg(long, value_name = "X", group = "keep", value_parser = finite::<f64>)]
    pub error: Option<f64>,

    /// How A and B are stored
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    pub dtype: FileDtype,

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
struct Pruned {
    /// The new adapter's folder.
    output: PathBuf,
    /// How its A and B are stored.
    dtype: FileDtype,
    /// The library's figures.
    #[serde(flatten)]
    report: PruneReport,
}

/// Runs the command.
///
/// # Errors
/// An adapter that cannot be pruned so, or a folder that cannot be written.
pub(super) fn run(args: &PruneArgs) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    let keep = match (args.rank, args.error) {
        (Some(rank), _) => Keep::Rank(rank),
        // clap's group has one of the two.
        (None, error) => Keep::Error(error.unwrap_or(0.0)),
    };
    let report = prune(&PruneOptions {
        adapter: &args.adapter,
        keep,
        output: &args.output,
        dtype: args.dtype,
        overwrite: args.overwrite,
    })?;
    let pruned = Pruned {
        output: args.output.clone(),
        dtype: args.dtype,
        report,
    };
    output.result(&pruned, |output| text(&pruned, output))
}

fn text(pruned: &Pruned, output: &Output) -> String {
    let report = &pruned.report;
    let mut facts = Facts::default();
    facts.add("pruned from", report.adapter.as_str());
    facts.add(
        "parameters",
        format!(
            "{} of {}",
            units::grouped(report.parameters),
            units::grouped(report.parameters_before)
        ),
    );
    facts.add("‖ΔW‖", short(report.norm));
    facts.add("relative error", or_dash(report.relative_error));
    let mut table = Table::new([
        ("Module", Align::Left),
        ("r before", Align::Right),
        ("r", Align::Right),
        ("‖ΔW‖", Align::Right),
        ("error", Align::Right),
    ]);
    for module in &report.modules {
        table.row([
            module.module.clone(),
            module.rank_before.to_string(),
            module.rank.to_string(),
            short(module.norm),
            or_dash(module.relative_error),
        ]);
    }
    let title = format!("written to {}", pruned.output.display());
    let facts = facts.render(&title, output.color);
    format!("{facts}\n{}", table.render(output.width, output.color))
}

#[cfg(test)]
mod tests {
    use lowrank::lora_files::PrunedModule;

    use super::*;

    #[test]
    fn what_was_pruned_is_shown() {
        let module = |name: &str, rank, relative_error| PrunedModule {
            module: format!("model.layers.0.self_attn.{name}"),
            rank_before: 8,
            rank,
            norm: 0.75,
            relative_error,
        };
        let pruned = Pruned {
            output: "small".into(),
            dtype: FileDtype::Bf16,
            report: PruneReport {
                adapter: "runs/a".to_owned(),
                modules: vec![module("q_proj", 2, Some(0.125)), module("v_proj", 1, None)],
                parameters_before: 18_432,
                parameters: 3_456,
                norm: 0.75,
                relative_error: Some(0.125),
            },
        };
        let output = Output {
            json: false,
            color: false,
            width: 80,
        };
        insta::assert_snapshot!(text(&pruned, &output), @r"
        written to small
        pruned from     runs/a
        parameters      3,456 of 18,432
        ‖ΔW‖            0.750
        relative error  0.125

        Module                           r before  r   ‖ΔW‖  error
        model.layers.0.self_attn.q_proj         8  2  0.750  0.125
        model.layers.0.self_attn.v_proj         8  1  0.750      –
        ");
    }
}
