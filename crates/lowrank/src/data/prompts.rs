//! Prompts of a data file, for generating from them.

use std::path::Path;

use serde_json::{Map, Value};

use super::chat::written_with;
use super::error::DataError;
use super::example::{alpaca_prompt, alpaca_turns, encode_prompt};
use super::files::{Rows, Split, require_split};
use super::message::{Message, read_messages};
use super::rows::{Content, RowKind, RowProblem, read_row, unknown_kind};
use super::task::TaskType;
use super::tokenizer::Tokenizer;

/// What rows are read for: a label beside a text is not looked at.
const TASK: Option<TaskType> = Some(TaskType::CausalLm);

/// What a model is asked, and what the data says it should answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The row's line in its file, counted from 1.
    pub line: usize,
    /// The text that the model reads, template and all.
    pub text: String,
    /// Its tokens, as they stand in training.
    pub ids: Vec<u32>,
    /// The answer in the data, if the row has one.
    pub reference: Option<String>,
}

impl Prompt {
    /// A prompt that is the text as it is, as in a prompt and completion row.
    ///
    /// # Errors
    /// If the text is empty or the tokenizer cannot encode it.
    pub fn from_text(tokenizer: &Tokenizer, text: &str) -> Result<Self, DataError> {
        let content = Content::Text(text.to_owned());
        prompt_of(tokenizer, content, 1).map_err(DataError::Text)
    }

    /// A conversation up to where the assistant speaks, as the model's chat template writes it.
    ///
    /// # Errors
    /// If the model has no template, or it refuses the messages.
    pub fn from_messages(tokenizer: &Tokenizer, messages: &[Message]) -> Result<Self, DataError> {
        let text =
            render(tokenizer, messages, None, &Map::new()).map_err(DataError::Conversation)?;
        let ids = tokenizer.encode(&text, false)?;
        Ok(Self {
            line: 1,
            text,
            ids,
            reference: None,
        })
    }
}

impl Prompt {
    /// The prompt of a conversation that is given as JSON, with the tools that the assistant may call.
    ///
    /// # Errors
    /// If a message is none, the model has no template, or that refuses the messages.
    pub fn from_chat(
        tokenizer: &Tokenizer,
        messages: &Value,
        tools: Option<&Value>,
    ) -> Result<Self, DataError> {
        Self::from_chat_with(tokenizer, messages, tools, &Map::new())
    }

    /// The same with variables for the chat template, as [`Tokenizer::render_chat_with`] takes them.
    ///
    /// # Errors
    /// As [`Self::from_chat`].
    pub fn from_chat_with(
        tokenizer: &Tokenizer,
        messages: &Value,
        tools: Option<&Value>,
        variables: &Map<String, Value>,
    ) -> Result<Self, DataError> {
        let messages = read_messages(messages).map_err(DataError::Conversation)?;
        let text =
            render(tokenizer, &messages, tools, variables).map_err(DataError::Conversation)?;
        let ids = tokenizer.encode(&text, false)?;
        Ok(Self {
            line: 1,
            text,
            ids,
            reference: None,
        })
    }
}

/// The prompt of every row: that of a prompt and completion row, the text of a text row, and for a conversation its messages
/// up to the last assistant turn, rendered with the generation prompt. The answer may be missing.
///
/// # Errors
/// If the file is not there or empty, or for the first row that cannot be read.
pub fn load_prompts(
    path: &Path,
    split: Split,
    tokenizer: &Tokenizer,
) -> Result<Vec<Prompt>, DataError> {
    let file = require_split(path, split)?;
    let mut rows = Rows::open(&file, None)?;
    let mut prompts = Vec::new();
    let mut first: Option<(RowKind, usize)> = None;
    loop {
        let batch = rows.next_batch(&file)?;
        if batch.is_empty() {
            break;
        }
        for raw in &batch {
            let bad = |reason: String| DataError::row(&file, raw.line, raw.about(reason));
            let mut row = raw
                .parse()
                .map_err(|(line, reason)| DataError::row(&file, line, reason))?;
            let reference = complete(&mut row);
            let detected = RowKind::detect(&row, TASK).ok_or_else(|| bad(unknown_kind(&row, TASK)));
            let (kind, first_line) = match first {
                Some(known) => known,
                None => *first.insert((detected?, raw.line)),
            };
            let content = read_row(kind, &row).map_err(|problem| match problem {
                RowProblem::Bad(reason) => bad(reason),
                RowProblem::OtherKind(found) => DataError::Mixed {
                    path: file.clone(),
                    line: raw.line,
                    first_line,
                    expected: kind.to_string(),
                    found: raw.after(found),
                },
            })?;
            let prompt = prompt_of(tokenizer, content, raw.line).map_err(bad)?;
            prompts.push(if reference {
                prompt
            } else {
                Prompt {
                    reference: None,
                    ..prompt
                }
            });
        }
    }
    if prompts.is_empty() {
        return Err(DataError::Empty {
            path: file,
            reason: "is empty: it holds no rows".into(),
        });
    }
    Ok(prompts)
}

