//! A server that is killed at any moment starts again with all that it had; and what the server says is what the commands say.
#![cfg(unix)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::classify::{headless, place, train};
use super::support::{Lab, lowrank, strs};

/// A server of the lab's model and adapters.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(lab: &Lab) -> Self {
        Self::start_with(&lab.path("model"), "--adapter-dir", &lab.path("adapters"))
    }

    /// A server of a model and of what `flag` says.
    fn start_with(model: &Path, flag: &str, value: &Path) -> Self {
        let program = assert_cmd::cargo::cargo_bin("lowrank");
        let mut child = Command::new(program)
            .args(["serve", "--port", "0", "--threads", "1", "--model"])
            .arg(model)
            .arg(flag)
            .arg(value)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let stderr = child.stderr.take().expect("it is piped");
        let mut said = Vec::new();
        for line in BufReader::new(stderr).lines() {
            let line = line.expect("text");
            if let Some((_, address)) = line.split_once(" at http://") {
                let address = address.trim().to_owned();
                return Self { child, address };
            }
            said.push(line);
        }
        let ended = child.wait();
        panic!("the server did not start ({ended:?}): {said:?}");
    }

    /// Sends a request; none where the server is gone.
    fn ask(address: &str, method: &str, path: &str, body: &Value) -> Option<(u16, String)> {
        let body = body.to_string();
        let mut stream = TcpStream::connect(address).ok()?;
        let timeout = Some(Duration::from_secs(60));
        stream.set_read_timeout(timeout).ok()?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some((status, body.to_owned()))
    }

    /// The answer of a request that is answered.
    fn good(&self, method: &str, path: &str, body: &Value) -> Value {
        let answer = Self::ask(&self.address, method, path, body);
        let (status, body) = answer.expect("it answers");
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).expect("JSON")
    }

    fn models(&self) -> Vec<String> {
        let list = self.good("GET", "/v1/models", &Value::Null);
        let data = list["data"].as_array().expect("a list");
        let names = data
            .iter()
            .map(|model| model["id"].as_str().expect("a name").to_owned());
        names.collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SIGKILL.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(from.join(name), to.join(name)).expect("a file of the adapter");
    }
}

#[test]
fn a_server_that_is_killed_while_it_writes_starts_again() {
    let lab = Lab::new();
    let train = lab.train("run", &["--learning-rate", "0.01"]);
    lowrank().args(strs(&train)).assert().success();
    for name in ["a", "b"] {
        copy(&lab.path("run"), &lab.path("adapters").join(name));
    }
    let registry = lab.path("adapters").join(".lowrank-registry.json");
    let mut known: Vec<String> = Vec::new();
    for round in 0..8_u64 {
        let server = Server::start(&lab);
        let models = server.models();
        for name in &known {
            assert!(models.contains(name), "{name} is lost: {models:?}");
        }
        let address = server.address.clone();
        let loading = std::thread::spawn(move || {
            let mut loaded = Vec::new();
            for at in 0.. {
                let name = format!("r{round}-{at}");
                let path = ["a", "b"][at % 2];
                let body = json!({"lora_name": name, "lora_path": path});
                match Server::ask(&address, "POST", "/v1/load_lora_adapter", &body) {
                    Some((200, _)) => loaded.push(name),
                    Some((status, body)) => panic!("{status}: {body}"),
                    None => break,
                }
            }
            loaded
        });
        std::thread::sleep(Duration::from_millis(15 + 17 * round));
        drop(server);
        // What was answered is there after a restart.
        known.extend(loading.join().expect("it loads until the server is gone"));
        if let Ok(text) = fs::read_to_string(&registry) {
            serde_json::from_str::<Value>(&text).expect("the registry is whole");
        }
    }
    assert!(known.len() > 8, "{known:?}");
    let server = Server::start(&lab);
    let models = server.models();
    assert!(known.iter().all(|name| models.contains(name)));
    for name in known.iter().step_by(known.len() / 5) {
        let body = json!({"model": name, "prompt": "Number", "max_tokens": 2});
        let answer = Server::ask(&server.address, "POST", "/v1/completions", &body);
        let (status, body) = answer.expect("it answers");
        assert_eq!(status, 200, "{name}: {body}");
    }
}

#[test]
fn a_server_that_is_told_to_stop_ends_with_success() {
    let lab = Lab::new();
    fs::create_dir(lab.path("adapters")).expect("a folder");
    let mut server = Server::start(&lab);
    let told = Command::new("kill")
        .arg(server.child.id().to_string())
        .status();
    assert!(told.expect("kill runs").success());
    let status = server.child.wait().expect("it ends");
    assert_eq!(status.code(), Some(0), "{status}");
}

