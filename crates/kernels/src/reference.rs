//! Naive versions of the forward operations in f64, one loop after another, as the formulas are
//! written; and of what the bytes of a number format say.
//!
//! They are what the fast operations are tested and timed against: values directly, gradients as
//! finite differences of these functions. Matrices are row-major slices; nothing here is fast,
//! parallel, or used at run time.

mod blocks;

pub use self::blocks::widened;
use crate::types::activation::Activation;
use crate::types::attention::{AttentionShape, Segment};
use crate::types::head::LogitScaling;
use crate::types::linear::Layout;
use crate::types::low_rank::Dropout;
use crate::types::optimizer::AdamW;
use crate::types::relative::{RelativeSegment, RelativeShape};
use crate::types::rope::RopeOrder;

/// y [T, out] = x [T, in] · Wᵀ + b.
pub fn linear(
    x: &[f64],
    w: &[f64],
    bias: Option<&[f64]>,
    inputs: usize,
    outputs: usize,
    layout: Layout,
) -> Vec<f64> {
    let mut y = Vec::with_capacity(x.len() / inputs * outputs);
    for row in x.chunks_exact(inputs) {
        for out in 0..outputs {
            let mut sum = bias.map_or(0.0, |bias| bias[out]);
            for (i, x) in row.iter().enumerate() {
                sum += x * match layout {
                    Layout::OutIn => w[out * inputs + i],
                    Layout::InOut => w[i * outputs + out],
                };
            }
            y.push(sum);
        }
    }
    y
}

/// s · drop(x) · Aᵀ · Bᵀ [T, n_out] for x [T, in], A [r, in] and B [n_out, r]; row t of x has the
/// dropout mask of row `first_row + t`.
pub fn low_rank(
    x: &[f64],
    a: &[f64],
    b: &[f64],
    rank: usize,
    scale: f64,
    dropout: Option<Dropout>,
    first_row: usize,
) -> Vec<f64> {
    let inputs = a.len() / rank;
    let mut dropped = x.to_vec();
    if let Some(dropout) = dropout {
        for (i, x) in dropped.iter_mut().enumerate() {
            *x *= f64::from(dropout.factor(first_row + i / inputs, i % inputs));
        }
    }
    let u = linear(&dropped, a, None, inputs, rank, Layout::OutIn);
    let y = linear(&u, b, None, rank, b.len() / rank, Layout::OutIn);
    y.iter().map(|y| scale * y).collect()
}

/// l ⊙ x for every row; x [T, n], l [1, n].
pub fn scale_columns(x: &[f64], l: &[f64]) -> Vec<f64> {
    let rows = x.chunks_exact(l.len());
    rows.flat_map(|row| row.iter().zip(l).map(|(x, l)| x * l))
        .collect()
}

/// c ⊙ (y - b) + b for every row; y [T, n], c and b [1, n].
pub fn magnitude(y: &[f64], c: &[f64], bias: &[f64]) -> Vec<f64> {
    let rows = y.chunks_exact(c.len());
    let scaled = rows.flat_map(|row| row.iter().zip(c).zip(bias));
    scaled.map(|((y, c), b)| c * (y - b) + b).collect()
}

/// ‖wᵢ + s·bᵢ·A‖ `[out]` for a weight W [out, in], A [r, in] and B [out, r].
pub fn adapted_norms(w: &[f64], a: &[f64], b: &[f64], rank: usize, scale: f64) -> Vec<f64> {
    let inputs = a.len() / rank;
    let rows = w.chunks_exact(inputs).zip(b.chunks_exact(rank));
    rows.map(|(w, b)| {
        let sum = |i: usize| {
            let added = b.iter().enumerate();
            w[i] + scale * added.map(|(k, b)| b * a[k * inputs + i]).sum::<f64>()
        };
        (0..inputs).map(|i| sum(i).powi(2)).sum::<f64>().sqrt()
    })
    .collect()
}

/// y = x / √(mean(x²) + ε) · (offset + w), in pieces of the size of w.
pub fn rms_norm(x: &[f64], weight: &[f64], offset: f64, eps: f64) -> Vec<f64> {
    let mut y = Vec::with_capacity(x.len());
    for piece in x.chunks_exact(weight.len()) {
        let mean = piece.iter().map(|x| x * x).sum::<f64>() / piece.len() as f64;
        let rstd = 1.0 / (mean + eps).sqrt();
        y.extend(
            piece
                .iter()
                .zip(weight)
                .map(|(x, w)| x * rstd * (offset + w)),
        );
    }
    y
}

