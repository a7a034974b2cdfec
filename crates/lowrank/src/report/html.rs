//! `report.html`: a run's figures and plots as one page that needs no network and no script.
//!
//! The plots are inline SVG drawn here from the lines of `metrics.jsonl`. Long runs are thinned: each horizontal
//! slice keeps its least and its greatest value, so spikes stay visible and the page stays small.

use std::fmt::Write;

use super::metrics::MetricsLine;
use super::page::{self, escape};
use super::svg::{Chart, Series};

/// Everything the page shows.
#[derive(Debug, Clone, Copy)]
pub struct Report<'a> {
    /// The heading, usually the name of the run's folder.
    pub title: &'a str,
    /// One sentence under the heading; may be empty.
    pub summary: &'a str,
    /// Final figures as (name, value), in the order shown.
    pub figures: &'a [(String, String)],
    /// Settings as (key, value), in the order shown.
    pub settings: &'a [(String, String)],
    /// The run's metrics in the order of the file.
    pub lines: &'a [MetricsLine],
}

/// The page.
pub fn render(report: &Report<'_>) -> String {
    let mut page = page::begin(report.title, report.summary, "");
    // Writing to a String cannot fail, so the results of `write!` are dropped throughout.
    if !report.figures.is_empty() {
        page.push_str("<dl class=\"figures\">\n");
        for (name, value) in report.figures {
            let _ = writeln!(
                page,
                "<div><dt>{}</dt><dd>{}</dd></div>",
                escape(name),
                escape(value)
            );
        }
        page.push_str("</dl>\n");
    }
    let charts = charts(report.lines);
    if charts.is_empty() {
        page.push_str("<p class=\"summary\">No steps were recorded.</p>\n");
    } else {
        page.push_str("<section class=\"charts\">\n");
        for chart in &charts {
            page.push_str(&chart.render());
        }
        page.push_str("</section>\n");
    }
    if !report.settings.is_empty() {
        page.push_str("<h2>Settings</h2>\n<table>\n");
        for (key, value) in report.settings {
            let _ = writeln!(
                page,
                "<tr><th scope=\"row\">{}</th><td>{}</td></tr>",
                escape(key),
                escape(value)
            );
        }
        page.push_str("</table>\n");
    }
    page::end(&mut page, "metrics.jsonl, which holds every step");
    page
}

/// The plots that the lines give data for.
fn charts(lines: &[MetricsLine]) -> Vec<Chart> {
    let steps: Vec<_> = lines
        .iter()
        .filter_map(|line| match line {
            MetricsLine::Step(step) => Some(step),
            MetricsLine::Eval(_) => None,
        })
        .collect();
    let of = |value: fn(&super::StepMetrics) -> f64| -> Vec<(f64, f64)> {
        steps
            .iter()
            .map(|step| (step.step as f64, value(step)))
            .collect()
    };
    let held_out: Vec<(f64, f64)> = lines
        .iter()
        .filter_map(|line| match line {
            MetricsLine::Eval(eval) => Some((eval.step as f64, eval.eval_loss)),
            MetricsLine::Step(_) => None,
        })
        .collect();

    let loss = of(|step| step.loss);
    let mut loss_series = Vec::new();
    let window = (loss.len() / 40).min(100);
    if window >= 2 {
        let mean = running_mean(&loss, window);
        loss_series.push(Series::faint("each step", loss));
        loss_series.push(Series::line(&format!("mean of {window} steps"), mean));
    } else {
        loss_series.push(Series::line("training", loss));
    }
    if !held_out.is_empty() {
        loss_series.push(Series::marked("held out", held_out));
    }
    let (unit, bytes) = if steps.iter().any(|step| step.peak_rss >= 1 << 30) {
        ("GiB", (1u64 << 30) as f64)
    } else {
        ("MiB", (1u64 << 20) as f64)
    };
    let memory = of(|step| step.peak_rss as f64)
        .into_iter()
        .map(|(step, value)| (step, value / bytes))
        .collect();
    let mut charts = vec![
        Chart::new("Loss", "nats a supervised token", loss_series).wide(),
        Chart::new(
            "Learning rate",
            "",
            vec![Series::line("learning rate", of(|step| step.learning_rate))],
        )
        .starting_at_zero(),
        Chart::new(
            "Speed",
            "tokens a second",
            vec![Series::line("speed", of(|step| step.tokens_per_second))],
        )
        .starting_at_zero(),
        Chart::new(
            "Gradient norm",
            "before clipping",
            vec![Series::line("norm", of(|step| step.grad_norm))],
        )
        .starting_at_zero(),
        Chart::new(
            "Peak memory",
            unit,
            vec![Series::line("peak memory", memory)],
        )
        .starting_at_zero(),
    ];
    charts.retain(Chart::has_points);
    charts
}

