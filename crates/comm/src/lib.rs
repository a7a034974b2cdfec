//! What the ranks of a distributed training say to each other.
//!
//! A *rank* is one process of a job; `size` of them work together, and each knows its number. All of them call the same collectives in the same
//! order. [`Communicator`] asks an engine for little: to exchange messages of known lengths with other ranks, and to send one without
//! waiting. The collectives are built on that, so they move the same bytes under every engine.
//!
//! Three engines: [`Alone`], one rank; [`InProcess`], ranks that are threads of one process, for tests; and MPI, whose library is loaded at run
//! time. [`start`] chooses the one for this process.

mod alone;
mod in_process;
mod launcher;
#[cfg(unix)]
mod mpi;
#[cfg(unix)]
mod search;
mod start;

pub use alone::Alone;
pub use in_process::InProcess;
pub use launcher::{Launcher, LauncherKind};
#[cfg(unix)]
pub use mpi::Mpi;
pub use start::{Options, start};

/// Why ranks could not exchange something.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another rank did not answer in time.
    #[error(
        "rank {rank} on {host} waited {seconds} s for rank {peer} in vain: it has died or is stopped, the network between them is down, or it waits for another rank in turn"
    )]
    TimedOut {
        /// The rank that waited.
        rank: usize,
        /// Its host.
        host: String,
        /// The rank that did not answer.
        peer: usize,
        /// How long.
        seconds: u64,
    },
    /// The engine refused something.
    #[error("{0}")]
    Failed(String),
}

/// A message to send: the rank that it is for, and its bytes.
pub type Sent<'a> = (usize, &'a [u8]);
/// A message to receive: the rank that it comes from, and where it goes; the length is known.
pub type Received<'a> = (usize, &'a mut [u8]);

/// One rank of a job, as it sees the others.
///
/// Messages between two ranks arrive in the order in which they were sent. Those of [`send`](Self::send) and those of
/// [`exchange`](Self::exchange) do not mix. One thread calls all of it.
pub trait Communicator {
    /// The number of this rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// The name of the machine that this rank runs on.
    fn host(&self) -> &str;

    /// What carries the messages, in words: the MPI library and its version.
    fn engine(&self) -> String;

    /// Sends and receives at the same time, and returns when both are done. Messages without bytes are not sent.
    ///
    /// # Errors
    /// A rank that does not answer in time; a message of another length.
    fn exchange(&self, sent: Option<Sent<'_>>, received: Option<Received<'_>>)
    -> Result<(), Error>;

    /// Sends without waiting for the other side, which calls [`receive`](Self::receive).
    ///
    /// # Errors
    /// What the engine refuses.
    fn send(&self, to: usize, bytes: Vec<u8>) -> Result<(), Error>;

    /// Receives what the other side has [sent](Self::send), of a known length.
    ///
    /// # Errors
    /// A rank that does not answer in time; a message of another length.
    fn receive(&self, from: usize, into: &mut [u8]) -> Result<(), Error>;

    /// Waits until everything that was [sent](Self::send) has left this rank.
    ///
    /// # Errors
    /// A rank that does not take it in time.
    fn flush(&self) -> Result<(), Error>;

    /// Ends the whole job at once, with this exit code where the engine passes it on.
    fn abort(&self, code: i32) -> !;

    /// Sends `sent[i]` to rank i, and receives from each rank i into `received[i]`; what a rank has for itself is copied. Both sides know
    /// the lengths, which may differ between pairs.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange).
    ///
    /// # Panics
    /// If there is not one of each for every rank.
    fn all_to_all(&self, sent: &[&[u8]], received: &mut [&mut [u8]]) -> Result<(), Error> {
        let (rank, size) = (self.rank(), self.size());
        assert_eq!((sent.len(), received.len()), (size, size), "one a rank");
        received[rank].copy_from_slice(sent[rank]);
        for (to, from) in pairs(rank, size) {
            self.exchange(Some((to, sent[to])), Some((from, &mut *received[from])))?;
        }
        Ok(())
    }

    /// What every rank has, in the order of the ranks; lengths may differ and need not be known.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange).
    fn all_gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let (rank, size) = (self.rank(), self.size());
        let mut all = vec![Vec::new(); size];
        let length = (own.len() as u64).to_le_bytes();
        for (to, from) in pairs(rank, size) {
            let mut other = [0; 8];
            self.exchange(Some((to, &length)), Some((from, &mut other)))?;
            all[from] = vec![0; u64::from_le_bytes(other) as usize];
            self.exchange(Some((to, own)), Some((from, &mut all[from])))?;
        }
        all[rank] = own.to_vec();
        Ok(all)
    }

    /// Gives every rank the bytes of `root`; those of the others are replaced.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange).
    fn broadcast(&self, root: usize, bytes: &mut Vec<u8>) -> Result<(), Error> {
        // A binomial tree: whoever has the bytes passes them on, to one that is half as far away each time.
        let size = self.size();
        let place = (self.rank() + size - root) % size;
        let rank_at = |place: usize| (place + root) % size;
        let mut reach = size.next_power_of_two();
        while reach > 1 {
            let half = reach / 2;
            if place.is_multiple_of(reach) && place + half < size {
                let to = rank_at(place + half);
                let length = (bytes.len() as u64).to_le_bytes();
                self.exchange(Some((to, &length)), None)?;
                self.exchange(Some((to, bytes)), None)?;
            } else if place % reach == half {
                let from = rank_at(place - half);
                let mut length = [0; 8];
                self.exchange(None, Some((from, &mut length)))?;
                *bytes = vec![0; u64::from_le_bytes(length) as usize];
                self.exchange(None, Some((from, bytes)))?;
            }
            reach = half;
        }
        Ok(())
    }

    /// Waits until every rank has come here.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange).
    fn barrier(&self) -> Result<(), Error> {
        let (rank, size) = (self.rank(), self.size());
        let mut distance = 1;
        while distance < size {
            let mut heard = [0];
            let to = (rank + distance) % size;
            let from = (rank + size - distance) % size;
            self.exchange(Some((to, &[1])), Some((from, &mut heard)))?;
            distance *= 2;
        }
        Ok(())
    }
}

/// For each round of an exchange of all with all, whom a rank sends to and whom it receives from. In every round each rank has one of both.
fn pairs(rank: usize, size: usize) -> impl Iterator<Item = (usize, usize)> {
    (1..size).map(move |round| ((rank + round) % size, (rank + size - round) % size))
}
