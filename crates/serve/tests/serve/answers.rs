//! The forms of answers: what streams come to, what is counted, where texts end.

use serde_json::{Value, json};

use super::gather;
use super::house::{BASE, House, Shelf, greedy, long_prompt, text_of};

fn chat(content: &str) -> Value {
    json!({"model": BASE, "messages": [{"role": "user", "content": content}], "max_tokens": 12, "seed": 4})
}

fn complete(house: &House, body: &Value) -> Value {
    house.client.post("/v1/completions", body).ok()
}

#[test]
fn a_stream_comes_to_the_same_as_an_answer_without_one() {
    let house = House::open(&Shelf::new());
    for (path, mut body) in [
        ("/v1/chat/completions", chat("Stream")),
        ("/v1/completions", greedy(BASE, "Stream")),
    ] {
        body["n"] = json!(3);
        body["temperature"] = json!(0.8);
        body["seed"] = json!(7);
        let whole = house.client.post(path, &body).ok();
        body["stream"] = true.into();
        let stream = house.client.open(path, &body);
        assert_eq!(
            stream.header("content-type"),
            Some("text/event-stream; charset=utf-8")
        );
        let events = stream.all();
        assert!(events.iter().all(|event| event.get("usage").is_none()));
        assert_eq!(
            gather::choices(&events),
            *whole["choices"].as_array().expect("choices")
        );
        let id = &events[0]["id"];
        assert!(
            events
                .iter()
                .all(|event| event["id"] == *id && event["model"] == BASE)
        );
        body["stream_options"] = json!({"include_usage": true});
        let mut events = house.client.open(path, &body).all();
        let last = events.pop().expect("the usage");
        assert_eq!(last["choices"], json!([]));
        assert!(events.iter().all(|event| event["usage"].is_null()));
        for name in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(last["usage"][name], whole["usage"][name], "{name}");
        }
    }
}

