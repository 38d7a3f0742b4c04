use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::*;
use crate::demo;
use crate::text::corpus::{self, Corpus};
use crate::text::{ChatTemplate, Message};

const TEXT: &str = "The state of the Union is strong. Ünïcode 😀 too.";

fn tokenizer() -> HostTokenizer {
    HostTokenizer::of(&demo::teacher()).unwrap()
}

/// Bytes of each token of `text`.
fn cut(tokenizer: &HostTokenizer, text: &str) -> (Vec<u32>, Vec<Vec<u8>>) {
    let pieces = Pieces::new(tokenizer).unwrap();
    let ids = tokenizer.encode(text, false, false).unwrap();
    let texts = ids.iter().map(|&id| pieces.spelled(id).unwrap().0).collect();
    (ids, texts)
}

fn token(bytes: &[u8], logprob: f32, top: &[(&str, f32)]) -> TokenLogprobs {
    let top = top.iter().map(|(text, logprob)| (Piece::Text((*text).to_owned()), *logprob)).collect();
    TokenLogprobs { token: Piece::new(bytes.into()), logprob, top }
}

/// Indices and entries for tokens that begin where `text` does.
fn aligned(tokenizer: &HostTokenizer, text: &str, tokens: &[TokenLogprobs]) -> Result<Aligned, TextError> {
    let (ids, _) = cut(tokenizer, text);
    align(&Pieces::new(tokenizer).unwrap(), &ids, text.as_bytes(), 0..text.len(), tokens)
}

#[test]
fn a_server_with_our_vocabulary_is_understood_everywhere() {
    let tokenizer = tokenizer();
    let (ids, texts) = cut(&tokenizer, TEXT);
    assert!(texts.iter().any(|text| str::from_utf8(text).is_err()), "no token is a part of a character");
    let [the, of] = [" the", " of"].map(|text| cut(&tokenizer, text).0[0]);
    let tokens: Vec<_> = texts
        .iter()
        .map(|text| token(text, -1.0, &[(" the", -2.0), (" of", -3.0), ("no token of ours at all", -1.5)]))
        // In its own list a token is not repeated.
        .map(|mut token| {
            token.top.retain(|entry| entry.0 != token.token);
            token.top.insert(0, (token.token.clone(), token.logprob));
            token
        })
        .collect();
    // As they are written into a row.
    let tokens: Vec<TokenLogprobs> = serde_json::from_str(&serde_json::to_string(&tokens).unwrap()).unwrap();
    let found = aligned(&tokenizer, TEXT, &tokens).unwrap();
    assert_eq!(found.iter().map(|entry| entry.0).collect::<Vec<_>>(), (0..ids.len()).collect::<Vec<_>>());
    for (index, entries) in &found {
        assert_eq!(entries[0], (ids[*index], -1.0));
        for (id, logprob) in [(the, -2.0), (of, -3.0)] {
            assert!(ids[*index] == id || entries.contains(&(id, logprob)), "{entries:?}");
        }
    }
    // What is not ours is in the tail.
    let mut soft = SoftTargets::default();
    soft.push(7, &found[0].1);
    let known: f32 = [-1.0f32, -2.0, -3.0].iter().map(|x| x.exp()).sum();
    assert!((soft.at(7).unwrap().tail() - (1.0 - known)).abs() < 1e-6);
}

#[test]
fn where_tokens_differ_targets_are_hard() {
    let tokenizer = tokenizer();
    let text = " of people and the people";
    let (ids, texts) = cut(&tokenizer, text);
    assert_eq!(texts, [" of", " people", " and", " the", " people"].map(|text| text.as_bytes().to_vec()));
    let indices = |pieces: &[&str]| -> Vec<usize> {
        let tokens: Vec<_> = pieces.iter().map(|piece| token(piece.as_bytes(), -0.5, &[])).collect();
        aligned(&tokenizer, text, &tokens).unwrap().into_iter().map(|entry| entry.0).collect()
    };
    assert_eq!(indices(&[" of", " people", " and", " the", " people"]), [0, 1, 2, 3, 4]);
    assert_eq!(indices(&[" of", " peo", "ple", " and", " the people"]), [0, 2]);
    assert_eq!(indices(&[" of ", "people", " and", " the", " people", ""]), [2, 3, 4]);
    // Behind bytes that are not in the text nothing is known; nor behind its end.
    assert_eq!(indices(&[" of", " persons", " and", " the", " people"]), [0]);
    assert_eq!(indices(&[" of", " people", " and", " the", " people", " people"]), [0, 1, 2, 3, 4]);
    assert_eq!(indices(&[]), [0usize; 0]);
    assert_eq!(ids.len(), 5);
}

