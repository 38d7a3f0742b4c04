//! A model of a few hundred kilobytes with weights of every type, made anew by each test.

use edge_runtime::format::{DType, f32_to_bf16, f32_to_f16};

const HIDDEN: u64 = 256;
const FFN: u64 = 512;
const HEADS: u32 = 4;
const KV_HEADS: u32 = 2;
const LAYERS: usize = 2;
const KV_WIDTH: u64 = HIDDEN * KV_HEADS as u64 / HEADS as u64;
/// Name, columns and rows of the linear maps of a layer.
const LINEARS: [(&str, u64, u64); 7] = [
    ("attn_q", HIDDEN, HIDDEN),
    ("attn_k", HIDDEN, KV_WIDTH),
    ("attn_v", HIDDEN, KV_WIDTH),
    ("attn_output", HIDDEN, HIDDEN),
    ("ffn_gate", HIDDEN, FFN),
    ("ffn_up", HIDDEN, FFN),
    ("ffn_down", FFN, HIDDEN),
];
const SPREAD: f32 = 0.12;
const MERGES: &[&str] = &["t h", "th e", "i n", "e r", "a n", "Ġ the", "o n", "an d", "Ġ and", "in g"];

/// A llama with random weights: two layers whose fourteen matrices go through all tensor types, and a
/// byte-level vocabulary with a few merges. The same bytes at each call.
pub struct TinyModel;

impl TinyModel {
    /// The GGUF file.
    pub fn gguf() -> Vec<u8> {
        Self::of_seed(7)
    }

    /// One of the same shape and vocabulary with other weights.
    pub fn of_seed(seed: u64) -> Vec<u8> {
        Self::write(seed, LAYERS)
    }

    /// One of `layers` layers: each adds about 600 KiB.
    pub fn of_layers(layers: usize) -> Vec<u8> {
        Self::write(7, layers)
    }

    fn write(seed: u64, layers: usize) -> Vec<u8> {
        let tokens = tokens();
        let mut tensors = Tensors { state: seed, list: Vec::new() };
        tensors.matrix("token_embd.weight", HIDDEN, tokens.len() as u64, DType::Q8_0);
        tensors.ones("output_norm.weight", HIDDEN);
        tensors.matrix("output.weight", HIDDEN, tokens.len() as u64, DType::Q6K);
        let mut types = DType::CORE.into_iter().cycle();
        for layer in 0..layers {
            tensors.ones(&format!("blk.{layer}.attn_norm.weight"), HIDDEN);
            tensors.ones(&format!("blk.{layer}.ffn_norm.weight"), HIDDEN);
            for (name, cols, rows) in LINEARS {
                let dtype = types.next().unwrap_or(DType::F32);
                tensors.matrix(&format!("blk.{layer}.{name}.weight"), cols, rows, dtype);
            }
        }
        write_file(&metadata(&tokens, layers), &tensors.list)
    }
}

/// LoRA adapters for [`TinyModel`], of F32, F16 and Q8_0 pairs.
pub struct TinyAdapter;

impl TinyAdapter {
    /// The GGUF file of an adapter of rank `rank` with random weights: the same bytes for the same seed. Pairs
    /// whose rank is a multiple of 32 are Q8_0, the others F32 and F16 in turn.
    pub fn gguf(seed: u64, rank: u64) -> Vec<u8> {
        let mut tensors = Tensors { state: seed, list: Vec::new() };
        for layer in 0..LAYERS {
            for (index, (name, cols, rows)) in LINEARS.into_iter().enumerate() {
                let dtype = match (rank % 32, index % 2) {
                    (0, _) => DType::Q8_0,
                    (_, 0) => DType::F32,
                    _ => DType::F16,
                };
                tensors.matrix(&format!("blk.{layer}.{name}.weight.lora_a"), cols, rank, dtype);
                tensors.matrix(&format!("blk.{layer}.{name}.weight.lora_b"), rank, rows, dtype);
            }
        }
        write_file(&Self::metadata("llama", 8.0), &tensors.list)
    }

