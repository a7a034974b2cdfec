//! What all routes share: the base, its adapters, the engine, and what may be asked of them.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use lowrank::base::Base;
use lowrank::data::Labels;
use lowrank::generate::{CacheKey, GenerateOptions, Request, Strategy};
use lowrank::model::{Adapter, BLOCK_ROWS, HeadKind};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::api::wanted::Wanted;
use crate::engine::{Engine, Refused, Submission, Update};
use crate::error::ApiError;
use crate::grammar::{Grammar, GrammarError, Vocabulary};
use crate::keys::Keys;
use crate::registry::{Lease, Registry, Resident};
use crate::sync::{blocking, lock};
use crate::tools::ToolForm;

/// What a request may ask for at most.
#[derive(Clone, Debug)]
pub struct Caps {
    /// Choices of a request (`n`), and prompts times choices.
    pub n: usize,
    /// Texts that end an answer.
    pub stops: usize,
    /// Tokens that come with their log-probabilities at each place.
    pub top_log_probs: usize,
    /// Bytes of a body.
    pub body: usize,
    /// How long a request may take; `None`: as long as it takes.
    pub timeout: Option<Duration>,
    /// Requests of one key that are under way at once; 0: any number.
    pub requests_per_key: usize,
}

impl Default for Caps {
    fn default() -> Self {
        Self {
            n: 16,
            stops: 16,
            top_log_probs: 20,
            body: 4 << 20,
            timeout: None,
            requests_per_key: 0,
        }
    }
}

/// The state of a server.
pub(crate) struct Server {
    pub(crate) base: Base,
    /// What the outputs of the base's classifier mean, if it has one.
    pub(crate) labels: Option<Labels>,
    pub(crate) name: String,
    pub(crate) registry: Arc<Registry>,
    pub(crate) engine: Engine,
    pub(crate) caps: Caps,
    pub(crate) keys: Keys,
    pub(crate) tool_form: Option<ToolForm>,
    pub(crate) started: SystemTime,
    /// Files and jobs, or why there are none.
    pub(crate) jobs: Result<Arc<crate::jobs::Jobs>, ApiError>,
    vocabulary: OnceLock<Result<Vocabulary, String>>,
    salts: Mutex<Salts>,
    mixes: Mutex<Mixes>,
}

/// The salts that were seen, so that each has a number of its own in cache keys.
#[derive(Default)]
struct Salts {
    /// Numbers by salt, of each adapter.
    of: HashMap<u64, HashMap<String, u64>>,
    /// How many there are.
    len: usize,
    last: u64,
}

/// So many salts are remembered; one that is forgotten gets another number when it comes again.
const MOST_SALTS: usize = 1 << 16;

/// Sums of adapters, kept for the next request of the same one.
#[derive(Default)]
struct Mixes {
    kept: Vec<Mixed>,
    last: u64,
}

struct Mixed {
    /// Numbers of adapters and bits of their weights.
    parts: Vec<(u64, u32)>,
    adapter: Arc<Adapter>,
    number: u64,
}

/// So many sums are kept.
const MOST_MIXES: usize = 32;

/// Numbers of sums in cache keys, apart from those of adapters.
const MIXES: u64 = 1 << 62;

/// What computes an answer.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) name: Arc<str>,
    /// Whose turn it is in the queue.
    pub(crate) party: Arc<str>,
    adapter: Option<Arc<Adapter>>,
    number: u64,
    /// Dropped when the request is over.
    _leases: Arc<Vec<Lease>>,
}

/// A choice of a request that was handed in.
pub(crate) struct Choice {
    pub(crate) index: usize,
    /// Tokens that end it and that the engine does not know of.
    pub(crate) ends: Vec<u32>,
    /// What it was told before anybody followed it.
    pub(crate) early: VecDeque<Update>,
    pub(crate) updates: UnboundedReceiver<Update>,
    /// Set where its text has come to an end that the engine does not know of.
    pub(crate) is_over: Arc<AtomicBool>,
    /// Its adapters are in use until it is dropped.
    _model: Model,
}

impl Model {
    /// The adapter; `None`: the base alone.
    pub(crate) fn adapter(&self) -> Option<Arc<Adapter>> {
        self.adapter.clone()
    }
}

