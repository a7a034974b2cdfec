//! What the tests share: random matrices, comparisons, finite differences, thread counts.

use lowrank_kernels::{CounterRng, DType, Tensor, fill_normal};

pub(crate) fn random(rows: usize, cols: usize, key: u64) -> Tensor {
    let mut tensor = Tensor::zeros(rows, cols);
    fill_normal(tensor.view_mut(), 1.0, key);
    tensor
}

pub(crate) fn random_as(rows: usize, cols: usize, key: u64, dtype: DType) -> Tensor {
    Tensor::from_f32_as(rows, cols, &random(rows, cols, key).to_vec(), dtype)
}

pub(crate) fn zeros_like(tensor: &Tensor) -> Tensor {
    Tensor::zeros(tensor.rows(), tensor.cols())
}

pub(crate) fn wide(tensor: &Tensor) -> Vec<f64> {
    tensor.to_vec().into_iter().map(f64::from).collect()
}

/// Numbers times a scale, as the nearest bf16 ones.
pub(crate) fn rounded(tensor: &Tensor, scale: f32) -> Vec<f64> {
    let round = |x: &f32| half::bf16::from_f32(x * scale).to_f64();
    tensor.to_vec().iter().map(round).collect()
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Each element within `tolerance` of the reference, relative to the largest of the reference.
#[track_caller]
pub(crate) fn assert_close(name: &str, found: &Tensor, expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{name}: number of elements");
    let size = expected
        .iter()
        .filter(|x| x.is_finite())
        .fold(1e-3_f64, |m, x| m.max(x.abs()));
    for (i, (found, &expected)) in found.to_vec().into_iter().zip(expected).enumerate() {
        let found = f64::from(found);
        assert!(
            found == expected || (found - expected).abs() <= tolerance * size,
            "{name}: element {i} is {found}, but the reference says {expected}"
        );
    }
}

/// The gradient against central differences of the loss: single elements, and a few random
/// directions that would show a wrong element anywhere.
#[track_caller]
pub(crate) fn check_gradient(
    name: &str,
    x: &Tensor,
    gradient: &Tensor,
    tolerance: f64,
    loss: impl Fn(&[f64]) -> f64,
) {
    let x = wide(x);
    let gradient = wide(gradient);
    let norm = dot(&gradient, &gradient).sqrt();
    assert!(norm > 0.0, "{name}: a gradient of zero proves nothing");
    let step = 1e-5;
    let slope = |direction: &[f64]| {
        let at = |t: f64| {
            let moved: Vec<f64> = x.iter().zip(direction).map(|(x, d)| x + t * d).collect();
            loss(&moved)
        };
        (at(step) - at(-step)) / (2.0 * step)
    };
    let mut rng = CounterRng::new(99);
    for _ in 0..12 {
        let i = rng.below(x.len() as u64) as usize;
        let mut direction = vec![0.0; x.len()];
        direction[i] = 1.0;
        let expected = slope(&direction);
        assert!(
            (gradient[i] - expected).abs() <= tolerance * norm,
            "{name}: element {i} of the gradient is {}, but the loss changes by {expected}",
            gradient[i]
        );
    }
    for _ in 0..3 {
        let direction: Vec<f64> = x.iter().map(|_| rng.next_f64() * 2.0 - 1.0).collect();
        let (expected, found) = (slope(&direction), dot(&gradient, &direction));
        assert!(
            (found - expected).abs() <= tolerance * norm,
            "{name}: along a random direction the gradient says {found}, the loss {expected}"
        );
    }
}

/// Runs `work` on pools of one, two and three threads and asserts that all bits are the same.
#[track_caller]
pub(crate) fn same_bits_on_any_threads(work: impl Fn() -> Vec<Tensor> + Sync) {
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("a pool");
        let results = pool.install(&work);
        results
            .iter()
            .flat_map(Tensor::to_vec)
            .map(f32::to_bits)
            .collect::<Vec<u32>>()
    };
    let one = run(1);
    assert!(!one.is_empty());
    for threads in [2, 3] {
        assert!(one == run(threads), "{threads} threads give other bits");
    }
}
