//! From config.json to the metadata of a GGUF file: what llama.cpp's converter would write.

use super::Shapes;
use super::architecture::Rotary;
use super::gpt2;
use super::rope;
use crate::FormatError;
use crate::gguf::KeyValue;
use crate::hf_config::HfConfig;

/// What a file says of a model, but for its tokenizer.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelKeys {
    /// The key/value section.
    pub keys: Vec<(String, KeyValue)>,
    /// Tensors of rotary factors: their names and values, f32.
    pub factors: Vec<(String, Vec<f32>)>,
}

/// Keys of one architecture, as they come together.
struct Keys<'a> {
    prefix: &'static str,
    config: &'a HfConfig,
    made: ModelKeys,
}

impl Shapes {
    /// The metadata of a model of these shapes whose config.json is `config`. `name` is `general.name`.
    ///
    /// # Errors
    /// A field of another type than transformers gives it, or a scaling of rotary positions that llama.cpp does not have.
    pub fn keys(&self, config: &HfConfig, name: &str) -> Result<ModelKeys, FormatError> {
        let text = |text: &str| KeyValue::String(text.to_owned());
        let general = [
            ("general.architecture", text(self.architecture())),
            ("general.type", text("model")),
            ("general.name", text(name)),
            ("general.quantization_version", KeyValue::U32(2)),
        ];
        let mut keys = Keys {
            prefix: self.architecture(),
            config,
            made: ModelKeys {
                keys: general.map(|(key, value)| (key.to_owned(), value)).to_vec(),
                factors: Vec::new(),
            },
        };
        for (key, size) in [
            ("block_count", self.layers),
            ("context_length", self.positions),
            ("embedding_length", self.hidden),
            ("feed_forward_length", self.intermediate),
            ("attention.head_count", self.heads),
        ] {
            keys.size(key, size);
        }
        if self.architecture.name == gpt2::NAME {
            let eps = config.opt_f64("layer_norm_epsilon")?.unwrap_or(1e-5);
            keys.real("attention.layer_norm_epsilon", eps);
            return Ok(keys.made);
        }
        for (key, size) in [
            ("attention.head_count_kv", self.key_value_heads),
            ("attention.key_length", self.head_dim),
            ("attention.value_length", self.head_dim),
            ("vocab_size", self.vocabulary),
        ] {
            keys.size(key, size);
        }
        // transformers' default of all these families.
        let eps = config.opt_f64("rms_norm_eps")?.unwrap_or(1e-6);
        keys.real("attention.layer_norm_rms_epsilon", eps);
        keys.rotary(self, self.positions)?;
        keys.own()?;
        Ok(keys.made)
    }
}

