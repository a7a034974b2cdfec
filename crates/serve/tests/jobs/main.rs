//! Files and jobs of a server, over HTTP.

#[path = "../common/client.rs"]
#[expect(
    dead_code,
    reason = "the tests of answers need more of it than those of jobs"
)]
mod client;
mod server;

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use lowrank::DType;
use lowrank::base::{BUILTIN, Base};
use lowrank_serve::serve;
use serde_json::{Value, json};

use server::{Client, PATIENCE, Running, good, options, status};

fn rows(count: usize) -> Vec<u8> {
    let row = |n: usize| {
        format!(
            "{}\n",
            json!({"prompt": format!("{n}+{n}="), "completion": (2 * n).to_string()})
        )
    };
    (1..=count).map(row).collect::<String>().into_bytes()
}

/// A request for a job that takes so many steps.
fn request(file: &str, steps: u64) -> Value {
    json!({
        "model": "tiny",
        "training_file": file,
        "hyperparameters": {"batch_size": 4},
        "lowrank": {"max_steps": steps, "save_steps": 10, "learning_rate": 0.002},
    })
}

/// The values of a job's result.
fn result(adapters: &Path, job: &Value) -> Vec<u8> {
    let name = job["fine_tuned_model"].as_str().expect("a name");
    std::fs::read(adapters.join(name).join("adapter_model.safetensors")).expect("the result")
}

#[test]
fn a_job_is_served_under_its_name() {
    let place = tempfile::tempdir().expect("a folder");
    let server = Running::start(options(Some(place.path())));
    let client = &server.client;
    let (train, valid) = (
        client.file("rows.jsonl", &rows(24)),
        client.file("valid.jsonl", &rows(3)),
    );
    let mut wanted = request(&train, 12);
    wanted["validation_file"] = json!(valid);
    wanted["suffix"] = json!("my sums");
    wanted["seed"] = json!(5);
    let id = client.job(&wanted);
    // Opened while it runs or before.
    let events = format!("/v1/fine_tuning/jobs/{id}/events");
    let (streamed, is_done) = client.stream(&format!("{events}?stream=true"));
    assert!(is_done);
    let job = client.succeeded(&id);
    let name = job["fine_tuned_model"].as_str().expect("a name");
    assert_eq!(name, format!("ft-tiny-my-sums-{}", &id[6..14]));
    assert!(job["trained_tokens"].as_u64().expect("tokens") > 0);
    assert_eq!((&job["seed"], &job["error"]), (&json!(5), &Value::Null));
    assert_eq!(job["hyperparameters"]["batch_size"], 4);

    // The list is newest first, in pages, and has the ids of the stream.
    let (mut listed, mut after) = (Vec::new(), String::new());
    loop {
        let page = good(client.get(&format!("{events}?limit=7{after}")));
        listed.extend(page["data"].as_array().expect("events").clone());
        if page["has_more"] == false {
            break;
        }
        after = format!("&after={}", page["last_id"].as_str().expect("an id"));
    }
    listed.reverse();
    assert_eq!(listed, streamed);
    let losses = |key: &str| -> Vec<u64> {
        let told = streamed
            .iter()
            .filter(|event| event["data"][key].is_number());
        told.map(|event| event["data"]["step"].as_u64().expect("a step"))
            .collect()
    };
    assert_eq!(losses("train_loss"), (1..=12).collect::<Vec<_>>());
    assert_eq!(losses("valid_loss"), (0..=12).collect::<Vec<_>>());

    let answer = json!({"model": name, "prompt": "2+2=", "max_tokens": 4, "temperature": 0});
    let of_job = good(client.post("/v1/completions", &answer));
    let checkpoints = good(client.get(&format!("/v1/fine_tuning/jobs/{id}/checkpoints")));
    let points = checkpoints["data"].as_array().expect("checkpoints");
    let steps: Vec<_> = points.iter().map(|point| &point["step_number"]).collect();
    assert_eq!(steps, [12, 10]);
    assert!(points[0]["metrics"]["valid_loss"].is_number());
    let mut of_point = answer.clone();
    of_point["model"] = points[0]["fine_tuned_model_checkpoint"].clone();
    let of_point = good(client.post("/v1/completions", &of_point));
    assert_eq!(of_point["choices"][0]["text"], of_job["choices"][0]["text"]);
    // And on from the result, with the rank that it has.
    let wanted = json!({"model": name, "training_file": train, "lowrank": {"max_steps": 2}});
    let again = client.succeeded(&client.job(&wanted));
    assert_eq!(again["model"], name);
    let wanted = json!({"model": name, "training_file": train, "lowrank": {"r": 3}});
    let (status, error) = client.post("/v1/fine_tuning/jobs", &wanted);
    assert_eq!(
        (status, &error["error"]["param"]),
        (400, &json!("lowrank.r")),
        "{error}"
    );
    let (_, metrics) = client.send("GET", "/metrics", "text/plain", b"");
    let metrics = String::from_utf8(metrics).expect("a text");
    assert!(
        metrics.contains("lowrank_jobs{status=\"succeeded\"} 2"),
        "{metrics}"
    );
    server.stop();
}

