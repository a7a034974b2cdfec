//! What is wrong with files: adapters that cannot be used, paths that lead away, and the registry over restarts.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::house::{BASE, House, Kind, Shelf, edit_config, greedy};

const WEIGHTS: &str = "adapter_model.safetensors";

/// Damages an adapter in a way of its own.
type Damage = fn(&Path);

/// Ways to damage an adapter.
const DAMAGES: [(&str, Damage); 10] = [
    ("no-config", |at| {
        fs::remove_file(at.join("adapter_config.json")).expect("it was there");
    }),
    ("no-weights", |at| {
        fs::remove_file(at.join(WEIGHTS)).expect("it was there");
    }),
    ("garbage", |at| {
        fs::write(at.join(WEIGHTS), b"garbage").expect("written");
    }),
    ("cut", |at| {
        let bytes = fs::read(at.join(WEIGHTS)).expect("read");
        fs::write(at.join(WEIGHTS), &bytes[..bytes.len() / 2]).expect("written");
    }),
    ("long-header", |at| {
        fs::write(at.join(WEIGHTS), [0xff; 64]).expect("written");
    }),
    ("not-json", |at| {
        fs::write(at.join("adapter_config.json"), b"{\"peft_type\": ").expect("written");
    }),
    ("other-method", |at| {
        edit_config(at, |config| config["peft_type"] = "POLY".into());
    }),
    ("other-rank", |at| {
        edit_config(at, |config| config["r"] = 5.into());
    }),
    ("other-targets", |at| {
        edit_config(at, |config| config["target_modules"] = json!(["o_proj"]));
    }),
    ("not-finite", |at| {
        let mut bytes = fs::read(at.join(WEIGHTS)).expect("read");
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        fs::write(at.join(WEIGHTS), bytes).expect("written");
    }),
];

#[test]
fn a_bad_adapter_is_refused_and_nobody_else_notices() {
    let shelf = Shelf::with_loras(1);
    let house = House::open(&shelf);
    let good = house.greedy("a0", "Good");
    for (name, damage) in DAMAGES {
        shelf.copy("a0", name);
        damage(&shelf.path(name));
        let answer = house.load("x", name);
        assert!(
            (400..500).contains(&answer.status),
            "{name}: {}",
            answer.text()
        );
        let code = answer.code();
        assert!(
            ["invalid_lora_adapter", "lora_adapter_not_found"].contains(&code.as_str()),
            "{name}: {code}"
        );
        let asked = house.client.post("/v1/completions", &greedy(name, "Bad"));
        assert!(
            (400..500).contains(&asked.status),
            "{name}: {}",
            asked.text()
        );
        assert_eq!(house.greedy("a0", "Good"), good, "{name}");
        assert_eq!(house.adapter("x"), Value::Null, "{name} leaves a trace");
    }
    // Nor does one that is bad from the start keep a server from starting with the others of the folder.
    house.close();
    let again = House::open(&shelf);
    assert_eq!(again.greedy("a0", "Good"), good);
    let listed = again.client.get("/v1/models").ok();
    let listed = listed["data"].as_array().expect("a list");
    assert!(listed.iter().all(|model| model["id"] != "x"), "{listed:?}");
}

#[test]
fn an_error_of_a_bad_adapter_tells_no_path_of_the_server() {
    let shelf = Shelf::with_loras(1);
    let house = House::open(&shelf);
    let folder = shelf.path("").display().to_string();
    for (name, damage) in DAMAGES {
        shelf.copy("a0", name);
        damage(&shelf.path(name));
        let asked = house.client.post("/v1/completions", &greedy(name, "Bad"));
        assert!(
            !asked.text().contains(folder.trim_end_matches('/')),
            "{name}: {}",
            asked.text()
        );
    }
}

