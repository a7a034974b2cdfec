//! How numbers, sizes and patterns are written on a command line and in YAML.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Parses a number. Rust's own parser also takes `nan`, `inf` and what is too large, such as `1e999`; JSON has no way to
/// write those, so a setting would silently fall back to its default.
///
/// # Errors
/// When the text is no number, or one that is not finite.
pub fn finite<T: FromStr + Copy + Into<f64>>(text: &str) -> Result<T, String> {
    match text.trim().parse::<T>() {
        Ok(number) if number.into().is_finite() => Ok(number),
        Ok(_) => Err("expected a finite number".to_owned()),
        Err(_) => Err("expected a number".to_owned()),
    }
}

/// Parses `PATTERN=NUMBER` with a number as [`finite`] takes it.
///
/// # Errors
/// As [`parse_pattern`] and [`finite`].
pub fn finite_pattern(text: &str) -> Result<(String, f64), String> {
    let (pattern, number) = parse_pattern::<String>(text)?;
    let number = finite(&number).map_err(|problem| format!("{problem} after the `=`"))?;
    Ok((pattern, number))
}

/// Parses `PATTERN=NUMBER`. The last `=` divides, so a pattern may hold one.
///
/// # Errors
/// When there is no `=`, no pattern before it, or no number behind it.
pub fn parse_pattern<T: FromStr>(text: &str) -> Result<(String, T), String> {
    let (pattern, value) = text.rsplit_once('=').ok_or("expected PATTERN=NUMBER")?;
    let value = value
        .trim()
        .parse()
        .map_err(|_| format!("`{value}` is not a number of the right kind"))?;
    if pattern.trim().is_empty() {
        return Err("expected a pattern before the `=`".to_owned());
    }
    Ok((pattern.trim().to_owned(), value))
}

/// Parses a number of bytes: `2GiB`, `500 MB`, `1073741824`.
///
/// # Errors
/// When the text is no such size.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("got \"{text}\", expected a size like 2GiB or 500MB");
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1_u64,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        _ => return Err(wrong()),
    };
    let bytes = number * factor as f64;
    if (1.0..1e18).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err(wrong())
    }
}

/// A number of bytes as files write it, if there is one: as the number, and read as [`parse_bytes`] does, too.
#[derive(Debug)]
pub struct AsBytes<T>(pub T);

impl Serialize for AsBytes<&Option<u64>> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for AsBytes<Option<u64>> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "expected a size like 2GiB, or a number of bytes"
        )]
        enum Raw {
            Bytes(u64),
            Text(String),
        }
        Ok(Self(match Option::<Raw>::deserialize(deserializer)? {
            None => None,
            Some(Raw::Bytes(bytes)) => Some(bytes),
            Some(Raw::Text(text)) => Some(parse_bytes(&text).map_err(serde::de::Error::custom)?),
        }))
    }
}

/// Patterns with their numbers as a map whose order is kept: the first that matches counts.
#[derive(Debug)]
pub struct AsMap<T>(pub T);

impl<T: Serialize> Serialize for AsMap<&Vec<(String, T)>> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (pattern, number) in self.0 {
            map.serialize_entry(pattern, number)?;
        }
        map.end()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for AsMap<Vec<(String, T)>> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Pairs<T> {
            type Value = Vec<(String, T)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("lines of the form `pattern: number`")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(pairs)
            }
        }
        Ok(Self(deserializer.deserialize_map(Pairs(PhantomData))?))
    }
}

/// serde's words for types in those of people.
pub fn plain(message: &str) -> String {
    let mut text = message.to_string();
    for (from, to) in [
        ("invalid type: ", "got "),
        ("invalid value: ", "got "),
        ("floating point ", "the number "),
        ("integer ", "the number "),
        ("boolean ", ""),
        ("expected f64", "expected a number"),
        ("expected u64", "expected a whole number"),
        ("expected usize", "expected a whole number"),
        ("expected a boolean", "expected true or false"),
        ("a string path", "a path"),
        ("unknown variant ", ""),
    ] {
        text = text.replace(from, to);
    }
    text
}

/// The known name that `name` was probably meant to be.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let normal = name.to_lowercase().replace('-', "_");
    known
        .map(|candidate| (strsim::jaro_winkler(&normal, candidate), candidate))
        .filter(|(likeness, _)| *likeness > 0.84)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_bytes("1073741824"), Ok(1 << 30));
        assert_eq!(parse_bytes("2GiB"), Ok(2 << 30));
        assert_eq!(parse_bytes("1.5 g"), Ok(3 << 29));
        assert_eq!(parse_bytes("500MB"), Ok(500_000_000));
        for wrong in ["", "GiB", "-1", "0", "2 parsecs", "1e3", "1.2.3"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
        let read = |json: &str| {
            serde_json::from_str::<AsBytes<Option<u64>>>(json)
                .map(|size| size.0)
                .map_err(drop)
        };
        assert_eq!(
            (read("7"), read("\"7 KiB\""), read("null")),
            (Ok(Some(7)), Ok(Some(7168)), Ok(None))
        );
        assert_eq!((read("-7"), read("true")), (Err(()), Err(())));
    }

    #[test]
    fn patterns_have_a_number() {
        assert_eq!(
            parse_pattern::<u64>("layers.0.*q_proj=4"),
            Ok(("layers.0.*q_proj".to_owned(), 4))
        );
        assert!(parse_pattern::<u64>("q_proj").is_err());
        assert!(parse_pattern::<u64>("q_proj=x").is_err());
        assert!(parse_pattern::<u64>("=4").is_err());
    }

    #[test]
    fn numbers_are_finite() {
        assert_eq!(
            (finite::<f64>("1e-4"), finite::<f32>(" -2 ")),
            (Ok(1e-4), Ok(-2.0))
        );
        for wrong in [
            "nan",
            "-NaN",
            "inf",
            "-Infinity",
            "1e999",
            "-1e999",
            "x",
            "",
        ] {
            assert!(finite::<f64>(wrong).is_err(), "{wrong}");
        }
        assert!(finite::<f64>("1e39").is_ok() && finite::<f32>("1e39").is_err());
        assert_eq!(finite_pattern("a=b=1.5"), Ok(("a=b".to_owned(), 1.5)));
        for wrong in ["a=nan", "a=inf", "a=1e999", "a=", "a", "=1"] {
            assert!(finite_pattern(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_nearest_key_is_found_or_none() {
        let known = ["learning_rate", "lora_alpha", "batch_size", "r", "seed"];
        assert_eq!(
            nearest("learing_rate", known.into_iter()),
            Some("learning_rate")
        );
        assert_eq!(
            nearest("Learning-Rate", known.into_iter()),
            Some("learning_rate")
        );
        assert_eq!(nearest("batchsize", known.into_iter()), Some("batch_size"));
        assert_eq!(nearest("wandb_project", known.into_iter()), None);
    }

    #[test]
    fn messages_speak_of_numbers() {
        assert_eq!(
            plain("invalid type: string \"abc\", expected f64"),
            "got string \"abc\", expected a number"
        );
        assert_eq!(
            plain("invalid value: integer `-1`, expected u64"),
            "got the number `-1`, expected a whole number"
        );
    }
}
