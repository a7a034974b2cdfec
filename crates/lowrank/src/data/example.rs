//! One row as ids and a mask.
//!
//! Prompt and completion are encoded apart and joined with nothing between, as they will be when the model is asked:
//! the prompt's ids are then the same in training and in use. The end token follows the completion, and is always
//! supervised: a model that never sees its end never stops. A beginning token stands in front only where the tokenizer
//! puts one there by itself, and neither is doubled where the text already has it.

use super::chat::encode_chat;
use super::dataset::DataOptions;
use super::rows::{Content, Message};
use super::tokenizer::Tokenizer;

/// A row, ready for training.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// The tokens, not padded.
    pub ids: Vec<u32>,
    /// For each token whether it is a label, that is, whether the loss falls on its prediction from the ones before it.
    /// Never true for the first. As long as `ids`.
    pub supervised: Vec<bool>,
    /// The row's line in its file, counted from 1.
    pub line: usize,
    /// How many tokens were cut from the end to fit `max_seq_length`.
    pub truncated: usize,
    /// How many tokens stand before the first that the row asks to learn.
    pub prompt_len: usize,
}

impl Example {
    /// How many tokens the loss falls on.
    pub fn supervised_tokens(&self) -> usize {
        self.supervised.iter().filter(|label| **label).count()
    }
}

/// A row's tokens, or why it cannot be learned from.
pub(super) fn encode_row(
    tokenizer: &Tokenizer,
    content: &Content,
    line: usize,
    options: &DataOptions,
) -> Result<Example, String> {
    let (mut ids, mut supervised) = match content {
        Content::Chat { messages, tools } => {
            let chat = encode_chat(tokenizer, messages, tools.as_ref())?;
            (chat.ids, chat.supervised)
        }
        Content::Pair { prompt, completion } => encode_pair(tokenizer, prompt, completion)?,
        Content::Instruction {
            instruction,
            input,
            output,
        } if tokenizer.has_chat_template() => {
            let turns = [
                Message::new("user", &alpaca_question(instruction, input)),
                Message::new("assistant", output),
            ];
            let chat = encode_chat(tokenizer, &turns, None)?;
            (chat.ids, chat.supervised)
        }
        Content::Instruction {
            instruction,
            input,
            output,
        } => encode_pair(tokenizer, &alpaca_prompt(instruction, input), output)?,
        Content::Text(text) => {
            let mut ids = encode_prompt(tokenizer, text)?;
            let given = ids.len() - encode(tokenizer, text)?.len();
            end(tokenizer, &mut ids);
            let supervised = (0..ids.len()).map(|at| at >= given).collect();
            (ids, supervised)
        }
    };
    let prompt_len = supervised
        .iter()
        .position(|label| *label)
        .unwrap_or(ids.len());
    if options.train_on_prompt {
        supervised.fill(true);
    }
    if let Some(first) = supervised.first_mut() {
        *first = false;
    }
    let full = ids.len();
    if !supervised.contains(&true) {
        return Err(match content {
            Content::Chat { .. } => {
                "no token is supervised: every assistant message has \"weight\": 0".into()
            }
            _ => format!("no token is supervised: the row has only {full} token(s)"),
        });
    }
    ids.truncate(options.max_seq_length);
    supervised.truncate(options.max_seq_length);
    if !supervised.contains(&true) {
        return Err(format!(
            "no supervised token is left: the row has {full} tokens, of which the first {prompt_len} are the prompt, and \
             max_seq_length is {}",
            options.max_seq_length
        ));
    }
    Ok(Example {
        truncated: full - ids.len(),
        prompt_len: prompt_len.min(ids.len()),
        ids,
        supervised,
        line,
    })
}

fn encode_pair(
    tokenizer: &Tokenizer,
    prompt: &str,
    completion: &str,
) -> Result<(Vec<u32>, Vec<bool>), String> {
    let mut ids = encode_prompt(tokenizer, prompt)?;
    let given = ids.len();
    ids.extend(encode(tokenizer, completion)?);
    end(tokenizer, &mut ids);
    let supervised = (0..ids.len()).map(|at| at >= given).collect();
    Ok((ids, supervised))
}

/// A prompt's tokens, with the beginning token where the tokenizer adds one and the text has none.
pub(super) fn encode_prompt(tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<u32>, String> {
    let ids = encode(tokenizer, prompt)?;
    if ids.starts_with(tokenizer.prefix()) {
        return Ok(ids);
    }
    Ok([tokenizer.prefix(), &ids].concat())
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, String> {
    tokenizer
        .encode(text, false)
        .map_err(|error| error.to_string())
}

fn end(tokenizer: &Tokenizer, ids: &mut Vec<u32>) {
    if ids.last() != Some(&tokenizer.eos_id()) {
        ids.push(tokenizer.eos_id());
    }
}

/// What the user says in a chat: the instruction, and the input behind an empty line.
pub(super) fn alpaca_question(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        instruction.to_owned()
    } else {
        format!("{instruction}\n\n{input}")
    }
}

/// The layout that Alpaca was trained with, for models without a chat template.
pub(super) fn alpaca_prompt(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the \
             request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
             response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n\
             ### Response:\n"
        )
    }
}
