//! The one thread that computes: requests of all adapters in one decoding session, and what else needs the model.
//!
//! Routes hand requests in and get tokens through channels. Whoever drops its end of a channel has left, and its rows are free a step later.
//! The numbers of a request do not depend on what is computed beside it, so the order in which requests are taken up decides when they are
//! answered, and nothing else.

mod queue;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lowrank::Workspace;
use lowrank::generate::{
    CacheKey, Constraint, Continuation, Decoding, Finish, Request, RequestId, Token,
};
use lowrank::model::{Adapter, BLOCK_ROWS, Decoder};
use tokio::sync::mpsc::UnboundedSender;

use crate::sync::lock;
use queue::Queue;

/// What a request is told.
#[derive(Debug)]
pub(crate) enum Update {
    /// It is taken up; so many tokens of its prompt were computed before.
    Begun { cached_tokens: usize },
    /// Tokens of its prompt with their log-probabilities.
    Read(Vec<Token>),
    /// The next token.
    Token(Token),
    /// It is over.
    Finished(Finish),
    /// Its deadline has passed.
    TimedOut,
    /// It needs more of the cache than there is.
    TooLarge { tokens: usize },
    /// The server ends before it is whole.
    Cut,
}

/// A request on its way to the engine.
pub(crate) struct Submission {
    pub(crate) request: Request<Arc<Adapter>>,
    pub(crate) grammar: Option<Box<dyn Constraint>>,
    /// Whose turn it is when it is taken up: adapters take turns.
    pub(crate) party: Arc<str>,
    pub(crate) deadline: Option<Instant>,
    pub(crate) updates: UnboundedSender<Update>,
    /// Set by whoever listens where the text has come to an end that the engine does not know of.
    pub(crate) is_over: Arc<AtomicBool>,
    pub(crate) submitted: Instant,
}

/// Work that needs the model and is no request for tokens, such as the vectors of texts.
pub(crate) type Work = Box<dyn FnOnce(&Decoder, &Workspace) + Send>;

/// Work beside the requests that takes long, such as training. It calls its argument as often as it can, which does what
/// requests are due.
pub(crate) type Background = Box<dyn FnOnce(&Arc<Decoder>, &mut (dyn FnMut() + Send)) + Send>;

enum Command {
    Submit(Box<Submission>),
    Work(Work),
    Background(Background),
    Forget(CacheKey),
}

/// How much is done at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Sequences that are generated together.
    pub(crate) running: usize,
    /// Requests that wait.
    pub(crate) waiting: usize,
    /// Tokens of prompts that a step reads while somebody is being answered.
    pub(crate) prompt_piece: usize,
    /// Blocks of the cache.
    pub(crate) blocks: usize,
    /// Share of the time that background work has while requests are under way.
    pub(crate) train_share: f64,
}

/// What the engine is doing, for routes to read.
#[derive(Debug, Default)]
pub(crate) struct Load {
    pub(crate) waiting: AtomicUsize,
    pub(crate) running: AtomicUsize,
    /// Whose requests wait, after the last step.
    pub(crate) waiting_parties: Mutex<Vec<Arc<str>>>,
    pub(crate) is_draining: AtomicBool,
    /// Whoever is still under way is to be told that the server ends.
    pub(crate) is_cut: AtomicBool,
    /// The thread is gone, which without a fault it never is while somebody can ask.
    pub(crate) has_ended: AtomicBool,
}

/// The engine's end for routes.
#[derive(Clone)]
pub(crate) struct Engine {
    commands: Sender<Command>,
    pub(crate) load: Arc<Load>,
    limits: Limits,
}

/// Why a request was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// So many wait already.
    Full(usize),
    /// The server is going down.
    Draining,
}

