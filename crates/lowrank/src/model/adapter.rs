//! The table that an adapter is: trainable values, and where in the model each of them acts.
//!
//! The decoder reads these tables and knows nothing of the methods that fill them ([`tuning`](crate::tuning)). The kinds of entry:
//!
//! - `low_rank`: a branch `scale · (x Aᵀ) Bᵀ` added to some columns of a linear's output, less what it was at first where it began as a
//!   part of the weight (`initial`);
//! - `magnitudes`: norms that the rows of a linear's weight are given, with the branches beside it (`magnitude`);
//! - `scaled`: factors of a linear's input or output columns;
//! - `replaced`: a weight whose values are the adapter's own, be it one of the base's (full training: all of them) or one
//!   that the base does not have (a bias, the head of tied embeddings);
//! - `bottleneck`: two linears with a nonlinearity between them, behind a block's attention or MLP;
//! - `token_rows`: rows of the embedding, or of the head, whose values are the adapter's own;
//! - `virtual_tokens`: embeddings, or keys and values in every block, that stand where tokens would.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use lowrank_kernels::{Activation, Arena, DType, Tensor, View, embedding_forward, frobenius_norm};

use super::batch::{VirtualPart, VirtualTokens};
use super::config::{BlockNorm, LinearId, LinearKind, ModelConfig, Sublayer, WeightId};
use super::families;
use super::magnitude::KeptNorms;
use super::weights::{Weights, is_last_linear};

/// A low-rank branch beside a linear.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRankSite {
    /// Arena slot of A, [r, in].
    pub a: usize,
    /// Arena slot of B, [n, r], n being the columns that the branch writes.
    pub b: usize,
    /// lora_alpha / r, or lora_alpha / √r.
    pub scale: f32,
    /// The first column of the linear's output that the branch writes.
    pub out_offset: usize,
    /// Probability that an element of the branch's input is dropped in training.
    pub dropout: f32,
}

/// Factors of a linear's columns: `((x ⊙ input) Wᵀ + b, and its branches) ⊙ output`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScaleSite {
    /// Arena slot of the input's factors, [1, in].
    pub input: Option<usize>,
    /// Arena slot of the output's factors, [1, out].
    pub output: Option<usize>,
}

/// Two linears with a nonlinearity between them: `y + act(h Dᵀ + b) Uᵀ + c`.
///
/// y [T, C] is what the sublayer gives to the residual stream, and h is y too; with a norm, y is the stream behind the
/// sublayer and h its layer norm.
#[derive(Clone, Debug, PartialEq)]
pub struct BottleneckSite {
    /// Arena slots of the layer norm's weight and bias, each [1, C].
    pub norm: Option<(usize, usize)>,
    /// Arena slots of D [r, C] and of its bias b [1, r].
    pub down: (usize, usize),
    /// Arena slots of U [C, r] and of its bias c [1, C].
    pub up: (usize, usize),
    /// The nonlinearity.
    pub activation: Activation,
}

impl BottleneckSite {
    /// Epsilon of the layer norm.
    pub const NORM_EPS: f32 = 1e-5;

    /// Every slot of it.
    pub(crate) fn slots(&self) -> impl Iterator<Item = usize> {
        let pairs = [self.norm, Some(self.down), Some(self.up)];
        pairs
            .into_iter()
            .flatten()
            .flat_map(|(weight, bias)| [weight, bias])
    }
}

/// How far back in a block its backward has to go; each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// Nothing in it is trained.
    Nothing,
    /// To the bottleneck behind the MLP.
    MlpBottleneck,
    /// To the norm before the MLP.
    Mlp,
    /// To the bottleneck behind the attention.
    AttentionBottleneck,
    /// To the attention's output projection.
    Output,
    /// To the norm before the attention.
    Attention,
    /// To the block's input.
    Input,
}

/// Rows of a table of tokens whose values are an adapter's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRows {
    ids: Vec<u32>,
    places: HashMap<u32, u32>,
    slot: usize,
}

