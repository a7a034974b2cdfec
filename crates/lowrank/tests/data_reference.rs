//! Ids, masks and chat texts beside those of `transformers`.
//!
//! `tokenizer_folders` reads the goldens of `scripts/goldens_tokenizers.py`. The other tests are for a tokenizer on disk: they write what this crate makes of a few hundred varied texts and conversations;
//! `scripts/check_import_tokenizer.py FOLDER CASES.json` compares it with `transformers`. They need files that are not
//! part of the repository, and are skipped without them:
//!
//! * `LOWRANK_REFERENCE_TOKENIZER`: a model folder; cases go to `cases.json` in `LOWRANK_REFERENCE_OUT`.
//! * `LOWRANK_REFERENCE_ROWS`: prompt and completion rows to compare in place of varied ones.
//! * `LOWRANK_GGUF_TOKENIZER`: the `tokenizer.*` keys of a GGUF file as one JSON object; the rebuilt tokenizer and
//!   its cases go to the folder `gguf` in `LOWRANK_REFERENCE_OUT`.

use std::fs;
use std::path::{Path, PathBuf};

use lowrank::data::gguf_tokenizer::GgufTokenizerParts;
use lowrank::data::{DataOptions, Dataset, Message, Split, Tokenizer};
use serde_json::{Value, json};

/// Words of many scripts and shapes, glued in all ways.
const PIECES: &[&str] = &[
    "the",
    "The",
    " quick",
    "brown ",
    "fox's",
    " DON'T",
    "we'll",
    "I'd",
    "'s",
    "’s",
    " 1",
    "12",
    "123",
    "1234567",
    "3.14",
    " ",
    "  ",
    "   ",
    "        ",
    "\t",
    "\t\t",
    "\n",
    "\n\n",
    "\r\n",
    " \n",
    "\n ",
    "\u{a0}",
    "\u{3000}",
    "\u{200b}",
    "\u{200d}",
    "é",
    "e\u{301}",
    "ñandú",
    "Ångström",
    "A\u{30a}",
    "naïve",
    "ﬁ",
    "ß",
    "İ",
    "ǅ",
    "你好",
    "世界。",
    "日本語",
    "カタカナ",
    "한국어",
    "\u{1112}\u{1161}\u{11ab}",
    "Привет",
    "שלום",
    "العربية",
    "हिन्दी",
    "ไทย",
    "😀",
    "👩‍👩‍👧‍👦",
    "🇩🇪",
    "👍🏽",
    "½",
    "Ⅷ",
    "٣",
    "²",
    "fn main() {",
    "    return x;",
    "}\n",
    "#include <stdio.h>",
    "a[i] += b->c;",
    "$x != null",
    "`code`",
    "\"quoted\"",
    "'",
    "''",
    "--",
    "…",
    "—",
    "!!!",
    "?",
    ",",
    ".",
    ";",
    ":",
    "/",
    "\\",
    "|",
    "<",
    ">",
    "<|",
    "|>",
    "_",
    "@",
    "#",
    "%",
    "^",
    "&",
    "*",
    "(",
    ")",
    "http://example.com/?q=a&b=c",
    "e-mail@example.com",
    "snake_case",
    "camelCase",
    "SCREAMING",
    "x86_64",
    "\u{feff}",
    "\u{fffd}",
    "\0",
    "\u{7f}",
];

/// A counter-based generator of its own, so that cases never change.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % bound
    }
}

fn varied_text(random: &mut Random, specials: &[String]) -> String {
    let mut text = String::new();
    for _ in 0..=random.below(14) {
        match random.below(12) {
            0 if !specials.is_empty() => text.push_str(&specials[random.below(specials.len())]),
            1..=3 => text.push(' '),
            _ => text.push_str(PIECES[random.below(PIECES.len())]),
        }
    }
    text
}

