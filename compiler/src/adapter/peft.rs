//! PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`, in and out.
//!
//! Whatever the configuration asks for beyond LoRA, rsLoRA and DoRA on linear layers is refused by name:
//! an adapter that is applied in part says something else than what was trained.

mod write;

use std::path::Path;

use edge_models::{DecoderSpec, TensorRow};
use safetensors::SafeTensors;
use serde_json::Value;

use super::{Adapter, AdapterError, CONFIG, Pair, Settings, linear, module};
use crate::teacher;
pub use write::write;

const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts in front of a module's name.
const PREFIX: &str = "base_model.model.";
/// Largest adapter that is read, in bytes.
const MAX_BYTES: u64 = 1 << 33;

/// Reads an adapter for models with `spec`.
///
/// # Errors
/// A key that asks for what is not done, a tensor that is missing, surplus, misshapen or not finite.
pub fn read(folder: &Path, spec: &DecoderSpec) -> Result<Adapter, AdapterError> {
    let config = Settings::read(&folder.join(CONFIG))?;
    let path = folder.join(WEIGHTS);
    let io = |source| AdapterError::Io { path: path.clone(), source };
    let size = std::fs::metadata(&path).map_err(io)?.len();
    if size > MAX_BYTES {
        let message = format!("{size} bytes, expected at most {MAX_BYTES}");
        return Err(io(std::io::Error::new(std::io::ErrorKind::InvalidData, message)));
    }
    let bytes = std::fs::read(&path).map_err(io)?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|source| AdapterError::Safetensors { path: path.clone(), source })?;
    let mut reader = Reader { path: &path, file: &file, taken: 0 };
    let mut pairs = Vec::new();
    for (row, layer) in linear(spec) {
        pairs.extend(reader.pair(&config, row, layer, spec)?);
    }
    if reader.taken < file.len() {
        let known = |name: &&str| {
            pairs
                .iter()
                .any(|pair| name.starts_with(&format!("{PREFIX}{}.lora_", module(pair.row, pair.layer))))
        };
        let names = file.names();
        let name = names.iter().find(|name| !known(name)).map_or("", |name| name);
        return Err(
            reader.refuse(name, format!("no linear layer of this {} model takes it", spec.family.name))
        );
    }
    if pairs.is_empty() {
        return Err(reader.refuse("", "the adapter has no tensors".into()));
    }
    Ok(Adapter { path: folder.into(), pairs, rs: config.rs })
}

