//! Typed reading of a TOML file in which every key is known and every fault has a place.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::rc::Rc;

use toml::{Table, Value};

/// Why a target cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// No device file has this name.
    #[error("unknown target `{name}`; known targets: {known}")]
    Unknown {
        /// The name that was asked for.
        name: String,
        /// Every name there is.
        known: String,
    },
    /// The file is not TOML.
    #[error("{file}:{line}: not TOML: {message}")]
    Syntax {
        /// The device file.
        file: String,
        /// Line, from 1.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// A key is missing, unknown or has a value that it cannot have.
    #[error("{file}: `{key}`: found {found}, expected {expected}")]
    Key {
        /// The device file.
        file: String,
        /// Full path of the key.
        key: String,
        /// What is there.
        found: String,
        /// What should be.
        expected: String,
    },
}

/// One table of the file; [`Reader::finish`] refuses what nobody asked for.
pub(crate) struct Reader {
    file: String,
    prefix: String,
    table: Table,
    asked: Vec<&'static str>,
    /// Keys that were there, without the index of their table.
    read: Rc<RefCell<BTreeSet<String>>>,
}

impl Reader {
    pub(crate) fn open(file: &str, text: &str) -> Result<Self, TargetError> {
        let table = text.parse().map_err(|error: toml::de::Error| {
            let start = error.span().map_or(0, |span| span.start).min(text.len());
            TargetError::Syntax {
                file: file.into(),
                line: text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count() + 1,
                message: error.message().replace('\n', " "),
            }
        })?;
        let file = file.into();
        Ok(Self { file, prefix: String::new(), table, asked: Vec::new(), read: Rc::default() })
    }

    pub(crate) fn fault(
        &self,
        key: &str,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> TargetError {
        TargetError::Key {
            file: self.file.clone(),
            key: format!("{}{key}", self.prefix),
            found: found.into(),
            expected: expected.into(),
        }
    }

    /// Whether a key (`cluster.ghz`, tables without index) was there.
    pub(crate) fn was_read(&self, key: &str) -> bool {
        self.read.borrow().contains(key)
    }

    fn take(&mut self, key: &'static str, expected: &str) -> Result<Value, TargetError> {
        self.asked.push(key);
        let table = self.prefix.split('[').next().unwrap_or_default().trim_end_matches('.');
        let full = if table.is_empty() { key.to_owned() } else { format!("{table}.{key}") };
        self.read.borrow_mut().insert(full);
        self.table.remove(key).ok_or_else(|| self.fault(key, "nothing", expected))
    }

    fn child(&self, prefix: String, table: Table) -> Self {
        let (file, read) = (self.file.clone(), Rc::clone(&self.read));
        Self { file, prefix: format!("{}{prefix}.", self.prefix), table, asked: Vec::new(), read }
    }

    /// `read` where the key is there.
    pub(crate) fn optional<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Self, &'static str) -> Result<T, TargetError>,
    ) -> Result<Option<T>, TargetError> {
        if self.table.contains_key(key) {
            return read(self, key).map(Some);
        }
        self.asked.push(key);
        Ok(None)
    }

    /// Text that is not empty.
    pub(crate) fn text(&mut self, key: &'static str) -> Result<String, TargetError> {
        match self.take(key, "text")? {
            Value::String(text) if text.trim().is_empty() => Err(self.fault(key, "an empty string", "text")),
            Value::String(text) => Ok(text),
            other => Err(self.fault(key, kind(&other), "text")),
        }
    }

    /// A list of texts.
    pub(crate) fn texts(&mut self, key: &'static str) -> Result<Vec<String>, TargetError> {
        let expected = "a list of texts";
        let values = match self.take(key, expected)? {
            Value::Array(values) => values,
            other => return Err(self.fault(key, kind(&other), expected)),
        };
        let text = |value| match value {
            Value::String(text) => Ok(text),
            other => Err(self.fault(key, format!("{} in it", kind(&other)), expected)),
        };
        values.into_iter().map(text).collect()
    }

