//! What a processor can do that Rust's standard library does not tell.

use std::sync::OnceLock;

/// Whether this processor multiplies bf16 in tile registers, and the system lets it.
pub(crate) fn has_tiles() -> bool {
    static SUPPORTED: OnceLock<bool> = OnceLock::new();
    *SUPPORTED.get_or_init(|| has_instructions() && may_use())
}

fn has_instructions() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const BF16: u32 = 1 << 22;
    const TILES: u32 = 1 << 24;
    #[expect(
        clippy::allow_attributes,
        reason = "whether reading this is safe depends on the compiler's version"
    )]
    #[allow(
        unsafe_code,
        unused_unsafe,
        reason = "every x86-64 processor has cpuid"
    )]
    // SAFETY: every x86-64 processor has this instruction, and the leaf is read only where there is one.
    let features = unsafe {
        if __cpuid(0).eax < 7 {
            return false;
        }
        __cpuid_count(7, 0).edx
    };
    features & BF16 != 0 && features & TILES != 0
}

/// Asks Linux for the tile registers, whose contents it then keeps for each thread; it does not by itself.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "a system call")]
fn may_use() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes no pointers. A kernel that does not know it, or has reasons to refuse, gives an error.
    unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_PERM,
            XFEATURE_XTILEDATA,
        ) == 0
    }
}

#[cfg(not(target_os = "linux"))]
fn may_use() -> bool {
    false
}
