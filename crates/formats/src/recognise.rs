//! What a file is, told by its first bytes, for messages about a file that is not what its name says.
//!
//! Data, adapters and models are asked for by name, and what lies there is often something else: a pointer of Git LFS,
//! a pickle, a page that says "404". A parser would only report the byte that it tripped over. Nothing is parsed or run
//! here; the bytes are compared with the marks that formats begin with.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// How many first bytes are enough to recognise any format here.
pub const HEAD: usize = 1024;

/// A format that is known by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// No bytes at all.
    Empty,
    /// The pointer that Git leaves where Git LFS is not installed.
    LfsPointer,
    /// A web page, often an error page that was saved under the name of a download.
    Html,
    /// XML.
    Xml,
    /// UTF-16 text with its low bytes first, with or without a mark.
    Utf16Le,
    /// UTF-16 text with its high bytes first, with or without a mark.
    Utf16Be,
    /// UTF-32 text with a mark.
    Utf32,
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
    /// bzip2.
    Bzip2,
    /// xz.
    Xz,
    /// LZ4.
    Lz4,
    /// 7-Zip.
    SevenZip,
    /// RAR.
    Rar,
    /// tar.
    Tar,
    /// A spreadsheet or document of an office program.
    Office,
    /// What `torch.save` writes: a pickle in a zip archive, or a bare pickle in its older form.
    Torch,
    /// `numpy.savez`.
    Npz,
    /// Another zip archive.
    Zip,
    /// A Python pickle.
    Pickle,
    /// `numpy.save`.
    Npy,
    /// Apache Parquet.
    Parquet,
    /// Apache Arrow, as a file, a stream or Feather.
    Arrow,
    /// Apache Avro.
    Avro,
    /// Apache ORC.
    Orc,
    /// HDF5, which Keras writes.
    Hdf5,
    /// SQLite.
    Sqlite,
    /// safetensors.
    Safetensors,
    /// llama.cpp's GGUF.
    Gguf,
    /// llama.cpp's older formats.
    Ggml,
    /// ONNX.
    Onnx,
    /// PDF.
    Pdf,
    /// A picture.
    Image,
}

impl Format {
    /// Recognises the first bytes of a file; [`HEAD`] of them are enough, and fewer only where the file is shorter.
    pub fn of(head: &[u8]) -> Option<Format> {
        if head.is_empty() {
            return Some(Format::Empty);
        }
        // The length of its header, which it begins with, may have the bytes of any mark.
        if is_safetensors(head) {
            return Some(Format::Safetensors);
        }
        let mark = MARKS.iter().find(|(mark, _)| head.starts_with(mark));
        match mark {
            Some((_, Format::Zip)) => Some(archive(head)),
            Some((_, Format::Pickle)) if head.starts_with(OLD_TORCH) => Some(Format::Torch),
            Some((_, Format::Pickle)) if !head.get(1).is_some_and(|v| (2..=5).contains(v)) => None,
            Some((_, Format::Arrow)) if head[0] == 0xFF && !is_arrow_stream(head) => None,
            Some((_, Format::Bzip2)) if !head.get(3).is_some_and(u8::is_ascii_digit) => None,
            Some((_, format)) => Some(*format),
            None => unmarked(head),
        }
    }

    /// Recognises a regular file. None where there is none, or it cannot be read, which whoever opens it says better.
    pub fn of_file(path: &Path) -> Option<Format> {
        // Opening a pipe would wait for its writer, and take bytes away from its reader.
        if !path.metadata().ok()?.is_file() {
            return None;
        }
        let mut head = Vec::new();
        let file = File::open(path).ok()?;
        file.take(HEAD as u64).read_to_end(&mut head).ok()?;
        Format::of(&head)
    }

