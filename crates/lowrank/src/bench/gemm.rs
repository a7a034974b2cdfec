//! The matrix products of a training step, each alone.

use std::time::Instant;

use lowrank_kernels::{
    ComputeDType, DType, Layout, LinearOutput, RowClasses, Tensor, Weight, Workspace, fill_normal,
    head_chunk_rows, linear_backward_input, linears_forward,
};
use serde::Serialize;

use crate::model::ModelConfig;

/// How fast one shape is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GemmFigures {
    /// Which product.
    pub name: String,
    /// Rows of the activations.
    pub tokens: usize,
    /// Columns of the input.
    pub inputs: usize,
    /// Columns of the output.
    pub outputs: usize,
    /// y = x·Wᵀ, operations a second in thousands of millions.
    pub forward_gflops: f64,
    /// dx = dy·W, likewise.
    pub backward_gflops: f64,
    /// How many of them a step has.
    pub count: usize,
}

impl GemmFigures {
    fn flops(&self) -> f64 {
        2.0 * (self.tokens * self.inputs * self.outputs) as f64
    }

    /// Seconds that all of a step's products of this shape take at the measured rates.
    pub fn seconds(&self) -> f64 {
        let each = 1e-9 / self.forward_gflops + 1e-9 / self.backward_gflops;
        self.count as f64 * self.flops() * each
    }
}

/// Measures the products of a step with `tokens` tokens, `supervised` of them with labels, each alone and best of
/// `repeats`, with weights stored as `dtype` and factors read as `compute` says.
pub fn gemm(
    config: &ModelConfig,
    (tokens, supervised): (usize, usize),
    (dtype, compute): (DType, ComputeDType),
    repeats: usize,
) -> Vec<GemmFigures> {
    let mut all: Vec<GemmFigures> = Vec::new();
    for &kind in config.linear_kinds() {
        let (inputs, outputs) = config.linear_shape(kind);
        let known = all
            .iter_mut()
            .find(|f| (f.inputs, f.outputs) == (inputs, outputs));
        if let Some(known) = known {
            known.count += config.num_hidden_layers;
            known.name = format!("{}, {}", known.name, format!("{kind:?}").to_lowercase());
            continue;
        }
        let name = format!("{kind:?}").to_lowercase();
        let mut figures = measure(
            &name,
            (tokens, inputs, outputs),
            config.layout,
            (dtype, compute),
            repeats,
        );
        figures.count = config.num_hidden_layers;
        all.push(figures);
    }
    // The head goes over its rows in chunks.
    let rows = head_chunk_rows(config.vocab_size, supervised);
    if rows > 0 {
        let shape = (rows, config.hidden_size, config.vocab_size);
        let mut head = measure("head", shape, Layout::OutIn, (dtype, compute), repeats);
        head.count = supervised.div_ceil(rows);
        all.push(head);
    }
    all
}

fn measure(
    name: &str,
    (tokens, inputs, outputs): (usize, usize, usize),
    layout: Layout,
    (dtype, compute): (DType, ComputeDType),
    repeats: usize,
) -> GemmFigures {
    let (rows, cols) = match layout {
        Layout::OutIn => (outputs, inputs),
        Layout::InOut => (inputs, outputs),
    };
    let mut weight = Tensor::zeros(rows, cols);
    fill_normal(weight.view_mut(), 0.05, 1);
    let weight = match dtype {
        DType::F32 => weight,
        DType::Bf16 => Tensor::from_f32_as(rows, cols, &weight.to_vec(), dtype),
    };
    let w = Weight {
        view: weight.view(),
        layout,
    };
    let mut x = Tensor::zeros(tokens, inputs);
    fill_normal(x.view_mut(), 1.0, 2);
    let mut y = Tensor::zeros(tokens, outputs);
    fill_normal(y.view_mut(), 1.0, 3);
    let ws = Workspace::new();
    let flops = 2.0 * (tokens * inputs * outputs) as f64;
    let rate = |mut work: Box<dyn FnMut() + '_>| {
        work();
        let best = (0..repeats.max(1))
            .map(|_| {
                let begun = Instant::now();
                work();
                begun.elapsed().as_secs_f64()
            })
            .fold(f64::INFINITY, f64::min);
        flops / best / 1e9
    };
    let forward = rate(Box::new(|| {
        let output = LinearOutput {
            y: y.view_mut(),
            w,
            bias: None,
            branches: Vec::new(),
        };
        linears_forward(x.view(), vec![output], RowClasses::PROMPT, compute, &ws);
    }));
    let backward = rate(Box::new(|| {
        linear_backward_input(x.view_mut(), y.view(), w, false, compute);
    }));
    GemmFigures {
        name: name.to_owned(),
        tokens,
        inputs,
        outputs,
        forward_gflops: forward,
        backward_gflops: backward,
        count: 1,
    }
}

/// The rate of the fastest product.
pub fn peak_gflops(shapes: &[GemmFigures]) -> f64 {
    shapes
        .iter()
        .map(|shape| shape.forward_gflops.max(shape.backward_gflops))
        .fold(0.0, f64::max)
}

/// The rate of all products of a step, one after the other.
pub fn mean_gflops(shapes: &[GemmFigures]) -> f64 {
    let flops = |shape: &GemmFigures| 2.0 * shape.count as f64 * shape.flops();
    let total: f64 = shapes.iter().map(flops).sum();
    let seconds: f64 = shapes.iter().map(GemmFigures::seconds).sum();
    total / seconds / 1e9
}
