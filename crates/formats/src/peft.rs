//! PEFT's LoRA adapters: `adapter_config.json`, which modules it targets, and the names of the tensors.
//!
//! The file is read as PEFT reads it and refused where it asks for something that is not done here. A key that holds
//! PEFT's default, or that is null, false or empty, asks for nothing and is fine, known or not. It is written with every
//! key of PEFT 0.21, sorted, indented by two, so that PEFT loads the folder without a warning.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::checkpoint::Checkpoint;
use crate::folders::{MLX, foreign_lora, instead_of_adapter, instead_of_adapter_weights};
use crate::hf_config::HfConfig;
use crate::json::read_object;
use crate::{FormatError, atomic};

mod prompt;
mod read;
mod target;
mod tokens;

pub use prompt::{PROMPT_EMBEDDINGS, PromptConfig, PromptKind, join_prefix, split_prefix};
pub use read::is_inactive;
pub use target::{
    LoraPart, ModuleNames, NamePattern, TargetModules, lora_key, magnitude_key, parse_lora_key,
    parse_magnitude_key,
};
pub use tokens::{TOKEN_ROWS, TokenIndices};

/// The name of the configuration in an adapter's folder.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The name of the weights in an adapter's folder.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// Metadata key of the weights that this program writes: a hash of the base that the adapter was trained on.
pub const BASE_FINGERPRINT: &str = "lowrank.base_fingerprint";
/// Metadata key of the weights that this program writes: what the outputs of a classifier mean, as JSON.
pub const LABELS: &str = "lowrank.labels";
/// Metadata key of the weights that this program writes: JSON, the parts of fused linears and their ranks by module.
pub const FUSED_PARTS: &str = "lowrank.fused_parts";

/// A configuration is a few kilobytes; one that lists every module of a large model, a few hundred.
const FILE_CAP: u64 = 16 << 20;
/// The version whose keys are written.
const PEFT_VERSION: &str = "0.21.2";

/// PEFT's `LoraConfig`, as far as it is supported. [`Default`] gives PEFT's defaults with no target.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of the file")]
pub struct LoraConfig {
    /// Rank of the update, at least one.
    pub r: usize,
    /// Numerator of the scale.
    pub lora_alpha: f64,
    /// Probability of dropping an input of `lora_A`, in [0, 1).
    pub lora_dropout: f64,
    /// Which modules are adapted.
    pub target_modules: TargetModules,
    /// Modules that are not adapted though `target_modules` matches them.
    pub exclude_modules: Option<ModuleNames>,
    /// Whether the base stores weights as [in, out], as GPT-2's Conv1D does.
    pub fan_in_fan_out: bool,
    /// Scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`.
    pub use_rslora: bool,
    /// Each module also has a magnitude for every output (DoRA).
    pub use_dora: bool,
    /// How A and B began: `true`, `false`, `"gaussian"`, …; only a record once an adapter is trained.
    pub init_lora_weights: Value,
    /// Ranks of some modules, by regular expression; the first that matches wins.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of some modules, by regular expression; the first that matches wins.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Only these layers, with a list of target modules.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Names of the lists that layers are counted in; empty: any.
    pub layers_pattern: Vec<String>,
    /// The model that the adapter was trained on.
    pub base_model_name_or_path: Option<String>,
    /// That model's revision.
    pub revision: Option<String>,
    /// `CAUSAL_LM`, `SEQ_CLS`, …
    pub task_type: Option<String>,
    /// Modules that are trained and saved as a whole; PEFT matches them by the end of their names.
    pub modules_to_save: Vec<String>,
    /// Tokens whose rows of the embedding are the adapter's own.
    pub trainable_token_indices: Option<TokenIndices>,
    /// Whether PEFT freezes the adapter when it loads it.
    pub inference_mode: bool,
    /// Classes of the base model, where it was not one of transformers' auto classes.
    pub auto_mapping: Option<Value>,
    /// The version of PEFT that wrote the file, or whose keys we write.
    pub peft_version: Option<String>,
}

