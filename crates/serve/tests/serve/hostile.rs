//! What no client should send: it is refused with an error of the client's, never with one of the server's, and never hangs.

use std::io::Write as _;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::house::{BASE, House, Shelf};

const ROUTES: [&str; 9] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/classify",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/adapters/x/pin",
    "/tokenize",
    "/detokenize",
];

/// A server whose answers are short.
fn open() -> (Shelf, House) {
    let shelf = Shelf::with_loras(1);
    let house = House::with(&shelf, |options| options.caps.body = 1 << 20);
    (shelf, house)
}

#[track_caller]
fn refused(house: &House, path: &str, body: &[u8]) {
    let answer = house.client.send("POST", path, body);
    let shown = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
    assert!(
        (400..500).contains(&answer.status),
        "{path} {shown}: {}",
        answer.text()
    );
    answer.code();
}

#[test]
fn bodies_that_are_no_json_are_refused() {
    let (_shelf, house) = open();
    let deep =
        |open: &str, close: &str| (open.repeat(100_000) + &close.repeat(100_000)).into_bytes();
    let bodies: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"{".to_vec(),
        b"null".to_vec(),
        b"[]".to_vec(),
        b"\"text\"".to_vec(),
        b"{\"model\": \"tiny\",}".to_vec(),
        b"{\"prompt\": \"\xff\xfe\"}".to_vec(),
        b"{\"prompt\": \"\\ud800\"}".to_vec(),
        b"\xef\xbb\xbf{}".to_vec(),
        b"{\"prompt\": 1e999}".to_vec(),
        [&b"{\"seed\": "[..], &[b'9'; 5000], b"}"].concat(),
        deep("[", "]"),
        deep("{\"a\":", "}"),
        [&b"{\"messages\": "[..], &deep("[", "]"), b"}"].concat(),
        vec![0; 1000],
        vec![b' '; 100_000],
    ];
    for path in ROUTES {
        for body in &bodies {
            refused(&house, path, body);
        }
    }
    house.greedy(BASE, "Still");
}

#[test]
fn a_body_that_is_too_large_is_refused() {
    let (_shelf, house) = open();
    let body = json!({"model": BASE, "prompt": "a".repeat(1 << 20)}).to_string();
    for path in ROUTES {
        let answer = house.client.send("POST", path, body.as_bytes());
        assert_eq!(
            (answer.status, answer.code()),
            (413, "body_too_large".to_owned()),
            "{path}"
        );
    }
    // One that says that it is larger than it is.
    let request = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 99999999999\r\n\r\n{}";
    let answer = house.client.raw(request.as_bytes()).expect("an answer");
    assert!((400..500).contains(&answer.status), "{}", answer.status);
}

