//! Every rank talks with every other one in all ways that there are, and rank 0 says "ok". Start it with an MPI launcher:
//!
//! ```sh
//! cargo build -p lowrank-comm --example ranks
//! mpirun -n 3 target/debug/examples/ranks
//! ```
//!
//! `RANKS_MIB` is the size of a large message, `RANKS_TIMEOUT` the number of seconds after which a rank gives up, and `RANKS_FAULT` has the last
//! rank do something wrong: `kill`, `stop`, `half` (it stops within a message of `RANKS_MIB`), `short` or `long`.
#![expect(clippy::print_stdout, reason = "a program")]

use std::env::var;
use std::process::{Command, ExitCode};
use std::time::Duration;

use lowrank_comm::{Communicator, Error, Options, start};

fn main() -> ExitCode {
    let seconds = var("RANKS_TIMEOUT").map_or(Ok(60), |seconds| seconds.parse());
    let options = Options {
        timeout: Duration::from_secs(seconds.expect("a number of seconds")),
        library: None,
    };
    let comm = match start(&options) {
        Ok(comm) => comm,
        Err(error) => {
            complain(&error);
            return ExitCode::FAILURE;
        }
    };
    let done = match var("RANKS_FAULT") {
        Ok(fault) => go_wrong(&*comm, &fault),
        Err(_) => talk(&*comm),
    };
    if let Err(error) = done {
        complain(&error);
        comm.abort(3);
    }
    if comm.rank() == 0 {
        println!(
            "ok: {} ranks, {}, {}",
            comm.size(),
            comm.engine(),
            comm.host()
        );
    }
    ExitCode::SUCCESS
}

/// In one piece: other ranks write at the same time, or end this one in the middle.
fn complain(error: &Error) {
    let line = format!("error: {error}\n");
    eprint!("{line}");
}

fn talk(comm: &dyn Communicator) -> Result<(), Error> {
    for length in [0, 1, 13, 4099, 70_001, 1_000_003, large()] {
        all_to_all(comm, length)?;
        send(comm, length)?;
    }
    let (rank, size) = (comm.rank(), comm.size());
    let own = pattern(rank, 0, 5 * rank + 1);
    for (from, other) in comm.all_gather(&own)?.into_iter().enumerate() {
        assert!(
            other == pattern(from, 0, 5 * from + 1),
            "gathered from {from}"
        );
    }
    for root in 0..size {
        let right = pattern(root, 1, 10_001 * root);
        let mut bytes = if rank == root { right.clone() } else { vec![7] };
        comm.broadcast(root, &mut bytes)?;
        assert!(bytes == right, "from {root} to all");
        comm.barrier()?;
    }
    Ok(())
}

/// The length of a large message.
fn large() -> usize {
    let mib: usize = var("RANKS_MIB").map_or(1, |mib| mib.parse().expect("a number of MiB"));
    (mib << 20) + 7
}

/// Lengths differ between pairs, and nothing goes to rank 1.
fn all_to_all(comm: &dyn Communicator, length: usize) -> Result<(), Error> {
    let (rank, size) = (comm.rank(), comm.size());
    let length = |from, to| if to == 1 { 0 } else { length + 3 * from + to };
    let sent: Vec<_> = (0..size)
        .map(|to| pattern(rank, to, length(rank, to)))
        .collect();
    let mut received: Vec<_> = (0..size).map(|from| vec![0; length(from, rank)]).collect();
    let sent: Vec<_> = sent.iter().map(Vec::as_slice).collect();
    let mut into: Vec<_> = received.iter_mut().map(Vec::as_mut_slice).collect();
    comm.all_to_all(&sent, &mut into)?;
    for (from, bytes) in received.iter().enumerate() {
        assert!(
            *bytes == pattern(from, rank, length(from, rank)),
            "all from {from}"
        );
    }
    Ok(())
}

/// Each rank sends twice to the next one, which exchanges something else before it receives.
fn send(comm: &dyn Communicator, length: usize) -> Result<(), Error> {
    let (rank, size) = (comm.rank(), comm.size());
    if size == 1 {
        return Ok(());
    }
    let (next, before) = ((rank + 1) % size, (rank + size - 1) % size);
    for time in [1, 2] {
        comm.send(next, pattern(rank, time, length + time))?;
    }
    let mut exchanged = [0; 3];
    comm.exchange(
        Some((next, &[rank as u8; 3])),
        Some((before, &mut exchanged)),
    )?;
    assert_eq!(exchanged, [before as u8; 3]);
    for time in [1, 2] {
        let mut bytes = vec![0; length + time];
        comm.receive(before, &mut bytes)?;
        assert!(
            bytes == pattern(before, time, length + time),
            "sent by {before}"
        );
    }
    comm.flush()
}

fn pattern(from: usize, to: usize, length: usize) -> Vec<u8> {
    (0..length)
        .map(|place| (place * 31 + (place >> 13) + from * 7 + to * 3) as u8)
        .collect()
}

fn go_wrong(comm: &dyn Communicator, fault: &str) -> Result<(), Error> {
    comm.barrier()?;
    let last = comm.size() - 1;
    if comm.rank() < last {
        // Nobody ends because the others do: each has to wait for the last one.
        let length = if fault == "half" { large() } else { 1000 };
        let mut bytes = vec![0; length];
        if fault == "half" {
            return comm.receive(last, &mut bytes);
        }
        return comm.exchange(None, Some((last, &mut bytes)));
    }
    let signal = |name: &str| {
        let process = std::process::id().to_string();
        let done = Command::new("kill").args([name, &process]).status();
        assert!(done.expect("kill is a program").success());
    };
    match fault {
        "kill" => signal("-KILL"),
        "stop" => signal("-STOP"),
        "half" => {
            for to in 0..last {
                comm.send(to, vec![1; large()])?;
            }
            signal("-STOP");
        }
        "short" | "long" => {
            let length = if fault == "short" { 999 } else { 1001 };
            for to in 0..last {
                comm.exchange(Some((to, &vec![1; length])), None)?;
            }
        }
        other => panic!("the fault {other} is not known"),
    }
    // The others have to find out by themselves.
    std::thread::sleep(Duration::from_secs(30));
    Ok(())
}
