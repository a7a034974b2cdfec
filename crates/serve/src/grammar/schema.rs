//! JSON schemas before llguidance compiles them: their limits, what is added to them, and the place of what is wrong.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::GrammarError;

/// The longest schema, in bytes.
const LENGTH_LIMIT: usize = 256 << 10;

/// The most levels of objects and arrays in a schema.
const DEPTH_LIMIT: usize = 64;

/// The most levels of all parts together that `$ref` names. llguidance compiles a part by recursion where it is first named, so
/// this bounds the stack.
const REFERENCE_LIMIT: usize = 2048;

/// How many parts of a schema are compiled on their own to find the one that is wrong.
const TRIALS: usize = 64;

/// White space between the parts of JSON: a space, or a line break and an indentation. The module's documentation says why.
const WHITE_SPACE: &str = r" |\n( {0,32}|\t{0,8})";

/// Keywords whose values are objects of schemas.
const MAPS: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];
/// Keywords whose values are lists of schemas.
const LISTS: [&str; 4] = ["anyOf", "oneOf", "allOf", "prefixItems"];
/// Keywords whose values are schemas.
const SINGLE: [&str; 3] = ["items", "additionalProperties", "additionalItems"];

/// Checks the size of a schema.
pub(super) fn check(schema: &Value) -> Result<(), GrammarError> {
    const WHAT: &str = "schema";
    if let Some(place) = too_deep(schema, 0) {
        return Err(GrammarError::TooDeep {
            what: WHAT,
            place: format!("#{place}"),
            limit: DEPTH_LIMIT,
        });
    }
    let bytes = schema.to_string().len();
    if bytes > LENGTH_LIMIT {
        return Err(GrammarError::TooLong {
            what: WHAT,
            bytes,
            limit: LENGTH_LIMIT,
        });
    }
    let mut targets = BTreeSet::new();
    references(schema, &mut targets);
    let levels = |target: &&str| target.strip_prefix('#').and_then(|at| schema.pointer(at));
    let sum: usize = targets.iter().filter_map(levels).map(depth).sum();
    if sum > REFERENCE_LIMIT {
        return Err(GrammarError::Schema {
            place: "#".into(),
            reason: format!(
                "the parts that $ref names have {sum} levels together, and at most {REFERENCE_LIMIT} are taken"
            ),
        });
    }
    if let Some(place) = endless(schema, &targets) {
        return Err(GrammarError::Schema {
            place,
            reason: "it refers to itself without an end, so nothing can follow it".into(),
        });
    }
    Ok(())
}

/// The reference to a part that only JSON without an end could follow, where the schema demands that part.
fn endless(schema: &Value, targets: &BTreeSet<&str>) -> Option<String> {
    let mut finite: BTreeSet<&str> = BTreeSet::new();
    loop {
        let before = finite.len();
        for target in targets {
            // What cannot be found is for the compiler to tell.
            let part = target.strip_prefix('#').and_then(|at| schema.pointer(at));
            if !finite.contains(target) && part.is_none_or(|part| can_end(part, &finite)) {
                finite.insert(target);
            }
        }
        if finite.len() == before {
            break;
        }
    }
    if can_end(schema, &finite) {
        return None;
    }
    let left = targets.iter().find(|target| !finite.contains(*target));
    left.map(|target| (*target).to_owned())
}

