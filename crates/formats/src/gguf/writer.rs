//! Writing GGUF files, streamed tensor by tensor.

use std::collections::HashSet;
use std::io::{self, Write};
use std::path::Path;

use super::{DEFAULT_ALIGNMENT, GgmlType, MOST_DIMENSIONS};
use crate::exactly::Exactly;
use crate::{FormatError, atomic};

/// The version that is written.
const VERSION: u32 = 3;

/// A value of the key/value section, in the type in which it is written: llama.cpp asks for exact types.
#[derive(Clone, Debug, PartialEq)]
pub enum KeyValue {
    /// Sizes and token ids.
    U32(u32),
    /// Numbers of file types.
    I32(i32),
    /// Factors and epsilons.
    F32(f32),
    /// Switches.
    Bool(bool),
    /// Texts.
    String(String),
    /// Types of tokens.
    I32s(Vec<i32>),
    /// Scores of tokens.
    F32s(Vec<f32>),
    /// Tokens and merges.
    Strings(Vec<String>),
    /// Type and value as another file has them, [`Gguf::raw_keys`](super::Gguf::raw_keys).
    Raw(Vec<u8>),
}

impl KeyValue {
    /// The number of its type, and of an array that of its elements.
    fn ids(&self) -> (u32, Option<u32>) {
        match self {
            // These bytes say it themselves.
            Self::Raw(_) => (0, None),
            Self::U32(_) => (4, None),
            Self::I32(_) => (5, None),
            Self::F32(_) => (6, None),
            Self::Bool(_) => (7, None),
            Self::String(_) => (8, None),
            Self::I32s(_) => (9, Some(5)),
            Self::F32s(_) => (9, Some(6)),
            Self::Strings(_) => (9, Some(8)),
        }
    }

    fn write(&self, to: &mut Vec<u8>) {
        if let Self::Raw(bytes) = self {
            to.extend_from_slice(bytes);
            return;
        }
        let (id, element) = self.ids();
        to.extend(id.to_le_bytes());
        to.extend(element.into_iter().flat_map(u32::to_le_bytes));
        let count = |n: usize, to: &mut Vec<u8>| to.extend((n as u64).to_le_bytes());
        match self {
            Self::Raw(_) => {}
            Self::U32(n) => to.extend(n.to_le_bytes()),
            Self::I32(n) => to.extend(n.to_le_bytes()),
            Self::F32(x) => to.extend(x.to_le_bytes()),
            Self::Bool(b) => to.push(u8::from(*b)),
            Self::String(text) => write_text(text, to),
            Self::I32s(list) => {
                count(list.len(), to);
                to.extend(list.iter().flat_map(|n| n.to_le_bytes()));
            }
            Self::F32s(list) => {
                count(list.len(), to);
                to.extend(list.iter().flat_map(|x| x.to_le_bytes()));
            }
            Self::Strings(list) => {
                count(list.len(), to);
                for text in list {
                    write_text(text, to);
                }
            }
        }
    }
}

fn write_text(text: &str, to: &mut Vec<u8>) {
    to.extend((text.len() as u64).to_le_bytes());
    to.extend(text.as_bytes());
}

/// Name, type and shape of a tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufSpec {
    /// The tensor's name in the file.
    pub name: String,
    /// How its values are stored.
    pub kind: GgmlType,
    /// The dimensions, outermost first, as everywhere in this program.
    pub shape: Vec<usize>,
}

