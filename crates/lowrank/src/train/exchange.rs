//! What the ranks of a run exchange in a step: gradients on the way to their sums, figures, and the parameters that the step made.
//!
//! Each way moves the bytes of a ring: a rank sends and gets (N - 1) / N of the gradients, and the same of the parameters.

use std::borrow::Cow;
use std::ops::Range;

use bytemuck::{cast_slice, cast_slice_mut};
use lowrank_kernels::{Arena, View, sum_squares};
use rayon::prelude::*;

use super::step::LeafOutcome;
use crate::Error;
use crate::objective::LossSum;
use crate::plan::IN_EXCHANGE;
use crate::ranks::tree::{LeafSums, add_up, nodes};
use crate::ranks::{Ranks, Shares};

/// Values that are on their way to a rank at a time.
const AT_A_TIME: usize = IN_EXCHANGE as usize / size_of::<f32>();

/// The ranks that hold the same values as this one: those of its stage, in the order of the replicas.
fn peers(ranks: &Ranks<'_>) -> Vec<usize> {
    let stage = ranks.stage();
    (0..ranks.replicas())
        .map(|replica| ranks.at(replica, stage))
        .collect()
}

/// A rank's share of the gradients, where other replicas have computed some of them. Its memory is used again in the next step.
#[derive(Default)]
pub(super) struct Reduced {
    /// The sums.
    pub(super) own: Vec<f32>,
    /// What they are added up from, a part at a time.
    received: Vec<Vec<f32>>,
}

/// The sums over all pieces of a rank's own share of the gradients, where other replicas have computed some of them.
pub(super) fn reduce(
    ranks: &Ranks<'_>,
    shares: &Shares,
    sums: &LeafSums,
    grads: &Arena,
    count: usize,
    Reduced { own, received }: &mut Reduced,
) -> Result<(), Error> {
    if ranks.replicas() == 1 {
        return Ok(());
    }
    let peers = peers(ranks);
    let of_replica = |replica| nodes(count, &ranks.share(count, replica));
    let nodes: Vec<Vec<Range<usize>>> = (0..peers.len()).map(of_replica).collect();
    let all: Vec<Range<usize>> = nodes.concat();
    let ranges: Vec<_> = peers
        .iter()
        .map(|peer| shares.ranges_of(*peer, grads))
        .collect();
    let lengths: Vec<usize> = peers.iter().map(|peer| shares.len_of(*peer)).collect();
    let own_len = lengths[ranks.replica()];
    own.resize(own_len, 0.0);
    let part = (AT_A_TIME / all.len()).max(1);
    let most = lengths.iter().copied().max().unwrap_or(0);
    let widest = nodes.iter().map(Vec::len).max().unwrap_or(0);
    for start in (0..most).step_by(part) {
        let within = |length: usize| start.min(length)..length.min(start + part);
        let wanted = within(own_len);
        received.resize_with(all.len(), Vec::new);
        for sum in received.iter_mut() {
            sum.resize(wanted.len(), 0.0);
        }
        for node in 0..widest {
            let sum = sums.sums(grads).nth(node);
            let mut packed = vec![Cow::Borrowed(&[][..]); ranks.size()];
            if let Some(sum) = sum {
                for (at, peer) in peers.iter().enumerate() {
                    packed[*peer] = pack(sum, &ranges[at], &within(lengths[at]));
                }
            }
            let sent: Vec<&[u8]> = packed.iter().map(|values| cast_slice(values)).collect();
            // The place of a replica's first node among all of them.
            let firsts = nodes.iter().scan(0, |first, of_replica| {
                let own = *first;
                *first += of_replica.len();
                Some(own)
            });
            let mut of_peer: Vec<Option<usize>> = vec![None; ranks.size()];
            for ((at, peer), first) in peers.iter().enumerate().zip(firsts) {
                of_peer[*peer] = (node < nodes[at].len()).then_some(first + node);
            }
            let mut buffers: Vec<Option<&mut Vec<f32>>> = received.iter_mut().map(Some).collect();
            let mut into: Vec<&mut [u8]> = of_peer
                .iter()
                .map(|at| match at.and_then(|at| buffers[at].take()) {
                    Some(buffer) => cast_slice_mut(buffer.as_mut_slice()),
                    None => &mut [],
                })
                .collect();
            ranks.comm().all_to_all(&sent, &mut into)?;
        }
        add_up(count, &all, received);
        own[wanted].copy_from_slice(&received[0]);
    }
    Ok(())
}

