//! `lowrank bench comm`.

use std::time::Instant;

use clap::Args;
use lowrank::comm::{self, Communicator};
use serde::Serialize;

use crate::failure::Misuse;
use crate::output::Output;
use crate::ranks::{Job, RanksArgs};
use crate::settings::values::at_most;
use crate::table::{Align, Facts, Table};

/// Arguments of `lowrank bench comm`.
#[derive(Debug, Args)]
pub struct BenchCommArgs {
    /// Exchange gradients of so many MiB; several times for several sizes [default: 1/16, 1, 16 and 64]
    #[arg(long, value_name = "N", value_parser = at_most::<65_536>)]
    pub mib: Vec<usize>,

    /// Take the median of so many exchanges
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = at_most::<1_000_000>)]
    pub repeats: usize,

    /// Seconds after which a rank that does not answer counts as lost
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = at_most::<86_400>)]
    pub timeout: usize,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Small exchanges are timed ten at a time: a rank that is ahead of the other one waits in every second exchange only.
const SMALL_ROUNDS: usize = 50;
const SMALL_EXCHANGES: usize = 10;
const SMALL: usize = 8;

#[derive(Debug, Serialize)]
struct Report {
    engine: String,
    ranks: usize,
    hosts: Vec<HostReport>,
    latency: Latency,
    exchanges: Vec<ExchangeReport>,
}

#[derive(Debug, Serialize)]
struct HostReport {
    host: String,
    ranks: usize,
}

/// What exchanging eight bytes takes in both directions at once, in microseconds: the medians of a rank and the rank that it sends to.
#[derive(Debug, PartialEq, Serialize)]
struct Latency {
    median_us: f64,
    slowest_us: f64,
    /// The sender and the receiver.
    slowest: [usize; 2],
}

/// The exchange of a step: each rank gets its slice of all ranks' gradients, and then gives all others what it made of it.
#[derive(Debug, Serialize)]
struct ExchangeReport {
    /// Of all gradients.
    bytes: usize,
    /// What one rank sends in both parts.
    sent_bytes: usize,
    milliseconds: f64,
    /// Bytes that one rank sends a second, and as many it receives.
    bytes_per_second: f64,
}

/// Runs the command.
///
/// # Errors
/// Without a launcher, and where ranks do not reach each other.
pub fn run(args: &BenchCommArgs) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    let mut problems = Misuse::default();
    let counts = [("--repeats", args.repeats), ("--timeout", args.timeout)];
    let sizes = args.mib.iter().map(|&mib| ("--mib", mib));
    for (flag, count) in counts.into_iter().chain(sizes) {
        problems.require(count > 0, || format!("{flag} must be 1 or greater"));
    }
    problems.or(())?;
    let ranks = RanksArgs {
        network_timeout: args.timeout as u64,
        ..RanksArgs::default()
    };
    let sizes = args.mib.iter().map(|mib| format!(" --mib {mib}"));
    let sizes: String = sizes.collect();
    let doing = format!("bench comm{sizes} --repeats {}", args.repeats);
    let job = Job::join(&ranks, &doing)?;
    let comm = job.comm();
    if comm.size() == 1 {
        return Err(Misuse::new(
            "there is one rank, and nobody to exchange anything with; start several with the launcher of an MPI: mpirun -n 2 lowrank bench comm",
        )
        .into());
    }
    let sizes = match args.mib.as_slice() {
        [] => vec![1 << 16, 1 << 20, 16 << 20, 64 << 20],
        mib => mib.iter().map(|mib| mib << 20).collect(),
    };
    let report = measure(comm, &sizes, args.repeats)?;
    if comm.rank() > 0 {
        return Ok(());
    }
    output.result(&report, |output| text(&report, output))
}

fn measure(
    comm: &dyn Communicator,
    sizes: &[usize],
    repeats: usize,
) -> Result<Report, comm::Error> {
    let hosts = comm.all_gather(comm.host().as_bytes())?;
    let latency = latency(comm)?;
    let exchanges = sizes.iter().map(|&bytes| exchange(comm, bytes, repeats));
    Ok(Report {
        engine: comm.engine(),
        ranks: comm.size(),
        exchanges: exchanges.collect::<Result<_, _>>()?,
        hosts: ranks_of(&hosts),
        latency,
    })
}

