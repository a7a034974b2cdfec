//! Any bytes as a GGUF file: an error or a file whose tensors hold what they say, and whose import plans without panic.

#![no_main]

use std::io::Write;

use libfuzzer_sys::fuzz_target;
use lowrank_formats::checkpoint::StoredDType;
use lowrank_formats::{Gguf, gguf_model};

fuzz_target!(|data: &[u8]| {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(data).expect("space for it");
    if let Ok(gguf) = Gguf::open(file.path()) {
        for tensor in gguf.tensors() {
            let blocks = tensor.bytes.as_ref().len() / tensor.kind.block_bytes();
            assert_eq!(blocks * tensor.kind.block_len(), tensor.len());
        }
        let _ = gguf_model::hf_config_json(&gguf, StoredDType::F32);
        let _ = gguf_model::weights(&gguf);
    }
});