    fn metadata(architecture: &str, alpha: f32) -> Vec<(&'static str, u32, Vec<u8>)> {
        let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        vec![
            ("general.architecture", 8, text(architecture)),
            ("general.type", 8, text("adapter")),
            ("adapter.type", 8, text("lora")),
            ("adapter.lora.alpha", 6, alpha.to_le_bytes().into()),
        ]
    }
}

/// GPT-2's letter for each byte: itself if it can be printed, otherwise one from U+0100 on.
fn byte_letters() -> impl Iterator<Item = char> {
    let mut next = 0x100;
    (0..=255u8).map(move |byte| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        _ => {
            next += 1;
            char::from_u32(next - 1).unwrap_or('\u{FFFD}')
        }
    })
}

fn tokens() -> Vec<String> {
    let special = ["<|begin|>", "<|end|>"].map(str::to_owned);
    let merged = MERGES.iter().map(|merge| merge.replace(' ', ""));
    special.into_iter().chain(byte_letters().map(String::from)).chain(merged).collect()
}

struct Tensor {
    name: String,
    dims: [u64; 2],
    dtype: DType,
    bytes: Vec<u8>,
}

struct Tensors {
    state: u64,
    list: Vec<Tensor>,
}

impl Tensors {
    fn ones(&mut self, name: &str, count: u64) {
        let bytes = (0..count).flat_map(|_| 1f32.to_le_bytes()).collect();
        self.list.push(Tensor { name: name.into(), dims: [count, 1], dtype: DType::F32, bytes });
    }

    fn matrix(&mut self, name: &str, cols: u64, rows: u64, dtype: DType) {
        let blocks = cols * rows / dtype.block_len() as u64;
        let bytes = (0..blocks).flat_map(|_| self.block(dtype)).collect();
        self.list.push(Tensor { name: name.into(), dims: [cols, rows], dtype, bytes });
    }

    /// 64 random bits (Steele and Vigna's multiplier, the high half folded in).
    fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
        self.state ^ (self.state >> 32)
    }

    /// A block of random bits, with scales that spread its values by about [`SPREAD`] around 0.
    fn block(&mut self, dtype: DType) -> Vec<u8> {
        let uniform = (self.bits() >> 40) as f32 / (1 << 24) as f32;
        let value = (uniform - 0.5) * 12f32.sqrt() * SPREAD;
        let mut bytes: Vec<u8> = (0..dtype.block_bytes()).map(|_| (self.bits() >> 24) as u8).collect();
        let mut half = |at: usize, value: f32| {
            bytes[at..at + 2].copy_from_slice(&f32_to_f16(value).to_le_bytes());
        };
        // Scale: the spread divided by that of the integers; minimum: their mean, taken off.
        match dtype {
            DType::F32 => return value.to_le_bytes().into(),
            DType::F16 => return f32_to_f16(value).to_le_bytes().into(),
            DType::BF16 => return f32_to_bf16(value).to_le_bytes().into(),
            DType::Q8_0 => half(0, SPREAD / 74.0),
            DType::Q4_0 => half(0, SPREAD / 4.6),
            DType::Q5_0 => half(0, SPREAD / 9.2),
            DType::Q4_1 => {
                half(0, SPREAD / 4.6);
                half(2, SPREAD / 4.6 * -7.5);
            }
            DType::Q5_1 => {
                half(0, SPREAD / 9.2);
                half(2, SPREAD / 9.2 * -15.5);
            }
            DType::Q4K => {
                half(0, SPREAD / (4.6 * 32.0));
                half(2, SPREAD / (4.6 * 32.0) * 7.5);
            }
            DType::Q5K => {
                half(0, SPREAD / (9.2 * 32.0));
                half(2, SPREAD / (9.2 * 32.0) * 15.5);
            }
            DType::Q6K => half(208, SPREAD / (18.5 * 74.0)),
            // Not among the core types.
            DType::Q2K | DType::Q3K | DType::IQ4NL => {}
        }
        bytes
    }
}

