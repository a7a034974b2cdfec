//! A comparison in a terminal.

use std::fmt::Write;

use lowrank::compare::{Comparison, Cost, Spread};
use lowrank::metrics;
use lowrank::units;

use super::config::Config;
use crate::output::Output;
use crate::table::{Align, Table};

/// Where there is no figure.
const NONE: &str = "–";

/// What `--dry-run` prints.
pub(super) fn plan(config: &Config, output: &Output) -> String {
    let mut table = Table::new([
        ("method", Align::Left),
        ("options", Align::Left),
        ("trained", Align::Right),
        ("of the base", Align::Right),
        ("learning rates", Align::Left),
        ("seeds", Align::Right),
    ]);
    let mut runs = 0;
    let parameters = config.shapes.parameters() as u64;
    for entry in &config.entries {
        let tried = if entry.rates.len() > 1 {
            entry.rates.len()
        } else {
            0
        };
        runs += tried + entry.seeds.len();
        let rates: Vec<String> = entry.rates.iter().map(|rate| format!("{rate:e}")).collect();
        table.row([
            entry.name.clone(),
            options(&entry.options),
            units::grouped(entry.trainable),
            share(entry.trainable, parameters),
            rates.join(" "),
            entry.seeds.len().to_string(),
        ]);
    }
    let mut text = format!("{}, on {}\n\n", config.title, config.model);
    text += &table.render(output.width, output.color);
    let _ = writeln!(
        text,
        "\n{runs} trainings, those that try a learning rate included"
    );
    text
}

/// Two tables: how good the methods are, and what they cost.
pub(super) fn tables(comparison: &Comparison, output: &Output) -> String {
    let mut text = format!("{}, on {}\n", comparison.title, comparison.model);
    if !comparison.held_out.is_empty() {
        let _ = writeln!(text, "loss on {}", comparison.held_out);
    }
    if !comparison.decoding.is_empty() {
        let _ = writeln!(text, "texts: {}", comparison.decoding);
    }
    text.push('\n');
    text += &quality(comparison).render(output.width, output.color);
    if comparison.has_costs() {
        let _ = writeln!(text, "\nmeasured with {}\n", comparison.machine);
        text += &costs(comparison).render(output.width, output.color);
    }
    let missing = comparison.missing_runs();
    if missing > 0 {
        let are = if missing == 1 { "is" } else { "are" };
        let _ = writeln!(text, "\n{missing} of the trainings {are} not finished");
    }
    text
}

fn quality(comparison: &Comparison) -> Table {
    let mut columns = vec![
        ("method", Align::Left),
        ("trained", Align::Right),
        ("of the base", Align::Right),
        ("rate", Align::Right),
        ("loss", Align::Right),
    ];
    let titles: Vec<&str> = comparison
        .metrics
        .iter()
        .map(|name| metrics::title(name))
        .collect();
    columns.extend(titles.iter().map(|title| (*title, Align::Right)));
    let mut table = Table::new(columns);
    let number = |value: Option<f64>| value.map_or(NONE.to_owned(), |value| format!("{value:.4}"));
    let base = &comparison.base;
    if base.loss.is_some() {
        let mut row = vec![
            "(no training)".to_owned(),
            "0".to_owned(),
            NONE.to_owned(),
            NONE.to_owned(),
        ];
        row.push(number(base.loss));
        row.extend(comparison.metrics.iter().map(|name| {
            base.metrics
                .get(name)
                .map_or(NONE.to_owned(), |&value| score(name, value))
        }));
        table.row(row);
    }
    for method in &comparison.methods {
        let mut row = vec![
            method.name.clone(),
            units::grouped(method.trainable_parameters),
            share(method.trainable_parameters, comparison.base_parameters),
            method
                .learning_rate
                .map_or(NONE.to_owned(), |rate| format!("{rate:e}")),
            spread(method.loss.as_ref(), |value| format!("{value:.4}")),
        ];
        row.extend(
            comparison
                .metrics
                .iter()
                .map(|name| spread(method.scores.get(name), |value| score(name, value))),
        );
        table.row(row);
    }
    table
}

fn costs(comparison: &Comparison) -> Table {
    let mut table = Table::new([
        ("method", Align::Left),
        ("file", Align::Right),
        ("tokens/s", Align::Right),
        ("peak memory", Align::Right),
        ("added latency", Align::Right),
        ("positions", Align::Right),
        ("swap", Align::Right),
    ]);
    for method in &comparison.methods {
        let file = method
            .checkpoint_bytes
            .map_or(NONE.to_owned(), units::bytes);
        let Some(cost) = &method.cost else {
            table.row([
                method.name.clone(),
                file,
                NONE.into(),
                NONE.into(),
                NONE.into(),
                NONE.into(),
                NONE.into(),
            ]);
            continue;
        };
        table.row([
            method.name.clone(),
            file,
            format!("{:.0}", cost.tokens_per_second),
            units::bytes(cost.peak_memory),
            latency(cost),
            cost.positions_taken.to_string(),
            format!("{:.1} ms", cost.switch_milliseconds),
        ]);
    }
    table
}

/// "+12 %", and after a merge nothing.
fn latency(cost: &Cost) -> String {
    let added = format!("{:+.0} %", 100.0 * cost.added_latency());
    if cost.mergeable {
        format!("{added}, merged 0")
    } else {
        added
    }
}

fn spread(spread: Option<&Spread>, show: impl Fn(f64) -> String) -> String {
    match spread {
        None => NONE.to_owned(),
        Some(one) => match one.deviation {
            None => show(one.mean),
            Some(deviation) => format!("{} ± {}", show(one.mean), show(deviation)),
        },
    }
}

/// A score with the digits that are usual for it.
fn score(name: &str, value: f64) -> String {
    match name {
        "bleu" | "nist" | "cider" => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn share(values: u64, parameters: u64) -> String {
    format!("{:.3} %", 100.0 * values as f64 / parameters.max(1) as f64)
}

fn options(options: &serde_json::Map<String, serde_json::Value>) -> String {
    let shown = options.iter().map(|(key, value)| match value {
        serde_json::Value::String(text) => format!("{key} {text}"),
        other => format!("{key} {other}"),
    });
    shown.collect::<Vec<_>>().join(", ")
}