/// Gives a row without an answer a stand-in, so that it reads as one of its kind; says whether it had its own.
fn complete(row: &mut Map<String, Value>) -> bool {
    for (asked, answer) in [("prompt", "completion"), ("instruction", "output")] {
        let empty = matches!(row.get(answer), None | Some(Value::Null))
            || row.get(answer) == Some(&Value::from(""));
        if row.contains_key(asked) && empty {
            row.insert(answer.into(), Value::from("-"));
            return false;
        }
    }
    true
}

fn prompt_of(tokenizer: &Tokenizer, content: Content, line: usize) -> Result<Prompt, String> {
    let (text, reference, is_chat) = match content {
        Content::Text(text) => (text, None, false),
        Content::Labelled(_) => return Err("the row has a label and nothing to go on with".into()),
        Content::Pair { prompt, completion } => (prompt, Some(completion), false),
        Content::Instruction(row) if tokenizer.has_chat_template() => {
            let turns = alpaca_turns(&row);
            (
                render(tokenizer, &turns, None, &Map::new())?,
                Some(row.output),
                true,
            )
        }
        Content::Instruction(row) => (alpaca_prompt(&row)?, Some(row.output), false),
        Content::Chat { messages, tools } => {
            let last = messages.len() - 1;
            let answer = (messages[last].role() == "assistant").then_some(last);
            let asked = &messages[..answer.unwrap_or(messages.len())];
            let reference = answer
                .and_then(|at| messages[at].content())
                .map(str::to_owned);
            (
                render(tokenizer, asked, tools.as_ref(), &Map::new())?,
                reference,
                true,
            )
        }
    };
    let ids = if is_chat {
        tokenizer
            .encode(&text, false)
            .map_err(|error| error.to_string())?
    } else {
        encode_prompt(tokenizer, &text)?
    };
    tokenizer.check(&ids).map_err(|error| error.to_string())?;
    if ids.is_empty() {
        return Err("the prompt is empty, so there is nothing to continue".into());
    }
    Ok(Prompt {
        line,
        text,
        ids,
        reference,
    })
}

fn render(
    tokenizer: &Tokenizer,
    messages: &[Message],
    tools: Option<&Value>,
    variables: &Map<String, Value>,
) -> Result<String, String> {
    Ok(written_with(tokenizer, messages, tools, true, variables)?.text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fixture;

    fn load(text: &str) -> Result<Vec<Prompt>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        std::fs::write(&path, text).unwrap();
        load_prompts(&path, Split::File, &fixture::tokenizer()).map_err(|error| error.to_string())
    }

    #[test]
    fn prompts_stand_as_in_training() {
        let prompts =
            load("{\"prompt\": \"hello\", \"completion\": \"x\"}\n{\"prompt\": \"b\"}\n").unwrap();
        assert_eq!(
            (prompts[0].text.as_str(), prompts[0].reference.as_deref()),
            ("hello", Some("x"))
        );
        assert_eq!(
            (prompts[1].line, prompts[1].reference.as_deref()),
            (2, None)
        );
        let prompts = load("{\"instruction\": \"do\", \"output\": \"\"}\n").unwrap();
        assert!(
            prompts[0]
                .text
                .ends_with("<|im_start|>user\ndo<|im_end|>\n<|im_start|>assistant\n")
        );
        assert_eq!(prompts[0].reference, None);
        assert_eq!(load("{\"text\": \"a\"}\n").unwrap()[0].text, "a");
    }

    #[test]
    fn conversations_end_before_the_last_answer() {
        let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}\n\
                    {\"messages\": [{\"role\": \"user\", \"content\": \"q\"}]}\n";
        let prompts = load(chat).unwrap();
        assert_eq!(prompts[0].text, prompts[1].text);
        assert!(
            prompts[0]
                .text
                .ends_with("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")
        );
        assert_eq!(
            prompts[0].ids,
            fixture::tokenizer()
                .encode(&prompts[0].text, false)
                .unwrap()
        );
        assert_eq!(
            (
                prompts[0].reference.as_deref(),
                prompts[1].reference.as_deref()
            ),
            (Some("a"), None)
        );
    }

    #[test]
    fn a_beginning_is_added_as_in_training() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.json");
        std::fs::write(&path, "[{\"prompt\": \"a\"}]").unwrap();
        let tokenizer = fixture::with_bos();
        let prompts = load_prompts(&path, Split::File, &tokenizer).unwrap();
        assert_eq!(tokenizer.decode(&prompts[0].ids, false).unwrap(), "<s>a");
    }

    #[test]
    fn errors_name_the_line() {
        for (text, expected) in [
            ("", "is empty"),
            ("{\"prompt\": \"\"}\n", "line 1: the prompt is empty"),
            (
                "{\"prompt\": \"a\"}\n{\"text\": \"b\"}\n",
                "line 2: this row is text, but the file began with prompt and completion on line 1",
            ),
            ("{\"prompt\": 1}\n", "line 1: \"prompt\" must be a text"),
            ("{\"a\": 1}\n", "line 1: the row has \"a\""),
            ("{\n", "line 1: invalid JSON"),
        ] {
            let error = load(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