impl Default for LoraConfig {
    fn default() -> LoraConfig {
        LoraConfig {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: TargetModules::List(Vec::new()),
            exclude_modules: None,
            fan_in_fan_out: false,
            use_rslora: false,
            use_dora: false,
            init_lora_weights: Value::Bool(true),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            base_model_name_or_path: None,
            revision: None,
            task_type: None,
            modules_to_save: Vec::new(),
            trainable_token_indices: None,
            inference_mode: false,
            auto_mapping: None,
            peft_version: None,
        }
    }
}

/// Reads the `adapter_config.json` of any method, unchecked; `path` is the adapter's folder or the file itself.
///
/// # Errors
/// The file is not there, too large, or not a JSON object.
pub fn read_adapter_config(path: &Path) -> Result<HfConfig, FormatError> {
    let file = if path.is_dir() {
        path.join(ADAPTER_CONFIG)
    } else {
        path.to_path_buf()
    };
    let other_file = path.is_file() && path.file_name() != Some(ADAPTER_CONFIG.as_ref());
    if other_file || !file.exists() {
        let instead = instead_of_adapter(path).unwrap_or_else(|| {
            format!("an adapter is a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
        });
        let missing = if other_file { "" } else { "is missing; " };
        return Err(FormatError::Missing {
            path: file,
            problem: format!("{missing}{instead}"),
        });
    }
    let map = read_object(&file, FILE_CAP)?;
    if !map.contains_key("peft_type")
        && (map.contains_key("fine_tune_type") || map.contains_key("lora_parameters"))
    {
        return Err(FormatError::malformed(&file, MLX));
    }
    Ok(HfConfig::from_map(&file, map))
}

/// Opens an adapter's weights; `folder` is the adapter's.
///
/// # Errors
/// The file is not there, which is said with what is there instead, or it is damaged or of another program.
pub fn open_adapter_weights(folder: &Path) -> Result<Checkpoint, FormatError> {
    if folder.is_file() {
        return Err(FormatError::Missing {
            path: folder.to_path_buf(),
            problem: instead_of_adapter(folder).unwrap_or_default(),
        });
    }
    let file = folder.join(ADAPTER_WEIGHTS);
    if !file.exists() {
        return Err(FormatError::Missing {
            path: file,
            problem: format!("is missing; {}", instead_of_adapter_weights(folder)),
        });
    }
    let weights = Checkpoint::open(&file)?;
    match foreign_lora(weights.names()) {
        None => Ok(weights),
        Some(whose) => Err(FormatError::malformed(
            &file,
            format!("these are the weights of {whose}, and adapters are read as PEFT writes them"),
        )),
    }
}

/// Writes `adapter_config.json` into `folder`: indented, keys sorted where the map sorts them.
///
/// # Errors
/// The file cannot be written.
pub fn write_adapter_config(folder: &Path, map: &Map<String, Value>) -> Result<(), FormatError> {
    atomic::write_file(&folder.join(ADAPTER_CONFIG), |out| {
        serde_json::to_writer_pretty(&mut *out, map).map_err(std::io::Error::from)
    })
}

impl LoraConfig {
    /// Reads and checks `adapter_config.json`; `path` is the adapter's folder or the file itself.
    ///
    /// # Errors
    /// The file is not there, not a JSON object, not LoRA's, or asks for something that is not supported. All problems
    /// are listed at once, each with its key and value.
    pub fn read(path: &Path) -> Result<LoraConfig, FormatError> {
        let raw = read_adapter_config(path)?;
        let (file, map) = (raw.path().to_path_buf(), raw.map());
        LoraConfig::from_json(map).map_err(|problems| FormatError::Problems {
            path: file,
            problems,
        })
    }

    /// Checks a parsed `adapter_config.json`.
    ///
    /// # Errors
    /// Every problem, one line each, with its key and value.
    pub fn from_json(map: &Map<String, Value>) -> Result<LoraConfig, Vec<String>> {
        read::read(map)
    }

    /// The JSON object that PEFT would write: every key, sorted. Patterns keep their order, since the first match wins.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut map = read::defaults();
        let ranks: Map<_, _> = self
            .rank_pattern
            .iter()
            .map(|(k, r)| (k.clone(), json!(r)))
            .collect();
        let alphas: Map<_, _> = self
            .alpha_pattern
            .iter()
            .map(|(k, a)| (k.clone(), number(*a)))
            .collect();
        let layers_pattern = match self.layers_pattern.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
        for (key, value) in [
            ("r", json!(self.r)),
            ("lora_alpha", number(self.lora_alpha)),
            ("lora_dropout", json!(self.lora_dropout)),
            ("target_modules", self.target_modules.to_json()),
            (
                "exclude_modules",
                json!(self.exclude_modules.as_ref().map(ModuleNames::to_json)),
            ),
            ("fan_in_fan_out", json!(self.fan_in_fan_out)),
            ("use_rslora", json!(self.use_rslora)),
            ("use_dora", json!(self.use_dora)),
            ("init_lora_weights", self.init_lora_weights.clone()),
            ("rank_pattern", Value::Object(ranks)),
            ("alpha_pattern", Value::Object(alphas)),
            ("layers_to_transform", json!(self.layers_to_transform)),
            ("layers_pattern", layers_pattern),
            (
                "base_model_name_or_path",
                json!(self.base_model_name_or_path),
            ),
            ("revision", json!(self.revision)),
            ("task_type", json!(self.task_type)),
            (
                "modules_to_save",
                match self.modules_to_save.as_slice() {
                    [] => Value::Null,
                    names => json!(names),
                },
            ),
            (
                "trainable_token_indices",
                json!(
                    self.trainable_token_indices
                        .as_ref()
                        .map(TokenIndices::to_json)
                ),
            ),
            ("inference_mode", json!(self.inference_mode)),
            ("auto_mapping", json!(self.auto_mapping)),
            ("peft_type", json!("LORA")),
            (
                "peft_version",
                json!(self.peft_version.as_deref().unwrap_or(PEFT_VERSION)),
            ),
        ] {
            map.insert(key.to_string(), value);
        }
        map.sort_keys();
        map
    }

    /// Writes `adapter_config.json` into `folder`, atomically.
    ///
    /// # Errors
    /// The configuration would not be read back (an impossible rank, a regular expression that does not compile, …), or
    /// the file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), FormatError> {
        let path = folder.join(ADAPTER_CONFIG);
        let map = self.to_json();
        if let Err(problems) = LoraConfig::from_json(&map) {
            return Err(FormatError::Problems { path, problems });
        }
        write_adapter_config(folder, &map)
    }
}

