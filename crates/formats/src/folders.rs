//! What a path holds that was given as a model or an adapter and is none, and what to do about it.
//!
//! Only names are looked at, the first bytes of files and the keys of JSON: nothing is loaded and nothing is run.

use std::fs;
use std::path::{Path, PathBuf};

use crate::checkpoint::Checkpoint;
use crate::hf_config::MODEL_CONFIG;
use crate::json::read_object;
use crate::peft::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
use crate::recognise::Format;

/// A configuration that is looked into for one key.
const CONFIG_CAP: u64 = 16 << 20;

/// How a file of other weights becomes safetensors, as the rest of "is PyTorch; …".
pub(crate) fn weights_mend(format: Format) -> &'static str {
    if let Some(mend) = format.fetch_again() {
        return mend;
    }
    match format {
        Format::Torch | Format::Pickle => {
            "where you trust its source, load it with transformers or PEFT and save it with save_pretrained, which writes safetensors"
        }
        Format::Gguf => "import it: lowrank model import FILE --output DIR",
        Format::Ggml => {
            "convert it to GGUF with llama.cpp, then import it: lowrank model import FILE --output DIR"
        }
        Format::Gzip | Format::Zstd | Format::Bzip2 | Format::Xz | Format::Lz4 => {
            "decompress it first"
        }
        Format::Tar | Format::Zip | Format::SevenZip | Format::Rar => "unpack it first",
        _ => "take the model's safetensors weights",
    }
}

/// What a folder without a usable config.json or without weights is, as the rest of "…: ". None where nothing in it is known.
pub(crate) fn instead_of_model(folder: &Path) -> Option<String> {
    let has = |name: &str| folder.join(name).is_file();
    let shown = folder.display();
    if has(ADAPTER_CONFIG) {
        let base = text_of(&folder.join(ADAPTER_CONFIG), "base_model_name_or_path");
        let base = base.map_or_else(
            || "its base".to_owned(),
            |base| format!("its base, {base},"),
        );
        return Some(format!(
            "it holds an adapter; give {base} as --model and this folder as --adapter"
        ));
    }
    if let Some(snapshots) = snapshots(folder) {
        let list: Vec<String> = snapshots
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        return Some(match list.as_slice() {
            [] => "it is a folder of the Hub's cache without a snapshot; fetch the model again: lowrank model pull NAME".to_owned(),
            list => format!("it is a folder of the Hub's cache; give one of its snapshots: {}", list.join(", ")),
        });
    }
    if has("model_index.json") {
        return Some(
            "it is a pipeline of Diffusers, which makes images; a language model is needed"
                .to_owned(),
        );
    }
    if has("modules.json") {
        return Some("it is a folder of sentence-transformers without its encoder; give the folder in it that has config.json, such as 0_Transformer".to_owned());
    }
    if has("params.json") {
        return Some(
            "params.json is of Meta's or Mistral's own format; take the model's Hugging Face version, or convert it with \
             transformers' convert_llama_weights_to_hf.py"
                .to_owned(),
        );
    }
    if has("zero_to_fp32.py") {
        return Some(format!(
            "it is a checkpoint of DeepSpeed in parts; put them together: python {shown}/zero_to_fp32.py {shown} {shown} --safe_serialization"
        ));
    }
    other_weights(folder)
}

/// Weights of other programs, models and adapters further inside, and weights under another name.
fn other_weights(folder: &Path) -> Option<String> {
    let has = |name: &str| folder.join(name).is_file();
    let shown = folder.display();
    let files = names(folder);
    let find = |wanted: &[&str]| {
        let fits = |name: &&String| {
            wanted
                .iter()
                .any(|ending| name.to_ascii_lowercase().ends_with(ending))
        };
        files.iter().find(fits)
    };
    if let Some(file) = find(&[".distcp"]) {
        return Some(format!(
            "{file} is a part of a PyTorch distributed checkpoint; put the parts together: accelerate merge-weights {shown} DIR"
        ));
    }
    if let Some(file) = find(&[".gguf"]) {
        let path = folder.join(file);
        return Some(format!(
            "it holds {file}; import it: lowrank model import {} --output DIR",
            path.display()
        ));
    }
    if let Some(file) = find(&[".bin", ".bin.index.json", ".pt", ".pth", ".ckpt"]) {
        return Some(format!(
            "it holds {file}, which is PyTorch's (a pickle, which can run code and is never loaded here); where you trust its source, write \
             safetensors: python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{shown}').save_pretrained('{shown}')\""
        ));
    }
    if let Some(file) = find(&[".onnx", ".h5", ".msgpack", ".tflite", ".npz"]) {
        return Some(format!(
            "it holds {file}, which is another program's format; take the model's safetensors weights"
        ));
    }
    let inner = subfolders_with(folder, MODEL_CONFIG);
    if !inner.is_empty() {
        return Some(format!(
            "there are models in {}; give one of them",
            inner.join(", ")
        ));
    }
    let adapters = subfolders_with(folder, ADAPTER_CONFIG);
    if !adapters.is_empty() {
        return Some(format!(
            "there are adapters in {}; give one of them as --adapter",
            adapters.join(", ")
        ));
    }
    let file = find(&[".safetensors"])?;
    Some(
        if file == "model.safetensors" || has("model.safetensors.index.json") {
            format!(
                "the weights are there without it; copy {MODEL_CONFIG} from where the model was saved"
            )
        } else if file.contains("-of-") {
            format!(
                "it holds {file}, a shard, without model.safetensors.index.json; download that, too"
            )
        } else {
            format!(
                "it holds {file}, and weights are called model.safetensors; rename it where it is the whole model"
            )
        },
    )
}

