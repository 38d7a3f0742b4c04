//! SentencePiece's BPE on small vocabularies made for the test, against a plain implementation of its
//! definition, and on broken ones.

extern crate std;

use super::hostile_tests::{File, encode};
use super::*;
use proptest::prelude::*;
use std::{collections::HashMap, format, string::String, vec, vec::Vec};

/// Pieces with their scores and types; `<unk>`, `<s>`, `</s>` and the 256 bytes come first.
fn file(pieces: &[(&str, f32, i32)]) -> File {
    let mut texts: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    let (mut scores, mut kinds) = (vec![0.0; 259], vec![2, 3, 3]);
    texts.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    kinds.resize(259, 6);
    for &(text, score, kind) in pieces {
        texts.push(text.into());
        scores.push(score);
        kinds.push(kind);
    }
    File::default().text("model", "llama").strings("tokens", &texts).scores(&scores).kinds(&kinds)
}

/// Ids of the pieces begin here.
const FIRST: u32 = 259;

pub(super) fn small() -> File {
    file(&[
        ("▁", -1.0, 1),
        ("a", -2.0, 1),
        ("b", -3.0, 1),
        ("ab", -4.0, 1),
        ("▁a", -5.0, 1),
        ("▁ab", -5.0, 1),
        ("▁▁", -6.0, 1),
        ("<u>", 0.0, 4),
        ("b▁", -9.0, 1),
        ("xé", -8.0, 1),
    ])
    .with("add_bos_token", 7, &[0])
}

fn ids(file: &File, text: &str) -> Vec<u32> {
    let ids = encode(&file.open().unwrap(), text, true);
    ids.into_iter().map(|id| if id >= FIRST { id - FIRST } else { id + 1000 }).collect()
}

fn decode(tokenizer: &Tokenizer<'_>, ids: &[u32]) -> Vec<u8> {
    let mut out = vec![0; ids.len() * 16];
    let len = tokenizer.decode(ids, &mut out).unwrap();
    out[..len].to_vec()
}

#[test]
fn highest_score_first_then_leftmost() {
    let no_prefix = small().with("add_space_prefix", 7, &[0]);
    // "ab" (-4) is made before "▁a" (-5), and then "▁ab".
    assert_eq!(ids(&no_prefix, " ab"), [5]);
    assert_eq!(ids(&no_prefix, " aab"), [4, 3]);
    assert_eq!(ids(&no_prefix, "   "), [6, 0]);
    assert_eq!(ids(&no_prefix, "aa"), [1, 1]);
    // A token with a space behind it, so that "b" and a space are never cut apart.
    assert_eq!(ids(&no_prefix, "bb b  a"), [2, 8, 8, 4]);
    // Neither character of this one is a token.
    assert_eq!(ids(&no_prefix, "xéx"), [9, 1003 + 0x78]);
    assert_eq!(ids(&no_prefix, ""), [0; 0]);
}

#[test]
fn a_space_before_the_text_and_behind_special_tokens() {
    assert_eq!(ids(&small(), "ab"), [5]);
    assert_eq!(ids(&small(), " ab"), [0, 5]);
    assert_eq!(ids(&small(), "a<u>a<s>a"), [4, 7, 4, 1001, 4]);
    assert_eq!(ids(&small(), "<u><u> "), [7, 7, 6]);
    let bos = small().without("add_bos_token");
    assert_eq!((ids(&bos, ""), ids(&bos, "a")), (vec![1001], vec![1001, 4]));
    let tokenizer = bos.open().unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.adds_bos()), (Some(1), Some(2), true));
    assert_eq!((tokenizer.model(), tokenizer.adds_space_prefix()), ("llama", true));
    assert!(tokenizer.is_end_of_generation(2));
    for text in ["", "a", " ab", "  a<u>"] {
        assert_eq!(decode(&tokenizer, &encode(&tokenizer, text, false)), text.as_bytes());
    }
    let error = tokenizer.decode(&[FIRST + 4, FIRST + 4], &mut [0; 2]).unwrap_err();
    assert_eq!((error.code, error.expected), (Code::BufferTooSmall, 3));
}

