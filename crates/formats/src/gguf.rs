//! GGUF, the file format of llama.cpp: metadata, tensor infos and quantized tensors, memory-mapped.
//!
//! Layout (little-endian): magic `GGUF`, version, tensor count, key/value count; the key/values; the tensor infos (name,
//! dimensions innermost first, type, offset); padding to the alignment; the data. Every count is compared with the
//! bytes that are left before anything is allocated for it, so a hostile file costs no more than a few times its size.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::FormatError;
use crate::mapped::{Mapping, SharedBytes};
use crate::recognise::{Format, HEAD};

mod metadata;
mod quant;
mod reader;
mod split;
mod writer;

pub use metadata::{GgufArray, GgufMetadata, GgufStrings, GgufValue};
pub use quant::{GgmlType, READABLE};
pub use split::file_bytes;
pub use writer::{GgufSpec, KeyValue, write_gguf};

use reader::Reader;

const MOST_KEYS: u64 = 1 << 16;
const MOST_TENSORS: u64 = 1 << 18;
/// ggml's own limit.
const MOST_DIMENSIONS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
const LARGEST_ALIGNMENT: u64 = 1 << 20;

/// A tensor in a GGUF file.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    /// Its name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// How its values are stored.
    pub kind: GgmlType,
    /// Dimensions, outermost first: a linear layer's weight is [out, in], as everywhere else in this program.
    pub shape: Vec<usize>,
    /// Its values as stored.
    pub bytes: SharedBytes,
    /// The file that they are in, for messages.
    pub file: Arc<Path>,
}

impl GgufTensor {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether a dimension is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Values in a row: the last dimension. Blocks do not cross rows.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of rows: the product of the other dimensions.
    pub fn rows(&self) -> usize {
        self.shape
            .split_last()
            .map_or(1, |(_, rest)| rest.iter().product())
    }
}

/// A GGUF file, opened and validated.
pub struct Gguf {
    path: PathBuf,
    version: u32,
    metadata: GgufMetadata,
    /// The file that the metadata are of.
    mapping: Arc<Mapping>,
    tensors: Vec<GgufTensor>,
    by_name: HashMap<String, usize>,
}

impl Gguf {
    /// Opens and checks a file, or all files of a model that was split; tensors stay in the mapping until they are asked for.
    ///
    /// # Errors
    /// The file is not GGUF version 2 or 3, is truncated, or contradicts itself, or another part is missing or of another model. The
    /// message names the section, key or tensor.
    pub fn open(path: &Path) -> Result<Gguf, FormatError> {
        let first = Self::open_one(path)?;
        match first.metadata.get_u64(split::COUNT) {
            Some(count) if count > 1 => split::join(first, count),
            _ => Ok(first),
        }
    }

    /// One file.
    fn open_one(path: &Path) -> Result<Gguf, FormatError> {
        let mapping = Mapping::open(path)?;
        let bytes = mapping.as_ref().as_ref();
        match Format::of(&bytes[..bytes.len().min(HEAD)]) {
            None | Some(Format::Gguf) => {}
            Some(format) => {
                let mend = format
                    .fetch_again()
                    .unwrap_or("give the GGUF file of the model");
                return Err(FormatError::malformed(
                    path,
                    format!("is {format}, not GGUF; {mend}"),
                ));
            }
        }
        let mut reader = Reader::new(path, bytes);
        let (version, tensor_count, key_count) = read_preamble(&mut reader)?;
        let metadata = GgufMetadata::read(&mut reader, key_count)?;
        let infos = read_infos(&mut reader, tensor_count)?;
        let alignment = alignment(path, &metadata)?;
        let tensors = place(path, &mapping, &infos, reader.position(), alignment)?;
        Ok(Self::new(path, version, metadata, mapping, tensors))
    }

    fn new(
        path: &Path,
        version: u32,
        metadata: GgufMetadata,
        mapping: Arc<Mapping>,
        tensors: Vec<GgufTensor>,
    ) -> Self {
        let by_name = tensors
            .iter()
            .enumerate()
            .map(|(i, t)| (t.name.clone(), i))
            .collect();
        Self {
            path: path.to_path_buf(),
            version,
            metadata,
            mapping,
            tensors,
            by_name,
        }
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The format's version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The key/value section.
    pub fn metadata(&self) -> &GgufMetadata {
        &self.metadata
    }

    /// The keys in the file's order, each with its type and value as the file has them.
    pub fn raw_keys(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let bytes = self.mapping.as_ref().as_ref();
        let places = self.metadata.places.iter();
        places.map(|(key, place)| (key.as_str(), &bytes[place.clone()]))
    }

    /// All tensors, in the file's order.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.by_name.get(name).map(|&index| &self.tensors[index])
    }

