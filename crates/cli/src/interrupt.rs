//! Signals that ask the program to end: Ctrl-C, and what a system or a scheduler sends. The first asks the work to stop in
//! good order, the second ends the program at once. The exit code is 128 plus the signal's number.
//!
//! The handlers only set flags. A thread prints the messages; where it cannot be started, nothing but them is missing.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use anyhow::Context;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// That the work is asked to stop.
static REQUESTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
/// That the next signal ends the program.
static AT_ONCE: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
/// The last signal.
static SIGNAL: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);
/// Whether there is nothing to save yet, so that the first signal ends the program. Whoever ends it holds the lock.
static IDLE: Mutex<bool> = Mutex::new(false);

/// Starts listening for Ctrl-C. The flag turns true at the first press, and `message` is printed; whoever does the work
/// looks at it between steps. A press while it is true ends the program.
///
/// # Errors
/// When the system refuses the handler.
pub fn install(message: &'static str) -> anyhow::Result<&'static AtomicBool> {
    listen(SIGINT, &REQUESTED)?;
    speak(&[SIGINT], message, Vec::new());
    Ok(&REQUESTED)
}

/// Starts listening for Ctrl-C, SIGTERM, SIGHUP and what schedulers send before they end a job (SIGUSR1, SIGUSR2, SIGXCPU), for
/// work that can be saved. One that the program was started
/// to ignore stays ignored, but for Ctrl-C: `nohup` promises that a closed terminal ends nothing, while shells let every
/// program in the background ignore Ctrl-C. Those of schedulers never end the program at once, however often they come: a
/// comparison sends SIGUSR1 to its trainings beside what these get themselves, and SIGXCPU comes every second.
///
/// # Errors
/// When the system refuses a handler.
pub fn install_all(message: &'static str) -> anyhow::Result<&'static AtomicBool> {
    let mut signals = vec![SIGINT];
    if !ignored(SIGTERM).unwrap_or(false) {
        signals.push(SIGTERM);
    }
    #[cfg(unix)]
    // Where it cannot be told, the system's way is kept.
    if !ignored(signal_hook::consts::SIGHUP).unwrap_or(true) {
        signals.push(signal_hook::consts::SIGHUP);
    }
    let mut all = signals.clone();
    #[cfg(unix)]
    all.extend(NOTICES);
    speak(&all, message, signals.clone());
    // The thread that speaks deletes what is unfinished before it ends the program; the handlers alone cannot.
    let speaks = SPEAKS.load(Ordering::SeqCst);
    for signal in all {
        if speaks || !signals.contains(&signal) {
            request(signal)?;
        } else {
            listen(signal, &AT_ONCE)?;
        }
    }
    Ok(&REQUESTED)
}

/// Set for a child of `lowrank compare`, whose standard input ends when the comparison does.
pub const WITH_PARENT: &str = "LOWRANK_ENDS_WITH_ITS_PARENT";

/// In such a child, does what SIGTERM asks for as soon as the parent is gone, however it went: a run that nobody waits for would keep
/// its folder from the next one.
pub fn end_with_parent() {
    // Of the ranks of a launcher the first alone has the parent's standard input.
    if std::env::var_os(WITH_PARENT).is_none() || crate::ranks::is_other_rank() {
        return;
    }
    // Where no thread can be had, the child works on to its own end.
    let _ = std::thread::Builder::new().spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        let _ = signal_hook::low_level::raise(SIGTERM);
    });
}

/// Signals that say that the end is near, and do not mean it at once.
#[cfg(unix)]
const NOTICES: [i32; 3] = [
    signal_hook::consts::SIGUSR1,
    signal_hook::consts::SIGUSR2,
    signal_hook::consts::SIGXCPU,
];

