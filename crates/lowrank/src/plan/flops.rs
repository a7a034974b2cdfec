//! The floating-point operations that a training step needs.
//!
//! A multiplication and an addition count as two. What an implementation does on top, such as computing scores or
//! activations again, padding, or a head at tokens without a label, is not needed and not counted; neither are
//! element-wise operations, which are a few thousandths.

use serde::Serialize;

use crate::model::{
    Adapter, Batch, BlockNorm, HeadKind, LinearId, LinearKind, ModelConfig, Part, Pooling, Reach,
    RelativeAttention, Sublayer, VirtualTokens, WeightId,
};

/// How much there is to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Work {
    /// Tokens, prompt and completion.
    pub tokens: usize,
    /// Tokens that carry loss.
    pub supervised_tokens: usize,
    /// Σ over tokens of the keys that each sees, the mean of the blocks.
    pub seen_keys: usize,
    /// Tokens of the longest sequence, virtual ones included.
    pub longest: usize,
}

impl Work {
    /// The work of a batch without padding. `windows` are those of the model's blocks.
    pub fn of(batch: &Batch, windows: &[Option<usize>]) -> Self {
        let seen = |window: usize| {
            let seen = batch.segments.iter().map(|segment| {
                let keys: usize = segment.keys.iter().map(ExactSizeIterator::len).sum();
                let queries = segment.queries.len();
                let seen = (0..queries).map(|i| {
                    // Without its own, which both sides of a window have.
                    let before = (keys + i + 1 - queries).min(window);
                    let behind = if segment.causal {
                        0
                    } else {
                        (queries - i - 1).min(window - 1)
                    };
                    before + behind
                });
                seen.sum::<usize>()
            });
            seen.sum::<usize>()
        };
        Self {
            tokens: batch.tokens(),
            supervised_tokens: batch.supervised.len(),
            seen_keys: mean_of_blocks(windows, seen),
            longest: batch
                .positions
                .iter()
                .max()
                .map_or(0, |last| *last as usize + 1),
        }
    }

    /// The work of `rows` sequences of `length` tokens, of which all but the first carry loss, with an adapter's virtual
    /// tokens. Sequences share the rows of the prefix, and a row sees what is before it.
    pub fn even(
        rows: usize,
        length: usize,
        tokens: VirtualTokens,
        windows: &[Option<usize>],
    ) -> Self {
        let before = tokens.keys + tokens.prefix;
        let own = length + tokens.infix;
        // Σ min(before + i, window) over i = 1..=own
        let seen = |window: usize, before: usize, own: usize| {
            let growing = window.saturating_sub(before).min(own);
            growing * before
                + growing * (growing + 1) / 2
                + (own - growing) * window.min(before + own)
        };
        Self {
            tokens: tokens.prefix + rows * own,
            supervised_tokens: rows * length.saturating_sub(1),
            seen_keys: mean_of_blocks(windows, |window| {
                seen(window, tokens.keys, tokens.prefix) + rows * seen(window, before, own)
            }),
            longest: before + own,
        }
    }

    /// The work of `rows` sequences of `length` tokens that a model of this config trains on, with an adapter's virtual tokens: with a
    /// classifier as it reads them, else as [`even`](Self::even).
    pub fn planned(
        config: &ModelConfig,
        rows: usize,
        length: usize,
        tokens: VirtualTokens,
    ) -> Self {
        let even = Self::even(rows, length, tokens, &config.windows());
        let scored = match config.classifier().map(|classifier| classifier.pooling) {
            None if config.causal => return even,
            None => 0,
            Some(Pooling::Each | Pooling::Mean) => length,
            Some(Pooling::First | Pooling::Last) => 1,
        };
        if config.causal {
            let supervised_tokens = rows * scored;
            return Self {
                supervised_tokens,
                ..even
            };
        }
        // Each row of an encoder has the prefix for itself.
        let own = tokens.prefix + length;
        let seen = |window: usize| {
            let keys = |i: usize| {
                let before = (tokens.keys + i + 1).min(window);
                before + (own - i - 1).min(window - 1)
            };
            rows * (0..own).map(keys).sum::<usize>()
        };
        Self {
            tokens: rows * own,
            supervised_tokens: rows * scored,
            seen_keys: mean_of_blocks(&config.windows(), seen),
            longest: tokens.keys + own,
        }
    }

    /// Adds another batch's work.
    pub fn add(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.supervised_tokens += other.supervised_tokens;
        self.seen_keys += other.seen_keys;
        self.longest = self.longest.max(other.longest);
    }
}

/// The mean over blocks with these windows.
fn mean_of_blocks(windows: &[Option<usize>], seen: impl Fn(usize) -> usize) -> usize {
    let mut kinds: Vec<(usize, usize)> = Vec::new();
    for window in windows {
        let window = window.unwrap_or(usize::MAX);
        match kinds.iter_mut().find(|(known, _)| *known == window) {
            Some((_, count)) => *count += 1,
            None => kinds.push((window, 1)),
        }
    }
    let sum: usize = kinds
        .iter()
        .map(|(window, count)| count * seen(*window))
        .sum();
    sum / windows.len().max(1)
}

