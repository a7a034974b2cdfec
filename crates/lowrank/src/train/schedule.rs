//! The learning rate of each step, as transformers' `get_scheduler` gives it.

use super::events::{Event, Observer};
use crate::settings::{SchedulerType, TrainConfig};

/// The schedule of one run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Shape after the warm-up.
    pub kind: SchedulerType,
    /// The highest rate.
    pub learning_rate: f64,
    /// Steps over which the rate rises linearly from zero.
    pub warmup_steps: u64,
    /// Optimizer steps of the run.
    pub total_steps: u64,
}

impl Schedule {
    /// The schedule of a run of so many steps.
    pub fn of(config: &TrainConfig, total_steps: u64) -> Self {
        let warmup_steps = if config.warmup_steps > 0 {
            config.warmup_steps
        } else {
            (config.warmup_ratio * total_steps as f64).ceil() as u64
        };
        Self {
            kind: config.lr_scheduler_type,
            learning_rate: config.learning_rate,
            warmup_steps,
            total_steps,
        }
    }

    /// Says that the highest rate is never reached, where that is so.
    pub(super) fn warn_of_warmup(self, observer: &mut dyn Observer) {
        let Self {
            warmup_steps,
            total_steps,
            learning_rate,
            ..
        } = self;
        if warmup_steps >= total_steps {
            observer.event(&Event::Note(format!(
                "warning: the warm-up takes {warmup_steps} steps and the run {total_steps}, so the learning rate never reaches {learning_rate}"
            )));
        }
    }

    /// The rate of optimizer step `step`, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * step as f64 / self.warmup_steps.max(1) as f64;
        }
        let length = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let done = (step - self.warmup_steps) as f64 / length;
        let factor = match self.kind {
            SchedulerType::Constant => 1.0,
            SchedulerType::Linear => (1.0 - done).max(0.0),
            SchedulerType::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * done).cos())).max(0.0),
        };
        self.learning_rate * factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_transformers() {
        // get_linear_schedule_with_warmup(warmup 2, total 10) and its cosine sibling, lr 1.
        let schedule = |kind| Schedule {
            kind,
            learning_rate: 1.0,
            warmup_steps: 2,
            total_steps: 10,
        };
        let linear = schedule(SchedulerType::Linear);
        let rates: Vec<f64> = [0, 1, 2, 6, 9, 10].iter().map(|&s| linear.at(s)).collect();
        assert_eq!(rates, [0.0, 0.5, 1.0, 0.5, 0.125, 0.0]);
        let cosine = schedule(SchedulerType::Cosine);
        assert!(
            (cosine.at(6) - 0.5).abs() < 1e-12 && (cosine.at(4) - 0.853_553_390_593).abs() < 1e-9
        );
        assert_eq!(schedule(SchedulerType::Constant).at(9), 1.0);
    }
}
