use std::time::Instant;

use lowrank::base::{BUILTIN, Source};
use lowrank::data::Tokenizer;
use serde_json::json;

use super::*;
use crate::tools::{self, ToolChoice, ToolForm};

fn tokenizer() -> Tokenizer {
    Source::find(BUILTIN).unwrap().tokenizer().unwrap()
}

fn vocabulary() -> Vocabulary {
    Vocabulary::new(&tokenizer()).unwrap()
}

/// Draws of SplitMix64.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }
}

/// How many rows the model's head has beyond the vocabulary.
const PADDING: usize = 37;

/// The text that a model with random logits writes, which would like best to give padding. After `patience` tokens it likes to come to an
/// end.
fn generate(tokenizer: &Tokenizer, mut grammar: Grammar, seed: u64, patience: usize) -> String {
    let vocab = tokenizer.vocab_size();
    let ends = tokenizer.stop_ids();
    let closing: Vec<usize> = (0..vocab)
        .filter(|id| {
            let bytes = tokenizer.token_bytes(*id as u32).unwrap_or_default();
            matches!(bytes.as_slice(), b"\"" | b"}" | b"]")
        })
        .collect();
    let mut draws = Draws(seed);
    let mut ids = Vec::new();
    while !grammar.is_complete() {
        assert!(ids.len() < 600, "{:?}", tokenizer.decode(&ids, false));
        let mut logits: Vec<f32> = (0..vocab).map(|_| draws.unit()).collect();
        logits.resize(vocab + PADDING, 1e9);
        if ids.len() > patience {
            for id in closing
                .iter()
                .copied()
                .chain(ends.iter().map(|id| *id as usize))
            {
                logits[id] += 2.0;
            }
        }
        grammar.restrict(&mut logits);
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
        let best = best.unwrap();
        assert!(best < vocab && logits[best] > f32::NEG_INFINITY);
        grammar.accept(best as u32);
        if !ends.contains(&(best as u32)) {
            ids.push(best as u32);
        }
    }
    assert_eq!(grammar.failure(), None);
    tokenizer.decode(&ids, false).unwrap()
}

/// Why a value does not follow a schema of those below.
fn fault(root: &Value, schema: &Value, value: &Value) -> Option<String> {
    let wrong = |what: &str| Some(format!("{value} has a wrong {what} by {schema}"));
    if let Some(target) = schema["$ref"].as_str() {
        return fault(root, root.pointer(&target[1..]).unwrap(), value);
    }
    if let Some(options) = schema["anyOf"].as_array() {
        let fits = |option| fault(root, option, value).is_none();
        return if options.iter().any(fits) {
            None
        } else {
            wrong("form")
        };
    }
    let is = |kind: &Value| match kind.as_str().unwrap() {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        other => other == "null" && value.is_null(),
    };
    match &schema["type"] {
        Value::Array(kinds) if !kinds.iter().any(is) => return wrong("type"),
        kind @ Value::String(_) if !is(kind) => return wrong("type"),
        _ => {}
    }
    if schema["enum"]
        .as_array()
        .is_some_and(|of| !of.contains(value))
        || schema
            .get("const")
            .is_some_and(|constant| constant != value)
    {
        return wrong("value");
    }
    let within = |size: usize, least: &str, most: &str| {
        let size = size as u64;
        size >= schema[least].as_u64().unwrap_or(0)
            && size <= schema[most].as_u64().unwrap_or(u64::MAX)
    };
    match value {
        Value::String(text) if !within(text.chars().count(), "minLength", "maxLength") => {
            wrong("length")
        }
        Value::Number(number) => {
            let number = number.as_f64().unwrap();
            let least = schema["minimum"].as_f64().unwrap_or(f64::MIN);
            let most = schema["maximum"].as_f64().unwrap_or(f64::MAX);
            if (least..=most).contains(&number) {
                None
            } else {
                wrong("size")
            }
        }
        Value::Array(list) if !within(list.len(), "minItems", "maxItems") => wrong("length"),
        Value::Array(list) => list
            .iter()
            .find_map(|item| fault(root, &schema["items"], item)),
        Value::Object(map) => {
            let properties = schema["properties"].as_object()?;
            // In the order of the schema, and no others.
            let known: Vec<&String> = properties
                .keys()
                .filter(|key| map.contains_key(*key))
                .collect();
            let required = schema["required"].as_array().unwrap();
            if known != map.keys().collect::<Vec<_>>()
                || !required
                    .iter()
                    .all(|key| map.contains_key(key.as_str().unwrap()))
            {
                return wrong("set of properties");
            }
            map.iter()
                .find_map(|(key, value)| fault(root, &properties[key], value))
        }
        _ => None,
    }
}

