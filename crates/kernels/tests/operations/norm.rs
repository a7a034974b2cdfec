use lowrank_kernels::{
    DType, Tensor, layer_norm_apply, layer_norm_backward, layer_norm_forward, reference,
    rms_norm_apply, rms_norm_backward, rms_norm_forward,
};

use crate::common::{
    assert_close, check_gradient, dot, random, random_as, same_bits_on_any_threads, wide,
    zeros_like,
};

const EPS: f32 = 1e-5;
/// (rows, columns, groups).
const SHAPES: [(usize, usize, usize); 5] = [
    (1, 1, 1),
    (3, 37, 1),
    (5, 96, 3),
    (70, 65, 5),
    (600, 130, 2),
];

#[test]
fn rms_norm_is_the_reference() {
    for (rows, cols, groups) in SHAPES {
        for (dtype, offset) in [
            (DType::F32, 0.0),
            (DType::F32, 1.0),
            (DType::Bf16, 1.0),
            (DType::Bf16, 0.0),
        ] {
            let x = random(rows, cols, 1);
            let weight = random_as(1, cols / groups, 2, dtype);
            let mut y = random(rows, cols, 3);
            let mut rstd = Tensor::zeros(rows, groups);
            rms_norm_forward(
                y.view_mut(),
                rstd.view_mut(),
                x.view(),
                weight.view(),
                offset,
                EPS,
                groups,
            );
            let expected =
                reference::rms_norm(&wide(&x), &wide(&weight), f64::from(offset), f64::from(EPS));
            assert_close("rms norm", &y, &expected, 1e-6);
            let mut again = random(rows, cols, 4);
            rms_norm_apply(
                again.view_mut(),
                x.view(),
                rstd.view(),
                weight.view(),
                offset,
                groups,
            );
            assert_eq!(y.to_vec(), again.to_vec());
        }
    }
}

/// dx and dweight.
fn rms_gradients(
    x: &Tensor,
    weight: &Tensor,
    offset: f32,
    dy: &Tensor,
    groups: usize,
) -> [Tensor; 2] {
    let mut y = zeros_like(x);
    let mut rstd = Tensor::zeros(x.rows(), groups);
    rms_norm_forward(
        y.view_mut(),
        rstd.view_mut(),
        x.view(),
        weight.view(),
        offset,
        EPS,
        groups,
    );
    let mut dx = random(x.rows(), x.cols(), 8);
    let mut dweight = zeros_like(weight);
    rms_norm_backward(
        dx.view_mut(),
        Some(dweight.view_mut()),
        dy.view(),
        x.view(),
        rstd.view(),
        weight.view(),
        offset,
        groups,
        false,
    );
    let mut twice = dx.clone();
    rms_norm_backward(
        twice.view_mut(),
        None,
        dy.view(),
        x.view(),
        rstd.view(),
        weight.view(),
        offset,
        groups,
        true,
    );
    let doubled: Vec<f64> = wide(&dx).iter().map(|x| 2.0 * x).collect();
    assert_close("accumulated dx", &twice, &doubled, 1e-6);
    [dx, dweight]
}

#[test]
fn rms_norm_gradients_are_finite_differences() {
    let offsets = [0.0, 1.0];
    let cases = SHAPES[1..]
        .iter()
        .flat_map(|shape| offsets.map(|offset| (shape, offset)));
    for ((rows, cols, groups), offset) in cases {
        let x = random(*rows, *cols, 1);
        let weight = random(1, cols / groups, 2);
        let dy = random(*rows, *cols, 3);
        let [dx, dweight] = rms_gradients(&x, &weight, offset, &dy, *groups);
        let (xs, ws, g) = (wide(&x), wide(&weight), wide(&dy));
        let loss = |x: &[f64], w: &[f64]| {
            dot(
                &g,
                &reference::rms_norm(x, w, f64::from(offset), f64::from(EPS)),
            )
        };
        check_gradient("rms dx", &x, &dx, 1e-5, |x| loss(x, &ws));
        check_gradient("rms dweight", &weight, &dweight, 1e-5, |w| loss(&xs, w));
    }
}