impl Engine {
    /// Starts the thread. It ends when all ends for routes are gone and everything is done.
    pub(crate) fn start(
        decoder: Arc<Decoder>,
        limits: Limits,
    ) -> std::io::Result<(Self, std::thread::JoinHandle<()>)> {
        let (commands, receiver) = std::sync::mpsc::channel();
        let load = Arc::new(Load::default());
        let of_thread = Arc::clone(&load);
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                let _end = End(&of_thread);
                run(&decoder, receiver, limits, &of_thread);
            })?;
        let engine = Self {
            commands,
            load,
            limits,
        };
        Ok((engine, thread))
    }

    /// Hands in requests that are answered together, all of them or none.
    pub(crate) fn submit(&self, submissions: Vec<Submission>) -> Result<(), Refused> {
        if self.load.is_draining.load(Ordering::SeqCst) {
            return Err(Refused::Draining);
        }
        let count = submissions.len();
        let reserve = |waiting: usize| {
            let after = waiting + count;
            // Many choices of one request may be more than may wait; alone they are let in.
            (after <= self.limits.waiting || waiting == 0).then_some(after)
        };
        let waiting = &self.load.waiting;
        waiting
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, reserve)
            .map_err(Refused::Full)?;
        for submission in submissions {
            // The thread outlives all ends.
            drop(self.commands.send(Command::Submit(Box::new(submission))));
        }
        Ok(())
    }

    /// Lets the thread do something with the model between two steps.
    pub(crate) fn work(&self, work: Work) {
        drop(self.commands.send(Command::Work(work)));
    }

    /// Lets the thread do something long beside the requests, after what it does already.
    pub(crate) fn background(&self, work: Background) {
        drop(self.commands.send(Command::Background(work)));
    }

    /// Gives up what is kept of prompts of this key.
    pub(crate) fn forget(&self, key: CacheKey) {
        drop(self.commands.send(Command::Forget(key)));
    }

    /// Rows of the cache.
    pub(crate) fn cache_rows(&self) -> usize {
        self.limits.blocks * BLOCK_ROWS
    }

    /// Takes no more requests.
    pub(crate) fn drain(&self) {
        self.load.is_draining.store(true, Ordering::SeqCst);
    }

    /// Requests that run or wait.
    pub(crate) fn under_way(&self) -> usize {
        self.load.running.load(Ordering::SeqCst) + self.load.waiting.load(Ordering::SeqCst)
    }

    /// Ends the requests that are still under way, and tells them so.
    pub(crate) fn cut(&self) {
        self.load.is_cut.store(true, Ordering::SeqCst);
    }
}

/// Says that the thread is gone, also where it died.
struct End<'l>(&'l Load);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.has_ended.store(true, Ordering::SeqCst);
    }
}

/// A request under way.
struct Running {
    updates: UnboundedSender<Update>,
    deadline: Option<Instant>,
    party: Arc<str>,
    key: Option<CacheKey>,
    is_over: Arc<AtomicBool>,
    /// The first block of its prompt while that is being read.
    reading: Option<Vec<u32>>,
    submitted: Instant,
    last_token: Option<Instant>,
}

impl Running {
    /// Counts an answer that is whole.
    fn count(&self, finish: Finish) {
        metrics::histogram!("vllm:e2e_request_latency_seconds")
            .record(self.submitted.elapsed().as_secs_f64());
        metrics::counter!("vllm:request_success_total", "finished_reason" => reason(finish))
            .increment(1);
    }
}

struct Worker<'m> {
    decoder: &'m Arc<Decoder>,
    ws: &'m Workspace,
    session: Decoding<'m, Arc<Adapter>>,
    limits: Limits,
    load: &'m Load,
    queue: Queue,
    running: HashMap<RequestId, Running>,
    works: Vec<Work>,
    backgrounds: VecDeque<Background>,
    is_closed: bool,
}

fn run(decoder: &Arc<Decoder>, mut commands: Receiver<Command>, limits: Limits, load: &Load) {
    let ws = Workspace::new();
    let mut worker = Worker {
        decoder,
        ws: &ws,
        session: Decoding::new(decoder, limits.blocks, &ws),
        limits,
        load,
        queue: Queue::default(),
        running: HashMap::new(),
        works: Vec::new(),
        backgrounds: VecDeque::new(),
        is_closed: false,
    };
    loop {
        worker.take_commands(&mut commands, true);
        if worker.is_closed && !worker.has_requests() {
            return;
        }
        if let Some(background) = worker.backgrounds.pop_front() {
            let pace = Pace::new(limits.train_share);
            let state = Mutex::new((pace, Instant::now(), &mut worker, &mut commands));
            let mut between = || {
                let mut locked = lock(&state);
                let (pace, since, worker, commands) = &mut *locked;
                pace.worked(since.elapsed());
                while pace.owes() {
                    let begun = Instant::now();
                    worker.take_commands(commands, false);
                    let had_requests = worker.has_requests();
                    worker.turn();
                    pace.answered(had_requests.then(|| begun.elapsed()));
                }
                *since = Instant::now();
            };
            background(decoder, &mut between);
            continue;
        }
        worker.turn();
    }
}

/// Shares the time between requests and work beside them: what the work took is paid back to the requests in turns.
struct Pace {
    share: f64,
    /// Seconds that the requests are owed; below zero where their last turn was longer than what they were owed.
    owed: f64,
}

