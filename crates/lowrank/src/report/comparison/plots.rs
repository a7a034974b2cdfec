//! What the page of a comparison draws.

use super::{added_latency, finite, signed_percent};
use crate::compare::{Comparison, MethodResult, Spread};
use crate::metrics;
use crate::report::svg::{Bar, Bars, Chart, Point, Scatter, Series, colour, range};
use crate::units::short;

/// Loss over trainable parameters, loss over steps, and every text metric over trainable parameters.
pub(super) fn quality(comparison: &Comparison) -> String {
    let base = &comparison.base;
    let mut plots = scatter(
        "Held-out loss",
        &with_base(
            &format!("{}, lower is better", comparison.unit.of_loss()),
            base.loss,
        ),
        &comparison.methods,
        |method| method.loss,
    );
    plots.push_str(&curves(comparison));
    for metric in &comparison.metrics {
        let better = if metrics::is_error(metric) {
            "lower is better"
        } else {
            "higher is better"
        };
        plots.push_str(&scatter(
            metrics::title(metric),
            &with_base(better, base.metrics.get(metric).copied()),
            &comparison.methods,
            |method| method.scores.get(metric).copied(),
        ));
    }
    plots
}

/// Memory, speed and latency.
pub(super) fn cost(comparison: &Comparison) -> String {
    let methods = &comparison.methods;
    let costs = || methods.iter().filter_map(|method| method.cost);
    let (unit, size) = if costs().any(|cost| cost.peak_memory >= 1 << 30) {
        ("GiB", (1u64 << 30) as f64)
    } else {
        ("MiB", (1u64 << 20) as f64)
    };
    let memory = bars("Peak memory of training", unit, methods, |method| {
        let peak = method.cost?.peak_memory;
        let value = peak as f64 / size;
        let decimals = if unit == "GiB" { 2 } else { 0 };
        Some((value, format!("{value:.decimals$}")))
    });
    let speed = bars("Training speed", "tokens a second", methods, |method| {
        let speed = finite(method.cost?.tokens_per_second)?;
        Some((speed, super::table::speed(speed)))
    });
    let mut remark = "% of the base’s, batch 1".to_owned();
    if costs().any(|cost| cost.mergeable) {
        remark += "; †: none once merged";
    }
    let latency = bars("Added latency", &remark, methods, |method| {
        let added = added_latency(method)?;
        let mark = if method.cost?.mergeable { " †" } else { "" };
        Some((added, format!("{}{mark}", signed_percent(added))))
    });
    memory + &speed + &latency
}

/// `remark`, and the base model's value if there is one.
fn with_base(remark: &str, base: Option<f64>) -> String {
    match base.and_then(finite) {
        Some(base) => format!("{remark}; base model {}", short(base)),
        None => remark.to_owned(),
    }
}

/// A value over trainable parameters.
fn scatter(
    title: &str,
    unit: &str,
    methods: &[MethodResult],
    value: impl Fn(&MethodResult) -> Option<Spread>,
) -> String {
    let points = methods.iter().enumerate().filter_map(|(index, method)| {
        let spread = value(method)?;
        Some(Point {
            name: method.name.clone(),
            class: colour(index),
            x: method.trainable_parameters as f64,
            y: spread.mean,
            deviation: spread.deviation,
        })
    });
    Scatter::new(title, unit, "trainable parameters", points.collect()).render()
}

/// Loss on the validation rows, a curve a method. The high losses of the first steps would flatten the part in which
/// methods differ, so they are cut, and the value before training is only said.
fn curves(comparison: &Comparison) -> String {
    let methods = &comparison.methods;
    let mut means: Vec<Vec<(f64, f64)>> = methods.iter().map(validation).collect();
    let mut unit = format!("{}, mean over seeds", comparison.unit.of_loss());
    let before = means.iter().flatten().filter(|(step, _)| *step == 0.0);
    let before = range(before.map(|(_, loss)| *loss));
    let last = means.iter().filter_map(|points| points.last());
    if let Some((least, most)) = range(last.map(|(_, loss)| *loss)) {
        let limit = most + ((most - least) / 2.0).max(most.abs() * 0.15);
        let cut = means
            .iter_mut()
            .filter_map(|points| cut_start(points, limit));
        if cut.count() > 0 {
            unit += ", start cut off";
        }
    }
    if let Some((least, most)) = before {
        let (least, most) = (short(least), short(most));
        unit += "; before training ";
        unit += &least;
        if least != most {
            unit += " to ";
            unit += &most;
        }
    }
    let series = methods.iter().zip(means).enumerate();
    let series = series
        .map(|(index, (method, points))| Series::coloured(&method.name, colour(index), points));
    let chart = Chart::new("Loss on validation rows", &unit, series.collect()).large();
    if chart.has_points() {
        chart.render()
    } else {
        String::new()
    }
}

