//! Whatever is wrong with an input, the answer is one line that says where, and nothing half-written.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use edge_tests::{Ran, edgec, teacher, text, workspace};
use serde_json::Value;

/// A folder for the inputs of one test; `out` inside it is where nothing may appear.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Runs a command with `--out` that must be refused with all of `parts` in its line, and must leave
    /// the folder as it was.
    fn refused(&self, case: &str, command: &mut Command, parts: &[&str]) {
        let before = self.listing();
        Ran::of(command.arg("--out").arg(self.path("out"))).assert_refused(case, parts);
        assert_eq!(self.listing(), before, "{case}: something was left behind");
    }

    fn listing(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut open = vec![self.folder.path().to_owned()];
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    open.push(path.clone());
                }
                found.push(path);
            }
        }
        found.sort();
        found
    }
}

fn distill(teacher: &Path, data: &Path) -> Command {
    let mut command = edgec();
    command.args(["distill", "--length", "64", "--tokens", "1024"]);
    command.arg("--teacher").arg(teacher).arg("--data").arg(data);
    command
}

fn quantize(model: &Path) -> Command {
    let mut command = edgec();
    command.args(["quantize", "--type", "Q8_0"]).arg(model);
    command
}

fn gguf() -> PathBuf {
    teacher().join("model.gguf")
}

