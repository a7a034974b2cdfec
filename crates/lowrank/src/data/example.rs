//! One row as ids and a mask.
//!
//! Prompt and completion are joined with nothing between and encoded as one text, as TRL does: a tokenizer that puts a
//! space before each text would otherwise put one between them. A token that covers a part of both is the completion's.
//! The end token follows the completion, and is always supervised: a model that never sees its end never stops. A beginning token stands in front only where the tokenizer
//! puts one there by itself, and neither is doubled where the text already has it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::chat::{ChatNotes, encode_chat};
use super::dataset::DataOptions;
use super::message::Message;
use super::rows::{AlpacaRow, Content};
use super::task::Label;
use super::tokenizer::Tokenizer;

/// A row, ready for training.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Example {
    /// The tokens, not padded.
    pub ids: Vec<u32>,
    /// For each token which of two texts it belongs to (`token_type_ids`); empty where all are 0.
    pub token_types: Vec<u8>,
    /// For each token whether it is a label, that is, whether the loss falls on its prediction from the ones before it.
    /// Never true for the first. As long as `ids`; empty where the row has a label.
    pub supervised: Vec<bool>,
    /// What the row teaches where that is not its own tokens.
    pub label: Option<Label>,
    /// The row's line in its file, counted from 1.
    pub line: usize,
    /// How many tokens were cut from the end to fit `max_seq_length`.
    pub truncated: usize,
    /// How many tokens stand before the first that the row asks to learn.
    pub prompt_len: usize,
}

impl Example {
    /// How many tokens the loss falls on; a label of the whole row counts as one.
    pub fn supervised_tokens(&self) -> usize {
        match &self.label {
            None => self.supervised.iter().filter(|label| **label).count(),
            Some(Label::Tags(tags)) => tags.len(),
            Some(_) => 1,
        }
    }

    /// The tokens before the first that the row asks to learn.
    pub fn prompt(&self) -> &[u32] {
        &self.ids[..self.prompt_len.min(self.ids.len())]
    }
}

/// How a prompt and its completion become tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Boundary {
    /// As one text; a token that covers a part of both is learned.
    ///
    /// TRL does so.
    #[default]
    Joint,
    /// Each by itself, so that the prompt's tokens are those that it has alone.
    Apart,
}

/// What a reader of a row should know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RowNotes {
    pub(super) chat: ChatNotes,
    /// A token covers the end of the prompt and the beginning of the completion, so that the prompt alone has another one.
    pub(super) shared_token: bool,
    /// Of the words that have tags.
    pub(super) words: WordNotes,
}

/// How words and marked passages of a row came through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct WordNotes {
    /// Words beyond the cut.
    pub(super) cut: usize,
    /// Words whose first token is that of the word before.
    pub(super) joined: usize,
    /// Passages that begin or end inside a word.
    pub(super) cut_marks: usize,
    /// Passages without a word.
    pub(super) lost_marks: usize,
}

