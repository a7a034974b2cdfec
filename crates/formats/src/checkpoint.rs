//! Reading safetensors: a model folder (one file or shards with an index) or a single file, memory-mapped.
//!
//! The header is parsed by the `safetensors` crate, which checks that the tensors tile the file exactly, with checked
//! arithmetic. Before it sees the header, the header is walked once without allocation in proportion to what it
//! claims: that pass names the offending tensor, and refuses doubled names, unknown types and absurd shapes.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::FormatError;
use crate::folders::{instead_of_model, weights_mend};
use crate::json::{read_object, show};
use crate::mapped::{Mapping, SharedBytes};
use crate::recognise::{Format, HEAD};

mod finite;
mod header;

pub use finite::{check_finite, check_finite_as_bf16};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The largest index in use (a 1T-parameter mixture of experts) is under 10 MB.
const INDEX_CAP: u64 = 64 << 20;

/// The element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoredDType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16: the upper half of a single.
    BF16,
    /// Any other type of the format, by its name in the file. Such a tensor can be listed but not converted.
    Other(&'static str),
}

impl StoredDType {
    /// The name in the file's header: `F32`, `BF16`, …
    pub fn name(self) -> &'static str {
        match self {
            StoredDType::F32 => "F32",
            StoredDType::F16 => "F16",
            StoredDType::BF16 => "BF16",
            StoredDType::Other(name) => name,
        }
    }

    /// Bytes an element, for the types that can be converted.
    pub fn size(self) -> Option<usize> {
        match self {
            StoredDType::F32 => Some(4),
            StoredDType::F16 | StoredDType::BF16 => Some(2),
            StoredDType::Other(_) => None,
        }
    }

    fn from_safetensors(dtype: Dtype) -> StoredDType {
        match dtype {
            Dtype::F32 => StoredDType::F32,
            Dtype::F16 => StoredDType::F16,
            Dtype::BF16 => StoredDType::BF16,
            Dtype::BOOL => StoredDType::Other("BOOL"),
            Dtype::U8 => StoredDType::Other("U8"),
            Dtype::I8 => StoredDType::Other("I8"),
            Dtype::I16 => StoredDType::Other("I16"),
            Dtype::U16 => StoredDType::Other("U16"),
            Dtype::I32 => StoredDType::Other("I32"),
            Dtype::U32 => StoredDType::Other("U32"),
            Dtype::I64 => StoredDType::Other("I64"),
            Dtype::U64 => StoredDType::Other("U64"),
            Dtype::F64 => StoredDType::Other("F64"),
            Dtype::C64 => StoredDType::Other("C64"),
            Dtype::F4 => StoredDType::Other("F4"),
            Dtype::F6_E2M3 => StoredDType::Other("F6_E2M3"),
            Dtype::F6_E3M2 => StoredDType::Other("F6_E3M2"),
            Dtype::F8_E5M2 => StoredDType::Other("F8_E5M2"),
            Dtype::F8_E4M3 => StoredDType::Other("F8_E4M3"),
            Dtype::F8_E8M0 => StoredDType::Other("F8_E8M0"),
            Dtype::F8_E4M3FNUZ => StoredDType::Other("F8_E4M3FNUZ"),
            Dtype::F8_E5M2FNUZ => StoredDType::Other("F8_E5M2FNUZ"),
            _ => StoredDType::Other("a type that this version does not know"),
        }
    }
}

impl fmt::Display for StoredDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor in a checkpoint: where its bytes are and how to read them.
#[derive(Clone, Debug)]
pub struct TensorEntry {
    /// Its name in the file.
    pub name: String,
    /// Element type.
    pub dtype: StoredDType,
    /// Dimensions, outermost first; the values are row-major. An empty shape is a scalar.
    pub shape: Vec<usize>,
    /// The values, little-endian. Their length is what dtype and shape demand; their alignment is whatever the file gives.
    pub bytes: SharedBytes,
    /// The file they are in, for messages.
    pub file: Arc<Path>,
}

impl TensorEntry {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether a dimension is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One element, counted row after row, as f32; `None` where there is none, or its type is none of F32, F16 and BF16.
    pub fn value(&self, index: usize) -> Option<f32> {
        let size = self.dtype.size()?;
        let bytes = self.bytes.as_ref().get(index * size..(index + 1) * size)?;
        Some(match self.dtype {
            StoredDType::F32 => f32::from_le_bytes(bytes.try_into().ok()?),
            StoredDType::F16 => f16::from_le_bytes(bytes.try_into().ok()?).to_f32(),
            StoredDType::BF16 => bf16::from_le_bytes(bytes.try_into().ok()?).to_f32(),
            StoredDType::Other(_) => return None,
        })
    }

