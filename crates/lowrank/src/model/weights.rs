//! The base's tensors: read from a folder, checked against the config, mapped in place where the storage fits.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, Write};
use std::path::Path;
use std::sync::OnceLock;

use lowrank_formats::SharedBytes;
use lowrank_formats::checkpoint::StoredDType;
use lowrank_formats::hf_config::HfConfig;
use lowrank_formats::safetensors_writer::{TensorSpec, write_safetensors};
use lowrank_kernels::{DType, Layout, NumberFormat, Tensor, View, fill_normal};
use rayon::prelude::*;

use super::adapter::Adapter;
use super::config::{Family, LinearKind, ModelConfig, Part, Purpose, WeightId};
use super::families;
use super::load_in::LoadIn;
use super::magnitude::BaseSquares;
use super::stage::Stage;
use super::stored::{StoredTensor, StoredTensors, check_all_finite};
use crate::Error;
use crate::random::{hash, mix};

/// Every tensor of a base model. Matrices are stored as `base_dtype`, vectors always as f32.
pub struct Weights {
    config: ModelConfig,
    /// The part of the model that is here; tensors of other parts are not.
    stage: Stage,
    tensors: HashMap<WeightId, Tensor>,
    dtype: DType,
    /// Where in a mapped file tensors lie.
    mapped: Vec<SharedBytes>,
    /// Tensors of the classifier that the checkpoint lacks, or has for another number of labels.
    new: Vec<WeightId>,
    /// How many labels the checkpoint's classifier has, where that is another number.
    other_labels: Option<usize>,
    /// The fingerprint of the whole checkpoint as it was read, where only a stage of it is here.
    checkpoint_fingerprint: Option<String>,
    /// That of the whole model as it is trained.
    whole_fingerprint: OnceLock<String>,
    /// ‖wᵢ‖² of linears, for adapters with magnitudes.
    pub(super) squares: BaseSquares,
}

/// For each tensor of a model, numbers that show what its values are; none for one that is not here.
pub(crate) type TensorMarks = Vec<Option<Vec<u64>>>;

impl Weights {
    /// Reads a Hugging Face folder. A tensor whose stored type is `dtype` is used where it is mapped; another is converted,
    /// and its file pages are given back.
    ///
    /// # Errors
    /// An unsupported config, a missing or damaged file, tensors that are missing or of another shape (all of them named).
    pub fn load(folder: &Path, dtype: DType) -> Result<Self, Error> {
        let raw = HfConfig::read(folder)?;
        let config = families::read_config(&raw)?;
        let stored = StoredTensors::of_folder(folder, &raw)?;
        Self::from_stored(config, &stored, dtype)
    }

    /// The same for a purpose.
    ///
    /// # Errors
    /// As [`load`](Self::load); a purpose that the architecture does not have.
    pub fn load_for(folder: &Path, dtype: DType, purpose: Purpose) -> Result<Self, Error> {
        let raw = HfConfig::read(folder)?;
        let config = families::read_config_for(&raw, purpose)?;
        let stored = StoredTensors::of_folder(folder, &raw)?;
        Self::from_stored(config, &stored, dtype)
    }

    /// Takes what the config asks for from opened files. What it lacks of a classifier begins as zeros, until
    /// [`begin_classifier`](Self::begin_classifier), and so does a last linear for another number of labels.
    ///
    /// # Errors
    /// Tensors that are missing, of another shape, or unknown; all are named, with both shapes. Values that are not finite, or
    /// would not be as `dtype`.
    pub fn from_stored(
        config: ModelConfig,
        stored: &StoredTensors,
        dtype: DType,
    ) -> Result<Self, Error> {
        Self::stage_from_stored(config, stored, dtype, &|_| Ok(None))
    }

