//! Rotary positions (Su et al., 2021) in the "rotate half" order of Hugging Face: element i of a
//! head's first half is paired with element i of its second half. A table may pair neighbours instead ([`RopeOrder`](crate::RopeOrder)),
//! and have so few frequencies that the last elements of a head stay as they are.
//!
//! Both directions work in place.

use crate::cpu;
use crate::profile::op;
use crate::types::rope::RopeTable;
use crate::view::ViewMut;

/// Rotates each head of each row by its position; x [T, n·D] in place, one position a row.
///
/// # Panics
/// If the shapes do not match, or a position is not in the table.
pub fn rope_forward(x: ViewMut<'_>, positions: &[u32], table: &RopeTable, head_size: usize) {
    let _op = op("rope forward", || 0.0);
    check(&x, positions, table, head_size);
    cpu::rope::rotate(x, positions, table, head_size, 1.0);
}

/// Rotates back: dx [T, n·D] holds the gradient of the output and then that of the input.
///
/// # Panics
/// If the shapes do not match, or a position is not in the table.
pub fn rope_backward(dx: ViewMut<'_>, positions: &[u32], table: &RopeTable, head_size: usize) {
    let _op = op("rope backward", || 0.0);
    // (a, b) -> (a·cos - b·sin, b·cos + a·sin); its transpose has the sine's sign turned
    check(&dx, positions, table, head_size);
    cpu::rope::rotate(dx, positions, table, head_size, -1.0);
}

fn check(x: &ViewMut<'_>, positions: &[u32], table: &RopeTable, head_size: usize) {
    let half = table.half;
    assert!(
        2 * half <= head_size,
        "{half} frequencies turn more than the {head_size} elements of a head"
    );
    assert_eq!(positions.len(), x.rows(), "positions and rows");
    assert!(
        head_size > 0 && x.cols().is_multiple_of(head_size),
        "{} columns are not heads of {head_size}",
        x.cols()
    );
    if let Some(largest) = positions.iter().max() {
        assert!(
            (*largest as usize) < table.max_positions(),
            "position {largest} is past the {} of the rope table",
            table.max_positions()
        );
    }
}