/// Where `text` ends in a file.
fn after(bytes: &[u8], text: &str) -> usize {
    let at = bytes.windows(text.len()).position(|window| window == text.as_bytes());
    at.unwrap_or_else(|| panic!("no `{text}`")) + text.len()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

#[test]
fn damaged_gguf_files() {
    const HUGE: [u8; 8] = u64::MAX.to_le_bytes();
    const TENSOR: &str = "blk.0.attn_q.weight";
    type Damage = fn(&mut Vec<u8>);
    let cases: [(&str, &str, Damage); 16] = [
        ("empty", "at byte 0", Vec::clear),
        ("cut in the header", "at byte 8", |bytes| bytes.truncate(10)),
        ("cut in the vocabulary", "at byte", |bytes| bytes.truncate(2000)),
        ("cut in the tensors", "`blk.", |bytes| bytes.truncate(bytes.len() / 2)),
        ("cut by one byte", "[E09]", |bytes| bytes.truncate(bytes.len() - 1)),
        ("wrong magic", "not a GGUF file", |bytes| put(bytes, 0, b"GGML")),
        ("version 4", "version", |bytes| put(bytes, 4, &[4])),
        ("tensor count", "at byte", |bytes| put(bytes, 8, &HUGE)),
        ("key count", "at byte", |bytes| put(bytes, 16, &HUGE)),
        ("length of a key", "at byte 24", |bytes| put(bytes, 24, &HUGE)),
        ("length of an array", "at byte", |bytes| {
            let at = after(bytes, "tokenizer.ggml.tokens");
            put(bytes, at + 8, &HUGE);
        }),
        ("n_dims 9", TENSOR, |bytes| {
            let at = after(bytes, TENSOR);
            put(bytes, at, &[9]);
        }),
        ("absurd dimensions", TENSOR, |bytes| {
            let at = after(bytes, TENSOR);
            put(bytes, at + 4, &(1u64 << 40).to_le_bytes());
            put(bytes, at + 12, &(1u64 << 40).to_le_bytes());
        }),
        ("tensor past the end", TENSOR, |bytes| {
            let at = after(bytes, TENSOR);
            put(bytes, at + 24, &(1u64 << 30).to_le_bytes());
        }),
        ("unknown tensor type", TENSOR, |bytes| {
            let at = after(bytes, TENSOR);
            put(bytes, at + 20, &[99]);
        }),
        ("tensor of another shape", TENSOR, |bytes| {
            let at = after(bytes, TENSOR);
            put(bytes, at + 12, &32u64.to_le_bytes());
        }),
    ];
    let place = Place::new();
    let good = fs::read(gguf()).unwrap();
    for (case, part, damage) in cases {
        let mut bytes = good.clone();
        damage(&mut bytes);
        let path = place.file("bad.gguf", &bytes);
        place.refused(case, &mut quantize(&path), &["bad.gguf", part]);
        place.refused(case, &mut distill(&path, text()), &["bad.gguf", part]);
        let mut run = edgec();
        run.args(["run", "--prompt", "x"]).arg(&path);
        Ran::of(&mut run).assert_refused(case, &["bad.gguf", part]);
    }
}

#[test]
fn gguf_files_that_name_no_model_of_ours() {
    let place = Place::new();
    let good = fs::read(gguf()).unwrap();
    let cases = [
        ("missing key", "llama.embedding_length", "llama.embedding_lengtX", "`llama.embedding_length`"),
        ("missing tensor", "blk.1.ffn_up.weight", "blk.1.ffn_uX.weight", "blk.1.ffn_u"),
        ("unknown family", "architecture\u{8}\0\0\0\u{5}\0\0\0\0\0\0\0llama", "", "lambo"),
        ("unknown tokenizer", "\u{4}\0\0\0\0\0\0\0gpt2", "", "gpt9"),
    ];
    for (case, found, changed, part) in cases {
        let end = after(&good, found);
        let mut bytes = good.clone();
        let changed = if changed.is_empty() { part } else { changed };
        put(&mut bytes, end - changed.len(), changed.as_bytes());
        let path = place.file("bad.gguf", &bytes);
        place.refused(case, &mut distill(&path, text()), &["bad.gguf", part]);
        let mut run = edgec();
        run.args(["run", "--prompt", "x"]).arg(&path);
        Ran::of(&mut run).assert_refused(case, &["bad.gguf", part]);
    }
}

#[test]
fn damaged_hugging_face_folders() {
    const WEIGHTS: &str = "model.safetensors";
    const NORM: &str = "model.norm.weight";
    let golden = workspace().join("tests/golden/models/qwen2");
    let place = Place::new();
    let bad = |case: &str, damage: &dyn Fn(&Path), parts: &[&str]| {
        let folder = place.path("bad");
        fs::create_dir(&folder).unwrap();
        for name in ["config.json", WEIGHTS] {
            fs::copy(golden.join(name), folder.join(name)).unwrap();
        }
        damage(&folder);
        place.refused(case, &mut quantize(&folder), parts);
        place.refused(case, &mut distill(&folder, text()), parts);
        fs::remove_dir_all(&folder).unwrap();
    };
    let edit = |folder: &Path, edit: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let path = folder.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        edit(config.as_object_mut().unwrap());
        fs::write(path, config.to_string()).unwrap();
    };
    let weights = |folder: &Path, edit: &dyn Fn(&mut Vec<u8>)| {
        let path = folder.join(WEIGHTS);
        let mut bytes = fs::read(&path).unwrap();
        edit(&mut bytes);
        fs::write(path, bytes).unwrap();
    };
    for key in ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]
    {
        let remove = |folder: &Path| edit(folder, &|config| drop(config.remove(key)));
        bad(&format!("without {key}"), &remove, &["config.json", key]);
        let absurd = |folder: &Path| edit(folder, &|config| config[key] = Value::from(1u64 << 62));
        bad(&format!("absurd {key}"), &absurd, &["bad", key]);
        let text = |folder: &Path| edit(folder, &|config| config[key] = Value::from("many"));
        bad(&format!("{key} is a text"), &text, &["config.json", key]);
    }
    let family = |folder: &Path| edit(folder, &|config| config["model_type"] = Value::from("lambo"));
    bad("unknown family", &family, &["config.json", "lambo"]);
    bad("not JSON", &|folder| fs::write(folder.join("config.json"), "{\"a\":").unwrap(), &["config.json"]);
    bad("no weights", &|folder| fs::remove_file(folder.join(WEIGHTS)).unwrap(), &[WEIGHTS]);
    bad("cut weights", &|folder| weights(folder, &|bytes| bytes.truncate(100_000)), &[WEIGHTS]);
    let huge = |bytes: &mut Vec<u8>| put(bytes, 0, &u64::MAX.to_le_bytes());
    bad("huge header", &|folder| weights(folder, &huge), &[WEIGHTS]);
    let shape = |folder: &Path| {
        // A norm of 64 elements as a matrix of 8 x 8: the same bytes.
        weights(folder, &|bytes| {
            let at = after(bytes, NORM);
            let found = bytes[at..].windows(4).position(|window| window == b"[64]").unwrap() + at;
            put(bytes, found, b"[8,8");
            bytes.splice(found + 4..found + 4, *b"]");
            let header = u64::from_le_bytes(*bytes.first_chunk().unwrap());
            put(bytes, 0, &(header + 1).to_le_bytes());
        });
    };
    bad("wrong shape", &shape, &[WEIGHTS, NORM, "[8, 8]", "[64]"]);
    let renamed = |folder: &Path| {
        weights(folder, &|bytes| {
            let at = after(bytes, NORM);
            put(bytes, at - 1, b"X");
        });
    };
    bad("unknown tensor", &renamed, &["bad", "model.norm.weigh"]);
    let nan = |folder: &Path| {
        weights(folder, &|bytes| {
            let end = bytes.len();
            put(bytes, end - 4, &f32::NAN.to_le_bytes());
        });
    };
    bad("NaN", &nan, &[WEIGHTS, "NaN", "at element"]);
    let shard = |folder: &Path| {
        fs::remove_file(folder.join(WEIGHTS)).unwrap();
        let index = r#"{"weight_map":{"model.norm.weight":"model-00002-of-00002.safetensors"}}"#;
        fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    };
    bad("missing shard", &shard, &["model-00002-of-00002.safetensors"]);
}

