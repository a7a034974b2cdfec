//! A model in several files, as `llama-gguf-split` writes them: `NAME-00001-of-00003.gguf` and so on.

use std::path::Path;

use super::Gguf;
use crate::FormatError;

/// How many files there are.
pub(super) const COUNT: &str = "split.count";
/// Which of them a file is, from 0 on.
const NUMBER: &str = "split.no";
/// How many tensors all of them have.
const TENSORS: &str = "split.tensors.count";
/// As many as their names have digits for.
const MOST: u64 = 99_999;

/// A model of `count` files, of which one was opened. The first one has the metadata.
pub(super) fn join(opened: Gguf, count: u64) -> Result<Gguf, FormatError> {
    let number = opened.metadata.get_u64(NUMBER);
    let number = number.filter(|number| *number < count && count <= MOST);
    let Some((number, before)) = number.and_then(|n| Some((n, beginning(&opened.path, n, count)?)))
    else {
        let problem = format!(
            "says that it is part {} of {count}, which its name does not; call it NAME-00001-of-{count:05}.gguf with its own number, \
             beside the other parts",
            number.map_or_else(|| "?".to_owned(), |number| (number + 1).to_string())
        );
        return Err(FormatError::malformed(&opened.path, problem));
    };
    let path = opened.path.clone();
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut opened = Some(opened);
    let mut parts = Vec::new();
    for i in 0..count {
        if i == number {
            parts.extend(opened.take());
            continue;
        }
        let other = folder.join(name(&before, i, count));
        if !other.is_file() {
            return Err(FormatError::Missing {
                path: other,
                problem: format!(
                    "is part {} of {count} of the model; download it again, into the folder of the others",
                    i + 1
                ),
            });
        }
        let part = Gguf::open_one(&other)?;
        if (part.metadata.get_u64(NUMBER), part.metadata.get_u64(COUNT)) != (Some(i), Some(count)) {
            let problem = format!("is not part {} of {count}, which its name says", i + 1);
            return Err(FormatError::malformed(&other, problem));
        }
        parts.push(part);
    }
    let mut parts = parts.into_iter();
    let Some(mut whole) = parts.next() else {
        return Err(FormatError::malformed(&path, "has no parts"));
    };
    for part in parts {
        for tensor in part.tensors {
            if whole.by_name.contains_key(&tensor.name) {
                return Err(FormatError::tensor(
                    &part.path,
                    tensor.name,
                    "is in another part, too",
                ));
            }
            let at = whole.tensors.len();
            whole.by_name.insert(tensor.name.clone(), at);
            whole.tensors.push(tensor);
        }
    }
    let found = whole.tensors.len() as u64;
    match whole.metadata.get_u64(TENSORS) {
        Some(all) if all != found => {
            let problem = format!(
                "the {count} parts have {found} tensors, and {TENSORS} is {all}; they are of several models"
            );
            Err(FormatError::malformed(&whole.path, problem))
        }
        _ => Ok(whole),
    }
}

/// Bytes of a file, or of all files of a model that was split, as far as they can be looked at; their contents are not.
pub fn file_bytes(path: &Path) -> u64 {
    let length = |path: &Path| std::fs::metadata(path).map_or(0, |data| data.len());
    let Some((before, count)) = split_name(path) else {
        return length(path);
    };
    let folder = path.parent().unwrap_or(Path::new(""));
    (0..count)
        .map(|i| length(&folder.join(name(&before, i, count))))
        .sum()
}

/// What the names of a file and its siblings begin with, and how many they are, if its name says that it was split.
fn split_name(path: &Path) -> Option<(String, u64)> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
    let (before, count) = stem.rsplit_once("-of-")?;
    let count = count
        .parse()
        .ok()
        .filter(|count| (1..=MOST).contains(count))?;
    let number: u64 = before.rsplit_once('-')?.1.parse().ok()?;
    Some((beginning(path, number.checked_sub(1)?, count)?, count))
}

/// What a part's name begins with, if it has the form that says so.
fn beginning(path: &Path, number: u64, count: u64) -> Option<String> {
    let whole = path.file_name()?.to_str()?;
    whole
        .strip_suffix(&name("", number, count))
        .map(str::to_owned)
}

fn name(before: &str, number: u64, count: u64) -> String {
    format!("{before}-{:05}-of-{count:05}.gguf", number + 1)
}

#[cfg(test)]
mod tests {
    use super::super::{GgmlType, GgufSpec, KeyValue, write_gguf};
    use super::*;

    /// Three parts with a tensor each, which is 0, 1 and 2.
    fn parts(folder: &Path) {
        for i in 0..3_u8 {
            let keys = [
                (NUMBER, u32::from(i)),
                (COUNT, 3),
                (TENSORS, 3),
                ("own", 10 + u32::from(i)),
            ];
            let keys = keys.map(|(key, value)| (key.to_owned(), KeyValue::U32(value)));
            let spec = GgufSpec {
                name: format!("tensor {i}"),
                kind: GgmlType::named("F32").unwrap(),
                shape: vec![1],
            };
            let path = folder.join(name("model", u64::from(i), 3));
            write_gguf(&path, &keys, &[spec], |_, out| out.write_all(&[i; 4])).unwrap();
        }
    }

    #[test]
    fn parts_are_one_model_whichever_is_named() {
        let folder = tempfile::tempdir().unwrap();
        parts(folder.path());
        let length = |i| {
            std::fs::metadata(folder.path().join(name("model", i, 3)))
                .unwrap()
                .len()
        };
        let all = (0..3).map(length).sum::<u64>();
        for i in 0..3 {
            let gguf = Gguf::open(&folder.path().join(name("model", i, 3))).unwrap();
            assert_eq!(gguf.metadata().get_u64("own"), Some(10));
            assert_eq!(file_bytes(gguf.path()), all);
            assert_eq!(gguf.tensors().len(), 3);
            for j in 0..3 {
                let tensor = gguf.tensor(&format!("tensor {j}")).unwrap();
                assert_eq!(tensor.bytes.as_ref(), [j; 4]);
            }
        }
    }

    #[test]
    fn parts_that_do_not_belong_together_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = |i| folder.path().join(name("model", i, 3));
        let says = |words: &str| {
            let error = Gguf::open(&path(0)).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        parts(folder.path());
        std::fs::copy(path(1), path(2)).unwrap();
        says("is not part 3 of 3");
        std::fs::remove_file(path(2)).unwrap();
        says("is part 3 of 3 of the model; download it again");
        parts(folder.path());
        let other = folder.path().join("model.gguf");
        std::fs::rename(path(1), &other).unwrap();
        assert_eq!(file_bytes(&other), std::fs::metadata(&other).unwrap().len());
        let error = Gguf::open(&other).unwrap_err().to_string();
        assert!(
            error.contains("part 2 of 3, which its name does not"),
            "{error}"
        );
    }
}
