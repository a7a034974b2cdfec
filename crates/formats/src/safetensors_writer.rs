//! Writing safetensors files, streamed tensor by tensor.
//!
//! The layout is that of the `safetensors` crate and Python package: eight bytes of header length, a JSON header padded
//! with spaces to a multiple of eight, then the tensors without gaps. Tensors of larger elements come first, so every
//! tensor is aligned to its element and can be used where it is mapped.

use std::collections::{BTreeMap, HashSet};
use std::io::{self, Write};
use std::path::Path;

use serde_json::json;

use crate::checkpoint::StoredDType;
use crate::exactly::Exactly;
use crate::{FormatError, atomic};

/// Name, type and shape of a tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The tensor's name in the file.
    pub name: String,
    /// F32, F16, BF16, U8, I8 or I32.
    pub dtype: StoredDType,
    /// The dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    fn element_len(&self) -> Option<usize> {
        match self.dtype {
            StoredDType::Other("U8" | "I8") => Some(1),
            StoredDType::Other("I32") => Some(4),
            dtype => dtype.size(),
        }
    }

    /// Bytes of the tensor's values; `None` when that overflows or the type is another than those.
    pub fn byte_len(&self) -> Option<usize> {
        let elements = self
            .shape
            .iter()
            .try_fold(1usize, |n, &d| n.checked_mul(d))?;
        elements.checked_mul(self.element_len()?)
    }
}

/// Writes a safetensors file atomically. `fill(index, out)` is called once for each of `specs`, in the order in which
/// they lie in the file, and must write that tensor's values, little-endian, row-major, exactly
/// [`byte_len`](TensorSpec::byte_len) bytes. Nothing is held in memory but a buffer. `metadata` gets
/// `"format": "pt"`, which transformers demands, unless it says otherwise.
///
/// # Errors
/// Two tensors share a name, a size overflows, `fill` fails or writes too little or too much, or the file cannot be
/// written. An earlier file at `path` is then intact.
pub fn write_safetensors(
    path: &Path,
    specs: &[TensorSpec],
    metadata: &BTreeMap<String, String>,
    mut fill: impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<(), FormatError> {
    let layout = lay_out(path, specs, metadata)?;
    atomic::write_file(path, |out| {
        out.write_all(&(layout.header.len() as u64).to_le_bytes())?;
        out.write_all(&layout.header)?;
        for &(index, length) in &layout.order {
            let mut counted = Exactly::new(out, length, &specs[index].name);
            fill(index, &mut counted)?;
            counted.finish()?;
        }
        Ok(())
    })
}

struct Layout {
    header: Vec<u8>,
    /// Index into the specs and length in bytes, in file order.
    order: Vec<(usize, usize)>,
}

fn lay_out(
    path: &Path,
    specs: &[TensorSpec],
    metadata: &BTreeMap<String, String>,
) -> Result<Layout, FormatError> {
    let mut names = HashSet::new();
    let mut order = Vec::with_capacity(specs.len());
    for (index, spec) in specs.iter().enumerate() {
        if spec.name == "__metadata__" || !names.insert(spec.name.as_str()) {
            return Err(FormatError::tensor(
                path,
                &spec.name,
                "this name is reserved or given twice",
            ));
        }
        let length = spec.byte_len().ok_or_else(|| {
            let problem = format!("cannot write {} of shape {:?}", spec.dtype, spec.shape);
            FormatError::tensor(path, &spec.name, problem)
        })?;
        order.push((index, length));
    }
    order.sort_by(|&(a, _), &(b, _)| {
        let (a, b) = (&specs[a], &specs[b]);
        b.element_len()
            .cmp(&a.element_len())
            .then_with(|| a.name.cmp(&b.name))
    });

    let mut metadata = metadata.clone();
    metadata
        .entry("format".into())
        .or_insert_with(|| "pt".into());
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!(metadata));
    let mut offset = 0usize;
    for &(index, length) in &order {
        let spec = &specs[index];
        let end = offset.checked_add(length).ok_or_else(|| {
            FormatError::tensor(
                path,
                &spec.name,
                "the file would be larger than memory can address",
            )
        })?;
        let entry = json!({
            "dtype": spec.dtype.name(),
            "shape": spec.shape,
            "data_offsets": [offset, end],
        });
        header.insert(spec.name.clone(), entry);
        offset = end;
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(Layout { header, order })
}

#[cfg(test)]
mod tests {
    use safetensors::{Dtype, SafeTensors};

    use super::*;
    use crate::Checkpoint;

    fn spec(name: &str, dtype: StoredDType, shape: &[usize]) -> TensorSpec {
        TensorSpec {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
        }
    }

    #[test]
    fn what_is_written_is_read_back_by_the_crate_and_by_us() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let specs = [
            spec("odd", StoredDType::BF16, &[3]),
            spec("z", StoredDType::F32, &[2, 1]),
            spec("a", StoredDType::F32, &[]),
            spec("none", StoredDType::F16, &[4, 0]),
        ];
        let metadata = BTreeMap::from([("made by".into(), "\"a\" test".into())]);
        let mut order = Vec::new();
        write_safetensors(&path, &specs, &metadata, |index, out| {
            order.push(index);
            // In pieces, to see that pieces are fine.
            for _ in 0..specs[index].byte_len().unwrap() {
                out.write_all(&[index as u8])?;
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(order, [2, 1, 3, 0], "large elements first, then by name");

        let bytes = std::fs::read(&path).unwrap();
        let parsed = SafeTensors::deserialize(&bytes).unwrap();
        let odd = parsed.tensor("odd").unwrap();
        assert_eq!(
            (odd.dtype(), odd.shape(), odd.data()),
            (Dtype::BF16, &[3][..], &[0; 6][..])
        );
        assert_eq!(parsed.tensor("z").unwrap().data(), [1; 8]);
        assert!(u64::from_le_bytes(bytes[..8].try_into().unwrap()).is_multiple_of(8));

        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.metadata()["format"], "pt");
        assert_eq!(checkpoint.metadata()["made by"], "\"a\" test");
        assert_eq!(
            checkpoint.names().collect::<Vec<_>>(),
            ["a", "none", "odd", "z"]
        );
        assert_eq!(checkpoint.get("z").unwrap().bytes.range().start % 4, 0);
    }

    #[test]
    fn too_little_too_much_and_doubled_names_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let one = [spec("liar", StoredDType::F32, &[1])];
        for bytes in [3, 5] {
            let result = write_safetensors(&path, &one, &BTreeMap::new(), |_, out| {
                out.write_all(&vec![0; bytes])
            });
            assert!(result.unwrap_err().to_string().contains("`liar`"));
        }
        for specs in [
            vec![one[0].clone(), one[0].clone()],
            vec![spec("__metadata__", StoredDType::F32, &[1])],
            vec![spec("huge", StoredDType::F32, &[usize::MAX, 2])],
            vec![spec("int", StoredDType::Other("I64"), &[1])],
        ] {
            let result = write_safetensors(&path, &specs, &BTreeMap::new(), |_, _| Ok(()));
            assert!(result.unwrap_err().to_string().contains(&specs[0].name));
        }
        assert!(!path.exists());
    }
}
