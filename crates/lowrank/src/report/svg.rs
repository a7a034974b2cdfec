//! Line plots as inline SVG, coloured by the page's style sheet.

use std::fmt::Write;

use super::html::escape;

/// Horizontal slices that a series is thinned to; each keeps at most two points.
const SLICES: usize = 300;
/// Slices that show their values when pointed at.
const PROBES: usize = 80;

const LEFT: f64 = 50.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 24.0;

/// One curve of a chart.
#[derive(Debug)]
pub(super) struct Series {
    name: String,
    /// The CSS class of the curve and of its entry in the legend.
    class: &'static str,
    points: Vec<(f64, f64)>,
}

impl Series {
    /// A plain curve.
    pub(super) fn line(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.to_string(),
            class: "line",
            points,
        }
    }

    /// A pale curve behind the others.
    pub(super) fn faint(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.to_string(),
            class: "faint",
            points,
        }
    }

    /// A curve in the second colour with a dot at each point.
    pub(super) fn marked(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.to_string(),
            class: "marked",
            points,
        }
    }
}

/// Curves over the same steps.
#[derive(Debug)]
pub(super) struct Chart {
    title: &'static str,
    unit: &'static str,
    series: Vec<Series>,
    from_zero: bool,
    wide: bool,
}

impl Chart {
    /// A chart; `unit` says what the vertical axis counts and may be empty. Points that are not finite are left out.
    pub(super) fn new(title: &'static str, unit: &'static str, mut series: Vec<Series>) -> Self {
        for one in &mut series {
            one.points.retain(|(x, y)| x.is_finite() && y.is_finite());
        }
        series.retain(|one| !one.points.is_empty());
        Self {
            title,
            unit,
            series,
            from_zero: false,
            wide: false,
        }
    }

    /// Lets the vertical axis start at zero.
    pub(super) fn starting_at_zero(mut self) -> Self {
        self.from_zero = true;
        self
    }

    /// Lets the chart span the page where there is room.
    pub(super) fn wide(mut self) -> Self {
        self.wide = true;
        self
    }

    /// Whether there is anything to draw.
    pub(super) fn has_points(&self) -> bool {
        !self.series.is_empty()
    }

    /// The chart as a `<figure>` with its legend.
    pub(super) fn render(&self) -> String {
        let mut out = String::new();
        let _ = write!(out, "<figure>\n<figcaption><b>{}</b>", escape(self.title));
        if !self.unit.is_empty() {
            let _ = write!(out, "<span>{}</span>", escape(self.unit));
        }
        if self.series.len() > 1 {
            for one in &self.series {
                let _ = write!(
                    out,
                    "<span><i class=\"{}\"></i>{}</span>",
                    one.class,
                    escape(&one.name)
                );
            }
        }
        out.push_str("</figcaption>\n");
        if self.wide {
            // The style sheet shows one of the two: letters keep their size on a phone and on a wide screen.
            self.draw(760.0, 260.0, "wide", &mut out);
            self.draw(400.0, 210.0, "narrow", &mut out);
        } else {
            self.draw(400.0, 210.0, "any", &mut out);
        }
        out.push_str("</figure>\n");
        out
    }

    fn draw(&self, width: f64, height: f64, class: &str, out: &mut String) {
        let _ = writeln!(
            out,
            "<svg class=\"{class}\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">",
            escape(&self.describe())
        );
        let frame = Frame::around(self, width, height);
        frame.draw_axes(out);
        for one in &self.series {
            frame.draw(one, out);
        }
        self.draw_probes(&frame, out);
        out.push_str("</svg>\n");
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
                "<rect class=\"probe\" x=\"{start:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{:.1}\">\
                 <title>step {x}: {}",
                (end - start).max(1.0),
                frame.height - TOP - BOTTOM,
                short(*y)
            );
            for other in self
                .series
                .iter()
                .filter(|other| !std::ptr::eq(*other, lead))
            {
                if let Some((step, value)) = other.points.iter().rfind(|(step, _)| step <= x) {
                    let _ = write!(out, "\n{} {}", escape(&other.name), short(*value));
                    if step != x {
                        let _ = write!(out, " (step {step})");
                    }
                }
            }
            out.push_str("</title></rect>\n");
        }
    }
}

/// Maps values to places in the picture.
struct Frame {
    width: f64,
    height: f64,
    x_range: (f64, f64),
    y_range: (f64, f64),
    x_ticks: Vec<f64>,
    y_ticks: Vec<f64>,
}

