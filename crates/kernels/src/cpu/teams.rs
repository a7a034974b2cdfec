//! Teams of threads, each of which computes something of its own.
//!
//! Threads that share one computation wait for each other at the end of every operation, a thousand times in a training step. Where
//! there are several computations that know nothing of each other, teams take one each, and wait for each other at the end alone.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::workspace::Workspace;

/// Threads of a team at least. Two threads that share one computation lose little of their time, and another team
/// takes the memory of another computation.
const TEAM_THREADS: usize = 2;

/// Teams that the current threads make for so many tasks, at most.
pub fn team_count(tasks: usize) -> usize {
    (rayon::current_num_threads() / TEAM_THREADS).clamp(1, tasks.max(1))
}

/// Threads in teams, which are started once for each number of teams that is asked for, and what the teams compute with.
#[derive(Default)]
pub struct Teams {
    /// Those of each number of teams.
    pools: Vec<Vec<ThreadPool>>,
    /// Threads that all of these were made of.
    threads: usize,
    /// Those of the teams behind the first one.
    workspaces: Vec<Workspace>,
}

impl Teams {
    /// What `work` makes of each number below `tasks`, in their order, with the workspace of the team that does it, which is `ws` for the
    /// first one. Each of `count` teams takes the next task when it has done one. With one team, or where the system gives no threads
    /// for more, the tasks come one after the other on the current threads.
    pub fn map<R: Send>(
        &mut self,
        count: usize,
        tasks: usize,
        ws: &Workspace,
        work: impl Fn(usize, &Workspace) -> R + Sync,
    ) -> Vec<R> {
        let count = count.min(team_count(tasks));
        let Some(pools) = (count > 1).then(|| self.pools(count)).flatten() else {
            return (0..tasks).map(|task| work(task, ws)).collect();
        };
        let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::with_capacity(tasks)));
        let run = |ws: &Workspace| {
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    break;
                }
                let result = work(task, ws);
                let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                done.push((task, result));
            }
        };
        let pools = &self.pools[pools];
        let workspaces = std::iter::once(ws).chain(&self.workspaces);
        rayon::scope(|scope| {
            for (pool, ws) in pools.iter().zip(workspaces) {
                let run = &run;
                scope.spawn(move |_| pool.install(|| run(ws)));
            }
        });
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.sort_unstable_by_key(|(task, _)| *task);
        done.into_iter().map(|(_, result)| result).collect()
    }

    /// Where the pools of so many teams of the current number of threads are; `None` where the system does not allow them.
    fn pools(&mut self, count: usize) -> Option<usize> {
        let threads = rayon::current_num_threads();
        if self.threads != threads {
            self.pools.clear();
            self.threads = threads;
        }
        let missing = count.saturating_sub(self.workspaces.len() + 1);
        self.workspaces
            .extend((0..missing).map(|_| Workspace::new()));
        if let Some(at) = self.pools.iter().position(|pools| pools.len() == count) {
            return Some(at);
        }
        let pools = (0..count).map(|team| {
            ThreadPoolBuilder::new()
                .num_threads(threads * (team + 1) / count - threads * team / count)
                .thread_name(move |thread| format!("team {team}.{thread}"))
                .build()
        });
        self.pools.push(pools.collect::<Result<_, _>>().ok()?);
        Some(self.pools.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn teams_do_every_task_once_on_their_own_threads() {
        for threads in 1..=9 {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build();
            pool.unwrap().install(|| {
                let (mut teams, ws) = (Teams::default(), Workspace::new());
                for (most, tasks) in [(9, 0), (9, 1), (9, 2), (9, 20), (2, 8), (1, 3), (9, 3)] {
                    let count = team_count(tasks).min(most);
                    let done = teams.map(most, tasks, &ws, |task, ws| {
                        let own = rayon::current_num_threads();
                        assert!((1..=threads.div_ceil(count)).contains(&own));
                        ws.give(ws.take(1, 1 + task));
                        task
                    });
                    assert_eq!(done, (0..tasks).collect::<Vec<_>>());
                }
            });
        }
    }
}