/// Floating-point operations of a forward and a backward, by what they are spent on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StepFlops {
    /// The blocks' linears.
    pub linears: f64,
    /// The output head, at supervised tokens alone.
    pub head: f64,
    /// Scores and weighted values.
    pub attention: f64,
    /// The branches of an adapter.
    pub low_rank: f64,
    /// Adapter layers.
    pub bottleneck: f64,
}

impl StepFlops {
    /// All of them.
    pub fn total(&self) -> f64 {
        self.linears + self.head + self.attention + self.low_rank + self.bottleneck
    }

    fn add(&mut self, other: Self) {
        self.linears += other.linears;
        self.head += other.head;
        self.attention += other.attention;
        self.low_rank += other.low_rank;
        self.bottleneck += other.bottleneck;
    }
}

/// What a forward and a backward over `work` need when `adapter` is trained.
///
/// A frozen linear takes 2 a weight and token forward and 2 backward, a trained one 2 more. Below the lowest trained
/// block nothing goes backward, and in it nothing goes back through what no trained value stands below.
pub fn step_flops(config: &ModelConfig, adapter: &Adapter, work: Work) -> StepFlops {
    // A classifier's own linear comes behind the blocks.
    let mut flops = StepFlops::default();
    for layer in 0..=config.num_hidden_layers {
        flops.add(block_flops(config, adapter, work, layer));
    }
    flops.head = head_flops(config, adapter, work);
    flops
}

/// What one block takes of that; the block behind the last is the linear that stands before a classifier's last.
pub(super) fn block_flops(
    config: &ModelConfig,
    adapter: &Adapter,
    work: Work,
    layer: usize,
) -> StepFlops {
    let mut flops = StepFlops::default();
    // Behind the last attention only scored rows matter.
    let scored = (work.tokens as f64).min(work.supervised_tokens as f64);
    let behind = if layer + 1 < config.num_hidden_layers {
        work.tokens as f64
    } else {
        scored
    };
    for id in config.linears().filter(|id| id.layer == layer) {
        let tokens = if is_before_attention(id.kind) {
            work.tokens as f64
        } else {
            behind
        };
        add_linear(&mut flops, config, adapter, work, id, tokens);
    }
    for (place, below) in [
        (Sublayer::Attention, Reach::AttentionBottleneck),
        (Sublayer::Mlp, Reach::MlpBottleneck),
    ] {
        let Some(site) = adapter.bottleneck.get(&(layer, place)) else {
            continue;
        };
        let (r, c) = adapter.params.shape(site.down.0);
        // Forward; backward to the parameters; backward through U, and through D where something below is trained.
        let products = if adapter.reach(layer) > below { 6 } else { 5 };
        flops.bottleneck += 2.0 * behind * (products * r * c) as f64;
    }
    if layer < config.num_hidden_layers {
        // Two products forward; four backward, for the gradients of values, weights, queries and keys. A term of relative positions
        // is one more forward, and two backward.
        let product = 2.0 * (work.seen_keys * config.q_size()) as f64;
        let terms = config.relative.map_or(0, RelativeAttention::terms);
        let backward = if adapter.reach(layer) > Reach::Output {
            4 + 2 * terms
        } else {
            0
        };
        flops.attention = product * (2 + terms + backward) as f64;
    }
    flops
}

/// Adds what a linear takes on so many rows, with the branches beside it.
fn add_linear(
    flops: &mut StepFlops,
    config: &ModelConfig,
    adapter: &Adapter,
    work: Work,
    id: LinearId,
    tokens: f64,
) {
    let (input, output) = config.linear_shape(id.kind);
    let product = |rows: f64| 2.0 * rows * (input * output) as f64;
    let backward = goes_backward(adapter, id);
    let weight = adapter
        .replaced
        .contains_key(&WeightId::Linear(id, Part::Weight));
    let products = 1 + usize::from(backward) + usize::from(weight);
    let relative = relative_rows(config, id.kind, work) as f64;
    let table = adapter.replaced.contains_key(&WeightId::Relative);
    let of_relative = 1 + usize::from(table) + usize::from(weight);
    flops.linears += products as f64 * product(tokens) + of_relative as f64 * product(relative);
    for site in adapter.low_rank.get(&id).into_iter().flatten() {
        let (a, b) = (adapter.params.shape(site.a), adapter.params.shape(site.b));
        let (a, b) = ((a.0 * a.1) as f64, (b.0 * b.1) as f64);
        // Forward; backward to u, to B and to A; backward to x.
        let inputs = if backward { 1.0 } else { 0.0 };
        flops.low_rank += 2.0 * tokens * ((a + b) + (2.0 * b + a) + inputs * a);
        flops.low_rank += 2.0 * relative * ((a + b) + (2.0 * b + a));
        if adapter.initial.is_some() {
            // Forward; backward to u and to x.
            flops.low_rank += 2.0 * (tokens + relative) * (1.0 + inputs) * (a + b);
        }
    }
}

