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
fn the_bytes_of_tokens_are_those_of_the_text() {
    let text = " hello é 👍🏽\n\u{7f}";
    for tokenizer in [fixture::tokenizer(), fixture::sentence_piece()] {
        let ids = tokenizer.encode(text, false).unwrap();
        let bytes: Vec<u8> = ids
            .iter()
            .flat_map(|id| tokenizer.token_bytes(*id).unwrap())
            .collect();
        let found = String::from_utf8(bytes).unwrap();
        assert_eq!(found.trim_start(), text.trim_start());
        assert_eq!(tokenizer.token_bytes(9999), None);
    }
    let tokenizer = fixture::tokenizer();
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    assert_eq!(tokenizer.token_bytes(end).unwrap(), b"<|im_end|>");
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
    // The flags of tokenizer_config.json do nothing beside tokenizer.json, as in transformers.
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
        flagged.encode("l", false).unwrap()
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
fn a_template_sees_variables_that_it_has_not() {
    let folder = tempfile::tempdir().unwrap();
    fixture::write(&fixture::parts(), folder.path());
    fs::write(
        folder.path().join("chat_template.jinja"),
        "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}",
    )
    .unwrap();
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    let messages = [Message::new("user", "x")];
    let render = |variables: serde_json::Value| {
        let variables = variables.as_object().unwrap();
        tokenizer
            .render_chat_with(&messages, None, true, variables)
            .unwrap()
    };
    assert_eq!(render(serde_json::json!({})), "x");
    assert_eq!(render(serde_json::json!({"enable_thinking": true})), "x");
    assert_eq!(
        render(serde_json::json!({"enable_thinking": false, "messages": []})),
        "x<think></think>"
    );
}

#[test]
fn templates_are_found_in_every_place() {
    let folder = tempfile::tempdir().unwrap();
    fixture::write(&fixture::parts(), folder.path());
    let config =
        |template: &str| format!(r#"{{"eos_token": "<|im_end|>", "chat_template": {template}}}"#);
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
    let named =
        r#"[{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]"#;
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
            r#"{"eos_token": "<|im_end|>", "added_tokens_decoder": []}"#,
            "\"added_tokens_decoder\" must be an object with ids as keys",
        ),
        (
            r#"{"eos_token": "<|im_end|>", "added_tokens_decoder": {"two": {"content": "x"}}}"#,
            "has the key \"two\"",
        ),
        (
            r#"{"eos_token": "<|im_end|>", "extra_special_tokens": [3]}"#,
            "\"extra_special_tokens\" must be a list of texts",
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
        Tokenizer::from_parts(json.as_bytes(), Some(fixture::CHATML), "<|im_end|>", &[0]).unwrap();
    assert_eq!(tokenizer.stop_ids(), [2, 0]);
    assert_eq!(tokenizer.eos_id(), 2);
    assert!(tokenizer.has_chat_template());
    let error = Tokenizer::from_parts(json.as_bytes(), None, "</s>", &[])
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
        Tokenizer::from_parts(json.to_string().as_bytes(), None, "<|im_end|>", &[]).unwrap();
    assert_eq!(tokenizer.encode("abcd", true).unwrap().len(), 4);
}

#[test]
fn what_the_reader_of_a_tokenizer_panics_at_is_an_error() {
    let json = fixture::parts().to_files().unwrap().tokenizer_json;
    let error = |json: &Value| {
        let read = Tokenizer::from_parts(json.to_string().as_bytes(), None, "<|im_end|>", &[]);
        read.unwrap_err().to_string()
    };
    let mut charsmap = json.clone();
    charsmap["normalizer"] =
        serde_json::json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"});
    let mut merges = json;
    merges["model"]["continuing_subword_prefix"] = "##".into();
    for json in [charsmap, merges] {
        let error = error(&json);
        assert!(
            error.contains("is not a tokenizer this program can read"),
            "{error}"
        );
    }
}

#[test]
fn a_dropout_is_off() {
    let mut json = fixture::parts().to_files().unwrap().tokenizer_json;
    json["model"]["dropout"] = 0.9.into();
    let tokenizer = Tokenizer::from_parts(json.to_string().as_bytes(), None, "<|im_end|>", &[]);
    let hello = fixture::tokenizer().encode("hello hello", false).unwrap();
    for _ in 0..10 {
        assert_eq!(
            tokenizer
                .as_ref()
                .unwrap()
                .encode("hello hello", false)
                .unwrap(),
            hello
        );
    }
}

/// A folder of BERT without a tokenizer.json.
fn word_pieces(config: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let pieces = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\nworld\n##s\n,\nh\n";
    fs::write(folder.path().join("vocab.txt"), pieces).unwrap();
    fs::write(
        folder.path().join("config.json"),
        r#"{"model_type": "bert"}"#,
    )
    .unwrap();
    fs::write(
        folder.path().join("tokenizer_config.json"),
        config.to_string(),
    )
    .unwrap();
    folder
}

#[test]
fn encoders_put_their_tokens_around_texts_and_pairs() {
    let folder = word_pieces(&serde_json::json!({}));
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    let one = tokenizer
        .encode_classified("Hello, worlds", None, 64)
        .unwrap();
    assert_eq!(one.ids, [2, 5, 8, 6, 7, 3]);
    assert!(one.token_types.is_empty());
    assert_eq!(one.offsets[1..5], [(0, 5), (5, 6), (7, 12), (12, 13)]);
    assert_eq!((one.truncated, one.added), (0, 2));
    let pair = |length| {
        tokenizer
            .encode_classified("hello hello hello", Some("world"), length)
            .unwrap()
    };
    assert_eq!(pair(64).ids, [2, 5, 5, 5, 3, 6, 3]);
    assert_eq!(pair(64).token_types, [0, 0, 0, 0, 0, 1, 1]);
    // The longer text is cut, and what stands around the texts is kept.
    assert_eq!(pair(5).ids, [2, 5, 3, 6, 3]);
    assert_eq!(pair(5).truncated, 2);
    let words = tokenizer
        .encode_words(&["hello", "", "worlds"], 64)
        .unwrap();
    assert_eq!(words.ids, [2, 5, 6, 7, 3]);
    assert_eq!(words.words, [None, Some(0), Some(2), Some(2), None]);
    // An encoder names no end of an answer.
    assert_eq!(tokenizer.eos_id(), 3);
}

#[test]
fn a_length_that_leaves_no_room_for_a_text_is_an_error() {
    let folder = word_pieces(&serde_json::json!({}));
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    let error = |length, pair| {
        let encoded = tokenizer.encode_classified("hello", pair, length);
        encoded.unwrap_err().to_string()
    };
    assert!(error(2, None).contains(
        "max_seq_length is 2, which leaves no room for a text: the tokenizer puts 2 tokens"
    ));
    assert!(error(3, Some("world")).contains("puts 3 tokens around it; set max_seq_length higher"));
    assert!(tokenizer.encode_classified("hello", None, 3).is_ok());
}

#[test]
fn what_a_decoder_reads_to_classify_is_the_text() {
    let tokenizer = fixture::tokenizer();
    let one = tokenizer.encode_classified("hello", None, 64).unwrap();
    assert_eq!(one.ids, tokenizer.encode("hello", false).unwrap());
    let pair = tokenizer
        .encode_classified("hello", Some(" hello"), 64)
        .unwrap();
    assert_eq!(pair.ids, tokenizer.encode("hello hello", false).unwrap());
    assert!(pair.token_types.is_empty());
    let with = fixture::with_bos();
    let ids = with.encode_classified("hello", None, 64).unwrap().ids;
    assert_eq!(ids, with.encode("hello", true).unwrap());
    let error = || {
        let mut limited = fixture::tokenizer();
        limited.limit(100);
        let encoded = limited.encode_classified("\u{ff}", None, 64);
        encoded.unwrap_err().to_string()
    };
    assert!(error().contains("the model's embedding has 100 rows"));
}

#[test]
fn files_of_older_tokenizers_that_do_not_fit_are_named() {
    let folder = word_pieces(&serde_json::json!({"cls_token": null}));
    let path = folder.path();
    assert!(error_of(path).contains("cls_token is null in tokenizer_config.json"));
    fs::write(path.join("tokenizer_config.json"), "{}").unwrap();
    fs::write(path.join("vocab.txt"), "").unwrap();
    assert!(error_of(path).contains("vocab.txt: is empty"));
    // The class is not known, so neither is what stands around a text.
    fs::write(path.join("config.json"), "{}").unwrap();
    assert!(error_of(path).contains("only vocab.txt is there: save the tokenizer"));
    fs::remove_file(path.join("vocab.txt")).unwrap();
    fs::write(path.join("config.json"), r#"{"model_type": "roberta"}"#).unwrap();
    fs::write(path.join("vocab.json"), "[]").unwrap();
    assert!(error_of(path).contains("vocab.json: must be an object of ids by token"));
    fs::write(path.join("vocab.json"), r#"{"a": 0}"#).unwrap();
    assert!(error_of(path).contains("is there without merges.txt"));
    fs::write(path.join("merges.txt"), "#version: 0.2\na b c\n").unwrap();
    assert!(error_of(path).contains("merges.txt: line 2 must be two tokens"));
    fs::write(path.join("merges.txt"), "#version: 0.2\na b\n").unwrap();
    assert!(error_of(path).contains("is not a tokenizer this program can read"));
    let flags = r#"{"tokenizer_class": "GPT2Tokenizer", "add_bos_token": true}"#;
    fs::write(path.join("tokenizer_config.json"), flags).unwrap();
    assert!(error_of(path).contains("which is not read without a tokenizer.json"));
    fs::remove_file(path.join("vocab.json")).unwrap();
    fs::write(path.join("sentencepiece.bpe.model"), "").unwrap();
    assert!(error_of(path).contains("only sentencepiece.bpe.model is there: save the tokenizer"));
    let class = r#"{"tokenizer_class": "XLMRobertaTokenizer"}"#;
    fs::write(path.join("tokenizer_config.json"), class).unwrap();
    assert!(error_of(path).contains("sentencepiece.bpe.model: is no SentencePiece model"));
    // A class that needs another vocabulary than the one that is there.
    fixture::write(&fixture::parts(), path);
    let class = r#"{"tokenizer_class": "BertTokenizer"}"#;
    fs::write(path.join("tokenizer_config.json"), class).unwrap();
    assert!(
        error_of(path).contains("with the class BertTokenizer, which needs a WordPiece vocabulary")
    );
}
