//! Folders by hand: spellings that occur, and files that are wrong.

use serde_json::json;

use super::*;

/// A byte-level `tokenizer.json`: 256 bytes, `<s>` (256), `</s>` (257), then "th" (258) and "the" (259).
fn file() -> Value {
    let mut letters: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    letters.sort_unstable();
    let mut vocab: Map<String, Value> =
        letters.iter().enumerate().map(|(id, letter)| (letter.to_string(), id.into())).collect();
    for (id, token) in [(256, "<s>"), (258, "th"), (259, "the")] {
        vocab.insert(token.into(), id.into());
    }
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "added_tokens": [token(256, "<s>", true), token(257, "</s>", true)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["t", "h"], ["th", "e"]]},
    })
}

fn token(id: u64, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "special": special, "single_word": false, "lstrip": false,
           "rstrip": false, "normalized": false})
}

fn template(token: &str, ids: &[u64]) -> Value {
    json!({
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {token: {"id": token, "ids": ids, "tokens": vec![token; ids.len()]}},
            },
        ],
    })
}

/// A folder with these files.
fn folder(files: &[(&str, Value)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, value) in files {
        fs::write(folder.path().join(name), value.to_string()).unwrap();
    }
    folder
}

fn good(files: &[(&str, Value)]) -> Vocabulary {
    read(folder(files).path()).unwrap().unwrap()
}

/// The message, without the folder.
fn refusal(files: &[(&str, Value)]) -> String {
    let folder = folder(files);
    let error = read(folder.path()).unwrap_err().to_string();
    let start = format!("{}/", folder.path().display());
    error.strip_prefix(&start).unwrap_or_else(|| panic!("no path in {error}")).to_owned()
}

/// The message for `tokenizer.json` alone, `change`d.
fn refused(change: impl FnOnce(&mut Value)) -> String {
    let mut file = file();
    change(&mut file);
    let message = refusal(&[("tokenizer.json", file)]);
    message.strip_prefix("tokenizer.json: ").unwrap_or_else(|| panic!("another file: {message}")).to_owned()
}

fn get(vocabulary: &Vocabulary, key: &str) -> Option<MetaValue> {
    vocabulary.get(&format!("tokenizer.ggml.{key}")).cloned()
}

#[test]
fn a_folder_without_a_tokenizer_and_one_of_pieces() {
    assert_eq!(read(folder(&[("config.json", json!({}))]).path()).unwrap(), None);
    let message = "tokenizer.model: a SentencePiece vocabulary alone, expected a tokenizer.json beside it";
    assert_eq!(refusal(&[("tokenizer.model", json!(0))]), message);
}

#[test]
fn both_spellings_of_merges_added_tokens_and_holes() {
    let mut file = file();
    let added = file["added_tokens"].as_array_mut().unwrap();
    added.extend([token(262, "<tool>", false), token(264, "<end>", true)]);
    file["model"]["vocab"]["[PAD260]"] = 260.into();
    let mut older = file.clone();
    older["model"]["merges"] = json!(["t h", "th e"]);
    let vocabulary = good(&[("tokenizer.json", file)]);
    assert_eq!(vocabulary, good(&[("tokenizer.json", older)]));
    assert_eq!(get(&vocabulary, "merges"), Some(MetaValue::Strings(vec![b"t h".to_vec(), b"th e".to_vec()])));
    let names: Vec<_> = vocabulary.tokens()[256..].iter().map(|t| String::from_utf8_lossy(t)).collect();
    let expected = ["<s>", "</s>", "th", "the", "[PAD260]", "[PAD261]", "<tool>", "[PAD263]", "<end>"];
    assert_eq!(names, expected);
    let Some(MetaValue::I32s(kinds)) = get(&vocabulary, "token_type") else { panic!("no types") };
    assert_eq!(kinds[255..], [1, 3, 3, 1, 1, 5, 5, 4, 5, 3]);
    assert_eq!(get(&vocabulary, "pre"), Some("gpt-2".into()));
    assert_eq!(get(&vocabulary, "bos_token_id"), None);
    assert_eq!(get(&vocabulary, "add_bos_token"), Some(MetaValue::Bool(false)));
}

#[test]
fn files_without_a_type_and_with_nfc() {
    let mut file = file();
    file["model"].as_object_mut().unwrap().remove("type");
    file["model"]["continuing_subword_prefix"] = "".into();
    file["normalizer"] = json!({"type": "NFC"});
    assert_eq!(get(&good(&[("tokenizer.json", file)]), "pre"), Some("gpt-2".into()));
}

