//! Adapters by name: where their files are, which of them are in memory, and who uses them.
//!
//! A name means a folder and a generation. Loading a folder again under its name makes a new generation; requests under way keep the one that
//! they began with. Values are in memory from their first use until others need the room. Files with the same content are held once, whatever
//! their names. The registry is a small file in the folder of adapters, written whole, and a server that starts again has the names of the one before.

mod file;

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::SystemTime;

use axum::http::StatusCode;
use lowrank::model::{Adapter, Decoder, LinearId, Part, WeightId};
use lowrank::tuning::{self, Loaded};
use serde::Serialize;

use crate::error::ApiError;
use crate::objects::{now, unix};
use crate::sync::{blocking, lock};
use file::SavedAdapter;

/// The files of an adapter that are read.
const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// An adapter's values in memory.
pub(crate) struct Resident {
    pub(crate) adapter: Arc<Adapter>,
    /// No other values of this process have it.
    pub(crate) number: u64,
    pub(crate) method: String,
    pub(crate) rank: Option<usize>,
    pub(crate) coverage: String,
    pub(crate) bytes: u64,
    pub(crate) relative_change: Option<f64>,
    content: u64,
}

/// The use of an adapter by a request, until it is dropped.
pub(crate) struct Lease {
    pub(crate) resident: Arc<Resident>,
    pub(crate) name: Arc<str>,
    entry: Arc<Entry>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.entry.running.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Default)]
struct Entry {
    running: AtomicUsize,
    requests: AtomicUsize,
    state: Mutex<State>,
    /// Held by whoever loads.
    loading: tokio::sync::Mutex<()>,
}

#[derive(Clone, Default)]
struct State {
    path: PathBuf,
    generation: u64,
    pinned: bool,
    resident: Option<Arc<Resident>>,
    /// Content of the generation, which is a new one when the files have changed.
    content: Option<u64>,
    last_used: Option<SystemTime>,
    created: u64,
    error: Option<String>,
    /// Its name was forgotten, so that whoever still loads it does not bring the name back.
    is_gone: bool,
    /// It was named at the start, so its files may be anywhere.
    is_anywhere: bool,
}

/// What is told of an adapter.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct About {
    pub(crate) id: String,
    pub(crate) generation: u64,
    pub(crate) created: u64,
    pub(crate) method: Option<String>,
    pub(crate) rank: Option<usize>,
    pub(crate) coverage: Option<String>,
    pub(crate) relative_change: Option<f64>,
    pub(crate) bytes: Option<u64>,
    pub(crate) resident: bool,
    pub(crate) pinned: bool,
    pub(crate) last_used: Option<u64>,
    pub(crate) requests: usize,
    pub(crate) running: usize,
    pub(crate) error: Option<String>,
}

/// All adapters of a server.
pub(crate) struct Registry {
    decoder: Arc<Decoder>,
    fingerprint: String,
    base: String,
    /// The folder that adapters may be loaded from while the server runs.
    folder: Option<PathBuf>,
    /// Bytes of values that stay in memory beside those in use.
    memory: Option<u64>,
    entries: Mutex<BTreeMap<Arc<str>, Arc<Entry>>>,
    /// Values by content, as long as somebody has them.
    contents: Mutex<HashMap<u64, Vec<Weak<Resident>>>>,
    numbers: AtomicUsize,
    /// ‖W‖² of the base's linears.
    squares: Mutex<HashMap<LinearId, f64>>,
    /// Held while the file is written.
    saving: Mutex<()>,
}

impl Registry {
    /// An empty registry for a base of this name; with a folder, the names that its file has.
    ///
    /// # Errors
    /// A folder or a file in it that cannot be read.
    pub(crate) fn open(
        decoder: Arc<Decoder>,
        base: &str,
        folder: Option<&Path>,
        memory: Option<u64>,
    ) -> Result<Self, String> {
        let folder = match folder {
            Some(folder) => Some(
                folder
                    .canonicalize()
                    .map_err(|error| format!("{}: {error}", folder.display()))?,
            ),
            None => None,
        };
        let fingerprint = decoder.weights().fingerprint();
        let registry = Self {
            decoder,
            fingerprint,
            base: base.to_owned(),
            folder,
            memory,
            entries: Mutex::default(),
            contents: Mutex::default(),
            numbers: AtomicUsize::new(1),
            squares: Mutex::default(),
            saving: Mutex::default(),
        };
        let saved = registry.folder.as_deref().map(file::read).transpose()?;
        for (name, saved) in saved.unwrap_or_default() {
            let entry = Entry::default();
            *lock(&entry.state) = State {
                path: saved.path,
                generation: saved.generation,
                pinned: saved.pinned,
                created: saved.created,
                content: saved
                    .content
                    .and_then(|content| u64::from_str_radix(&content, 16).ok()),
                ..State::default()
            };
            lock(&registry.entries).insert(name.into(), Arc::new(entry));
        }
        Ok(registry)
    }

