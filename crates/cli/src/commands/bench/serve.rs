//! `lowrank bench serve`: requests to a running server, and how fast it answers.
//!
//! Prompts are random tokens and answers have a fixed length (`ignore_eos`), so that two measurements ask for the same work. It speaks OpenAI's
//! API, so other servers can be measured, too.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use lowrank::fields::finite;
use lowrank::kernels::CounterRng;
use serde::Serialize;
use serde_json::{Value, json};

use crate::failure::Misuse;
use crate::output::Output;
use crate::table::Facts;

/// Arguments of `lowrank bench serve`.
#[derive(Debug, Args)]
pub struct BenchServeArgs {
    /// The server, such as http://127.0.0.1:8080; a /v1 at the end is left out
    #[arg(long, value_name = "URL")]
    pub url: String,

    /// The model or adapter to ask for; several are asked in turn. {N} in a name stands for 0 to --models less one
    #[arg(long, value_name = "NAME", required = true)]
    pub model: Vec<String>,

    /// How many names {N} makes
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub models: usize,

    /// Draw models by Zipf's law with this exponent instead of in turn
    #[arg(long, value_name = "S", value_parser = finite::<f64>)]
    pub zipf: Option<f64>,

    /// Requests under way at once
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub concurrency: usize,

    /// Requests in all
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub requests: usize,

    /// Requests before, which are not measured
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub warmup: usize,

    /// Begin so many requests a second instead of whenever one ends
    #[arg(long, value_name = "RATE", value_parser = finite::<f64>)]
    pub rate: Option<f64>,

    /// Tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    pub prompt_tokens: usize,

    /// Tokens that all prompts begin with, beside those
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub shared_tokens: usize,

    /// Tokens of an answer
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    pub max_tokens: usize,

    /// Draw token ids below this
    #[arg(long, value_name = "N", default_value_t = 2000)]
    pub vocabulary: u32,

    /// Ask with words instead of token ids, for servers that take no ids
    #[arg(long)]
    pub words: bool,

    /// The key
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,

    /// The same seed draws the same prompts and models
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub seed: u64,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Words that are one token each in most vocabularies.
const WORDS: [&str; 32] = [
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "was", "on", "with", "as", "be",
    "at", "by", "this", "from", "or", "one", "had", "not", "but", "what", "all", "were", "when",
    "we", "there", "can", "an", "your",
];

/// What came out.
#[derive(Debug, Serialize)]
struct Measured {
    requests: usize,
    failed: usize,
    errors: BTreeMap<String, usize>,
    seconds: f64,
    output_tokens: usize,
    output_tokens_per_second: f64,
    requests_per_second: f64,
    prompt_tokens: usize,
    cached_tokens: usize,
    /// Milliseconds.
    time_to_first_token: Spread,
    /// Milliseconds from one token to the next.
    inter_token: Spread,
    /// Milliseconds of a request.
    latency: Spread,
}

/// Quantiles.
#[derive(Debug, Default, Serialize)]
struct Spread {
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let last = values.len().saturating_sub(1);
            values.get((share * last as f64).round() as usize).copied()
        };
        let at = |share| at(share).unwrap_or(0.0);
        Self {
            mean: values.iter().sum::<f64>() / values.len().max(1) as f64,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: at(1.0),
        }
    }
}

/// What one request saw.
#[derive(Debug, Default)]
struct Seen {
    first: f64,
    gaps: Vec<f64>,
    whole: f64,
    made: usize,
    prompt: usize,
    cached: usize,
}

/// Runs the command.
///
/// # Errors
/// A server that cannot be reached.
pub fn run(args: &BenchServeArgs) -> anyhow::Result<()> {
    let url = endpoint(&args.url)?;
    check(args)?;
    let names = names(args);
    let agent = ureq::Agent::new_with_config(
        ureq::Agent::config_builder()
            .http_status_as_error(false)
            .build(),
    );
    let ask = |index: usize| request(&agent, &url, args, &names, index);
    drop(ask(usize::MAX)?);
    let warm = AtomicUsize::new(0);
    each(args.concurrency, &warm, args.warmup, None, &|index| {
        drop(ask(args.requests + index));
    });
    let answers = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let begun = Instant::now();
    each(
        args.concurrency,
        &next,
        args.requests,
        args.rate,
        &|index| {
            let answer = ask(index);
            answers
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(answer);
        },
    );
    let seconds = begun.elapsed().as_secs_f64();
    let answers = answers.into_inner();
    let (mut seen, mut errors) = (Vec::new(), BTreeMap::new());
    for answer in answers.unwrap_or_else(PoisonError::into_inner) {
        match answer {
            Ok(one) => seen.push(one),
            Err(error) => *errors.entry(format!("{error:#}")).or_insert(0) += 1,
        }
    }
    let output_tokens: usize = seen.iter().map(|one| one.made).sum();
    let measured = Measured {
        requests: seen.len(),
        failed: errors.values().sum(),
        errors,
        seconds,
        output_tokens,
        output_tokens_per_second: output_tokens as f64 / seconds,
        requests_per_second: seen.len() as f64 / seconds,
        prompt_tokens: seen.iter().map(|one| one.prompt).sum(),
        cached_tokens: seen.iter().map(|one| one.cached).sum(),
        time_to_first_token: Spread::of(seen.iter().map(|one| one.first).collect()),
        inter_token: Spread::of(seen.iter().flat_map(|one| one.gaps.clone()).collect()),
        latency: Spread::of(seen.iter().map(|one| one.whole).collect()),
    };
    Output::detect(args.json).result(&measured, |output| text(&measured, output))
}

