//! The order in which the gradients of a step's pieces are added: a binary tree over their numbers.
//!
//! The tree is fixed by the number of pieces alone, so the sum has the same bits however its leaves are shared out. Leaves are
//! `0..count`. A node of several leaves has the largest power of two of them that leaves some over as its left child, and
//! the rest as its right one.

use std::ops::Range;

use lowrank_kernels::{Arena, View, ViewMut, add_assign};

/// The leaves of a node's left and right child.
fn children(node: &Range<usize>) -> (Range<usize>, Range<usize>) {
    let left = node.len().next_power_of_two() / 2;
    let middle = node.start + left;
    (node.start..middle, middle..node.end)
}

/// The largest nodes that consist of these leaves alone, from left to right: what whoever has these leaves can add up by itself.
pub(crate) fn nodes(count: usize, leaves: &Range<usize>) -> Vec<Range<usize>> {
    fn collect(node: Range<usize>, leaves: &Range<usize>, found: &mut Vec<Range<usize>>) {
        if node.end <= leaves.start || leaves.end <= node.start {
            return;
        }
        if leaves.start <= node.start && node.end <= leaves.end {
            found.push(node);
            return;
        }
        let (left, right) = children(&node);
        collect(left, leaves, found);
        collect(right, leaves, found);
    }
    let mut found = Vec::new();
    if count > 0 {
        collect(0..count, leaves, &mut found);
    }
    found
}

/// The node that has this one as a child, and the other child; `None` for the root.
fn above(count: usize, node: &Range<usize>) -> Option<(Range<usize>, Range<usize>)> {
    let mut parent = 0..count;
    loop {
        let (left, right) = children(&parent);
        if parent.len() < 2 || parent == *node {
            return None;
        }
        if left == *node {
            return Some((parent, right));
        }
        if right == *node {
            return Some((parent, left));
        }
        parent = if node.end <= left.end { left } else { right };
    }
}

/// Sums of gradients of a range of leaves, which come in any order. At the end there is one for each of its [`nodes`].
#[derive(Default)]
pub(crate) struct LeafSums {
    /// By their nodes, from left to right.
    sums: Vec<(Range<usize>, Arena)>,
    spare: Vec<Arena>,
}

impl LeafSums {
    /// Forgets all sums, and takes the memory of `grads` for the new ones.
    pub(crate) fn begin(&mut self, grads: &mut Arena) {
        // The first one is what `end` has put in the place of `grads`, and has no memory of its own.
        let others = self.sums.drain(..).skip(1);
        self.spare.extend(others.map(|(_, sum)| sum));
        let empty = grads.zeros_like();
        self.spare.push(std::mem::replace(grads, empty));
    }

    /// Gives `grads` the first sum, which is all of it where all leaves were pushed; zeros where there is none.
    pub(crate) fn end(&mut self, grads: &mut Arena) {
        match self.sums.first_mut() {
            Some((_, sum)) => std::mem::swap(sum, grads),
            None => *grads = self.leaf(grads),
        }
    }

    /// An arena of zeros for a leaf's gradient, laid out as `like`.
    pub(crate) fn leaf(&mut self, like: &Arena) -> Arena {
        match self.spare.pop() {
            Some(mut arena) => {
                arena.zero();
                arena
            }
            None => like.zeros_like(),
        }
    }

    /// Takes the gradient of a leaf, of those in `leaves`, and adds up the nodes that are complete with it.
    pub(crate) fn push(
        &mut self,
        gradient: Arena,
        count: usize,
        leaves: &Range<usize>,
        leaf: usize,
    ) {
        let (mut node, mut sum) = (leaf..leaf + 1, gradient);
        while let Some((parent, other)) = above(count, &node)
            && leaves.start <= parent.start
            && parent.end <= leaves.end
            && let Some(at) = self.sums.iter().position(|(known, _)| *known == other)
        {
            let (_, other_sum) = self.sums.remove(at);
            let (mut left, right) = if other.start < node.start {
                (other_sum, sum)
            } else {
                (sum, other_sum)
            };
            add_assign(left.flat_mut(), right.flat());
            self.spare.push(right);
            (node, sum) = (parent, left);
        }
        let at = self
            .sums
            .partition_point(|(known, _)| known.start < node.start);
        self.sums.insert(at, (node, sum));
    }

