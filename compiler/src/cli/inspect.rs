//! `edgec inspect`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use edge_models::{DecoderSpec, FAMILIES, Rope, RopeScaling};
use edge_runtime::Code;
use edge_runtime::format::{DType, Gguf, Layout, TensorInfo, Value};
use edge_runtime::session::{Limits, Plan};
use edgec::pack::hex;
use edgec::profile::{self, ModelFile};
use edgec::text::{ChatTemplate, HostTokenizer};
use serde_json::json;

use super::output;

#[derive(Args)]
pub struct Arguments {
    /// GGUF file, pack, Hugging Face folder or run's folder
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
    let plan = Plan::new(&gguf, Limits { batch: 64, ..Limits::default() });
    let tokenizer = HostTokenizer::from_gguf(&gguf);
    let mut obstacles = unknown_types(&gguf);
    obstacles.extend(plan.as_ref().err().map(|error| match error.code {
        Code::UnknownFamily => format!("{error}; there are {}", families()),
        _ => error.to_string(),
    }));
    obstacles.extend(tokenizer.as_ref().err().map(ToString::to_string));
    let (plan, tokenizer) = (plan.ok(), tokenizer.ok());
    if arguments.json {
        return output::json(&document(&file, &gguf, plan.as_ref(), tokenizer.as_ref(), &obstacles));
    }
    let name = gguf.get("general.name").and_then(|value| value.as_str()).unwrap_or("(no name)");
    output::line(format!("{}: {name}", arguments.model.display()))?;
    output::line(format!(
        "  GGUF version {}, {}, family {}",
        gguf.version(),
        output::bytes(file.bytes().len() as u64),
        gguf.architecture().unwrap_or("?"),
    ))?;
    let mut lines = Vec::new();
    lines.extend(gguf.packed_from().map(|hash| format!("pack of the file with SHA-256 {}", hex(hash))));
    if let Some(plan) = &plan {
        lines.extend(of_spec(plan.spec()));
        lines.push(format!(
            "context {} tokens: arena {} with one thread, of it KV cache {}",
            plan.spec().context,
            output::bytes(plan.arena_bytes() as u64),
            output::bytes(plan.kv_bytes() as u64),
        ));
    }
    lines.extend(tokenizer.iter().flat_map(of_tokenizer));
    lines.extend(types(&gguf).into_iter().map(|(dtype, (count, bytes))| {
        format!("{count:>4} tensors {dtype:<5} {}", output::bytes(bytes as u64))
    }));
    lines.extend(obstacles.iter().map(|line| format!("cannot run: {line}")));
    if arguments.all {
        lines.extend(everything(&gguf));
    }
    Ok(lines.iter().try_for_each(|line| output::line(format!("  {line}")))?)
}

/// Tensors of types that this runtime does not have, by name.
fn unknown_types(gguf: &Gguf<'_>) -> Vec<String> {
    let known = DType::ALL.map(DType::name).join(", ");
    let mut found: BTreeMap<u32, Vec<&str>> = BTreeMap::new();
    for tensor in gguf.tensors().filter(|tensor| tensor.weights().is_none()) {
        found.entry(tensor.type_id).or_default().push(tensor.name);
    }
    let line = |(id, names): (u32, Vec<&str>)| {
        let others = if names.len() > 1 { format!(" and {} others", names.len() - 1) } else { String::new() };
        format!("tensor `{}`{others} of type {}; there are {known}", names[0], type_name(id))
    };
    found.into_iter().map(line).collect()
}

/// What ggml calls the tensor types that this runtime does not have.
fn type_name(id: u32) -> String {
    let name = match id {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("number {id}"),
    };
    name.to_owned()
}

fn tensor_type(tensor: &TensorInfo<'_>) -> String {
    match tensor.weights() {
        Some((dtype, Layout::Rows)) => dtype.name().to_owned(),
        Some((dtype, Layout::Tiles)) => format!("{} in tiles", dtype.name()),
        None => type_name(tensor.type_id),
    }
}

fn families() -> String {
    FAMILIES.iter().map(|family| family.name).collect::<Vec<_>>().join(", ")
}

