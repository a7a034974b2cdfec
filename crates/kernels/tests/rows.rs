//! A row's bits are those that it has alone, whatever else is in the batch, however a prompt is cut into pieces, and on every
//! engine that this processor can run.
//!
//! Each case computes a batch at once, and then the same rows again in other company: generated rows one by one and in
//! groups, prompts a row at a time and in pieces. What the rows get must be equal to the bit.

use std::ops::Range;

use lowrank_kernels::{
    AttentionShape, BranchOutput, ComputeDType, CounterRng, DType, Layout, LinearOutput,
    LogitScaling, LowRank, RelativeGradients, RelativePositions, RelativeSegment, RelativeShape,
    RowClasses, Segment, Tensor, Weight, Workspace, attention_forward, engines, fill_normal,
    head_logits, linear_forward, linears_forward, low_rank_forward, reference,
    relative_attention_backward, relative_attention_forward, with_engine,
};

fn random(rows: usize, cols: usize, key: u64) -> Tensor {
    let mut tensor = Tensor::zeros(rows, cols);
    fill_normal(tensor.view_mut(), 1.0, key);
    tensor
}

fn random_as(rows: usize, cols: usize, key: u64, dtype: DType) -> Tensor {
    Tensor::from_f32_as(rows, cols, &random(rows, cols, key).to_vec(), dtype)
}

fn rows_of(tensor: &Tensor, rows: Range<usize>) -> Tensor {
    let view = tensor.view().slice_rows(rows);
    Tensor::from_f32(view.rows(), view.cols(), view.to_vec())
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.to_vec().into_iter().map(f32::to_bits).collect()
}

/// A number from a range.
fn draw(rng: &mut CounterRng, range: Range<usize>) -> usize {
    range.start + rng.below(range.len() as u64) as usize
}

/// Cuts a range into random pieces; often into single rows.
fn cut(rng: &mut CounterRng, range: Range<usize>) -> Vec<Range<usize>> {
    let most = [1, 4, 64, range.len().max(1)][draw(rng, 0..4)];
    let (mut pieces, mut at) = (Vec::new(), range.start);
    while at < range.end {
        let end = (at + draw(rng, 1..most + 1)).min(range.end);
        pieces.push(at..end);
        at = end;
    }
    pieces
}

/// Runs a test on each engine, with pools of one thread and of three.
fn on_every_engine(test: impl Fn() + Sync) {
    for engine in engines() {
        for threads in [1, 3] {
            eprintln!("{engine:?} with {threads} threads");
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().expect("a pool");
            with_engine(engine, || pool.install(&test));
        }
    }
}

/// An adapter's factors of one linear.
struct Factors {
    a: Tensor,
    b: Tensor,
    scale: f32,
    out_offset: usize,
}

impl Factors {
    fn branch(&self) -> LowRank<'_> {
        LowRank {
            a: self.a.view(),
            b: self.b.view(),
            scale: self.scale,
            out_offset: self.out_offset,
            dropout: None,
        }
    }
}

/// Linears of one input, and several adapters of them.
struct Linears {
    inputs: usize,
    weights: Vec<Tensor>,
    biases: Vec<Option<Tensor>>,
    layout: Layout,
    /// [adapter][linear]; an adapter may leave a linear alone.
    adapters: Vec<Vec<Option<Factors>>>,
}

