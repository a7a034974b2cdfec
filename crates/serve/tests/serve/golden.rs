//! What the server says of adapters that PEFT wrote, beside what PEFT computes with them.

use std::fs;
use std::path::{Path, PathBuf};

use lowrank::DType;
use lowrank::base::{Checkpoint, Source};
use lowrank_serve::Options;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::house::{BASE, House, load};

/// Adapters of the golden Llama.
const ADAPTERS: [&str; 5] = ["all_linear", "patterns", "ia3", "prefix", "prompt"];

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../lowrank/tests/goldens/llama")
}

/// The golden model with a tokenizer of a character a token.
fn model() -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(goldens().join(name), folder.path().join(name)).expect("the golden model");
    }
    let special = ["<unk>", "<s>", "</s>"];
    let letters = (b' '..=b'}').map(|letter| char::from(letter).to_string());
    let vocab: serde_json::Map<String, Value> = special
        .iter()
        .map(ToString::to_string)
        .chain(letters)
        .zip(0..)
        .map(|(token, id): (String, u32)| (token, id.into()))
        .collect();
    let added: Vec<Value> = (0..3)
        .map(|id| {
            json!({"id": id, "content": special[id], "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []},
    });
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).expect("a tokenizer");
    let config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"});
    fs::write(
        folder.path().join("tokenizer_config.json"),
        config.to_string(),
    )
    .expect("its config");
    folder
}

/// The logarithms of the probabilities of `ids`, but the first, from logits [T, V].
fn log_probs(logits: &[f32], ids: &[u32]) -> Vec<f64> {
    let width = logits.len() / ids.len();
    let rows = logits.chunks(width).zip(&ids[1..]);
    rows.map(|(row, id)| {
        let top = row.iter().fold(f32::NEG_INFINITY, |top, x| top.max(*x));
        let sum: f64 = row.iter().map(|x| f64::from(x - top).exp()).sum();
        f64::from(row[*id as usize] - top) - sum.ln()
    })
    .collect()
}

#[test]
fn answers_are_pefts() {
    let model = model();
    let base = load(Source::Folder(model.path().to_owned()), DType::F32);
    let mut options = Options::new(BASE);
    options.adapters = ADAPTERS
        .map(|name| (name.to_owned(), goldens().join(name)))
        .into();
    let house = House::start(base, options).unwrap_or_else(|error| panic!("{error}"));
    let of_base = Checkpoint::open(&goldens().join("golden.safetensors")).expect("the golden");
    let ids_of = |file: &Checkpoint, name: &str| -> Vec<u32> {
        let bytes = file.get(name).expect(name).bytes.as_ref().to_vec();
        bytes
            .chunks(4)
            .map(|word| u32::from_le_bytes(word.try_into().expect("four")))
            .collect()
    };
    for name in ADAPTERS.into_iter().chain([BASE]) {
        let folder = if name == BASE {
            goldens()
        } else {
            goldens().join(name)
        };
        let golden = Checkpoint::open(&folder.join("golden.safetensors")).expect("the golden");
        for at in 0..3 {
            let ids = ids_of(&of_base, &format!("ids.{at}"));
            let logits = golden
                .get(&format!("logits.{at}"))
                .expect("logits")
                .to_f32()
                .expect("numbers");
            let ask =
                json!({"model": name, "prompt": ids, "echo": true, "logprobs": 1, "max_tokens": 0});
            let answer = house.client.post("/v1/completions", &ask).ok();
            let found = answer["choices"][0]["logprobs"]["token_logprobs"]
                .as_array()
                .expect("a list")
                .clone();
            let expected = log_probs(&logits, &ids);
            assert_eq!((found.len(), &found[0]), (ids.len(), &Value::Null));
            for (found, expected) in found[1..].iter().zip(expected) {
                let found = found.as_f64().expect("a number");
                assert!(
                    (found - expected).abs() < 2e-4,
                    "{name} {at}: {found} in place of {expected}"
                );
            }
            let Some(_) = golden.get(&format!("greedy.{at}")) else {
                continue;
            };
            let greedy = ids_of(&golden, &format!("greedy.{at}"));
            let ask = json!({"model": name, "prompt": ids, "logprobs": 0, "temperature": 0, "max_tokens": greedy.len()});
            let answer = house.client.post("/v1/completions", &ask).ok();
            let tokens = answer["choices"][0]["logprobs"]["tokens"]
                .as_array()
                .expect("a list")
                .clone();
            let expected: Vec<Value> = greedy
                .iter()
                .take_while(|id| **id != 2)
                .map(|id| match id {
                    0 => json!("<unk>"),
                    1 => json!("<s>"),
                    id => json!(char::from(b' ' + (*id as u8 - 3)).to_string()),
                })
                .collect();
            assert_eq!(tokens, expected, "{name} {at}");
        }
    }
}
