//! The tokenizer of a model folder, with its special tokens and its chat template.
//!
//! tokenizer.json does the work, through the `tokenizers` crate. Its post-processor is taken apart when it is read:
//! what it puts in front of and behind a text does not depend on the text, so it is kept as two lists of ids. Then
//! every text is encoded once, without it, and the offsets of the tokens are those of the text, untrimmed (GPT-2's
//! post-processor moves them past spaces, which would spoil the masks of chats). Truncation and padding that a file
//! carries are switched off, as `transformers` does.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::TokenizerImpl;

use super::error::DataError;
use super::rows::Message;
use super::stream::DecodeStream;
use super::template::ChatTemplate;

/// Text to ids and back. Cheap to share between threads by reference.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// What the post-processor puts before and behind a text.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    bos: Option<u32>,
    eos: u32,
    stop: Vec<u32>,
    special: HashSet<u32>,
    vocab_size: usize,
    bytes: ByteAlphabet,
    template: Option<ChatTemplate>,
}

/// A text's ids, and for each the bytes of the text that it covers.
pub(super) struct Encoded {
    pub(super) ids: Vec<u32>,
    pub(super) offsets: Vec<(usize, usize)>,
}

/// What is known besides tokenizer.json.
#[derive(Default)]
struct Extras {
    /// `bos_token`, `eos_token` and so on, by name.
    special_tokens: Vec<(String, String)>,
    /// Whether `add_bos_token` and `add_eos_token` override the post-processor.
    add_bos_eos: Option<(bool, bool)>,
    template: Option<String>,
    tool_template: Option<String>,
    /// Ids that config.json and generation_config.json call ends.
    end_ids: Vec<u32>,
}