#[test]
fn an_adapter_that_does_nothing_is_refused() {
    let shelf = Shelf::with_loras(1);
    shelf.copy("a0", "zero");
    let path = shelf.path("zero").join(WEIGHTS);
    let mut bytes = fs::read(&path).expect("read");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight")) as usize;
    bytes[8 + header..].fill(0);
    fs::write(&path, bytes).expect("written");
    // Targets that no module of the model has, and no tensors.
    shelf.copy("a0", "nowhere");
    edit_config(&shelf.path("nowhere"), |config| {
        config["target_modules"] = json!(["nothing_proj"]);
    });
    let header = b"{}      ";
    let empty = [&(header.len() as u64).to_le_bytes()[..], header].concat();
    fs::write(shelf.path("nowhere").join(WEIGHTS), empty).expect("written");
    // Factors that are all one.
    shelf.add("ones", Kind::Ia3, 3);
    let path = shelf.path("ones").join(WEIGHTS);
    let mut bytes = fs::read(&path).expect("read");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight")) as usize;
    for number in bytes[8 + header..].chunks_exact_mut(4) {
        number.copy_from_slice(&1.0_f32.to_le_bytes());
    }
    fs::write(&path, bytes).expect("written");
    let house = House::open(&shelf);
    for name in ["zero", "nowhere", "ones"] {
        let asked = house
            .client
            .post("/v1/completions", &greedy(name, "Nothing"));
        let code = asked.code();
        assert!(
            ["adapter_does_nothing", "invalid_lora_adapter"].contains(&code.as_str()),
            "{name}: {}",
            asked.text()
        );
        assert_eq!(house.load("x", name).code(), code);
        let started = House::try_with(&shelf, |options| {
            options.adapters = vec![("it".to_owned(), shelf.path(name))];
        });
        let error = started.err().expect("it cannot start").to_string();
        assert!(error.contains("it"), "{error}");
    }
}

#[test]
fn an_adapter_of_another_base_is_refused() {
    let shelf = Shelf::with_loras(1);
    let path = shelf.path("a0").join(WEIGHTS);
    let mut bytes = fs::read(&path).expect("read");
    let key = b"lowrank.base_fingerprint";
    let at = bytes
        .windows(key.len())
        .position(|part| part == key)
        .expect("it is recorded");
    let digit = &mut bytes[at + key.len() + 4];
    *digit = if *digit == b'0' { b'1' } else { b'0' };
    fs::write(&path, bytes).expect("written");
    let house = House::open(&shelf);
    let asked = house.client.post("/v1/completions", &greedy("a0", "Other"));
    assert_eq!(asked.code(), "adapter_of_other_base");
}

#[test]
fn a_missing_adapter_at_the_start_is_an_error() {
    let shelf = Shelf::with_loras(1);
    let started = House::try_with(&shelf, |options| {
        options.adapters = vec![
            ("there".to_owned(), shelf.path("a0")),
            ("missing".to_owned(), shelf.path("nowhere")),
        ];
    });
    let error = started.err().expect("it cannot start").to_string();
    assert!(error.contains("missing"), "{error}");
}

#[test]
fn an_unknown_adapter_is_never_answered_by_the_base() {
    let shelf = Shelf::with_loras(1);
    let house = House::open(&shelf);
    for name in ["nobody", "A0", "a0 ", "tiny/", "", "base"] {
        let asked = house.client.post("/v1/completions", &greedy(name, "Who"));
        assert_eq!(
            (asked.status, asked.code()),
            (404, "model_not_found".to_owned()),
            "{name:?}"
        );
        for stream in [false, true] {
            let chat = json!({"model": name, "messages": [{"role": "user", "content": "Who"}], "stream": stream});
            let asked = house.client.post("/v1/chat/completions", &chat);
            assert_eq!(
                (asked.status, asked.code()),
                (404, "model_not_found".to_owned()),
                "{name:?}"
            );
        }
    }
}

