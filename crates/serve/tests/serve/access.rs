//! Keys: what is open to whom.

use serde_json::json;

use super::client::Client;
use super::house::{BASE, House, Shelf, endless, greedy};

/// Every route that needs a key.
const CLOSED: [(&str, &str); 16] = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/classify"),
    ("POST", "/classify"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/v1/adapters"),
    ("POST", "/v1/adapters/x/pin"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
];

/// Routes that change what is served.
const OF_ADMINS: [(&str, &str); 4] = [
    ("GET", "/v1/adapters"),
    ("POST", "/v1/adapters/x/pin"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
];

fn status(client: &Client, (method, path): (&str, &str)) -> u16 {
    client.send(method, path, b"{}").status
}

#[test]
fn every_route_needs_the_key_but_health_and_the_page() {
    let shelf = Shelf::new();
    let house = House::with(&shelf, |options| {
        options.api_keys = vec!["secret".to_owned()];
    });
    for route in CLOSED {
        for client in [
            house.client.clone(),
            house.client.with_key("secre"),
            house.client.with_key(""),
        ] {
            let answer = client.send(route.0, route.1, b"{}");
            assert_eq!(answer.status, 401, "{route:?}");
            assert!(["missing_api_key", "invalid_api_key"].contains(&answer.code().as_str()));
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        }
        let with_key = status(&house.client.with_key("secret"), route);
        assert!(![401, 403].contains(&with_key), "{route:?}: {with_key}");
    }
    for path in ["/health", "/ready", "/", "/page.js", "/page.css"] {
        assert_eq!(house.client.get(path).status, 200, "{path}");
    }
    // Every route that the document lists is among those that were tried, so that none is forgotten.
    let document = house.client.with_key("secret").get("/openapi.json").ok();
    for path in document["paths"].as_object().expect("paths").keys() {
        if ["/health", "/ready"].contains(&path.as_str()) || path.starts_with("/v1/f") {
            continue;
        }
        let path = path.replace("{id}", "x").replace("models/x", "models/tiny");
        assert!(CLOSED.iter().any(|(_, known)| *known == path), "{path}");
    }
}

#[test]
fn what_changes_the_server_needs_the_admin_key() {
    let shelf = Shelf::with_loras(1);
    let house = House::with(&shelf, |options| {
        options.api_keys = vec!["user".to_owned(), "other".to_owned()];
        options.admin_key = Some("root".to_owned());
    });
    for route in OF_ADMINS {
        let answer = house.client.with_key("user").send(route.0, route.1, b"{}");
        assert_eq!(
            (answer.status, answer.code()),
            (403, "admin_key_required".to_owned()),
            "{route:?}"
        );
        let admin = status(&house.client.with_key("root"), route);
        assert!(![401, 403].contains(&admin), "{route:?}: {admin}");
    }
    for key in ["user", "other", "root"] {
        let asked = house
            .client
            .with_key(key)
            .post("/v1/completions", &greedy("a0", "Key"));
        assert_eq!(asked.status, 200, "{key}");
    }
    let load = json!({"lora_name": "x", "lora_path": "a0"});
    assert_eq!(
        house
            .client
            .with_key("root")
            .post("/v1/load_lora_adapter", &load)
            .status,
        200
    );
}

#[test]
fn an_admin_key_alone_leaves_questions_open_to_all() {
    let shelf = Shelf::with_loras(1);
    let house = House::with(&shelf, |options| {
        options.admin_key = Some("root".to_owned());
    });
    assert_eq!(
        house
            .client
            .post("/v1/completions", &greedy("a0", "Key"))
            .status,
        200
    );
    assert_eq!(house.load("x", "a0").code(), "admin_key_required");
}

#[test]
fn the_key_comes_in_any_form_of_the_header() {
    let shelf = Shelf::new();
    let house = House::with(&shelf, |options| {
        options.api_keys = vec!["secret".to_owned()];
    });
    for (header, expected) in [
        ("Authorization: Bearer secret", 200),
        ("authorization: bearer secret", 200),
        ("AUTHORIZATION: BEARER  secret ", 200),
        ("Authorization: secret", 401),
        ("Authorization: Basic secret", 401),
        ("Authorization: Bearer", 401),
        ("Authorization: Bearer \u{fffd}", 401),
        ("X-Api-Key: secret", 401),
    ] {
        let request = format!(
            "GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{header}\r\n\r\n"
        );
        let answer = house.client.raw(request.as_bytes()).expect("an answer");
        assert_eq!(answer.status, expected, "{header}");
    }
}

#[test]
fn a_key_has_so_many_requests_under_way() {
    let shelf = Shelf::new();
    let house = House::with(&shelf, |options| {
        options.api_keys = vec!["one".to_owned(), "two".to_owned()];
        options.caps.requests_per_key = 2;
    });
    let (one, two) = (house.client.with_key("one"), house.client.with_key("two"));
    let open = || {
        let mut stream = one.open("/v1/completions", &endless(BASE, "Limit"));
        stream.next().expect("it runs");
        stream
    };
    let (first, second) = (open(), open());
    for path in ["/v1/completions", "/v1/chat/completions"] {
        let refused = one.post(path, &greedy(BASE, "Limit"));
        assert_eq!(
            (refused.status, refused.code()),
            (429, "rate_limit_exceeded".to_owned())
        );
        assert!(refused.header("retry-after").is_some());
    }
    assert_eq!(
        two.post("/v1/completions", &greedy(BASE, "Limit")).status,
        200
    );
    drop(first);
    // Whoever leaves makes room.
    house.until("there is room", |_| {
        one.post("/v1/completions", &greedy(BASE, "Limit")).status == 200
    });
    drop(second);
    // So does one that fails.
    for _ in 0..5 {
        assert_eq!(
            one.post("/v1/completions", &json!({"prompt": 1})).status,
            400
        );
    }
    house.until("there is room", |_| {
        one.post("/v1/completions", &greedy(BASE, "Limit")).status == 200
    });
}

#[test]
fn other_origins_get_no_leave() {
    let shelf = Shelf::new();
    let house = House::open(&shelf);
    let asked = b"OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\norigin: http://evil.example\r\n\
        access-control-request-method: POST\r\n\r\n";
    let answer = house.client.raw(asked).expect("an answer");
    assert_eq!(
        (answer.status, answer.code()),
        (403, "forbidden_origin".to_owned())
    );
    assert_eq!(answer.header("access-control-allow-origin"), None);
}
