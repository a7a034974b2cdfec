//! `config.json` and `generation_config.json` of a Hugging Face model folder, field by field.
//!
//! Which fields a family needs is the model's business; this module gives typed access whose errors name the file, the
//! field, what was found and what is accepted. Numbers are bounded: a size fits in 31 bits, so products of two sizes
//! cannot overflow, and a real number is finite, not negative and fits in f32.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::FormatError;
use crate::folders::instead_of_model;
use crate::json::{read_object, show};

/// The name of a model's configuration in its folder.
pub const MODEL_CONFIG: &str = "config.json";
/// The name of the defaults for generation in a model's folder.
pub const GENERATION_CONFIG: &str = "generation_config.json";

const FILE_CAP: u64 = 16 << 20;
const MOST: u64 = i32::MAX as u64;

/// A JSON object with typed access to its fields.
#[derive(Clone, Debug)]
pub struct HfConfig {
    path: PathBuf,
    /// Names of the enclosing objects, each with a dot after it; empty for the file's own object.
    prefix: String,
    map: Map<String, Value>,
}

impl HfConfig {
    /// Reads `config.json`; `path` is the model's folder or the file itself.
    ///
    /// # Errors
    /// The file is not there, larger than 16 MiB or not a JSON object.
    pub fn read(path: &Path) -> Result<HfConfig, FormatError> {
        let file = if path.is_dir() {
            path.join(MODEL_CONFIG)
        } else {
            path.to_path_buf()
        };
        if !file.exists() {
            let instead = file.parent().and_then(instead_of_model);
            let problem = instead.unwrap_or_else(|| {
                format!(
                    "a model is a folder with {MODEL_CONFIG}, safetensors weights and a tokenizer"
                )
            });
            return Err(FormatError::Missing {
                path: file,
                problem: format!("is missing; {problem}"),
            });
        }
        let map = read_object(&file, FILE_CAP)?;
        Ok(HfConfig {
            path: file,
            prefix: String::new(),
            map,
        })
    }

    /// Wraps an object that was read or made elsewhere; `path` is for messages.
    pub fn from_map(path: &Path, map: Map<String, Value>) -> HfConfig {
        HfConfig {
            path: path.to_path_buf(),
            prefix: String::new(),
            map,
        }
    }

    /// The file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The object itself, in the file's order.
    pub fn map(&self) -> &Map<String, Value> {
        &self.map
    }

    /// A field's value; `None` where it is missing or null.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// A size or an id: an integer from 0 to 2³¹-1.
    ///
    /// # Errors
    /// The field is missing, null or anything else.
    pub fn usize(&self, field: &str) -> Result<usize, FormatError> {
        self.required(field, self.opt_usize(field)?, SIZE)
    }

    /// Like [`usize`](HfConfig::usize), `None` where the field is missing or null.
    ///
    /// # Errors
    /// The field is there and not such a number.
    pub fn opt_usize(&self, field: &str) -> Result<Option<usize>, FormatError> {
        self.optional(field, SIZE, |v| {
            v.as_u64().filter(|&n| n <= MOST).map(|n| n as usize)
        })
    }

    /// A finite number, not negative, in f32's range.
    ///
    /// # Errors
    /// The field is missing, null or anything else.
    pub fn f64(&self, field: &str) -> Result<f64, FormatError> {
        self.required(field, self.opt_f64(field)?, REAL)
    }

    /// Like [`f64`](HfConfig::f64), `None` where the field is missing or null.
    ///
    /// # Errors
    /// The field is there and not such a number.
    pub fn opt_f64(&self, field: &str) -> Result<Option<f64>, FormatError> {
        let range = 0.0..=f64::from(f32::MAX);
        self.optional(field, REAL, |v| v.as_f64().filter(|x| range.contains(x)))
    }

    /// True or false.
    ///
    /// # Errors
    /// The field is missing, null or anything else.
    pub fn bool(&self, field: &str) -> Result<bool, FormatError> {
        self.required(field, self.opt_bool(field)?, BOOL)
    }

    /// Like [`bool`](HfConfig::bool), `None` where the field is missing or null.
    ///
    /// # Errors
    /// The field is there and neither true nor false.
    pub fn opt_bool(&self, field: &str) -> Result<Option<bool>, FormatError> {
        self.optional(field, BOOL, Value::as_bool)
    }

