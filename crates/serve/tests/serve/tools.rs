//! Calls of functions, and answers that follow a schema.

use serde_json::{Value, json};

use super::gather;
use super::house::{BASE, House, Shelf, tool_model};

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "weather", "description": "Of a city", "strict": true, "parameters": {
            "type": "object", "additionalProperties": false, "required": ["city", "unit"],
            "properties": {"city": {"enum": ["Paris", "東京"]}, "unit": {"enum": ["C", "F"]}}}}},
        {"type": "function", "function": {"name": "time", "parameters": {
            "type": "object", "properties": {"zone": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["zone"]}}},
    ])
}

fn chat(choice: &Value) -> Value {
    json!({"model": BASE, "messages": [{"role": "user", "content": "Weather?"}], "tools": tools(), "tool_choice": choice,
        "temperature": 0, "max_tokens": 350, "seed": 3})
}

/// The answer, which must be the same as a stream.
#[track_caller]
fn both(house: &House, body: &Value) -> Value {
    let answer = house.client.post("/v1/chat/completions", body).ok();
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    let events = house.client.open("/v1/chat/completions", &streamed).all();
    assert_eq!(
        gather::choices(&events),
        *answer["choices"].as_array().expect("choices")
    );
    answer["choices"][0].clone()
}

#[test]
fn a_call_that_is_demanded_is_made_in_every_form() {
    for mark in ["<tool_call>", "<|python_tag|>", "[TOOL_CALLS]"] {
        let model = tool_model(mark);
        let house = House::of_model(model.path());
        let named = both(
            &house,
            &chat(&json!({"type": "function", "function": {"name": "weather"}})),
        );
        assert_eq!(named["finish_reason"], "tool_calls", "{mark}: {named}");
        let calls = named["message"]["tool_calls"].as_array().expect("calls");
        assert_eq!(
            (calls.len(), &calls[0]["type"]),
            (1, &json!("function")),
            "{mark}"
        );
        assert_eq!(calls[0]["function"]["name"], "weather");
        assert_eq!(named["message"]["content"], Value::Null, "{mark}: {named}");
        let text = calls[0]["function"]["arguments"].as_str().expect("a text");
        let arguments: Value = serde_json::from_str(text).expect("JSON");
        assert!(
            arguments["city"].is_string() && arguments["unit"].is_string(),
            "{arguments}"
        );
        let required = both(&house, &chat(&json!("required")));
        assert_eq!(
            required["finish_reason"], "tool_calls",
            "{mark}: {required}"
        );
        // The answer can be handed back with what the function said.
        let mut body = chat(&json!("auto"));
        let id = calls[0]["id"].clone();
        assert!(id.as_str().is_some_and(|id| !id.is_empty()));
        let messages = body["messages"].as_array_mut().expect("a list");
        messages.push(named["message"].clone());
        messages.push(json!({"role": "tool", "tool_call_id": id, "content": "Rain"}));
        let answer = both(&house, &body);
        assert!(answer["finish_reason"].is_string());
        // Without tools nothing is one.
        assert_eq!(
            both(&house, &chat(&json!("none")))["message"].get("tool_calls"),
            None
        );
    }
}

#[test]
fn a_call_that_is_cut_is_no_call() {
    let model = tool_model("<tool_call>");
    let house = House::of_model(model.path());
    let mut body = chat(&json!("required"));
    body["max_tokens"] = json!(6);
    let cut = both(&house, &body);
    assert_eq!(cut["finish_reason"], "length", "{cut}");
    assert_eq!(cut["message"].get("tool_calls"), None, "{cut}");
}

