//! `checkpoints/step-N/`: everything that going on needs, written whole or not at all.
//!
//! A checkpoint holds the adapter as PEFT reads it (LoRA), `training_state.safetensors` with every trained value and both
//! moments of AdamW in f32 (and what is frozen beside them, [`Adapter::initial`]), and `trainer_state.json`. The order of rows, the dropout masks and the learning rate are
//! functions of the seed and the step, so no generator state has to be kept.

use std::fmt;
use std::path::{Path, PathBuf};

use lowrank_formats::atomic;
use lowrank_formats::checkpoint::{Checkpoint, StoredDType, TensorEntry, check_finite};
use lowrank_formats::safetensors_writer::{TensorSpec, write_safetensors};
use lowrank_kernels::{DType, View, engine_name};
use serde::{Deserialize, Serialize};

use super::values::{Kind, Values};
use crate::Error;
use crate::data::Example;
use crate::model::{Adapter, Decoder, Recompute};
use crate::random::{hash, mix};
use crate::settings::{ComputeFormat, TrainConfig};

const STATE: &str = "training_state.safetensors";
const TRAINER: &str = "trainer_state.json";

/// What a run knows beside the trained values.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Optimizer steps taken.
    pub step: u64,
    /// [`Weights::fingerprint`](crate::model::Weights::fingerprint) of the base.
    pub base: String,
    /// The training data.
    pub data: DataMark,
    /// The held-out rows.
    pub valid: DataMark,
    /// Held-out loss before the first step.
    pub first_eval_loss: Option<f64>,
    /// The lowest held-out loss and the step that had it.
    pub best: Option<(f64, u64)>,
    /// Evaluations since the best one.
    pub evaluations_without_best: usize,
    /// What the blocks compute again in the backward, which the memory decided where the settings did not. With a bf16 base
    /// another choice rounds otherwise. Checkpoints of older versions have none.
    #[serde(default)]
    pub recompute: Option<Recompute>,
    /// What computed the last steps. Checkpoints of older versions have none.
    #[serde(default)]
    pub computed: Option<Computed>,
    /// The base in full. Checkpoints of older versions have none.
    #[serde(default)]
    pub base_mark: Option<ModelMark>,
    /// A hash of every tensor of the state, which shows damage. Checkpoints of older versions have none.
    #[serde(default)]
    pub state_hash: Option<String>,
}

/// What decides how sums and factors are rounded, beside the settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Computed {
    /// The processor's kind, as `LOWRANK_CPU` names it.
    pub processor: String,
    /// How it reads the factors of products.
    pub compute_dtype: ComputeFormat,
}

impl Computed {
    /// By this process.
    pub fn here(config: &TrainConfig) -> Self {
        Self {
            processor: engine_name().to_owned(),
            compute_dtype: config.compute_format().here(),
        }
    }
}

impl fmt::Display for Computed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}", self.compute_dtype, self.processor)
    }
}

/// Enough about a base to notice any other in its place, such as one that was trained on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelMark {
    /// The version of this program that made the mark: another may describe the same config.json in another way.
    #[serde(default)]
    pub version: String,
    /// A hash of what config.json decides about the network.
    pub config: String,
    /// [`Decoder::weights_hash`].
    pub weights: String,
}

impl ModelMark {
    /// The mark of a base.
    pub fn of(decoder: &Decoder) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            config: format!(
                "{:016x}",
                hash(format!("{:?}", decoder.config()).as_bytes())
            ),
            weights: decoder.weights_hash().to_owned(),
        }
    }
}

/// Enough about some examples to notice others in their place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataMark {
    /// Number of rows.
    pub rows: usize,
    /// Tokens in all.
    pub tokens: usize,
    /// A hash of every id and of which of them carry loss, in order.
    pub hash: String,
}