#[test]
fn a_damaged_registry_is_an_error_that_says_what_to_do() {
    let lab = Lab::new();
    fs::create_dir(lab.path("adapters")).expect("a folder");
    fs::write(
        lab.path("adapters").join(".lowrank-registry.json"),
        "{\"version\"",
    )
    .expect("written");
    let (model, adapters) = (lab.arg("model"), lab.arg("adapters"));
    let args = [
        "serve",
        "--port",
        "0",
        "--model",
        &model,
        "--adapter-dir",
        &adapters,
    ];
    let assert = lowrank().args(args).assert().code(1);
    let said = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    assert!(
        said.contains(".lowrank-registry.json") && said.contains("move it away"),
        "{said}"
    );
}

const TEXTS: [&str; 3] = ["good film", "awful play film", "dull"];

/// What a command prints of the texts, a JSON object a line.
fn printed(arguments: &[&str]) -> Vec<Value> {
    let texts = TEXTS.iter().flat_map(|text| ["--text", text]);
    let output = lowrank().args(arguments).args(texts).output();
    let output = output.expect("it runs");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("text");
    let lines = text.lines().map(serde_json::from_str);
    lines.collect::<Result<_, _>>().expect("JSON")
}

fn near(a: &Value, b: &Value) -> bool {
    (a.as_f64().expect("a number") - b.as_f64().expect("a number")).abs() < 1e-6
}

#[test]
fn texts_and_words_get_the_labels_that_classify_prints() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let path = |name: &str| folder.join(name).display().to_string();
    place(folder);
    headless(folder);
    train(folder, "texts", &[]);
    let rows = [
        r#"{"tokens": ["good", "film"], "tags": ["GOOD", "O"]}"#,
        r#"{"tokens": ["bad", "play", "film"], "tags": ["BAD", "O", "O"]}"#,
    ];
    fs::write(folder.join("data/train.jsonl"), rows.join("\n")).expect("a file");
    for name in ["train.csv", "valid.csv"] {
        fs::remove_file(folder.join("data").join(name)).expect("it was there");
    }
    train(
        folder,
        "words",
        &["--task-type", "TOKEN_CLS", "--max-steps", "5"],
    );
    for adapter in ["texts", "words"] {
        let (model, run) = (path("model"), path(adapter));
        let said = printed(&["classify", "--model", &model, "--adapter", &run, "--json"]);
        let server = Server::start_with(&folder.join("model"), "--adapter", &folder.join(adapter));
        let body = json!({"model": adapter, "input": TEXTS});
        let answer = server.good("POST", "/v1/classify", &body);
        let data = answer["data"].as_array().expect("a list");
        assert_eq!(data.len(), said.len());
        for (found, said) in data.iter().zip(&said) {
            if adapter == "texts" {
                assert_eq!(found["label"], said["label"]);
                let names = answer["labels"].as_array().expect("names");
                for (name, found) in names.iter().zip(found["probs"].as_array().expect("a list")) {
                    let name = name.as_str().expect("a name");
                    assert!(near(found, &said["probabilities"][name]), "{found} {said}");
                }
                continue;
            }
            let words = said["words"].as_array().expect("words");
            let found = found["words"].as_array().expect("words");
            assert_eq!(found.len(), words.len());
            for (found, said) in found.iter().zip(words) {
                for key in ["word", "start", "end", "label"] {
                    assert_eq!(found[key], said[key]);
                }
                assert!(near(&found["probability"], &said["probability"]));
            }
        }
        let ids = json!({"model": adapter, "input": [[2, 5, 3]]});
        let answer = Server::ask(&server.address, "POST", "/v1/classify", &ids);
        let (status, body) = answer.expect("it answers");
        let is_refused = status == 400 && body.contains("input must have texts");
        assert_eq!(is_refused, adapter == "words", "{status}: {body}");
    }
}

#[test]
fn vectors_are_those_that_embed_prints() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    place(folder);
    let model = folder.join("model");
    let said = printed(&["embed", "--model", &model.display().to_string()]);
    let adapters = folder.join("adapters");
    fs::create_dir(&adapters).expect("a folder");
    let server = Server::start_with(&model, "--adapter-dir", &adapters);
    let answer = server.good(
        "POST",
        "/v1/embeddings",
        &json!({"model": "model", "input": TEXTS}),
    );
    for (at, said) in said.iter().enumerate() {
        let found = answer["data"][at]["embedding"].as_array().expect("numbers");
        let said = said["embedding"].as_array().expect("numbers");
        assert_eq!(found.len(), said.len());
        assert!(found.iter().zip(said).all(|(a, b)| near(a, b)));
    }
}
