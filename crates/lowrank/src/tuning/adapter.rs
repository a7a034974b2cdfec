//! Adapter layers: `y + act(h Dᵀ + b) Uᵀ + c` between frozen layers, D [r, C] and U [C, r].
//!
//! - Houlsby et al. (2019): behind the attention and behind the MLP of every block, inside the residual branch.
//! - Lin, Madotto and Fung (2020): behind the MLP, on the residual stream, with a layer norm of its own before D.
//! - Pfeiffer et al. (2021): behind the MLP alone, inside the residual branch.
//!
//! U and both biases begin at zero, so that training starts from the base itself. Nothing in a model's architecture could
//! hold these layers, so they cannot be merged.

use std::path::Path;

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;
use lowrank_kernels::{Activation, fill_uniform};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::files::{check_keys, finish, write_both};
use super::{
    AdapterConfig, BaseMark, Loaded, MethodConfig, MethodOptions, MethodSpec, Size, Started,
    Starting,
};
use crate::Error;
use crate::fields::{Field, Fields, fields};
use crate::model::{Adapter, BottleneckSite, ModelConfig, Sublayer, families};
use crate::random::mix;

/// `peft_type` in adapter_config.json.
const PEFT_TYPE: &str = "LOWRANK_ADAPTER";

fields! {
    /// The options of adapter layers.
    pub struct Settings {
        /// Where adapter layers stand
        #[arg(value_name = "KIND", value_enum, help_heading = "Other methods")]
        #[fixes(Shape)]
        #[absent(Kind::Houlsby)]
        pub adapter_kind: Kind = Kind::Houlsby,

        /// Width of adapter layers
        #[arg(value_name = "N", help_heading = "Other methods")]
        #[range(COUNT)]
        #[fixes(Shape)]
        #[absent(64)]
        pub bottleneck: usize = 64,
    }
}

impl Settings {
    fn options(&self) -> Options {
        Options {
            kind: self.adapter_kind,
            bottleneck: self.bottleneck,
        }
    }
}

/// What its files say.
pub type Config = Options;

/// Adapter layers in the table of methods.
pub(super) struct Spec;

impl MethodSpec for Spec {
    fn title(&self) -> &'static str {
        "adapter layers"
    }

    fn help(&self) -> &'static str {
        "New layers of a small width between the frozen ones"
    }

    fn learning_rate(&self) -> f64 {
        1e-3
    }

    fn fields(&self) -> Vec<Field> {
        Settings::fields()
    }

    fn label(&self, options: &MethodOptions) -> String {
        let Options { kind, bottleneck } = options.adapter.options();
        format!("{} {bottleneck}", kind.name())
    }

    fn merges(&self) -> bool {
        false
    }

    fn size(&self) -> Option<Size> {
        Some(Size {
            key: "bottleneck",
            follower: None,
            set: |options, width| options.adapter.bottleneck = width,
            most: |model| model.hidden_size,
        })
    }

    fn lay_out(&self, options: &MethodOptions, model: &ModelConfig) -> Result<Adapter, Error> {
        lay_out(model, options.adapter.options())
    }

    fn start(&self, options: &MethodOptions, with: &Starting) -> Result<Started, Error> {
        let (model, options) = (with.decoder.config(), options.adapter.options());
        Ok(Started {
            adapter: inject(model, options, with.seed)?,
            coverage: Some(coverage(model, options)),
            config: Some(AdapterConfig::Adapter(options)),
        })
    }

    fn peft_types(&self) -> &'static [&'static str] {
        &[PEFT_TYPE]
    }

    fn load(&self, folder: &Path, raw: &HfConfig, model: &ModelConfig) -> Result<Loaded, Error> {
        let options = read(raw, model)?;
        let adapter = lay_out(model, options)?;
        let coverage = coverage(model, options);
        finish(
            folder,
            model,
            adapter,
            AdapterConfig::Adapter(options),
            coverage,
        )
    }
}

impl MethodConfig for Config {
    fn save(
        &self,
        folder: &Path,
        model: &ModelConfig,
        adapter: &Adapter,
        base: BaseMark,
    ) -> Result<(), Error> {
        write_both(folder, PEFT_TYPE, self.options(), (model, adapter), base)
    }

    fn options(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("adapter_kind", self.kind.name().into()),
            ("bottleneck", self.bottleneck.into()),
        ]
    }
}

