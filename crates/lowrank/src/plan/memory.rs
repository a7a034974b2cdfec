//! The memory that training takes, from shapes alone.
//!
//! What is predicted is the largest resident memory of the process: the pages of the mapped weights that are touched
//! (all of them), what is trained with its gradient and moments, what the blocks keep until the backward, and the
//! working space of the moment that needs most. What the process takes is not known from shapes; it was measured on one
//! machine and is named below.

use std::ops::Range;

use lowrank_kernels::{ComputeDType, DType};
use serde::Serialize;

use super::Work;
use super::flops::relative_rows;
use crate::model::{
    Adapter, Batch, HeadKind, LinearId, LinearKind, MlpKind, ModelConfig, NormPlacement, Part,
    QkNorm, Recompute, Saving, Stage, Sublayer, WeightId, keeps_output,
};

/// Bytes of a run, by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// The base's weights.
    pub weights: u64,
    /// Trained values in f32, and what they were at first where that is kept beside them.
    pub trained: u64,
    /// Their gradients in f32.
    pub gradients: u64,
    /// AdamW's two moments in f32.
    pub optimizer: u64,
    /// What the blocks keep for the backward.
    pub activations: u64,
    /// Temporaries of the moment that needs most.
    pub working: u64,
    /// The program; training has dropped the tokenizer.
    pub process: u64,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights
            + self.trained
            + self.gradients
            + self.optimizer
            + self.activations
            + self.working
            + self.process
    }
}

/// The program with its threads, their scratch memory and the rows, as measured.
const PROGRAM: u64 = 18 * 1024 * 1024;

/// What a step takes at its peak, when `adapter` is trained on a base stored as `base_dtype`. `converted` bytes of it are not
/// pages of its file ([`Weights::converted_bytes`](crate::model::Weights::converted_bytes)). Its micro-batches are computed in so many
/// pieces, `teams` of them at a time, and `work` is that of the largest.
pub fn training_memory(
    config: &ModelConfig,
    adapter: &Adapter,
    base_dtype: DType,
    converted: u64,
    work: Work,
    pieces: usize,
    teams: usize,
    saving: Saving,
    compute: ComputeDType,
) -> Memory {
    let part = RankPart {
        stage: &Stage::whole(config),
        trained: adapter.parameters(),
        replicas: 1,
        stages_left: 1,
        teams,
    };
    rank_memory(
        config, adapter, part, base_dtype, converted, work, pieces, saving, compute,
    )
}

/// The part of a run that one of its ranks has.
#[derive(Clone, Copy, Debug)]
pub struct RankPart<'a> {
    /// The part of the model.
    pub stage: &'a Stage,
    /// Values that are trained in it.
    pub trained: usize,
    /// Ranks that have the same part, among which moments are divided.
    pub replicas: usize,
    /// Stages from this one on, itself among them: so many pieces are in flight at most.
    pub stages_left: usize,
    /// Teams of threads, each of which computes a piece of its own where there are no stages.
    pub teams: usize,
}

/// Bytes of gradients and trained values that are on their way to a rank at a time.
pub(crate) const IN_EXCHANGE: u64 = 64 << 20;

/// [`training_memory`] of one of several ranks; `converted` bytes and `pieces` are the rank's own.
pub fn rank_memory(
    config: &ModelConfig,
    adapter: &Adapter,
    part: RankPart<'_>,
    base_dtype: DType,
    converted: u64,
    work: Work,
    pieces: usize,
    saving: Saving,
    compute: ComputeDType,
) -> Memory {
    let RankPart {
        stage,
        trained,
        replicas,
        stages_left,
        teams,
    } = part;
    let trained = 4 * trained as u64;
    let weights = if replaces_all(config, adapter) {
        converted
    } else {
        stage.weight_bytes(config, base_dtype)
    };
    // A rank's share of the sums, and what is on its way to them.
    let exchanged = if replicas > 1 {
        let share = trained.div_ceil(replicas as u64);
        share + share.min(IN_EXCHANGE)
    } else {
        0
    };
    let at_once = teams.clamp(1, pieces.max(1)) as u64;
    let in_flight = stages_left.min(pieces.max(1)) as u64;
    let kept = activation_bytes(
        config,
        adapter,
        work,
        (saving, compute),
        stage.blocks.clone(),
    );
    let head = if stage.is_last {
        head_working_bytes(config, work)
    } else {
        0
    };
    Memory {
        weights,
        trained: trained + initial_bytes(adapter, trained),
        gradients: gradient_arenas(pieces, at_once) * trained + exchanged,
        optimizer: (2 * trained).div_ceil(replicas as u64),
        activations: in_flight.max(at_once) * kept,
        working: at_once * (block_working_bytes(config, adapter, work, saving) + head),
        process: PROGRAM,
    }
}