    /// The folder of adapters.
    pub(crate) fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// Takes in an adapter that was named at the start, wherever its files are, and loads it.
    pub(crate) fn add(&self, name: &str, path: &Path) -> Result<(), ApiError> {
        self.check_name(name)?;
        let path = path
            .canonicalize()
            .map_err(|error| bad_adapter(format!("{}: {error}", path.display())))?;
        let resident = self.read(&path)?;
        let entry = self.entry_or_new(name);
        install(&entry, path, resident);
        lock(&entry.state).is_anywhere = true;
        self.save_if_possible();
        Ok(())
    }

    /// Forgets the names of an earlier start whose files are gone, or elsewhere and that were not named again.
    pub(crate) fn forget_elsewhere(&self) {
        lock(&self.entries).retain(|_, entry| {
            let state = lock(&entry.state);
            let folder = self.folder.as_ref();
            let is_inside = folder.is_some_and(|folder| state.path.starts_with(folder));
            state.is_anywhere || is_inside && state.path.join(FILES[0]).exists()
        });
    }

    /// `/v1/load_lora_adapter`: loads a folder of the adapters' folder under a name.
    pub(crate) async fn load(
        self: &Arc<Self>,
        name: &str,
        path: &str,
        in_place: bool,
        expected_generation: Option<u64>,
    ) -> Result<About, ApiError> {
        self.check_name(name)?;
        let path = self.path_inside(path)?;
        let known = lock(&self.entries).get(name).cloned();
        let entry = match known {
            Some(entry) => {
                let state = lock(&entry.state).clone();
                if let Some(expected) = expected_generation
                    && state.generation != expected
                {
                    return Err(ApiError::new(
                        StatusCode::CONFLICT,
                        "generation_conflict",
                        format!(
                            "the adapter {name:?} is of generation {}, not {expected}",
                            state.generation
                        ),
                    ));
                }
                if !in_place && state.resident.is_some() {
                    return Err(ApiError::bad_request(
                        "lora_adapter_already_loaded",
                        format!(
                            "the adapter {name:?} is loaded; set load_inplace to replace it, or unload it first"
                        ),
                    ));
                }
                entry
            }
            None => Arc::new(Entry::default()),
        };
        let Ok(_loading) = entry.loading.try_lock() else {
            return Err(ApiError::busy(
                "lora_load_busy",
                format!("the adapter {name:?} is being loaded"),
                1,
            ));
        };
        let (registry, from) = (Arc::clone(self), path.clone());
        let resident = blocking(move || registry.read(&from)).await?;
        // It is known from here on, so a folder that cannot be used leaves no trace.
        let entry = {
            let mut entries = lock(&self.entries);
            Arc::clone(
                entries
                    .entry(name.into())
                    .or_insert_with(|| Arc::clone(&entry)),
            )
        };
        let before = lock(&entry.state).clone();
        install(&entry, path, resident);
        {
            let mut state = lock(&entry.state);
            state.is_gone = false;
            state.is_anywhere = false;
        }
        if let Err(error) = self.save() {
            let is_new = before.generation == 0;
            *lock(&entry.state) = before;
            if is_new {
                lock(&self.entries).remove(name);
            }
            return Err(error);
        }
        self.make_room(None);
        Ok(about(name, &entry))
    }

    /// `/v1/unload_lora_adapter`: forgets a name. Requests under way keep their values; the prompts that were kept for it are named by the number
    /// that comes back.
    pub(crate) fn unload(&self, name: &str) -> Result<Option<u64>, ApiError> {
        let Some(entry) = lock(&self.entries).remove(name) else {
            return Err(no_adapter(name));
        };
        let before = lock(&entry.state).clone();
        let number = {
            let mut state = lock(&entry.state);
            state.is_gone = true;
            state.resident.take().map(|resident| resident.number)
        };
        if let Err(error) = self.save() {
            *lock(&entry.state) = before;
            lock(&self.entries).insert(name.into(), entry);
            return Err(error);
        }
        Ok(number)
    }