impl Tokenizer {
    /// Reads tokenizer.json of a model folder, and what is there of tokenizer_config.json, special_tokens_map.json,
    /// chat_template.jinja, generation_config.json and config.json.
    ///
    /// # Errors
    /// If tokenizer.json is missing, if a file is not what it should be, or if no end token is named anywhere.
    pub fn from_folder(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            let hint = if folder.join("tokenizer.model").is_file() {
                "only tokenizer.model is there: save the tokenizer with transformers' AutoTokenizer to get tokenizer.json"
            } else {
                "there is no tokenizer.json; copy it from the model's repository"
            };
            return Err(DataError::layout(folder, hint));
        }
        let json = fs::read(&path).map_err(|error| DataError::io(&path, error))?;
        Self::build(&json, &path.display().to_string(), read_extras(folder)?)
    }

    /// A tokenizer from the contents of its files, for a model that is built into a program.
    ///
    /// `eos_token` is the text of the end token; the beginning, if any, is what the post-processor of `tokenizer_json`
    /// adds.
    ///
    /// # Errors
    /// If the JSON is no tokenizer, the end token is not in it, or the template does not compile.
    pub fn from_parts(
        tokenizer_json: &[u8],
        chat_template: Option<&str>,
        eos_token: &str,
    ) -> Result<Self, DataError> {
        let extras = Extras {
            special_tokens: vec![("eos_token".into(), eos_token.into())],
            template: chat_template.map(str::to_owned),
            ..Extras::default()
        };
        Self::build(tokenizer_json, "the built-in tokenizer.json", extras)
    }

    fn build(json: &[u8], origin: &str, extras: Extras) -> Result<Self, DataError> {
        let wrong = |reason: String| DataError::tokenizer(origin, reason);
        let mut inner = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|error| wrong(format!("is not a tokenizer this program can read: {error}")))?;
        inner
            .with_truncation(None)
            .map_err(|error| wrong(error.to_string()))?;
        inner.with_padding(None);
        let (mut prefix, mut suffix) = added_by_post_processor(&inner).map_err(wrong)?;
        let bare: Option<tokenizers::PostProcessorWrapper> = None;
        inner.with_post_processor(bare);

        let special_id = |name: &str| -> Result<Option<u32>, DataError> {
            let Some((_, text)) = extras
                .special_tokens
                .iter()
                .find(|(known, _)| known == name)
            else {
                return Ok(None);
            };
            match inner.token_to_id(text) {
                Some(id) => Ok(Some(id)),
                None => Err(wrong(format!(
                    "{name} is {text:?}, but the vocabulary has no such token"
                ))),
            }
        };
        let named_bos = special_id("bos_token")?;
        let named_eos = special_id("eos_token")?;
        let vocabulary = inner.get_vocab(true);
        let vocab_size = vocabulary.values().max().map_or(0, |id| *id as usize + 1);
        let known_end = extras
            .end_ids
            .iter()
            .copied()
            .find(|id| (*id as usize) < vocab_size);
        let Some(eos) = named_eos.or(known_end) else {
            return Err(wrong(
                "no end token is known, so a model could not learn to stop; name it as \"eos_token\" in \
                 tokenizer_config.json (or its id as \"eos_token_id\" in config.json)"
                    .into(),
            ));
        };
        if let Some((add_bos, add_eos)) = extras.add_bos_eos {
            prefix = if add_bos {
                named_bos.into_iter().collect()
            } else {
                Vec::new()
            };
            suffix = if add_eos { vec![eos] } else { Vec::new() };
        }
        let mut stop = vec![eos];
        // Ids above the vocabulary stay: a model with more rows than tokens can give them.
        for id in extras.end_ids {
            if !stop.contains(&id) {
                stop.push(id);
            }
        }
        let special = inner
            .get_added_tokens_decoder()
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| *id)
            .collect();
        let template = extras
            .template
            .map(|source| {
                ChatTemplate::new(
                    &source,
                    extras.tool_template.as_deref(),
                    extras.special_tokens,
                )
            })
            .transpose()?;
        Ok(Self {
            bytes: ByteAlphabet::of(&inner),
            bos: named_bos.or_else(|| prefix.first().copied()),
            inner,
            prefix,
            suffix,
            eos,
            stop,
            special,
            vocab_size,
            template,
        })
    }

    /// The ids of a text; special tokens that stand in it as text are recognised. `add_special` puts around it what
    /// the tokenizer adds by itself (a beginning token, for most models that have one).
    ///
    /// # Errors
    /// If the tokenizer cannot encode it, as one without an unknown token may.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, DataError> {
        let ids = self.encode_with_offsets(text)?.ids;
        if !add_special {
            return Ok(ids);
        }
        Ok([self.prefix.as_slice(), &ids, &self.suffix].concat())
    }

    pub(super) fn encode_with_offsets(&self, text: &str) -> Result<Encoded, DataError> {
        let encoding = self
            .inner
            .encode(text, false)
            .map_err(|error| DataError::Encoding(error.to_string()))?;
        Ok(Encoded {
            ids: encoding.get_ids().to_vec(),
            offsets: encoding.get_offsets().to_vec(),
        })
    }

    /// The text of ids; `skip_special` leaves out special tokens. Ids outside the vocabulary stand for nothing.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, DataError> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|error| DataError::Encoding(error.to_string()))
    }

    /// Text of ids that come one by one, as when a model generates.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// One token as text, for showing: spaces are kept, and bytes that are no whole character stand as `\xE2`.
    pub fn token_text(&self, id: u32) -> String {
        let Some(token) = self.inner.id_to_token(id) else {
            return format!("<no token {id}>");
        };
        if self
            .inner
            .get_added_vocabulary()
            .simple_id_to_token(id)
            .is_some()
        {
            return token;
        }
        self.bytes.text_of(&token)
    }

    /// The token that ends an answer.
    pub fn eos_id(&self) -> u32 {
        self.eos
    }

    /// All tokens that end an answer: [`Self::eos_id`] first, then what generation_config.json and config.json name.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop
    }

    /// The token that begins a text, if the tokenizer has one, whether it adds it or not.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// Whether the tokenizer puts a token in front of a text by itself.
    pub fn adds_bos(&self) -> bool {
        !self.prefix.is_empty()
    }

    /// What [`Self::adds_bos`] speaks of.
    pub(super) fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// Whether an id is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// One more than the largest id: the rows that an embedding must have at least.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token by its exact text.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether conversations can be rendered.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// A template that writes today's date writes that of `seconds` since 1970 instead: a run that goes on another day
    /// must read the texts that it began with.
    pub fn set_date(&mut self, seconds: i64) {
        if let Some(template) = &mut self.template {
            template.set_date(seconds);
        }
    }

    /// A conversation as the text that the model reads; encode it with `add_special` false, since the template writes
    /// the beginning token itself.
    ///
    /// # Errors
    /// If there is no template, or it refuses the conversation.
    pub fn render_chat(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String, DataError> {
        match &self.template {
            Some(template) => template.render(messages, tools, add_generation_prompt),
            None => Err(DataError::Template(
                "the model has none, so conversations cannot be written as text; use prompt and completion rows, or \
                 put a chat_template.jinja into the model's folder"
                    .into(),
            )),
        }
    }
}

