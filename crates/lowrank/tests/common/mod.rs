//! What `scripts/goldens.py` computed with PyTorch, transformers and PEFT, and how the engine is compared with it.
//!
//! That script's docstring says what each file holds. [`MODELS`] and [`ADAPTERS`] list the cases, [`Golden`] reads
//! one file, and a [`Comparison`] collects every tensor of a case before it fails, so that one run shows whether all
//! gradients are wrong or only one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

/// The largest difference allowed, as a part of the golden tensor's largest value. Rounding in f32 moves these
/// values by up to 6e-6, measured against float64; a wrong epsilon or scale moves them by more than 1e-3.
pub(crate) const TOLERANCE: f64 = 1e-4;

/// A model folder below `tests/goldens`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ModelCase {
    /// The folder's name.
    pub(crate) name: &'static str,
    /// Whether the output head is the token embedding.
    pub(crate) tied: bool,
    /// Whether the golden holds the gradient of every weight and the losses of full fine-tuning (learning rate 1e-3).
    pub(crate) fully_tuned: bool,
}

/// The models, one or more a family.
pub(crate) const MODELS: [ModelCase; 6] = [
    ModelCase {
        name: "llama",
        tied: false,
        fully_tuned: true,
    },
    ModelCase {
        name: "llama3",
        tied: true,
        fully_tuned: false,
    },
    ModelCase {
        name: "mistral",
        tied: false,
        fully_tuned: false,
    },
    ModelCase {
        name: "qwen2",
        tied: true,
        fully_tuned: true,
    },
    ModelCase {
        name: "qwen3",
        tied: false,
        fully_tuned: false,
    },
    ModelCase {
        name: "gpt2",
        tied: true,
        fully_tuned: true,
    },
];

/// An adapter folder below a model's; all are trained with learning rate 1e-2.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdapterCase {
    /// The folder of the model.
    pub(crate) model: &'static str,
    /// The adapter's folder in it.
    pub(crate) name: &'static str,
    /// Whether there are `smoothed.` tensors: loss and gradients with label smoothing 0.1.
    pub(crate) smoothed: bool,
    /// Whether the trained tensors belong to parts of a fused matrix and start as `init.KEY`; PEFT's files beside
    /// the golden then hold the same change, stacked, and only the logits and the loss can be compared with them.
    pub(crate) parts: bool,
}

const fn adapter(model: &'static str, name: &'static str) -> AdapterCase {
    AdapterCase {
        model,
        name,
        smoothed: false,
        parts: false,
    }
}

/// Folders of PEFT's prefix and prompt tuning below the models', trained with learning rate 1e-2.
pub(crate) const PROMPT_ADAPTERS: [AdapterCase; 5] = [
    adapter("llama", "prefix"),
    adapter("llama", "prompt"),
    adapter("qwen3", "prefix"),
    adapter("gpt2", "prefix"),
    adapter("gpt2", "prompt"),
];

/// Folders of PEFT's IA3 below the models', trained with learning rate 1e-2.
pub(crate) const IA3_ADAPTERS: [AdapterCase; 3] = [
    adapter("llama", "ia3"),
    adapter("qwen2", "ia3"),
    adapter("gpt2", "ia3"),
];

/// The adapters.
pub(crate) const ADAPTERS: [AdapterCase; 9] = [
    AdapterCase {
        smoothed: true,
        ..adapter("llama", "all_linear")
    },
    adapter("llama", "patterns"),
    adapter("llama3", "rslora"),
    adapter("mistral", "q_v"),
    adapter("qwen2", "attention"),
    adapter("qwen3", "all_linear"),
    adapter("gpt2", "c_attn"),
    adapter("gpt2", "all_linear"),
    AdapterCase {
        parts: true,
        ..adapter("gpt2", "q_v_parts")
    },
];