impl TokenRows {
    /// The rows of these tokens, each named once, in the order of the slot's rows [n, C].
    pub fn new(ids: Vec<u32>, slot: usize) -> Self {
        let places = ids.iter().copied().zip(0..).collect();
        Self { ids, places, slot }
    }

    /// The tokens.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Arena slot of the rows.
    pub fn slot(&self) -> usize {
        self.slot
    }

    /// Which of the rows is a token's, if one is.
    pub fn place(&self, id: u32) -> Option<u32> {
        self.places.get(&id).copied()
    }
}

/// Rows of tokens that are an adapter's own. Where the head is tied to the embedding, both may have the same slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenRowSites {
    /// Of the embedding.
    pub embedding: Option<TokenRows>,
    /// Of the output projection.
    pub head: Option<TokenRows>,
}

impl TokenRowSites {
    /// Rows of each table that has a slot of its own, with the weight that they belong to.
    pub fn tables(&self) -> impl Iterator<Item = (WeightId, &TokenRows)> {
        let embedding = self.embedding.as_ref();
        let shared = embedding.map(TokenRows::slot);
        let head = self.head.as_ref();
        let head = head.filter(|head| Some(head.slot()) != shared);
        let embedding = embedding.map(|rows| (WeightId::Embedding, rows));
        embedding
            .into_iter()
            .chain(head.map(|rows| (WeightId::Head, rows)))
    }

    /// Whether they take apart what the base has as one table: the head's rows are not the embedding's.
    pub fn untie(&self, config: &ModelConfig) -> bool {
        let slot = |rows: &Option<TokenRows>| rows.as_ref().map(TokenRows::slot);
        config.ties_head() && slot(&self.embedding) != slot(&self.head)
    }
}

/// Trained rows that stand where tokens would.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VirtualSites {
    /// Slots of keys and values [n, KV·D] before every sequence, for each block; empty: none.
    pub key_values: Vec<(usize, usize)>,
    /// Slot of embeddings [n, C] before every sequence.
    pub prefix: Option<usize>,
    /// Slot of embeddings [n, C] between prompt and completion.
    pub infix: Option<usize>,
}

impl VirtualSites {
    /// Slot of some of the embeddings.
    pub(crate) fn embedding(&self, part: VirtualPart) -> Option<usize> {
        match part {
            VirtualPart::Prefix => self.prefix,
            VirtualPart::Infix => self.infix,
        }
    }
}

/// Modules that are trained as a whole beside what a method adapts. Their weights are [replaced](Adapter::replaced).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SavedModules {
    /// Their names, as `modules_to_save` has them.
    pub names: Vec<String>,
    /// The slots of their values, behind the method's own.
    pub slots: Range<usize>,
}

/// Trainable values and where in the model they act.
pub struct Adapter {
    /// The values, f32.
    pub params: Arena,
    /// A name for each slot of `params`, as the method saves it.
    pub names: Vec<String>,
    /// Low-rank branches by the linear they stand beside.
    pub low_rank: HashMap<LinearId, Vec<LowRankSite>>,
    /// Arena slot of the magnitudes m [1, out] of a linear with branches, as DoRA has them.
    pub magnitudes: HashMap<LinearId, usize>,
    /// A and B of the low-rank branches as they were at first, in the slots that they have in `params`, where these are the first ones. A
    /// branch adds `scale · (B·A − B₀·A₀)` to its linear then: the linear has its own values at the start, whatever A and B begin with. They
    /// are frozen.
    pub initial: Option<Arena>,
    /// Factors of columns by the linear that they belong to.
    pub scaled: HashMap<LinearId, ScaleSite>,
    /// Weights whose values are slots of `params`: the base's, or ones that the base does not have.
    pub replaced: HashMap<WeightId, usize>,
    /// Bottlenecks by block and place.
    pub bottleneck: HashMap<(usize, Sublayer), BottleneckSite>,
    /// Rows of tables of tokens whose values are its own.
    pub token_rows: TokenRowSites,
    /// Rows that stand where tokens would.
    pub virtual_tokens: VirtualSites,
    /// Modules that are trained as a whole beside what the method adapts.
    pub saved: SavedModules,
    /// Of the linears with magnitudes.
    pub(crate) norms: KeptNorms,
}