/// By the model's name, as in llama.cpp.
#[test]
fn white_space_behind_the_special_tokens_of_phi_3() {
    let phi = small().text("general.name", "My Phi-3 mini");
    assert_eq!(ids(&phi, "a</s> \t\n\u{b} b<s> a<u>  <u> \n"), [4, 1002, 0, 2, 1001, 0, 4, 7, 7]);
    assert_eq!(ids(&small().text("general.name", "Phi-2"), "</s> a"), [1002, 0, 4]);
}

#[test]
fn characters_without_a_token() {
    let no_prefix = small().with("add_space_prefix", 7, &[0]);
    assert_eq!(ids(&no_prefix, "é\n"), [1003 + 0xC3, 1003 + 0xA9, 1003 + 0x0A]);
    let texts = ["<unk>", "▁", "a", "<0xC3>", "a\u{301}"];
    let few = small().strings("tokens", &texts).scores(&[0.0; 5]).kinds(&[2, 1, 1, 6, 4]);
    let few = few.with("add_space_prefix", 7, &[0]);
    let tokenizer = few.open().unwrap();
    // Only one of the two bytes of "é" has a token.
    assert_eq!(encode(&tokenizer, "aéa", false), [2, 0, 2]);
    assert_eq!((tokenizer.byte(0xC3), tokenizer.byte(b'a'), tokenizer.byte(0xA9)), (Some(3), Some(2), None));
}

/// Gemma's: no space before the text, runs of white space and markup as user-defined tokens, unused tokens
/// with one low score, a token that ends with a space.
#[test]
fn a_vocabulary_like_gemmas() {
    let file = file(&[
        ("▁", -10.0, 1),
        (">", -11.0, 1),
        ("<", -12.0, 1),
        ("/", -13.0, 1),
        ("</", -1.0, 1),
        (">▁</", -9.0, 1),
        ("▁</", -8.0, 1),
        ("\n", -1000.0, 4),
        ("\n\n", -1000.0, 4),
        ("  ", -1000.0, 4),
        ("<start_of_turn>", -1000.0, 3),
        ("h", -20.0, 1),
    ])
    .text("pre", "default")
    .with("add_space_prefix", 7, &[0])
    .id("bos_token_id", 2);
    assert_eq!(ids(&file, "h> </"), [1002, 11, 5]);
    assert_eq!(ids(&file, "h </"), [1002, 11, 6]);
    assert_eq!(ids(&file, "h   h"), [1002, 11, 9, 0, 11]);
    assert_eq!(ids(&file, "\n\n\nh"), [1002, 8, 7, 11]);
    assert_eq!(ids(&file, "<start_of_turn>h"), [1002, 10, 11]);
    let tokenizer = file.open().unwrap();
    for text in ["h> </ h", "\n \n\n  h   h    ", "é\u{1F600} >"] {
        assert_eq!(decode(&tokenizer, &encode(&tokenizer, text, false)), text.as_bytes());
    }
}

#[test]
fn pieces_by_kind() {
    let tokenizer =
        file(&[("▁", 0.0, 1), ("a▁▁b▁", 0.0, 1), ("▁u", 0.0, 4), ("<0x9>", 0.0, 6)]).open().unwrap();
    let piece = |token| {
        let mut out = [0; 16];
        let len = tokenizer.piece(token, &mut out).unwrap();
        out[..len].to_vec()
    };
    assert_eq!((piece(FIRST), piece(FIRST + 1)), (b" ".to_vec(), b"a  b ".to_vec()));
    assert_eq!((piece(FIRST + 2), piece(FIRST + 3)), ("▁u".into(), vec![]));
    assert_eq!((piece(3 + 0xE2), piece(0), piece(1)), (vec![0xE2], vec![], vec![]));
    // As after other text: only `decode` knows of the space before a text.
    assert_eq!(decode(&tokenizer, &[1, FIRST, FIRST]), b" ");
    assert_eq!(decode(&tokenizer, &[2, FIRST]), b" ");
}

