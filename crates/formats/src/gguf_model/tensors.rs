//! The tensors of a model: where each comes from.

use std::collections::HashSet;

use super::architecture::Rotary;
use super::shapes::{Change, Place};
use super::{Model, rope};
use crate::FormatError;
use crate::gguf::{GgmlType, GgufTensor};

/// Where one Hugging Face tensor comes from.
#[derive(Clone, Debug)]
pub struct GgufWeight {
    /// Its name in a Hugging Face folder.
    pub name: String,
    /// What the file has.
    pub tensor: GgufTensor,
    /// What is to be undone.
    pub change: Change,
}

impl GgufWeight {
    /// Its dimensions in a Hugging Face folder.
    pub fn shape(&self) -> Vec<usize> {
        let mut shape = self.tensor.shape.clone();
        if self.change == Change::Turned {
            shape.reverse();
        }
        shape
    }
}

impl Model<'_> {
    /// Every tensor of the model, with its source; every problem at once.
    pub(super) fn weights(&self) -> Result<Vec<GgufWeight>, FormatError> {
        let mut finder = Finder {
            model: self,
            weights: Vec::new(),
            problems: Vec::new(),
        };
        for place in self.shapes.outside() {
            finder.add(place);
        }
        for layer in 0..self.shapes.layers {
            for place in self.shapes.layer(layer) {
                finder.add(place);
            }
            // A file that claims a billion layers is wrong in the first already.
            if finder.problems.len() > 20 {
                break;
            }
        }
        finder.unused();
        let Finder {
            weights, problems, ..
        } = finder;
        if problems.is_empty() {
            return Ok(weights);
        }
        Err(FormatError::Problems {
            path: self.gguf.path().to_path_buf(),
            problems,
        })
    }
}

struct Finder<'p, 'a> {
    model: &'p Model<'a>,
    weights: Vec<GgufWeight>,
    problems: Vec<String>,
}

impl Finder<'_, '_> {
    fn add(&mut self, place: Place) {
        let from = &place.gguf;
        let Some(tensor) = self.model.gguf.tensor(from) else {
            self.problems.push(format!("tensor `{from}` is missing"));
            return;
        };
        if tensor.shape != place.shape {
            self.problems.push(format!(
                "tensor `{from}` has shape {:?}; the metadata demand {:?}",
                tensor.shape, place.shape
            ));
        }
        if !tensor.kind.is_readable() {
            self.problems.push(format!(
                "tensor `{from}` is stored as {}; types that can be read: {}",
                tensor.kind,
                GgmlType::readable()
            ));
        }
        self.weights.push(GgufWeight {
            name: place.name,
            tensor: tensor.clone(),
            change: place.change,
        });
    }

    /// A tensor that nothing consumes is a part of the model that would be lost.
    fn unused(&mut self) {
        let architecture = self.model.shapes.architecture;
        let used: HashSet<&str> = self
            .weights
            .iter()
            .map(|weight| weight.tensor.name.as_str())
            .collect();
        for tensor in self.model.gguf.tensors() {
            let name = tensor.name.as_str();
            // The rotary factors are in config.json; each layer of old files repeats plain ones.
            let is_rope = name == rope::FACTORS
                || architecture.rotary == Rotary::PartAndLong
                    && rope::LONGROPE_FACTORS.contains(&name)
                || name.ends_with(".attn_rot_embd");
            if !used.contains(name) && !is_rope && self.problems.len() <= 20 {
                let class = architecture.class;
                self.problems
                    .push(format!("tensor `{name}` has no place in {class}"));
            }
        }
    }
}