fn schemas() -> [Value; 10] {
    [
        json!({"type": "object"}),
        json!({"type": "object", "additionalProperties": false, "required": ["name", "age"], "properties": {
            "name": {"type": "string", "description": "of the person"},
            "age": {"type": "integer", "minimum": 0, "maximum": 150}}}),
        json!({"type": "object", "required": ["z"], "properties": {
            "z": {"enum": ["red", "green", "blau \"ü\"", 3, null, true]},
            "a": {"type": ["string", "null"]},
            "m": {"type": "number", "minimum": -1.5, "maximum": 1.5}}}),
        json!({"type": "array", "minItems": 2, "maxItems": 4, "items": {"type": "boolean"}}),
        json!({"type": "object", "required": ["root"], "properties": {"root": {"$ref": "#/$defs/node"}}, "$defs": {
            "node": {"type": "object", "required": ["value", "next"], "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}}}),
        json!({"anyOf": [
            {"type": "object", "required": ["kind", "r"], "properties": {"kind": {"const": "circle"}, "r": {"type": "integer"}}},
            {"type": "object", "required": ["kind", "w"], "properties": {"kind": {"const": "box"}, "w": {"type": "boolean"}}}]}),
        json!({"type": "object", "required": ["名前"], "properties": {
            "名前": {"type": "string", "minLength": 2, "maxLength": 5},
            "ü/~": {"const": "é👍🏽"}}}),
        json!({"type": "object", "required": ["rows"], "properties": {"rows": {"type": "array", "maxItems": 3, "items": {
            "type": "array", "maxItems": 2, "items": {"type": "string", "enum": ["", "a", "ab"]}}}}}),
        json!({"type": "string", "maxLength": 20}),
        json!({"type": "object", "required": [], "properties": {
            "a": {"type": "integer"}, "b": {"type": "null"}, "c": {"type": "object", "required": [], "properties": {
                "d": {"type": "boolean"}}}}}),
    ]
}

#[test]
fn what_random_logits_write_follows_the_schema() {
    let tokenizer = tokenizer();
    let vocabulary = vocabulary();
    for (at, schema) in schemas().iter().enumerate() {
        let mut texts = std::collections::HashSet::new();
        for seed in 0..20 {
            let grammar = vocabulary.json_schema(schema).unwrap();
            let text = generate(&tokenizer, grammar, at as u64 * 1000 + seed, 40);
            let value: Value =
                serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(fault(schema, schema, &value), None);
            assert_eq!(text, text.trim());
            texts.insert(text);
        }
        assert!(texts.len() > 5, "{texts:?}");
    }
}

/// The text as tokens of one byte each, as far as the grammar takes it; and whether it might end there.
fn follow(grammar: &mut Grammar, text: &str) -> (usize, bool) {
    let tokenizer = tokenizer();
    let of = |byte: u8| {
        (0..tokenizer.vocab_size() as u32).find(|id| {
            !tokenizer.is_special(*id)
                && tokenizer
                    .token_bytes(*id)
                    .is_some_and(|bytes| bytes == [byte])
        })
    };
    for (at, byte) in text.bytes().enumerate() {
        let id = of(byte).unwrap();
        let mut logits = vec![0.0; tokenizer.vocab_size()];
        grammar.restrict(&mut logits);
        if logits[id as usize] != 0.0 {
            return (at, grammar.may_end());
        }
        grammar.accept(id);
        if grammar.is_complete() {
            return (at + 1, grammar.may_end());
        }
    }
    (text.len(), grammar.may_end())
}

#[test]
fn a_text_is_followed_a_byte_at_a_time() {
    let vocabulary = vocabulary();
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]});
    let all = |text: &str| {
        let mut grammar = vocabulary.json_schema(&schema).unwrap();
        follow(&mut grammar, text) == (text.len(), true) && grammar.is_complete()
    };
    for text in [
        "{\"a\":1}",
        "{\"a\": -20, \"b\": \"x\"}",
        "{\n  \"a\": 0,\n  \"b\": \"é👍🏽\\n\\u00e9\"\n}",
        "{\n\t\"a\": 7\n}",
    ] {
        assert!(all(text), "{text}");
    }
    for text in [
        " {\"a\":1}",
        "{\"a\":  1}",
        "{\n\n\"a\":1}",
        "{\"b\":\"x\",\"a\":1}",
        "{\"a\":1,\"c\":2}",
        "{\"a\":1.5}",
        "{\"a\":01}",
        "{}",
        "[1]",
        "{\"a\":1,\"b\":\"\n\"}",
    ] {
        assert!(!all(text), "{text}");
    }
    let mut grammar = vocabulary.json_schema(&json!({"type": "integer"})).unwrap();
    assert_eq!(follow(&mut grammar, "-"), (1, false));
    assert_eq!(follow(&mut grammar, "12"), (2, true));
    assert!(!grammar.is_complete());
    // Where the text may end, its end tokens stay.
    let end = tokenizer().eos_id();
    let mut logits = vec![0.0; tokenizer().vocab_size() + PADDING];
    grammar.restrict(&mut logits);
    assert_eq!(logits[end as usize], 0.0);
    assert_eq!(follow(&mut grammar, " ").0, 0);
    grammar.accept(end);
    assert!(grammar.is_complete() && grammar.failure().is_none());
}

#[test]
fn a_complete_text_can_only_end() {
    let vocabulary = vocabulary();
    let tokenizer = tokenizer();
    let mut grammar = vocabulary.json_schema(&json!({"const": true})).unwrap();
    assert_eq!(follow(&mut grammar, "true"), (4, true));
    assert!(grammar.is_complete());
    let mut logits = vec![0.5; tokenizer.vocab_size() + PADDING];
    grammar.restrict(&mut logits);
    for (id, logit) in logits.iter().enumerate() {
        let is_end = tokenizer.stop_ids().contains(&(id as u32));
        assert_eq!(*logit, if is_end { 0.5 } else { f32::NEG_INFINITY });
    }
    grammar.accept(0);
    assert_eq!(grammar.failure(), None);
}

#[test]
fn a_token_that_is_not_allowed_ends_the_text_with_an_error() {
    let vocabulary = vocabulary();
    let tokenizer = tokenizer();
    for token in [0, tokenizer.vocab_size() as u32, u32::MAX] {
        let mut grammar = vocabulary.json_object().unwrap();
        grammar.accept(token);
        assert!(grammar.is_complete());
        assert!(grammar.failure().is_some());
        assert!(!grammar.may_end());
        let mut logits = vec![0.0; tokenizer.vocab_size()];
        grammar.restrict(&mut logits);
        let end = tokenizer.eos_id() as usize;
        assert!(
            (0..logits.len()).all(|id| (logits[id] == 0.0)
                == (id == end || tokenizer.stop_ids().contains(&(id as u32))))
        );
    }
}

#[test]
fn a_model_without_the_tokens_ends_the_text_with_an_error() {
    let mut grammar = vocabulary().json_object().unwrap();
    let mut logits = vec![0.0; 1];
    grammar.restrict(&mut logits);
    assert!(grammar.is_complete());
    assert!(
        grammar.failure().unwrap().contains("no token"),
        "{grammar:?}"
    );
    // A vocabulary in which nothing but one brace can be written.
    let words = vec![
        (b"</s>".to_vec(), true),
        (b"{".to_vec(), false),
        (Vec::new(), false),
    ];
    let narrow = Vocabulary::of(words, &[0, 4, 1 << 30], vec![]).unwrap();
    let mut grammar = narrow.json_object().unwrap();
    let mut logits = vec![0.0; 8];
    grammar.restrict(&mut logits);
    let allowed: Vec<usize> = (0..8).filter(|id| logits[*id] == 0.0).collect();
    assert_eq!(allowed, [1]);
    grammar.accept(1);
    grammar.restrict(&mut logits);
    assert!(grammar.is_complete() && grammar.failure().is_some());
}

#[test]
fn special_tokens_never_stand_in_a_text() {
    let tokenizer = tokenizer();
    let mut grammar = vocabulary()
        .json_schema(&json!({"type": "string"}))
        .unwrap();
    assert_eq!(follow(&mut grammar, "\"a"), (2, false));
    let mut logits = vec![0.0; tokenizer.vocab_size()];
    grammar.restrict(&mut logits);
    let special = (0..logits.len()).filter(|id| tokenizer.is_special(*id as u32));
    let special: Vec<usize> = special.collect();
    assert!(!special.is_empty());
    assert!(special.iter().all(|id| logits[*id] == f32::NEG_INFINITY));
}

#[test]
fn a_schema_that_cannot_be_followed_is_named_with_its_place() {
    let vocabulary = vocabulary();
    let error = |schema: Value| vocabulary.json_schema(&schema).unwrap_err().to_string();
    for (schema, place, reason) in [
        (
            json!({"type": "object", "properties": {"a": {"type": "array", "items": {"not": {}}}}}),
            "#/properties/a/items:",
            "not",
        ),
        (
            json!({"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": "array", "uniqueItems": true}}}),
            "#/$defs/b:",
            "uniqueItems",
        ),
        (
            json!({"anyOf": [{"type": "null"}, {"type": "text"}]}),
            "#/anyOf/1:",
            "text",
        ),
        (
            json!({"type": "object", "properties": {"a": {"$ref": "#/$defs/c"}}}),
            "#/properties/a:",
            "'$defs' not found",
        ),
        (
            json!({"type": "integer", "minimum": 3, "maximum": 2}),
            "#:",
            "minimum",
        ),
        (
            json!({"type": "object", "properties": {"a": {}}, "required": ["b"]}),
            "#:",
            "'b' is unsatisfiable",
        ),
        (
            json!({"properties": {"a": {"type": "string", "pattern": "(?=a)"}}}),
            "#/properties/a:",
            "look",
        ),
        (
            json!({"type": "string", "format": "ünknown"}),
            "#:",
            "Unknown format: ünknown",
        ),
        (
            json!({"properties": {"a": {"minimum": "ü".repeat(99)}}}),
            "#/properties/a:",
            "",
        ),
        (json!(false), "#:", "false"),
        (json!("text"), "#:", "object"),
        (
            json!({"properties": [1]}),
            "#:",
            "properties must be an object",
        ),
    ] {
        let error = error(schema);
        assert!(
            error.contains(&format!("cannot be followed at {place}")),
            "{error}"
        );
        assert!(error.contains(reason), "{error}");
        assert!(error.len() < 600, "{error}");
    }
}