/// What frozen first values take beside `trained` bytes of an adapter's values.
fn initial_bytes(adapter: &Adapter, trained: u64) -> u64 {
    let Some(initial) = &adapter.initial else {
        return 0;
    };
    let shapes = (0..initial.slots()).map(|slot| initial.shape(slot));
    let values: usize = shapes.map(|(rows, cols)| rows * cols).sum();
    trained * values as u64 / adapter.parameters().max(1) as u64
}

/// Whether trained values stand in for all weights. The base's own are then not touched, and their pages are given back.
fn replaces_all(config: &ModelConfig, adapter: &Adapter) -> bool {
    let values = adapter.replaced.values().map(|&slot| {
        let (rows, cols) = adapter.params.shape(slot);
        rows * cols
    });
    values.sum::<usize>() == config.parameters()
}

/// How many sums of gradients there are at once, while a step's pieces are added along a binary tree: those of the pieces that are being
/// computed, and one a level of the tree that waits for its neighbour, 1 + ⌊log₂ n⌋ for one piece at a time.
fn gradient_arenas(pieces: usize, at_once: u64) -> u64 {
    at_once + u64::from(pieces.max(1).ilog2())
}

/// What these blocks keep.
fn activation_bytes(
    config: &ModelConfig,
    adapter: &Adapter,
    work: Work,
    (saving, compute): (Saving, ComputeDType),
    blocks: Range<usize>,
) -> u64 {
    let layers = config.num_hidden_layers;
    let Some(lowest) = adapter.lowest_layer() else {
        return 0;
    };
    let (c, q, kv) = (config.hidden_size, config.q_size(), config.kv_size());
    let size = saving.dtype.bytes_for(1);
    let statistics = config.norm.statistics();
    let heads_size = if config.relative.is_none() && compute.rounds_here() {
        size
    } else {
        4
    };
    (lowest.max(blocks.start)..blocks.end)
        .map(|layer| {
            let tokens = work.tokens as u64;
            if saving.recompute == Recompute::Full {
                return tokens * (4 * c) as u64;
            }
            let heads = match config.qk_norm {
                QkNorm::None => 0,
                QkNorm::Heads | QkNorm::Projections => q + kv,
            };
            // Attention's output is kept where gradients of its projection read it.
            let id = LinearId {
                layer,
                kind: LinearKind::O,
            };
            let weight = WeightId::Linear(id, Part::Weight);
            let scales_o = adapter.scaled.get(&id).is_some_and(|at| at.input.is_some());
            let reads_o = scales_o
                || adapter.low_rank.contains_key(&id)
                || adapter.replaced.contains_key(&weight);
            let o = if reads_o { q } else { 0 };
            let before = size * (c + o + heads)
                + heads_size * (q + 2 * kv)
                + 4 * (config.num_attention_heads + statistics);
            let behind = if saving.recompute == Recompute::Selective {
                4 * c
            } else {
                size * (c + mlp_width(config))
            } + 4 * statistics;
            // The sum behind the MLP, which its norm reads.
            let behind = match config.norm_placement {
                NormPlacement::Input => behind,
                NormPlacement::Sum => behind + size * c + 4 * statistics,
                // The sublayers' outputs, which their norms read.
                NormPlacement::Output | NormPlacement::InputAndOutput => {
                    behind + 2 * (size * c + 4 * statistics)
                }
            };
            let beside = |before| beside_linears(config, adapter, layer, saving, before);
            let rows = rows_behind(layer + 1 == layers, work);
            let before = before + beside(true);
            let behind = behind + beside(false) + bottleneck_bytes(config, adapter, layer, size);
            // Trained keys and values stand before the batch's own.
            let keys = 8 * (kv * adapter.virtual_tokens().keys) as u64;
            let relative = relative_bytes(config, adapter, layer, work);
            tokens * before as u64 + rows * behind as u64 + keys + relative
        })
        .sum()
}

