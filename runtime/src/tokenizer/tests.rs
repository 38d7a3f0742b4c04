//! The tokenizer against llama.cpp, against the models' regular expressions, and against hostile files.

extern crate std;

use super::pretokenize::PreTokenizer;
use super::*;
use crate::format::pack_header;
use proptest::prelude::*;
use std::{fs, path::PathBuf, string::String, vec, vec::Vec};

const PLAIN: Encode = Encode { add_bos: false, parse_special: false };
const SPECIAL: Encode = Encode { add_bos: false, parse_special: true };

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
pub(super) fn vocabulary(name: &str, pre: Option<&str>) -> Tokenizer<'static> {
    open(vocabulary_file(name, pre)).unwrap()
}

/// The same as a GGUF file and as a pack.
fn both(name: &str, pre: Option<&str>) -> [Tokenizer<'static>; 2] {
    let file = vocabulary_file(name, pre);
    let packed = open(pack(&file)).unwrap();
    [open(file).unwrap(), packed]
}

/// A vocabulary file, its pre-tokenizer's name replaced.
fn vocabulary_file(name: &str, pre: Option<&str>) -> Vec<u8> {
    let mut file = golden(&std::format!("ggml-vocab-{name}.gguf"));
    if let Some(pre) = pre {
        let key = b"tokenizer.ggml.pre";
        let at = file.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
        let old = u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
        file.splice(at..at + 8 + old, [&(pre.len() as u64).to_le_bytes(), pre.as_bytes()].concat());
    }
    file
}

/// The pack of a vocabulary file: without merges, with an index.
fn pack(file: &[u8]) -> Vec<u8> {
    let parsed = Gguf::parse(file).unwrap();
    let mut index = vec![0x55; Tokenizer::index_bytes(&parsed).unwrap()];
    let bytes = Tokenizer::build_index(&parsed, &mut index).unwrap();
    let mut body = file.to_vec();
    let key = b"tokenizer.ggml.merges";
    if let Some(at) = file.windows(key.len()).position(|window| window == key) {
        let merges = parsed.get("tokenizer.ggml.merges").and_then(|merges| merges.as_array()).unwrap();
        // The length of the key before it, type, type of elements and their number behind it.
        body.drain(at - 8..at + key.len() + 16 + merges.bytes().len());
        let entries = parsed.metadata().count() as u64 - 1;
        body[16..24].copy_from_slice(&entries.to_le_bytes());
    }
    body.resize(body.len().next_multiple_of(64), 0);
    let header = pack_header(&[0; 32], body.len() as u64, bytes as u32);
    [&header[..], &body, &index[..bytes]].concat()
}

fn open(file: Vec<u8>) -> Result<Tokenizer<'static>> {
    let file = Gguf::parse(file.leak())?;
    let bytes = Tokenizer::index_bytes(&file)?;
    assert_eq!(file.tokenizer_index().is_some(), bytes == 0);
    Tokenizer::new(&file, vec![0x55; bytes].leak())
}

fn encode(tokenizer: &Tokenizer<'_>, text: &[u8], options: Encode) -> Vec<u32> {
    let mut scratch = vec![0xAAAA_AAAA; Tokenizer::scratch_words(text.len())];
    let mut out = vec![0; Tokenizer::most_ids(text.len())];
    let count = tokenizer.encode(text, options, &mut scratch, &mut out).unwrap();
    out.truncate(count);
    out
}

fn decode(tokenizer: &Tokenizer<'_>, ids: &[u32]) -> Vec<u8> {
    let most = ids.iter().map(|&id| tokenizer.raw_text(id).unwrap().len()).sum();
    let mut text = vec![0; most];
    let len = tokenizer.decode(ids, &mut text).unwrap();
    text.truncate(len);
    text
}

/// llama.cpp's own test cases.
#[test]
fn every_case_of_llama_cpp() {
    for name in ["gpt-2", "llama-spm"] {
        let [texts, ids] = ["inp", "out"]
            .map(|end| String::from_utf8(golden(&std::format!("ggml-vocab-{name}.gguf.{end}"))).unwrap());
        let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
        let ids: Vec<Vec<u32>> =
            ids.lines().map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect()).collect();
        // The last separator is followed by nothing.
        assert_eq!(texts.len(), ids.len() + 1);
        assert!(ids.len() > 40);
        for tokenizer in both(name, None) {
            for (text, ids) in texts.iter().zip(&ids) {
                assert_eq!(&encode(&tokenizer, text.as_bytes(), PLAIN), ids, "{name} {text:?}");
                assert_eq!(decode(&tokenizer, ids), text.as_bytes(), "{name}");
            }
        }
    }
}