#[test]
fn a_stopped_server_goes_on_to_the_same_result() {
    let place = tempfile::tempdir().expect("a folder");
    let server = Running::start(options(Some(place.path())));
    let file = server.client.file("rows.jsonl", &rows(40));
    let whole = server
        .client
        .succeeded(&server.client.job(&request(&file, 120)));

    // One that runs, beside requests, and one that waits; the server stops in the middle.
    let id = server.client.job(&request(&file, 120));
    let waits = server.client.job(&request(&file, 3));
    let is_over = Arc::new(AtomicBool::new(false));
    let asking = {
        let (client, is_over) = (server.client.clone(), Arc::clone(&is_over));
        std::thread::spawn(move || {
            let mut count = 0;
            while !is_over.load(Ordering::SeqCst) {
                let wanted = json!({"prompt": "1+1=", "max_tokens": 8, "ignore_eos": true});
                count += usize::from(client.post("/v1/completions", &wanted).0 == 200);
            }
            count
        })
    };
    server.client.wait_for_steps(&id, 25);
    is_over.store(true, Ordering::SeqCst);
    assert!(
        asking.join().expect("a count") > 0,
        "nobody was answered while the job ran"
    );
    server.stop();
    let run = place
        .path()
        .join(".lowrank-serve/jobs")
        .join(&id)
        .join("run");
    let steps = lowrank::train::checkpoint::steps(&run);
    let last = *steps.last().expect("a checkpoint");
    assert!((25..120).contains(&last), "{steps:?}");

    let server = Running::start(options(Some(place.path())));
    let job = server.client.succeeded(&id);
    assert!(
        result(place.path(), &job) == result(place.path(), &whole),
        "another result"
    );
    assert_eq!(job["trained_tokens"], whole["trained_tokens"]);
    assert_eq!(server.client.steps(&id), 120);
    server.client.succeeded(&waits);
    let list = good(server.client.get("/v1/fine_tuning/jobs?limit=2"));
    let ids: Vec<_> = list["data"]
        .as_array()
        .expect("jobs")
        .iter()
        .map(|job| &job["id"])
        .collect();
    assert_eq!(ids, [&waits, &id]);
    assert_eq!(list["has_more"], true);
}

/// Where the child puts its address.
const CHILD: &str = "LOWRANK_TEST_CHILD";

/// Not a test: the server of the next one, in a process of its own.
#[test]
fn child() {
    let Some(folder) = std::env::var_os(CHILD) else {
        return;
    };
    let folder = Path::new(&folder);
    let server = Running::start(options(Some(&folder.join("adapters"))));
    let address = server.client.address().to_string();
    lowrank::write_text(&folder.join("address"), &address).expect("the address");
    std::thread::sleep(PATIENCE);
}

