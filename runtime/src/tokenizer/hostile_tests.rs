//! Small vocabularies made for the test: odd ones that work, broken ones that are refused by name.

extern crate std;

use super::*;
use proptest::prelude::*;
use std::{string::String, vec, vec::Vec};

/// A GGUF file without tensors.
#[derive(Clone, Default)]
pub(super) struct File {
    entries: Vec<(String, Vec<u8>)>,
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

impl File {
    pub(super) fn with(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        let key = if key.contains('.') { key.into() } else { String::from("tokenizer.ggml.") + key };
        self.entries.retain(|(old, _)| *old != key);
        self.entries.push((key, [&kind.to_le_bytes(), value].concat()));
        self
    }

    pub(super) fn without(mut self, key: &str) -> Self {
        self.entries.retain(|(old, _)| !old.ends_with(key));
        self
    }

    pub(super) fn text(self, key: &str, text: &str) -> Self {
        self.with(key, 8, &string(text.as_bytes()))
    }

    pub(super) fn id(self, key: &str, id: u32) -> Self {
        self.with(key, 4, &id.to_le_bytes())
    }

    pub(super) fn strings<T: AsRef<[u8]>>(self, key: &str, texts: &[T]) -> Self {
        let bytes: Vec<u8> = texts.iter().flat_map(|text| string(text.as_ref())).collect();
        self.array(key, 8, texts.len(), &bytes)
    }

    pub(super) fn kinds(self, kinds: &[i32]) -> Self {
        let bytes: Vec<u8> = kinds.iter().flat_map(|kind| kind.to_le_bytes()).collect();
        self.array("token_type", 5, kinds.len(), &bytes)
    }

    pub(super) fn scores(self, scores: &[f32]) -> Self {
        let bytes: Vec<u8> = scores.iter().flat_map(|score| score.to_le_bytes()).collect();
        self.array("scores", 6, scores.len(), &bytes)
    }

    pub(super) fn array(self, key: &str, element: u32, count: usize, bytes: &[u8]) -> Self {
        self.with(key, 9, &[&element.to_le_bytes(), &(count as u64).to_le_bytes()[..], bytes].concat())
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend_from_slice(&0u64.to_le_bytes());
        file.extend_from_slice(&(self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            file.extend_from_slice(&string(key.as_bytes()));
            file.extend_from_slice(value);
        }
        file
    }

    pub(super) fn open(&self) -> Result<Tokenizer<'static>> {
        let file = Gguf::parse(self.bytes().leak())?;
        let bytes = Tokenizer::index_bytes(&file)?;
        Tokenizer::new(&file, vec![0; bytes].leak())
    }

