//! Sequences that come and go in a decoding session: each gets what it would get alone, and the cache gets its blocks back.

use std::collections::HashMap;
use std::sync::Arc;

use lowrank::Workspace;
use lowrank::base::{BUILTIN, Base, DType};
use lowrank::generate::{
    BeamOptions, Constraint, Continuation, Decoding, Finish, GenerateOptions, LogProbs, NoRoom,
    Request, RequestId, Sampling, Strategy,
};
use lowrank::model::{Adapter, BLOCK_ROWS, Decoder};
use lowrank::tuning::bitfit;

use super::common::{adapter, all_linear, decoder, ids};

/// A continuation with the tokens' log-probabilities.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) continuation: Continuation,
    /// As bits.
    pub(crate) log_probs: Vec<u64>,
}

pub(crate) fn sample(
    prompt: Vec<u32>,
    adapter: Option<Arc<Adapter>>,
    seed: u64,
) -> Request<Arc<Adapter>> {
    Request {
        prompt,
        adapter,
        search: Strategy::Sample(GenerateOptions {
            max_new_tokens: 3 + seed as usize % 9,
            sampling: Sampling {
                temperature: [0.0, 0.7, 1.3][seed as usize % 3],
                top_k: [0, 5][seed as usize % 2],
                top_p: [1.0, 0.9][seed as usize / 2 % 2],
                min_p: 0.0,
                seed,
            },
            no_repeat_ngram_size: [0, 0, 2][seed as usize / 3 % 3],
            ..GenerateOptions::default()
        }),
        log_probs: LogProbs {
            made: true,
            ..LogProbs::default()
        },
        cache_key: None,
    }
}

/// Steps until `done` says so or nothing is left; tokens and ends by request.
#[derive(Default)]
pub(crate) struct Collected {
    log_probs: HashMap<RequestId, Vec<u64>>,
    pub(crate) answers: HashMap<RequestId, Answer>,
}

impl Collected {
    pub(crate) fn step(&mut self, session: &mut Decoding<'_, Arc<Adapter>>) {
        for made in session.step() {
            let log_probs = self.log_probs.entry(made.id).or_default();
            log_probs.extend(
                made.token
                    .and_then(|token| token.log_prob)
                    .map(f64::to_bits),
            );
            if let Some(continuation) = made.finished {
                let log_probs = std::mem::take(log_probs);
                let answer = Answer {
                    continuation,
                    log_probs,
                };
                assert!(
                    self.answers.insert(made.id, answer).is_none(),
                    "it ends once"
                );
            }
        }
    }
}

/// What a request gets alone.
pub(crate) fn alone(model: &Decoder, request: &Request<Arc<Adapter>>) -> Answer {
    let ws = Workspace::new();
    let mut session = Decoding::with_room_for(model, std::slice::from_ref(request), &ws);
    let id = session.admit(request.clone()).expect("room");
    let mut collected = Collected::default();
    while !session.is_empty() {
        collected.step(&mut session);
    }
    collected.answers.remove(&id).expect("an end")
}

#[test]
fn requests_come_and_go_between_steps() {
    let model = decoder("llama");
    let ws = Workspace::new();
    let own = |seed| Some(Arc::new(adapter(&model, &all_linear(), seed)));
    let (a, b) = (own(1), own(2));
    let requests = [
        sample(ids(9, 1), None, 3),
        sample(ids(20, 2), a.clone(), 8),
        sample(ids(5, 3), b, 10),
        sample(ids(13, 4), a, 17),
    ];
    let mut session = Decoding::with_room_for(&model, &requests, &ws);
    let blocks = session.free_blocks();
    let mut collected = Collected::default();
    let mut admitted = Vec::new();
    for request in &requests {
        admitted.push(session.admit(request.clone()).expect("room"));
        collected.step(&mut session);
    }
    // One goes before its end, and what it made is the beginning of what it would have made.
    let removed = session.remove(admitted[3]).expect("it is under way");
    assert_eq!((removed.ids.len(), removed.finish), (1, Finish::Cancelled));
    assert_eq!(session.remove(admitted[3]), None);
    while !session.is_empty() {
        collected.step(&mut session);
    }
    assert_eq!(session.free_blocks(), blocks);
    for (id, request) in admitted.iter().zip(&requests).take(3) {
        assert_eq!(
            collected.answers[id].continuation,
            alone(&model, request).continuation
        );
    }
    let whole = alone(&model, &requests[3]).continuation;
    assert_eq!(removed.ids, whole.ids[..1]);
}