    /// The same of one stage of a pipeline, which `stage_of` chooses for the config as the tensors have it; `None`: all of it. The tensors of
    /// others are looked for, but not read.
    ///
    /// # Errors
    /// As [`from_stored`](Self::from_stored); what `stage_of` says.
    pub fn stage_from_stored(
        config: ModelConfig,
        stored: &StoredTensors,
        dtype: DType,
        stage_of: &dyn Fn(&ModelConfig) -> Result<Option<Stage>, Error>,
    ) -> Result<Self, Error> {
        let config = with_head_of(config, stored)?;
        let stage = stage_of(&config)?.unwrap_or_else(|| Stage::whole(&config));
        let mut problems = Vec::new();
        let mut tensors = HashMap::new();
        let (mut mapped, mut samples) = (Vec::new(), HashMap::new());
        let mut used = HashSet::new();
        let (mut new, mut other_labels) = (Vec::new(), None);
        for (id, shape) in config.weights() {
            let name = families::tensor_name(&config, id);
            let Some(entry) = find(&config, stored, id)? else {
                if config.is_of_classifier(id) {
                    new.push(id);
                    if stage.reads(&config, id) {
                        tensors.insert(id, Tensor::zeros(shape.0, shape.1));
                    }
                    continue;
                }
                problems.push(format!("{name}: missing (expected {})", shape_text(shape)));
                if id == WeightId::Head {
                    problems.push(
                        "tie_word_embeddings is false in config.json, or by default; set it to true where the head is the embedding".to_owned(),
                    );
                }
                continue;
            };
            used.insert(entry.name().to_owned());
            if let Some(labels) = other_label_count(&config, id, entry.shape()) {
                other_labels = Some(labels);
                new.push(id);
                if stage.reads(&config, id) {
                    tensors.insert(id, Tensor::zeros(shape.0, shape.1));
                }
                continue;
            }
            let in_files = match stored {
                StoredTensors::Gguf { .. } => shape,
                _ => shape_in_folder(&config, id, shape),
            };
            if !has_shape(entry.shape(), in_files) {
                problems.push(format!(
                    "{name}: shape {:?}, expected {}",
                    entry.shape(),
                    shape_text(in_files)
                ));
                continue;
            }
            if !stage.is_whole() {
                // Enough to know whether another rank has the same model, as it is before it is quantized here.
                samples.insert(id, samples_of(shape, |index| entry.value(index)));
            }
            if !stage.reads(&config, id) {
                continue;
            }
            let tensor = held(&config, id, &entry, shape, (dtype, stored.loads_in()))?;
            if tensor.is_shared() {
                mapped.push(entry);
            }
            tensors.insert(id, tensor);
        }
        problems.extend(
            stored
                .names()
                .into_iter()
                .filter(|name| !used.contains(*name) && !families::is_derived(name))
                .filter(|name| !families::is_of_other_head(&config, name))
                .filter(|name| !families::is_of_other_positions(&config, name))
                .filter(|name| !families::is_of_pictures(&config, name))
                .filter(|name| !(config.tie_word_embeddings && is_head(name)))
                .map(|name| format!("{name}: no part of this architecture reads it")),
        );
        problems.extend(reasons_for_leftovers(&config, stored));
        if !problems.is_empty() {
            return Err(Error::Tensors {
                path: stored.path().to_path_buf(),
                problems,
            });
        }
        // The first pass reads every one of these pages anyway, so looking at them now costs little more than the time to do so.
        check_all_finite(&mapped)?;
        let read = Self {
            config,
            stage,
            tensors,
            dtype,
            mapped: (mapped.iter().map(|entry| entry.bytes().clone())).collect(),
            new,
            other_labels,
            checkpoint_fingerprint: None,
            whole_fingerprint: OnceLock::new(),
            squares: BaseSquares::default(),
        };
        let checkpoint_fingerprint = (!read.stage.is_whole()).then(|| {
            let ids = read.marked_ids().into_iter();
            fingerprint_of(&ids.map(|id| samples.remove(&id)).collect())
        });
        Ok(Self {
            checkpoint_fingerprint,
            ..read
        })
    }

