//! Continuations: the cache changes nothing, prompts of a batch don't meet, and every end has its reason.

use lowrank::Workspace;
use lowrank::generate::{
    Continuation, Finish, GenerateOptions, Penalties, PromptIds, Sampling, generate,
};
use lowrank::model::{Adapter, AdapterSet, Decoder};

use super::common::{FAMILIES, adapter, all_linear, decoder, ids, logits};

const GREEDY: GenerateOptions = GenerateOptions {
    max_new_tokens: 10,
    sampling: Sampling {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 42,
    },
    no_repeat_ngram_size: 0,
    penalties: Penalties::NONE,
    logit_bias: Vec::new(),
    stop_ids: Vec::new(),
};

fn continue_all(
    model: &Decoder,
    adapters: &[&Adapter],
    prompts: &[PromptIds],
    options: &GenerateOptions,
) -> Vec<Continuation> {
    let set = AdapterSet::new(adapters);
    generate(model, set, prompts, options, &Workspace::new(), |_, _| true)
}

fn one(model: &Decoder, ids: Vec<u32>, options: &GenerateOptions) -> Continuation {
    let prompt = PromptIds { ids, adapter: None };
    continue_all(model, &[], &[prompt], options).remove(0)
}

/// Greedy decoding with the whole sequence computed again for every token.
fn from_scratch(
    model: &Decoder,
    adapter: Option<&Adapter>,
    prompt: &[u32],
    count: usize,
) -> Vec<u32> {
    let vocab = model.config().vocab_size;
    let mut ids = prompt.to_vec();
    for _ in 0..count {
        let all = logits(model, adapter, &ids);
        let last = &all[all.len() - vocab..];
        let best = (0..vocab).fold(0, |best, id| if last[id] > last[best] { id } else { best });
        ids.push(best as u32);
    }
    ids.split_off(prompt.len())
}

#[test]
fn the_cache_changes_nothing() {
    for family in FAMILIES {
        let model = decoder(family);
        let (a, b) = (
            adapter(&model, &all_linear(), 1),
            adapter(&model, &all_linear(), 2),
        );
        let set = [&a, &b];
        let prompts: Vec<PromptIds> = [
            (1, None),
            (9, Some(0)),
            (28, Some(1)),
            (4, None),
            (17, Some(0)),
        ]
        .iter()
        .enumerate()
        .map(|(n, &(length, adapter))| PromptIds {
            ids: ids(length, n as u32),
            adapter,
        })
        .collect();
        let together = continue_all(&model, &set, &prompts, &GREEDY);
        for (prompt, made) in prompts.iter().zip(&together) {
            let used = prompt.adapter.map(|index| set[index]);
            let expected = from_scratch(&model, used, &prompt.ids, 10);
            assert_eq!(made.ids, expected, "{family}, {} tokens", prompt.ids.len());
            assert_eq!(made.finish, Finish::Length);
            let alone = continue_all(&model, &set, std::slice::from_ref(prompt), &GREEDY);
            assert_eq!(alone[0], *made, "{family}");
        }
    }
}

#[test]
fn a_stop_token_ends_its_sequence_alone() {
    let model = decoder("llama");
    let prompts: Vec<PromptIds> = (0..3)
        .map(|n| PromptIds {
            ids: ids(6 + n, n as u32),
            adapter: None,
        })
        .collect();
    let free = continue_all(&model, &[], &prompts, &GREEDY);
    let stop = free[0].ids[2];
    let options = GenerateOptions {
        stop_ids: vec![96, stop],
        ..GREEDY
    };
    let stopped = continue_all(&model, &[], &prompts, &options);
    for (free, stopped) in free.iter().zip(&stopped) {
        match free.ids.iter().position(|id| options.stop_ids.contains(id)) {
            Some(at) => {
                assert_eq!(stopped.ids, free.ids[..at]);
                assert_eq!(stopped.finish, Finish::Stop);
            }
            None => assert_eq!(stopped, free),
        }
    }
    assert!(stopped[0].ids.len() <= 2);
}

#[test]
fn the_context_has_an_end() {
    let model = decoder("gpt2");
    let options = GenerateOptions {
        max_new_tokens: usize::MAX,
        ..GREEDY
    };
    // Each token but the last is read in its place: 40 places.
    for (length, made) in [(38, 3), (40, 1), (41, 0)] {
        let done = one(&model, ids(length, 0), &options);
        assert_eq!(
            (done.ids.len(), done.finish),
            (made, Finish::ContextFull),
            "{length}"
        );
    }
    assert_eq!(
        one(&model, ids(38, 0), &options).ids,
        from_scratch(&model, None, &ids(38, 0), 3)
    );
    // Exactly as many as fit, and none.
    let exact = GenerateOptions {
        max_new_tokens: 3,
        ..GREEDY
    };
    assert_eq!(one(&model, ids(38, 0), &exact).finish, Finish::Length);
    let none = GenerateOptions {
        max_new_tokens: 0,
        ..GREEDY
    };
    let nothing = Continuation {
        ids: Vec::new(),
        finish: Finish::Length,
    };
    assert_eq!(one(&model, ids(5, 0), &none), nothing);
    assert_eq!(one(&model, Vec::new(), &GREEDY), nothing);
}

#[test]
fn the_caller_can_stop_one_prompt() {
    let model = decoder("llama");
    let prompts = [ids(5, 0), ids(8, 1)].map(|ids| PromptIds { ids, adapter: None });
    let free = continue_all(&model, &[], &prompts, &GREEDY);
    let mut seen = [Vec::new(), Vec::new()];
    let ws = Workspace::new();
    let stopped = generate(
        &model,
        AdapterSet::none(),
        &prompts,
        &GREEDY,
        &ws,
        |prompt, token| {
            seen[prompt].push(token);
            prompt == 1 || seen[0].len() < 4
        },
    );
    assert_eq!(stopped[0].ids, free[0].ids[..4]);
    assert_eq!(stopped[0].finish, Finish::Cancelled);
    assert_eq!(stopped[1], free[1]);
    assert_eq!([&stopped[0].ids, &stopped[1].ids], [&seen[0], &seen[1]]);
}

#[test]
fn draws_follow_their_seed() {
    let model = decoder("llama");
    let with_seed = |seed| {
        let options = GenerateOptions {
            max_new_tokens: 24,
            sampling: Sampling {
                temperature: 1.0,
                top_k: 50,
                top_p: 0.95,
                min_p: 0.0,
                seed,
            },
            ..GREEDY
        };
        one(&model, ids(6, 0), &options).ids
    };
    assert_eq!(with_seed(1), with_seed(1));
    assert_ne!(with_seed(1), with_seed(2));
    // The likeliest of one is greedy's choice.
    let narrow = GenerateOptions {
        sampling: Sampling {
            temperature: 1.0,
            top_k: 1,
            ..GREEDY.sampling
        },
        ..GREEDY
    };
    assert_eq!(
        one(&model, ids(6, 0), &narrow),
        one(&model, ids(6, 0), &GREEDY)
    );
}