/// Hosts in the order of their first ranks.
fn ranks_of(hosts: &[Vec<u8>]) -> Vec<HostReport> {
    let mut reports: Vec<HostReport> = Vec::new();
    for host in hosts {
        let host = String::from_utf8_lossy(host).into_owned();
        match reports.iter_mut().find(|report| report.host == host) {
            Some(report) => report.ranks += 1,
            None => reports.push(HostReport { host, ranks: 1 }),
        }
    }
    reports
}

fn latency(comm: &dyn Communicator) -> Result<Latency, comm::Error> {
    let (rank, size) = (comm.rank(), comm.size());
    let mut medians = Vec::new();
    for distance in 1..size {
        let (to, from) = ((rank + distance) % size, (rank + size - distance) % size);
        comm.barrier()?;
        let mut times = Vec::with_capacity(SMALL_ROUNDS);
        for _ in 0..SMALL_ROUNDS {
            let began = Instant::now();
            for _ in 0..SMALL_EXCHANGES {
                comm.exchange(Some((to, &[0; SMALL])), Some((from, &mut [0; SMALL])))?;
            }
            times.push(began.elapsed().as_secs_f64() / SMALL_EXCHANGES as f64);
        }
        medians.push(median(times));
    }
    Ok(slowest(&gather(comm, &medians)?))
}

/// From the medians that each rank has of those at distance 1, 2 and so on.
fn slowest(medians: &[Vec<f64>]) -> Latency {
    let size = medians.len();
    let pairs = medians.iter().enumerate().flat_map(|(rank, medians)| {
        let to = move |distance| (rank + distance) % size;
        let medians = medians.iter().enumerate();
        medians.map(move |(place, &seconds)| ([rank, to(place + 1)], seconds))
    });
    let slowest = pairs.max_by(|a, b| a.1.total_cmp(&b.1));
    let (pair, seconds) = slowest.unwrap_or_default();
    Latency {
        median_us: 1e6 * median(medians.concat()),
        slowest_us: 1e6 * seconds,
        slowest: pair,
    }
}

fn exchange(
    comm: &dyn Communicator,
    bytes: usize,
    repeats: usize,
) -> Result<ExchangeReport, comm::Error> {
    let (rank, size) = (comm.rank(), comm.size());
    let gradients = vec![rank as u8; bytes];
    let mut sum = vec![0; bytes];
    let own = slice(bytes, rank, size).len();
    let mut slices = vec![0; own * size];
    let mut times = Vec::with_capacity(repeats);
    // The first one also waits for the pages of memory, and is not counted.
    for round in 0..=repeats {
        comm.barrier()?;
        let began = Instant::now();
        let sent: Vec<&[u8]> = (0..size)
            .map(|to| &gradients[slice(bytes, to, size)])
            .collect();
        let mut into: Vec<&mut [u8]> = if own == 0 {
            (0..size).map(|_| &mut [][..]).collect()
        } else {
            slices.chunks_mut(own).collect()
        };
        comm.all_to_all(&sent, &mut into)?;
        let mut into = Vec::with_capacity(size);
        let mut rest = &mut sum[..];
        for from in 0..size {
            let (part, after) = rest.split_at_mut(slice(bytes, from, size).len());
            into.push(part);
            rest = after;
        }
        let summed = &gradients[slice(bytes, rank, size)];
        comm.all_to_all(&vec![summed; size], &mut into)?;
        if round > 0 {
            times.push(began.elapsed().as_secs_f64());
        }
    }
    // A step ends when its slowest rank does.
    let all = gather(comm, &times)?;
    let slowest = (0..repeats).map(|round| {
        let times = all.iter().map(|times| times[round]);
        times.fold(0.0, f64::max)
    });
    let seconds = median(slowest.collect());
    let sent_bytes = bytes - own + own * (size - 1);
    Ok(ExchangeReport {
        bytes,
        sent_bytes,
        milliseconds: 1e3 * seconds,
        bytes_per_second: sent_bytes as f64 / seconds,
    })
}