#[test]
fn several_calls_keep_their_order_in_a_stream() {
    let model = tool_model("<tool_call>");
    let house = House::of_model(model.path());
    for seed in 0..6 {
        let mut body = chat(&json!("required"));
        body["temperature"] = json!(1.5);
        body["seed"] = json!(seed);
        body["n"] = json!(2);
        body["max_tokens"] = json!(300);
        both(&house, &body);
        body["parallel_tool_calls"] = false.into();
        let one = both(&house, &body);
        if one["finish_reason"] == "tool_calls" {
            assert_eq!(
                one["message"]["tool_calls"].as_array().map(Vec::len),
                Some(1),
                "{one}"
            );
        }
    }
}

#[test]
fn what_is_wrong_with_tools_is_said() {
    let model = tool_model("<tool_call>");
    let house = House::of_model(model.path());
    let code = |change: &dyn Fn(&mut Value)| {
        let mut body = chat(&json!("auto"));
        change(&mut body);
        let answer = house.client.post("/v1/chat/completions", &body);
        assert_eq!(answer.status, 400, "{}", answer.text());
        answer.json()["error"]["param"].as_str().map(str::to_owned)
    };
    let tools = Some("tools".to_owned());
    let choice = Some("tool_choice".to_owned());
    assert_eq!(
        code(&|body| body["tools"][0]["function"]["name"] = json!("a b")),
        tools
    );
    assert_eq!(
        code(&|body| body["tools"][1]["function"]["name"] = json!("weather")),
        tools
    );
    assert_eq!(
        code(&|body| body["tools"][0]["type"] = json!("web_search")),
        tools
    );
    assert_eq!(code(&|body| body["tool_choice"] = json!("always")), choice);
    assert_eq!(
        code(&|body| body["tool_choice"] =
            json!({"type": "function", "function": {"name": "nobody"}})),
        choice
    );
    assert_eq!(
        code(&|body| {
            body["tools"] = json!([]);
            body["tool_choice"] = json!("required");
        }),
        choice
    );
    // A model whose template shows no tools cannot be made to call one, and that is said.
    let plain = House::open(&Shelf::new());
    let refused = plain
        .client
        .post("/v1/chat/completions", &chat(&json!("required")));
    assert_eq!(
        (refused.status, refused.code()),
        (400, "unsupported_parameter".to_owned())
    );
    assert_eq!(
        plain
            .client
            .post("/v1/chat/completions", &chat(&json!("auto")))
            .status,
        200
    );
}

#[test]
fn the_chat_template_is_given_variables() {
    let model = tool_model("<tool_call>");
    let template = "{% for message in messages %}{{ message.content }}{% endfor %}\
        {% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}";
    std::fs::write(model.path().join("chat_template.jinja"), template).expect("a template");
    let house = House::of_model(model.path());
    let messages = json!([{"role": "user", "content": "Think"}]);
    let text = |variables: Value| {
        let body = json!({"messages": messages, "chat_template_kwargs": variables});
        let tokens = house.client.post("/tokenize", &body).ok()["tokens"].clone();
        let mut body = body;
        body["max_tokens"] = json!(1);
        let answer = house.client.post("/v1/chat/completions", &body).ok();
        assert_eq!(
            answer["usage"]["prompt_tokens"],
            tokens.as_array().expect("a list").len()
        );
        let text = house.client.post("/detokenize", &json!({"tokens": tokens}));
        text.ok()["prompt"].clone()
    };
    assert_eq!(text(Value::Null), "Think");
    assert_eq!(text(json!({"enable_thinking": true})), "Think");
    assert_eq!(
        text(json!({"enable_thinking": false})),
        "Think<think></think>"
    );
    for (variables, param) in [
        (json!({"messages": []}), "chat_template_kwargs.messages"),
        (
            json!({"add_generation_prompt": false}),
            "chat_template_kwargs.add_generation_prompt",
        ),
        (json!([]), "chat_template_kwargs"),
    ] {
        for path in ["/tokenize", "/v1/chat/completions"] {
            let body = json!({"messages": messages, "chat_template_kwargs": variables});
            let answer = house.client.post(path, &body);
            assert_eq!(answer.status, 400, "{}", answer.text());
            assert_eq!(answer.json()["error"]["param"], param);
        }
    }
}