/// The first linears of MLPs.
const MLP_INPUTS: [LinearKind; 3] = [LinearKind::Gate, LinearKind::Up, LinearKind::GateUp];

/// What a block keeps of a token for branches, factors and magnitudes of its linears `before` attention, or of those behind it.
fn beside_linears(
    config: &ModelConfig,
    adapter: &Adapter,
    layer: usize,
    saving: Saving,
    before: bool,
) -> usize {
    let kept = |kind: &&LinearKind| match kind {
        LinearKind::Q | LinearKind::K | LinearKind::V | LinearKind::Qkv => before,
        // What selective recomputing computes again is not kept.
        kind if MLP_INPUTS.contains(kind) => !before && saving.recompute != Recompute::Selective,
        _ => !before,
    };
    let kinds = config.linear_kinds().iter().filter(kept);
    let of = kinds.map(|&kind| {
        let id = LinearId { layer, kind };
        let branches = adapter.low_rank.get(&id).into_iter().flatten();
        let ranks: usize = branches.map(|site| adapter.params.shape(site.a).0).sum();
        4 * (ranks + unscaled_width(config, adapter, id))
            + saving.dtype.bytes_for(magnitude_width(config, adapter, id))
    });
    of.sum()
}

/// Numbers a row that a linear keeps of its output as it was before its factors were put on it.
fn unscaled_width(config: &ModelConfig, adapter: &Adapter, id: LinearId) -> usize {
    let scales = adapter.scaled.get(&id);
    let scaled = scales.is_some_and(|site| site.output.is_some());
    usize::from(scaled) * config.linear_shape(id.kind).1
}

/// Numbers a row that a linear keeps of its output as it was before its magnitudes were put on it.
fn magnitude_width(config: &ModelConfig, adapter: &Adapter, id: LinearId) -> usize {
    let keeps = adapter.magnitudes.contains_key(&id) && !keeps_output(config, id.kind);
    usize::from(keeps) * config.linear_shape(id.kind).1
}

/// The most that these linears of a block have of them at once, numbers a row.
fn magnitude_widths(config: &ModelConfig, adapter: &Adapter, kinds: &[LinearKind]) -> usize {
    let widths = |layer| -> usize {
        let widths =
            (kinds.iter()).map(|&kind| magnitude_width(config, adapter, LinearId { layer, kind }));
        widths.sum()
    };
    (0..config.num_hidden_layers).map(widths).max().unwrap_or(0)
}

/// What a block keeps of relative positions: their keys and queries, and what branches and factors beside these linears keep.
fn relative_bytes(config: &ModelConfig, adapter: &Adapter, layer: usize, work: Work) -> u64 {
    let of = |kind| {
        let id = LinearId { layer, kind };
        let branches = adapter.low_rank.get(&id).into_iter().flatten();
        let ranks: usize = branches.map(|site| adapter.params.shape(site.a).0).sum();
        let before = unscaled_width(config, adapter, id) + magnitude_width(config, adapter, id);
        let width = ranks + config.linear_shape(kind).1 + before;
        4 * (relative_rows(config, kind, work) * width) as u64
    };
    of(LinearKind::Q) + of(LinearKind::K)
}

/// What relative positions take beside the tokens: the table's rows before and behind their norm, and in one block their gradients, those
/// of their keys and queries, and in each thread what is in the place of a table of all pairs.
fn relative_working_bytes(config: &ModelConfig, work: Work) -> u64 {
    let Some(relative) = config.relative else {
        return 0;
    };
    let rows = relative.reached(work.longest).len();
    let widths = 4 * config.hidden_size + 2 * relative.terms() * config.q_size();
    4 * (rows * widths + 2 * rows * work.longest) as u64
}

/// What the adapter layers of a block keep of a token: what they read, what the nonlinearity reads, the norm's statistics.
fn bottleneck_bytes(config: &ModelConfig, adapter: &Adapter, layer: usize, size: usize) -> usize {
    let places = [Sublayer::Attention, Sublayer::Mlp];
    let sites = places.map(|place| adapter.bottleneck.get(&(layer, place)));
    let kept = sites.into_iter().flatten().map(|site| {
        let statistics = if site.norm.is_some() { 2 } else { 0 };
        size * config.hidden_size + 4 * (adapter.params.shape(site.down.0).0 + statistics)
    });
    kept.sum()
}