    /// A string.
    ///
    /// # Errors
    /// The field is missing, null or anything else.
    pub fn str(&self, field: &str) -> Result<&str, FormatError> {
        self.required(field, self.opt_str(field)?, TEXT)
    }

    /// Like [`str`](HfConfig::str), `None` where the field is missing or null.
    ///
    /// # Errors
    /// The field is there and not a string.
    pub fn opt_str(&self, field: &str) -> Result<Option<&str>, FormatError> {
        self.optional(field, TEXT, Value::as_str)
    }

    /// A list of strings, such as `architectures`; `None` where the field is missing or null.
    ///
    /// # Errors
    /// The field is there and not such a list.
    pub fn opt_strs(&self, field: &str) -> Result<Option<Vec<&str>>, FormatError> {
        self.optional(field, "a list of strings", |v| {
            v.as_array()?.iter().map(Value::as_str).collect()
        })
    }

    /// A list of numbers as of [`f64`](HfConfig::f64); `None` where the field is missing or null.
    ///
    /// # Errors
    /// The field is there and not such a list.
    pub fn opt_f64s(&self, field: &str) -> Result<Option<Vec<f64>>, FormatError> {
        let range = 0.0..=f64::from(f32::MAX);
        self.optional(
            field,
            "a list of finite numbers that are not negative",
            |v| {
                let number = |v: &Value| v.as_f64().filter(|x| range.contains(x));
                v.as_array()?.iter().map(number).collect()
            },
        )
    }

    /// An object in this one, such as `rope_parameters`; `None` where the field is missing or null. Its errors name
    /// both, as `rope_parameters.factor`.
    ///
    /// # Errors
    /// The field is there and not an object.
    pub fn opt_object(&self, field: &str) -> Result<Option<HfConfig>, FormatError> {
        let map = self.optional(field, "an object or null", |v| v.as_object().cloned())?;
        Ok(map.map(|map| HfConfig {
            path: self.path.clone(),
            prefix: format!("{}{field}.", self.prefix),
            map,
        }))
    }

    /// Token ids: one integer, a list of them, or nothing (an empty list).
    ///
    /// # Errors
    /// The field is there and none of these.
    pub fn token_ids(&self, field: &str) -> Result<Vec<u32>, FormatError> {
        let id = |v: &Value| v.as_u64().filter(|&n| n <= MOST).map(|n| n as u32);
        let ids = self.optional(field, "a token id or a list of them", |v| match v {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    /// The error for a value that is well-formed but cannot be used.
    pub fn unsupported(&self, field: &str, accepted: impl Into<String>) -> FormatError {
        let found = self
            .map
            .get(field)
            .map_or("is missing".into(), |v| format!("is {}", show(v)));
        FormatError::Field {
            path: self.path.clone(),
            field: format!("{}{field}", self.prefix),
            found,
            accepted: accepted.into(),
        }
    }

    fn optional<'a, T>(
        &'a self,
        field: &str,
        accepted: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, FormatError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(value) => Ok(Some(value)),
                None => Err(self.unsupported(field, accepted)),
            },
        }
    }

    fn required<T>(&self, field: &str, value: Option<T>, accepted: &str) -> Result<T, FormatError> {
        value.ok_or_else(|| self.unsupported(field, accepted))
    }
}

const SIZE: &str = "an integer from 0 to 2147483647";
const REAL: &str = "a finite number that is not negative";
const BOOL: &str = "true or false";
const TEXT: &str = "a string";

