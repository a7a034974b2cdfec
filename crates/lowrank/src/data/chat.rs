//! Which tokens of a conversation the assistant says.
//!
//! The whole conversation is rendered once and encoded once, so its ids are those that `transformers` gives with
//! `apply_chat_template(messages, tokenize=True)`: encoding turns one by one would split tokens that a vocabulary
//! joins across a turn's edge. Each assistant turn is then found as a range of the text. It begins where the same
//! conversation cut before it, rendered with the generation prompt, ends: exactly what the model will have read when it
//! has to answer. It ends with the turn's end token. The bytes of the text that every token covers are known
//! exactly, and a token is supervised if it covers any byte of the range.
//!
//! Some templates write a turn otherwise once others follow (they drop its reasoning, or end the last turn with one
//! more token). The whole conversation decides: such a turn is found in it from its beginning to its end token. What
//! cannot be found is an error, never a guess.

use std::ops::Range;

use serde_json::Value;

use super::rows::Message;
use super::tokenizer::{Encoded, Tokenizer};

/// A conversation's ids, and for each whether it is the assistant's.
pub(super) struct Chat {
    pub(super) ids: Vec<u32>,
    pub(super) supervised: Vec<bool>,
}

pub(super) fn encode_chat(
    tokenizer: &Tokenizer,
    messages: &[Message],
    tools: Option<&Value>,
) -> Result<Chat, String> {
    if !messages.iter().any(|message| message.role() == "assistant") {
        return Err("no message has the role \"assistant\", so there is nothing to learn".into());
    }
    let render = |upto: usize, prompt: bool| {
        tokenizer
            .render_chat(&messages[..upto], tools, prompt)
            .map_err(|error| error.to_string())
    };
    let whole = render(messages.len(), false)?;
    let encoded = tokenizer
        .encode_with_offsets(&whole)
        .map_err(|error| error.to_string())?;
    let mut supervised = vec![false; encoded.ids.len()];
    for (at, message) in messages
        .iter()
        .enumerate()
        .filter(|(_, message)| message.is_supervised())
    {
        let before = render(at, true)?;
        let after = if at + 1 == messages.len() {
            whole.clone()
        } else {
            render(at + 1, false)?
        };
        if !after.starts_with(&before) {
            return Err(format!(
                "messages[{at}]: with this chat template, the text up to this turn is no beginning of the text that has \
                 it, so what the assistant says cannot be told from the prompt (they differ at character {}); give \
                 prompt and completion rows, or another template",
                common_characters(&before, &after)
            ));
        }
        let unchanged = whole.starts_with(&after);
        if !unchanged && !whole.starts_with(&before) {
            return Err(format!(
                "messages[{at}]: this chat template rewrites earlier turns once later ones follow; end the row with \
                 this turn, or give it \"weight\": 0"
            ));
        }
        let turn = before.len()..if unchanged { after.len() } else { whole.len() };
        let tokens = tokens_in(&encoded, &turn);
        let content = message.content().map_or("", str::trim);
        let said = whole[turn.clone()]
            .find(content)
            .map_or(turn.start, |found| turn.start + found + content.len());
        let end = end_token(tokenizer, &encoded, tokens.clone(), said, unchanged).ok_or_else(|| {
            format!(
                "messages[{at}]: this chat template writes the turn otherwise once later ones follow, and without one of \
                 the model's end tokens, so its end cannot be found; end the row with this turn, or give it \"weight\": 0"
            )
        })?;
        supervised[tokens.start..end].fill(true);
    }
    Ok(Chat {
        ids: encoded.ids,
        supervised,
    })
}

/// One behind the last token to learn: the first end token behind what was said, else the last special token, else
/// all of the turn (which the template then ends with plain text).
fn end_token(
    tokenizer: &Tokenizer,
    encoded: &Encoded,
    tokens: Range<usize>,
    said: usize,
    exact: bool,
) -> Option<usize> {
    let behind = |at: &usize| encoded.offsets[*at].0 >= said;
    let stops = |at: &usize| tokenizer.stop_ids().contains(&encoded.ids[*at]);
    let special = |at: &usize| tokenizer.is_special(encoded.ids[*at]);
    let found = tokens.clone().filter(behind).find(stops);
    if !exact {
        return found.map(|at| at + 1);
    }
    Some(
        found
            .or_else(|| tokens.clone().rev().filter(behind).find(special))
            .map_or(tokens.end, |at| at + 1),
    )
}

/// The tokens that cover any byte of the range.
fn tokens_in(encoded: &Encoded, range: &Range<usize>) -> Range<usize> {
    let start = encoded
        .offsets
        .partition_point(|(_, end)| *end <= range.start);
    let end = encoded
        .offsets
        .partition_point(|(begin, _)| *begin < range.end);
    start..end.max(start)
}

fn common_characters(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(x, y)| x == y).count()
}
