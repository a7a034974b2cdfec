//! What is trained beside, or instead of, the base's weights.
//!
//! A method turns its options into an [`Adapter`](crate::model::Adapter): named f32 parameters in one arena and a table that says where in the
//! model each of them acts. The decoder knows the table's kinds of entry and nothing of the methods.
//!
//! A new method is a module here that fills the table, a [`Method`] entry, a variant of [`AdapterConfig`] with its lines in
//! [`load`] and [`save`], and, where it acts at a point that no method has used before, a new kind of entry.

pub mod adapter;
pub mod bitfit;
mod files;
pub mod full;
pub mod lora;
pub mod prefix;
pub mod top;

pub use files::{AdapterConfig, BaseMark, Loaded, base_of, lay_out, load, save};

/// A way to adapt a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Method {
    /// Low-rank matrices beside frozen weights.
    Lora,
    /// Every weight of the model.
    Full,
    /// The last blocks, or the output projection alone.
    Top,
    /// Biases alone; zeros are added where the model has none.
    Bitfit,
    /// New layers of a small width between the frozen ones.
    Adapter,
    /// Virtual tokens before every sequence.
    Prefix,
}

impl Method {
    /// Every method.
    pub const ALL: [Self; 6] = [
        Self::Lora,
        Self::Full,
        Self::Top,
        Self::Bitfit,
        Self::Adapter,
        Self::Prefix,
    ];

    /// Its name in a sentence: "trained with …".
    pub fn title(self) -> &'static str {
        match self {
            Self::Lora => "LoRA",
            Self::Full => "full fine-tuning",
            Self::Top => "top-layer fine-tuning",
            Self::Bitfit => "BitFit",
            Self::Adapter => "adapter layers",
            Self::Prefix => "prefix tuning",
        }
    }

    /// Keys of the training settings that mean something to this method alone.
    pub fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Lora => &[
                "r",
                "lora_alpha",
                "lora_dropout",
                "target_modules",
                "exclude_modules",
                "rank_pattern",
                "alpha_pattern",
                "init_lora_weights",
                "use_rslora",
            ],
            Self::Top => &["top_layers", "head_only"],
            Self::Adapter => &["adapter_kind", "bottleneck"],
            Self::Prefix => &[
                "prefix_kind",
                "num_virtual_tokens",
                "infix_tokens",
                "prefix_init",
            ],
            Self::Full | Self::Bitfit => &[],
        }
    }

    /// Whether a key of the training settings means anything to this method.
    pub fn reads(self, key: &str) -> bool {
        if key == "init_adapter" {
            return self != Self::Full;
        }
        let others = Self::ALL.iter().filter(|method| **method != self);
        self.keys().contains(&key) || !others.into_iter().any(|other| other.keys().contains(&key))
    }

    /// The learning rate where none is given: the fewer values a method has and the further they are from the model's own
    /// weights, the larger it is.
    pub fn learning_rate(self) -> f64 {
        match self {
            Self::Lora => 2e-4,
            Self::Full => 2e-5,
            Self::Top => 5e-5,
            Self::Bitfit | Self::Adapter => 1e-3,
            Self::Prefix => 1e-2,
        }
    }
}
