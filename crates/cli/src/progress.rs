//! Long work on standard error: a bar on a terminal, a line now and then elsewhere, nothing with `-q`.

use std::io::Write;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use console::Term;
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use lowrank::report::{EvalMetrics, StepMetrics};
use lowrank::units;

/// All bars of the process, so that other text can be printed above them.
static BARS: LazyLock<MultiProgress> =
    LazyLock::new(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));

/// How often a line is printed where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Runs `print` with the bars out of the way.
pub fn suspend<T>(print: impl FnOnce() -> T) -> T {
    BARS.suspend(print)
}

/// Prints a line to standard error above the bars. A standard error that is gone is ignored: there is nobody to tell.
pub fn stderr_line(line: &str) {
    suspend(|| {
        let _ = writeln!(std::io::stderr(), "{line}");
    });
}

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A bar that is redrawn.
    Bar,
    /// A line every ten seconds.
    Lines,
    /// Nothing.
    Quiet,
}

impl Mode {
    /// A bar on a terminal, lines elsewhere, nothing when `quiet`.
    pub fn detect(quiet: bool) -> Self {
        if quiet {
            Self::Quiet
        } else if Term::stderr().features().is_attended() {
            Self::Bar
        } else {
            Self::Lines
        }
    }
}

/// Shows a training run. The trainer's events map onto the methods one to one.
#[derive(Debug)]
pub struct TrainProgress {
    mode: Mode,
    bar: ProgressBar,
    total_steps: u64,
    pace: Pace,
    last_line: Option<Instant>,
}

impl TrainProgress {
    /// Nothing is shown before [`start`](Self::start).
    pub fn new(mode: Mode) -> Self {
        Self {
            mode,
            bar: ProgressBar::hidden(),
            total_steps: 0,
            pace: Pace::default(),
            last_line: None,
        }
    }

    /// The run is about to take its first step; `done_steps` were taken before it was resumed.
    pub fn start(&mut self, total_steps: u64, done_steps: u64) {
        self.total_steps = total_steps;
        if self.mode == Mode::Bar {
            self.bar = BARS.add(ProgressBar::new(total_steps).with_position(done_steps));
            self.bar
                .set_style(bar_style("{wide_bar:.cyan/dim} {pos}/{len} · {msg}"));
            // Drawn with each step. A ticker would be a thread of its own, which may not be had.
            self.bar.tick();
        }
    }

    /// An optimizer step was taken.
    pub fn step(&mut self, step: &StepMetrics) {
        let now = Instant::now();
        // The step's own time: loading, evaluations and checkpoints come between steps.
        let seconds = step.tokens as f64 / step.tokens_per_second;
        let elapsed = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        let left = self.total_steps.saturating_sub(step.step);
        let left = self.pace.remaining(elapsed, left);
        match self.mode {
            Mode::Bar => {
                self.bar.set_position(step.step);
                self.bar.set_message(step_text(step, left));
            }
            Mode::Lines => {
                let due = self.last_line.is_none_or(|last| now - last >= LINE_EVERY);
                if due || step.step == self.total_steps {
                    self.last_line = Some(now);
                    let (position, total) = (step.step, self.total_steps);
                    stderr_line(&format!(
                        "step {position}/{total} · {}",
                        step_text(step, left)
                    ));
                }
            }
            Mode::Quiet => {}
        }
    }

    /// The held-out rows were evaluated.
    pub fn eval(&self, eval: &EvalMetrics) {
        self.note(&format!(
            "step {} · held-out loss {:.4}",
            eval.step, eval.eval_loss
        ));
    }

    /// A checkpoint was written.
    pub fn checkpoint(&self, path: &Path) {
        self.note(&format!("checkpoint written to {}", path.display()));
    }

    /// Something worth a line.
    pub fn note(&self, text: &str) {
        if self.mode != Mode::Quiet {
            stderr_line(text);
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for TrainProgress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// A bar over counted things, such as rows evaluated or modules merged.
pub fn counter(mode: Mode, total: u64, what: &'static str) -> ProgressBar {
    let bar = hidden_unless_bar(mode, total);
    bar.set_style(bar_style(
        "{prefix} {wide_bar:.cyan/dim} {pos}/{len} · {eta} left",
    ));
    bar.set_prefix(what);
    bar
}

/// A bar over bytes, for downloads.
pub fn bytes(mode: Mode, total: u64, what: String) -> ProgressBar {
    if mode == Mode::Lines {
        stderr_line(&format!("{what}: {}", HumanBytes(total)));
    }
    let bar = hidden_unless_bar(mode, total);
    bar.set_style(bar_style(
        "{prefix} {wide_bar:.cyan/dim} {bytes}/{total_bytes} · {bytes_per_sec} · {eta} left",
    ));
    bar.set_prefix(what);
    bar
}

fn hidden_unless_bar(mode: Mode, total: u64) -> ProgressBar {
    if mode == Mode::Bar {
        BARS.add(ProgressBar::new(total))
    } else {
        ProgressBar::hidden()
    }
}

/// The templates are constants of this file; a mistake in one shows as indicatif's own style, not as a failed run.
fn bar_style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸─")
}

fn step_text(step: &StepMetrics, left: Duration) -> String {
    let mut text = format!(
        "loss {:.4} · {:.0} tokens/s",
        step.loss, step.tokens_per_second
    );
    if !left.is_zero() {
        text.extend([" · ", &units::duration(left), " left"]);
    }
    text
}

/// Seconds a step, averaged with recent steps counting most.
#[derive(Debug, Default)]
struct Pace {
    seconds: Option<f64>,
}

impl Pace {
    /// Takes in that a step took `elapsed`; the time that `steps` more will take.
    fn remaining(&mut self, elapsed: Duration, steps: u64) -> Duration {
        let now = elapsed.as_secs_f64();
        let seconds = self
            .seconds
            .map_or(now, |before| 0.95 * before + 0.05 * now);
        self.seconds = Some(seconds);
        Duration::try_from_secs_f64(seconds * steps as f64).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_follows_the_steps() {
        let mut pace = Pace::default();
        assert_eq!(
            pace.remaining(Duration::from_secs(2), 10),
            Duration::from_secs(20)
        );
        for _ in 0..200 {
            pace.remaining(Duration::from_secs(1), 1);
        }
        let left = pace.remaining(Duration::from_secs(1), 100).as_secs_f64();
        assert!((left - 100.0).abs() < 1.0, "{left}");
    }

    #[test]
    fn a_step_is_one_line() {
        let step = StepMetrics {
            step: 12,
            epoch: 0.5,
            loss: 2.345_67,
            learning_rate: 2e-4,
            grad_norm: 1.0,
            tokens: 100,
            supervised_tokens: 50,
            tokens_per_second: 811.6,
            peak_rss: 0,
        };
        assert_eq!(
            step_text(&step, Duration::from_secs(192)),
            "loss 2.3457 · 812 tokens/s · 3 min 12 s left"
        );
        assert_eq!(
            step_text(&step, Duration::ZERO),
            "loss 2.3457 · 812 tokens/s"
        );
    }

    #[test]
    fn bar_templates_are_valid() {
        for template in [
            "{wide_bar:.cyan/dim} {pos}/{len} · {msg}",
            "{prefix} {wide_bar:.cyan/dim} {pos}/{len} · {eta} left",
            "{prefix} {wide_bar:.cyan/dim} {bytes}/{total_bytes} · {bytes_per_sec} · {eta} left",
        ] {
            ProgressStyle::with_template(template).unwrap();
        }
    }
}