/// Texts of every length, with special tokens in some.
fn varied_texts(specials: &[String]) -> Vec<String> {
    let mut random = Random(20_260_101);
    let single = PIECES.iter().map(|piece| (*piece).to_owned());
    let spaced = PIECES.iter().map(|piece| format!("a {piece} b"));
    let mut texts: Vec<String> = single
        .chain(spaced)
        .chain(specials.iter().cloned())
        .collect();
    texts.extend((0..400).map(|_| varied_text(&mut random, specials)));
    texts.push(" ".repeat(300));
    texts.push("x".repeat(3000));
    texts.push("\n".repeat(200) + "x");
    texts.push("ab ".repeat(2000));
    texts
}

/// Conversations of two to seven turns, with and without a system message and tools.
fn varied_conversations(specials: &[String]) -> Vec<Value> {
    let mut random = Random(7);
    let mut conversations = Vec::new();
    for _ in 0..200 {
        let mut messages = Vec::new();
        if random.below(2) == 0 {
            messages.push(json!({"role": "system", "content": varied_text(&mut random, &[])}));
        }
        let tools = random.below(3) == 0;
        for _ in 0..=random.below(3) {
            messages.push(json!({"role": "user", "content": varied_text(&mut random, &[])}));
            if tools && random.below(2) == 0 {
                let call = json!({"id": "abcdefghi", "type": "function", "function": {
                    "name": "look_up", "arguments": {"word": varied_text(&mut random, &[]), "n": [1, 2.5, null, true], "deep": {"é": {}}}}});
                messages.push(json!({"role": "assistant", "content": null, "tool_calls": [call]}));
                messages.push(json!({"role": "tool", "tool_call_id": "abcdefghi", "content": varied_text(&mut random, &[])}));
            }
            let special = random.below(5) == 0;
            let answer = varied_text(&mut random, if special { specials } else { &[] });
            let reasoning = (random.below(4) == 0).then(|| varied_text(&mut random, &[]));
            messages.push(match reasoning {
                Some(text) if special => json!({"role": "assistant", "content": answer, "reasoning_content": text}),
                Some(text) => json!({"role": "assistant", "content": format!("<think>\n{text}\n</think>\n\n{answer}")}),
                None => json!({"role": "assistant", "content": answer}),
            });
        }
        let offered = json!([
            {"type": "function", "function": {"name": "look_up", "description": "Looks <up> a \"word\" & é",
                "parameters": {"type": "object", "properties": {"word": {"type": "string"}, "n": {"type": "array", "default": []}}, "required": ["word"]}}},
            {"type": "function", "function": {"name": "other", "description": "", "parameters": {}, "return": 0.1}},
        ]);
        conversations.push(
            json!({"messages": messages, "tools": if tools { offered } else { Value::Null }}),
        );
    }
    conversations
}

/// What this crate makes of a conversation, or why it makes nothing of it.
fn chat_case(tokenizer: &Tokenizer, scratch: &Path, row: &Value) -> Value {
    let messages: Vec<Message> = serde_json::from_value(row["messages"].clone()).unwrap();
    let tools = (!row["tools"].is_null()).then_some(&row["tools"]);
    let file = scratch.join("chat.jsonl");
    fs::write(&file, row.to_string()).unwrap();
    let options = DataOptions {
        max_seq_length: 1 << 20,
        ..DataOptions::default()
    };
    let render = |upto: usize, prompt| {
        tokenizer
            .render_chat(&messages[..upto], tools, prompt)
            .map_err(|error| error.to_string())
    };
    let (text, prompt) = (
        render(messages.len(), false),
        render(messages.len() - 1, true),
    );
    let data =
        Dataset::load(&file, Split::File, tokenizer, &options).map_err(|error| error.to_string());
    let error = data.as_ref().err().cloned();
    let example = data.ok().map(|data| data.examples[0].clone());
    json!({
        "messages": row["messages"],
        "tools": row["tools"],
        "text": text.ok(),
        "prompt": prompt.ok(),
        "error": error,
        "ids": example.as_ref().map(|example| &example.ids),
        "supervised": example.as_ref().map(|example| &example.supervised),
    })
}