impl DataMark {
    /// The mark of some examples.
    pub fn of(examples: &[Example]) -> Self {
        let mut hash = 0;
        for example in examples {
            hash = mix(hash, example.ids.len() as u64);
            for (&id, &supervised) in example.ids.iter().zip(&example.supervised) {
                hash = mix(hash, u64::from(id) << 1 | u64::from(supervised));
            }
        }
        Self {
            rows: examples.len(),
            tokens: examples.iter().map(|example| example.ids.len()).sum(),
            hash: format!("{hash:016x}"),
        }
    }
}

impl TrainerState {
    /// What is of another run than `now`, in words.
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let data = |name: &str, then: &DataMark, now: &DataMark| {
            (then != now).then(|| {
                format!(
                    "the {name} changed since the run began ({} rows and {} tokens then, {} and {} now)",
                    then.rows, then.tokens, now.rows, now.tokens
                )
            })
        };
        let data = [
            data("training data", &self.data, &now.data),
            data("held-out data", &self.valid, &now.valid),
        ];
        let base = self.other_base(now);
        base.into_iter().chain(data.into_iter().flatten()).collect()
    }

    /// How the base of `now` is another, if it is. A mark that either side lacks says nothing.
    fn other_base(&self, now: &Self) -> Option<String> {
        if self.base != now.base {
            return Some(format!(
                "this is another base than the run began with (fingerprint {} then, {} now)",
                self.base, now.base
            ));
        }
        let (then, now) = (self.base_mark.as_ref()?, now.base_mark.as_ref()?);
        let other_config = then.version == now.version && then.config != now.config;
        let what = match (other_config, then.weights != now.weights) {
            (false, false) => return None,
            (true, false) => "its config.json says otherwise",
            (false, true) => "its weights differ",
            (true, true) => "its config.json and its weights differ",
        };
        Some(format!(
            "this is another base than the run began with: {what}"
        ))
    }
}

/// Writes `checkpoints/step-N` on rank 0, whose state gets its hash. `write_adapter` adds the method's own files.
///
/// # Errors
/// A file can't be written; an earlier checkpoint is then intact.
pub(super) fn write(
    run: &Path,
    values: &Values<'_>,
    state: &TrainerState,
    write_adapter: impl FnOnce(&Path) -> Result<(), Error>,
) -> Result<PathBuf, Error> {
    let checkpoints = run.join("checkpoints");
    std::fs::create_dir_all(&checkpoints).map_err(Error::io(&checkpoints))?;
    let folder = step_folder(run, state.step);
    atomic::write_folder(&folder, true, |temporary| -> Result<(), Error> {
        write_adapter(temporary)?;
        let (adapter, all) = (values.adapter, Kind::all_of(values.adapter));
        let specs: Vec<_> = all
            .iter()
            .map(|(kind, slot)| {
                let (rows, cols) = adapter.params.shape(*slot);
                TensorSpec {
                    name: key(*kind, &adapter.names[*slot]),
                    dtype: StoredDType::F32,
                    shape: vec![rows, cols],
                }
            })
            .collect();
        // The file's order is the writer's own.
        let mut hashes = vec![0; specs.len()];
        write_safetensors(
            &temporary.join(STATE),
            &specs,
            &std::collections::BTreeMap::new(),
            |index, out| {
                let (kind, slot) = all[index];
                let values = values.slot(kind, slot);
                let values = values.map_err(std::io::Error::other)?;
                let bytes = View::of_row(&values).to_le_bytes(DType::F32);
                hashes[index] = hash(&bytes);
                out.write_all(&bytes)
            },
        )?;
        let state = TrainerState {
            state_hash: Some(format!("{:016x}", hashes.into_iter().fold(0, mix))),
            ..state.clone()
        };
        atomic::write_file(&temporary.join(TRAINER), |out| {
            Ok(serde_json::to_writer_pretty(out, &state)?)
        })?;
        Ok(())
    })?;
    Ok(folder)
}

/// The name of a slot's values in a checkpoint.
fn key(kind: Kind, name: &str) -> String {
    format!("{}.{name}", kind.name())
}