#[test]
fn what_nothing_can_follow_is_refused() {
    let vocabulary = vocabulary();
    let node = |next: Value| json!({"type": "object", "required": ["next"], "properties": {"next": next}, "additionalProperties": false});
    for schema in [
        json!({"$ref": "#"}),
        json!({"anyOf": [{"$ref": "#"}]}),
        json!({"allOf": [{"$ref": "#"}, {"type": "object"}]}),
        json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        node(json!({"$ref": "#"})),
        json!({"type": "array", "minItems": 1, "items": {"$ref": "#"}}),
    ] {
        let error = vocabulary.json_schema(&schema).expect_err("endless");
        assert!(
            error.to_string().contains("refers to itself"),
            "{schema}: {error}"
        );
    }
    for schema in [
        node(json!({"anyOf": [{"$ref": "#"}, {"type": "null"}]})),
        json!({"type": "object", "properties": {"next": {"$ref": "#"}}}),
        json!({"type": "array", "items": {"$ref": "#"}}),
    ] {
        assert!(vocabulary.json_schema(&schema).is_ok(), "{schema}");
    }
    assert!(vocabulary.lark("start: start \"a\"\n").is_err());
    assert!(vocabulary.lark("start: \"a\" start\n | \"b\"\n").is_ok());
}

#[test]
fn large_schemas_are_refused_before_they_overflow_the_stack() {
    let vocabulary = vocabulary();
    let error = |schema: &Value| vocabulary.json_schema(schema).unwrap_err().to_string();
    let long = json!({"description": "x".repeat(300_000)});
    assert!(
        error(&long).contains("the schema has 300018 bytes"),
        "{}",
        error(&long)
    );
    let mut deep = json!({});
    for _ in 0..40 {
        deep = json!({"items": {"items": deep}});
    }
    assert!(error(&deep).contains("nested too deeply at #/items/items/"));
    // Each part refers to the next one, in several ways.
    let chain = |length: usize, part: &dyn Fn(Value) -> Value| {
        let mut parts = serde_json::Map::new();
        for at in 0..length {
            let next = json!({"$ref": format!("#/$defs/p{}", at + 1)});
            parts.insert(format!("p{at}"), part(next));
        }
        parts.insert(format!("p{length}"), json!({"type": "object"}));
        json!({"$ref": "#/$defs/p0", "$defs": parts})
    };
    let plain = |next: Value| next;
    assert!(error(&chain(1100, &plain)).contains("the parts that $ref names"));
    // The longest chains that are taken do not overflow the stack.
    assert!(vocabulary.json_schema(&chain(1000, &plain)).is_ok());
    let ways: [&dyn Fn(Value) -> Value; 4] = [
        &|next| json!({"type": "object", "$ref": next["$ref"], "minProperties": 0}),
        &|next| json!({"allOf": [next, {"type": "object"}]}),
        &|next| json!({"anyOf": [next, {"type": "null"}]}),
        &|next| json!({"properties": {"a": {"items": {"additionalProperties": next}}}}),
    ];
    for way in ways {
        let levels = depth_of(&way(json!({"$ref": ""})));
        let schema = chain(2040 / levels, way);
        let built = vocabulary.json_schema(&schema);
        assert!(matches!(built, Ok(_) | Err(GrammarError::Schema { .. })));
    }
}

