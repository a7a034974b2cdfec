//! A tokenizer small enough to read, for tests: the 256 bytes, six merges and four special tokens.

use std::path::Path;

use serde_json::json;

use super::Tokenizer;
use super::gguf_tokenizer::GgufTokenizerParts;
use super::tokenizer::printable_bytes;

/// ChatML, with a system message if none is given.
pub(crate) const CHATML: &str = "{% for message in messages %}\
    {% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}\
    {{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Bytes in GPT-2's alphabet and a few words, with ChatML's tokens; nothing is added to a text.
pub(crate) fn parts() -> GgufTokenizerParts {
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"];
    let mut tokens: Vec<String> = special.iter().map(|token| (*token).to_owned()).collect();
    tokens.extend(
        printable_bytes()
            .iter()
            .filter_map(|code| char::from_u32(*code))
            .map(String::from),
    );
    let merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ Ġ"];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let token_types = (0..tokens.len())
        .map(|id| if id < special.len() { 3 } else { 1 })
        .collect();
    GgufTokenizerParts {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens,
        token_types,
        merges: merges.iter().map(|merge| (*merge).to_owned()).collect(),
        bos_id: Some(3),
        eos_id: Some(2),
        chat_template: Some(CHATML.into()),
        ..GgufTokenizerParts::default()
    }
}

/// Writes the files of a tokenizer into a folder.
pub(crate) fn write(parts: &GgufTokenizerParts, folder: &Path) {
    let files = parts.to_files().unwrap();
    std::fs::write(
        folder.join("tokenizer.json"),
        files.tokenizer_json.to_string(),
    )
    .unwrap();
    std::fs::write(
        folder.join("tokenizer_config.json"),
        files.tokenizer_config.to_string(),
    )
    .unwrap();
    if let Some(template) = files.chat_template {
        std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
    }
}

pub(crate) fn build(parts: &GgufTokenizerParts) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    write(parts, folder.path());
    Tokenizer::from_folder(folder.path()).unwrap()
}

pub(crate) fn tokenizer() -> Tokenizer {
    build(&parts())
}

/// The same with another chat template, or none.
pub(crate) fn with_template(template: Option<&str>) -> Tokenizer {
    build(&GgufTokenizerParts {
        chat_template: template.map(str::to_owned),
        ..parts()
    })
}

/// The same, putting `<s>` in front of every text.
pub(crate) fn with_bos() -> Tokenizer {
    build(&GgufTokenizerParts {
        add_bos: Some(true),
        ..parts()
    })
}

/// `▁`-words with bytes as a last resort, as in Llama 2: the normalizer puts a space in front, the decoder drops it.
/// The words have the ids 3 to 6, byte b has 7 + b.
pub(crate) fn sentence_piece() -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    for token in ["<unk>", "<s>", "</s>", "▁Hello", "▁you", "▁", "!"] {
        vocab.insert(token.into(), vocab.len().into());
    }
    for byte in 0..=255_u8 {
        vocab.insert(format!("<0x{byte:02X}>"), vocab.len().into());
    }
    let mut merges = Vec::new();
    for word in ["▁Hello", "▁you"] {
        let mut left = "▁".to_owned();
        for letter in word.chars().skip(1) {
            merges.push(json!([left, letter]));
            left.push(letter);
            for token in [letter.to_string(), left.clone()] {
                let next = vocab.len();
                vocab.entry(token).or_insert_with(|| next.into());
            }
        }
    }
    let special = |id: u32, text: &str| {
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true})
    };
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": merges},
    });
    let template = "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}\
        {% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}";
    Tokenizer::from_parts(json.to_string().as_bytes(), Some(template), "</s>", &[]).unwrap()
}