/// A checkpoint that was opened, and whose values are all there and as they were written.
#[derive(Debug)]
pub struct Opened {
    /// What it knows beside them.
    pub state: TrainerState,
    file: Checkpoint,
    /// Names and shapes of the trained values.
    slots: Vec<(String, [usize; 2])>,
}

impl Opened {
    /// Opens a checkpoint of these trained values, and looks whether everything is there.
    ///
    /// # Errors
    /// Files that are missing, damaged, or of another run.
    pub fn open(folder: &Path, adapter: &Adapter) -> Result<Self, Error> {
        let state = read_state(folder)?;
        let file = open_whole(folder, &state, adapter)?;
        let shape = |slot| <[usize; 2]>::from(adapter.params.shape(slot));
        let names = adapter.names.iter().cloned().enumerate();
        let opened = Self {
            state,
            file,
            slots: names.map(|(slot, name)| (name, shape(slot))).collect(),
        };
        let mut problems = Vec::new();
        for (kind, slot) in Kind::all_of(adapter) {
            if opened.entry(kind, slot).is_none() {
                let key = key(kind, &adapter.names[slot]);
                problems.push(format!("{key}: missing or of another shape"));
            }
        }
        if problems.is_empty() {
            Ok(opened)
        } else {
            Err(Error::Tensors {
                path: opened.file.path().to_path_buf(),
                problems,
            })
        }
    }

    fn entry(&self, kind: Kind, slot: usize) -> Option<TensorEntry> {
        let (name, shape) = &self.slots[slot];
        self.file
            .get(&key(kind, name))
            .filter(|entry| entry.shape == shape && entry.dtype == StoredDType::F32)
    }

    /// The values of a slot.
    ///
    /// # Errors
    /// A file that was damaged after it was opened.
    pub fn values(&self, kind: Kind, slot: usize) -> Result<Vec<f32>, Error> {
        match self.entry(kind, slot) {
            Some(entry) => Ok(entry.to_f32()?),
            None => Err(Error::Training(format!(
                "{}: it lacks {}",
                self.file.path().display(),
                key(kind, &self.slots[slot].0)
            ))),
        }
    }
}

/// What a checkpoint knows beside the trained values.
///
/// # Errors
/// A file that is missing or damaged, or that is of another step than its folder.
pub fn read_state(folder: &Path) -> Result<TrainerState, Error> {
    let path = folder.join(TRAINER);
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let state: TrainerState = serde_json::from_str(&text)
        .map_err(|error| Error::Training(format!("{}: {error}", path.display())))?;
    let named = name_of(folder);
    if named != format!("step-{}", state.step) {
        return Err(Error::Training(format!(
            "{}: it is of step {}, and the folder is called {named}",
            path.display(),
            state.step
        )));
    }
    Ok(state)
}

/// Opens the newest checkpoint that can be read. `check` refuses those of another run, and with them to go on. Newer
/// ones, which are damaged or of a step after `total_steps`, are renamed to `damaged-step-N`, and `warn` is told of each: left in
/// place, they would be counted as the newest again.
///
/// # Errors
/// There are checkpoints, and none can be read; what `check` says.
pub fn open_newest(
    run: &Path,
    adapter: &Adapter,
    total_steps: u64,
    check: impl Fn(&TrainerState) -> Result<(), Error>,
    mut warn: impl FnMut(String),
) -> Result<Option<Opened>, Error> {
    let mut damaged: Vec<(PathBuf, Error)> = Vec::new();
    for step in steps(run).into_iter().rev() {
        let folder = step_folder(run, step);
        let found = match read_state(&folder) {
            Ok(state) => {
                check(&state)?;
                if state.step > total_steps {
                    Err(Error::Training(format!(
                        "it is of step {}, and the run has {total_steps}",
                        state.step
                    )))
                } else {
                    Opened::open(&folder, adapter)
                }
            }
            Err(error) => Err(error),
        };
        match found {
            Ok(opened) => {
                for (folder, error) in damaged {
                    let now = match move_aside(&folder) {
                        Ok(aside) => format!("moved to {}", aside.display()),
                        Err(error) => format!("left where it is ({error})"),
                    };
                    warn(format!(
                        "warning: the checkpoint {} cannot be used and is {now}: {error}",
                        folder.display()
                    ));
                }
                return Ok(Some(opened));
            }
            Err(error) => damaged.push((folder, error)),
        }
    }
    match damaged.into_iter().next() {
        None => Ok(None),
        Some((folder, error)) => Err(Error::Training(format!(
            "no checkpoint of {} can be used; the newest, {}: {error}; to begin again, delete {}",
            run.display(),
            name_of(&folder),
            run.join("checkpoints").display()
        ))),
    }
}