impl Frame {
    fn around(chart: &Chart, width: f64, height: f64) -> Self {
        let points = || chart.series.iter().flat_map(|one| &one.points);
        let range = |value: fn(&(f64, f64)) -> f64| {
            points()
                .map(value)
                .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
                    (low.min(v), high.max(v))
                })
        };
        let x_range = widen(range(|point| point.0));
        let (mut low, high) = range(|point| point.1);
        if chart.from_zero {
            low = low.min(0.0);
        }
        let (low, high) = widen((low, high));
        let y_step = tick_step(high - low, 5.0);
        let y_range = (
            (low / y_step).floor() * y_step,
            (high / y_step).ceil() * y_step,
        );
        let x_step = tick_step(x_range.1 - x_range.0, (width / 80.0).floor()).max(1.0);
        Self {
            width,
            height,
            x_range,
            y_range,
            x_ticks: ticks((x_range.0 / x_step).ceil() * x_step, x_range.1, x_step),
            y_ticks: ticks(y_range.0, y_range.1, y_step),
        }
    }

    fn x(&self, value: f64) -> f64 {
        let (low, high) = self.x_range;
        LEFT + (value - low) / (high - low) * (self.width - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        let (low, high) = self.y_range;
        self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)
    }

    fn draw_axes(&self, out: &mut String) {
        let (right, foot) = (self.width - RIGHT, self.height - 6.0);
        for tick in &self.y_ticks {
            let y = self.y(*tick);
            let _ = writeln!(
                out,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 6.0,
                y + 4.0,
                short(*tick)
            );
        }
        for (index, tick) in self.x_ticks.iter().enumerate() {
            let x = self.x(*tick);
            // The last label would be cut in half at the edge of the picture.
            let anchor = if x > right - 12.0 { "end" } else { "middle" };
            let word = if index == 0 { "step " } else { "" };
            let x = if anchor == "end" { right } else { x };
            let _ = writeln!(
                out,
                "<text x=\"{x:.1}\" y=\"{foot:.1}\" text-anchor=\"{anchor}\">{word}{}</text>",
                short(*tick)
            );
        }
    }

    fn draw(&self, series: &Series, out: &mut String) {
        let points = thin(&series.points, SLICES);
        if points.len() > 1 {
            let _ = write!(out, "<polyline class=\"{}\" points=\"", series.class);
            for (x, y) in &points {
                let _ = write!(out, "{:.1},{:.1} ", self.x(*x), self.y(*y));
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
                    self.x(*x),
                    self.y(*y)
                );
            }
        }
    }
}

/// The same range, or one around it where it has no width.
fn widen((low, high): (f64, f64)) -> (f64, f64) {
    if high > low {
        (low, high)
    } else {
        let margin = if low == 0.0 { 1.0 } else { low.abs() * 0.1 };
        (low - margin, low + margin)
    }
}

/// A round step that cuts `span` into at most about `count` pieces.
fn tick_step(span: f64, count: f64) -> f64 {
    let raw = span / count;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|step| step * power >= raw * 0.999);
    step.unwrap_or(10.0) * power
}

/// Multiples of `step` from `first` to `last`.
fn ticks(first: f64, last: f64, step: f64) -> Vec<f64> {
    let count = ((last - first) / step + 1e-6).floor().max(0.0) as usize;
    (0..=count.min(50))
        .map(|index| first + index as f64 * step)
        .collect()
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

/// A number in few characters.
fn short(value: f64) -> String {
    let size = value.abs();
    if size < 1e-12 {
        "0".to_string()
    } else if size >= 1e6 {
        format!("{}M", trim(value / 1e6))
    } else if size >= 1e4 {
        format!("{}k", trim(value / 1e3))
    } else if size < 1e-3 {
        let text = format!("{value:.1e}");
        text.replace(".0e", "e")
    } else {
        trim(value)
    }
}

/// Four significant digits at most, without zeros at the end.
fn trim(value: f64) -> String {
    let whole = value.abs().log10().floor().max(-3.0) as i32;
    let decimals = usize::try_from(3 - whole).unwrap_or(0);
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_string()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_right() {
        let cases = [
            (0.0, "0"),
            (0.5, "0.5"),
            (2.0, "2"),
            (1.234_56, "1.235"),
            (0.012_345, "0.01235"),
            (2e-4, "2e-4"),
            (1.8e-4, "1.8e-4"),
            (-3.5, "-3.5"),
            (1250.0, "1250"),
            (10_000.0, "10k"),
            (12_500.0, "12.5k"),
            (3_000_000.0, "3M"),
        ];
        for (value, text) in cases {
            assert_eq!(short(value), text);
        }
    }

    #[test]
    fn ticks_are_round_and_cover_the_range() {
        assert_eq!(tick_step(10.0, 5.0), 2.0);
        assert_eq!(tick_step(0.9, 5.0), 0.2);
        assert_eq!(ticks(0.0, 10.0, 5.0), [0.0, 5.0, 10.0]);
        assert_eq!(widen((3.0, 3.0)), (2.7, 3.3));
    }

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
        <rect class="probe" x="50.0" y="10" width="169.0" height="176.0"><title>step 1: 100</title></rect>
        <rect class="probe" x="219.0" y="10" width="169.0" height="176.0"><title>step 2: 300
        other 200</title></rect>
        </svg>
        </figure>
        "#);
    }
}