    /// The tensor cut into vectors of so many elements, the last of fewer, for work that holds only some of its pages at a time.
    pub fn parts(&self, elements: usize) -> impl Iterator<Item = TensorEntry> + '_ {
        let size = self.dtype.size().unwrap_or(1);
        let starts = (0..self.len()).step_by(elements.max(1));
        starts.map(move |start| {
            let end = (start + elements.max(1)).min(self.len());
            TensorEntry {
                name: self.name.clone(),
                dtype: self.dtype,
                shape: vec![end - start],
                bytes: self.bytes.part(start * size..end * size),
                file: Arc::clone(&self.file),
            }
        })
    }

    /// The values as f32, widened without loss.
    ///
    /// # Errors
    /// The type is none of F32, F16 and BF16.
    pub fn to_f32(&self) -> Result<Vec<f32>, FormatError> {
        let bytes = self.bytes.as_ref();
        Ok(match self.dtype {
            StoredDType::F32 => convert(bytes, f32::from_le_bytes),
            StoredDType::F16 => convert(bytes, |b| f16::from_le_bytes(b).to_f32()),
            StoredDType::BF16 => convert(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            StoredDType::Other(_) => return Err(self.unsupported()),
        })
    }

    /// The values as bf16, rounded to nearest even where they do not fit.
    ///
    /// # Errors
    /// The type is none of F32, F16 and BF16.
    pub fn to_bf16(&self) -> Result<Vec<bf16>, FormatError> {
        let bytes = self.bytes.as_ref();
        Ok(match self.dtype {
            StoredDType::F32 => convert(bytes, |b| bf16::from_f32(f32::from_le_bytes(b))),
            StoredDType::F16 => convert(bytes, |b| bf16::from_f32(f16::from_le_bytes(b).to_f32())),
            StoredDType::BF16 => convert(bytes, bf16::from_le_bytes),
            StoredDType::Other(_) => return Err(self.unsupported()),
        })
    }

    fn unsupported(&self) -> FormatError {
        FormatError::tensor(
            &self.file,
            &self.name,
            format!(
                "is stored as {}; weights can be read from F32, F16 and BF16",
                self.dtype
            ),
        )
    }
}

fn convert<const N: usize, T>(bytes: &[u8], element: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes
        .as_chunks::<N>()
        .0
        .iter()
        .map(|&chunk| element(chunk))
        .collect()
}

/// A file of this size and more is not mapped as a whole: whoever reads some of its tensors has only these mapped.
const MAPPED_IN_PARTS: usize = 64 << 20;

struct Shard {
    file: Arc<Path>,
    bytes: ShardBytes,
}

/// How a tensor's bytes are reached.
enum ShardBytes {
    /// The file is mapped.
    Whole(Arc<Mapping>),
    /// A tensor's part of the file is mapped when it is asked for.
    Parts(File),
}

impl Shard {
    fn bytes(&self, located: &Located) -> Result<SharedBytes, FormatError> {
        let range = located.start..located.end;
        match &self.bytes {
            ShardBytes::Whole(mapping) => Ok(SharedBytes::new(mapping, range)),
            ShardBytes::Parts(file) => {
                let mapping = Mapping::part(file, &range);
                let mapping = mapping.map_err(|e| FormatError::io(&self.file, "map", e))?;
                Ok(SharedBytes::new(&mapping, 0..range.len()))
            }
        }
    }
}

