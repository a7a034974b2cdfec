//! Stages of a pipeline: which part of a model a process holds, and where trained values act.

use std::ops::Range;

use lowrank_kernels::DType;

use super::adapter::Adapter;
use super::config::{LinearId, ModelConfig, WeightId};

/// The part of a model that a process holds: some of the blocks, one after the other. The first stage has the embeddings, and the
/// last one the final norm and the head or classifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// The blocks.
    pub blocks: Range<usize>,
    /// Whether tokens come in here.
    pub is_first: bool,
    /// Whether the rows are scored here.
    pub is_last: bool,
}

/// Where a value acts.
#[derive(Clone, Copy)]
enum Place {
    Embeddings,
    Block(usize),
    Everywhere,
    Top,
}

impl Stage {
    /// The whole of a model.
    pub fn whole(config: &ModelConfig) -> Self {
        Self {
            blocks: 0..config.num_hidden_layers,
            is_first: true,
            is_last: true,
        }
    }

    /// Whether it is the whole model.
    pub fn is_whole(&self) -> bool {
        self.is_first && self.is_last
    }

    /// Whether one of the base's tensors is read here. A tied embedding is read at both ends.
    pub fn reads(&self, config: &ModelConfig, id: WeightId) -> bool {
        let is_head = id == WeightId::Embedding && config.ties_head();
        self.has(place_of(config, id)) || (is_head && self.is_last)
    }

    /// Bytes of its tensors, as of [`ModelConfig::weight_bytes`].
    pub fn weight_bytes(&self, config: &ModelConfig, dtype: DType) -> u64 {
        let own = config.weights().into_iter();
        let own = own.filter(|(id, _)| self.reads(config, *id));
        own.map(|(id, shape)| config.tensor_bytes(id, shape, dtype))
            .sum()
    }

    /// Which share of the model's bytes that is.
    pub fn share(&self, config: &ModelConfig, dtype: DType) -> f64 {
        let whole = Self::whole(config).weight_bytes(config, dtype);
        self.weight_bytes(config, dtype) as f64 / whole.max(1) as f64
    }

    fn has(&self, place: Place) -> bool {
        match place {
            Place::Embeddings => self.is_first,
            Place::Block(layer) => self.blocks.contains(&layer),
            Place::Everywhere => true,
            Place::Top => self.is_last,
        }
    }
}

/// Cuts a model into stages that take about the same time to train this adapter.
///
/// A block costs its parameters, once for the forward and once or twice for the backward where there is one; the head costs its table's. The
/// slowest stage is as fast as it can be.
///
/// # Errors
/// With the number of blocks, where there are fewer of them than stages.
pub fn split(config: &ModelConfig, adapter: &Adapter, stages: usize) -> Result<Vec<Stage>, usize> {
    let layers = config.num_hidden_layers;
    if stages == 0 || stages > layers {
        return Err(layers);
    }
    let costs = costs(config, adapter);
    let sums: Vec<u64> = std::iter::once(0)
        .chain(costs.iter().scan(0, |sum, cost| {
            *sum += cost;
            Some(*sum)
        }))
        .collect();
    // least[n][end]: the cost of the slowest of n stages that have the blocks before `end`, and where the last of them begins.
    let mut least = vec![vec![(u64::MAX, 0); layers + 1]; stages + 1];
    least[0][0] = (0, 0);
    for n in 1..=stages {
        for end in n..=layers {
            least[n][end] = (n - 1..end)
                .map(|begin| {
                    let own = sums[end] - sums[begin];
                    (least[n - 1][begin].0.max(own), begin)
                })
                .min()
                .unwrap_or((u64::MAX, 0));
        }
    }
    let mut bounds = vec![layers];
    for n in (1..=stages).rev() {
        let end = bounds[bounds.len() - 1];
        bounds.push(least[n][end].1);
    }
    bounds.reverse();
    let all = bounds.windows(2).enumerate();
    Ok(all
        .map(|(n, ends)| Stage {
            blocks: ends[0]..ends[1],
            is_first: n == 0,
            is_last: n + 1 == stages,
        })
        .collect())
}

/// What each block costs; the last one with the head behind it.
fn costs(config: &ModelConfig, adapter: &Adapter) -> Vec<u64> {
    let layers = config.num_hidden_layers;
    let lowest = adapter.lowest_layer().unwrap_or(layers);
    let mut blocks = vec![0; layers];
    let mut head = 0;
    for (id, (rows, cols)) in config.weights() {
        let size = (rows * cols) as u64;
        let trained = u64::from(adapter.replaced.contains_key(&id));
        match place_of(config, id) {
            Place::Block(layer) => {
                let backward = u64::from(layer >= lowest) * (1 + trained);
                blocks[layer] += size * (1 + backward);
            }
            Place::Top => head += size * (2 + trained),
            Place::Embeddings if id == WeightId::Embedding => {
                head += size * u64::from(config.ties_head()) * (2 + trained);
            }
            Place::Embeddings | Place::Everywhere => {}
        }
    }
    if let Some(last) = blocks.last_mut() {
        *last += head;
    }
    blocks
}

fn place_of(config: &ModelConfig, id: WeightId) -> Place {
    match id {
        WeightId::Embedding
        | WeightId::Positions
        | WeightId::TokenTypes
        | WeightId::EmbeddingNorm(_) => Place::Embeddings,
        WeightId::Relative | WeightId::RelativeNorm(_) => Place::Everywhere,
        WeightId::Linear(linear, _) => place_of_linear(config, linear),
        WeightId::Norm(layer, ..) => Place::Block(layer),
        WeightId::FinalNorm(_) | WeightId::Head | WeightId::ClassifierNorm(_) => Place::Top,
    }
}