    /// A whole number within `range`.
    pub(crate) fn integer(
        &mut self,
        key: &'static str,
        range: RangeInclusive<u32>,
    ) -> Result<u32, TargetError> {
        match self.take(key, "a whole number")? {
            Value::Integer(value) => u32::try_from(value)
                .ok()
                .filter(|value| range.contains(value))
                .ok_or_else(|| self.outside(key, value, &range)),
            other => Err(self.fault(key, kind(&other), "a whole number")),
        }
    }

    /// A number within `range`.
    pub(crate) fn number(
        &mut self,
        key: &'static str,
        range: RangeInclusive<f64>,
    ) -> Result<f64, TargetError> {
        let value = match self.take(key, "a number")? {
            Value::Integer(value) => value as f64,
            Value::Float(value) => value,
            other => return Err(self.fault(key, kind(&other), "a number")),
        };
        if range.contains(&value) { Ok(value) } else { Err(self.outside(key, value, &range)) }
    }

    fn outside<T: Display>(&self, key: &str, value: impl Display, range: &RangeInclusive<T>) -> TargetError {
        self.fault(key, value.to_string(), format!("{} to {}", range.start(), range.end()))
    }

    /// One of the names in `values`.
    pub(crate) fn one_of<T: Copy>(
        &mut self,
        key: &'static str,
        values: &[(&'static str, T)],
    ) -> Result<T, TargetError> {
        let text = self.text(key)?;
        self.choose(key, &text, values)
    }

    /// Any of the names in `values`, each at most once.
    pub(crate) fn several_of<T: Copy>(
        &mut self,
        key: &'static str,
        values: &[(&'static str, T)],
    ) -> Result<Vec<T>, TargetError> {
        let texts = self.texts(key)?;
        for (index, text) in texts.iter().enumerate() {
            if texts[..index].contains(text) {
                return Err(self.fault(key, format!("`{text}` twice"), "each once"));
            }
        }
        texts.iter().map(|text| self.choose(key, text, values)).collect()
    }

    fn choose<T: Copy>(&self, key: &str, text: &str, values: &[(&'static str, T)]) -> Result<T, TargetError> {
        values.iter().find(|(name, _)| *name == text).map(|(_, value)| *value).ok_or_else(|| {
            let names: Vec<_> = values.iter().map(|(name, _)| *name).collect();
            self.fault(key, format!("`{text}`"), format!("one of {}", names.join(", ")))
        })
    }

    /// A table.
    pub(crate) fn table(&mut self, key: &'static str) -> Result<Self, TargetError> {
        match self.take(key, "a table")? {
            Value::Table(table) => Ok(self.child(key.into(), table)),
            other => Err(self.fault(key, kind(&other), "a table")),
        }
    }

    /// A list of tables.
    pub(crate) fn tables(&mut self, key: &'static str) -> Result<Vec<Self>, TargetError> {
        let values = match self.take(key, "a list of tables")? {
            Value::Array(values) => values,
            other => return Err(self.fault(key, kind(&other), "a list of tables")),
        };
        let table = |(index, value)| match value {
            Value::Table(table) => Ok(self.child(format!("{key}[{index}]"), table)),
            other => Err(self.fault(key, format!("{} in it", kind(&other)), "a list of tables")),
        };
        values.into_iter().enumerate().map(table).collect()
    }

    /// Refuses keys that nobody asked for.
    pub(crate) fn finish(self) -> Result<(), TargetError> {
        match self.table.keys().next() {
            Some(key) => Err(self.fault(key, "an unknown key", format!("only {}", self.asked.join(", ")))),
            None => Ok(()),
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a string",
        Value::Integer(_) => "a whole number",
        Value::Float(_) => "a number",
        Value::Boolean(_) => "a truth value",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
    }
}