    /// Keeps an adapter's values in memory, to which they are brought, or no longer.
    pub(crate) async fn pin(self: &Arc<Self>, name: &str, pinned: bool) -> Result<About, ApiError> {
        if pinned {
            let lease = self.lease(name).await;
            drop(lease.map_err(|error| match error.code {
                "model_not_found" => no_adapter(name),
                _ => error,
            })?);
        }
        let entry = lock(&self.entries).get(name).cloned();
        let entry = entry.ok_or_else(|| no_adapter(name))?;
        let before = std::mem::replace(&mut lock(&entry.state).pinned, pinned);
        if let Err(error) = self.save() {
            lock(&entry.state).pinned = before;
            return Err(error);
        }
        self.make_room(None);
        Ok(about(name, &entry))
    }

    /// Brings to memory what was pinned when the server before ended. What cannot be read is told, and is no reason not to start.
    pub(crate) fn load_pinned(&self) {
        let entries = lock(&self.entries).clone();
        for (name, entry) in entries {
            let State {
                path,
                pinned,
                resident,
                ..
            } = lock(&entry.state).clone();
            if !pinned || resident.is_some() {
                continue;
            }
            match self.check_inside(&path).and_then(|()| self.read(&path)) {
                Ok(resident) => drop(install(&entry, path, resident)),
                Err(error) => {
                    tracing::warn!("the pinned adapter {name} is not loaded: {}", error.message);
                    lock(&entry.state).error = Some(error.message);
                }
            }
        }
    }

    /// The adapter of a name for one request: as it is in memory, or from its files; one that was never named is looked for in the folder.
    pub(crate) async fn lease(self: &Arc<Self>, name: &str) -> Result<Lease, ApiError> {
        if let Some(lease) = self.lease_resident(name) {
            return Ok(lease);
        }
        let known = lock(&self.entries).get_key_value(name).map(pair);
        let (name, entry) = match known {
            Some(known) => known,
            None => self.discover(name)?,
        };
        let loading = Arc::clone(&entry);
        let _loading = loading.loading.lock().await;
        // Somebody else may have loaded it in the meantime.
        if let Some(lease) = self.lease_resident(&name) {
            return Ok(lease);
        }
        let State {
            path, is_anywhere, ..
        } = lock(&entry.state).clone();
        let (registry, from, asked) = (Arc::clone(self), path.clone(), Arc::clone(&name));
        let read = move || {
            if !is_anywhere {
                registry.check_inside(&from)?;
            }
            if !from.exists() {
                return Err(ApiError::no_model(&asked, &registry.base));
            }
            registry.read(&from)
        };
        let resident = match blocking(read).await {
            Ok(resident) => resident,
            Err(error) => {
                lock(&entry.state).error = Some(error.message.clone());
                return Err(error);
            }
        };
        let mut is_new = install(&entry, path, Arc::clone(&resident));
        if !lock(&entry.state).is_gone {
            let mut entries = lock(&self.entries);
            is_new |= !entries.contains_key(&name);
            let known = entries.entry(Arc::clone(&name));
            known.or_insert_with(|| Arc::clone(&entry));
        }
        if is_new {
            let registry = Arc::clone(self);
            blocking(move || {
                registry.save_if_possible();
                Ok(())
            })
            .await?;
        }
        self.make_room(Some(&name));
        Ok(Lease::new(name, entry, resident))
    }

    fn lease_resident(&self, name: &str) -> Option<Lease> {
        let (name, entry) = lock(&self.entries).get_key_value(name).map(pair)?;
        let resident = lock(&entry.state).resident.clone()?;
        Some(Lease::new(name, entry, resident))
    }

    /// Every adapter, those among them that lie in the folder and were not asked for yet.
    pub(crate) fn offered(&self) -> Vec<About> {
        let mut all = self.list();
        let found = self.folder.as_ref().map(std::fs::read_dir);
        for file in found.into_iter().flatten().flatten().flatten() {
            let Ok(name) = file.file_name().into_string() else {
                continue;
            };
            if lock(&self.entries).contains_key(name.as_str()) {
                continue;
            }
            if let Ok((name, entry)) = self.discover(&name) {
                all.push(about(&name, &entry));
            }
        }
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all
    }