#[test]
fn ids_of_llama_cpp() {
    let texts = texts();
    let oracles = json("ids.json");
    for oracle in oracles.as_array().unwrap() {
        let (name, pre) = (oracle["vocabulary"].as_str().unwrap(), oracle["pre"].as_str());
        let tokenizers = both(name, pre);
        let options = Encode { add_bos: false, parse_special: oracle["parse_special"].as_bool().unwrap() };
        for (text, ids) in texts.iter().zip(oracle["ids"].as_array().unwrap()) {
            let ids: Vec<u32> =
                ids.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
            for tokenizer in &tokenizers {
                let found = encode(tokenizer, text.as_bytes(), options);
                assert_eq!(found, ids, "{name} {pre:?} {options:?} {text:?}");
            }
        }
    }
}

/// A megabyte of words, code, Chinese, emoji, digits, runs of white space and random code points, as `make.py`
/// puts it together.
fn long_text(long: &serde_json::Value) -> String {
    let pieces: Vec<String> = serde_json::from_value(long["pieces"].clone()).unwrap();
    // The first of the texts is empty.
    let pieces: Vec<String> = texts().into_iter().skip(1).chain(pieces).collect();
    let mut state = long["seed"].as_u64().unwrap();
    let mut text = String::new();
    while text.len() < long["bytes"].as_u64().unwrap() as usize {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text.push_str(&pieces[(state >> 33) as usize % pieces.len()]);
    }
    text
}

