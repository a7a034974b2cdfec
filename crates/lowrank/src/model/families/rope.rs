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
    /// `partial_rotary_factor` where the file has none; `None` where the architecture knows no such key.
    pub(super) partial: Option<f64>,
    /// Which numbers of a head are pairs.
    pub(super) order: RopeOrder,
    /// `original_max_position_embeddings` where the file has none; `None`: `max_position_embeddings`.
    pub(super) original: Option<f64>,
    /// Whether `su` and `yarn` are older names of `longrope`.
    pub(super) is_longrope: bool,
}

impl Rules {
    pub(super) fn new(theta: f64, positions: usize, head_size: usize) -> Self {
        Self {
            theta,
            positions,
            head_size,
            partial: None,
            order: RopeOrder::Halves,
            original: None,
            is_longrope: false,
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

    /// The rotary embedding of one kind of layers: an object of `rope_parameters`, or of transformers 4 `rope_scaling`, which is for those
    /// layers that see everything.
    pub(super) fn read_kind(&self, raw: &HfConfig, kind: &str) -> Result<Rope, FormatError> {
        let scaling = raw.opt_object("rope_scaling")?;
        let scaling =
            scaling.filter(|scaling| kind == "full_attention" && !scaling.map().is_empty());
        let of_kind = match raw.opt_object("rope_parameters")? {
            Some(kinds) => kinds.opt_object(kind)?,
            None => None,
        };
        self.read_one(raw, scaling.or(of_kind))
    }

    /// A rotary embedding from its object.
    pub(super) fn read_one(
        &self,
        raw: &HfConfig,
        nested: Option<HfConfig>,
    ) -> Result<Rope, FormatError> {
        let said = nested.as_ref().map(|nested| nested.opt_f64("rope_theta"));
        let theta = said.transpose()?.flatten().unwrap_or(self.theta);
        let plain = Rope {
            theta,
            scaling: RopeScaling::None,
            rotary_size: self.rotary_size(raw, nested.as_ref())?,
            order: self.order,
            query_scale: None,
        };
        let Some(nested) = nested else {
            check_theta(raw, theta, 0.0)?;
            return Ok(plain);
        };
        let scaling = self.scaling(raw, &nested, plain.rotary_size)?;
        // Its ramp is found by the logarithm.
        let is_yarn = matches!(scaling, RopeScaling::Yarn { .. });
        let by = if nested.get("rope_theta").is_some() {
            &nested
        } else {
            raw
        };
        check_theta(by, theta, if is_yarn { 1.0 } else { 0.0 })?;
        Ok(Rope { scaling, ..plain })
    }

    /// How many numbers of a head are rotated.
    fn rotary_size(&self, raw: &HfConfig, nested: Option<&HfConfig>) -> Result<usize, FormatError> {
        const PARTIAL: &str = "partial_rotary_factor";
        let mut found = None;
        for object in nested.into_iter().chain([raw]) {
            let Some(partial) = object.opt_f64(PARTIAL)? else {
                continue;
            };
            if self.partial.is_none() && partial != 1.0 {
                return Err(object.unsupported(PARTIAL, "1.0"));
            }
            found = found.or(Some(partial));
        }
        let partial = found.or(self.partial).unwrap_or(1.0);
        let size = (self.head_size as f64 * partial) as usize;
        if self.partial.is_some() && !(2..=self.head_size).contains(&size) {
            let accepted = format!(
                "a part of a head of {}, from 2 numbers to all",
                self.head_size
            );
            return Err(raw.unsupported(PARTIAL, accepted));
        }
        if self.partial.is_some() && !size.is_multiple_of(2) {
            let accepted = format!("a part of a head of {} with an even size", self.head_size);
            return Err(raw.unsupported(PARTIAL, accepted));
        }
        Ok(size)
    }

    /// The context length of pretraining. A value beside the object goes before one in it.
    pub(super) fn original(
        &self,
        raw: &HfConfig,
        nested: Option<&HfConfig>,
    ) -> Result<f64, FormatError> {
        const FIELD: &str = "original_max_position_embeddings";
        let said = match (raw.opt_f64(FIELD)?.or(self.original), nested) {
            (Some(beside), _) => Some(beside),
            (None, Some(nested)) => nested.opt_f64(FIELD)?,
            (None, None) => None,
        };
        let original = said.unwrap_or(self.positions as f64);
        if original < 2.0 {
            return Err(raw.unsupported(FIELD, "a number of at least 2"));
        }
        Ok(original)
    }

    fn scaling(
        &self,
        raw: &HfConfig,
        nested: &HfConfig,
        rotary_size: usize,
    ) -> Result<RopeScaling, FormatError> {
        let kind_field = if nested.get("rope_type").is_some() {
            "rope_type"
        } else {
            "type"
        };
        let kind = nested.opt_str(kind_field)?.unwrap_or("default");
        let original = || self.original(raw, Some(nested));
        Ok(match kind {
            "su" | "yarn" if self.is_longrope => self.longrope(raw, nested, rotary_size)?,
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear {
                factor: nested.f64("factor")?,
            },
            "dynamic" => {
                nested.f64("factor")?;
                RopeScaling::None
            }
            "llama3" => RopeScaling::Llama3 {
                factor: nested.f64("factor")?,
                low_freq_factor: nested.f64("low_freq_factor")?,
                high_freq_factor: nested.f64("high_freq_factor")?,
                original_max_position_embeddings: original()?,
            },
            "yarn" => self.yarn(nested, original()?)?,
            "longrope" => self.longrope(raw, nested, rotary_size)?,
            _ => {
                let accepted = "default, linear, dynamic, llama3, yarn, longrope";
                return Err(nested.unsupported(kind_field, accepted));
            }
        })
    }

    /// `factor`: null means the ratio of the context lengths.
    fn factor(&self, nested: &HfConfig, original: f64) -> Result<f64, FormatError> {
        let factor = nested.opt_f64("factor")?;
        Ok(factor.unwrap_or(self.positions as f64 / original))
    }

    fn yarn(&self, nested: &HfConfig, original: f64) -> Result<RopeScaling, FormatError> {
        let factor = if nested.map().contains_key("factor") {
            self.factor(nested, original)?
        } else {
            nested.f64("factor")?
        };
        // Zero counts as absent, as in Python.
        let number =
            |field: &str| Ok::<_, FormatError>(nested.opt_f64(field)?.filter(|x| *x != 0.0));
        let mscale = |scale: f64| {
            if factor <= 1.0 {
                1.0
            } else {
                0.1 * scale * factor.ln() + 1.0
            }
        };
        let attention_factor = match nested.opt_f64("attention_factor")? {
            Some(said) => said,
            None => match number("mscale")?.zip(number("mscale_all_dim")?) {
                Some((one, all)) => mscale(one) / mscale(all),
                None => mscale(1.0),
            },
        };
        Ok(RopeScaling::Yarn {
            factor,
            beta_fast: number("beta_fast")?.unwrap_or(32.0),
            beta_slow: number("beta_slow")?.unwrap_or(1.0),
            truncate: nested.opt_bool("truncate")?.unwrap_or(true),
            original_max_position_embeddings: original,
            attention_factor,
        })
    }

    fn longrope(
        &self,
        raw: &HfConfig,
        nested: &HfConfig,
        rotary_size: usize,
    ) -> Result<RopeScaling, FormatError> {
        let original = self.original(raw, Some(nested))?;
        let factor = self.factor(nested, original)?;
        let attention_factor = match nested.opt_f64("attention_factor")? {
            Some(said) => said,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / original.ln()).sqrt(),
        };
        let factors = |field: &str| {
            let list = nested.opt_f64s(field)?.unwrap_or_default();
            let count = rotary_size / 2;
            if list.len() != count || list.contains(&0.0) {
                let accepted = format!("a list of {count} numbers above 0, one a pair of a head");
                return Err(nested.unsupported(field, accepted));
            }
            Ok(list)
        };
        factors("long_factor")?;
        Ok(RopeScaling::LongRope {
            short_factor: factors("short_factor")?,
            attention_factor,
        })
    }
}

/// Refuses a base that gives no angles.
fn check_theta(raw: &HfConfig, theta: f64, least: f64) -> Result<(), FormatError> {
    if theta > least && theta.is_finite() {
        return Ok(());
    }
    let problem = format!("a number greater than {least}, not {theta}");
    Err(raw.unsupported("rope_theta", problem))
}
