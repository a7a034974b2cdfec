//! Curves over steps.

use std::fmt::Write;

use super::axes::{Axis, Frame, Margins, range};
use super::{Figure, Size};
use crate::report::page::escape;
use crate::units::short;

/// Horizontal slices that a series is thinned to; each keeps at most two points.
const SLICES: usize = 300;
/// Slices that show their values when pointed at.
const PROBES: usize = 80;

/// One curve of a chart.
#[derive(Debug)]
pub(in crate::report) struct Series {
    name: String,
    /// The CSS class of the curve and of its entry in the legend.
    class: String,
    points: Vec<(f64, f64)>,
}

impl Series {
    /// A plain curve.
    pub(in crate::report) fn line(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.to_string(),
            class: "line".to_string(),
            points,
        }
    }

    /// A curve with the colour of a class.
    pub(in crate::report) fn coloured(name: &str, class: String, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.to_string(),
            class,
            points,
        }
    }

    /// A pale curve behind the others.
    pub(in crate::report) fn faint(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.to_string(),
            class: "faint".to_string(),
            points,
        }
    }

    /// A curve in the second colour with a dot at each point.
    pub(in crate::report) fn marked(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.to_string(),
            class: "marked".to_string(),
            points,
        }
    }
}

/// Curves over the same steps.
#[derive(Debug)]
pub(in crate::report) struct Chart {
    title: String,
    unit: String,
    series: Vec<Series>,
    from_zero: bool,
    full: bool,
    size: Size,
}

impl Chart {
    /// A chart; `unit` says what the vertical axis counts and may be empty. Points that are not finite are left out.
    pub(in crate::report) fn new(title: &str, unit: &str, mut series: Vec<Series>) -> Self {
        for one in &mut series {
            one.points.retain(|(x, y)| x.is_finite() && y.is_finite());
        }
        series.retain(|one| !one.points.is_empty());
        Self {
            title: title.to_string(),
            unit: unit.to_string(),
            series,
            from_zero: false,
            full: false,
            size: Size::Any(400.0, 210.0),
        }
    }

    /// Lets the vertical axis start at zero.
    pub(in crate::report) fn starting_at_zero(mut self) -> Self {
        self.from_zero = true;
        self
    }

    /// Lets the chart span the page where there is room.
    pub(in crate::report) fn wide(mut self) -> Self {
        self.full = true;
        self.size = Size::Two {
            wide: (760.0, 260.0),
            narrow: (400.0, 210.0),
        };
        self
    }

    /// Makes the chart as large as the points beside it.
    pub(in crate::report) fn large(mut self) -> Self {
        self.size = super::LARGE;
        self
    }

    /// Whether there is anything to draw.
    pub(in crate::report) fn has_points(&self) -> bool {
        !self.series.is_empty()
    }

    /// The chart as a `<figure>` with its legend.
    pub(in crate::report) fn render(&self) -> String {
        let figure = Figure {
            title: &self.title,
            unit: &self.unit,
            legend: self
                .series
                .iter()
                .map(|one| (&one.class[..], &one.name[..]))
                .collect(),
            description: self.describe(),
            size: self.size,
        };
        figure.render(self.full, |width, height, out| {
            let Some(frame) = self.frame(width, height) else {
                return;
            };
            frame.draw_axes(out);
            for one in &self.series {
                draw(&frame, one, out);
            }
            self.draw_probes(&frame, out);
        })
    }

    /// Axes around all points; `None` where there are none.
    fn frame(&self, width: f64, height: f64) -> Option<Frame> {
        let points = || self.series.iter().flat_map(|one| &one.points);
        let steps = range(points().map(|(x, _)| *x))?;
        let (low, high) = range(points().map(|(_, y)| *y))?;
        let low = if self.from_zero { low.min(0.0) } else { low };
        Some(Frame {
            width,
            height,
            margins: Margins::default(),
            x: Axis::steps(steps, width / 80.0),
            y: Axis::round((low, high), 5.0),
        })
    }

    /// The chart in a sentence, for readers who do not see it.
    fn describe(&self) -> String {
        let mut text = format!("{} over steps", self.title);
        for one in &self.series {
            if let (Some((_, first)), Some((_, last))) = (one.points.first(), one.points.last()) {
                let _ = write!(
                    text,
                    "; {} from {} to {}",
                    one.name,
                    short(*first),
                    short(*last)
                );
            }
        }
        text
    }