#[test]
fn texts_that_cannot_be_learned_from() {
    let place = Place::new();
    let cases: [(&str, &[u8], &[&str]); 10] = [
        ("empty.txt", b"", &["empty.txt", "empty"]),
        ("blank.txt", b" \n\n \t\n", &["blank.txt", "empty"]),
        ("latin1.txt", b"caf\xe9 au lait", &["latin1.txt", "UTF-8", "byte 3"]),
        ("short.txt", b"My fellow Americans", &["short.txt", "tokens", "needed"]),
        ("text.csv", b"a,b", &["text.csv", ".txt", ".jsonl"]),
        ("cut.jsonl", b"{\"text\":\"a\"}\n{\"text\":", &["cut.jsonl", "line 2", "JSON"]),
        ("keys.jsonl", b"{\"txt\":\"a\"}", &["keys.jsonl", "line 1", "txt", "`messages`"]),
        ("list.jsonl", b"\n[1]\n", &["list.jsonl", "line 2", "object"]),
        ("latin1.jsonl", b"{\"text\":\"\xff\"}", &["latin1.jsonl", "UTF-8"]),
        (
            "chat.jsonl",
            b"{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}",
            &["chat.jsonl", "line 1", "chat template"],
        ),
    ];
    for (name, bytes, parts) in cases {
        let path = place.file(name, bytes);
        place.refused(name, &mut distill(&gguf(), &path), parts);
    }
    place.refused("missing", &mut distill(&gguf(), &place.path("no.txt")), &["no.txt", "No such file"]);
    let mut eval_data = distill(&gguf(), text());
    eval_data.arg("--eval-data").arg(place.path("empty.txt"));
    place.refused("--eval-data", &mut eval_data, &["empty.txt", "empty"]);
    for (name, parts) in [
        ("empty.txt", ["empty.txt", "empty"]),
        ("latin1.txt", ["latin1.txt", "byte 3"]),
        ("short.txt", ["short.txt", "needs"]),
    ] {
        let mut eval = edgec();
        eval.arg("eval").arg(gguf()).arg("--data").arg(place.path(name));
        Ran::of(&mut eval).assert_refused(name, &parts);
    }
}

#[test]
fn places_that_cannot_be_written_are_named_once() {
    let place = Place::new();
    for (format, name) in [("gguf", "no/model.gguf"), ("hf", "no/folder")] {
        let out = place.path(name);
        let mut export = edgec();
        export.arg("export").arg(gguf()).args(["--format", format, "--out"]).arg(&out);
        let ran = Ran::of(&mut export);
        ran.assert_refused(format, &["No such file"]);
        let out = out.display().to_string();
        assert_eq!(ran.err.matches(&out).count(), 1, "{}", ran.err);
        assert!(!ran.err.contains(".edgec-"), "{}", ran.err);
    }
}

