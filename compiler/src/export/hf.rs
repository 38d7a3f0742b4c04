//! A model as a Hugging Face folder, which `transformers` loads by itself.
//!
//! `config.json` keeps the spelling that `transformers` 4 and 5 both read (`rope_theta`, `rope_scaling`).
//! What it says is read back before anything is written, so a folder never describes another model.

mod sentence_piece;
#[cfg(test)]
mod tests;
mod tokenizer;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use edge_models::{Activation, DecoderSpec, NameBuf, Role, RopeScaling, SpecError, TensorRow};
use safetensors::SafeTensorError;
use serde_json::{Value, json};

use crate::model::Model;
use crate::teacher::JsonConfig;
use crate::text::TextError;
use tokenizer::Special;

const WEIGHTS: &str = "model.safetensors";
const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// Everything that a folder written here can hold.
const FILES: [&str; 5] = [CONFIG, WEIGHTS, GENERATION, TOKENIZER, TOKENIZER_CONFIG];

/// Why a model could not be written as a Hugging Face folder.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum HfError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: {source}", path.display())]
    Safetensors { path: PathBuf, source: SafeTensorError },
    #[error("{}: there is {found} in the way, expected a folder of an earlier export or none", path.display())]
    Occupied { path: PathBuf, found: String },
    #[error("{}: cannot say {what} for family `{family}`", path.display())]
    Inexpressible { path: PathBuf, family: &'static str, what: String },
    #[error("{}: {source}", path.display())]
    Spec { path: PathBuf, source: SpecError },
    #[error("{}: tensor `{name}` is missing", path.display())]
    MissingTensor { path: PathBuf, name: String },
    #[error("{}: tensor `{name}` is {found}, expected {expected}", path.display())]
    Tensor { path: PathBuf, name: String, found: String, expected: String },
    #[error("{}: {source}", path.display())]
    Tokenizer { path: PathBuf, source: Box<TextError> },
    #[error("{}: {message}", path.display())]
    Vocabulary { path: PathBuf, message: String },
}

/// Writes `model` to `folder`, whole or not at all. A folder of an earlier export is replaced; one that
/// holds anything else is left alone.
///
/// # Errors
/// See [`HfError`].
pub fn write(model: &Model, folder: &Path) -> Result<(), HfError> {
    check_place(folder)?;
    let mut documents = Vec::new();
    let mut special = Special::default();
    if let Some(vocabulary) = &model.vocabulary {
        let files = tokenizer::files(vocabulary, &model.spec, folder)?;
        documents.push((TOKENIZER, files.tokenizer));
        documents.push((TOKENIZER_CONFIG, files.config));
        special = files.special;
    }
    documents.push((CONFIG, config(model, special, &folder.join(CONFIG))?));
    documents.push((GENERATION, generation(special)));
    let tensors = tensors(model, &folder.join(WEIGHTS))?;
    replace(folder, |place| {
        for (name, document) in &documents {
            write_json(&place.join(name), document)
                .map_err(|source| HfError::Io { path: folder.join(name), source })?;
        }
        let path = place.join(WEIGHTS);
        let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize_to_file(tensors, Some(about), &path)
            .map_err(|source| HfError::Safetensors { path: folder.join(WEIGHTS), source })?;
        finish(&path).map_err(|source| HfError::Io { path: folder.join(WEIGHTS), source })
    })
}

fn write_json(path: &Path, document: &Value) -> io::Result<()> {
    let mut file = File::create(path)?;
    let mut bytes = serde_json::to_vec_pretty(document)?;
    bytes.push(b'\n');
    file.write_all(&bytes)?;
    file.sync_all()
}

/// Flushes a file to the disk; the library that wrote it made it unreadable for others.
fn finish(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o644))?;
    }
    File::open(path)?.sync_all()
}

/// Refuses a place with something in it that no earlier export wrote.
fn check_place(folder: &Path) -> Result<(), HfError> {
    let io = |source| HfError::Io { path: folder.into(), source };
    let occupied = |found| HfError::Occupied { path: folder.into(), found };
    if fs::symlink_metadata(folder).is_err() {
        return Ok(());
    }
    if !folder.is_dir() {
        return Err(occupied("a file".into()));
    }
    for entry in fs::read_dir(folder).map_err(io)? {
        let name = entry.map_err(io)?.file_name();
        if !FILES.iter().any(|known| name == *known) {
            return Err(occupied(format!("`{}`", name.to_string_lossy())));
        }
    }
    Ok(())
}

