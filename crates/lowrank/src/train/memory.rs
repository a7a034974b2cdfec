//! The process's memory as the system counts it, and what a run keeps so that it fits.

use lowrank_kernels::DType;

use super::batch::batch_for;
use super::checkpoint::Computed;
use super::events::{Event, Observer};
use super::pieces::{pieces, teams};
use crate::Error;
use crate::base::{LoadingBytes, Network};
use crate::data::Example;
use crate::machine::{Bound, addresses_are_limited, available_memory, memory_room};
use crate::model::{Adapter, ModelConfig, Recompute, Saving, Stage};
use crate::names::{named, valued};
use crate::plan::{Memory, RankPart, Work, rank_memory, training_memory};
use crate::ranks::Ranks;
use crate::settings::TrainConfig;
use crate::units;

/// The largest resident memory of this process so far, in bytes; 0 where the system doesn't tell.
pub fn peak_rss() -> u64 {
    status_field("VmHWM:")
}

/// Addresses that an allocator reserves for each thread that converts weights.
const ARENA: u64 = 64 * 1024 * 1024;

fn status_field(name: &str) -> u64 {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else {
        return 0;
    };
    let kib = status.lines().find_map(|line| {
        line.strip_prefix(name)?
            .trim()
            .strip_suffix(" kB")?
            .trim()
            .parse::<u64>()
            .ok()
    });
    kib.unwrap_or(0) * 1024
}

/// The tokens of the largest micro-batch that these rows can make, the work of its largest piece, and how many pieces it has.
fn largest_batch(
    model: &ModelConfig,
    adapter: &Adapter,
    examples: &[Example],
    batch_size: usize,
) -> (usize, Work, usize) {
    let mut rows: Vec<&Example> = examples.iter().collect();
    rows.sort_unstable_by_key(|row| std::cmp::Reverse(row.ids.len()));
    rows.truncate(batch_size);
    let pieces = pieces(model, adapter, &rows, false);
    let works = pieces.iter().map(|rows| {
        let batch = batch_for(model, rows.iter().copied(), adapter.virtual_tokens());
        Work::of(&batch, &model.windows())
    });
    let works: Vec<Work> = works.collect();
    let tokens = works.iter().map(|work| work.tokens).sum();
    let largest = works.iter().copied().max_by_key(|work| work.tokens);
    (tokens, largest.unwrap_or_default(), pieces.len())
}

/// What the blocks keep of a run beside other work on a base that is in memory: what the settings ask for, or as much as the free memory
/// allows. `adapter` may be without values ([`TrainConfig::lay_out`]).
///
/// # Errors
/// Settings' `memory_budget`, or the free memory, if the run does not fit in.
pub fn saving_beside(
    config: &TrainConfig,
    base: &Network,
    adapter: &Adapter,
    examples: &[Example],
) -> Result<Saving, Error> {
    let model = base.decoder.config();
    let (tokens, work, pieces) = largest_batch(model, adapter, examples, config.batch_size);
    let pieces = pieces * config.gradient_accumulation_steps;
    let compute = config.compute_format().into();
    let needs = |recompute| {
        let saving = Saving {
            recompute,
            dtype: config.base_dtype.into(),
        };
        let base_dtype = config.base_dtype.into();
        // Beside other work, threads are not parted.
        let memory = training_memory(
            model, adapter, base_dtype, 0, work, pieces, 1, saving, compute,
        );
        (saving, memory)
    };
    let all = [Recompute::None, Recompute::Selective, Recompute::Full].map(needs);
    // The weights are there, whatever else is done with them.
    let room = |memory: &Memory| {
        let free = available_memory().map(|free| free.saturating_add(memory.weights));
        config.memory_budget.or(free)
    };
    let (saving, memory) = choose(&all, config.recompute, room(&all[0].1));
    match room(&memory) {
        Some(room) if memory.total() > room => Err(Error::Settings(format!(
            "training takes about {} for rows of up to {} tokens a batch, the base among them, and there are {}; lower batch_size or \
             max_seq_length, or train fewer values",
            units::bytes(memory.total()),
            tokens,
            units::bytes(room)
        ))),
        _ => Ok(saving),
    }
}

