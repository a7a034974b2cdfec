//! Numbers that flags take.

/// Parses a whole number that is `MOST` at most, for what is multiplied or allocated before anything can say that it does not
/// fit.
///
/// # Errors
/// When the text is no such number.
pub fn at_most<const MOST: usize>(text: &str) -> Result<usize, String> {
    match text.trim().parse::<usize>() {
        Ok(number) if number <= MOST => Ok(number),
        _ => Err(format!("expected a whole number of {MOST} at most")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_an_end() {
        assert_eq!(at_most::<9>("9"), Ok(9));
        for wrong in ["10", "-1", "1.5", "18446744073709551616", "x", ""] {
            let text = at_most::<9>(wrong).unwrap_err();
            assert_eq!(text, "expected a whole number of 9 at most");
        }
    }
}
