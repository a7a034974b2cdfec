//! The tokenizer of a model folder, with its special tokens and its chat template.
//!
//! tokenizer.json does the work, through the `tokenizers` crate. Its post-processor is taken apart when it is read:
//! what it puts in front of and behind a text does not depend on the text, so it is kept as two lists of ids. Then
//! every text that is to be gone on with is encoded once, without it, and the offsets of the tokens are those of the text, untrimmed (GPT-2's
//! post-processor moves them past spaces, which would spoil the masks of chats). Truncation and padding that a file
//! carries are switched off, as `transformers` does.

mod alphabet;
mod class;
mod classified;
mod encoders;
mod folder;
mod vocabulary;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::utils::truncation::TruncationDirection;
use tokenizers::{AddedToken, PostProcessorWrapper};

use self::alphabet::ByteAlphabet;
#[cfg(test)]
pub(super) use self::alphabet::printable_bytes;
use self::folder::{Files, Place};
use super::added_tokens::NewToken;
use super::error::DataError;
use super::message::Message;
use super::stream::DecodeStream;
use super::template::{ChatTemplate, DEFAULT};

/// Text to ids and back. Cheap to share between threads by reference.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// What puts the tokenizer's own tokens around texts. It is kept apart: see the module's doc.
    processor: Option<PostProcessorWrapper>,
    /// What it puts before and behind one text.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    /// Words are told by the space before them, and none is put before a text.
    spaces_before_words: bool,
    /// Where texts are cut that are too long for a classifier.
    cuts_from: TruncationDirection,
    bos: Option<u32>,
    eos: u32,
    stop: Vec<u32>,
    /// The token that ends a turn in the chat template, where no file names it as an end.
    unnamed_end: Option<u32>,
    special: HashSet<u32>,
    vocab_size: usize,
    /// Rows of the model's embedding, where they are known.
    rows: Option<usize>,
    /// Tokens whose id is not the one that a file gives them, and what is wrong.
    misplaced: HashMap<u32, String>,
    bytes: ByteAlphabet,
    template: Option<ChatTemplate>,
    /// What is there in place of a template that could be one.
    no_template: &'static str,
}

/// A text, or a pair of them, as tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The tokens.
    pub ids: Vec<u32>,
    /// For each token which of two texts it belongs to (`token_type_ids`); empty where all are 0.
    pub token_types: Vec<u8>,
    /// How many tokens of the texts were cut.
    pub truncated: usize,
    /// For each token the bytes of its text that it covers; of two texts each counts from 0. Those of words count from the
    /// beginning of the word.
    pub offsets: Vec<(usize, usize)>,
    /// For each token the number of its word; none for the tokenizer's own tokens. What a word is, is the tokenizer's
    /// matter, unless the text was given in words.
    pub words: Vec<Option<u32>>,
    /// How many of the tokens the tokenizer put around the texts.
    pub added: usize,
}

impl Tokenizer {
    /// Reads tokenizer.json of a model folder, and what is there of tokenizer_config.json, special_tokens_map.json,
    /// chat_template.jinja, generation_config.json and config.json. Without a tokenizer.json it is built from vocab.txt, from
    /// vocab.json and merges.txt, or from a model of SentencePiece, where the class of the folder is known to build it so.
    ///
    /// # Errors
    /// If there is no such file, if a file is not what it should be, or if no end token is named anywhere.
    pub fn from_folder(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join("tokenizer.json");
        if path.is_file() {
            let json = fs::read(&path).map_err(|error| DataError::io(&path, error))?;
            let files = Files::read(Place::Folder(folder), &json)?;
            return Self::read(&json, &path.display().to_string(), files);
        }
        let files = Files::read(Place::Folder(folder), &[])?;
        if let Some((json, path)) = vocabulary::tokenizer_json(folder, &files)? {
            return Self::read(&json, &path.display().to_string(), files);
        }
        let others = [
            "tokenizer.model",
            "vocab.json",
            "tekken.json",
            "vocab.txt",
            "tiktoken.model",
            "sentencepiece.bpe.model",
            "spm.model",
        ];
        let hint = match others.iter().find(|name| folder.join(name).is_file()) {
            Some(other) => format!(
                "only {other} is there: save the tokenizer with transformers' AutoTokenizer to get tokenizer.json"
            ),
            None => "there is no tokenizer.json, nor a vocab.txt or vocab.json with merges.txt to build it from; copy it from the model's repository".to_owned(),
        };
        Err(DataError::layout(folder, hint))
    }

