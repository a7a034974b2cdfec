//! Files made by Python's `gguf`, `safetensors` and `peft`, and files meant to do harm.

mod import;
