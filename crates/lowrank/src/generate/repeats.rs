//! Keeping a text from repeating itself.

/// The tokens that would end a run of `n` tokens that `tokens` already holds; none where `n` is 0.
pub(super) fn repeating(tokens: &[u32], n: usize) -> Vec<u32> {
    if n == 0 || tokens.len() < n {
        return Vec::new();
    }
    let last = &tokens[tokens.len() + 1 - n..];
    tokens
        .windows(n)
        .filter(|run| run[..n - 1] == *last)
        .map(|run| run[n - 1])
        .collect()
}

/// Sets what would repeat a run of `n` tokens of a prompt and its continuation to -∞.
pub(super) fn ban_repeats(scores: &mut [f32], prompt: &[u32], made: &[u32], n: usize) {
    if n == 0 {
        return;
    }
    for token in repeating(&[prompt, made].concat(), n) {
        if let Some(score) = scores.get_mut(token as usize) {
            *score = f32::NEG_INFINITY;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_before_is_banned() {
        let tokens = [1, 2, 3, 1, 2, 4, 1, 2];
        assert_eq!(repeating(&tokens, 3), [3, 4]);
        assert_eq!(repeating(&tokens, 2), [3, 4]);
        assert_eq!(repeating(&tokens, 1), tokens);
        assert!(repeating(&tokens, 4).is_empty());
        assert!(repeating(&tokens, 0).is_empty());
        assert!(repeating(&tokens[..2], 3).is_empty());
        // A run of equal tokens bans one more of them.
        assert_eq!(repeating(&[5, 5, 5], 3), [5]);
    }
}
