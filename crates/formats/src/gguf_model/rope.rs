//! The rotary embedding's parameters: base and, where there is one, scaling.
//!
//! Llama 3.1 and later stretch the slow frequencies. llama.cpp keeps the result, one factor a frequency, in the tensor
//! `rope_freqs.weight`; Hugging Face keeps the parameters. They are found again here: the largest factor is `factor`, the
//! others are those of every Llama 3, and the factors that follow from them must be the file's. Phi-3's two lists of factors stand in
//! config.json as they are.

use std::f64::consts::TAU;

use serde_json::{Map, Value, json};

use super::architecture::Rotary;
use super::{Model, decimal, field};
use crate::FormatError;

/// The tensor with one factor a frequency.
pub(super) const FACTORS: &str = "rope_freqs.weight";
/// The tensors with one factor a frequency for texts up to the context length of pretraining, and for longer ones.
pub(super) const LONGROPE_FACTORS: [&str; 2] =
    ["rope_factors_short.weight", "rope_factors_long.weight"];

const ORIGINAL: &str = "rope.scaling.original_context_length";
const LOW_FREQ_FACTOR: f64 = 1.0;
const HIGH_FREQ_FACTOR: f64 = 4.0;
/// The context that Llama 3 was first trained with.
const ORIGINAL_CONTEXT: u64 = 8192;

pub(super) struct Rope {
    pub(super) theta: f64,
    /// The part of a head that is rotated; none: all.
    pub(super) partial: Option<f64>,
    /// The context length of pretraining.
    pub(super) original: usize,
    scaling: Option<Map<String, Value>>,
}

impl Rope {
    /// transformers 4's `rope_scaling`.
    pub(super) fn v4(&self) -> Value {
        let mut scaling = json!(self.scaling);
        // transformers 4 wants `type` here, and no fourth key.
        if let Some(map) = scaling.as_object_mut()
            && map.get("rope_type") == Some(&json!("longrope"))
        {
            map.retain(|key, _| key.ends_with("_factor"));
            map.insert("type".into(), json!("longrope"));
        }
        scaling
    }

    /// transformers 5's `rope_parameters`.
    pub(super) fn v5(&self) -> Value {
        let mut map = self.scaling.clone().unwrap_or_default();
        map.entry("rope_type").or_insert_with(|| json!("default"));
        map.insert("rope_theta".into(), json!(self.theta));
        if let Some(partial) = self.partial {
            map.insert("partial_rotary_factor".into(), json!(partial));
        }
        Value::Object(map)
    }
}

pub(super) fn parameters(model: &Model<'_>, context: usize) -> Result<Rope, FormatError> {
    let theta = model.optional("rope.freq_base")?.unwrap_or(10000.0);
    let has = |name: &str| model.gguf.tensor(name).is_some();
    let original = if model.has(ORIGINAL) {
        model.size(ORIGINAL)?
    } else {
        context
    };
    let scaling = if has(FACTORS) {
        llama3(model, theta, context)?
    } else if model.shapes.architecture.rotary == Rotary::PartAndLong
        && LONGROPE_FACTORS.into_iter().any(has)
    {
        longrope(model, context, original)?
    } else {
        from_metadata(model, original)?
    };
    Ok(Rope {
        theta,
        partial: partial(model),
        original,
        scaling,
    })
}

/// The part of a head that is rotated, as the number of which Python's `int(head_dim * partial)` is that many.
fn partial(model: &Model<'_>) -> Option<f64> {
    let (part, whole) = (model.rotary_dim, model.shapes.head_dim as f64);
    let mut partial = part as f64 / whole;
    while (partial * whole) as usize != part && partial < 1.0 {
        partial = partial.next_up();
    }
    (part != model.shapes.head_dim).then_some(partial)
}

/// `rope.scaling.*`, and the older `rope.scale_linear`.
fn from_metadata(
    model: &Model<'_>,
    original: usize,
) -> Result<Option<Map<String, Value>>, FormatError> {
    const KIND: &str = "rope.scaling.type";
    model.value(KIND);
    let kind = model.gguf.metadata().get_str(&model.key(KIND));
    if model.has(KIND) && kind.is_none() {
        return Err(model.refused(KIND, "a text"));
    }
    let kind = kind.unwrap_or("linear");
    let name = if model.has("rope.scaling.factor") {
        "rope.scaling.factor"
    } else {
        "rope.scale_linear"
    };
    // Zero and one both stand for no scaling.
    let factor = model.optional(name)?.filter(|&factor| factor != 1.0);
    match (kind, factor) {
        ("none", _) | ("linear", None) => Ok(None),
        ("linear", Some(factor)) => Ok(Some(object(
            json!({ "rope_type": "linear", "factor": factor }),
        ))),
        ("yarn", Some(factor)) => {
            const EXTRAPOLATION: &str = "rope.scaling.yarn_ext_factor";
            if model.optional(EXTRAPOLATION)?.is_some_and(|x| x != 1.0) {
                return Err(model.refused(EXTRAPOLATION, "1"));
            }
            let mut yarn = object(json!({
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
            }));
            for (key, name) in [
                ("attention_factor", "rope.scaling.yarn_attn_factor"),
                ("beta_fast", "rope.scaling.yarn_beta_fast"),
                ("beta_slow", "rope.scaling.yarn_beta_slow"),
            ] {
                if let Some(value) = model.optional(name)? {
                    yarn.insert(key.into(), json!(value));
                }
            }
            Ok(Some(yarn))
        }
        _ => Err(field(
            model.gguf,
            &model.key(KIND),
            "\"none\", \"linear\", \"yarn\" with a rope.scaling.factor above one, or factors in tensors",
        )),
    }
}