    /// What to do about a file that should be something else and can be had again, whatever it should be: a pointer, a web
    /// page, nothing. None for real contents.
    pub fn fetch_again(self) -> Option<&'static str> {
        match self {
            Format::LfsPointer => {
                Some("run `git lfs install` and `git lfs pull` in the repository it came from")
            }
            Format::Html | Format::Xml => Some(
                "a download has saved a web page in its place; delete it and download the file itself",
            ),
            Format::Empty => Some("download or copy it again"),
            _ => None,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Empty => "empty",
            Format::LfsPointer => "a Git LFS pointer",
            Format::Html => "an HTML page",
            Format::Xml => "XML",
            Format::Utf16Le | Format::Utf16Be => "UTF-16 text",
            Format::Utf32 => "UTF-32 text",
            Format::Gzip => "compressed with gzip",
            Format::Zstd => "compressed with Zstandard",
            Format::Bzip2 => "compressed with bzip2",
            Format::Xz => "compressed with xz",
            Format::Lz4 => "compressed with LZ4",
            Format::SevenZip => "a 7-Zip archive",
            Format::Rar => "a RAR archive",
            Format::Tar => "a tar archive",
            Format::Office => "a spreadsheet or document of an office program",
            Format::Torch => {
                "a PyTorch file (a pickle, which can run code and is never loaded here)"
            }
            Format::Npz => "a NumPy archive",
            Format::Zip => "a zip archive",
            Format::Pickle => "a Python pickle (which can run code and is never loaded here)",
            Format::Npy => "a NumPy array",
            Format::Parquet => "Parquet",
            Format::Arrow => "Arrow",
            Format::Avro => "Avro",
            Format::Orc => "ORC",
            Format::Hdf5 => "HDF5",
            Format::Sqlite => "an SQLite database",
            Format::Safetensors => "safetensors",
            Format::Gguf => "GGUF (llama.cpp)",
            Format::Ggml => "GGML (llama.cpp's format before GGUF)",
            Format::Onnx => "ONNX",
            Format::Pdf => "a PDF",
            Format::Image => "a picture",
        })
    }
}

/// The older form of `torch.save`: a pickle of this number, then others.
const OLD_TORCH: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

/// What formats begin with. UTF-32's mark begins with UTF-16's, so it stands first.
const MARKS: &[(&[u8], Format)] = &[
    (
        b"version https://git-lfs.github.com/spec/",
        Format::LfsPointer,
    ),
    (b"\xFF\xFE\0\0", Format::Utf32),
    (b"\0\0\xFE\xFF", Format::Utf32),
    (b"\xFF\xFE", Format::Utf16Le),
    (b"\xFE\xFF", Format::Utf16Be),
    (b"\x1F\x8B", Format::Gzip),
    (b"\x28\xB5\x2F\xFD", Format::Zstd),
    (b"BZh", Format::Bzip2),
    (b"\xFD7zXZ\0", Format::Xz),
    (b"\x04\x22\x4D\x18", Format::Lz4),
    (b"7z\xBC\xAF\x27\x1C", Format::SevenZip),
    (b"Rar!\x1A\x07", Format::Rar),
    (b"PK\x03\x04", Format::Zip),
    (b"PK\x05\x06", Format::Zip),
    (b"\x80", Format::Pickle),
    (b"\x93NUMPY", Format::Npy),
    (b"PAR1", Format::Parquet),
    (b"PARE", Format::Parquet),
    (b"ARROW1", Format::Arrow),
    (b"FEA1", Format::Arrow),
    (b"\xFF\xFF\xFF\xFF", Format::Arrow),
    (b"Obj\x01", Format::Avro),
    (b"ORC\x0A", Format::Orc),
    (b"\x89HDF\r\n\x1A\n", Format::Hdf5),
    (b"SQLite format 3\0", Format::Sqlite),
    (b"GGUF", Format::Gguf),
    (b"lmgg", Format::Ggml),
    (b"fmgg", Format::Ggml),
    (b"tjgg", Format::Ggml),
    (b"algg", Format::Ggml),
    (b"%PDF-", Format::Pdf),
    (b"\x89PNG\r\n", Format::Image),
    (b"\xFF\xD8\xFF", Format::Image),
    (b"GIF8", Format::Image),
];

/// The length of the header, which is JSON, and its brace.
fn is_safetensors(head: &[u8]) -> bool {
    head.split_first_chunk::<8>().is_some_and(|(length, rest)| {
        rest.first() == Some(&b'{') && (2..100_000_000).contains(&u64::from_le_bytes(*length))
    })
}

/// The mark and the length of the schema.
fn is_arrow_stream(head: &[u8]) -> bool {
    let length = head.get(4..8).and_then(|bytes| bytes.try_into().ok());
    length.is_some_and(|bytes| (8..1 << 24).contains(&u32::from_le_bytes(bytes)))
}

/// A zip archive is told by the name of its first entry, which stands in the head.
fn archive(head: &[u8]) -> Format {
    let has = |name: &[u8]| head.windows(name.len()).any(|part| part == name);
    if has(b"/data.pkl") || has(b"/version") || has(b"/.format_version") {
        Format::Torch
    } else if has(b"[Content_Types].xml") || has(b"mimetypeapplication/vnd.") {
        Format::Office
    } else if has(b".npy") {
        Format::Npz
    } else {
        Format::Zip
    }
}