    /// Gives the tables of tokens so many rows; a new one is the mean of those that are there.
    pub(crate) fn grow(&mut self, rows: usize) -> Result<(), Error> {
        let old = self.config.vocab_size;
        if rows <= old {
            return Ok(());
        }
        for id in [WeightId::Embedding, WeightId::Head] {
            let Some(table) = self.tensors.get(&id) else {
                continue;
            };
            // Rows of blocks cannot be written one by one.
            let dtype = table.format().as_dtype().unwrap_or(self.dtype);
            let width = table.cols();
            let mut sums = vec![0.0_f64; width];
            for row in 0..old {
                let row = table.view().slice_rows(row..row + 1).to_vec();
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum += f64::from(value);
                }
            }
            let mean = sums.iter().map(|sum| (sum / old as f64) as f32).collect();
            let mean = Tensor::from_f32(1, width, mean);
            let mean = mean.to_le_bytes(dtype);
            let mut bytes = table.to_le_bytes(dtype).into_owned();
            for _ in old..rows {
                bytes.extend_from_slice(&mean);
            }
            let grown = Tensor::from_le_bytes(&bytes, dtype, rows, width)?;
            self.tensors.insert(id, grown);
        }
        self.config.vocab_size = rows;
        Ok(())
    }

    /// How many labels the checkpoint's classifier has, where that is another number than the config's; a new last linear stands in its
    /// place.
    pub fn other_labels(&self) -> Option<usize> {
        self.other_labels
    }

    /// A tensor as the files have it; none for one that begins at random.
    pub(crate) fn stored(&self, id: WeightId) -> Option<View<'_>> {
        if self.new.contains(&id) {
            return None;
        }
        self.get(id)
    }

    /// The name of a tensor of the classifier that neither the checkpoint nor the adapter has.
    pub fn untrained(&self, adapter: Option<&Adapter>) -> Option<String> {
        let has = |id: &WeightId| adapter.is_some_and(|adapter| adapter.replaced.contains_key(id));
        let lacking = self.new.iter().find(|id| !has(id))?;
        Some(families::tensor_name(&self.config, *lacking))
    }

    /// The names of the classifier's tensors that the checkpoint lacks.
    pub fn new_names(&self) -> Vec<String> {
        self.new_names_of(|_| true)
    }

    /// The same of the last linear alone.
    pub(crate) fn new_last_names(&self) -> Vec<String> {
        self.new_names_of(is_last_linear)
    }

    fn new_names_of(&self, wanted: impl Fn(WeightId) -> bool) -> Vec<String> {
        let new = self.new.iter().filter(|id| wanted(**id));
        new.map(|id| families::tensor_name(&self.config, *id))
            .collect()
    }

    /// Lets the classifier's last linear begin anew, whatever the checkpoint has.
    pub(crate) fn renew_classifier(&mut self) {
        let last = self.config.weights().into_iter().map(|(id, _)| id);
        let last = last.filter(|id| is_last_linear(*id) && !self.new.contains(id));
        let last: Vec<_> = last.collect();
        for &id in &last {
            if let Some(tensor) = self.tensors.get(&id) {
                let (rows, cols) = (tensor.rows(), tensor.cols());
                self.tensors.insert(id, Tensor::zeros(rows, cols));
            }
        }
        self.new.extend(last);
    }

    /// Gives the classifier's tensors that the checkpoint lacks their first values, as transformers does: weights are normal with
    /// the spread that config.json names, biases 0 and norms 1. ModernBERT's are cut at two spreads, and its last linear has 1/√C.
    pub fn begin_classifier(&mut self, seed: u64) {
        for (n, id) in self.new.clone().into_iter().enumerate() {
            let std = families::classifier_spread(&self.config, id);
            let Some(tensor) = self.tensors.get_mut(&id) else {
                continue;
            };
            match id {
                WeightId::Linear(_, Part::Weight) => {
                    let key = mix(seed, n as u64);
                    fill_normal(tensor.view_mut(), std, key);
                    if self.config.family == Family::ModernBert {
                        redraw_beyond(tensor, 2.0 * std, std, key);
                    }
                }
                WeightId::ClassifierNorm(Part::Weight) => {
                    tensor
                        .view_mut()
                        .fill(1.0 - self.config.norm.weight_offset());
                }
                _ => tensor.view_mut().fill(0.0),
            }
        }
    }

    /// Weights from tensors that the caller made (random initialisation, tests). Shapes must be the config's.
    ///
    /// # Errors
    /// Tensors that are missing or of another shape.
    pub fn from_tensors(
        config: ModelConfig,
        mut given: HashMap<WeightId, Tensor>,
        dtype: DType,
    ) -> Result<Self, Error> {
        let mut tensors = HashMap::new();
        let mut problems = Vec::new();
        for (id, (rows, cols)) in config.weights() {
            match given.remove(&id) {
                Some(tensor) if tensor.rows() == rows && tensor.cols() == cols => {
                    tensors.insert(id, tensor);
                }
                _ => problems.push(format!(
                    "{}: missing or of another shape",
                    families::tensor_name(&config, id)
                )),
            }
        }
        if problems.is_empty() {
            Ok(Self {
                stage: Stage::whole(&config),
                config,
                tensors,
                dtype,
                mapped: Vec::new(),
                new: Vec::new(),
                other_labels: None,
                checkpoint_fingerprint: None,
                whole_fingerprint: OnceLock::new(),
                squares: BaseSquares::default(),
            })
        } else {
            Err(Error::Tensors {
                path: "(in memory)".into(),
                problems,
            })
        }
    }

    /// The model's shapes and choices.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The part of the model that is here.
    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// How matrices are stored.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// A tensor of the base. Every id of [`ModelConfig::weights`] is there, unless another stage of a pipeline has it.
    pub fn view(&self, id: WeightId) -> View<'_> {
        self.tensors[&id].view()
    }

    /// A tensor that the base may have.
    pub fn get(&self, id: WeightId) -> Option<View<'_>> {
        self.tensors.get(&id).map(Tensor::view)
    }

    /// Gives the memory of tensors that lie in a mapped file back to the system, where other values stand in for them.
    /// They stay readable: the next access reads the file again.
    pub fn release_pages(&self) {
        self.mapped.iter().for_each(SharedBytes::release);
    }

    /// Whether a tensor's numbers are integers but for their scales, so that generated rows are rounded beside it.
    pub fn has_integers(&self) -> bool {
        let mut formats = self.tensors.values().map(Tensor::format);
        formats.any(NumberFormat::has_integers)
    }

    /// Bytes that the tensors take.
    pub fn bytes(&self) -> usize {
        self.tensors.values().map(Tensor::nbytes).sum()
    }

    /// Bytes of the tensors that were converted when they were read, and so are no pages of a file that could be given back.
    pub fn converted_bytes(&self) -> u64 {
        let own = self.tensors.values().filter(|tensor| !tensor.is_shared());
        own.map(|tensor| tensor.nbytes() as u64).sum()
    }

    /// A hash of all of the base's values as they are held. Unlike the [`fingerprint`](Self::fingerprint) it notices any
    /// change, and it is another for another storage.
    ///
    /// # Panics
    /// If only a stage of the model is here.
    pub fn hash(&self) -> String {
        hash_of(&self.hashes())
    }

    /// The hashes of each tensor's parts.
    pub(crate) fn hashes(&self) -> TensorMarks {
        // So many elements are copied out at a time.
        const PART: usize = 1 << 18;
        let marked = self.marked();
        let parts: Vec<(usize, View<'_>)> = marked
            .iter()
            .enumerate()
            .filter_map(|(index, (_, view))| Some((index, (*view)?)))
            .flat_map(|(index, view)| {
                let rows = view.rows();
                let step = (PART / view.cols().max(1)).max(1);
                (0..rows)
                    .step_by(step)
                    .map(move |row| (index, view.slice_rows(row..rows.min(row + step))))
            })
            .collect();
        let hashes: Vec<(usize, u64)> = parts
            .into_par_iter()
            .map(|(index, part)| (index, hash(part.stored_bytes())))
            .collect();
        let mut marks: TensorMarks = marked
            .iter()
            .map(|(_, view)| view.map(|_| Vec::new()))
            .collect();
        for (index, hash) in hashes {
            if let Some(mark) = &mut marks[index] {
                mark.push(hash);
            }
        }
        marks
    }

    /// A short hash of shapes and of 64 values of each tensor, rounded to bf16: the same model stored as f32 or as bf16
    /// has the same fingerprint, another model has another.
    ///
    /// # Panics
    /// If only a stage of the model is here, and the whole one's was not given.
    pub fn fingerprint(&self) -> String {
        match self.whole_fingerprint.get() {
            Some(known) => known.clone(),
            None => fingerprint_of(&self.samples()),
        }
    }

    /// Lets a stage of a model know the fingerprint of all of it.
    pub(crate) fn set_fingerprint(&self, fingerprint: String) {
        drop(self.whole_fingerprint.set(fingerprint));
    }

    /// What shows whether two stages are of the same checkpoint; none for a whole model.
    pub(crate) fn checkpoint_fingerprint(&self) -> Option<&str> {
        self.checkpoint_fingerprint.as_deref()
    }

    /// What the fingerprint is made of.
    pub(crate) fn samples(&self) -> TensorMarks {
        let samples = |(shape, view): ((usize, usize), Option<View<'_>>)| {
            let (view, cols) = (view?, shape.1);
            Some(samples_of(shape, |index| {
                view.get(index / cols, index % cols)
            }))
        };
        self.marked().into_iter().map(samples).collect()
    }

    /// The tensors that tell one base from another, in their order.
    fn marked(&self) -> Vec<((usize, usize), Option<View<'_>>)> {
        let all = self.config.weights().into_iter();
        all.filter(|(id, _)| !self.config.is_of_classifier(*id))
            .map(|(id, shape)| (shape, self.get(id)))
            .collect()
    }

    fn marked_ids(&self) -> Vec<WeightId> {
        let all = self.config.weights().into_iter().map(|(id, _)| id);
        all.filter(|id| !self.config.is_of_classifier(*id))
            .collect()
    }
}