/// The linears of a classifier are of a layer behind the last block.
fn place_of_linear(config: &ModelConfig, linear: LinearId) -> Place {
    if linear.layer < config.num_hidden_layers {
        Place::Block(linear.layer)
    } else {
        Place::Top
    }
}

/// For each slot of an adapter, the stages in which it acts, ascending.
pub(crate) fn stages_of_slots(
    config: &ModelConfig,
    adapter: &Adapter,
    stages: &[Stage],
) -> Vec<Vec<usize>> {
    let mut found = vec![Vec::new(); adapter.params.slots()];
    for (slot, place) in places(config, adapter) {
        let has = (0..stages.len()).filter(|stage| stages[*stage].has(place));
        found[slot].extend(has);
    }
    for of_slot in &mut found {
        of_slot.sort_unstable();
        of_slot.dedup();
        // One that acts nowhere is somebody's all the same.
        if of_slot.is_empty() {
            of_slot.push(0);
        }
    }
    found
}

/// Where each slot acts; one that acts in several places comes several times.
fn places(config: &ModelConfig, adapter: &Adapter) -> Vec<(usize, Place)> {
    let mut places = Vec::new();
    for (linear, branches) in &adapter.low_rank {
        let place = place_of_linear(config, *linear);
        let slots = branches.iter().flat_map(|branch| [branch.a, branch.b]);
        places.extend(slots.map(|slot| (slot, place)));
    }
    for (linear, slot) in &adapter.magnitudes {
        places.push((*slot, place_of_linear(config, *linear)));
    }
    for (linear, site) in &adapter.scaled {
        let place = place_of_linear(config, *linear);
        let slots = [site.input, site.output].into_iter().flatten();
        places.extend(slots.map(|slot| (slot, place)));
    }
    let unties = adapter.replaced.contains_key(&WeightId::Head);
    let is_tied = config.ties_head() && !unties;
    for (&id, &slot) in &adapter.replaced {
        places.push((slot, place_of(config, id)));
        if id == WeightId::Embedding && is_tied {
            places.push((slot, Place::Top));
        }
    }
    for ((layer, _), site) in &adapter.bottleneck {
        places.extend(site.slots().map(|slot| (slot, Place::Block(*layer))));
    }
    let rows = &adapter.token_rows;
    let embedding = rows.embedding.as_ref();
    places.extend(embedding.map(|rows| (rows.slot(), Place::Embeddings)));
    let head = rows.head.as_ref();
    places.extend(head.map(|rows| (rows.slot(), Place::Top)));
    let sites = &adapter.virtual_tokens;
    for (layer, (keys, values)) in sites.key_values.iter().enumerate() {
        places.push((*keys, Place::Block(layer)));
        places.push((*values, Place::Block(layer)));
    }
    let embeddings = [sites.prefix, sites.infix].into_iter().flatten();
    places.extend(embeddings.map(|slot| (slot, Place::Embeddings)));
    places
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::presets;
    use crate::tuning::{Method, MethodOptions};

    #[test]
    fn stages_cover_the_blocks_and_none_is_much_slower() {
        let config = presets::config("llama-3-8b").unwrap();
        let lora = Method::Lora;
        let adapter = lora.lay_out(&MethodOptions::default(), &config).unwrap();
        for stages in [1, 2, 3, 4, 8, 32] {
            let all = split(&config, &adapter, stages).unwrap();
            assert_eq!(all.len(), stages);
            assert_eq!(all[0].blocks.start, 0);
            assert_eq!(all[stages - 1].blocks.end, config.num_hidden_layers);
            assert!(
                all.windows(2)
                    .all(|two| two[0].blocks.end == two[1].blocks.start)
            );
            assert!(all.iter().all(|stage| !stage.blocks.is_empty()));
            assert!(all[0].is_first && all[stages - 1].is_last);
        }
        // The head weighs about as much as two and a half blocks.
        let two = split(&config, &adapter, 2).unwrap();
        assert!((16..=18).contains(&two[0].blocks.len()), "{two:?}");
        let shares: Vec<f64> = two
            .iter()
            .map(|stage| stage.share(&config, DType::Bf16))
            .collect();
        assert!(
            (shares.iter().sum::<f64>() - 1.0).abs() < 1e-9,
            "{shares:?}"
        );
        assert!(
            shares.iter().all(|share| (0.4..0.6).contains(share)),
            "{shares:?}"
        );
        assert_eq!(split(&config, &adapter, 33), Err(32));
    }

    #[test]
    fn every_tensor_is_read_somewhere_and_a_tied_table_at_both_ends() {
        let config = presets::config("smollm2-135m").unwrap();
        assert!(config.tie_word_embeddings);
        let adapter = Method::Full
            .lay_out(&MethodOptions::default(), &config)
            .unwrap();
        let stages = split(&config, &adapter, 3).unwrap();
        for (id, _) in config.weights() {
            let readers = stages
                .iter()
                .filter(|stage| stage.reads(&config, id))
                .count();
            let expected = if id == WeightId::Embedding { 2 } else { 1 };
            assert_eq!(readers, expected, "{id:?}");
        }
        let of_slots = stages_of_slots(&config, &adapter, &stages);
        let table = adapter.replaced[&WeightId::Embedding];
        assert_eq!(of_slots[table], [0, 2]);
        let others = (0..of_slots.len()).filter(|slot| *slot != table);
        assert!(others.into_iter().all(|slot| of_slots[slot].len() == 1));
    }
}