/// What the blocks keep: what the settings ask for; else what an earlier part of the run `kept`, since another choice rounds
/// otherwise; else as much as the memory allows, which is the fastest. And how many teams of threads there is memory for then; fewer change
/// nothing of the result, so that they come before computing again.
///
/// # Errors
/// A memory budget, or a machine without `force`, that it does not fit in.
pub(super) fn choose_saving(
    ranks: &Ranks<'_>,
    config: &TrainConfig,
    base: &Network,
    adapter: &Adapter,
    examples: &[Example],
    kept: Option<Recompute>,
    observer: &mut dyn Observer,
) -> Result<(Saving, usize), Error> {
    let base_dtype = config.base_dtype.into();
    let model = base.decoder.config();
    let (tokens, work, pieces) = largest_batch(model, adapter, examples, config.batch_size);
    let converted = base.decoder.weights().converted_bytes();
    let pieces = pieces_of_rank(ranks, config, pieces);
    let compute = config.compute_format().into();
    let part = RankPart {
        stage: base.decoder.weights().stage(),
        trained: adapter.params.len(),
        replicas: ranks.replicas(),
        stages_left: ranks.stages() - ranks.stage(),
        teams: if ranks.stages() == 1 {
            teams(model, adapter, pieces)
        } else {
            1
        },
    };
    let mapped = part.stage.weight_bytes(model, base_dtype);
    let mapped = mapped.saturating_sub(converted);
    let available = memory_room(mapped, 0);
    let budget = config.memory_budget.or(available.map(|(room, _)| room));
    let with_teams = |saving, teams| {
        let part = RankPart { teams, ..part };
        rank_memory(
            model, adapter, part, base_dtype, converted, work, pieces, saving, compute,
        )
    };
    // As many teams as there is memory for, and one where it is too little even so.
    let teams_of = |saving| {
        let fits = |teams: &usize| {
            budget.is_none_or(|budget| with_teams(saving, *teams).total() <= budget)
        };
        (2..=part.teams).rev().find(fits).unwrap_or(1)
    };
    let needs = |recompute| {
        let saving = Saving {
            recompute,
            dtype: config.base_dtype.into(),
        };
        (saving, with_teams(saving, teams_of(saving)))
    };
    let all = [Recompute::None, Recompute::Selective, Recompute::Full].map(needs);
    let (saving, memory) = choose(&all, config.recompute.or(kept), budget);
    let rows = format!(
        "rows of up to {tokens} tokens a batch (recompute {})",
        saving.recompute
    );
    let mut mends = Vec::new();
    let is_least = saving.recompute == Recompute::Full;
    let rounds = saving.dtype != DType::F32;
    match kept {
        None if is_least => {}
        None => mends.push(format!(
            "set {recompute}",
            recompute = valued("recompute", "full")
        )),
        Some(_) if is_least => mends.push("resume with more memory".to_owned()),
        Some(_) => {
            mends.push("resume with more memory".to_owned());
            mends.push(if rounds {
                format!(
                    "set {recompute}, which may change the last bits of the result",
                    recompute = valued("recompute", "full")
                )
            } else {
                format!("set {recompute}", recompute = valued("recompute", "full"))
            });
        }
    }
    if kept.is_none() {
        mends.push(format!(
            "lower {batch_size} (and raise {gradient_accumulation_steps}) or {max_seq_length}",
            batch_size = named("batch_size"),
            gradient_accumulation_steps = named("gradient_accumulation_steps"),
            max_seq_length = named("max_seq_length")
        ));
    } else if let Some(now) = config.recompute
        && kept != Some(now)
        && rounds
    {
        observer.event(&Event::Note(format!(
            "warning: recompute was {} until now and is {now} from here on; the result may differ in its last bits from that of a run that kept it",
            kept.unwrap_or_default()
        )));
    }
    refuse(config, memory, available, &rows, &mends)?;
    observer.event(&Event::Note(format!(
        "plan: {} trained of {} parameters, peak memory about {} of {} (weights {} in {}, trained {}, activations {} in {}, recompute {}), factors read as {}",
        units::grouped(adapter.parameters() as u64),
        units::grouped(model.parameters() as u64),
        units::bytes(memory.total()),
        budget.map_or("an unknown amount".to_owned(), units::bytes),
        units::bytes(memory.weights),
        model.kept_in(base_dtype),
        units::bytes(memory.trained + memory.gradients + memory.optimizer),
        units::bytes(memory.activations),
        saving.dtype,
        saving.recompute,
        Computed::here(config),
    )));
    Ok((saving, teams_of(saving)))
}

/// Pieces of a step that a rank computes at most.
fn pieces_of_rank(ranks: &Ranks<'_>, config: &TrainConfig, of_batch: usize) -> usize {
    let all = config.gradient_accumulation_steps * of_batch;
    all.div_ceil(ranks.replicas())
}

/// The saving of the rank that keeps the least, which all ranks then have: another one rounds otherwise.
pub(super) fn most_frugal(ranks: &Ranks<'_>, own: Saving) -> Result<Saving, Error> {
    let all = [Recompute::None, Recompute::Selective, Recompute::Full];
    let place = all.iter().position(|known| *known == own.recompute);
    let told = ranks.gather(&[place.unwrap_or(0) as u64], |_| 1)?;
    let most = told.concat().into_iter().max().unwrap_or(0);
    Ok(Saving {
        recompute: all[most as usize],
        ..own
    })
}