/// [`Weights::hash`] from the marks of all tensors.
///
/// # Panics
/// If one is missing.
pub(crate) fn hash_of(marks: &TensorMarks) -> String {
    let all = whole(marks);
    format!("{:016x}", all.flatten().copied().fold(0, mix))
}

/// [`Weights::fingerprint`] from the marks of all tensors.
///
/// # Panics
/// If one is missing.
pub(crate) fn fingerprint_of(marks: &TensorMarks) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in whole(marks).flatten().flat_map(|value| value.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("{hash:016x}")
}

fn whole(marks: &TensorMarks) -> impl Iterator<Item = &Vec<u64>> {
    let parts = marks.iter();
    parts.map(|mark| {
        mark.as_ref()
            .unwrap_or_else(|| panic!("a tensor is in another stage"))
    })
}

/// The samples of a tensor for the fingerprint: its shape, and 64 of its values as bf16.
fn samples_of((rows, cols): (usize, usize), value: impl Fn(usize) -> f32) -> Vec<u64> {
    let step = (rows * cols / 64).max(1);
    let places = (0..rows * cols).step_by(step).take(64);
    let values = places.map(|index| u64::from(half::bf16::from_f32(value(index)).to_bits()));
    [rows as u64, cols as u64]
        .into_iter()
        .chain(values)
        .collect()
}