#[test]
fn no_name_and_no_path_leaves_the_folder() {
    let outside = Shelf::with_loras(1);
    let shelf = Shelf::with_loras(1);
    let away = outside.path("a0").display().to_string();
    #[cfg(unix)]
    {
        use std::os::unix::fs::symlink;
        symlink(outside.path("a0"), shelf.path("link")).expect("a link");
        symlink(outside.path(""), shelf.path("links")).expect("a link");
        fs::create_dir(shelf.path("inner")).expect("a folder");
        fs::copy(
            shelf.path("a0").join("adapter_config.json"),
            shelf.path("inner").join("adapter_config.json"),
        )
        .expect("a copy");
        symlink(
            outside.path("a0").join(WEIGHTS),
            shelf.path("inner").join(WEIGHTS),
        )
        .expect("a link");
    }
    let house = House::open(&shelf);
    let last = outside.path("");
    let last = last
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    let up = format!("../{last}/a0");
    for path in [
        up.as_str(),
        away.as_str(),
        "a0/../../etc",
        "..",
        "/etc",
        "link",
        "links/a0",
        "inner",
        "/",
        "",
    ] {
        let answer = house.load("x", path);
        let code = answer.code();
        assert!(
            [
                "adapter_path_forbidden",
                "lora_adapter_not_found",
                "invalid_lora_adapter",
                "invalid_value"
            ]
            .contains(&code.as_str()),
            "{path}: {}",
            answer.text()
        );
        assert_eq!(house.adapter("x"), Value::Null, "{path}");
    }
    assert_eq!(house.load("x", &up).code(), "adapter_path_forbidden");
    assert_eq!(house.load("x", &away).code(), "adapter_path_forbidden");
    #[cfg(unix)]
    for path in ["link", "links/a0", "inner"] {
        assert_eq!(
            house.load("x", path).code(),
            "adapter_path_forbidden",
            "{path}"
        );
        let asked = house.client.post("/v1/completions", &greedy(path, "Away"));
        assert!(
            [403, 404].contains(&asked.status),
            "{path}: {}",
            asked.text()
        );
    }
    for name in [
        "../a0", "..", ".", "a0/", "./a0", "a0/../a0", "links/a0", "%2e%2e", "a\u{0}0", "\\a0",
        ".hidden",
    ] {
        let asked = house.client.post("/v1/completions", &greedy(name, "Away"));
        assert_eq!(asked.status, 404, "{name}: {}", asked.text());
        let loaded = house.load(name, "a0");
        assert_eq!(loaded.status, 400, "{name}: {}", loaded.text());
    }
    assert_eq!(house.load(BASE, "a0").code(), "invalid_value");
    // The folder itself may lie behind a link, and its own path may be given as a whole.
    assert_eq!(
        house
            .load("x", &shelf.path("a0").display().to_string())
            .status,
        200
    );
}

/// A folder that is replaced by a link after it was loaded is not followed when its values are read again.
#[cfg(unix)]
#[test]
fn a_folder_that_became_a_link_is_not_followed() {
    let outside = Shelf::with_loras(2);
    let shelf = Shelf::with_loras(1);
    {
        let house = House::open(&shelf);
        house.load("x", "a0");
        house.close();
    }
    fs::remove_dir_all(shelf.path("a0")).expect("it is removed");
    std::os::unix::fs::symlink(outside.path("a1"), shelf.path("a0")).expect("a link");
    let house = House::open(&shelf);
    let asked = house.client.post("/v1/completions", &greedy("x", "Link"));
    assert!((400..500).contains(&asked.status), "{}", asked.text());
}

#[test]
fn a_server_without_a_folder_loads_nothing_while_it_runs() {
    let shelf = Shelf::with_loras(1);
    let house = House::with(&shelf, |options| options.adapter_dir = None);
    assert_eq!(house.load("x", "a0").code(), "adapter_path_forbidden");
    let asked = house.client.post("/v1/completions", &greedy("a0", "None"));
    assert_eq!(asked.code(), "model_not_found");
}

#[test]
fn what_was_loaded_at_run_time_is_there_after_a_restart() {
    let shelf = Shelf::with_loras(3);
    let (text, created) = {
        let house = House::open(&shelf);
        house.load("x", "a0");
        house.reload("x", "a1");
        house.load("gone", "a2");
        house.unload("gone");
        house
            .client
            .post("/v1/adapters/x/pin", &json!({"pinned": true}))
            .ok();
        let seen = (
            house.greedy("x", "Again"),
            house.adapter("x")["created"].clone(),
        );
        house.close();
        seen
    };
    for _ in 0..2 {
        let house = House::open(&shelf);
        let about = house.adapter("x");
        assert_eq!(
            (&about["generation"], &about["pinned"]),
            (&json!(2), &json!(true)),
            "{about}"
        );
        assert_eq!(house.greedy("x", "Again"), text);
        let about = house.adapter("x");
        // The same values are the same generation.
        assert_eq!(
            (&about["generation"], &about["created"]),
            (&json!(2), &created),
            "{about}"
        );
        assert_eq!(house.adapter("gone"), Value::Null);
        house.close();
    }
    // Other values under the same path are a new one.
    shelf.copy("a2", "a1");
    let house = House::open(&shelf);
    house.greedy("x", "Again");
    assert_eq!(house.adapter("x")["generation"], 3);
}

#[test]
fn an_adapter_whose_files_are_gone_keeps_no_server_from_starting() {
    let shelf = Shelf::with_loras(2);
    {
        let house = House::open(&shelf);
        house.load("x", "a0");
        house.load("y", "a1");
        house.close();
    }
    fs::remove_dir_all(shelf.path("a0")).expect("it is removed");
    let house = House::open(&shelf);
    house.greedy("y", "Gone");
    let asked = house.client.post("/v1/completions", &greedy("x", "Gone"));
    assert!((400..500).contains(&asked.status), "{}", asked.text());
    assert_eq!(
        (asked.status, asked.code()),
        (404, "model_not_found".to_owned())
    );
    assert_eq!(house.adapter("x"), Value::Null);
}

