//! Beam search: as transformers finds them, as a search without a cache does, and no run of tokens comes twice.

use std::collections::HashSet;

use lowrank::Workspace;
use lowrank::generate::{
    BeamOptions, Continuation, Finish, GenerateOptions, Penalties, PromptIds, Sampling,
    beam_search, generate,
};
use lowrank::model::{Adapter, AdapterSet, Decoder};
use serde::Deserialize;

use super::common::{FAMILIES, adapter, all_linear, decoder, ids, logits_after};
use super::virtual_tokens::{ALL, random};

const OPTIONS: BeamOptions = BeamOptions {
    num_beams: 4,
    length_penalty: 0.9,
    max_new_tokens: 12,
    no_repeat_ngram_size: 0,
    stop_ids: Vec::new(),
};

fn search(model: &Decoder, prompts: &[Vec<u32>], options: &BeamOptions) -> Vec<Continuation> {
    let prompts: Vec<PromptIds> = prompts
        .iter()
        .map(|ids| PromptIds {
            ids: ids.clone(),
            adapter: None,
        })
        .collect();
    let set = AdapterSet::none();
    beam_search(model, set, &prompts, options, &Workspace::new())
}

#[derive(Deserialize)]
struct Case {
    model: String,
    num_beams: usize,
    length_penalty: f32,
    no_repeat_ngram_size: usize,
    max_new_tokens: usize,
    stop_ids: Vec<u32>,
    prompts: Vec<Vec<u32>>,
    made: Vec<Vec<u32>>,
}

#[test]
fn beams_are_those_of_transformers() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("../goldens/beams.json"))
        .expect("what scripts/goldens_beams.py wrote");
    let mut lengths = HashSet::new();
    for case in cases {
        let options = BeamOptions {
            num_beams: case.num_beams,
            length_penalty: case.length_penalty,
            max_new_tokens: case.max_new_tokens,
            no_repeat_ngram_size: case.no_repeat_ngram_size,
            stop_ids: case.stop_ids,
        };
        let found = search(&decoder(&case.model), &case.prompts, &options);
        for (found, made) in found.iter().zip(&case.made) {
            assert_eq!(found.ids, *made, "{} {options:?}", case.model);
            lengths.insert(made.len());
        }
    }
    assert!(lengths.len() > 4, "the cases end in different places");
}

/// The same search, every beam computed from its beginning in every step.
fn from_scratch(
    model: &Decoder,
    adapter: Option<&Adapter>,
    prompt: &[u32],
    options: &BeamOptions,
) -> Vec<u32> {
    let mut beams = vec![(0.0_f64, Vec::new())];
    let mut finished: Vec<(f64, Vec<u32>)> = Vec::new();
    for length in 1..=options.max_new_tokens {
        let worth = |score: f64| score / (length as f64).powf(options.length_penalty.into());
        let mut all = Vec::new();
        for (score, made) in &beams {
            let last = logits_after(model, adapter, prompt, made);
            let sum: f64 = last.iter().map(|x| f64::from(*x).exp()).sum();
            for (token, x) in last.iter().enumerate() {
                let next: Vec<u32> = [made.as_slice(), &[token as u32]].concat();
                let whole: Vec<u32> = prompt.iter().chain(&next).copied().collect();
                let n = options.no_repeat_ngram_size;
                let repeats = n > 0
                    && whole.len() > n
                    && whole[..whole.len() - 1]
                        .windows(n)
                        .any(|run| whole.ends_with(run));
                if !repeats {
                    all.push((score + f64::from(*x) - sum.ln(), next));
                }
            }
        }
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        let is_last = length == options.max_new_tokens;
        let ends = |made: &[u32]| is_last || options.stop_ids.contains(&made[made.len() - 1]);
        let best = all.iter().take(options.num_beams);
        finished.extend(
            best.filter(|(_, made)| ends(made))
                .map(|(score, made)| (worth(*score), made.clone())),
        );
        finished.sort_by(|a, b| b.0.total_cmp(&a.0));
        finished.truncate(options.num_beams);
        let going = all.into_iter().filter(|(_, made)| !ends(made));
        beams = going.take(options.num_beams).collect();
        let Some((best, _)) = beams.first() else {
            break;
        };
        if finished.len() == options.num_beams && worth(*best) <= finished[finished.len() - 1].0 {
            break;
        }
    }
    let (_, mut best) = finished.swap_remove(0);
    if best
        .last()
        .is_some_and(|token| options.stop_ids.contains(token))
    {
        best.pop();
    }
    best
}

