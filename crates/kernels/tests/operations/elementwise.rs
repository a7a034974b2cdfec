use lowrank_kernels::{
    Activation, DType, RopeOrder, RopeTable, Tensor, activation_backward, activation_forward,
    add_assign, add_cols, copy_cols, embedding_backward, embedding_forward, gated_backward,
    gated_forward, layer_norm_apply, layer_norm_forward, pool_backward, pool_forward, reference,
    rms_norm_apply, rms_norm_forward, rope_backward, rope_forward, scale, scale_columns,
    scale_columns_backward,
};

use crate::common::{
    assert_close, check_gradient, dot, random, random_as, same_bits_on_any_threads, wide,
    zeros_like,
};

const ALL: [Activation; 5] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Tanh,
];

#[test]
fn activations_are_the_reference_from_end_to_end() {
    let points: Vec<f32> = (-4000..4000).map(|i| i as f32 * 0.01).collect();
    let x = Tensor::from_f32(1, points.len(), points);
    for act in ALL {
        let mut h = random(1, x.cols(), 1);
        activation_forward(h.view_mut(), x.view(), act);
        for (&x, found) in x.to_vec().iter().zip(h.to_vec()) {
            let expected = reference::activation(f64::from(x), act);
            // Relative in the tails too, but for what is lost below the smallest f32.
            let allowed = 4e-6 * expected.abs() + 4e-7 * f64::from(x.abs()).min(1e-2) + 1e-37;
            assert!(
                (f64::from(found) - expected).abs() <= allowed,
                "{act:?}({x}) is {found}, but the reference says {expected}"
            );
        }
    }
}

/// What a product reads next may be written as bf16, which is the rounding of what is written otherwise.
#[test]
fn outputs_may_be_rounded() {
    let (rows, cols) = (70, 130);
    let (x, up, dh) = (
        random(rows, cols, 1),
        random(rows, cols, 2),
        random(rows, cols, 3),
    );
    let (weight, bias) = (random(1, cols, 4), random(1, cols, 5));
    let check = |name: &str, write: &dyn Fn([&mut Tensor; 2])| {
        let of = |dtype| [6, 7].map(|key| random_as(rows, cols, key, dtype));
        let (mut wide, mut narrow) = (of(DType::F32), of(DType::Bf16));
        write(wide.each_mut());
        write(narrow.each_mut());
        for (wide, narrow) in wide.iter().zip(&narrow) {
            let expected = Tensor::from_f32_as(rows, cols, &wide.to_vec(), DType::Bf16);
            assert_eq!(narrow.to_vec(), expected.to_vec(), "{name}");
        }
    };
    let act = Activation::Silu;
    let (x, up, dh) = (x.view(), up.view(), dh.view());
    check("activation forward", &|[h, g]| {
        activation_forward(h, x, act);
        activation_forward(g, up, act);
    });
    check("activation backward", &|[dx, du]| {
        activation_backward(dx, dh, x, act);
        activation_backward(du, dh, up, act);
    });
    check("gated forward", &|[h, g]| {
        gated_forward(h, x, up, act);
        gated_forward(g, up, x, act);
    });
    check("gated backward", &|[dgate, dup]| {
        gated_backward(dgate, dup, dh, x, up, act);
    });
    let (weight, bias) = (weight.view(), bias.view());
    check("rms norm", &|[y, z]| {
        let mut rstd = Tensor::zeros(rows, 1);
        rms_norm_forward(y, rstd.view_mut(), x, weight, 0.0, 1e-5, 1);
        rms_norm_apply(z, x, rstd.view(), weight, 1.0, 1);
    });
    check("layer norm", &|[y, z]| {
        let (mut mean, mut rstd) = (Tensor::zeros(rows, 1), Tensor::zeros(rows, 1));
        let (m, r) = (mean.view_mut(), rstd.view_mut());
        layer_norm_forward(y, m, r, x, weight, Some(bias), 1e-5);
        layer_norm_apply(z, x, mean.view(), rstd.view(), weight, None);
    });
}

#[test]
fn activations_keep_what_is_not_a_number() {
    let x = Tensor::from_f32(1, 3, vec![f32::NAN, f32::INFINITY, 1.0]);
    for act in ALL {
        let mut h = Tensor::zeros(1, 3);
        activation_forward(h.view_mut(), x.view(), act);
        let h = h.to_vec();
        let end = if act == Activation::Tanh {
            1.0
        } else {
            f32::INFINITY
        };
        assert!(h[0].is_nan() && h[1] == end && h[2].is_finite(), "{act:?}");
    }
}