/// Where the layers stand (`adapter_kind`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Kind {
    /// Behind attention and feed-forward (Houlsby et al., 2019).
    ///
    /// With GELU.
    #[default]
    Houlsby,
    /// Behind the feed-forward, with a layer norm of its own (Lin et al., 2020).
    ///
    /// On the residual stream, with ReLU.
    Lin,
    /// Behind the feed-forward (Pfeiffer et al., 2021).
    ///
    /// With ReLU.
    Pfeiffer,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Houlsby => "houlsby",
            Self::Lin => "lin",
            Self::Pfeiffer => "pfeiffer",
        }
    }

    fn places(self) -> &'static [Sublayer] {
        match self {
            Self::Houlsby => &[Sublayer::Attention, Sublayer::Mlp],
            Self::Lin | Self::Pfeiffer => &[Sublayer::Mlp],
        }
    }

    fn activation(self) -> Activation {
        match self {
            Self::Houlsby => Activation::GeluTanh,
            Self::Lin | Self::Pfeiffer => Activation::Relu,
        }
    }
}

/// Which layers there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where they stand.
    pub kind: Kind,
    /// r
    pub bottleneck: usize,
}

fn read(raw: &HfConfig, model: &ModelConfig) -> Result<Options, FormatError> {
    check_keys(raw, &["adapter_kind", "bottleneck"])?;
    let all = [Kind::Houlsby, Kind::Lin, Kind::Pfeiffer];
    let named = raw.str("adapter_kind")?;
    let kind = all
        .into_iter()
        .find(|kind| kind.name() == named)
        .ok_or_else(|| raw.unsupported("adapter_kind", all.map(Kind::name).join(", ")))?;
    let bottleneck = raw.usize("bottleneck")?;
    if !(1..=model.hidden_size).contains(&bottleneck) {
        let most = model.hidden_size;
        return Err(raw.unsupported(
            "bottleneck",
            format!("a number from 1 to the model's {most}"),
        ));
    }
    Ok(Options { kind, bottleneck })
}

/// New layers that change nothing yet.
///
/// # Errors
/// A bottleneck that is wider than the model.
pub fn inject(config: &ModelConfig, options: Options, seed: u64) -> Result<Adapter, Error> {
    let mut adapter = lay_out(config, options)?;
    let bound = 1.0 / (config.hidden_size as f32).sqrt();
    for site in adapter.bottleneck.values() {
        let slot = site.down.0;
        let key = mix(seed, slot as u64);
        fill_uniform(adapter.params.view_mut(slot), -bound, bound, key);
        if let Some((weight, _)) = site.norm {
            adapter.params.view_mut(weight).fill(1.0);
        }
    }
    Ok(adapter)
}

/// Number of trained values: L_a · (2·C·r + r + C) + 2 · L_ln · C, as Hu et al. (2021) count them.
pub fn parameters(config: &ModelConfig, options: &Options) -> usize {
    let (c, r) = (config.hidden_size, options.bottleneck);
    let layers = config.num_hidden_layers * options.kind.places().len();
    let norms = if options.kind == Kind::Lin { layers } else { 0 };
    layers * (2 * c * r + r + c) + 2 * norms * c
}

fn lay_out(config: &ModelConfig, options: Options) -> Result<Adapter, Error> {
    let Options { kind, bottleneck } = options;
    let c = config.hidden_size;
    if !(1..=c).contains(&bottleneck) {
        return Err(Error::Settings(format!(
            "bottleneck is {bottleneck}, and the model's hidden size is {c}; give a number from 1 to that"
        )));
    }
    let mut params = Vec::new();
    let mut sites = Vec::new();
    for layer in 0..config.num_hidden_layers {
        for &place in kind.places() {
            let module = families::bottleneck_module(config, layer, place);
            let mut add = |part: &str, shape| {
                params.push((format!("{module}.{part}"), shape));
                params.len() - 1
            };
            let site = BottleneckSite {
                norm: (kind == Kind::Lin)
                    .then(|| (add("norm.weight", (1, c)), add("norm.bias", (1, c)))),
                down: (
                    add("down.weight", (bottleneck, c)),
                    add("down.bias", (1, bottleneck)),
                ),
                up: (add("up.weight", (c, bottleneck)), add("up.bias", (1, c))),
                activation: kind.activation(),
            };
            sites.push(((layer, place), site));
        }
    }
    Ok(Adapter {
        bottleneck: sites.into_iter().collect(),
        ..Adapter::new(params)
    })
}

/// What is trained, in words.
fn coverage(config: &ModelConfig, options: Options) -> String {
    format!(
        "{} adapter layers ({}), {} trainable parameters",
        config.num_hidden_layers * options.kind.places().len(),
        options.kind.name(),
        parameters(config, &options)
    )
}