    /// Invisible bars that show the values under the pointer.
    fn draw_probes(&self, frame: &Frame, out: &mut String) {
        let Some(lead) = self
            .series
            .iter()
            .find(|one| one.class != "marked")
            .or(self.series.first())
        else {
            return;
        };
        let stride = lead.points.len().div_ceil(PROBES).max(1);
        let shown: Vec<_> = lead.points.iter().step_by(stride).collect();
        for (index, (x, y)) in shown.iter().enumerate() {
            let start = if index == 0 {
                frame.x(*x)
            } else {
                f64::midpoint(frame.x(shown[index - 1].0), frame.x(*x))
            };
            let end = shown.get(index + 1).map_or(frame.x(*x), |next| {
                f64::midpoint(frame.x(next.0), frame.x(*x))
            });
            let _ = write!(
                out,
                "<rect class=\"probe\" x=\"{start:.1}\" y=\"{}\" width=\"{:.1}\" height=\"{:.1}\">\
                 <title>step {x:.0}: ",
                frame.top(),
                (end - start).max(1.0),
                frame.bottom() - frame.top()
            );
            if self.series.len() > 1 {
                let _ = write!(out, "{} ", escape(&lead.name));
            }
            out.push_str(&short(*y));
            for other in self
                .series
                .iter()
                .filter(|other| !std::ptr::eq(*other, lead))
            {
                if let Some((step, value)) = other.points.iter().rfind(|(step, _)| step <= x) {
                    let _ = write!(out, "\n{} {}", escape(&other.name), short(*value));
                    if step != x {
                        let _ = write!(out, " (step {step:.0})");
                    }
                }
            }
            out.push_str("</title></rect>\n");
        }
    }
}

/// Draws a curve, or dots where a curve would not be seen.
fn draw(frame: &Frame, series: &Series, out: &mut String) {
    let points = thin(&series.points, SLICES);
    if points.len() > 1 {
        let _ = write!(out, "<polyline class=\"{}\" points=\"", series.class);
        for (x, y) in &points {
            let _ = write!(out, "{:.1},{:.1} ", frame.x(*x), frame.y(*y));
        }
        out.push_str("\"/>\n");
    }
    // Many dots would hide their own curve.
    if points.len() == 1 || (series.class == "marked" && points.len() <= 60) {
        for (x, y) in &points {
            let _ = writeln!(
                out,
                "<circle class=\"{}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"/>",
                series.class,
                frame.x(*x),
                frame.y(*y)
            );
        }
    }
}

/// At most two points a slice: the least and the greatest of each, in their order.
fn thin(points: &[(f64, f64)], slices: usize) -> Vec<(f64, f64)> {
    if points.len() <= slices * 2 {
        return points.to_vec();
    }
    let mut kept = Vec::with_capacity(slices * 2);
    for slice in 0..slices {
        let part = &points[slice * points.len() / slices..(slice + 1) * points.len() / slices];
        let mut extremes = [0; 2];
        for (index, (_, value)) in part.iter().enumerate() {
            if *value < part[extremes[0]].1 {
                extremes[0] = index;
            }
            if *value > part[extremes[1]].1 {
                extremes[1] = index;
            }
        }
        extremes.sort_unstable();
        kept.push(part[extremes[0]]);
        if extremes[1] != extremes[0] {
            kept.push(part[extremes[1]]);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_extremes_and_order() {
        let mut points: Vec<(f64, f64)> = (0..10_000).map(|i| (f64::from(i), 1.0)).collect();
        points[4321].1 = 9.0;
        points[4322].1 = -9.0;
        let kept = thin(&points, 100);
        assert!(kept.len() <= 200);
        assert!(kept.contains(&(4321.0, 9.0)) && kept.contains(&(4322.0, -9.0)));
        assert!(kept.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }

    #[test]
    fn a_chart_draws_its_curves() {
        let chart = Chart::new(
            "Speed",
            "tokens a second",
            vec![
                Series::line("speed", vec![(1.0, 100.0), (2.0, 300.0)]),
                Series::marked("other", vec![(2.0, 200.0)]),
            ],
        )
        .starting_at_zero();
        insta::assert_snapshot!(chart.render(), @r#"
        <figure>
        <figcaption><b>Speed</b><span>tokens a second</span><span><i class="line"></i>speed</span><span><i class="marked"></i>other</span></figcaption>
        <svg class="any" viewBox="0 0 400 210" role="img" aria-label="Speed over steps; speed from 100 to 300; other from 200 to 200">
        <line class="grid" x1="50" x2="388" y1="186.0" y2="186.0"/><text x="44.0" y="190.0" text-anchor="end">0</text>
        <line class="grid" x1="50" x2="388" y1="127.3" y2="127.3"/><text x="44.0" y="131.3" text-anchor="end">100</text>
        <line class="grid" x1="50" x2="388" y1="68.7" y2="68.7"/><text x="44.0" y="72.7" text-anchor="end">200</text>
        <line class="grid" x1="50" x2="388" y1="10.0" y2="10.0"/><text x="44.0" y="14.0" text-anchor="end">300</text>
        <text x="50.0" y="204.0" text-anchor="middle">step 1</text>
        <text x="388.0" y="204.0" text-anchor="end">2</text>
        <polyline class="line" points="50.0,127.3 388.0,10.0 "/>
        <circle class="marked" cx="388.0" cy="68.7" r="3"/>
        <rect class="probe" x="50.0" y="10" width="169.0" height="176.0"><title>step 1: speed 100</title></rect>
        <rect class="probe" x="219.0" y="10" width="169.0" height="176.0"><title>step 2: speed 300
        other 200</title></rect>
        </svg>
        </figure>
        "#);
    }
}