impl Linears {
    fn random(rng: &mut CounterRng) -> Self {
        let inputs = [1, 40, 130, 576, 800, 1700][draw(rng, 0..6)];
        let layout = [Layout::OutIn, Layout::OutIn, Layout::InOut][draw(rng, 0..3)];
        let outputs: Vec<usize> = (0..draw(rng, 1..4)).map(|_| draw(rng, 1..200)).collect();
        let mut weights = Vec::new();
        let mut biases = Vec::new();
        for &out in &outputs {
            let dtype = [DType::Bf16, DType::F32][draw(rng, 0..2)];
            let shape = match layout {
                Layout::OutIn => (out, inputs),
                Layout::InOut => (inputs, out),
            };
            weights.push(random_as(shape.0, shape.1, rng.next_u64(), dtype));
            let bias_dtype = [DType::Bf16, DType::F32][draw(rng, 0..2)];
            let bias = draw(rng, 0..2) == 0;
            biases.push(bias.then(|| random_as(1, out, rng.next_u64(), bias_dtype)));
        }
        let adapter = |rng: &mut CounterRng| {
            let factors = outputs.iter().map(|&out| {
                let rank = [1, 4, 8, 20][draw(rng, 0..4)];
                let out_offset = [0, draw(rng, 0..out)][draw(rng, 0..2)];
                let columns = [out - out_offset, draw(rng, 1..out - out_offset + 1)];
                let columns = columns[draw(rng, 0..2)];
                (draw(rng, 0..4) > 0).then(|| Factors {
                    a: random(rank, inputs, rng.next_u64()),
                    b: random(columns, rank, rng.next_u64()),
                    scale: 1.75,
                    out_offset,
                })
            });
            factors.collect()
        };
        Self {
            adapters: (0..draw(rng, 1..5)).map(|_| adapter(rng)).collect(),
            inputs,
            weights,
            biases,
            layout,
        }
    }

    /// Outputs of these rows, of which each range uses an adapter or none.
    fn forward(
        &self,
        x: &Tensor,
        adapters: &[(Range<usize>, Option<usize>)],
        classes: RowClasses,
    ) -> Vec<Tensor> {
        let weights = self.weights.iter().map(|w| Weight {
            view: w.view(),
            layout: self.layout,
        });
        let mut ys: Vec<Tensor> = weights
            .clone()
            .map(|w| random(x.rows(), w.outputs(), 5))
            .collect();
        let branches_of = |linear: usize| {
            let adapters = adapters.iter();
            adapters.filter_map(move |(rows, adapter)| {
                let factors = self.adapters[(*adapter)?][linear].as_ref()?;
                Some((rows.clone(), factors))
            })
        };
        let mut hidden: Vec<Vec<Tensor>> = (0..ys.len())
            .map(|linear| {
                let of = branches_of(linear);
                of.map(|(rows, factors)| random(rows.len(), factors.a.rows(), 6))
                    .collect()
            })
            .collect();
        let outputs = weights.zip(&mut ys).zip(&mut hidden).enumerate();
        let outputs = outputs.map(|(i, ((w, y), hidden))| LinearOutput {
            y: y.view_mut(),
            w,
            bias: self.biases[i].as_ref().map(Tensor::view),
            branches: branches_of(i)
                .zip(hidden)
                .map(|((rows, factors), u)| BranchOutput {
                    u: u.view_mut(),
                    rows,
                    branch: factors.branch(),
                })
                .collect(),
        });
        let outputs = outputs.collect();
        linears_forward(
            x.view(),
            outputs,
            classes,
            ComputeDType::F32,
            &Workspace::new(),
        );
        ys
    }
}

/// Ranges of rows, each with an adapter or none; one may hold rows of both classes.
fn adapters_of(
    rng: &mut CounterRng,
    rows: Range<usize>,
    count: usize,
) -> Vec<(Range<usize>, Option<usize>)> {
    let pieces = cut(rng, rows);
    let adapter = |rng: &mut CounterRng| (draw(rng, 0..5) > 0).then(|| draw(rng, 0..count));
    pieces
        .into_iter()
        .map(|rows| (rows, adapter(rng)))
        .collect()
}

/// The part of a batch's ranges that lies in some rows, counted from the first of these.
fn within(
    adapters: &[(Range<usize>, Option<usize>)],
    rows: &Range<usize>,
) -> Vec<(Range<usize>, Option<usize>)> {
    let part = |range: &Range<usize>| range.start.max(rows.start)..range.end.min(rows.end);
    let parts = adapters
        .iter()
        .map(|(range, adapter)| (part(range), *adapter));
    let parts = parts.filter(|(range, _)| !range.is_empty());
    parts
        .map(|(range, adapter)| (range.start - rows.start..range.end - rows.start, adapter))
        .collect()
}

