//! The rotary embedding's parameters: base and, where there is one, scaling.
//!
//! Llama 3.1 and later stretch the slow frequencies. llama.cpp keeps the result, one factor a frequency, in the tensor
//! `rope_freqs.weight`; Hugging Face keeps the parameters. They are found again here: the largest factor is `factor`, the
//! others are those of every Llama 3, and the factors that follow from them must be the file's.

use std::f64::consts::TAU;

use serde_json::{Map, Value, json};

use super::{Llama, decimal, field, key};
use crate::FormatError;

/// The tensor with one factor a frequency.
pub(super) const FACTORS: &str = "rope_freqs.weight";

const LOW_FREQ_FACTOR: f64 = 1.0;
const HIGH_FREQ_FACTOR: f64 = 4.0;
/// The context that Llama 3 was first trained with.
const ORIGINAL_CONTEXT: u64 = 8192;

pub(super) struct Rope {
    theta: f64,
    scaling: Option<Map<String, Value>>,
}

impl Rope {
    pub(super) fn theta(&self) -> f64 {
        self.theta
    }

    /// transformers 4's `rope_scaling`.
    pub(super) fn scaling(&self) -> Value {
        json!(self.scaling)
    }

    /// transformers 5's `rope_parameters`.
    pub(super) fn v5(&self) -> Value {
        let mut map = self.scaling.clone().unwrap_or_default();
        map.entry("rope_type").or_insert_with(|| json!("default"));
        map.insert("rope_theta".into(), json!(self.theta));
        Value::Object(map)
    }
}

pub(super) fn parameters(llama: &Llama<'_>, context: usize) -> Result<Rope, FormatError> {
    let theta = if llama.has("rope.freq_base") {
        decimal(llama.real("rope.freq_base")?)
    } else {
        10000.0
    };
    let scaling = match llama.gguf.tensor(FACTORS) {
        Some(_) => llama3(llama, theta, context)?,
        None => from_metadata(llama)?,
    };
    Ok(Rope { theta, scaling })
}

/// `llama.rope.scaling.*`, and the older `llama.rope.scale_linear`.
fn from_metadata(llama: &Llama<'_>) -> Result<Option<Map<String, Value>>, FormatError> {
    let metadata = llama.gguf.metadata();
    let kind = metadata
        .get_str(&key("rope.scaling.type"))
        .unwrap_or("linear");
    let name = if llama.has("rope.scaling.factor") {
        "rope.scaling.factor"
    } else {
        "rope.scale_linear"
    };
    // Zero and one both stand for no scaling.
    let factor = metadata
        .get_f64(&key(name))
        .filter(|&factor| factor != 0.0 && factor != 1.0);
    match (kind, factor) {
        ("none", _) | ("linear", None) => Ok(None),
        ("linear", Some(_)) => {
            let factor = decimal(llama.real(name)?);
            Ok(Some(object(
                json!({ "rope_type": "linear", "factor": factor }),
            )))
        }
        _ => Err(field(
            llama.gguf,
            &key("rope.scaling.type"),
            "\"none\", \"linear\", or Llama 3's rope_freqs.weight",
        )),
    }
}

fn llama3(
    llama: &Llama<'_>,
    theta: f64,
    context: usize,
) -> Result<Option<Map<String, Value>>, FormatError> {
    let wrong = |problem: String| Err(FormatError::tensor(llama.gguf.path(), FACTORS, problem));
    let half = llama.head_dim / 2;
    let shape = llama
        .gguf
        .tensor(FACTORS)
        .map(|tensor| tensor.shape.clone())
        .unwrap_or_default();
    if shape != [half] {
        return wrong(format!("has shape {shape:?}; accepted: [{half}]"));
    }
    let factors = llama.gguf.dequantize(FACTORS)?;
    if factors.iter().all(|&factor| factor == 1.0) {
        return Ok(None);
    }
    let original = llama
        .gguf
        .metadata()
        .get_u64(&key("rope.scaling.original_context_length"))
        .unwrap_or(ORIGINAL_CONTEXT);
    let factor = factors.iter().copied().fold(1.0f32, f32::max);
    let expected = llama3_factors(theta, llama.head_dim, f64::from(factor), original as f64);
    let matches = factors
        .iter()
        .zip(&expected)
        .all(|(&found, &expected)| (f64::from(found) - expected).abs() <= 1e-4 * expected);
    if !matches || (original as usize) > context {
        return wrong(format!(
            "holds factors that are not those of Llama 3 (factor {factor}, low_freq_factor {LOW_FREQ_FACTOR}, \
             high_freq_factor {HIGH_FREQ_FACTOR}, original_max_position_embeddings {original}); other scalings cannot \
             be imported"
        ));
    }
    Ok(Some(object(json!({
        "rope_type": "llama3",
        "factor": decimal(f64::from(factor)),
        "low_freq_factor": LOW_FREQ_FACTOR,
        "high_freq_factor": HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": original,
    }))))
}

/// What each frequency is divided by: 1 for wavelengths below `original/high`, `factor` above `original/low`, and a
/// blend between.
fn llama3_factors(theta: f64, head_dim: usize, factor: f64, original: f64) -> Vec<f64> {
    let (short, long) = (original / HIGH_FREQ_FACTOR, original / LOW_FREQ_FACTOR);
    (0..head_dim / 2)
        .map(|i| {
            let wavelength = TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
            if wavelength < short {
                return 1.0;
            }
            if wavelength > long {
                return factor;
            }
            let smooth =
                (original / wavelength - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR);
            1.0 / ((1.0 - smooth) / factor + smooth)
        })
        .collect()
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