/// Rows that a block goes on with behind its attention.
fn rows_behind(last: bool, work: Work) -> u64 {
    if last && Batch::goes_on_with(work.supervised_tokens, work.tokens) {
        work.supervised_tokens as u64
    } else {
        work.tokens as u64
    }
}

fn mlp_width(config: &ModelConfig) -> usize {
    match config.mlp {
        MlpKind::Gated | MlpKind::GatedFused => 2 * config.intermediate_size,
        MlpKind::Plain => config.intermediate_size,
    }
}

/// The temporaries of the moment that needs most in a block, which stay at hand while the head is computed.
fn block_working_bytes(config: &ModelConfig, adapter: &Adapter, work: Work, saving: Saving) -> u64 {
    let (c, q, kv) = (config.hidden_size, config.q_size(), config.kv_size());
    let (f, mlp) = (config.intermediate_size, mlp_width(config));
    // A block's own values in f32, while it is computed.
    let outputs = if config.norm_placement.has_output() {
        2 * c
    } else {
        0
    };
    let without_magnitudes = |kinds| magnitude_widths(config, adapter, kinds);
    let values = c + 2 * q + 2 * kv + c + mlp + outputs + without_magnitudes(config.linear_kinds());
    let forward = values + f + c;
    let again = match saving.recompute {
        Recompute::None => 0,
        Recompute::Selective => mlp + c + without_magnitudes(&MLP_INPUTS),
        Recompute::Full => values,
    };
    let widened = if saving.dtype == DType::F32 { 0 } else { c };
    let is_down = |id: &LinearId| id.kind == LinearKind::Down;
    let trains_down = adapter.low_rank.keys().any(is_down)
        || adapter.scaled.keys().any(is_down)
        || adapter
            .replaced
            .keys()
            .any(|id| matches!(id, WeightId::Linear(id, Part::Weight) if is_down(id)));
    let hidden = if trains_down { f } else { 0 };
    // What an adapter layer reads and gives, and the gradient of the sublayer's output.
    let layers = if adapter.bottleneck.is_empty() {
        0
    } else {
        2 * c
    };
    // Gradients of outputs with magnitudes are copies.
    let copies = |kinds: &[LinearKind]| -> usize {
        let has = |kind: &&LinearKind| adapter.magnitudes.keys().any(|id| id.kind == **kind);
        let kinds = kinds.iter().filter(has);
        kinds.map(|kind| config.linear_shape(*kind).1).sum()
    };
    let mlp_copies = copies(&MLP_INPUTS).max(copies(&[LinearKind::Down]));
    let mlp_backward = c + widened + hidden + f + mlp + again + layers + mlp_copies;
    // The gradients of q, k and v, and these in f32 where they are kept otherwise.
    let [q_kind, k_kind, v_kind] = [LinearKind::Q, LinearKind::K, LinearKind::V];
    let of_heads = copies(&[q_kind, k_kind, v_kind, LinearKind::Qkv]);
    let attention_backward = c + 3 * q + 4 * kv + 2 * c + widened + of_heads;
    let tokens = work.tokens as u64;
    let most = forward.max(mlp_backward).max(attention_backward);
    4 * tokens * most as u64 + relative_working_bytes(config, work)
}