/// What the post-processor puts before and behind a text, found by encoding one with and without it.
fn added_by_post_processor(inner: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>), String> {
    let encode = |special| {
        inner
            .encode("a", special)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| error.to_string())
    };
    let (bare, full) = (encode(false)?, encode(true)?);
    match full
        .windows(bare.len().max(1))
        .position(|window| window == bare.as_slice())
    {
        Some(at) if !bare.is_empty() => Ok((full[..at].to_vec(), full[at + bare.len()..].to_vec())),
        _ if bare.is_empty() => Ok((full, Vec::new())),
        _ => Err("its post-processor changes the tokens of a text, which is not supported".into()),
    }
}

/// How the tokens of a vocabulary write bytes.
#[derive(Debug)]
enum ByteAlphabet {
    /// GPT-2's: a printable character for each byte.
    Printable(Box<[u32; 256]>),
    /// SentencePiece's: `▁` is a space, `<0xE2>` a byte.
    SentencePiece,
}

impl ByteAlphabet {
    fn of<M, N, P, PP>(inner: &TokenizerImpl<M, N, P, PP, tokenizers::DecoderWrapper>) -> Self
    where
        M: tokenizers::Model,
        N: tokenizers::Normalizer,
        P: tokenizers::PreTokenizer,
        PP: tokenizers::PostProcessor,
    {
        fn is_byte_level(decoder: &tokenizers::DecoderWrapper) -> bool {
            match decoder {
                tokenizers::DecoderWrapper::ByteLevel(_) => true,
                tokenizers::DecoderWrapper::Sequence(sequence) => {
                    sequence.get_decoders().iter().any(is_byte_level)
                }
                _ => false,
            }
        }
        if inner.get_decoder().is_some_and(is_byte_level) {
            Self::Printable(Box::new(printable_bytes()))
        } else {
            Self::SentencePiece
        }
    }

    fn text_of(&self, token: &str) -> String {
        match self {
            Self::Printable(alphabet) => {
                let byte = |c: char| alphabet.iter().position(|known| *known == c as u32);
                match token.chars().map(byte).collect::<Option<Vec<usize>>>() {
                    Some(bytes) => {
                        readable(&bytes.iter().map(|byte| *byte as u8).collect::<Vec<u8>>())
                    }
                    None => token.to_owned(),
                }
            }
            Self::SentencePiece => {
                let byte = token
                    .strip_prefix("<0x")
                    .and_then(|rest| rest.strip_suffix('>'));
                match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => readable(&[byte]),
                    None => token.replace('▁', " "),
                }
            }
        }
    }
}

/// Bytes as text, with `\xE2` for those that are no whole character.
fn readable(bytes: &[u8]) -> String {
    let mut out = String::new();
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        for byte in chunk.invalid() {
            // Writing to a String cannot fail.
            let _ = write!(out, "\\x{byte:02X}");
        }
    }
    out
}

/// GPT-2's character of every byte: itself where it is printable, the next one from 256 on where it is not.
pub(super) fn printable_bytes() -> [u32; 256] {
    let mut next = 256;
    std::array::from_fn(|byte| {
        if matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) {
            byte as u32
        } else {
            next += 1;
            next - 1
        }
    })
}