/// The ids that end a generation: `generation_config.json`'s where it names any, else `config.json`'s. Empty where
/// neither does.
///
/// # Errors
/// A file cannot be read, or `eos_token_id` is neither an id nor a list of ids.
pub fn eos_token_ids(folder: &Path) -> Result<Vec<u32>, FormatError> {
    for name in [GENERATION_CONFIG, MODEL_CONFIG] {
        let file = folder.join(name);
        if file.is_file() {
            let ids = HfConfig::read(&file)?.token_ids("eos_token_id")?;
            if !ids.is_empty() {
                return Ok(ids);
            }
        }
    }
    Ok(Vec::new())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn config(json: &str) -> HfConfig {
        let map = serde_json::from_str(json).unwrap();
        HfConfig::from_map(Path::new("m/config.json"), map)
    }

    #[test]
    fn fields_are_read_by_type() {
        let config = config(
            r#"{"n":576,"x":1e-5,"b":true,"s":"silu","l":["a"],"none":null,"r":{"factor":8.0},"eos":[2,3],"bos":1}"#,
        );
        assert_eq!(config.usize("n").unwrap(), 576);
        assert_eq!(config.f64("x").unwrap(), 1e-5);
        assert_eq!(config.f64("n").unwrap(), 576.0);
        assert!(config.bool("b").unwrap());
        assert_eq!(config.str("s").unwrap(), "silu");
        assert_eq!(config.opt_strs("l").unwrap().unwrap(), ["a"]);
        for missing in ["none", "missing"] {
            assert_eq!(config.opt_usize(missing).unwrap(), None);
            assert!(config.opt_object(missing).unwrap().is_none());
            assert!(config.token_ids(missing).unwrap().is_empty());
        }
        assert_eq!(config.token_ids("eos").unwrap(), [2, 3]);
        assert_eq!(config.token_ids("bos").unwrap(), [1]);
        let rope = config.opt_object("r").unwrap().unwrap();
        assert_eq!(rope.f64("factor").unwrap(), 8.0);
    }

    #[test]
    fn errors_name_file_field_value_and_what_is_accepted() {
        let config = config(r#"{"n":-1,"x":1e39,"s":7,"r":{"factor":"x"},"long":[1,2]}"#);
        assert_eq!(
            config.usize("n").unwrap_err().to_string(),
            "m/config.json: `n` is -1; accepted: an integer from 0 to 2147483647"
        );
        assert_eq!(
            config.usize("hidden_size").unwrap_err().to_string(),
            "m/config.json: `hidden_size` is missing; accepted: an integer from 0 to 2147483647"
        );
        let rope = config.opt_object("r").unwrap().unwrap();
        let message = rope.f64("factor").unwrap_err().to_string();
        assert!(message.contains("`r.factor` is \"x\""), "{message}");
        assert_eq!(
            config.unsupported("s", "\"silu\"").to_string(),
            "m/config.json: `s` is 7; accepted: \"silu\""
        );
    }

    #[test]
    fn impossible_numbers_are_refused() {
        for value in [
            "-1",
            "2147483648",
            "1e30",
            "18446744073709551616",
            "1.5",
            "\"8\"",
            "true",
        ] {
            let config = config(&format!(r#"{{"n":{value}}}"#));
            config.usize("n").expect_err(value);
            config.token_ids("n").expect_err(value);
        }
        for value in ["-1", "-0.1", "1e39", "1e308", "\"1\"", "[]"] {
            let config = config(&format!(r#"{{"n":{value}}}"#));
            config.f64("n").expect_err(value);
        }
    }

    #[test]
    fn files_that_are_not_json_objects_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let message = HfConfig::read(folder.path()).unwrap_err().to_string();
        assert!(message.contains("config.json: is missing"), "{message}");
        let deep = format!(r#"{{"a":{}}}"#, "[".repeat(100_000));
        for text in [
            "",
            "[]",
            "7",
            "{\"a\":NaN}",
            "{\"a\":1e999}",
            "{\"a\":",
            &deep,
        ] {
            fs::write(folder.path().join(MODEL_CONFIG), text).unwrap();
            let message = HfConfig::read(folder.path()).expect_err(text).to_string();
            assert!(message.contains("config.json"), "{message}");
        }
    }

    #[test]
    fn generation_config_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        assert!(eos_token_ids(folder.path()).unwrap().is_empty());
        fs::write(folder.path().join(MODEL_CONFIG), r#"{"eos_token_id":2}"#).unwrap();
        assert_eq!(eos_token_ids(folder.path()).unwrap(), [2]);
        fs::write(
            folder.path().join(GENERATION_CONFIG),
            r#"{"eos_token_id":[5,6]}"#,
        )
        .unwrap();
        assert_eq!(eos_token_ids(folder.path()).unwrap(), [5, 6]);
        fs::write(
            folder.path().join(GENERATION_CONFIG),
            r#"{"do_sample":true}"#,
        )
        .unwrap();
        assert_eq!(eos_token_ids(folder.path()).unwrap(), [2]);
        fs::write(
            folder.path().join(GENERATION_CONFIG),
            r#"{"eos_token_id":"</s>"}"#,
        )
        .unwrap();
        let message = eos_token_ids(folder.path()).unwrap_err().to_string();
        assert!(message.contains("generation_config.json"), "{message}");
    }
}
