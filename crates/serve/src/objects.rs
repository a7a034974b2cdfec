//! What every object of OpenAI's API has: an id and the time when it was made.

use std::hash::{BuildHasher as _, RandomState};
use std::time::SystemTime;

/// An id that no other object has.
pub(crate) fn new_id(prefix: &str) -> String {
    let (a, b) = (
        RandomState::new().hash_one(0),
        RandomState::new().hash_one(1),
    );
    format!("{prefix}{a:016x}{:08x}", b as u32)
}

/// Seconds since 1970.
pub(crate) fn unix(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// The same of now.
pub(crate) fn now() -> u64 {
    unix(SystemTime::now())
}
