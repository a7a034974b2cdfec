//! The ranks of a run: who they are, what each of them computes, and what they exchange in a step.
//!
//! The ranks are a grid of replicas and pipeline stages. A replica has the whole model, over one rank or, in a pipeline, over one rank a
//! stage; the ranks of a replica are neighbours. Replicas share out the pieces of a step's micro-batches.
//!
//! Whatever the grid is, the run comes to the same bits: gradients are added along a tree that is fixed by the number of pieces
//! (`tree`), sums of losses in the order of the pieces, and the norm of the gradients over parts whose bounds depend on the
//! trained values alone (`shares`).

mod shares;
pub(crate) mod tree;

use std::ops::Range;

use bytemuck::{AnyBitPattern, NoUninit};
use lowrank_comm::{Alone, Communicator};
use lowrank_kernels::{DType, Tensor, View};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) use shares::Shares;
#[cfg(test)]
pub(crate) use shares::within;

use crate::Error;

/// The ranks of a run, as one of them sees them.
#[derive(Clone, Copy)]
pub struct Ranks<'a> {
    comm: &'a dyn Communicator,
    stages: usize,
}

impl Ranks<'static> {
    /// One rank, which has everything.
    pub fn alone() -> Self {
        Self::of(&Alone)
    }
}

impl<'a> Ranks<'a> {
    /// The ranks of a communicator, each with the whole model.
    pub fn of(comm: &'a dyn Communicator) -> Self {
        Self { comm, stages: 1 }
    }

    /// The ranks of a communicator, with so many pipeline stages.
    ///
    /// # Errors
    /// Ranks that are no multiple of the stages.
    pub fn new(comm: &'a dyn Communicator, stages: usize) -> Result<Self, Error> {
        let size = comm.size();
        if stages == 0 || !size.is_multiple_of(stages) {
            return Err(Error::Settings(format!(
                "{stages} pipeline stages go with {stages} ranks or a multiple of them, and there {}; start as many with your launcher, such as mpirun -n {}",
                if size == 1 {
                    "is 1".to_owned()
                } else {
                    format!("are {size}")
                },
                stages.max(1) * (size / stages.max(1)).max(1)
            )));
        }
        Ok(Self { comm, stages })
    }

