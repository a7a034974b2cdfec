//! A cursor over untrusted bytes: every read says what it was for when the bytes run out.

use std::path::Path;

use crate::FormatError;

pub(super) struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(path: &'a Path, bytes: &'a [u8]) -> Reader<'a> {
        Reader {
            path,
            bytes,
            position: 0,
        }
    }

    pub(super) fn path(&self) -> &'a Path {
        self.path
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn error(&self, problem: impl Into<String>) -> FormatError {
        FormatError::malformed(self.path, problem)
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.position
    }

    pub(super) fn bytes(&mut self, count: usize, what: &str) -> Result<&'a [u8], FormatError> {
        if count > self.left() {
            return Err(self.error(format!(
                "is truncated: {what} at byte {} needs {count} bytes, {} are left",
                self.position,
                self.left()
            )));
        }
        let start = self.position;
        self.position += count;
        Ok(&self.bytes[start..self.position])
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], FormatError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N, what)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, FormatError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, FormatError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A length and that many bytes of UTF-8.
    pub(super) fn string(&mut self, what: &str) -> Result<String, FormatError> {
        self.text(what).map(str::to_owned)
    }

    /// The same where it lies.
    pub(super) fn text(&mut self, what: &str) -> Result<&'a str, FormatError> {
        let length = usize::try_from(self.u64(what)?).unwrap_or(usize::MAX);
        let bytes = self.bytes(length, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text),
            Err(_) => Err(self.error(format!(
                "{what} before byte {} is not valid UTF-8",
                self.position
            ))),
        }
    }

    /// Refuses a count that the rest of the file cannot hold, before anything is done for it.
    pub(super) fn check_count(
        &self,
        count: u64,
        most: u64,
        smallest: u64,
        what: &str,
    ) -> Result<(), FormatError> {
        if count > most {
            return Err(self.error(format!("claims {count} {what}; accepted: at most {most}")));
        }
        if count.saturating_mul(smallest) > self.left() as u64 {
            return Err(self.error(format!(
                "is truncated: it claims {count} {what}, for which {} bytes are too few",
                self.left()
            )));
        }
        Ok(())
    }
}