fn start_child(folder: &Path) -> (Child, Client) {
    let at = folder.join("address");
    drop(std::fs::remove_file(&at));
    let program = std::env::current_exe().expect("this program");
    let child = Command::new(program)
        .args(["--exact", "child"])
        .env(CHILD, folder)
        .stdout(Stdio::null())
        .spawn()
        .expect("a child");
    let begun = Instant::now();
    let address: SocketAddr = loop {
        if let Ok(text) = std::fs::read_to_string(&at) {
            break text.parse().expect("an address");
        }
        assert!(begun.elapsed() < PATIENCE);
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    (child, Client::new(address))
}

#[test]
fn a_killed_server_goes_on_to_the_same_result() {
    let place = tempfile::tempdir().expect("a folder");
    let adapters = place.path().join("adapters");
    std::fs::create_dir(&adapters).expect("a folder");
    let (mut child, client) = start_child(place.path());
    let file = client.file("rows.jsonl", &rows(40));
    let whole = client.succeeded(&client.job(&request(&file, 90)));
    let id = client.job(&request(&file, 90));
    client.wait_for_steps(&id, 13);
    kill(&mut child);
    let (mut child, client) = start_child(place.path());
    client.wait_for_steps(&id, 37);
    kill(&mut child);
    let (mut child, client) = start_child(place.path());
    let job = client.succeeded(&id);
    assert!(
        result(&adapters, &job) == result(&adapters, &whole),
        "another result"
    );
    assert_eq!(job["trained_tokens"], whole["trained_tokens"]);
    assert_eq!(client.steps(&id), 90);
    let events = good(client.get(&format!("/v1/fine_tuning/jobs/{id}/events?limit=500")));
    let events = events["data"].as_array().expect("events");
    let ids: std::collections::BTreeSet<_> =
        events.iter().map(|event| event["id"].as_str()).collect();
    assert_eq!(ids.len(), events.len(), "an id comes twice");
    kill(&mut child);
}

fn kill(child: &mut Child) {
    child.kill().expect("a kill");
    child.wait().expect("an end");
}

#[test]
fn jobs_are_cancelled_paused_and_resumed() {
    let place = tempfile::tempdir().expect("a folder");
    let server = Running::start(options(Some(place.path())));
    let client = &server.client;
    let file = client.file("rows.jsonl", &rows(40));
    let endless = client.job(&request(&file, 1_000_000));
    // It has begun, or the other might be validated and trained before it.
    client.wait_for_steps(&endless, 3);
    let waits = client.job(&request(&file, 20));
    client.wait(&waits, |job| status(job) == "queued");
    let path = |id: &str, what: &str| format!("/v1/fine_tuning/jobs/{id}/{what}");
    let act = |id: &str, what: &str| client.post(&path(id, what), &json!({}));
    // Its file is needed until it is over.
    let (status_of, error) = {
        let (status, body) = client.send("DELETE", &format!("/v1/files/{file}"), "text/plain", b"");
        (
            status,
            serde_json::from_slice::<Value>(&body).expect("JSON"),
        )
    };
    assert_eq!(
        (status_of, &error["error"]["code"]),
        (409, &json!("file_in_use"))
    );
    // The one that waits gets its turn while the other rests.
    assert_eq!(good(act(&endless, "pause"))["status"], "paused");
    client.succeeded(&waits);
    let rested = client.steps(&endless);
    let resumed = good(act(&endless, "resume"));
    assert!(
        ["queued", "running"].contains(&status(&resumed)),
        "{resumed}"
    );
    client.wait_for_steps(&endless, rested + 3);
    let cancelled = good(act(&endless, "cancel"));
    assert_eq!(cancelled["status"], "cancelled");
    assert!(cancelled["finished_at"].is_number());
    let (_, is_done) = client.stream(&format!("{}?stream=true", path(&endless, "events")));
    assert!(is_done);
    let points = good(client.get(&path(&endless, "checkpoints")));
    assert!(!points["data"].as_array().expect("checkpoints").is_empty());
    for what in ["cancel", "pause", "resume"] {
        let (status, error) = act(&endless, what);
        assert_eq!(
            (status, &error["error"]["code"]),
            (400, &json!("invalid_status")),
            "{what}"
        );
    }
    // One that has not begun.
    let (first, second) = (
        client.job(&request(&file, 1_000_000)),
        client.job(&request(&file, 5)),
    );
    assert_eq!(good(act(&second, "cancel"))["status"], "cancelled");
    assert_eq!(good(act(&first, "cancel"))["status"], "cancelled");
}

#[test]
fn files_are_kept_shown_and_deleted() {
    let place = tempfile::tempdir().expect("a folder");
    let server = Running::start(options(Some(place.path())));
    let client = &server.client;
    let table = b"prompt,completion\n1+1=,2\n2+2=,4\n";
    let (a, b) = (
        client.file("../../a.csv", table),
        client.file("rows.jsonl", &rows(9)),
    );
    let file = good(client.get(&format!("/v1/files/{a}")));
    assert_eq!(
        (&file["filename"], &file["bytes"]),
        (&json!("a.csv"), &json!(table.len()))
    );
    assert_eq!(
        client
            .send("GET", &format!("/v1/files/{a}/content"), "", b"")
            .1,
        table
    );
    let shown = good(client.get(&format!("/v1/files/{a}/preview?rows=1")));
    assert_eq!(
        (&shown["report"]["rows"], &shown["report"]["kept"]),
        (&json!(2), &json!(2))
    );
    let tokens = shown["rows"][0]["tokens"].as_array().expect("tokens");
    let text = |supervised: bool| -> String {
        let tokens = tokens
            .iter()
            .filter(|token| token["supervised"] == supervised && token["special"] == false);
        tokens
            .map(|token| token["text"].as_str().expect("a text"))
            .collect()
    };
    assert_eq!((text(false).as_str(), text(true).as_str()), ("1+1=", "2"));
    assert_eq!(tokens.last().expect("an end")["special"], true);
    let ids = |query: &str| -> Vec<String> {
        let list = good(client.get(&format!("/v1/files{query}")));
        let data = list["data"].as_array().expect("files").iter();
        data.map(|file| file["id"].as_str().expect("an id").to_owned())
            .collect()
    };
    assert_eq!(ids("").len(), 2);
    assert_eq!(ids("?purpose=batch").len(), 0);
    for (name, content, part) in [
        ("x.jsonl", &b"hello\n"[..], "x.jsonl"),
        ("x.jsonl", b"", "x.jsonl"),
        ("x.jsonl", b"\xff\xfe\x00", "x.jsonl"),
    ] {
        let (status, error) = client.upload(name, content);
        assert_eq!(
            (status, &error["error"]["code"]),
            (400, &json!("invalid_file")),
            "{error}"
        );
        let message = error["error"]["message"].as_str().expect("a message");
        assert!(
            message.contains(part) && !message.contains("lowrank-serve"),
            "{message}"
        );
    }
    for (kind, body) in [
        ("application/json", &b"{}"[..]),
        (
            "multipart/form-data; boundary=x",
            b"--x\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nabc",
        ),
        ("multipart/form-data; boundary=x", b"nothing"),
    ] {
        let (status, _) = client.send("POST", "/v1/files", kind, body);
        assert_eq!(status, 400, "{kind}");
    }
    for id in ["..", "file-..%2F..%2Fx", "file-none", "%00"] {
        let (status, _) = client.send("DELETE", &format!("/v1/files/{id}"), "text/plain", b"");
        assert_eq!(status, 404, "{id}");
    }
    let (status, _) = client.send("DELETE", &format!("/v1/files/{a}"), "text/plain", b"");
    assert_eq!(status, 200);
    assert_eq!(ids(""), std::slice::from_ref(&b));
    // They are there after a restart, and nothing else is.
    server.stop();
    let server = Running::start(options(Some(place.path())));
    let list = good(server.client.get("/v1/files"));
    assert_eq!(list["data"][0]["id"], b.as_str());
    let state = place.path().join(".lowrank-serve/files");
    assert_eq!(std::fs::read_dir(state).expect("a folder").count(), 1);
}

#[test]
fn what_is_wrong_is_said_by_line_and_field() {
    let place = tempfile::tempdir().expect("a folder");
    let server = Running::start(options(Some(place.path())));
    let client = &server.client;
    for (name, row, part) in [
        ("bad.jsonl", r#"{"prompt": "x"}"#, "completion"),
        ("half.jsonl", r#"{"prompt": "x", "compl"#, "line 3"),
        ("mixed.jsonl", r#"{"text": "x"}"#, "the file began with"),
    ] {
        let mut content = rows(2);
        content.extend(row.as_bytes());
        let file = client.file(name, &content);
        let job = client.wait(&client.job(&request(&file, 3)), |job| {
            status(job) == "failed"
        });
        let error = &job["error"];
        let message = error["message"].as_str().expect("a message");
        assert!(
            message.contains(&format!("{name}, line 3")) && message.contains(part),
            "{message}"
        );
        assert_eq!(
            (&error["param"], &error["code"]),
            (&json!("training_file"), &json!("invalid_training_file"))
        );
    }
    let labelled = client.file("labels.jsonl", br#"{"text": "good", "label": "yes"}"#);
    let job = client.wait(&client.job(&request(&labelled, 3)), |job| {
        status(job) == "failed"
    });
    assert!(
        job["error"]["message"]
            .as_str()
            .expect("a message")
            .contains("labels"),
        "{job}"
    );
    let file = client.file("rows.jsonl", &rows(4));
    let mut diverges = request(&file, 50);
    diverges["lowrank"]["learning_rate"] = json!(1e38);
    diverges["lowrank"]["max_grad_norm"] = json!(0);
    let job = client.wait(&client.job(&diverges), |job| status(job) == "failed");
    assert_eq!(job["error"]["code"], "training_diverged", "{job}");
    let place = place.path().display().to_string();
    assert!(!job.to_string().contains(&place), "{job}");
    // Memory is looked at with the rows.
    let mut large = request(&file, 3);
    large["lowrank"]["memory_budget"] = json!("1MiB");
    let job = client.wait(&client.job(&large), |job| status(job) == "failed");
    let message = job["error"]["message"].as_str().expect("a message");
    assert!(message.contains("there are 1.0 MiB"), "{message}");
}

#[test]
fn what_a_request_shows_is_refused_at_once() {
    let place = tempfile::tempdir().expect("a folder");
    let server = Running::start(options(Some(place.path())));
    let client = &server.client;
    let file = client.file("rows.jsonl", &rows(4));
    for (change, code, param) in [
        (json!({"model": "none"}), "model_not_found", "model"),
        (
            json!({"training_file": "file-none"}),
            "file_not_found",
            "training_file",
        ),
        (
            json!({"validation_file": "../x"}),
            "file_not_found",
            "validation_file",
        ),
        (
            json!({"lowrank": {"lora_alfa": 1}}),
            "unknown_parameter",
            "lowrank.lora_alfa",
        ),
        (json!({"sufix": "x"}), "unknown_parameter", "sufix"),
        (json!({"suffix": "x".repeat(65)}), "invalid_value", "suffix"),
        (json!({"seed": -1}), "invalid_value", "seed"),
    ] {
        let mut wanted = request(&file, 3);
        for (key, value) in change.as_object().expect("an object") {
            wanted[key] = value.clone();
        }
        let (status_of, answer) = client.post("/v1/fine_tuning/jobs", &wanted);
        assert!(status_of == 400 || status_of == 404, "{answer}");
        assert_eq!(
            (&answer["error"]["code"], &answer["error"]["param"]),
            (&json!(code), &json!(param)),
            "{answer}"
        );
    }
    for path in [
        "",
        "?limit=0",
        "?limit=101",
        "?limit=x",
        "?after=ftjob-none",
        "?nothing=1",
    ] {
        let (status, _) = client.get(&format!("/v1/fine_tuning/jobs{path}"));
        assert_eq!(status, if path.is_empty() { 200 } else { 400 }, "{path}");
    }
}

#[test]
fn jobs_need_a_folder_and_the_admin_key() {
    let server = Running::start(options(None));
    let (status, error) = server.client.get("/v1/fine_tuning/jobs");
    assert_eq!(
        (status, &error["error"]["code"]),
        (400, &json!("jobs_unavailable"))
    );
    assert!(
        error["error"]["message"]
            .as_str()
            .expect("a message")
            .contains("--adapter-dir")
    );
    drop(server);
    let place = tempfile::tempdir().expect("a folder");
    let mut with_keys = options(Some(place.path()));
    with_keys.api_keys = vec!["user".to_owned()];
    with_keys.admin_key = Some("root".to_owned());
    let server = Running::start(with_keys);
    let paths = [
        "/v1/files",
        "/v1/files/x",
        "/v1/fine_tuning/jobs",
        "/v1/fine_tuning/jobs/x/events?stream=true",
    ];
    for path in paths {
        assert_eq!(server.client.get(path).0, 401, "{path}");
        assert_eq!(server.client.with_key("user").get(path).0, 403, "{path}");
    }
    assert_eq!(
        server.client.with_key("user").upload("a.jsonl", &rows(1)).0,
        403
    );
    assert_eq!(server.client.with_key("root").get("/v1/files").0, 200);
    // Another server does not start with the same folder.
    let base = Base::load(BUILTIN, DType::F32).expect("the built-in model");
    let started = serve(base, None, options(Some(place.path())), |_| {}, || true);
    let error = started.expect_err("it is in use").to_string();
    assert!(error.contains("another server"), "{error}");
}