/// A mix of prompts and generated rows, and again in pieces: the prompts' rows in some, the generated ones in others, or one of
/// each together.
fn check_linears(rng: &mut CounterRng) {
    let linears = Linears::random(rng);
    let prompt = [0, 1, 7, 50, 130][draw(rng, 0..5)];
    let generated = [0, 1, 5, 8, 9, 40][draw(rng, 0..6)];
    let tokens = prompt + generated;
    let x = random(tokens, linears.inputs, rng.next_u64());
    let adapters = adapters_of(rng, 0..tokens, linears.adapters.len());
    let classes = RowClasses::generated_from(prompt);
    let all = linears.forward(&x, &adapters, classes);
    let check = |rows: &Range<usize>, found: &[Tensor], first: usize| {
        for (linear, (all, found)) in all.iter().zip(found).enumerate() {
            assert_eq!(
                bits(&rows_of(all, rows.clone())),
                bits(&rows_of(found, first..first + rows.len())),
                "linear {linear} of {} inputs, {:?} {}, rows {rows:?} of {prompt} and {generated}",
                linears.inputs,
                linears.layout,
                linears.weights[linear].format(),
            );
        }
    };
    let prompts = cut(rng, 0..prompt);
    let mut others = cut(rng, prompt..tokens);
    for rows in prompts {
        // The same rows with generated ones behind them, or without.
        let company = others.pop().unwrap_or(tokens..tokens);
        let mut both = rows_of(&x, rows.clone()).to_vec();
        both.extend(rows_of(&x, company.clone()).to_vec());
        let both = Tensor::from_f32(rows.len() + company.len(), linears.inputs, both);
        let mut branches = within(&adapters, &rows);
        branches.extend(
            within(&adapters, &company)
                .into_iter()
                .map(|(range, a)| (rows.len() + range.start..rows.len() + range.end, a)),
        );
        let classes = RowClasses::generated_from(rows.len());
        let found = linears.forward(&both, &branches, classes);
        check(&rows, &found, 0);
        check(&company, &found, rows.len());
    }
    for rows in others {
        let part = rows_of(&x, rows.clone());
        let branches = within(&adapters, &rows);
        let found = linears.forward(&part, &branches, RowClasses::GENERATED);
        check(&rows, &found, 0);
    }
}

#[test]
fn linears_with_many_adapters() {
    on_every_engine(|| {
        let mut rng = CounterRng::new(11);
        for _ in 0..24 {
            check_linears(&mut rng);
        }
    });
}

/// Sizes at which tiles, panels and parts of rows begin and end, without branches.
#[test]
fn a_linear_and_a_head_of_every_shape() {
    on_every_engine(|| {
        let mut rng = CounterRng::new(12);
        for (inputs, outputs) in [(128, 32), (127, 33), (600, 300), (769, 17), (3100, 40)] {
            for (layout, dtype) in [
                (Layout::OutIn, DType::Bf16),
                (Layout::OutIn, DType::F32),
                (Layout::InOut, DType::Bf16),
                (Layout::InOut, DType::F32),
            ] {
                let w = match layout {
                    Layout::OutIn => random_as(outputs, inputs, 1, dtype),
                    Layout::InOut => random_as(inputs, outputs, 1, dtype),
                };
                let w = Weight {
                    view: w.view(),
                    layout,
                };
                let (x, bias) = (random(100, inputs, 2), random(1, outputs, 3));
                let scaling = LogitScaling {
                    divisor: 1.5,
                    softcap: Some(2.0),
                };
                for classes in [RowClasses::PROMPT, RowClasses::GENERATED] {
                    let mut all = Tensor::zeros(100, outputs);
                    let mut logits = Tensor::zeros(100, outputs);
                    linear_forward(all.view_mut(), x.view(), w, Some(bias.view()), classes);
                    head_logits(logits.view_mut(), x.view(), w, scaling, classes);
                    for rows in cut(&mut rng, 0..100) {
                        let part = rows_of(&x, rows.clone());
                        let mut y = Tensor::zeros(rows.len(), outputs);
                        linear_forward(y.view_mut(), part.view(), w, Some(bias.view()), classes);
                        let name = format!("{rows:?} {inputs}x{outputs} {layout:?} {dtype}");
                        assert_eq!(bits(&y), bits(&rows_of(&all, rows.clone())), "{name}");
                        head_logits(y.view_mut(), part.view(), w, scaling, classes);
                        assert_eq!(bits(&y), bits(&rows_of(&logits, rows)), "{name}");
                    }
                }
            }
        }
    });
}

