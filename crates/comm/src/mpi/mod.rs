//! Ranks that an MPI launcher started.
//!
//! Of MPI this uses messages between two ranks that do not block, and nothing else: whoever waits does it here, with a deadline, and sleeps
//! meanwhile, where MPI's own functions would keep a core busy for ever.
#![allow(
    unsafe_code,
    reason = "the functions of a C library are called, and it keeps pointers to messages"
)]

mod abi;
mod calls;
mod library;
mod wait;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::Write;
use std::marker::PhantomData;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use calls::{Calls, Code, Request};
pub(crate) use library::{Identity, Opened, open};
use wait::Rest;

use super::{Communicator, Error, Received, Sent};

/// Messages of different kinds do not mix.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lane {
    Exchange = 1,
    Sent = 2,
    /// The last barrier, before MPI ends.
    Closing = 3,
}

/// Messages are sent in pieces of this many bytes: MPI counts with an `int`, and a piece that has arrived shows that the other side is alive.
const PIECE: usize = 64 << 20;

/// How long a message that is given up may take to be forgotten.
const SETTLING: Duration = Duration::from_millis(200);

/// How long a launcher may take to pass on what was printed.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// How long MPI may take to end the job.
const ABORTING: Duration = Duration::from_secs(5);

/// Lets Open MPI have two TCP connections to each rank, unless the environment says otherwise. Over one it sends and receives by turns, so that an exchange in
/// both directions at once is hardly faster than one after the other.
fn use_two_connections() {
    const LINKS: &str = "OMPI_MCA_btl_tcp_links";
    if std::env::var_os(LINKS).is_none() {
        // SAFETY: whoever calls `start` answers for it that no other thread reads or changes the environment meanwhile.
        unsafe { std::env::set_var(LINKS, "2") };
    }
}

/// Ends the process where MPI has not started by the deadline, until the value is dropped: MPI waits for ever for a rank that does not join. Where no
/// thread can be had, it waits.
fn watch_start(deadline: Duration) -> Sender<()> {
    let (started, waits) = channel::<()>();
    let thread = std::thread::Builder::new().name("MPI's start".to_owned());
    drop(thread.spawn(move || {
        if waits.recv_timeout(deadline) == Err(RecvTimeoutError::Timeout) {
            tracing::error!(
                "MPI has not started within {} s: a rank has not joined, or its network cannot be reached",
                deadline.as_secs()
            );
            std::process::exit(1);
        }
    }));
    started
}

/// One rank of a job under MPI.
///
/// One value exists in a process, in the thread that started it, and MPI ends when it is dropped. It then waits for the other ranks to come to their end, too, at
/// most until the deadline. After an error, or while the thread panics, MPI is not ended, because that might wait for ever; the launcher or
/// [`abort`](Communicator::abort) ends the other ranks.
pub struct Mpi {
    calls: Box<dyn Calls>,
    engine: String,
    rank: usize,
    size: usize,
    host: String,
    deadline: Duration,
    /// What was sent without waiting, and MPI still needs.
    sending: RefCell<VecDeque<(Vec<u8>, Message)>>,
    /// An error has occurred: messages may be lost, and no more of them can be trusted.
    failed: Cell<bool>,
    /// MPI was promised that one thread calls it.
    one_thread: PhantomData<*const ()>,
}

/// A message on its way, as the pieces that are not done.
struct Message {
    peer: usize,
    /// Whether it comes in.
    incoming: bool,
    pieces: VecDeque<(Request, usize)>,
}

/// MPI can be started once in the life of a process.
static STARTED: AtomicBool = AtomicBool::new(false);

