//! A run of several ranks comes to the bits of one, however its work is shared out. The ranks are threads of this process here.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lowrank::Error;
use lowrank::comm::{Communicator, InProcess};
use lowrank::model::{LoadIn, Recompute};
use lowrank::ranks::Ranks;
use lowrank::train::{self, BaseDtype, Event, Observer, Outcome, Start, TrainConfig, train_on};
use lowrank::tuning::Method;
use lowrank::tuning::lora::InitLoraWeights;
use lowrank::tuning::targets::Targets;

use super::common::{Place, assert_says, run, timeless};
use super::initial::builtin_folder;
use super::relative;

/// A grid of ranks.
#[derive(Clone, Copy, Debug)]
struct Grid {
    replicas: usize,
    stages: usize,
}

const GRIDS: [Grid; 6] = [
    grid(2, 1),
    grid(3, 1),
    grid(4, 1),
    grid(1, 2),
    grid(2, 2),
    grid(4, 2),
];

const fn grid(replicas: usize, stages: usize) -> Grid {
    Grid { replicas, stages }
}

/// Asks its rank to stop after a step.
struct StopAfter<'a> {
    step: Option<u64>,
    stop: &'a AtomicBool,
}

impl Observer for StopAfter<'_> {
    fn event(&mut self, event: &Event) {
        if let Event::Step(step) = event
            && Some(step.step) == self.step
        {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}

/// What each rank of a run comes to. The last rank is asked to stop after a step, if there is one, and all stop with the next; `config_of` changes the settings of a rank.
fn on(
    grid: Grid,
    start: Start,
    stop_after: Option<u64>,
    config_of: impl Fn(usize) -> TrainConfig + Sync,
) -> Vec<Result<Outcome, Error>> {
    let size = grid.replicas * grid.stages;
    let comms = InProcess::ranks(size, Duration::from_secs(60));
    std::thread::scope(|scope| {
        let config_of = &config_of;
        let threads: Vec<_> = comms
            .into_iter()
            .map(|comm| {
                scope.spawn(move || {
                    let config = config_of(comm.rank());
                    let stop = AtomicBool::new(false);
                    let is_last = comm.rank() + 1 == size;
                    let mut observer = StopAfter {
                        step: stop_after.filter(|_| is_last),
                        stop: &stop,
                    };
                    let ranks = Ranks::new(&comm, grid.stages)?;
                    train_on(ranks, &config, start, &mut observer, &stop)
                })
            })
            .collect();
        let ends = threads.into_iter().map(std::thread::ScopedJoinHandle::join);
        ends.map(|end| end.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

fn fresh(grid: Grid, config: &TrainConfig) -> Outcome {
    let start = Start::Fresh { overwrite: false };
    let mut all = on(grid, start, None, |_| config.clone());
    for (rank, end) in all.iter().enumerate() {
        assert!(
            end.is_ok(),
            "rank {rank} of {grid:?}: {:?}",
            end.as_ref().err()
        );
    }
    all.swap_remove(0).expect("rank 0")
}

/// The files of a run that do not say how long it took, with their contents.
fn files(run: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut folders = vec![run.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path
                .file_name()
                .expect("a name")
                .to_string_lossy()
                .into_owned();
            if path.is_dir() {
                folders.push(path);
            } else if !["config.yaml", "metrics.jsonl", "report.html"].contains(&name.as_str()) {
                let inner = path.strip_prefix(run).expect("within").to_path_buf();
                let mut bytes = fs::read(&path).expect("a file");
                if name == "README.md" {
                    // The card is named after the folder.
                    let text = String::from_utf8(bytes).expect("text");
                    let own = run.file_name().expect("a name").to_string_lossy();
                    bytes = text.replace(&*own, "RUN").into_bytes();
                }
                found.push((inner, bytes));
            }
        }
    }
    found.sort();
    found
}

fn assert_same(one: &Path, other: &Path, what: &str) {
    let (one_files, other_files) = (files(one), files(other));
    let names = |files: &[(PathBuf, Vec<u8>)]| -> Vec<PathBuf> {
        files.iter().map(|(name, _)| name.clone()).collect()
    };
    assert_eq!(names(&one_files), names(&other_files), "{what}");
    assert!(one_files.len() >= 6, "{:?}", names(&one_files));
    for ((name, a), (_, b)) in one_files.iter().zip(&other_files) {
        assert!(a == b, "{what}: {} differs", name.display());
    }
    assert_eq!(timeless(one), timeless(other), "{what}");
}

/// Trains with the settings of each name on one rank and on each grid, and fails unless all come to the same bits. What one rank came to.
fn assert_grids_agree(
    path: impl Fn(&str) -> PathBuf,
    grids: &[Grid],
    what: &str,
    settings: impl Fn(&str) -> TrainConfig,
) -> Outcome {
    let outcome = run(&settings("alone")).expect("the run");
    for grid in grids {
        let name = format!("grid-{}-{}", grid.replicas, grid.stages);
        let shared = fresh(*grid, &settings(&name));
        assert_same(&path("alone"), &path(&name), &format!("{what} on {grid:?}"));
        assert_eq!(shared.eval_loss, outcome.eval_loss);
        assert_eq!(shared.trainable_parameters, outcome.trainable_parameters);
    }
    outcome
}

/// The settings of a run with everything that could tell ranks apart: dropout, ragged last steps, evaluations, checkpoints, micro-batches that
/// no number of ranks divides.
fn config(place: &Place, method: Method, name: &str) -> TrainConfig {
    let mut config = place.config(method, name);
    config.batch_size = 1;
    config.gradient_accumulation_steps = 6;
    config.save_steps = Some(2);
    config.max_steps = Some(5);
    config.recompute = Some(Recompute::None);
    if method == Method::Lora {
        config.options.targets.target_modules = Some(Targets::Pattern("all-linear".to_owned()));
    }
    config
}

#[test]
fn any_grid_comes_to_the_bits_of_one_rank() {
    for method in [
        Method::Lora,
        Method::Full,
        Method::Prefix,
        Method::Adapter,
        Method::Bitfit,
        Method::Top,
        Method::Ia3,
    ] {
        let place = Place::new("llama");
        let path = |name: &str| place.path(name);
        let outcome = assert_grids_agree(path, &GRIDS, &format!("{method:?}"), |name| {
            config(&place, method, name)
        });
        assert_eq!(outcome.steps, 5);
    }
}

#[test]
fn families_with_tied_and_untied_heads_are_cut_alike() {
    for family in ["gpt2", "qwen2", "gemma2", "mistral"] {
        for method in [Method::Full, Method::Lora] {
            let place = Place::new(family);
            let (path, grids) = (|name: &str| place.path(name), [grid(1, 2), grid(3, 2)]);
            assert_grids_agree(path, &grids, &format!("{family}, {method:?}"), |name| {
                config(&place, method, name)
            });
        }
    }
}

#[test]
fn a_bf16_base_and_blocks_that_are_computed_again_are_cut_alike() {
    for recompute in [Recompute::Selective, Recompute::Full] {
        let place = Place::new("llama");
        let (path, grids) = (|name: &str| place.path(name), [grid(2, 1), grid(2, 2)]);
        assert_grids_agree(path, &grids, &format!("{recompute}"), |name| TrainConfig {
            base_dtype: BaseDtype::Bf16,
            recompute: Some(recompute),
            ..config(&place, Method::Lora, name)
        });
    }
}

/// Magnitudes, whose norms every rank computes, and groups that cut the ranges that a rank takes steps on.
#[test]
fn magnitudes_and_groups_of_rates_are_cut_alike() {
    for (family, targets) in [("llama", "all-linear"), ("gpt2", "c_attn.q,c_attn.v,c_fc")] {
        let place = Place::new(family);
        let path = |name: &str| place.path(name);
        assert_grids_agree(path, &GRIDS, family, |name| {
            let mut config = config(&place, Method::Lora, name);
            config.options.lora.lora_dropout = 0.0;
            config.options.lora.use_dora = true;
            config.options.lora.loraplus_lr_ratio = Some(4.0);
            config.options.targets.target_modules = Some(targets.parse().expect("targets"));
            config.lr_pattern = vec![("lora_A".to_owned(), 0.5)];
            config.weight_decay_pattern = vec![("lora_magnitude_vector".to_owned(), 0.0)];
            config
        });
    }
}

#[test]
fn stages_below_what_is_trained_run_no_backward() {
    let place = Place::new("llama");
    let path = |name: &str| place.path(name);
    assert_grids_agree(path, &[grid(2, 2)], "the upper block alone", |name| {
        let mut config = config(&place, Method::Lora, name);
        let upper = Targets::Pattern(r".*layers\.1\..*proj".to_owned());
        config.options.targets.target_modules = Some(upper);
        config
    });
}

#[test]
fn tokens_that_are_added_are_rows_of_both_ends() {
    let place = Place::new("llama");
    let file = place.path("tokens.txt");
    fs::write(&file, "say\n and \n").expect("the tokens");
    let (path, grids) = (|name: &str| place.path(name), [grid(2, 1), grid(2, 2)]);
    assert_grids_agree(path, &grids, "added tokens", |name| {
        let mut config = config(&place, Method::Lora, name);
        config.options.lora.add_tokens = Some(file.clone());
        config
    });
}

/// A classifier stands on the last stage, and what DeBERTa's scores know of distances is read by every block.
#[test]
fn classifiers_and_tables_that_every_block_reads_are_cut_alike() {
    for (family, methods) in [
        ("deberta", [Method::Full, Method::Lora]),
        ("bert", [Method::Full, Method::Bitfit]),
        ("modernbert", [Method::Full, Method::Lora]),
    ] {
        for method in methods {
            let place = relative::Place::new(family);
            let path = |name: &str| place.path(name);
            let grids = [grid(2, 1), grid(1, 2), grid(3, 2)];
            assert_grids_agree(path, &grids, &format!("{family}, {method:?}"), |name| {
                TrainConfig {
                    batch_size: 2,
                    gradient_accumulation_steps: 3,
                    save_steps: Some(2),
                    max_steps: Some(3),
                    recompute: Some(Recompute::None),
                    ..place.config(method, name)
                }
            });
        }
    }
}

/// Trains with the settings of each name on one rank; stops the same on four, goes on with two stages, stops and goes on with two ranks; and
/// fails unless both come to the same bits.
fn assert_goes_on(what: &str, settings: impl Fn(&str) -> TrainConfig) {
    let set = |name: &str| TrainConfig {
        max_steps: Some(7),
        ..settings(name)
    };
    let alone = set("alone");
    run(&alone).expect("the run");
    let stopped = set("stopped");
    let start = Start::Fresh { overwrite: false };
    let ends = on(grid(4, 1), start, Some(2), |_| stopped.clone());
    for end in ends {
        let end = end.expect("stopping is no failure");
        assert!(end.interrupted && end.steps == 3, "all ranks stop together");
    }
    for (next, stop_after) in [(grid(1, 2), Some(4)), (grid(2, 1), None)] {
        for end in on(next, Start::Resume, stop_after, |_| stopped.clone()) {
            assert_eq!(end.expect("it goes on").interrupted, stop_after.is_some());
        }
    }
    // The checkpoints of the stops are more than the other run has.
    for step in [3, 5] {
        let folder = stopped.output.join(format!("checkpoints/step-{step}"));
        if !alone
            .output
            .join(format!("checkpoints/step-{step}"))
            .exists()
        {
            fs::remove_dir_all(folder).expect("a checkpoint of the stop");
        }
    }
    assert_same(&alone.output, &stopped.output, what);
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    for method in [Method::Lora, Method::Full] {
        let place = Place::new("llama");
        assert_goes_on(&format!("{method:?}"), |name| config(&place, method, name));
    }
}

/// Each rank makes the first values of what it holds, and what is taken off the weights is not made again.
#[test]
fn first_values_of_the_weights_are_cut_alike_and_go_on() {
    for init in [
        InitLoraWeights::Pissa,
        InitLoraWeights::Olora,
        InitLoraWeights::Loftq,
    ] {
        let place = Place::new("llama");
        let loftq = (init == InitLoraWeights::Loftq).then(|| builtin_folder(&place));
        let settings = |name: &str| {
            let mut config = config(&place, Method::Lora, name);
            config.options.lora.init_lora_weights = init;
            if let Some(folder) = &loftq {
                config.model = folder.display().to_string();
                config.load_in = Some(LoadIn::FourBit);
                config.options.targets.target_modules = Some("q_proj".parse().expect("targets"));
            }
            config
        };
        assert_goes_on(&format!("{init}"), settings);
        let path = |name: &str| place.path(&format!("fresh-{name}"));
        let grids = [grid(2, 1), grid(2, 2)];
        assert_grids_agree(path, &grids, &format!("{init}"), |name| {
            settings(&format!("fresh-{name}"))
        });
    }
}

#[test]
fn the_best_checkpoint_reaches_all_ranks() {
    let place = Place::new("llama");
    let set = |name: &str| TrainConfig {
        load_best_model_at_end: true,
        eval_steps: Some(1),
        save_total_limit: Some(1),
        ..config(&place, Method::Full, name)
    };
    place.write_contrary_valid();
    let alone = run(&set("alone")).expect("the run");
    let shared = fresh(grid(2, 2), &set("shared"));
    assert_eq!(alone.eval_loss, shared.eval_loss);
    assert_same(&place.path("alone"), &place.path("shared"), "the best step");
}

#[test]
fn ranks_that_would_train_something_else_are_named() {
    let place = Place::new("llama");
    place.write_rows("other.jsonl", 11, 50);
    let start = Start::Fresh { overwrite: false };
    let of_rank_2 = |change: &(dyn Fn(&mut TrainConfig) + Sync)| {
        let ends = on(grid(4, 1), start, None, |rank| {
            let mut config = config(&place, Method::Lora, "run");
            config.valid_data = Some(place.path("data/valid.jsonl"));
            if rank == 2 {
                change(&mut config);
            }
            config
        });
        let mut texts = Vec::new();
        for end in ends {
            let error = end.expect_err("they do not agree");
            texts.push(error.to_string());
        }
        assert!(
            !place.path("run").join("config.yaml").exists(),
            "nothing began"
        );
        assert_says(&texts[1], &["rank 0 says why"]);
        texts.swap_remove(0)
    };
    let said = of_rank_2(&|config| config.learning_rate = 2e-2);
    assert_says(
        &said,
        &[
            "rank 2 on this process",
            "learning_rate 0.02 here, and 0.01 on rank 0",
        ],
    );
    let said = of_rank_2(&|config| config.data = place.path("data/other.jsonl"));
    assert_says(&said, &["rank 2", "training data (11 rows"]);
    let said = of_rank_2(&|config| config.data = place.path("nowhere"));
    assert_says(&said, &["rank 2", "nowhere"]);
    let said = of_rank_2(&|config| config.model = place.path("none").display().to_string());
    assert_says(&said, &["rank 2", "none"]);
    // What is wrong everywhere is said once, and of no rank.
    let ends = on(grid(2, 1), start, None, |_| {
        let mut config = config(&place, Method::Lora, "run");
        config.data = place.path("nowhere");
        config
    });
    let said = ends[0].as_ref().expect_err("no data").to_string();
    assert!(!said.contains("rank"), "{said}");
}

/// Stages hold no tensor in common, and pipelines hold the same ones.
#[test]
fn another_base_on_a_rank_is_noticed_with_stages_too() {
    let place = Place::new("llama");
    let other = TrainConfig {
        max_steps: Some(3),
        ..config(&place, Method::Full, "other")
    };
    run(&other).expect("another model");
    let start = Start::Fresh { overwrite: false };
    for (grid, odd) in [(grid(1, 2), 1), (grid(2, 2), 3), (grid(2, 1), 1)] {
        let ends = on(grid, start, None, |rank| {
            let mut config = config(&place, Method::Lora, "run");
            if rank == odd {
                config.model = place.path("other").display().to_string();
            }
            config
        });
        let texts = ends
            .iter()
            .map(|end| end.as_ref().expect_err("another base").to_string());
        let texts: Vec<String> = texts.collect();
        assert_says(&texts[0], &[&format!("rank {odd} on"), "weights"]);
        assert!(
            !place.path("run").join("config.yaml").exists(),
            "nothing began"
        );
    }
}

#[test]
fn held_out_losses_are_those_of_one_rank() {
    let place = Place::new("llama");
    place.write_rows("valid.jsonl", 300, 0);
    let base = lowrank::base::Base::load(
        &place.path("model").display().to_string(),
        lowrank::DType::F32,
    )
    .expect("the model");
    let options = lowrank::data::DataOptions::default();
    let valid = lowrank::data::Split::Valid;
    let data = lowrank::data::Dataset::load(&place.path("data"), valid, &base.tokenizer, &options)
        .expect("the rows");
    let ws = lowrank::Workspace::new();
    let none = lowrank::model::AdapterSet::none();
    let rows = &data.examples;
    let alone = lowrank::train::evaluate(&base.decoder, none, None, rows, &ws);
    let comms = InProcess::ranks(3, Duration::from_secs(60));
    let losses: Vec<_> = std::thread::scope(|scope| {
        let (base, rows) = (&base, rows);
        let threads: Vec<_> = comms
            .into_iter()
            .map(|comm| {
                scope.spawn(move || {
                    let ranks = Ranks::new(&comm, 1).expect("three ranks");
                    let ws = lowrank::Workspace::new();
                    // A rank with fewer rows is refused.
                    let fewer = &rows[..rows.len() - usize::from(comm.rank() == 1)];
                    let model = &base.decoder;
                    let refused = train::evaluate_on(&ranks, model, none, None, fewer, &ws);
                    assert!(refused.expect_err("other rows").is_misuse());
                    train::evaluate_on(&ranks, model, none, None, rows, &ws).expect("the losses")
                })
            })
            .collect();
        let ends = threads.into_iter().map(std::thread::ScopedJoinHandle::join);
        ends.map(|end| end.expect("no panic")).collect()
    });
    assert!(
        losses.iter().all(|found| *found == alone),
        "{losses:?} {alone:?}"
    );
}

#[test]
fn stages_must_fit_the_ranks_and_the_model() {
    let place = Place::new("llama");
    let start = Start::Fresh { overwrite: false };
    let ends = on(grid(3, 1), start, None, |_| {
        config(&place, Method::Lora, "run")
    });
    assert!(ends.iter().all(Result::is_ok));
    let comms = InProcess::ranks(3, Duration::from_secs(1));
    let refused = Ranks::new(&comms[0], 2).err().expect("3 ranks, 2 stages");
    assert_says(&refused.to_string(), &["2 pipeline stages", "are 3"]);
    let ends = on(grid(1, 3), start, None, |_| {
        config(&place, Method::Lora, "deep")
    });
    let said = ends[0].as_ref().expect_err("two blocks").to_string();
    assert_says(&said, &["2 blocks", "3 pipeline stages"]);
}

#[test]
fn a_loss_that_is_not_finite_ends_all_ranks() {
    let place = Place::new("llama");
    let start = Start::Fresh { overwrite: false };
    for grid in [grid(3, 1), grid(1, 2)] {
        let name = format!("run-{}", grid.stages);
        let ends = on(grid, start, None, |_| TrainConfig {
            learning_rate: 1e30,
            max_grad_norm: 0.0,
            eval_steps: None,
            ..config(&place, Method::Lora, &name)
        });
        for end in ends {
            let error = end.expect_err("it diverges");
            assert!(matches!(error, Error::Diverged(_)), "{error}");
        }
    }
}

#[test]
fn ranks_without_micro_batches_change_nothing() {
    let place = Place::new("llama");
    let path = |name: &str| place.path(name);
    assert_grids_agree(path, &[grid(4, 1)], "two micro-batches", |name| {
        let mut config = config(&place, Method::Lora, name);
        config.batch_size = 3;
        config.gradient_accumulation_steps = 2;
        config
    });
}
