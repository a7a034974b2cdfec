//! Writers of a known number of bytes.

use std::io::{self, Write};

/// A writer that lets through one tensor's bytes, no more and no fewer.
pub(crate) struct Exactly<'a> {
    out: &'a mut dyn Write,
    left: usize,
    name: &'a str,
}

impl<'a> Exactly<'a> {
    /// For a tensor of so many bytes.
    pub(crate) fn new(out: &'a mut dyn Write, bytes: usize, name: &'a str) -> Self {
        Self {
            out,
            left: bytes,
            name,
        }
    }

    /// Whether all were written.
    pub(crate) fn finish(&self) -> io::Result<()> {
        if self.left == 0 {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "tensor `{}`: {} bytes were not given",
            self.name, self.left
        )))
    }
}

impl Write for Exactly<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.left {
            return Err(io::Error::other(format!(
                "tensor `{}`: more bytes were given than its shape holds",
                self.name
            )));
        }
        let written = self.out.write(bytes)?;
        self.left -= written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
