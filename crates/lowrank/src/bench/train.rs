//! Optimizer steps, timed.

use std::time::Instant;

use lowrank_kernels::{
    OpCost, RegionCost, Workspace, profiled_regions, start_profile, stop_profile,
};

use crate::Error;
use crate::data::Example;
use crate::data::batches::prompt_groups;
use crate::model::{Adapter, Decoder};
use crate::plan::{Memory, StepFlops, Work, step_flops, training_memory};
use crate::train::pieces::teams;
use crate::train::{OptimizerState, StepOptions, optimizer_step, peak_rss};

/// What to measure.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Steps that are measured.
    pub steps: usize,
    /// Steps before them that are not.
    pub warmup: usize,
    /// Whether to say where the time went.
    pub profile: bool,
    /// The steps' settings; `batch_size` rows are a step.
    pub step: StepOptions<'static>,
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct TrainFigures {
    /// Seconds of each measured step.
    pub seconds: Vec<f64>,
    /// The loss of every step, warm-up included.
    pub losses: Vec<f64>,
    /// What all measured steps computed.
    pub work: Work,
    /// Rows of all measured steps.
    pub rows: usize,
    /// What the measured steps needed.
    pub flops: StepFlops,
    /// What the memory was predicted to be for the largest step.
    pub predicted: Memory,
    /// The process's largest resident memory at the end, bytes.
    pub peak_rss: u64,
    /// Where the time went, if asked.
    pub profile: Vec<OpCost>,
    /// What of the time threads share, if asked.
    pub regions: Vec<RegionCost>,
}

impl TrainFigures {
    /// Seconds of all measured steps.
    pub fn total_seconds(&self) -> f64 {
        self.seconds.iter().sum()
    }
}

/// Trains on `examples` in their order, round and round, and times each step. To share prompts, rows with the same one
/// are first put together.
///
/// # Errors
/// A loss that is not finite.
pub fn train(
    model: &Decoder,
    adapter: &mut Adapter,
    examples: &[Example],
    options: &TrainOptions,
) -> Result<TrainFigures, Error> {
    let ws = Workspace::new();
    let mut state = OptimizerState::new(adapter);
    let mut figures = TrainFigures {
        seconds: Vec::new(),
        losses: Vec::new(),
        work: Work::default(),
        rows: 0,
        flops: StepFlops::default(),
        predicted: Memory::default(),
        peak_rss: 0,
        profile: Vec::new(),
        regions: Vec::new(),
    };
    let size = options.step.batch_size;
    let order = if options.step.share_prompts {
        prompt_groups(examples).concat()
    } else {
        (0..examples.len()).collect()
    };
    for step in 0..options.warmup + options.steps {
        let rows: Vec<&Example> = (0..size)
            .map(|i| &examples[order[(step * size + i) % order.len()]])
            .collect();
        if step == options.warmup && options.profile {
            start_profile();
        }
        let begun = Instant::now();
        let done = optimizer_step(model, adapter, &mut state, &rows, &options.step, &ws)?;
        let seconds = begun.elapsed().as_secs_f64();
        figures.losses.push(done.loss);
        let config = model.config();
        let pieces = options.step.pieces(config, adapter, &rows);
        let works = pieces.iter().map(|rows| {
            let batch = options
                .step
                .batch_of(config, rows, adapter.virtual_tokens());
            Work::of(&batch, &config.windows())
        });
        let works: Vec<Work> = works.collect();
        let largest = works.iter().copied().max_by_key(|work| work.tokens);
        let (dtype, saving) = (model.weights().dtype(), options.step.saving);
        let memory = training_memory(
            config,
            adapter,
            dtype,
            model.weights().converted_bytes(),
            largest.unwrap_or_default(),
            pieces.len(),
            teams(config, adapter, pieces.len()),
            saving,
            options.step.compute_dtype,
        );
        if memory.total() > figures.predicted.total() {
            figures.predicted = memory;
        }
        if step >= options.warmup {
            figures.seconds.push(seconds);
            figures.rows += rows.len();
            for work in works {
                figures.work.add(work);
            }
        }
    }
    if options.profile {
        figures.profile = stop_profile();
        figures.regions = profiled_regions();
    }
    figures.flops = step_flops(model.config(), adapter, figures.work);
    figures.peak_rss = peak_rss();
    Ok(figures)
}