    /// The same from files in memory, by name, which were made from `origin`.
    ///
    /// # Errors
    /// As [`from_folder`](Self::from_folder).
    pub fn from_files(origin: &Path, files: &BTreeMap<String, Vec<u8>>) -> Result<Self, DataError> {
        let json = files.get("tokenizer.json").map_or(&[][..], Vec::as_slice);
        let beside = Files::read(Place::Memory(origin, files), json)?;
        Self::read(json, &origin.display().to_string(), beside)
    }

    fn read(json: &[u8], origin: &str, files: Files) -> Result<Self, DataError> {
        Self::build(read(json, origin)?, json, origin, files)
    }

    /// A tokenizer from the contents of its files, for a model that is built into a program.
    ///
    /// `eos_token` is the text of the end token, `end_ids` are all that end a generation; the beginning, if any, is what
    /// the post-processor of `tokenizer_json` adds.
    ///
    /// # Errors
    /// If the JSON is no tokenizer, the end token is not in it, or the template does not compile.
    pub fn from_parts(
        tokenizer_json: &[u8],
        chat_template: Option<&str>,
        eos_token: &str,
        end_ids: &[u32],
    ) -> Result<Self, DataError> {
        let origin = "the built-in tokenizer.json";
        let mut files = Files {
            end_ids: end_ids.to_vec(),
            ..Files::default()
        };
        let end = AddedToken::from(eos_token, true);
        files.named.insert("eos_token".into(), end);
        if let Some(template) = chat_template {
            files.templates.add(DEFAULT, template.to_owned());
        }
        let inner = read(tokenizer_json, origin)?;
        if inner.token_to_id(eos_token).is_none() {
            return Err(DataError::tokenizer(
                origin,
                format!("eos_token is {eos_token:?}, but the vocabulary has no such token"),
            ));
        }
        Self::build(inner, tokenizer_json, origin, files)
    }