    /// One sum for each node; the first one is in `grads` since the [`end`](Self::end).
    pub(crate) fn sums<'a>(&'a self, grads: &'a Arena) -> impl Iterator<Item = &'a Arena> + Clone {
        let others = self.sums.iter().skip(1).map(|(_, sum)| sum);
        self.sums.first().map(|_| grads).into_iter().chain(others)
    }
}

/// Adds up the tree from sums of nodes that cover all leaves, in their order; the first of them holds the result.
pub(crate) fn add_up(count: usize, nodes: &[Range<usize>], sums: &mut [Vec<f32>]) {
    // Gives the place of the node's sum.
    fn sum_of(node: Range<usize>, nodes: &[Range<usize>], sums: &mut [Vec<f32>]) -> usize {
        if let Some(at) = nodes.iter().position(|known| *known == node) {
            return at;
        }
        if node.len() <= 1 {
            unreachable!("the nodes cover all leaves");
        }
        let (left, right) = children(&node);
        let left = sum_of(left, nodes, sums);
        let right = sum_of(right, nodes, sums);
        let (before, after) = sums.split_at_mut(right);
        add(&mut before[left], &after[0]);
        left
    }
    if count > 0 {
        sum_of(0..count, nodes, sums);
    }
}

fn add(sum: &mut [f32], other: &[f32]) {
    let columns = sum.len();
    add_assign(ViewMut::of_row(sum), View::of_row(&other[..columns]));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sum of a node by the definition.
    fn naive(node: Range<usize>, leaves: &[f32]) -> f32 {
        if node.len() == 1 {
            return leaves[node.start];
        }
        let (left, right) = children(&node);
        naive(left, leaves) + naive(right, leaves)
    }

    #[test]
    fn however_leaves_are_shared_out_the_bits_are_the_same() {
        let values: Vec<f32> = (0..23_u32)
            .map(|n| ((n * 7919) % 1013) as f32 * 1e-3 + 1e4 * (n % 3) as f32)
            .collect();
        for count in 1..=values.len() {
            let whole = naive(0..count, &values);
            for ranks in 1..=count + 2 {
                let (mut all, mut sums) = (Vec::new(), Vec::new());
                for rank in 0..ranks {
                    let leaves = count * rank / ranks..count * (rank + 1) / ranks;
                    let mut own = LeafSums::default();
                    let like = Arena::new(&[(1, 1)]);
                    let mut order: Vec<usize> = leaves.clone().collect();
                    if ranks % 2 == 0 {
                        order.reverse();
                    } else {
                        order.sort_by_key(|leaf| (leaf * 7) % 5);
                    }
                    for leaf in order {
                        let mut gradient = own.leaf(&like);
                        gradient.view_mut(0).fill(values[leaf]);
                        own.push(gradient, count, &leaves, leaf);
                    }
                    let mut grads = like.zeros_like();
                    own.end(&mut grads);
                    let found = nodes(count, &leaves);
                    assert_eq!(found.len(), own.sums(&grads).count());
                    all.extend(found);
                    sums.extend(own.sums(&grads).map(|sum| sum.as_slice().to_vec()));
                }
                add_up(count, &all, &mut sums);
                assert_eq!(sums[0][0].to_bits(), whole.to_bits(), "{count} on {ranks}");
            }
        }
    }

    #[test]
    fn shares_of_a_power_of_two_are_one_node_each() {
        let only = |count, leaves: Range<usize>| {
            let mut found = nodes(count, &leaves);
            assert_eq!(found.len(), 1, "{leaves:?} of {count}");
            found.remove(0)
        };
        assert_eq!(only(16, 4..8), 4..8);
        assert_eq!(nodes(6, &(3..6)), [3..4, 4..6]);
        assert_eq!(only(5, 4..5), 4..5);
        assert!(nodes(5, &(5..5)).is_empty());
        assert_eq!(only(7, 0..7), 0..7);
    }

    #[test]
    fn few_arenas_are_held_however_many_steps_there_are() {
        let mut sums = LeafSums::default();
        let like = Arena::new(&[(1, 1)]);
        let mut grads = like.zeros_like();
        for _ in 0..5 {
            sums.begin(&mut grads);
            for leaf in 0..16 {
                let gradient = sums.leaf(&like);
                sums.push(gradient, 16, &(0..16), leaf);
            }
            sums.end(&mut grads);
            // One of them is `grads`, in whose place an arena without memory stands.
            assert_eq!(sums.sums.len() + sums.spare.len(), 5, "1 + log2(16)");
        }
    }
}