impl Adapter {
    /// Values that act nowhere yet: slots of zeros with their names.
    pub fn new(params: Vec<(String, (usize, usize))>) -> Self {
        let (names, shapes): (Vec<_>, Vec<_>) = params.into_iter().unzip();
        Self {
            params: Arena::new(&shapes),
            names,
            low_rank: HashMap::new(),
            magnitudes: HashMap::new(),
            initial: None,
            scaled: HashMap::new(),
            replaced: HashMap::new(),
            bottleneck: HashMap::new(),
            token_rows: TokenRowSites::default(),
            virtual_tokens: VirtualSites::default(),
            saved: SavedModules::default(),
            norms: KeptNorms::default(),
        }
    }

    /// Adds slots of zeros behind the others, whose values stand in for these weights.
    pub(crate) fn replace_also(&mut self, weights: Vec<(String, WeightId, (usize, usize))>) {
        let own = self.params.slots();
        let shapes: Vec<_> = weights.iter().map(|(_, _, shape)| *shape).collect();
        self.params.extend(&shapes);
        self.saved.slots = own..own + weights.len();
        for (slot, (name, id, _)) in (own..).zip(weights) {
            self.names.push(name);
            self.replaced.insert(id, slot);
        }
    }

    /// A copy that does nothing but to replace some of the weights that this one replaces.
    pub(crate) fn with_replaced_alone(&self, wanted: impl Fn(WeightId) -> bool) -> Self {
        let replaced = self.replaced.iter().filter(|(id, _)| wanted(**id));
        Self {
            params: self.params.clone(),
            names: self.names.clone(),
            replaced: replaced.map(|(id, slot)| (*id, *slot)).collect(),
            ..Self::new(Vec::new())
        }
    }

    /// The same tables with other values, which are laid out alike.
    pub(crate) fn with_params(&self, params: Arena) -> Self {
        Self {
            params,
            names: self.names.clone(),
            low_rank: self.low_rank.clone(),
            magnitudes: self.magnitudes.clone(),
            initial: self.initial.clone(),
            scaled: self.scaled.clone(),
            replaced: self.replaced.clone(),
            bottleneck: self.bottleneck.clone(),
            token_rows: self.token_rows.clone(),
            virtual_tokens: self.virtual_tokens.clone(),
            saved: self.saved.clone(),
            norms: KeptNorms::default(),
        }
    }

    /// A and B of a branch as they were at first, where they are taken off again.
    pub(crate) fn initial_of(&self, site: &LowRankSite) -> Option<(View<'_>, View<'_>)> {
        let initial = self.initial.as_ref()?;
        Some((initial.view(site.a), initial.view(site.b)))
    }

    /// Rounds every value to what `dtype` can hold.
    pub(crate) fn round_to(&mut self, dtype: DType) {
        self.forget_norms();
        for slot in 0..self.params.slots() {
            if !self.params.is_held(slot) {
                continue;
            }
            let (rows, cols) = self.params.shape(slot);
            let rounded = Tensor::from_f32_as(rows, cols, &self.params.view(slot).to_vec(), dtype);
            self.params.view_mut(slot).copy_from(rounded.view());
        }
    }

    /// Takes the classifier's last linear from the base, which may have it for another number of labels.
    pub(crate) fn renew_classifier(&mut self, weights: &Weights) {
        let renewed: HashMap<usize, WeightId> = self
            .replaced
            .iter()
            .filter(|(id, _)| is_last_linear(**id))
            .map(|(id, slot)| (*slot, *id))
            .collect();
        let shape = |slot: usize| match renewed.get(&slot) {
            Some(id) => {
                let view = weights.view(*id);
                (view.rows(), view.cols())
            }
            None => self.params.shape(slot),
        };
        let shapes: Vec<_> = (0..self.params.slots()).map(shape).collect();
        let mut params = Arena::new(&shapes);
        for slot in 0..shapes.len() {
            let from = match renewed.get(&slot) {
                Some(id) => weights.view(*id),
                None => self.params.view(slot),
            };
            params.view_mut(slot).copy_from(from);
        }
        self.params = params;
    }