/// For commands that have nothing to save: the first Ctrl-C, SIGTERM or SIGHUP deletes files and folders that are not finished,
/// and ends the program. One that the program was started to ignore stays ignored.
#[cfg(unix)]
pub fn clean_up() {
    use signal_hook::iterator::Signals;
    let ends: Vec<i32> = [SIGINT, SIGTERM, signal_hook::consts::SIGHUP]
        .into_iter()
        .filter(|&signal| !ignored(signal).unwrap_or(false))
        .collect();
    let Ok(mut coming) = Signals::new(&ends) else {
        return;
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    let started = thread.spawn(move || {
        if let Some(signal) = coming.forever().next() {
            let by = match signal {
                SIGINT => String::new(),
                other => format!(" by {}", name(other)),
            };
            lowrank::lock::abandon();
            crate::progress::stderr_line(&format!("stopped{by}"));
            std::process::exit(128 + signal);
        }
    });
    if started.is_err() {
        // The handlers are there already, and would do nothing.
        for signal in ends {
            drop(flag::register_conditional_shutdown(
                signal,
                128 + signal,
                Arc::new(AtomicBool::new(true)),
            ));
        }
    }
}

/// The system's own way ends a program here, and what is unfinished stays.
#[cfg(not(unix))]
pub fn clean_up() {}

/// A file that grows over the limit on its size (`ulimit -f`) is an error of the write, as a full disk is, and not the end of
/// the program without a word.
pub fn no_end_by_file_size() {
    #[cfg(unix)]
    drop(flag::register(
        signal_hook::consts::SIGXFSZ,
        Arc::new(AtomicBool::new(false)),
    ));
}

/// From [`install_all`] until [`saving_begins`] there is nothing to save: the first signal ends the program.
pub fn nothing_to_save() {
    set_idle(true);
}

/// From now on the first signal asks the work to stop in good order.
pub fn saving_begins() {
    set_idle(false);
}

/// The name of the last signal, where it was not Ctrl-C.
pub fn signal_name() -> Option<&'static str> {
    match SIGNAL.load(Ordering::SeqCst) as i32 {
        0 | SIGINT => None,
        other => Some(name(other)),
    }
}

/// The number of the last signal; 0 where none came.
pub fn signal() -> u8 {
    SIGNAL.load(Ordering::SeqCst) as u8
}

/// Takes a signal that another rank of the job was sent as this one's own.
pub fn take_signal(number: u8) {
    SIGNAL.store(usize::from(number), Ordering::SeqCst);
}

/// The exit code of a program that a signal ended; Ctrl-C's where none came.
pub fn exit_code() -> u8 {
    match SIGNAL.load(Ordering::SeqCst) {
        0 => 128 + SIGINT as u8,
        signal => 128 + signal as u8,
    }
}

/// Whether an exit code says that a signal ended the program in good order.
pub fn is_exit_code(code: i32) -> bool {
    code > 128 && name(code - 128) != UNNAMED
}

/// Asks another process of this program to stop in good order. One that has gone already is none to ask.
#[cfg(unix)]
pub fn ask_to_stop(child: &std::process::Child) {
    let id = rustix::process::Pid::from_child(child);
    let _ = rustix::process::kill_process(id, rustix::process::Signal::USR1);
}

/// Windows sends Ctrl-C to every process of a console.
#[cfg(not(unix))]
pub fn ask_to_stop(_: &std::process::Child) {}

/// A second signal while `again` is true ends the program; the first turns it true.
fn listen(signal: i32, again: &Arc<AtomicBool>) -> anyhow::Result<()> {
    // In this order: what is registered first is done first.
    flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(again))
        .and_then(|_| flag::register(signal, Arc::clone(again)))
        .with_context(|| format!("cannot listen for {}", name(signal)))?;
    request(signal)
}

fn request(signal: i32) -> anyhow::Result<()> {
    flag::register_usize(signal, Arc::clone(&SIGNAL), signal as usize)
        .and_then(|_| flag::register(signal, Arc::clone(&REQUESTED)))
        .with_context(|| format!("cannot listen for {}", name(signal)))?;
    Ok(())
}

