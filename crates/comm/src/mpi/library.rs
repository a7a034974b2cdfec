//! Opens an MPI library, and finds out which one it is.

use std::path::Path;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};

use super::abi::{Abi, short_version};
use super::calls::{self, Calls};

/// A library that is loaded but does nothing yet.
pub(crate) struct Opened {
    pub(super) calls: Box<dyn Calls>,
    /// Its name and version.
    pub(crate) engine: String,
}

/// Loads a library by its path, or by a name that the system's loader finds. One that `accept`, given its version, refuses is
/// unloaded again.
pub(crate) fn open(
    path: &Path,
    accept: impl FnOnce(&Identity) -> Result<(), String>,
) -> Result<Opened, String> {
    // SAFETY: loading runs the library's initializers. A library that is named as MPI's, by the user or by the system, is trusted with that.
    // It is local at first, so that nothing of one that is refused stays in the way of the next.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) };
    let library = library.map_err(|error| reason(&error))?;
    let identity = identify(&library)?;
    accept(&identity)?;
    // MPI libraries load parts of themselves that expect the symbols of the first to be visible.
    // SAFETY: as above; it is loaded already, and only becomes visible.
    let visible = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
    // It is never unloaded: MPI leaves threads, hooks and exit handlers behind that must still find their code.
    let visible = Box::leak(Box::new(visible.map_err(|error| reason(&error))?));
    // SAFETY: the family was found out from the library itself.
    let calls = unsafe { calls::bind(visible, identity.abi) };
    Ok(Opened {
        calls: calls.map_err(|error| reason(&error))?,
        engine: identity.engine,
    })
}

/// What a library says about itself.
pub(crate) struct Identity {
    abi: Abi,
    version: String,
    engine: String,
}

impl Identity {
    /// Its name and version.
    pub(crate) fn engine(&self) -> &str {
        &self.engine
    }

    pub(crate) fn is_open_mpi(&self) -> bool {
        self.version.contains("Open MPI")
    }
}

fn identify(library: &Library) -> Result<Identity, String> {
    type GetVersion = unsafe extern "C" fn(*mut std::ffi::c_char, *mut i32) -> i32;
    type GetAbi = unsafe extern "C" fn(*mut i32, *mut i32) -> i32;
    // SAFETY: the standard gives the function this type.
    let get = unsafe { library.get::<GetVersion>("MPI_Get_library_version") };
    let get = get.map_err(|_| "it is not an MPI library".to_owned())?;
    // SAFETY: it may be called before MPI starts, and the room is larger than what any library writes.
    let version = calls::text(|room, length| unsafe { get(room, length) });
    let version = version.map_err(|code| format!("it does not tell its version: error {code}"))?;
    // SAFETY: the standard gives the function this type.
    let get = unsafe { library.get::<GetAbi>("MPI_Abi_get_version") };
    let standard = get.ok().map(|get| {
        let (mut major, mut minor) = (-1, -1);
        // SAFETY: it may be called before MPI starts, and writes two ints.
        unsafe { get(&raw mut major, &raw mut minor) };
        major
    });
    // SAFETY: the symbol is only looked for.
    let exports = |symbol: &str| unsafe { library.get::<*mut std::ffi::c_void>(symbol) }.is_ok();
    let mut engine = short_version(&version);
    let Some(abi) = Abi::of(&version, standard, exports) else {
        return Err(format!(
            "{engine} has an interface that is not known; Open MPI, MPICH, and those compatible with MPICH or MPI's standard ABI are"
        ));
    };
    if abi == Abi::Standard {
        engine.push_str(" (standard ABI)");
    }
    Ok(Identity {
        abi,
        version,
        engine,
    })
}

/// The message of the system's loader, without the name of the function.
fn reason(error: &libloading::Error) -> String {
    use std::error::Error as _;
    let source = error.source().map(ToString::to_string);
    source.unwrap_or_else(|| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_mpi_library_is_refused() {
        let refused = |path: &str| open(Path::new(path), |_| Ok(())).err().unwrap();
        let error = refused("/nowhere/libmpi.so.40");
        assert!(error.contains("libmpi.so.40"), "{error}");
        let name = if cfg!(target_os = "macos") {
            "libSystem.B.dylib"
        } else {
            "libc.so.6"
        };
        assert_eq!(refused(name), "it is not an MPI library");
    }
}