#[test]
fn layer_norm_is_the_reference() {
    for (rows, cols, _) in SHAPES {
        for dtype in [DType::F32, DType::Bf16] {
            let mut x = random(rows, cols, 1);
            // A mean far from zero shows a variance that is computed carelessly.
            let moved: Vec<f32> = x.to_vec().iter().map(|x| x + 30.0).collect();
            x = Tensor::from_f32(rows, cols, moved);
            let weight = random_as(1, cols, 2, dtype);
            let bias = random_as(1, cols, 3, dtype);
            for bias in [None, Some(&bias)] {
                let mut y = random(rows, cols, 3);
                let (mut mean, mut rstd) = (Tensor::zeros(rows, 1), Tensor::zeros(rows, 1));
                layer_norm_forward(
                    y.view_mut(),
                    mean.view_mut(),
                    rstd.view_mut(),
                    x.view(),
                    weight.view(),
                    bias.map(Tensor::view),
                    EPS,
                );
                let wide_bias = bias.map(wide);
                let expected = reference::layer_norm(
                    &wide(&x),
                    &wide(&weight),
                    wide_bias.as_deref(),
                    f64::from(EPS),
                );
                assert_close("layer norm", &y, &expected, 2e-5);
                let mut again = random(rows, cols, 4);
                layer_norm_apply(
                    again.view_mut(),
                    x.view(),
                    mean.view(),
                    rstd.view(),
                    weight.view(),
                    bias.map(Tensor::view),
                );
                assert_eq!(y.to_vec(), again.to_vec());
            }
        }
    }
}

/// dx, dweight and dbias.
fn layer_gradients(x: &Tensor, weight: &Tensor, dy: &Tensor) -> [Tensor; 3] {
    let mut y = zeros_like(x);
    let (mut mean, mut rstd) = (Tensor::zeros(x.rows(), 1), Tensor::zeros(x.rows(), 1));
    layer_norm_forward(
        y.view_mut(),
        mean.view_mut(),
        rstd.view_mut(),
        x.view(),
        weight.view(),
        None,
        EPS,
    );
    let mut dx = random(x.rows(), x.cols(), 8);
    let (mut dweight, mut dbias) = (zeros_like(weight), zeros_like(weight));
    layer_norm_backward(
        dx.view_mut(),
        Some(dweight.view_mut()),
        Some(dbias.view_mut()),
        dy.view(),
        x.view(),
        mean.view(),
        rstd.view(),
        weight.view(),
        false,
    );
    let mut twice = dx.clone();
    layer_norm_backward(
        twice.view_mut(),
        None,
        None,
        dy.view(),
        x.view(),
        mean.view(),
        rstd.view(),
        weight.view(),
        true,
    );
    let doubled: Vec<f64> = wide(&dx).iter().map(|x| 2.0 * x).collect();
    assert_close("accumulated dx", &twice, &doubled, 1e-6);
    [dx, dweight, dbias]
}

#[test]
fn layer_norm_gradients_are_finite_differences() {
    for (rows, cols, _) in &SHAPES[1..] {
        let x = random(*rows, *cols, 1);
        let weight = random(1, *cols, 2);
        let bias = random(1, *cols, 4);
        let dy = random(*rows, *cols, 3);
        let [dx, dweight, dbias] = layer_gradients(&x, &weight, &dy);
        let (xs, ws, bs, g) = (wide(&x), wide(&weight), wide(&bias), wide(&dy));
        let loss = |x: &[f64], w: &[f64], b: &[f64]| {
            dot(&g, &reference::layer_norm(x, w, Some(b), f64::from(EPS)))
        };
        check_gradient("layer dx", &x, &dx, 1e-5, |x| loss(x, &ws, &bs));
        check_gradient("layer dweight", &weight, &dweight, 1e-5, |w| {
            loss(&xs, w, &bs)
        });
        check_gradient("layer dbias", &bias, &dbias, 1e-5, |b| loss(&xs, &ws, b));
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let (x, dy, weight) = (random(600, 130, 1), random(600, 130, 2), random(1, 130, 3));
    same_bits_on_any_threads(|| layer_gradients(&x, &weight, &dy).to_vec());
    let weight = random(1, 65, 3);
    same_bits_on_any_threads(|| rms_gradients(&x, &weight, 1.0, &dy, 2).to_vec());
}
