//! Writes an adapter and a model imported from GGUF, for `scripts/check_formats.py` to read with PEFT and transformers.
//!
//! Usage: `cargo run -p lowrank --example write_samples -- [FOLDER [FILE.gguf]]`

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

use lowrank::DType;
use lowrank::import::import_weights;
use lowrank_formats::checkpoint::StoredDType;
use lowrank_formats::peft::{ADAPTER_WEIGHTS, LoraConfig, LoraPart, TargetModules, lora_key};
use lowrank_formats::{Gguf, TensorSpec, hf_config, write_safetensors};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args_os().skip(1).map(PathBuf::from);
    let samples = || env::temp_dir().join("lowrank-samples");
    let folder = arguments.next().unwrap_or_else(samples);
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../formats/tests/goldens/llama.gguf");
    let gguf = Gguf::open(&arguments.next().unwrap_or(golden))?;

    let model = folder.join("model");
    fs::create_dir_all(&model)?;
    import_weights(&gguf, &model, DType::F32)?;
    write_adapter(&model, &folder.join("adapter"))?;
    Ok(())
}

/// An adapter on q and v of every layer, one of them with a rank of its own, whose tensors count upwards.
fn write_adapter(model: &Path, folder: &Path) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(folder)?;
    let shapes = hf_config::HfConfig::read(model)?;
    let (hidden, head_dim) = (shapes.usize("hidden_size")?, shapes.usize("head_dim")?);
    let config = LoraConfig {
        r: 4,
        lora_alpha: 12.0,
        target_modules: TargetModules::List(vec!["q_proj".into(), "v_proj".into()]),
        rank_pattern: vec![(r"layers\.1\.self_attn\.q_proj".into(), 2)],
        task_type: Some("CAUSAL_LM".into()),
        base_model_name_or_path: Some(model.display().to_string()),
        ..LoraConfig::default()
    };
    let mut specs = Vec::new();
    for layer in 0..shapes.usize("num_hidden_layers")? {
        for (name, heads) in [
            ("q_proj", "num_attention_heads"),
            ("v_proj", "num_key_value_heads"),
        ] {
            let module = format!("model.layers.{layer}.self_attn.{name}");
            let (rank, rows) = (config.rank_of(&module), shapes.usize(heads)? * head_dim);
            for (part, shape) in [
                (LoraPart::A, vec![rank, hidden]),
                (LoraPart::B, vec![rows, rank]),
            ] {
                specs.push(TensorSpec {
                    name: lora_key(&module, part),
                    dtype: StoredDType::F32,
                    shape,
                });
            }
        }
    }
    config.write(folder)?;
    write_safetensors(
        &folder.join(ADAPTER_WEIGHTS),
        &specs,
        &BTreeMap::new(),
        |index, out| {
            let count: usize = specs[index].shape.iter().product();
            for n in 0..count {
                out.write_all(&(n as f32 / 1000.0).to_le_bytes())?;
            }
            Ok(())
        },
    )?;
    Ok(())
}