#[test]
fn a_branch_alone() {
    on_every_engine(|| {
        let mut rng = CounterRng::new(13);
        for rank in [1, 7, 8, 33] {
            let factors = Factors {
                a: random(rank, 900, 1),
                b: random(70, rank, 2),
                scale: 0.5,
                out_offset: 9,
            };
            let (x, base) = (random(60, 900, 3), random(60, 90, 4));
            for classes in [RowClasses::PROMPT, RowClasses::GENERATED] {
                let run = |rows: &Range<usize>| {
                    let (x, mut y) = (rows_of(&x, rows.clone()), rows_of(&base, rows.clone()));
                    let mut u = Tensor::zeros(rows.len(), rank);
                    low_rank_forward(
                        y.view_mut(),
                        u.view_mut(),
                        x.view(),
                        0..rows.len(),
                        &factors.branch(),
                        classes,
                        &Workspace::new(),
                    );
                    [y, u]
                };
                let all = run(&(0..60));
                for rows in cut(&mut rng, 0..60) {
                    for (all, found) in all.iter().zip(&run(&rows)) {
                        let expected = rows_of(all, rows.clone());
                        assert_eq!(bits(found), bits(&expected), "rank {rank}, {rows:?}");
                    }
                }
            }
        }
    });
}

/// Rows of a block of a pool of keys and values: more than a tile of attention has.
const POOL_BLOCK: usize = 256;

/// A sequence whose keys lie in blocks somewhere in a pool.
struct Sequence {
    /// Rows before the blocks: a prefix.
    prefix: Range<usize>,
    blocks: Vec<usize>,
    /// Of q: its prompt, and the one generated row.
    prompt: usize,
}

impl Sequence {
    /// The list of ranges of its first `count` keys after the prefix.
    fn keys(&self, count: usize) -> Vec<Range<usize>> {
        let mut ranges = vec![self.prefix.clone()];
        for (i, block) in self.blocks.iter().enumerate() {
            let filled = count.saturating_sub(i * POOL_BLOCK).min(POOL_BLOCK);
            if filled > 0 {
                ranges.push(block * POOL_BLOCK..block * POOL_BLOCK + filled);
            }
        }
        ranges
    }
}

struct Caches {
    compute: ComputeDType,
    shape: AttentionShape,
    k: Tensor,
    v: Tensor,
    sequences: Vec<Sequence>,
}

impl Caches {
    fn random(rng: &mut CounterRng) -> Self {
        let (kv_heads, group) = (draw(rng, 1..4), [1, 2, 3, 5, 12][draw(rng, 0..5)]);
        let head_size = [8, 20, 64][draw(rng, 0..3)];
        let window = [None, Some(draw(rng, 1..400))][draw(rng, 0..2)];
        let softcap = [None, Some(0.8)][draw(rng, 0..2)];
        let count = draw(rng, 1..4);
        let mut sequences = Vec::new();
        let mut next = 1;
        for _ in 0..count {
            let prompt = [1, 3, 130, 400][draw(rng, 0..4)];
            let blocks = (prompt + 1_usize).div_ceil(POOL_BLOCK);
            sequences.push(Sequence {
                prefix: 0..draw(rng, 0..10),
                // Blocks of one sequence lie anywhere, here backwards.
                blocks: (next..next + blocks).rev().collect(),
                prompt,
            });
            next += blocks;
        }
        let cols = kv_heads * head_size;
        Self {
            compute: [ComputeDType::F32, ComputeDType::Bf16][draw(rng, 0..2)],
            shape: AttentionShape {
                heads: kv_heads * group,
                kv_heads,
                head_size,
                scale: 0.3,
                softcap,
                window,
            },
            k: random(next * POOL_BLOCK, cols, rng.next_u64()),
            v: random(next * POOL_BLOCK, cols, rng.next_u64()),
            sequences,
        }
    }

