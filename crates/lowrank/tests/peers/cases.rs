//! The cases of `scripts/goldens.py` and `scripts/goldens_methods.py`.

use std::path::{Path, PathBuf};

use crate::common::Golden;

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
pub(crate) const MODELS: [ModelCase; 15] = [
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
        name: "gemma3",
        tied: true,
        fully_tuned: true,
    },
    ModelCase {
        name: "gemma2",
        tied: true,
        fully_tuned: true,
    },
    ModelCase {
        name: "smollm3",
        tied: true,
        fully_tuned: false,
    },
    ModelCase {
        name: "granite",
        tied: true,
        fully_tuned: true,
    },
    ModelCase {
        name: "olmo2",
        tied: false,
        fully_tuned: true,
    },
    ModelCase {
        name: "olmo3",
        tied: false,
        fully_tuned: false,
    },
    ModelCase {
        name: "phi3",
        tied: false,
        fully_tuned: true,
    },
    ModelCase {
        name: "ministral3",
        tied: true,
        fully_tuned: false,
    },
    ModelCase {
        name: "glm4",
        tied: false,
        fully_tuned: true,
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
pub(crate) const PROMPT_ADAPTERS: [AdapterCase; 7] = [
    adapter("llama", "prefix"),
    adapter("llama", "prompt"),
    adapter("qwen3", "prefix"),
    adapter("gemma3", "prompt"),
    adapter("granite", "prompt"),
    adapter("gpt2", "prefix"),
    adapter("gpt2", "prompt"),
];

/// Folders of PEFT's IA3 below the models', trained with learning rate 1e-2.
pub(crate) const IA3_ADAPTERS: [AdapterCase; 3] = [
    adapter("llama", "ia3"),
    adapter("qwen2", "ia3"),
    adapter("gpt2", "ia3"),
];

/// Folders of PEFT's LoRA with rows of tokens below the models', trained with learning rate 1e-2.
pub(crate) const TOKEN_ADAPTERS: [AdapterCase; 7] = [
    adapter("llama", "tokens"),
    adapter("llama", "token_tables"),
    adapter("qwen2", "tokens"),
    adapter("qwen2", "token_tables"),
    adapter("gemma2", "tokens"),
    adapter("granite", "tokens"),
    adapter("gpt2", "tokens"),
];

/// The adapters.
pub(crate) const ADAPTERS: [AdapterCase; 21] = [
    AdapterCase {
        smoothed: true,
        ..adapter("llama", "all_linear")
    },
    adapter("llama", "patterns"),
    adapter("llama3", "rslora"),
    adapter("mistral", "q_v"),
    adapter("qwen2", "attention"),
    adapter("qwen3", "all_linear"),
    adapter("gemma3", "all_linear"),
    adapter("gemma2", "all_linear"),
    adapter("smollm3", "all_linear"),
    adapter("granite", "all_linear"),
    adapter("olmo2", "all_linear"),
    adapter("olmo3", "all_linear"),
    adapter("phi3", "all_linear"),
    adapter("ministral3", "all_linear"),
    adapter("glm4", "all_linear"),
    adapter("gpt2", "c_attn"),
    adapter("gpt2", "all_linear"),
    adapter("llama", "dora"),
    adapter("qwen2", "dora"),
    adapter("gpt2", "dora"),
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

pub(crate) fn goldens() -> PathBuf {
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

impl Golden {
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