/// A value of each type that JSON has, and a few that programs get wrong.
fn values() -> Vec<Value> {
    vec![
        json!(true),
        json!(0),
        json!(-1),
        json!(1.5),
        json!(1e300),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(""),
        json!("text"),
        json!("\u{0}"),
        json!([]),
        json!([null]),
        json!([[]]),
        json!([{}]),
        json!([-1]),
        json!([1e300]),
        json!(["a", 1]),
        json!({}),
        json!({"a": null}),
        json!({"type": "function"}),
        json!({"type": "json_schema", "json_schema": {"schema": 5}}),
        json!({"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "("}}}),
        json!({"99999999999": 1}),
        json!([{"type": "function", "function": {"name": "f", "parameters": []}}]),
        json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        json!([{"role": "user", "content": {"a": 1}}]),
        json!([{"role": 5, "content": "a"}]),
        json!([{"id": 1}]),
        json!([{"id": "tiny"}]),
    ]
}

/// The least that a body of a route needs.
fn least(path: &str) -> Value {
    match path {
        "/v1/chat/completions" => {
            json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1})
        }
        "/v1/completions" => json!({"prompt": "a", "max_tokens": 1}),
        "/v1/load_lora_adapter" => {
            json!({"lora_name": "x", "lora_path": "a0", "load_inplace": true})
        }
        "/v1/unload_lora_adapter" => json!({"lora_name": "nobody"}),
        "/tokenize" => json!({"prompt": "a"}),
        "/detokenize" => json!({"tokens": [5]}),
        _ => json!({}),
    }
}

#[test]
fn a_wrong_value_in_any_field_is_an_error_that_names_it() {
    let (_shelf, house) = open();
    let document = house.client.get("/openapi.json").ok();
    let mut tried = 0;
    for (path, operations) in document["paths"].as_object().expect("paths") {
        let schema = &operations["post"]["requestBody"]["content"]["application/json"]["schema"];
        let Some(fields) = schema["properties"].as_object() else {
            continue;
        };
        let path = path.replace("{id}", "x");
        if path.starts_with("/v1/f") {
            continue;
        }
        for name in fields.keys() {
            for value in values() {
                let mut body = least(&path);
                body[name] = value.clone();
                if name == "stream" || name == "n" {
                    body["max_tokens"] = json!(1);
                }
                let answer = house.client.post(&path, &body);
                assert!(
                    answer.status < 500,
                    "{path} {name}={value}: {}",
                    answer.text()
                );
                if answer.status >= 400 {
                    answer.code();
                }
                if answer.status == 400 {
                    let error = &answer.json()["error"];
                    let says = error["message"].to_string() + &error["param"].to_string();
                    assert!(
                        says.contains(name.as_str())
                            || !error["param"].is_null()
                            || path.contains("pin")
                            // A language model gives no vectors and no labels, whatever the fields say.
                            || error["code"] == "unsupported_by_model",
                        "{path} {name}={value}: {error}"
                    );
                }
                tried += 1;
            }
        }
    }
    assert!(tried > 1500, "{tried}");
    house.greedy(BASE, "Still");
}

#[test]
fn a_field_that_nobody_knows_is_an_error() {
    let (_shelf, house) = open();
    for path in [
        "/v1/chat/completions",
        "/v1/completions",
        "/tokenize",
        "/v1/load_lora_adapter",
    ] {
        let mut body = least(path);
        body["max_token"] = json!(5);
        let answer = house.client.post(path, &body);
        assert_eq!(
            (answer.status, answer.code()),
            (400, "unknown_parameter".to_owned()),
            "{path}"
        );
        assert_eq!(answer.json()["error"]["param"], "max_token");
    }
}

/// Refuses a body with 400 and a message about a field.
#[track_caller]
fn says(house: &House, path: &str, body: &Value, param: &str, part: &str) {
    let answer = house.client.post(path, body);
    assert_eq!(answer.status, 400, "{path} {body}: {}", answer.text());
    let error = &answer.json()["error"];
    assert_eq!(error["param"], param, "{path} {body}: {error}");
    let message = error["message"].as_str().expect("a message");
    assert!(message.contains(part), "{path} {body}: {message}");
}

#[test]
fn errors_tell_the_limits_of_this_server() {
    let shelf = Shelf::with_loras(1);
    let house = House::with(&shelf, |options| options.caps.n = 3);
    let (chat, text) = ("/v1/chat/completions", "/v1/completions");
    for (path, field, value, part) in [
        (chat, "n", json!(0), "from 1 to 3, not 0"),
        (text, "n", json!(4), "from 1 to 3, not 4"),
        (text, "best_of", json!(4), "from 1 to 3, not 4"),
        (chat, "top_logprobs", json!(-1), "from 0 to 20, not -1"),
        (text, "logprobs", json!(21), "from 0 to 20, not 21"),
        (
            chat,
            "max_tokens",
            json!(1e300),
            "from 0 to 9223372036854775807",
        ),
        (
            text,
            "prompt",
            json!(vec!["a"; 25]),
            "prompt has 25 entries, and this server allows 24 at most",
        ),
        (
            text,
            "stop",
            json!(vec!["a"; 17]),
            "stop has 17 entries, and this server allows 16 at most",
        ),
    ] {
        let mut body = least(path);
        body[field] = value;
        says(&house, path, &body, field, part);
    }
    says(
        &house,
        text,
        &json!({"prompt": vec!["a"; 9], "n": 3}),
        "prompt",
        "prompt has 9 entries and n is 3, which makes 27 choices",
    );
    let document = house.client.get("/openapi.json").ok();
    let most = |path: &str, field: &str| {
        let content = &document["paths"][path]["post"]["requestBody"]["content"];
        content["application/json"]["schema"]["properties"][field]["maximum"].clone()
    };
    assert_eq!(
        (most(chat, "n"), most(chat, "top_logprobs")),
        (json!(3), json!(20))
    );
    // Whole numbers may be written as floats.
    let body = json!({"prompt": "a", "max_tokens": 1.0, "n": 2.0, "temperature": 0});
    let answer = house.client.post(text, &body).ok();
    assert_eq!(answer["usage"]["completion_tokens"], 2, "{answer}");
    let mut body = least(chat);
    body["max_tokens"] = json!(1e18);
    body["stop_token_ids"] = json!((0..2000).collect::<Vec<u32>>());
    house.client.post(chat, &body).ok();
}

#[test]
fn ids_beyond_the_vocabulary_are_refused() {
    let (_shelf, house) = open();
    let size = house.client.get("/tokenizer_info").ok()["vocab_size"]
        .as_u64()
        .expect("a number");
    let part = format!("the vocabulary has {size} tokens");
    for path in ["/v1/chat/completions", "/v1/completions"] {
        let mut body = least(path);
        body["logit_bias"] = json!({(size - 1).to_string(): 1});
        body["stop_token_ids"] = json!([size - 1]);
        house.client.post(path, &body).ok();
        body["logit_bias"] = json!({size.to_string(): 1});
        says(&house, path, &body, "logit_bias", &part);
        body = least(path);
        body["stop_token_ids"] = json!([5, size]);
        says(&house, path, &body, "stop_token_ids", &part);
    }
    says(
        &house,
        "/detokenize",
        &json!({"tokens": [99_999]}),
        "tokens",
        &part,
    );
    for (path, mut body) in [
        ("/tokenize", least("/tokenize")),
        ("/detokenize", least("/detokenize")),
    ] {
        for model in [BASE, "a0"] {
            body["model"] = json!(model);
            house.client.post(path, &body).ok();
        }
        body["model"] = json!("nobody");
        let answer = house.client.post(path, &body);
        assert_eq!(
            (answer.status, answer.code()),
            (404, "model_not_found".to_owned()),
            "{path}"
        );
    }
}

#[test]
fn a_part_that_is_no_text_is_refused_in_the_words_of_a_chat() {
    let (_shelf, house) = open();
    let image = json!({"type": "image_url", "image_url": {"url": "data:,"}});
    let body =
        json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, image]}]});
    let part = "the model reads text alone";
    says(&house, "/v1/chat/completions", &body, "messages", part);
}

