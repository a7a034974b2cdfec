//! Teams of threads, each of which computes something of its own.
//!
//! Threads that share one computation wait for each other at the end of every operation, a thousand times in a training step. Where
//! there are several computations that know nothing of each other, teams take one each, and wait for each other at the end alone.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::workspace::Workspace;

/// Threads of a team at least. Two threads that share one computation lose little of their time, and another team
/// takes the memory of another computation.
const TEAM_THREADS: usize = 2;

/// Teams that the current threads make for so many tasks.
pub fn team_count(tasks: usize) -> usize {
    (rayon::current_num_threads() / TEAM_THREADS).clamp(1, tasks.max(1))
}

/// The threads of the last call, which the next one uses again, and what they compute with.
#[derive(Default)]
pub struct Teams {
    pools: Vec<ThreadPool>,
    /// Threads that the pools were made of.
    threads: usize,
    /// Those of the teams behind the first one.
    workspaces: Vec<Workspace>,
}

impl Teams {
    /// Calls `work` with each number below `tasks` and the workspace of a team, which is `ws` for the first one. A team takes the next
    /// task when it has done one. With one team, or where the system gives no threads for more, the tasks come one after the
    /// other on the current threads.
    pub fn for_each_task(
        &mut self,
        tasks: usize,
        ws: &Workspace,
        work: impl Fn(usize, &Workspace) + Sync,
    ) {
        let count = team_count(tasks);
        if count == 1 || !self.make(count) {
            for task in 0..tasks {
                work(task, ws);
            }
            return;
        }
        let next = AtomicUsize::new(0);
        let run = |ws: &Workspace| {
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    break;
                }
                work(task, ws);
            }
        };
        let workspaces = std::iter::once(ws).chain(&self.workspaces);
        rayon::scope(|scope| {
            for (pool, ws) in self.pools.iter().zip(workspaces) {
                let run = &run;
                scope.spawn(move |_| pool.install(|| run(ws)));
            }
        });
    }

    /// Makes so many teams of the current number of threads; whether the system allowed it.
    fn make(&mut self, count: usize) -> bool {
        let threads = rayon::current_num_threads();
        if self.pools.len() == count && self.threads == threads {
            return true;
        }
        self.pools.clear();
        for team in 0..count {
            let of_team = threads * (team + 1) / count - threads * team / count;
            let builder = ThreadPoolBuilder::new()
                .num_threads(of_team)
                .thread_name(move |thread| format!("team {team}.{thread}"));
            let Ok(pool) = builder.build() else {
                self.pools.clear();
                return false;
            };
            self.pools.push(pool);
        }
        self.threads = threads;
        self.workspaces
            .resize_with(count.saturating_sub(1), Workspace::new);
        true
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
                for tasks in [0, 1, 2, 3, 8, 20, 3] {
                    let ran: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    let most = threads.div_ceil(team_count(tasks));
                    teams.for_each_task(tasks, &ws, |task, ws| {
                        assert!((1..=most).contains(&rayon::current_num_threads()));
                        ws.give(ws.take(1, 1 + task));
                        ran[task].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(ran.iter().all(|ran| ran.load(Ordering::Relaxed) == 1));
                }
            });
        }
    }
}