#[test]
fn broken_metadata_is_refused() {
    let scores = "tokenizer.ggml.scores";
    assert_eq!(small().without(".scores").refused(), (Code::MissingKey, scores, 0));
    assert_eq!(small().scores(&[0.0; 7]).refused(), (Code::BadLength, scores, 7));
    assert_eq!(small().array("scores", 5, 269, &[0; 4 * 269]).refused(), (Code::WrongKeyType, scores, 0));
    assert_eq!(small().array("scores", 12, 269, &[0; 8 * 269]).refused(), (Code::WrongKeyType, scores, 0));
    assert_eq!(small().text("scores", "1").refused(), (Code::WrongKeyType, scores, 0));
    for nan in [f32::NAN, -f32::NAN, f32::from_bits(0x7F80_0001)] {
        let mut numbers = [0.0; 269];
        numbers[260] = nan;
        assert_eq!(small().scores(&numbers).refused(), (Code::BadVocabulary, scores, 260));
    }
    let prefix = small().id("add_space_prefix", 1).refused();
    assert_eq!(prefix, (Code::WrongKeyType, "tokenizer.ggml.add_space_prefix", 0));
    let unknown = small().id("unknown_token_id", 269).refused();
    assert_eq!(unknown, (Code::OutOfRange, "tokenizer.ggml.unknown_token_id", 269));
    let no_space = small().strings("tokens", &["a"]).scores(&[0.0]).kinds(&[1]);
    assert_eq!(no_space.refused(), (Code::BadVocabulary, "tokenizer.ggml.tokens", 0));
    let no_bos = no_space.strings("tokens", &["▁"]).with("add_bos_token", 7, &[1]);
    assert_eq!(no_bos.refused(), (Code::MissingKey, "tokenizer.ggml.bos_token_id", 0));
    let (bytes, index) = (small().bytes(), &mut [0; 1000]);
    let error = Tokenizer::new(&Gguf::parse(&bytes).unwrap(), index).unwrap_err();
    assert_eq!((error.code, error.found), (Code::BufferTooSmall, 250));
}

/// Any score that is a number: infinite ones, both zeros, the smallest.
#[test]
fn every_score_has_its_place() {
    let order = [f32::INFINITY, 3.0, f32::MIN_POSITIVE, 0.0, -1e-40, -1.0, -2.0, f32::MIN, f32::NEG_INFINITY];
    for (i, high) in order.iter().enumerate() {
        for low in &order[i + 1..] {
            let pieces = [("▁", 0.0, 1), ("ab", *low, 1), ("bc", *high, 1)];
            let file = file(&pieces).with("add_bos_token", 7, &[0]).with("add_space_prefix", 7, &[0]);
            assert_eq!(ids(&file, "abc"), [1003 + 97, 2], "{high} {low}");
        }
    }
    let zeros = [("▁", 0.0, 1), ("ab", -0.0, 1), ("bc", 0.0, 1)];
    let file = file(&zeros).with("add_bos_token", 7, &[0]).with("add_space_prefix", 7, &[0]);
    assert_eq!(ids(&file, "abc"), [1, 1003 + 99]);
}

/// Texts of a megabyte and vocabularies made to be slow: whatever the merges, none takes a second step for
/// each earlier one.
#[test]
fn long_chains() {
    const LEN: usize = 1 << 20;
    let chain: Vec<String> = (1..=1500).map(|len| "a".repeat(len)).collect();
    let doubling: Vec<String> = (0..=19).map(|power| "a".repeat(1 << power)).collect();
    let spaces: Vec<String> = (1..=1000).map(|len| "▁".repeat(len)).collect();
    let letters: Vec<String> = (1..=1000).map(|len| format!("b{}", "▁a".repeat(len))).collect();
    let cases: [(&[String], i32, Vec<u8>); 6] = [
        (&chain, 1, vec![b'a'; LEN]),
        (&chain, -1, vec![b'a'; LEN]),
        (&doubling, 1, vec![b'a'; LEN]),
        (&doubling, -1, vec![b'a'; LEN]),
        (&spaces, 1, vec![b' '; LEN]),
        (&letters, 1, [&b"b"[..], &b" a".repeat(LEN / 2)].concat()),
    ];
    for (texts, sign, text) in cases {
        let mut pieces = vec![("▁", -0.5, 1), ("b", -0.5, 1)];
        pieces.retain(|(text, ..)| !texts.iter().any(|other| other == text));
        pieces.extend(texts.iter().enumerate().map(|(i, text)| (&**text, (sign * i as i32) as f32, 1)));
        let tokenizer =
            file(&pieces).with("add_bos_token", 7, &[0]).with("add_space_prefix", 7, &[0]).open().unwrap();
        let start = std::time::Instant::now();
        let mut scratch = vec![0; Tokenizer::scratch_words(text.len())];
        let mut out = vec![0; Tokenizer::most_ids(text.len())];
        let count = tokenizer.encode(&text, Encode::default(), &mut scratch, &mut out).unwrap();
        // A quadratic one would need days.
        assert!(start.elapsed().as_secs() < 60, "{} {sign}", texts.len());
        let mut back = vec![0; text.len()];
        assert_eq!(tokenizer.decode(&out[..count], &mut back).unwrap(), text.len());
        assert!(back == text);
    }
}

