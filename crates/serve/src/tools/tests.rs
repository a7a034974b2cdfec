use super::*;

fn tool(name: &str, parameters: &Value) -> Tool {
    serde_json::from_value(json!({"type": "function", "function": {
        "name": name, "description": "does it", "parameters": parameters,
    }}))
    .unwrap()
}

fn tools() -> Vec<Tool> {
    let place = json!({"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"],
        "$defs": {"City": {"type": "string", "maxLength": 8}}});
    vec![
        tool("weather", &place),
        serde_json::from_value(json!({"type": "function", "function": {"name": "now"}})).unwrap(),
    ]
}

/// Content and each call's name and arguments.
fn found(form: ToolForm, text: &str) -> (Option<String>, Vec<(String, String)>) {
    let parsed = parse(form, &tools(), 7, text);
    let calls = parsed.calls.into_iter();
    let calls = calls.map(|call| (call.function.name, call.function.arguments));
    (parsed.content, calls.collect())
}

fn calls(of: &[(&str, &str)]) -> Vec<(String, String)> {
    of.iter()
        .map(|(name, arguments)| ((*name).to_owned(), (*arguments).to_owned()))
        .collect()
}

/// Texts with calls, without and with damaged ones, in all forms.
const TEXTS: [(ToolForm, &str); 24] = [
    (
        ToolForm::Hermes,
        "Let me look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\":  \"Köln\"}}\n</tool_call>",
    ),
    (
        ToolForm::Hermes,
        "<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"</tool_call>\"}}\n</tool_call>\n",
    ),
    (
        ToolForm::Hermes,
        "<tool_call>\n{\"name\": \"fly\", \"arguments\": {}}\n</tool_call> then <tool_call>{\"name\": \"now\"}</tool_call> and more ",
    ),
    (
        ToolForm::Hermes,
        "<tool_call>\n{\"name\": \"now\", \"arguments\": {}\n</tool_call><tool_call>{\"name\": \"now\", \"arguments\": null}",
    ),
    (
        ToolForm::Hermes,
        "<tool_call>{\"name\": \"now\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool",
    ),
    (ToolForm::Hermes, "a < b, <tool_cal is no marker <tool_call"),
    (ToolForm::Hermes, "<tool_call> none <tool_call>"),
    (
        ToolForm::Hermes,
        "<tool_call>{\"name\": \"now\", \"arguments\": [1]}</tool_call>",
    ),
    (
        ToolForm::Hermes,
        "<tool_call>{\"name\": \"now\", \"x\": \"<tool_call>{\"name\": \"now\"}",
    ),
    (ToolForm::Hermes, " \n 你好 👍🏽 \n"),
    (ToolForm::Hermes, ""),
    (
        ToolForm::Llama,
        "{\"name\": \"weather\", \"parameters\": {\"city\": \"Rom\"}}",
    ),
    (
        ToolForm::Llama,
        " <|python_tag|>{\"name\": \"weather\", \"parameters\": {\"city\": \"a;b\"}}; {\"type\": \"function\", \"name\": \"now\", \"parameters\": {}};",
    ),
    (
        ToolForm::Llama,
        "I call <|python_tag|> {\"name\": \"now\", \"arguments\": {\"name\": 1}}",
    ),
    (
        ToolForm::Llama,
        "{\"name\": \"now\", \"parameters\": {}}; {\"name\": \"fly\", \"parameters\": {}}",
    ),
    (
        ToolForm::Llama,
        "{\"name\": \"now\", \"parameters\": {}}\n{\"a\": tru}",
    ),
    (ToolForm::Llama, "{not JSON} but a text; {"),
    (ToolForm::Llama, "{\"city\": \"Rom\"}"),
    (ToolForm::Llama, "<|python_tag|>search.call(query=\"a\")"),
    (
        ToolForm::Mistral,
        "[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}}, {\"name\": \"weather\", \"arguments\": {\"city\": \"[\"}}]",
    ),
    (
        ToolForm::Mistral,
        "Well. [TOOL_CALLS] [{\"name\": \"fly\", \"arguments\": {}}, {\"name\": \"now\", \"arguments\": { }}] done",
    ),
    (
        ToolForm::Mistral,
        "[{\"name\": \"now\", \"arguments\": {\"a\": [1, {\"b\": \"}\"}]}}]",
    ),
    (
        ToolForm::Mistral,
        "[1] is a note; [TOOL_CALLS]{\"name\": \"now\", \"arguments\": {}}",
    ),
    (ToolForm::Mistral, "[TOOL_CALLS][]"),
];

