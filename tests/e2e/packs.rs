//! Packs: the model that they were made from in another layout, and to every command a model.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use edge_runtime::format::{Gguf, PACK_HEADER_BYTES};
use edge_runtime::kernels::Kernels;
use edge_runtime::session::{Limits, Plan, Session};
use edge_runtime::tokenizer::{Encode, Tokenizer};
use edge_runtime::workers::Single;
use edge_tests::{Ran, TinyModel, edgec, run, teacher, text, wide_teacher};
use safetensors::SafeTensors;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// A GGUF file of one type and its pack, in a folder of their own.
struct Packed {
    folder: tempfile::TempDir,
    gguf: PathBuf,
    pack: PathBuf,
}

impl Packed {
    /// The trained model `teacher` (a run's folder) in tensor type `mix`.
    fn of(teacher: &Path, mix: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let gguf = folder.path().join(format!("{mix}.gguf"));
        let mut quantize = edgec();
        quantize.arg("quantize").arg(teacher.join("student")).args(["--type", mix, "--out"]).arg(&gguf);
        run(&mut quantize);
        let pack = gguf.with_extension("edgepack");
        let ran = Ran::of(edgec().arg("pack").arg(&gguf).args(["--target", "raspberry-pi-5"]));
        assert!(ran.success && ran.err.contains("matrices in tiles"), "{mix}: {}", ran.err);
        Self { folder, gguf, pack }
    }

