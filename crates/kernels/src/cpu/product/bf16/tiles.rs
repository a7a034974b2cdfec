//! A strip of 16 rows of sums in the tile registers of Intel's Advanced Matrix Extensions.
//!
//! A tile has 16 rows of 64 bytes. `tdpbf16ps` multiplies one of 16 × 32 bf16 with one of 32 × 16, whose rows lie in pairs, and adds
//! the products to a tile of 16 × 16 f32 (Intel, "Architecture Instruction Set Extensions Programming Reference", chapter 3).
//! Rust has no stable names for these instructions; they are written out.

use std::arch::asm;

use super::layout::Run;
use crate::cpu::engine::{Engine, engine};

/// Tiles of sums that are computed together.
pub(crate) const TOGETHER: usize = 4;

/// Whether this processor can.
#[inline]
pub(crate) fn supported() -> bool {
    engine() >= Engine::Amx
}

/// The registers' shapes, as `ldtilecfg` reads them: 8 tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static SHAPES: Shapes = Shapes {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Calls `work` on this thread with the tile registers in use; they cost a context switch more only that long.
///
/// # Panics
/// If they are not [`supported`].
#[expect(unsafe_code, reason = "instructions that Rust has no names for")]
pub(crate) fn with_tiles(work: impl FnOnce(&Tiles)) {
    /// Ends it even if `work` panics.
    struct Release;
    impl Drop for Release {
        fn drop(&mut self) {
            // SAFETY: the processor has the instruction, since a `Release` is made behind the assertion below.
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
        }
    }
    assert!(supported(), "a processor without tiles of bf16");
    // SAFETY: the processor has the instruction and the system allows it; the shapes are those of palette 1.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const SHAPES, options(nostack, readonly)) };
    let _release = Release;
    work(&Tiles(std::marker::PhantomData));
}

/// Shows that this thread may use the tile registers; it stays on the thread.
pub(crate) struct Tiles(std::marker::PhantomData<*const ()>);

/// c (+)= Σ over the runs of a · b for 16 rows and up to 4 tiles of columns.
///
/// # Safety
/// The runs are as [`Run`] says for `columns` tiles. `c` has 16 rows of 16 · `columns` numbers, `row_bytes` apart.
///
/// # Panics
/// If there are no runs, or not 1 to 4 columns.
#[expect(unsafe_code, reason = "instructions that Rust has no names for")]
pub(crate) unsafe fn multiply(
    _tiles: &Tiles,
    runs: &[Run],
    columns: usize,
    c: *mut f32,
    row_bytes: usize,
    add: bool,
) {
    assert!(!runs.is_empty() && runs.iter().all(|run| run.steps > 0));
    let kernel = match columns {
        1 => multiply_1,
        2 => multiply_2,
        3 => multiply_3,
        4 => multiply_4,
        _ => panic!("{columns} tiles of columns"),
    };
    // SAFETY: by the contract of this function; a `Tiles` shows that the registers have their shapes.
    unsafe { kernel(runs, c, row_bytes, add) }
}

