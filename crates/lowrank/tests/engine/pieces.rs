//! A step comes to the same bits on any number of threads, though its micro-batches are cut into pieces that teams of them share.

use lowrank::base::Base;
use lowrank::data::Example;
use lowrank::kernels::Pauses;
use lowrank::train::{
    OptimizerState, Silent, StepOptions, TrainConfig, accumulate, optimizer_step, prepare,
};
use lowrank::tuning::Method;
use lowrank::{ComputeDType, Workspace};

use crate::compute::{base, options, rows};

fn on_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.expect("a pool").install(work)
}

/// The trained values and the losses of two steps.
fn trained(base: &Base, rows: &[&Example], options: &StepOptions) -> (Vec<u32>, Vec<f64>) {
    let config = TrainConfig::new(Method::Lora, "", "", "");
    let mut adapter = prepare(&config, &base.network(), &[], &mut Silent)
        .expect("an adapter")
        .adapter;
    let (mut state, ws) = (OptimizerState::new(&adapter), Workspace::new());
    let losses = (0..2).map(|_| {
        let done = optimizer_step(&base.decoder, &mut adapter, &mut state, rows, options, &ws);
        done.expect("a step").loss
    });
    let losses = losses.collect();
    let values = adapter.params.as_slice();
    (values.iter().map(|x| x.to_bits()).collect(), losses)
}

#[test]
fn a_step_has_the_same_bits_on_any_number_of_threads() {
    let folder = tempfile::tempdir().expect("a folder");
    let base = base();
    let all = rows(&base, folder.path());
    let rows: Vec<&Example> = all.iter().take(150).collect();
    for (compute, share_prompts) in [(ComputeDType::F32, true), (ComputeDType::Bf16, false)] {
        let options = StepOptions {
            // The last micro-batch is smaller.
            batch_size: 100,
            share_prompts,
            ..options(compute)
        };
        let config = TrainConfig::new(Method::Lora, "", "", "");
        let adapter = config.lay_out(base.decoder.config()).expect("a layout");
        let pieces = options.pieces(base.decoder.config(), &adapter, &rows);
        assert!(pieces.len() > 4, "{} pieces", pieces.len());
        assert_eq!(pieces.concat().len(), rows.len());
        let one = on_threads(1, || trained(&base, &rows, &options));
        for threads in [2, 3, 4, 9] {
            let found = on_threads(threads, || trained(&base, &rows, &options));
            assert!(found == one, "{threads} threads, {compute:?}");
        }
        let pause = || {};
        let beside = StepOptions {
            pauses: Pauses::with(&pause),
            ..options
        };
        let found = on_threads(4, || trained(&base, &rows, &beside));
        // What is scored in more chunks is added up in another order.
        let off = (found.1[0] - one.1[0]).abs();
        assert!(off < 1e-6, "{off:e} with pauses");
    }
}

#[test]
fn gradients_are_those_of_the_rows() {
    let folder = tempfile::tempdir().expect("a folder");
    let base = base();
    let all = rows(&base, folder.path());
    let rows: Vec<&Example> = all.iter().take(60).collect();
    let config = TrainConfig::new(Method::Lora, "", "", "");
    let adapter = prepare(&config, &base.network(), &[], &mut Silent)
        .expect("an adapter")
        .adapter;
    let gradient = |batch_size| {
        let options = StepOptions {
            batch_size,
            ..options(ComputeDType::F32)
        };
        let (mut state, ws) = (OptimizerState::new(&adapter), Workspace::new());
        accumulate(
            &base.decoder,
            &adapter,
            &mut state.grads,
            &rows,
            0,
            &options,
            &ws,
        )
        .expect("one adapter");
        state.grads.as_slice().to_vec()
    };
    let (whole, single) = (gradient(60), gradient(1));
    let square = |x: &f32| f64::from(*x).powi(2);
    let norm = single.iter().map(square).sum::<f64>().sqrt();
    let off: Vec<f32> = whole.iter().zip(&single).map(|(a, b)| a - b).collect();
    let off = off.iter().map(square).sum::<f64>().sqrt();
    assert!(norm > 0.0 && off < 1e-5 * norm, "{off:e} of {norm:e}");
}
