//! How A and B begin (`init_lora_weights`), and what becomes of a beginning that is a part of the weight.
//!
//! [`PiSSA`](low_rank) and [`OLoRA`](low_rank) begin with a part of W itself: s·B₀·A₀ is near W, and what is left of W is frozen. The base here
//! cannot be changed, since other adapters share it and a file may be mapped behind it. So A₀ and B₀ are kept, frozen
//! ([`Adapter::initial`]), and the layer computes W x + s·(B·A − B₀·A₀) x, which is the same.
//!
//! What is saved is LoRA of twice the rank beside the base as it is, as PEFT's `path_initial_model_for_weight_conversion` makes it:
//! A = [A; A₀], B = [B, −B₀] and the scale as it was.

mod choice;
mod low_rank;
mod quantized;

use std::borrow::Cow;

use lowrank_formats::peft::LoraConfig;
use lowrank_kernels::{Arena, Layout, Tensor, View};
use rayon::prelude::*;

pub use choice::InitLoraWeights;
pub use quantized::{Loftq, loftq};

use super::inject::choose;
use super::{Candidate, Settings};
use crate::Error;
use crate::fields::Names;
use crate::model::{Adapter, LowRankSite, ModelConfig, Part, WeightId, Weights};
use crate::random::mix;
use crate::svd::Matrix;
use crate::tuning::Starting;

/// Numbers of the weights that are widened at a time, of several modules at once; one module is always widened as a whole.
const AT_ONCE: usize = 1 << 26;

/// What A and B begin with: B [out, r] and A [r, in].
pub(super) struct Beginning {
    pub(super) b: Matrix,
    pub(super) a: Matrix,
}

impl InitLoraWeights {
    /// Whether A and B are made of the base's weights.
    pub fn is_of_the_weights(self) -> bool {
        self.is_taken_off() || self == Self::Loftq
    }

    /// Whether A and B begin with a part of the weight, which is taken off it.
    pub fn is_taken_off(self) -> bool {
        matches!(self, Self::Pissa | Self::PissaNiter(_) | Self::Olora)
    }
}

/// Gives an adapter whose branches have their slots room for what they begin with, where that is to be taken off.
pub(super) fn lay_out(adapter: &mut Adapter, init: InitLoraWeights) {
    if init.is_taken_off() {
        let shapes = (0..branch_slots(adapter)).map(|slot| adapter.params.shape(slot));
        adapter.initial = Some(Arena::new(&shapes.collect::<Vec<_>>()));
    }
}

/// The slots of branches, which are the first ones.
fn branch_slots(adapter: &Adapter) -> usize {
    let sites = adapter.low_rank.values().flatten();
    sites.map(|site| site.b + 1).max().unwrap_or(0)
}

/// Adds what does not go together to `problems`.
pub(super) fn check(options: &Settings, names: &dyn Names, problems: &mut Vec<String>) {
    let is_loftq = options.init_lora_weights == InitLoraWeights::Loftq;
    if options.use_dora && options.init_lora_weights.is_taken_off() {
        problems.push(format!(
            "{} cannot go with {}, whose norms are those of the weight without what A and B begin with; leave one of them out",
            names.given("init_lora_weights"),
            names.given("use_dora")
        ));
    }
    if !is_loftq && options.loftq_weights.is_some() {
        problems.push(format!(
            "{} is read for {} alone; give both, or leave it out",
            names.given("loftq_weights"),
            names.to_give_as("init_lora_weights", "loftq")
        ));
    }
}

/// Gives the branches the values that are made of the weights, where the options ask for it; and says what is to be known of them, behind
/// what was said before.
///
/// Weights are widened a few at a time ([`AT_ONCE`]). What another stage of a pipeline has is left as it is.
///
/// # Errors
/// `LoftQ` without the weights before they were quantized, or beside a base that is not quantized.
pub(super) fn begin(
    adapter: &mut Adapter,
    options: &Settings,
    lora: &LoraConfig,
    with: &Starting,
) -> Result<String, Error> {
    let (init, weights) = (options.init_lora_weights, with.decoder.weights());
    lay_out(adapter, init);
    let places = choose(weights.config(), lora)?;
    if with.is_resumed || !init.is_of_the_weights() {
        return Ok(String::new());
    }
    let source = if init == InitLoraWeights::Loftq {
        let folder = options.loftq_weights.as_deref();
        Some(quantized::Source::open(folder, with, &places)?)
    } else {
        None
    };
    let model = weights.config();
    let size = |place: &Candidate| {
        let (input, output) = model.linear_shape(place.id.kind);
        input * output
    };
    let largest = places.iter().map(size).max().unwrap_or(1);
    let at_once = (AT_ONCE / largest).clamp(1, rayon::current_num_threads());
    let seed = with.seed;
    let numbered: Vec<(usize, &Candidate)> = places.iter().enumerate().collect();
    for some in numbered.chunks(at_once) {
        let made = some.par_iter().map(|(index, place)| {
            let (r, scale) = (lora.rank_of(&place.name), lora.scale_of(&place.name));
            let begins = match &source {
                Some(source) => source.beginning(weights, place, r, scale)?,
                None => dense(weights, place)
                    .map(|w| low_rank::beginning(&w, init, r, scale, mix(seed, *index as u64))),
            };
            Ok::<_, Error>((*index, begins))
        });
        for (index, begins) in made.collect::<Result<Vec<_>, _>>()? {
            if let Some(Beginning { b, a }) = begins {
                put(adapter, 2 * index, &a);
                put(adapter, 2 * index + 1, &b);
            }
        }
    }
    Ok(source.map_or_else(String::new, |source| source.note()))
}

