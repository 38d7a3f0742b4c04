//! Folders written, read back by this crate, and their tokenizers against the device's.

use edge_models::{Rope, family_by_gguf_name};
use edge_runtime::format::Gguf;

use super::*;
use crate::export::gguf::{MetaValue, vocabulary_file};
use crate::model::Vocabulary;
use crate::text::{HostTokenizer, hf_vocabulary};
use crate::train::fixture::tiny;
use crate::train::pretrain::{initialize, learn_vocabulary};

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tokenizers")).join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A golden vocabulary under another pre-tokenizer's name.
fn vocabulary(name: &str, pre: &str) -> Vocabulary {
    let file = golden(&format!("ggml-vocab-{name}.gguf"));
    let mut vocabulary = Vocabulary::from_gguf(&Gguf::parse(&file).unwrap()).unwrap();
    set(&mut vocabulary, "tokenizer.ggml.pre", pre.into());
    vocabulary
}

fn set(vocabulary: &mut Vocabulary, key: &str, value: MetaValue) {
    vocabulary.entries.retain(|(found, _)| found != key);
    vocabulary.entries.push((key.into(), value));
}

/// A small model with that vocabulary.
fn model(vocabulary: Option<Vocabulary>) -> Model {
    let mut model = tiny(1, 3);
    if let Some(vocabulary) = &vocabulary {
        model.spec.vocab = vocabulary.tokens().len();
        model.spec.hidden = 8;
        model.weights = initialize(&model.spec, 3).unwrap();
    }
    Model { vocabulary, ..model }
}

fn host(vocabulary: &Vocabulary) -> HostTokenizer {
    HostTokenizer::from_gguf(&Gguf::parse(&vocabulary_file(Some(vocabulary))).unwrap()).unwrap()
}

fn texts() -> Vec<String> {
    serde_json::from_slice(&golden("texts.json")).unwrap()
}

/// Vocabularies to write: golden ones, relabelled, and one that was learned here.
fn vocabularies() -> Vec<Vocabulary> {
    let mut all = vec![vocabulary("smollm2", "smollm")];
    all.extend(["gpt-2", "llama-bpe", "qwen2", "dbrx", "default"].map(|pre| vocabulary("gpt-2", pre)));
    all.push(learn_vocabulary(&["the cat sat on the mat, the cat sat on the hat"], 262).unwrap());
    all
}

#[test]
fn vocabularies_come_back() {
    for mut vocabulary in vocabularies() {
        set(&mut vocabulary, "tokenizer.chat_template", "{{ messages[0].content }}".into());
        let folder = tempfile::tempdir().unwrap();
        write(&model(Some(vocabulary.clone())), &folder.path().join("out")).unwrap();
        let back = hf_vocabulary::read(&folder.path().join("out")).unwrap().unwrap();
        back.same_tokens(&vocabulary).unwrap();
        let pre = vocabulary.get("tokenizer.ggml.pre").cloned();
        for key in ["pre", "token_type", "merges", "bos_token_id", "eos_token_id", "padding_token_id"] {
            let key = format!("tokenizer.ggml.{key}");
            assert!(back.get(&key) == vocabulary.get(&key), "{key} of {pre:?}: {:?}", back.get(&key));
        }
        let template = "tokenizer.chat_template";
        assert_eq!(back.get(template), vocabulary.get(template));
        assert_eq!(host(&back).bos_to_add(), host(&vocabulary).bos_to_add(), "{pre:?}");
    }
}

/// A vocabulary of single bytes tells nothing about words, the name must come back all the same.
#[test]
fn names_come_back_from_the_smallest_vocabulary() {
    let text = ["the cat sat on the mat"; 2];
    for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2", "dbrx", "default"] {
        let mut vocabulary = learn_vocabulary(&text, 257).unwrap();
        set(&mut vocabulary, "tokenizer.ggml.pre", pre.into());
        let folder = tempfile::tempdir().unwrap();
        write(&model(Some(vocabulary)), &folder.path().join("out")).unwrap();
        let back = hf_vocabulary::read(&folder.path().join("out")).unwrap().unwrap();
        assert_eq!(back.get("tokenizer.ggml.pre"), Some(&pre.into()));
    }
}

