//! The tokenizer against llama.cpp, against the models' regular expressions, and against hostile files.

extern crate std;

use super::*;
use std::{fs, path::PathBuf, string::String, vec, vec::Vec};

const PLAIN: Encode = Encode { add_bos: false, parse_special: false };

fn golden(name: &str) -> Vec<u8> {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tokenizers")).join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn json(name: &str) -> serde_json::Value {
    serde_json::from_slice(&golden(name)).unwrap()
}

fn texts() -> Vec<String> {
    json("texts.json").as_array().unwrap().iter().map(|text| text.as_str().unwrap().into()).collect()
}

/// A vocabulary file that lives as long as the test process, its pre-tokenizer's name replaced.
fn vocabulary(name: &str, pre: Option<&str>) -> Tokenizer<'static> {
    let mut file = golden(&std::format!("ggml-vocab-{name}.gguf"));
    if let Some(pre) = pre {
        let key = b"tokenizer.ggml.pre";
        let at = file.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
        let old = u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
        file.splice(at..at + 8 + old, [&(pre.len() as u64).to_le_bytes(), pre.as_bytes()].concat());
    }
    open(file).unwrap()
}

fn open(file: Vec<u8>) -> Result<Tokenizer<'static>> {
    let file = Gguf::parse(file.leak())?;
    let words = Tokenizer::index_words(&file)?;
    Tokenizer::new(&file, vec![0x5555_5555; words].leak())
}

fn encode(tokenizer: &Tokenizer<'_>, text: &[u8], options: Encode) -> Vec<u32> {
    let mut scratch = vec![0xAAAA_AAAA; Tokenizer::scratch_words(text.len())];
    let mut out = vec![0; text.len() + 1];
    let count = tokenizer.encode(text, options, &mut scratch, &mut out).unwrap();
    out.truncate(count);
    out
}

fn decode(tokenizer: &Tokenizer<'_>, ids: &[u32]) -> Vec<u8> {
    let mut text = Vec::new();
    for &id in ids {
        let mut piece = vec![0; tokenizer.raw_text(id).unwrap().len()];
        let len = tokenizer.piece(id, &mut piece).unwrap();
        text.extend_from_slice(&piece[..len]);
    }
    text
}

#[test]
fn every_case_of_llama_cpp_for_gpt_2() {
    let tokenizer = vocabulary("gpt-2", None);
    let (texts, ids) = (golden("ggml-vocab-gpt-2.gguf.inp"), golden("ggml-vocab-gpt-2.gguf.out"));
    let texts = String::from_utf8(texts).unwrap();
    let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
    let ids = String::from_utf8(ids).unwrap();
    let ids: Vec<Vec<u32>> =
        ids.lines().map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect()).collect();
    // The last separator is followed by nothing.
    assert_eq!(texts.len(), ids.len() + 1);
    assert!(ids.len() > 40);
    for (text, ids) in texts.iter().zip(&ids) {
        assert_eq!(&encode(&tokenizer, text.as_bytes(), PLAIN), ids, "{text:?}");
        assert_eq!(decode(&tokenizer, ids), text.as_bytes());
    }
}

#[test]
fn ids_of_llama_cpp() {
    let texts = texts();
    let oracles = json("ids.json");
    for oracle in oracles.as_array().unwrap() {
        let (name, pre) = (oracle["vocabulary"].as_str().unwrap(), oracle["pre"].as_str().unwrap());
        let tokenizer = vocabulary(name, Some(pre));
        let options = Encode { add_bos: false, parse_special: oracle["parse_special"].as_bool().unwrap() };
        for (text, ids) in texts.iter().zip(oracle["ids"].as_array().unwrap()) {
            let ids: Vec<u32> =
                ids.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
            assert_eq!(
                encode(&tokenizer, text.as_bytes(), options),
                ids,
                "{name} {pre} {options:?} {text:?}"
            );
        }
    }
}

#[test]
fn splits_of_the_regular_expressions() {
    let texts = texts();
    for (name, splits) in json("splits.json").as_object().unwrap() {
        let pre = PreTokenizer::find(name.as_bytes()).unwrap();
        for (text, lengths) in texts.iter().zip(splits.as_array().unwrap()) {
            let ours: Vec<usize> = pre.words(text.as_bytes()).map(<[u8]>::len).collect();
            let theirs: Vec<usize> =
                lengths.as_array().unwrap().iter().map(|length| length.as_u64().unwrap() as usize).collect();
            assert_eq!(ours, theirs, "{name} {text:?}");
        }
    }
}
