//! What a bundle promises, for every platform that a target names.

use std::collections::BTreeMap;

use edge_run::ChatPieces;
use edge_targets::Target;
use edge_tests::{command, require_tool, run, workspace};
use edgec::bundle::{self, elf};
use edgec::profile;

/// Most bytes of the shared library for Android.
const MOST_BYTES: usize = 256 * 1024;

#[test]
fn the_library_of_every_platform_keeps_its_promises() {
    let mut platforms = BTreeMap::new();
    for target in Target::all().unwrap() {
        platforms.entry(target.triple.clone()).or_insert(target);
    }
    let header = std::fs::read_to_string(workspace().join("runtime/capi/include/edge.h")).unwrap();
    let declared = declared_functions(&header);
    assert!(declared.contains(&"edge_generate".to_owned()), "{declared:?}");
    for target in platforms.values() {
        let out = tempfile::tempdir().unwrap();
        let report = bundle::build(target, out.path()).unwrap();
        let library = std::fs::read(&report.shared).unwrap();
        assert_eq!(report.shared_bytes, library.len() as u64);
        let checked = elf::check(&library, target.architecture()).unwrap();
        assert_eq!(checked.exports, declared, "exports of {}", target.triple);
        if target.triple == "aarch64-linux-android" {
            assert!(library.len() <= MOST_BYTES, "{} bytes", library.len());
        }
        assert_eq!(std::fs::read_to_string(&report.header).unwrap(), header);
        assert!(!contains(&library, workspace().to_str().unwrap()), "{} names this machine", target.triple);

        let again = tempfile::tempdir().unwrap();
        let again = bundle::build(target, again.path()).unwrap();
        assert_eq!(std::fs::read(again.shared).unwrap(), library, "the same twice");
        assert_eq!(std::fs::read(again.archive).unwrap(), std::fs::read(&report.archive).unwrap());

        if require_tool("readelf") {
            let dynamic = run(&mut command("readelf", [&"-dW", &report.shared]));
            assert!(dynamic.contains("libedge.so") && !dynamic.contains("NEEDED"), "{dynamic}");
            let segments = run(&mut command("readelf", [&"-lW", &report.shared]));
            let loads: Vec<_> = segments.lines().filter(|line| line.trim().starts_with("LOAD")).collect();
            assert!(!loads.is_empty() && loads.iter().all(|load| load.ends_with("0x4000")), "{segments}");
            let sections = run(&mut command("readelf", [&"-SW", &report.shared]));
            assert!(!sections.contains(".symtab") && !sections.contains(".debug"), "{sections}");
        }
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let target = Target::by_name(edge_targets::DEFAULT).unwrap();
    let error = bundle::build(&target, file.path()).unwrap_err().to_string();
    assert!(error.starts_with(file.path().to_str().unwrap()) && !error.contains('\n'), "{error}");
}

#[test]
fn the_chat_template_goes_with_the_model() {
    let out = tempfile::tempdir().unwrap();
    let vocabulary = |name: &str| {
        let path = workspace().join(format!("tests/golden/tokenizers/ggml-vocab-{name}.gguf"));
        profile::open(&path).unwrap()
    };
    let said = bundle::write_chat(&vocabulary("smollm2"), out.path()).unwrap();
    assert_eq!(said, "chat.json: the chat template as fixed texts");
    let path = out.path().join("chat.json");
    let pieces: ChatPieces = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let conversation = pieces.render(Some("Be brief."), &[("Hi", "Hello")], "Who are you?").unwrap();
    assert_eq!(
        conversation,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n\
         Hello<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    );
    // Another model in the same folder: the file of the first must not stay.
    let said = bundle::write_chat(&vocabulary("gpt-2"), out.path()).unwrap();
    assert_eq!(said, "no chat.json: the model has no chat template");
    assert!(!path.exists());
}

/// Names of the functions that a header declares, sorted.
fn declared_functions(header: &str) -> Vec<String> {
    let mut text = String::new();
    for (index, part) in header.split("/*").enumerate() {
        text.push_str(if index == 0 { part } else { part.split_once("*/").map_or("", |(_, rest)| rest) });
    }
    let declaration = |line: &str| {
        let name = line.split('(').next()?.rsplit([' ', '*']).next()?;
        let is_one = line.contains('(') && name.starts_with("edge_") && !line.starts_with([' ', '#']);
        (is_one && !line.starts_with("typedef")).then(|| name.to_owned())
    };
    let mut names: Vec<_> = text.lines().filter_map(declaration).collect();
    names.sort();
    names
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}