#[test]
fn settings_that_make_no_sense() {
    let place = Place::new();
    let cases = [
        ("--target", "toaster", "`toaster`"),
        ("--quant", "Q3_X", "`Q3_X`"),
        ("--alpha", "1.5", "alpha is 1.5"),
        ("--alpha", "NaN", "alpha is NaN"),
        ("--temperature", "0", "temperature is 0"),
        ("--layers", "0", "0 layers"),
        ("--layers", "3", "3 layers"),
        ("--shrink", "0", "shrink is 0"),
        ("--shrink", "2", "shrink is 2"),
        ("--tokens", "0", "tokens is 0"),
        ("--tokens", "many", "--tokens"),
        ("--length", "0", "length is 0"),
        ("--length", "999999999999", "length is 999999999999"),
        ("--batch", "0", "batch is 0"),
        ("--accumulate", "0", "accumulate is 0"),
        ("--lr", "inf", "learning rate is inf"),
        ("--loss", "guess", "--loss"),
        ("--device", "tpu", "expected cpu, cuda or metal"),
        // Neither is among the features of this build.
        ("--device", "cuda:1", "--features cuda"),
        ("--device", "metal", "--features metal"),
    ];
    for (flag, value, part) in cases {
        let mut command = edgec();
        // The last of two would win, so that a case stands alone.
        command.arg("distill").arg("--teacher").arg(gguf()).arg("--data").arg(text()).args([flag, value]);
        if flag != "--length" {
            command.args(["--length", "64"]);
        }
        place.refused(&format!("{flag} {value}"), &mut command, &[part]);
    }
    let mut kernels = edgec();
    kernels.arg("run").arg(gguf()).args(["--prompt", "x", "--kernels", "mmx"]);
    Ran::of(&mut kernels).assert_refused("--kernels", &["`mmx`", "generic"]);
    let mut kind = edgec();
    kind.arg("quantize").arg(gguf()).args(["--type", "Q3_X"]);
    place.refused("--type", &mut kind, &["Q3_X", "Q4_K_M"]);
    Ran::of(edgec().arg("quantize")).assert_refused("nothing given", &["MODEL", "--out"]);
    let mut no_type = edgec();
    no_type.arg("quantize").arg(gguf());
    place.refused("no type", &mut no_type, &["--type", "--budget-bytes"]);
    Ran::of(edgec().arg("distil")).assert_refused("a misspelt command", &["distil"]);
}

#[test]
fn students_with_other_tokens() {
    let place = Place::new();
    let mut bytes = fs::read(gguf()).unwrap();
    // The first token after <|endoftext|> is `!` of one byte, then comes `"`.
    let at = after(&bytes, "\u{1}\0\0\0\0\0\0\0!");
    put(&mut bytes, at - 1, b"\"");
    put(&mut bytes, at + 8, b"!");
    let student = place.file("student.gguf", &bytes);
    let mut command = distill(&gguf(), text());
    place.refused("swapped tokens", command.arg("--student").arg(&student), &["vocabulary", "`!`", "`\"`"]);
    let golden = workspace().join("tests/golden/models/llama-tied");
    let mut command = distill(&gguf(), text());
    place.refused(
        "another size",
        command.arg("--student").arg(golden),
        &["vocabulary", "256", "512", "--align"],
    );
    let given = |options: &[&str]| {
        let mut command = distill(&gguf(), text());
        command.args(options);
        command
    };
    let own = gguf();
    let own = own.to_str().unwrap();
    let cached = ["--student", own, "--align", "--cache-teacher", "top-k=5"];
    place.refused("a cache", &mut given(&cached), &["the teacher's cache", "--align"]);
    let hidden = ["--student", own, "--loss", "uld", "--hidden", "mse=1"];
    place.refused("hidden states", &mut given(&hidden), &["hidden-state term", "uld"]);
    place.refused("both", &mut given(&["--student", own, "--loss", "uld", "--align"]), &["loss is uld"]);
    place.refused("uld of a cut", &mut given(&["--loss", "uld"]), &["--student"]);
    let mut nobody = edgec();
    nobody.args(["distill", "--loss", "uld", "--student", own, "--data"]).arg(text());
    place.refused("nobody to align with", &mut nobody, &["--teacher"]);
    let mut nobody = edgec();
    nobody.args(["distill", "--soft-targets", "teacher", "--student", own, "--data"]).arg(text());
    place.refused("nobody to ask", &mut nobody, &["--soft-targets", "no --teacher"]);
    let mut nobody = edgec();
    nobody.args(["distill", "--teacher-precision", "int8", "--student", own, "--data"]).arg(text());
    place.refused("nobody to ask in int8", &mut nobody, &["--teacher-precision", "no --teacher"]);
    let unknown = ["--student", own, "--teacher-precision", "int4"];
    place.refused("another type", &mut given(&unknown), &["int4", "f32", "int8"]);
    let mut command = distill(&gguf(), text());
    place.refused("no model", command.arg("--student").arg(place.path("no")), &["no", "No such file"]);
}

