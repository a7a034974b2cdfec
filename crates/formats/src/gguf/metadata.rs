//! The key/value section of a GGUF file.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use super::reader::Reader;
use crate::FormatError;

/// Elements of all arrays together: ten times the largest vocabulary with its merges.
const MOST_ELEMENTS: u64 = 1 << 23;

/// A value: the file's thirteen types, widened to the largest of their kind.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// u8, u16, u32 or u64.
    Unsigned(u64),
    /// i8, i16, i32 or i64.
    Signed(i64),
    /// f32 (exactly, as it was stored) or f64.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// Text.
    String(String),
    /// Many values of one type.
    Array(GgufArray),
}

/// An array of values, which all have one type.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufArray {
    /// u8, u16, u32 or u64.
    Unsigned(Vec<u64>),
    /// i8, i16, i32 or i64.
    Signed(Vec<i64>),
    /// f32 or f64.
    Float(Vec<f64>),
    /// True or false.
    Bool(Vec<bool>),
    /// Text.
    String(GgufStrings),
}

/// Texts, such as the tokens of a vocabulary. They lie in one piece of memory: there may be hundreds of thousands of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GgufStrings {
    text: String,
    /// Where each ends.
    ends: Vec<usize>,
}

impl GgufStrings {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Each in its order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let text = &self.text[start..end];
            start = end;
            text
        })
    }
}

impl<'a> FromIterator<&'a str> for GgufStrings {
    fn from_iter<I: IntoIterator<Item = &'a str>>(texts: I) -> Self {
        let mut strings = Self::default();
        for text in texts {
            strings.text.push_str(text);
            strings.ends.push(strings.text.len());
        }
        strings
    }
}

impl GgufArray {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            GgufArray::Unsigned(list) => list.len(),
            GgufArray::Signed(list) => list.len(),
            GgufArray::Float(list) => list.len(),
            GgufArray::Bool(list) => list.len(),
            GgufArray::String(list) => list.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Display for GgufValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LONGEST: usize = 80;
        match self {
            GgufValue::Unsigned(n) => write!(f, "{n}"),
            GgufValue::Signed(n) => write!(f, "{n}"),
            GgufValue::Float(x) => write!(f, "{x}"),
            GgufValue::Bool(b) => write!(f, "{b}"),
            GgufValue::String(text) if text.chars().count() <= LONGEST => write!(f, "{text:?}"),
            GgufValue::String(text) => {
                write!(f, "{:?}…", text.chars().take(LONGEST).collect::<String>())
            }
            GgufValue::Array(array) => write!(f, "an array of {} elements", array.len()),
        }
    }
}

/// Typed access to the key/value section. A getter gives `None` where the key is missing or holds another type.
#[derive(Clone, Debug, Default)]
pub struct GgufMetadata {
    values: BTreeMap<String, GgufValue>,
    /// The keys in the file's order, and where the file has the type and the value of each.
    pub(super) places: Vec<(String, Range<usize>)>,
}

impl GgufMetadata {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&GgufValue> {
        self.values.get(key)
    }

    /// Every key and value, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &GgufValue)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Text.
    pub fn get_str(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            GgufValue::String(text) => Some(text),
            _ => None,
        }
    }

    /// An integer that is not negative.
    pub fn get_u64(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            GgufValue::Unsigned(n) => Some(*n),
            GgufValue::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// An integer in u32's range, such as a token id.
    pub fn get_u32(&self, key: &str) -> Option<u32> {
        self.get_u64(key)?.try_into().ok()
    }

    /// A number, of whatever type.
    pub fn get_f64(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            GgufValue::Unsigned(n) => Some(*n as f64),
            GgufValue::Signed(n) => Some(*n as f64),
            GgufValue::Float(x) => Some(*x),
            _ => None,
        }
    }

    /// True or false.
    pub fn get_bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            GgufValue::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// An array of any type.
    pub fn get_array(&self, key: &str) -> Option<&GgufArray> {
        match self.get(key)? {
            GgufValue::Array(array) => Some(array),
            _ => None,
        }
    }

    /// An array of texts, such as `tokenizer.ggml.tokens` and `tokenizer.ggml.merges`.
    pub fn get_str_array(&self, key: &str) -> Option<&GgufStrings> {
        match self.get_array(key)? {
            GgufArray::String(list) => Some(list),
            _ => None,
        }
    }

    /// An array of integers, such as `tokenizer.ggml.token_type`.
    pub fn get_i64_array(&self, key: &str) -> Option<Vec<i64>> {
        match self.get_array(key)? {
            GgufArray::Signed(list) => Some(list.clone()),
            GgufArray::Unsigned(list) => list.iter().map(|&n| i64::try_from(n).ok()).collect(),
            _ => None,
        }
    }

    /// An array of real numbers, such as `tokenizer.ggml.scores`.
    pub fn get_f64_array(&self, key: &str) -> Option<&[f64]> {
        match self.get_array(key)? {
            GgufArray::Float(list) => Some(list),
            _ => None,
        }
    }

    pub(super) fn read(reader: &mut Reader<'_>, count: u64) -> Result<GgufMetadata, FormatError> {
        let mut values = BTreeMap::new();
        let mut places = Vec::new();
        let mut budget = MOST_ELEMENTS;
        for _ in 0..count {
            let key = reader.string("a key")?;
            let start = reader.position();
            let value = read_value(reader, &key, &mut budget)?;
            places.push((key.clone(), start..reader.position()));
            if values.insert(key.clone(), value).is_some() {
                return Err(reader.error(format!("key `{key}` occurs twice")));
            }
        }
        Ok(GgufMetadata { values, places })
    }
}