/// Keys with GGUF's number of their type and their bytes.
fn metadata(tokens: &[String], layers: usize) -> Vec<(&'static str, u32, Vec<u8>)> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let uint = |value: u32| value.to_le_bytes().to_vec();
    let texts = |texts: &mut dyn Iterator<Item = &str>| {
        let items: Vec<_> = texts.map(text).collect();
        [&uint(8)[..], &(items.len() as u64).to_le_bytes(), &items.concat()].concat()
    };
    // Control tokens are of kind 3, all others of kind 1.
    let kinds = (0..tokens.len()).flat_map(|token| if token < 2 { uint(3) } else { uint(1) });
    let kinds = [&uint(5)[..], &(tokens.len() as u64).to_le_bytes(), &kinds.collect::<Vec<_>>()].concat();
    const UINT: u32 = 4;
    const FLOAT: u32 = 6;
    const BOOL: u32 = 7;
    const TEXT: u32 = 8;
    const LIST: u32 = 9;
    vec![
        ("general.architecture", TEXT, text("llama")),
        ("general.name", TEXT, text("tiny")),
        ("llama.block_count", UINT, uint(layers as u32)),
        ("llama.context_length", UINT, uint(256)),
        ("llama.embedding_length", UINT, uint(HIDDEN as u32)),
        ("llama.feed_forward_length", UINT, uint(FFN as u32)),
        ("llama.attention.head_count", UINT, uint(HEADS)),
        ("llama.attention.head_count_kv", UINT, uint(KV_HEADS)),
        ("llama.attention.layer_norm_rms_epsilon", FLOAT, 1e-5f32.to_le_bytes().into()),
        ("llama.rope.freq_base", FLOAT, 10_000f32.to_le_bytes().into()),
        ("llama.rope.dimension_count", UINT, uint((HIDDEN as u32) / HEADS)),
        ("llama.vocab_size", UINT, uint(tokens.len() as u32)),
        ("tokenizer.ggml.model", TEXT, text("gpt2")),
        ("tokenizer.ggml.pre", TEXT, text("gpt-2")),
        ("tokenizer.ggml.tokens", LIST, texts(&mut tokens.iter().map(String::as_str))),
        ("tokenizer.ggml.token_type", LIST, kinds),
        ("tokenizer.ggml.merges", LIST, texts(&mut MERGES.iter().copied())),
        ("tokenizer.ggml.bos_token_id", UINT, uint(0)),
        ("tokenizer.ggml.eos_token_id", UINT, uint(1)),
        ("tokenizer.ggml.add_bos_token", BOOL, vec![1]),
    ]
}

fn write_file(metadata: &[(&str, u32, Vec<u8>)], tensors: &[Tensor]) -> Vec<u8> {
    const ALIGNMENT: usize = 32;
    let mut file = b"GGUF".to_vec();
    let text = |file: &mut Vec<u8>, text: &str| {
        file.extend((text.len() as u64).to_le_bytes());
        file.extend(text.as_bytes());
    };
    file.extend(3u32.to_le_bytes());
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend((metadata.len() as u64).to_le_bytes());
    for (key, kind, value) in metadata {
        text(&mut file, key);
        file.extend(kind.to_le_bytes());
        file.extend(value);
    }
    let mut offset = 0;
    for tensor in tensors {
        text(&mut file, &tensor.name);
        let n_dims = if tensor.dims[1] == 1 { 1 } else { 2 };
        file.extend((n_dims as u32).to_le_bytes());
        tensor.dims[..n_dims].iter().for_each(|dim| file.extend(dim.to_le_bytes()));
        file.extend((tensor.dtype as u32).to_le_bytes());
        file.extend((offset as u64).to_le_bytes());
        offset += tensor.bytes.len().next_multiple_of(ALIGNMENT);
    }
    for tensor in tensors {
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend(&tensor.bytes);
    }
    file
}
