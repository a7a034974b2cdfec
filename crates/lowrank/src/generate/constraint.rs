//! What may come next in a text, beside what is likely.

use std::fmt;

/// A grammar that the tokens of one text must follow.
pub trait Constraint: Send {
    /// Sets the logits `[V]` of all tokens that may not come next to −∞. Where the text may end here, the tokens that end it stay.
    fn restrict(&mut self, logits: &mut [f32]);

    /// Goes on behind a token that was allowed.
    fn accept(&mut self, token: u32);

    /// Whether the text is complete, so that nothing may follow.
    fn is_complete(&self) -> bool;
}

impl fmt::Debug for dyn Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Constraint")
    }
}