/// Whether some JSON of finite length follows a schema, if it is so for the references in `finite` and for no other.
fn can_end(schema: &Value, finite: &BTreeSet<&str>) -> bool {
    let Value::Object(map) = schema else {
        return true;
    };
    let ends = |part: &Value| can_end(part, finite);
    let list = |key: &str| map.get(key).and_then(Value::as_array);
    if map.contains_key("const") || map.contains_key("enum") {
        return true;
    }
    let target = map.get("$ref").and_then(Value::as_str);
    if target.is_some_and(|target| !finite.contains(target))
        || list("allOf").is_some_and(|parts| !parts.iter().all(ends))
    {
        return false;
    }
    for key in ["anyOf", "oneOf"] {
        if list(key).is_some_and(|parts| !parts.is_empty() && !parts.iter().any(ends)) {
            return false;
        }
    }
    // A schema that allows another type than objects or arrays can always be followed.
    let only = |kind: &str| match map.get("type") {
        Some(Value::String(name)) => name == kind,
        Some(Value::Array(names)) => names.iter().all(|name| name == kind),
        _ => false,
    };
    if only("object") {
        let properties = map.get("properties").and_then(Value::as_object);
        let mut required = list("required").into_iter().flatten();
        return required.all(|name| {
            let part = name.as_str().and_then(|name| properties?.get(name));
            part.is_none_or(ends)
        });
    }
    if only("array") {
        let least = map.get("minItems").and_then(Value::as_u64).unwrap_or(0);
        let first = list("prefixItems").or_else(|| list("items"));
        let first = first.map_or(&[][..], Vec::as_slice);
        let demanded = usize::try_from(least).unwrap_or(usize::MAX);
        let rest = map.get("items").filter(|_| demanded > first.len());
        return first.iter().take(demanded).chain(rest).all(ends);
    }
    true
}

/// The place below which a value has more levels than allowed; it has `above` levels above it.
fn too_deep(value: &Value, above: usize) -> Option<String> {
    if above > DEPTH_LIMIT {
        return Some(String::new());
    }
    match value {
        Value::Object(map) => map.iter().find_map(|(key, value)| {
            too_deep(value, above + 1).map(|rest| format!("/{}{rest}", escaped(key)))
        }),
        Value::Array(list) => list
            .iter()
            .enumerate()
            .find_map(|(at, value)| too_deep(value, above + 1).map(|rest| format!("/{at}{rest}"))),
        _ => None,
    }
}

fn depth(value: &Value) -> usize {
    let below = match value {
        Value::Object(map) => map.values().map(depth).max(),
        Value::Array(list) => list.iter().map(depth).max(),
        _ => None,
    };
    1 + below.unwrap_or(0)
}