    fn q4() -> Self {
        Self::of(teacher(), "Q4_0")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn on(command: &str, model: &Path) -> Command {
    let mut program = edgec();
    program.arg(command).arg(model);
    program
}

fn perplexity(model: &Path) -> f64 {
    let mut eval = on("eval", model);
    let found =
        Ran::of(eval.args(["--context", "64", "--windows", "32", "--json", "--data"]).arg(text())).json();
    found["ppl"].as_f64().unwrap()
}

fn greedy(model: &Path) -> Vec<u32> {
    let mut speak = on("run", model);
    speak.args(["--prompt", "My fellow citizens", "--max-tokens", "24", "--ids"]);
    serde_json::from_str(&run(&mut speak)).unwrap()
}

/// Logits after each of `ids`.
fn logits(model: &Path, ids: &[u32]) -> Vec<Vec<f32>> {
    let out = tempfile::NamedTempFile::new().unwrap();
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    run(on("logits", model).args(["--ids", &ids.join(","), "--out"]).arg(out.path()));
    let bytes = fs::read(out.path()).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor("logits").unwrap();
    let values: Vec<f32> =
        view.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    values.chunks(view.shape()[1]).map(<[f32]>::to_vec).collect()
}

/// How far the best logit is above the next one.
fn lead(logits: &[f32]) -> f32 {
    let mut sorted = logits.to_vec();
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    sorted[0] - sorted[1]
}

#[test]
fn a_pack_says_what_its_gguf_says_in_every_type() {
    // Super-blocks need rows of 256.
    let mixes = [
        (teacher(), &["Q4_0", "Q8_0", "Q4_1", "Q5_0", "Q5_1", "F16"][..]),
        (wide_teacher(), &["Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "Q3_K_S", "Q2_K"]),
    ];
    for (teacher, mixes) in mixes {
        for mix in mixes {
            let packed = Packed::of(teacher, mix);
            // The same weights in f32: activations are not quantized there.
            let float = packed.path("f32.gguf");
            run(on("quantize", &packed.gguf).args(["--type", "F32", "--out"]).arg(&float));
            let [pack, gguf, float] = [&packed.pack, &packed.gguf, &float].map(|path| perplexity(path));
            println!("{mix}: perplexity {pack:.4}, GGUF {gguf:.4}, f32 {float:.4}");
            for (other, name) in [(gguf, "GGUF"), (float, "f32")] {
                assert!((pack / other - 1.0).abs() < 0.005, "{mix}: {pack}, {name} {other}");
            }
            the_same_tokens(&packed, mix);
        }
    }
}

/// The greedy tokens are the same up to a choice that is close.
fn the_same_tokens(packed: &Packed, mix: &str) {
    const CLOSE: f32 = 0.1;
    let (of_pack, of_gguf) = (greedy(&packed.pack), greedy(&packed.gguf));
    assert_eq!(of_gguf.len(), 24, "{mix}");
    let same = of_pack.iter().zip(&of_gguf).take_while(|(a, b)| a == b).count();
    if same == of_gguf.len() {
        return;
    }
    let mut prompt = edgec();
    let question = packed.path("question");
    fs::write(&question, "My fellow citizens").unwrap();
    prompt.arg("tokenize").arg(&packed.gguf).stdin(fs::File::open(question).unwrap());
    let mut ids: Vec<u32> = serde_json::from_str(&run(&mut prompt)).unwrap();
    ids.extend(&of_gguf[..same]);
    let lead = lead(logits(&packed.gguf, &ids).last().unwrap());
    println!("{mix}: token {same} differs, its lead is {lead}");
    assert!(lead < CLOSE, "{mix}: token {same} of {of_pack:?}, GGUF {of_gguf:?}, is ahead by {lead}");
}

#[test]
fn every_command_that_runs_a_model_takes_a_pack() {
    let packed = Packed::q4();
    let ids = [5, 40, 300, 2, 511];
    let worst = furthest(&logits(&packed.pack, &ids), &logits(&packed.gguf, &ids));
    assert!(worst < 0.2, "{worst}");

    let tests =
        Ran::of(on("bench", &packed.pack).args(["-p", "16", "-n", "8", "-r", "1", "-o", "json"])).json();
    assert_eq!(tests.as_array().unwrap().len(), 2);
    assert!(tests[0]["model_type"].as_str().unwrap().ends_with("Q4_0"), "{}", tests[0]["model_type"]);

    let inspected = |path: &Path| Ran::of(on("inspect", path).arg("--json")).json();
    let (pack, gguf) = (inspected(&packed.pack), inspected(&packed.gguf));
    assert_eq!(pack["cannot_run"], Value::Array(vec![]));
    assert_eq!((&pack["spec"], &pack["tokenizer"]), (&gguf["spec"], &gguf["tokenizer"]));
    let hash = Sha256::digest(fs::read(&packed.gguf).unwrap());
    let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(pack["packed_from"], hash);
    assert!(gguf["packed_from"].is_null());
    assert!(run(&mut on("inspect", &packed.pack)).contains(&hash));

    let mut eval = on("eval", &packed.pack);
    eval.arg("--teacher").arg(&packed.gguf).args(["--context", "64", "--windows", "4", "--json", "--data"]);
    let beside = Ran::of(eval.arg(text())).json();
    assert!(beside["kl"].as_f64().unwrap() < 0.01, "{beside}");

    let mut tokenize = on("tokenize", &packed.pack);
    let of_pack = run(tokenize.stdin(fs::File::open(text()).unwrap()));
    assert_eq!(of_pack, run(on("tokenize", &packed.gguf).stdin(fs::File::open(text()).unwrap())));
}

/// The largest difference of two lists of rows.
fn furthest(ours: &[Vec<f32>], theirs: &[Vec<f32>]) -> f32 {
    assert_eq!((ours.len(), ours[0].len()), (theirs.len(), theirs[0].len()));
    let pairs = ours.iter().flatten().zip(theirs.iter().flatten());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_bundle_holds_the_pack() {
    let packed = Packed::q4();
    for (model, names) in
        [(&packed.gguf, &["student.edgepack", "student.gguf"][..]), (&packed.pack, &["student.edgepack"])]
    {
        let out = tempfile::tempdir().unwrap();
        run(on("bundle", model).args(["--target", "aarch64-android", "--out"]).arg(out.path()));
        let mut found: Vec<_> = fs::read_dir(out.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with("student"))
            .collect();
        found.sort();
        assert_eq!(found, names, "{}", model.display());
        let pack = fs::read(out.path().join("student.edgepack")).unwrap();
        assert!(pack == fs::read(&packed.pack).unwrap(), "another pack from {}", model.display());
    }
}

#[test]
fn a_pack_is_no_source() {
    let packed = Packed::q4();
    let before = packed.names();
    let out = packed.path("out");
    let mut distill = edgec();
    distill.args(["distill", "--length", "64", "--tokens", "1024", "--data"]).arg(text());
    distill.arg("--teacher").arg(&packed.pack);
    let with = |command: &str, options: &[&str]| {
        let mut program = on(command, &packed.pack);
        program.args(options);
        program
    };
    let commands = [
        ("pack", with("pack", &[])),
        ("quantize", with("quantize", &["--type", "Q8_0"])),
        ("export", with("export", &["--format", "hf"])),
        ("logits", with("logits", &["--ids", "1", "--backend", "candle"])),
        ("distill", distill),
    ];
    for (name, mut command) in commands {
        Ran::of(command.arg("--out").arg(&out))
            .assert_refused(name, &["Q4_0.edgepack", "is a pack", "GGUF file that it was made from"]);
        assert_eq!(packed.names(), before, "{name}");
    }
}

#[test]
fn packs_are_the_same_twice_and_appear_whole_or_not_at_all() {
    let packed = Packed::q4();
    let first = fs::read(&packed.pack).unwrap();
    let again = packed.path("again.edgepack");
    run(on("pack", &packed.gguf).arg("--out").arg(&again));
    assert!(first == fs::read(&again).unwrap(), "another pack of the same file");
    assert_eq!(first[32..64], Sha256::digest(fs::read(&packed.gguf).unwrap())[..]);

    // A file that cannot be packed leaves an earlier pack as it was, and nothing beside it.
    let bytes = fs::read(&packed.gguf).unwrap();
    let bad = packed.path("bad.gguf");
    fs::write(&bad, &bytes[..bytes.len() - 1]).unwrap();
    let before = packed.names();
    Ran::of(on("pack", &bad).arg("--out").arg(&again)).assert_refused("cut", &["bad.gguf", "[E09]"]);
    let nowhere = packed.path("no/such/folder.edgepack");
    Ran::of(on("pack", &packed.gguf).arg("--out").arg(&nowhere))
        .assert_refused("nowhere", &["folder.edgepack"]);
    Ran::of(on("pack", &packed.gguf).args(["--target", "toaster"])).assert_refused("target", &["`toaster`"]);
    assert_eq!(packed.names(), before);
    assert!(first == fs::read(&again).unwrap());
}

#[test]
fn a_pack_brings_the_index_of_its_tokenizer() {
    let packed = Packed::q4();
    let [gguf, mut pack] = [&packed.gguf, &packed.pack].map(|path| fs::read(path).unwrap());
    let (file, source) = (Gguf::parse(&pack).unwrap(), Gguf::parse(&gguf).unwrap());
    let mut index = vec![0; Tokenizer::index_bytes(&source).unwrap()];
    let bytes = Tokenizer::build_index(&source, &mut index).unwrap();
    assert!(file.tokenizer_index() == Some(&index[..bytes]));
    assert_eq!((Tokenizer::index_bytes(&file), (pack.len() - bytes) % 64), (Ok(0), 0));
    // The merges are in the index.
    let merges = "tokenizer.ggml.merges";
    assert!(source.get(merges).is_some() && file.get(merges).is_none());

    pack[8] = 1;
    let old = packed.path("old.edgepack");
    fs::write(&old, &pack).unwrap();
    Ran::of(on("run", &old).args(["--prompt", "My"])).assert_refused(
        "version 1",
        &["old.edgepack", "version 1 of the format, expected 2", "pack the GGUF file again"],
    );
}

#[test]
fn damaged_packs_are_refused_or_run() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.edgepack");
    let source = edgec::profile::ModelFile::from_memory(Path::new("tiny.gguf"), TinyModel::gguf());
    edgec::pack::pack(&source, &path).unwrap();
    let good = fs::read(&path).unwrap();
    let header = Gguf::parse(&good).unwrap().tensors().map(|tensor| tensor.offset).min().unwrap();
    let limits = Limits { context: 4, batch: 2, ..Limits::default() };
    let (mut refused, mut planned) = (0, 0);
    for at in 0..PACK_HEADER_BYTES + header {
        for change in [1, 0x80] {
            let mut bytes = good.clone();
            bytes[at] ^= change;
            match Gguf::parse(&bytes).and_then(|file| Plan::new(&file, limits)) {
                Ok(_) => planned += 1,
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 1000 && planned > 1000, "{refused} refused, {planned} planned");

    // Weights may be anything, not-a-numbers among them: nothing reads or writes elsewhere.
    for round in 0..24usize {
        let mut bytes = good.clone();
        let weights = &mut bytes[PACK_HEADER_BYTES + header..];
        let mut at = round * 37;
        while at < weights.len() {
            weights[at] ^= [0xFF, 0x7C, 0x80][round % 3];
            at += 101 + round;
        }
        let file = Gguf::parse(&bytes).unwrap();
        let plan = Plan::new(&file, limits).unwrap();
        let mut arena = vec![0; plan.arena_bytes()];
        for kernels in Kernels::available() {
            let mut session = Session::new(&file, &plan, kernels, &Single, &mut arena).unwrap();
            session.feed(&[2, 3, 4]).unwrap();
            assert_eq!(session.logits().len(), plan.spec().vocab);
        }
    }

    // So may the tokenizer's index, at the end: it is refused, or tokens are others.
    let index = Gguf::parse(&good).unwrap().tokenizer_index().unwrap().len();
    let (mut refused, mut opened) = (0, 0);
    for at in good.len() - index..good.len() {
        let mut bytes = good.clone();
        bytes[at] ^= 0x41;
        match Tokenizer::new(&Gguf::parse(&bytes).unwrap(), &mut []) {
            Err(_) => refused += 1,
            Ok(tokenizer) => {
                let options = Encode { add_bos: true, parse_special: true };
                let text = b"My fellow citizens, the state of the Union <|im_end|> is \xFF strong.";
                let mut ids = [0; Tokenizer::most_ids(80)];
                let count = tokenizer.encode(text, options, &mut [0; 1000], &mut ids).unwrap();
                assert!(count <= text.len() + 1);
                opened += 1;
            }
        }
    }
    assert!(refused >= 12 && opened > 1000, "{refused} refused, {opened} opened");
}
