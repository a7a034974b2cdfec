//! The binary `lowrank`; everything is in the library beside it.

use std::process::ExitCode;

fn main() -> ExitCode {
    lowrank_cli::main()
}
