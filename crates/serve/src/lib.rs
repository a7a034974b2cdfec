//! Many adapters on one base model, behind OpenAI's API.
//!
//! [`serve`] loads a base once, takes adapters by name, and answers `/v1/chat/completions`, `/v1/completions` and the routes that vLLM has for adapters.
//! Requests of all adapters are computed together in one decoding session; what a request gets does not depend on the others, bit for bit.

mod api;
mod engine;
mod error;
pub mod grammar;
mod jobs;
mod keys;
mod metrics;
mod objects;
mod registry;
mod server;
mod sync;
pub mod tools;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use axum::serve::ListenerExt as _;
use lowrank::base::Base;
use lowrank::data::Labels;
use lowrank::lock::{Attempt, Lock};
use lowrank::model::{BLOCK_ROWS, ModelConfig};

pub use server::Caps;

use engine::{Engine, Limits};
use jobs::Jobs;
use keys::Keys;
use registry::Registry;
use server::Server;

/// How a server is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it listens.
    pub address: SocketAddr,
    /// The base's name in requests.
    pub name: String,
    /// Adapters by name that are loaded at the start.
    pub adapters: Vec<(String, PathBuf)>,
    /// The folder that adapters are loaded from while the server runs; files, jobs and the registry are in it, too.
    pub adapter_dir: Option<PathBuf>,
    /// Bytes of adapters' values that stay in memory beside those in use; `None`: all.
    pub adapter_memory: Option<u64>,
    /// Sequences that are generated together.
    pub max_num_seqs: usize,
    /// Requests that wait at most.
    pub max_waiting: usize,
    /// Tokens of prompts that a step reads while others are being answered.
    pub prompt_piece: usize,
    /// Bytes of keys and values; `None`: as many as all sequences need, or half of the memory that is free.
    pub kv_cache_memory: Option<u64>,
    /// Share of the time that training has while requests are under way.
    pub train_share: f64,
    /// Keys that callers must have; none: everybody may ask.
    pub api_keys: Vec<String>,
    /// The key for what changes the server; `None`: whoever may ask may change.
    pub admin_key: Option<String>,
    /// What a request may ask for.
    pub caps: Caps,
    /// How long requests under way have when the server is told to stop.
    pub drain_timeout: Duration,
}

impl Options {
    /// A server on the loopback address.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 8080)),
            name: name.into(),
            adapters: Vec::new(),
            adapter_dir: None,
            adapter_memory: None,
            max_num_seqs: 16,
            max_waiting: 256,
            prompt_piece: 64,
            kv_cache_memory: None,
            train_share: 0.25,
            api_keys: Vec::new(),
            admin_key: None,
            caps: Caps::default(),
            drain_timeout: Duration::from_secs(30),
        }
    }
}

/// Why a server could not start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// An adapter that was named at the start.
    #[error("adapter {name}: {message}")]
    Adapter {
        /// Its name.
        name: String,
        /// What is wrong with it.
        message: String,
    },
    /// The folder of adapters or what is in it.
    #[error("{0}")]
    Folder(String),
    /// An address that cannot be listened on.
    #[error("cannot listen on {address}: {source}; another program may, so give another --port")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The thread that computes has died, so nothing can be answered any more.
    #[error("the server met a fault of its own and ends; what was printed before this says more")]
    Fault,
    /// The system.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Bytes of keys and values that a block of the cache has.
pub fn block_bytes(config: &ModelConfig) -> u64 {
    (2 * config.num_hidden_layers * config.kv_size() * BLOCK_ROWS * 4) as u64
}

