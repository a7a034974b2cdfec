use lowrank_kernels::{
    DType, Layout, LowRank, NumberFormat, RowClasses, Tensor, Weight, adapted_squares,
    linear_forward, magnitude_backward, magnitude_forward, output_squares, reference,
};

use crate::common::{
    assert_close, check_gradient, dot, random, random_as, same_bits_on_any_threads, wide,
};

/// W [out, in] of a weight that lies either way.
fn out_in(w: &Tensor, layout: Layout) -> Vec<f64> {
    let values = wide(w);
    match layout {
        Layout::OutIn => values,
        Layout::InOut => {
            let (ins, outs) = (w.rows(), w.cols());
            let at = |out: usize| (0..ins).map(move |i| i * outs + out);
            (0..outs).flat_map(at).map(|at| values[at]).collect()
        }
    }
}

#[test]
fn norms_are_those_of_the_sum() {
    for (ins, outs, r) in [(3, 2, 1), (70, 130, 5), (130, 70, 16)] {
        for (layout, dtype) in [
            (Layout::OutIn, DType::F32),
            (Layout::InOut, DType::F32),
            (Layout::OutIn, DType::Bf16),
            (Layout::InOut, DType::Bf16),
        ] {
            let w = match layout {
                Layout::OutIn => random_as(outs, ins, 1, dtype),
                Layout::InOut => random_as(ins, outs, 1, dtype),
            };
            let weight = Weight {
                view: w.view(),
                layout,
            };
            // Two branches: each writes a part of the outputs.
            let first = outs / 2;
            let (a, b) = (random(r, ins, 2), random(first, r, 3));
            let (c, d) = (random(r, ins, 4), random(outs - first, r, 5));
            let mut squares = output_squares(weight);
            for (a, b, out_offset) in [(&a, &b, 0), (&c, &d, first)] {
                let lr = LowRank {
                    a: a.view(),
                    b: b.view(),
                    scale: -0.7,
                    out_offset,
                    dropout: None,
                };
                let mut wa = Tensor::zeros(r, outs);
                linear_forward(wa.view_mut(), a.view(), weight, None, RowClasses::PROMPT);
                adapted_squares(&mut squares, wa.view(), &lr);
            }
            let norms = squares.iter().map(|square| square.sqrt() as f32);
            let norms = Tensor::from_f32(1, outs, norms.collect());
            let w = out_in(&w, layout);
            let (upper, lower) = w.split_at(first * ins);
            let expected = [
                reference::adapted_norms(upper, &wide(&a), &wide(&b), r, -0.7),
                reference::adapted_norms(lower, &wide(&c), &wide(&d), r, -0.7),
            ];
            assert_close("norms", &norms, &expected.concat(), 2e-6);
        }
    }
}

#[test]
fn magnitudes_and_their_gradients() {
    for (rows, cols) in [(1, 1), (7, 5), (100, 513)] {
        let (y, m, norms) = (
            random(rows, cols, 1),
            random(1, cols, 2),
            random(1, cols, 3),
        );
        let norms = norms.to_vec().into_iter().map(|x| 0.5 + x.abs()).collect();
        let norms = Tensor::from_f32(1, cols, norms);
        let (bias, dy) = (random(1, cols, 4), random(rows, cols, 5));
        let quotients = |m: &[f64]| -> Vec<f64> {
            m.iter()
                .zip(wide(&norms))
                .map(|(m, norm)| m / norm)
                .collect()
        };
        let c = quotients(&wide(&m)).into_iter().map(|c| c as f32).collect();
        let c = Tensor::from_f32(1, cols, c);
        for bias in [None, Some(&bias)] {
            let wide_bias = bias.map_or_else(|| vec![0.0; cols], wide);
            let (mut z, mut u) = (y.clone(), Tensor::zeros(rows, cols));
            let view = bias.map(Tensor::view);
            magnitude_forward(z.view_mut(), Some(u.view_mut()), c.view(), view);
            let mut alone = y.clone();
            magnitude_forward(alone.view_mut(), None, c.view(), view);
            assert!(alone.to_vec() == z.to_vec(), "u changes the output");
            let of = |y: &[f64], m: &[f64]| reference::magnitude(y, &quotients(m), &wide_bias);
            assert_close("z", &z, &of(&wide(&y), &wide(&m)), 1e-6);
            let (mut du, mut dm) = (random(rows, cols, 6), Tensor::zeros(1, cols));
            let factors = (c.view(), norms.view());
            magnitude_backward(du.view_mut(), dm.view_mut(), dy.view(), u.view(), factors);
            let g = wide(&dy);
            check_gradient("du", &y, &du, 1e-5, |y| dot(&g, &of(y, &wide(&m))));
            check_gradient("dm", &m, &dm, 1e-5, |m| dot(&g, &of(&wide(&y), m)));
            let twice: Vec<f64> = wide(&dm).iter().map(|g| 2.0 * g).collect();
            magnitude_backward(du.view_mut(), dm.view_mut(), dy.view(), u.view(), factors);
            assert_close("dm accumulates", &dm, &twice, 1e-6);
            if bias.is_none() {
                // From what was put out, and from numbers of 16 bits.
                let once: Vec<f64> = twice.iter().map(|g| g / 2.0).collect();
                let m_of_c = quotients(&vec![1.0; cols]).into_iter().zip(wide(&c));
                let of_y = m_of_c.map(|(inverse, c)| (c / inverse) as f32).collect();
                let of_y = Tensor::from_f32(1, cols, of_y);
                let bytes = u.to_vec();
                let mut narrow = Vec::new();
                NumberFormat::Bf16
                    .quantize(&bytes, &mut narrow)
                    .expect("numbers");
                let narrow = Tensor::from_le_bytes(&narrow, NumberFormat::Bf16, rows, cols);
                let narrow = narrow.expect("numbers");
                for (saved, divisors, bound) in [(&z, &of_y, 1e-5), (&narrow, &norms, 2e-2)] {
                    let mut dm = Tensor::zeros(1, cols);
                    let factors = (c.view(), divisors.view());
                    magnitude_backward(
                        du.view_mut(),
                        dm.view_mut(),
                        dy.view(),
                        saved.view(),
                        factors,
                    );
                    let most = once.iter().fold(0.0, |most: f64, g| most.max(g.abs()));
                    for (found, expected) in wide(&dm).iter().zip(&once) {
                        assert!(
                            (found - expected).abs() <= bound * most,
                            "{found} {expected}"
                        );
                    }
                }
            }
        }
    }
    let (dy, u, c) = (random(300, 200, 1), random(300, 200, 2), random(1, 200, 3));
    let w = random(200, 300, 4);
    same_bits_on_any_threads(|| {
        let (mut du, mut dm) = (Tensor::zeros(300, 200), Tensor::zeros(1, 200));
        let factors = (c.view(), c.view());
        magnitude_backward(du.view_mut(), dm.view_mut(), dy.view(), u.view(), factors);
        let layout = Layout::InOut;
        let view = w.view();
        let squares = output_squares(Weight { view, layout });
        let squares = squares.into_iter().map(|x| x as f32).collect();
        vec![du, dm, Tensor::from_f32(1, 300, squares)]
    });
}