impl Server {
    pub(crate) fn new(
        base: Base,
        labels: Option<Labels>,
        name: String,
        registry: Arc<Registry>,
        engine: Engine,
        caps: Caps,
        keys: Keys,
        jobs: Result<Arc<crate::jobs::Jobs>, ApiError>,
    ) -> Self {
        let tool_form = base
            .tokenizer
            .chat_template()
            .and_then(ToolForm::of_template);
        Self {
            base,
            labels,
            name,
            registry,
            engine,
            caps,
            keys,
            tool_form,
            started: SystemTime::now(),
            jobs,
            vocabulary: OnceLock::new(),
            salts: Mutex::default(),
            mixes: Mutex::default(),
        }
    }

    /// The vocabulary as grammars read it, made at its first use.
    pub(crate) fn vocabulary(&self) -> Result<&Vocabulary, ApiError> {
        let made = self
            .vocabulary
            .get_or_init(|| Vocabulary::new(&self.base.tokenizer).map_err(|e| e.to_string()));
        made.as_ref()
            .map_err(|message| ApiError::bad_request("grammar_unsupported", message.clone()))
    }

    /// The base or an adapter by its name, or a sum of adapters.
    pub(crate) async fn model(&self, wanted: &Wanted) -> Result<Model, ApiError> {
        let name = wanted.model.as_deref().unwrap_or(&self.name);
        let is_base = name == self.name;
        if !wanted.mix.is_empty() {
            if !is_base {
                return Err(ApiError::invalid(
                    "adapters",
                    format!(
                        "adapters go with the base as model, {:?}, not with {name:?}",
                        self.name
                    ),
                ));
            }
            return self.mixed(&wanted.mix).await;
        }
        if is_base {
            let name: Arc<str> = self.name.as_str().into();
            return Ok(Model {
                party: Arc::clone(&name),
                name,
                adapter: None,
                number: 0,
                _leases: Arc::default(),
            });
        }
        let lease = self.lease(name).await?;
        Ok(Model {
            name: Arc::clone(&lease.name),
            party: Arc::clone(&lease.name),
            adapter: Some(Arc::clone(&lease.resident.adapter)),
            number: lease.resident.number,
            _leases: Arc::new(vec![lease]),
        })
    }

    /// The adapter of a name, which may be a job's checkpoint.
    async fn lease(&self, name: &str) -> Result<Lease, ApiError> {
        if self.registry.get(name).is_none()
            && let Ok(jobs) = &self.jobs
            && let Some(path) = jobs.checkpoint_path(name)
        {
            let path = path.display().to_string();
            self.registry.load(name, &path, true, None).await?;
        }
        self.registry.lease(name).await
    }

    async fn mixed(&self, mix: &[(String, f32)]) -> Result<Model, ApiError> {
        let mut leases = Vec::new();
        for (name, _) in mix {
            let lease = self.lease(name).await.map_err(|error| ApiError {
                param: Some("adapters".to_owned()),
                ..error
            });
            leases.push(lease?);
        }
        let parts: Vec<(u64, u32)> = leases
            .iter()
            .zip(mix)
            .map(|(lease, (_, weight))| (lease.resident.number, weight.to_bits()))
            .collect();
        let known = lock(&self.mixes).find(&parts);
        let (adapter, number) = if let Some(known) = known {
            known
        } else {
            let residents: Vec<_> = leases
                .iter()
                .map(|lease| Arc::clone(&lease.resident))
                .collect();
            let mix = mix.to_vec();
            let adapter = blocking(move || sum(&residents, &mix)).await?;
            lock(&self.mixes).keep(parts, Arc::new(adapter))
        };
        let name: Arc<str> = self.name.as_str().into();
        Ok(Model {
            party: Arc::clone(&name),
            name,
            adapter: Some(adapter),
            number,
            _leases: Arc::new(leases),
        })
    }

    /// Tokens that a prompt and its answer may have together.
    pub(crate) fn context(&self, model: &Model) -> usize {
        let config = self.base.decoder.config();
        let taken = model.adapter.as_ref();
        let taken = taken.map_or(0, |adapter| adapter.virtual_tokens().total());
        config.longest_sequence().saturating_sub(taken)
    }

    /// Tokens that a prompt and its answer may have together so that the cache has room for them.
    fn cache_room(&self, model: &Model) -> usize {
        let taken = model.adapter.as_ref();
        let taken = taken.map(|adapter| adapter.virtual_tokens());
        let (before, inside) =
            taken.map_or((0, 0), |taken| (taken.keys + taken.prefix, taken.infix));
        let before = before.next_multiple_of(BLOCK_ROWS);
        self.engine.cache_rows().saturating_sub(before + inside)
    }