struct Located {
    shard: usize,
    dtype: StoredDType,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// A safetensors checkpoint, opened and validated; tensors are read from the mapping on demand.
pub struct Checkpoint {
    path: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Located>,
    metadata: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens a model folder (`model.safetensors`, or `model.safetensors.index.json` with its shards) or one file.
    ///
    /// # Errors
    /// Nothing to open is there, a shard is missing, truncated or malformed, or index and shards disagree. The message
    /// names the file and the tensor.
    pub fn open(path: &Path) -> Result<Checkpoint, FormatError> {
        let mut checkpoint = Checkpoint {
            path: path.to_path_buf(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: BTreeMap::new(),
        };
        if !path.is_dir() {
            checkpoint.add_file(path)?;
            return Ok(checkpoint);
        }
        let (single, index) = (path.join(SINGLE), path.join(INDEX));
        if single.is_file() {
            checkpoint.add_file(&single)?;
        } else if index.is_file() {
            checkpoint.add_index(path, &index)?;
        } else {
            return Err(FormatError::Missing {
                path: path.to_path_buf(),
                problem: match instead_of_model(path) {
                    Some(instead) => format!("has neither {SINGLE} nor {INDEX}; {instead}"),
                    None => format!(
                        "has neither {SINGLE} nor {INDEX}, so the weights are missing; copy or download them"
                    ),
                },
            });
        }
        Ok(checkpoint)
    }

    /// Opens a safetensors file that is part of the program; `name` stands for it in messages.
    ///
    /// # Errors
    /// The bytes are not a valid safetensors file.
    pub fn from_static(bytes: &'static [u8], name: &Path) -> Result<Checkpoint, FormatError> {
        let mut checkpoint = Checkpoint {
            path: name.to_path_buf(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: BTreeMap::new(),
        };
        checkpoint.add_mapping(name, Arc::new(Mapping::Static(bytes)), None)?;
        Ok(checkpoint)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor of that name. One of a large file that cannot be mapped counts as missing; [`find`](Self::find) says why.
    pub fn get(&self, name: &str) -> Option<TensorEntry> {
        self.find(name).ok().flatten()
    }

    /// The tensor of that name, if there is one.
    ///
    /// # Errors
    /// The process has no room to map it.
    pub fn find(&self, name: &str) -> Result<Option<TensorEntry>, FormatError> {
        let Some((name, located)) = self.tensors.get_key_value(name) else {
            return Ok(None);
        };
        let shard = &self.shards[located.shard];
        Ok(Some(TensorEntry {
            name: name.clone(),
            dtype: located.dtype,
            shape: located.shape.clone(),
            bytes: shard.bytes(located)?,
            file: Arc::clone(&shard.file),
        }))
    }

    /// The dimensions of a tensor, which is not mapped for it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors
            .get(name)
            .map(|located| located.shape.as_slice())
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// The headers' `__metadata__`; of shards that disagree, the first one's value.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of all tensors, without headers.
    pub fn total_bytes(&self) -> u64 {
        self.tensors
            .values()
            .map(|t| (t.end - t.start) as u64)
            .sum()
    }

    fn add_file(&mut self, path: &Path) -> Result<(), FormatError> {
        let (mapping, file) = Mapping::open_with_file(path)?;
        self.add_mapping(path, mapping, Some(file))
    }

    fn add_mapping(
        &mut self,
        path: &Path,
        mapping: Arc<Mapping>,
        file: Option<File>,
    ) -> Result<(), FormatError> {
        let bytes = mapping.as_ref().as_ref();
        match Format::of(&bytes[..bytes.len().min(HEAD)]) {
            None | Some(Format::Safetensors) => {}
            Some(format) => {
                let problem = format!("is {format}, not safetensors; {}", weights_mend(format));
                return Err(FormatError::malformed(path, problem));
            }
        }
        let data = header::check(path, bytes)?;
        let (_, parsed) = SafeTensors::read_metadata(bytes).map_err(|e| {
            FormatError::malformed(path, format!("not a valid safetensors file: {e}"))
        })?;
        for (name, info) in parsed.tensors() {
            let (start, end) = info.data_offsets;
            let located = Located {
                shard: self.shards.len(),
                dtype: StoredDType::from_safetensors(info.dtype),
                shape: info.shape.clone(),
                // The crate has checked that the file ends where the last tensor does, so these cannot overflow.
                start: data + start,
                end: data + end,
            };
            if let Some(earlier) = self.tensors.get(&name) {
                let other = &self.shards[earlier.shard].file;
                let problem = format!("is also in {}; a name may occur once", other.display());
                return Err(FormatError::tensor(path, name, problem));
            }
            self.tensors.insert(name, located);
        }
        for (key, value) in parsed.metadata().iter().flatten() {
            self.metadata
                .entry(key.clone())
                .or_insert_with(|| value.clone());
        }
        let bytes = match file.filter(|_| bytes.len() >= MAPPED_IN_PARTS) {
            Some(file) => ShardBytes::Parts(file),
            None => ShardBytes::Whole(mapping),
        };
        self.shards.push(Shard {
            file: Arc::from(path),
            bytes,
        });
        Ok(())
    }

    fn add_index(&mut self, folder: &Path, index: &Path) -> Result<(), FormatError> {
        let map = read_object(index, INDEX_CAP)?;
        let Some(Value::Object(weights)) = map.get("weight_map") else {
            return Err(FormatError::malformed(
                index,
                "`weight_map` is missing or not an object of tensor names and file names",
            ));
        };
        // Grouped by file, so that each is opened once and a missing one is named with a tensor it should hold.
        let mut files: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, file) in weights {
            let name = file
                .as_str()
                .filter(|name| is_plain_name(name))
                .ok_or_else(|| {
                    let problem = format!(
                        "is mapped to {}, not the name of a file in this folder",
                        show(file)
                    );
                    FormatError::tensor(index, tensor, problem)
                })?;
            files.entry(name).or_default().push(tensor);
        }
        for (file, tensors) in files {
            let path = folder.join(file);
            if !path.is_file() {
                return Err(FormatError::Missing {
                    path,
                    problem: format!(
                        "this shard is missing; the index says that it holds {} tensors, among them `{}`; download it again",
                        tensors.len(),
                        tensors[0]
                    ),
                });
            }
            self.add_file(&path)?;
            let shard = self.shards.len() - 1;
            for tensor in tensors {
                if self.tensors.get(tensor).is_none_or(|t| t.shard != shard) {
                    return Err(FormatError::tensor(
                        &path,
                        tensor,
                        format!("is not in this file, where {INDEX} says it is"),
                    ));
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("path", &self.path)
            .field("tensors", &self.tensors.len())
            .field("bytes", &self.total_bytes())
            .finish_non_exhaustive()
    }
}

/// A file name without folders: an index must not reach outside its own folder.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0'])
}