/// The specification in lines; what a model does not have is not mentioned.
fn of_spec(spec: &DecoderSpec) -> Vec<String> {
    let mut lines = vec![format!(
        "{} parameters: {} layers of {} wide, {} heads of {} ({} key/value), feed-forward {} ({:?}), vocabulary {}",
        output::parameters(spec.parameters()),
        spec.layers,
        spec.hidden,
        spec.heads,
        spec.head_dim,
        spec.kv_heads,
        spec.ffn,
        spec.activation,
        spec.vocab,
    )];
    let switches = [
        (spec.tied_embeddings, "tied head"),
        (spec.qkv_bias, "biases of query, key and value"),
        (spec.attn_out_bias, "bias of the attention's output"),
        (spec.qk_norm, "normalized query and key heads"),
        (spec.post_norms, "norms behind attention and feed-forward network"),
    ];
    let mut parts: Vec<String> =
        switches.iter().filter(|(on, _)| *on).map(|(_, text)| (*text).to_owned()).collect();
    parts.extend((spec.embedding_scale != 1.0).then(|| format!("embeddings times {}", spec.embedding_scale)));
    parts.extend((spec.final_soft_cap != 0.0).then(|| format!("logits' soft cap {}", spec.final_soft_cap)));
    if !parts.is_empty() {
        lines.push(parts.join(", "));
    }
    let mut attention = format!("attention: scores times {:.6}", spec.score_scale());
    if spec.attn_soft_cap != 0.0 {
        attention += &format!(", soft cap {}", spec.attn_soft_cap);
    }
    if spec.window != 0 {
        let local = windows(spec).len();
        attention += &format!(", window of {} tokens in {local} of {} layers", spec.window, spec.layers);
        attention += &match spec.local.period(spec.layers) {
            Some(0) => String::new(),
            Some(period) => format!(" (all but every {period}th)"),
            None => format!(" ({:?})", windows(spec)),
        };
    }
    lines.push(attention);
    let mut rope = format!("rope: {}", of_rope(&spec.rope));
    if let Some(local) = &spec.local_rope {
        rope += &format!("; in layers with a window {}", of_rope(local));
    }
    if spec.rope_dims != spec.head_dim {
        rope += &format!("; {} of a head's {} elements rotate", spec.rope_dims, spec.head_dim);
    }
    lines.push(rope);
    lines
}

/// Layers with a window.
fn windows(spec: &DecoderSpec) -> Vec<usize> {
    (0..spec.layers).filter(|layer| spec.local.contains(*layer)).collect()
}

fn of_rope(rope: &Rope) -> String {
    let scaling = match rope.scaling {
        RopeScaling::None => return format!("base {}", rope.theta),
        RopeScaling::Linear { factor } => format!("stretched by {factor}"),
        RopeScaling::Llama3 { factor, original_context, .. } => {
            format!("low frequencies stretched by {factor} from {original_context} tokens (Llama 3)")
        }
        RopeScaling::Table => "stretched by a table in the file".to_owned(),
        RopeScaling::Long { original_context, attention_factor } => format!(
            "stretched by one table up to {original_context} tokens and another beyond (LongRoPE), \
             magnitude {attention_factor}"
        ),
    };
    format!("base {}, {scaling}", rope.theta)
}

/// Special tokens by role: name and id.
fn special_tokens(tokenizer: &HostTokenizer) -> Vec<(&'static str, u32)> {
    let view = tokenizer.view();
    let mut found: Vec<_> =
        [("bos", view.bos()), ("eos", view.eos())].into_iter().filter_map(|(n, t)| Some((n, t?))).collect();
    let ends = (0..view.len() as u32).filter(|token| view.is_end_of_generation(*token));
    found.extend(ends.filter(|token| Some(*token) != view.eos()).map(|token| ("ends generation", token)));
    found
}

fn text_of(tokenizer: &HostTokenizer, token: u32) -> String {
    String::from_utf8_lossy(tokenizer.view().raw_text(token).unwrap_or_default()).into_owned()
}

/// What stands in the way of `chat.json`; `None` if the file has no chat template.
fn chat(tokenizer: &HostTokenizer) -> Option<Result<(), String>> {
    let template = ChatTemplate::of(tokenizer)?;
    Some(template.pieces().map(drop).map_err(|error| error.to_string()))
}