/// Writes a GGUF file atomically. `fill(index, out)` is called once for each of `specs`, in their order, and must write that tensor's
/// blocks, row after row. Nothing is held in memory but the keys and a buffer.
///
/// # Errors
/// Two tensors share a name, a shape cannot be stored so, `fill` fails or writes too little or too much, or the file cannot be written. An
/// earlier file at `path` is then intact.
pub fn write_gguf(
    path: &Path,
    keys: &[(String, KeyValue)],
    specs: &[GgufSpec],
    mut fill: impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<(), FormatError> {
    let (header, sizes) = lay_out(path, keys, specs)?;
    atomic::write_file(path, |out| {
        out.write_all(&header)?;
        pad(out, header.len() as u64)?;
        for (index, (spec, size)) in specs.iter().zip(&sizes).enumerate() {
            let mut counted = Exactly::new(out, *size as usize, &spec.name);
            fill(index, &mut counted)?;
            counted.finish()?;
            pad(out, *size)?;
        }
        Ok(())
    })
}

/// The next place where a tensor may begin.
fn pad(out: &mut dyn Write, written: u64) -> io::Result<()> {
    let missing = written.next_multiple_of(DEFAULT_ALIGNMENT) - written;
    out.write_all(&[0; DEFAULT_ALIGNMENT as usize][..missing as usize])
}

/// Everything before the data, and the bytes of each tensor.
fn lay_out(
    path: &Path,
    keys: &[(String, KeyValue)],
    specs: &[GgufSpec],
) -> Result<(Vec<u8>, Vec<u64>), FormatError> {
    let mut header = b"GGUF".to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend((specs.len() as u64).to_le_bytes());
    header.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        write_text(key, &mut header);
        value.write(&mut header);
    }
    let (mut names, mut sizes, mut offset) = (HashSet::new(), Vec::new(), 0_u64);
    for spec in specs {
        let wrong = |problem: String| FormatError::tensor(path, &spec.name, problem);
        if !names.insert(spec.name.as_str()) {
            return Err(wrong("this name is given twice".to_owned()));
        }
        let fits = (1..=MOST_DIMENSIONS as usize).contains(&spec.shape.len());
        let size = spec.kind.byte_len(&spec.shape).filter(|_| fits);
        let size = size.ok_or_else(|| {
            wrong(format!(
                "of shape {:?} cannot be stored as {}, whose blocks have {} values",
                spec.shape,
                spec.kind,
                spec.kind.block_len()
            ))
        })?;
        write_text(&spec.name, &mut header);
        header.extend((spec.shape.len() as u32).to_le_bytes());
        let dimensions = spec.shape.iter().rev();
        header.extend(dimensions.flat_map(|size| (*size as u64).to_le_bytes()));
        header.extend(spec.kind.id().to_le_bytes());
        header.extend(offset.to_le_bytes());
        offset += size.next_multiple_of(DEFAULT_ALIGNMENT);
        sizes.push(size);
    }
    Ok((header, sizes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gguf;
    use crate::gguf::{GgufArray, GgufValue};

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let keys = [
            ("a", KeyValue::U32(7)),
            ("b", KeyValue::I32(-7)),
            ("c", KeyValue::F32(0.1)),
            ("d", KeyValue::Bool(true)),
            ("e", KeyValue::String("größer".to_owned())),
            ("f", KeyValue::I32s(vec![1, -2])),
            ("g", KeyValue::F32s(vec![0.5])),
            ("h", KeyValue::Strings(vec!["x".to_owned(), String::new()])),
        ]
        .map(|(key, value)| (key.to_owned(), value));
        let spec = |name: &str, kind: &str, shape: &[usize]| GgufSpec {
            name: name.to_owned(),
            kind: GgmlType::named(kind).unwrap(),
            shape: shape.to_vec(),
        };
        let specs = [spec("one", "F32", &[3]), spec("two", "Q8_0", &[2, 32])];
        write_gguf(&path, &keys, &specs, |index, out| {
            out.write_all(&vec![index as u8 + 1; [12, 68][index]])
        })
        .unwrap();
        let gguf = Gguf::open(&path).unwrap();
        let found: Vec<_> = gguf
            .metadata()
            .iter()
            .map(|(_, value)| value.clone())
            .collect();
        assert_eq!(
            found,
            [
                GgufValue::Unsigned(7),
                GgufValue::Signed(-7),
                GgufValue::Float(f64::from(0.1_f32)),
                GgufValue::Bool(true),
                GgufValue::String("größer".to_owned()),
                GgufValue::Array(GgufArray::Signed(vec![1, -2])),
                GgufValue::Array(GgufArray::Float(vec![0.5])),
                GgufValue::Array(GgufArray::String(["x", ""].into_iter().collect())),
            ]
        );
        for (tensor, spec) in gguf.tensors().iter().zip(&specs) {
            assert_eq!((&tensor.name, &tensor.shape), (&spec.name, &spec.shape));
        }
        assert_eq!(gguf.tensors()[1].bytes.as_ref(), [2; 68]);

        let copied: Vec<(String, KeyValue)> = (gguf.raw_keys())
            .map(|(key, bytes)| (key.to_owned(), KeyValue::Raw(bytes.to_vec())))
            .collect();
        let again = folder.path().join("again.gguf");
        write_gguf(&again, &copied, &[], |_, _| Ok(())).unwrap();
        let again = Gguf::open(&again).unwrap();
        assert!(again.metadata().iter().eq(gguf.metadata().iter()));

        let refused = |specs: &[GgufSpec], words: &str| {
            let error = write_gguf(&path, &[], specs, |_, _| Ok(()))
                .unwrap_err()
                .to_string();
            assert!(error.contains(words), "{error}");
        };
        refused(&[spec("w", "Q8_0", &[33])], "[33] cannot be stored as Q8_0");
        refused(
            &[spec("w", "F32", &[1]), spec("w", "F32", &[1])],
            "given twice",
        );
        refused(&[spec("w", "F32", &[1])], "`w`");
        assert_eq!(Gguf::open(&path).unwrap().tensors().len(), 2);
    }
}