    pub(super) fn refused(&self) -> (Code, &'static str, u64) {
        let error = self.open().unwrap_err();
        (error.code, std::string::ToString::to_string(error.name.as_str()).leak(), error.found)
    }
}

/// Tokens 0 to 9: a, b, c, ab, bc, abc, two user-defined, a control and an empty one.
fn small() -> File {
    File::default()
        .text("model", "gpt2")
        .text("pre", "gpt-2")
        .strings("tokens", &["a", "b", "c", "ab", "bc", "abc", "<u>", "<u>>", "<c>", ""])
        .kinds(&[1, 1, 1, 1, 1, 1, 4, 4, 3, 5])
        .strings("merges", &["b c", "a b", "a bc", "ab c", "b c"])
}

pub(super) fn encode(tokenizer: &Tokenizer<'_>, text: &str, parse_special: bool) -> Vec<u32> {
    let mut out = vec![0; Tokenizer::most_ids(text.len())];
    let options = Encode { add_bos: true, parse_special };
    let mut scratch = vec![0; Tokenizer::scratch_words(text.len())];
    let count = tokenizer.encode(text.as_bytes(), options, &mut scratch, &mut out).unwrap();
    out.truncate(count);
    out
}

#[test]
fn lowest_rank_first_then_leftmost() {
    let tokenizer = small().open().unwrap();
    // b c has the lowest rank, then a bc; the repeated merge changes nothing.
    assert_eq!(encode(&tokenizer, "abc", false), [5]);
    assert_eq!(encode(&tokenizer, "abab", false), [3, 3]);
    assert_eq!(encode(&tokenizer, "cbcb", false), [2, 4, 1]);
    // Bytes without a token are left out.
    assert_eq!(encode(&tokenizer, "a!b", false), [0, 1]);
    let overlapping =
        small().strings("tokens", &["a", "aa", "b"]).kinds(&[1, 1, 1]).strings("merges", &["a a"]);
    assert_eq!(encode(&overlapping.open().unwrap(), "aaa", false), [1, 0]);
}

#[test]
fn a_whole_word_wins_only_where_merges_are_ignored() {
    let file = small().strings("merges", &["a b"]);
    assert_eq!(encode(&file.open().unwrap(), "abc", false), [3, 2]);
    let file = file.text("pre", "llama-bpe").id("bos_token_id", 8);
    assert_eq!(encode(&file.open().unwrap(), "abc", false), [8, 5]);
    let file = file.with("add_bos_token", 7, &[0]);
    assert_eq!(encode(&file.open().unwrap(), "abc", false), [5]);
}

#[test]
fn special_tokens_in_a_text() {
    let tokenizer = small().open().unwrap();
    assert_eq!(encode(&tokenizer, "a<u>>b<u><c>", false), [0, 7, 1, 6, 2]);
    assert_eq!(encode(&tokenizer, "a<u>>b<u><c>", true), [0, 7, 1, 6, 8]);
    // A marker is a control token even where the file calls it user-defined or normal.
    let marked =
        small().strings("tokens", &["a", "<|im_end|>", "</s>"]).kinds(&[1, 4, 1]).strings("merges", &[""; 0]);
    let tokenizer = marked.open().unwrap();
    assert_eq!(encode(&tokenizer, "a<|im_end|></s>a", true), [0, 1, 2, 0]);
    assert_eq!(encode(&tokenizer, "a<|im_end|></s>a", false), [0, 0]);
    assert!(tokenizer.is_end_of_generation(1) && tokenizer.is_end_of_generation(2));
    let mut piece = [0; 16];
    assert_eq!(tokenizer.piece(1, &mut piece), Ok(0));
}

#[test]
fn ends_of_generation_by_key() {
    let file = small().id("eos_token_id", 0).id("eot_token_id", 1).id("eom_token_id", 2);
    let tokenizer = file.open().unwrap();
    let ends: Vec<u32> = (0..10).filter(|&token| tokenizer.is_end_of_generation(token)).collect();
    assert_eq!(ends, [0, 1, 2]);
}

#[test]
fn pieces_by_kind() {
    let tokenizer = small()
        .strings("tokens", &["Ġa", "Ġ<", "Ġ", "<unk>", "x y"])
        .kinds(&[1, 4, 5, 2, 1])
        .strings("merges", &[""; 0])
        .open()
        .unwrap();
    let piece = |token| {
        let mut out = [0; 8];
        let len = tokenizer.piece(token, &mut out).unwrap();
        out[..len].to_vec()
    };
    assert_eq!(piece(0), b" a");
    assert_eq!(piece(1), "Ġ<".as_bytes());
    assert_eq!((piece(2), piece(3)), (vec![], vec![]));
    assert_eq!(piece(4), b"x y");
}

#[test]
fn unknown_tokenizers_are_refused_by_name() {
    for (key, name, known) in
        [("model", "bert", "gpt2"), ("model", "t5", "llama"), ("pre", "tekken", "llama-bpe")]
    {
        let error = small().text(key, name).open().unwrap_err();
        assert_eq!((error.code, error.name.as_str()), (Code::Unsupported, name));
        assert!(error.hint.contains(known));
    }
    assert_eq!(small().without(".pre").open().unwrap().pre_tokenizer(), "default");
}

#[test]
fn broken_metadata_is_refused() {
    for key in ["model", "tokens", "merges"] {
        let name = String::from("tokenizer.ggml.") + key;
        assert_eq!(small().without(key).refused(), (Code::MissingKey, &*name, 0));
        assert_eq!(small().id(key, 7).refused(), (Code::WrongKeyType, &*name, 0));
    }
    let numbers = small().array("tokens", 4, 1, &[0; 4]);
    assert_eq!(numbers.refused().0, Code::WrongKeyType);
    assert_eq!(small().kinds(&[1; 9]).refused(), (Code::BadLength, "tokenizer.ggml.token_type", 9));
    assert_eq!(
        small().id("eos_token_id", 10).refused(),
        (Code::OutOfRange, "tokenizer.ggml.eos_token_id", 10)
    );
    let negative = small().with("bos_token_id", 5, &(-1i32).to_le_bytes());
    assert_eq!(negative.refused(), (Code::WrongKeyType, "tokenizer.ggml.bos_token_id", 0));
    let no_bos = small().with("add_bos_token", 7, &[1]);
    assert_eq!(no_bos.refused(), (Code::MissingKey, "tokenizer.ggml.bos_token_id", 0));
    assert_eq!(small().strings("tokens", &[""; 0]).kinds(&[]).refused().0, Code::BadLength);
    let index = vec![0; 401].leak();
    let error = Tokenizer::new(&Gguf::parse(small().bytes().leak()).unwrap(), index).unwrap_err();
    assert_eq!((error.code, error.found), (Code::BufferTooSmall, 100));
}

#[test]
fn contradictions_are_refused() {
    let twice = small().strings("tokens", &["a", "b", "a"]).kinds(&[1; 3]);
    assert_eq!(twice.refused(), (Code::BadVocabulary, "tokenizer.ggml.tokens", 2));
    for merge in ["a x", "x a", "b a", "a", "", " ", "a ", " a", "ab", "a b c"] {
        let file = small().strings("merges", &["a b", merge]);
        assert_eq!(file.refused(), (Code::BadVocabulary, "tokenizer.ggml.merges", 1), "{merge:?}");
    }
    let long = small().strings("tokens", &["x".repeat(1025)]).kinds(&[4]).strings("merges", &[""; 0]);
    assert_eq!(long.refused(), (Code::BadVocabulary, "tokenizer.ggml.tokens", 0));
}

/// Texts that all begin their search in the same part of the hash table.
#[test]
fn texts_made_to_collide_are_refused() {
    let texts = (0u32..).map(|number| std::format!("{number:x}"));
    let texts: Vec<String> =
        texts.filter(|text| vocab::Hash::of(text.as_bytes()).finish() >> 25 == 0).take(1500).collect();
    let file = small().strings("merges", &[""; 0]).kinds(&[1; 1500]).strings("tokens", &texts);
    assert_eq!(file.refused().0, Code::BadVocabulary);
    let file = file.kinds(&[1; 900]).strings("tokens", &texts[..900]);
    let tokenizer = file.open().unwrap();
    assert!((0..900).all(|token| tokenizer.find(texts[token].as_bytes()) == Some(token as u32)));
}

/// Each merge appends one letter: the longest chain that a vocabulary can make.
#[test]
fn a_chain_of_merges() {
    let tokens: Vec<String> = (1..=500).map(|len| "a".repeat(len)).collect();
    let merges: Vec<String> = tokens[..499].iter().map(|token| token.clone() + " a").collect();
    let file = small().strings("tokens", &tokens).kinds(&[1; 500]).strings("merges", &merges);
    let tokenizer = file.open().unwrap();
    // Pairs of one letter come first, and then nothing merges two pairs.
    assert_eq!(encode(&tokenizer, &"a".repeat(100_000), false), vec![1; 50_000]);
    let reversed: Vec<String> = merges.into_iter().rev().collect();
    let tokenizer = file.strings("merges", &reversed).open().unwrap();
    let ids = encode(&tokenizer, &"a".repeat(1_000_000), false);
    assert!(ids[0] > 0);
    assert_eq!(ids.iter().map(|id| id + 1).sum::<u32>(), 1_000_000);
}

/// The index of a file.
fn index(file: &Gguf<'_>) -> Vec<u8> {
    let mut index = vec![0; Tokenizer::index_bytes(file).unwrap()];
    let bytes = Tokenizer::build_index(file, &mut index).unwrap();
    index.truncate(bytes);
    index
}

#[test]
fn an_index_is_as_long_as_it_says_and_of_this_vocabulary() {
    for (file, other) in [(small(), sentence_piece_tests::small()), (sentence_piece_tests::small(), small())]
    {
        let (bytes, other) = (file.bytes(), other.bytes());
        let file = Gguf::parse(&bytes).unwrap();
        let good = index(&file);
        assert!(Tokenizer::with_index(&file, &good).is_ok());
        let refused = |index: &[u8]| {
            let error = Tokenizer::with_index(&file, index).unwrap_err();
            assert_eq!((error.code, error.name.as_str()), (Code::BadLength, "tokenizer index"));
        };
        (0..good.len()).for_each(|bytes| refused(&good[..bytes]));
        refused(&[&good[..], &[0; 4]].concat());
        refused(&index(&Gguf::parse(&other).unwrap()));
        // The header but its last number, which bounds no part.
        for at in 0..12 {
            let mut bad = good.clone();
            bad[at] ^= 0x81;
            refused(&bad);
        }
    }
}

/// A number in place of a word of an index: any, that of a token, or none.
fn word() -> impl Strategy<Value = u32> {
    prop_oneof![any::<u32>(), 0..300u32, Just(NONE), (0..2000u32).prop_map(|low| 0x7FFF_FF00 + low)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// An index may say anything behind its header.
    #[test]
    fn an_index_that_lies_does_no_harm(changes in prop::collection::vec((any::<prop::sample::Index>(), word()), 1..40),
                                       fill in prop::option::weighted(0.2, word()),
                                       text in "(<c>|<u>>|[abc<u>é \\n]){0,90}", by_score: bool) {
        let bytes = if by_score { sentence_piece_tests::small() } else { small() }.bytes();
        let file = Gguf::parse(&bytes).unwrap();
        let mut index = index(&file);
        let words = &mut index.as_chunks_mut::<4>().0[4..];
        if let Some(word) = fill {
            words.fill(word.to_le_bytes());
        }
        for (at, word) in changes {
            words[at.index(words.len())] = word.to_le_bytes();
        }
        let tokenizer = Tokenizer::with_index(&file, &index).unwrap();
        let tokens = tokenizer.len() as u32;
        let mut ids = vec![0; Tokenizer::most_ids(text.len())];
        let mut scratch = vec![0; Tokenizer::scratch_words(text.len())];
        let options = Encode { add_bos: true, parse_special: true };
        match tokenizer.encode(text.as_bytes(), options, &mut scratch, &mut ids) {
            Ok(count) => ids.truncate(count),
            // Without its token the space before the text is spelled in three bytes.
            Err(error) => prop_assert!(by_score && error.code == Code::BufferTooSmall),
        }
        for id in ids.into_iter().chain(0..=tokens) {
            match tokenizer.piece(id, &mut vec![0; bytes.len()]) {
                Ok(len) => prop_assert!(id < tokens && len < bytes.len()),
                Err(error) => prop_assert!(id >= tokens && error.code == Code::BadToken),
            }
            tokenizer.is_end_of_generation(id);
        }
        let found = tokenizer.find(text.as_bytes()).or(tokenizer.find(b"")).or(tokenizer.byte(b'a'));
        prop_assert!(found.is_none() || tokenizer.byte(b'a') == found || found < Some(tokens));
    }

    /// Whatever a file holds, it is refused or it works.
    #[test]
    fn damaged_files_do_no_harm(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
                                text in "[abc<u>é \\n]{0,50}", by_score: bool) {
        let by_rank = small().id("bos_token_id", 8).id("eos_token_id", 8).with("add_bos_token", 7, &[1]);
        let mut bytes = if by_score { sentence_piece_tests::small() } else { by_rank }.bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let Ok(file) = Gguf::parse(&bytes) else { return Ok(()) };
        let Ok(bytes) = Tokenizer::index_bytes(&file) else { return Ok(()) };
        let mut index = vec![0x56; bytes];
        let Ok(tokenizer) = Tokenizer::new(&file, &mut index) else { return Ok(()) };
        for id in encode(&tokenizer, &text, true) {
            prop_assert!((id as usize) < tokenizer.len());
            let mut piece = vec![0; tokenizer.raw_text(id).unwrap().len()];
            tokenizer.piece(id, &mut piece).unwrap();
        }
    }
}