/// Some of the values of an arena's ranges, counted over all of them; a copy where they do not lie together.
fn pack<'a>(arena: &'a Arena, ranges: &[Range<usize>], wanted: &Range<usize>) -> Cow<'a, [f32]> {
    let values = arena.as_slice();
    let mut parts = parts(ranges, wanted);
    match (parts.next(), parts.next()) {
        (None, _) => Cow::Borrowed(&[]),
        (Some(one), None) => Cow::Borrowed(&values[one]),
        (Some(first), Some(second)) => {
            let mut packed = values[first].to_vec();
            for part in std::iter::once(second).chain(parts) {
                packed.extend_from_slice(&values[part]);
            }
            Cow::Owned(packed)
        }
    }
}

/// Where in an arena some of the values of ranges lie, `wanted` being counted over all of them.
fn parts<'a>(
    ranges: &'a [Range<usize>],
    wanted: &'a Range<usize>,
) -> impl Iterator<Item = Range<usize>> + 'a {
    let mut before = 0;
    ranges.iter().filter_map(move |range| {
        let first = wanted.start.max(before) - before;
        let end = wanted.end.min(before + range.len()).saturating_sub(before);
        before += range.len();
        (first < end).then(|| range.start + first..range.start + end)
    })
}

/// What the ranks tell each other of a step.
pub(super) struct Told {
    /// What came of each piece, in their order.
    pub(super) leaves: Vec<LeafOutcome>,
    /// Σ of the squares of all gradients.
    pub(super) squares: f64,
    /// The first slot whose gradient is not finite.
    pub(super) first_bad: Option<usize>,
    /// Whether any rank is asked to stop.
    pub(super) stops: bool,
}

/// Numbers of a piece in a message.
const OF_LEAF: usize = 5;

fn to_numbers(leaf: &LeafOutcome) -> [u64; OF_LEAF] {
    let LossSum {
        loss,
        correct,
        tokens,
        weight,
    } = leaf.sums;
    let real = leaf.tokens as u64;
    [
        loss.to_bits(),
        correct as u64,
        tokens as u64,
        weight.to_bits(),
        real,
    ]
}

fn from_numbers(numbers: &[u64]) -> LeafOutcome {
    LeafOutcome {
        sums: LossSum {
            loss: f64::from_bits(numbers[0]),
            correct: numbers[1] as usize,
            tokens: numbers[2] as usize,
            weight: f64::from_bits(numbers[3]),
        },
        tokens: numbers[4] as usize,
    }
}