    /// Values that stand in for these weights, in their order, all zero; a slot's name is the weight's.
    pub(crate) fn replacing(config: &ModelConfig, weights: &[(WeightId, (usize, usize))]) -> Self {
        let named = weights
            .iter()
            .map(|(id, shape)| (families::tensor_name(config, *id), *shape));
        let mut adapter = Self::new(named.collect());
        adapter.replaced = weights
            .iter()
            .enumerate()
            .map(|(slot, (id, _))| (*id, slot))
            .collect();
        adapter
    }

    /// Takes the base's values for the weights that it has; another stays as it is, and an untied head begins as the
    /// embedding.
    pub(crate) fn copy_base(&mut self, weights: &Weights) {
        self.copy_base_to(0..self.params.slots(), weights);
    }

    /// The same for some of the slots.
    pub(crate) fn copy_base_to(&mut self, slots: Range<usize>, weights: &Weights) {
        let replaced = self.replaced.iter();
        for (id, &slot) in replaced.filter(|(_, slot)| slots.contains(slot)) {
            let from = match id {
                WeightId::Head if weights.config().tie_word_embeddings => WeightId::Embedding,
                id => *id,
            };
            if let Some(values) = weights.get(from) {
                self.params.view_mut(slot).copy_from(values);
            }
        }
    }

    /// Takes the base's values for the rows of tokens.
    pub(crate) fn copy_token_rows(&mut self, weights: &Weights) {
        for (id, rows) in self.token_rows.tables() {
            let tied = id == WeightId::Head && weights.config().tie_word_embeddings;
            // A stage of a pipeline may have neither the table nor the rows.
            if let Some(table) = weights.get(if tied { WeightId::Embedding } else { id }) {
                let own = self.params.view_mut(rows.slot);
                embedding_forward(own, &rows.ids, table, false);
            }
        }
    }

    /// The lowest block in which something is trained; backward goes no further down. `None`: only what lies above the
    /// blocks.
    pub fn lowest_layer(&self) -> Option<usize> {
        self.reaches().map(|(layer, _)| layer).min()
    }

    /// How far back a block's backward has to go for what is trained in it or below it.
    pub fn reach(&self, layer: usize) -> Reach {
        let reaches = self.reaches();
        reaches
            .filter(|(at, _)| *at <= layer)
            .map(|(at, reach)| if at < layer { Reach::Input } else { reach })
            .max()
            .unwrap_or(Reach::Nothing)
    }