/// Writes a slot's values, and what they are at first. Where a weight has fewer directions than r, the rows of A behind them stay random,
/// and the columns of B nought.
fn put(adapter: &mut Adapter, slot: usize, values: &Matrix) {
    let cols = adapter.params.shape(slot).1;
    let mut all = adapter.params.view(slot).to_vec();
    for (row, line) in all.chunks_exact_mut(cols).enumerate().take(values.nrows()) {
        for (to, from) in line.iter_mut().zip(values.row(row).iter()) {
            *to = *from as f32;
        }
    }
    adapter.params.view_mut(slot).copy_from_f32(&all);
    if let Some(initial) = &mut adapter.initial {
        initial.view_mut(slot).copy_from_f32(&all);
    }
}

/// The weight of a place as f32 [out, in]; `None` where another stage of a pipeline has it.
fn dense(weights: &Weights, place: &Candidate) -> Option<Tensor> {
    let id = weight_of(place);
    let view = weights.get(id)?;
    Some(dense_of(weights.config(), place, view))
}

/// The tensor that a place is of.
fn weight_of(place: &Candidate) -> WeightId {
    WeightId::Linear(place.id, Part::Weight)
}

/// The rows of a linear's weight that belong to a place, as f32 [out, in].
fn dense_of(model: &ModelConfig, place: &Candidate, view: View<'_>) -> Tensor {
    let (input, output) = model.linear_shape(place.id.kind);
    let columns = place
        .part
        .map_or(0..output, |part| model.fused_columns(part));
    let n = columns.len();
    match model.linear_layout(place.id.kind) {
        Layout::OutIn => Tensor::from_f32(n, input, view.slice_rows(columns).to_vec()),
        Layout::InOut => {
            let stored = view.to_vec();
            let transposed = columns
                .flat_map(|column| stored[column..].iter().step_by(output))
                .copied();
            Tensor::from_f32(n, input, transposed.collect())
        }
    }
}

/// The adapter as its files have it, and their config: plain LoRA of twice the rank where something is taken off.
pub(super) fn plain<'a>(
    lora: &'a LoraConfig,
    adapter: &'a Adapter,
) -> (Cow<'a, LoraConfig>, Plain<'a>) {
    if adapter.initial.is_none() {
        return (Cow::Borrowed(lora), Plain::AsItIs(adapter));
    }
    // The scale lora_alpha / r, or lora_alpha / √r, stays as it is.
    let factor = if lora.use_rslora { 2.0_f64.sqrt() } else { 2.0 };
    let mut config = lora.clone();
    config.r *= 2;
    config.lora_alpha *= factor;
    config.rank_pattern.iter_mut().for_each(|(_, r)| *r *= 2);
    config
        .alpha_pattern
        .iter_mut()
        .for_each(|(_, alpha)| *alpha *= factor);
    (Cow::Owned(config), Plain::Joined(Box::new(joined(adapter))))
}

/// An adapter that takes nothing off.
pub(super) enum Plain<'a> {
    /// It never did.
    AsItIs(&'a Adapter),
    /// Its branches have twice the rank.
    Joined(Box<Adapter>),
}

impl std::ops::Deref for Plain<'_> {
    type Target = Adapter;

    fn deref(&self) -> &Adapter {
        match self {
            Self::AsItIs(adapter) => adapter,
            Self::Joined(adapter) => adapter,
        }
    }
}

/// Branches [A; A₀] and [B, −B₀] in place of those from which B₀·A₀ is taken off.
fn joined(adapter: &Adapter) -> Adapter {
    let sites: Vec<&LowRankSite> = adapter.low_rank.values().flatten().collect();
    let mut shapes: Vec<_> = (0..adapter.params.slots())
        .map(|slot| adapter.params.shape(slot))
        .collect();
    for site in &sites {
        shapes[site.a].0 *= 2;
        shapes[site.b].1 *= 2;
    }
    let mut params = Arena::new(&shapes);
    for slot in branch_slots(adapter)..shapes.len() {
        params.view_mut(slot).copy_from(adapter.params.view(slot));
    }
    for site in sites {
        let Some((a, b)) = adapter.initial_of(site) else {
            continue;
        };
        let mut rows = adapter.params.view(site.a).to_vec();
        rows.extend(a.to_vec());
        params.view_mut(site.a).copy_from_f32(&rows);
        let (own, first, r) = (adapter.params.view(site.b).to_vec(), b.to_vec(), b.cols());
        let columns: Vec<f32> = own
            .chunks_exact(r)
            .zip(first.chunks_exact(r))
            .flat_map(|(own, first)| own.iter().copied().chain(first.iter().map(|value| -value)))
            .collect();
        params.view_mut(site.b).copy_from_f32(&columns);
    }
    Adapter {
        initial: None,
        ..adapter.with_params(params)
    }
}