fn depth_of(value: &Value) -> usize {
    let below = match value {
        Value::Object(map) => map.values().map(depth_of).max(),
        Value::Array(list) => list.iter().map(depth_of).max(),
        _ => None,
    };
    1 + below.unwrap_or(0)
}

#[test]
fn hostile_schemas_end_soon() {
    let vocabulary = vocabulary();
    let part = |n: usize| json!({"$ref": format!("#/$defs/p{n}")});
    let mut doubled = serde_json::Map::new();
    for at in 0..30 {
        doubled.insert(
            format!("p{at}"),
            json!({"allOf": [part(at + 1), part(at + 1)]}),
        );
    }
    doubled.insert(
        "p30".into(),
        json!({"type": "object", "properties": {"a": {"type": "string"}}}),
    );
    for schema in [
        json!({"type": "string", "minLength": 1_000_000_000, "maxLength": 2_000_000_000}),
        json!({"type": "array", "minItems": 1_000_000_000, "items": {"type": "null"}}),
        json!({"type": "number", "multipleOf": 1e-300}),
        json!({"type": "integer", "multipleOf": 9_007_199_254_740_993_u64, "minimum": 5}),
        json!({"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"}),
        json!({"type": "string", "pattern": "(".repeat(5000)}),
        json!({"type": "string", "pattern": "(.*a.{200}b.*)&(.*b.{300}c.*)"}),
        json!({"allOf": [{"$ref": "#"}, {"type": "object"}]}),
        json!({"$ref": "#"}),
        json!({"$ref": "#/$defs/p0", "$defs": doubled}),
        json!({"enum": (0..5000).map(|n| format!("value {n}")).collect::<Vec<_>>()}),
        json!({"properties": (0..5000).map(|n| (format!("key {n}"), json!({"type": "integer"}))).collect::<serde_json::Map<_, _>>()}),
        json!({"type": "object", "patternProperties": {"^(a+)+$": {}, "^(a|b)+c$": {}}}),
    ] {
        let start = Instant::now();
        if let Ok(mut grammar) = vocabulary.json_schema(&schema) {
            let mut logits = vec![0.0; 600];
            for _ in 0..20 {
                grammar.restrict(&mut logits);
            }
        }
        assert!(start.elapsed().as_secs() < 10, "{schema}");
    }
}