#[test]
fn roles_by_text_then_by_id() {
    let tokenizer = ("tokenizer.json", file());
    let vocabulary = good(&[
        tokenizer.clone(),
        ("tokenizer_config.json", json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>"})),
        ("special_tokens_map.json", json!({"eos_token": "th", "unk_token": {"content": "the"}})),
        ("generation_config.json", json!({"eos_token_id": 3, "pad_token_id": [7, 8]})),
        ("config.json", json!({"bos_token_id": 1, "pad_token_id": 9})),
    ]);
    let ids = ["bos", "eos", "unknown", "padding"].map(|name| get(&vocabulary, &format!("{name}_token_id")));
    assert_eq!(ids, [256, 257, 259, 7].map(|id| Some(MetaValue::U32(id))));

    let vocabulary = good(&[
        tokenizer,
        ("tokenizer_config.json", json!({"bos_token": null})),
        ("config.json", json!({"bos_token_id": 256, "eos_token_id": [257, 1], "pad_token_id": -1})),
    ]);
    let ids = ["bos", "eos", "padding"].map(|name| get(&vocabulary, &format!("{name}_token_id")));
    assert_eq!(ids, [Some(MetaValue::U32(256)), Some(MetaValue::U32(257)), None]);
}

#[test]
fn bos_is_found_by_what_the_post_processor_does() {
    let mut begins = file();
    begins["post_processor"] = template("<s>", &[256]);
    let adds = |files: &[(&str, Value)]| {
        let vocabulary = good(files);
        (get(&vocabulary, "bos_token_id"), get(&vocabulary, "add_bos_token"))
    };
    let bos = Some(MetaValue::U32(256));
    let told = |add: bool| ("tokenizer_config.json", json!({"bos_token": "<s>", "add_bos_token": add}));
    let begins = ("tokenizer.json", begins);
    assert_eq!(adds(std::slice::from_ref(&begins)), (bos.clone(), Some(MetaValue::Bool(true))));
    assert_eq!(adds(&[begins.clone(), told(false)]), (bos.clone(), Some(MetaValue::Bool(false))));
    assert_eq!(adds(&[("tokenizer.json", file()), told(true)]), (bos, Some(MetaValue::Bool(true))));

    let message = refusal(&[begins, ("tokenizer_config.json", json!({"bos_token": "</s>"}))]);
    let expected = "tokenizer.json: `post_processor` puts [256] before a text, expected BOS (257)";
    assert_eq!(message, expected);
    let message = refused(|file| file["post_processor"] = template("<s>", &[256, 256]));
    assert_eq!(message, "`post_processor` puts [256, 256] before a text, expected BOS (no token)");
    let message = refused(|file| file["post_processor"] = template("<s>", &[u64::from(u32::MAX)]));
    assert_eq!(message, "`post_processor` puts [4294967295] before a text, expected BOS (no token)");
    let message =
        refusal(&[("tokenizer.json", file()), ("tokenizer_config.json", json!({"add_bos_token": true}))]);
    let expected = "tokenizer.json: `add_bos_token` in tokenizer_config.json is true, expected a `bos_token`";
    assert_eq!(message, expected);
}

#[test]
fn templates_by_text_by_name_and_from_a_file() {
    let template = |config: Value, jinja: Option<&str>| {
        let folder = folder(&[("tokenizer.json", file()), ("tokenizer_config.json", config)]);
        if let Some(text) = jinja {
            fs::write(folder.path().join("chat_template.jinja"), text).unwrap();
        }
        read(folder.path()).unwrap().unwrap().get("tokenizer.chat_template").cloned()
    };
    let named = json!([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]);
    assert_eq!(template(json!({"chat_template": "t"}), None), Some("t".into()));
    assert_eq!(template(json!({"chat_template": named}), None), Some("d".into()));
    assert_eq!(template(json!({"chat_template": "t"}), Some("j\n")), Some("j\n".into()));
    assert_eq!(template(json!({"chat_template": null}), None), None);
    let wrong = ("tokenizer_config.json", json!({"chat_template": 3}));
    let message = refusal(&[("tokenizer.json", file()), wrong]);
    assert_eq!(message, "tokenizer_config.json: `chat_template` is 3, expected text");
}

/// A SentencePiece `tokenizer.json`: `<unk>`, `<s>`, `</s>`, 256 bytes, then characters and what merges make.
fn pieces() -> Value {
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let mut tokens: Vec<String> =
        ["<unk>", "<s>", "</s>"].map(String::from).into_iter().chain(bytes).collect();
    tokens.extend(["▁", "t", "h", "e", "a", "th", "▁t", "▁th", "the", "▁the"].map(String::from));
    let vocab: Map<String, Value> =
        tokens.into_iter().enumerate().map(|(id, token)| (token, id.into())).collect();
    json!({
        "added_tokens": [token(0, "<unk>", true), token(1, "<s>", true), token(2, "</s>", true)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "post_processor": null,
        "model": {
            "type": "BPE", "vocab": vocab, "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "merges": ["t h", "▁ t", "▁ th", "▁t h", "th e", "▁ the", "▁th e"],
        },
    })
}

#[test]
fn scores_from_merges() {
    let vocabulary = good(&[("tokenizer.json", pieces())]);
    assert_eq!(get(&vocabulary, "model"), Some("llama".into()));
    assert_eq!(get(&vocabulary, "merges"), None);
    assert_eq!(get(&vocabulary, "unknown_token_id"), Some(MetaValue::U32(0)));
    let (Some(MetaValue::F32s(scores)), Some(MetaValue::I32s(kinds))) =
        (get(&vocabulary, "scores"), get(&vocabulary, "token_type"))
    else {
        panic!("no scores or types")
    };
    assert_eq!(scores[257..], [0.0, 0.0, -7.0, -7.0, -7.0, -7.0, -7.0, -0.0, -1.0, -2.0, -4.0, -5.0]);
    assert_eq!(kinds[..4], [2, 3, 3, 6]);
    assert_eq!(kinds[258..], [6, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]);
    assert_eq!(get(&vocabulary, "add_space_prefix"), Some(MetaValue::Bool(true)));
}

/// Llama's of today, Gemma's, and that of Llama 2 at first.
#[test]
fn spellings_of_spaces() {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
    let split = json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false});
    for (normalizer, pre_tokenizer, prefix) in [
        (pieces()["normalizer"].clone(), Value::Null, true),
        (Value::Null, metaspace("first"), true),
        (Value::Null, metaspace("always"), true),
        (Value::Null, metaspace("never"), false),
        (replace.clone(), split, false),
        (replace, Value::Null, false),
    ] {
        let mut file = pieces();
        (file["normalizer"], file["pre_tokenizer"]) = (normalizer, pre_tokenizer);
        let found = get(&good(&[("tokenizer.json", file)]), "add_space_prefix");
        assert_eq!(found, Some(MetaValue::Bool(prefix)));
    }
}

