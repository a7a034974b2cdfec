//! Any bytes as model.safetensors: an error or a checkpoint whose tensors hold what they say.

#![no_main]

use std::io::Write;

use libfuzzer_sys::fuzz_target;
use lowrank_formats::Checkpoint;

fuzz_target!(|data: &[u8]| {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(data).expect("space for it");
    if let Ok(checkpoint) = Checkpoint::open(file.path()) {
        for name in checkpoint.names() {
            let entry = checkpoint.get(name).expect("a listed tensor");
            if let Ok(values) = entry.to_f32() {
                assert_eq!(values.len(), entry.len());
            }
        }
    }
});
