//! Measures the tokenizer on a text and on texts without a break.
//!
//! `cargo run --release -p edge-runtime --example tokenizer_speed -- MODEL.gguf TEXT`

use edge_runtime::{
    format::Gguf,
    tokenizer::{Encode, Tokenizer},
};
use std::{env, error::Error, fs, time::Instant};

const MIB: usize = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let (Some(model), Some(text)) = (env::args().nth(1), env::args().nth(2)) else {
        return Err("expected a GGUF file and a text file".into());
    };
    let (model, text) = (fs::read(model)?, fs::read(text)?);
    let file = Gguf::parse(&model)?;
    let start = Instant::now();
    let mut index = vec![0; Tokenizer::index_bytes(&file)?];
    let kib = index.len() / 1024;
    let tokenizer = Tokenizer::new(&file, &mut index)?;
    println!("index: {kib} KiB in {:.1} ms", start.elapsed().as_secs_f64() * 1e3);

    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    measure(&tokenizer, "the text", &text)?;
    measure(&tokenizer, "one letter", &[b'a'; MIB])?;
    measure(&tokenizer, "spaces", &[b' '; MIB])?;
    measure(&tokenizer, "random bytes", &(0..MIB).map(|_| random()).collect::<Vec<_>>())?;
    measure(&tokenizer, "random letters", &(0..MIB).map(|_| b'a' + random() % 26).collect::<Vec<_>>())?;
    Ok(())
}

/// Prints the best of five encodings.
fn measure(tokenizer: &Tokenizer<'_>, name: &str, text: &[u8]) -> Result<(), Box<dyn Error>> {
    let mut scratch = vec![0; Tokenizer::scratch_words(text.len())];
    let mut ids = vec![0; Tokenizer::most_ids(text.len())];
    let (mut seconds, mut count) = (f64::MAX, 0);
    for _ in 0..5 {
        let start = Instant::now();
        count = tokenizer.encode(text, Encode::default(), &mut scratch, &mut ids)?;
        seconds = seconds.min(start.elapsed().as_secs_f64());
    }
    let rate = text.len() as f64 / seconds / 1e6;
    println!("{name}: {} bytes, {count} tokens, {:.1} ms, {rate:.1} MB/s", text.len(), seconds * 1e3);
    Ok(())
}