/// Rows of relative positions that a linear reads beside the tokens.
pub(super) fn relative_rows(config: &ModelConfig, kind: LinearKind, work: Work) -> usize {
    match config.relative {
        Some(relative) if relative.is_read_by(kind) => relative.reached(work.longest).len(),
        _ => 0,
    }
}

/// Of the output projection of a language model, or of the last linear of a classifier.
pub(super) fn head_flops(config: &ModelConfig, adapter: &Adapter, work: Work) -> f64 {
    let untied = !config.tie_word_embeddings || adapter.replaced.contains_key(&WeightId::Head);
    let (head_id, outputs) = match &config.head {
        HeadKind::None => return 0.0,
        HeadKind::Classifier(classifier) => {
            let out = config.classifier_linear(LinearKind::Out);
            (WeightId::Linear(out, Part::Weight), classifier.labels)
        }
        HeadKind::LanguageModel if untied => (WeightId::Head, config.vocab_size),
        HeadKind::LanguageModel => (WeightId::Embedding, config.vocab_size),
    };
    let head = 2.0 * work.supervised_tokens as f64 * (outputs * config.hidden_size) as f64;
    // Forward; backward to what it reads, where that is trained; backward to its weight.
    let below = adapter.lowest_layer().is_some()
        || [Part::Weight, Part::Bias]
            .into_iter()
            .any(|part| adapter.replaced.contains_key(&WeightId::FinalNorm(part)));
    let weight = adapter.replaced.contains_key(&head_id);
    // Forward once more, and backward to them.
    let rows = adapter.token_rows.head.as_ref();
    let rows = rows.map_or(0, |rows| rows.ids().len() * config.hidden_size);
    let own = 2.0 * work.supervised_tokens as f64 * rows as f64;
    (1 + usize::from(below) + usize::from(weight)) as f64 * head + 2.0 * own
}

/// Whether a linear stands before a block's attention.
fn is_before_attention(kind: LinearKind) -> bool {
    matches!(
        kind,
        LinearKind::Q | LinearKind::K | LinearKind::V | LinearKind::Qkv
    )
}

/// Whether the gradient of a linear's input is needed.
fn goes_backward(adapter: &Adapter, id: LinearId) -> bool {
    let behind = match id.kind {
        LinearKind::Down | LinearKind::Up | LinearKind::Gate | LinearKind::GateUp => {
            Reach::MlpBottleneck
        }
        LinearKind::O => Reach::Output,
        _ => Reach::Attention,
    };
    let norm = |norm| {
        let part = |part| WeightId::Norm(id.layer, norm, part);
        [Part::Weight, Part::Bias]
            .into_iter()
            .any(|p| adapter.replaced.contains_key(&part(p)))
    };
    adapter.reach(id.layer) > behind || (is_before_attention(id.kind) && norm(BlockNorm::Attention))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Example;
    use crate::model::Purpose;
    use crate::plan::presets;
    use crate::train::{batch_for, batch_of};

    #[test]
    fn even_rows_are_counted_as_a_batch_of_them_is() {
        let row = Example {
            ids: vec![1; 7],
            supervised: (0..7).map(|i| i > 0).collect(),
            line: 1,
            truncated: 0,
            prompt_len: 2,
            ..Example::default()
        };
        let places = |keys, prefix, infix| VirtualTokens {
            keys,
            prefix,
            infix,
        };
        for tokens in [places(0, 0, 0), places(4, 0, 0), places(0, 3, 2)] {
            let batch = batch_of([&row, &row, &row], tokens);
            assert_eq!(
                Work::even(3, 7, tokens, &[None]),
                Work::of(&batch, &[None]),
                "{tokens:?}"
            );
        }
        let batch = batch_of([&row, &row], VirtualTokens::default());
        let none = VirtualTokens::default();
        let windows = [Some(3), None];
        assert_eq!(Work::even(2, 7, none, &windows), Work::of(&batch, &windows));
    }

    #[test]
    fn planned_rows_are_counted_as_a_batch_of_them_is() {
        let row = Example {
            ids: vec![1; 200],
            line: 1,
            ..Example::default()
        };
        let places = |keys, prefix| VirtualTokens {
            keys,
            prefix,
            infix: 0,
        };
        let sequences = Purpose::SequenceClassifier { labels: 2 };
        let tokens = Purpose::TokenClassifier { labels: 2 };
        for (preset, purpose) in [
            ("bert-base", sequences),
            ("bert-base", tokens),
            ("modernbert-base", sequences),
            ("deberta-v3-base", sequences),
            ("gpt2", sequences),
        ] {
            let config = presets::config_for(preset, purpose).unwrap();
            for virtual_tokens in [places(0, 0), places(4, 0), places(0, 3)] {
                let batch = batch_for(&config, [&row, &row, &row], virtual_tokens);
                assert_eq!(
                    Work::planned(&config, 3, 200, virtual_tokens),
                    Work::of(&batch, &config.windows()),
                    "{preset} {purpose:?} {virtual_tokens:?}"
                );
            }
        }
    }
}