impl Settings {
    /// What of `adapter_config.json` counts.
    fn read(path: &Path) -> Result<Self, AdapterError> {
        let json = teacher::json(path).map_err(|source| AdapterError::Io { path: path.into(), source })?;
        let error = |key: &str, expected| {
            let found = json.get(key).map_or("absent".into(), Value::to_string);
            AdapterError::Key { path: path.into(), key: key.into(), found, expected }
        };
        let number = |key: &str| {
            let found = json.get(key).and_then(Value::as_f64);
            found.filter(|x| *x > 0.0 && x.is_finite()).ok_or_else(|| error(key, "a number above 0"))
        };
        let text = |key: &str| json.get(key).and_then(Value::as_str);
        let on = |key: &str| json.get(key).and_then(Value::as_bool) == Some(true);
        if text("peft_type") != Some("LORA") {
            return Err(error("peft_type", "LORA"));
        }
        if text("bias").is_some_and(|bias| bias != "none") {
            return Err(error("bias", "none"));
        }
        let off = ["fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora"];
        if let Some(key) = off.into_iter().find(|key| on(key)) {
            return Err(error(key, "false"));
        }
        let absent = [
            "modules_to_save",
            "layer_replication",
            "alora_invocation_tokens",
            "target_parameters",
            "trainable_token_indices",
            "megatron_config",
            "kasa_config",
            "velora_config",
            "monteclora_config",
            "arrow_config",
        ];
        let empty = |value: &Value| match value {
            Value::Null => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        if let Some(key) = absent.into_iter().find(|key| json.get(key).is_some_and(|value| !empty(value))) {
            return Err(error(key, "null"));
        }
        let list = |key| pattern(&json, key).ok_or_else(|| error(key, PATTERN));
        let whole = |key: &str, value: f64| {
            let fits = value.fract() == 0.0 && value <= MAX_RANK;
            if fits { Ok(value as usize) } else { Err(error(key, "whole numbers above 0, to 65536")) }
        };
        let mut ranks = Vec::new();
        for (name, rank) in list("rank_pattern")? {
            ranks.push((name, whole("rank_pattern", rank)?));
        }
        Ok(Self {
            rank: whole("r", number("r")?)?,
            alpha: number("lora_alpha")?,
            ranks,
            alphas: list("alpha_pattern")?,
            rs: on("use_rslora"),
            dora: on("use_dora"),
        })
    }
}

/// Largest rank that is read.
const MAX_RANK: f64 = 65_536.0;
const PATTERN: &str = "ends of modules' names (no expressions), each with a number above 0";

/// A map from ends of modules' names to numbers; `None` if it is something else. PEFT takes the names for
/// regular expressions; one that is more than a name is not understood here.
fn pattern(json: &Value, key: &str) -> Option<Vec<(String, f64)>> {
    let Some(value) = json.get(key).filter(|value| !value.is_null()) else { return Some(Vec::new()) };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let entry = |(name, value): (&String, &Value)| {
        let value = value.as_f64().filter(|x| *x > 0.0 && x.is_finite())?;
        name.chars().all(plain).then(|| (name.clone(), value))
    };
    value.as_object()?.iter().map(entry).collect()
}

struct Reader<'f> {
    path: &'f Path,
    file: &'f SafeTensors<'f>,
    /// Tensors that somebody asked for.
    taken: usize,
}

impl Reader<'_> {
    fn refuse(&self, name: &str, message: String) -> AdapterError {
        AdapterError::Tensor { path: self.path.into(), name: name.into(), message }
    }

    /// The pair of a module, if the file has it.
    fn pair(
        &mut self,
        config: &Settings,
        row: &'static TensorRow,
        layer: usize,
        spec: &DecoderSpec,
    ) -> Result<Option<Pair>, AdapterError> {
        let module = module(row, layer);
        let name = |part: &str| format!("{PREFIX}{module}.{part}");
        let [a, b] = ["lora_A.weight", "lora_B.weight"].map(name);
        match [&a, &b].map(|name| self.file.tensor(name).is_ok()) {
            [false, false] => return Ok(None),
            [true, true] => {}
            [has_a, _] => {
                let (there, missing) = if has_a { (&a, &b) } else { (&b, &a) };
                return Err(self.refuse(there, format!("its other half `{missing}` is missing")));
            }
        }
        let [rows, cols] = row.file_shape(spec);
        let (rank, scale) = config.rank_and_scale(&module);
        let down = self.tensor(&a, &[rank, cols])?;
        let up = self.tensor(&b, &[rows, rank])?;
        let magnitude = if config.dora {
            let names = [name("lora_magnitude_vector"), name("lora_magnitude_vector.weight")];
            let found = names.iter().find(|name| self.file.tensor(name).is_ok()).unwrap_or(&names[0]);
            Some(self.tensor(found, &[rows])?)
        } else {
            None
        };
        Ok(Some(Pair { row, layer, rank, down, up, scale, magnitude }))
    }

    /// The values of a tensor of a known shape.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, AdapterError> {
        let view = self.file.tensor(name).map_err(|_| self.refuse(name, "it is missing".into()))?;
        if view.shape() != shape {
            return Err(self.refuse(name, format!("its shape is {:?}, expected {shape:?}", view.shape())));
        }
        let values = teacher::to_f32(view.dtype(), view.data()).ok_or_else(|| {
            self.refuse(name, format!("its type is {:?}, expected F32, F16 or BF16", view.dtype()))
        })?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            let message = format!("it holds {} at element {index}, expected finite numbers", values[index]);
            return Err(self.refuse(name, message));
        }
        self.taken += 1;
        Ok(values)
    }
}