#[test]
fn objects_are_closed_unless_the_schema_combines_parts() {
    let vocabulary = vocabulary();
    let takes = |schema: Value, text: &str| {
        let mut grammar = vocabulary.json_schema(&schema).unwrap();
        follow(&mut grammar, text) == (text.len(), true)
    };
    let text = "{\"a\":1,\"b\":2}";
    assert!(!takes(json!({"properties": {"a": {}}}), text));
    assert!(takes(
        json!({"properties": {"a": {}}, "additionalProperties": {"type": "integer"}}),
        text
    ));
    assert!(takes(
        json!({"properties": {"a": {}}, "patternProperties": {"^b": {}}}),
        text
    ));
    let all = json!({"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"properties": {"b": {"type": "integer"}}, "required": ["b"]}]});
    assert!(takes(all.clone(), text));
    assert!(!takes(all, "{\"a\":1}"));
    // The text cannot set how it is compiled.
    let own = json!({"x-guidance": {"whitespace_flexible": false}, "type": "array"});
    assert!(takes(own, "[ 1 ]"));
    assert!(takes(
        json!({"oneOf": [{"type": "integer"}, {"type": "number"}]}),
        "1"
    ));
}

#[test]
fn expressions_and_grammars_are_followed() {
    let vocabulary = vocabulary();
    let mut grammar = vocabulary.regex("(yes|no)!?").unwrap();
    assert_eq!(follow(&mut grammar, "no?"), (2, true));
    let mut grammar = vocabulary.lark("start: \"a\" start \"b\" | \"c\"").unwrap();
    assert_eq!(follow(&mut grammar, "aacbb"), (5, true));
    assert!(grammar.is_complete());
    let error = |grammar: Result<Grammar, GrammarError>| grammar.unwrap_err().to_string();
    let wrong = error(vocabulary.regex("(a"));
    assert!(
        wrong.starts_with("the regular expression cannot be followed"),
        "{wrong}"
    );
    assert!(error(vocabulary.lark("start: other")).starts_with("the grammar cannot be followed"));
    assert!(error(vocabulary.lark("")).starts_with("the grammar cannot be followed"));
    assert!(error(vocabulary.regex(&"(".repeat(100))).contains("nested too deeply at byte 64"));
    assert!(error(vocabulary.regex(&"a".repeat(100_000))).contains("has 100000 bytes"));
}

#[test]
fn forced_calls_are_found_again() {
    let tokenizer = tokenizer();
    let vocabulary = vocabulary();
    let tools: Vec<tools::Tool> = serde_json::from_value(json!([
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "required": ["city"],
            "properties": {"city": {"$ref": "#/$defs/City"}}, "$defs": {"City": {"type": "string", "maxLength": 6}}}}},
        {"type": "function", "function": {"name": "now"}},
    ]))
    .unwrap();
    for form in [ToolForm::Hermes, ToolForm::Llama, ToolForm::Mistral] {
        let mut most = 0;
        for seed in 0..20 {
            let choice = match seed % 3 {
                0 => ToolChoice::Named("weather".into()),
                _ => ToolChoice::Required,
            };
            let framed = tools::forced(form, &tools, &choice, seed % 3 == 1).unwrap();
            let grammar = vocabulary.framed(&framed.unwrap()).unwrap();
            let text = generate(&tokenizer, grammar, seed, 150);
            let parsed = tools::parse(form, &tools, seed, &text);
            assert_eq!(parsed.content, None, "{text}");
            most = most.max(parsed.calls.len());
            assert!(
                parsed.calls.len() == 1 || seed % 3 == 1 && !parsed.calls.is_empty(),
                "{text}"
            );
            for call in &parsed.calls {
                let arguments: Value = serde_json::from_str(&call.function.arguments).unwrap();
                assert_eq!(
                    arguments.get("city").is_some(),
                    call.function.name == "weather"
                );
                assert!(seed % 3 != 0 || call.function.name == "weather");
            }
        }
        assert!(most > 1, "{form:?} never calls twice");
    }
}