#[test]
fn folders_that_cannot_be_written() {
    let place = Place::new();
    let in_the_way = place.file("in-the-way", "mine");
    let used = place.path("used");
    fs::create_dir(&used).unwrap();
    fs::write(used.join("mine"), "mine").unwrap();
    let absent = place.path("absent");
    let before = place.listing();
    let refuse = |case: &str, out: &Path, resume: bool, parts: &[&str]| {
        let mut command = distill(&gguf(), text());
        command.arg("--out").arg(out).args(resume.then_some("--resume"));
        Ran::of(&mut command).assert_refused(case, parts);
        assert_eq!(place.listing(), before, "{case}");
    };
    refuse("a file", &in_the_way, false, &["in-the-way"]);
    refuse("below a file", &in_the_way.join("run"), false, &["in-the-way/run"]);
    refuse("the system's", Path::new("/proc/run"), false, &["/proc/run"]);
    refuse("not empty", &used, false, &["used", "not empty", "--resume"]);
    refuse("no run", &used, true, &["used", "no run to resume"]);
    refuse("no folder", &absent, true, &["absent", "no run to resume"]);

    for out in [&used, &in_the_way.join("x"), Path::new("/proc/x"), Path::new("/dev/null")] {
        let case = out.display().to_string();
        Ran::of(quantize(&gguf()).arg("--out").arg(out)).assert_refused(&case, &[&case]);
        let mut logits = edgec();
        logits.arg("logits").arg(gguf()).args(["--ids", "1,2,3", "--out"]).arg(out);
        Ran::of(&mut logits).assert_refused(&case, &[&case]);
        assert_eq!(place.listing(), before, "{case}");
    }
    for out in [&used, &in_the_way] {
        let mut export = edgec();
        export.arg("export").arg(gguf()).args(["--format", "hf", "--out"]).arg(out);
        Ran::of(&mut export).assert_refused("export", &[out.to_str().unwrap()]);
        assert_eq!(place.listing(), before);
    }
}

#[test]
fn a_run_is_resumed_with_the_same_recipe_only() {
    let place = Place::new();
    let out = place.path("run");
    let small = |extra: &[&str]| {
        let mut command = distill(&gguf(), text());
        command.args(["--target", "x86_64-linux", "--out"]).arg(&out).args(extra);
        Ran::of(&mut command)
    };
    let ran = small(&[]);
    assert!(ran.success, "{}", ran.err);
    small(&["--resume", "--alpha", "0.5"]).assert_refused("alpha", &["alpha", "1.0", "0.5"]);
    small(&["--resume", "--seed", "7"]).assert_refused("seed", &["seed was 0, now 7"]);
    fs::write(out.join("recipe.json"), "{").unwrap();
    small(&["--resume"]).assert_refused("recipe", &["recipe.json"]);
}

/// A limit on the size of files stands for a disk that is full: writing beyond it fails in the same place.
#[cfg(unix)]
#[test]
fn a_full_disk() {
    let place = Place::new();
    let limited = |blocks: usize, command: &Command| {
        let mut shell = Command::new("sh");
        // Blocks of 512 bytes. The signal is ignored, so that the write itself fails.
        shell.arg("-c").arg(format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"")).arg("sh");
        shell.arg(command.get_program()).args(command.get_args());
        shell
    };
    let command = quantize(&gguf());
    place.refused("quantize", &mut limited(100, &command), &["out", "File too large"]);
    let mut export = edgec();
    export.args(["export", "--format", "hf"]).arg(gguf());
    place.refused("export", &mut limited(100, &export), &["out", "File too large"]);

    // In a run, the checkpoint of 1.3 MB is what does not fit; what came before it stays for --resume.
    let out = place.path("run");
    let mut distill = distill(&gguf(), text());
    distill.args(["--layers", "2", "--out"]).arg(&out);
    let ran = Ran::of(&mut limited(1000, &distill));
    ran.assert_refused("distill", &["checkpoint.safetensors", "File too large"]);
    let mut left: Vec<_> =
        fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    left.sort();
    assert_eq!(left, ["layers.json", "metrics.csv", "metrics.jsonl", "recipe.json", "tensorboard"]);
}
