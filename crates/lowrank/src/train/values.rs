//! The trained values and their moments as files have them: whole, wherever in the run they are held.
//!
//! Rank 0 alone reads and writes files. While it writes, the other ranks give it what it asks for, a slot at a time, so that it never holds
//! what all of them hold together. What it reads it sends to whoever holds it.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::ops::Range;

use bytemuck::{cast_slice, cast_slice_mut};
use lowrank_kernels::Arena;

use super::step::OptimizerState;
use crate::Error;
use crate::model::Adapter;
use crate::ranks::Ranks;

/// Which values of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The trained values.
    Param,
    /// AdamW's first moments.
    M,
    /// Its second moments.
    V,
    /// What the values of branches were at first, where that is taken off again ([`Adapter::initial`]). The first slots alone have it.
    Initial,
}

impl Kind {
    /// All of them, in the order of a checkpoint.
    pub(super) const ALL: [Self; 4] = [Self::Param, Self::M, Self::V, Self::Initial];

    /// How many slots of an adapter have it.
    pub(super) fn slots(self, adapter: &Adapter) -> usize {
        match self {
            Self::Param | Self::M | Self::V => adapter.params.slots(),
            Self::Initial => adapter.initial.as_ref().map_or(0, Arena::slots),
        }
    }

    /// Every kind with each of its slots, in the order of a checkpoint.
    pub(super) fn all_of(adapter: &Adapter) -> Vec<(Self, usize)> {
        let slots = |kind: Self| (0..kind.slots(adapter)).map(move |slot| (kind, slot));
        Self::ALL.into_iter().flat_map(slots).collect()
    }

    /// The prefix of its tensors in a checkpoint.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Param => "param",
            Self::M => "m",
            Self::V => "v",
            Self::Initial => "initial",
        }
    }
}

/// What another rank is asked for: a kind and a slot; or [`DONE`] and whether all went well.
type Request = [u64; 2];
const DONE: u64 = u64::MAX;

/// The values of a run, as one rank sees them.
#[derive(Clone, Copy)]
pub(super) struct Values<'a> {
    pub(super) ranks: &'a Ranks<'a>,
    pub(super) adapter: &'a Adapter,
    pub(super) optimizer: &'a OptimizerState,
}

impl Values<'_> {
    /// Does something on rank 0 that may ask for values of any slot, while the other ranks answer. Whoever is not rank 0 gets `None`.
    ///
    /// # Errors
    /// What the work says, on rank 0; [`Error::OtherRank`] on the others then; ranks that do not answer.
    pub(super) fn on_first<T>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        if !self.ranks.is_first() {
            return self.answer().map(|()| None);
        }
        let done = work(self);
        let told: Request = [DONE, u64::from(done.is_ok())];
        for rank in 1..self.ranks.size() {
            let said = self.ranks.comm().send(rank, cast_slice(&told).to_vec());
            if done.is_ok() {
                said?;
            }
        }
        let left = self.ranks.comm().flush();
        let done = if self.ranks.are_several() {
            done.map_err(Error::agreed)?
        } else {
            done?
        };
        left?;
        Ok(Some(done))
    }

    /// Answers rank 0 until it is done.
    fn answer(&self) -> Result<(), Error> {
        loop {
            let mut request: Request = [0; 2];
            self.ranks.comm().receive(0, cast_slice_mut(&mut request))?;
            let [kind, slot] = request;
            if kind == DONE {
                self.ranks.comm().flush()?;
                return match slot {
                    0 => Err(Error::OtherRank { is_misuse: false }),
                    _ => Ok(()),
                };
            }
            let kind = Kind::ALL[kind as usize];
            let own = self.own(kind, slot as usize);
            self.ranks.comm().send(0, cast_slice(own).to_vec())?;
        }
    }

    /// The values of a slot, on rank 0 within [`on_first`](Self::on_first).
    ///
    /// # Errors
    /// Ranks that do not answer.
    pub(super) fn slot(&self, kind: Kind, slot: usize) -> Result<Cow<'_, [f32]>, Error> {
        let params = &self.adapter.params;
        if let Some(held) = self.held(kind).filter(|held| held.is_held(slot)) {
            return Ok(Cow::Borrowed(&held.as_slice()[held.range(slot)]));
        }
        let owners = owners(self.optimizer, slot);
        let rank = self.ranks.rank();
        if owners.iter().all(|(owner, _)| *owner == rank) {
            return Ok(Cow::Borrowed(self.own(kind, slot)));
        }
        let (rows, cols) = params.shape(slot);
        let mut values = vec![0.0_f32; rows * cols];
        for (owner, range) in owners {
            let into = &mut values[range];
            if owner == rank {
                into.copy_from_slice(self.own(kind, slot));
            } else {
                let request: Request = [kind as u64, slot as u64];
                let comm = self.ranks.comm();
                comm.send(owner, cast_slice(&request).to_vec())?;
                comm.receive(owner, cast_slice_mut(into))?;
            }
        }
        Ok(Cow::Owned(values))
    }

    /// The values of a kind that every rank of a stage has as a whole.
    fn held(&self, kind: Kind) -> Option<&Arena> {
        match kind {
            Kind::Param => Some(&self.adapter.params),
            Kind::Initial => self.adapter.initial.as_ref(),
            Kind::M | Kind::V => None,
        }
    }

    /// A copy of the adapter with all of its values, on rank 0 within [`on_first`](Self::on_first).
    ///
    /// # Errors
    /// Ranks that do not answer.
    pub(super) fn whole_adapter(&self) -> Result<Adapter, Error> {
        let whole = |kind: Kind| {
            let slots = 0..kind.slots(self.adapter);
            let shapes: Vec<_> = slots
                .clone()
                .map(|slot| self.adapter.params.shape(slot))
                .collect();
            let mut whole = Arena::new(&shapes);
            for slot in slots {
                let values = self.slot(kind, slot)?;
                whole.view_mut(slot).copy_from_f32(&values);
            }
            Ok::<_, Error>(whole)
        };
        let initial = self.adapter.initial.as_ref();
        let initial = initial.map(|_| whole(Kind::Initial)).transpose()?;
        Ok(Adapter {
            initial,
            ..self.adapter.with_params(whole(Kind::Param)?)
        })
    }

    /// This rank's own values of a slot.
    fn own(&self, kind: Kind, slot: usize) -> &[f32] {
        let rank = self.ranks.rank();
        let owners = owners(self.optimizer, slot);
        let Some((_, range)) = owners.into_iter().find(|(owner, _)| *owner == rank) else {
            return &[];
        };
        let place = match kind {
            Kind::Param | Kind::Initial => {
                let start = self.adapter.params.range(slot).start;
                start + range.start..start + range.end
            }
            Kind::M | Kind::V => place_of_moments(self.optimizer, rank, slot),
        };
        let arena = match kind {
            Kind::M => Some(&self.optimizer.m),
            Kind::V => Some(&self.optimizer.v),
            Kind::Param | Kind::Initial => self.held(kind),
        };
        arena.map_or(&[], |arena| &arena.as_slice()[place])
    }
}