#[test]
fn parameters_of_a_path_are_checked() {
    let (_shelf, house) = open();
    for (path, param, part) in [
        (
            "/v1/files/x/preview?model=x",
            "model",
            "there is no parameter \"model\" here, only rows",
        ),
        (
            "/v1/files/x/preview?rows=many",
            "rows",
            "rows must be a whole number, not \"many\"",
        ),
        (
            "/v1/files?stream=true",
            "stream",
            "only limit, after, order, purpose",
        ),
        (
            "/v1/fine_tuning/jobs?limit=-1",
            "limit",
            "limit must be a whole number",
        ),
    ] {
        let answer = house.client.get(path);
        assert_eq!(answer.status, 400, "{path}: {}", answer.text());
        let error = &answer.json()["error"];
        assert_eq!(error["param"], param, "{path}: {error}");
        let message = error["message"].as_str().expect("a message");
        assert!(message.contains(part), "{path}: {message}");
    }
}

fn post(headers: &str, body: &str) -> Vec<u8> {
    format!("POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n\r\n{body}")
        .into_bytes()
}

#[test]
fn heads_that_are_no_http_are_refused() {
    let (_shelf, house) = open();
    let long = "a".repeat(1 << 20);
    let many: Vec<String> = (0..2000).map(|at| format!("x-{at}: {at}\r\n")).collect();
    let many = many.concat();
    let heads: Vec<Vec<u8>> = vec![
        b"nonsense\r\n\r\n".to_vec(),
        b"GET\r\n\r\n".to_vec(),
        b"GET / HTTP/9.9\r\n\r\n".to_vec(),
        b"GET /\x00 HTTP/1.1\r\nhost: localhost\r\n\r\n".to_vec(),
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nbad header\r\n\r\n".to_vec(),
        format!("GET /{long} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            .into_bytes(),
        format!("GET / HTTP/1.1\r\nhost: localhost\r\nx-long: {long}\r\nconnection: close\r\n\r\n")
            .into_bytes(),
        format!("GET / HTTP/1.1\r\nhost: localhost\r\n{many}connection: close\r\n\r\n")
            .into_bytes(),
        post("content-length: -1", "{}"),
        post("content-length: 5\r\ncontent-length: 6", "{}"),
        post("transfer-encoding: chunked", "zz\r\n{}\r\n0\r\n\r\n"),
        post("transfer-encoding: chunked", "ffffffffffffffffff\r\n{}"),
        post("transfer-encoding: gzip", "{}"),
        post(
            "content-encoding: gzip\r\ncontent-length: 2\r\nconnection: close",
            "{}",
        ),
    ];
    for head in &heads {
        let shown = String::from_utf8_lossy(&head[..head.len().min(90)]).into_owned();
        if let Some(answer) = house.client.raw(head) {
            assert!(
                (400..500).contains(&answer.status),
                "{shown:?}: {}",
                answer.status
            );
        }
    }
    // What is cut off in the middle.
    for head in [
        b"\r\n\r\n".to_vec(),
        b"GET / HT".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        post("transfer-encoding: chunked", "5\r\n{}"),
        post("content-length: 100", "{"),
    ] {
        if let Some(answer) = house.client.cut(&head) {
            assert!(
                (400..500).contains(&answer.status),
                "{:?}: {}",
                String::from_utf8_lossy(&head),
                answer.status
            );
        }
    }
    house.greedy(BASE, "Still");
}

#[test]
fn paths_that_lead_nowhere_are_refused() {
    let (_shelf, house) = open();
    for path in [
        "/nowhere",
        "/v1",
        "/v1/",
        "//",
        "/../Cargo.toml",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/page.js/../../x",
        "/v1/models/%ff%fe",
        "/v1/models/..%2f..",
        "/v1/adapters/%00/pin",
        "/?a=b&c",
        "/v1/models?x=%",
        "/*",
        "/v1/models/a/b/c",
        "/page.js%00",
    ] {
        let answer = house.client.get(path);
        assert!(answer.status < 500, "{path}: {}", answer.status);
        assert!(!answer.text().contains("root:"), "{path}");
    }
    for method in ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO", "HEAD"] {
        for path in ["/v1/completions", "/v1/models", "/health", "/"] {
            let request =
                format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
            let answer = house.client.raw(request.as_bytes()).expect("an answer");
            let expected = if method == "HEAD" && path != "/v1/completions" {
                200
            } else {
                405
            };
            assert_eq!(answer.status, expected, "{method} {path}");
            if expected == 405 {
                assert!(answer.header("allow").is_some(), "{method} {path}");
            }
        }
    }
    // Names that clients make up do not become metrics.
    let metrics = house.client.get("/metrics").text();
    assert!(
        !metrics.contains("FOO") && !metrics.contains("nowhere"),
        "{metrics}"
    );
}