impl Mpi {
    /// Starts MPI. Whoever waits for another rank longer than `deadline` gets an error.
    ///
    /// # Errors
    /// MPI does not start, or has already been started in this process.
    pub(crate) fn start(opened: Opened, deadline: Duration) -> Result<Self, Error> {
        if STARTED.swap(true, Ordering::SeqCst) {
            let message = "MPI can be started only once in a process";
            return Err(Error::Failed(message.to_owned()));
        }
        let Opened { calls, engine } = opened;
        let explained = |what: &str, code: Code| {
            Error::Failed(format!("{engine}: {what}: {}", calls.explain(code)))
        };
        if engine.starts_with("Open MPI") {
            use_two_connections();
        }
        let watch = watch_start(deadline);
        let threads = calls.init();
        drop(watch);
        let threads = threads.map_err(|code| explained("it does not start", code))?;
        if !threads {
            tracing::warn!("{engine} does not expect a program with threads; it is used from one");
        }
        let rank = calls.rank().map_err(|code| explained("no rank", code))?;
        let size = calls.size().map_err(|code| explained("no size", code))?;
        let host = calls
            .host()
            .map_err(|code| explained("no name of the host", code))?;
        Ok(Self {
            calls,
            engine,
            rank,
            size,
            host,
            deadline,
            sending: RefCell::default(),
            failed: Cell::new(false),
            one_thread: PhantomData,
        })
    }

    fn fail<T>(&self, error: Error) -> Result<T, Error> {
        self.failed.set(true);
        Err(error)
    }

    fn failure(&self, message: impl std::fmt::Display) -> Error {
        Error::Failed(format!("rank {} on {}: {message}", self.rank, self.host))
    }

    fn usable(&self) -> Result<(), Error> {
        if self.failed.get() {
            return Err(self.failure("nothing can be exchanged after an error"));
        }
        Ok(())
    }

    /// Starts to send all pieces of a message.
    ///
    /// # Safety
    /// The bytes stay where they are, unchanged, until the message is done.
    unsafe fn post_send(&self, (to, bytes): Sent<'_>, lane: Lane) -> Result<Message, Error> {
        let mut message = Message::new(to, false);
        for piece in pieces(bytes.len()) {
            let bytes = &bytes[piece];
            // SAFETY: the caller's promise.
            let request = unsafe {
                self.calls
                    .send(bytes.as_ptr(), bytes.len(), to, lane as i32)
            };
            match request {
                Ok(request) => message.pieces.push_back((request, bytes.len())),
                Err(code) => return self.fail(self.refused(&message, code)),
            }
        }
        Ok(message)
    }

    /// Starts to receive all pieces of a message.
    ///
    /// # Safety
    /// The bytes stay where they are, and nobody else touches them, until the message is done.
    unsafe fn post_receive(
        &self,
        (from, bytes): &mut Received<'_>,
        lane: Lane,
    ) -> Result<Message, Error> {
        let mut message = Message::new(*from, true);
        for piece in pieces(bytes.len()) {
            let bytes = &mut bytes[piece];
            let (start, length) = (bytes.as_mut_ptr(), bytes.len());
            // SAFETY: the caller's promise.
            match unsafe { self.calls.receive(start, length, *from, lane as i32) } {
                Ok(request) => message.pieces.push_back((request, length)),
                Err(code) => {
                    let error = self.refused(&message, code);
                    self.give_up(&mut message, &error);
                    return self.fail(error);
                }
            }
        }
        Ok(message)
    }

    fn refused(&self, message: &Message, code: Code) -> Error {
        let what = if message.incoming {
            "receive from"
        } else {
            "send to"
        };
        let why = self.calls.explain(code);
        self.failure(format_args!("cannot {what} rank {}: {why}", message.peer))
    }

    /// Lets MPI work on a message. Returns whether a piece was done.
    fn advance(&self, message: &mut Message) -> Result<bool, Error> {
        let mut moved = false;
        while let Some((request, expected)) = message.pieces.front_mut() {
            let expected = *expected;
            let came = match self.calls.test(request) {
                Ok(None) => return Ok(moved),
                Ok(Some(came)) if !message.incoming || came == expected => None,
                Ok(Some(came)) => Some(came.to_string()),
                Err(code) if message.incoming && self.calls.is_truncated(code) => {
                    Some("more".to_owned())
                }
                Err(code) => {
                    message.pieces.pop_front();
                    return self.fail(self.refused(message, code));
                }
            };
            message.pieces.pop_front();
            moved = true;
            if let Some(came) = came {
                let peer = message.peer;
                return self.fail(self.failure(format_args!(
                    "expected {expected} bytes from rank {peer}, and {came} came"
                )));
            }
        }
        Ok(moved)
    }