/// The factor of attention's scores, which transformers calculates in this way from the two lengths.
pub(super) fn longrope_attention(context: usize, original: usize) -> f64 {
    let ratio = context as f64 / original as f64;
    if ratio > 1.0 {
        (1.0 + ratio.ln() / (original as f64).ln()).sqrt()
    } else {
        1.0
    }
}

/// Phi-3's.
fn longrope(
    model: &Model<'_>,
    context: usize,
    original: usize,
) -> Result<Option<Map<String, Value>>, FormatError> {
    const ATTENTION: &str = "rope.scaling.attn_factor";
    const KIND: &str = "rope.scaling.type";
    let kind = model.value(KIND);
    let says = |kind: &str| model.gguf.metadata().get_str(&model.key(KIND)) == Some(kind);
    if kind.is_some() && !says("longrope") {
        return Err(model.refused(KIND, "\"longrope\", since there are factors for it"));
    }
    if original < 2 {
        return Err(model.refused(ORIGINAL, "2 or more"));
    }
    let expected = longrope_attention(context, original);
    if let Some(found) = model.optional(ATTENTION)?
        && (found - expected).abs() > 1e-4
    {
        let accepted = format!("{expected}, which follows from the context lengths");
        return Err(model.refused(ATTENTION, &accepted));
    }
    let mut map = object(json!({
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
    }));
    let half = model.rotary_dim / 2;
    for (key, name) in ["short_factor", "long_factor"]
        .into_iter()
        .zip(LONGROPE_FACTORS)
    {
        let wrong = |problem: String| Err(FormatError::tensor(model.gguf.path(), name, problem));
        let Some(tensor) = model.gguf.tensor(name) else {
            return wrong("is missing".into());
        };
        if tensor.shape != [half] {
            return wrong(format!("has shape {:?}; accepted: [{half}]", tensor.shape));
        }
        let factors = model.gguf.f32s(name)?;
        if let Some(bad) = factors.iter().find(|&&x| !(x.is_finite() && x > 0.0)) {
            return wrong(format!("holds {bad}; accepted: finite numbers above zero"));
        }
        let factors: Vec<f64> = factors.into_iter().map(|x| decimal(x.into())).collect();
        map.insert(key.into(), json!(factors));
    }
    Ok(Some(map))
}

fn llama3(
    model: &Model<'_>,
    theta: f64,
    context: usize,
) -> Result<Option<Map<String, Value>>, FormatError> {
    let wrong = |problem: String| Err(FormatError::tensor(model.gguf.path(), FACTORS, problem));
    let half = model.rotary_dim / 2;
    let shape = model
        .gguf
        .tensor(FACTORS)
        .map(|tensor| tensor.shape.clone())
        .unwrap_or_default();
    if shape != [half] {
        return wrong(format!("has shape {shape:?}; accepted: [{half}]"));
    }
    let factors = model.gguf.f32s(FACTORS)?;
    if factors.iter().all(|&factor| factor == 1.0) {
        return Ok(None);
    }
    let original = model
        .gguf
        .metadata()
        .get_u64(&model.key(ORIGINAL))
        .unwrap_or(ORIGINAL_CONTEXT);
    let factor = factors.iter().copied().fold(1.0f32, f32::max);
    let bounds = (LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR);
    let expected = llama3_factors(
        theta,
        model.rotary_dim,
        f64::from(factor),
        original as f64,
        bounds,
    );
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
pub(super) fn llama3_factors(
    theta: f64,
    head_dim: usize,
    factor: f64,
    original: f64,
    (low, high): (f64, f64),
) -> Vec<f64> {
    let (short, long) = (original / high, original / low);
    (0..head_dim / 2)
        .map(|i| {
            let wavelength = TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
            if wavelength < short {
                return 1.0;
            }
            if wavelength > long {
                return factor;
            }
            let smooth = (original / wavelength - low) / (high - low);
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
