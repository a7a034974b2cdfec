//! Waiting that costs next to nothing.

use std::thread;
use std::time::Duration;

/// So often MPI is asked at once, before anybody sleeps: what comes from the same machine is there by then.
const AT_ONCE: u32 = 100;
const SHORTEST: Duration = Duration::from_micros(20);
const LONGEST: Duration = Duration::from_millis(1);
/// A step that took longer than this has moved bytes: an idle one takes a microsecond or two.
const BUSY: Duration = Duration::from_micros(15);

/// Naps between questions whether something has come, which become longer the longer nothing does.
pub(super) struct Rest {
    asked: u32,
    nap: Duration,
}

impl Rest {
    pub(super) fn new() -> Self {
        Self {
            asked: 0,
            nap: SHORTEST,
        }
    }

    /// Rests after a question that took this long, not longer than `most`.
    pub(super) fn after(&mut self, took: Duration, most: Duration) {
        if let Some(nap) = self.next(took) {
            thread::sleep(nap.min(most));
        }
    }

    fn next(&mut self, took: Duration) -> Option<Duration> {
        if took > BUSY {
            *self = Self::new();
        }
        self.asked += 1;
        if self.asked <= AT_ONCE {
            std::hint::spin_loop();
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
        for _ in 0..AT_ONCE {
            assert_eq!(rest.next(idle), None);
        }
        let naps: Vec<_> = (0..40).map(|_| rest.next(idle).unwrap()).collect();
        assert_eq!((naps[0], naps[39]), (SHORTEST, LONGEST));
        assert!(naps.is_sorted());
        assert_eq!(rest.next(BUSY * 2), None);
    }
}