/// The methods of `scripts/goldens_methods.py` with their learning rates, for llama and gpt2.
pub(crate) const METHODS: [(&str, f64); 6] = [
    ("top", 1e-3),
    ("head", 1e-3),
    ("bitfit", 1e-2),
    ("houlsby", 1e-2),
    ("lin", 1e-2),
    ("pfeiffer", 1e-2),
];

/// The folder of a method's adapter of a model, with its golden.
pub(crate) fn method_folder(model: &str, method: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens_methods")
        .join(model)
        .join(method)
}

impl ModelCase {
    /// The folder that holds the model.
    pub(crate) fn folder(&self) -> PathBuf {
        goldens().join(self.name)
    }
}

impl AdapterCase {
    /// The folder that holds the model.
    pub(crate) fn model_folder(&self) -> PathBuf {
        goldens().join(self.model)
    }

    /// The folder that holds the adapter.
    pub(crate) fn folder(&self) -> PathBuf {
        self.model_folder().join(self.name)
    }
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// An example: T token ids and T labels.
#[derive(Debug)]
pub(crate) struct Row {
    /// The token ids.
    pub(crate) ids: Vec<u32>,
    /// At position t the token to predict from position t - 1, or none; the first is never used.
    pub(crate) labels: Vec<Option<u32>>,
}

/// A tensor of f32 values.
#[derive(Debug)]
pub(crate) struct Values {
    /// Its dimensions, outermost first.
    pub(crate) shape: Vec<usize>,
    /// Its values, row by row.
    pub(crate) data: Vec<f32>,
}

/// The tensors of one safetensors file: a golden, a model or an adapter.
#[derive(Debug)]
pub(crate) struct Golden {
    path: PathBuf,
    floats: BTreeMap<String, Values>,
    integers: BTreeMap<String, Vec<i32>>,
}

impl Golden {
    /// Reads `golden.safetensors` in `folder`.
    pub(crate) fn in_folder(folder: &Path) -> Self {
        Self::read(&folder.join("golden.safetensors"))
    }

    /// Reads a file whose tensors are f32 or i32.
    pub(crate) fn read(path: &Path) -> Self {
        let bytes =
            std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = SafeTensors::deserialize(&bytes)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let (mut floats, mut integers) = (BTreeMap::new(), BTreeMap::new());
        for (name, view) in file.iter() {
            let words = view.data().as_chunks::<4>().0.iter();
            match view.dtype() {
                Dtype::F32 => {
                    let data = words.map(|&word| f32::from_le_bytes(word)).collect();
                    floats.insert(
                        name.to_owned(),
                        Values {
                            shape: view.shape().to_vec(),
                            data,
                        },
                    );
                }
                Dtype::I32 => {
                    integers.insert(
                        name.to_owned(),
                        words.map(|&word| i32::from_le_bytes(word)).collect(),
                    );
                }
                other => panic!("{}: {name} is {other:?}", path.display()),
            }
        }
        Self {
            path: path.to_owned(),
            floats,
            integers,
        }
    }

    /// The tensor of that name.
    pub(crate) fn values(&self, name: &str) -> &Values {
        self.floats
            .get(name)
            .unwrap_or_else(|| panic!("{} has no {name}", self.path.display()))
    }

    /// The only value of a tensor such as `loss`.
    pub(crate) fn scalar(&self, name: &str) -> f32 {
        let values = self.values(name);
        assert_eq!(values.data.len(), 1, "{name} is {:?}", values.shape);
        values.data[0]
    }

    /// The tensors whose names start with `prefix`, by the rest of their names.
    pub(crate) fn below<'a>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a Values)> {
        self.floats
            .iter()
            .filter_map(move |(name, values)| Some((name.strip_prefix(prefix)?, values)))
    }