#[test]
fn activation_gradients_are_finite_differences() {
    let (x, up, dh) = (random(7, 33, 1), random(7, 33, 2), random(7, 33, 3));
    let (xs, ups, g) = (wide(&x), wide(&up), wide(&dh));
    for act in ALL {
        let name = format!("{act:?}");
        let mut dx = random(7, 33, 4);
        activation_backward(dx.view_mut(), dh.view(), x.view(), act);
        let plain = |x: &[f64]| {
            let h: Vec<f64> = x.iter().map(|&x| reference::activation(x, act)).collect();
            dot(&g, &h)
        };
        check_gradient(&name, &x, &dx, 1e-6, plain);

        let gated = |x: &[f64], up: &[f64]| -> Vec<f64> {
            let pairs = x.iter().zip(up);
            pairs
                .map(|(&x, up)| reference::activation(x, act) * up)
                .collect()
        };
        let mut h = random(7, 33, 4);
        gated_forward(h.view_mut(), x.view(), up.view(), act);
        assert_close(&name, &h, &gated(&xs, &ups), 1e-6);
        let (mut dgate, mut dup) = (random(7, 33, 5), random(7, 33, 6));
        gated_backward(
            dgate.view_mut(),
            dup.view_mut(),
            dh.view(),
            x.view(),
            up.view(),
            act,
        );
        check_gradient(&name, &x, &dgate, 1e-6, |x| dot(&g, &gated(x, &ups)));
        check_gradient(&name, &up, &dup, 1e-6, |up| dot(&g, &gated(&xs, up)));
    }
}

#[test]
fn rope_is_the_reference_and_its_backward_the_transpose() {
    let inv_freq = [1.0, 0.3, 0.01];
    for (order, head_size) in [
        (RopeOrder::Halves, 6),
        (RopeOrder::Halves, 9),
        (RopeOrder::Neighbours, 6),
        (RopeOrder::Neighbours, 11),
    ] {
        let table = RopeTable::new(&inv_freq, 1.25, 2000).with_order(order);
        assert_eq!(table.max_positions(), 2000);
        let cols = 3 * head_size;
        for rows in [1, 5, 1300] {
            let x = random(rows, cols, 1);
            let positions: Vec<u32> = (0..rows).map(|i| (i * 7 % 2000) as u32).collect();
            let mut y = x.clone();
            rope_forward(y.view_mut(), &positions, &table, head_size);
            let run =
                |x: &[f64]| reference::rope(x, &positions, &inv_freq, 1.25, order, head_size, cols);
            assert_close("rope", &y, &run(&wide(&x)), 1e-6);
            let dy = random(rows, cols, 2);
            let mut dx = dy.clone();
            rope_backward(dx.view_mut(), &positions, &table, head_size);
            let g = wide(&dy);
            check_gradient("rope", &x, &dx, 1e-6, |x| dot(&g, &run(x)));
        }
    }
}

#[test]
#[should_panic(expected = "position 4 is past the 4 of the rope table")]
fn rope_refuses_a_position_past_its_table() {
    let table = RopeTable::new(&[1.0], 1.0, 4);
    rope_forward(random(1, 2, 1).view_mut(), &[4], &table, 2);
}

#[test]
fn embedding_looks_up_and_adds_up() {
    for dtype in [DType::F32, DType::Bf16] {
        let table = random_as(11, 70, 1, dtype);
        let ids = [3, 0, 10, 3, 3];
        let expected: Vec<f64> = ids
            .iter()
            .flat_map(|&id| wide(&table)[id as usize * 70..][..70].to_vec())
            .collect();
        let mut y = random(5, 70, 2);
        embedding_forward(y.view_mut(), &ids, table.view(), false);
        assert_close("embedding", &y, &expected, 0.0);
        embedding_forward(y.view_mut(), &ids, table.view(), true);
        let twice: Vec<f64> = expected.iter().map(|x| 2.0 * x).collect();
        assert_close("embedding added", &y, &twice, 0.0);
    }
    let ids = [3, 0, 10, 3, 3];
    let dy = random(5, 70, 3);
    let mut dtable = random(11, 70, 4);
    let mut expected = wide(&dtable);
    embedding_backward(dtable.view_mut(), &ids, dy.view());
    for (&id, row) in ids.iter().zip(wide(&dy).chunks_exact(70)) {
        for (sum, x) in expected[id as usize * 70..].iter_mut().zip(row) {
            *sum += x;
        }
    }
    assert_close("embedding gradient", &dtable, &expected, 1e-6);
}

#[test]
#[should_panic(expected = "id 11 is past the 11 rows of the table")]
fn embedding_refuses_an_id_past_its_table() {
    let table = random(11, 4, 1);
    embedding_forward(random(1, 4, 2).view_mut(), &[11], table.view(), false);
}