fn check(args: &BenchServeArgs) -> Result<(), Misuse> {
    let mut problems = Misuse::default();
    for (flag, number) in [
        ("--concurrency", args.concurrency),
        ("--requests", args.requests),
        ("--models", args.models),
        ("--prompt-tokens", args.prompt_tokens),
        ("--max-tokens", args.max_tokens),
    ] {
        problems.require(number > 0, || format!("{flag} must be 1 or greater"));
    }
    problems.require(args.rate.is_none_or(|rate| rate > 0.0), || {
        "--rate must be greater than 0".to_owned()
    });
    problems.or(())
}

/// Where completions are asked for. OpenAI's clients are given a URL with `/v1` at its end, so that is taken, too.
fn endpoint(url: &str) -> Result<String, Misuse> {
    let (scheme, host) = url.split_once("://").unwrap_or_default();
    let scheme = scheme.to_ascii_lowercase();
    let host = host.trim_end_matches('/');
    let host = host.strip_suffix("/v1").unwrap_or(host);
    let host = host.trim_end_matches('/');
    if !["http", "https"].contains(&scheme.as_str()) || host.is_empty() {
        return Err(Misuse::new(format!(
            "--url must begin with http:// or https://, as in http://127.0.0.1:8080, not {url:?}"
        )));
    }
    Ok(format!("{scheme}://{host}/v1/completions"))
}

fn names(args: &BenchServeArgs) -> Vec<String> {
    let made = args.model.iter().flat_map(|name| {
        let count = if name.contains("{N}") { args.models } else { 1 };
        (0..count).map(move |n| name.replace("{N}", &n.to_string()))
    });
    made.collect()
}

/// Does `count` things on so many threads, or beginning at a rate.
fn each(
    threads: usize,
    next: &AtomicUsize,
    count: usize,
    rate: Option<f64>,
    work: &(impl Fn(usize) + Sync),
) {
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::SeqCst);
                    if index >= count {
                        return;
                    }
                    if let Some(rate) = rate {
                        let due = begun + Duration::from_secs_f64(index as f64 / rate);
                        std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    }
                    work(index);
                }
            });
        }
    });
}

/// The random numbers of a request.
fn own_rng(args: &BenchServeArgs, index: usize) -> CounterRng {
    CounterRng::new(args.seed ^ (index as u64).wrapping_add(1) << 32)
}

/// Which model a request asks for.
fn choose<'a>(args: &BenchServeArgs, names: &'a [String], index: usize) -> &'a str {
    let Some(exponent) = args.zipf else {
        return &names[index % names.len()];
    };
    let weight = |rank: usize| 1.0 / ((rank + 1) as f64).powf(exponent);
    let total: f64 = (0..names.len()).map(weight).sum();
    let mut point = own_rng(args, index).next_f64() * total;
    for (rank, name) in names.iter().enumerate() {
        point -= weight(rank);
        if point < 0.0 {
            return name;
        }
    }
    &names[names.len() - 1]
}