fn read_extras(folder: &Path) -> Result<Extras, DataError> {
    let mut extras = Extras::default();
    let config = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    let map = read_json(&folder.join("special_tokens_map.json"))?.unwrap_or_default();
    for (source, file) in [
        (&config, "tokenizer_config.json"),
        (&map, "special_tokens_map.json"),
    ] {
        for (name, value) in source.iter().filter(|(name, _)| name.ends_with("_token")) {
            let known = extras.special_tokens.iter().any(|(known, _)| known == name);
            if let (Some(text), false) = (token_of(value), known) {
                extras.special_tokens.push((name.clone(), text));
            } else if !known && !value.is_null() && !value.is_boolean() {
                let path = folder.join(file).display().to_string();
                return Err(DataError::tokenizer(
                    path,
                    format!("{name:?} is neither a text nor a token's object"),
                ));
            }
        }
    }
    let flag = |name: &str| {
        config
            .get(name)
            .map(|value| value.as_bool().unwrap_or(false))
    };
    if let (Some(_), _) | (_, Some(_)) = (flag("add_bos_token"), flag("add_eos_token")) {
        extras.add_bos_eos = Some((
            flag("add_bos_token").unwrap_or(false),
            flag("add_eos_token").unwrap_or(false),
        ));
    }
    read_templates(folder, &config, &mut extras)?;
    for file in ["generation_config.json", "config.json"] {
        let path = folder.join(file);
        match read_json(&path)?.unwrap_or_default().get("eos_token_id") {
            None | Some(Value::Null) => {}
            Some(value) => {
                let ids = match value {
                    Value::Array(items) => items.iter().map(as_id).collect::<Option<Vec<u32>>>(),
                    one => as_id(one).map(|id| vec![id]),
                };
                let Some(ids) = ids else {
                    let reason =
                        format!("\"eos_token_id\" must be an id or a list of ids, but is {value}");
                    return Err(DataError::tokenizer(path.display().to_string(), reason));
                };
                extras.end_ids.extend(ids);
            }
        }
    }
    Ok(extras)
}

/// The template of chat_template.jinja, or that of tokenizer_config.json: a text, or a list of named ones.
fn read_templates(
    folder: &Path,
    config: &Map<String, Value>,
    extras: &mut Extras,
) -> Result<(), DataError> {
    let file = folder.join("chat_template.jinja");
    if file.is_file() {
        extras.template =
            Some(fs::read_to_string(&file).map_err(|error| DataError::io(&file, error))?);
    }
    let tools = folder
        .join("additional_chat_templates")
        .join("tool_use.jinja");
    if tools.is_file() {
        extras.tool_template =
            Some(fs::read_to_string(&tools).map_err(|error| DataError::io(&tools, error))?);
    }
    if extras.template.is_some() {
        return Ok(());
    }
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(text)) => {
            extras.template = Some(text.clone());
            Ok(())
        }
        Some(Value::Array(list)) => {
            for entry in list {
                if let (Some(name), Some(text)) =
                    (entry["name"].as_str(), entry["template"].as_str())
                {
                    match name {
                        "default" => extras.template = Some(text.to_owned()),
                        "tool_use" => extras.tool_template = Some(text.to_owned()),
                        _ => {}
                    }
                }
            }
            Ok(())
        }
        Some(_) => Err(DataError::tokenizer(
            folder.join("tokenizer_config.json").display().to_string(),
            "\"chat_template\" must be a text or a list of named templates",
        )),
    }
}

fn as_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// A special token is written as its text, or as an object with the text under "content".
fn token_of(value: &Value) -> Option<String> {
    value
        .as_str()
        .or_else(|| value.get("content")?.as_str())
        .map(str::to_owned)
}