#[test]
fn adapters_that_replace_weights_share_a_session_with_others() {
    let model = decoder("gpt2");
    let ws = Workspace::new();
    let mut biases = bitfit::inject(model.weights());
    lowrank_kernels::fill_normal(biases.params.flat_mut(), 0.3, 5);
    let (biases, low_rank) = (
        Some(Arc::new(biases)),
        Some(Arc::new(adapter(&model, &all_linear(), 2))),
    );
    let requests = [
        sample(ids(9, 1), biases.clone(), 3),
        sample(ids(7, 2), low_rank, 8),
        sample(ids(5, 3), None, 10),
        sample(ids(12, 4), biases, 16),
    ];
    let mut session = Decoding::with_room_for(&model, &requests, &ws);
    let admitted: Vec<_> = requests
        .iter()
        .map(|request| session.admit(request.clone()).expect("room"))
        .collect();
    let mut collected = Collected::default();
    while !session.is_empty() {
        collected.step(&mut session);
    }
    let answers: Vec<_> = admitted.iter().map(|id| &collected.answers[id]).collect();
    for (answer, request) in answers.iter().zip(&requests) {
        assert_eq!(answer.continuation, alone(&model, request).continuation);
    }
    let without = Request {
        adapter: None,
        ..requests[0].clone()
    };
    assert_ne!(alone(&model, &without).log_probs, answers[0].log_probs);
}

#[test]
fn a_request_waits_until_others_gave_their_rows_back() {
    let model = decoder("llama");
    let ws = Workspace::new();
    let mut session = Decoding::new(&model, 2, &ws);
    // Beams have rows of their own beside the prompt's, so they take a block each.
    let beams = Request {
        search: Strategy::Beams(BeamOptions {
            num_beams: 2,
            length_penalty: 1.0,
            max_new_tokens: 4,
            no_repeat_ngram_size: 0,
            stop_ids: Vec::new(),
        }),
        ..sample(ids(6, 9), None, 1)
    };
    assert_eq!(session.admit(beams.clone()), Err(NoRoom));
    let first = session.admit(sample(ids(6, 1), None, 0)).expect("room");
    let second = session.admit(sample(ids(6, 2), None, 1)).expect("room");
    assert_eq!(session.admit(sample(ids(6, 3), None, 2)), Err(NoRoom));
    // What is over at once takes no rows.
    let nothing = session.admit(sample(Vec::new(), None, 2)).expect("no rows");
    let mut collected = Collected::default();
    collected.step(&mut session);
    assert_eq!(
        collected.answers[&nothing].continuation.finish,
        Finish::Length
    );
    session.remove(second).expect("it is under way");
    let third = session.admit(sample(ids(6, 3), None, 2)).expect("room now");
    while !session.is_empty() {
        collected.step(&mut session);
    }
    for (id, seed) in [(first, 0), (third, 2)] {
        let request = sample(ids(6, [1, 0, 3][seed]), None, seed as u64);
        let expected = alone(&model, &request).continuation;
        assert_eq!(collected.answers[&id].continuation, expected);
    }
    assert_eq!(session.free_blocks(), 2);
}

#[test]
fn a_log_probability_is_that_of_the_models_own_distribution() {
    let model = decoder("llama");
    let request = sample(ids(9, 1), None, 10);
    let answer = alone(&model, &request);
    let mut text = request.prompt.clone();
    for (id, log_prob) in answer.continuation.ids.iter().zip(&answer.log_probs) {
        let all = super::common::logits(&model, None, &text);
        let last = &all[all.len() - model.config().vocab_size..];
        let sum: f64 = last.iter().map(|x| f64::from(*x).exp()).sum();
        let expected = f64::from(last[*id as usize]) - sum.ln();
        assert!((f64::from_bits(*log_prob) - expected).abs() < 1e-4);
        text.push(*id);
    }
    assert_eq!(answer.log_probs.len(), answer.continuation.ids.len());
}

/// Runs one request to its end; how much of its prompt was there before.
fn run_one(
    session: &mut Decoding<'_, Arc<Adapter>>,
    request: &Request<Arc<Adapter>>,
) -> (Answer, usize) {
    let id = session.admit(request.clone()).expect("room");
    let cached = session.cached_tokens(id).expect("it is under way");
    let mut collected = Collected::default();
    while !session.is_empty() {
        collected.step(session);
    }
    (collected.answers.remove(&id).expect("an end"), cached)
}

