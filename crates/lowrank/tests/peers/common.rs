//! What the scripts `goldens*.py` computed with PyTorch, transformers and PEFT, and how the engine is compared with it.
//!
//! The scripts' docstrings say what each file holds. [`Golden`] reads one file, and a [`Comparison`] collects every tensor of a case
//! before it fails, so that one run shows whether all gradients are wrong or only one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

/// The largest difference allowed, as a part of the golden tensor's largest value. Rounding in f32 moves these
/// values by up to 6e-6, measured against float64; a wrong epsilon or scale moves them by more than 1e-3.
pub(crate) const TOLERANCE: f64 = 1e-4;

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
    pub(crate) path: PathBuf,
    floats: BTreeMap<String, Values>,
    pub(crate) integers: BTreeMap<String, Vec<i32>>,
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

    /// Whether there is a tensor of f32 values of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.floats.contains_key(name)
    }

    /// The integers of that name.
    pub(crate) fn integers(&self, name: &str) -> &[i32] {
        let found = self.integers.get(name);
        found.unwrap_or_else(|| panic!("{} has no {name}", self.path.display()))
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
        self.values_of_size(name, ours, golden, 0.0);
    }

    /// The same where what is smaller than `least` is zero but for rounding.
    pub(crate) fn values_of_size(&mut self, name: &str, ours: &[f32], golden: &[f32], least: f64) {
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
            .fold(least, |size: f64, &value| size.max(f64::from(value).abs()));
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
