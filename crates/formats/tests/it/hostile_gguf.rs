//! GGUF files that are cut, contradict themselves or mean harm.

use std::fs;

use lowrank_formats::FormatError;
use lowrank_formats::checkpoint::StoredDType;
use lowrank_formats::gguf::Gguf;
use lowrank_formats::gguf_model::{hf_config_json, weights};
use proptest::prelude::*;

use crate::golden;

/// Builds a file by hand, so that any number in it can be a lie.
#[derive(Clone, Default)]
struct Builder {
    tensors: u64,
    keys: u64,
    key_bytes: Vec<u8>,
    info_bytes: Vec<u8>,
    data: Vec<u8>,
}

fn text(bytes: &mut Vec<u8>, text: &[u8]) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text);
}

impl Builder {
    fn key(mut self, key: &str, kind: u32, value: &[u8]) -> Builder {
        self.keys += 1;
        text(&mut self.key_bytes, key.as_bytes());
        self.key_bytes.extend(kind.to_le_bytes());
        self.key_bytes.extend(value);
        self
    }

    fn string(self, key: &str, value: &str) -> Builder {
        let mut bytes = Vec::new();
        text(&mut bytes, value.as_bytes());
        self.key(key, 8, &bytes)
    }

    fn u32(self, key: &str, value: u32) -> Builder {
        self.key(key, 4, &value.to_le_bytes())
    }

    fn tensor(mut self, name: &str, shape: &[u64], kind: u32, offset: u64) -> Builder {
        self.tensors += 1;
        text(&mut self.info_bytes, name.as_bytes());
        self.info_bytes.extend((shape.len() as u32).to_le_bytes());
        self.info_bytes
            .extend(shape.iter().flat_map(|d| d.to_le_bytes()));
        self.info_bytes.extend(kind.to_le_bytes());
        self.info_bytes.extend(offset.to_le_bytes());
        self
    }

    fn data(mut self, length: usize) -> Builder {
        self.data = vec![0; length];
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(self.tensors.to_le_bytes());
        bytes.extend(self.keys.to_le_bytes());
        bytes.extend(&self.key_bytes);
        bytes.extend(&self.info_bytes);
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(&self.data);
        bytes
    }
}

fn open_bytes(bytes: &[u8]) -> Result<Gguf, FormatError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    Gguf::open(&path)
}

/// Opening fails, and the message names the file and every one of `words`.
fn assert_refused(bytes: &[u8], words: &[&str]) {
    let message = open_bytes(bytes).expect_err("must be refused").to_string();
    for word in words.iter().chain(&["model.gguf"]) {
        assert!(message.contains(word), "{message:?} does not say {word:?}");
    }
}

#[test]
fn an_honest_file_is_read() {
    let bytes = Builder::default()
        .string("general.architecture", "llama")
        .tensor("a", &[4, 2], 0, 0)
        .tensor("none", &[0], 0, 32)
        .tensor("b", &[32], 8, 32)
        .data(66)
        .bytes();
    let gguf = open_bytes(&bytes).unwrap();
    assert_eq!(gguf.tensor("a").unwrap().shape, [2, 4]);
    assert_eq!(gguf.tensor("b").unwrap().bytes.as_ref().len(), 34);
    assert!(gguf.tensor("none").unwrap().bytes.as_ref().is_empty());
}