fn references<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
    match value {
        Value::Object(map) => {
            found.extend(map.get("$ref").and_then(Value::as_str));
            map.values().for_each(|value| references(value, found));
        }
        Value::Array(list) => list.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

/// A schema as llguidance is to read it.
pub(super) fn prepared(schema: &Value) -> Value {
    with_options(closed(schema))
}

/// A schema whose objects have no other properties than those it names, unless it speaks of others.
fn closed(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if !combines(&schema) {
        close(&mut schema);
    }
    schema
}

/// Adds how llguidance is to compile a schema.
fn with_options(schema: Value) -> Value {
    let options = json!({
        "whitespace_flexible": true,
        "whitespace_pattern": WHITE_SPACE,
        "coerce_one_of": true,
        // `\u4f60` and the like, as Python's json.dumps writes them.
        "json_allow_general_unicode_escapes": true,
    });
    match schema {
        Value::Object(mut map) => {
            map.insert("x-guidance".into(), options);
            Value::Object(map)
        }
        Value::Bool(true) => json!({"x-guidance": options}),
        other => other,
    }
}

/// Whether a schema describes an object in several parts that hold together.
fn combines(schema: &Value) -> bool {
    let Value::Object(map) = schema else {
        return false;
    };
    let parts = map
        .get("allOf")
        .and_then(Value::as_array)
        .map_or(0, Vec::len);
    let besides = ["$ref", "anyOf", "oneOf", "allOf"]
        .iter()
        .filter(|key| map.contains_key(**key))
        .count();
    parts > 1
        || besides > 1
        || besides == 1 && map.contains_key("properties")
        || children(map).any(|(_, child)| combines(child))
}

/// Says of objects with properties that they have no others, where the schema says nothing of it.
fn close(schema: &mut Value) {
    let Value::Object(map) = schema else {
        return;
    };
    let has = |key: &str| {
        map.get(key)
            .and_then(Value::as_object)
            .is_some_and(|map| !map.is_empty())
    };
    if has("properties") && !map.contains_key("additionalProperties") && !has("patternProperties") {
        map.insert("additionalProperties".into(), Value::Bool(false));
    }
    for (key, value) in map.iter_mut() {
        let key = key.as_str();
        match value {
            Value::Object(parts) if MAPS.contains(&key) => parts.values_mut().for_each(close),
            Value::Array(parts) if LISTS.contains(&key) || key == "items" => {
                parts.iter_mut().for_each(close);
            }
            value if SINGLE.contains(&key) => close(value),
            _ => {}
        }
    }
}

/// The schemas right below one, each with where it stands: `/properties/name`.
fn children(map: &Map<String, Value>) -> impl Iterator<Item = (String, &Value)> {
    map.iter().flat_map(|(key, value)| {
        let key = key.as_str();
        let found: Vec<(String, &Value)> = match value {
            Value::Object(parts) if MAPS.contains(&key) => parts
                .iter()
                .map(|(name, part)| (format!("/{key}/{}", escaped(name)), part))
                .collect(),
            Value::Array(parts) if LISTS.contains(&key) || key == "items" => parts
                .iter()
                .enumerate()
                .map(|(at, part)| (format!("/{key}/{at}"), part))
                .collect(),
            part if SINGLE.contains(&key) => vec![(format!("/{key}"), part)],
            _ => Vec::new(),
        };
        found
    })
}

/// A name as a part of a JSON pointer.
fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

/// The smallest part of a schema that does not compile, and why; `reason` is why the whole does not.
pub(super) fn locate(
    whole: &Value,
    reason: String,
    compile: impl Fn(Value) -> Result<(), String>,
) -> (String, String) {
    // The whole stands below another root, which refers to one part of it.
    let mut moved = closed(whole);
    move_references(&mut moved, "#/whole");
    let alone = |pointer: &str| {
        compile(with_options(
            json!({"$ref": format!("#/whole{pointer}"), "whole": moved}),
        ))
    };
    let (mut place, mut reason) = (String::new(), reason);
    let mut trials = TRIALS;
    let mut seen = BTreeSet::new();
    'deeper: while let Some(Value::Object(map)) = whole.pointer(&place) {
        seen.insert(place.clone());
        let target = map.get("$ref").and_then(Value::as_str);
        let target = target.and_then(|target| target.strip_prefix('#'));
        let target = target.filter(|at| whole.pointer(at).is_some());
        let target = target.map(|at| (at.to_owned(), &Value::Null));
        let below = children(map).map(|(step, part)| (format!("{place}{step}"), part));
        let parts: Vec<(String, &Value)> = target.into_iter().chain(below).collect();
        for (pointer, part) in parts {
            // What allows nothing is fine as a part; and llguidance finds no names that are escaped.
            if part.is_boolean() || pointer.contains('~') || seen.contains(&pointer) {
                continue;
            }
            let Some(left) = trials.checked_sub(1) else {
                break 'deeper;
            };
            trials = left;
            if let Err(error) = alone(&pointer) {
                (place, reason) = (pointer, error);
                continue 'deeper;
            }
        }
        break;
    }
    (format!("#{place}"), reason)
}

/// Makes a schema's references to its own parts right for a new place: `#/$defs/name`.
pub(crate) fn move_references(schema: &mut Value, place: &str) {
    match schema {
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::String(target) if key == "$ref" && target.starts_with('#') => {
                        *target = format!("{place}{}", target[1..].trim_end_matches('/'));
                    }
                    value => move_references(value, place),
                }
            }
        }
        Value::Array(list) => {
            for value in list {
                move_references(value, place);
            }
        }
        _ => {}
    }
}
