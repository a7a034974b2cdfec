//! Files made by Python's `gguf` and `safetensors`, and files meant to do harm. `scripts/goldens_gguf.py` makes the
//! goldens.

mod adapter_config;
mod goldens;
mod hostile_gguf;
mod hostile_safetensors;

use std::path::PathBuf;

/// A file under `tests/goldens`.
fn golden(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "goldens", name]
        .iter()
        .collect()
}