#[test]
fn columns_are_split_and_joined() {
    let fused = random(300, 50, 1);
    let mut part = zeros_like(&random(300, 21, 2));
    copy_cols(part.view_mut(), 1, fused.view(), 30..50);
    let (all, cut) = (fused.to_vec(), part.to_vec());
    for row in 0..300 {
        assert_eq!(cut[row * 21], 0.0);
        assert_eq!(
            cut[row * 21 + 1..(row + 1) * 21],
            all[row * 50 + 30..(row + 1) * 50]
        );
    }
    let mut joined = fused.clone();
    add_cols(joined.view_mut(), 30, part.view(), 1..21);
    for (i, (joined, once)) in joined.to_vec().iter().zip(&all).enumerate() {
        let times = if i % 50 >= 30 { 2.0 } else { 1.0 };
        assert_eq!(*joined, times * once);
    }
}

#[test]
fn sums_and_multiples() {
    let (mut y, x) = (random(130, 257, 1), random(130, 257, 2));
    let expected: Vec<f64> = wide(&y)
        .iter()
        .zip(wide(&x))
        .map(|(y, x)| -0.5 * (y + x))
        .collect();
    add_assign(y.view_mut(), x.view());
    scale(y.view_mut(), -0.5);
    assert_close("sum", &y, &expected, 1e-7);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let (x, dy) = (random(300, 130, 1), random(300, 130, 2));
    let ids: Vec<u32> = (0..300).map(|i| i * 13 % 17).collect();
    same_bits_on_any_threads(|| {
        let mut dtable = Tensor::zeros(17, 130);
        embedding_backward(dtable.view_mut(), &ids, dy.view());
        let mut h = zeros_like(&x);
        gated_forward(h.view_mut(), x.view(), dy.view(), Activation::Silu);
        vec![dtable, h]
    });
}

#[test]
fn columns_are_scaled_and_their_factors_have_gradients() {
    for (rows, cols) in [(1, 1), (7, 33), (130, 70), (65, 300)] {
        let (x, l, dy) = (
            random(rows, cols, 1),
            random(1, cols, 2),
            random(rows, cols, 3),
        );
        let (xs, ls, g) = (wide(&x), wide(&l), wide(&dy));
        let mut y = x.clone();
        scale_columns(y.view_mut(), l.view());
        assert_close("y", &y, &reference::scale_columns(&xs, &ls), 1e-7);
        let mut dl = Tensor::zeros(1, cols);
        scale_columns_backward(dl.view_mut(), dy.view(), x.view());
        check_gradient("dl", &l, &dl, 1e-5, |l| {
            dot(&g, &reference::scale_columns(&xs, l))
        });
        let mut dx = dy.clone();
        scale_columns(dx.view_mut(), l.view());
        check_gradient("dx", &x, &dx, 1e-5, |x| {
            dot(&g, &reference::scale_columns(x, &ls))
        });
        let once = wide(&dl);
        scale_columns_backward(dl.view_mut(), dy.view(), x.view());
        let twice: Vec<f64> = once.iter().map(|g| 2.0 * g).collect();
        assert_close("dl accumulates", &dl, &twice, 1e-6);
    }
    let (x, dy) = (random(300, 200, 1), random(300, 200, 3));
    same_bits_on_any_threads(|| {
        let mut dl = Tensor::zeros(1, 200);
        scale_columns_backward(dl.view_mut(), dy.view(), x.view());
        vec![dl]
    });
}

#[test]
fn pools_are_means_with_their_gradient() {
    let x = random(7, 5, 3);
    // Pools may share rows, and a row may be in none.
    let pools = [0..1, 2..5, 4..7];
    let means = |values: &[f64]| -> Vec<f64> {
        let mean = |pool: &std::ops::Range<usize>, col: usize| {
            let rows = pool.clone().map(|row| values[row * 5 + col]);
            rows.sum::<f64>() / pool.len() as f64
        };
        let all = pools.iter();
        all.flat_map(|pool| (0..5).map(move |col| mean(pool, col)))
            .collect()
    };
    let mut y = random(3, 5, 4);
    pool_forward(y.view_mut(), x.view(), &pools);
    assert_close("means", &y, &means(&wide(&x)), 1e-6);
    let weights = random(3, 5, 5);
    let mut dx = random(7, 5, 6);
    pool_backward(dx.view_mut(), weights.view(), &pools);
    check_gradient("means", &x, &dx, 1e-6, |x| dot(&means(x), &wide(&weights)));
    let is_zero = |row: usize| {
        dx.to_vec()[row * 5..][..5]
            .iter()
            .all(|value| *value == 0.0)
    };
    assert!(is_zero(1) && !is_zero(2));
}