/// Serves a base, whose classifier has these labels if it has one, until `stop` says so, then lets requests under way end. `ready` is told the address.
///
/// # Errors
/// An adapter of the start that cannot be used, a folder or an address that cannot.
pub fn serve(
    base: Base,
    labels: Option<Labels>,
    options: Options,
    ready: impl FnOnce(SocketAddr),
    stop: impl Fn() -> bool + Send + Sync + 'static,
) -> Result<(), ServeError> {
    metrics::install();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("http")
        .enable_all()
        .build()?;
    let (engine, thread) = Engine::start(Arc::clone(&base.decoder), limits(&base, &options))?;
    let state_lock = lock_state(options.adapter_dir.as_deref())?.map(Arc::new);
    let registry = Registry::open(
        Arc::clone(&base.decoder),
        &options.name,
        options.adapter_dir.as_deref(),
        options.adapter_memory,
    )
    .map_err(ServeError::Folder)?;
    for (name, path) in &options.adapters {
        registry
            .add(name, path)
            .map_err(|error| ServeError::Adapter {
                name: name.clone(),
                message: error.message,
            })?;
    }
    registry.forget_elsewhere();
    registry.load_pinned();
    let is_loopback = options.address.ip().is_loopback();
    let keys = Keys::new(options.api_keys, options.admin_key, is_loopback);
    let registry = Arc::new(registry);
    let jobs = Jobs::open(
        &base,
        &options.name,
        registry.folder(),
        state_lock.clone(),
        engine.clone(),
        Arc::clone(&registry),
        runtime.handle().clone(),
    );
    let of_end = jobs.as_ref().ok().cloned();
    let jobs_to_stop = of_end.clone();
    let server = Arc::new(Server::new(
        base,
        labels,
        options.name,
        registry,
        engine.clone(),
        options.caps,
        keys,
        jobs,
    ));
    runtime.block_on(async move {
        let listener = tokio::net::TcpListener::bind(options.address)
            .await
            .map_err(|source| ServeError::Listen {
                address: options.address,
                source,
            })?;
        ready(listener.local_addr()?);
        // Events are small, and must not wait for each other to fill a packet.
        let listener = listener.tap_io(|connection| drop(connection.set_nodelay(true)));
        let patience = options.drain_timeout;
        let of_stop = engine.clone();
        let (ended, has_ended) = tokio::sync::oneshot::channel::<()>();
        let serving =
            axum::serve(listener, api::service(server)).with_graceful_shutdown(async move {
                while !stop() && !of_stop.load.has_ended.load(Ordering::SeqCst) {
                    tokio::time::sleep(TICK).await;
                }
                if let Some(jobs) = jobs_to_stop {
                    jobs.stop();
                }
                drain(&of_stop, patience).await;
                drop(ended);
            });
        let serving = std::future::IntoFuture::into_future(serving);
        tokio::select! {
            done = serving => done?,
            () = async {
                let _ = has_ended.await;
                tokio::time::sleep(LAST_WORDS).await;
            } => {}
        }
        if engine.load.has_ended.load(Ordering::SeqCst) {
            return Err(ServeError::Fault);
        }
        Ok(())
    })?;
    if let Some(jobs) = of_end {
        jobs.stop();
        jobs.finish(options.drain_timeout.max(Duration::from_secs(10)));
    }
    runtime.shutdown_timeout(Duration::from_secs(1));
    // What the engine still does would be for nobody.
    drop((thread, state_lock));
    Ok(())
}

/// How often it is looked whether the server is to end, or has done all.
const TICK: Duration = Duration::from_millis(50);

/// How long connections have to take what was written to them.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Takes no more requests, and waits for those under way; routes say meanwhile that the server is going down. Who is not done after all that time is told so.
async fn drain(engine: &Engine, patience: Duration) {
    engine.drain();
    let end = Instant::now() + patience;
    while engine.under_way() > 0 && Instant::now() < end {
        if engine.load.has_ended.load(Ordering::SeqCst) {
            return;
        }
        tokio::time::sleep(TICK).await;
    }
    let left = engine.under_way();
    if left > 0 {
        tracing::warn!("{left} requests were not done in time, and are told that the server ends");
        engine.cut();
    }
}

/// Locks the state in a folder of adapters, so that no other server writes there; nothing where it cannot be written to, or its file system has no locks.
fn lock_state(adapters: Option<&Path>) -> Result<Option<Lock>, ServeError> {
    let Some(adapters) = adapters else {
        return Ok(None);
    };
    let state = server::state_folder(adapters);
    let taken = std::fs::create_dir_all(&state).and_then(|()| Lock::attempt(&state.join(".lock")));
    match taken {
        Ok(Attempt::Taken(lock)) => Ok(Some(lock)),
        Ok(Attempt::Unsupported(_)) => Ok(None),
        Ok(Attempt::Busy(process)) => {
            let who = process.map_or(String::new(), |id| format!(" (process {id})"));
            Err(ServeError::Folder(format!(
                "{}: another server{who} has this folder; give each server an --adapter-dir of its own",
                adapters.display()
            )))
        }
        Err(error) => {
            tracing::warn!(
                "{} cannot be written to ({error}), so nothing can be loaded, unloaded, pinned or trained while the server runs",
                adapters.display()
            );
            Ok(None)
        }
    }
}

fn limits(base: &Base, options: &Options) -> Limits {
    let config = base.decoder.config();
    let block = block_bytes(config).max(1);
    let wanted = options.max_num_seqs * config.longest_sequence().div_ceil(BLOCK_ROWS);
    let most = options
        .kv_cache_memory
        .or_else(|| lowrank::machine::available_memory().map(|free| free / 2));
    let blocks = most.map_or(wanted, |most| wanted.min((most / block) as usize));
    Limits {
        running: options.max_num_seqs,
        waiting: options.max_waiting,
        prompt_piece: options.prompt_piece,
        blocks: blocks.max(1),
        train_share: options.train_share,
    }
}