    fn forward(&self, q: &Tensor, segments: &[Segment], classes: RowClasses) -> [Tensor; 2] {
        let mut o = Tensor::zeros(q.rows(), q.cols());
        let mut lse = Tensor::zeros(q.rows(), self.shape.heads);
        attention_forward(
            o.view_mut(),
            lse.view_mut(),
            q.view(),
            self.k.view(),
            self.v.view(),
            segments,
            &self.shape,
            classes,
            self.compute,
            &Workspace::new(),
        );
        [o, lse]
    }
}

/// Whole prompts at once and a generated row of each sequence, against prompts in pieces and generated rows in groups.
fn check_attention(rng: &mut CounterRng) {
    let caches = Caches::random(rng);
    let count = caches.sequences.len();
    let prompts: usize = caches.sequences.iter().map(|s| s.prompt).sum();
    let cols = caches.shape.heads * caches.shape.head_size;
    let q = random(prompts + count, cols, rng.next_u64());
    let (mut segments, mut at) = (Vec::new(), 0);
    for sequence in &caches.sequences {
        segments.push(Segment {
            queries: at..at + sequence.prompt,
            keys: sequence.keys(sequence.prompt),
            causal: true,
        });
        at += sequence.prompt;
    }
    for (i, sequence) in caches.sequences.iter().enumerate() {
        segments.push(Segment {
            queries: prompts + i..prompts + i + 1,
            keys: sequence.keys(sequence.prompt + 1),
            causal: true,
        });
    }
    let all = caches.forward(&q, &segments, RowClasses::generated_from(prompts));
    let check = |rows: &Range<usize>, found: &[Tensor; 2], first: usize| {
        for (all, found) in all.iter().zip(found) {
            let expected = rows_of(all, rows.clone());
            let found = rows_of(found, first..first + rows.len());
            assert_eq!(bits(&found), bits(&expected), "{rows:?} {:?}", caches.shape);
        }
    };
    at = 0;
    for (i, sequence) in caches.sequences.iter().enumerate() {
        for piece in cut(rng, 0..sequence.prompt) {
            let rows = at + piece.start..at + piece.end;
            let own = Segment {
                queries: 0..piece.len(),
                keys: sequence.keys(piece.end),
                causal: true,
            };
            // Another sequence's generated row goes with it.
            let other = (i + 1) % count;
            let with = Segment {
                queries: piece.len()..piece.len() + 1,
                keys: caches.sequences[other].keys(caches.sequences[other].prompt + 1),
                causal: true,
            };
            let mut both = rows_of(&q, rows.clone()).to_vec();
            both.extend(rows_of(&q, prompts + other..prompts + other + 1).to_vec());
            let both = Tensor::from_f32(piece.len() + 1, cols, both);
            let classes = RowClasses::generated_from(piece.len());
            let found = caches.forward(&both, &[own, with], classes);
            check(&rows, &found, 0);
            check(&(prompts + other..prompts + other + 1), &found, piece.len());
        }
        at += sequence.prompt;
    }
}

#[test]
fn attention_over_caches_in_blocks() {
    on_every_engine(|| {
        let mut rng = CounterRng::new(14);
        for _ in 0..10 {
            check_attention(&mut rng);
        }
    });
}

