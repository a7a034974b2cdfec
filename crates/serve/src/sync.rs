//! Locks, and work off the threads of the routes.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::ApiError;

/// Locks, also behind a thread that has died: nothing that is locked here is left half done.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does something that takes long off the threads of the routes.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(ApiError::internal(format!("the work was lost: {error}"))),
    }
}
