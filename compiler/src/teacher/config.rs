//! `config.json` as a source of hyper-parameters.

use edge_models::Config;
use serde_json::Value;

/// A parsed `config.json`; keys are dotted paths.
#[derive(Clone, Debug)]
pub struct JsonConfig(pub Value);

impl JsonConfig {
    fn find(&self, key: &str) -> Option<&Value> {
        key.split('.').try_fold(&self.0, step)
    }
}

/// The member of an object, or the element of a list by its number.
fn step<'v>(value: &'v Value, part: &str) -> Option<&'v Value> {
    match value {
        Value::Array(list) => list.get(part.parse::<usize>().ok()?),
        _ => value.get(part),
    }
}

impl Config for JsonConfig {
    fn has(&self, key: &str) -> bool {
        self.find(key).is_some()
    }

    fn uint(&self, key: &str) -> Option<u64> {
        self.find(key)?.as_u64()
    }

    fn float(&self, key: &str) -> Option<f64> {
        self.find(key)?.as_f64()
    }

    fn bool(&self, key: &str) -> Option<bool> {
        self.find(key)?.as_bool()
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.find(key)?.as_str()
    }

    fn tensor_shape(&self, _name: &str) -> Option<[u64; 2]> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dotted_paths_and_kinds() {
        let config =
            JsonConfig(serde_json::json!({"a": {"b": 3}, "n": null, "x": -1, "t": "s", "l": ["u", 2.5]}));
        assert_eq!(config.uint("a.b"), Some(3));
        assert_eq!(config.float("a.b"), Some(3.0));
        assert_eq!(config.uint("n"), None);
        assert_eq!(config.uint("x"), None);
        assert_eq!(config.float("x"), Some(-1.0));
        assert_eq!(config.text("t"), Some("s"));
        assert_eq!(config.text("a.c"), None);
        assert_eq!(
            (config.text("l.0"), config.float("l.1"), config.float("l.2")),
            (Some("u"), Some(2.5), None)
        );
        assert!(config.has("n") && config.has("a") && !config.has("a.c") && !config.has("l.x"));
    }
}
