//! Each operation beside its naive reference, at the sizes of a small transformer.
//!
//! The references are f64 and run on one thread; they say what the fast paths are worth, not what
//! another library does.

mod attention;
mod elements;
mod head;
mod linear;
mod low_rank;
mod norm;
mod relative;

use divan::Divan;
use divan::counter::ItemsCount;
use lowrank_kernels::{DType, Tensor, fill_normal};

const HIDDEN: usize = 576;
const INNER: usize = 1536;
const RANK: usize = 8;

fn main() {
    Divan::default().sample_count(10).config_with_args().main();
}

fn random(rows: usize, cols: usize) -> Tensor {
    let mut tensor = Tensor::zeros(rows, cols);
    fill_normal(tensor.view_mut(), 1.0, (rows * 31 + cols) as u64);
    tensor
}

fn bf16(rows: usize, cols: usize) -> Tensor {
    Tensor::from_f32_as(rows, cols, &random(rows, cols).to_vec(), DType::Bf16)
}

fn wide(tensor: &Tensor) -> Vec<f64> {
    tensor.to_vec().into_iter().map(f64::from).collect()
}

fn flops(n: usize) -> ItemsCount {
    ItemsCount::new(n)
}