#[test]
fn numbers_that_contradict_each_other_are_no_targets() {
    let tokenizer = tokenizer();
    let (_, texts) = cut(&tokenizer, " of people");
    let found =
        |first: TokenLogprobs| aligned(&tokenizer, " of people", &[first, token(&texts[1], -0.1, &[])]);
    let indices = |first| found(first).unwrap().into_iter().map(|entry| entry.0).collect::<Vec<_>>();
    // Likelier than an alternative, but not among them: these are of another place.
    assert_eq!(indices(token(b" of", -0.5, &[(" in", -0.5), (" a", -2.0)])), [1]);
    // Drawn from beyond the list.
    assert_eq!(indices(token(b" of", -3.5, &[(" in", -0.5), (" a", -2.0)])), [0, 1]);
    assert_eq!(indices(token(b" of", -9999.0, &[])), [0, 1]);
    for (wrong, part) in [
        (token(b" of", f32::NAN, &[]), "NaN is not the logarithm"),
        (token(b" of", 0.5, &[]), "0.5 is not the logarithm"),
        (token(b" of", -0.1, &[(" of", -0.1), (" in", -0.2)]), "sum to 1.7"),
    ] {
        let message = found(wrong).unwrap_err().to_string();
        assert!(message.starts_with("`logprobs`: token 1: ") && message.contains(part), "{message}");
    }
}

#[test]
fn texts_that_are_one_token_of_ours_count_together() {
    let tokenizer = tokenizer();
    let half = 0.5f32.ln();
    let found =
        aligned(&tokenizer, " of", &[token(b" of", -5.0, &[(" in", half), (" in", half - 1.0)])]).unwrap();
    let alternative = cut(&tokenizer, " in").0[0];
    let (id, logprob) = found[0].1[0];
    assert_eq!(id, alternative);
    assert!((logprob.exp() - (0.5 + 0.5 / std::f32::consts::E)).abs() < 1e-6);
    assert_eq!(found[0].1.len(), 2);
}

struct Place(tempfile::TempDir);

impl Place {
    fn load(&self, rows: &[Value], mask: bool) -> Result<Corpus, TextError> {
        let path: PathBuf = self.0.path().join("rows.jsonl");
        fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
        let source = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} /{% endfor %}\
            {% if add_generation_prompt %}[assistant] {% endif %}";
        let template = ChatTemplate { source: source.into(), bos: String::new(), eos: String::new() };
        corpus::load(&[path], &tokenizer(), Some(&template), mask)
    }
}

/// Each token of a text as a server of our vocabulary would give it.
fn said(text: &str) -> Value {
    let tokens: Vec<_> = cut(&tokenizer(), text).1.iter().map(|bytes| token(bytes, -0.5, &[])).collect();
    json!(tokens)
}

/// The text of the tokens for which there are soft targets, and of those that are learned.
fn learned(corpus: &Corpus) -> (String, String) {
    let tokenizer = tokenizer();
    let soft: Vec<u32> = corpus.soft.iter().map(|(position, _)| corpus.ids[position]).collect();
    assert!(corpus.soft.iter().all(|(position, target)| target.ids[0] == corpus.ids[position]));
    let scored = corpus.ids.iter().zip(&corpus.scored).filter(|(_, scored)| **scored);
    let scored: Vec<u32> = scored.map(|(&id, _)| id).collect();
    (tokenizer.decode(&soft).unwrap(), tokenizer.decode(&scored).unwrap())
}