/// Writes `model.safetensors` into `folder`: every tensor of a model of this config, named as its family names it.
/// `fill(index, id, out)` writes one tensor, little-endian, as `dtype`; indices are those of [`ModelConfig::weights`].
///
/// # Errors
/// The file can't be written.
pub(crate) fn write_model(
    config: &ModelConfig,
    folder: &Path,
    dtype: DType,
    mut fill: impl FnMut(usize, WeightId, &mut dyn Write) -> io::Result<()>,
) -> Result<(), Error> {
    let weights = config.weights();
    let specs: Vec<TensorSpec> = weights
        .iter()
        .map(|&(id, (rows, cols))| TensorSpec {
            name: families::tensor_name(config, id),
            dtype: match dtype {
                DType::F32 => StoredDType::F32,
                DType::Bf16 => StoredDType::BF16,
            },
            shape: if id.is_vector() {
                vec![cols]
            } else {
                let (rows, cols) = shape_in_folder(config, id, (rows, cols));
                vec![rows, cols]
            },
        })
        .collect();
    let path = folder.join("model.safetensors");
    write_safetensors(&path, &specs, &BTreeMap::new(), |index, out| {
        let (id, (rows, cols)) = weights[index];
        if !is_turned(config, id) {
            return fill(index, id, out);
        }
        let mut bytes = Vec::with_capacity(dtype.bytes_for(rows * cols));
        fill(index, id, &mut bytes)?;
        let size = dtype.bytes_for(1);
        let numbers: Vec<&[u8]> = bytes.chunks_exact(size).collect();
        let turned = (0..cols).flat_map(|col| numbers.iter().skip(col).step_by(cols));
        out.write_all(&turned.copied().collect::<Vec<_>>().concat())
    })?;
    Ok(())
}