    /// Every adapter that is known.
    pub(crate) fn list(&self) -> Vec<About> {
        let entries = lock(&self.entries).clone();
        let all = entries.iter();
        all.map(|(name, entry)| about(name, entry)).collect()
    }

    /// One adapter of [`offered`](Self::offered).
    pub(crate) fn get(&self, name: &str) -> Option<About> {
        let known = lock(&self.entries).get_key_value(name).map(pair);
        let (name, entry) = known.or_else(|| self.discover(name).ok())?;
        Some(about(&name, &entry))
    }

    /// Where the files of an adapter are.
    pub(crate) fn path_of(&self, name: &str) -> Option<PathBuf> {
        let entry = lock(&self.entries).get(name).cloned()?;
        let path = lock(&entry.state).path.clone();
        Some(path)
    }

    /// Bytes of all values in memory, each content once.
    pub(crate) fn bytes(&self) -> u64 {
        let contents = lock(&self.contents);
        let held = contents.values().flatten().filter_map(Weak::upgrade);
        held.map(|resident| resident.bytes).sum()
    }

    /// The limit of [`bytes`](Self::bytes).
    pub(crate) fn memory(&self) -> Option<u64> {
        self.memory
    }

    /// Makes a name known whose folder is there, and nothing more: it is loaded at its first use.
    fn discover(&self, name: &str) -> Result<(Arc<str>, Arc<Entry>), ApiError> {
        let missing = || ApiError::no_model(name, &self.base);
        if self.folder.is_none() {
            return Err(missing());
        }
        let named = self.check_name(name);
        let is_one_part = matches!(
            Path::new(name).components().collect::<Vec<_>>()[..],
            [Component::Normal(part)] if part == name
        );
        if named.is_err() && !is_one_part {
            return Err(missing());
        }
        let path = self.path_inside(name).map_err(|error| match error.code {
            "adapter_path_forbidden" => error,
            _ => missing(),
        })?;
        if !path.join(FILES[0]).is_file() {
            return Err(missing());
        }
        // There is such an adapter, and no request can have it.
        named.map_err(|error| ApiError {
            param: Some("model".to_owned()),
            ..error
        })?;
        let entry = Entry::default();
        {
            let mut state = lock(&entry.state);
            let written = std::fs::metadata(path.join(FILES[0])).and_then(|file| file.modified());
            state.created = written.map_or(0, unix);
            state.path = path;
        }
        Ok((name.into(), Arc::new(entry)))
    }

    fn check_name(&self, name: &str) -> Result<(), ApiError> {
        let is_plain = |c: char| c.is_alphanumeric() || "-_.:@".contains(c);
        let wrong = if name == self.base {
            "it is the base's name"
        } else if name.is_empty() || name.len() > 200 {
            "a name has 1 to 200 bytes"
        } else if !name.chars().all(is_plain) || name.starts_with('.') {
            "a name has letters, digits and -_.:@, and begins with no dot"
        } else {
            return Ok(());
        };
        Err(ApiError::invalid(
            "lora_name",
            format!("an adapter cannot be called {name:?}: {wrong}"),
        ))
    }

    /// A path that lies inside the folder of adapters, links followed.
    fn path_inside(&self, path: &str) -> Result<PathBuf, ApiError> {
        let forbidden = |why: &str| {
            Err(ApiError {
                param: Some("lora_path".to_owned()),
                ..ApiError::new(
                    StatusCode::FORBIDDEN,
                    "adapter_path_forbidden",
                    format!("the path {path:?} cannot be used: {why}"),
                )
            })
        };
        let Some(folder) = &self.folder else {
            return forbidden(
                "the server was started without --adapter-dir, so nothing is loaded while it runs",
            );
        };
        let given = Path::new(path);
        if given.components().any(|part| part == Component::ParentDir) {
            return forbidden("it has ..");
        }
        if given.is_absolute() && !given.starts_with(folder) {
            // Whether there is something is nobody's business.
            return forbidden("it lies outside of the folder of adapters");
        }
        let whole = folder.join(given);
        let Ok(real) = whole.canonicalize() else {
            return Err(ApiError {
                param: Some("lora_path".to_owned()),
                ..ApiError::not_found(
                    "lora_adapter_not_found",
                    format!("there is no folder {path:?} in the folder of adapters"),
                )
            });
        };
        if real == *folder {
            return forbidden("it is the folder of adapters itself");
        }
        if self.check_inside(&real).is_err() {
            return forbidden("it or a file in it lies outside of the folder of adapters");
        }
        Ok(real)
    }