#[test]
fn the_library_gives_the_ids_of_the_device() {
    for vocabulary in vocabularies() {
        let host = host(&vocabulary);
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        write(&model(Some(vocabulary)), &out).unwrap();
        let library = tokenizers::Tokenizer::from_file(out.join(TOKENIZER)).unwrap();
        for text in texts() {
            let ours = host.encode(&text, true, true).unwrap();
            let theirs = library.encode_fast(text.as_str(), true).unwrap();
            assert_eq!(theirs.get_ids(), ours, "{} {text:?}", host.view().pre_tokenizer());
        }
    }
}

/// Llama 2's vocabulary, with and without the space before a text.
#[test]
fn a_vocabulary_with_scores_comes_back() {
    let file = golden("ggml-vocab-llama-spm.gguf");
    for prefix in [true, false] {
        let mut vocabulary = Vocabulary::from_gguf(&Gguf::parse(&file).unwrap()).unwrap();
        set(&mut vocabulary, "tokenizer.ggml.add_space_prefix", MetaValue::Bool(prefix));
        let host = host(&vocabulary);
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        write(&model(Some(vocabulary.clone())), &out).unwrap();
        let library = tokenizers::Tokenizer::from_file(out.join(TOKENIZER)).unwrap();
        let back = hf_vocabulary::read(&out).unwrap().unwrap();
        back.same_tokens(&vocabulary).unwrap();
        for key in [
            "model",
            "token_type",
            "add_space_prefix",
            "bos_token_id",
            "eos_token_id",
            "unknown_token_id",
            "add_bos_token",
        ] {
            let key = format!("tokenizer.ggml.{key}");
            assert_eq!(back.get(&key), vocabulary.get(&key), "{key}");
        }
        let again = self::host(&back);
        for text in texts().iter().chain(&["a</s> b<s>c  <unk> ".to_owned()]) {
            let ours = host.encode(text, true, true).unwrap();
            assert_eq!(again.encode(text, true, true).unwrap(), ours, "{text:?}");
            let theirs = library.encode_fast(text.as_str(), true).unwrap();
            assert_eq!(theirs.get_ids(), ours, "{text:?}");
        }
        let text = "  Hello, wörld 😀 \u{4e2d} ";
        let ids = host.encode(text, true, false).unwrap();
        assert_eq!(host.decode(&ids).unwrap(), text);
        assert_eq!(library.decode(&ids, true).unwrap(), text);
    }
}

/// Equal scores merge from the left on the device and by rank in the library.
#[test]
fn scores_that_no_merges_can_say_are_refused() {
    let file = golden("ggml-vocab-llama-spm.gguf");
    let mut vocabulary = Vocabulary::from_gguf(&Gguf::parse(&file).unwrap()).unwrap();
    let count = vocabulary.tokens().len();
    set(&mut vocabulary, "tokenizer.ggml.scores", MetaValue::F32s(vec![0.0; count]));
    let message = refusal(&model(Some(vocabulary)));
    assert!(
        message.starts_with("/out/tokenizer.json: token ") && message.contains("expected the same"),
        "{message}"
    );
}