#[test]
fn a_registry_that_cannot_be_written_changes_nothing() {
    let shelf = Shelf::with_loras(2);
    let house = House::open(&shelf);
    house.load("x", "a0");
    let before = house.adapter("x");
    // A file cannot take the place of a folder that is not empty.
    let registry = shelf.path(".lowrank-registry.json");
    fs::remove_file(&registry).expect("it was written");
    fs::create_dir_all(registry.join("full")).expect("a folder");
    let asked = [
        house.load("y", "a1"),
        house.reload("x", "a1"),
        house.unload("x"),
        house.client.post("/v1/adapters/x/pin", &json!({})),
    ];
    for answer in asked {
        assert_eq!(
            (answer.status, answer.code()),
            (500, "storage_failed".to_owned())
        );
        assert!(
            !answer.text().contains("registry.json"),
            "{}",
            answer.text()
        );
    }
    assert_eq!(house.adapter("y"), Value::Null);
    let after = house.adapter("x");
    for key in ["generation", "created", "resident", "pinned"] {
        assert_eq!(before[key], after[key], "{key}");
    }
    fs::remove_dir_all(&registry).expect("it is removed");
    assert_eq!(house.load("y", "a1").status, 200);
}

#[test]
fn a_registry_that_is_damaged_is_a_clear_error() {
    let shelf = Shelf::with_loras(1);
    House::open(&shelf).load("x", "a0");
    let path = shelf.path(".lowrank-registry.json");
    let whole = fs::read_to_string(&path).expect("a registry");
    for torn in [
        "",
        "{",
        &whole[..whole.len() / 2],
        "[]",
        "{\"version\": 1}",
        "{\"version\": 99, \"adapters\": {}}",
        "\u{0}",
    ] {
        fs::write(&path, torn).expect("written");
        let error = House::try_with(&shelf, |_| {}).err();
        let error = error
            .unwrap_or_else(|| panic!("it starts with {torn:?}"))
            .to_string();
        assert!(
            error.contains(".lowrank-registry.json") && error.contains("move it away"),
            "{error}"
        );
    }
    // One that leads out of the folder was not written by this program.
    let away = json!({"version": 1, "adapters": {"x": {"path": "../..", "generation": 1}}});
    fs::write(&path, away.to_string()).expect("written");
    if let Ok(house) = House::try_with(&shelf, |_| {}) {
        let asked = house.client.post("/v1/completions", &greedy("x", "Away"));
        assert!((400..500).contains(&asked.status), "{}", asked.text());
    }
    fs::write(&path, whole).expect("written");
    House::open(&shelf).greedy("x", "Whole");
}

/// Loading a folder that can never be read to its end: a pipe that nobody writes to.
#[cfg(unix)]
#[test]
fn a_load_that_takes_for_ever_holds_up_nobody_else() {
    let shelf = Shelf::with_loras(1);
    shelf.copy("a0", "slow");
    shelf.add("other", Kind::Lora(4), 9);
    let pipe = shelf.path("slow").join(WEIGHTS);
    fs::remove_file(&pipe).expect("it was there");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.expect("mkfifo runs").success());
    let house = House::open(&shelf);
    let before = house.greedy("a0", "Slow");
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            house
                .client
                .post("/v1/completions", &greedy("slow", "Slow"))
        });
        let loading = scope.spawn(|| house.load("x", "slow"));
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert_eq!(house.greedy("a0", "Slow"), before);
        assert!(!house.greedy(BASE, "Slow").is_empty());
        assert_eq!(house.load("y", "other").status, 200);
        assert_eq!(house.unload("y").status, 200);
        assert_eq!(house.client.get("/v1/models").status, 200);
        // Then the pipe ends, and both see that it was no adapter.
        while !(asked.is_finished() && loading.is_finished()) {
            use std::os::unix::fs::OpenOptionsExt as _;
            let nonblocking = 0o4000;
            drop(
                fs::OpenOptions::new()
                    .write(true)
                    .custom_flags(nonblocking)
                    .open(&pipe),
            );
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(asked.join().expect("an answer").status >= 400);
        assert!(loading.join().expect("an answer").status >= 400);
    });
}
