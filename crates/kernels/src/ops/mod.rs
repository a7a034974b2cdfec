//! The contract: what a model may call. Each operation has its shapes and its panics in its documentation, checks what it is given,
//! and is timed by the profile; what computes it is below, in `cpu`.

mod activation;
mod attention;
mod elementwise;
mod embedding;
mod factors;
mod head;
mod linear;
mod low_rank;
mod magnitude;
mod measure;
mod merge;
mod norm;
mod optimizer;
mod pool;
mod relative;
mod rope;

pub use crate::random::{fill_normal, fill_uniform};
pub use activation::{activation_backward, activation_forward, gated_backward, gated_forward};
pub use attention::{attention_backward, attention_forward};
pub use elementwise::{add_assign, add_cols, convert, copy_cols, scale};
pub use embedding::{embedding_backward, embedding_forward};
pub use factors::{scale_columns, scale_columns_backward};
pub use head::{
    cross_entropy_forward_backward, head_backward, head_chunk_rows, head_log_probs, head_logits,
    head_own_logits,
};
pub use linear::{
    bias_backward, linear_backward_input, linear_backward_weight, linear_forward,
    linears_backward_input, linears_forward,
};
pub use low_rank::{
    low_rank_backward_hidden, low_rank_backward_input, low_rank_backward_weights, low_rank_forward,
};
pub use magnitude::{adapted_squares, magnitude_backward, magnitude_forward, output_squares};
pub use measure::{
    all_finite, argmax_rows, first_non_finite, frobenius_norm, max_abs_diff, read_bandwidth,
    sum_squares,
};
pub use merge::low_rank_delta;
pub use norm::layer::{layer_norm_apply, layer_norm_backward, layer_norm_forward};
pub use norm::rms::{rms_norm_apply, rms_norm_backward, rms_norm_forward};
pub use optimizer::adamw_step;
pub use pool::{pool_backward, pool_forward};
pub use relative::{relative_attention_backward, relative_attention_forward};
pub use rope::{rope_backward, rope_forward};

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    /// The functions that are made public here.
    fn exported() -> BTreeSet<&'static str> {
        let lines = include_str!("mod.rs").split(';');
        let uses = lines.filter_map(|line| line.trim().strip_prefix("pub use "));
        let names = uses.flat_map(|names| names.split(['{', '}', ',', ':', '\n', ' ']));
        let names = names.map(str::trim);
        let modules = ["", "crate", "random", "norm", "layer", "rms"];
        let files: Vec<&str> = include_str!("mod.rs")
            .lines()
            .filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'))
            .collect();
        names
            .filter(|name| !modules.contains(name) && !files.contains(name))
            .collect()
    }

    /// Of the list in the crate's documentation.
    fn listed() -> Vec<&'static str> {
        let lines = include_str!("../lib.rs").lines();
        let entries = lines.filter_map(|line| line.strip_prefix("//! - [`"));
        entries
            .filter_map(|entry| entry.split_once("`] – "))
            .map(|(name, _)| name)
            .collect()
    }

    /// It is what a second device would have to implement.
    #[test]
    fn the_crate_lists_every_operation_once() {
        let listed = listed();
        let names: BTreeSet<&str> = listed.iter().copied().collect();
        assert_eq!(names.len(), listed.len(), "twice in the list");
        assert_eq!(names, exported());
        assert!(names.contains("linears_forward") && names.len() > 40);
    }
}