/// Whether a matrix is held the other way than a folder of the model has it: [out, in] of GPT-2's, as blocks need it.
fn is_turned(config: &ModelConfig, id: WeightId) -> bool {
    let is_of_block =
        matches!(id, WeightId::Linear(_, Part::Weight)) && !config.is_of_classifier(id);
    is_of_block && config.layout != families::layout(config.family)
}

/// The shape that a tensor has in a folder.
fn shape_in_folder(
    config: &ModelConfig,
    id: WeightId,
    (rows, cols): (usize, usize),
) -> (usize, usize) {
    if is_turned(config, id) {
        (cols, rows)
    } else {
        (rows, cols)
    }
}

/// Draws the values that lie beyond `most` again until none does.
fn redraw_beyond(tensor: &mut Tensor, most: f32, std: f32, key: u64) {
    let (rows, cols) = (tensor.rows(), tensor.cols());
    let mut values = tensor.to_vec();
    let mut round = 0;
    while values.iter().any(|value| value.abs() > most) {
        round += 1;
        fill_normal(tensor.view_mut(), std, mix(key, round));
        for (value, other) in values.iter_mut().zip(tensor.to_vec()) {
            if value.abs() > most {
                *value = other;
            }
        }
    }
    *tensor = Tensor::from_f32(rows, cols, values);
}

/// Whether it names an output projection, of a model by itself or within another one.
fn is_head(name: &str) -> bool {
    name.strip_prefix("language_model.").unwrap_or(name) == "lm_head.weight"
}

/// The config as the tensors have it. `tie_word_embeddings`: a head of its own that differs from the embedding is used, whatever
/// config.json says, as in transformers. A classifier's first linear that they lack is trained and saved with the last one, since
/// nothing else has its values.
///
/// # Errors
/// Tensors of a type that is not read.
pub(crate) fn with_head_of(
    mut config: ModelConfig,
    stored: &StoredTensors,
) -> Result<ModelConfig, Error> {
    let own = |id| get(&config, stored, id);
    if config.tie_word_embeddings
        && let (Some(head), Some(embedding)) = (own(WeightId::Head)?, own(WeightId::Embedding)?)
    {
        config.tie_word_embeddings =
            head.shape() == embedding.shape() && head.has_values_of(&embedding)?;
    }
    if let Some(load_in) = stored.loads_in() {
        load_in.mark(&mut config);
    } else if stored.has_formats() {
        // Rows of blocks are those of a weight [out, in].
        config.layout = Layout::OutIn;
        for (id, _) in config
            .weights()
            .into_iter()
            .filter(|(id, _)| !id.is_vector())
        {
            if let Some(format) = find(&config, stored, id)?.and_then(|tensor| tensor.own_format())
            {
                config.formats.insert(id, format);
            }
        }
    }
    let dense = WeightId::Linear(config.classifier_linear(LinearKind::Dense), Part::Weight);
    let names = families::stored_names(&config, dense);
    if names.iter().any(|name| stored.shape(name).is_some()) {
        return Ok(config);
    }
    Ok(config.with_saved_dense())
}

