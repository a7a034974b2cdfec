//! `lowrank adapter diff`.

use std::path::PathBuf;

use clap::Args;
use lowrank::base::Source;
use lowrank::diff::{AgainstWeight, Change, DiffReport, Of, diff};
use lowrank::report::heatmap;
use lowrank::train::BaseDtype;

use crate::failure::Misuse;
use crate::output::Output;
use crate::table::{Align, Facts, Table};

/// Arguments of `lowrank adapter diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// The first adapter's folder
    #[arg(value_name = "FIRST")]
    pub first: PathBuf,

    /// The second adapter's folder; its rank may be another
    #[arg(value_name = "SECOND")]
    pub second: PathBuf,

    /// Whose singular vectors are compared
    #[arg(long, value_name = "WHAT", default_value = "a")]
    pub of: Of,

    /// Also hold both against this model's weights: how much of what is there they amplify
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,

    /// Draw φ(i, j) of every module, as one SVG
    #[arg(long, value_name = "FILE.svg")]
    pub output: Option<PathBuf>,

    /// Replace the output file
    #[arg(long, requires = "output")]
    pub overwrite: bool,

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
/// Adapters that cannot be compared, a model that is not theirs, a picture that cannot be written.
pub(super) fn run(args: &DiffArgs) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    check_output(args)?;
    let base = match &args.model {
        Some(model) => Some(
            Source::find(model)?
                .load(BaseDtype::Bf16.into())?
                .into_network(),
        ),
        None => None,
    };
    let report = diff(&args.first, &args.second, args.of, base.as_ref())?;
    if report.same_base == Some(false) {
        tracing::warn!(
            "the two were trained on different models, so equal directions need not mean the same"
        );
    }
    if let Some(path) = &args.output {
        heatmap::write(path, &report)?;
        tracing::info!("{}: written", path.display());
    }
    output.result(&report, |output| text(&report, output))
}

fn check_output(args: &DiffArgs) -> Result<(), Misuse> {
    let Some(path) = &args.output else {
        return Ok(());
    };
    let shown = path.display();
    let mut problems = Misuse::default();
    let is_svg = path
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("svg"));
    problems.require(is_svg, || {
        format!("--output {shown}: the picture is an SVG, so give it a name that ends in .svg")
    });
    problems.require(!path.exists() || (args.overwrite && path.is_file()), || {
        format!("--output {shown} exists; give another name, or --overwrite to replace the file")
    });
    problems.or(())
}

fn text(report: &DiffReport, output: &Output) -> String {
    let mut facts = Facts::default();
    facts.add("first", report.first.as_str());
    facts.add("second", report.second.as_str());
    facts.add(
        "compared",
        match report.of {
            Of::A => "right singular vectors of A",
            Of::B => "left singular vectors of B",
            Of::Delta => "right singular vectors of ΔW",
        },
    );
    if let Some(model) = &report.model {
        facts.add("model", model.as_str());
    }
    let mean = |value: fn(&lowrank::diff::ModuleDiff) -> Option<f64>| {
        let values: Vec<f64> = report.modules.iter().filter_map(value).collect();
        if values.is_empty() {
            "-".to_owned()
        } else {
            format!("{:.3}", values.iter().sum::<f64>() / values.len() as f64)
        }
    };
    facts.add(
        "φ, mean of all modules",
        format!(
            "{} of the strongest directions, {} of all, {} at random",
            mean(lowrank::diff::ModuleDiff::strongest),
            mean(lowrank::diff::ModuleDiff::whole),
            mean(|module| Some(module.random_similarity)),
        ),
    );
    for (whose, names) in [
        ("only in the first", &report.only_first),
        ("only in the second", &report.only_second),
    ] {
        if !names.is_empty() {
            facts.add(whose, listed(names));
        }
    }
    let mut text = facts.render("", output.color);
    text.push('\n');
    text.push_str(&overlap(report).render(output.width, output.color));
    if report.model.is_some() {
        text.push('\n');
        text.push_str(&amplification(report).render(output.width, output.color));
    }
    text
}

