//! `model pull` against a Hub on the loopback interface: the few answers that hf-hub asks for, from a folder.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use assert_cmd::Command;

use crate::support::{Lab, lowrank};

const ID: &str = "somebody/tiny";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// The Hub, and what it was asked for.
struct Hub {
    endpoint: String,
    /// The first byte of each download, by file.
    asked: Arc<Mutex<Vec<(String, usize)>>>,
    /// While true, the weights break off in the middle.
    broken: Arc<AtomicBool>,
}

impl Hub {
    fn serving(folder: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("the loopback interface is there");
        let address = listener.local_addr().expect("it has an address");
        let hub = Self {
            endpoint: format!("http://{address}"),
            asked: Arc::default(),
            broken: Arc::new(AtomicBool::new(true)),
        };
        let (asked, broken) = (Arc::clone(&hub.asked), Arc::clone(&hub.broken));
        // The thread ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away in the middle is what this test is about.
                drop(answer(stream, &folder, &asked, &broken));
            }
        });
        hub
    }

    fn command(&self, home: &Path) -> Command {
        let mut command = lowrank();
        command
            .env("HF_ENDPOINT", &self.endpoint)
            .env("HF_HOME", home)
            .env_remove("HF_TOKEN")
            .env_remove("HTTP_PROXY")
            .env_remove("http_proxy");
        command
    }
}

fn answer(
    stream: TcpStream,
    folder: &Path,
    asked: &Mutex<Vec<(String, usize)>>,
    broken: &AtomicBool,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut range = None;
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if let Some(bytes) = line.strip_prefix("range: bytes=") {
            let (first, last) = bytes.split_once('-').unwrap_or((bytes, ""));
            range = Some((
                first.parse::<usize>().unwrap_or(0),
                last.parse::<usize>().ok(),
            ));
        }
        if line.is_empty() {
            break;
        }
    }
    let mut out = stream;
    if path.starts_with("/api/models/") {
        let names = std::fs::read_dir(folder)?.flatten();
        let siblings: Vec<_> = names
            .map(|entry| serde_json::json!({"rfilename": entry.file_name().to_string_lossy()}))
            .collect();
        let body = serde_json::json!({"siblings": siblings, "sha": COMMIT}).to_string();
        return write!(
            out,
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
    }
    let name = path.rsplit('/').next().unwrap_or_default().to_owned();
    let Ok(bytes) = std::fs::read(folder.join(&name)) else {
        return write!(
            out,
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    };
    let (first, last) = range.unwrap_or((0, None));
    let end = last.map_or(bytes.len(), |last| (last + 1).min(bytes.len()));
    if last.is_none() {
        asked
            .lock()
            .expect("no test thread panicked")
            .push((name.clone(), first));
    }
    let mut head = String::from("HTTP/1.1 206 Partial Content\r\nConnection: close\r\n");
    let _ = write!(head, "Content-Length: {}\r\n", end - first);
    let _ = write!(
        head,
        "Content-Range: bytes {first}-{}/{}\r\n",
        end - 1,
        bytes.len()
    );
    let _ = write!(head, "ETag: \"{name}\"\r\nx-repo-commit: {COMMIT}\r\n\r\n");
    out.write_all(head.as_bytes())?;
    let breaks = last.is_none() && name.ends_with(".safetensors") && broken.load(Ordering::SeqCst);
    let end = if breaks {
        first + (end - first) / 2
    } else {
        end
    };
    out.write_all(&bytes[first..end])
}

#[test]
fn a_pull_that_broke_goes_on_and_the_model_is_used_by_its_id() {
    let lab = Lab::new();
    let hub = Hub::serving(lab.path("model"));
    let home = lab.path("home");
    let text = |command: &mut Command, code: i32| {
        let assert = command.assert().code(code);
        let output = assert.get_output();
        String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr)
    };
    let eval = |code: i32| {
        let data = lab.arg("data");
        text(
            hub.command(&home)
                .args(["eval", "--model", ID, "--data", &data]),
            code,
        )
    };

    assert!(
        eval(2).contains("lowrank model pull somebody/tiny"),
        "the mend is named"
    );

    let broken = text(hub.command(&home).args(["model", "pull", ID]), 1);
    assert!(broken.contains("model.safetensors"), "{broken}");

    hub.broken.store(false, Ordering::SeqCst);
    hub.asked.lock().expect("no test thread panicked").clear();
    text(hub.command(&home).args(["model", "pull", ID]), 0);
    let asked = std::mem::take(&mut *hub.asked.lock().expect("no test thread panicked"));
    let half = std::fs::metadata(lab.path("model/model.safetensors"))
        .expect("it is there")
        .len() as usize
        / 2;
    // Only the weights, from where they broke off.
    assert_eq!(asked, [("model.safetensors".to_owned(), half)]);
    assert!(eval(0).contains("loss"));

    text(hub.command(&home).args(["model", "pull", ID]), 0);
    assert!(
        hub.asked
            .lock()
            .expect("no test thread panicked")
            .is_empty(),
        "nothing is fetched twice"
    );

    let missing = text(hub.command(&home).args(["model", "pull", "somebody"]), 2);
    assert!(missing.contains("owner/name"), "{missing}");
}

#[test]
fn no_network_is_said() {
    let lab = Lab::new();
    let mut command = lowrank();
    // Nothing listens on the discard port.
    command
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .env("HF_HOME", lab.path("home"));
    let assert = command
        .args(["model", "pull", ID])
        .assert()
        .code(1)
        .stdout("");
    let text = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    assert!(
        text.contains("somebody/tiny") && text.contains("network"),
        "{text}"
    );
}
