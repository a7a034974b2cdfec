//! Commands about adapters: `lowrank adapter inspect`, [`diff`], [`merge`], [`prune`] and [`travel`].

pub mod diff;
pub mod merge;
pub mod prune;
pub mod travel;

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Subcommand};
use lowrank::base::Source;
use lowrank::report::inspect::{self, AdapterReport};
use lowrank::train::BaseDtype;
use lowrank::tuning;
use lowrank::units;

use super::with_adapter;
use crate::failure::Misuse;
use crate::output::Output;
use crate::table::{Align, Facts, Table};

/// Commands about adapters.
#[derive(Debug, Subcommand)]
pub enum AdapterCommands {
    /// Show which modules an adapter changes, with which rank, and how much: ‖ΔW‖/‖W‖
    Inspect(InspectArgs),
    /// Compare two LoRA adapters of one model: overlap of their subspaces, size, effective rank, amplification
    Diff(diff::DiffArgs),
    /// Combine LoRA adapters of one model to one, with weights: their sum, or as TIES and DARE do
    Merge(merge::CombineArgs),
    /// Lower the ranks of a LoRA adapter by SVD, and report the error
    Prune(prune::PruneArgs),
    /// Write a LoRA adapter for another program: llama.cpp and Ollama, mlx-lm, loralib
    Export(travel::ExportArgs),
    /// Read a LoRA adapter of another program, and write it as PEFT's folder
    Import(travel::ImportArgs),
}

/// Arguments of `lowrank adapter inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The adapter's folder
    #[arg(value_name = "ADAPTER")]
    pub adapter: PathBuf,

    /// The model it belongs to [default: the one that adapter_config.json names]
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,

    /// Threads to compute with [default: one a core]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// An adapter or model that cannot be used.
pub fn run(command: AdapterCommands) -> anyhow::Result<()> {
    match command {
        AdapterCommands::Inspect(args) => {
            let output = Output::detect(args.json);
            let report = measure(&args)?;
            output.result(&report, |output| text(&report, output))
        }
        AdapterCommands::Diff(args) => diff::run(&args),
        AdapterCommands::Merge(args) => merge::run(&args),
        AdapterCommands::Prune(args) => prune::run(&args),
        AdapterCommands::Export(args) => travel::export(&args),
        AdapterCommands::Import(args) => travel::import(&args),
    }
}

/// The name of an adapter's model: what was given, or what its config names.
fn base_name(adapter: &Path, given: Option<&str>) -> anyhow::Result<String> {
    if let Some(model) = given {
        return Ok(model.to_owned());
    }
    let named = tuning::base_of(adapter)?;
    Ok(named.ok_or_else(|| {
        let shown = adapter.display();
        Misuse::new(format!(
            "{shown}/adapter_config.json names no base model; give it with --model"
        ))
    })?)
}

/// An adapter's model by its name, which `was_given` or stands in its config.
fn find_base(name: &str, was_given: bool) -> Result<Source, lowrank::Error> {
    Source::find(name).map_err(|error| {
        if was_given {
            return error;
        }
        lowrank::Error::Settings(format!(
            "the base that adapter_config.json names cannot be used, so give it with --model ({error})"
        ))
    })
}

/// The call into the library.
fn measure(args: &InspectArgs) -> anyhow::Result<AdapterReport> {
    let model = base_name(&args.adapter, args.model.as_deref())?;
    let source = find_base(&model, args.model.is_some())?;
    let plan = with_adapter::plan_of(source, Some(&args.adapter))?;
    let loaded = plan.load(BaseDtype::Bf16, Some(&args.adapter))?;
    let adapter = loaded.adapter.context("the adapter was loaded")?;
    Ok(inspect::adapter(&args.adapter, &adapter, &loaded.network)?)
}

fn text(report: &AdapterReport, output: &Output) -> String {
    let mut facts = Facts::default();
    let base = match report.base_matches {
        Some(true) => format!("{}, on which it was trained", report.model),
        Some(false) => format!("{}, but it was trained on another", report.model),
        None => report.model.clone(),
    };
    facts.add("base", base);
    facts.add("method", report.method.title());
    for (key, value) in &report.options {
        let text = value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned);
        facts.add(key, text);
    }
    if !report.labels.is_empty() {
        facts.add("labels", report.labels.join(", "));
    }
    facts.add("parameters", units::grouped(report.parameters));
    facts.add("files", units::bytes(report.bytes));
    let mut table = Table::new([
        ("Module", Align::Left),
        ("r", Align::Right),
        ("Scale", Align::Right),
        ("Parameters", Align::Right),
        ("‖ΔW‖/‖W‖", Align::Right),
    ]);
    for module in &report.modules {
        table.row([
            module.module.clone(),
            or_dash(module.r, |r| r.to_string()),
            or_dash(module.scale, |scale| {
                let text = format!("{scale:.4}");
                text.trim_end_matches('0').trim_end_matches('.').to_string()
            }),
            units::grouped(module.parameters),
            or_dash(module.relative_change, |change| format!("{change:.4}")),
        ]);
    }
    let facts = facts.render(&report.adapter, output.color);
    format!("{facts}\n{}", table.render(output.width, output.color))
}

fn or_dash<T>(value: Option<T>, text: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "–".to_string(), text)
}

#[cfg(test)]
mod tests {
    use lowrank::report::inspect::ModuleReport;
    use lowrank::tuning::Method;

    use super::*;

    #[test]
    fn modules_are_listed() {
        let module = |name: &str, relative_change| ModuleReport {
            module: name.to_string(),
            r: Some(8),
            scale: Some(2.0),
            parameters: 9216,
            relative_change: Some(relative_change),
        };
        let report = AdapterReport {
            adapter: "runs/e2e".to_string(),
            model: "models/smollm2".to_string(),
            method: Method::Lora,
            options: serde_json::Map::from_iter([
                ("r".to_string(), 8.into()),
                ("lora_alpha".to_string(), 16.0.into()),
                ("target_modules".to_string(), "q_proj, v_proj".into()),
                ("use_rslora".to_string(), false.into()),
            ]),
            labels: Vec::new(),
            parameters: 460_800,
            bytes: 1_848_000,
            base_matches: Some(false),
            modules: vec![
                module("model.layers.0.self_attn.q_proj", 0.012_34),
                module("model.layers.0.self_attn.v_proj", 0.5),
            ],
        };
        let output = Output {
            json: false,
            color: false,
            width: 80,
        };
        insta::assert_snapshot!(text(&report, &output), @r#"
        runs/e2e
        base            models/smollm2, but it was trained on another
        method          LoRA
        r               8
        lora_alpha      16.0
        target_modules  q_proj, v_proj
        use_rslora      false
        parameters      460,800
        files           1.8 MiB

        Module                           r  Scale  Parameters  ‖ΔW‖/‖W‖
        model.layers.0.self_attn.q_proj  8      2       9,216    0.0123
        model.layers.0.self_attn.v_proj  8      2       9,216    0.5000
        "#);
    }
}