#[test]
fn lies_are_refused_by_name() {
    let empty = Builder::default();
    assert_refused(b"", &["is empty"]);
    assert_refused(b"GGML\x03\0\0\0", &["not a GGUF file"]);
    assert_refused(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        &["a Git LFS pointer, not GGUF", "git lfs pull"],
    );
    assert_refused(b"GGUF\x01\0\0\0", &["version 1"]);
    assert_refused(b"GGUF\0\0\0\x03", &["big-endian"]);
    for (tensors, keys) in [
        (u64::MAX, 0),
        (0, u64::MAX),
        (1000, 0),
        (0, 1000),
        (1 << 61, 1 << 61),
    ] {
        let liar = Builder {
            tensors,
            keys,
            ..empty.clone()
        };
        assert!(open_bytes(&liar.bytes()).is_err());
    }
    let array = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    for (kind, value) in [
        (8, u64::MAX.to_le_bytes().to_vec()),
        (8, [&1u64.to_le_bytes()[..], &[0xff]].concat()),
        (13, vec![0; 8]),
        (u32::MAX, vec![0; 8]),
        (7, vec![2]),
        (9, array(0, u64::MAX)),
        (9, array(8, 1 << 40)),
        (9, array(12, 1 << 61)),
        (9, array(9, 1)),
        (9, array(99, 0)),
    ] {
        assert_refused(&empty.clone().key("liar", kind, &value).bytes(), &["liar"]);
    }
    assert_refused(
        &empty.clone().u32("liar", 1).u32("liar", 1).bytes(),
        &["liar", "twice"],
    );
    for alignment in [0, 3, 48, 1 << 31] {
        let file = empty
            .clone()
            .u32("general.alignment", alignment)
            .tensor("a", &[1], 0, 0)
            .data(64);
        assert_refused(&file.bytes(), &["general.alignment"]);
    }
    assert_refused(
        &empty.clone().string("general.alignment", "32").bytes(),
        &["general.alignment"],
    );
    for (shape, kind, offset) in [
        (&[1, 1, 1, 1, 1][..], 0, 0),
        (&[1], 4, 0),
        (&[1], 1000, 0),
        (&[u64::MAX], 0, 0),
        (&[u64::MAX, u64::MAX], 0, 0),
        (&[1 << 62], 24, 0),
        (&[33], 2, 0),
        (&[128], 12, 0),
        (&[1], 0, 4),
        (&[1], 0, 64),
        (&[17], 0, 0),
        (&[1], 0, u64::MAX - 31),
    ] {
        let file = empty.clone().tensor("liar", shape, kind, offset).data(64);
        assert_refused(&file.bytes(), &["liar"]);
    }
    let twice = empty
        .clone()
        .tensor("liar", &[1], 0, 0)
        .tensor("liar", &[1], 0, 32)
        .data(64);
    assert_refused(&twice.bytes(), &["liar", "twice"]);
    for (first, second) in [(0, 32), (32, 0)] {
        let overlap = empty
            .clone()
            .tensor("one", &[if first == 0 { 16 } else { 1 }], 0, first)
            .tensor("two", &[if second == 0 { 16 } else { 1 }], 0, second)
            .data(64);
        assert_refused(&overlap.bytes(), &["one", "two", "overlap"]);
    }
    // The same bytes through two names.
    assert_refused(
        &empty
            .tensor("one", &[4], 0, 0)
            .tensor("two", &[4], 0, 0)
            .data(64)
            .bytes(),
        &["one", "two"],
    );
}