#[test]
fn rows_with_probabilities_become_soft_targets() {
    let place = Place(tempfile::tempdir().unwrap());
    let pair = json!({
        "id": "1", "prompt": "My fellow", "completion": " citizens of the Union", "finish_reason": "stop",
        "logprobs": said(" citizens of the Union"),
    });
    let messages = json!([Message::new("user", "Go on"), Message::new("assistant", "We the people, we all")]);
    let chat = json!({ "messages": messages, "logprobs": said("We the people, we all") });
    let corpus = place.load(&[pair.clone(), chat.clone()], true).unwrap();
    let (soft, scored) = learned(&corpus);
    // The first token of a turn may have swallowed the template's space; then it is none of the server's.
    assert!(soft == " citizens of the UnionWe the people, we all", "{soft}");
    assert_eq!(scored, " citizens of the UnionWe the people, we all /");

    // Without a mask the same places are soft, and everything is learned.
    let whole = place.load(&[pair, chat.clone()], false).unwrap();
    assert_eq!(whole.ids, corpus.ids);
    assert_eq!(whole.soft, corpus.soft);
    assert!(whole.scored.iter().all(|&scored| scored));

    // Splitting keeps what is left.
    let (first, _) = corpus.soft.iter().last().unwrap();
    let count = corpus.soft.len();
    let (left, _) = corpus.clone().split(corpus.ids.len() - first);
    assert_eq!(left.soft.len(), count - 1);
    assert!(left.soft.iter().zip(corpus.soft.iter()).all(|(a, b)| a == b));

    let mut damaged = chat;
    damaged["logprobs"][1]["logprob"] = json!(2.0);
    let message = place.load(&[damaged.clone()], false).unwrap_err().to_string();
    assert!(message.contains("rows.jsonl: line 1: `logprobs`: token 2: 2 is not"), "{message}");
    damaged["logprobs"] = json!({"content": []});
    let message = place.load(&[damaged], false).unwrap_err().to_string();
    assert!(message.contains("line 1: `logprobs`: invalid type"), "{message}");
}

#[test]
fn the_end_of_a_cut_answer_is_not_learned() {
    let place = Place(tempfile::tempdir().unwrap());
    let eos = tokenizer().eos().unwrap();
    let row = |reason: &str| json!({"prompt": "My", "completion": " fellow citi", "finish_reason": reason});
    for (reason, learned) in [("stop", true), ("length", false)] {
        let corpus = place.load(&[row(reason)], false).unwrap();
        assert_eq!(corpus.ids.last(), Some(&eos));
        assert_eq!(corpus.scored.last(), Some(&learned), "{reason}");
        assert!(corpus.scored[..corpus.scored.len() - 1].iter().all(|&scored| scored));
    }
    let messages = json!([Message::new("user", "Go on"), Message::new("assistant", "We the peo\n")]);
    let chat = json!({"messages": messages, "finish_reason": "length", "logprobs": null});
    let corpus = place.load(&[chat], true).unwrap();
    assert_eq!(learned(&corpus).1, "We the peo");
    assert!(!corpus.scored.last().unwrap());
}

/// Behind a prompt SentencePiece puts no space: prompt and completion are the text that they are together, and a
/// server's tokens are found in it.
#[test]
fn a_completion_goes_on_after_its_prompt() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tokenizers/ggml-vocab-llama-spm.gguf");
    let tokenizer = HostTokenizer::open(path.as_ref()).unwrap();
    let load = |prompt: &str, completion: &str| {
        let folder = tempfile::tempdir().unwrap();
        let rows = folder.path().join("rows.jsonl");
        let pieces = Pieces::new(&tokenizer).unwrap();
        let said: Vec<_> = tokenizer
            .encode_behind(completion.as_bytes(), false)
            .unwrap()
            .iter()
            .map(|&id| token(&pieces.spelled(id).unwrap().0, -0.5, &[]))
            .collect();
        let row = json!({"prompt": prompt, "completion": completion, "logprobs": said});
        fs::write(&rows, row.to_string()).unwrap();
        corpus::load(&[rows], &tokenizer, None, true).unwrap()
    };
    for (prompt, completion) in
        [("The capital of France is", " Paris, and it"), ("Say: na", "ïve xylophones"), ("", "It is so")]
    {
        let corpus = load(prompt, completion);
        let mut whole = tokenizer.encode(&format!("{prompt}{completion}"), true, false).unwrap();
        whole.extend(tokenizer.eos());
        let text = |ids: &[u32]| tokenizer.decode(ids).unwrap();
        assert_eq!(text(&corpus.ids), format!("{prompt}{completion}"), "{:?}", corpus.ids);
        if prompt.ends_with("is") || prompt.is_empty() {
            assert_eq!(corpus.ids, whole);
        }
        let scored = corpus.scored.iter().filter(|scored| **scored).count() - 1;
        if !prompt.is_empty() {
            assert_eq!(corpus.soft.len(), scored, "every token of {completion} has its probabilities");
        }
    }
}