/// Lets a curve begin where it first comes below `limit`, on the line between two of its points, and gives the step
/// there if something was cut. Step 0 alone is no curve.
fn cut_start(points: &mut Vec<(f64, f64)>, limit: f64) -> Option<f64> {
    let first = points.iter().position(|(_, loss)| *loss <= limit)?;
    if first == 0 {
        if points.len() == 1 && points[0].0 == 0.0 {
            points.clear();
        }
        return None;
    }
    let ((step, loss), (next, next_loss)) = (points[first - 1], points[first]);
    let start = step + (next - step) * (loss - limit) / (loss - next_loss);
    points[first - 1] = (start, limit);
    points.drain(..first - 1);
    Some(start)
}

/// The mean curve over seeds, at the steps that every run has a number for: elsewhere it would jump.
fn validation(method: &MethodResult) -> Vec<(f64, f64)> {
    let runs: Vec<&Vec<(u64, f64)>> = method
        .runs
        .iter()
        .map(|run| &run.validation)
        .filter(|points| !points.is_empty())
        .collect();
    let Some(first) = runs.first() else {
        return Vec::new();
    };
    first
        .iter()
        .filter_map(|(step, _)| {
            let at_step = |run: &&Vec<(u64, f64)>| {
                let (_, loss) = run.iter().find(|(other, _)| other == step)?;
                finite(*loss)
            };
            let losses: Vec<f64> = runs.iter().map(at_step).collect::<Option<_>>()?;
            Some((
                *step as f64,
                losses.iter().sum::<f64>() / losses.len() as f64,
            ))
        })
        .collect()
}

fn bars(
    title: &str,
    unit: &str,
    methods: &[MethodResult],
    value: impl Fn(&MethodResult) -> Option<(f64, String)>,
) -> String {
    let bars = methods.iter().enumerate().map(|(index, method)| {
        let (value, label) = value(method).unzip();
        Bar {
            name: method.name.clone(),
            class: colour(index),
            value,
            label: label.unwrap_or_else(|| super::NONE.to_owned()),
        }
    });
    Bars::new(title, unit, bars.collect()).render()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::comparison::tests::method;

    #[test]
    fn curves_are_means_at_steps_that_all_runs_have() {
        let mut method = method("a", 1000);
        let mut runs = vec![method.runs[0].clone(); 3];
        runs[0].validation = vec![(0, 3.0), (10, 2.0), (20, 1.0), (30, 0.5)];
        runs[1].validation = vec![(0, 5.0), (10, f64::NAN), (20, 2.0)];
        runs[2].validation = Vec::new();
        method.runs = runs;
        assert_eq!(validation(&method), [(0.0, 4.0), (20.0, 1.5)]);
    }

    #[test]
    fn curves_begin_at_the_limit() {
        let cut = |points: &[(f64, f64)]| {
            let mut points = points.to_vec();
            cut_start(&mut points, 2.0);
            points
        };
        let curve = [(0.0, 9.0), (10.0, 4.0), (20.0, 1.0), (30.0, 3.0)];
        let start = 10.0 + 10.0 * 2.0 / 3.0;
        assert_eq!(cut(&curve), [(start, 2.0), (20.0, 1.0), (30.0, 3.0)]);
        assert_eq!(cut(&curve[2..]), curve[2..]);
        assert_eq!(cut(&[(0.0, 1.5)]), []);
        // A curve that never comes down stays as it is.
        assert_eq!(cut(&curve[..2]), curve[..2]);
    }
}