#[test]
fn tokens_of_every_type() {
    let mut vocabulary = learn_vocabulary(&["one two"; 2], 260).unwrap();
    let Some((_, MetaValue::Strings(tokens))) =
        vocabulary.entries.iter_mut().find(|(key, _)| key.ends_with(".tokens"))
    else {
        panic!("no tokens")
    };
    tokens.extend([&b"<tool>"[..], b"<|im_end|>", b"[PAD262]", b"<s>"].map(<[u8]>::to_vec));
    let mut kinds = vec![1; 264];
    (kinds[0], kinds[260], kinds[262], kinds[263]) = (3, 4, 5, 3);
    set(&mut vocabulary, "tokenizer.ggml.token_type", MetaValue::I32s(kinds.clone()));
    set(&mut vocabulary, "tokenizer.ggml.bos_token_id", MetaValue::U32(263));
    set(&mut vocabulary, "tokenizer.ggml.add_bos_token", MetaValue::Bool(true));
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    write(&model(Some(vocabulary.clone())), &out).unwrap();
    let back = hf_vocabulary::read(&out).unwrap().unwrap();
    // A marker is special whatever its type.
    kinds[261] = 3;
    assert_eq!(back.get("tokenizer.ggml.token_type"), Some(&MetaValue::I32s(kinds)));
    assert_eq!(back.get("tokenizer.ggml.add_bos_token"), Some(&MetaValue::Bool(true)));
    let library = tokenizers::Tokenizer::from_file(out.join(TOKENIZER)).unwrap();
    let text = "one<tool><|im_end|> two<s>[PAD262]";
    let expected = host(&vocabulary).encode(text, true, true).unwrap();
    assert_eq!(library.encode_fast(text, true).unwrap().get_ids(), expected);
    assert_eq!((expected[0], expected.contains(&260), expected.contains(&261)), (263, true, true));
}

#[test]
fn models_come_back() {
    let scalings = [
        RopeScaling::None,
        RopeScaling::Linear { factor: 2.5 },
        RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        },
    ];
    for (family, biases) in [("llama", (false, false)), ("llama", (true, true)), ("qwen2", (true, false))] {
        for (i, scaling) in scalings.into_iter().enumerate() {
            let spec = DecoderSpec {
                family: family_by_gguf_name(family).unwrap(),
                head_dim: 6,
                rope_dims: 6,
                qkv_bias: biases.0,
                attn_out_bias: biases.1,
                rope: Rope { theta: 500_000.0, scaling },
                tied_embeddings: i == 0,
                ..tiny(2, 0).spec
            };
            let weights = initialize(&spec, i as u64).unwrap();
            let model = Model { spec, weights, vocabulary: None, name: "m".into() };
            let folder = tempfile::tempdir().unwrap();
            let out = folder.path().join("out");
            write(&model, &out).unwrap();
            let back = crate::teacher::load(&out).unwrap();
            assert_eq!((back.spec, back.name.as_str()), (spec, "out"));
            assert!(back.vocabulary.is_none());
            assert_eq!(back.weights.iter().count(), model.weights.iter().count());
            for (role, layer, tensor) in model.weights.iter() {
                let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let found = back.weights.get(role, layer).unwrap();
                assert_eq!(found.dims(), tensor.dims());
                assert_eq!(values(found), values(tensor), "{role:?} {layer}");
            }
        }
    }
}

#[test]
fn weights_say_their_format_and_are_readable() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    write(&tiny(1, 0), &out).unwrap();
    let bytes = fs::read(out.join(WEIGHTS)).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let format = header.metadata().as_ref().and_then(|about| about.get("format"));
    assert_eq!(format.map(String::as_str), Some("pt"));
    #[cfg(unix)]
    for name in [WEIGHTS, CONFIG] {
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::metadata(out.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o444, 0o444, "{name}");
    }
}

#[test]
fn a_file_without_a_vocabulary_says_so() {
    let file = vocabulary_file(None);
    let model = Gguf::parse(&file).unwrap().get("tokenizer.ggml.model");
    assert_eq!(model.and_then(|model| model.as_str()), Some("none"));
}

/// The message of a refusal; nothing may be left behind.
fn refusal(model: &Model) -> String {
    let folder = tempfile::tempdir().unwrap();
    let error = write(model, &folder.path().join("out")).unwrap_err().to_string();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{error}");
    let start = folder.path().display().to_string();
    error.strip_prefix(&start).unwrap_or_else(|| panic!("no path in {error}")).to_owned()
}