/// The bytes that are a rank's to sum.
fn slice(bytes: usize, rank: usize, size: usize) -> std::ops::Range<usize> {
    bytes * rank / size..bytes * (rank + 1) / size
}

/// What all ranks have, in their order.
fn gather(comm: &dyn Communicator, own: &[f64]) -> Result<Vec<Vec<f64>>, comm::Error> {
    let bytes: Vec<u8> = own.iter().flat_map(|number| number.to_le_bytes()).collect();
    let all = comm.all_gather(&bytes)?;
    let numbers = |bytes: Vec<u8>| {
        let (eights, _) = bytes.as_chunks::<8>();
        eights
            .iter()
            .map(|&eight| f64::from_le_bytes(eight))
            .collect()
    };
    Ok(all.into_iter().map(numbers).collect())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn text(report: &Report, output: &Output) -> String {
    let mut facts = Facts::default();
    facts.add("engine", report.engine.clone());
    let hosts: Vec<String> = report
        .hosts
        .iter()
        .map(|host| format!("{} on {}", host.ranks, host.host))
        .collect();
    facts.add("ranks", format!("{}: {}", report.ranks, hosts.join(", ")));
    let Latency {
        median_us,
        slowest_us,
        slowest: [from, to],
    } = report.latency;
    facts.add(
        "small exchange",
        format!("{median_us:.1} µs; slowest {slowest_us:.1} µs, rank {from} to {to}"),
    );
    let mut table = Table::new([
        ("gradients", Align::Right),
        ("sent by a rank", Align::Right),
        ("ms a step", Align::Right),
        ("MB/s", Align::Right),
    ]);
    for exchange in &report.exchanges {
        table.row([
            lowrank::units::bytes(exchange.bytes as u64),
            lowrank::units::bytes(exchange.sent_bytes as u64),
            format!("{:.2}", exchange.milliseconds),
            format!("{:.0}", exchange.bytes_per_second / 1e6),
        ]);
    }
    format!(
        "{}\n{}",
        facts.render("", output.color),
        table.render(output.width, output.color)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_in_one_process_are_measured() {
        for size in [2, 3] {
            let ranks = comm::InProcess::ranks(size, std::time::Duration::from_secs(60));
            let reports = std::thread::scope(|scope| {
                let measured = |rank| measure(&rank, &[1, 1000, 4099], 2).unwrap();
                let threads: Vec<_> = ranks
                    .into_iter()
                    .map(|rank| scope.spawn(move || measured(rank)))
                    .collect();
                let ends = threads.into_iter().map(|thread| thread.join().unwrap());
                ends.collect::<Vec<_>>()
            });
            let report = &reports[0];
            assert_eq!((report.ranks, report.hosts.len()), (size, 1));
            assert_eq!(report.hosts[0].ranks, size);
            assert!(report.latency.median_us > 0.0);
            assert_eq!(report.exchanges.len(), 3);
            // All have the same figures, and what they send is twice all but the own slices.
            let sent = |which: usize| {
                let sent = reports
                    .iter()
                    .map(|report| report.exchanges[which].sent_bytes);
                sent.sum::<usize>()
            };
            assert_eq!(sent(2), 2 * 4099 * (size - 1));
            let times = reports
                .iter()
                .map(|report| report.exchanges[1].milliseconds);
            assert!(
                times
                    .clone()
                    .all(|time| time == report.exchanges[1].milliseconds)
            );
        }
    }

    #[test]
    fn the_slowest_pair_is_named() {
        let medians = [vec![1e-6, 2e-6], vec![3e-6, 9e-6], vec![4e-6, 5e-6]];
        let latency = slowest(&medians);
        assert_eq!(latency.slowest, [1, 0]);
        assert!((latency.slowest_us - 9.0).abs() < 1e-9 && (latency.median_us - 4.0).abs() < 1e-9);
    }

    #[test]
    fn hosts_are_counted() {
        let hosts = ["a", "a", "b", "a"].map(|host| host.as_bytes().to_vec());
        let counted = ranks_of(&hosts);
        assert_eq!((counted[0].host.as_str(), counted[0].ranks), ("a", 3));
        assert_eq!((counted[1].host.as_str(), counted[1].ranks), ("b", 1));
    }
}