/// The snapshots of a model's folder in the Hub's cache; None where the folder is no such.
///
/// The one that `refs/main` names stands first.
pub fn snapshots(folder: &Path) -> Option<Vec<PathBuf>> {
    let snapshots = folder.join("snapshots");
    if !snapshots.is_dir() || folder.join(MODEL_CONFIG).exists() {
        return None;
    }
    let main = fs::read_to_string(folder.join("refs/main")).unwrap_or_default();
    let mut found: Vec<PathBuf> = fs::read_dir(snapshots)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_dir())
        .collect();
    found.sort_by_key(|path| (!path.ends_with(main.trim()), path.clone()));
    Some(found)
}

/// What is wrong with a path that was given as an adapter's folder: none where it holds adapter_config.json.
pub(crate) fn instead_of_adapter(path: &Path) -> Option<String> {
    if path.join(ADAPTER_CONFIG).is_file() {
        return None;
    }
    if path.is_file() {
        return Some(instead_of_adapter_file(path));
    }
    if !path.is_dir() {
        return None;
    }
    let shown = path.display();
    let has = |name: &str| path.join(name).is_file();
    if has(MODEL_CONFIG) {
        return Some(format!(
            "it is a whole model, not an adapter; give it with --model {shown}"
        ));
    }
    let inner = subfolders_with(path, ADAPTER_CONFIG);
    if !inner.is_empty() {
        return Some(format!(
            "there are adapters in {}; give one of them",
            inner.join(", ")
        ));
    }
    if has(ADAPTER_WEIGHTS) || has("adapter_model.bin") {
        return Some(format!(
            "the weights are there without {ADAPTER_CONFIG}, which says what they adapt; copy it from where the adapter was saved"
        ));
    }
    let file = names(path).into_iter().find(|name| {
        let ending = Path::new(name)
            .extension()
            .and_then(|ending| ending.to_str());
        matches!(
            ending,
            Some("safetensors" | "gguf" | "pt" | "pth" | "bin" | "ckpt")
        )
    })?;
    Some(format!(
        "it holds {file}: {}",
        instead_of_adapter_file(&path.join(&file))
    ))
}

/// About a file that was given as an adapter.
fn instead_of_adapter_file(path: &Path) -> String {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let of_adapter =
        name == ADAPTER_CONFIG || name == ADAPTER_WEIGHTS || name == "adapter_model.bin";
    if of_adapter || folder.join(ADAPTER_CONFIG).is_file() {
        return format!(
            "an adapter is a folder, and this is a file in one; give the folder, {}",
            folder.display()
        );
    }
    let needed = format!(
        "an adapter is a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, as PEFT writes it"
    );
    match Format::of_file(path) {
        Some(Format::Gguf | Format::Ggml) => {
            format!(
                "this is llama.cpp's form of an adapter; {needed}: make that of it with `lowrank adapter import`"
            )
        }
        Some(Format::Safetensors) => {
            let what = Checkpoint::open(path)
                .ok()
                .and_then(|file| foreign_lora(file.names()));
            match what {
                Some(what) => format!("these are the weights of {what}; {needed}"),
                None => needed,
            }
        }
        Some(format @ (Format::Torch | Format::Pickle)) => format!(
            "this is {format}; {needed}: load it in the program that wrote it (loralib's files have no config) and save it with PEFT"
        ),
        Some(format) => match format.fetch_again() {
            Some(mend) => format!("this is {format}; {mend}"),
            None => format!("this is {format}; {needed}"),
        },
        None => needed,
    }
}