fn request(
    agent: &ureq::Agent,
    url: &str,
    args: &BenchServeArgs,
    names: &[String],
    index: usize,
) -> anyhow::Result<Seen> {
    let ids = |rng: &mut CounterRng, count| -> Vec<u32> {
        let most = u64::from(args.vocabulary.saturating_sub(10).max(1));
        (0..count).map(|_| 10 + rng.below(most) as u32).collect()
    };
    let mut own = own_rng(args, index);
    let prompt = [
        ids(&mut CounterRng::new(args.seed), args.shared_tokens),
        ids(&mut own, args.prompt_tokens),
    ];
    let prompt = prompt.concat();
    let prompt = if args.words {
        let words = prompt.iter().map(|id| WORDS[*id as usize % WORDS.len()]);
        json!(words.collect::<Vec<_>>().join(" "))
    } else {
        json!(prompt)
    };
    let body = json!({
        "model": choose(args, names, index),
        "prompt": prompt,
        "max_tokens": args.max_tokens,
        "temperature": 0,
        "ignore_eos": true,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    let mut request = agent.post(url).header("content-type", "application/json");
    if let Some(key) = &args.api_key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let begun = Instant::now();
    let mut response = request
        .send(body.to_string())
        .context("the server does not answer")?;
    if !response.status().is_success() {
        let body = response.body_mut().read_to_string().unwrap_or_default();
        let error: Value = serde_json::from_str(&body).unwrap_or_default();
        let message = error["error"]["message"]
            .as_str()
            .unwrap_or(&body)
            .to_owned();
        bail!("the server answers {}: {message}", response.status());
    }
    let mut seen = Seen::default();
    let mut last = begun;
    let mut is_done = false;
    let mut texts = 0;
    for line in BufReader::new(response.into_body().into_reader()).lines() {
        let line = line?;
        let Some(data) = line.strip_prefix("data: ") else {
            continue;
        };
        if data == "[DONE]" {
            is_done = true;
            continue;
        }
        let event: Value = serde_json::from_str(data)?;
        if let Some(message) = event["error"]["message"].as_str() {
            bail!("{message}");
        }
        if let Some(made) = event["usage"]["completion_tokens"].as_u64() {
            seen.made = made as usize;
            seen.prompt = event["usage"]["prompt_tokens"].as_u64().unwrap_or(0) as usize;
            let details = &event["usage"]["prompt_tokens_details"];
            seen.cached = details["cached_tokens"].as_u64().unwrap_or(0) as usize;
        }
        let is_text = event["choices"][0]["text"]
            .as_str()
            .is_some_and(|text| !text.is_empty());
        if is_text {
            texts += 1;
            let now = Instant::now();
            let gap = 1e3 * (now - last).as_secs_f64();
            if seen.first == 0.0 {
                seen.first = gap;
            } else {
                seen.gaps.push(gap);
            }
            last = now;
        }
    }
    if !is_done {
        bail!("the stream broke off");
    }
    if seen.made == 0 {
        // A server that says no usage in streams; a piece of text is then taken for a token.
        seen.made = texts;
    }
    seen.whole = 1e3 * begun.elapsed().as_secs_f64();
    Ok(seen)
}

fn text(measured: &Measured, output: &Output) -> String {
    let mut facts = Facts::default();
    facts.add(
        "requests",
        format!("{}, {} failed", measured.requests, measured.failed),
    );
    facts.add(
        "tokens a second",
        format!("{:.1}", measured.output_tokens_per_second),
    );
    let spread = |spread: &Spread| {
        format!(
            "p50 {:.1}, p90 {:.1}, p99 {:.1}, max {:.1} ms",
            spread.p50, spread.p90, spread.p99, spread.max
        )
    };
    facts.add("to the first token", spread(&measured.time_to_first_token));
    facts.add("between tokens", spread(&measured.inter_token));
    facts.add("a request", spread(&measured.latency));
    let share = measured.cached_tokens as f64 / measured.prompt_tokens.max(1) as f64;
    facts.add("prompts from the cache", format!("{:.1} %", 1e2 * share));
    for (error, count) in &measured.errors {
        facts.add("error", format!("{count} × {error}"));
    }
    facts.render("server", output.color)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_values() {
        let spread = Spread::of((1..=101).map(f64::from).collect());
        assert_eq!((spread.p50, spread.p99, spread.max), (51.0, 100.0, 101.0));
        assert_eq!(Spread::of(Vec::new()).p99, 0.0);
    }

    #[test]
    fn urls_lead_to_completions() {
        for url in [
            "http://a:8080",
            "http://a:8080/",
            "http://a:8080/v1",
            "http://a:8080/v1/",
            "HTTP://a:8080/v1",
        ] {
            assert_eq!(
                endpoint(url).expect("good"),
                "http://a:8080/v1/completions",
                "{url}"
            );
        }
        assert_eq!(
            endpoint("http://a/base/v1").expect("good"),
            "http://a/base/v1/completions"
        );
        assert_eq!(
            endpoint("https://a/v1").expect("good"),
            "https://a/v1/completions"
        );
        for url in [
            "127.0.0.1:8080",
            "localhost",
            "ftp://a",
            "http://",
            "/v1",
            "",
        ] {
            let error = endpoint(url).expect_err("bad");
            let problem = &error.problems()[0];
            assert!(problem.contains("must begin with http://"), "{problem}");
        }
    }
}