#[test]
fn merges_that_are_not_from_scores_are_refused() {
    let refused = |change: fn(&mut Value)| {
        let mut file = pieces();
        change(&mut file);
        refusal(&[("tokenizer.json", file)])
    };
    // "the" is a token, but nothing makes it.
    let message = refused(|file| file["model"]["merges"] = json!(["t h"]));
    assert!(message.contains("none that scores can say"), "{message}");
    let message = refused(|file| file["normalizer"] = Value::Null);
    assert!(message.contains("without a space before the text neither"), "{message}");
    let message = refused(|file| file["normalizer"] = json!({"type": "Lowercase"}));
    assert!(message.contains("expected one of Prepend, Replace"), "{message}");
    let message = refused(|file| file["model"]["unk_token"] = "<none>".into());
    assert!(message.ends_with("`model.unk_token` is `<none>`, which is no token"), "{message}");
}

#[test]
fn other_tokenizers_are_refused_by_name() {
    let message = refused(|file| file["model"]["type"] = "Unigram".into());
    assert_eq!(message, "`model.type` is \"Unigram\", expected BPE");
    assert_eq!(refused(|file| *file = json!([1])), "`model.type` is null, expected BPE");
    let message = refused(|file| file["model"]["byte_fallback"] = true.into());
    let expected =
        "`pre_tokenizer` is of type \"ByteLevel\", expected one of Metaspace, Split, or a Sequence of them";
    assert_eq!(message, expected);
    let message = refused(|file| file["model"]["end_of_word_suffix"] = "</w>".into());
    assert_eq!(message, "`model.end_of_word_suffix` is \"</w>\", expected none");
    let message = refused(|file| {
        file["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "Lowercase"}]})
    });
    let expected = "`normalizer` is of type \"Lowercase\", expected one of NFC, or a Sequence of them";
    assert_eq!(message, expected);
    let message = refused(|file| file["pre_tokenizer"] = json!({"type": "Metaspace"}));
    assert!(
        message.starts_with("`pre_tokenizer` is of type \"Metaspace\", expected one of ByteLevel"),
        "{message}"
    );
    let none = "`pre_tokenizer` cuts texts as none that the device has; tried \
        gpt-2, smollm, llama-bpe, qwen2, dbrx, default";
    assert_eq!(refused(|file| file["pre_tokenizer"] = Value::Null), none);
    assert_eq!(refused(|file| file["pre_tokenizer"]["add_prefix_space"] = true.into()), none);
    assert_eq!(refused(|file| file["pre_tokenizer"]["use_regex"] = false.into()), none);
    let split = json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false});
    let message = refused(|file| file["pre_tokenizer"] = split);
    assert!(message.contains("Parsing error"), "{message}");
}

