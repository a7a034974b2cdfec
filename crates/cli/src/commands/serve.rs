//! `lowrank serve`: many adapters on one base, behind OpenAI's API.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use lowrank::base::Base;
use lowrank::data::Labels;
use lowrank::fields::finite;
use lowrank::model::Purpose;
use lowrank_serve::{Caps, Options, serve};

use super::common::{AdapterArg, BaseArgs, ExactArgs, check_is_adapter};
use super::with_adapter;
use crate::failure::Misuse;
use crate::interrupt;
use crate::progress::stderr_line;

/// Arguments of `lowrank serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The model
    #[command(flatten)]
    pub base: BaseArgs,

    /// How exactly tokens are generated
    #[command(flatten)]
    pub exact: ExactArgs,

    /// The base's name in requests [default: the model's last part]
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,

    /// An adapter that is loaded at the start; may be given several times
    #[arg(long, value_name = "[NAME=]DIR")]
    pub adapter: Vec<AdapterArg>,

    /// Load adapters of this folder by their names as they are asked for; what is loaded at run time must lie in it
    #[arg(long, value_name = "DIR")]
    pub adapter_dir: Option<PathBuf>,

    /// Keep so many bytes of adapters in memory beside those in use [default: all]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub adapter_memory: Option<u64>,

    /// Listen on this address; 0.0.0.0 is every one of the machine
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", value_parser = host)]
    pub host: IpAddr,

    /// Listen on this port; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    pub port: u16,

    /// A key that requests must have; may be given several times, or as LOWRANK_API_KEY
    #[arg(long, value_name = "KEY", help_heading = "Keys")]
    pub api_key: Vec<String>,

    /// A file with one key per line
    #[arg(long, value_name = "FILE", help_heading = "Keys")]
    pub api_key_file: Option<PathBuf>,

    /// The key for what changes the server: adapters, files, jobs; or as LOWRANK_ADMIN_KEY
    #[arg(long, value_name = "KEY", help_heading = "Keys")]
    pub admin_key: Option<String>,

    /// Generate so many sequences together
    #[arg(
        long,
        value_name = "N",
        default_value_t = 16,
        help_heading = "Scheduling"
    )]
    pub max_num_seqs: usize,

    /// Let so many requests wait; more are answered with 429
    #[arg(
        long,
        value_name = "N",
        default_value_t = 256,
        help_heading = "Scheduling"
    )]
    pub max_waiting: usize,

    /// Read so many tokens of new prompts a step while others are being answered
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 64,
        help_heading = "Scheduling"
    )]
    pub prompt_piece: usize,

    /// Bytes of keys and values of prompts and answers [default: what --max-num-seqs need, at most half of the free memory]
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Scheduling")]
    pub kv_cache_memory: Option<u64>,

    /// Share of the time that training has while requests are under way
    #[arg(
        long,
        value_parser = finite::<f64>,
        value_name = "SHARE",
        default_value_t = 0.25,
        help_heading = "Scheduling"
    )]
    pub train_share: f64,

    /// Abort a request after so many seconds [default: never]
    #[arg(long, value_name = "SECONDS", value_parser = finite::<f64>, help_heading = "Limits")]
    pub request_timeout: Option<f64>,

    /// Let a key have so many requests under way; 0 means any number
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Limits")]
    pub max_requests_per_key: usize,

    /// Maximum of a request's `n`
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Limits")]
    pub max_n: usize,

    /// Maximum size of a request
    #[arg(long, value_name = "SIZE", default_value = "4MiB", value_parser = size, help_heading = "Limits")]
    pub max_body: u64,

    /// Let requests under way go on for so many seconds after SIGTERM
    #[arg(
        long,
        value_parser = finite::<f64>,
        value_name = "SECONDS",
        default_value_t = 30.0,
        help_heading = "Limits"
    )]
    pub drain_timeout: f64,
}

/// An address to listen on.
fn host(text: &str) -> Result<IpAddr, String> {
    if text.eq_ignore_ascii_case("localhost") {
        return Ok(Ipv4Addr::LOCALHOST.into());
    }
    text.parse().map_err(|_| {
        "expected an IP address, such as 127.0.0.1 or 0.0.0.0, or localhost".to_owned()
    })
}

/// A number of bytes.
fn size(text: &str) -> Result<u64, String> {
    lowrank::fields::parse_bytes(text)
        .map_err(|error| format!("{error}; units are B, kB, MB, GB, TB, KiB, MiB, GiB and TiB"))
}