    /// `inner` is what `json` holds.
    fn build(
        mut inner: tokenizers::Tokenizer,
        json: &[u8],
        origin: &str,
        files: Files,
    ) -> Result<Self, DataError> {
        let wrong = |reason: String| DataError::tokenizer(origin, reason);
        without_dropout(&mut inner);
        inner
            .with_truncation(None)
            .map_err(|error| wrong(error.to_string()))?;
        inner.with_padding(None);
        let misplaced = add_tokens(&mut inner, json, &files).map_err(wrong)?;
        inner.set_encode_special_tokens(files.split_special_tokens);
        if let Some(own) = around(&inner, &files).map_err(wrong)? {
            inner.with_post_processor(Some(own));
        }
        let (prefix, suffix) = added_by_post_processor(&inner).map_err(wrong)?;
        warn_of_flags(files.flags, &prefix, &suffix);
        let processor = inner.get_post_processor().cloned();
        let bare: Option<tokenizers::PostProcessorWrapper> = None;
        inner.with_post_processor(bare);

        let id_of = |name: &str| inner.token_to_id(&files.named.get(name)?.content);
        let named_bos = id_of("bos_token");
        let vocabulary = inner.get_vocab(true);
        let vocab_size = vocabulary.values().max().map_or(0, |id| *id as usize + 1);
        let mut ends = files.end_ids.iter().copied();
        let known_end = ends.find(|id| (*id as usize) < vocab_size);
        // An encoder may name no end; what it ends a text with is its separator.
        let end = id_of("eos_token").or(known_end);
        let Some(eos) = end.or_else(|| id_of("sep_token")) else {
            return Err(wrong(
                "no end token is known, so a model could not learn to stop; name it as \"eos_token\" in \
                 tokenizer_config.json (or its id as \"eos_token_id\" in config.json)"
                    .into(),
            ));
        };
        let mut stop = vec![eos];
        // Ids above the vocabulary stay: a model with more rows than tokens can give them.
        for id in files.end_ids {
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
        let names = files.named.into_iter();
        let names = names.map(|(name, token)| (name, token.content)).collect();
        let no_template = if files.templates.only_of_a_processor {
            " (chat_template.json is there, which transformers reads for multimodal models alone)"
        } else {
            ""
        };
        let template = ChatTemplate::new(files.templates, names)?;
        let mut built = Self {
            bytes: ByteAlphabet::of(&inner),
            bos: named_bos.or_else(|| prefix.first().copied()),
            spaces_before_words: spaces_before_words(&inner),
            cuts_from: if files.cuts_from_left {
                TruncationDirection::Left
            } else {
                TruncationDirection::Right
            },
            inner,
            processor,
            prefix,
            suffix,
            eos,
            stop,
            special,
            vocab_size,
            rows: None,
            misplaced,
            template,
            no_template,
            unnamed_end: None,
        };
        // Who writes conversations through a template has to stop where the template ends a turn.
        if let Some(end) = built.end_of_turn()
            && !built.stop.contains(&end)
        {
            built.unnamed_end = Some(end);
            built.stop.push(end);
        }
        Ok(built)
    }

    /// The special token that the chat template writes behind an answer.
    fn end_of_turn(&self) -> Option<u32> {
        let turns = [
            Message::new("user", "Q"),
            Message::new("assistant", "A\u{1}A"),
        ];
        let text = self.render_chat(&turns, None, false).ok()?;
        let (_, tail) = text.rsplit_once("A\u{1}A")?;
        let ids = self.encode_with_offsets(tail).ok()?.ids;
        ids.into_iter().find(|id| self.is_special(*id))
    }

    /// Adds tokens as transformers' `add_tokens` does, and gives each one's id; one that is there already keeps its own.
    ///
    /// # Errors
    /// If the tokenizer gives a token the id of another one, as where ids are left out.
    pub(crate) fn add(&mut self, tokens: &[NewToken]) -> Result<Vec<u32>, DataError> {
        let known = self.inner.get_vocab(true);
        let wrong = |reason: String| DataError::Encoding(reason);
        let added = tokens.iter().map(|token| AddedToken {
            content: token.content.clone(),
            single_word: token.single_word,
            lstrip: token.lstrip,
            rstrip: token.rstrip,
            normalized: token.normalized,
            special: token.special,
        });
        self.inner
            .add_tokens(added.collect::<Vec<_>>())
            .map_err(|error| wrong(error.to_string()))?;
        let mut ids = Vec::new();
        for token in tokens {
            let id = self.inner.token_to_id(&token.content);
            let id = id.ok_or_else(|| wrong(format!("{:?} cannot be added", token.content)))?;
            if !known.contains_key(&token.content) {
                if (id as usize) < self.vocab_size {
                    return Err(wrong(format!(
                        "{:?} would get the id {id}, which is within the vocabulary of {}: its ids have gaps, and no token can be added",
                        token.content, self.vocab_size
                    )));
                }
                if token.special {
                    self.special.insert(id);
                }
            }
            ids.push(id);
        }
        let last = ids.iter().max().map_or(0, |id| *id as usize + 1);
        self.vocab_size = self.vocab_size.max(last);
        Ok(ids)
    }

    /// Every token that is added to the vocabulary, by its id.
    pub(crate) fn added(&self) -> Vec<NewToken> {
        let added = self.inner.get_added_tokens_decoder().into_iter();
        let mut tokens: Vec<NewToken> = added
            .map(|(id, token)| NewToken {
                id,
                content: token.content,
                single_word: token.single_word,
                lstrip: token.lstrip,
                rstrip: token.rstrip,
                normalized: token.normalized,
                special: token.special,
            })
            .collect();
        tokens.sort_by_key(|token| token.id);
        tokens
    }

    /// Makes every text an error that contains a token for which a model with `rows` rows of embedding has none.
    pub fn limit(&mut self, rows: usize) {
        self.rows = Some(rows);
        if self.vocab_size > rows {
            tracing::warn!(
                "the tokenizer has {} tokens and the model's embedding {rows} rows; a text with a token that has no row is \
                 refused",
                self.vocab_size
            );
        }
    }

    /// Whether a model can be given these ids.
    pub(super) fn check(&self, ids: &[u32]) -> Result<(), DataError> {
        let rows = self.rows.unwrap_or(usize::MAX);
        let over = ids.iter().find(|id| **id as usize >= rows);
        if let Some(id) = over {
            return Err(DataError::Encoding(format!(
                "the token {:?} has the id {id}, and the model's embedding has {rows} rows, so it knows no such token; \
                 leave it out, or give a model whose embedding has a row for it (resize_token_embeddings of transformers)",
                self.token_text(*id)
            )));
        }
        if self.misplaced.is_empty() {
            return Ok(());
        }
        match ids.iter().find_map(|id| self.misplaced.get(id)) {
            Some(reason) => Err(DataError::Encoding(reason.clone())),
            None => Ok(()),
        }
    }

    /// The ids of a text; special tokens that stand in it as text are recognised. `add_special` puts around it what
    /// the tokenizer adds by itself (a beginning token, for most models that have one).
    ///
    /// # Errors
    /// If the tokenizer cannot encode it, as one without an unknown token may.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, DataError> {
        let mut ids = self.encode_with_offsets(text)?.ids;
        if add_special {
            ids = [self.prefix.as_slice(), &ids, &self.suffix].concat();
        }
        self.check(&ids)?;
        Ok(ids)
    }

