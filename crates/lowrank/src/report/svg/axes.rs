//! The axes of every plot: which range they show, where a value lies, and how they are drawn.

use std::fmt::Write;

use crate::report::page::escape;
use crate::units::short;

/// A round number beside an axis, or a name.
#[derive(Debug)]
pub(super) struct Tick {
    pub(super) at: f64,
    pub(super) label: String,
}

/// One axis: values from `range.0` to `range.1`, on a linear or a logarithmic scale.
#[derive(Debug)]
pub(super) struct Axis {
    pub(super) range: (f64, f64),
    pub(super) ticks: Vec<Tick>,
    log: bool,
    grid: bool,
}

impl Axis {
    /// From the round number below the least value to that above the greatest, in about `count` pieces.
    pub(super) fn round(range: (f64, f64), count: f64) -> Self {
        let (low, high) = widen(range);
        let step = tick_step(high - low, count);
        let range = ((low / step).floor() * step, (high / step).ceil() * step);
        Self {
            range,
            ticks: labelled(&ticks(range.0, range.1, step), step),
            log: false,
            grid: true,
        }
    }

    /// Whole steps, exactly the range that there is, in at most about `count` pieces.
    pub(super) fn steps(range: (f64, f64), count: f64) -> Self {
        let range = widen(range);
        let step = tick_step(range.1 - range.0, count.floor()).max(1.0);
        let mut ticks = labelled(&ticks((range.0 / step).ceil() * step, range.1, step), step);
        if let Some(first) = ticks.first_mut() {
            first.label.insert_str(0, "step ");
        }
        Self {
            range,
            ticks,
            log: false,
            grid: false,
        }
    }

    /// A logarithmic axis for positive values, with room on both sides.
    pub(super) fn logarithmic((low, high): (f64, f64)) -> Self {
        /// Numbers of a decade that are labelled, the fewer the more decades there are.
        const CUTS: [(f64, &[f64]); 3] = [
            (2.5, &[1.0]),
            (1.2, &[1.0, 2.0, 5.0]),
            (0.0, &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0]),
        ];
        // Wide enough that at least one number of every list lies in it.
        let range = (low / 1.7, high * 1.7);
        let decades = (range.1 / range.0).log10();
        let cuts = CUTS.iter().find(|(least, _)| decades >= *least);
        let cuts = cuts.map_or(&[1.0][..], |(_, cuts)| cuts);
        let (first, last) = (
            range.0.log10().floor() as i32,
            range.1.log10().ceil() as i32,
        );
        let ticks = (first..=last)
            .flat_map(|power| cuts.iter().map(move |cut| cut * 10f64.powi(power)))
            .filter(|at| (range.0..=range.1).contains(at))
            .map(|at| Tick {
                at,
                label: short(at),
            })
            .collect();
        Self {
            range,
            ticks,
            log: true,
            grid: true,
        }
    }

    /// One place a name, from the far end of the axis to its near end: the first name is on top.
    pub(super) fn names(names: impl Iterator<Item = String>) -> Self {
        let ticks: Vec<Tick> = names
            .enumerate()
            .map(|(index, label)| Tick {
                at: index as f64 + 0.5,
                label,
            })
            .collect();
        Self {
            range: (ticks.len().max(1) as f64, 0.0),
            ticks,
            log: false,
            grid: false,
        }
    }

    /// Where a value lies: 0 at the near end, 1 at the far one.
    fn share(&self, value: f64) -> f64 {
        let (low, high) = self.range;
        if self.log {
            (value / low).ln() / (high / low).ln()
        } else {
            (value - low) / (high - low)
        }
    }
}

/// Space around the plot for the axes' words.
#[derive(Debug, Clone, Copy)]
pub(super) struct Margins {
    pub(super) left: f64,
    pub(super) right: f64,
    pub(super) top: f64,
    pub(super) bottom: f64,
}

impl Default for Margins {
    /// For numbers on both axes.
    fn default() -> Self {
        Self {
            left: 50.0,
            right: 12.0,
            top: 10.0,
            bottom: 24.0,
        }
    }
}

/// Maps values to places in the picture.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) width: f64,
    pub(super) height: f64,
    pub(super) margins: Margins,
    pub(super) x: Axis,
    pub(super) y: Axis,
}

impl Frame {
    pub(super) fn x(&self, value: f64) -> f64 {
        self.left() + self.x.share(value) * (self.right() - self.left())
    }