#[test]
fn a_request_that_asks_for_too_much_is_refused_at_once() {
    let (_shelf, house) = open();
    let begun = Instant::now();
    let prompts = vec!["a"; 50_000];
    for body in [
        json!({"prompt": prompts}),
        json!({"prompt": "a", "n": 17}),
        json!({"prompt": "a", "n": 128}),
        json!({"prompt": ["a", "b", "c", "d", "e", "f", "g", "h", "i"], "n": 16}),
        json!({"prompt": "a", "logprobs": 21}),
        json!({"prompt": "a", "stop": vec!["x"; 17]}),
        json!({"prompt": "a", "stop": "x".repeat(2000)}),
        json!({"prompt": "word ".repeat(150_000)}),
        json!({"prompt": vec![5; 200_000]}),
        json!({"prompt": [4_000_000]}),
        json!({"prompt": []}),
        json!({"prompt": [[]]}),
        json!({"prompt": ["a", 5]}),
        json!({"prompt": "a", "cache_salt": "s".repeat(100_000)}),
    ] {
        let answer = house.client.post("/v1/completions", &body);
        assert_eq!(
            answer.status,
            400,
            "{}: {}",
            answer.text(),
            &body.to_string()[..80.min(body.to_string().len())]
        );
        answer.code();
    }
    // Schemas that grow without end.
    let mut nested = json!({"type": "string"});
    for _ in 0..60 {
        nested =
            json!({"anyOf": [nested.clone(), {"type": "object", "properties": {"a": nested}}]});
        if nested.to_string().len() > 900_000 {
            break;
        }
    }
    for schema in [
        nested,
        json!({"$ref": "#"}),
        json!({"$ref": "http://example.com/x"}),
        json!({"type": "string", "pattern": "(a{1000}){1000}"}),
        json!({"type": "string", "pattern": "(a*)*b"}),
        json!({"type": "array", "minItems": 1_000_000_000, "items": {}}),
        json!({"type": "string", "minLength": 1_000_000_000}),
        json!({"enum": []}),
        json!(false),
        json!({"not": {}}),
    ] {
        let format = json!({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}});
        let body = json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "response_format": format});
        let answer = house.client.post("/v1/chat/completions", &body);
        assert!(answer.status < 500, "{}", answer.text());
    }
    assert!(
        begun.elapsed() < Duration::from_secs(30),
        "{:?}",
        begun.elapsed()
    );
    house.greedy(BASE, "Still");
}

#[test]
fn connections_that_do_nothing_hold_up_nobody() {
    let (_shelf, house) = open();
    let mut idle = Vec::new();
    for at in 0..200 {
        let mut stream = house.client.connect();
        if at % 2 == 0 {
            let part = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{\"prompt\"";
            stream
                .write_all(&part[..part.len() - at % 40])
                .expect("it is sent");
        }
        idle.push(stream);
    }
    house.greedy(BASE, "Still");
    assert_eq!(house.client.get("/health").status, 200);
}
