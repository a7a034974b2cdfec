//! A small model with random weights, small data, and the program.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use lowrank::base::BUILTIN_FILES;
use serde_json::Value;
use tempfile::TempDir;

/// The program, with nothing from the environment that changes what it prints.
pub(crate) fn lowrank() -> Command {
    let mut command =
        Command::cargo_bin("lowrank").expect("cargo builds the program for its tests");
    command.env_remove("RUST_LOG").env_remove("CLICOLOR_FORCE");
    command
}

/// Standard error of a command that is expected to exit with `code` and to print nothing on standard output.
pub(crate) fn stderr_of(args: &[&str], code: i32) -> String {
    let assert = lowrank().args(args).assert().code(code).stdout("");
    String::from_utf8(assert.get_output().stderr.clone()).expect("messages are UTF-8")
}

/// The one JSON object that a command prints with `--json`.
pub(crate) fn json_of(args: &[&str]) -> Value {
    let assert = lowrank().args(args).arg("--json").assert().success();
    serde_json::from_slice(&assert.get_output().stdout).expect("standard output is one JSON value")
}

/// Writes a file and gives its path as an argument.
pub(crate) fn write(folder: &Path, name: &str, content: impl AsRef<[u8]>) -> String {
    let path = folder.join(name);
    std::fs::write(&path, content).expect("a temporary folder can be written");
    path.display().to_string()
}

/// A folder with a model, `model`, and data, `data`.
pub(crate) struct Lab {
    folder: TempDir,
}

const VOCABULARY: usize = 2048;
const HIDDEN: usize = 16;
const INTERMEDIATE: usize = 32;
const LAYERS: usize = 2;

impl Lab {
    /// The built-in model's tokenizer with a llama of two narrow layers, and forty rows of which eight are held out.
    pub(crate) fn new() -> Self {
        let lab = Self {
            folder: tempfile::tempdir().expect("there is room for a temporary folder"),
        };
        let model = lab.path("model");
        std::fs::create_dir_all(&model).expect("a folder can be made");
        std::fs::create_dir_all(lab.path("data")).expect("a folder can be made");
        for (name, bytes) in BUILTIN_FILES
            .iter()
            .filter(|(name, _)| *name != "model.safetensors")
        {
            write(&model, name, bytes);
        }
        write(&model, "config.json", config(HIDDEN).to_string());
        write(&model, "model.safetensors", safetensors(&tensors(HIDDEN)));
        let row = |number: usize| {
            let (prompt, completion) = (
                format!("Number {number} is"),
                format!(" {}.", ["odd", "even"][number % 2]),
            );
            serde_json::json!({"prompt": prompt, "completion": completion}).to_string() + "\n"
        };
        write(
            &lab.path("data"),
            "train.jsonl",
            (0..32).map(row).collect::<String>(),
        );
        write(
            &lab.path("data"),
            "valid.jsonl",
            (32..40).map(row).collect::<String>(),
        );
        lab
    }

    /// A path in the folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The same as an argument.
    pub(crate) fn arg(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// The arguments of a short training into `output`, with more behind them.
    pub(crate) fn train(&self, output: &str, more: &[&str]) -> Vec<String> {
        let mut args: Vec<String> = ["train", "--model"].map(String::from).to_vec();
        args.extend([
            self.arg("model"),
            "--data".into(),
            self.arg("data"),
            "--output".into(),
            self.arg(output),
        ]);
        args.extend(["--max-steps", "6", "--threads", "1"].map(String::from));
        args.extend(more.iter().map(ToString::to_string));
        args
    }
}

/// Borrowed arguments.
pub(crate) fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// A config.json of a llama with this hidden size.
pub(crate) fn config(hidden: usize) -> Value {
    serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
        "hidden_size": hidden, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": hidden / 2, "vocab_size": VOCABULARY,
        "max_position_embeddings": 128, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "bos_token_id": null, "eos_token_id": 0
    })
}

/// The tensors of that llama: names and shapes.
pub(crate) fn tensors(hidden: usize) -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        (
            "model.embed_tokens.weight".to_string(),
            vec![VOCABULARY, hidden],
        ),
        ("model.norm.weight".to_string(), vec![hidden]),
    ];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![hidden, hidden]),
            ("self_attn.k_proj", vec![hidden / 2, hidden]),
            ("self_attn.v_proj", vec![hidden / 2, hidden]),
            ("self_attn.o_proj", vec![hidden, hidden]),
            ("mlp.gate_proj", vec![INTERMEDIATE, hidden]),
            ("mlp.up_proj", vec![INTERMEDIATE, hidden]),
            ("mlp.down_proj", vec![hidden, INTERMEDIATE]),
        ] {
            all.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    all
}

/// A safetensors file of f32: ones for vectors, small repeatable noise for matrices.
pub(crate) fn safetensors(tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut values = Vec::new();
    let mut state = 1u32;
    for (name, shape) in tensors {
        let start = values.len();
        for _ in 0..shape.iter().product() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let noise = (state >> 8) as f32 / (1 << 24) as f32 - 0.5;
            let value: f32 = if shape.len() == 1 { 1.0 } else { 0.4 * noise };
            values.extend(value.to_le_bytes());
        }
        let entry = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [start, values.len()]});
        header.insert(name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        &values,
    ]
    .concat()
}