/// Fills a folder beside `folder` and puts it in its place.
fn replace(folder: &Path, fill: impl FnOnce(&Path) -> Result<(), HfError>) -> Result<(), HfError> {
    let io = |source| HfError::Io { path: folder.into(), source };
    let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = tempfile::Builder::new()
        .prefix(".edgec-")
        .tempdir_in(parent)
        .map_err(crate::atomic::plain)
        .map_err(io)?;
    let (new, old) = (temporary.path().join("new"), temporary.path().join("old"));
    fs::create_dir(&new).map_err(io)?;
    fill(&new)?;
    sync_folder(&new).map_err(io)?;
    // A folder cannot be renamed onto one that is not empty.
    let had_one = fs::symlink_metadata(folder).is_ok();
    if had_one {
        fs::rename(folder, &old).map_err(io)?;
    }
    if let Err(source) = fs::rename(&new, folder) {
        if had_one {
            fs::rename(&old, folder).map_err(io)?;
        }
        return Err(io(source));
    }
    sync_folder(parent).map_err(io)
}

/// Flushes the names in a folder to the disk.
fn sync_folder(folder: &Path) -> io::Result<()> {
    // Elsewhere a folder cannot be opened as a file.
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// `rope_scaling`; `None` for what it cannot say.
fn rope_scaling(model: &Model) -> Option<Value> {
    Some(match model.spec.rope.scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_context as u64,
        }),
        RopeScaling::Long { original_context, attention_factor } => {
            let list = |role| -> Option<Vec<f64>> {
                let divisors = model.weights.get(role, 0)?.to_vec1::<f32>().ok()?;
                Some(divisors.into_iter().map(shortest).collect())
            };
            // transformers 4 refuses any other key beside these three.
            let mut scaling = json!({
                "type": "longrope",
                "long_factor": list(Role::RopeLong)?,
                "short_factor": list(Role::RopeShort)?,
            });
            let stretched = model.spec.context as f64 / original_context as f64;
            if attention_factor != RopeScaling::long_attention_factor(stretched, original_context) {
                scaling["attention_factor"] = shortest(attention_factor).into();
            }
            scaling
        }
        RopeScaling::Table => return None,
    })
}

/// The keys that only some models need.
fn particular(spec: &DecoderSpec, document: &mut Value) {
    let cap = |cap: f32| if cap > 0.0 { shortest(cap).into() } else { Value::Null };
    document["sliding_window"] = if spec.window > 0 { spec.window.into() } else { Value::Null };
    if let Some(rope) = spec.local_rope {
        document["rope_local_base_freq"] = rope.theta.into();
    }
    if let RopeScaling::Long { original_context, .. } = spec.rope.scaling {
        document["original_max_position_embeddings"] = original_context.into();
    }
    if spec.rope_dims != spec.head_dim {
        document["partial_rotary_factor"] = (spec.rope_dims as f64 / spec.head_dim as f64).into();
    }
    // Keys that only Gemma's files have, and for which absence does not mean what it means elsewhere.
    if spec.post_norms {
        let kind = |layer| if spec.local.contains(layer) { "sliding_attention" } else { "full_attention" };
        document["layer_types"] = (0..spec.layers).map(kind).collect();
        document["hidden_activation"] = document["hidden_act"].clone();
        document["attn_logit_softcapping"] = cap(spec.attn_soft_cap);
        document["final_logit_softcapping"] = cap(spec.final_soft_cap);
        let scalar = spec.query_pre_attn_scalar();
        document["query_pre_attn_scalar"] =
            if scalar.fract() == 0.0 { (scalar as u64).into() } else { scalar.into() };
    }
}