    /// Block and place of everything that is trained in a block or below it.
    fn reaches(&self) -> impl Iterator<Item = (usize, Reach)> + '_ {
        let linears = self.low_rank.keys().chain(self.scaled.keys());
        let linears = linears.map(|id| (id.layer, reach_of(id.kind)));
        let weights = self.replaced.keys().filter_map(|id| match id {
            WeightId::Linear(linear, _) => Some((linear.layer, reach_of(linear.kind))),
            WeightId::Norm(layer, BlockNorm::Mlp | BlockNorm::MlpOutput, _) => {
                Some((*layer, Reach::Mlp))
            }
            WeightId::Norm(layer, BlockNorm::AttentionOutput, _) => Some((*layer, Reach::Output)),
            WeightId::Norm(layer, ..) => Some((*layer, Reach::Attention)),
            WeightId::Embedding
            | WeightId::Positions
            | WeightId::TokenTypes
            | WeightId::EmbeddingNorm(_) => Some((0, Reach::Input)),
            // Every block reads them.
            WeightId::Relative | WeightId::RelativeNorm(_) => Some((0, Reach::Attention)),
            WeightId::FinalNorm(_) | WeightId::Head | WeightId::ClassifierNorm(_) => None,
        });
        let bottlenecks = self.bottleneck.keys().map(|(layer, place)| {
            let reach = match place {
                Sublayer::Attention => Reach::AttentionBottleneck,
                Sublayer::Mlp => Reach::MlpBottleneck,
            };
            (*layer, reach)
        });
        let sites = &self.virtual_tokens;
        let keys = (0..sites.key_values.len()).map(|layer| (layer, Reach::Attention));
        let embeds =
            sites.prefix.is_some() || sites.infix.is_some() || self.token_rows.embedding.is_some();
        let embeddings = embeds.then_some((0, Reach::Input));
        linears
            .chain(weights)
            .chain(bottlenecks)
            .chain(keys)
            .chain(embeddings)
    }

    /// Slots whose matrix of one row is a vector, which files hold with one dimension.
    pub(crate) fn vectors(&self) -> HashSet<usize> {
        let replaced = self.replaced.iter();
        let replaced = replaced
            .filter(|(id, _)| id.is_vector())
            .map(|(_, slot)| *slot);
        let bottlenecks = self.bottleneck.values().flat_map(|site| {
            let matrices = [site.down.0, site.up.0];
            site.slots().filter(move |slot| !matrices.contains(slot))
        });
        let magnitudes = self.magnitudes.values().copied();
        replaced.chain(bottlenecks).chain(magnitudes).collect()
    }

    /// What it puts before and between the tokens of its sequences.
    pub fn virtual_tokens(&self) -> VirtualTokens {
        let rows = |slot: usize| self.params.shape(slot).0;
        let sites = &self.virtual_tokens;
        VirtualTokens {
            keys: sites.key_values.first().map_or(0, |(k, _)| rows(*k)),
            prefix: sites.prefix.map_or(0, rows),
            infix: sites.infix.map_or(0, rows),
        }
    }

    /// Whether other adapters, or rows without one, may be in the same batch: replaced weights act on every row.
    pub fn goes_with_others(&self) -> bool {
        self.replaced.is_empty()
    }

    /// Whether it acts through low-rank branches and nothing else.
    fn has_branches_alone(&self) -> bool {
        self.scaled.is_empty() && self.has_branches_and_factors_alone()
    }

    fn has_branches_and_factors_alone(&self) -> bool {
        self.replaced.is_empty()
            && self.magnitudes.is_empty()
            && self.initial.is_none()
            && self.bottleneck.is_empty()
            && self.token_rows.tables().next().is_none()
            && self.virtual_tokens().total() == 0
    }

    /// Whether it surely changes nothing: it acts nowhere, or its branches have B zero and its factors are all one. What has values of other kinds is
    /// taken to change something.
    pub fn does_nothing(&self) -> bool {
        let is_zero = |slot: usize| frobenius_norm(self.params.view(slot)) == 0.0;
        let mut branches = self.low_rank.values().flatten();
        let sites = self.scaled.values();
        let mut factors = sites.flat_map(|site| site.input.into_iter().chain(site.output));
        self.has_branches_and_factors_alone()
            && branches.all(|branch| branch.scale == 0.0 || is_zero(branch.b))
            && factors.all(|slot| self.params.view(slot).to_vec().iter().all(|x| *x == 1.0))
    }

    /// The largest rank of its branches, if it has any.
    pub fn largest_rank(&self) -> Option<usize> {
        let branches = self.low_rank.values().flatten();
        branches.map(|branch| self.params.shape(branch.a).0).max()
    }

    /// ‖ΔW‖² of each linear with low-rank branches, of A's and B's products alone: ΔW is never made. Branches of one linear are taken to write
    /// different columns. Linears with magnitudes are left out: what changes their weights is not of A and B alone.
    pub fn squared_changes(&self) -> Vec<(LinearId, f64)> {
        let all = self.low_rank.iter();
        let changes = all.filter(|(linear, _)| !self.magnitudes.contains_key(linear));
        let changes = changes.map(|(linear, branches)| {
            let squares = branches.iter().map(|branch| {
                let (a, b) = (self.params.view(branch.a), self.params.view(branch.b));
                let (r, a, b) = (a.rows(), a.to_vec(), b.to_vec());
                let inputs = a.len() / r.max(1);
                let dot = |i: usize, j: usize| {
                    let rows = a[i * inputs..].iter().zip(&a[j * inputs..]);
                    let of_a: f64 = rows.take(inputs).map(|(x, y)| f64::from(x * y)).sum();
                    let columns = b.chunks_exact(r);
                    let of_b: f64 = columns.map(|row| f64::from(row[i] * row[j])).sum();
                    of_a * of_b
                };
                let pairs = (0..r).flat_map(|i| (0..r).map(move |j| (i, j)));
                let sum: f64 = pairs.map(|(i, j)| dot(i, j)).sum();
                f64::from(branch.scale).powi(2) * sum
            });
            (*linear, squares.sum::<f64>())
        });
        changes.collect()
    }

    /// The sum of several adapters, each with a weight: their branches stand beside one another.
    ///
    /// # Errors
    /// With the place of an adapter that is more than low-rank branches, which cannot be added.
    pub fn mixed(parts: &[(&Self, f32)]) -> Result<Self, usize> {
        let mut mixed = Self::new(Vec::new());
        for (at, (part, weight)) in parts.iter().enumerate() {
            if !part.has_branches_alone() {
                return Err(at);
            }
            let first = mixed.params.slots();
            let slots = 0..part.params.slots();
            let shapes: Vec<_> = slots.clone().map(|slot| part.params.shape(slot)).collect();
            mixed.params.extend(&shapes);
            for slot in slots {
                let mut own = mixed.params.view_mut(first + slot);
                own.copy_from(part.params.view(slot));
            }
            mixed.names.extend(part.names.iter().cloned());
            for (linear, branches) in &part.low_rank {
                let own = mixed.low_rank.entry(*linear).or_default();
                own.extend(branches.iter().map(|branch| LowRankSite {
                    a: first + branch.a,
                    b: first + branch.b,
                    scale: weight * branch.scale,
                    ..branch.clone()
                }));
            }
        }
        Ok(mixed)
    }

    /// Number of trained values, also of those that other stages of a pipeline hold.
    pub fn parameters(&self) -> usize {
        let slots = 0..self.params.slots();
        let shapes = slots.map(|slot| self.params.shape(slot));
        shapes.map(|(rows, cols)| rows * cols).sum()
    }

    /// Slot of a parameter by its name.
    pub fn slot(&self, name: &str) -> Option<usize> {
        self.names.iter().position(|n| n == name)
    }
}

