//! Which rows each step takes.

use super::events::{Event, Observer};
use crate::data::Example;
use crate::data::batches::{epoch_order, grouped_epoch_order, prompt_groups};
use crate::settings::TrainConfig;
use crate::units::grouped;

/// The rows of a run in the order of its steps. That is a function of the settings, the step and the rows alone; the
/// order of the current epoch is kept.
pub(super) struct StepRows<'a> {
    config: &'a TrainConfig,
    examples: &'a [Example],
    /// Rows that share a prompt, where they are to stay together.
    groups: Option<Vec<Vec<usize>>>,
    /// The epoch that `order` belongs to.
    epoch: Option<u64>,
    order: Vec<usize>,
}

impl<'a> StepRows<'a> {
    pub(super) fn new(config: &'a TrainConfig, examples: &'a [Example]) -> Self {
        Self {
            config,
            examples,
            groups: config.share_prompts.then(|| prompt_groups(examples)),
            epoch: None,
            order: Vec::new(),
        }
    }

    pub(super) fn steps_per_epoch(&self) -> u64 {
        self.examples.len().div_ceil(self.config.rows_per_step()) as u64
    }

    /// The rows of a step; the last step of an epoch takes what is left.
    pub(super) fn rows(&mut self, step: u64) -> Vec<&'a Example> {
        let epoch = step / self.steps_per_epoch();
        if self.epoch != Some(epoch) {
            self.order = self.of_epoch(epoch);
            self.epoch = Some(epoch);
        }
        let size = self.config.rows_per_step();
        let first = (step % self.steps_per_epoch()) as usize * size;
        let rows = self.order[first..].iter().take(size);
        rows.map(|&row| &self.examples[row]).collect()
    }

    fn of_epoch(&self, epoch: u64) -> Vec<usize> {
        let (seed, shuffle) = (self.config.seed, self.config.shuffle);
        match &self.groups {
            Some(groups) => grouped_epoch_order(groups, seed, epoch, shuffle),
            None => epoch_order(self.examples.len(), seed, epoch, shuffle),
        }
    }

    /// Says what sharing prompts comes to, where that is asked for.
    pub(super) fn announce(&self, observer: &mut dyn Observer) {
        if let Some(note) = self.note() {
            observer.event(&Event::Note(note));
        }
    }

    fn note(&self) -> Option<String> {
        let groups = self.groups.as_ref()?;
        let rows = grouped(self.examples.len() as u64);
        let prompts = grouped(groups.len() as u64);
        let alone: usize = self.examples.iter().map(|row| row.ids.len()).sum();
        // A step's rows are whole micro-batches, but for the last step's, so these are simply the pieces of the order.
        let saved: usize = self
            .of_epoch(0)
            .chunks(self.config.batch_size)
            .map(|micro| self.saved_tokens(micro))
            .sum();
        if saved == 0 {
            return Some(format!(
                "warning: share_prompts saves nothing here: {rows} rows have {prompts} distinct prompts, and no batch has two rows of one"
            ));
        }
        Some(format!(
            "sharing prompts: {rows} rows have {prompts} distinct prompts; the first pass over them computes {} tokens instead of {}",
            grouped((alone - saved) as u64),
            grouped(alone as u64)
        ))
    }

    /// Tokens of a micro-batch that are not computed because another row of it has the same prompt.
    fn saved_tokens(&self, micro: &[usize]) -> usize {
        prompt_groups(micro.iter().map(|&row| &self.examples[row]))
            .iter()
            .map(|group| (group.len() - 1) * self.examples[micro[group[0]]].prompt().len())
            .sum()
    }
}
