//! Values that several settings share: numbers, sizes in bytes, patterns.

use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

/// A number of bytes: `2GiB`, `500 MB`, `1073741824`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
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
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            _ => return Err(wrong()),
        };
        let bytes = number * factor as f64;
        if (1.0..1e18).contains(&bytes) {
            Ok(Self(bytes as u64))
        } else {
            Err(wrong())
        }
    }
}

impl<'de> Deserialize<'de> for ByteSize {
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
        match Raw::deserialize(deserializer)? {
            Raw::Bytes(bytes) => Ok(Self(bytes)),
            Raw::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// Parses a number. Rust's own parser also takes `nan`, `inf` and what is too large, such as `1e999`; JSON has no way to
/// write those, so a setting would silently fall back to its default.
///
/// # Errors
/// When the text is no number, or one that is not finite.
pub fn finite<T: FromStr + Copy + Into<f64>>(text: &str) -> Result<T, String> {
    match text.trim().parse::<T>() {
        Ok(number) if number.into().is_finite() => Ok(number),
        Ok(_) => Err("expected a finite number".to_string()),
        Err(_) => Err("expected a number".to_string()),
    }
}

/// Parses a whole number that is `MOST` at most, for what is multiplied or allocated before anything can say that it does not
/// fit.
///
/// # Errors
/// When the text is no such number.
pub fn at_most<const MOST: usize>(text: &str) -> Result<usize, String> {
    match text.trim().parse::<usize>() {
        Ok(number) if number <= MOST => Ok(number),
        _ => Err(format!("expected a whole number of {MOST} at most")),
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
        return Err("expected a pattern before the `=`".to_string());
    }
    Ok((pattern.trim().to_string(), value))
}

/// Patterns with their values as a map whose order is kept, for `#[serde(with)]`: the first that matches counts.
pub mod pattern_map {
    use std::fmt;
    use std::marker::PhantomData;

    use serde::de::{MapAccess, Visitor};
    use serde::ser::SerializeMap;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// Writes the pairs as a map.
    ///
    /// # Errors
    /// The serializer's own.
    pub fn serialize<T: Serialize, S: Serializer>(
        pairs: &[(String, T)],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(pairs.len()))?;
        for (key, value) in pairs {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }

    /// Reads a map as pairs.
    ///
    /// # Errors
    /// When there is no map or a value is of the wrong kind.
    pub fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<(String, T)>, D::Error> {
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
        deserializer.deserialize_map(Pairs(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        let bytes = |text: &str| text.parse::<ByteSize>().map(|size| size.0);
        assert_eq!(bytes("1073741824"), Ok(1 << 30));
        assert_eq!(bytes("2GiB"), Ok(2 << 30));
        assert_eq!(bytes("1.5 g"), Ok(3 << 29));
        assert_eq!(bytes("500MB"), Ok(500_000_000));
        for wrong in ["", "GiB", "-1", "0", "2 parsecs", "1e3", "1.2.3"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
        let read = |json: &str| {
            serde_json::from_str::<ByteSize>(json)
                .map(|size| size.0)
                .ok()
        };
        assert_eq!((read("7"), read("\"7 KiB\"")), (Some(7), Some(7168)));
        assert_eq!((read("-7"), read("true")), (None, None));
    }

    #[test]
    fn patterns_have_a_number() {
        assert_eq!(
            parse_pattern::<u64>("layers.0.*q_proj=4"),
            Ok(("layers.0.*q_proj".to_string(), 4))
        );
        assert!(parse_pattern::<u64>("q_proj").is_err());
        assert!(parse_pattern::<u64>("q_proj=x").is_err());
        assert!(parse_pattern::<u64>("=4").is_err());
    }

    #[test]
    fn counts_have_an_end() {
        assert_eq!(at_most::<9>("9"), Ok(9));
        for wrong in ["10", "-1", "1.5", "18446744073709551616", "x", ""] {
            let text = at_most::<9>(wrong).unwrap_err();
            assert_eq!(text, "expected a whole number of 9 at most");
        }
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
        assert_eq!(finite_pattern("a=b=1.5"), Ok(("a=b".to_string(), 1.5)));
        for wrong in ["a=nan", "a=inf", "a=1e999", "a=", "a", "=1"] {
            assert!(finite_pattern(wrong).is_err(), "{wrong}");
        }
    }
}