    /// Refuses a folder that a link leads out of the folder of adapters, or that has such files.
    fn check_inside(&self, path: &Path) -> Result<(), ApiError> {
        let files = FILES.iter().map(|name| path.join(name));
        let mut all = std::iter::once(path.to_path_buf()).chain(files);
        let leaves = |path: PathBuf| match (path.canonicalize(), &self.folder) {
            (Ok(real), Some(folder)) => !real.starts_with(folder),
            // What is not there is told by whoever reads it.
            _ => false,
        };
        if !all.any(leaves) {
            return Ok(());
        }
        Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "adapter_path_forbidden",
            "the adapter's files lie outside of the folder of adapters",
        ))
    }

    /// Reads a folder, or takes values of the same content that are in memory.
    fn read(&self, path: &Path) -> Result<Arc<Resident>, ApiError> {
        let content = content_of(path)?;
        let find = |registry: &Self| {
            let contents = lock(&registry.contents);
            let known = contents.get(&content);
            known.and_then(|known| known.iter().find_map(Weak::upgrade))
        };
        if let Some(known) = find(self) {
            return Ok(known);
        }
        let loaded = tuning::load(path, self.decoder.config())
            .map_err(|error| bad_adapter(without_folder(&error.to_string(), path)))?;
        self.check(&loaded)?;
        if content_of(path)? != content {
            return Err(bad_adapter(
                "its files changed while they were read; try again".to_owned(),
            ));
        }
        let Loaded {
            adapter,
            config,
            coverage,
            ..
        } = loaded;
        let resident = Arc::new(Resident {
            number: self.numbers.fetch_add(1, Ordering::SeqCst) as u64,
            method: config.method().name().to_owned(),
            rank: adapter.largest_rank(),
            coverage,
            bytes: 4 * adapter.params.len() as u64,
            relative_change: self.relative_change(&adapter),
            adapter: Arc::new(adapter),
            content,
        });
        let mut contents = lock(&self.contents);
        contents.retain(|_, known| {
            known.retain(|one| one.strong_count() > 0);
            !known.is_empty()
        });
        let known = contents.entry(resident.content).or_default();
        known.push(Arc::downgrade(&resident));
        Ok(resident)
    }

    /// Refuses what would be served and do something else than its name says.
    fn check(&self, loaded: &Loaded) -> Result<(), ApiError> {
        if let Some(recorded) = &loaded.base_fingerprint
            && *recorded != self.fingerprint
        {
            return Err(ApiError::bad_request(
                "adapter_of_other_base",
                format!(
                    "the adapter was trained on another model than {}: it fits in shape alone",
                    self.base
                ),
            ));
        }
        if loaded.adapter.does_nothing() {
            return Err(ApiError::bad_request(
                "adapter_does_nothing",
                "the adapter changes nothing: all of its B are zero, or it has no module of the model",
            ));
        }
        Ok(())
    }

    /// ‖ΔW‖/‖W‖ over all linears that have branches.
    fn relative_change(&self, adapter: &Adapter) -> Option<f64> {
        let (mut changed, mut whole) = (0.0, 0.0);
        let mut squares = lock(&self.squares);
        for (linear, square) in adapter.squared_changes() {
            changed += square;
            whole += *squares.entry(linear).or_insert_with(|| {
                let weight = WeightId::Linear(linear, Part::Weight);
                let values = self.decoder.weights().view(weight).to_vec();
                values.iter().map(|x| f64::from(*x).powi(2)).sum()
            });
        }
        (whole > 0.0).then(|| (changed / whole).sqrt())
    }

    fn entry_or_new(&self, name: &str) -> Arc<Entry> {
        let mut entries = lock(&self.entries);
        Arc::clone(entries.entry(name.into()).or_default())
    }

    /// Gives up values that were used longest ago until the limit holds; those that are pinned, in use, or `but` stay.
    fn make_room(&self, but: Option<&str>) {
        let Some(limit) = self.memory else { return };
        while self.bytes() > limit {
            let entries = lock(&self.entries);
            let oldest = entries
                .iter()
                .filter(|(name, entry)| {
                    Some(&***name) != but && entry.running.load(Ordering::SeqCst) == 0
                })
                .filter_map(|(_, entry)| {
                    let state = lock(&entry.state);
                    let may_go = state.resident.is_some() && !state.pinned;
                    may_go.then(|| (state.last_used, Arc::clone(entry)))
                })
                .min_by_key(|(last_used, _)| *last_used);
            let Some((_, entry)) = oldest else { return };
            lock(&entry.state).resident = None;
            metrics::counter!("lowrank_adapters_evicted_total").increment(1);
        }
    }

    /// Saves what a request or the start has found out; a folder that cannot be written to is no reason to refuse either.
    fn save_if_possible(&self) {
        // Its log has it.
        drop(self.save());
    }

    fn save(&self) -> Result<(), ApiError> {
        let Some(folder) = &self.folder else {
            return Ok(());
        };
        let _saving = lock(&self.saving);
        let entries = lock(&self.entries).clone();
        let adapters = entries
            .iter()
            .map(|(name, entry)| {
                let state = lock(&entry.state);
                let inside = state.path.strip_prefix(folder);
                let saved = SavedAdapter {
                    path: inside.unwrap_or(&state.path).to_path_buf(),
                    generation: state.generation,
                    pinned: state.pinned,
                    created: state.created,
                    content: state.content.map(|content| format!("{content:016x}")),
                };
                (name.to_string(), saved)
            })
            .collect();
        file::write(folder, adapters)
    }
}