fn move_aside(folder: &Path) -> std::io::Result<PathBuf> {
    let aside = folder.with_file_name(format!("damaged-{}", name_of(folder)));
    drop(std::fs::remove_dir_all(&aside));
    std::fs::rename(folder, &aside)?;
    Ok(aside)
}

fn name_of(folder: &Path) -> String {
    let name = folder.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Opens the state's tensors, and looks whether they are as they were written and are numbers.
fn open_whole(folder: &Path, state: &TrainerState, adapter: &Adapter) -> Result<Checkpoint, Error> {
    let path = folder.join(STATE);
    let file = Checkpoint::open(&path)?;
    let all = Kind::all_of(adapter);
    let keys = all
        .iter()
        .map(|(kind, slot)| key(*kind, &adapter.names[*slot]));
    // One that is missing is named by whoever reads it.
    let entries: Vec<_> = keys.filter_map(|key| file.get(&key)).collect();
    if let Some(written) = &state.state_hash
        && entries.len() == all.len()
    {
        let sum = entries
            .iter()
            .fold(0, |sum, entry| mix(sum, hash(entry.bytes.as_ref())));
        if *written != format!("{sum:016x}") {
            return Err(Error::Training(format!(
                "{}: its values are not those that were written (hash {written} then, {sum:016x} now)",
                path.display()
            )));
        }
    }
    check_finite(&entries)?;
    Ok(file)
}

/// Whether a run's folder or a checkpoint holds an adapter's files.
pub fn has_adapter(folder: &Path) -> bool {
    folder.join("adapter_config.json").is_file()
}

/// The folder of a step's checkpoint.
pub fn step_folder(run: &Path, step: u64) -> PathBuf {
    run.join("checkpoints").join(format!("step-{step}"))
}

/// The steps that have a checkpoint, ascending.
pub fn steps(run: &Path) -> Vec<u64> {
    let Ok(entries) = std::fs::read_dir(run.join("checkpoints")) else {
        return Vec::new();
    };
    let mut steps: Vec<u64> = entries
        .flatten()
        .filter_map(|entry| {
            entry
                .file_name()
                .to_str()?
                .strip_prefix("step-")?
                .parse()
                .ok()
        })
        .collect();
    steps.sort_unstable();
    steps
}

/// Deletes the half-written checkpoints that a killed run left behind. One that can't be deleted does no harm.
pub fn sweep(run: &Path) {
    let Ok(entries) = std::fs::read_dir(run.join("checkpoints")) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.to_str().is_some_and(|name| name.starts_with(".step-")) {
            drop(std::fs::remove_dir_all(entry.path()));
        }
    }
}

/// Deletes the oldest checkpoints over `limit`, never the newest and never `keep`.
///
/// # Errors
/// A folder can't be deleted.
pub fn prune(run: &Path, limit: usize, keep: Option<u64>) -> Result<(), Error> {
    let steps = steps(run);
    let mut surplus = steps.len().saturating_sub(limit.max(1));
    for step in steps.iter().take(steps.len().saturating_sub(1)) {
        if surplus == 0 {
            break;
        }
        if Some(*step) == keep {
            continue;
        }
        let folder = step_folder(run, *step);
        std::fs::remove_dir_all(&folder).map_err(Error::io(&folder))?;
        surplus -= 1;
    }
    Ok(())
}