/// Mean of each point with up to `window` − 1 before it; points that are not finite do not count.
fn running_mean(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    (0..points.len())
        .map(|end| {
            let slice = &points[(end + 1).saturating_sub(window)..=end];
            let (sum, count) = slice
                .iter()
                .filter(|(_, value)| value.is_finite())
                .fold((0.0, 0.0), |(sum, count), (_, value)| {
                    (sum + value, count + 1.0)
                });
            (points[end].0, sum / count)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::{EvalMetrics, StepMetrics};
    use super::*;

    /// A run of `steps` steps whose loss falls with a ripple, evaluated every tenth of the way.
    pub(super) fn run(steps: u64) -> Vec<MetricsLine> {
        let mut lines = Vec::new();
        for step in 1..=steps {
            let share = step as f64 / steps as f64;
            lines.push(MetricsLine::Step(StepMetrics {
                step,
                epoch: 3.0 * share,
                loss: 1.2 + 2.0 * (-4.0 * share).exp() + 0.2 * (step as f64 * 1.7).sin(),
                learning_rate: 2e-4 * (1.0 - share),
                grad_norm: 0.6 + 0.3 * (step as f64 * 0.9).cos(),
                tokens: 900,
                supervised_tokens: 300,
                tokens_per_second: 800.0 + 40.0 * (step as f64 * 0.3).sin(),
                peak_rss: 900_000_000 + step * 1000,
            }));
            if step % (steps / 10).max(1) == 0 {
                lines.push(MetricsLine::Eval(EvalMetrics {
                    step,
                    epoch: 3.0 * share,
                    eval_loss: 1.3 + 1.8 * (-4.0 * share).exp(),
                    eval_accuracy: None,
                    eval_supervised_tokens: None,
                }));
            }
        }
        lines
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(a, b)| ((*a).to_string(), (*b).to_string()))
            .collect()
    }

    fn page(lines: &[MetricsLine]) -> String {
        render(&Report {
            title: "runs/<e2e>",
            summary: "LoRA on SmolLM2-135M-Instruct",
            figures: &pairs(&[
                ("Held-out loss", "1.332 (before: 3.105)"),
                ("Trainable parameters", "460,800 of 134,515,008 (0.34 %)"),
                ("Adapter", "1.8 MiB"),
                ("Time", "12 min 4 s"),
            ]),
            settings: &pairs(&[
                ("method", "lora"),
                ("model", "models/smollm2"),
                ("target_modules", "[\"q_proj\",\"v_proj\"]"),
                ("learning_rate", "0.0002"),
            ]),
            lines,
        })
    }

    #[test]
    fn the_page_stands_alone() {
        let page = page(&run(300));
        assert!(page.contains("runs/&lt;e2e&gt;"));
        assert_eq!(page.matches("<figure").count(), 5);
        page::assert_stands_alone(&page);
        // For looking at it: LOWRANK_REPORT_OUT=FOLDER cargo test -p lowrank report
        if let Some(folder) = std::env::var_os("LOWRANK_REPORT_OUT") {
            std::fs::write(std::path::Path::new(&folder).join("report.html"), page).unwrap();
        }
    }

    #[test]
    fn long_runs_are_thinned_and_keep_their_spikes() {
        let mut lines = run(100_000);
        if let Some(MetricsLine::Step(step)) = lines.get_mut(50_001) {
            step.grad_norm = 77.0;
        }
        let page = page(&lines);
        assert!(page.len() < 400 << 10, "{} bytes", page.len());
        assert!(page.contains(">80<"), "the spike is off the axis");
    }

    #[test]
    fn runs_without_steps_and_with_bad_numbers_render() {
        assert!(page(&[]).contains("No steps were recorded."));
        let mut lines = run(3);
        if let Some(MetricsLine::Step(step)) = lines.get_mut(1) {
            step.loss = f64::NAN;
            step.grad_norm = f64::INFINITY;
        }
        for lines in [&lines[..], &lines[..1]] {
            let page = page(lines);
            assert!(page.contains("<svg") && !page.contains("NaN") && !page.contains("inf"));
        }
    }
}
