//! Memory-mapped files and shared ranges of them: the only raw memory of this crate.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::FormatError;

/// A file mapped for reading, or bytes that are part of the program.
pub(crate) enum Mapping {
    File(Mmap),
    Static(&'static [u8]),
}

impl Mapping {
    /// Maps the whole file.
    pub(crate) fn open(path: &Path) -> Result<Arc<Mapping>, FormatError> {
        Self::open_with_file(path).map(|(mapping, _)| mapping)
    }

    /// The same, with the file itself, of which [`part`](Self::part) maps parts by themselves.
    pub(crate) fn open_with_file(path: &Path) -> Result<(Arc<Mapping>, File), FormatError> {
        let file = File::open(path).map_err(|e| FormatError::io(path, "open", e))?;
        let metadata = file
            .metadata()
            .map_err(|e| FormatError::io(path, "read the size of", e))?;
        if !metadata.is_file() {
            return Err(FormatError::Missing {
                path: path.to_path_buf(),
                problem: "is not a regular file".into(),
            });
        }
        #[expect(unsafe_code, reason = "weights are mapped, not copied into memory")]
        // SAFETY: the mapping is read-only and lives as long as every slice of it. As for every reader that maps files,
        // soundness rests on nobody shrinking or rewriting the file meanwhile: our own writers never do, they write
        // aside and rename, which leaves the mapped inode as it is.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| FormatError::io(path, "map", e))?;
        Ok((Arc::new(Mapping::File(map)), file))
    }

    /// Maps some of a file's bytes, which must be there.
    pub(crate) fn part(file: &File, range: &Range<usize>) -> std::io::Result<Arc<Mapping>> {
        if range.is_empty() {
            return Ok(Arc::new(Mapping::Static(&[])));
        }
        let mut options = memmap2::MmapOptions::new();
        let options = options.offset(range.start as u64).len(range.len());
        #[expect(unsafe_code, reason = "weights are mapped, not copied into memory")]
        // SAFETY: as above; the range lies within the file, whose size was read when it was opened.
        let map = unsafe { options.map(file) }?;
        Ok(Arc::new(Mapping::File(map)))
    }

    /// Tells the kernel that the pages that lie wholly inside `range` may be dropped from memory.
    fn release(&self, range: &Range<usize>) {
        #[cfg(unix)]
        {
            const PAGE: usize = 4096;
            let start = range.start.next_multiple_of(PAGE);
            let end = range.end / PAGE * PAGE;
            if let Mapping::File(map) = self
                && start < end
            {
                #[expect(unsafe_code, reason = "gives a converted tensor's source pages back")]
                // SAFETY: DONTNEED on a shared, read-only, file-backed mapping loses nothing: the next access reads the
                // same bytes from the file again. On machines whose pages are larger than 4096 bytes the range is
                // widened to whole pages, which costs neighbours a re-read and nothing else.
                let advised = unsafe {
                    map.unchecked_advise_range(
                        memmap2::UncheckedAdvice::DontNeed,
                        start,
                        end - start,
                    )
                };
                // Advice only: a kernel that refuses it keeps the pages, and nothing is wrong.
                drop(advised);
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        match self {
            Mapping::File(map) => map,
            Mapping::Static(bytes) => bytes,
        }
    }
}

/// A range of a memory-mapped file, kept alive by a shared owner.
#[derive(Clone)]
pub struct SharedBytes {
    mapping: Arc<Mapping>,
    range: Range<usize>,
}

impl SharedBytes {
    /// `range` must lie inside the mapping; it is clamped if it does not.
    pub(crate) fn new(mapping: &Arc<Mapping>, range: Range<usize>) -> SharedBytes {
        let length = mapping.as_ref().as_ref().len();
        let end = range.end.min(length);
        SharedBytes {
            mapping: Arc::clone(mapping),
            range: range.start.min(end)..end,
        }
    }

    /// Some of these bytes; the range is clamped to them.
    #[must_use]
    pub fn part(&self, range: Range<usize>) -> SharedBytes {
        let end = self.range.len().min(range.end);
        let start = self.range.start + range.start.min(end);
        SharedBytes::new(&self.mapping, start..self.range.start + end)
    }

    /// The whole mapped file; [`range`](SharedBytes::range) says where in it these bytes lie.
    pub fn owner(&self) -> Arc<dyn AsRef<[u8]> + Send + Sync> {
        Arc::clone(&self.mapping) as Arc<dyn AsRef<[u8]> + Send + Sync>
    }

    /// Where these bytes lie in [`owner`](SharedBytes::owner).
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Gives the memory behind these bytes back to the system. They stay readable: the next access reads the file
    /// again. Call it when a tensor has been converted, so that source and copy are not both resident.
    pub fn release(&self) {
        self.mapping.release(&self.range);
    }
}

impl AsRef<[u8]> for SharedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.mapping.as_ref().as_ref()[self.range.clone()]
    }
}

impl fmt::Debug for SharedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedBytes({:?})", self.range)
    }
}