/// y = (x - mean) / √(var + ε) · w + b, in rows of the size of w.
pub fn layer_norm(x: &[f64], weight: &[f64], bias: Option<&[f64]>, eps: f64) -> Vec<f64> {
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let n = row.len() as f64;
        let mean = row.iter().sum::<f64>() / n;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        let rstd = 1.0 / (variance + eps).sqrt();
        for (i, x) in row.iter().enumerate() {
            y.push((x - mean) * rstd * weight[i] + bias.map_or(0.0, |bias| bias[i]));
        }
    }
    y
}

/// x with the pairs of each head of `head_size` turned by position · frequency; elements past the last pair stay.
pub fn rope(
    x: &[f64],
    positions: &[u32],
    inv_freq: &[f32],
    attention_scale: f64,
    order: RopeOrder,
    head_size: usize,
    cols: usize,
) -> Vec<f64> {
    let half = inv_freq.len();
    let mut y = x.to_vec();
    for (row, &position) in y.chunks_exact_mut(cols).zip(positions) {
        for head in row.chunks_exact_mut(head_size) {
            for i in 0..half {
                let angle = f64::from(position) * f64::from(inv_freq[i]);
                let (sin, cos) = angle.sin_cos();
                let (first, second) = match order {
                    RopeOrder::Halves => (i, half + i),
                    RopeOrder::Neighbours => (2 * i, 2 * i + 1),
                };
                let (a, b) = (head[first], head[second]);
                head[first] = attention_scale * (a * cos - b * sin);
                head[second] = attention_scale * (b * cos + a * sin);
            }
        }
    }
    y
}

/// act(x).
pub fn activation(x: f64, act: Activation) -> f64 {
    match act {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => x * normal_distribution(x),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::Tanh => x.tanh(),
    }
}

/// Φ(x) = ½ + φ(x)·(x + x³/3 + x⁵/(3·5) + …) near zero, and beyond that the continued fraction of
/// its tail.
fn normal_distribution(x: f64) -> f64 {
    let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    if x.abs() < 3.0 {
        let (mut sum, mut term, mut n) = (x, x, 3.0);
        while term.abs() > 1e-18 {
            term *= x * x / n;
            sum += term;
            n += 2.0;
        }
        return 0.5 + density * sum;
    }
    let mut fraction = x.abs();
    for n in (1..200).rev() {
        fraction = x.abs() + f64::from(n) / fraction;
    }
    let tail = density / fraction;
    if x > 0.0 { 1.0 - tail } else { tail }
}