    /// Refuses texts of an encoder.
    fn require_language_model(&self) -> Result<(), ApiError> {
        if self.base.decoder.config().head != HeadKind::LanguageModel {
            return Err(ApiError::bad_request(
                "unsupported_by_model",
                format!(
                    "{} writes no text; ask for /v1/embeddings of an encoder, and for /v1/classify of a classifier",
                    self.name
                ),
            ));
        }
        Ok(())
    }

    /// Hands in `n` choices of every prompt. Of each, `default` new tokens are made where the request says nothing; `None`: until the context is full.
    pub(crate) fn submit(
        &self,
        wanted: &Wanted,
        model: &Model,
        prompts: Vec<Vec<u32>>,
        default: Option<usize>,
        grammar: Option<&Grammar>,
    ) -> Result<Vec<Choice>, ApiError> {
        self.require_language_model()?;
        let (context, room) = (self.context(model), self.cache_room(model));
        let vocabulary = self.base.decoder.config().vocab_size;
        let key = self.cache_key(model.number, wanted.salt.as_deref());
        let mut stop_ids = wanted.options.stop_ids.clone();
        if !wanted.ignore_eos {
            stop_ids.extend_from_slice(self.base.tokenizer.stop_ids());
        }
        let (stop_ids, ends) = if wanted.shows_end {
            (Vec::new(), stop_ids)
        } else {
            (stop_ids, Vec::new())
        };
        let (mut submissions, mut choices) = (Vec::new(), Vec::new());
        for prompt in prompts {
            let length = prompt.len();
            if prompt.is_empty() {
                return Err(ApiError::invalid("prompt", "the prompt has no tokens"));
            }
            if let Some(id) = prompt.iter().find(|id| **id as usize >= vocabulary) {
                return Err(ApiError::invalid(
                    "prompt",
                    format!("the prompt has the token {id}, and the model has {vocabulary}"),
                ));
            }
            let most = context.saturating_sub(length);
            let fitting = most.min(room.saturating_sub(length));
            let asked = wanted.max_tokens.or(default).unwrap_or(fitting.max(1));
            if length > context || most == 0 && asked > 0 {
                return Err(too_long(length, context));
            }
            if length > room || asked.min(most) > fitting {
                return Err(cache_too_small(length));
            }
            for _ in 0..wanted.n {
                let index = choices.len();
                let mut sampling = wanted.options.sampling;
                sampling.seed = sampling.seed.wrapping_add((index % wanted.n) as u64);
                let options = GenerateOptions {
                    max_new_tokens: asked.min(most),
                    sampling: sampling.for_prompt(&prompt),
                    stop_ids: stop_ids.clone(),
                    ..wanted.options.clone()
                };
                let request = Request {
                    prompt: prompt.clone(),
                    adapter: model.adapter.clone(),
                    search: Strategy::Sample(options),
                    log_probs: wanted.log_probs,
                    cache_key: Some(key),
                };
                let (sender, updates) = tokio::sync::mpsc::unbounded_channel();
                let is_over = Arc::new(AtomicBool::new(false));
                submissions.push(Submission {
                    request,
                    grammar: grammar.map(|grammar| Box::new(grammar.clone()) as _),
                    party: Arc::clone(&model.party),
                    deadline: wanted.deadline,
                    updates: sender,
                    is_over: Arc::clone(&is_over),
                    submitted: Instant::now(),
                });
                choices.push(Choice {
                    index,
                    ends: ends.clone(),
                    early: VecDeque::new(),
                    updates,
                    is_over,
                    _model: model.clone(),
                });
            }
        }
        self.engine
            .submit(submissions)
            .map_err(|refused| match refused {
                Refused::Full(waiting) => ApiError::busy(
                    "queue_full",
                    format!("{waiting} requests wait already; try again later"),
                    2,
                ),
                Refused::Draining => ApiError {
                    retry_after: Some(5),
                    ..ApiError::new(
                        axum::http::StatusCode::SERVICE_UNAVAILABLE,
                        "shutting_down",
                        "the server is going down",
                    )
                },
            })?;
        Ok(choices)
    }

    /// What keys and values of prompts depend on beside tokens. Salts are told apart by their texts, so no two of them, and no salt and name, can meet.
    fn cache_key(&self, number: u64, salt: Option<&str>) -> CacheKey {
        let salt = salt.map_or(0, |salt| lock(&self.salts).number_of(number, salt));
        CacheKey::from(number) << 64 | CacheKey::from(salt)
    }