/// The temporaries of the head.
fn head_working_bytes(config: &ModelConfig, work: Work) -> u64 {
    let c = config.hidden_size;
    let scored = work.supervised_tokens;
    let outputs = match config.head {
        HeadKind::LanguageModel => {
            let rows = lowrank_kernels::head_chunk_rows(config.vocab_size, scored);
            // Gradients go back through a cap with the logits beside them.
            let logits = 1 + usize::from(config.logit_scaling.softcap.is_some());
            logits * rows * config.vocab_size
        }
        // What the classifier's own layer computes, and its gradients.
        HeadKind::Classifier(_) => 4 * scored * c,
        HeadKind::None => 0,
    };
    4 * (outputs + 4 * scored * c) as u64
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use lowrank_formats::peft::{LoraConfig, TargetModules};
    use lowrank_kernels::Workspace;

    use super::*;
    use crate::model::{AdapterSet, BlockSaved, Decoder, PassOptions, Weights};
    use crate::plan::presets;
    use crate::settings::TrainConfig;
    use crate::tuning::{Method, lora};

    #[test]
    fn a_tree_of_gradients_has_one_more_a_level() {
        // As they are added: a micro-batch's gradient, then sums of equally many as long as there are two.
        let mut waiting: Vec<usize> = Vec::new();
        let mut most = 0;
        for leaf in 1..=40 {
            waiting.push(1);
            most = most.max(waiting.len());
            while waiting.len() > 1 && waiting[waiting.len() - 1] == waiting[waiting.len() - 2] {
                waiting.pop();
                *waiting.last_mut().unwrap() *= 2;
            }
            assert_eq!(gradient_arenas(leaf, 1), most as u64, "{leaf}");
        }
        assert_eq!(gradient_arenas(0, 1), 1);
    }

    /// What linears keep is what is counted for them, to the byte.
    #[test]
    fn linears_keep_what_is_planned() {
        // Plain and fused linears, with biases and without, and an MLP without a gate.
        for (family, spared) in [
            (
                "llama",
                &[LinearKind::V, LinearKind::Gate, LinearKind::Up][..],
            ),
            ("qwen2", &[LinearKind::Gate, LinearKind::Up]),
            ("phi3", &[]),
            ("gpt2", &[]),
        ] {
            let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
            let weights = Weights::load(&goldens.join(family), DType::F32).unwrap();
            let model = Decoder::new(weights);
            let config = model.config();
            let mut batch = Batch::default();
            let ids: Vec<u32> = (1..=40).collect();
            let supervised: Vec<bool> = ids.iter().map(|id| *id > 30).collect();
            batch.push(&ids, &supervised);
            let batch = batch.with_adapter(0);
            let rows = rows_behind(true, Work::of(&batch, &[None]));
            assert!(rows < 40, "the last block goes on with some of the rows");
            for use_dora in [false, true] {
                let lora = LoraConfig {
                    target_modules: TargetModules::AllLinear,
                    use_dora,
                    ..LoraConfig::default()
                };
                let init = lora::InitLoraWeights::Gaussian;
                let (mut adapter, _) = lora::inject(config, &lora, init, 1).unwrap();
                adapter.begin_magnitudes(model.weights());
                for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
                    for dtype in [DType::F32, DType::Bf16] {
                        let saving = Saving { recompute, dtype };
                        let options = PassOptions {
                            saving,
                            ..PassOptions::default()
                        };
                        let (set, ws) = ([&adapter], Workspace::new());
                        let set = AdapterSet::new(&set);
                        let forward = model.stage_keeping(&batch, set, None, &options, &ws);
                        let forward = forward.unwrap();
                        let blocks = forward.kept().iter().map(BlockSaved::bytes_of_linears);
                        let counted = (0..config.num_hidden_layers).map(|layer| {
                            if recompute == Recompute::Full {
                                return 0;
                            }
                            let of =
                                |before| beside_linears(config, &adapter, layer, saving, before);
                            let last = layer + 1 == config.num_hidden_layers;
                            let rows = rows_behind(last, Work::of(&batch, &[None])) as usize;
                            40 * of(true) + rows * of(false)
                        });
                        let name = format!("{family}, {saving:?}, DoRA {use_dora}");
                        assert_eq!(
                            blocks.collect::<Vec<_>>(),
                            counted.collect::<Vec<_>>(),
                            "{name}"
                        );
                    }
                }
                for &kind in config.linear_kinds() {
                    let width = magnitude_width(config, &adapter, LinearId { layer: 0, kind });
                    let is_kept = use_dora && !spared.contains(&kind);
                    assert_eq!(width > 0, is_kept, "{family}, {kind:?}");
                }
            }
        }
    }

    #[test]
    fn pieces_take_gradients_and_nothing_else() {
        let model = presets::config("smollm2-135m").unwrap();
        let train = TrainConfig::new(Method::Full, "m", "", "");
        let adapter = train.lay_out(&model).unwrap();
        let memory = |pieces| {
            let (work, saving) = (Work::default(), Saving::default());
            let compute = ComputeDType::F32;
            training_memory(
                &model,
                &adapter,
                DType::Bf16,
                0,
                work,
                pieces,
                1,
                saving,
                compute,
            )
        };
        let (one, eight) = (memory(1), memory(8));
        assert_eq!(one.gradients, one.trained);
        assert_eq!(eight.gradients, 4 * one.trained);
        assert_eq!(eight.total() - one.total(), 3 * one.trained);
    }
}