/// o [Tq, H·D] and lse [Tq, H] for q [Tq, H·D], k and v [Tk, KV·D].
pub fn attention(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    segments: &[Segment],
    shape: &AttentionShape,
) -> (Vec<f64>, Vec<f64>) {
    let (size, heads) = (shape.head_size, shape.heads);
    let (q_cols, k_cols) = (heads * size, shape.kv_heads * size);
    let mut o = vec![0.0; q.len()];
    let mut lse = vec![f64::NEG_INFINITY; q.len() / size];
    for segment in segments {
        let keys: Vec<usize> = segment.keys.iter().cloned().flatten().collect();
        let before = keys.len() as i64 - segment.queries.len() as i64;
        for (i, query) in segment.queries.clone().enumerate() {
            let own = before + i as i64;
            let sees = |at: usize| {
                let distance = own - at as i64;
                let window = shape.window.map_or(i64::MAX, |window| window as i64);
                (!segment.causal || distance >= 0) && distance.abs() < window
            };
            for head in 0..heads {
                let kv = head / (heads / shape.kv_heads);
                let q = &q[query * q_cols + head * size..][..size];
                let visible: Vec<usize> = (0..keys.len()).filter(|&at| sees(at)).collect();
                let scores: Vec<f64> = visible
                    .iter()
                    .map(|&at| {
                        let k = &k[keys[at] * k_cols + kv * size..][..size];
                        let product = q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
                        softcap(f64::from(shape.scale) * product, shape.softcap)
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
                if visible.is_empty() {
                    continue;
                }
                lse[query * heads + head] = max + sum.ln();
                for (&at, score) in visible.iter().zip(&scores) {
                    let weight = (score - max).exp() / sum;
                    let v = &v[keys[at] * k_cols + kv * size..][..size];
                    for (d, v) in v.iter().enumerate() {
                        o[query * q_cols + head * size + d] += weight * v;
                    }
                }
            }
        }
    }
    (o, lse)
}

/// o [T, H·D] and lse [T, H] for q, k and v [T, H·D], and relative positions [S, H·D] as keys and as queries where the scores have such
/// terms.
pub fn relative_attention(
    [q, k, v]: [&[f64]; 3],
    position_keys: Option<&[f64]>,
    position_queries: Option<&[f64]>,
    segments: &[RelativeSegment],
    shape: &RelativeShape<'_>,
) -> (Vec<f64>, Vec<f64>) {
    let (size, heads) = (shape.head_size, shape.heads);
    let mut o = vec![0.0; q.len()];
    let mut lse = vec![f64::NEG_INFINITY; q.len() / size];
    for RelativeSegment { rows, first } in segments {
        for (query, head) in rows.clone().flat_map(|i| (0..heads).map(move |h| (i, h))) {
            let at = |row: usize| (row * heads + head) * size..(row * heads + head + 1) * size;
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let score = |key: usize| {
                let distance = query + shape.places.len() / 2 - key;
                let place = at(first + shape.places[distance] as usize);
                let mut sum = dot(&q[at(query)], &k[at(key)]);
                sum += position_keys.map_or(0.0, |kr| dot(&q[at(query)], &kr[place.clone()]));
                sum += position_queries.map_or(0.0, |qr| dot(&k[at(key)], &qr[place.clone()]));
                f64::from(shape.scale) * sum
            };
            let scores: Vec<f64> = rows.clone().map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
            lse[query * heads + head] = max + sum.ln();
            for (key, score) in rows.clone().zip(&scores) {
                let weight = (score - max).exp() / sum;
                for (o, v) in o[at(query)].iter_mut().zip(&v[at(key)]) {
                    *o += weight * v;
                }
            }
        }
    }
    (o, lse)
}

/// c · tanh(x / c), or x without a cap.
fn softcap(x: f64, cap: Option<f32>) -> f64 {
    cap.map_or(x, |cap| f64::from(cap) * (x / f64::from(cap)).tanh())
}

/// What [`head`] gives for a row.
#[derive(Clone, Copy, Debug)]
pub struct HeadRow {
    /// log-sum-exp of the logits.
    pub lse: f64,
    /// Logarithm of the target's probability.
    pub log_prob: f64,
    /// Mean of the logits.
    pub mean_logit: f64,
    /// Whether the target has the largest logit.
    pub correct: bool,
}

impl HeadRow {
    /// The loss with label smoothing ε.
    pub fn loss(&self, label_smoothing: f64) -> f64 {
        -(1.0 - label_smoothing) * self.log_prob + label_smoothing * (self.lse - self.mean_logit)
    }
}

/// Statistics of the scaled logits h·Wᵀ of each row, for h [n, C] and W [V, C].
pub fn head(
    h: &[f64],
    w: &[f64],
    scaling: LogitScaling,
    hidden: usize,
    targets: &[u32],
) -> Vec<HeadRow> {
    let vocabulary = w.len() / hidden;
    let mut logits = linear(h, w, None, hidden, vocabulary, Layout::OutIn);
    for logit in &mut logits {
        *logit = softcap(*logit / f64::from(scaling.divisor), scaling.softcap);
    }
    logits
        .chunks_exact(vocabulary)
        .zip(targets)
        .map(|(row, &target)| {
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
            let logit = row[target as usize];
            HeadRow {
                lse,
                log_prob: logit - lse,
                mean_logit: row.iter().sum::<f64>() / vocabulary as f64,
                correct: row.iter().position(|&x| x == max) == Some(target as usize),
            }
        })
        .collect()
}

/// One AdamW step on a value and its moments, as PyTorch's documentation writes it.
pub fn adamw(value: &mut f64, grad: f64, m: &mut f64, v: &mut f64, settings: &AdamW) {
    let grad = grad * f64::from(settings.grad_scale);
    let (lr, beta1, beta2) = (
        f64::from(settings.lr),
        f64::from(settings.beta1),
        f64::from(settings.beta2),
    );
    *value -= lr * f64::from(settings.weight_decay) * *value;
    *m = beta1 * *m + (1.0 - beta1) * grad;
    *v = beta2 * *v + (1.0 - beta2) * grad * grad;
    let m_hat = *m / (1.0 - beta1.powf(settings.step as f64));
    let v_hat = *v / (1.0 - beta2.powf(settings.step as f64));
    *value -= lr * m_hat / (v_hat.sqrt() + f64::from(settings.eps));
}