    /// What the ranks say things through.
    pub fn comm(&self) -> &'a dyn Communicator {
        self.comm
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.comm.size()
    }

    /// Whether there is more than one.
    pub fn are_several(&self) -> bool {
        self.size() > 1
    }

    /// The number of this rank.
    pub fn rank(&self) -> usize {
        self.comm.rank()
    }

    /// Whether this is the rank that writes files.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Number of pipeline stages.
    pub fn stages(&self) -> usize {
        self.stages
    }

    /// Number of replicas.
    pub fn replicas(&self) -> usize {
        self.size() / self.stages
    }

    /// The stage of this rank.
    pub fn stage(&self) -> usize {
        self.rank() % self.stages
    }

    /// Whether this rank has the top of the model, which scores.
    pub fn scores(&self) -> bool {
        self.stage() + 1 == self.stages
    }

    /// The replica of this rank.
    pub fn replica(&self) -> usize {
        self.rank() / self.stages
    }

    /// The rank at a place of the grid.
    pub fn at(&self, replica: usize, stage: usize) -> usize {
        replica * self.stages + stage
    }

    /// Those of `count` things that a replica computes: an equal share, in their order.
    pub(crate) fn share(&self, count: usize, replica: usize) -> Range<usize> {
        let replicas = self.replicas();
        count * replica / replicas..count * (replica + 1) / replicas
    }

    /// The share of this rank's own replica.
    pub(crate) fn own_share(&self, count: usize) -> Range<usize> {
        self.share(count, self.replica())
    }

    /// What each rank has, of lengths that all know.
    ///
    /// # Errors
    /// Ranks that do not answer.
    pub(crate) fn gather<T: NoUninit + AnyBitPattern>(
        &self,
        own: &[T],
        length: impl Fn(usize) -> usize,
    ) -> Result<Vec<Vec<T>>, Error> {
        let mut all: Vec<Vec<T>> = (0..self.size())
            .map(|rank| vec![T::zeroed(); length(rank)])
            .collect();
        let sent = vec![bytemuck::cast_slice(own); self.size()];
        let mut received: Vec<&mut [u8]> = all
            .iter_mut()
            .map(|of_rank| bytemuck::cast_slice_mut(of_rank.as_mut_slice()))
            .collect();
        self.comm.all_to_all(&sent, &mut received)?;
        Ok(all)
    }

    /// Sends rows to another stage of the same replica, without waiting.
    ///
    /// # Errors
    /// What the communicator refuses.
    pub(crate) fn send_rows(&self, stage: usize, rows: View<'_>) -> Result<(), Error> {
        let bytes = rows.to_le_bytes(DType::F32).into_owned();
        Ok(self.comm.send(self.at(self.replica(), stage), bytes)?)
    }

    /// Receives rows from another stage of the same replica.
    ///
    /// # Errors
    /// A rank that does not answer.
    pub(crate) fn rows_from(
        &self,
        stage: usize,
        rows: usize,
        cols: usize,
    ) -> Result<Tensor, Error> {
        let mut values = vec![0.0_f32; rows * cols];
        let into = bytemuck::cast_slice_mut(values.as_mut_slice());
        self.comm.receive(self.at(self.replica(), stage), into)?;
        Ok(Tensor::from_f32(rows, cols, values))
    }

    /// Gives every rank what the first one has; the others hand in `None`.
    ///
    /// # Errors
    /// Ranks that do not answer.
    pub fn from_first<T: Serialize + DeserializeOwned>(&self, own: Option<T>) -> Result<T, Error> {
        // In a list, since a value may itself be none.
        let mut bytes = match &own {
            Some(own) => serde_json::to_vec(&[own]).unwrap_or_default(),
            None => Vec::new(),
        };
        if let (Some(own), false) = (own, self.are_several()) {
            return Ok(own);
        }
        self.comm.broadcast(0, &mut bytes)?;
        let given: Result<(T,), _> = serde_json::from_slice(&bytes);
        given
            .map(|(given,)| given)
            .map_err(|error| Error::Training(format!("what rank 0 said cannot be read: {error}")))
    }

    /// What each rank has, of any lengths.
    ///
    /// # Errors
    /// Ranks that do not answer, or that tell something else.
    pub fn gather_all<T: Serialize + DeserializeOwned>(&self, own: &T) -> Result<Vec<T>, Error> {
        let own = serde_json::to_vec(own).unwrap_or_default();
        let told = self.comm.all_gather(&own)?;
        let all = told.iter().enumerate().map(|(rank, bytes)| {
            serde_json::from_slice(bytes).map_err(|error| {
                Error::Training(format!("what rank {rank} said cannot be read: {error}"))
            })
        });
        all.collect()
    }

    /// What came of something that every rank has done: an error where any of them failed, on all. The first rank's names those that failed,
    /// the others' is [`Error::OtherRank`].
    ///
    /// # Errors
    /// That; ranks that do not answer.
    pub fn agree<T>(&self, own: Result<T, Error>) -> Result<T, Error> {
        if !self.are_several() {
            return own;
        }
        let said = match &own {
            Ok(_) => String::new(),
            Err(error) => format!("{}{error}", if error.is_misuse() { '2' } else { '1' }),
        };
        let all = self.comm.all_gather(said.as_bytes())?;
        let hosts = self.comm.all_gather(self.comm.host().as_bytes())?;
        let mut failed: Vec<(Vec<usize>, &[u8])> = Vec::new();
        for (rank, said) in all.iter().enumerate().filter(|(_, said)| !said.is_empty()) {
            match failed
                .iter_mut()
                .find(|(_, known)| *known == said.as_slice())
            {
                Some((ranks, _)) => ranks.push(rank),
                None => failed.push((vec![rank], said)),
            }
        }
        if failed.is_empty() {
            return own;
        }
        if !self.is_first() {
            let is_misuse = failed.iter().any(|(_, said)| said[0] == b'2');
            return Err(Error::OtherRank { is_misuse });
        }
        // What all of them say is of no rank.
        if let [(ranks, _)] = failed.as_slice()
            && ranks.len() == self.size()
        {
            return own.map_err(Error::agreed);
        }
        let lines: Vec<String> = failed
            .iter()
            .map(|(ranks, said)| {
                let host = String::from_utf8_lossy(&hosts[ranks[0]]);
                let more = match ranks.len() {
                    1 => String::new(),
                    n => format!(" and {} more", n - 1),
                };
                let said = String::from_utf8_lossy(&said[1..]);
                format!("rank {} on {host}{more}: {said}", ranks[0])
            })
            .collect();
        let text = lines.join("\n");
        let error = if failed.iter().any(|(_, said)| said[0] == b'2') {
            Error::Settings(text)
        } else {
            Error::Training(text)
        };
        Err(error.agreed())
    }

    /// Does something on the first rank alone, and lets the others know whether it went well; `None` on these.
    ///
    /// # Errors
    /// As [`agree`](Self::agree).
    pub(crate) fn on_first<T>(
        &self,
        work: impl FnOnce() -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        self.agree(if self.is_first() {
            work().map(Some)
        } else {
            Ok(None)
        })
    }

    /// Refuses ranks that are about to do different things. `what` names each mark; a rank whose marks differ from the first one's is
    /// named with its host and both values.
    ///
    /// # Errors
    /// That, on all ranks; ranks that do not answer.
    pub fn same(&self, marks: &[(String, String)]) -> Result<(), Error> {
        if !self.are_several() {
            return Ok(());
        }
        let own = || marks.iter().map(|(_, mark)| mark.clone());
        let first: Vec<String> = self.from_first(self.is_first().then(|| own().collect()))?;
        let differences: Vec<String> = marks
            .iter()
            .zip(&first)
            .filter(|((_, own), first)| own != *first)
            .map(|((what, own), first)| format!("{what} {own} here, and {first} on rank 0"))
            .collect();
        self.agree(if differences.is_empty() {
            Ok(())
        } else {
            Err(Error::Settings(format!(
                "this rank would do something else: {}; let all ranks have the same program, settings, data and model",
                differences.join("; ")
            )))
        })
    }
}
