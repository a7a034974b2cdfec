//! First values that are made of the weights; `scripts/goldens_initial.py` wrote what PEFT makes of them.

use std::path::{Path, PathBuf};

use lowrank::tuning::lora::{self, InitLoraWeights};
use lowrank::tuning::targets::Targets;
use lowrank::tuning::{FirstText, Method, MethodOptions, Starting};
use lowrank_kernels::{NumberFormat, Tensor};

use super::Case;
use super::cases::MODELS;
use super::common::{Comparison, Golden};

fn golden(name: &str) -> Golden {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens_initial");
    let folder: PathBuf = goldens.join(name);
    Golden::in_folder(&folder)
}

#[test]
fn a_part_of_the_weight_is_pefts() {
    for (model, init, targets) in [
        (
            "llama",
            InitLoraWeights::Pissa,
            ["q_proj", "v_proj"].as_slice(),
        ),
        ("llama", InitLoraWeights::Olora, &["q_proj", "v_proj"]),
        ("gpt2", InitLoraWeights::Pissa, &["c_attn"]),
    ] {
        let name = format!("{model}-{init}");
        let golden = golden(&name);
        let mut comparison = Comparison::new(name);
        let case = MODELS.iter().find(|case| case.name == model);
        let folder = case.expect("the model is listed").folder();
        let mut run = Case::new(&folder, |decoder| {
            let mut options = MethodOptions::default();
            options.lora.r = 3;
            options.lora.lora_alpha = 7.0;
            options.lora.init_lora_weights = init;
            let names = targets.iter().map(ToString::to_string).collect();
            options.targets.target_modules = Some(Targets::Names(names));
            let starting = Starting {
                decoder,
                base: "",
                seed: 1,
                text: &|_| FirstText {
                    ids: Vec::new(),
                    source: "rows",
                },
                is_resumed: false,
                unquantized: &|| Ok(None),
                ranks: lowrank::ranks::Ranks::alone(),
            };
            let started = Method::Lora.start(&options, &starting);
            started.expect("first values").adapter
        });
        let values = run.tensors(&run.adapter.params);
        comparison.below(&golden, "init.", |name| values.get(name).map(Vec::as_slice));
        run.gradients(&mut comparison, &golden, "", 0.0, 3);
        run.gradients(&mut comparison, &golden, "", 0.0, 1);
        run.train(&mut comparison, &golden, 1e-2);
        comparison.finish();
    }
}

/// With NF4, and lora_alpha twice r: what PEFT does not divide by it.
#[test]
fn what_quantizing_loses_is_pefts() {
    let golden = golden("loftq");
    let of = |name: &str| {
        let values = golden.values(name);
        Tensor::from_f32(values.shape[0], values.shape[1], values.data.clone())
    };
    let weight = of("weight");
    let quantize = |weight: &Tensor| {
        let (mut bytes, format) = (Vec::new(), NumberFormat::Nf4);
        for row in weight.to_vec().chunks_exact(weight.cols()) {
            format.quantize(row, &mut bytes)?;
        }
        Ok(Tensor::from_le_bytes(
            &bytes,
            format,
            weight.rows(),
            weight.cols(),
        )?)
    };
    let mut comparison = Comparison::new("loftq");
    let mut errors = Vec::new();
    for iterations in [1, 5] {
        let (a, b) = (
            of(&format!("{iterations}.a")),
            of(&format!("{iterations}.b")),
        );
        let made = lora::loftq(&weight, &quantize, a.rows(), 2.0, iterations);
        let made = made.expect("the weight is quantized");
        let expected = of(&format!("{iterations}.quantized"));
        comparison.values("quantized", &made.quantized.to_vec(), &expected.to_vec());
        let ours = product(&made.b, &made.a, 2.0);
        comparison.values("B·A", &ours, &product(&b, &a, 1.0));
        let root = 2.0_f32.sqrt();
        let scaled = |tensor: &Tensor| -> Vec<f32> {
            tensor.to_vec().iter().map(|value| value * root).collect()
        };
        comparison.values("A", &scaled(&made.a), &a.to_vec());
        comparison.values("B", &scaled(&made.b), &b.to_vec());
        let left = weight.to_vec().into_iter().zip(made.quantized.to_vec());
        let left = left
            .zip(ours)
            .map(|((w, q), ba)| f64::from(w - q - ba).powi(2));
        errors.push(left.sum::<f64>());
    }
    comparison.finish();
    assert!(
        errors[1] < errors[0],
        "iterations bring it nearer: {errors:?}"
    );
}

/// scale · B·A, row by row.
fn product(b: &Tensor, a: &Tensor, scale: f32) -> Vec<f32> {
    let (rows, r, cols) = (b.rows(), a.rows(), a.cols());
    let (b, a) = (b.to_vec(), a.to_vec());
    let element = |i: usize, j: usize| {
        let terms = (0..r).map(|k| b[i * r + k] * a[k * cols + j]);
        scale * terms.sum::<f32>()
    };
    (0..rows)
        .flat_map(|i| (0..cols).map(move |j| (i, j)))
        .map(|(i, j)| element(i, j))
        .collect()
}