#[test]
fn ids_of_llama_cpp_for_a_long_text() {
    let long = json("long.json");
    let text = long_text(&long);
    for oracle in long["ids"].as_array().unwrap() {
        let (name, pre) = (oracle["vocabulary"].as_str().unwrap(), oracle["pre"].as_str());
        let [tokenizer, packed] = both(name, pre);
        let options = Encode { add_bos: false, parse_special: oracle["parse_special"].as_bool().unwrap() };
        let ids = encode(&tokenizer, text.as_bytes(), options);
        let first: Vec<u32> = serde_json::from_value(oracle["first"].clone()).unwrap();
        assert_eq!(ids[..first.len()], first, "{name}");
        let hash = ids.iter().fold(0xCBF2_9CE4_8422_2325, |hash: u64, &id| {
            (hash ^ u64::from(id)).wrapping_mul(0x0100_0000_01B3)
        });
        let found = (ids.len() as u64, std::format!("{hash:016x}"));
        let expected = (oracle["count"].as_u64().unwrap(), oracle["hash"].as_str().unwrap().into());
        assert_eq!(found, expected, "{name} {options:?}");
        assert!(encode(&packed, text.as_bytes(), options) == ids, "{name} {options:?}, from a pack");
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

/// Whatever the bytes: an alphabet that is whole loses nothing.
#[test]
fn decoding_gives_the_text_back() {
    let pieces = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        ".{0,12}".prop_map(String::into_bytes),
        prop::sample::select(vec![" ", "  ", "\n", "'s", "'LL", "the", "2024", "½", "漢", "e\u{301}", "😀"])
            .prop_map(|text| text.as_bytes().to_vec()),
    ];
    let texts = prop::collection::vec(pieces, 0..12).prop_map(|pieces| pieces.concat());
    let byte_level = ["gpt-2", "smollm", "llama-bpe", "qwen2", "default"];
    let tokenizers = byte_level.map(|pre| vocabulary("gpt-2", Some(pre)));
    for tokenizer in tokenizers.into_iter().chain([vocabulary("llama-spm", None)]) {
        proptest!(|(text in &texts)| {
            let ids = encode(&tokenizer, &text, PLAIN);
            // SentencePiece makes no difference between a space and U+2581.
            let spaces = |text: &[u8]| String::from_utf8_lossy(text).replace('\u{2581}', " ");
            let back = decode(&tokenizer, &ids);
            prop_assert!(back == text || (tokenizer.model() == "llama" && spaces(&back) == spaces(&text)));
        });
    }
}

#[test]
fn bytes_without_a_token_are_left_out() {
    let tokenizer = vocabulary("smollm2", None);
    assert_eq!(tokenizer.byte(0x04), None);
    assert_eq!(
        encode(&tokenizer, b"a\x04b", PLAIN),
        encode(&tokenizer, b"a", PLAIN)
            .into_iter()
            .chain(encode(&tokenizer, b"b", PLAIN))
            .collect::<Vec<_>>()
    );
    let all = vocabulary("gpt-2", None);
    assert!((0..=255).all(|byte| all.byte(byte).is_some()));
}

/// Long words of every kind; a merge that looked at each pair again after each merge would need hours.
#[test]
fn a_megabyte_without_a_break() {
    const LEN: usize = 1 << 20;
    let mut state = 1u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let texts: [Vec<u8>; 6] = [
        vec![b'a'; LEN],
        vec![b' '; LEN],
        vec![b'\n'; LEN],
        vec![b'<'; LEN],
        (0..LEN).map(|_| random()).collect(),
        (0..LEN).map(|_| b'a' + random() % 26).collect(),
    ];
    let byte_level = ["gpt-2", "llama-bpe", "default"].map(|pre| vocabulary("gpt-2", Some(pre)));
    for tokenizer in byte_level.into_iter().chain([vocabulary("llama-spm", None)]) {
        for text in &texts {
            let start = std::time::Instant::now();
            let ids = encode(&tokenizer, text, SPECIAL);
            assert!(start.elapsed().as_secs() < 20, "{} {:?}", tokenizer.pre_tokenizer(), &text[..4]);
            assert!(decode(&tokenizer, &ids) == *text);
        }
    }
}

#[test]
fn special_tokens_of_smollm2() {
    let tokenizer = vocabulary("smollm2", None);
    let (start, end) = (tokenizer.find(b"<|im_start|>").unwrap(), tokenizer.find(b"<|im_end|>").unwrap());
    assert_eq!((tokenizer.len(), start, end), (49_152, 1, 2));
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.adds_bos()), (Some(1), Some(2), false));
    assert_eq!(tokenizer.pre_tokenizer(), "smollm");
    assert!(tokenizer.is_end_of_generation(end) && tokenizer.is_end_of_generation(0));
    assert!(!tokenizer.is_end_of_generation(start) && !tokenizer.is_end_of_generation(100));
    let chat = b"<|im_start|>user\nHi<|im_end|>";
    let ids = encode(&tokenizer, chat, SPECIAL);
    assert_eq!((ids[0], *ids.last().unwrap()), (start, end));
    assert_eq!(decode(&tokenizer, &ids), b"user\nHi");
    assert_eq!(decode(&tokenizer, &encode(&tokenizer, chat, PLAIN)), chat);
    assert_eq!(tokenizer.raw_text(end), Some(&b"<|im_end|>"[..]));
    assert_eq!(tokenizer.raw_text(49_152), None);
    let error = tokenizer.piece(49_152, &mut []).unwrap_err();
    assert_eq!((error.code, error.found, error.expected), (Code::BadToken, 49_152, 49_152));
}

#[test]
fn small_buffers_say_what_they_need() {
    let tokenizer = vocabulary("gpt-2", None);
    let text = b"Hello world, this is a text";
    let ids = encode(&tokenizer, text, PLAIN);
    let error = tokenizer.encode(text, PLAIN, &mut [], &mut [0; 2]).unwrap_err();
    assert_eq!((error.code, error.found, error.expected), (Code::BufferTooSmall, 2, ids.len() as u64));
    let long = [b'x'; 100];
    let error = tokenizer.encode(&long, PLAIN, &mut [0; 799], &mut [0; 100]).unwrap_err();
    assert_eq!((error.code, error.found, error.expected), (Code::BufferTooSmall, 799, 800));
    assert_eq!((Tokenizer::scratch_words(31), Tokenizer::scratch_words(100)), (0, 808));
    let error = tokenizer.piece(ids[0], &mut [0; 4]).unwrap_err();
    assert_eq!((error.code, error.found, error.expected), (Code::BufferTooSmall, 4, 5));
}