macro_rules! kernel {
    ($name:ident, $columns:literal, $($column:literal)*) => {
        /// # Safety
        /// As [`multiply`]; the tile registers have the shapes of [`SHAPES`].
        #[expect(unsafe_code, reason = "instructions that Rust has no names for")]
        #[expect(clippy::too_many_lines, reason = "one block of assembly")]
        unsafe fn $name(runs: &[Run], c: *mut f32, row_bytes: usize, add: bool) {
            // SAFETY: by the contract of this function it reads the tiles of the runs, and reads and writes 16 rows of c. What it
            // changes of the registers is named.
            unsafe {
                asm!(
                    "test {add}, {add}",
                    "jnz 20f",
                    $(concat!("tilezero tmm", $column),)*
                    "jmp 21f",
                    "20:",
                    $(concat!("tileloadd tmm", $column, ", [{c} + {row}*1 + 64*", $column, "]"),)*
                    "21:",
                    "mov {a}, [{run}]",
                    "mov {b}, [{run} + 8]",
                    "mov {n}, [{run} + 16]",
                    "cmp qword ptr [{run} + 24], 1",
                    "je 23f",
                    "ja 25f",
                    "22:", // three by one
                    "tileloadd tmm4, [{a} + {line}*1]",
                    "tileloadd tmm5, [{a} + {line}*1 + 1024]",
                    "tileloadd tmm6, [{a} + {line}*1 + 2048]",
                    $(
                        concat!("tileloadd tmm7, [{b} + {line}*1 + 1024*", $column, "]"),
                        concat!("tdpbf16ps tmm", $column, ", tmm4, tmm7"),
                        concat!("tdpbf16ps tmm", $column, ", tmm5, tmm7"),
                        concat!("tdpbf16ps tmm", $column, ", tmm6, tmm7"),
                    )*
                    "add {a}, 3072",
                    concat!("add {b}, 1024*", $columns),
                    "dec {n}",
                    "jnz 22b",
                    "jmp 24f",
                    "23:", // three by three
                    "tileloadd tmm4, [{a} + {line}*1]",
                    "tileloadd tmm5, [{a} + {line}*1 + 1024]",
                    "tileloadd tmm6, [{a} + {line}*1 + 2048]",
                    $(
                        concat!("tileloadd tmm7, [{b} + {line}*1 + 3072*", $column, "]"),
                        concat!("tdpbf16ps tmm", $column, ", tmm4, tmm7"),
                        concat!("tdpbf16ps tmm", $column, ", tmm5, tmm7"),
                        concat!("tdpbf16ps tmm", $column, ", tmm6, tmm7"),
                        concat!("tileloadd tmm7, [{b} + {line}*1 + 3072*", $column, " + 1024]"),
                        concat!("tdpbf16ps tmm", $column, ", tmm4, tmm7"),
                        concat!("tdpbf16ps tmm", $column, ", tmm5, tmm7"),
                        concat!("tileloadd tmm7, [{b} + {line}*1 + 3072*", $column, " + 2048]"),
                        concat!("tdpbf16ps tmm", $column, ", tmm4, tmm7"),
                    )*
                    "add {a}, 3072",
                    concat!("add {b}, 3072*", $columns),
                    "dec {n}",
                    "jnz 23b",
                    "jmp 24f",
                    "25:",
                    "cmp qword ptr [{run} + 24], 3",
                    "je 27f",
                    "ja 28f",
                    "26:", // two by one
                    "tileloadd tmm4, [{a} + {line}*1]",
                    "tileloadd tmm5, [{a} + {line}*1 + 1024]",
                    $(
                        concat!("tileloadd tmm7, [{b} + {line}*1 + 1024*", $column, "]"),
                        concat!("tdpbf16ps tmm", $column, ", tmm4, tmm7"),
                        concat!("tdpbf16ps tmm", $column, ", tmm5, tmm7"),
                    )*
                    "add {a}, 2048",
                    concat!("add {b}, 1024*", $columns),
                    "dec {n}",
                    "jnz 26b",
                    "jmp 24f",
                    "27:", // two by two
                    "tileloadd tmm4, [{a} + {line}*1]",
                    "tileloadd tmm5, [{a} + {line}*1 + 1024]",
                    $(
                        concat!("tileloadd tmm7, [{b} + {line}*1 + 2048*", $column, "]"),
                        concat!("tdpbf16ps tmm", $column, ", tmm4, tmm7"),
                        concat!("tdpbf16ps tmm", $column, ", tmm5, tmm7"),
                        concat!("tileloadd tmm7, [{b} + {line}*1 + 2048*", $column, " + 1024]"),
                        concat!("tdpbf16ps tmm", $column, ", tmm4, tmm7"),
                    )*
                    "add {a}, 2048",
                    concat!("add {b}, 2048*", $columns),
                    "dec {n}",
                    "jnz 27b",
                    "jmp 24f",
                    "28:", // one by one
                    "tileloadd tmm4, [{a} + {line}*1]",
                    $(
                        concat!("tileloadd tmm7, [{b} + {line}*1 + 1024*", $column, "]"),
                        concat!("tdpbf16ps tmm", $column, ", tmm4, tmm7"),
                    )*
                    "add {a}, 1024",
                    "add {b}, [{run} + 40]",
                    "dec {n}",
                    "jnz 28b",
                    "24:",
                    "add {run}, 48",
                    "dec {count}",
                    "jnz 21b",
                    $(concat!("tilestored [{c} + {row}*1 + 64*", $column, "], tmm", $column),)*
                    add = in(reg) usize::from(add),
                    run = inout(reg) runs.as_ptr() => _,
                    count = inout(reg) runs.len() => _,
                    c = in(reg) c,
                    row = in(reg) row_bytes,
                    line = in(reg) 64_usize,
                    a = out(reg) _,
                    b = out(reg) _,
                    n = out(reg) _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

kernel!(multiply_1, 1, 0);
kernel!(multiply_2, 2, 0 1);
kernel!(multiply_3, 3, 0 1 2);
kernel!(multiply_4, 4, 0 1 2 3);
