//! Tokens that are added to a tokenizer, as `tokenizer.add_tokens(list)` of transformers does: the file that lists them, and what
//! becomes of a folder's tokenizer.json and tokenizer_config.json.

use std::collections::HashSet;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::error::DataError;

/// An added token, as tokenizer.json lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of the file")]
pub(crate) struct NewToken {
    /// Its id.
    pub(crate) id: u32,
    /// Its text.
    pub(crate) content: String,
    /// Whether it matches whole words alone.
    pub(crate) single_word: bool,
    /// Whether it takes the spaces before it.
    pub(crate) lstrip: bool,
    /// Whether it takes the spaces behind it.
    pub(crate) rstrip: bool,
    /// Whether it is looked for in the normalized text.
    pub(crate) normalized: bool,
    /// Whether decoding may leave it out.
    pub(crate) special: bool,
}

impl NewToken {
    /// What `add_tokens` makes of a text.
    pub(crate) fn ordinary(id: u32, content: String) -> Self {
        Self {
            id,
            content,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: true,
            special: false,
        }
    }
}

/// Reads a file of tokens: a JSON list of texts where it begins with `[`, else one a line.
///
/// # Errors
/// A file that cannot be read or is empty, a blank line, a token that is listed twice.
pub(crate) fn read_tokens(path: &Path) -> Result<Vec<String>, DataError> {
    let bytes = std::fs::read(path).map_err(|error| DataError::io(path, error))?;
    let wrong = |reason: String| DataError::layout(path, reason);
    let text = String::from_utf8(bytes).map_err(|_| {
        wrong("is not UTF-8; write a token a line, or a JSON list of texts".to_owned())
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let is_list = text.trim_start().starts_with('[');
    let tokens: Vec<String> = if is_list {
        serde_json::from_str(text).map_err(|error| {
            wrong(format!(
                "begins with [ and is no JSON list of texts ({error}); write [\"<one>\", \"<two>\"], which tokens that begin with [ \
                 need, too"
            ))
        })?
    } else {
        text.lines().map(str::to_owned).collect()
    };
    let place = |n: usize| {
        let kind = if is_list { "token" } else { "line" };
        format!("{kind} {}", n + 1)
    };
    if tokens.is_empty() {
        return Err(wrong("holds no token; write one a line".to_owned()));
    }
    if let Some(n) = tokens.iter().position(|token| token.trim().is_empty()) {
        return Err(wrong(format!("{} is blank; take it out", place(n))));
    }
    let mut seen = HashSet::new();
    if let Some(n) = tokens.iter().position(|token| !seen.insert(token)) {
        return Err(wrong(format!(
            "{} is {:?}, which stands before it, too; take one of them out",
            place(n),
            tokens[n]
        )));
    }
    Ok(tokens)
}

/// The added tokens that a tokenizer.json lists.
///
/// # Errors
/// Text that is no tokenizer.json; it is called `origin`.
pub(crate) fn listed_tokens(
    tokenizer_json: &[u8],
    origin: &Path,
) -> Result<Vec<NewToken>, DataError> {
    #[derive(Deserialize)]
    struct Listed {
        #[serde(default)]
        added_tokens: Vec<NewToken>,
    }
    let listed: Listed = serde_json::from_slice(tokenizer_json)
        .map_err(|error| DataError::layout(origin, format!("is no tokenizer.json ({error})")))?;
    Ok(listed.added_tokens)
}

/// A tokenizer.json with these tokens beside its own, by their ids.
///
/// # Errors
/// As [`listed_tokens`].
pub(crate) fn with_tokens(
    tokenizer_json: &[u8],
    origin: &Path,
    tokens: &[NewToken],
) -> Result<Vec<u8>, DataError> {
    let mut listed = listed_tokens(tokenizer_json, origin)?;
    listed.retain(|known| !tokens.iter().any(|token| token.id == known.id));
    listed.extend(tokens.iter().cloned());
    listed.sort_by_key(|token| token.id);
    let mut map = object(tokenizer_json, origin)?;
    map.insert("added_tokens".to_owned(), json!(listed));
    pretty(&map, origin)
}

/// A tokenizer_config.json with these tokens in its list, if it has one.
///
/// # Errors
/// Text that is no JSON object; it is called `origin`.
pub(crate) fn config_with_tokens(
    tokenizer_config: &[u8],
    origin: &Path,
    tokens: &[NewToken],
) -> Result<Vec<u8>, DataError> {
    let mut map = object(tokenizer_config, origin)?;
    let Some(Value::Object(list)) = map.get_mut("added_tokens_decoder") else {
        return Ok(tokenizer_config.to_vec());
    };
    for token in tokens {
        let mut entry = json!(token);
        if let Some(entry) = entry.as_object_mut() {
            entry.shift_remove("id");
        }
        list.insert(token.id.to_string(), entry);
    }
    pretty(&map, origin)
}

fn object(bytes: &[u8], origin: &Path) -> Result<Map<String, Value>, DataError> {
    serde_json::from_slice(bytes)
        .map_err(|error| DataError::layout(origin, format!("is no JSON object ({error})")))
}

fn pretty(map: &Map<String, Value>, origin: &Path) -> Result<Vec<u8>, DataError> {
    let mut bytes = serde_json::to_vec_pretty(map)
        .map_err(|error| DataError::layout(origin, error.to_string()))?;
    bytes.push(b'\n');
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<String>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.txt");
        std::fs::write(&path, text).unwrap();
        read_tokens(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn tokens_stand_a_line_each_or_in_a_list() {
        let two = ["<a>".to_owned(), " b".to_owned()];
        assert_eq!(read("<a>\n b\n").unwrap(), two);
        assert_eq!(read("\u{feff}<a>\r\n b").unwrap(), two);
        assert_eq!(read("\n [\"<a>\", \" b\"]\n").unwrap(), two);
        for (text, words) in [
            ("", "holds no token"),
            ("[]", "holds no token"),
            ("<a>\n\n<b>\n", "line 2 is blank"),
            ("[\"a\", \" \"]", "token 2 is blank"),
            (
                "<a>\n<b>\n<a>\n",
                "line 3 is \"<a>\", which stands before it",
            ),
            ("[SEP]\n", "is no JSON list of texts"),
            ("[1]", "is no JSON list of texts"),
        ] {
            let problem = read(text).unwrap_err();
            assert!(problem.contains(words), "{problem}");
            assert!(problem.contains("tokens.txt"), "{problem}");
        }
    }

    #[test]
    fn files_list_the_tokens_by_their_ids() {
        let path = Path::new("tokenizer.json");
        let old = br#"{"version":"1.0","added_tokens":[{"id":5,"content":"</s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"model":{"b":1,"a":2}}"#;
        let new = [
            NewToken::ordinary(7, "<y>".to_owned()),
            NewToken::ordinary(2, "x".to_owned()),
        ];
        let written = with_tokens(old, path, &new).unwrap();
        let ids: Vec<u32> = listed_tokens(&written, path)
            .unwrap()
            .iter()
            .map(|token| token.id)
            .collect();
        assert_eq!(ids, [2, 5, 7]);
        let map = object(&written, path).unwrap();
        assert_eq!(map["model"].to_string(), r#"{"b":1,"a":2}"#);

        let config = br#"{"added_tokens_decoder":{"5":{}},"eos_token":"</s>"}"#;
        let map = object(&config_with_tokens(config, path, &new).unwrap(), path).unwrap();
        assert_eq!(map["added_tokens_decoder"]["7"]["content"], "<y>");
        assert!(map["added_tokens_decoder"]["7"].get("id").is_none());
        let without = b"{\"eos_token\": \"</s>\"}";
        assert_eq!(config_with_tokens(without, path, &new).unwrap(), without);
        assert!(listed_tokens(br#"{"added_tokens":7}"#, path).is_err());
    }
}
