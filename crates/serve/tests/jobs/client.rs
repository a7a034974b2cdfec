//! A server in this process and what asks it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lowrank::DType;
use lowrank::base::{BUILTIN, Base};
use lowrank_serve::{Options, serve};
use serde_json::Value;

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Options of a server on a free port.
pub(crate) fn options(adapters: Option<&Path>) -> Options {
    Options {
        address: SocketAddr::from(([127, 0, 0, 1], 0)),
        adapter_dir: adapters.map(Path::to_path_buf),
        max_num_seqs: 4,
        drain_timeout: Duration::from_secs(5),
        ..Options::new("tiny")
    }
}

/// A server in this process.
pub(crate) struct Running {
    pub(crate) client: Client,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    pub(crate) fn start(options: Options) -> Self {
        let base = Base::load(BUILTIN, DType::F32).expect("the built-in model");
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, receiver) = channel();
        let asked = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let ready = move |address| sender.send(address).expect("somebody waits");
            serve(base, None, options, ready, move || {
                asked.load(Ordering::SeqCst)
            })
            .expect("a server");
        });
        let address = receiver.recv_timeout(PATIENCE).expect("an address");
        Self {
            client: Client::new(address),
            stop,
            thread: Some(thread),
        }
    }

    /// Does what SIGTERM does.
    pub(crate) fn stop(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let thread = self.thread.take().expect("a thread");
        thread.join().expect("a good end");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Asks a server.
#[derive(Clone)]
pub(crate) struct Client {
    address: SocketAddr,
    key: Option<&'static str>,
}

impl Client {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self { address, key: None }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn with_key(&self, key: &'static str) -> Self {
        Self {
            key: Some(key),
            ..self.clone()
        }
    }

    /// Status and body.
    pub(crate) fn send(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> (u16, Vec<u8>) {
        let (status, mut reader, is_chunked) = self.open(method, path, kind, body);
        let mut whole = Vec::new();
        if is_chunked {
            while let Some(chunk) = next_chunk(&mut reader) {
                whole.extend(chunk);
            }
        } else {
            reader.read_to_end(&mut whole).expect("a body");
        }
        (status, whole)
    }

    fn open(
        &self,
        method: &str,
        path: &str,
        kind: &str,
        body: &[u8],
    ) -> (u16, BufReader<TcpStream>, bool) {
        let mut stream = TcpStream::connect(self.address).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let key = self.key.map_or(String::new(), |key| {
            format!("Authorization: Bearer {key}\r\n")
        });
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{key}Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).expect("a request");
        // A server may answer before it has read everything.
        drop(stream.write_all(body));
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).expect("a status");
        let status = line
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no status: {line:?}"));
        let mut is_chunked = false;
        loop {
            line.clear();
            reader.read_line(&mut line).expect("a header");
            if line.trim().is_empty() {
                return (status, reader, is_chunked);
            }
            is_chunked |= line
                .to_lowercase()
                .starts_with("transfer-encoding: chunked");
        }
    }

    pub(crate) fn get(&self, path: &str) -> (u16, Value) {
        let (status, body) = self.send("GET", path, "text/plain", b"");
        (status, json(&body))
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, body) = self.send(
            "POST",
            path,
            "application/json",
            body.to_string().as_bytes(),
        );
        (status, json(&body))
    }

    pub(crate) fn upload(&self, name: &str, content: &[u8]) -> (u16, Value) {
        let mut body = format!(
            "--x\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n--x\r\nContent-Disposition: form-data; \
             name=\"file\"; filename=\"{name}\"\r\n\r\n"
        )
        .into_bytes();
        body.extend(content);
        body.extend(b"\r\n--x--\r\n");
        let (status, body) = self.send(
            "POST",
            "/v1/files",
            "multipart/form-data; boundary=x",
            &body,
        );
        (status, json(&body))
    }

    /// The id of a new file.
    pub(crate) fn file(&self, name: &str, content: &[u8]) -> String {
        let file = good(self.upload(name, content));
        file["id"].as_str().expect("an id").to_owned()
    }

    /// The id of a new job.
    pub(crate) fn job(&self, request: &Value) -> String {
        let job = good(self.post("/v1/fine_tuning/jobs", request));
        job["id"].as_str().expect("an id").to_owned()
    }

    /// A job once a condition holds.
    pub(crate) fn wait(&self, id: &str, is_there: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let job = good(self.get(&format!("/v1/fine_tuning/jobs/{id}")));
            if is_there(&job) {
                return job;
            }
            assert!(begun.elapsed() < PATIENCE, "{job}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A job that must succeed.
    pub(crate) fn succeeded(&self, id: &str) -> Value {
        let job = self.wait(id, |job| {
            ["succeeded", "failed", "cancelled"].contains(&status(job))
        });
        assert_eq!(job["status"], "succeeded", "{job}");
        job
    }

    /// The steps that a job has told of.
    pub(crate) fn steps(&self, id: &str) -> usize {
        let events = good(self.get(&format!("/v1/fine_tuning/jobs/{id}/events?limit=500")));
        let events = events["data"].as_array().expect("events").iter();
        let steps = events.filter(|event| event["data"]["train_loss"].is_number());
        steps.count()
    }

    pub(crate) fn wait_for_steps(&self, id: &str, steps: usize) {
        let begun = Instant::now();
        while self.steps(id) < steps {
            assert!(begun.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The events of a stream until it ends, and whether it says so.
    pub(crate) fn stream(&self, path: &str) -> (Vec<Value>, bool) {
        let (status, mut reader, _) = self.open("GET", path, "text/plain", b"");
        assert_eq!(status, 200);
        let mut text = Vec::new();
        while let Some(chunk) = next_chunk(&mut reader) {
            text.extend(chunk);
        }
        let text = String::from_utf8(text).expect("a text");
        let mut is_done = false;
        let mut events = Vec::new();
        for data in text.lines().filter_map(|line| line.strip_prefix("data: ")) {
            if data == "[DONE]" {
                is_done = true;
            } else {
                events.push(json(data.as_bytes()));
            }
        }
        (events, is_done)
    }
}

/// The answer to a request that must succeed.
pub(crate) fn good(answer: (u16, Value)) -> Value {
    assert_eq!(answer.0, 200, "{}", answer.1);
    answer.1
}

pub(crate) fn status(job: &Value) -> &str {
    job["status"].as_str().unwrap_or_default()
}

fn json(body: &[u8]) -> Value {
    serde_json::from_slice(body)
        .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(body).into_owned()))
}

fn next_chunk(reader: &mut BufReader<TcpStream>) -> Option<Vec<u8>> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let length = usize::from_str_radix(line.trim(), 16)
        .ok()
        .filter(|length| *length > 0)?;
    let mut chunk = vec![0; length + 2];
    reader.read_exact(&mut chunk).ok()?;
    chunk.truncate(length);
    Some(chunk)
}