    /// The examples `ids.N` and `labels.N`; they are in a model's golden alone.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let numbered = (0..).map_while(|n| {
            Some((
                self.integers.get(&format!("ids.{n}"))?,
                self.integers.get(&format!("labels.{n}"))?,
            ))
        });
        numbered
            .map(|(ids, labels)| Row {
                ids: ids
                    .iter()
                    .map(|&id| u32::try_from(id).expect("token ids are not negative"))
                    .collect(),
                labels: labels
                    .iter()
                    .map(|&label| u32::try_from(label).ok())
                    .collect(),
            })
            .collect()
    }

    /// The tokens that greedy decoding appends to row `n`.
    pub(crate) fn greedy(&self, n: usize) -> Vec<u32> {
        let ids = self.integers.get(&format!("greedy.{n}"));
        let ids = ids.unwrap_or_else(|| panic!("{} has no greedy.{n}", self.path.display()));
        ids.iter()
            .map(|&id| u32::try_from(id).expect("token ids are not negative"))
            .collect()
    }
}

/// The differences between what the engine computed and a golden.
#[derive(Debug)]
pub(crate) struct Comparison {
    case: String,
    compared: usize,
    worst: (f64, String),
    failures: Vec<String>,
}

impl Comparison {
    /// Starts the comparison of a case, named in what is printed.
    pub(crate) fn new(case: impl Into<String>) -> Self {
        Self {
            case: case.into(),
            compared: 0,
            worst: (0.0, "nothing".to_owned()),
            failures: Vec::new(),
        }
    }

    /// Compares the values of one tensor: `max|ours - golden|` may be [`TOLERANCE`] of `max|golden|`.
    pub(crate) fn values(&mut self, name: &str, ours: &[f32], golden: &[f32]) {
        self.compared += 1;
        if ours.len() != golden.len() {
            self.failures.push(format!(
                "{name}: {} values, golden {}",
                ours.len(),
                golden.len()
            ));
            return;
        }
        let size = golden
            .iter()
            .fold(0.0, |size: f64, &value| size.max(f64::from(value).abs()));
        // A NaN counts as the largest difference; `max` would drop it.
        let difference = |(&a, &b): (&f32, &f32)| {
            let difference = (f64::from(a) - f64::from(b)).abs();
            if difference.is_nan() {
                f64::INFINITY
            } else {
                difference
            }
        };
        let differences = ours.iter().zip(golden).map(difference).enumerate();
        let Some((at, largest)) = differences.max_by(|a, b| a.1.total_cmp(&b.1)) else {
            self.failures.push(format!("{name}: no values"));
            return;
        };
        let relative = if largest == 0.0 { 0.0 } else { largest / size };
        if relative > self.worst.0 {
            self.worst = (relative, name.to_owned());
        }
        if relative > TOLERANCE {
            self.failures.push(format!(
                "{name}: {relative:.1e} of its largest value {size:.3e} (at {at} of {}: {}, golden {})",
                ours.len(),
                ours[at],
                golden[at]
            ));
        }
    }

    /// Compares one number.
    pub(crate) fn scalar(&mut self, name: &str, ours: f32, golden: f32) {
        self.values(name, &[ours], &[golden]);
    }

    /// Compares every tensor of `golden` whose name starts with `prefix` with the one that `ours` gives for the rest
    /// of its name; one that it doesn't give is a failure.
    pub(crate) fn below<'a>(
        &mut self,
        golden: &Golden,
        prefix: &str,
        mut ours: impl FnMut(&str) -> Option<&'a [f32]>,
    ) {
        for (name, values) in golden.below(prefix) {
            match ours(name) {
                Some(found) => self.values(&format!("{prefix}{name}"), found, &values.data),
                None => self.failures.push(format!("{prefix}{name}: not computed")),
            }
        }
    }

    /// Prints the worst tensor; panics with every tensor that is too far from its golden, or if none was compared.
    pub(crate) fn finish(self) {
        let Self {
            case,
            compared,
            worst: (relative, name),
            failures,
        } = self;
        assert!(
            failures.is_empty(),
            "{case}: {} of {compared} differ\n  {}",
            failures.len(),
            failures.join("\n  ")
        );
        assert!(compared > 0, "{case}: nothing was compared");
        eprintln!("{case}: {compared} compared, worst {relative:.1e} ({name})");
    }
}
