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

    /// The tokens before the first that the row asks to learn.
    pub fn prompt(&self) -> &[u32] {
        &self.ids[..self.prompt_len.min(self.ids.len())]
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
        encode_row(tokenizer, content, 5, options)
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
    fn prompt_and_completion_are_encoded_apart_and_ended() {
        let tokenizer = fixture::tokenizer();
        let example = encoded(&tokenizer, &pair("hel", "lo"), &DataOptions::default()).unwrap();
        let apart = [
            tokenizer.encode("hel", false).unwrap(),
            tokenizer.encode("lo", false).unwrap(),
            vec![2],
        ]
        .concat();
        assert_eq!(example.ids, apart);
        assert_eq!(example.supervised, [false, false, true, true, true]);
        assert_eq!(
            (example.prompt_len, example.truncated, example.line),
            (2, 0, 5)
        );
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
        let content = |input: &str| Content::Instruction {
            instruction: "Do".into(),
            input: input.into(),
            output: "done".into(),
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
}