impl Lease {
    fn new(name: Arc<str>, entry: Arc<Entry>, resident: Arc<Resident>) -> Self {
        entry.running.fetch_add(1, Ordering::SeqCst);
        entry.requests.fetch_add(1, Ordering::Relaxed);
        lock(&entry.state).last_used = Some(SystemTime::now());
        Self {
            resident,
            name,
            entry,
        }
    }
}

/// Gives an entry its values; they are a new generation where their content is new, which is what it says.
fn install(entry: &Entry, path: PathBuf, resident: Arc<Resident>) -> bool {
    let mut state = lock(&entry.state);
    let is_new = state.content != Some(resident.content);
    if is_new {
        state.generation += 1;
        state.content = Some(resident.content);
        state.created = now();
    }
    state.path = path;
    state.resident = Some(resident);
    state.error = None;
    state.last_used = Some(SystemTime::now());
    is_new
}

fn pair(known: (&Arc<str>, &Arc<Entry>)) -> (Arc<str>, Arc<Entry>) {
    (Arc::clone(known.0), Arc::clone(known.1))
}

fn about(name: &str, entry: &Entry) -> About {
    let state = lock(&entry.state).clone();
    let resident = state.resident.as_deref();
    About {
        id: name.to_owned(),
        generation: state.generation,
        created: state.created,
        method: resident.map(|one| one.method.clone()),
        rank: resident.and_then(|one| one.rank),
        coverage: resident.map(|one| one.coverage.clone()),
        relative_change: resident.and_then(|one| one.relative_change),
        bytes: resident.map(|one| one.bytes),
        resident: resident.is_some(),
        pinned: state.pinned,
        last_used: state.last_used.map(unix),
        requests: entry.requests.load(Ordering::Relaxed),
        running: entry.running.load(Ordering::SeqCst),
        error: state.error,
    }
}

fn no_adapter(name: &str) -> ApiError {
    ApiError {
        param: Some("lora_name".to_owned()),
        ..ApiError::not_found(
            "lora_adapter_not_found",
            format!("there is no adapter {name:?}; GET /v1/models lists them"),
        )
    }
}

fn bad_adapter(message: String) -> ApiError {
    ApiError::bad_request("invalid_lora_adapter", message)
}

/// A message about files of a folder, without where the server keeps that.
fn without_folder(message: &str, folder: &Path) -> String {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    message.replace(&folder.display().to_string(), &name)
}

/// A mark of what the two files of an adapter hold.
fn content_of(path: &Path) -> Result<u64, ApiError> {
    let mut hasher = DefaultHasher::new();
    for name in FILES {
        // Others may keep whoever reads them waiting for ever.
        if std::fs::metadata(path.join(name)).is_ok_and(|file| !file.is_file()) {
            return Err(bad_adapter(format!("{name}: it is no regular file")));
        }
        match std::fs::read(path.join(name)) {
            Ok(bytes) => (name, bytes).hash(&mut hasher),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(bad_adapter(format!("{name}: {error}"))),
        }
    }
    Ok(hasher.finish())
}