/// `config.json`, checked to say exactly the model's specification.
fn config(model: &Model, special: Special, path: &Path) -> Result<Value, HfError> {
    let spec = &model.spec;
    let family = spec.family;
    let inexpressible = |what| HfError::Inexpressible { path: path.into(), family: family.name, what };
    let scaling =
        rope_scaling(model).ok_or_else(|| inexpressible("a table of rotary divisors".to_owned()))?;
    let mut document = json!({
        "architectures": [family.hf_architecture],
        "model_type": family.hf_model_type,
        "torch_dtype": "float32",
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.context,
        "hidden_act": match spec.activation {
            Activation::Silu => "silu",
            Activation::GeluTanh => "gelu_pytorch_tanh",
        },
        "rms_norm_eps": shortest(spec.norm_eps),
        "rope_theta": spec.rope.theta,
        "rope_scaling": scaling,
        // A family whose biases are part of its architecture ignores the key.
        "attention_bias": spec.qkv_bias && spec.attn_out_bias,
        "mlp_bias": false,
        "tie_word_embeddings": spec.tied_embeddings,
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        // Left out, it would be a number of the family's own vocabulary.
        "pad_token_id": special.pad,
    });
    particular(spec, &mut document);
    let read = family
        .from_hf
        .read(&JsonConfig(document.clone()))
        .map_err(|source| HfError::Spec { path: path.into(), source })?;
    if read == *spec {
        return Ok(document);
    }
    let biases = |spec: &DecoderSpec| (spec.qkv_bias, spec.attn_out_bias);
    Err(inexpressible(if biases(&read) != biases(spec) {
        let (qkv, out) = biases(spec);
        format!("biases of query, key and value {qkv}, of the attention's output {out}")
    } else if read.rope != spec.rope {
        format!("{:?}", spec.rope)
    } else {
        format!("{spec:?}")
    }))
}

/// The shortest decimal that reads as the same f32: 1e-5, not 9.999999747378752e-6.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn generation(special: Special) -> Value {
    let ids = [("bos_token_id", special.bos), ("eos_token_id", special.eos), ("pad_token_id", special.pad)];
    ids.into_iter()
        .filter_map(|(key, id)| Some((key.to_owned(), id?.into())))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// The tensors by name, checked against the specification.
fn tensors(model: &Model, path: &Path) -> Result<Vec<(String, Tensor)>, HfError> {
    let spec = &model.spec;
    let mut tensors = Vec::new();
    for row in spec.family.tensors.iter().filter(|row| !row.hf.is_empty() && row.leads()) {
        for layer in 0..if row.role.per_layer() { spec.layers } else { 1 } {
            let name = NameBuf::new(row.hf, layer).as_str().to_owned();
            if let Some(tensor) = tensor(model, row, layer, &name, path)? {
                tensors.push((name, tensor));
            }
        }
    }
    Ok(tensors)
}

/// The tensor of a row and of those that are fused with it; `None` if the model has none.
fn tensor(
    model: &Model,
    row: &TensorRow,
    layer: usize,
    name: &str,
    path: &Path,
) -> Result<Option<Tensor>, HfError> {
    let (spec, path) = (&model.spec, || path.to_path_buf());
    let refuse = |found: String, expected: String| HfError::Tensor {
        path: path(),
        name: name.into(),
        found,
        expected,
    };
    let failed = |error: candle_core::Error| refuse(error.to_string(), "a tensor on the CPU".into());
    let mut parts = Vec::new();
    for &role in row.members() {
        let Some(tensor) = model.weights.get(role, layer) else {
            if role.required(spec) {
                return Err(HfError::MissingTensor { path: path(), name: name.into() });
            }
            return Ok(None);
        };
        let [rows, cols] = role.shape(spec);
        let shape = if role.is_vector() { vec![cols] } else { vec![rows, cols] };
        if !role.required(spec) {
            return Err(refuse("there".into(), "none by the hyper-parameters".into()));
        }
        if tensor.dims() != shape || tensor.dtype() != DType::F32 {
            let found = format!("{:?} {:?}", tensor.dtype(), tensor.dims());
            return Err(refuse(found, format!("{:?} {shape:?}", DType::F32)));
        }
        parts.push(tensor.clone());
    }
    let offset = f64::from(spec.family.hf_norm_offset);
    Ok(Some(match (&parts[..], row.role.is_norm() && offset != 0.0) {
        ([norm], true) => (norm - offset).map_err(failed)?,
        ([alone], false) => alone.clone(),
        _ => Tensor::cat(&parts, 0).map_err(failed)?,
    }))
}