/// The definition, with nothing clever: look at all pairs, merge one, look again.
fn by_definition(pieces: &[(String, f32)], text: &str) -> Vec<String> {
    let scores: HashMap<&str, f32> = pieces.iter().map(|(text, score)| (text.as_str(), *score)).collect();
    let mut symbols: Vec<String> = text.replace(' ', "▁").chars().map(String::from).collect();
    loop {
        let mut best: Option<(usize, f32)> = None;
        for (i, pair) in symbols.windows(2).enumerate() {
            if let Some(&score) = scores.get(pair.concat().as_str())
                && best.is_none_or(|(_, highest)| score > highest)
            {
                best = Some((i, score));
            }
        }
        let Some((i, _)) = best else { return symbols };
        let gone = symbols.remove(i + 1);
        symbols[i].push_str(&gone);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Vocabularies of every shape: tokens that end with a space, cut characters, equal scores.
    #[test]
    fn equals_the_definition(
        pieces in prop::collection::hash_map("[abé▁]{1,4}", -3i8..0, 1..40),
        text in "[abé ]{0,60}",
    ) {
        let mut pieces: Vec<(String, f32)> =
            pieces.into_iter().map(|(text, score)| (text, f32::from(score))).collect();
        pieces.retain(|(text, _)| text != "▁");
        pieces.push(("▁".into(), -1.0));
        let listed: Vec<(&str, f32, i32)> =
            pieces.iter().map(|(text, score)| (text.as_str(), *score, 1)).collect();
        let file = file(&listed).with("add_bos_token", 7, &[0]).with("add_space_prefix", 7, &[0]);
        let tokenizer = file.open().unwrap();
        let expected: Vec<u32> = by_definition(&pieces, &text).iter().flat_map(|symbol| {
            let bytes = || symbol.bytes().map(|byte| u32::from(byte) + 3).collect();
            tokenizer.find(symbol.as_bytes()).map_or_else(bytes, |token| vec![token])
        }).collect();
        let ids = encode(&tokenizer, &text, false);
        prop_assert_eq!(&ids, &expected);
        prop_assert_eq!(decode(&tokenizer, &ids), text.into_bytes());
    }

    /// Whatever the bytes: with a token for each nothing is lost, but that U+2581 comes back as a space.
    #[test]
    fn decoding_gives_the_text_back(
        bytes in prop::collection::vec(prop_oneof![
            any::<u8>(), prop::sample::select("ab <u>é▁\n".as_bytes().to_vec())], 0..80),
        prefix: bool,
        bos: bool,
    ) {
        let tokenizer = file(&[("▁", -1.0, 1), ("a", -2.0, 1), ("▁a", -3.0, 1), ("▁▁", -4.0, 1)])
            .with("add_space_prefix", 7, &[u8::from(prefix)]).with("add_bos_token", 7, &[1]).open().unwrap();
        let mut scratch = vec![0; Tokenizer::scratch_words(bytes.len())];
        let mut out = vec![0; Tokenizer::most_ids(bytes.len())];
        let options = Encode { add_bos: bos, parse_special: false };
        let count = tokenizer.encode(&bytes, options, &mut scratch, &mut out).unwrap();
        let mut expected = Vec::new();
        sentence_piece::decode(&bytes, |run| expected.extend_from_slice(run));
        prop_assert_eq!(decode(&tokenizer, &out[..count]), expected);
    }
}