/// Two settings of which one lets texts end often.
fn two_options() -> [BeamOptions; 2] {
    [
        BeamOptions {
            no_repeat_ngram_size: 2,
            stop_ids: (0..97).step_by(6).collect(),
            ..OPTIONS
        },
        BeamOptions {
            num_beams: 3,
            length_penalty: 1.5,
            stop_ids: vec![40, 41],
            ..OPTIONS
        },
    ]
}

/// Prompts of several lengths that use these adapters of a set, searched together and each from scratch.
fn compare(family: &str, model: &Decoder, set: &[&Adapter], used: &[Option<usize>]) {
    let prompts: Vec<PromptIds> = (used.iter().zip([1, 9, 20, 6, 3].iter().cycle()).enumerate())
        .map(|(n, (&adapter, &length))| PromptIds {
            ids: ids(length, n as u32),
            adapter,
        })
        .collect();
    for options in two_options() {
        let ws = Workspace::new();
        let together = beam_search(model, AdapterSet::new(set), &prompts, &options, &ws);
        for (prompt, found) in prompts.iter().zip(&together) {
            let used = prompt.adapter.map(|index| set[index]);
            let expected = from_scratch(model, used, &prompt.ids, &options);
            assert_eq!(
                found.ids, expected,
                "{family}, {:?} {:?}",
                prompt.adapter, prompt.ids
            );
            let full = found.ids.len() == options.max_new_tokens;
            assert_eq!(found.finish == Finish::Length, full, "{family}");
        }
    }
}

#[test]
fn the_cache_changes_nothing() {
    for family in FAMILIES {
        let model = decoder(family);
        let (a, b) = (
            adapter(&model, &all_linear(), 1),
            adapter(&model, &all_linear(), 2),
        );
        compare(family, &model, &[&a, &b], &[None, Some(0), Some(1), None]);
    }
}

#[test]
fn beams_share_the_virtual_tokens_of_their_adapter() {
    for family in ["llama", "gpt2"] {
        let model = decoder(family);
        let mut all: Vec<Adapter> = ALL.iter().map(|o| random(&model, *o, 5)).collect();
        // A second of the same kind, and one that has none.
        all.push(random(&model, ALL[2], 6));
        all.push(adapter(&model, &all_linear(), 1));
        let set: Vec<&Adapter> = all.iter().collect();
        let each = (0..all.len()).map(Some);
        let used: Vec<Option<usize>> = each.clone().chain([None]).chain(each).collect();
        compare(family, &model, &set, &used);
        for index in 0..set.len() {
            compare(family, &model, &set, &[Some(index)]);
        }
    }
}