/// Runs the command.
///
/// # Errors
/// A model, an adapter or an address that cannot be used.
pub fn run(args: ServeArgs) -> anyhow::Result<()> {
    check(&args)?;
    for adapter in &args.adapter {
        check_is_adapter(&adapter.path)?;
    }
    let keys = keys(&args)?;
    let stop = interrupt::install_all("letting the requests under way end; again: end at once")?;
    let (base, labels) = load(&args)?;
    args.exact.apply(&base)?;
    let name = match &args.served_model_name {
        Some(name) => name.clone(),
        None => default_name(&args.base.model),
    };
    let seconds = Duration::from_secs_f64;
    let options = Options {
        address: SocketAddr::new(args.host, args.port),
        adapters: args
            .adapter
            .into_iter()
            .map(|adapter| (adapter.name, adapter.path))
            .collect(),
        adapter_dir: args.adapter_dir,
        adapter_memory: args.adapter_memory,
        max_num_seqs: args.max_num_seqs,
        max_waiting: args.max_waiting,
        prompt_piece: args.prompt_piece,
        kv_cache_memory: args.kv_cache_memory,
        train_share: args.train_share,
        api_keys: keys,
        admin_key: args
            .admin_key
            .or_else(|| std::env::var("LOWRANK_ADMIN_KEY").ok()),
        caps: Caps {
            n: args.max_n,
            body: usize::try_from(args.max_body).unwrap_or(usize::MAX),
            timeout: args.request_timeout.map(seconds),
            requests_per_key: args.max_requests_per_key,
            ..Caps::default()
        },
        drain_timeout: seconds(args.drain_timeout),
        ..Options::new(name)
    };
    if !options.address.ip().is_loopback() && options.api_keys.is_empty() {
        tracing::warn!(
            "{} can be reached from other machines, and there is no --api-key: everybody there may use it",
            options.address
        );
    }
    let name = options.name.clone();
    serve(
        base,
        labels,
        options,
        move |address| stderr_line(&format!("{name} at http://{address}")),
        || stop.load(Ordering::SeqCst),
    )
    .context("cannot serve")
}

/// The model, for what it or the first adapter is made, and what its labels mean where it classifies.
fn load(args: &ServeArgs) -> anyhow::Result<(Base, Option<Labels>)> {
    let paths = AdapterArg::paths(&args.adapter);
    let plan = with_adapter::plan_of(args.base.source()?, paths.first().copied())?;
    if plan.purpose == Purpose::LanguageModel {
        return Ok((args.base.load(&paths)?, None));
    }
    let tokenizer = plan.tokenizer()?;
    let dtype = args.base.base_dtype.into();
    let network = plan.source.load_for(dtype, plan.purpose, plan.labels, 0)?;
    let base = Base {
        decoder: network.decoder,
        tokenizer,
        source: network.source,
    };
    Ok((base, network.labels))
}

fn check(args: &ServeArgs) -> Result<(), Misuse> {
    let mut problems = Misuse::default();
    let is_time = |seconds: f64| seconds > 0.0 && seconds <= 1e6;
    problems.require(args.max_num_seqs > 0, || {
        "--max-num-seqs must be 1 or greater".to_owned()
    });
    problems.require(args.max_n > 0, || "--max-n must be 1 or greater".to_owned());
    let is_named = |name: &String| !name.trim().is_empty() && !name.contains(char::is_control);
    problems.require(args.served_model_name.as_ref().is_none_or(is_named), || {
        "--served-model-name must not be empty, and must have no control characters".to_owned()
    });
    problems.require(args.prompt_piece > 0, || {
        "--prompt-piece must be 1 or greater".to_owned()
    });
    problems.require((0.0..1.0).contains(&args.train_share), || {
        format!(
            "--train-share must be from 0 to less than 1, not {}",
            args.train_share
        )
    });
    problems.require(args.request_timeout.is_none_or(is_time), || {
        "--request-timeout must be greater than 0".to_owned()
    });
    problems.require(
        is_time(args.drain_timeout) || args.drain_timeout == 0.0,
        || "--drain-timeout must be 0 or greater".to_owned(),
    );
    if let Some(folder) = &args.adapter_dir {
        problems.require(folder.is_dir(), || {
            format!("--adapter-dir: {} is no folder", folder.display())
        });
    }
    let is_twice = |at: usize| {
        let name = &args.adapter[at].name;
        args.adapter[..at].iter().any(|other| other.name == *name)
    };
    if let Some(at) = (0..args.adapter.len()).find(|at| is_twice(*at)) {
        problems.require(false, || {
            format!(
                "two adapters are called {}; name them: --adapter NAME=DIR",
                args.adapter[at].name
            )
        });
    }
    problems.or(())
}

fn keys(args: &ServeArgs) -> anyhow::Result<Vec<String>> {
    let mut keys = args.api_key.clone();
    if let Some(path) = &args.api_key_file {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("--api-key-file: {}", path.display()))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        keys.extend(lines.map(str::to_owned));
        if keys.is_empty() {
            return Err(
                Misuse::new(format!("--api-key-file: {} has no key", path.display())).into(),
            );
        }
    }
    keys.extend(
        std::env::var("LOWRANK_API_KEY")
            .ok()
            .filter(|key| !key.is_empty()),
    );
    if keys.iter().any(String::is_empty) {
        return Err(Misuse::new("--api-key must not be empty").into());
    }
    Ok(keys)
}

/// The last part of a folder or an id, or the name of the built-in model.
fn default_name(model: &str) -> String {
    let last = Path::new(model).file_name();
    last.map_or_else(
        || model.to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}