/// Attention with relative positions, forward and backward.
struct Relative {
    inputs: [Tensor; 4],
    positions: [Tensor; 2],
    places: Vec<u32>,
    heads: usize,
    size: usize,
}

impl Relative {
    /// o, lse, dq, dk and dv of some of the rows, in these segments.
    fn run(&self, rows: &Range<usize>, segments: &[RelativeSegment]) -> [Tensor; 5] {
        let [q, k, v, d_o] = [0, 1, 2, 3].map(|i| rows_of(&self.inputs[i], rows.clone()));
        let positions = RelativePositions {
            keys: Some(self.positions[0].view()),
            queries: Some(self.positions[1].view()),
        };
        let shape = RelativeShape {
            heads: self.heads,
            head_size: self.size,
            scale: 0.2,
            places: &self.places,
        };
        let ws = Workspace::new();
        let [mut o, mut dq, mut dk, mut dv] = std::array::from_fn(|_| q.clone());
        let mut lse = Tensor::zeros(q.rows(), self.heads);
        let [mut d_keys, mut d_queries] = self.positions.clone();
        relative_attention_forward(
            o.view_mut(),
            lse.view_mut(),
            q.view(),
            k.view(),
            v.view(),
            positions,
            segments,
            &shape,
            &ws,
        );
        relative_attention_backward(
            dq.view_mut(),
            dk.view_mut(),
            dv.view_mut(),
            RelativeGradients {
                keys: Some(d_keys.view_mut()),
                queries: Some(d_queries.view_mut()),
            },
            d_o.view(),
            q.view(),
            k.view(),
            v.view(),
            positions,
            lse.view(),
            segments,
            &shape,
            &ws,
        );
        [o, lse, dq, dk, dv]
    }

    fn reference(&self, segments: &[RelativeSegment]) -> Vec<f64> {
        let wide =
            |tensor: &Tensor| -> Vec<f64> { tensor.to_vec().into_iter().map(f64::from).collect() };
        let [q, k, v, ..] = [0, 1, 2].map(|i| wide(&self.inputs[i]));
        let [keys, queries] = [0, 1].map(|i| wide(&self.positions[i]));
        let shape = RelativeShape {
            heads: self.heads,
            head_size: self.size,
            scale: 0.2,
            places: &self.places,
        };
        let inputs = [&q[..], &k, &v];
        reference::relative_attention(inputs, Some(&keys), Some(&queries), segments, &shape).0
    }
}

#[test]
fn segments_with_relative_positions() {
    on_every_engine(|| {
        let mut rng = CounterRng::new(15);
        for (heads, size) in [(3, 16), (1, 5), (17, 8)] {
            let span = draw(&mut rng, 4..90);
            let edges = [0, 1, 30, 31, 160, 224];
            let of = |rows: Range<usize>| RelativeSegment { rows, first: 0 };
            let segments: Vec<RelativeSegment> =
                edges.windows(2).map(|edge| of(edge[0]..edge[1])).collect();
            let rows = |key| random(224, heads * size, key);
            let positions = |key| random(2 * span, heads * size, key);
            let place =
                |distance: i64| (distance + span as i64).clamp(0, 2 * span as i64 - 1) as u32;
            let relative = Relative {
                inputs: [rows(1), rows(2), rows(3), rows(4)],
                positions: [positions(5), positions(6)],
                places: (-223..224).map(place).collect(),
                heads,
                size,
            };
            let all = relative.run(&(0..224), &segments);
            let expected = relative.reference(&segments);
            for (found, expected) in all[0].to_vec().into_iter().zip(expected) {
                assert!(
                    (f64::from(found) - expected).abs() < 2e-5,
                    "{found} {expected}"
                );
            }
            for RelativeSegment { rows, .. } in segments {
                let alone = relative.run(&rows, &[of(0..rows.len())]);
                for (alone, all) in alone.iter().zip(&all) {
                    assert_eq!(bits(alone), bits(&rows_of(all, rows.clone())), "{rows:?}");
                }
            }
        }
    });
}
