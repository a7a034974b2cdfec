//! A first walk over a safetensors header: cheap, bounded in memory, and able to name the tensor at fault.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use crate::FormatError;

/// The format's own limit is 100 MB. The largest real headers (a hundred thousand experts in one file) are a tenth of
/// this.
const HEADER_CAP: usize = 100_000_000;
/// No weight has more dimensions; a longer list is an attempt to fill memory.
const MOST_DIMENSIONS: usize = 8;

/// Checks the header of `bytes`, a whole file, and returns where the tensors' data begins.
pub(super) fn check(path: &Path, bytes: &[u8]) -> Result<usize, FormatError> {
    let bad = |problem: String| Err(FormatError::malformed(path, problem));
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return bad(format!(
            "is {} bytes long, too short for a safetensors file",
            bytes.len()
        ));
    };
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > HEADER_CAP {
        return bad(format!(
            "claims a header of {length} bytes, more than the format's {HEADER_CAP}; this is not a safetensors file"
        ));
    }
    let Some((header, data)) = rest.split_at_checked(length) else {
        return bad(format!(
            "is truncated: the header should be {length} bytes long, {} are there; copy or download it again",
            rest.len()
        ));
    };
    let mut deserializer = serde_json::Deserializer::from_slice(header);
    let entries = deserializer
        .deserialize_map(HeaderVisitor)
        .and_then(|entries| deserializer.end().map(|()| entries))
        .map_err(|e| FormatError::malformed(path, format!("the header is not valid: {e}")))?;
    let mut end_of_data = 0;
    for entry in &entries {
        let (start, end) = entry.offsets;
        let expected = entry.byte_len();
        if end < start || expected != Some(end - start) {
            let problem = format!(
                "{} of shape {:?} cannot lie at bytes {start} to {end}",
                entry.dtype, entry.shape
            );
            return Err(FormatError::tensor(path, &entry.name, problem));
        }
        if end > data.len() {
            let problem = format!(
                "should end at byte {end} of the data, but the file holds {} bytes of data: it is truncated; copy or download it again",
                data.len()
            );
            return Err(FormatError::tensor(path, &entry.name, problem));
        }
        end_of_data = end_of_data.max(end);
    }
    if end_of_data != data.len() {
        return bad(format!(
            "{} bytes after the last tensor belong to none",
            data.len() - end_of_data
        ));
    }
    Ok(8 + length)
}

struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    offsets: (usize, usize),
}

impl Entry {
    fn byte_len(&self) -> Option<usize> {
        let elements = self
            .shape
            .iter()
            .try_fold(1usize, |n, &d| n.checked_mul(d))?;
        let bits = elements.checked_mul(self.dtype.bitsize())?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Vec<Entry>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensor names and their dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vec<Entry>, A::Error> {
        let mut seen = HashSet::new();
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format!("`{name}` occurs twice")));
            }
            if name == "__metadata__" {
                map.next_value::<Metadata>()?;
                continue;
            }
            let Info {
                dtype,
                shape,
                data_offsets,
            } = map
                .next_value()
                .map_err(|e| A::Error::custom(format!("tensor `{name}`: {e}")))?;
            entries.push(Entry {
                name,
                dtype,
                shape: shape.0,
                offsets: data_offsets,
            });
        }
        Ok(entries)
    }
}

#[derive(Deserialize)]
struct Info {
    dtype: Dtype,
    shape: Shape,
    data_offsets: (usize, usize),
}

struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Shape, D::Error> {
        struct ShapeVisitor;
        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {MOST_DIMENSIONS} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(dimension) = seq.next_element()? {
                    if shape.len() == MOST_DIMENSIONS {
                        return Err(A::Error::custom(format!(
                            "has more than {MOST_DIMENSIONS} dimensions"
                        )));
                    }
                    shape.push(dimension);
                }
                Ok(Shape(shape))
            }
        }
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

/// Strings only, as the crate demands; checked and dropped, one pair at a time.
struct Metadata;

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Metadata, D::Error> {
        struct MetadataVisitor;
        impl<'de> Visitor<'de> for MetadataVisitor {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`__metadata__` to be an object of strings, or null")
            }

            fn visit_unit<E>(self) -> Result<Metadata, E> {
                Ok(Metadata)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                while map.next_entry::<String, String>()?.is_some() {}
                Ok(Metadata)
            }
        }
        deserializer.deserialize_any(MetadataVisitor)
    }
}