    /// Lets MPI work on what was sent without waiting, and frees what is done. To ask for the first message is enough for that, because
    /// MPI works on all of them then; many questions would only take time.
    fn advance_sending(&self) -> Result<bool, Error> {
        let mut sending = self.sending.borrow_mut();
        let mut moved = false;
        while let Some((_, message)) = sending.front_mut() {
            moved |= self.advance(message)?;
            if !message.is_done() {
                break;
            }
            sending.pop_front();
        }
        Ok(moved)
    }

    /// Waits until these messages are done, or until nothing has moved for as long as the deadline.
    fn wait(&self, messages: &mut [Message]) -> Result<(), Error> {
        self.wait_while(|| {
            let mut moved = false;
            for message in messages.iter_mut() {
                moved |= self.advance(message)?;
            }
            let waited_for = messages.iter().find(|message| !message.is_done());
            Ok((moved, waited_for.map(|message| message.peer)))
        })
    }

    /// Calls `step` until it no longer names a rank to wait for. It also says whether something has moved.
    fn wait_while(
        &self,
        mut step: impl FnMut() -> Result<(bool, Option<usize>), Error>,
    ) -> Result<(), Error> {
        let mut rest = Rest::new();
        let mut since = Instant::now();
        loop {
            let began = Instant::now();
            let (moved, peer) = step()?;
            let Some(peer) = peer else {
                return Ok(());
            };
            self.advance_sending()?;
            let now = Instant::now();
            if moved {
                since = now;
            } else if now - since >= self.deadline {
                return self.fail(Error::TimedOut {
                    rank: self.rank,
                    host: self.host.clone(),
                    peer,
                    seconds: self.deadline.as_secs(),
                });
            }
            rest.after(now - began, self.deadline.saturating_sub(now - since));
        }
    }

    /// Makes MPI forget a message after an error, so that the caller gets its bytes back. Where that is not possible, the job ends here.
    fn give_up(&self, message: &mut Message, error: &Error) {
        if !message.incoming {
            // MPI may still read what was to be sent, or a network card may. Nothing is lost by that: no rank trusts what comes after an error.
            message.pieces.clear();
            return;
        }
        for (request, _) in &mut message.pieces {
            self.calls.cancel(request);
        }
        let until = Instant::now() + SETTLING;
        let mut rest = Rest::new();
        while let Some((request, _)) = message.pieces.front_mut() {
            let began = Instant::now();
            if !matches!(self.calls.test(request), Ok(None)) {
                message.pieces.pop_front();
            } else if began >= until {
                // The other side has begun to send it, and stopped in the middle.
                tracing::error!(
                    "{error}; half of its message has come, and MPI does not give up the rest, so the job ends here"
                );
                self.abort(1);
            } else {
                rest.after(began.elapsed(), SETTLING);
            }
        }
    }

    fn transfer(
        &self,
        sent: Option<Sent<'_>>,
        received: Option<Received<'_>>,
        lane: Lane,
    ) -> Result<(), Error> {
        self.usable()?;
        let mut messages = Vec::with_capacity(2);
        if let Some(mut received) = received {
            // SAFETY: the caller's bytes are borrowed until this function returns, and it returns after the message is done or forgotten.
            messages.push(unsafe { self.post_receive(&mut received, lane) }?);
        }
        let posted = sent.map_or(Ok(()), |sent| {
            // SAFETY: as above, except after an error; see `give_up`.
            messages.push(unsafe { self.post_send(sent, lane) }?);
            Ok(())
        });
        let done = posted.and_then(|()| self.wait(&mut messages));
        if let Err(error) = &done {
            for message in &mut messages {
                self.give_up(message, error);
            }
        }
        done
    }