#[test]
fn calls_of_hermes_are_found() {
    let of = |at: usize| found(TEXTS[at].0, TEXTS[at].1);
    let text = |text: &str| Some(text.to_owned());
    // Arguments stay as they are written, with both spaces.
    let expected = calls(&[("weather", "{\"city\":  \"Köln\"}")]);
    assert_eq!(of(0), (text("Let me look."), expected));
    let expected = calls(&[("now", "{}"), ("weather", "{\"city\": \"</tool_call>\"}")]);
    assert_eq!(of(1), (None, expected));
    let content =
        "<tool_call>\n{\"name\": \"fly\", \"arguments\": {}}\n</tool_call> then and more ";
    assert_eq!(of(2), (text(content), calls(&[("now", "{}")])));
    let content = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}\n</tool_call>";
    assert_eq!(of(3), (text(content), calls(&[("now", "{}")])));
    assert_eq!(of(4), (None, calls(&[("now", "{\"a\": 1}")])));
    for at in [5, 6, 7, 9] {
        assert_eq!(of(at), (text(TEXTS[at].1), vec![]));
    }
    let content = "<tool_call>{\"name\": \"now\", \"x\": \"";
    assert_eq!(of(8), (text(content), calls(&[("now", "{}")])));
    assert_eq!(of(10), (None, vec![]));
}

#[test]
fn calls_of_llama_are_found() {
    let of = |at: usize| found(TEXTS[at].0, TEXTS[at].1);
    let text = |text: &str| Some(text.to_owned());
    assert_eq!(of(11), (None, calls(&[("weather", "{\"city\": \"Rom\"}")])));
    let expected = calls(&[("weather", "{\"city\": \"a;b\"}"), ("now", "{}")]);
    assert_eq!(of(12), (None, expected));
    let expected = calls(&[("now", "{\"name\": 1}")]);
    assert_eq!(of(13), (text("I call"), expected));
    let content = "; {\"name\": \"fly\", \"parameters\": {}}";
    assert_eq!(of(14), (text(content), calls(&[("now", "{}")])));
    assert_eq!(of(15), (text("{\"a\": tru}"), calls(&[("now", "{}")])));
    for at in [16, 17, 18] {
        assert_eq!(of(at), (text(TEXTS[at].1), vec![]));
    }
}

#[test]
fn calls_of_mistral_are_found() {
    let of = |at: usize| found(TEXTS[at].0, TEXTS[at].1);
    let text = |text: &str| Some(text.to_owned());
    let expected = calls(&[("now", "{}"), ("weather", "{\"city\": \"[\"}")]);
    assert_eq!(of(19), (None, expected));
    let content = "Well. {\"name\": \"fly\", \"arguments\": {}} done";
    assert_eq!(of(20), (text(content), calls(&[("now", "{ }")])));
    let expected = calls(&[("now", "{\"a\": [1, {\"b\": \"}\"}]}")]);
    assert_eq!(of(21), (None, expected));
    assert_eq!(of(22), (text("[1] is a note;"), calls(&[("now", "{}")])));
    assert_eq!(of(23), (text("[TOOL_CALLS][]"), vec![]));
}

#[test]
fn any_way_to_cut_a_text_gives_the_same() {
    let mut state = 1_u64;
    let mut draw = |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for (form, text) in TEXTS {
        let whole = parse(form, &tools(), 3, text);
        for round in 0..200 {
            let mut stream = ToolStream::new(form, &tools(), 3);
            let mut total = Parsed::default();
            let mut add = |parsed: Parsed| {
                if let Some(more) = parsed.content {
                    assert!(!more.is_empty());
                    total.content.get_or_insert_default().push_str(&more);
                }
                total.calls.extend(parsed.calls);
            };
            let mut rest = text;
            while !rest.is_empty() {
                // The first round gives a character at a time.
                let length = if round == 0 { 1 } else { 1 + draw(12) };
                let at = rest
                    .char_indices()
                    .nth(length)
                    .map_or(rest.len(), |(at, _)| at);
                add(stream.push(&rest[..at]));
                rest = &rest[at..];
            }
            add(stream.finish());
            assert_eq!(total, whole, "{text}");
        }
    }
}

#[test]
fn content_is_given_as_soon_as_it_cannot_be_a_call() {
    let mut stream = ToolStream::new(ToolForm::Hermes, &tools(), 0);
    let mut pushed = |piece| stream.push(piece).content;
    assert_eq!(pushed("Look: "), Some("Look:".into()));
    assert_eq!(pushed("<tool"), None);
    assert_eq!(pushed("box> a"), Some(" <toolbox> a".into()));
    assert_eq!(pushed("<tool_call>\n{\"name\": \"now\""), None);
    let call = stream.push(", \"arguments\": {}}");
    assert_eq!((call.content, call.calls.len()), (None, 1));
    assert_eq!(stream.push("\n</tool"), Parsed::default());
    assert_eq!(stream.push("_call>\n"), Parsed::default());
    assert_eq!(stream.finish(), Parsed::default());
}

