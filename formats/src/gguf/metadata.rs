//! The key-value part of a GGUF file, with getters that check the type.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::FormatError;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// An unsigned integer of any width.
    Unsigned(u64),
    /// A signed integer of any width.
    Signed(i64),
    /// A float of either width.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A UTF-8 string.
    Str(String),
    /// An array.
    Array(Array),
}

/// An array of metadata values, all of one type.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    /// Unsigned integers of any width.
    Unsigned(Vec<u64>),
    /// Signed integers of any width.
    Signed(Vec<i64>),
    /// Floats of either width.
    Float(Vec<f64>),
    /// Truth values.
    Bool(Vec<bool>),
    /// Strings.
    Str(Vec<String>),
    /// Arrays of arrays.
    Nested(Vec<Array>),
}

impl Value {
    fn describe(&self) -> String {
        match self {
            Self::Unsigned(v) => format!("the integer {v}"),
            Self::Signed(v) => format!("the integer {v}"),
            Self::Float(v) => format!("the float {v}"),
            Self::Bool(v) => format!("the bool {v}"),
            Self::Str(v) => format!("the string {:?}", v.chars().take(40).collect::<String>()),
            Self::Array(_) => "an array".to_owned(),
        }
    }

    fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(v) => Some(*v),
            Self::Signed(v) => u64::try_from(*v).ok(),
            _ => None,
        }
    }
}

/// All metadata of a GGUF file. A getter answers `None` for a key that is not there and an error,
/// naming file and key, for one of another type.
#[derive(Clone, Debug)]
pub struct Metadata {
    path: PathBuf,
    values: BTreeMap<String, Value>,
}

impl Metadata {
    /// Metadata put together by hand, for tests and tools. `path` is what errors will name.
    #[must_use]
    pub fn new(path: &Path, values: BTreeMap<String, Value>) -> Self {
        Self { path: path.to_owned(), values }
    }

    /// The file it came from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All keys and values, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// The raw value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// An error that says what `key` should have been.
    #[must_use]
    pub fn error(&self, key: &str, expected: &str) -> FormatError {
        let found = self.get(key).map_or_else(|| "nothing".to_owned(), Value::describe);
        FormatError::invalid(&self.path, key, expected, found)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        cast: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, FormatError> {
        self.get(key).map(|v| cast(v).ok_or_else(|| self.error(key, expected))).transpose()
    }

    /// A string.
    ///
    /// # Errors
    /// The key has another type.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>, FormatError> {
        self.typed(key, "a string", |v| match v {
            Value::Str(s) => Some(s.as_str()),
            _ => None,
        })
    }

    /// A non-negative integer below 2³².
    ///
    /// # Errors
    /// The key has another type or the value does not fit.
    pub fn get_u32(&self, key: &str) -> Result<Option<u32>, FormatError> {
        self.typed(key, "a 32-bit unsigned integer", |v| {
            v.as_u64().and_then(|v| u32::try_from(v).ok())
        })
    }

    /// A non-negative integer.
    ///
    /// # Errors
    /// The key has another type or the value is negative.
    pub fn get_u64(&self, key: &str) -> Result<Option<u64>, FormatError> {
        self.typed(key, "an unsigned integer", Value::as_u64)
    }

    /// A finite float.
    ///
    /// # Errors
    /// The key has another type or is NaN or infinite.
    pub fn get_f32(&self, key: &str) -> Result<Option<f32>, FormatError> {
        self.typed(key, "a finite float", |v| match v {
            Value::Float(f) if f.is_finite() => Some(*f as f32),
            _ => None,
        })
    }

    /// A truth value.
    ///
    /// # Errors
    /// The key has another type.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>, FormatError> {
        self.typed(key, "a bool", |v| match v {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    }

    /// An array of strings.
    ///
    /// # Errors
    /// The key has another type.
    pub fn get_str_array(&self, key: &str) -> Result<Option<&[String]>, FormatError> {
        self.typed(key, "an array of strings", |v| match v {
            Value::Array(Array::Str(a)) => Some(a.as_slice()),
            _ => None,
        })
    }

    /// An array of integers that fit 32 bits.
    ///
    /// # Errors
    /// The key has another type or a value does not fit.
    pub fn get_i32_array(&self, key: &str) -> Result<Option<Vec<i32>>, FormatError> {
        self.typed(key, "an array of 32-bit integers", |v| match v {
            Value::Array(Array::Signed(a)) => a.iter().map(|v| i32::try_from(*v).ok()).collect(),
            Value::Array(Array::Unsigned(a)) => a.iter().map(|v| i32::try_from(*v).ok()).collect(),
            _ => None,
        })
    }

    /// An array of floats.
    ///
    /// # Errors
    /// The key has another type.
    pub fn get_f32_array(&self, key: &str) -> Result<Option<Vec<f32>>, FormatError> {
        self.typed(key, "an array of floats", |v| match v {
            Value::Array(Array::Float(a)) => Some(a.iter().map(|v| *v as f32).collect()),
            _ => None,
        })
    }

    /// A string that must be there.
    ///
    /// # Errors
    /// The key is missing or has another type.
    pub fn require_str(&self, key: &str) -> Result<&str, FormatError> {
        self.get_str(key)?.ok_or_else(|| self.error(key, "a string"))
    }

    /// An integer that must be there.
    ///
    /// # Errors
    /// The key is missing, has another type or does not fit.
    pub fn require_u32(&self, key: &str) -> Result<u32, FormatError> {
        self.get_u32(key)?.ok_or_else(|| self.error(key, "a 32-bit unsigned integer"))
    }

    /// A float that must be there.
    ///
    /// # Errors
    /// The key is missing or has another type.
    pub fn require_f32(&self, key: &str) -> Result<f32, FormatError> {
        self.get_f32(key)?.ok_or_else(|| self.error(key, "a finite float"))
    }

    /// An array of strings that must be there.
    ///
    /// # Errors
    /// The key is missing or has another type.
    pub fn require_str_array(&self, key: &str) -> Result<&[String], FormatError> {
        self.get_str_array(key)?.ok_or_else(|| self.error(key, "an array of strings"))
    }
}