#[test]
fn one_beam_is_greedy() {
    let model = decoder("llama");
    let all: Vec<Adapter> = ALL.iter().map(|o| random(&model, *o, 5)).collect();
    let set: Vec<&Adapter> = all.iter().collect();
    let inputs: Vec<PromptIds> = [
        (5, None),
        (17, None),
        (4, Some(0)),
        (9, Some(1)),
        (7, Some(2)),
    ]
    .into_iter()
    .chain([(1, Some(3)), (6, Some(2))])
    .map(|(length, adapter)| PromptIds {
        ids: ids(length, length as u32),
        adapter,
    })
    .collect();
    for no_repeat_ngram_size in [0, 2] {
        let options = BeamOptions {
            num_beams: 1,
            no_repeat_ngram_size,
            ..OPTIONS
        };
        let greedy = GenerateOptions {
            max_new_tokens: 12,
            sampling: Sampling::default(),
            no_repeat_ngram_size,
            penalties: Penalties::NONE,
            logit_bias: Vec::new(),
            stop_ids: Vec::new(),
        };
        let (adapters, ws) = (AdapterSet::new(&set), Workspace::new());
        let made = generate(&model, adapters, &inputs, &greedy, &ws, |_, _| true);
        let found = beam_search(&model, adapters, &inputs, &options, &ws);
        assert_eq!(found, made);
        for (prompt, made) in inputs.iter().zip(&made) {
            let all = [prompt.ids.as_slice(), &made.ids].concat();
            let runs: HashSet<&[u32]> = all.windows(2).collect();
            let repeats = runs.len() < all.len() - 1;
            assert!(no_repeat_ngram_size == 0 || !repeats, "{all:?}");
        }
    }
}

#[test]
fn draws_do_not_repeat_either() {
    let model = decoder("llama");
    let options = GenerateOptions {
        max_new_tokens: 24,
        sampling: Sampling {
            temperature: 0.5,
            top_k: 3,
            ..Sampling::default()
        },
        no_repeat_ngram_size: 1,
        penalties: Penalties::NONE,
        logit_bias: Vec::new(),
        stop_ids: Vec::new(),
    };
    let prompt = PromptIds {
        ids: vec![5, 6],
        adapter: None,
    };
    let (set, ws) = (AdapterSet::none(), Workspace::new());
    let mut made = generate(&model, set, &[prompt], &options, &ws, |_, _| true);
    let all: HashSet<u32> = made.remove(0).ids.into_iter().chain([5, 6]).collect();
    assert_eq!(all.len(), 26);
}

#[test]
fn beams_end_where_the_context_does() {
    let model = decoder("gpt2");
    let options = BeamOptions {
        max_new_tokens: usize::MAX,
        ..OPTIONS
    };
    let prompts = [38, 40, 41].map(|length| ids(length, 0));
    let found = search(&model, &prompts, &options);
    for (found, made) in found.iter().zip([3, 1, 0]) {
        assert_eq!((found.ids.len(), found.finish), (made, Finish::ContextFull));
    }
    let three = BeamOptions {
        max_new_tokens: 3,
        ..OPTIONS
    };
    let scratch = from_scratch(&model, None, &prompts[0], &three);
    assert_eq!(found[0].ids, scratch);
    assert_eq!(
        search(&model, &prompts[..1], &three)[0].finish,
        Finish::Length
    );
    let none = BeamOptions {
        max_new_tokens: 0,
        ..OPTIONS
    };
    for nothing in [
        search(&model, &[ids(5, 0)], &none),
        search(&model, &[Vec::new()], &OPTIONS),
    ] {
        assert_eq!(
            (nothing[0].ids.len(), nothing[0].finish),
            (0, Finish::Length)
        );
    }
}

#[test]
fn virtual_tokens_take_room_of_the_beams() {
    let model = decoder("gpt2");
    let options = BeamOptions {
        max_new_tokens: 10,
        ..OPTIONS
    };
    for kind in ALL {
        let made = random(&model, kind, 5);
        let (set, ws) = ([&made], Workspace::new());
        let taken = made.virtual_tokens().total();
        let prompts = [38, 40, 41].map(|end| PromptIds {
            ids: ids(end - taken, 0),
            adapter: Some(0),
        });
        let found = beam_search(&model, AdapterSet::new(&set), &prompts, &options, &ws);
        for (found, made) in found.iter().zip([3, 1, 0]) {
            assert_eq!((found.ids.len(), found.finish), (made, Finish::ContextFull));
        }
        let three = BeamOptions {
            max_new_tokens: 3,
            ..OPTIONS
        };
        let scratch = from_scratch(&model, Some(&made), &prompts[0].ids, &three);
        assert_eq!(found[0].ids, scratch, "{kind:?}");
    }
}