    /// Gives up the prompts that were kept for an adapter that is gone.
    pub(crate) fn forget(&self, number: u64) {
        let mut numbers = lock(&self.mixes).forget(number);
        numbers.push(number);
        for number in numbers {
            let salts = lock(&self.salts).forget(number);
            for salt in std::iter::once(0).chain(salts) {
                self.engine
                    .forget(CacheKey::from(number) << 64 | CacheKey::from(salt));
            }
        }
    }
}

impl Salts {
    fn number_of(&mut self, adapter: u64, salt: &str) -> u64 {
        let known = self.of.get(&adapter).and_then(|salts| salts.get(salt));
        if let Some(known) = known {
            return *known;
        }
        if self.len >= MOST_SALTS {
            self.of.clear();
            self.len = 0;
        }
        self.last += 1;
        self.len += 1;
        let salts = self.of.entry(adapter).or_default();
        salts.insert(salt.to_owned(), self.last);
        self.last
    }

    /// Forgets the salts of an adapter, and gives their numbers.
    fn forget(&mut self, adapter: u64) -> Vec<u64> {
        let salts = self.of.remove(&adapter).unwrap_or_default();
        self.len -= salts.len();
        salts.into_values().collect()
    }
}

impl Mixes {
    fn find(&self, parts: &[(u64, u32)]) -> Option<(Arc<Adapter>, u64)> {
        let known = self.kept.iter().find(|mixed| mixed.parts == parts)?;
        Some((Arc::clone(&known.adapter), known.number))
    }

    fn keep(&mut self, parts: Vec<(u64, u32)>, adapter: Arc<Adapter>) -> (Arc<Adapter>, u64) {
        // Somebody else may have made the same meanwhile.
        if let Some(known) = self.find(&parts) {
            return known;
        }
        if self.kept.len() >= MOST_MIXES {
            self.kept.remove(0);
        }
        self.last += 1;
        let number = MIXES + self.last;
        self.kept.push(Mixed {
            parts,
            adapter: Arc::clone(&adapter),
            number,
        });
        (adapter, number)
    }

    /// Forgets the sums that have an adapter, and gives their numbers.
    fn forget(&mut self, adapter: u64) -> Vec<u64> {
        let has = |mixed: &Mixed| mixed.parts.iter().any(|(part, _)| *part == adapter);
        let numbers = self.kept.iter().filter(|mixed| has(mixed));
        let numbers = numbers.map(|mixed| mixed.number).collect();
        self.kept.retain(|mixed| !has(mixed));
        numbers
    }
}

/// The sum of adapters, each with its weight.
fn sum(residents: &[Arc<Resident>], mix: &[(String, f32)]) -> Result<Adapter, ApiError> {
    let parts: Vec<(&Adapter, f32)> = residents
        .iter()
        .zip(mix)
        .map(|(resident, (_, weight))| (&*resident.adapter, *weight))
        .collect();
    Adapter::mixed(&parts).map_err(|at| {
        ApiError::invalid(
            "adapters",
            format!(
                "{:?} is more than low-rank branches, and only these can be mixed",
                mix[at].0
            ),
        )
    })
}

/// A grammar that cannot be followed.
pub(crate) fn grammar_error(param: &str, error: &GrammarError) -> ApiError {
    ApiError {
        code: "invalid_grammar",
        ..ApiError::invalid(param, error.to_string())
    }
}

fn too_long(length: usize, context: usize) -> ApiError {
    ApiError {
        param: Some("prompt".to_owned()),
        ..ApiError::bad_request(
            "context_length_exceeded",
            format!(
                "the prompt has {length} tokens, and the model reads {context}, those of the answer among them"
            ),
        )
    }
}

/// A request that the cache can never have room for.
pub(crate) fn cache_too_small(length: usize) -> ApiError {
    ApiError::bad_request(
        "cache_too_small",
        format!(
            "a prompt of {length} tokens with its answer needs more of the cache than the server has; ask for fewer tokens, or \
             start it with a larger --kv-cache-memory"
        ),
    )
}

/// The folder of files and jobs in a folder of adapters.
pub(crate) fn state_folder(adapters: &std::path::Path) -> PathBuf {
    adapters.join(".lowrank-serve")
}
