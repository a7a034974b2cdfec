//! Waiting that costs next to nothing.

use std::thread;
use std::time::Duration;

/// So long MPI is asked again at once, before anybody sleeps: what comes from the same machine is there by then.
const AT_ONCE: Duration = Duration::from_micros(60);
const SHORTEST: Duration = Duration::from_micros(20);
const LONGEST: Duration = Duration::from_millis(1);
/// A step that took longer than this has moved bytes: an idle one takes a microsecond or two.
const BUSY: Duration = Duration::from_micros(15);

/// Naps between questions whether something has come, which become longer the longer nothing does.
pub(super) struct Rest {
    asked: Duration,
    nap: Duration,
}

impl Rest {
    pub(super) fn new() -> Self {
        Self {
            asked: Duration::ZERO,
            nap: SHORTEST,
        }
    }

    /// Rests after a question that took this long, not longer than `most`.
    pub(super) fn after(&mut self, took: Duration, most: Duration) {
        match self.next(took) {
            Some(nap) => thread::sleep(nap.min(most)),
            // The other side may be waiting for this very core.
            None => thread::yield_now(),
        }
    }

    fn next(&mut self, took: Duration) -> Option<Duration> {
        if took > BUSY {
            *self = Self::new();
        }
        self.asked += took;
        if self.asked <= AT_ONCE {
            return None;
        }
        let nap = self.nap;
        self.nap = (nap * 5 / 4).min(LONGEST);
        Some(nap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn naps_grow_until_something_moves() {
        let mut rest = Rest::new();
        let idle = Duration::from_micros(1);
        for _ in 0..AT_ONCE.as_micros() {
            assert_eq!(rest.next(idle), None);
        }
        let naps: Vec<_> = (0..40).map(|_| rest.next(idle).unwrap()).collect();
        assert_eq!((naps[0], naps[39]), (SHORTEST, LONGEST));
        assert!(naps.is_sorted());
        assert_eq!(rest.next(BUSY * 2), None);
    }
}
