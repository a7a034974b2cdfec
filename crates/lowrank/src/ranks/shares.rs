//! Which rank takes the optimizer's step on which of the trained values, and holds their moments (ZeRO-1).
//!
//! The values of a slot are cut into pieces of a fixed size. The pieces of a stage are shared out among its replicas, contiguous and as
//! equal as they can be. A value that acts in several stages belongs to the lowest of them, to which its gradient comes last.

use std::ops::Range;

use lowrank_kernels::Arena;

use super::Ranks;

/// Values of a piece, but for the last one of a slot. Their squares are one sum of the norm.
const PIECE: usize = 16 * 1024;

/// Some values of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) slot: usize,
    /// Which of the slot's values.
    pub(crate) values: Range<usize>,
    /// The rank that takes the optimizer's step on them.
    pub(crate) owner: usize,
}

/// How the trained values are shared out.
pub(crate) struct Shares {
    /// All pieces, in the order of the slots.
    pieces: Vec<Piece>,
    /// For each slot, the stages in which it acts, ascending.
    stages: Vec<Vec<usize>>,
}

impl Shares {
    /// Shares out slots of these lengths; `stages` names for each of them the stages in which it acts.
    pub(crate) fn new(ranks: &Ranks<'_>, lengths: &[usize], stages: Vec<Vec<usize>>) -> Self {
        let mut totals = vec![0; ranks.stages()];
        let owner_stage = |slot: usize| stages[slot].first().copied().unwrap_or(0);
        for (slot, length) in lengths.iter().enumerate() {
            totals[owner_stage(slot)] += length;
        }
        let mut before = vec![0; ranks.stages()];
        let mut pieces = Vec::new();
        for (slot, &length) in lengths.iter().enumerate() {
            let stage = owner_stage(slot);
            for start in (0..length).step_by(PIECE) {
                let values = start..length.min(start + PIECE);
                let replica = before[stage] * ranks.replicas() / totals[stage];
                before[stage] += values.len();
                pieces.push(Piece {
                    slot,
                    values,
                    owner: ranks.at(replica, stage),
                });
            }
        }
        Self { pieces, stages }
    }

    /// All pieces, in the order of the slots.
    pub(crate) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The pieces of a slot.
    pub(crate) fn of_slot(&self, slot: usize) -> &[Piece] {
        let first = self.pieces.partition_point(|piece| piece.slot < slot);
        let end = self.pieces.partition_point(|piece| piece.slot <= slot);
        &self.pieces[first..end]
    }

    /// The pieces of a rank, in their order.
    pub(crate) fn of(&self, rank: usize) -> impl Iterator<Item = &Piece> {
        self.pieces.iter().filter(move |piece| piece.owner == rank)
    }

    /// Number of values of a rank.
    pub(crate) fn len_of(&self, rank: usize) -> usize {
        self.of(rank).map(|piece| piece.values.len()).sum()
    }

    /// Where the values of a rank lie in an arena that holds all slots of its stage; ranges that touch are one.
    pub(crate) fn ranges_of(&self, rank: usize, arena: &Arena) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for piece in self.of(rank) {
            let range = within(arena, piece);
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        ranges
    }

    /// The stages in which a slot acts, ascending; the first one owns it.
    pub(crate) fn stages_of(&self, slot: usize) -> &[usize] {
        &self.stages[slot]
    }

    /// Slots that act in several stages.
    pub(crate) fn shared_slots(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.stages.len()).filter(|slot| self.stages[*slot].len() > 1)
    }
}

/// Where a piece lies in an arena that holds its slot.
pub(crate) fn within(arena: &Arena, piece: &Piece) -> Range<usize> {
    let start = arena.range(piece.slot).start;
    start + piece.values.start..start + piece.values.end
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lowrank_comm::InProcess;

    use super::*;

    #[test]
    fn every_value_has_one_owner_and_ranks_have_about_as_many() {
        let comms = InProcess::ranks(4, Duration::from_secs(1));
        let ranks = Ranks::new(&comms[0], 2).unwrap();
        let lengths = [3 * PIECE + 5, 7, 2 * PIECE, 40 * PIECE];
        let stages = vec![vec![0], vec![0, 1], vec![0], vec![1]];
        let shares = Shares::new(&ranks, &lengths, stages);
        for (slot, length) in lengths.iter().enumerate() {
            let of_slot = shares.pieces().iter().filter(|piece| piece.slot == slot);
            let mut end = 0;
            for piece in of_slot {
                assert_eq!(piece.values.start, end);
                end = piece.values.end;
            }
            assert_eq!(end, *length);
        }
        let owned: Vec<usize> = (0..4).map(|rank| shares.len_of(rank)).collect();
        assert_eq!(owned.iter().sum::<usize>(), lengths.iter().sum::<usize>());
        assert_eq!((owned[1], owned[3]), (20 * PIECE, 20 * PIECE), "of stage 1");
        assert!(owned[0].abs_diff(owned[2]) <= PIECE, "{owned:?}");
        assert_eq!(shares.shared_slots().collect::<Vec<_>>(), [1]);
    }
}
