//! Where the time goes: calls, seconds and floating-point operations of every operation.
//!
//! Off by default, and then one relaxed load an operation. Operations are called by one thread and
//! spread their own work, so the time between entering and leaving one is the time it costs the
//! pass; an operation that calls another is charged for what is left.

use std::cell::RefCell;
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

static ENABLED: AtomicBool = AtomicBool::new(false);
static COSTS: Mutex<Vec<OpCost>> = Mutex::new(Vec::new());

thread_local! {
    /// Time spent in operations that the ones under way have called.
    static NESTED: RefCell<Vec<Duration>> = const { RefCell::new(Vec::new()) };
}

/// Begins to measure, from zero. There is one profile a process.
pub fn start_profile() {
    COSTS.lock().unwrap_or_else(PoisonError::into_inner).clear();
    ENABLED.store(true, Ordering::Relaxed);
}

/// Ends measuring; what each operation cost, the dearest first.
pub fn stop_profile() -> Vec<OpCost> {
    ENABLED.store(false, Ordering::Relaxed);
    let mut costs = std::mem::take(&mut *COSTS.lock().unwrap_or_else(PoisonError::into_inner));
    costs.sort_by(|a, b| b.time.cmp(&a.time).then(a.name.cmp(b.name)));
    costs
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
        let costs = stop_profile();
        // Other tests of this process may have run operations of their own meanwhile.
        let find = |name| *costs.iter().find(|cost| cost.name == name).unwrap();
        let (outer, inner) = (find("test outer"), find("test inner"));
        assert_eq!((outer.calls, inner.calls), (1, 2));
        assert_eq!((outer.flops, inner.flops), (1.0, 4.0));
        assert!(inner.time >= 2 * nap && outer.time < nap, "{costs:?}");
        let _off = op("test outer", || 1.0);
    }
}
