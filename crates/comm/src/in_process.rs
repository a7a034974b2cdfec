//! Ranks that are threads of one process.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use super::{Communicator, Error, Received, Sent};

/// A message of [`Communicator::exchange`] or of [`Communicator::send`].
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lane {
    Exchange,
    Sent,
}

/// Both lanes between two ranks.
struct Lanes<T> {
    exchange: T,
    sent: T,
}

impl<T> Lanes<T> {
    fn get(&self, lane: Lane) -> &T {
        match lane {
            Lane::Exchange => &self.exchange,
            Lane::Sent => &self.sent,
        }
    }
}

/// One of several ranks that are threads of this process. They show what many machines would compute without any network.
pub struct InProcess {
    rank: usize,
    deadline: Duration,
    /// To each rank.
    senders: Vec<Lanes<Sender<Vec<u8>>>>,
    /// From each rank.
    receivers: Vec<Lanes<Receiver<Vec<u8>>>>,
}

impl InProcess {
    /// So many ranks, of which each goes to a thread of its own. Whoever waits for another one longer than `deadline` gets an error.
    pub fn ranks(size: usize, deadline: Duration) -> Vec<Self> {
        let mut senders: Vec<Vec<_>> = (0..size).map(|_| Vec::new()).collect();
        let mut receivers: Vec<Vec<_>> = (0..size).map(|_| Vec::new()).collect();
        for from in &mut senders {
            for to in &mut receivers {
                let (exchange, sent) = (channel(), channel());
                from.push(Lanes {
                    exchange: exchange.0,
                    sent: sent.0,
                });
                to.push(Lanes {
                    exchange: exchange.1,
                    sent: sent.1,
                });
            }
        }
        let both = senders.into_iter().zip(receivers);
        both.enumerate()
            .map(|(rank, (senders, receivers))| Self {
                rank,
                deadline,
                senders,
                receivers,
            })
            .collect()
    }

    fn put(&self, to: usize, bytes: Vec<u8>, lane: Lane) -> Result<(), Error> {
        if bytes.is_empty() {
            return Ok(());
        }
        let sender = self.senders[to].get(lane);
        sender.send(bytes).map_err(|_| self.gone(to))
    }

    fn take(&self, (from, into): Received<'_>, lane: Lane) -> Result<(), Error> {
        if into.is_empty() {
            return Ok(());
        }
        let receiver = self.receivers[from].get(lane);
        let bytes = receiver.recv_timeout(self.deadline);
        let bytes = bytes.map_err(|error| match error {
            RecvTimeoutError::Timeout => Error::TimedOut {
                rank: self.rank,
                host: self.host().to_owned(),
                peer: from,
                seconds: self.deadline.as_secs(),
            },
            RecvTimeoutError::Disconnected => self.gone(from),
        })?;
        if bytes.len() != into.len() {
            return Err(Error::Failed(format!(
                "rank {} expected {} bytes from rank {from}, and {} came",
                self.rank,
                into.len(),
                bytes.len()
            )));
        }
        into.copy_from_slice(&bytes);
        Ok(())
    }

    fn gone(&self, peer: usize) -> Error {
        Error::Failed(format!("rank {}: rank {peer} has ended", self.rank))
    }
}

impl Communicator for InProcess {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.senders.len()
    }

    fn host(&self) -> &'static str {
        "this process"
    }

    fn engine(&self) -> String {
        "threads of one process".to_owned()
    }

    fn exchange(
        &self,
        sent: Option<Sent<'_>>,
        received: Option<Received<'_>>,
    ) -> Result<(), Error> {
        if let Some((to, bytes)) = sent {
            self.put(to, bytes.to_vec(), Lane::Exchange)?;
        }
        match received {
            Some(received) => self.take(received, Lane::Exchange),
            None => Ok(()),
        }
    }

    fn send(&self, to: usize, bytes: Vec<u8>) -> Result<(), Error> {
        self.put(to, bytes, Lane::Sent)
    }

    fn receive(&self, from: usize, into: &mut [u8]) -> Result<(), Error> {
        self.take((from, into), Lane::Sent)
    }

    fn flush(&self) -> Result<(), Error> {
        Ok(())
    }

    fn abort(&self, code: i32) -> ! {
        panic!("rank {} ends the job with code {code}", self.rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each of so many ranks comes to.
    fn on<T: Send>(size: usize, work: impl Fn(InProcess) -> T + Sync) -> Vec<T> {
        let ranks = InProcess::ranks(size, Duration::from_secs(20));
        std::thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = ranks
                .into_iter()
                .map(|rank| scope.spawn(move || work(rank)))
                .collect();
            let ends = threads.into_iter().map(|thread| thread.join().unwrap());
            ends.collect()
        })
    }

    #[test]
    fn every_rank_gets_what_is_for_it() {
        for size in [1, 2, 3, 5, 8] {
            let all = on(size, |comm| {
                let me = comm.rank();
                // Rank i sends j + 1 bytes to rank j; nobody sends anything to rank 1.
                let length = |to: usize| if to == 1 { 0 } else { to + 1 };
                let sent: Vec<Vec<u8>> = (0..size)
                    .map(|to| vec![(10 * me + to) as u8; length(to)])
                    .collect();
                let mut received = vec![vec![0; length(me)]; size];
                let sent: Vec<&[u8]> = sent.iter().map(Vec::as_slice).collect();
                let mut into: Vec<&mut [u8]> = received.iter_mut().map(Vec::as_mut_slice).collect();
                comm.all_to_all(&sent, &mut into).unwrap();
                let right = received
                    .iter()
                    .enumerate()
                    .all(|(from, bytes)| *bytes == vec![(10 * from + me) as u8; length(me)]);
                comm.barrier().unwrap();
                let gathered = comm.all_gather(&vec![me as u8; me]).unwrap();
                let as_sent = (0..size).all(|rank| gathered[rank] == vec![rank as u8; rank]);
                let mut word = format!("from {me}").into_bytes();
                comm.broadcast(size - 1, &mut word).unwrap();
                right && as_sent && word == format!("from {}", size - 1).into_bytes()
            });
            assert!(all.into_iter().all(|right| right), "{size} ranks");
        }
    }

    #[test]
    fn what_is_sent_does_not_mix_with_what_is_exchanged() {
        on(2, |comm| {
            let other = 1 - comm.rank();
            comm.send(other, vec![1, 2]).unwrap();
            comm.send(other, vec![3]).unwrap();
            let mut exchanged = [0];
            comm.exchange(Some((other, &[9])), Some((other, &mut exchanged)))
                .unwrap();
            let (mut first, mut second) = ([0; 2], [0]);
            comm.receive(other, &mut first).unwrap();
            comm.receive(other, &mut second).unwrap();
            assert_eq!((exchanged, first, second), ([9], [1, 2], [3]));
        });
    }

    #[test]
    fn a_rank_that_does_not_answer_is_named() {
        let mut ranks = InProcess::ranks(2, Duration::from_millis(20));
        let second = ranks.pop().unwrap();
        let error = second.receive(0, &mut [0]).unwrap_err();
        assert!(error.to_string().contains("for rank 0"), "{error}");
        drop(ranks);
        let error = second.receive(0, &mut [0]).unwrap_err();
        assert!(error.to_string().contains("rank 0 has ended"), "{error}");
    }
}