/// PEFT's alphas are integers where they can be.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        json!(value as i64)
    } else {
        json!(value)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// What PEFT 0.21.2 writes for `LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
    /// base_model_name_or_path="x")`.
    const WRITTEN_BY_PEFT: &str = r#"{
  "alora_invocation_tokens": null,
  "alpha_pattern": {},
  "arrow_config": null,
  "auto_mapping": null,
  "base_model_name_or_path": "x",
  "bias": "none",
  "corda_config": null,
  "ensure_weight_tying": false,
  "eva_config": null,
  "exclude_modules": null,
  "fan_in_fan_out": false,
  "inference_mode": false,
  "init_lora_weights": true,
  "kasa_config": null,
  "layer_replication": null,
  "layers_pattern": null,
  "layers_to_transform": null,
  "loftq_config": {},
  "lora_alpha": 8,
  "lora_bias": false,
  "lora_dropout": 0.0,
  "lora_ga_config": null,
  "megatron_config": null,
  "megatron_core": "megatron.core",
  "modules_to_save": null,
  "monteclora_config": null,
  "peft_type": "LORA",
  "peft_version": "0.21.2",
  "qalora_group_size": 16,
  "r": 8,
  "rank_pattern": {},
  "revision": null,
  "target_modules": [
    "q_proj",
    "v_proj"
  ],
  "target_parameters": null,
  "task_type": "CAUSAL_LM",
  "trainable_token_indices": null,
  "use_bdlora": null,
  "use_dora": false,
  "use_qalora": false,
  "use_rslora": false,
  "velora_config": null
}"#;

    fn q_and_v() -> LoraConfig {
        LoraConfig {
            target_modules: TargetModules::List(vec!["q_proj".into(), "v_proj".into()]),
            task_type: Some("CAUSAL_LM".into()),
            base_model_name_or_path: Some("x".into()),
            ..LoraConfig::default()
        }
    }

    fn read(json: &str) -> Result<LoraConfig, FormatError> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(ADAPTER_CONFIG), json).unwrap();
        LoraConfig::read(folder.path())
    }

    #[test]
    fn the_file_is_peft_s_to_the_byte() {
        let folder = tempfile::tempdir().unwrap();
        q_and_v().write(folder.path()).unwrap();
        let written = fs::read_to_string(folder.path().join(ADAPTER_CONFIG)).unwrap();
        assert_eq!(written, WRITTEN_BY_PEFT);
        let read = LoraConfig::read(folder.path()).unwrap();
        assert_eq!(
            read,
            LoraConfig {
                peft_version: Some("0.21.2".into()),
                ..q_and_v()
            }
        );
    }

    #[test]
    fn every_field_survives_a_round_trip() {
        let config = LoraConfig {
            r: 16,
            lora_alpha: 12.5,
            lora_dropout: 0.1,
            exclude_modules: Some(ModuleNames::Regex(r".*\.0\..*".into())),
            fan_in_fan_out: true,
            use_rslora: true,
            use_dora: true,
            init_lora_weights: json!("gaussian"),
            rank_pattern: vec![("z".into(), 4), ("a".into(), 2)],
            alpha_pattern: vec![("z".into(), 4.0), ("a".into(), 2.5)],
            layers_to_transform: Some(vec![0, 3]),
            layers_pattern: vec!["layers".into()],
            revision: Some("main".into()),
            trainable_token_indices: Some(TokenIndices::Tables(vec![
                ("lm_head".into(), vec![4]),
                ("embed_tokens".into(), vec![7, 2]),
            ])),
            inference_mode: true,
            auto_mapping: Some(json!({ "base_model_class": "X" })),
            peft_version: Some("0.19.0".into()),
            ..q_and_v()
        };
        let folder = tempfile::tempdir().unwrap();
        config.write(folder.path()).unwrap();
        assert_eq!(LoraConfig::read(folder.path()).unwrap(), config);
    }

    #[test]
    fn two_keys_are_enough_and_defaults_of_any_version_ask_for_nothing() {
        let config = read(r#"{"peft_type":"LORA","target_modules":"all-linear"}"#).unwrap();
        assert_eq!(config.target_modules, TargetModules::AllLinear);
        assert_eq!((config.r, config.lora_alpha), (8, 8.0));
        // Older and newer files.
        let config = read(
            r#"{"peft_type":"LORA","target_modules":["q_proj"],"layers_pattern":[],"future_feature":null,
                "other_feature":false,"third":{},"fourth":[],"fifth":"","megatron_config":{},"modules_to_save":[],
                "runtime_config":{"ephemeral_gpu_offload":true},"auto_mapping":{"unsloth_fixed":true},
                "qalora_group_size":32,"eva_config":{"rho":2.0},"layers_to_transform":null}"#,
        );
        assert!(config.is_ok(), "{config:?}");
    }

    #[test]
    fn every_active_unsupported_feature_is_named_at_once() {
        let message = read(
            r#"{"peft_type":"LORA","target_modules":["q_proj"],"bias":"all","lora_bias":true,
                "modules_to_save":["lm_head"],"layer_replication":[[0,2]],
                "target_parameters":["w"],"use_qalora":true,"alora_invocation_tokens":[5],"new_thing":3,
                "init_lora_weights":"pissa","ensure_weight_tying":true}"#,
        )
        .unwrap_err()
        .to_string();
        for words in [
            "adapter_config.json: 9 problems",
            "`bias` is \"all\": this feature is not supported; accepted: \"none\"",
            "`lora_bias` is true",
            "`layer_replication` is [[0,2]]",
            "`target_parameters` is [\"w\"]",
            "`use_qalora` is true",
            "`alora_invocation_tokens` is [5]",
            "`new_thing` is 3: this key is not known",
            "`init_lora_weights` is \"pissa\"",
            "`ensure_weight_tying` is true",
        ] {
            assert!(message.contains(words), "{words} is not in\n{message}");
        }
    }

    #[test]
    fn wrong_values_are_named() {
        for (json, word) in [
            (r#""target_modules":["q"]"#, "`peft_type` is missing"),
            (
                r#""peft_type":"IA3","target_modules":["q"]"#,
                "`peft_type` is \"IA3\"",
            ),
            (r#""peft_type":"LORA""#, "`target_modules` is missing"),
            (
                r#""peft_type":"LORA","target_modules":null"#,
                "`target_modules` is missing",
            ),
            (
                r#""peft_type":"LORA","target_modules":[]"#,
                "`target_modules` is []",
            ),
            (
                r#""peft_type":"LORA","target_modules":[1]"#,
                "`target_modules` is [1]",
            ),
            (
                r#""peft_type":"LORA","target_modules":"(""#,
                "not a valid regular expression",
            ),
            (
                r#""peft_type":"LORA","target_modules":"(?!x)q""#,
                "look-ahead",
            ),
            (
                r#""peft_type":"LORA","target_modules":["q"],"r":0"#,
                "`r` is 0",
            ),
            (
                r#""peft_type":"LORA","target_modules":["q"],"r":-1"#,
                "`r` is -1",
            ),
            (
                r#""peft_type":"LORA","target_modules":["q"],"r":1e9"#,
                "`r` is 1000000000.0",
            ),
            (
                r#""peft_type":"LORA","target_modules":["q"],"lora_alpha":1e300"#,
                "`lora_alpha`",
            ),
            (
                r#""peft_type":"LORA","target_modules":["q"],"lora_dropout":1.0"#,
                "`lora_dropout`",
            ),
            (
                r#""peft_type":"LORA","target_modules":["q"],"rank_pattern":{"a":0}"#,
                "`rank_pattern.a`",
            ),
            (
                r#""peft_type":"LORA","target_modules":["q"],"rank_pattern":{"*":1}"#,
                "`rank_pattern.*`",
            ),
            (
                r#""peft_type":"LORA","target_modules":["q"],"layers_pattern":"h""#,
                "`layers_to_transform`",
            ),
            (
                r#""peft_type":"LORA","target_modules":"q","layers_to_transform":[1]"#,
                "need a list",
            ),
            (
                r#""peft_type":"LORA","target_modules":["q"],"layers_to_transform":[-1]"#,
                "`layers_to_transform`",
            ),
            (
                r#""peft_type":"LORA","target_modules":["q"],"use_rslora":1"#,
                "`use_rslora` is 1",
            ),
            (
                r#""peft_type":"LORA","target_modules":["q"],"trainable_token_indices":[-1]"#,
                "`trainable_token_indices` is [-1]",
            ),
            (
                r#""peft_type":"LORA","target_modules":["q"],"trainable_token_indices":[5,3,5]"#,
                "`trainable_token_indices`: 5 is named twice",
            ),
            (
                r#""peft_type":"LORA","target_modules":["q"],"trainable_token_indices":{"a":[]}"#,
                "`trainable_token_indices.a` names no token",
            ),
            (
                r#""peft_type":"LORA","target_modules":["q"],"trainable_token_indices":"5""#,
                "`trainable_token_indices` is \"5\"",
            ),
        ] {
            let message = read(&format!("{{{json}}}")).expect_err(json).to_string();
            assert!(message.contains(word), "{word} is not in {message}");
        }
        let folder = tempfile::tempdir().unwrap();
        let bad = LoraConfig { r: 0, ..q_and_v() };
        assert!(bad.write(folder.path()).is_err());
        assert!(
            LoraConfig::read(folder.path())
                .unwrap_err()
                .to_string()
                .contains("is missing")
        );
    }
}