    /// A barrier that only this value's end waits in.
    fn close(&self) -> Result<(), Error> {
        self.flush()?;
        let (rank, size) = (self.rank, self.size);
        let mut distance = 1;
        while distance < size {
            let to = (rank + distance) % size;
            let from = (rank + size - distance) % size;
            self.transfer(Some((to, &[1])), Some((from, &mut [0])), Lane::Closing)?;
            distance *= 2;
        }
        Ok(())
    }
}

impl Message {
    fn new(peer: usize, incoming: bool) -> Self {
        Self {
            peer,
            incoming,
            pieces: VecDeque::new(),
        }
    }

    fn is_done(&self) -> bool {
        self.pieces.is_empty()
    }
}

/// The pieces of a message. The first is the one that may be short, so that messages of different lengths differ at once.
fn pieces(length: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let count = length.div_ceil(PIECE);
    let first = length - PIECE * count.saturating_sub(1);
    (0..count).map(move |piece| {
        let end = first + PIECE * piece;
        end.saturating_sub(if piece == 0 { first } else { PIECE })..end
    })
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn host(&self) -> &str {
        &self.host
    }

    fn engine(&self) -> String {
        self.engine.clone()
    }

    fn exchange(
        &self,
        sent: Option<Sent<'_>>,
        received: Option<Received<'_>>,
    ) -> Result<(), Error> {
        self.transfer(sent, received, Lane::Exchange)
    }

    fn send(&self, to: usize, bytes: Vec<u8>) -> Result<(), Error> {
        self.usable()?;
        // SAFETY: the vector moves, but not its bytes, and the list keeps it until the message is done.
        let message = unsafe { self.post_send((to, &bytes), Lane::Sent) };
        match message {
            Ok(message) => self.sending.borrow_mut().push_back((bytes, message)),
            Err(error) => {
                // MPI may still read a piece that it took before it refused one.
                mem::forget(bytes);
                return Err(error);
            }
        }
        self.advance_sending()?;
        Ok(())
    }

    fn receive(&self, from: usize, into: &mut [u8]) -> Result<(), Error> {
        self.transfer(None, Some((from, into)), Lane::Sent)
    }

    fn flush(&self) -> Result<(), Error> {
        self.usable()?;
        self.wait_while(|| {
            let moved = self.advance_sending()?;
            let sending = self.sending.borrow();
            Ok((moved, sending.front().map(|(_, message)| message.peer)))
        })
    }

    fn abort(&self, code: i32) -> ! {
        let _ = std::io::stdout().flush();
        // Launchers throw away what they have not read when the job ends, and that may be the message which says why.
        std::thread::sleep(LAST_WORDS);
        // It talks to the launcher, which may be what is broken.
        std::thread::spawn(move || {
            std::thread::sleep(ABORTING);
            std::process::exit(code);
        });
        self.calls.abort(code);
        std::process::exit(code)
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if !self.failed.get() && !std::thread::panicking() {
            match self.close() {
                Ok(()) => return self.calls.finalize(),
                Err(error) => tracing::warn!("at the end of the job: {error}"),
            }
        }
        // MPI is left as it is. What it may still send must stay in memory.
        mem::forget(self.sending.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_piece_is_the_short_one() {
        let of = |length| {
            let pieces = pieces(length).map(|piece| (piece.start, piece.end));
            pieces.collect::<Vec<_>>()
        };
        assert_eq!(of(0), []);
        assert_eq!(of(5), [(0, 5)]);
        assert_eq!(of(PIECE), [(0, PIECE)]);
        assert_eq!(of(PIECE + 3), [(0, 3), (3, PIECE + 3)]);
        assert_eq!(of(2 * PIECE), [(0, PIECE), (PIECE, 2 * PIECE)]);
    }
}