fn reach_of(kind: LinearKind) -> Reach {
    match kind {
        LinearKind::Q | LinearKind::K | LinearKind::V | LinearKind::Qkv => Reach::Attention,
        LinearKind::O => Reach::Output,
        LinearKind::Gate | LinearKind::Up | LinearKind::GateUp | LinearKind::Down => Reach::Mlp,
        // Behind the blocks.
        LinearKind::Dense | LinearKind::Out => Reach::Nothing,
    }
}

/// The adapters that a batch may use, by index. Many sets can share one base.
#[derive(Clone, Copy, Default)]
pub struct AdapterSet<'a> {
    adapters: &'a [&'a Adapter],
}

impl<'a> AdapterSet<'a> {
    /// A set; [`Batch::adapters`](super::Batch::adapters) refers to its indices.
    ///
    /// # Panics
    /// If one of several replaces base weights: that changes every row, so it can only be the sole member.
    pub fn new(adapters: &'a [&'a Adapter]) -> Self {
        let alone = adapters.iter().any(|adapter| !adapter.goes_with_others());
        assert!(
            adapters.len() < 2 || !alone,
            "an adapter that replaces base weights is the only one of its set"
        );
        Self { adapters }
    }

    /// The base alone.
    pub fn none() -> Self {
        Self { adapters: &[] }
    }

    pub(crate) fn get(&self, index: usize) -> &'a Adapter {
        self.adapters[index]
    }

    /// The adapter that a pass with gradients trains.
    pub(crate) fn first(&self) -> Option<&'a Adapter> {
        self.adapters.first().copied()
    }

    /// The values that stand in for a base weight.
    pub(crate) fn replacement(&self, id: WeightId) -> Option<View<'a>> {
        let adapter = self.adapters.first()?;
        adapter
            .replaced
            .get(&id)
            .map(|&slot| adapter.params.view(slot))
    }

    /// Whether it is the base alone.
    pub fn is_empty(&self) -> bool {
        self.adapters.is_empty()
    }
}