/// Whose adapter it is, by the names of its tensors. None where they may be PEFT's.
pub(crate) fn foreign_lora<'a>(names: impl Iterator<Item = &'a str>) -> Option<&'static str> {
    for name in names {
        if name.starts_with("lora_unet_") || name.starts_with("lora_te") {
            return Some("a LoRA of kohya-ss for an image model");
        }
        if name.starts_with("unet.")
            || name.starts_with("text_encoder.")
            || name.starts_with("transformer.") && name.contains(".lora_A.")
        {
            return Some("a LoRA of Diffusers for an image model");
        }
        if ["hada_w1", "hada_w2", "lokr_w1", "lokr_w2"]
            .iter()
            .any(|part| name.contains(part))
            && !name.starts_with("base_model.")
        {
            return Some("an adapter of LyCORIS");
        }
        if name.ends_with(".lora_a") || name.ends_with(".lora_b") {
            return Some("an adapter of mlx-lm");
        }
        if name.ends_with(".lora_down.weight") || name.ends_with(".lora_up.weight") {
            return Some("a LoRA of kohya-ss for an image model");
        }
    }
    None
}

/// What is there instead of an adapter's weights, as the rest of "is missing; …".
pub(crate) fn instead_of_adapter_weights(folder: &Path) -> String {
    let has = |name: &str| folder.join(name).is_file();
    let shown = folder.display();
    if has("adapter_model.bin") {
        return match Format::of_file(&folder.join("adapter_model.bin")) {
            Some(Format::LfsPointer) => "adapter_model.bin is a Git LFS pointer".to_owned(),
            _ => format!(
                "the weights are in adapter_model.bin, PyTorch's format (a pickle, which can run code and is never loaded here); where you trust \
                 its source, write them as safetensors: python -c \"import torch, safetensors.torch as s; s.save_file({{k: v.contiguous() for k, v \
                 in torch.load('{shown}/adapter_model.bin', map_location='cpu', weights_only=True).items()}}, '{shown}/{ADAPTER_WEIGHTS}')\""
            ),
        };
    }
    if has("adapters.safetensors") || has("adapters.npz") {
        return MLX.to_owned();
    }
    let inner = subfolders_with(folder, ADAPTER_WEIGHTS);
    if !inner.is_empty() {
        return format!(
            "there are adapters in {}; give one of them",
            inner.join(", ")
        );
    }
    let files = names(folder);
    if let Some(file) = files
        .iter()
        .find(|name| name.starts_with("adapter_model") && name.contains("-of-"))
    {
        return format!(
            "it is in parts ({file}); load it with PEFT and save it whole, with a larger max_shard_size"
        );
    }
    format!(
        "an adapter is a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}; copy or download it again"
    )
}

/// About an adapter of mlx-lm.
pub(crate) const MLX: &str = "this is mlx-lm's format of adapters, which names and shapes tensors in its own way; make PEFT's of it with `lowrank adapter import`";

/// The folders in a folder, and in those in it, that hold a file of this name.
fn subfolders_with(folder: &Path, file: &str) -> Vec<String> {
    const MOST: usize = 8;
    let inside = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten();
        let mut found: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.is_dir() && !path.is_symlink())
            .collect();
        found.sort();
        found
    };
    let first = inside(folder);
    let second = first.iter().flat_map(|path| inside(path));
    let all = first.iter().cloned().chain(second);
    let mut found: Vec<String> = all
        .filter(|path| path.join(file).is_file())
        .take(MOST + 1)
        .map(|path| path.display().to_string())
        .collect();
    if found.len() > MOST {
        found.truncate(MOST);
        found.push("others".to_owned());
    }
    found
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