#[test]
fn hostile_ids_and_merges_are_refused() {
    let message = refused(|file| file["model"]["vocab"]["far"] = u32::MAX.into());
    assert_eq!(message, "token `far` has id 4294967295, expected less than 65798");
    let message = refused(|file| file["added_tokens"][1]["id"] = 10_000_000.into());
    assert_eq!(message, "token `</s>` has id 10000000, expected less than 65797");
    for id in [json!(-1), json!(1.5), json!("1"), json!(null), json!(4_294_967_296u64)] {
        let message = refused(|file| file["model"]["vocab"]["bad"] = id.clone());
        assert_eq!(message, format!("token `bad` has id {id}, expected a whole number below 2^32"));
    }
    let message = refused(|file| file["model"]["vocab"]["twin"] = 258.into());
    assert_eq!(message, "tokens `th` and `twin` both have id 258");
    let message = refused(|file| file["added_tokens"][0]["id"] = 300.into());
    assert_eq!(message, "token `<s>` has ids 256 and 300, expected one");
    let message = refused(|file| file["added_tokens"][0]["content"] = 7.into());
    assert!(message.starts_with("added token {") && message.ends_with(" has no text"), "{message}");
    let message = refused(|file| file["model"]["vocab"] = json!({}));
    assert_eq!(message, "merge 0 is [\"t\",\"h\"], expected two tokens whose joined text is a token");
    let message = refused(|file| *file = json!({"model": {"type": "BPE", "vocab": {}, "merges": []}}));
    assert_eq!(message, "no tokens");
    let message = refused(|file| file["model"]["vocab"] = json!([["a", 0]]));
    assert_eq!(message, "`model.vocab` is missing, expected tokens and ids");
    let message = refused(|file| file["model"]["merges"] = json!({}));
    assert_eq!(message, "`model.merges` is missing, expected a list of pairs");
    for merge in [json!(7), json!("th"), json!(["t"]), json!(["t", "h", "e"]), json!(["t", 1])] {
        let message = refused(|file| file["model"]["merges"] = json!([merge]));
        assert_eq!(message, format!("merge 0 is {merge}, expected two tokens"));
    }
    // The joined text is longer than any token: the library would write beyond its buffer.
    for merge in [json!("the the"), json!(["the", "nowhere"]), json!(" the"), json!("h t")] {
        let message = refused(|file| file["model"]["merges"] = json!([merge]));
        assert_eq!(message, format!("merge 0 is {merge}, expected two tokens whose joined text is a token"));
    }
}

#[test]
fn hostile_templates_are_refused() {
    let mut undefined = template("<s>", &[256]);
    undefined["processors"][1]["special_tokens"] = json!({});
    let message = refused(|file| file["post_processor"] = undefined);
    let expected = "`post_processor` has piece {\"SpecialToken\":{\"id\":\"<s>\",\"type_id\":0}}, expected one that it defines";
    assert_eq!(message, expected);
    let mut second = template("<s>", &[256]);
    second["processors"][1]["single"][1]["Sequence"]["id"] = "B".into();
    let message = refused(|file| file["post_processor"] = second);
    assert!(message.contains("has piece {\"Sequence\":{\"id\":\"B\""), "{message}");
    let mut none = template("<s>", &[256]);
    none["processors"][1]["single"] = json!([]);
    let message = refused(|file| file["post_processor"] = none);
    assert_eq!(message, "`post_processor` holds the text 0 times, expected once");
}

#[test]
fn wrong_settings_are_refused_with_their_file() {
    let tokenizer = || ("tokenizer.json", file());
    let message = refusal(&[tokenizer(), ("tokenizer_config.json", json!({"eos_token": "<|end|>"}))]);
    let expected = "tokenizer_config.json: `eos_token` is `<|end|>`, which is no token of tokenizer.json";
    assert_eq!(message, expected);
    let message = refusal(&[tokenizer(), ("special_tokens_map.json", json!({"pad_token": 3}))]);
    assert_eq!(message, "special_tokens_map.json: `pad_token` is 3, expected a token's text");
    let message = refusal(&[tokenizer(), ("config.json", json!({"eos_token_id": 4_294_967_296u64}))]);
    assert_eq!(message, "config.json: `eos_token_id` is 4294967296, expected an id below 260");
    let message = refusal(&[tokenizer(), ("generation_config.json", json!([]))]);
    assert_eq!(message, "generation_config.json: [], expected an object");
    let folder = folder(&[tokenizer()]);
    fs::write(folder.path().join("tokenizer.json"), "{").unwrap();
    let message = read(folder.path()).unwrap_err().to_string();
    assert!(message.contains("tokenizer.json: EOF while parsing"), "{message}");
    let large = fs::File::create(folder.path().join("tokenizer.json")).unwrap();
    large.set_len((1 << 26) + 1).unwrap();
    let message = read(folder.path()).unwrap_err().to_string();
    assert!(
        message.ends_with("tokenizer.json: 67108865 bytes of JSON, expected at most 67108864"),
        "{message}"
    );
}