#[test]
fn a_tools_schema_that_cannot_be_followed_names_the_tool() {
    let tools: Vec<tools::Tool> =
        serde_json::from_value(json!([{"type": "function", "function": {"name": "weather",
        "parameters": {"properties": {"city": {"not": {}}}}}}]))
        .unwrap();
    let framed = tools::forced(ToolForm::Hermes, &tools, &ToolChoice::Required, true);
    let error = vocabulary().framed(&framed.unwrap().unwrap()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("at #/$defs/weather/properties/city:"),
        "{error}"
    );
}

#[test]
fn markers_that_are_special_tokens_are_forced_as_such() {
    let mut words: Vec<(Vec<u8>, bool)> = (0..=255).map(|byte| (vec![byte], false)).collect();
    words.push((b"</s>".to_vec(), true));
    words.push((b"[TOOL_CALLS]".to_vec(), true));
    let special = vec![("</s>".to_owned(), 256), ("[TOOL_CALLS]".to_owned(), 257)];
    let vocabulary = Vocabulary::of(words, &[256], special).unwrap();
    let framed = Framed {
        before: "a[TOOL_CALLS]".into(),
        schema: json!({"const": 1}),
        after: String::new(),
        between: None,
    };
    let mut grammar = vocabulary.framed(&framed).unwrap();
    for token in [u32::from(b'a'), 257, u32::from(b'1')] {
        let mut logits = vec![0.0; 300];
        grammar.restrict(&mut logits);
        let allowed: Vec<u32> = (0..300).filter(|id| logits[*id as usize] == 0.0).collect();
        assert_eq!(allowed, [token]);
        grammar.accept(token);
    }
    assert_eq!(grammar.failure(), None);
    assert!(grammar.may_end());
}