/// A row's tokens, or why it cannot be learned from.
pub(super) fn encode_row(
    tokenizer: &Tokenizer,
    content: &Content,
    line: usize,
    options: &DataOptions,
) -> Result<(Example, RowNotes), String> {
    let mut notes = RowNotes::default();
    let mut of_chat = |messages: &[Message], tools: Option<&Value>| {
        let chat = encode_chat(tokenizer, messages, tools)?;
        notes.chat = chat.notes;
        Ok::<_, String>((chat.ids, chat.supervised))
    };
    let pair = |prompt: &str, completion: &str| {
        encode_pair(tokenizer, prompt, completion, options.completion_boundary)
    };
    let (mut ids, mut supervised) = match content {
        Content::Chat { messages, tools } => of_chat(messages, tools.as_ref())?,
        Content::Instruction(row) if tokenizer.has_chat_template() => {
            let mut turns = alpaca_turns(row);
            turns.push(Message::new("assistant", &row.output));
            of_chat(&turns, None)?
        }
        Content::Pair { prompt, completion } => {
            let (ids, supervised, shared) = pair(prompt, completion)?;
            notes.shared_token = shared;
            (ids, supervised)
        }
        Content::Instruction(row) => {
            let (ids, supervised, shared) = pair(&alpaca_prompt(row)?, &row.output)?;
            notes.shared_token = shared;
            (ids, supervised)
        }
        Content::Labelled(_) => return Err("the row has a label and no text to go on with".into()),
        Content::Text(text) => {
            let ids = encode(tokenizer, text)?;
            let own = ids.len();
            let mut ids = with_prefix(tokenizer, ids);
            let given = ids.len() - own;
            end(tokenizer, &mut ids);
            let supervised = (0..ids.len()).map(|at| at >= given).collect();
            (ids, supervised)
        }
    };
    tokenizer.check(&ids).map_err(|error| error.to_string())?;
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
            Content::Chat { messages, .. } if messages.iter().any(Message::is_supervised) => {
                "no token is supervised: the chat template does not write what the assistant says".into()
            }
            Content::Chat { .. } => {
                "no token is supervised: every assistant message is marked as not to be learned (\"weight\": 0 or the like)".into()
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
    let example = Example {
        truncated: full - ids.len(),
        prompt_len: prompt_len.min(ids.len()),
        ids,
        supervised,
        line,
        ..Example::default()
    };
    Ok((example, notes))
}

/// Ids, mask, and whether a token covers a part of both.
fn encode_pair(
    tokenizer: &Tokenizer,
    prompt: &str,
    completion: &str,
    boundary: Boundary,
) -> Result<(Vec<u32>, Vec<bool>, bool), String> {
    let (mut ids, given, shared) = match boundary {
        Boundary::Joint => {
            let text = [prompt, completion].concat();
            let encoded = tokenizer
                .encode_with_offsets(&text)
                .map_err(|error| error.to_string())?;
            let own = encoded
                .offsets
                .partition_point(|(_, end)| *end <= prompt.len());
            let begin = encoded
                .offsets
                .get(own)
                .map_or(text.len(), |(begin, _)| *begin);
            let ids = with_prefix(tokenizer, encoded.ids);
            let given = ids.len() - encoded.offsets.len() + own;
            (ids, given, begin < prompt.len())
        }
        Boundary::Apart => {
            let mut ids = encode_prompt(tokenizer, prompt)?;
            let given = ids.len();
            ids.extend(encode(tokenizer, completion)?);
            (ids, given, false)
        }
    };
    end(tokenizer, &mut ids);
    let supervised = (0..ids.len()).map(|at| at >= given).collect();
    Ok((ids, supervised, shared))
}

/// A prompt's tokens, with the beginning token where the tokenizer adds one and the text has none.
pub(super) fn encode_prompt(tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<u32>, String> {
    Ok(with_prefix(tokenizer, encode(tokenizer, prompt)?))
}

fn with_prefix(tokenizer: &Tokenizer, ids: Vec<u32>) -> Vec<u32> {
    if ids.starts_with(tokenizer.prefix()) {
        return ids;
    }
    [tokenizer.prefix(), &ids].concat()
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, String> {
    tokenizer
        .encode(text, false)
        .map_err(|error| error.to_string())
}

fn end(tokenizer: &Tokenizer, ids: &mut Vec<u32>) {
    if ids.last() != Some(&tokenizer.eos_id()) {
        // All rows of a file are in memory, and a vector that grows by itself doubles.
        ids.reserve_exact(1);
        ids.push(tokenizer.eos_id());
    }
}

/// An Alpaca row as a conversation up to its answer: the system message, the history, and the instruction with the input
/// behind an empty line.
pub(super) fn alpaca_turns(row: &AlpacaRow) -> Vec<Message> {
    let mut turns = Vec::new();
    if let Some(system) = &row.system {
        turns.push(Message::new("system", system));
    }
    for (question, answer) in &row.history {
        turns.push(Message::new("user", question));
        turns.push(Message::new("assistant", answer));
    }
    let question = if row.input.is_empty() {
        row.instruction.clone()
    } else {
        format!("{}\n\n{}", row.instruction, row.input)
    };
    turns.push(Message::new("user", &question));
    turns
}

/// The layout that Alpaca was trained with, for models without a chat template. A row's `system` stands in place of its
/// first sentences.
///
/// # Errors
/// If the row has a history, for which the layout has no place.
pub(super) fn alpaca_prompt(row: &AlpacaRow) -> Result<String, String> {
    if !row.history.is_empty() {
        return Err(
            "the row has a \"history\", which only a chat template can write, and the model has none; put a \
             chat_template.jinja into the model's folder, or leave the history out"
                .into(),
        );
    }
    let (instruction, input) = (&row.instruction, &row.input);
    let context = if input.is_empty() {
        ""
    } else {
        ", paired with an input that provides further context"
    };
    let head = match &row.system {
        Some(system) => system.clone(),
        None => format!(
            "Below is an instruction that describes a task{context}. Write a response that appropriately completes the \
             request."
        ),
    };
    let input = if input.is_empty() {
        String::new()
    } else {
        format!("### Input:\n{input}\n\n")
    };
    Ok(format!(
        "{head}\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fixture;

    fn pair(prompt: &str, completion: &str) -> Content {
        Content::Pair {
            prompt: prompt.into(),
            completion: completion.into(),
        }
    }

    fn encoded(
        tokenizer: &Tokenizer,
        content: &Content,
        options: &DataOptions,
    ) -> Result<Example, String> {
        encode_row(tokenizer, content, 5, options).map(|(example, _)| example)
    }

    fn learned(tokenizer: &Tokenizer, example: &Example) -> String {
        let ids: Vec<u32> = example
            .ids
            .iter()
            .zip(&example.supervised)
            .filter(|(_, label)| **label)
            .map(|(id, _)| *id)
            .collect();
        tokenizer.decode(&ids, false).unwrap()
    }

    #[test]
    fn prompt_and_completion_are_one_text_and_ended() {
        let tokenizer = fixture::tokenizer();
        let both = |boundary| {
            let options = DataOptions {
                completion_boundary: boundary,
                ..DataOptions::default()
            };
            encode_row(&tokenizer, &pair("x hel", "lo you"), 5, &options).unwrap()
        };
        let ids = |text: &str| tokenizer.encode(text, false).unwrap();
        let (example, notes) = both(Boundary::Joint);
        assert_eq!(example.ids, [ids("x hello you"), vec![2]].concat());
        // " hello" is one token, which is the completion's.
        assert_eq!(learned(&tokenizer, &example), " hello you<|im_end|>");
        assert!(notes.shared_token);
        assert_eq!(
            (example.prompt_len, example.truncated, example.line),
            (1, 0, 5)
        );
        let (example, notes) = both(Boundary::Apart);
        assert_eq!(example.ids, [ids("x hel"), ids("lo you"), vec![2]].concat());
        assert_eq!(learned(&tokenizer, &example), "lo you<|im_end|>");
        assert!(!notes.shared_token);
    }

    #[test]
    fn a_space_that_a_tokenizer_begins_with_stands_once() {
        let tokenizer = fixture::sentence_piece();
        let example = encoded(&tokenizer, &pair("Hello", " you"), &DataOptions::default()).unwrap();
        assert_eq!(example.ids, [1, 3, 4, 2]);
        assert_eq!(example.supervised, [false, false, true, true]);
    }

    #[test]
    fn a_beginning_and_an_end_stand_once() {
        let tokenizer = fixture::with_bos();
        for (prompt, completion) in [
            ("a", "b"),
            ("<s>a", "b"),
            ("a", "b<|im_end|>"),
            ("<s>a", "b<|im_end|>"),
        ] {
            let example = encoded(
                &tokenizer,
                &pair(prompt, completion),
                &DataOptions::default(),
            )
            .unwrap();
            assert_eq!(
                tokenizer.decode(&example.ids, false).unwrap(),
                "<s>ab<|im_end|>"
            );
            assert_eq!(learned(&tokenizer, &example), "b<|im_end|>");
            assert_eq!(example.prompt_len, 2);
        }
        let example = encoded(
            &tokenizer,
            &Content::Text("ab".into()),
            &DataOptions::default(),
        )
        .unwrap();
        assert_eq!(
            tokenizer.decode(&example.ids, false).unwrap(),
            "<s>ab<|im_end|>"
        );
        assert_eq!(learned(&tokenizer, &example), "ab<|im_end|>");
    }

    #[test]
    fn text_is_learned_from_its_second_token_on() {
        let tokenizer = fixture::tokenizer();
        let example = encoded(
            &tokenizer,
            &Content::Text("abc".into()),
            &DataOptions::default(),
        )
        .unwrap();
        assert_eq!(example.supervised, [false, true, true, true]);
        assert_eq!(example.prompt_len, 0);
        let empty = encoded(
            &tokenizer,
            &Content::Text(String::new()),
            &DataOptions::default(),
        )
        .unwrap_err();
        assert_eq!(empty, "no token is supervised: the row has only 1 token(s)");
    }

    #[test]
    fn train_on_prompt_widens_to_all_but_the_first() {
        let options = DataOptions {
            train_on_prompt: true,
            ..DataOptions::default()
        };
        let example = encoded(&fixture::tokenizer(), &pair("abc", "d"), &options).unwrap();
        assert_eq!(example.supervised, [false, true, true, true, true]);
        assert_eq!(example.prompt_len, 3);
    }

    #[test]
    fn long_rows_are_cut_from_the_end_and_counted() {
        let tokenizer = fixture::tokenizer();
        let options = |max_seq_length| DataOptions {
            max_seq_length,
            ..DataOptions::default()
        };
        let example = encoded(&tokenizer, &pair("abc", "defg"), &options(5)).unwrap();
        assert_eq!(
            (example.ids.len(), example.truncated, example.prompt_len),
            (5, 3, 3)
        );
        assert_eq!(learned(&tokenizer, &example), "de");
        let exact = encoded(&tokenizer, &pair("abc", "defg"), &options(8)).unwrap();
        assert_eq!(exact.truncated, 0);
        let error = encoded(&tokenizer, &pair("abc", "defg"), &options(3)).unwrap_err();
        assert_eq!(
            error,
            "no supervised token is left: the row has 8 tokens, of which the first 3 are the prompt, and max_seq_length is 3"
        );
    }

    #[test]
    fn alpaca_is_a_chat_where_there_is_a_template() {
        let content = |input: &str| {
            Content::Instruction(AlpacaRow {
                instruction: "Do".into(),
                input: input.into(),
                output: "done".into(),
                ..AlpacaRow::default()
            })
        };
        let chat = fixture::tokenizer();
        let example = encoded(&chat, &content("this"), &DataOptions::default()).unwrap();
        assert!(
            chat.decode(&example.ids, false)
                .unwrap()
                .contains("<|im_start|>user\nDo\n\nthis<|im_end|>")
        );
        assert_eq!(learned(&chat, &example), "done<|im_end|>");
        let plain = fixture::with_template(None);
        let example = encoded(&plain, &content("this"), &DataOptions::default()).unwrap();
        let text = plain.decode(&example.ids, false).unwrap();
        assert!(
            text.starts_with("Below is an instruction that describes a task, paired with an input"),
            "{text}"
        );
        assert!(
            text.ends_with(
                "### Instruction:\nDo\n\n### Input:\nthis\n\n### Response:\ndone<|im_end|>"
            ),
            "{text}"
        );
        let example = encoded(&plain, &content(""), &DataOptions::default()).unwrap();
        let text = plain.decode(&example.ids, false).unwrap();
        assert!(
            text.ends_with("the request.\n\n### Instruction:\nDo\n\n### Response:\ndone<|im_end|>"),
            "{text}"
        );
    }

    #[test]
    fn alpacas_system_and_history_are_written() {
        let row = AlpacaRow {
            instruction: "Do".into(),
            output: "done".into(),
            system: Some("Be brief.".into()),
            history: vec![("one?".into(), "1".into())],
            ..AlpacaRow::default()
        };
        let chat = fixture::tokenizer();
        let example = encoded(
            &chat,
            &Content::Instruction(row.clone()),
            &DataOptions::default(),
        )
        .unwrap();
        let text = chat.decode(&example.ids, false).unwrap();
        assert!(
            text.starts_with("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none?"),
            "{text}"
        );
        assert_eq!(learned(&chat, &example), "1<|im_end|>done<|im_end|>");
        let plain = fixture::with_template(None);
        let with_history = Content::Instruction(row.clone());
        let error = encoded(&plain, &with_history, &DataOptions::default()).unwrap_err();
        assert!(error.contains("the row has a \"history\""), "{error}");
        let without = AlpacaRow {
            history: Vec::new(),
            ..row
        };
        let example = encoded(
            &plain,
            &Content::Instruction(without),
            &DataOptions::default(),
        )
        .unwrap();
        assert_eq!(
            plain.decode(&example.ids, false).unwrap(),
            "Be brief.\n\n### Instruction:\nDo\n\n### Response:\ndone<|im_end|>"
        );
    }
}