#[test]
fn ids_are_drawn_from_the_seed() {
    let ids = |form, seed| -> Vec<String> {
        let text = match form {
            ToolForm::Mistral => TEXTS[19].1,
            _ => TEXTS[1].1,
        };
        let calls = parse(form, &tools(), seed, text).calls;
        calls.into_iter().map(|call| call.id).collect()
    };
    let first = ids(ToolForm::Hermes, 1);
    assert_eq!(first, ids(ToolForm::Hermes, 1));
    assert_ne!(first, ids(ToolForm::Hermes, 2));
    assert_ne!(first[0], first[1]);
    for id in first {
        let signs = id.strip_prefix("call_").unwrap();
        assert_eq!(signs.len(), 24);
        assert!(signs.bytes().all(|byte| byte.is_ascii_alphanumeric()));
    }
    for id in ids(ToolForm::Mistral, 1) {
        assert_eq!(id.len(), 9);
        assert!(id.bytes().all(|byte| byte.is_ascii_alphanumeric()));
    }
}

#[test]
fn calls_are_written_as_in_openais_answers() {
    let parsed = parse(ToolForm::Hermes, &tools(), 1, TEXTS[0].1);
    let written = serde_json::to_value(&parsed.calls[0]).unwrap();
    assert_eq!(
        written,
        json!({"id": parsed.calls[0].id, "type": "function",
            "function": {"name": "weather", "arguments": "{\"city\":  \"Köln\"}"}})
    );
}

#[test]
fn the_form_is_seen_in_the_template() {
    for (template, form) in [
        (
            "{{ '<tool_call>\\n{\"name\": \"' }}",
            Some(ToolForm::Hermes),
        ),
        ("{{ '<tool_call>\\n<function=' }}", None),
        ("{{ \"<|python_tag|>\" }}", Some(ToolForm::Llama)),
        (
            "<|start_header_id|>{{ '\"parameters\": ' }}",
            Some(ToolForm::Llama),
        ),
        ("<|start_header_id|>{{ message }}", None),
        ("{{ \"[TOOL_CALLS] [\" }}", Some(ToolForm::Mistral)),
        ("{{ \"[TOOL_CALLS]\" + name + \"[ARGS]\" }}", None),
        ("<|im_start|>{{ message }}", None),
    ] {
        assert_eq!(ToolForm::of_template(template), form, "{template}");
    }
}

#[test]
fn choices_are_read() {
    let read = |value| serde_json::from_value::<ToolChoice>(value);
    assert_eq!(read(json!("none")).unwrap(), ToolChoice::None);
    assert_eq!(read(json!("auto")).unwrap(), ToolChoice::Auto);
    assert_eq!(read(json!("required")).unwrap(), ToolChoice::Required);
    let named = json!({"type": "function", "function": {"name": "now"}});
    assert_eq!(read(named).unwrap(), ToolChoice::Named("now".into()));
    for wrong in [json!("any"), json!({"type": "function"}), json!(1)] {
        let error = read(wrong).unwrap_err().to_string();
        assert!(error.contains("tool_choice must be"), "{error}");
    }
}

#[test]
fn tools_are_checked() {
    assert_eq!(check(&tools()), Ok(()));
    let object = json!({"type": "object"});
    let error = |tools: &[Tool]| check(tools).unwrap_err().to_string();
    let spaced = tool("a b", &object);
    assert!(error(&[spaced]).contains("tools[0].function.name is \"a b\""));
    let twice = [tool("a", &object), tool("a", &object)];
    assert!(error(&twice).contains("tools[1].function.name is \"a\", as that of another"));
    let list = tool("a", &json!({"type": "array"}));
    assert!(error(&[list]).contains("tools[0].function.parameters must be"));
}

#[test]
fn a_call_is_forced_where_the_choice_demands_one() {
    let framed = |form, choice: ToolChoice, parallel| forced(form, &tools(), &choice, parallel);
    for choice in [ToolChoice::None, ToolChoice::Auto] {
        assert_eq!(framed(ToolForm::Hermes, choice, true), Ok(None));
    }
    let unknown = framed(ToolForm::Hermes, ToolChoice::Named("fly".into()), true);
    assert_eq!(unknown, Err(ToolError::Unknown { name: "fly".into() }));
    let none = forced(ToolForm::Llama, &[], &ToolChoice::Required, true);
    assert_eq!(none, Err(ToolError::NoTools));
    let named = framed(ToolForm::Llama, ToolChoice::Named("weather".into()), true);
    let named = named.unwrap().unwrap();
    assert_eq!(
        named,
        Framed {
            before: String::new(),
            schema: json!({"type": "object",
                "properties": {"name": {"const": "weather"}, "parameters": {"$ref": "#/$defs/weather"}},
                "required": ["name", "parameters"], "additionalProperties": false,
                "$defs": {"weather": {"type": "object",
                    "properties": {"city": {"$ref": "#/$defs/weather/$defs/City"}}, "required": ["city"],
                    "$defs": {"City": {"type": "string", "maxLength": 8}}}}}),
            after: String::new(),
            between: None,
        }
    );
    let several = framed(ToolForm::Hermes, ToolChoice::Required, true).unwrap();
    let several = several.unwrap();
    assert_eq!(several.between.as_deref(), Some("\n"));
    assert_eq!(several.schema["anyOf"].as_array().unwrap().len(), 2);
    let one = framed(ToolForm::Mistral, ToolChoice::Required, false).unwrap();
    assert_eq!(one.unwrap().schema["maxItems"], 1);
}