/// `cargo test -p lowrank-serve the_cost -- --nocapture` shows it.
#[test]
#[expect(clippy::print_stdout, reason = "a measurement is to be read")]
fn the_cost_of_a_token() {
    let mut draws = Draws(1);
    let mut words: Vec<(Vec<u8>, bool)> = (0..=255).map(|byte| (vec![byte], false)).collect();
    while words.len() < 50_000 {
        let length = 2 + draws.next() % 8;
        let mut word: Vec<u8> = (0..length)
            .map(|_| b'a' + (draws.next() % 26) as u8)
            .collect();
        match draws.next() % 8 {
            0 => word[0] = b' ',
            1 => word[0] = b'"',
            2 => word.extend(*b"\":"),
            3 => word.extend("é".bytes()),
            4 => word = (draws.next() % 1000).to_string().into_bytes(),
            _ => {}
        }
        words.push((word, false));
    }
    words.push((b"</s>".to_vec(), true));
    let start = Instant::now();
    let vocabulary = Vocabulary::of(words, &[50_000], vec![]).unwrap();
    println!("vocabulary: {:?}", start.elapsed());
    for schema in schemas() {
        let start = Instant::now();
        let mut grammar = vocabulary.json_schema(&schema).unwrap();
        let built = start.elapsed();
        let (mut all, mut most, mut count) = (0.0, 0.0_f64, 0);
        let random: Vec<f32> = (0..50_048).map(|_| draws.unit()).collect();
        while !grammar.is_complete() && count < 200 {
            let mut logits = random.clone();
            logits.rotate_left(count * 131);
            let start = Instant::now();
            grammar.restrict(&mut logits);
            let spent = start.elapsed().as_secs_f64() * 1e6;
            let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
            grammar.accept(best.unwrap() as u32);
            (all, most, count) = (all + spent, most.max(spent), count + 1);
        }
        println!(
            "built {built:?}; {count} tokens, mean {:.0} us, most {most:.0} us",
            all / count as f64
        );
        // Far above what it takes, since machines that run tests are busy.
        assert!(all / (count as f64) < 20_000.0);
    }
}