#[test]
fn impossible_metadata_do_not_import() {
    let refused = |file: Builder, word: &str| {
        let gguf = open_bytes(&file.bytes()).unwrap();
        let message = hf_config_json(&gguf, StoredDType::F32)
            .unwrap_err()
            .to_string();
        assert!(message.contains(word), "{message:?} does not say {word:?}");
    };
    refused(Builder::default(), "general.architecture");
    let mut file = Builder::default().string("general.architecture", "llama");
    refused(
        file.clone().string("general.type", "adapter"),
        "general.type` is \"adapter\"",
    );
    refused(
        file.clone().u32("llama.block_count", 0),
        "llama.block_count` is 0",
    );
    refused(
        file.clone().u32("llama.block_count", u32::MAX),
        "llama.block_count",
    );
    for key in [
        "block_count",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
    ] {
        refused(file.clone(), &format!("llama.{key}` is missing"));
        file = file.u32(&format!("llama.{key}"), 8);
    }
    refused(
        file.clone().u32("llama.attention.head_count_kv", 3),
        "head_count_kv",
    );
    refused(file.clone(), "key_length");
    let file = file.u32("llama.attention.key_length", 4);
    refused(file.clone(), "token_embd.weight");
    refused(
        file.clone().u32("llama.rope.dimension_count", 2),
        "rope.dimension_count",
    );
    let file = file
        .tensor("token_embd.weight", &[8, 1], 0, 0)
        .data(32)
        .u32("llama.context_length", 64);
    refused(file.clone(), "layer_norm_rms_epsilon");
    let nan = f32::NAN.to_le_bytes();
    refused(
        file.clone()
            .key("llama.attention.layer_norm_rms_epsilon", 6, &nan),
        "NaN",
    );
    let file = file.key(
        "llama.attention.layer_norm_rms_epsilon",
        6,
        &1e-5f32.to_le_bytes(),
    );
    refused(
        file.clone()
            .string("llama.rope.scaling.type", "longrope")
            .u32("llama.rope.scaling.factor", 4),
        "longrope",
    );
    refused(
        file.clone().u32("llama.rope.scaling.type", 1),
        "llama.rope.scaling.type` is 1; accepted: a text",
    );
    refused(
        file.clone().u32("llama.expert_count", 8),
        "`llama.expert_count` is 8",
    );
    refused(
        file.clone().u32("llama.trick", 1).u32("llama.clever", 2),
        "`llama.clever` is 2, and what that means for LlamaForCausalLM is not known here",
    );
    // What a key says to be absent needs no understanding.
    for file in [file.clone().u32("llama.expert_count", 0), file] {
        assert!(hf_config_json(&open_bytes(&file.bytes()).unwrap(), StoredDType::F32).is_ok());
    }
}

/// A file of an architecture with all keys that every one of them needs.
fn complete(architecture: &str) -> Builder {
    let mut file = Builder::default().string("general.architecture", architecture);
    for key in [
        "block_count",
        "embedding_length",
        "feed_forward_length",
        "context_length",
    ] {
        file = file.u32(&format!("{architecture}.{key}"), 8);
    }
    let eps = format!("{architecture}.attention.layer_norm_rms_epsilon");
    file.u32(&format!("{architecture}.attention.head_count"), 2)
        .key(&eps, 6, &1e-5f32.to_le_bytes())
        .tensor("token_embd.weight", &[8, 1], 0, 0)
        .data(32)
}

fn config(file: &Builder) -> Result<serde_json::Value, FormatError> {
    hf_config_json(&open_bytes(&file.bytes()).unwrap(), StoredDType::F32)
}

#[test]
fn a_key_that_is_not_understood_is_named_in_every_architecture() {
    for architecture in [
        "llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "granite", "smollm3", "olmo2",
        "glm4", "mistral3",
    ] {
        let file = complete(architecture);
        assert!(config(&file).is_ok(), "{architecture}");
        let message = config(&file.u32(&format!("{architecture}.trick"), 1))
            .unwrap_err()
            .to_string();
        assert!(
            message.contains(&format!("`{architecture}.trick` is 1")),
            "{message}"
        );
    }
    // Keys of parts that this model does not have, and one number a layer.
    let counts: Vec<u8> = [2u32; 8].iter().flat_map(|n| n.to_le_bytes()).collect();
    let counts = [&4u32.to_le_bytes()[..], &8u64.to_le_bytes(), &counts].concat();
    let file = complete("granite")
        .u32("granite.ssm.conv_kernel", 4)
        .u32("granite.expert_shared_feed_forward_length", 8)
        .key("granite.attention.head_count_kv", 9, &counts);
    assert_eq!(config(&file).unwrap()["num_key_value_heads"], 2);
}