/// A tensor as the model holds it. Vectors and classifiers are f32 always, and linears of blocks may be quantized here.
fn held(
    config: &ModelConfig,
    id: WeightId,
    stored: &StoredTensor,
    shape: (usize, usize),
    (dtype, load_in): (DType, Option<LoadIn>),
) -> Result<Tensor, Error> {
    if let Some(load_in) = load_in.filter(|_| LoadIn::is_for(config, id)) {
        return load_in.quantized(stored, shape, is_turned(config, id));
    }
    let exact = shape.0 == 1 || config.is_of_classifier(id);
    stored.to_tensor(shape, if exact { DType::F32 } else { dtype })
}

/// A tensor by its name, or by its name in a checkpoint of a bare model.
fn get(
    config: &ModelConfig,
    stored: &StoredTensors,
    id: WeightId,
) -> Result<Option<StoredTensor>, Error> {
    for name in families::stored_names(config, id) {
        if let Some(entry) = stored.find(&name)? {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// [`get`], or of a tied pair the one that is there.
pub(crate) fn find(
    config: &ModelConfig,
    stored: &StoredTensors,
    id: WeightId,
) -> Result<Option<StoredTensor>, Error> {
    let found = get(config, stored, id)?;
    if found.is_none() && id == WeightId::Embedding && config.tie_word_embeddings {
        return get(config, stored, WeightId::Head);
    }
    Ok(found)
}

/// Keys of config.json that decide about tensors that nothing reads.
fn reasons_for_leftovers(config: &ModelConfig, stored: &StoredTensors) -> Vec<String> {
    let mut reasons = Vec::new();
    let layers = config.num_hidden_layers;
    let blocks = families::blocks(config);
    let short = blocks
        .strip_prefix(families::optional_prefix(config.family))
        .unwrap_or(&blocks);
    let layer = |name: &str| -> Option<usize> {
        let rest = name
            .strip_prefix(&blocks)
            .or_else(|| name.strip_prefix(short))?;
        rest.strip_prefix('.')?.split('.').next()?.parse().ok()
    };
    let names = stored.names();
    if let Some(last) = names
        .iter()
        .filter_map(|name| layer(name))
        .max()
        .filter(|last| *last >= layers)
    {
        reasons.push(format!(
            "num_hidden_layers is {layers} in config.json, and the file holds {} layers",
            last + 1
        ));
    }
    let has = |name: &str| names.iter().any(|known| known.ends_with(name));
    let keys: Vec<&str> = [
        ("attention_bias", config.biases.o, "o_proj.bias"),
        ("mlp_bias", config.biases.mlp, "down_proj.bias"),
    ]
    .into_iter()
    .filter(|(_, on, name)| !on && has(name))
    .map(|(key, _, _)| key)
    .collect();
    if !keys.is_empty() {
        reasons.push(format!(
            "{} must be true in config.json where biases are meant to be used",
            keys.join(" and ")
        ));
    }
    reasons
}

/// Whether a tensor is of a classifier's last linear.
pub(crate) fn is_last_linear(id: WeightId) -> bool {
    matches!(id, WeightId::Linear(linear, _) if linear.kind == LinearKind::Out)
}

/// How many labels a tensor of a classifier's last linear is for, if that is another number than the config's.
fn other_label_count(config: &ModelConfig, id: WeightId, stored: &[usize]) -> Option<usize> {
    let labels = config.classifier()?.labels;
    let WeightId::Linear(linear, part) = id else {
        return None;
    };
    if linear.kind != LinearKind::Out || !config.is_of_classifier(id) {
        return None;
    }
    match (part, stored) {
        (Part::Weight, [found, inputs]) if *inputs == config.hidden_size => Some(*found),
        (Part::Bias, [found]) => Some(*found),
        _ => None,
    }
    .filter(|found| *found != labels)
}

fn has_shape(stored: &[usize], (rows, cols): (usize, usize)) -> bool {
    match stored {
        [n] => rows == 1 && *n == cols,
        [r, c] => (*r, *c) == (rows, cols),
        _ => false,
    }
}

fn shape_text((rows, cols): (usize, usize)) -> String {
    if rows == 1 {
        format!("[{cols}]")
    } else {
        format!("[{rows}, {cols}]")
    }
}