    pub(super) fn y(&self, value: f64) -> f64 {
        self.bottom() - self.y.share(value) * (self.bottom() - self.top())
    }

    pub(super) fn left(&self) -> f64 {
        self.margins.left
    }

    pub(super) fn right(&self) -> f64 {
        self.width - self.margins.right
    }

    pub(super) fn top(&self) -> f64 {
        self.margins.top
    }

    pub(super) fn bottom(&self) -> f64 {
        self.height - self.margins.bottom
    }

    pub(super) fn draw_axes(&self, out: &mut String) {
        let (left, right) = (self.left(), self.right());
        let foot = self.bottom() + 18.0;
        for tick in &self.y.ticks {
            let y = self.y(tick.at);
            if self.y.grid {
                let _ = write!(
                    out,
                    "<line class=\"grid\" x1=\"{left}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"
                );
            }
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                left - 6.0,
                y + 4.0,
                escape(&tick.label)
            );
        }
        for tick in &self.x.ticks {
            let x = self.x(tick.at);
            if self.x.grid {
                let _ = write!(
                    out,
                    "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>",
                    self.top(),
                    self.bottom()
                );
            }
            // The last label would be cut in half at the edge of the picture.
            let at_edge = x > self.width - 24.0;
            let (x, anchor) = if at_edge {
                (right, "end")
            } else {
                (x, "middle")
            };
            let _ = writeln!(
                out,
                "<text x=\"{x:.1}\" y=\"{foot:.1}\" text-anchor=\"{anchor}\">{}</text>",
                escape(&tick.label)
            );
        }
    }
}

/// The least and the greatest of finite values; `None` if there are none.
pub(in crate::report) fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values
        .filter(|value| value.is_finite())
        .fold(None, |range, value| {
            let (low, high) = range.unwrap_or((value, value));
            Some((low.min(value), high.max(value)))
        })
}

/// Ticks with their numbers: in few digits, or in as many as tell them apart.
fn labelled(places: &[f64], step: f64) -> Vec<Tick> {
    let mut labels: Vec<String> = places.iter().map(|at| short(*at)).collect();
    if labels.windows(2).any(|pair| pair[0] == pair[1]) {
        let decimals = usize::try_from(-step.log10().floor() as i32).unwrap_or(0);
        labels = places.iter().map(|at| format!("{at:.decimals$}")).collect();
    }
    let ticks = places.iter().zip(labels);
    ticks.map(|(at, label)| Tick { at: *at, label }).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_range() {
        assert_eq!(tick_step(10.0, 5.0), 2.0);
        assert_eq!(tick_step(0.9, 5.0), 0.2);
        assert_eq!(ticks(0.0, 10.0, 5.0), [0.0, 5.0, 10.0]);
        assert_eq!(widen((3.0, 3.0)), (2.7, 3.3));
    }

    #[test]
    fn ticks_that_lie_close_keep_their_digits() {
        let axis = Axis::round((1.2041, 1.2059), 5.0);
        let labels: Vec<&str> = axis.ticks.iter().map(|tick| &tick.label[..]).collect();
        assert_eq!(labels, ["1.2040", "1.2045", "1.2050", "1.2055", "1.2060"]);
    }

    #[test]
    fn logarithmic_axes_have_ticks_whatever_they_span() {
        for (low, high) in [(2.4e5, 2.4e5), (3e5, 8e5), (4e4, 9e6), (1.0, 1.3e8)] {
            let axis = Axis::logarithmic((low, high));
            assert!((1..=12).contains(&axis.ticks.len()), "{axis:?}");
            assert!(axis.share(low) > 0.0 && axis.share(high) < 1.0);
        }
        let axis = Axis::logarithmic((1e3, 1e7));
        assert!((axis.share(1e5) - 0.5).abs() < 1e-12);
        assert_eq!(axis.ticks[0].label, "1000");
    }

    #[test]
    fn the_first_name_is_on_top() {
        let axis = Axis::names(["a", "b"].into_iter().map(str::to_owned));
        assert!((axis.share(axis.ticks[0].at) - 0.75).abs() < 1e-12);
    }

    #[test]
    fn ranges_leave_out_what_is_not_finite() {
        assert_eq!(range([2.0, f64::NAN, 1.0].into_iter()), Some((1.0, 2.0)));
        assert_eq!(range([f64::INFINITY].into_iter()), None);
    }
}