fn read_value(
    reader: &mut Reader<'_>,
    key: &str,
    budget: &mut u64,
) -> Result<GgufValue, FormatError> {
    let what = format!("the value of `{key}`");
    let kind = reader.u32(&what)?;
    Ok(match kind {
        ARRAY => {
            let element = reader.u32(&what)?;
            let count = reader.u64(&what)?;
            let what = format!("elements of `{key}`");
            let smallest = smallest(element).ok_or_else(|| unknown(reader, key, element))?;
            reader.check_count(count, *budget, smallest, &what)?;
            *budget -= count;
            GgufValue::Array(read_array(reader, element, count, &what)?)
        }
        STRING => GgufValue::String(reader.string(&what)?),
        BOOL => GgufValue::Bool(read_bool(reader, &what)?),
        F32 | F64 => GgufValue::Float(read_float(reader, kind, &what)?),
        U8 | U16 | U32 | U64 => GgufValue::Unsigned(read_unsigned(reader, kind, &what)?),
        I8 | I16 | I32 | I64 => GgufValue::Signed(read_signed(reader, kind, &what)?),
        other => return Err(unknown(reader, key, other)),
    })
}

fn read_array(
    reader: &mut Reader<'_>,
    element: u32,
    count: u64,
    what: &str,
) -> Result<GgufArray, FormatError> {
    let all = 0..count;
    Ok(match element {
        STRING => GgufArray::String(all.map(|_| reader.text(what)).collect::<Result<_, _>>()?),
        BOOL => GgufArray::Bool(
            all.map(|_| read_bool(reader, what))
                .collect::<Result<_, _>>()?,
        ),
        F32 | F64 => GgufArray::Float(
            all.map(|_| read_float(reader, element, what))
                .collect::<Result<_, _>>()?,
        ),
        U8 | U16 | U32 | U64 => GgufArray::Unsigned(
            all.map(|_| read_unsigned(reader, element, what))
                .collect::<Result<_, _>>()?,
        ),
        _ => GgufArray::Signed(
            all.map(|_| read_signed(reader, element, what))
                .collect::<Result<_, _>>()?,
        ),
    })
}

const U8: u32 = 0;
const I8: u32 = 1;
const U16: u32 = 2;
const I16: u32 = 3;
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const U64: u32 = 10;
const I64: u32 = 11;
const F64: u32 = 12;

/// Bytes of the smallest value of a type that an array may hold. Arrays of arrays are not in use and not read.
fn smallest(kind: u32) -> Option<u64> {
    match kind {
        U8 | I8 | BOOL => Some(1),
        U16 | I16 => Some(2),
        U32 | I32 | F32 => Some(4),
        U64 | I64 | F64 | STRING => Some(8),
        _ => None,
    }
}

fn unknown(reader: &Reader<'_>, key: &str, kind: u32) -> FormatError {
    let name = if kind == ARRAY {
        " (an array of arrays)"
    } else {
        ""
    };
    reader.error(format!(
        "`{key}` has values of type number {kind}{name}, which cannot be read"
    ))
}

fn read_bool(reader: &mut Reader<'_>, what: &str) -> Result<bool, FormatError> {
    match reader.array::<1>(what)? {
        [0] => Ok(false),
        [1] => Ok(true),
        [other] => Err(reader.error(format!("{what}: {other} is neither true (1) nor false (0)"))),
    }
}

fn read_float(reader: &mut Reader<'_>, kind: u32, what: &str) -> Result<f64, FormatError> {
    Ok(if kind == F64 {
        f64::from_le_bytes(reader.array(what)?)
    } else {
        f64::from(f32::from_le_bytes(reader.array(what)?))
    })
}

fn read_unsigned(reader: &mut Reader<'_>, kind: u32, what: &str) -> Result<u64, FormatError> {
    Ok(match kind {
        U8 => u64::from(u8::from_le_bytes(reader.array(what)?)),
        U16 => u64::from(u16::from_le_bytes(reader.array(what)?)),
        U32 => u64::from(u32::from_le_bytes(reader.array(what)?)),
        _ => u64::from_le_bytes(reader.array(what)?),
    })
}

fn read_signed(reader: &mut Reader<'_>, kind: u32, what: &str) -> Result<i64, FormatError> {
    Ok(match kind {
        I8 => i64::from(i8::from_le_bytes(reader.array(what)?)),
        I16 => i64::from(i16::from_le_bytes(reader.array(what)?)),
        I32 => i64::from(i32::from_le_bytes(reader.array(what)?)),
        _ => i64::from_le_bytes(reader.array(what)?),
    })
}
