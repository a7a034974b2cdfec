//! A row's bits do not depend on company: in random mixes of prompts, adapters, lengths and pieces, every request gets the ids and
//! the log-probabilities, bit for bit, that it gets alone. So with every engine that the machine has.
//!
//! The engine is a choice of the whole process, so these tests have a process of their own. `LOWRANK_MIXES_MODEL` names another model's
//! folder than the built-in one, and `LOWRANK_MIXES` another number of mixes; scripts/check_mixes.sh sets both.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use lowrank::base::Source;
use lowrank::generate::{
    BeamOptions, Decoding, Finish, GenerateOptions, LogProbs, Penalties, Request, RequestId,
    Sampling, Strategy,
};
use lowrank::model::{Adapter, BLOCK_ROWS, Decoder, ModelConfig, ScaleSite};
use lowrank::train::TrainConfig;
use lowrank::tuning::targets::Targets;
use lowrank::tuning::{Method, adapter, prefix};
use lowrank::{DType, Workspace};
use lowrank_kernels::{CounterRng, engines, fill_normal, fill_uniform, with_engine};

type Shared = Arc<Adapter>;

/// What a request came to: ids, log-probabilities as bits, and why it ended.
type Answer = (Vec<u32>, Vec<u64>, Finish);

fn model() -> Arc<Decoder> {
    let folder = std::env::var_os("LOWRANK_MIXES_MODEL").map(PathBuf::from);
    let source = folder.map_or(Source::Builtin, Source::Folder);
    source
        .load(DType::Bf16)
        .expect("the model")
        .into_network()
        .decoder
}

fn mixes() -> u64 {
    let count = std::env::var("LOWRANK_MIXES").ok();
    count.map_or(200, |count| count.parse().expect("a number"))
}

/// A number below `end`.
fn below(rng: &mut CounterRng, end: usize) -> usize {
    (rng.next_f64() * end as f64) as usize
}

/// Adapters of every kind of entry that a table has.
fn adapters(model: &ModelConfig) -> Vec<Shared> {
    let defaults = |method| TrainConfig::new(method, "", "", "");
    let lora = |r| {
        defaults(Method::Lora).with_options(|options| {
            options.lora.r = r;
            options.targets.target_modules = Some(Targets::Pattern("all-linear".to_owned()));
        })
    };
    let layers = |kind| {
        defaults(Method::Adapter).with_options(|options| {
            options.adapter.adapter_kind = kind;
            options.adapter.bottleneck = 24;
        })
    };
    let virtual_tokens = |kind, infix_tokens| {
        defaults(Method::Prefix).with_options(|options| {
            options.prefix.prefix_kind = kind;
            options.prefix.num_virtual_tokens = 5;
            options.prefix.infix_tokens = infix_tokens;
        })
    };
    let settings = [
        lora(4),
        lora(4),
        lora(16),
        lora(4).with_options(|options| options.lora.use_dora = true),
        defaults(Method::Lora),
        layers(adapter::Kind::Houlsby),
        layers(adapter::Kind::Lin),
        virtual_tokens(prefix::Kind::Layer, 0),
        virtual_tokens(prefix::Kind::Embedding, 3),
        defaults(Method::Bitfit),
    ];
    let mut all: Vec<Adapter> = settings
        .iter()
        .enumerate()
        .map(|(seed, settings)| {
            let mut made = settings.lay_out(model).expect("it fits");
            fill_normal(made.params.flat_mut(), 0.1, seed as u64);
            made
        })
        .collect();
    let (mut shapes, mut table) = (Vec::new(), HashMap::new());
    for id in model.linears() {
        let (inputs, outputs) = model.linear_shape(id.kind);
        let at = shapes.len();
        shapes.push((format!("{id:?} in"), (1, inputs)));
        shapes.push((format!("{id:?} out"), (1, outputs)));
        let (input, output) = (Some(at), Some(at + 1));
        table.insert(id, ScaleSite { input, output });
    }
    let mut scaled = Adapter::new(shapes);
    scaled.scaled = table;
    fill_uniform(scaled.params.flat_mut(), 0.8, 1.2, 9);
    all.push(scaled);
    all.into_iter().map(Arc::new).collect()
}