fn formatted(format: &Value) -> Value {
    json!({"model": BASE, "messages": [{"role": "user", "content": "JSON"}], "response_format": format, "max_tokens": 300,
        "temperature": 0.7, "seed": 1})
}

fn schema(schema: &Value) -> Value {
    formatted(
        &json!({"type": "json_schema", "json_schema": {"name": "it", "strict": true, "schema": schema}}),
    )
}

#[test]
fn an_answer_follows_its_schema() {
    let house = House::open(&Shelf::new());
    let wanted = json!({"type": "object", "additionalProperties": false, "required": ["name", "age", "kind"], "properties": {
        "name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog"]}}});
    let choice = both(&house, &schema(&wanted));
    assert_eq!(choice["finish_reason"], "stop", "{choice}");
    let text = choice["message"]["content"].as_str().expect("a text");
    let value: Value = serde_json::from_str(text).expect("JSON");
    assert!(
        value["age"].as_u64().is_some_and(|age| age <= 120),
        "{value}"
    );
    assert!(value["kind"] == "cat" || value["kind"] == "dog", "{value}");
    let text = both(&house, &formatted(&json!({"type": "text"})));
    assert!(text["message"]["content"].is_string());
    // An object of any kind may go on for long; where it ends it is one.
    let object = both(&house, &formatted(&json!({"type": "json_object"})));
    if object["finish_reason"] == "stop" {
        let text = object["message"]["content"].as_str().expect("a text");
        assert!(
            serde_json::from_str::<Value>(text)
                .expect("JSON")
                .is_object()
        );
    }
    for bad in [
        json!({"type": "json_schema"}),
        json!({"type": "yaml"}),
        json!({}),
        json!("json_object"),
    ] {
        let answer = house.client.post("/v1/chat/completions", &formatted(&bad));
        assert_eq!(
            (answer.status, answer.json()["error"]["param"].clone()),
            (400, json!("response_format"))
        );
    }
    let bad = house.client.post(
        "/v1/chat/completions",
        &schema(&json!({"type": "string", "format": 5, "not": {}})),
    );
    assert_eq!(bad.code(), "invalid_grammar");
    let endless = house
        .client
        .post("/v1/chat/completions", &schema(&json!({"$ref": "#"})));
    assert_eq!(
        (endless.status, endless.code()),
        (400, "invalid_grammar".to_owned()),
        "{}",
        endless.text()
    );
}

/// Characters of several tokens each, which a grammar makes certain.
#[test]
fn streamed_characters_are_always_whole() {
    let house = House::open(&Shelf::new());
    let words = [
        "漢字かな交じり文",
        "한국어 문장",
        "😀👩‍👩‍👧‍👦🇩🇪",
        "naïve café Straße",
        "\u{1F468}\u{200D}\u{1F680}x",
    ];
    for word in words {
        let choice = both(&house, &schema(&json!({"const": word})));
        let text = choice["message"]["content"].as_str().expect("a text");
        assert_eq!(serde_json::from_str::<String>(text).expect("JSON"), word);
        // Cut anywhere, there is no half of a character, and a text that ends an answer is found behind characters of many tokens.
        for most in 1..8 {
            let mut cut = schema(&json!({"const": word}));
            cut["max_tokens"] = json!(most);
            let text = both(&house, &cut)["message"]["content"]
                .as_str()
                .expect("a text")
                .to_owned();
            assert!(!text.contains('\u{FFFD}'), "{most}: {text:?}");
        }
        let (at, last) = word.char_indices().nth(3).expect("four characters");
        let mut stopped = schema(&json!({"const": word}));
        stopped["stop"] = json!(last.to_string());
        let text = both(&house, &stopped)["message"]["content"]
            .as_str()
            .expect("a text")
            .to_owned();
        assert_eq!(
            text,
            format!("\"{}", &word[..word.find(last).unwrap_or(at)])
        );
    }
}
