use lowrank_kernels::{
    AdamW, Arena, Tensor, adamw_step, all_finite, fill_uniform, first_non_finite, frobenius_norm,
    reference, sum_squares,
};

use crate::common::{random, same_bits_on_any_threads, wide};

#[test]
fn adamw_by_hand() {
    // step 1: m = 0.05, v = 0.00025, both corrected to 0.5 and 0.25, so the value moves by lr
    // against the gradient, after the decay by 1 - 0.1·0.2.
    let mut value = Tensor::from_f32(1, 1, vec![1.0]);
    let grad = Tensor::from_f32(1, 1, vec![0.5]);
    let (mut m, mut v) = (Tensor::zeros(1, 1), Tensor::zeros(1, 1));
    let settings = AdamW {
        lr: 0.1,
        beta1: 0.9,
        beta2: 0.999,
        eps: 0.0,
        weight_decay: 0.2,
        step: 1,
        grad_scale: 1.0,
    };
    adamw_step(
        value.view_mut(),
        grad.view(),
        m.view_mut(),
        v.view_mut(),
        &settings,
    );
    assert!((value.to_vec()[0] - 0.88).abs() < 1e-6);
    assert!((m.to_vec()[0] - 0.05).abs() < 1e-7);
    assert!((v.to_vec()[0] - 0.00025).abs() < 1e-8);
}

#[test]
fn adamw_is_the_reference_over_many_steps() {
    let n = 16 * 1024 + 37;
    let mut values = random(1, n, 1);
    let (mut m, mut v) = (Tensor::zeros(1, n), Tensor::zeros(1, n));
    let mut expected = wide(&values);
    let (mut ms, mut vs) = (vec![0.0; n], vec![0.0; n]);
    for step in 1..=5 {
        let grads = random(1, n, 10 + step);
        let settings = AdamW {
            lr: 0.01 * step as f32,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-6,
            weight_decay: 0.1,
            step,
            grad_scale: 1.0,
        };
        adamw_step(
            values.view_mut(),
            grads.view(),
            m.view_mut(),
            v.view_mut(),
            &settings,
        );
        let grads = wide(&grads);
        for i in 0..n {
            reference::adamw(
                &mut expected[i],
                grads[i],
                &mut ms[i],
                &mut vs[i],
                &settings,
            );
        }
    }
    for (found, expected) in values.to_vec().iter().zip(&expected) {
        assert!((f64::from(*found) - expected).abs() < 1e-5);
    }
}

#[test]
fn sums_of_squares_are_exact_enough_and_do_not_depend_on_threads() {
    let x = random(1, 100_003, 1);
    let expected: f64 = wide(&x).iter().map(|x| x * x).sum();
    assert!((sum_squares(x.view()) - expected).abs() < 1e-9 * expected);
    assert_eq!(frobenius_norm(x.view()), sum_squares(x.view()).sqrt());
    same_bits_on_any_threads(|| {
        let bits = sum_squares(x.view()).to_bits();
        let halves = vec![
            f32::from_bits(bits as u32),
            f32::from_bits((bits >> 32) as u32),
        ];
        vec![Tensor::from_f32(1, 2, halves)]
    });
}

#[test]
fn the_first_that_is_not_finite_is_found() {
    let mut values = random(3, 20_000, 1).to_vec();
    let check = |values: &[f32]| {
        let tensor = Tensor::from_f32(3, 20_000, values.to_vec());
        assert_eq!(
            all_finite(tensor.view()),
            first_non_finite(tensor.view()).is_none()
        );
        first_non_finite(tensor.view())
    };
    assert_eq!(check(&values), None);
    values[59_999] = f32::NAN;
    assert_eq!(check(&values), Some(59_999));
    values[40_001] = f32::NEG_INFINITY;
    assert_eq!(check(&values), Some(40_001));
    values[0] = f32::INFINITY;
    assert_eq!(check(&values), Some(0));
}

#[test]
fn random_fills_have_their_moments_and_do_not_depend_on_threads() {
    let normal = random(100, 1000, 3);
    let values = wide(&normal);
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    let kurtosis = values.iter().map(|x| (x - mean).powi(4)).sum::<f64>() / n / variance.powi(2);
    // Five standard deviations of each for 100,000 draws.
    assert!(mean.abs() < 0.016, "mean {mean}");
    assert!((variance - 1.0).abs() < 0.023, "variance {variance}");
    assert!((kurtosis - 3.0).abs() < 0.08, "kurtosis {kurtosis}");

    let mut uniform = Tensor::zeros(100, 1000);
    fill_uniform(uniform.view_mut(), -0.25, 0.75, 4);
    let values = uniform.to_vec();
    assert!(values.iter().all(|x| (-0.25..0.75).contains(x)));
    let mean = wide(&uniform).iter().sum::<f64>() / n;
    assert!((mean - 0.25).abs() < 0.005, "mean {mean}");

    assert_ne!(random(1, 10, 3).to_vec(), random(1, 10, 4).to_vec());
    same_bits_on_any_threads(|| vec![random(77, 333, 3)]);
}

#[test]
fn an_arena_is_one_flat_vector() {
    let mut arena = Arena::new(&[(2, 3), (0, 5), (1, 4)]);
    assert_eq!((arena.slots(), arena.len()), (3, 10));
    assert_eq!(arena.shape(1), (0, 5));
    arena.view_mut(0).fill(1.0);
    arena.view_mut(2).fill(2.0);
    assert_eq!(
        arena.flat().to_vec(),
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    );
    let (mut last, mut first) = arena.pair_mut(2, 0);
    assert_eq!((last.rows(), last.cols()), (1, 4));
    assert_eq!((first.rows(), first.cols()), (2, 3));
    last.fill(3.0);
    first.fill(4.0);
    assert_eq!(arena.view(2).to_vec(), [3.0; 4]);
    assert_eq!(arena.view(0).to_vec(), [4.0; 6]);
    arena.zero();
    assert_eq!(sum_squares(arena.flat()), 0.0);
}

#[test]
fn gradients_are_scaled_first() {
    let settings = AdamW {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        step: 3,
        grad_scale: 0.25,
    };
    let tensor = |numbers: [f32; 3]| Tensor::from_f32(1, 3, numbers.to_vec());
    let step = |grads: [f32; 3], settings: &AdamW| {
        let (mut values, mut m) = (tensor([1.0, -2.0, 3.0]), tensor([0.1, 0.2, -0.3]));
        let mut v = tensor([0.01, 0.02, 0.03]);
        let grads = tensor(grads);
        let moments = (m.view_mut(), v.view_mut());
        adamw_step(
            values.view_mut(),
            grads.view(),
            moments.0,
            moments.1,
            settings,
        );
        (values.to_vec(), m.to_vec(), v.to_vec())
    };
    let plain = AdamW {
        grad_scale: 1.0,
        ..settings
    };
    assert_eq!(
        step([4.0, -8.0, 0.5], &settings),
        step([1.0, -2.0, 0.125], &plain)
    );
}