#[test]
fn keys_that_only_some_architectures_have_are_checked() {
    let array = |kind: u32, values: &[u8]| {
        [
            &kind.to_le_bytes()[..],
            &(values.len() as u64).to_le_bytes(),
            values,
        ]
        .concat()
    };
    let minus = (-1.0f32).to_le_bytes();
    for (file, word) in [
        (
            complete("phi3").u32("phi3.rope.dimension_count", 3),
            "an even number up to 4",
        ),
        (
            complete("phi3").u32("phi3.rope.dimension_count", 6),
            "an even number up to 4",
        ),
        (
            complete("phi3").u32("phi3.attention.key_length", 6),
            "embedding_length / attention.head_count",
        ),
        (
            complete("qwen2").u32("qwen2.rope.dimension_count", 2),
            "rope.dimension_count",
        ),
        (
            complete("granite").key("granite.residual_scale", 6, &minus),
            "residual_scale",
        ),
        (
            complete("gemma2").key("gemma2.attn_logit_softcapping", 6, &minus),
            "attn_logit_softcapping",
        ),
        (
            complete("gemma3").key("gemma3.rope.freq_base_swa", 6, &minus),
            "rope.freq_base_swa",
        ),
        (
            complete("gemma3").string("gemma3.attention.sliding_window", "wide"),
            "sliding_window",
        ),
        (
            // Seven truths for eight layers.
            complete("gemma3").key(
                "gemma3.attention.sliding_window_pattern",
                9,
                &array(7, &[1; 7]),
            ),
            "8 times true or false",
        ),
        (
            complete("olmo2").u32("olmo2.attention.sliding_window_pattern", 3),
            "sliding_window_pattern",
        ),
        (
            complete("mistral3").u32("mistral3.attention.temperature_scale", 1),
            "\"yarn\"",
        ),
        // Llama has no window.
        (
            complete("llama").u32("llama.attention.sliding_window", 8),
            "llama.attention.sliding_window",
        ),
        (
            complete("gemma2").u32("gemma2.ssm.conv_kernel", 4),
            "`gemma2.ssm.conv_kernel` is 4",
        ),
        (
            complete("qwen2").key(
                "qwen2.attention.head_count_kv",
                9,
                &[
                    &4u32.to_le_bytes()[..],
                    &2u64.to_le_bytes(),
                    &1u32.to_le_bytes(),
                    &2u32.to_le_bytes(),
                ]
                .concat(),
            ),
            "qwen2.attention.head_count_kv` is an array of 2 elements",
        ),
        (
            complete("qwen2")
                .string("qwen2.rope.scaling.type", "yarn")
                .u32("qwen2.rope.scaling.factor", 4)
                .u32("qwen2.rope.scaling.yarn_ext_factor", 2),
            "yarn_ext_factor",
        ),
        (
            complete("qwen2")
                .string("qwen2.rope.scaling.type", "yarn")
                .u32("qwen2.rope.scaling.factor", 1),
            "qwen2.rope.scaling.type",
        ),
    ] {
        let message = config(&file).expect_err(word).to_string();
        assert!(message.contains(word), "{message:?} does not say {word:?}");
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = fs::read(golden("llama.gguf")).unwrap();
    // Every place in keys and infos, then every hundredth in the data.
    let data = bytes.len() - 17_000;
    for length in (0..data).step_by(7).chain((data..bytes.len()).step_by(101)) {
        assert!(
            open_bytes(&bytes[..length]).is_err(),
            "cut to {length} bytes"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_bytes_never_panic(rest in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(rest);
        let _ = open_bytes(&bytes);
    }

    #[test]
    fn a_damaged_file_never_panics(at in 0usize..6000, byte in any::<u8>()) {
        let mut bytes = fs::read(golden("llama.gguf")).unwrap();
        bytes[at] = byte;
        if let Ok(gguf) = open_bytes(&bytes) {
            for tensor in gguf.tensors() {
                let blocks = tensor.bytes.as_ref().len() / tensor.kind.block_bytes();
                prop_assert_eq!(blocks * tensor.kind.block_len(), tensor.len());
            }
            let _ = hf_config_json(&gguf, StoredDType::F32);
            let _ = weights(&gguf);
        }
    }
}