impl Pace {
    /// Seconds of turns that the work is given for at once. A long turn reads a prompt, whose tokens are then not to wait for all of what the work has a
    /// right to.
    const AHEAD: f64 = 0.05;

    fn new(share: f64) -> Self {
        Self { share, owed: 0.0 }
    }

    /// Counts what the work took.
    fn worked(&mut self, time: Duration) {
        self.owed += time.as_secs_f64() * (1.0 - self.share) / self.share.max(1e-3);
    }

    /// Whether the requests are to have a turn before the work goes on.
    fn owes(&self) -> bool {
        self.owed > 0.0
    }

    /// Counts a turn of the requests; `None` where there were none.
    fn answered(&mut self, turn: Option<Duration>) {
        self.owed = match turn {
            Some(time) => (self.owed - time.as_secs_f64()).max(-Self::AHEAD),
            None => 0.0,
        };
    }
}

impl Worker<'_> {
    fn has_requests(&self) -> bool {
        !self.running.is_empty() || !self.queue.is_empty() || !self.works.is_empty()
    }

    /// Takes in what has come; where there is nothing to do, waits for it if it may.
    fn take_commands(&mut self, commands: &mut Receiver<Command>, may_wait: bool) {
        let has_work = self.has_requests() || !self.backgrounds.is_empty();
        if may_wait && !has_work && !self.is_closed {
            match commands.recv_timeout(Duration::from_secs(1)) {
                Ok(command) => self.take(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => self.is_closed = true,
            }
        }
        loop {
            match commands.try_recv() {
                Ok(command) => self.take(command),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.is_closed = true;
                    return;
                }
            }
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => self.queue.push(*submission),
            Command::Work(work) => self.works.push(work),
            Command::Background(work) => self.backgrounds.push_back(work),
            Command::Forget(key) => self.session.forget(key),
        }
    }

    /// One step for everyone.
    fn turn(&mut self) {
        for work in std::mem::take(&mut self.works) {
            work(self.decoder, self.ws);
        }
        self.drop_those_who_left();
        self.admit();
        *lock(&self.load.waiting_parties) = self.queue.parties();
        if self.session.is_empty() {
            return;
        }
        let answering = self.running.values().any(|one| one.last_token.is_some());
        let piece = if answering {
            self.limits.prompt_piece
        } else {
            self.limits.prompt_piece.max(8 * BLOCK_ROWS)
        };
        self.session.set_prompt_rows(piece);
        for made in self.session.step() {
            self.tell(made);
        }
        self.load
            .running
            .store(self.running.len(), Ordering::SeqCst);
        metrics::gauge!("vllm:num_requests_running").set(self.running.len() as f64);
        metrics::gauge!("vllm:num_requests_waiting").set(self.queue.len() as f64);
        let free = self.session.free_blocks() as f64;
        metrics::gauge!("vllm:kv_cache_usage_perc")
            .set(1.0 - free / self.limits.blocks.max(1) as f64);
    }

    fn drop_those_who_left(&mut self) {
        let now = Instant::now();
        let is_cut = self.load.is_cut.load(Ordering::SeqCst);
        let end = |deadline: Option<Instant>| {
            let is_late = deadline.is_some_and(|deadline| deadline <= now);
            let late = is_late.then_some(Update::TimedOut);
            if is_cut { Some(Update::Cut) } else { late }
        };
        let left = self.queue.retain(|waiting| match end(waiting.deadline) {
            Some(update) => {
                drop(waiting.updates.send(update));
                false
            }
            None => !waiting.updates.is_closed(),
        });
        self.load.waiting.fetch_sub(left, Ordering::SeqCst);
        let over: Vec<RequestId> = self
            .running
            .iter()
            .filter(|(_, one)| one.updates.is_closed() || end(one.deadline).is_some())
            .map(|(id, _)| *id)
            .collect();
        for id in over {
            self.session.remove(id);
            let Some(one) = self.running.remove(&id) else {
                continue;
            };
            if one.is_over.load(Ordering::SeqCst) {
                one.count(Finish::Stop);
                continue;
            }
            if let Some(update) = end(one.deadline) {
                drop(one.updates.send(update));
            }
            metrics::counter!("lowrank_requests_aborted_total").increment(1);
        }
        self.load
            .running
            .store(self.running.len(), Ordering::SeqCst);
    }

    /// Takes up requests while there is room.
    fn admit(&mut self) {
        while self.running.len() < self.limits.running {
            let running = &self.running;
            // Whoever begins like a prompt that is being read waits until that can be shared.
            let next = self.queue.pop(|waiting| {
                let request = &waiting.request;
                let begins = request.prompt.get(..BLOCK_ROWS);
                let waits = running.values().any(|one| {
                    one.key == request.cache_key
                        && one.key.is_some()
                        && one.reading.is_some()
                        && one.reading.as_deref() == begins
                });
                !waits
            });
            let Some(mut submission) = next else { return };
            let prompt = submission.request.prompt.len();
            let request = submission.request.clone();
            match self.session.admit(request) {
                Ok(id) => {
                    self.load.waiting.fetch_sub(1, Ordering::SeqCst);
                    if let Some(grammar) = submission.grammar.take() {
                        self.session.constrain(id, grammar);
                    }
                    let cached_tokens = self.session.cached_tokens(id).unwrap_or(0);
                    self.begin(id, submission, cached_tokens);
                }
                Err(_) if self.running.is_empty() => {
                    self.load.waiting.fetch_sub(1, Ordering::SeqCst);
                    drop(submission.updates.send(Update::TooLarge { tokens: prompt }));
                }
                Err(_) => {
                    self.queue.put_back(submission);
                    return;
                }
            }
        }
    }

    fn begin(&mut self, id: RequestId, submission: Submission, cached_tokens: usize) {
        let Submission {
            request,
            party,
            deadline,
            updates,
            is_over,
            submitted,
            ..
        } = submission;
        let prompt = request.prompt;
        self.queue
            .charge(&party, (prompt.len() - cached_tokens) as u64);
        metrics::counter!("vllm:prompt_tokens_total").increment(prompt.len() as u64);
        metrics::counter!("vllm:prefix_cache_queries_total").increment(prompt.len() as u64);
        metrics::counter!("vllm:prefix_cache_hits_total").increment(cached_tokens as u64);
        metrics::histogram!("vllm:request_queue_time_seconds")
            .record(submitted.elapsed().as_secs_f64());
        drop(updates.send(Update::Begun { cached_tokens }));
        let running = Running {
            updates,
            deadline,
            party,
            key: request.cache_key,
            is_over,
            reading: prompt.get(..BLOCK_ROWS).map(<[u32]>::to_vec),
            submitted,
            last_token: None,
        };
        self.running.insert(id, running);
    }

    /// Tells a request what a step did for it.
    fn tell(&mut self, made: lowrank::generate::Made) {
        let Some(one) = self.running.get_mut(&made.id) else {
            return;
        };
        if !made.read.is_empty() {
            drop(one.updates.send(Update::Read(made.read)));
        }
        if let Some(token) = made.token {
            let now = Instant::now();
            match one.last_token.replace(now) {
                None => {
                    one.reading = None;
                    metrics::histogram!("vllm:time_to_first_token_seconds")
                        .record(one.submitted.elapsed().as_secs_f64());
                }
                Some(last) => metrics::histogram!("vllm:inter_token_latency_seconds")
                    .record((now - last).as_secs_f64()),
            }
            metrics::counter!("vllm:generation_tokens_total").increment(1);
            self.queue.charge(&one.party, 1);
            drop(one.updates.send(Update::Token(token)));
        }
        if let Some(Continuation { finish, .. }) = made.finished
            && let Some(one) = self.running.remove(&made.id)
        {
            one.count(finish);
            drop(one.updates.send(Update::Finished(finish)));
        }
    }
}

/// Why a text ended, in OpenAI's words.
pub(crate) fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length | Finish::ContextFull => "length",
        Finish::Cancelled => "abort",
        Finish::NotFinite => "error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parts and turns of any lengths come to the share, and nobody is owed for a time without requests.
    #[test]
    fn work_has_its_share_of_the_time() {
        let ms = Duration::from_millis;
        let mut pace = Pace::new(0.25);
        let (mut work, mut turns) = (0, 0);
        for part in 0..1000 {
            let part = 1 + part % 5;
            work += part;
            pace.worked(ms(part));
            while pace.owes() {
                turns += 7;
                pace.answered(Some(ms(7)));
            }
        }
        let share = work as f64 / (work + turns) as f64;
        assert!((share - 0.25).abs() < 0.01, "{share}");
        pace.worked(ms(1000));
        pace.answered(None);
        assert!(!pace.owes());
        // After a long prompt the work does not go on for as long as its share would be.
        pace.worked(ms(1));
        pace.answered(Some(ms(2000)));
        pace.worked(ms(20));
        assert!(pace.owes());
    }
}