/// Refuses a run whose weights and trained values alone are more than there is, before any of them is loaded.
///
/// Files that are not held as they are stay mapped beside what is made of them, which only a limit on addresses counts.
///
/// # Errors
/// Too little memory, without `force`.
pub(super) fn check_room(
    ranks: &Ranks<'_>,
    config: &TrainConfig,
    model: &ModelConfig,
    loading: LoadingBytes,
) -> Result<(), Error> {
    let adapter = config.lay_out(model)?;
    let saving = Saving {
        recompute: Recompute::Full,
        dtype: config.base_dtype.into(),
    };
    let base_dtype = config.base_dtype.into();
    let pieces = pieces_of_rank(ranks, config, 1);
    let part = RankPart {
        stage: &Stage::whole(model),
        trained: adapter.parameters(),
        replicas: ranks.replicas(),
        stages_left: 1,
        teams: 1,
    };
    let least = rank_memory(
        model,
        &adapter,
        part,
        base_dtype,
        0,
        Work::default(),
        pieces,
        saving,
        config.compute_format().into(),
    );
    let mut mends = Vec::new();
    if saving.dtype == DType::F32 && !config.method.writes_model() {
        mends.push(format!(
            "set {base_dtype}",
            base_dtype = valued("base_dtype", "bf16")
        ));
    }
    if config.method.writes_model() {
        mends.push(format!(
            "train with {method}",
            method = valued("method", "lora")
        ));
    } else {
        mends.push("train fewer values or a smaller model".to_owned());
    }
    let is_converted = loading.converted > 0;
    let (mapped, to_map) = if loading.is_mapped {
        (loading.mapped, 0)
    } else {
        (0, loading.mapped)
    };
    let (beside, mapped, to_map) = match (is_converted, addresses_are_limited()) {
        (true, true) => (to_map + ARENA * rayon::current_num_threads() as u64, 0, 0),
        (true, false) => (0, 0, 0),
        (false, _) => (0, mapped, to_map),
    };
    let available =
        memory_room(mapped, to_map).map(|(room, bound)| (room.saturating_sub(beside), bound));
    refuse(
        config,
        least,
        available,
        "the weights and what is trained alone",
        &mends,
    )
}

/// An error where `memory` is more than the run may take, or than the machine has.
fn refuse(
    config: &TrainConfig,
    memory: Memory,
    available: Option<(u64, Bound)>,
    what: &str,
    mends: &[String],
) -> Result<(), Error> {
    let needed = format!("about {} for {what}", units::bytes(memory.total()));
    let mend = mends.join(", or ");
    if let Some(budget) = config.memory_budget {
        if memory.total() <= budget {
            return Ok(());
        }
        return Err(Error::Settings(format!(
            "memory_budget is {}, and the run takes {needed}; {mend}",
            units::bytes(budget)
        )));
    }
    match available {
        Some((available, bound)) if memory.total() > available && !config.force => {
            Err(Error::Settings(format!(
                "the run takes {needed}, and {} has {} free; {mend}, or say with {memory_budget} what it may take, or run it all the same with {force}",
                bound.whose(),
                units::bytes(available),
                memory_budget = named("memory_budget"),
                force = named("force")
            )))
        }
        _ => Ok(()),
    }
}

/// What is asked for; else the first that fits, where they come in the order of their speed; else the last.
fn choose(
    all: &[(Saving, Memory); 3],
    asked: Option<Recompute>,
    budget: Option<u64>,
) -> (Saving, Memory) {
    let fits = |memory: &Memory| budget.is_none_or(|budget| memory.total() <= budget);
    let chosen = match asked {
        Some(asked) => all.iter().find(|(saving, _)| saving.recompute == asked),
        None => all.iter().find(|(_, memory)| fits(memory)),
    };
    *chosen.unwrap_or(&all[2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_that_fits_is_chosen() {
        let all = [
            (Recompute::None, 300),
            (Recompute::Selective, 200),
            (Recompute::Full, 100),
        ]
        .map(|(recompute, activations)| {
            let saving = Saving {
                recompute,
                ..Saving::default()
            };
            let memory = Memory {
                weights: 1000,
                activations,
                ..Memory::default()
            };
            (saving, memory)
        });
        let chosen = |asked, budget| choose(&all, asked, budget).0.recompute;
        assert_eq!(chosen(None, None), Recompute::None);
        assert_eq!(chosen(None, Some(1300)), Recompute::None);
        assert_eq!(chosen(None, Some(1299)), Recompute::Selective);
        assert_eq!(chosen(None, Some(1199)), Recompute::Full);
        assert_eq!(chosen(None, Some(1)), Recompute::Full);
        assert_eq!(chosen(Some(Recompute::None), Some(1)), Recompute::None);
        assert_eq!(chosen(Some(Recompute::Full), None), Recompute::Full);
    }
}
