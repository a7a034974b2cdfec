//! The checkpoints of a job, each of which can be served by its name.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lowrank::formats::peft;
use lowrank::report::metrics::{self, MetricsLine};
use lowrank::train::checkpoint;
use serde_json::{Value, json};

use super::Jobs;
use super::job::{Job, result_name, short};
use crate::objects::unix;

/// What stands between the name of a job's result and the step of a checkpoint.
const MARK: &str = ":ckpt-step-";

impl Jobs {
    /// The checkpoints of a job, newest first.
    pub(super) fn checkpoints(&self, job: &Job) -> Vec<Value> {
        let run = job.run_folder();
        let record = job.record();
        let name = result_name(&self.base_name, record.suffix.as_deref(), &record.id);
        let mut losses: BTreeMap<u64, (Option<f64>, Option<f64>)> = BTreeMap::new();
        let found = metrics::read(&run.join("metrics.jsonl")).unwrap_or_default();
        for line in &found.lines {
            let of_step = losses.entry(line.step()).or_default();
            match line {
                MetricsLine::Step(step) => of_step.0 = Some(step.loss),
                MetricsLine::Eval(eval) => of_step.1 = Some(eval.eval_loss),
            }
        }
        let steps = checkpoint::steps(&run).into_iter().rev();
        steps
            .map(|step| {
                let folder = checkpoint::step_folder(&run, step);
                let written = folder.metadata().and_then(|about| about.modified());
                let (train, valid) = losses.get(&step).copied().unwrap_or_default();
                json!({
                    "id": format!("ftckpt-{}-{step}", short(&job.id)),
                    "object": "fine_tuning.job.checkpoint",
                    "created_at": written.map_or(record.created_at, unix),
                    "fine_tuning_job_id": job.id,
                    "fine_tuned_model_checkpoint": format!("{name}{MARK}{step}"),
                    "step_number": step,
                    "metrics": {
                        "step": step,
                        "train_loss": train,
                        "valid_loss": valid,
                        "full_valid_loss": valid,
                    },
                })
            })
            .collect()
    }

    /// Where the adapter of a checkpoint is, relative to the folder of adapters, if a name is that of one.
    pub(crate) fn checkpoint_path(&self, name: &str) -> Option<PathBuf> {
        let (result, step) = name.split_once(MARK)?;
        let step: u64 = step.parse().ok()?;
        let job = self.all().into_iter().find(|job| {
            let record = job.record();
            result_name(&self.base_name, record.suffix.as_deref(), &record.id) == result
        })?;
        let folder = checkpoint::step_folder(&job.run_folder(), step);
        let is_there = folder.join(peft::ADAPTER_CONFIG).is_file();
        let inside = folder.strip_prefix(&self.adapters).ok().map(PathBuf::from);
        inside.filter(|_| is_there)
    }
}