    /// The values of a tensor of singles.
    ///
    /// # Errors
    /// There is no such tensor, or it is of another type; the message names it.
    pub fn f32s(&self, name: &str) -> Result<Vec<f32>, FormatError> {
        let wrong = |problem: String| FormatError::tensor(&self.path, name, problem);
        let tensor = self
            .tensor(name)
            .ok_or_else(|| wrong("is not in this file".to_owned()))?;
        if tensor.kind.name() != "F32" {
            return Err(wrong(format!(
                "is stored as {}; accepted: F32",
                tensor.kind
            )));
        }
        let values = tensor.bytes.as_ref().as_chunks().0.iter();
        Ok(values.map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gguf")
            .field("path", &self.path)
            .field("version", &self.version)
            .field("keys", &self.metadata.len())
            .field("tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}

/// Version, number of tensors, number of keys.
fn read_preamble(reader: &mut Reader<'_>) -> Result<(u32, u64, u64), FormatError> {
    if reader.bytes(4, "the magic number")? != b"GGUF" {
        return Err(reader.error("is not a GGUF file: it does not begin with the letters GGUF"));
    }
    let version = reader.u32("the version")?;
    if !(2..=3).contains(&version) {
        let hint = if version.swap_bytes() <= 3 {
            " (it was written on a big-endian machine)"
        } else {
            ""
        };
        return Err(reader.error(format!(
            "is GGUF version {version}{hint}; accepted: 2 and 3, little-endian"
        )));
    }
    let tensors = reader.u64("the number of tensors")?;
    let keys = reader.u64("the number of keys")?;
    // The smallest tensor info: an empty name, no dimension. The smallest key: an empty name and one byte.
    reader.check_count(tensors, MOST_TENSORS, 8 + 4 + 4 + 8, "tensors")?;
    reader.check_count(keys, MOST_KEYS, 8 + 4 + 1, "keys")?;
    Ok((version, tensors, keys))
}

struct Info {
    name: String,
    kind: GgmlType,
    shape: Vec<usize>,
    offset: u64,
}

fn read_infos(reader: &mut Reader<'_>, count: u64) -> Result<Vec<Info>, FormatError> {
    let mut infos = Vec::new();
    for _ in 0..count {
        let name = reader.string("a tensor's name")?;
        let dimensions = reader.u32("a tensor's number of dimensions")?;
        if dimensions > MOST_DIMENSIONS {
            let problem =
                format!("has {dimensions} dimensions; accepted: at most {MOST_DIMENSIONS}");
            return Err(FormatError::tensor(reader.path(), name, problem));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let dimension = reader.u64("a tensor's dimensions")?;
            shape.push(usize::try_from(dimension).unwrap_or(usize::MAX));
        }
        shape.reverse();
        let id = reader.u32("a tensor's type")?;
        let offset = reader.u64("a tensor's offset")?;
        let Some(kind) = GgmlType::from_id(id) else {
            let problem = format!("is of type number {id}, which this version does not know");
            return Err(FormatError::tensor(reader.path(), name, problem));
        };
        infos.push(Info {
            name,
            kind,
            shape,
            offset,
        });
    }
    Ok(infos)
}

fn alignment(path: &Path, metadata: &GgufMetadata) -> Result<u64, FormatError> {
    let key = "general.alignment";
    let Some(value) = metadata.get(key) else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    match metadata.get_u64(key) {
        Some(n) if n.is_power_of_two() && n <= LARGEST_ALIGNMENT => Ok(n),
        _ => Err(FormatError::Field {
            path: path.to_path_buf(),
            field: key.into(),
            found: format!("is {value}"),
            accepted: format!("a power of two up to {LARGEST_ALIGNMENT}"),
        }),
    }
}

/// Finds every tensor's bytes in the mapping, and checks that they are there and that no two overlap.
fn place(
    path: &Path,
    mapping: &Arc<Mapping>,
    infos: &[Info],
    end_of_infos: usize,
    alignment: u64,
) -> Result<Vec<GgufTensor>, FormatError> {
    let length = mapping.as_ref().as_ref().len() as u64;
    let data = (end_of_infos as u64).next_multiple_of(alignment);
    let mut tensors = Vec::with_capacity(infos.len());
    let mut taken: BTreeMap<u64, (u64, &str)> = BTreeMap::new();
    let mut names = HashSet::new();
    let file: Arc<Path> = Arc::from(path);
    for info in infos {
        let wrong = |problem: String| Err(FormatError::tensor(path, &info.name, problem));
        if !names.insert(info.name.as_str()) {
            return wrong("occurs twice".into());
        }
        let Some(size) = info.kind.byte_len(&info.shape) else {
            return wrong(format!(
                "of shape {:?} cannot be stored as {}: its size overflows, or its rows are not a multiple of {} values",
                info.shape,
                info.kind,
                info.kind.block_len()
            ));
        };
        if !info.offset.is_multiple_of(alignment) {
            return wrong(format!(
                "lies at {}, not a multiple of {alignment}",
                info.offset
            ));
        }
        let Some((start, end)) = data
            .checked_add(info.offset)
            .and_then(|start| Some((start, start.checked_add(size)?)))
            .filter(|&(_, end)| end <= length)
        else {
            return wrong(format!(
                "needs {size} bytes at offset {} of the data; the file is truncated or its header is wrong",
                info.offset
            ));
        };
        if size > 0
            && let Some((_, (_, other))) = taken
                .range(..end)
                .next_back()
                .filter(|(_, (e, _))| *e > start)
        {
            return wrong(format!("overlaps tensor `{other}`"));
        }
        if size > 0 {
            taken.insert(start, (end, &info.name));
        }
        tensors.push(GgufTensor {
            name: info.name.clone(),
            kind: info.kind,
            shape: info.shape.clone(),
            bytes: SharedBytes::new(mapping, start as usize..end as usize),
            file: Arc::clone(&file),
        });
    }
    Ok(tensors)
}
