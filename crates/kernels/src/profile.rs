//! Where the time goes: calls, seconds and floating-point operations of every operation, and what of
//! it threads share.
//!
//! Off by default, and then one relaxed load an operation. Operations are called by one thread and
//! spread their own work, so the time between entering and leaving one is the time it costs the
//! pass; an operation that calls another is charged for what is left.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What one operation cost since profiling began.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OpCost {
    /// The operation.
    pub name: &'static str,
    /// How often it was called.
    pub calls: u64,
    /// Time within it, without the operations that it called.
    pub time: Duration,
    /// Floating-point operations of its matrix products; zero where it has none.
    pub flops: f64,
}

/// What the parallel regions with one number of tasks cost since profiling began. In a region threads
/// share tasks, and at its end they wait for each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RegionCost {
    /// Tasks that threads share; `None` where the work is cut for as many threads as there are.
    pub tasks: Option<usize>,
    /// How many such regions there were.
    pub count: u64,
    /// Time within them.
    pub time: Duration,
}

impl RegionCost {
    /// Seconds that these regions would take on so many threads, had they been measured on one: the
    /// thread with the most tasks decides. Waking threads and waiting for them comes on top.
    pub fn seconds_on(&self, threads: usize) -> f64 {
        let share = self.tasks.map_or(1.0 / threads as f64, |tasks| {
            tasks.div_ceil(threads) as f64 / tasks as f64
        });
        self.time.as_secs_f64() * share
    }
}

static ENABLED: AtomicBool = AtomicBool::new(false);
static COSTS: Mutex<Vec<OpCost>> = Mutex::new(Vec::new());
static REGIONS: Mutex<Vec<RegionCost>> = Mutex::new(Vec::new());

thread_local! {
    /// Time spent in operations that the ones under way have called.
    static NESTED: RefCell<Vec<Duration>> = const { RefCell::new(Vec::new()) };
    /// Whether this thread is within a region that it has opened.
    static IN_REGION: Cell<bool> = const { Cell::new(false) };
}

/// Begins to measure, from zero. There is one profile a process.
pub fn start_profile() {
    COSTS.lock().unwrap_or_else(PoisonError::into_inner).clear();
    REGIONS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clear();
    ENABLED.store(true, Ordering::Relaxed);
}

/// Ends measuring; what each operation cost, the dearest first.
pub fn stop_profile() -> Vec<OpCost> {
    ENABLED.store(false, Ordering::Relaxed);
    let mut costs = std::mem::take(&mut *COSTS.lock().unwrap_or_else(PoisonError::into_inner));
    costs.sort_by(|a, b| b.time.cmp(&a.time).then(a.name.cmp(b.name)));
    costs
}

/// The parallel regions of the last profile, those with the fewest tasks first.
pub fn profiled_regions() -> Vec<RegionCost> {
    let mut regions = REGIONS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    regions.sort_by_key(|region| region.tasks);
    regions
}

/// Does work whose tasks threads share; `None` where it is cut for as many threads as there are.
pub(crate) fn region<R>(tasks: Option<usize>, work: impl FnOnce() -> R) -> R {
    if !ENABLED.load(Ordering::Relaxed) || tasks == Some(0) || IN_REGION.get() {
        return work();
    }
    IN_REGION.set(true);
    let begun = Instant::now();
    let result = work();
    let time = begun.elapsed();
    IN_REGION.set(false);
    let mut regions = REGIONS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(region) = regions.iter_mut().find(|region| region.tasks == tasks) {
        region.count += 1;
        region.time += time;
    } else {
        regions.push(RegionCost {
            tasks,
            count: 1,
            time,
        });
    }
    result
}

/// An operation under way; it ends when this is dropped.
pub(crate) struct Op {
    name: &'static str,
    flops: f64,
    begun: Option<Instant>,
}

/// Enters an operation; `flops` says how many operations its matrix products take.
pub(crate) fn op(name: &'static str, flops: impl FnOnce() -> f64) -> Op {
    if !ENABLED.load(Ordering::Relaxed) {
        return Op {
            name,
            flops: 0.0,
            begun: None,
        };
    }
    NESTED.with_borrow_mut(|nested| nested.push(Duration::ZERO));
    Op {
        name,
        flops: flops(),
        begun: Some(Instant::now()),
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        let Some(begun) = self.begun else { return };
        let whole = begun.elapsed();
        let nested = NESTED.with_borrow_mut(|nested| {
            let own = nested.pop().unwrap_or_default();
            if let Some(outer) = nested.last_mut() {
                *outer += whole;
            }
            own
        });
        let time = whole.saturating_sub(nested);
        let mut costs = COSTS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cost) = costs.iter_mut().find(|cost| cost.name == self.name) {
            cost.calls += 1;
            cost.time += time;
            cost.flops += self.flops;
        } else {
            costs.push(OpCost {
                name: self.name,
                calls: 1,
                time,
                flops: self.flops,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nested_operation_is_not_counted_twice() {
        let nap = Duration::from_millis(20);
        start_profile();
        {
            let _outer = op("test outer", || 1.0);
            for _ in 0..2 {
                let _inner = op("test inner", || 2.0);
                std::thread::sleep(nap);
            }
        }
        // A number of tasks that no other test has.
        let tasks = Some(1_000_003);
        for _ in 0..2 {
            region(tasks, || {
                region(tasks, || std::thread::sleep(nap));
            });
        }
        let costs = stop_profile();
        // Other tests of this process may have run operations of their own meanwhile.
        let find = |name| *costs.iter().find(|cost| cost.name == name).unwrap();
        let (outer, inner) = (find("test outer"), find("test inner"));
        assert_eq!((outer.calls, inner.calls), (1, 2));
        assert_eq!((outer.flops, inner.flops), (1.0, 4.0));
        assert!(inner.time >= 2 * nap && outer.time < nap, "{costs:?}");
        let regions = profiled_regions();
        let region = regions.iter().find(|r| r.tasks == tasks).unwrap();
        assert_eq!(region.count, 2);
        assert!(region.time >= 2 * nap, "{region:?}");
        let _off = op("test outer", || 1.0);
    }

    #[test]
    fn the_thread_with_the_most_tasks_decides() {
        let region = |tasks| RegionCost {
            tasks,
            count: 1,
            time: Duration::from_secs(12),
        };
        assert_eq!(region(Some(1)).seconds_on(64), 12.0);
        assert_eq!(region(Some(3)).seconds_on(2), 8.0);
        assert_eq!(region(Some(24)).seconds_on(16), 1.0);
        assert_eq!(region(None).seconds_on(16), 0.75);
    }
}