#[test]
fn what_the_format_cannot_say_is_refused() {
    let mut table = tiny(1, 0);
    table.spec.rope.scaling = RopeScaling::Table;
    let message = "/out/config.json: cannot say a table of rotary divisors for family `llama`";
    assert_eq!(refusal(&table), message);

    let mut biased = tiny(1, 0);
    biased.spec.qkv_bias = true;
    let message = "/out/config.json: cannot say biases of query, key and value true, of the attention's \
        output false for family `llama`";
    assert_eq!(refusal(&biased), message);

    let mut scaled = tiny(1, 0);
    scaled.spec.rope.scaling = RopeScaling::Linear { factor: 0.5 };
    let message = "/out/config.json: key `rope_scaling.factor` is 0.5, expected 1 to 1000000";
    assert_eq!(refusal(&scaled), message);

    let mut part = tiny(1, 0);
    part.spec.rope.scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 64.5,
    };
    let message = refusal(&part);
    assert!(message.starts_with("/out/config.json: cannot say Rope { theta: 10000.0"), "{message}");
}

#[test]
fn wrong_weights_and_vocabularies_are_refused() {
    use edge_models::Role;
    let mut missing = tiny(2, 0);
    missing.weights.remove(Role::FfnUp, 1);
    let message = "/out/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight` is missing";
    assert_eq!(refusal(&missing), message);

    let mut other = tiny(1, 0);
    let tensor = other.weights.get(Role::AttnK, 0).unwrap().t().unwrap();
    other.weights.insert(Role::AttnK, 0, tensor);
    let message = "/out/model.safetensors: tensor `model.layers.0.self_attn.k_proj.weight` is F32 [16, 8], \
        expected F32 [8, 16]";
    assert_eq!(refusal(&other), message);

    let mut tied = tiny(1, 0);
    let tensor = tied.weights.get(Role::TokenEmbedding, 0).unwrap().clone();
    tied.weights.insert(Role::Output, 0, tensor);
    let message =
        "/out/model.safetensors: tensor `lm_head.weight` is there, expected none by the hyper-parameters";
    assert_eq!(refusal(&tied), message);

    let learned = || learn_vocabulary(&["one two"; 2], 260).unwrap();
    let mut large = model(Some(learned()));
    large.spec.vocab = 259;
    assert_eq!(refusal(&large), "/out/tokenizer.json: 260 tokens, expected at most 259");

    let mut pieces = learned();
    set(&mut pieces, "tokenizer.ggml.model", "t5".into());
    let message = refusal(&model(Some(pieces)));
    assert!(message.starts_with("/out/tokenizer.json: tokenizer: ") && message.contains("t5"), "{message}");

    let mut bytes = learned();
    let Some((_, MetaValue::Strings(tokens))) =
        bytes.entries.iter_mut().find(|(key, _)| key.ends_with(".tokens"))
    else {
        panic!("no tokens")
    };
    tokens.push(vec![b'x', 0xFF]);
    set(&mut bytes, "tokenizer.ggml.token_type", MetaValue::I32s(vec![1; 261]));
    let message = "/out/tokenizer.json: token 260 is `x\u{FFFD}`, expected UTF-8";
    assert_eq!(refusal(&model(Some(bytes))), message);

    let mut template = learned();
    set(&mut template, "tokenizer.chat_template", MetaValue::Bool(true));
    let message = "/out/tokenizer_config.json: `chat_template` is not text";
    assert_eq!(refusal(&model(Some(template))), message);
}

#[test]
fn an_earlier_export_is_replaced_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    write(&model(Some(learn_vocabulary(&["one two"; 2], 260).unwrap())), &out).unwrap();
    assert_eq!(fs::read_dir(&out).unwrap().count(), 5);
    write(&tiny(1, 0), &out).unwrap();
    assert_eq!(fs::read_dir(&out).unwrap().count(), 3);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);

    fs::write(out.join("notes.txt"), "mine").unwrap();
    let error = write(&tiny(1, 0), &out).unwrap_err().to_string();
    let expected = "there is `notes.txt` in the way, expected a folder of an earlier export or none";
    assert_eq!(error, format!("{}: {expected}", out.display()));
    let error = write(&tiny(1, 0), &out.join("notes.txt")).unwrap_err().to_string();
    assert!(error.contains("notes.txt: there is a file in the way"), "{error}");
    let error = write(&tiny(1, 0), &folder.path().join("none").join("out")).unwrap_err();
    assert!(matches!(error, HfError::Io { .. }), "{error}");
    assert_eq!(fs::read(out.join("notes.txt")).unwrap(), b"mine");
}