#[test]
fn prompts_that_begin_alike_share_their_blocks_and_keep_their_bits() {
    let base = Base::load(BUILTIN, DType::Bf16).expect("the built-in model");
    let model = base.decoder;
    let ws = Workspace::new();
    let long = ids(3 * BLOCK_ROWS + 5, 1);
    let request = |ends: &[u32], key: u128| Request {
        cache_key: Some(key),
        ..sample([&long, ends].concat(), None, 3)
    };
    let mut session = Decoding::new(&model, 9, &ws);
    let first = request(&[1, 2], 7);
    assert_eq!(run_one(&mut session, &first), (alone(&model, &first), 0));
    assert_eq!((session.free_blocks(), session.kept_blocks()), (9, 3));
    let second = request(&[3], 7);
    let found = run_one(&mut session, &second);
    assert_eq!(found, (alone(&model, &second), 3 * BLOCK_ROWS));
    // Another key has nothing of it, and one token is always left to read.
    assert_eq!(run_one(&mut session, &request(&[3], 8)).1, 0);
    let whole = Request {
        prompt: long[..3 * BLOCK_ROWS].to_vec(),
        ..request(&[], 7)
    };
    let found = run_one(&mut session, &whole);
    assert_eq!(found, (alone(&model, &whole), 2 * BLOCK_ROWS));
    // What was used longest ago makes way: the last block of the first key, which the last request did not use.
    assert_eq!(session.kept_blocks(), 6);
    let other = Request {
        cache_key: None,
        ..sample(ids(4 * BLOCK_ROWS - 20, 4), None, 3)
    };
    assert_eq!(run_one(&mut session, &other).0, alone(&model, &other));
    assert_eq!(session.kept_blocks(), 5);
    assert_eq!(run_one(&mut session, &request(&[9], 8)).1, 3 * BLOCK_ROWS);
    assert_eq!(run_one(&mut session, &second).1, 2 * BLOCK_ROWS);
    session.forget(7);
    assert_eq!(run_one(&mut session, &second).1, 0);
    assert_eq!(session.free_blocks(), 9);
}

#[test]
fn a_prompt_is_scored_and_nothing_made_of_it() {
    let model = decoder("llama");
    let ws = Workspace::new();
    let prompt = ids(40, 6);
    let request = |max_new_tokens, prompt_rows: usize| {
        let wanted = Request {
            log_probs: LogProbs {
                made: true,
                prompt: true,
                top: 2,
            },
            ..Request::new(
                prompt.clone(),
                None::<Arc<Adapter>>,
                Strategy::Sample(GenerateOptions::greedy(max_new_tokens, &[])),
            )
        };
        let mut session = Decoding::with_room_for(&model, std::slice::from_ref(&wanted), &ws)
            .with_prompt_rows(prompt_rows);
        session.admit(wanted).expect("room");
        let (mut read, mut made, mut finish) = (Vec::new(), Vec::new(), None);
        while !session.is_empty() {
            for one in session.step() {
                read.extend(one.read);
                made.extend(one.token);
                finish = one.finished.map(|end| end.finish);
            }
        }
        (read, made, finish)
    };
    let (read, made, finish) = request(0, usize::MAX);
    assert_eq!((made.len(), finish), (0, Some(Finish::Length)));
    let scored: Vec<u32> = read.iter().map(|token| token.id).collect();
    assert_eq!(scored, prompt[1..]);
    // What is made and what is read have one scale: the greedy token of the prompt's first half is the likeliest one there.
    let (again, made, _) = request(1, 7);
    assert_eq!(again, read);
    assert_eq!(made[0].log_prob, Some(made[0].top[0].1));
    assert!(read.iter().all(|token| token.top.len() == 2
        && token.log_prob <= Some(token.top[0].1)
        && token.log_prob < Some(0.0)));
}

/// Allows even tokens, so many of them.
struct Even(usize);

impl Constraint for Even {
    fn restrict(&mut self, logits: &mut [f32]) {
        for logit in logits.iter_mut().skip(1).step_by(2) {
            *logit = f32::NEG_INFINITY;
        }
    }

    fn accept(&mut self, token: u32) {
        assert_eq!(token % 2, 0);
        self.0 -= 1;
    }

    fn is_complete(&self) -> bool {
        self.0 == 0
    }
}

#[test]
fn a_grammar_is_followed_and_ends_its_text() {
    let model = decoder("llama");
    let ws = Workspace::new();
    let requests = [0, 1, 2].map(|seed| Request {
        search: Strategy::Sample(GenerateOptions {
            max_new_tokens: 20,
            sampling: Sampling {
                temperature: seed as f32,
                seed,
                ..Sampling::default()
            },
            ..GenerateOptions::default()
        }),
        ..sample(ids(9, seed as u32), None, 0)
    });
    let mut session = Decoding::with_room_for(&model, &requests, &ws);
    for request in &requests {
        let id = session.admit(request.clone()).expect("room");
        session.constrain(id, Box::new(Even(5)));
    }
    let mut collected = Collected::default();
    while !session.is_empty() {
        collected.step(&mut session);
    }
    assert_eq!(collected.answers.len(), 3);
    for answer in collected.answers.values() {
        assert_eq!(answer.continuation.finish, Finish::Stop);
        assert_eq!(answer.continuation.ids.len(), 5);
        assert!(answer.continuation.ids.iter().all(|id| id % 2 == 0));
    }
}
