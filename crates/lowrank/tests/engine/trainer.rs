//! A training that somebody else drives, a step at a time.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use lowrank::base::{Network, Source};
use lowrank::data::{DataOptions, Dataset, Split};
use lowrank::kernels::Pauses;
use lowrank::train::{Event, Observer, Rows, Silent, TrainConfig, Trained, Trainer, prepare};
use lowrank::tuning::Method;

use super::common::{Place, failure, run, tensors};

/// The base and the rows of a place.
struct Loaded {
    network: Network,
    train: Dataset,
    valid: Dataset,
}

impl Loaded {
    fn of(place: &Place, config: &TrainConfig) -> Self {
        let source = Source::find(&config.model).expect("the model");
        let base = source.load(config.base_dtype.into()).expect("the base");
        let rows = |split| {
            let options = DataOptions::default();
            Dataset::load(&place.path("data"), split, &base.tokenizer, &options).expect("rows")
        };
        let (train, valid) = (rows(Split::Train), rows(Split::Valid));
        Self {
            network: base.into_network(),
            train,
            valid,
        }
    }

    fn rows(&self) -> Rows<'_> {
        Rows {
            train: &self.train.examples,
            valid: &self.valid.examples,
        }
    }

    fn trained(&self, config: &TrainConfig) -> Trained {
        prepare(config, &self.network, &self.train.examples, &mut Silent).expect("an adapter")
    }
}

/// Counts what a training tells.
#[derive(Default)]
struct Count {
    steps: usize,
    evaluations: usize,
    checkpoints: usize,
}

impl Observer for Count {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Step(_) => self.steps += 1,
            Event::Eval(_) => self.evaluations += 1,
            Event::Checkpoint(_) => self.checkpoints += 1,
            _ => {}
        }
    }
}

#[test]
fn steps_taken_one_by_one_are_those_of_a_run() {
    let place = Place::new("llama");
    let whole = place.config(Method::Lora, "whole");
    run(&whole).expect("the run");
    let config = place.config(Method::Lora, "driven");
    let loaded = Loaded::of(&place, &config);
    let stop = AtomicBool::new(false);

    // Five of nine steps by hand, with a checkpoint that no setting asked for.
    let mut count = Count::default();
    let trained = loaded.trained(&config);
    let mut trainer = Trainer::new(
        &config,
        &loaded.network,
        trained,
        loaded.rows(),
        false,
        &mut count,
    )
    .expect("a trainer");
    assert_eq!((trainer.steps(), trainer.total_steps()), (0, 9));
    for step in 1..=5 {
        assert!(trainer.advance(&stop).expect("a step"));
        assert_eq!(trainer.steps(), step);
    }
    trainer.checkpoint().expect("a checkpoint");
    drop(trainer);
    // Before the first step, and after the second and the fourth.
    assert_eq!(
        (count.steps, count.evaluations, count.checkpoints),
        (5, 3, 1)
    );

    let trained = loaded.trained(&config);
    let mut silent = Silent;
    let trainer = Trainer::resume(
        &config,
        &loaded.network,
        trained,
        loaded.rows(),
        &mut silent,
    )
    .expect("a trainer");
    assert_eq!(trainer.steps(), 5);
    let outcome = trainer.run(&stop).expect("the rest");
    assert_eq!((outcome.steps, outcome.interrupted), (9, false));
    let file = "adapter_model.safetensors";
    assert_eq!(
        tensors(&config.output.join(file)),
        tensors(&whole.output.join(file))
    );
    assert!(config.output.join("report.html").is_file());
}

#[test]
fn pauses_come_often_and_change_nothing() {
    let place = Place::new("llama");
    let whole = place.config(Method::Lora, "whole");
    run(&whole).expect("the run");
    let config = place.config(Method::Lora, "paused");
    let loaded = Loaded::of(&place, &config);
    let mut silent = Silent;
    let trained = loaded.trained(&config);
    let count = AtomicUsize::new(0);
    let work = || {
        count.fetch_add(1, Ordering::SeqCst);
    };
    let trainer = Trainer::new(
        &config,
        &loaded.network,
        trained,
        loaded.rows(),
        false,
        &mut silent,
    );
    let stop = AtomicBool::new(false);
    let mut trainer = trainer.expect("a trainer").with_pauses(Pauses::with(&work));
    trainer.step().expect("a step");
    let layers = loaded.network.decoder.config().num_hidden_layers;
    let batches = config.gradient_accumulation_steps;
    // Around the halves of every block, forward and backward; the head; before the norm of the gradient and the optimizer.
    let least = batches * (4 * layers + 3) + 2;
    assert!(count.load(Ordering::SeqCst) >= least, "{count:?} {least}");
    let before = count.load(Ordering::SeqCst);
    trainer.evaluate().expect("an evaluation");
    assert!(count.load(Ordering::SeqCst) > before + 2 * layers);
    drop(trainer);

    let config = place.config(Method::Lora, "again");
    let trained = loaded.trained(&config);
    let mut silent = Silent;
    Trainer::new(
        &config,
        &loaded.network,
        trained,
        loaded.rows(),
        false,
        &mut silent,
    )
    .expect("a trainer")
    .with_pauses(Pauses::with(&work))
    .run(&stop)
    .expect("a run");
    let file = "adapter_model.safetensors";
    assert_eq!(
        tensors(&config.output.join(file)),
        tensors(&whole.output.join(file))
    );
}

#[test]
fn a_trainer_refuses_what_a_run_refuses() {
    let place = Place::new("llama");
    let config = place.config(Method::Lora, "run");
    let loaded = Loaded::of(&place, &config);
    let refused = |config: &TrainConfig, rows: Rows<'_>| {
        let trained = loaded.trained(&place.config(Method::Lora, "run"));
        let mut silent = Silent;
        let made = Trainer::new(config, &loaded.network, trained, rows, false, &mut silent);
        failure(made.map(|_| ()))
    };
    let wrong = TrainConfig {
        batch_size: 0,
        ..config.clone()
    };
    assert!(refused(&wrong, loaded.rows()).contains("batch_size must be 1 or greater, not 0"));
    let none = Rows {
        train: &[],
        valid: &[],
    };
    assert!(refused(&config, none).contains("no row to train on"));
    let unmeasured = Rows {
        valid: &[],
        ..loaded.rows()
    };
    assert!(refused(&config, unmeasured).contains("eval_steps needs held-out rows"));
    assert!(!config.output.exists(), "nothing was written");
    fs::create_dir(&config.output).expect("a folder");
    fs::write(config.output.join("notes.txt"), "mine").expect("a file");
    assert!(refused(&config, loaded.rows()).contains("holds files and no run"));
}