/// Formats without a mark at the start.
fn unmarked(head: &[u8]) -> Option<Format> {
    if head.get(257..262) == Some(b"ustar") {
        return Some(Format::Tar);
    }
    // A protobuf whose first field is a small version and whose second or third is the name of the tool that made it.
    if head.starts_with(b"\x08")
        && head.get(1).is_some_and(|version| *version < 32)
        && head.get(2) == Some(&0x12)
    {
        return Some(Format::Onnx);
    }
    if let Some(format) = utf16(head) {
        return Some(format);
    }
    let text = head.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(head);
    let text = text.trim_ascii_start();
    let starts = |with: &str| {
        text.get(..with.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(with.as_bytes()))
    };
    if starts("<!doctype html") || starts("<html") || starts("<head") {
        return Some(Format::Html);
    }
    starts("<?xml").then_some(Format::Xml)
}

/// UTF-16 without a mark: text in it begins with ASCII (a bracket, a quote), each with a zero byte on the same side.
fn utf16(head: &[u8]) -> Option<Format> {
    const SEEN: usize = 4;
    let pairs: Vec<&[u8; 2]> = head.as_chunks::<2>().0.iter().take(SEEN).collect();
    let ascii = |byte: u8| byte.is_ascii_graphic() || byte.is_ascii_whitespace();
    if pairs.len() < 2 {
        None
    } else if pairs.iter().all(|[low, high]| ascii(*low) && *high == 0) {
        Some(Format::Utf16Le)
    } else if pairs.iter().all(|[high, low]| ascii(*low) && *high == 0) {
        Some(Format::Utf16Be)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_by_their_first_bytes() {
        let utf16 = |text: &str, bytes: fn(u16) -> [u8; 2]| -> Vec<u8> {
            text.encode_utf16().flat_map(bytes).collect()
        };
        let mut tar = vec![b'a'; 300];
        tar[257..262].copy_from_slice(b"ustar");
        let mut safetensors = 60_u64.to_le_bytes().to_vec();
        safetensors.extend(b"{\"a\":");
        let mut like_a_pickle = 0x0280_u64.to_le_bytes().to_vec();
        like_a_pickle.extend(b"{\"a\":");
        for (head, expected) in [
            (b"".to_vec(), Format::Empty),
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:1".to_vec(),
                Format::LfsPointer,
            ),
            (b"\n  <!DOCTYPE HTML>".to_vec(), Format::Html),
            (b"<html lang=\"en\">".to_vec(), Format::Html),
            (b"\xEF\xBB\xBF<?xml version".to_vec(), Format::Xml),
            (utf16("\u{feff}{}", u16::to_le_bytes), Format::Utf16Le),
            (utf16("\u{feff}{}", u16::to_be_bytes), Format::Utf16Be),
            (utf16("{\"a\": 1}", u16::to_le_bytes), Format::Utf16Le),
            (utf16("{\"a\": 1}", u16::to_be_bytes), Format::Utf16Be),
            (b"\xFF\xFE\0\0{\0\0\0".to_vec(), Format::Utf32),
            (b"\x1F\x8B\x08".to_vec(), Format::Gzip),
            (b"BZh9".to_vec(), Format::Bzip2),
            (b"PK\x03\x04....archive/data.pkl".to_vec(), Format::Torch),
            (
                b"PK\x03\x04....[Content_Types].xml".to_vec(),
                Format::Office,
            ),
            (b"PK\x03\x04....a.npy".to_vec(), Format::Npz),
            (b"PK\x03\x04....rows.jsonl".to_vec(), Format::Zip),
            (b"\x80\x04\x95".to_vec(), Format::Pickle),
            (OLD_TORCH.to_vec(), Format::Torch),
            (b"PAR1\x15".to_vec(), Format::Parquet),
            (b"\xFF\xFF\xFF\xFF\x10\x01\0\0".to_vec(), Format::Arrow),
            (tar, Format::Tar),
            (safetensors, Format::Safetensors),
            (like_a_pickle, Format::Safetensors),
            (b"GGUF\x03".to_vec(), Format::Gguf),
            (b"\x08\x07\x12\x07pytorch".to_vec(), Format::Onnx),
        ] {
            assert_eq!(
                Format::of(&head),
                Some(expected),
                "{:?}",
                String::from_utf8_lossy(&head)
            );
        }
    }

    #[test]
    fn text_and_json_are_none_of_them() {
        for text in [
            "{\"a\": 1}\n",
            "[",
            "a",
            "PK",
            "BZhang said\n",
            "version 2\n",
            "<|user|>",
            "prompt,completion\n",
            "\u{80}",
            "ORC and elf",
            "ü",
        ] {
            assert_eq!(Format::of(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn only_regular_files_are_looked_into() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Format::of_file(folder.path()), None);
        assert_eq!(Format::of_file(&folder.path().join("none")), None);
        let file = folder.path().join("a");
        std::fs::write(&file, b"GGUF").unwrap();
        assert_eq!(Format::of_file(&file), Some(Format::Gguf));
    }
}