/// A JSON object, or nothing where there is no such file.
fn read_json(path: &Path) -> Result<Option<Map<String, Value>>, DataError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(DataError::io(path, error)),
    };
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(Some(map)),
        Ok(_) => Err(DataError::tokenizer(
            path.display().to_string(),
            "must hold one JSON object",
        )),
        Err(error) => Err(DataError::tokenizer(
            path.display().to_string(),
            format!("invalid JSON: {error}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fixture;

    fn error_of(folder: &Path) -> String {
        Tokenizer::from_folder(folder).unwrap_err().to_string()
    }

    #[test]
    fn ids_and_text_return() {
        let tokenizer = fixture::tokenizer();
        for text in [
            "hello",
            " hello  hello",
            "héllo 👍🏽\n",
            "<|im_start|>hello",
            "\u{0}\u{7f}",
        ] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        }
        let ids = tokenizer.encode("<|im_start|>hello", false).unwrap();
        assert_eq!(
            ids,
            [
                tokenizer.token_id("<|im_start|>").unwrap(),
                tokenizer.token_id("hello").unwrap()
            ]
        );
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "hello");
        assert_eq!(tokenizer.vocab_size(), 266);
        assert_eq!(
            (tokenizer.eos_id(), tokenizer.bos_id(), tokenizer.stop_ids()),
            (2, Some(3), [2].as_slice())
        );
    }

    #[test]
    fn tokens_are_shown_with_their_spaces_and_bytes() {
        let tokenizer = fixture::tokenizer();
        let shown = |text: &str| {
            let ids = tokenizer.encode(text, false).unwrap();
            ids.iter()
                .map(|id| tokenizer.token_text(*id))
                .collect::<Vec<_>>()
        };
        assert_eq!(shown(" hello\n"), [" hello", "\n"]);
        assert_eq!(shown("é<|im_end|>"), ["\\xC3", "\\xA9", "<|im_end|>"]);
        assert_eq!(tokenizer.token_text(9999), "<no token 9999>");
    }

    #[test]
    fn a_beginning_is_added_where_the_tokenizer_does() {
        let plain = fixture::tokenizer();
        assert!(!plain.adds_bos());
        assert_eq!(
            plain.encode("hello", true).unwrap(),
            plain.encode("hello", false).unwrap()
        );
        let with = fixture::with_bos();
        assert!(with.adds_bos());
        let bare = with.encode("hello", false).unwrap();
        assert_eq!(
            with.encode("hello", true).unwrap(),
            [vec![3], bare].concat()
        );
        // The flags of tokenizer_config.json decide, as in transformers.
        let folder = tempfile::tempdir().unwrap();
        fixture::write(&fixture::parts(), folder.path());
        let path = folder.path().join("tokenizer_config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["add_bos_token"] = true.into();
        config["add_eos_token"] = true.into();
        fs::write(&path, config.to_string()).unwrap();
        let flagged = Tokenizer::from_folder(folder.path()).unwrap();
        assert_eq!(
            flagged.encode("l", true).unwrap(),
            [vec![3], flagged.encode("l", false).unwrap(), vec![2]].concat()
        );
    }

    #[test]
    fn ends_are_gathered_from_all_files() {
        let folder = tempfile::tempdir().unwrap();
        fixture::write(&fixture::parts(), folder.path());
        fs::write(
            folder.path().join("generation_config.json"),
            r#"{"eos_token_id": [2, 0]}"#,
        )
        .unwrap();
        fs::write(folder.path().join("config.json"), r#"{"eos_token_id": 1}"#).unwrap();
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        assert_eq!(tokenizer.stop_ids(), [2, 0, 1]);
        // Without a name in the tokenizer's files, the first of them is the end token.
        fs::write(folder.path().join("tokenizer_config.json"), "{}").unwrap();
        assert_eq!(Tokenizer::from_folder(folder.path()).unwrap().eos_id(), 2);
        fs::write(
            folder.path().join("special_tokens_map.json"),
            r#"{"eos_token": {"content": "<|endoftext|>"}}"#,
        )
        .unwrap();
        assert_eq!(Tokenizer::from_folder(folder.path()).unwrap().eos_id(), 0);
    }

    #[test]
    fn templates_are_found_in_every_place() {
        let folder = tempfile::tempdir().unwrap();
        fixture::write(&fixture::parts(), folder.path());
        let config = |template: &str| {
            format!(r#"{{"eos_token": "<|im_end|>", "chat_template": {template}}}"#)
        };
        let path = folder.path().join("tokenizer_config.json");
        let messages = [Message::new("user", "x")];
        let tools = serde_json::json!([{"name": "f"}]);
        let render = |tools| {
            Tokenizer::from_folder(folder.path())
                .unwrap()
                .render_chat(&messages, tools, false)
                .unwrap()
        };
        fs::write(&path, config(r#""from config""#)).unwrap();
        assert!(render(None).starts_with("<|im_start|>"));
        fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
        assert_eq!(render(None), "from config");
        let named = r#"[{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]"#;
        fs::write(&path, config(named)).unwrap();
        assert_eq!(render(None), "plain");
        assert_eq!(render(Some(&tools)), "tools");
        fs::write(&path, config("7")).unwrap();
        assert!(
            error_of(folder.path())
                .contains("\"chat_template\" must be a text or a list of named templates")
        );
        fs::write(&path, config(r#""{% if %}""#)).unwrap();
        assert!(error_of(folder.path()).starts_with("chat template: cannot be read: syntax error"));
    }

    #[test]
    fn errors_name_the_file_and_the_mend() {
        let folder = tempfile::tempdir().unwrap();
        assert!(error_of(folder.path()).contains("there is no tokenizer.json"));
        fs::write(folder.path().join("tokenizer.model"), "").unwrap();
        assert!(error_of(folder.path()).contains("AutoTokenizer"));
        fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
        assert!(
            error_of(folder.path())
                .contains("tokenizer.json: is not a tokenizer this program can read")
        );
        fixture::write(&fixture::parts(), folder.path());
        let config = folder.path().join("tokenizer_config.json");
        for (text, expected) in [
            ("{", "tokenizer_config.json: invalid JSON"),
            ("[]", "must hold one JSON object"),
            (
                "{}",
                "no end token is known, so a model could not learn to stop; name it as \"eos_token\"",
            ),
            (
                r#"{"eos_token": "</s>"}"#,
                "eos_token is \"</s>\", but the vocabulary has no such token",
            ),
            (
                r#"{"eos_token": 5}"#,
                "\"eos_token\" is neither a text nor a token's object",
            ),
        ] {
            fs::write(&config, text).unwrap();
            let error = error_of(folder.path());
            assert!(error.contains(expected), "{error}");
        }
        fixture::write(&fixture::parts(), folder.path());
        fs::write(
            folder.path().join("config.json"),
            r#"{"eos_token_id": "two"}"#,
        )
        .unwrap();
        assert!(
            error_of(folder.path())
                .contains("config.json: \"eos_token_id\" must be an id or a list of ids")
        );
        let error = fixture::with_template(None)
            .render_chat(&[Message::new("user", "x")], None, false)
            .unwrap_err();
        assert!(
            error
                .to_string()
                .contains("put a chat_template.jinja into the model's folder"),
            "{error}"
        );
    }

    #[test]
    fn a_built_in_tokenizer_needs_no_folder() {
        let json = fixture::parts()
            .to_files()
            .unwrap()
            .tokenizer_json
            .to_string();
        let tokenizer =
            Tokenizer::from_parts(json.as_bytes(), Some(fixture::CHATML), "<|im_end|>").unwrap();
        assert_eq!(tokenizer.eos_id(), 2);
        assert!(tokenizer.has_chat_template());
        let error = Tokenizer::from_parts(json.as_bytes(), None, "</s>")
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("the built-in tokenizer.json: eos_token is \"</s>\""),
            "{error}"
        );
    }

    #[test]
    fn truncation_and_padding_of_the_file_are_off() {
        let mut json = fixture::parts().to_files().unwrap().tokenizer_json;
        json["truncation"] = serde_json::json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
        json["padding"] = serde_json::json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"});
        let tokenizer =
            Tokenizer::from_parts(json.to_string().as_bytes(), None, "<|im_end|>").unwrap();
        assert_eq!(tokenizer.encode("abcd", true).unwrap().len(), 4);
    }
}
