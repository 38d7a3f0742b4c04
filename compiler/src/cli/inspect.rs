//! `edgec inspect`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use edge_runtime::format::{Gguf, Value};
use edge_runtime::session::{Limits, Plan};
use edgec::profile::{self, ModelFile};
use edgec::text::HostTokenizer;
use serde_json::json;

use super::output;

#[derive(Args)]
pub struct Arguments {
    /// GGUF file, Hugging Face folder or run's folder
    model: PathBuf,
    /// List every tensor and every metadata entry
    #[arg(long)]
    all: bool,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let file = profile::open(&arguments.model)?;
    let gguf = file.parse()?;
    let obstacles = obstacles(&gguf);
    if arguments.json {
        return output::json(&document(&file, &gguf, &obstacles));
    }
    let name = gguf.get("general.name").and_then(|value| value.as_str()).unwrap_or("(no name)");
    output::line(format!("{}: {name}", arguments.model.display()))?;
    output::line(format!(
        "  GGUF version {}, {}, family {}",
        gguf.version(),
        output::bytes(file.bytes().len() as u64),
        gguf.architecture().unwrap_or("?"),
    ))?;
    if let Ok(plan) = Plan::new(&gguf, Limits { batch: 64, ..Limits::default() }) {
        let spec = plan.spec();
        output::line(format!(
            "  {} parameters: {} layers of {} wide, {} heads of {} ({} key/value), feed-forward {}, vocabulary {}{}",
            output::parameters(spec.parameters()),
            spec.layers,
            spec.hidden,
            spec.heads,
            spec.head_dim,
            spec.kv_heads,
            spec.ffn,
            spec.vocab,
            if spec.tied_embeddings { ", tied head" } else { "" },
        ))?;
        output::line(format!(
            "  context {} tokens: arena {} with one thread, of it KV cache {}",
            spec.context,
            output::bytes(plan.arena_bytes() as u64),
            output::bytes(plan.kv_bytes() as u64),
        ))?;
    }
    for (dtype, (count, bytes)) in types(&gguf) {
        output::line(format!("  {count:>4} tensors {dtype:<5} {}", output::bytes(bytes as u64)))?;
    }
    for line in &obstacles {
        output::line(format!("  cannot run: {line}"))?;
    }
    if arguments.all {
        everything(&gguf)?;
    }
    Ok(())
}

/// What of the file this runtime refuses, by name.
fn obstacles(gguf: &Gguf<'_>) -> Vec<String> {
    let mut found: Vec<String> = gguf
        .tensors()
        .filter(|tensor| tensor.dtype.is_none())
        .map(|tensor| format!("tensor `{}` has type {}", tensor.name, tensor.type_id))
        .collect();
    let limits = Limits { context: 1, ..Limits::default() };
    if let Err(error) = Plan::new(gguf, limits) {
        found.push(error.to_string());
    }
    if let Err(error) = HostTokenizer::from_gguf(gguf) {
        found.push(format!("tokenizer: {error}"));
    }
    found
}

/// Number and bytes of tensors by type.
fn types(gguf: &Gguf<'_>) -> BTreeMap<String, (usize, usize)> {
    let mut types = BTreeMap::new();
    for tensor in gguf.tensors() {
        let name = tensor.dtype.map_or_else(|| format!("#{}", tensor.type_id), |d| d.name().to_owned());
        let entry = types.entry(name).or_insert((0, 0));
        entry.0 += 1;
        entry.1 += tensor.data.len();
    }
    types
}

fn everything(gguf: &Gguf<'_>) -> anyhow::Result<()> {
    for (key, value) in gguf.metadata() {
        output::line(format!("  {key} = {}", brief(&value)))?;
    }
    for tensor in gguf.tensors() {
        let dtype = tensor.dtype.map_or("?", |dtype| dtype.name());
        let dims = &tensor.dims[..tensor.n_dims];
        output::line(format!("  {:<40} {dtype:<5} {dims:?} at byte {}", tensor.name, tensor.offset))?;
    }
    Ok(())
}

/// A value, cut to a line.
fn brief(value: &Value<'_>) -> String {
    const WIDTH: usize = 100;
    match value {
        Value::Uint(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::Float(value) => value.to_string(),
        Value::Bool(value) => value.to_string(),
        Value::String(bytes) => {
            let text = String::from_utf8_lossy(bytes).replace('\n', "\\n");
            match text.char_indices().nth(WIDTH) {
                Some((end, _)) => format!("{}...", &text[..end]),
                None => text,
            }
        }
        Value::Array(array) => format!("[{} values of {:?}]", array.len(), array.element_type()),
    }
}

fn document(file: &ModelFile, gguf: &Gguf<'_>, obstacles: &[String]) -> serde_json::Value {
    let metadata: serde_json::Map<_, _> =
        gguf.metadata().map(|(key, value)| (key.to_owned(), brief(&value).into())).collect();
    let tensors: Vec<_> = gguf
        .tensors()
        .map(|tensor| {
            json!({
                "name": tensor.name,
                "type": tensor.dtype.map(|dtype| dtype.name()),
                "dims": &tensor.dims[..tensor.n_dims],
                "bytes": tensor.data.len(),
            })
        })
        .collect();
    json!({
        "path": file.path().display().to_string(),
        "bytes": file.bytes().len(),
        "version": gguf.version(),
        "metadata": metadata,
        "tensors": tensors,
        "cannot_run": obstacles,
    })
}
