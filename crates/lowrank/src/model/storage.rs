//! What a model's weights are kept in, and the bytes that it takes.

use std::cmp::Reverse;

use lowrank_kernels::{DType, NumberFormat};

use super::config::{ModelConfig, WeightId};

impl ModelConfig {
    /// Bytes of the weights: matrices as `dtype` or in fewer bits, as the files have them, vectors as f32.
    pub fn weight_bytes(&self, dtype: DType) -> u64 {
        let all = self.weights().into_iter();
        all.map(|(id, shape)| self.tensor_bytes(id, shape, dtype))
            .sum()
    }

    /// Bytes of one of them.
    pub(super) fn tensor_bytes(
        &self,
        id: WeightId,
        (rows, cols): (usize, usize),
        dtype: DType,
    ) -> u64 {
        let format = if rows == 1 {
            NumberFormat::F32
        } else {
            self.matrix_format(id, dtype)
        };
        format.bytes_for(rows * cols) as u64
    }

    /// What a matrix is kept in beside others as `dtype`.
    fn matrix_format(&self, id: WeightId, dtype: DType) -> NumberFormat {
        match self.formats.get(&id) {
            Some(format) if dtype == DType::Bf16 || self.load_in.is_some() => *format,
            _ => dtype.into(),
        }
    }

    /// What the matrices are kept in beside others as `dtype`, in words: the format that most values are in, and the others
    /// behind it, as `Q4_K (with Q6_K)`.
    pub fn kept_in(&self, dtype: DType) -> String {
        let mut values: Vec<(NumberFormat, usize)> = Vec::new();
        for (id, (rows, cols)) in self.weights() {
            if rows == 1 {
                continue;
            }
            let format = self.matrix_format(id, dtype);
            match values.iter_mut().find(|(known, _)| *known == format) {
                Some((_, count)) => *count += rows * cols,
                None => values.push((format, rows * cols)),
            }
        }
        values.sort_by_key(|(_, count)| Reverse(*count));
        let names: Vec<String> = values
            .iter()
            .map(|(format, _)| format.to_string())
            .collect();
        match names.split_first() {
            None => dtype.to_string(),
            Some((most, [])) => most.clone(),
            Some((most, others)) => format!("{most} (with {})", others.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{LinearKind, LoadIn, Part};
    use crate::plan::presets;

    #[test]
    fn formats_are_named_by_how_much_they_hold() {
        let mut config = presets::config("smollm2-135m").unwrap();
        assert_eq!(config.kept_in(DType::Bf16), "bf16");
        assert_eq!(config.kept_in(DType::F32), "f32");
        for (id, (rows, _)) in config.weights() {
            let format = match id {
                WeightId::Linear(linear, Part::Weight) if linear.kind == LinearKind::V => {
                    NumberFormat::Q6K
                }
                WeightId::Embedding => NumberFormat::Q8_0,
                _ => NumberFormat::Q4K,
            };
            if rows > 1 {
                config.formats.insert(id, format);
            }
        }
        assert_eq!(config.kept_in(DType::Bf16), "Q4_K (with Q8_0, Q6_K)");
        // Then all numbers are widened.
        assert_eq!(config.kept_in(DType::F32), "f32");
    }

    #[test]
    fn what_is_quantized_while_it_is_loaded_is_so_beside_any_type() {
        let mut config = presets::config("smollm2-135m").unwrap();
        let plain = config.weight_bytes(DType::F32);
        LoadIn::FourBit.mark(&mut config);
        assert_eq!(config.kept_in(DType::Bf16), "NF4 (with bf16)");
        assert_eq!(config.kept_in(DType::F32), "NF4 (with f32)");
        assert!(config.weight_bytes(DType::F32) < plain / 2);
    }
}
