//! How rotary positions read in `config.json`.

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;
use lowrank_kernels::RopeOrder;

use super::super::config::{Position, Rope, RopeScaling};

/// What an architecture says of its rotary positions.
#[derive(Clone, Copy)]
pub(super) struct Rules {
    /// `rope_theta` where the file has none.
    pub(super) theta: f64,
    /// `max_position_embeddings`.
    pub(super) positions: usize,
    /// D
    pub(super) head_size: usize,
}

impl Rules {
    pub(super) fn new(theta: f64, positions: usize, head_size: usize) -> Self {
        Self {
            theta,
            positions,
            head_size,
        }
    }

    /// Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (transformers 4), the same for every layer. Where a
    /// file has both objects, the older one is read and the other is not, as in transformers.
    pub(super) fn read(&self, raw: &HfConfig) -> Result<Position, FormatError> {
        let scaling = raw.opt_object("rope_scaling")?;
        let nested = match scaling.filter(|scaling| !scaling.map().is_empty()) {
            Some(scaling) => Some(scaling),
            None => raw.opt_object("rope_parameters")?,
        };
        let kinds = |nested: &HfConfig| {
            let mut values = nested.map().iter();
            let object = values.find(|(_, value)| value.is_object());
            object.map(|(layers, _)| layers.clone())
        };
        if let Some(nested) = &nested
            && let Some(layers) = kinds(nested)
        {
            return Err(nested.unsupported(
                &layers,
                "the same rotary positions on every layer, without objects in rope_parameters",
            ));
        }
        let theta = raw.opt_f64("rope_theta")?.unwrap_or(self.theta);
        let rope = Self { theta, ..*self }.read_one(raw, nested)?;
        Ok(Position::Rope(vec![rope]))
    }

    /// A rotary embedding from its object.
    pub(super) fn read_one(
        &self,
        raw: &HfConfig,
        nested: Option<HfConfig>,
    ) -> Result<Rope, FormatError> {
        const ORIGINAL: &str = "original_max_position_embeddings";
        let said = nested.as_ref().map(|nested| nested.opt_f64("rope_theta"));
        let theta = said.transpose()?.flatten().unwrap_or(self.theta);
        if let Some(partial) = raw.opt_f64("partial_rotary_factor")?
            && partial != 1.0
        {
            return Err(raw.unsupported("partial_rotary_factor", "1.0"));
        }
        let plain = Rope {
            theta,
            scaling: RopeScaling::None,
            rotary_size: self.head_size,
            order: RopeOrder::Halves,
            query_scale: None,
        };
        let Some(nested) = nested else {
            return Ok(plain);
        };
        let kind_field = if nested.get("rope_type").is_some() {
            "rope_type"
        } else {
            "type"
        };
        let scaling = match nested.opt_str(kind_field)?.unwrap_or("default") {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear {
                factor: nested.f64("factor")?,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: nested.f64("factor")?,
                low_freq_factor: nested.f64("low_freq_factor")?,
                high_freq_factor: nested.f64("high_freq_factor")?,
                original_max_position_embeddings: match raw.opt_f64(ORIGINAL)? {
                    Some(beside) => beside,
                    None => nested.opt_f64(ORIGINAL)?.unwrap_or(self.positions as f64),
                },
            },
            _ => return Err(nested.unsupported(kind_field, "default, linear, llama3")),
        };
        if let Some(partial) = nested.opt_f64("partial_rotary_factor")?
            && partial != 1.0
        {
            return Err(nested.unsupported("partial_rotary_factor", "1.0"));
        }
        Ok(Rope { scaling, ..plain })
    }
}