fn request(rng: &mut CounterRng, config: &ModelConfig, adapters: &[Shared]) -> Request<Shared> {
    // A few reach over several blocks of the cache.
    let longest = match below(rng, 12) {
        0 => 2 * BLOCK_ROWS + 50,
        1 => BLOCK_ROWS + 20,
        2..6 => 40,
        _ => 12,
    };
    let mut prompt: Vec<u32> = (0..=below(rng, longest))
        .map(|_| 3 + below(rng, config.vocab_size - 3) as u32)
        .collect();
    if below(rng, 6) == 0 {
        // Some begin alike, and share what was computed of that.
        let common = (0..below(rng, 2 * BLOCK_ROWS + 30)).map(|at| 3 + at as u32 % 50);
        prompt = common.chain(prompt).collect();
    }
    let choice = below(rng, adapters.len() + 2);
    let sampling = Sampling {
        temperature: [0.0, 0.0, 0.8, 1.2][below(rng, 4)],
        top_k: [0, 20][below(rng, 2)],
        top_p: [1.0, 0.9][below(rng, 2)],
        min_p: [0.0, 0.0, 0.1][below(rng, 3)],
        seed: below(rng, 1 << 30) as u64,
    };
    let options = GenerateOptions {
        max_new_tokens: 1 + below(rng, 12),
        sampling,
        penalties: Penalties {
            repetition: [1.0, 1.2][below(rng, 2)],
            frequency: [0.0, 0.0, 0.3][below(rng, 3)],
            ..Penalties::NONE
        },
        logit_bias: Vec::new(),
        no_repeat_ngram_size: [0, 0, 3][below(rng, 3)],
        stop_ids: vec![0],
    };
    let search = if below(rng, 8) == 0 {
        Strategy::Beams(BeamOptions {
            num_beams: 3,
            length_penalty: 1.0,
            max_new_tokens: options.max_new_tokens,
            no_repeat_ngram_size: 0,
            stop_ids: vec![0],
        })
    } else {
        Strategy::Sample(options)
    };
    Request {
        prompt,
        adapter: adapters.get(choice).cloned(),
        search,
        log_probs: LogProbs {
            made: true,
            prompt: below(rng, 4) == 0,
            top: [0, 0, 3][below(rng, 3)],
        },
        cache_key: Some(choice as u128),
    }
}

/// Steps a session to its end; between steps requests are admitted as long as `when` says so.
fn answers(
    mut session: Decoding<'_, Shared>,
    requests: &[Request<Shared>],
    mut when: impl FnMut() -> bool,
) -> Vec<Answer> {
    let mut ids: Vec<RequestId> = Vec::new();
    let mut log_probs: HashMap<RequestId, Vec<u64>> = HashMap::new();
    let mut done: HashMap<RequestId, Answer> = HashMap::new();
    while ids.len() < requests.len() || !session.is_empty() {
        while ids.len() < requests.len() && (session.is_empty() || when()) {
            let next = requests[ids.len()].clone();
            ids.push(session.admit(next).expect("the session has room for all"));
        }
        for made in session.step() {
            let bits = log_probs.entry(made.id).or_default();
            for token in made.read.into_iter().chain(made.token) {
                bits.extend(token.log_prob.map(f64::to_bits));
                bits.extend(token.top.iter().map(|(_, log_prob)| log_prob.to_bits()));
            }
            if let Some(end) = made.finished {
                let answer = (end.ids, std::mem::take(bits), end.finish);
                done.insert(made.id, answer);
            }
        }
    }
    ids.iter()
        .map(|id| done.remove(id).expect("an end"))
        .collect()
}

#[test]
fn rows_have_the_bits_that_they_have_alone() {
    let (model, ws) = (model(), Workspace::new());
    let adapters = adapters(model.config());
    let mut rng = CounterRng::new(7);
    let pool: Vec<_> = (0..60)
        .map(|_| request(&mut rng, model.config(), &adapters))
        .collect();
    for engine in engines() {
        let count = mixes();
        let mut tokens = 0;
        with_engine(engine, || {
            let alone: Vec<Answer> = pool
                .iter()
                .map(std::slice::from_ref)
                .flat_map(|one| answers(Decoding::with_room_for(&model, one, &ws), one, || true))
                .collect();
            for mix in 0..count {
                let mut rng = CounterRng::new(1000 + mix);
                let members: Vec<usize> = (0..2 + below(&mut rng, 9))
                    .map(|_| below(&mut rng, pool.len()))
                    .collect();
                let requests: Vec<_> = members.iter().map(|i| pool[*i].clone()).collect();
                let piece = match below(&mut rng, 16) {
                    0 => 1,
                    1 => 3,
                    2..6 => 19,
                    6..11 => 50,
                    _ => usize::MAX,
                };
                let session =
                    Decoding::with_room_for(&model, &requests, &ws).with_prompt_rows(piece);
                let found = answers(session, &requests, || below(&mut rng, 3) > 0);
                for (found, member) in found.iter().zip(&members) {
                    tokens += found.0.len();
                    assert_eq!(
                        *found, alone[*member],
                        "{engine:?}, mix {mix} of {members:?}, pieces of {piece}, request {member}"
                    );
                }
            }
        });
        assert!(
            tokens as u64 > 10 * count,
            "{tokens} tokens in {count} mixes"
        );
    }
}
