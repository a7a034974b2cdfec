//! The binary interfaces of MPI libraries.
//!
//! MPI's standard named functions for thirty years, and only its fifth edition says what their arguments are made of. So there are three
//! families, whose handles have other types and values: Open MPI, whose handles are addresses of exported variables; MPICH and those that promise its
//! interface (Intel MPI, MVAPICH, Cray), whose handles are numbers of type `int`; and the standard's own, whose handles are numbers of the
//! size of a pointer.

/// A family of libraries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Abi {
    OpenMpi,
    Mpich,
    Standard,
}

/// The values that a family gives to what this crate uses.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Values {
    pub(super) world: Value,
    pub(super) byte: Value,
    pub(super) errors_return: Value,
    /// `MPI_THREAD_FUNNELED`: threads exist, and only the first one calls MPI.
    pub(super) funneled: i32,
    /// The error class `MPI_ERR_TRUNCATE`: a message was longer than the room for it.
    pub(super) truncated: i32,
}

/// A handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// The number itself.
    Number(usize),
    /// The address of this symbol.
    Address(&'static str),
}

impl Abi {
    /// The family of a library that calls itself `version`. `exports` says whether it has a symbol, and `standard` what its
    /// `MPI_Abi_get_version` answers: MPICH 5 has that function in both of its libraries, and only in one of them the answer is positive.
    pub(super) fn of(
        version: &str,
        standard: Option<i32>,
        exports: impl Fn(&str) -> bool,
    ) -> Option<Self> {
        // First of all, because a library with the standard's interface may stand on one of the others, and shows its symbols.
        if standard.is_some_and(|major| major > 0) {
            return Some(Self::Standard);
        }
        if exports("ompi_mpi_comm_world") {
            return Some(Self::OpenMpi);
        }
        let family = ["MPICH", "MVAPICH", "Intel(R) MPI"];
        let mpich = family.iter().any(|name| version.contains(name));
        mpich.then_some(Self::Mpich)
    }

    pub(super) fn values(self) -> &'static Values {
        match self {
            Self::OpenMpi => &Values {
                world: Value::Address("ompi_mpi_comm_world"),
                byte: Value::Address("ompi_mpi_byte"),
                errors_return: Value::Address("ompi_mpi_errors_return"),
                funneled: 1,
                truncated: 15,
            },
            Self::Mpich => &Values {
                world: Value::Number(0x4400_0000),
                byte: Value::Number(0x4c00_010d),
                errors_return: Value::Number(0x5400_0001),
                funneled: 1,
                truncated: 14,
            },
            Self::Standard => &Values {
                world: Value::Number(0x101),
                byte: Value::Number(0x247),
                errors_return: Value::Number(0x143),
                funneled: 1024,
                truncated: 15,
            },
        }
    }
}

/// The name and version of a library, from its long description.
pub(super) fn short_version(version: &str) -> String {
    let line = version.lines().next().unwrap_or_default();
    // "Open MPI v4.1.4, package: …"
    let line = line.split(", package").next().unwrap_or_default();
    let line = line.replace("Open MPI v", "Open MPI ");
    // "MPICH Version:\t4.0.2", "MVAPICH2 Version      :\t2.3.7"
    let words: Vec<&str> = line
        .split_whitespace()
        .filter(|&word| !matches!(word, "Version" | "Version:" | ":"))
        .collect();
    if words.is_empty() {
        return "an MPI without a name".to_owned();
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_told_apart() {
        let ompi = |name: &str| name == "ompi_mpi_comm_world";
        let none = |_: &str| false;
        assert_eq!(Abi::of("Open MPI v4.1.4", None, ompi), Some(Abi::OpenMpi));
        assert_eq!(
            Abi::of("Open MPI v6.0.0", Some(-1), ompi),
            Some(Abi::OpenMpi)
        );
        assert_eq!(
            Abi::of("Open MPI v6.0.0", Some(1), ompi),
            Some(Abi::Standard)
        );
        assert_eq!(
            Abi::of("MPICH Version:\t4.0.2", None, none),
            Some(Abi::Mpich)
        );
        assert_eq!(
            Abi::of("MPICH Version: 5.0.2", Some(-1), none),
            Some(Abi::Mpich)
        );
        assert_eq!(
            Abi::of("MPICH Version: 5.0.2", Some(1), none),
            Some(Abi::Standard)
        );
        let intel = "Intel(R) MPI Library 2021.13 for Linux* OS";
        assert_eq!(Abi::of(intel, None, none), Some(Abi::Mpich));
        assert_eq!(Abi::of("MPT 2.25", None, none), None);
    }

    #[test]
    fn versions_are_short() {
        for (long, short) in [
            (
                "Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4",
                "Open MPI 4.1.4",
            ),
            (
                "MPICH Version:\t4.0.2\nMPICH Release date:\tThu Apr",
                "MPICH 4.0.2",
            ),
            ("MPICH Version:      5.0.2\nMPICH Release", "MPICH 5.0.2"),
            ("MVAPICH2 Version      :\t2.3.7\n", "MVAPICH2 2.3.7"),
            (
                "Intel(R) MPI Library 2021.13 for Linux* OS\n",
                "Intel(R) MPI Library 2021.13 for Linux* OS",
            ),
            ("", "an MPI without a name"),
        ] {
            assert_eq!(short_version(long), short);
        }
    }
}