impl Keys<'_> {
    fn add(&mut self, key: &str, value: KeyValue) {
        self.made
            .keys
            .push((format!("{}.{key}", self.prefix), value));
    }

    fn size(&mut self, key: &str, value: usize) {
        self.add(key, KeyValue::U32(u32::try_from(value).unwrap_or(u32::MAX)));
    }

    fn real(&mut self, key: &str, value: f64) {
        self.add(key, KeyValue::F32(value as f32));
    }

    /// A number of config.json, where it is there.
    fn copied(&mut self, key: &str, field: &str) -> Result<(), FormatError> {
        if let Some(value) = self.config.opt_f64(field)? {
            self.real(key, value);
        }
        Ok(())
    }

    /// What only some architectures have.
    fn own(&mut self) -> Result<(), FormatError> {
        let window = self.config.opt_usize("sliding_window")?;
        match self.prefix {
            "gemma2" => {
                self.copied("attn_logit_softcapping", "attn_logit_softcapping")?;
                self.copied("final_logit_softcapping", "final_logit_softcapping")?;
            }
            "granite" => {
                self.copied("attention.scale", "attention_multiplier")?;
                self.copied("embedding_scale", "embedding_multiplier")?;
                self.copied("residual_scale", "residual_multiplier")?;
                self.copied("logit_scale", "logits_scaling")?;
            }
            "mistral3" => {
                let parameters = self.config.opt_object("rope_parameters")?;
                let beta = parameters.map(|found| found.opt_f64("llama_4_scaling_beta"));
                if let Some(beta) = beta.transpose()?.flatten() {
                    self.real("attention.temperature_scale", beta);
                }
            }
            _ => {}
        }
        if matches!(self.prefix, "gemma2" | "gemma3" | "phi3" | "olmo2")
            && let Some(window) = window
        {
            self.size("attention.sliding_window", window);
        }
        Ok(())
    }

    /// Rotary positions: transformers 5's `rope_parameters`, or transformers 4's `rope_theta` and `rope_scaling`.
    fn rotary(&mut self, shapes: &Shapes, context: usize) -> Result<(), FormatError> {
        let all = self.config.opt_object("rope_parameters")?;
        let full = match &all {
            Some(all) => all.opt_object("full_attention")?,
            None => None,
        };
        let scaling = match (full, all.clone()) {
            (Some(full), _) => Some(full),
            (None, Some(all)) => Some(all),
            (None, None) => self.config.opt_object("rope_scaling")?,
        };
        let own = |field: &str| match &scaling {
            Some(scaling) => scaling.opt_f64(field),
            None => Ok(None),
        };
        let theta = match own("rope_theta")? {
            Some(theta) => theta,
            None => self.config.opt_f64("rope_theta")?.unwrap_or(10000.0),
        };
        let partial = match own("partial_rotary_factor")? {
            Some(partial) => partial,
            None => self.config.opt_f64("partial_rotary_factor")?.unwrap_or(1.0),
        };
        let rotated = (shapes.head_dim as f64 * partial) as usize;
        self.size("rope.dimension_count", rotated);
        self.real("rope.freq_base", theta);
        if let Some(local) = local_theta(self.config, all.as_ref())? {
            self.real("rope.freq_base_swa", local);
        }
        let Some(scaling) = scaling else {
            return Ok(());
        };
        let kind = match scaling.opt_str("rope_type")? {
            Some(kind) => Some(kind),
            None => scaling.opt_str("type")?,
        };
        match kind {
            None | Some("default") => Ok(()),
            Some("linear") => {
                self.add("rope.scaling.type", KeyValue::String("linear".to_owned()));
                self.real("rope.scaling.factor", scaling.f64("factor")?);
                Ok(())
            }
            Some("yarn") => self.yarn(&scaling),
            Some("llama3") => self.llama3(&scaling, theta, rotated),
            Some("longrope" | "su") if shapes.architecture.rotary == Rotary::PartAndLong => {
                self.longrope(&scaling, context)
            }
            Some(_) => Err(scaling.unsupported("rope_type", "default, linear, yarn, llama3")),
        }
    }

    fn yarn(&mut self, scaling: &HfConfig) -> Result<(), FormatError> {
        self.add("rope.scaling.type", KeyValue::String("yarn".to_owned()));
        self.real("rope.scaling.factor", scaling.f64("factor")?);
        if let Some(original) = scaling.opt_usize("original_max_position_embeddings")? {
            self.size("rope.scaling.original_context_length", original);
        }
        for (key, field) in [
            ("rope.scaling.yarn_attn_factor", "attention_factor"),
            ("rope.scaling.yarn_beta_fast", "beta_fast"),
            ("rope.scaling.yarn_beta_slow", "beta_slow"),
            ("rope.scaling.yarn_log_multiplier", "mscale_all_dim"),
        ] {
            if let Some(value) = scaling.opt_f64(field)? {
                self.real(key, value);
            }
        }
        Ok(())
    }

    /// One factor a frequency, which llama.cpp's converter computes from the parameters.
    fn llama3(
        &mut self,
        scaling: &HfConfig,
        theta: f64,
        rotated: usize,
    ) -> Result<(), FormatError> {
        let (factor, original) = (
            scaling.f64("factor")?,
            scaling.f64("original_max_position_embeddings")?,
        );
        let (low, high) = (
            scaling.f64("low_freq_factor")?,
            scaling.f64("high_freq_factor")?,
        );
        self.size("rope.scaling.original_context_length", original as usize);
        let factors = rope::llama3_factors(theta, rotated, factor, original, (low, high));
        let factors = factors.into_iter().map(|factor| factor as f32).collect();
        self.made.factors.push((rope::FACTORS.to_owned(), factors));
        Ok(())
    }

    /// Phi-3's factors for short and for long texts.
    fn longrope(&mut self, scaling: &HfConfig, context: usize) -> Result<(), FormatError> {
        let original = match scaling.opt_usize("original_max_position_embeddings")? {
            Some(original) => original,
            None => self.config.usize("original_max_position_embeddings")?,
        };
        self.add("rope.scaling.type", KeyValue::String("longrope".to_owned()));
        self.size("rope.scaling.original_context_length", original);
        let attention = rope::longrope_attention(context, original);
        self.real("rope.scaling.attn_factor", attention);
        for (field, name) in ["short_factor", "long_factor"]
            .into_iter()
            .zip(rope::LONGROPE_FACTORS)
        {
            let Some(factors) = scaling.opt_f64s(field)? else {
                return Err(scaling.unsupported(field, "a list of numbers"));
            };
            let factors = factors.into_iter().map(|factor| factor as f32).collect();
            self.made.factors.push((name.to_owned(), factors));
        }
        Ok(())
    }
}

/// The base of layers that slide, where they have one of their own.
fn local_theta(config: &HfConfig, all: Option<&HfConfig>) -> Result<Option<f64>, FormatError> {
    if let Some(sliding) = all
        .map(|all| all.opt_object("sliding_attention"))
        .transpose()?
        .flatten()
    {
        return sliding.opt_f64("rope_theta");
    }
    config.opt_f64("rope_local_base_freq")
}