/// The first few names, and how many more there are.
pub(super) fn listed(names: &[String]) -> String {
    const SHOWN: usize = 3;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn overlap(report: &DiffReport) -> Table {
    let mut table = Table::new([
        ("Module", Align::Left),
        ("r", Align::Right),
        ("φ(1,1)", Align::Right),
        ("φ(all)", Align::Right),
        ("random", Align::Right),
        ("cos ΔW", Align::Right),
        ("‖ΔW‖", Align::Right),
        ("eff. rank", Align::Right),
    ]);
    for module in &report.modules {
        let (first, second) = (&module.first, &module.second);
        let pair = |value: fn(&Change) -> String| format!("{} · {}", value(first), value(second));
        table.row([
            module.module.clone(),
            pair(|change| change.r.to_string()),
            decimals(module.strongest()),
            decimals(module.whole()),
            decimals(Some(module.random_similarity)),
            decimals(module.cosine),
            pair(|change| short(change.norm)),
            pair(|change| format!("{:.1}", change.effective_rank)),
        ]);
    }
    table
}

fn amplification(report: &DiffReport) -> Table {
    let mut table = Table::new([
        ("Module", Align::Left),
        ("Adapter", Align::Left),
        ("‖W‖", Align::Right),
        ("‖UᵀWV‖", Align::Right),
        ("W's own", Align::Right),
        ("random", Align::Right),
        ("amplified", Align::Right),
    ]);
    for module in &report.modules {
        for (name, change) in [("first", &module.first), ("second", &module.second)] {
            let figure = |value: fn(&AgainstWeight) -> f64| {
                change
                    .weight
                    .as_ref()
                    .map_or("-".to_owned(), |w| short(value(w)))
            };
            let factor = change.weight.and_then(|weight| weight.amplification);
            table.row([
                module.module.clone(),
                name.to_owned(),
                figure(|weight| weight.norm),
                figure(|weight| weight.projected),
                figure(|weight| weight.projected_on_own),
                figure(|weight| weight.projected_on_random),
                factor.map_or("-".to_owned(), |factor| format!("×{}", short(factor))),
            ]);
        }
    }
    table
}

fn decimals(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.3}"))
}

/// Three significant digits.
pub(super) fn short(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let whole = value.abs().log10().floor();
    if (-3.0..5.0).contains(&whole) {
        let decimals = (2.0 - whole).max(0.0) as usize;
        format!("{value:.decimals$}")
    } else {
        format!("{value:.1e}")
    }
}

#[cfg(test)]
mod tests {
    use lowrank::diff::ModuleDiff;

    use super::*;

    fn report() -> DiffReport {
        let change = |r, norm| Change {
            r,
            norm,
            singular_values: vec![norm],
            effective_rank: 1.0,
            weight: (norm > 0.0).then_some(AgainstWeight {
                norm: 41.5,
                projected: 0.1234,
                projected_on_own: 12.0,
                projected_on_random: 0.05,
                amplification: Some(norm / 0.1234),
            }),
        };
        DiffReport {
            first: "runs/a".to_owned(),
            second: "runs/b".to_owned(),
            of: Of::A,
            model: Some("models/smollm2".to_owned()),
            same_base: Some(true),
            modules: vec![
                ModuleDiff {
                    module: "model.layers.0.self_attn.q_proj".to_owned(),
                    shape: (576, 576),
                    similarity: vec![vec![0.9, 0.95], vec![0.5, 0.625]],
                    random_similarity: 2.0 / 576.0,
                    cosine: Some(0.25),
                    first: change(2, 0.75),
                    second: change(2, 1.5),
                },
                ModuleDiff {
                    module: "model.layers.0.self_attn.v_proj".to_owned(),
                    shape: (192, 576),
                    similarity: Vec::new(),
                    random_similarity: 2.0 / 576.0,
                    cosine: None,
                    first: change(2, 0.75),
                    second: change(2, 0.0),
                },
            ],
            only_first: Vec::new(),
            only_second: vec!["model.layers.0.self_attn.k_proj".to_owned()],
        }
    }

    #[test]
    fn both_tables_are_shown() {
        let output = Output {
            json: false,
            color: false,
            width: 110,
        };
        insta::assert_snapshot!(text(&report(), &output), @r#"
        first                   runs/a
        second                  runs/b
        compared                right singular vectors of A
        model                   models/smollm2
        φ, mean of all modules  0.900 of the strongest directions, 0.625 of all, 0.003 at random
        only in the second      model.layers.0.self_attn.k_proj

        Module                               r  φ(1,1)  φ(all)  random  cos ΔW          ‖ΔW‖  eff. rank
        model.layers.0.self_attn.q_proj  2 · 2   0.900   0.625   0.003   0.250  0.750 · 1.50  1.0 · 1.0
        model.layers.0.self_attn.v_proj  2 · 2       -       -   0.003       -     0.750 · 0  1.0 · 1.0

        Module                           Adapter   ‖W‖  ‖UᵀWV‖  W's own  random  amplified
        model.layers.0.self_attn.q_proj  first    41.5   0.123     12.0  0.0500      ×6.08
        model.layers.0.self_attn.q_proj  second   41.5   0.123     12.0  0.0500      ×12.2
        model.layers.0.self_attn.v_proj  first    41.5   0.123     12.0  0.0500      ×6.08
        model.layers.0.self_attn.v_proj  second      -       -        -       -          -
        "#);
    }

    #[test]
    fn a_narrow_terminal_gets_lines() {
        let output = Output {
            json: false,
            color: false,
            width: 60,
        };
        let text = text(&report(), &output);
        assert!(text.contains("φ(all): 0.625\n"), "{text}");
    }

    #[test]
    fn numbers_have_three_digits() {
        let cases = [
            (0.0, "0"),
            (0.012_34, "0.0123"),
            (3.456, "3.46"),
            (123.4, "123"),
            (1e-5, "1.0e-5"),
        ];
        for (value, text) in cases {
            assert_eq!(short(value), text);
        }
    }
}