fn of_tokenizer(tokenizer: &HostTokenizer) -> Vec<String> {
    let view = tokenizer.view();
    let kind = match view.model() {
        "gpt2" => format!("byte-level BPE, pre-tokenizer {}", view.pre_tokenizer()),
        _ => "SentencePiece BPE".to_owned(),
    };
    let bos = if view.adds_bos() { "begins texts with BOS" } else { "adds no BOS" };
    let tokens: Vec<String> = special_tokens(tokenizer)
        .into_iter()
        .map(|(name, token)| format!("{name} {token} `{}`", text_of(tokenizer, token)))
        .collect();
    vec![
        format!("tokenizer: {} ({kind}), {} tokens, {bos}: {}", view.model(), view.len(), tokens.join(", ")),
        match chat(tokenizer) {
            None => "chat template: none".to_owned(),
            Some(Ok(())) => "chat template: yes, and as fixed texts for devices (chat.json)".to_owned(),
            Some(Err(error)) => format!("chat template: yes, on this machine only: {error}"),
        },
    ]
}

/// Number and bytes of tensors by type.
fn types(gguf: &Gguf<'_>) -> BTreeMap<String, (usize, usize)> {
    let mut types = BTreeMap::new();
    for tensor in gguf.tensors() {
        let entry = types.entry(tensor_type(&tensor)).or_insert((0, 0));
        entry.0 += 1;
        entry.1 += tensor.data.len();
    }
    types
}

fn everything(gguf: &Gguf<'_>) -> Vec<String> {
    let entries = gguf.metadata().map(|(key, value)| format!("{key} = {}", brief(&value)));
    let tensors = gguf.tensors().map(|tensor| {
        let dims = &tensor.dims[..tensor.n_dims];
        format!("{:<40} {:<5} {dims:?} at byte {}", tensor.name, tensor_type(&tensor), tensor.offset)
    });
    entries.chain(tensors).collect()
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

fn document(
    file: &ModelFile,
    gguf: &Gguf<'_>,
    plan: Option<&Plan>,
    tokenizer: Option<&HostTokenizer>,
    obstacles: &[String],
) -> serde_json::Value {
    let metadata: serde_json::Map<_, _> =
        gguf.metadata().map(|(key, value)| (key.to_owned(), brief(&value).into())).collect();
    let tensors: Vec<_> = gguf
        .tensors()
        .map(|tensor| {
            json!({
                "name": tensor.name,
                "type": tensor_type(&tensor),
                "dims": &tensor.dims[..tensor.n_dims],
                "bytes": tensor.data.len(),
            })
        })
        .collect();
    json!({
        "path": file.path().display().to_string(),
        "bytes": file.bytes().len(),
        "version": gguf.version(),
        "packed_from": gguf.packed_from().map(|hash| hex(hash)),
        "spec": plan.map(|plan| spec_document(plan.spec())),
        "tokenizer": tokenizer.map(tokenizer_document),
        "metadata": metadata,
        "tensors": tensors,
        "cannot_run": obstacles,
    })
}

fn spec_document(spec: &DecoderSpec) -> serde_json::Value {
    let rope = |rope: &Rope| json!({ "theta": rope.theta, "description": of_rope(rope) });
    json!({
        "family": spec.family.name,
        "parameters": spec.parameters(),
        "layers": spec.layers,
        "hidden": spec.hidden,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "ffn": spec.ffn,
        "activation": format!("{:?}", spec.activation),
        "vocab": spec.vocab,
        "context": spec.context,
        "norm_eps": spec.norm_eps,
        "rope": rope(&spec.rope),
        "local_rope": spec.local_rope.as_ref().map(rope),
        "rope_dims": spec.rope_dims,
        "window": spec.window,
        "window_layers": windows(spec),
        "score_scale": spec.score_scale(),
        "attn_soft_cap": spec.attn_soft_cap,
        "final_soft_cap": spec.final_soft_cap,
        "embedding_scale": spec.embedding_scale,
        "qk_norm": spec.qk_norm,
        "post_norms": spec.post_norms,
        "qkv_bias": spec.qkv_bias,
        "attn_out_bias": spec.attn_out_bias,
        "tied_embeddings": spec.tied_embeddings,
    })
}

fn tokenizer_document(tokenizer: &HostTokenizer) -> serde_json::Value {
    let view = tokenizer.view();
    let special: Vec<_> = special_tokens(tokenizer)
        .into_iter()
        .map(|(role, id)| json!({ "role": role, "id": id, "text": text_of(tokenizer, id) }))
        .collect();
    let chat = chat(tokenizer);
    json!({
        "model": view.model(),
        "pre_tokenizer": view.pre_tokenizer(),
        "tokens": view.len(),
        "adds_bos": view.adds_bos(),
        "special": special,
        "chat_template": chat.is_some(),
        "chat_pieces": matches!(chat, Some(Ok(()))),
        "chat_pieces_obstacle": chat.and_then(Result::err),
    })
}
