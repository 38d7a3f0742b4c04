//! The whole way in one recipe, from a server's text to a bundle: killed half-way it goes on, changed it does again
//! what has changed and all that follows, and nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use edge_tests::server::{Asked, Reply, Server};
use edge_tests::{Ran, edgec, kill_when, run, text, workspace};
use serde_json::{Value, json};

/// The example of the repository with a few keys of it set otherwise, so that a test can run it.
fn recipe(folder: &Path, changes: &[(&str, &str)]) -> PathBuf {
    let mut table: toml::Table =
        fs::read_to_string(workspace().join("models/demo/pipeline.toml")).unwrap().parse().unwrap();
    for (key, value) in changes {
        let (section, key) = key.split_once('.').unwrap();
        let section = table.entry(section).or_insert(toml::Table::new().into()).as_table_mut().unwrap();
        let value = value.parse::<i64>().map_or_else(|_| (*value).into(), toml::Value::from);
        section.insert(key.to_owned(), value);
    }
    let path = folder.join("recipe.toml");
    fs::write(&path, table.to_string()).unwrap();
    path
}

fn pipeline(recipe: &Path, out: &Path) -> Command {
    let mut command = edgec();
    for variable in ["EDGE_API_KEY", "OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"] {
        command.env_remove(variable);
    }
    command.arg("pipeline").arg(recipe).arg("--out").arg(out);
    command
}

/// What the ledger says: names of stages, and which are done.
fn stages(out: &Path) -> Vec<(String, bool)> {
    let text = fs::read(out.join("pipeline.json")).unwrap_or_else(|_| b"[]".into());
    let entries: Value = serde_json::from_slice(&text).unwrap();
    let entries = entries.as_array().unwrap().iter();
    entries.map(|entry| (entry["name"].as_str().unwrap().to_owned(), entry["done"] == true)).collect()
}

fn written(path: PathBuf) -> SystemTime {
    path.metadata().unwrap_or_else(|error| panic!("{}: {error}", path.display())).modified().unwrap()
}

#[test]
fn a_killed_pipeline_goes_on_and_a_changed_one_does_no_more_than_it_must() {
    let server = Server::new("pipeline", |asked: &Asked| {
        let words: Vec<&str> = asked.prompt().split(' ').take(40).collect();
        Reply::json(
            200,
            &json!({"choices": [{"text": format!(" {}", words.join(" ")), "finish_reason": "length"}]}),
        )
    });
    let folder = tempfile::tempdir().unwrap();
    let (out, text) = (folder.path().join("run"), text().to_str().unwrap());
    let small = [
        ("synth.url", &*server.url),
        ("synth.seed-data", text),
        ("synth.count", "24"),
        ("tune.tokens", "512"),
        ("tune.length", "32"),
        ("tune.rank", "4"),
        ("tune.eval-data", text),
        ("distill.tokens", "2048"),
        ("distill.length", "32"),
        ("distill.eval-data", text),
        ("distill.target", "x86_64-linux"),
        ("distill.checkpoint-every", "2"),
        ("quantize.calibration", text),
        ("quantize.calibration-tokens", "1024"),
        ("quantize.calibration-length", "64"),
    ];
    let changed =
        |changes: &[(&'static str, &'static str)]| recipe(folder.path(), &[&small[..], changes].concat());
    let asked_for = changed(&[]);

    let dry = Ran::of(pipeline(&asked_for, &out).arg("--dry-run"));
    assert!(dry.success && dry.err.contains("edgec distill") && !out.exists(), "{}", dry.err);

    kill_when(&mut pipeline(&asked_for, &out), Duration::from_secs(300), || {
        out.join("distill/checkpoint.safetensors").exists()
    });
    let done = |names: &[(&str, bool)]| {
        names.iter().map(|(name, done)| ((*name).to_owned(), *done)).collect::<Vec<_>>()
    };
    assert_eq!(stages(&out), done(&[("synth", true), ("tune", true), ("distill", false)]));
    let asked = server.asked().len();
    let tuned = written(out.join("tune/tune.json"));

    let ran = Ran::of(&mut pipeline(&asked_for, &out));
    assert!(ran.success, "{}", ran.err);
    let all =
        done(&[("synth", true), ("tune", true), ("distill", true), ("quantize", true), ("bundle", true)]);
    assert_eq!(stages(&out), all);
    assert!(ran.err.contains("resumed after step"), "{}", ran.err);
    assert!(ran.err.contains("adapter") && ran.err.contains("is merged into it"), "{}", ran.err);
    assert_eq!((server.asked().len(), written(out.join("tune/tune.json"))), (asked, tuned), "done again");
    for file in
        ["synth/rows.jsonl", "quantize/student.gguf", "bundle/student.gguf", "bundle/student.edgepack"]
    {
        assert!(out.join(file).is_file(), "{file}");
    }
    assert!(out.join("bundle/lib/x86_64-linux/libedge.so").is_file());
    assert_eq!(
        fs::read(out.join("quantize/student.gguf")).unwrap(),
        fs::read(out.join("bundle/student.gguf")).unwrap()
    );
    let manifest: Value =
        serde_json::from_slice(&fs::read(out.join("distill/manifest.json")).unwrap()).unwrap();
    assert!(manifest["recipe"]["teacher_adapter"].as_str().unwrap().ends_with("tune"), "{manifest}");
    run(edgec().arg("run").arg(out.join("bundle/student.gguf")).args([
        "--prompt",
        "My",
        "--max-tokens",
        "3",
    ]));

    // Everything is there.
    let bundled = written(out.join("bundle/student.gguf"));
    let again = Ran::of(&mut pipeline(&asked_for, &out));
    assert!(again.success && again.err.matches("done before").count() == 5, "{}", again.err);
    assert_eq!(written(out.join("bundle/student.gguf")), bundled);

    // Another type: quantized and bundled again, nothing else.
    let distilled = written(out.join("distill/manifest.json"));
    let ran = Ran::of(&mut pipeline(&changed(&[("quantize.type", "Q8_0")]), &out));
    assert!(ran.success && ran.err.contains("done again: quantize, bundle"), "{}", ran.err);
    assert_eq!((stages(&out), written(out.join("distill/manifest.json"))), (all, distilled));
    assert!(written(out.join("bundle/student.gguf")) > bundled);

    // What makes no sense is said before anything is done.
    for (changes, parts) in [
        (&[("quantize.type", "Q9")][..], &["recipe.toml: [quantize]", "Q9"][..]),
        (&[("distill.out", "x")], &["`out` is no flag of `distill`"]),
        (&[("distil.tokens", "1")], &["`distil` is no stage", "synth, tune, distill"]),
    ] {
        Ran::of(&mut pipeline(&changed(changes), &out)).assert_refused("a bad recipe", parts);
    }
    assert!(out.join("bundle/student.gguf").is_file());
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("mine"), "mine").unwrap();
    Ran::of(&mut pipeline(&changed(&[]), &other))
        .assert_refused("a folder in use", &["pipeline.json is missing"]);
}
