//! Which code multiplies: one choice for the processor, made here and nowhere else.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};

/// Code for a kind of processor. Each runs on the processors of those after it, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Engine {
    /// For any processor: `gemm-f32`, and loops that the compiler turns into what vectors there are.
    Portable,
    /// AVX2 with FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512, for what multiplies most.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 and its dot products of bf16.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// These and tile registers.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// NEON, which every 64-bit Arm processor has.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// NEON and products of bf16 matrices (FEAT_BF16).
    #[cfg(target_arch = "aarch64")]
    NeonBf16,
}

const ALL: &[Engine] = &[
    Engine::Portable,
    #[cfg(target_arch = "x86_64")]
    Engine::Avx2,
    #[cfg(target_arch = "x86_64")]
    Engine::Avx512,
    #[cfg(target_arch = "x86_64")]
    Engine::Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    Engine::Amx,
    #[cfg(target_arch = "aarch64")]
    Engine::Neon,
    #[cfg(target_arch = "aarch64")]
    Engine::NeonBf16,
];

/// Stands for a choice that was not made yet.
const UNKNOWN: u8 = u8::MAX;

static CURRENT: AtomicU8 = AtomicU8::new(UNKNOWN);

/// The engine that computes.
#[inline]
pub(crate) fn engine() -> Engine {
    let current = CURRENT.load(Ordering::Relaxed);
    ALL.get(usize::from(current))
        .copied()
        .unwrap_or_else(choose)
}

#[cold]
fn choose() -> Engine {
    let best = best();
    // Where a test has chosen meanwhile, its choice stays.
    match CURRENT.compare_exchange(UNKNOWN, best as u8, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => best,
        Err(chosen) => ALL[usize::from(chosen)],
    }
}

#[cfg(target_arch = "x86_64")]
fn best() -> Engine {
    use std::arch::is_x86_feature_detected as has;
    if !(has!("avx2") && has!("fma")) {
        Engine::Portable
    } else if !has!("avx512f") {
        Engine::Avx2
    } else if !(has!("avx512bw") && has!("avx512bf16")) {
        Engine::Avx512
    } else if crate::cpu::processor::has_tiles() {
        Engine::Amx
    } else {
        Engine::Avx512Bf16
    }
}

#[cfg(target_arch = "aarch64")]
fn best() -> Engine {
    if std::arch::is_aarch64_feature_detected!("bf16") {
        Engine::NeonBf16
    } else {
        Engine::Neon
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn best() -> Engine {
    Engine::Portable
}

impl Engine {
    /// As [`limit_engine`] is told it.
    fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Self::Amx => "amx",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "neon",
            #[cfg(target_arch = "aarch64")]
            Self::NeonBf16 => "neon-bf16",
        }
    }
}

/// What computes: the name of this processor's kind, or of the one that [`limit_engine`] was told.
pub fn engine_name() -> &'static str {
    engine().name()
}

/// Computes as on a processor that has no more than this, for the rest of the process; before anything is computed.
///
/// # Errors
/// A name that is not one of an engine that this processor can run; the message says which there are.
pub fn limit_engine(name: &str) -> Result<(), String> {
    let engines = engines();
    let Some(engine) = engines.iter().find(|engine| engine.name() == name) else {
        let names: Vec<&str> = engines.iter().map(|engine| engine.name()).collect();
        return Err(format!("this processor can be {}", names.join(", ")));
    };
    CURRENT.store(*engine as u8, Ordering::Relaxed);
    Ok(())
}

/// The engines that this processor can run, for tests of all of them.
#[doc(hidden)]
pub fn engines() -> Vec<Engine> {
    let best = best();
    ALL.iter()
        .copied()
        .filter(|engine| *engine <= best)
        .collect()
}

/// Calls `work` while every thread of the process computes with this engine, for tests; one call at a time.
///
/// A product that another thread has under way would change engines in its midst, and be wrong. So tests that call
/// this are in a binary apart from those that compute without it, or those call it too.
///
/// # Panics
/// If this processor cannot run it.
#[doc(hidden)]
pub fn with_engine<R>(engine: Engine, work: impl FnOnce() -> R) -> R {
    static ONE: Mutex<()> = Mutex::new(());
    /// Goes back to the best one even if `work` panics.
    struct Restore;
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.store(UNKNOWN, Ordering::Relaxed);
        }
    }
    assert!(engine <= best(), "this processor cannot run {engine:?}");
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let _restore = Restore;
    CURRENT.store(engine as u8, Ordering::Relaxed);
    work()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_processor_runs_what_is_for_any() {
        assert_eq!(engines().first(), Some(&Engine::Portable));
        assert_eq!(engines().last(), Some(&best()));
    }

    #[test]
    fn what_a_processor_has_not_is_refused() {
        let message = limit_engine("z80").unwrap_err();
        assert!(
            message.starts_with("this processor can be portable"),
            "{message}"
        );
    }
}
