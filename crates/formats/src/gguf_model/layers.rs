//! Which layers see a window and which see everything.

use serde_json::{Map, Value, json};

use super::Model;
use crate::FormatError;
use crate::gguf::{GgufArray, GgufValue};

/// A layer that sees everything before it.
pub(super) const FULL: &str = "full_attention";
/// A layer that sees a window.
pub(super) const SLIDING: &str = "sliding_attention";

/// Which layers slide.
pub(super) enum Pattern {
    /// All but the last of every so many.
    LastOf(usize),
    /// Those.
    Each(Vec<bool>),
}

/// Sets `sliding_window` and `layer_types`, from `attention.sliding_window` and `attention.sliding_window_pattern`. Where the file has no
/// window, `absent` is it, and with none all layers see everything.
pub(super) fn windows(
    model: &Model<'_>,
    usual: &Pattern,
    absent: Option<usize>,
    config: &mut Map<String, Value>,
) -> Result<(), FormatError> {
    const WINDOW: &str = "attention.sliding_window";
    let window = match model.value(WINDOW) {
        None => absent,
        Some(value) if super::is_off(value) => None,
        Some(_) => Some(model.size(WINDOW)?),
    };
    let said = said(model)?;
    let pattern = said.as_ref().unwrap_or(usual);
    let slides = |layer: usize| match pattern {
        Pattern::LastOf(step) => !(layer + 1).is_multiple_of(*step),
        Pattern::Each(slides) => slides[layer],
    };
    let kinds: Vec<&str> = (0..model.shapes.layers)
        .map(|layer| {
            if window.is_some() && slides(layer) {
                SLIDING
            } else {
                FULL
            }
        })
        .collect();
    config.insert("layer_types".into(), json!(kinds));
    config.insert("sliding_window".into(), json!(window));
    Ok(())
}

/// The file's own pattern: a number, or true for every layer that slides.
fn said(model: &Model<'_>) -> Result<Option<Pattern>, FormatError> {
    const PATTERN: &str = "attention.sliding_window_pattern";
    match model.value(PATTERN) {
        None => Ok(None),
        Some(GgufValue::Array(GgufArray::Bool(slides))) if slides.len() == model.shapes.layers => {
            Ok(Some(Pattern::Each(slides.clone())))
        }
        Some(GgufValue::Array(_)) => {
            let accepted = format!("a number, or {} times true or false", model.shapes.layers);
            Err(model.refused(PATTERN, &accepted))
        }
        Some(_) => Ok(Some(Pattern::LastOf(model.size(PATTERN)?))),
    }
}
