//! A server in this process and what asks it.

use std::net::SocketAddr;
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

use super::client;

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

/// Asks a server for jobs.
#[derive(Clone)]
pub(crate) struct Client(client::Client);

impl Client {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self(client::Client { address, key: None })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.0.address
    }

    pub(crate) fn with_key(&self, key: &str) -> Self {
        Self(self.0.with_key(key))
    }

    /// Status and body.
    pub(crate) fn send(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> (u16, Vec<u8>) {
        let reply = self.0.send_as(method, path, kind, body);
        (reply.status, reply.body)
    }

    pub(crate) fn get(&self, path: &str) -> (u16, Value) {
        let reply = self.0.get(path);
        (reply.status, json(&reply.body))
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let reply = self.0.post(path, body);
        (reply.status, json(&reply.body))
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
        self.0.open_as("GET", path, "").rest()
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
