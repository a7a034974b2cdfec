//! What is done in the pauses of a long computation.

use std::fmt;

/// Something that a long computation calls between its parts, on the thread that computes: a server answers requests there
/// while it trains. It changes nothing of the result. The default is nothing.
#[derive(Clone, Copy, Default)]
pub struct Pauses<'a>(Option<&'a (dyn Fn() + Sync)>);

impl<'a> Pauses<'a> {
    /// Nothing is done.
    pub const NONE: Self = Self(None);

    /// This is done in every pause.
    pub fn with(work: &'a (dyn Fn() + Sync)) -> Self {
        Self(Some(work))
    }

    /// Whether anything is done.
    pub fn are_used(self) -> bool {
        self.0.is_some()
    }

    /// A pause.
    pub fn pause(self) {
        if let Some(work) = self.0 {
            work();
        }
    }
}

impl fmt::Debug for Pauses<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pauses").field(&self.are_used()).finish()
    }
}