fn text_of(config: &Path, key: &str) -> Option<String> {
    let map = read_object(config, CONFIG_CAP).ok()?;
    Some(map.get(key)?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        folder
    }

    #[test]
    fn what_is_no_model_is_named() {
        let adapter = br#"{"base_model_name_or_path": "owner/base"}"#.as_slice();
        for (files, expected) in [
            (
                [(ADAPTER_CONFIG, adapter)].as_slice(),
                "its base, owner/base, as --model and this folder as --adapter",
            ),
            (&[("model_index.json", b"{}")], "a pipeline of Diffusers"),
            (&[("modules.json", b"[]")], "sentence-transformers"),
            (
                &[("params.json", b"{}"), ("consolidated.00.pth", b"PK")],
                "Meta's or Mistral's own format",
            ),
            (
                &[("a.Q4_0.gguf", b"GGUF")],
                "a.Q4_0.gguf; import it: lowrank model import ",
            ),
            (&[("pytorch_model.bin", b"PK")], "save_pretrained("),
            (&[("pytorch_model.bin.index.json", b"{}")], "PyTorch's"),
            (&[("model.ckpt", b"PK")], "model.ckpt, which is PyTorch's"),
            (&[("zero_to_fp32.py", b"")], "DeepSpeed"),
            (&[("__0_0.distcp", b"")], "accelerate merge-weights"),
            (
                &[("model.onnx", b"")],
                "model.onnx, which is another program's",
            ),
            (&[("tf_model.h5", b"")], "tf_model.h5"),
            (
                &[("a/config.json", b"{}"), ("b/c/config.json", b"{}")],
                "there are models in ",
            ),
            (
                &[("checkpoints/step-4/adapter_config.json", b"{}")],
                "there are adapters in ",
            ),
            (
                &[("weights.safetensors", b"")],
                "weights are called model.safetensors",
            ),
            (
                &[("model.safetensors", b"")],
                "the weights are there without it; copy config.json",
            ),
            (
                &[("model-00001-of-00002.safetensors", b"")],
                "a shard, without model.safetensors.index.json",
            ),
            (
                &[("snapshots/abc/config.json", b"{}")],
                "give one of its snapshots: ",
            ),
        ] {
            let folder = folder_with(files);
            let said = instead_of_model(folder.path()).unwrap_or_default();
            assert!(said.contains(expected), "{expected}: {said}");
        }
        assert_eq!(
            instead_of_model(folder_with(&[("README.md", b"")]).path()),
            None
        );
    }

    #[test]
    fn what_is_no_adapter_is_named() {
        for (files, expected) in [
            (
                [(MODEL_CONFIG, b"{}".as_slice())].as_slice(),
                "it is a whole model, not an adapter",
            ),
            (
                &[("checkpoint-5/adapter_config.json", b"{}")],
                "checkpoint-5; give one of them",
            ),
            (
                &[("checkpoints/step-4/adapter_config.json", b"{}")],
                "step-4; give one of them",
            ),
            (&[(ADAPTER_WEIGHTS, b"")], "without adapter_config.json"),
            (
                &[("lora.gguf", b"GGUF\x03")],
                "llama.cpp's form of an adapter",
            ),
            (
                &[("lora.pt", b"PK\x03\x04 lora/data.pkl")],
                "loralib's files have no config",
            ),
            (
                &[(
                    "lora.safetensors",
                    b"version https://git-lfs.github.com/spec/v1\n",
                )],
                "git lfs pull",
            ),
        ] {
            let folder = folder_with(files);
            let said = instead_of_adapter(folder.path()).unwrap_or_default();
            assert!(said.contains(expected), "{expected}: {said}");
        }
        let whole = folder_with(&[
            (ADAPTER_CONFIG, b"{}"),
            (ADAPTER_WEIGHTS, b""),
            ("lora.gguf", b"GGUF"),
        ]);
        assert_eq!(instead_of_adapter(whole.path()), None);
        for name in [ADAPTER_CONFIG, ADAPTER_WEIGHTS, "lora.gguf"] {
            let said = instead_of_adapter(&whole.path().join(name)).unwrap_or_default();
            assert!(
                said.ends_with(&format!("give the folder, {}", whole.path().display())),
                "{said}"
            );
        }
    }

    #[test]
    fn adapters_of_other_programs_are_told_by_their_tensors() {
        for (name, expected) in [
            ("lora_unet_down_blocks_0.lora_down.weight", "kohya-ss"),
            ("unet.down_blocks.0.attn.to_q.lora.down.weight", "Diffusers"),
            ("blocks.0.hada_w1_a", "LyCORIS"),
            ("model.layers.0.self_attn.q_proj.lora_a", "mlx-lm"),
        ] {
            let found = foreign_lora([name].into_iter()).unwrap_or_default();
            assert!(found.contains(expected), "{name}: {found}");
        }
        let peft = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
        assert_eq!(foreign_lora([peft].into_iter()), None);
    }

    #[test]
    fn weights_that_are_elsewhere_are_named() {
        for (file, expected) in [
            ("adapter_model.bin", "torch.load("),
            ("adapters.safetensors", "mlx-lm's format"),
            (
                "checkpoint-5/adapter_model.safetensors",
                "checkpoint-5; give one of them",
            ),
            ("adapter_model-00001-of-00002.safetensors", "in parts"),
            ("README.md", "copy or download it again"),
        ] {
            let folder = folder_with(&[(file, b"PK")]);
            let said = instead_of_adapter_weights(folder.path());
            assert!(said.contains(expected), "{expected}: {said}");
        }
    }
}