/// The ranks that own values of a slot, and which of them; what belongs to a rank lies together.
fn owners(optimizer: &OptimizerState, slot: usize) -> Vec<(usize, Range<usize>)> {
    let mut owners: Vec<(usize, Range<usize>)> = Vec::new();
    for piece in optimizer.shares.of_slot(slot) {
        match owners.last_mut() {
            Some((owner, range)) if *owner == piece.owner => range.end = piece.values.end,
            _ => owners.push((piece.owner, piece.values.clone())),
        }
    }
    owners
}

/// Where a rank's moments of a slot lie among its own.
fn place_of_moments(optimizer: &OptimizerState, rank: usize, slot: usize) -> Range<usize> {
    let (mut before, mut own) = (0, 0);
    for piece in optimizer.shares.of(rank) {
        match piece.slot.cmp(&slot) {
            Ordering::Less => before += piece.values.len(),
            Ordering::Equal => own += piece.values.len(),
            Ordering::Greater => break,
        }
    }
    before..before + own
}

/// Takes a run's values of these kinds from what rank 0 reads: `read` gives those of a slot, on rank 0 alone.
///
/// # Errors
/// What `read` says; ranks that do not answer.
pub(super) fn take(
    ranks: &Ranks<'_>,
    adapter: &mut Adapter,
    optimizer: &mut OptimizerState,
    kinds: &[Kind],
    mut read: impl FnMut(Kind, usize) -> Result<Vec<f32>, Error>,
) -> Result<(), Error> {
    let rank = ranks.rank();
    for &kind in kinds {
        for slot in 0..kind.slots(adapter) {
            let (rows, cols) = adapter.params.shape(slot);
            let targets = match kind {
                Kind::Param | Kind::Initial => holders(ranks, optimizer, slot, rows * cols),
                Kind::M | Kind::V => owners(optimizer, slot),
            };
            let own = targets.iter().find(|(to, _)| *to == rank);
            if ranks.is_first() {
                let values = read(kind, slot)?;
                for (to, range) in targets.iter().filter(|(to, _)| *to != rank) {
                    let part = cast_slice(&values[range.clone()]).to_vec();
                    ranks.comm().send(*to, part)?;
                }
                if let Some((_, range)) = own {
                    put(kind, slot, rank, &values[range.clone()], adapter, optimizer);
                }
                ranks.comm().flush()?;
            } else if let Some((_, range)) = own {
                let mut part = vec![0.0_f32; range.len()];
                let into = cast_slice_mut(part.as_mut_slice());
                ranks.comm().receive(0, into)?;
                put(kind, slot, rank, &part, adapter, optimizer);
            }
        }
    }
    Ok(())
}

/// The ranks that hold all values of a slot.
fn holders(
    ranks: &Ranks<'_>,
    optimizer: &OptimizerState,
    slot: usize,
    length: usize,
) -> Vec<(usize, Range<usize>)> {
    let stages = optimizer.shares.stages_of(slot);
    (0..ranks.replicas())
        .flat_map(|replica| stages.iter().map(move |stage| ranks.at(replica, *stage)))
        .map(|rank| (rank, 0..length))
        .collect()
}

/// Puts a rank's own values of a slot in their place.
fn put(
    kind: Kind,
    slot: usize,
    rank: usize,
    values: &[f32],
    adapter: &mut Adapter,
    optimizer: &mut OptimizerState,
) {
    let place = match kind {
        Kind::Param | Kind::Initial => adapter.params.range(slot),
        Kind::M | Kind::V => place_of_moments(optimizer, rank, slot),
    };
    let arena = match kind {
        Kind::Param => Some(&mut adapter.params),
        Kind::Initial => adapter.initial.as_mut(),
        Kind::M => Some(&mut optimizer.m),
        Kind::V => Some(&mut optimizer.v),
    };
    if let Some(arena) = arena {
        arena.as_mut_slice()[place].copy_from_slice(values);
    }
}