/// Prints what a signal does when it comes. The second of `ends` ends the program.
#[cfg(unix)]
fn speak(signals: &[i32], message: &'static str, ends: Vec<i32>) {
    use signal_hook::iterator::Signals;
    let Ok(mut coming) = Signals::new(signals) else {
        return;
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    let started = thread.spawn(move || {
        let mut asked = false;
        for signal in coming.forever() {
            if let Ok(idle) = IDLE.lock()
                && *idle
            {
                end_idle(signal);
            }
            if ends.contains(&signal) {
                if asked {
                    lowrank::lock::abandon();
                    std::process::exit(128 + signal);
                }
                asked = true;
            }
            // Rank 0 says it for all.
            if crate::ranks::is_other_rank() {
                continue;
            }
            let name = name(signal);
            let text = match signal {
                SIGINT => format!("{message}; press Ctrl-C again to stop at once"),
                notice if NOTICES.contains(&notice) => format!("{name}: {message}"),
                _ => format!("{name}: {message}; send it again to stop at once"),
            };
            crate::progress::stderr_line(&text);
        }
    });
    SPEAKS.store(started.is_ok(), Ordering::SeqCst);
}

/// Nothing can wait for a signal here; the handlers do their work without a word.
#[cfg(not(unix))]
fn speak(_: &[i32], _: &'static str, _: Vec<i32>) {}

/// Whether there is a thread that prints messages, and ends a program that has nothing to save.
static SPEAKS: AtomicBool = AtomicBool::new(false);

fn set_idle(value: bool) {
    if !SPEAKS.load(Ordering::SeqCst) {
        AT_ONCE.store(value, Ordering::SeqCst);
    }
    if let Ok(mut idle) = IDLE.lock() {
        *idle = value;
    }
}

/// Ends a program that has written nothing yet.
#[cfg(unix)]
fn end_idle(signal: i32) -> ! {
    let by = match signal {
        SIGINT => String::new(),
        other => format!(" by {}", name(other)),
    };
    crate::progress::stderr_line(&format!(
        "stopped{by} before the first step; nothing was written"
    ));
    lowrank::lock::abandon();
    std::process::exit(128 + signal)
}

const UNNAMED: &str = "a signal";

fn name(signal: i32) -> &'static str {
    #[cfg(unix)]
    match signal {
        signal_hook::consts::SIGHUP => return "SIGHUP",
        signal_hook::consts::SIGUSR1 => return "SIGUSR1",
        signal_hook::consts::SIGUSR2 => return "SIGUSR2",
        signal_hook::consts::SIGXCPU => return "SIGXCPU",
        _ => {}
    }
    match signal {
        SIGINT => "Ctrl-C",
        SIGTERM => "SIGTERM",
        _ => UNNAMED,
    }
}

/// Whether the program was started with this signal ignored; `None` where the system does not tell.
fn ignored(signal: i32) -> Option<bool> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    in_mask(&status, signal)
}

fn in_mask(status: &str, signal: i32) -> Option<bool> {
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))?;
    let mask = u64::from_str_radix(mask.trim(), 16).ok()?;
    Some(mask >> (signal - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_found_in_the_mask() {
        let status = "Name:\tx\nSigIgn:\t0000000000001001\nSigCgt:\tffff\n";
        assert_eq!(in_mask(status, 1), Some(true));
        assert_eq!(in_mask(status, 13), Some(true));
        assert_eq!(in_mask(status, 15), Some(false));
        assert_eq!(in_mask("Name:\tx\n", 1), None);
    }

    #[test]
    fn exit_codes_have_signals() {
        assert!(is_exit_code(130) && is_exit_code(143));
        assert!(!is_exit_code(101) && !is_exit_code(137) && !is_exit_code(0));
        assert_eq!(exit_code(), 130);
        assert_eq!(signal_name(), None);
    }
}