#[test]
fn usage_counts_a_prompt_once_and_every_choice() {
    let house = House::open(&Shelf::new());
    let mut ask = greedy(BASE, "Count");
    let one = complete(&house, &ask);
    let prompt = one["usage"]["prompt_tokens"].as_u64().expect("a number");
    let tokens = house
        .client
        .post("/tokenize", &json!({"prompt": "Count"}))
        .ok();
    assert_eq!(json!(prompt), tokens["count"]);
    ask["n"] = json!(4);
    let four = complete(&house, &ask);
    let expected = json!({"prompt_tokens": prompt, "completion_tokens": 48, "total_tokens": prompt + 48,
        "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(four["usage"], expected);
    ask["prompt"] = json!(["Count", "Count"]);
    let both = complete(&house, &ask);
    assert_eq!(both["usage"]["prompt_tokens"], json!(2 * prompt));
    let indices: Vec<u64> = both["choices"]
        .as_array()
        .expect("choices")
        .iter()
        .filter_map(|c| c["index"].as_u64())
        .collect();
    assert_eq!(indices, (0..8).collect::<Vec<_>>());
}

#[test]
fn cached_tokens_are_whole_blocks_of_the_common_beginning() {
    let house = House::open(&Shelf::new());
    let cached = |prompt: &[u32]| {
        let mut ask = greedy(BASE, "");
        ask["prompt"] = json!(prompt);
        complete(&house, &ask)["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .expect("a number")
    };
    let ids: Vec<u32> = (0..400).map(|at| 300 + at * at % 700).collect();
    assert_eq!(cached(&ids[..300]), 0);
    assert_eq!(cached(&ids[..300]), 256);
    assert_eq!(cached(&ids[..200]), 128);
    // A last token is always left to read.
    assert_eq!(cached(&ids[..256]), 128);
    assert_eq!(cached(&ids[..257]), 256);
    assert_eq!(cached(&ids[1..300]), 0);
    assert_eq!(cached(&[&ids[..130], &[7, 8, 9][..]].concat()), 128);
    // Choices of one prompt count what the first of them found.
    let mut ask = greedy(BASE, &long_prompt("Choices", 200));
    ask["n"] = json!(4);
    assert_eq!(
        complete(&house, &ask)["usage"]["prompt_tokens_details"]["cached_tokens"],
        0
    );
    assert!(
        complete(&house, &ask)["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64()
            >= Some(128)
    );
}

#[test]
fn a_text_ends_before_its_stop_wherever_that_lies() {
    let house = House::open(&Shelf::new());
    let mut ask = greedy(BASE, "A story about");
    ask["max_tokens"] = json!(40);
    let whole = text_of(&complete(&house, &ask));
    // Any part of the text may be the stop: inside of one token or over several.
    for (from, to) in [(0, 1), (1, 3), (3, 4), (5, 11), (8, 20), (2, 14)] {
        let Some(stop) = whole.get(from..to) else {
            continue;
        };
        let first = whole.find(stop).expect("it is there");
        ask["stop"] = json!([stop, "never in there"]);
        let answer = complete(&house, &ask);
        assert_eq!(text_of(&answer), whole[..first], "{stop:?}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        ask["stream"] = true.into();
        let events = house.client.open("/v1/completions", &ask).all();
        assert_eq!(
            gather::choices(&events),
            *answer["choices"].as_array().expect("choices")
        );
        ask["stream"] = false.into();
    }
    ask["stop"] = json!(null);
    let answer = complete(&house, &ask);
    assert_eq!(
        (
            text_of(&answer),
            answer["choices"][0]["finish_reason"].clone()
        ),
        (whole, json!("length"))
    );
}

#[test]
fn log_probabilities_say_where_their_tokens_stand() {
    let house = House::open(&Shelf::new());
    for prompt in ["A plain text", "漢字 and 😀 café"] {
        let mut ask = greedy(BASE, prompt);
        ask["logprobs"] = json!(2);
        ask["echo"] = true.into();
        let answer = complete(&house, &ask);
        let (text, all) = (text_of(&answer), &answer["choices"][0]["logprobs"]);
        assert!(text.starts_with(prompt), "{text}");
        let list = |name: &str| {
            all[name]
                .as_array()
                .unwrap_or_else(|| panic!("{name} in {all}"))
                .clone()
        };
        let (tokens, offsets) = (list("tokens"), list("text_offset"));
        let usage = &answer["usage"];
        assert_eq!(json!(tokens.len()), usage["total_tokens"]);
        let offsets: Vec<usize> = offsets
            .iter()
            .map(|at| at.as_u64().expect("a number") as usize)
            .collect();
        assert!(offsets.is_sorted() && offsets[0] == 0, "{offsets:?}");
        let letters: Vec<char> = text.chars().collect();
        for (at, token) in offsets.iter().zip(&tokens) {
            let token = token.as_str().expect("a text");
            // Parts of characters are shown as bytes, and stand where their character does.
            // Special tokens are no part of the text.
            if !token.contains("\\x") && !token.starts_with("<|") {
                let found: String = letters[*at..].iter().take(token.chars().count()).collect();
                assert_eq!(found, token, "{prompt}");
            }
        }
        let (log_probs, top) = (list("token_logprobs"), list("top_logprobs"));
        assert_eq!((&log_probs[0], &top[0]), (&Value::Null, &Value::Null));
        for ((token, log_prob), top) in tokens.iter().zip(&log_probs).zip(&top).skip(1) {
            let log_prob = log_prob.as_f64().expect("a number");
            assert!(log_prob <= 0.0);
            // The token itself is always among them.
            let top = top.as_object().expect("a map");
            assert!((2..=3).contains(&top.len()), "{top:?}");
            assert_eq!(top[token.as_str().expect("a text")], json!(log_prob));
        }
        // Greedy tokens are the likeliest.
        let made = usage["completion_tokens"].as_u64().expect("a number") as usize;
        for at in tokens.len() - made..tokens.len() {
            let largest = top[at]
                .as_object()
                .expect("a map")
                .values()
                .filter_map(Value::as_f64)
                .fold(f64::MIN, f64::max);
            assert_eq!(log_probs[at], json!(largest));
        }
    }
    let mut ask = chat("Likely");
    ask["logprobs"] = true.into();
    ask["top_logprobs"] = json!(3);
    let answer = house.client.post("/v1/chat/completions", &ask).ok();
    let content = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .expect("a list")
        .clone();
    assert_eq!(json!(content.len()), answer["usage"]["completion_tokens"]);
    assert!(
        content
            .iter()
            .all(|token| token["top_logprobs"].as_array().map(Vec::len) == Some(3))
    );
    let bytes: Vec<u8> = content
        .iter()
        .flat_map(|token| token["bytes"].as_array().expect("bytes").clone())
        .map(|byte| byte.as_u64().expect("a byte") as u8)
        .collect();
    let text = answer["choices"][0]["message"]["content"]
        .as_str()
        .expect("a text");
    assert!(String::from_utf8_lossy(&bytes).starts_with(text));
    ask["logprobs"] = false.into();
    let refused = house.client.post("/v1/chat/completions", &ask);
    assert_eq!(
        (refused.status, refused.json()["error"]["param"].clone()),
        (400, json!("top_logprobs"))
    );
}

#[test]
fn the_token_that_ends_a_text_has_its_log_probability() {
    let house = House::open(&Shelf::new());
    let info = house.client.get("/tokenizer_info").ok();
    let end = house
        .client
        .post("/tokenize", &json!({"prompt": info["eos_token"]}))
        .ok();
    let mut ask = json!({"model": BASE, "prompt": [5, 6, 7], "echo": true, "logprobs": 1, "max_tokens": 1, "temperature": 0});
    ask["logit_bias"] = json!({end["tokens"][0].to_string(): 100});
    for max_tokens in [1, 5] {
        ask["max_tokens"] = json!(max_tokens);
        let answer = complete(&house, &ask);
        let choice = &answer["choices"][0];
        let tokens = choice["logprobs"]["tokens"].as_array().expect("a list");
        assert_eq!(
            (tokens.len(), tokens.last()),
            (4, Some(&info["eos_token"])),
            "{choice}"
        );
        assert_eq!(
            (
                &choice["finish_reason"],
                &answer["usage"]["completion_tokens"]
            ),
            (&json!("stop"), &json!(0))
        );
        assert!(!text_of(&answer).contains("<|"), "{answer}");
        ask["stream"] = true.into();
        let events = house.client.open("/v1/completions", &ask).all();
        assert_eq!(gather::choices(&events), std::slice::from_ref(choice));
        ask["stream"] = false.into();
    }
}

#[test]
fn a_prompt_can_be_scored_without_an_answer() {
    let house = House::open(&Shelf::new());
    let ids: Vec<u32> = (0..150).map(|at| 300 + at * 7 % 900).collect();
    let ask = json!({"model": BASE, "prompt": [ids], "echo": true, "logprobs": 1, "max_tokens": 0});
    let scored = complete(&house, &ask);
    let mut more = ask.clone();
    more["max_tokens"] = json!(1);
    let with_one = complete(&house, &more);
    let of = |answer: &Value| {
        answer["choices"][0]["logprobs"]["token_logprobs"]
            .as_array()
            .expect("a list")
            .clone()
    };
    assert_eq!(of(&scored).len(), 150);
    assert_eq!(of(&scored), of(&with_one)[..150]);
    assert_eq!(scored["usage"]["completion_tokens"], 0);
    // A cache that has the beginning changes nothing.
    assert_eq!(of(&complete(&house, &ask)), of(&scored));
    let refused = json!({"model": BASE, "prompt": "a", "max_tokens": 0});
    assert_eq!(house.client.post("/v1/completions", &refused).status, 400);
}

#[test]
fn an_answer_is_cut_where_the_context_ends() {
    let house = House::open(&Shelf::new());
    let mut ask = greedy(BASE, "Long");
    ask["max_tokens"] = json!(1_000_000);
    let answer = complete(&house, &ask);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["total_tokens"], 512);
    let prompt: Vec<u32> = vec![300; 512];
    let full = json!({"model": BASE, "prompt": prompt, "max_tokens": 1});
    let full = house.client.post("/v1/completions", &full);
    assert_eq!(
        (full.status, full.code()),
        (400, "context_length_exceeded".to_owned())
    );
    // It can be scored all the same.
    let score =
        json!({"model": BASE, "prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": 0});
    assert_eq!(complete(&house, &score)["usage"]["prompt_tokens"], 512);
}

#[test]
fn nulls_are_absent_and_what_openai_ignores_is_counted() {
    let house = House::open(&Shelf::new());
    let plain = complete(&house, &greedy(BASE, "Null"));
    let mut ask = greedy(BASE, "Null");
    for name in [
        "stop",
        "logprobs",
        "suffix",
        "n",
        "best_of",
        "echo",
        "seed",
        "logit_bias",
        "top_p",
        "stream",
        "stream_options",
        "user",
    ] {
        ask[name] = Value::Null;
    }
    assert_eq!(complete(&house, &ask)["choices"], plain["choices"]);
    for (name, value) in [
        ("user", json!("somebody")),
        ("metadata", json!({"a": "b"})),
        ("store", json!(true)),
        ("service_tier", json!("auto")),
    ] {
        ask[name] = value;
    }
    assert_eq!(complete(&house, &ask)["choices"], plain["choices"]);
    let metrics = house.client.get("/metrics").text();
    assert!(
        metrics.contains("lowrank_ignored_parameters_total{name=\"user\"}"),
        "{metrics}"
    );
    // Whole numbers may be written as some languages write them.
    ask["max_tokens"] = json!(12.0);
    ask["n"] = json!(1.0);
    assert_eq!(complete(&house, &ask)["choices"], plain["choices"]);
}

#[test]
fn choices_of_a_seed_are_those_of_the_seeds_behind_it() {
    let house = House::open(&Shelf::new());
    let ask = |seed: i64, n: u64| {
        let body = json!({"model": BASE, "prompt": "Seed", "max_tokens": 10, "seed": seed, "n": n, "temperature": 1.2});
        let answer = complete(&house, &body);
        let choices = answer["choices"].as_array().expect("choices").clone();
        choices
            .into_iter()
            .map(|choice| choice["text"].clone())
            .collect::<Vec<_>>()
    };
    let three = ask(20, 3);
    assert_eq!(three, [ask(20, 1), ask(21, 1), ask(22, 1)].concat());
    assert!(three[0] != three[1] || three[1] != three[2]);
    assert_eq!(ask(-5, 1), ask(-5, 1));
    assert_eq!(ask(i64::MAX, 2).len(), 2);
}

#[test]
fn a_top_p_of_zero_takes_the_likeliest_token() {
    let house = House::open(&Shelf::new());
    let mut ask = greedy(BASE, "Likeliest");
    let greedy = text_of(&complete(&house, &ask));
    ask["temperature"] = json!(1.5);
    ask["top_p"] = json!(0);
    assert_eq!(text_of(&complete(&house, &ask)), greedy);
}

#[test]
fn prompts_come_as_texts_and_as_tokens() {
    let house = House::open(&Shelf::new());
    let ids = house
        .client
        .post("/tokenize", &json!({"prompt": "The same"}))
        .ok()["tokens"]
        .clone();
    let ask = |prompt: Value| {
        let mut body = greedy(BASE, "");
        body["prompt"] = prompt;
        complete(&house, &body)["choices"].clone()
    };
    let of_text = ask(json!("The same"));
    assert_eq!(ask(json!(["The same"])), of_text);
    assert_eq!(ask(ids.clone()), of_text);
    assert_eq!(ask(json!([ids])), of_text);
    let two = ask(json!(["The same", "Another"]));
    assert_eq!(
        (two.as_array().map(Vec::len), &two[0]),
        (Some(2), &of_text[0])
    );
    let text = house
        .client
        .post("/detokenize", &json!({"tokens": ids}))
        .ok();
    assert_eq!(text["prompt"], "The same");
    let info = house.client.get("/tokenizer_info").ok();
    assert!(info["eos_token"].is_string(), "{info}");
    let conversation =
        json!({"messages": [{"role": "user", "content": "Hi"}], "return_token_strs": true});
    let tokens = house.client.post("/tokenize", &conversation).ok();
    assert_eq!(tokens["token_strs"][0], "<|im_start|>");
}

#[test]
fn a_conversation_is_what_its_template_writes() {
    let house = House::open(&Shelf::new());
    let mut ask = chat("Template");
    ask["temperature"] = json!(0);
    let answer = house.client.post("/v1/chat/completions", &ask).ok();
    assert_eq!(answer["object"], "chat.completion");
    let message = &answer["choices"][0]["message"];
    assert_eq!(
        (&message["role"], message.get("tool_calls")),
        (&json!("assistant"), None)
    );
    let written = "<|im_start|>user\nTemplate<|im_end|>\n<|im_start|>assistant\n";
    let text = json!({"model": BASE, "prompt": written, "max_tokens": 12, "temperature": 0});
    assert_eq!(
        complete(&house, &text)["choices"][0]["text"],
        message["content"]
    );
    // Contents in parts, and what clients hand back of an answer.
    ask["messages"] = json!([
        {"role": "user", "content": [{"type": "text", "text": "Template"}]},
        {"role": "assistant", "content": "Yes", "refusal": null, "annotations": [], "audio": null, "function_call": null, "tool_calls": null},
        {"role": "user", "content": "Again", "name": "me"},
    ]);
    assert_eq!(house.client.post("/v1/chat/completions", &ask).status, 200);
    ask["max_completion_tokens"] = json!(2);
    let short = house.client.post("/v1/chat/completions", &ask).ok();
    assert!(short["usage"]["completion_tokens"].as_u64() <= Some(2));
}

#[test]
fn answers_have_the_id_of_their_request() {
    let house = House::open(&Shelf::new());
    let own =
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-request-id: mine-5\r\n\r\n";
    let answer = house.client.raw(own).expect("an answer");
    assert_eq!(answer.header("x-request-id"), Some("mine-5"));
    let (first, second) = (house.client.get("/nowhere"), house.client.get("/health"));
    assert!(first.header("x-request-id").is_some());
    assert_ne!(first.header("x-request-id"), second.header("x-request-id"));
}

#[test]
fn a_slash_at_the_end_changes_nothing() {
    let house = House::open(&Shelf::new());
    assert_eq!(house.client.get("/v1/models/").ok()["object"], "list");
    assert_eq!(
        house
            .client
            .post("/v1/completions/", &greedy(BASE, "Slash"))
            .status,
        200
    );
    assert_eq!(house.client.get("/health/?a=b").status, 200);
}
