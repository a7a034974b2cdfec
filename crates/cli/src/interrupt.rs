//! Ctrl-C: the first press asks the work to stop in good order, the second ends the program at once.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Starts listening. The flag turns true at the first press, after `message` was printed; whoever does the work looks
/// at it between steps. The second press exits with code 130.
///
/// # Errors
/// When the system refuses the handler, or one was installed before.
pub fn install(message: &'static str) -> anyhow::Result<&'static AtomicBool> {
    ctrlc::set_handler(move || {
        if REQUESTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        crate::progress::stderr_line(&format!("{message}; press Ctrl-C again to stop at once"));
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(&REQUESTED)
}