    pub(super) fn encode_with_offsets(&self, text: &str) -> Result<Encoded, DataError> {
        let encoding = self
            .inner
            .encode(text, false)
            .map_err(|error| DataError::Encoding(error.to_string()))?;
        Ok(Encoded {
            ids: encoding.get_ids().to_vec(),
            offsets: encoding.get_offsets().to_vec(),
            ..Encoded::default()
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

    /// The bytes that a token adds to a text: of an added token its content. None for ids outside the vocabulary.
    ///
    /// One token may be a part of a character. What the decoder does to a text as a whole, such as leaving out the space at
    /// its beginning, is not seen here.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.inner.id_to_token(id)?;
        let added = self.inner.get_added_vocabulary();
        Some(if added.simple_id_to_token(id).is_some() {
            token.into_bytes()
        } else {
            self.bytes.bytes_of(&token)
        })
    }

    /// The token that ends an answer; an encoder that names none has its separator here.
    pub fn eos_id(&self) -> u32 {
        self.eos
    }

    /// All tokens that end an answer: [`Self::eos_id`] first, then what generation_config.json and config.json name, then
    /// the one that ends a turn in the chat template.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop
    }

    /// The last of [`Self::stop_ids`] where only the chat template says that it is one: other programs may not stop there.
    pub(super) fn unnamed_end(&self) -> Option<u32> {
        self.unnamed_end
    }

    /// Whether a chat template mentions a word, such as a field of its messages.
    pub(super) fn template_mentions(&self, word: &str) -> bool {
        self.template
            .as_ref()
            .is_some_and(|template| template.mentions(word))
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

    /// The source of the chat template, if there is one.
    pub fn chat_template(&self) -> Option<&str> {
        self.template.as_ref().map(ChatTemplate::source)
    }

    /// Whether a chat template has `text` in quotes, as where it compares something with it.
    pub(super) fn template_has_text(&self, text: &str) -> bool {
        self.template
            .as_ref()
            .is_some_and(|template| template.has_text(text))
    }

    /// Whether there is a template of its own for conversations with tools.
    pub(super) fn has_tool_template(&self) -> bool {
        self.template
            .as_ref()
            .is_some_and(ChatTemplate::has_tool_use)
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
        self.render_chat_with(messages, tools, add_generation_prompt, &Map::new())
    }

    /// The same with variables for the template, such as `enable_thinking`. They replace none of those that every
    /// template has: `messages`, `tools`, `add_generation_prompt` and the special tokens.
    ///
    /// # Errors
    /// As [`Self::render_chat`].
    pub fn render_chat_with(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
        variables: &Map<String, Value>,
    ) -> Result<String, DataError> {
        match &self.template {
            Some(template) => template.render(messages, tools, add_generation_prompt, variables),
            None => Err(DataError::Template(format!(
                "the model has none{}, so conversations cannot be written as text; use prompt and completion rows, or \
                 put a chat_template.jinja into the model's folder",
                self.no_template
            ))),
        }
    }
}

/// Says so where tokenizer_config.json asks for another beginning or end than tokenizer.json's post-processor gives.
fn warn_of_flags(flags: [Option<bool>; 2], prefix: &[u32], suffix: &[u32]) {
    for (name, flag, added) in [
        ("add_bos_token", flags[0], prefix),
        ("add_eos_token", flags[1], suffix),
    ] {
        if let Some(flag) = flag
            && flag == added.is_empty()
        {
            let does = if flag { "adds none" } else { "adds one" };
            tracing::warn!(
                "tokenizer_config.json says {name}: {flag}, but the post-processor of tokenizer.json {does}, and that alone \
                 counts, as in transformers 5"
            );
        }
    }
}

/// Held while the hook of panics is another one. It is the whole process's: two that swap it at once could leave the silent one in place.
static HOOK: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// The tokenizer of a tokenizer.json. The crate that reads it panics at some contents that cannot be.
fn read(json: &[u8], origin: &str) -> Result<tokenizers::Tokenizer, DataError> {
    let wrong = |error: String| {
        let reason = format!("is not a tokenizer this program can read: {error}");
        DataError::tokenizer(origin, reason)
    };
    let _swap = HOOK
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let read = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(json));
    std::panic::set_hook(hook);
    match read {
        Ok(read) => read.map_err(|error| wrong(error.to_string())),
        Err(_) => Err(wrong(
            "its merges, its normalizer or another part of it is damaged".into(),
        )),
    }
}

/// Merges that are left out at random are for training a tokenizer's model; the same text must have the same tokens here.
fn without_dropout(inner: &mut tokenizers::Tokenizer) {
    let tokenizers::ModelWrapper::BPE(model) = inner.get_model() else {
        return;
    };
    if model.dropout.is_some_and(|dropout| dropout > 0.0) {
        tracing::warn!(
            "tokenizer.json has a dropout, with which transformers gives a text other tokens each time; it is off here"
        );
        let mut model = model.clone();
        model.dropout = None;
        inner.with_model(model);
    }
}

/// The part of tokenizer.json that says which id an added token has.
#[derive(Deserialize)]
struct GivenTokens {
    #[serde(default)]
    added_tokens: Vec<GivenToken>,
}

#[derive(Deserialize)]
struct GivenToken {
    id: u32,
    content: String,
}

/// Builds what the folder's class builds itself, and adds the tokens that stand in other files than tokenizer.json, in the
/// order in which `transformers` adds them: those that have an id, by their ids; special tokens by name; the others.
/// A token takes the next free id, whatever its file says, so the tokens whose file says otherwise are returned, with
/// an error for each.
fn add_tokens(
    inner: &mut tokenizers::Tokenizer,
    json: &[u8],
    files: &Files,
) -> Result<HashMap<u32, String>, String> {
    let given: GivenTokens = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    let own = inner.get_added_tokens_decoder();
    let mut listed = files.listed.clone();
    let unknown = files.named.get("unk_token");
    let unknown = unknown.map(|token| token.content.as_str());
    if files.class.rebuild(inner, unknown)? && !files.complete {
        listed.extend(own);
    }
    let present = inner.get_added_tokens_decoder();
    let mut tokens: Vec<AddedToken> = listed
        .into_values()
        .filter(|token| !present.values().any(|known| is_same(known, token)))
        .collect();
    let mut known: HashSet<String> = present.into_values().map(|token| token.content).collect();
    for token in &mut tokens {
        let is_named = |named: &AddedToken| named.content == token.content;
        token.special |= files.named.values().any(is_named);
        known.insert(token.content.clone());
    }
    for token in files.named.values().chain(&files.extra) {
        if known.insert(token.content.clone()) {
            tokens.push(token.clone());
        }
    }
    inner
        .add_tokens(tokens)
        .map_err(|error| error.to_string())?;

    let listed = files.listed.iter();
    let listed = listed.map(|(id, token)| (*id, &token.content, files.listed_in));
    let given = given.added_tokens.iter();
    let given = given.map(|token| (token.id, &token.content, "tokenizer.json"));
    let mut misplaced = HashMap::new();
    for (id, text, file) in listed.chain(given) {
        let Some(actual) = inner.token_to_id(text) else {
            continue;
        };
        if actual != id {
            misplaced.entry(actual).or_insert_with(|| {
                format!(
                    "{text:?} is listed with the id {id} in {file}, but the tokenizer gives it {actual} (as transformers \
                     would, without a word); correct the list, or add the tokens that are missing before it"
                )
            });
        }
    }
    if let Some(reason) = misplaced.values().min() {
        let more = misplaced.len() - 1;
        let more = if more > 0 {
            format!(" ({more} more are)")
        } else {
            String::new()
        };
        tracing::warn!("{reason}{more}; texts with such a token are refused");
    }
    Ok(misplaced)
}

fn is_same(a: &AddedToken, b: &AddedToken) -> bool {
    let flags = |token: &AddedToken| {
        (
            token.single_word,
            token.lstrip,
            token.rstrip,
            token.normalized,
            token.special,
        )
    };
    a.content == b.content && flags(a) == flags(b)
}

/// What the folder's class puts around a text where that is not the file's post-processor.
fn around(
    inner: &tokenizers::Tokenizer,
    files: &Files,
) -> Result<Option<PostProcessorWrapper>, String> {
    files.class.around(|name| {
        let token = files.named.get(name).ok_or_else(|| {
            format!("{name} is null in tokenizer_config.json, and the tokenizer puts it around each text; name it")
        })?;
        let id = inner.token_to_id(&token.content).ok_or_else(|| {
            format!("{name} is {:?}, but the vocabulary has no such token", token.content)
        })?;
        Ok((token.content.clone(), id))
    })
}

/// Whether words are told by the space before them while none is put before the text.
fn spaces_before_words(inner: &tokenizers::Tokenizer) -> bool {
    fn without_prefix(part: &tokenizers::PreTokenizerWrapper) -> bool {
        match part {
            tokenizers::PreTokenizerWrapper::ByteLevel(bytes) => !bytes.add_prefix_space,
            tokenizers::PreTokenizerWrapper::Sequence(parts) => {
                parts.as_ref().iter().any(without_prefix)
            }
            _ => false,
        }
    }
    inner.get_pre_tokenizer().is_some_and(without_prefix)
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

#[cfg(test)]
mod tests;