/// Tells all ranks what came of this rank's pieces and how large its share of the gradients is.
pub(super) fn tell(
    ranks: &Ranks<'_>,
    shares: &Shares,
    own: &[LeafOutcome],
    grads: &[View<'_>],
    count: usize,
    stops: bool,
) -> Result<Told, Error> {
    let own_squares = squares_of_pieces(ranks, shares, grads);
    let mut pieces_of = vec![0; ranks.size()];
    for piece in shares.pieces() {
        pieces_of[piece.owner] += 1;
    }
    let own_squares = (own_squares.as_slice(), pieces_of.as_slice());
    let heard = tell_all(ranks, own_squares, own, count, stops)?;
    let mut squares: Vec<_> = heard.numbers.iter().map(|of_rank| of_rank.iter()).collect();
    let (mut sum, mut first_bad) = (0.0, None);
    for piece in shares.pieces() {
        let square = *squares[piece.owner].next().unwrap_or(&f64::NAN);
        if first_bad.is_none() && !square.is_finite() {
            first_bad = Some(piece.slot);
        }
        sum += square;
    }
    Ok(Told {
        leaves: heard.leaves,
        squares: sum,
        first_bad,
        stops: heard.stops,
    })
}

/// How many of `count` pieces or passes a rank has the outcome of: those of its replica, where it scores.
fn leaves_of(ranks: &Ranks<'_>, count: usize, rank: usize) -> usize {
    let scores = rank % ranks.stages() + 1 == ranks.stages();
    if scores {
        ranks.share(count, rank / ranks.stages()).len()
    } else {
        0
    }
}

/// What came of all of `count` passes, from what came of this rank's own; and whether any rank is asked to stop.
pub(super) fn tell_outcomes(
    ranks: &Ranks<'_>,
    own: &[LeafOutcome],
    count: usize,
    stops: bool,
) -> Result<(Vec<LeafOutcome>, bool), Error> {
    let none = vec![0; ranks.size()];
    let heard = tell_all(ranks, (&[], &none), own, count, stops)?;
    Ok((heard.leaves, heard.stops))
}

/// What all ranks have told each other.
#[derive(Default)]
struct Heard {
    /// The numbers of each rank.
    numbers: Vec<Vec<f64>>,
    /// What came of each piece or pass, in their order.
    leaves: Vec<LeafOutcome>,
    /// Whether any rank is asked to stop.
    stops: bool,
}

/// Tells all ranks, in one message, whether this one is asked to stop, some numbers, of which `numbers_of` says how many each rank has, and what
/// came of its share of `count` pieces or passes.
fn tell_all(
    ranks: &Ranks<'_>,
    (numbers, numbers_of): (&[f64], &[usize]),
    own: &[LeafOutcome],
    count: usize,
    stops: bool,
) -> Result<Heard, Error> {
    let mut message = vec![u64::from(stops)];
    message.extend(numbers.iter().map(|number| number.to_bits()));
    if ranks.scores() {
        message.extend(own.iter().flat_map(to_numbers));
    }
    let told = ranks.gather(&message, |rank| {
        1 + numbers_of[rank] + OF_LEAF * leaves_of(ranks, count, rank)
    })?;
    let mut heard = Heard::default();
    for (of_rank, count) in told.iter().zip(numbers_of) {
        let (numbers, leaves) = of_rank[1..].split_at(*count);
        let numbers = numbers.iter().copied().map(f64::from_bits);
        heard.numbers.push(numbers.collect());
        heard
            .leaves
            .extend(leaves.chunks_exact(OF_LEAF).map(from_numbers));
        heard.stops |= of_rank[0] != 0;
    }
    Ok(heard)
}

/// Σ x² of each piece of a rank's share, whose gradients come range by range.
fn squares_of_pieces(ranks: &Ranks<'_>, shares: &Shares, grads: &[View<'_>]) -> Vec<f64> {
    let mut left = grads.iter();
    let mut current: Option<(View<'_>, usize)> = None;
    let mut pieces = Vec::new();
    for piece in shares.of(ranks.rank()) {
        let length = piece.values.len();
        let (view, at) = match current {
            Some((view, at)) if at < view.len() => (view, at),
            _ => match left.next() {
                Some(view) => (*view, 0),
                None => break,
            },
        };
        let column = view.reshape(view.len(), 1);
        pieces.push(column.slice_rows(at..at + length));
        current = Some((view, at + length));
    }
    pieces.into_par_iter().map(sum_squares).collect()
}

/// Gives every rank the parameters that others have made: those of its stage, and those of other stages that act in its own, too.
pub(super) fn share(ranks: &Ranks<'_>, shares: &Shares, params: &mut Arena) -> Result<(), Error> {
    if ranks.replicas() > 1 {
        share_within_stage(ranks, shares, params)?;
    }
    let stage = ranks.stage();
    for slot in shares.shared_slots() {
        let stages = shares.stages_of(slot);
        let owner = stages[0];
        if stage == owner {
            for other in &stages[1..] {
                let values = cast_slice(&params.as_slice()[params.range(slot)]).to_vec();
                ranks
                    .comm()
                    .send(ranks.at(ranks.replica(), *other), values)?;
            }
        } else if stages.contains(&stage) {
            let range = params.range(slot);
            let into = cast_slice_mut(&mut params.as_mut_slice()[range]);
            ranks
                .comm()
                .receive(ranks.at(ranks.replica(), owner), into)?;
        }
    }
    Ok(ranks.comm().flush()?)
}

fn share_within_stage(ranks: &Ranks<'_>, shares: &Shares, params: &mut Arena) -> Result<(), Error> {
    let peers = peers(ranks);
    let ranges: Vec<_> = peers
        .iter()
        .map(|peer| shares.ranges_of(*peer, params))
        .collect();
    let lengths: Vec<usize> = peers.iter().map(|peer| shares.len_of(*peer)).collect();
    let part = (AT_A_TIME / peers.len()).max(1);
    let most = lengths.iter().copied().max().unwrap_or(0);
    for start in (0..most).step_by(part) {
        let within = |at: usize| start.min(lengths[at])..lengths[at].min(start + part);
        let parts_of = |at: usize| parts(&ranges[at], &within(at)).collect::<Vec<_>>();
        let parts: Vec<Vec<Range<usize>>> = (0..peers.len()).map(parts_of).collect();
        if parts.iter().all(|of_peer| of_peer.len() <= 1) {
            exchange_in_place(ranks, &peers, &parts, params)?;
        } else {
            exchange_packed(ranks, &peers, &parts, params)?;
        }
    }
    Ok(())
}

/// Sends this rank's values to its peers, and gets theirs, where each of them has values that lie together. Those of a rank lie behind those
/// of the one before it.
fn exchange_in_place(
    ranks: &Ranks<'_>,
    peers: &[usize],
    parts: &[Vec<Range<usize>>],
    params: &mut Arena,
) -> Result<(), Error> {
    let mut own: &[f32] = &[];
    let mut into: Vec<&mut [u8]> = (0..ranks.size()).map(|_| &mut [][..]).collect();
    let (mut rest, mut before) = (params.as_mut_slice(), 0);
    for (at, peer) in peers.iter().enumerate() {
        let Some(part) = parts[at].first() else {
            continue;
        };
        let (_, behind) = std::mem::take(&mut rest).split_at_mut(part.start - before);
        let (values, behind) = behind.split_at_mut(part.len());
        (rest, before) = (behind, part.end);
        if at == ranks.replica() {
            own = values;
        } else {
            into[*peer] = cast_slice_mut(values);
        }
    }
    let mut sent: Vec<&[u8]> = vec![&[]; ranks.size()];
    for peer in peers.iter().filter(|peer| **peer != ranks.rank()) {
        sent[*peer] = cast_slice(own);
    }
    Ok(ranks.comm().all_to_all(&sent, &mut into)?)
}

/// The same where values of a rank lie apart: they are copied on the way.
fn exchange_packed(
    ranks: &Ranks<'_>,
    peers: &[usize],
    parts: &[Vec<Range<usize>>],
    params: &mut Arena,
) -> Result<(), Error> {
    let own = ranks.replica();
    let length = |at: usize| parts[at].iter().map(Range::len).sum::<usize>();
    let packed = pack(params, &parts[own], &(0..length(own)));
    let mut sent: Vec<&[u8]> = vec![&[]; ranks.size()];
    let mut buffers: Vec<Vec<f32>> = vec![Vec::new(); ranks.size()];
    for (at, peer) in peers.iter().enumerate() {
        sent[*peer] = cast_slice(&packed);
        buffers[*peer] = vec![0.0; length(at)];
    }
    let mut into: Vec<&mut [u8]> = buffers
        .iter_mut()
        .map(|buffer| cast_slice_mut(buffer.as_mut_slice()))
        .collect();
    ranks.comm().all_to_all(&sent, &mut into)?;
    drop(packed);
    let values = params.as_mut_slice();
    for (at, peer) in peers.iter().enumerate().filter(|(at, _)| *at != own) {
        let mut from = buffers[*peer].as_slice();
        for part in &parts[at] {
            let (these, rest) = from.split_at(part.len());
            values[part.clone()].copy_from_slice(these);
            from = rest;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lowrank_comm::{Communicator, InProcess};

    use super::*;
    use crate::ranks::within;

    /// Slots of which one lies between others and belongs to another stage.
    const STAGES: [&[usize]; 4] = [&[1], &[0, 1], &[1], &[0]];

    fn value(slot: usize, at: usize) -> f32 {
        (1000 * slot) as f32 + at as f32 * 1e-3
    }

    #[test]
    fn every_rank_gets_the_values_that_others_made() {
        // With these lengths a rank's values lie together, and with the others they do not.
        for lengths in [
            [40_000, 100, 60_000, 70_000],
            [20_000, 33, 100_000, 1],
            [5, 20_000, 3, 40_000],
        ] {
            let comms = InProcess::ranks(6, Duration::from_secs(20));
            std::thread::scope(|scope| {
                for comm in comms {
                    scope.spawn(move || {
                        let ranks = Ranks::new(&comm, 2).unwrap();
                        let stages = STAGES.map(<[usize]>::to_vec).to_vec();
                        let shares = Shares::new(&ranks, &lengths, stages);
                        let shapes = lengths.map(|length| (1, length));
                        let is_held = |slot: usize| STAGES[slot].contains(&ranks.stage());
                        let mut params = Arena::holding(&shapes, is_held);
                        for piece in shares.of(comm.rank()) {
                            let place = within(&params, piece);
                            let values = &mut params.as_mut_slice()[place];
                            for (value_of, at) in values.iter_mut().zip(piece.values.clone()) {
                                *value_of = value(piece.slot, at);
                            }
                        }
                        share(&ranks, &shares, &mut params).unwrap();
                        for slot in (0..4).filter(|slot| is_held(*slot)) {
                            let values = &params.as_slice()[params.range(slot)];
                            let right = (0..lengths[slot]).map(|at| value(slot, at));
                            assert!(values.iter().copied().eq(right), "slot {slot}");
                        }
                    });
                }
            });
        }
    }

    #[test]
    fn parts_of_ranges_are_counted_over_all_of_them() {
        let ranges = [10..14, 20..21, 30..35];
        let found = |wanted: Range<usize>| parts(&ranges, &wanted).collect::<Vec<_>>();
        assert_eq!(found(0..10), ranges);
        assert_eq!(found(3..6), [13..14, 20..21, 30..31]);
        assert!(found(4..4).is_empty());
    }
}
