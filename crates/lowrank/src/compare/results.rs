//! What a comparison of methods came to: the contents of comparison.json, which every table and plot is made from.

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::tuning::Method;

/// Methods side by side: what comparison.json holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The heading.
    pub title: String,
    /// The base model as it was named.
    pub model: String,
    /// Its parameters.
    pub base_parameters: u64,
    /// The rows that losses and texts were measured on, in words: "740 rows of data/e2e/test.jsonl".
    pub held_out: String,
    /// How texts were made, in words; empty where none were.
    pub decoding: String,
    /// The machine that speed, memory and latency were measured on, in words; empty where they were not.
    pub machine: String,
    /// Names of the metrics in the order shown; may be empty.
    pub metrics: Vec<String>,
    /// What losses and times are counted by.
    #[serde(default)]
    pub unit: Unit,
    /// The base model as it is.
    pub base: BaseResult,
    /// The methods in the config's order.
    pub methods: Vec<MethodResult>,
}

/// What losses and times are counted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Tokens that are said.
    #[default]
    Token,
    /// Rows that are classified.
    Row,
}

impl Unit {
    /// What a loss is, in words.
    pub fn of_loss(self) -> &'static str {
        match self {
            Self::Token => "nats a token",
            Self::Row => "mean of the labels",
        }
    }
}

/// The model before any training.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BaseResult {
    /// Held-out loss.
    pub loss: Option<f64>,
    /// Metrics by name.
    pub metrics: IndexMap<String, f64>,
    /// Milliseconds a generated token, or a classified row, at batch 1.
    pub milliseconds_per_token: Option<f64>,
}

/// One method with its options.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MethodResult {
    /// Its name in the config: "LoRA q,v".
    pub name: String,
    /// The method.
    pub method: Method,
    /// The options that it does not share with all others, as `train` takes them.
    pub options: Map<String, Value>,
    /// Values that are trained.
    pub trainable_parameters: u64,
    /// Bytes of what a task's folder holds beside the base (all of the model for full fine-tuning).
    pub checkpoint_bytes: Option<u64>,
    /// The learning rate used.
    pub learning_rate: Option<f64>,
    /// The rates tried before, with the loss on the validation rows; `None` where training diverged.
    pub sweep: Vec<(f64, Option<f64>)>,
    /// A training a seed, those that are finished.
    pub runs: Vec<SeedResult>,
    /// Runs that the config asks for and that are not finished.
    pub missing_runs: usize,
    /// Loss on the held-out rows, over the seeds.
    pub loss: Option<Spread>,
    /// Metrics by name, over the seeds.
    pub scores: IndexMap<String, Spread>,
    /// What it costs; `None` where that was not measured.
    pub cost: Option<Cost>,
}

/// One training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SeedResult {
    /// The seed.
    pub seed: u64,
    /// Loss on the held-out rows.
    pub loss: f64,
    /// Metrics by name.
    pub metrics: IndexMap<String, f64>,
    /// Training loss: (step, loss), thinned to at most 200 points.
    pub training: Vec<(u64, f64)>,
    /// Loss on the validation rows: (step, loss); step 0 is before training.
    pub validation: Vec<(u64, f64)>,
    /// Seconds of the training's steps, of those alone after it was last resumed, wherever it ran.
    pub seconds: f64,
}

/// A mean over seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// The sample standard deviation (n − 1); `None` for one seed.
    pub deviation: Option<f64>,
    /// How many seeds.
    pub seeds: usize,
}

/// What a method costs, measured on one machine in one pass over all methods.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Real tokens a second of training, the median step.
    pub tokens_per_second: f64,
    /// The training process's largest resident set, bytes.
    pub peak_memory: u64,
    /// Milliseconds a generated token, or a classified row, at batch 1, the adapter beside the base.
    pub milliseconds_per_token: f64,
    /// The base's own, measured in turn with it.
    pub base_milliseconds_per_token: f64,
    /// Whether it can be merged into the weights, after which it adds no latency.
    pub mergeable: bool,
    /// Positions of the context that it takes.
    pub positions_taken: usize,
    /// Bytes read to swap this task in.
    pub switch_bytes: u64,
    /// Milliseconds to do so, files in the page cache.
    pub switch_milliseconds: f64,
}

impl Comparison {
    /// Runs of all methods that are not finished.
    pub fn missing_runs(&self) -> usize {
        self.methods.iter().map(|method| method.missing_runs).sum()
    }

    /// Whether the cost of any method was measured.
    pub fn has_costs(&self) -> bool {
        self.methods.iter().any(|method| method.cost.is_some())
    }
}

impl Spread {
    /// Mean and sample deviation; `None` of no values.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().collect();
        let count = values.len() as f64;
        if values.is_empty() {
            return None;
        }
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        Some(Self {
            mean,
            deviation: (values.len() > 1).then(|| (squares / (count - 1.0)).sqrt()),
            seeds: values.len(),
        })
    }
}

impl Cost {
    /// How much longer a generated token or a classified row takes than without the method, as a share: 0.1 is a tenth longer. Noise may
    /// make it negative.
    pub fn added_latency(&self) -> f64 {
        self.milliseconds_per_token / self.base_milliseconds_per_token - 1.0
    }
}

impl MethodResult {
    /// Loss and scores over the runs that there are.
    pub fn summarize(&mut self, metrics: &[String]) {
        self.loss = Spread::of(self.runs.iter().map(|run| run.loss));
        self.scores = metrics
            .iter()
            .filter_map(|name| {
                let values = self.runs.iter().filter_map(|run| run.metrics.get(name));
                Some((name.clone(), Spread::of(values.copied())?))
            })
            .collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_mean_and_sample_deviation() {
        assert_eq!(Spread::of([]), None);
        let one = Spread::of([3.0]).unwrap();
        assert_eq!((one.mean, one.deviation, one.seeds), (3.0, None, 1));
        let three = Spread::of([1.0, 2.0, 6.0]).unwrap();
        assert_eq!((three.mean, three.seeds), (3.0, 3));
        // Squares 4, 1 and 9 over 2.
        assert!((three.deviation.unwrap() - 7f64.sqrt()).abs() < 1e-12);
    }
}