fn cases(folder: &Path) -> Value {
    let tokenizer = Tokenizer::from_folder(folder).unwrap();
    let json: Value =
        serde_json::from_slice(&fs::read(folder.join("tokenizer.json")).unwrap()).unwrap();
    let mut specials: Vec<String> = json["added_tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|token| token["content"].as_str().unwrap().to_owned())
        .collect();
    specials.truncate(40);
    let texts: Vec<Value> = varied_texts(&specials)
        .into_iter()
        .map(|text| {
            let ids = tokenizer.encode(&text, false).unwrap();
            let decoded = tokenizer.decode(&ids, false).unwrap();
            let mut stream = tokenizer.decode_stream(false);
            let mut streamed = String::new();
            for id in &ids {
                streamed += &stream.push(*id).unwrap();
            }
            streamed += &stream.finish().unwrap();
            assert_eq!(streamed, decoded, "streaming {text:?}");
            json!({"text": text, "ids": ids, "special_ids": tokenizer.encode(&text, true).unwrap(), "decoded": decoded})
        })
        .collect();
    let mut chats = Vec::new();
    if tokenizer.has_chat_template() {
        let scratch = tempfile::tempdir().unwrap();
        let conversations = varied_conversations(&specials);
        chats.extend(
            conversations
                .iter()
                .map(|row| chat_case(&tokenizer, scratch.path(), row)),
        );
    }
    let pairs = pair_cases(&tokenizer, &specials);
    json!({"texts": texts, "chats": chats, "pairs": pairs, "eos": tokenizer.eos_id(), "bos": tokenizer.bos_id()})
}

/// Prompt and completion rows: varied texts, or those of the file that `LOWRANK_REFERENCE_ROWS` names.
fn pair_cases(tokenizer: &Tokenizer, specials: &[String]) -> Vec<Value> {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("rows.jsonl");
    let text = match environment("LOWRANK_REFERENCE_ROWS") {
        Some(rows) => fs::read_to_string(rows).unwrap(),
        None => varied_texts(specials)
            .windows(2)
            .filter(|pair| pair.iter().all(|text| !text.is_empty()))
            .map(|pair| json!({"prompt": pair[0], "completion": pair[1]}).to_string() + "\n")
            .collect(),
    };
    fs::write(&file, &text).unwrap();
    let options = DataOptions {
        max_seq_length: 1 << 20,
        ..DataOptions::default()
    };
    let data = Dataset::load(&file, Split::File, tokenizer, &options).unwrap();
    let rows = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.zip(&data.examples)
        .map(|(row, example)| {
            json!({"prompt": row["prompt"], "completion": row["completion"], "ids": example.ids,
                "supervised": example.supervised})
        })
        .collect()
}

fn environment(name: &str) -> Option<PathBuf> {
    let value = std::env::var_os(name).map(PathBuf::from);
    if value.is_none() {
        eprintln!("skipped: {name} is not set");
    }
    value
}

#[test]
fn cases_of_a_folder() {
    let (Some(folder), Some(out)) = (
        environment("LOWRANK_REFERENCE_TOKENIZER"),
        environment("LOWRANK_REFERENCE_OUT"),
    ) else {
        return;
    };
    fs::write(out.join("cases.json"), cases(&folder).to_string()).unwrap();
}

#[test]
fn cases_of_a_gguf_tokenizer() {
    let (Some(dump), Some(out)) = (
        environment("LOWRANK_GGUF_TOKENIZER"),
        environment("LOWRANK_REFERENCE_OUT"),
    ) else {
        return;
    };
    let dump: Value = serde_json::from_slice(&fs::read(dump).unwrap()).unwrap();
    let key = |name: &str| &dump[format!("tokenizer.ggml.{name}")];
    let texts = |name: &str| {
        let list = key(name).as_array().map(Vec::as_slice).unwrap_or_default();
        list.iter()
            .map(|text| text.as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let id = |name: &str| key(name).as_u64().map(|id| u32::try_from(id).unwrap());
    let parts = GgufTokenizerParts {
        architecture: dump["general.architecture"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
        model: key("model").as_str().unwrap().to_owned(),
        pre: key("pre").as_str().map(str::to_owned),
        tokens: texts("tokens"),
        token_types: key("token_type")
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t.as_i64().unwrap() as i32)
            .collect(),
        scores: key("scores")
            .as_array()
            .map(|scores| scores.iter().map(|score| score.as_f64().unwrap()).collect())
            .unwrap_or_default(),
        merges: texts("merges"),
        bos_id: id("bos_token_id"),
        eos_id: id("eos_token_id"),
        unk_id: id("unknown_token_id"),
        pad_id: id("padding_token_id"),
        add_bos: key("add_bos_token").as_bool(),
        add_eos: key("add_eos_token").as_bool(),
        add_space_prefix: key("add_space_prefix").as_bool(),
        chat_template: dump["tokenizer.chat_template"].as_str().map(str::to_owned),
        ..GgufTokenizerParts::default()
    };
    let files = parts.to_files().unwrap();
    let folder = out.join("gguf");
    fs::create_dir_all(&folder).unwrap();
    fs::write(
        folder.join("tokenizer.json"),
        files.tokenizer_json.to_string(),
    )
    .unwrap();
    fs::write(
        folder.join("tokenizer_config.json"),
        files.tokenizer_config.to_string(),
    )
    .unwrap();
    if let Some(template) = files.chat_template {
        fs::write(folder.join("chat_template.jinja"), template).unwrap();
    }
    fs::write(folder.join("cases.json"), cases(&folder).to_string()).unwrap();
}

/// Folders that say things in one file or another, and what `AutoTokenizer` makes of them.
#[test]
fn tokenizer_folders() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/tokenizers.json");
    let goldens: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let texts: Vec<String> = serde_json::from_value(goldens["texts"].clone()).unwrap();
    let messages: Vec<Message> = serde_json::from_value(goldens["conversation"].clone()).unwrap();
    let mut problems = Vec::new();
    let mut classified = 0;
    let cases = goldens["cases"].as_array().unwrap();
    for case in cases {
        let folder = tempfile::tempdir().unwrap();
        write_folder(folder.path(), &goldens["bases"], case);
        for problem in compare_folder(folder.path(), case, &texts, &messages) {
            problems.push(format!("{}: {problem}", case["name"].as_str().unwrap()));
        }
        if case["classified"] == true {
            classified += 1;
            for problem in compare_classified(folder.path(), case, &goldens) {
                problems.push(format!("{}: {problem}", case["name"].as_str().unwrap()));
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert!(cases.len() >= 50 && classified >= 25);
}

fn write_folder(folder: &Path, bases: &Value, case: &Value) {
    if let Some(base) = case["base"].as_str() {
        let mut json = bases[base].clone();
        for (key, value) in case["json_patch"].as_object().unwrap() {
            json[key] = value.clone();
        }
        fs::write(folder.join("tokenizer.json"), json.to_string()).unwrap();
    }
    for (name, content) in case["files"].as_object().unwrap() {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        if let Some(hex) = content["hex"].as_str() {
            let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
            let bytes: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
            fs::write(path, bytes).unwrap();
            continue;
        }
        let text = content
            .as_str()
            .map_or_else(|| content.to_string(), str::to_owned);
        fs::write(path, text).unwrap();
    }
}

/// What differs from the golden in what a classifier reads: texts and pairs, cut at several lengths, and texts in words.
fn compare_classified(folder: &Path, case: &Value, goldens: &Value) -> Vec<String> {
    let expected = &case["expected"];
    let tokenizer = Tokenizer::from_folder(folder).unwrap();
    let list = |value: &Value| value.as_array().unwrap().clone();
    let lengths: Vec<usize> = serde_json::from_value(goldens["lengths"].clone()).unwrap();
    let mut problems = Vec::new();
    let mut differ = |what: String, ours: Value, theirs: &Value| {
        if ours != *theirs {
            problems.push(format!("{what}: {ours} here, {theirs} there"));
        }
    };
    for (pair, theirs) in list(&goldens["pairs"]).iter().zip(list(&expected["pairs"])) {
        for (length, theirs) in lengths.iter().zip(list(&theirs)) {
            let text = pair[0].as_str().unwrap();
            let encode = |length| tokenizer.encode_classified(text, pair[1].as_str(), length);
            let (ours, whole) = (encode(*length).unwrap(), encode(1000).unwrap());
            differ(format!("{pair} in {length}"), json!(ours.ids), &theirs[0]);
            // The types of decoders are not theirs to read, and mean nothing.
            if ours.added > 0 {
                let mut types = ours.token_types.clone();
                types.resize(ours.ids.len(), 0);
                differ(
                    format!("types of {pair} in {length}"),
                    json!(types),
                    &theirs[1],
                );
            }
            assert_eq!(ours.ids.len() + ours.truncated, whole.ids.len(), "{pair}");
        }
    }
    for (words, theirs) in list(&goldens["words"]).iter().zip(list(&expected["words"])) {
        let text: Vec<String> = serde_json::from_value(words.clone()).unwrap();
        for (length, theirs) in lengths.iter().zip(list(&theirs)) {
            let ours = tokenizer.encode_words(&text, *length).unwrap();
            let ours = json!([ours.ids, ours.words]);
            differ(format!("{words} in {length}"), ours, &theirs);
        }
    }
    problems
}

/// What differs from the golden, where `refused` is what our error says in place of ids that cannot be right.
fn compare_folder(
    folder: &Path,
    case: &Value,
    texts: &[String],
    messages: &[Message],
) -> Vec<String> {
    let expected = &case["expected"];
    let tokenizer = match Tokenizer::from_folder(folder) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return vec![format!("cannot be read: {error}")],
    };
    let mut problems = Vec::new();
    let mut differ = |what: &str, ours: Value, theirs: &Value| {
        if ours != *theirs {
            problems.push(format!("{what}: {ours} here, {theirs} there"));
        }
    };
    let mut refused = 0;
    for (at, text) in texts.iter().enumerate() {
        for (key, special) in [("ids", true), ("bare", false)] {
            let theirs = &expected[key][at];
            match (tokenizer.encode(text, special), case["refused"].as_str()) {
                (Ok(ids), _) => {
                    if special {
                        let decoded = tokenizer.decode(&ids, true).unwrap();
                        differ("text", decoded.into(), &expected["decoded"][at]);
                    }
                    differ(&format!("{key} of {text:?}"), json!(ids), theirs);
                }
                (Err(error), Some(part)) if error.to_string().contains(part) => refused += 1,
                (Err(error), _) => differ(
                    &format!("{key} of {text:?}"),
                    error.to_string().into(),
                    theirs,
                ),
            }
        }
    }
    if !case["refused"].is_null() && refused == 0 {
        differ("refused", "nothing".into(), &case["refused"]);
    }
    if !expected["eos"].is_null() {
        differ("end", json!(tokenizer.eos_id()), &expected["eos"]);
    }
    if !expected["bos"].is_null() {
        differ("beginning", json!(tokenizer.bos_id()), &expected["bos"]);
    }
    let tools = json!([{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}]);
    for (key, tools) in [("chat", None), ("tools", Some(&tools))] {
        match tokenizer.render_chat(messages, tools, false) {
            Ok(text) => differ(key, text.into(), &expected[key]),
            Err(_) if expected[key].is_object() => {}
            Err(error) => differ(key, error.to_string().into(), &expected[key]),
        }
    }
    problems
}
