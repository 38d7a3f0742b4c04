//! A real server, llama.cpp's with SmolLM2: what `edgec synth` gets from it, the server killed half-way; and
//! that the probabilities in its rows are those of our own forward pass at the tokens that they were given
//! to.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use edge_tests::{Ran, edgec, require_python, require_smollm2, run, teacher, text, workspace};
use edgec::text::corpus;
use edgec::text::{ChatTemplate, HostTokenizer};
use serde_json::{Value, json};

const ROWS: usize = 6;

/// The server as a process, which dies with this.
struct Server {
    child: Child,
    url: String,
}

impl Server {
    fn start(model: &Path, port: u16) -> Option<Self> {
        let mut python: Command = require_python("xllamacpp")?;
        python.arg(workspace().join("tests/oracle/openai_server.py")).arg(model).arg(port.to_string());
        python.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = python.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = lines.find_map(|line| Some(line.ok()?).filter(|line| line.starts_with("http")));
        let Some(address) = address else {
            panic!("the server did not start: {:?}", child.wait());
        };
        Some(Self { child, url: format!("{address}/v1") })
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn synth(url: &str, out: &Path, options: &[&str]) -> Command {
    let mut command = edgec();
    for variable in ["EDGE_API_KEY", "OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"] {
        command.env_remove(variable);
    }
    command.args(["synth", "--model", "SmolLM2", "--concurrency", "2", "--json", "--url", url]).args(options);
    command.arg("--out").arg(out);
    command
}

fn rows(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn rows_of_a_server_that_was_killed_are_distilled() {
    let Some(model) = require_smollm2() else { return };
    let port = free_port();
    let Some(server) = Server::start(&model, port) else { return };
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("rows.jsonl");
    let text = text().to_str().unwrap();
    let rows_wanted = ROWS.to_string();
    let options =
        ["--seed-data", text, "--passage", "200", "--count", &rows_wanted, "--endpoint", "completions"];
    let options = [&options[..], &["--max-tokens", "48", "--temperature", "0.7", "--seed", "1"]].concat();
    let options = [&options[..], &["--top-logprobs", "8"]].concat();
    let mut command = synth(&server.url, &out, &[&options[..], &["--retries", "1"]].concat());
    let client = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while fs::read_to_string(&out).map_or(0, |text| text.lines().count()) < 2 {
        assert!(started.elapsed() < Duration::from_secs(120), "no rows come");
        std::thread::sleep(Duration::from_millis(2));
    }
    server.kill();
    let ended = client.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success() && error.contains("--resume goes on"), "{error}");
    let before = rows(&out);
    assert!((2..ROWS).contains(&before.len()), "{} rows when the server was killed", before.len());

    let Some(server) = Server::start(&model, port) else { return };
    let summary = Ran::of(synth(&server.url, &out, &options).arg("--resume")).json();
    drop(server);
    assert_eq!(summary["present"], before.len());
    assert_eq!(summary["written"], ROWS - before.len());
    assert!(summary["completion_tokens"].as_u64().unwrap() > 0, "{summary}");
    let after = rows(&out);
    assert_eq!(after[..before.len()], before, "rows that were there changed");
    let mut ids: Vec<_> = after.iter().map(|row| row["id"].as_str().unwrap()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), ROWS);

    let mut distill = edgec();
    distill.args(["distill", "--layers", "1", "--length", "32", "--batch", "2", "--tokens", "1024"]);
    distill
        .args(["--mask-prompts", "--target", "x86_64-linux", "--teacher"])
        .arg(teacher().join("model.gguf"));
    distill.arg("--data").arg(&out).args(["--eval-data", text, "--out"]).arg(folder.path().join("run"));
    let ran = Ran::of(&mut distill);
    assert!(ran.success, "{}", ran.err);
    // Another vocabulary than the server's: where both cut alike, its probabilities are learned.
    let said = ran.err.lines().find(|line| line.contains("have probabilities that came with them")).unwrap();
    let counts: Vec<usize> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    assert!(counts[0] > 0 && counts[0] < counts[1], "{said}");
    assert!(folder.path().join("run/student.gguf").exists());
}

/// Natural logarithm of the probability that our own forward pass gives each token after the first.
fn own_logprobs(model: &Path, folder: &Path, ids: &[u32]) -> Vec<f32> {
    let (listed, out) = (folder.join("ids"), folder.join("logits.safetensors"));
    fs::write(&listed, json!(ids).to_string()).unwrap();
    run(edgec().arg("logits").arg(model).arg("--ids").arg(listed).arg("--out").arg(&out));
    let bytes = fs::read(out).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let logits = tensors.tensor("logits").unwrap();
    let logits: Vec<f32> = logits.data().as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
    let rows = logits.chunks_exact(logits.len() / ids.len());
    let of = |(row, &next): (&[f32], &u32)| {
        let most = row.iter().copied().fold(f32::MIN, f32::max);
        row[next as usize] - most - row.iter().map(|logit| (logit - most).exp()).sum::<f32>().ln()
    };
    rows.zip(&ids[1..]).map(of).collect()
}

#[test]
fn probabilities_of_a_server_are_those_of_the_model() {
    const TOKENS: usize = 32;
    let Some(model) = require_smollm2() else { return };
    let Some(server) = Server::start(&model, free_port()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let (prompts, out) = (folder.path().join("prompts.txt"), folder.path().join("rows.jsonl"));
    fs::write(&prompts, "Name three cities in France and say what each is known for.\n").unwrap();
    let options = ["--prompts", prompts.to_str().unwrap(), "--top-logprobs", "8", "--temperature", "0"];
    let summary =
        Ran::of(synth(&server.url, &out, &options).args(["--max-tokens", &TOKENS.to_string()])).json();
    drop(server);
    assert_eq!((&summary["written"], &summary["with_logprobs"]), (&json!(1), &json!(1)));

    let tokenizer = HostTokenizer::open(&model).unwrap();
    let template = ChatTemplate::of(&tokenizer);
    let corpus = corpus::load(&[out], &tokenizer, template.as_ref(), true).unwrap();
    // The same vocabulary: every token of the answer is found again, and its alternatives too.
    assert_eq!(corpus.soft.len(), TOKENS);
    let own = own_logprobs(&model, folder.path(), &corpus.ids);
    let (mut sum, mut most) = (0.0, 0f32);
    for (position, target) in corpus.soft.iter() {
        assert!(corpus.scored[position]);
        assert_eq!(target.ids.len(), 8, "at {position}");
        assert_eq!(target.ids[0], corpus.ids[position], "a greedy token is the likeliest");
        assert!((0.0..1.0).contains(&target.tail()));
        let difference = (target.logprobs[0] - own[position - 1]).abs();
        sum += difference;
        most = most.max(difference);
    }
    let mean = sum / TOKENS as f32;
    println!("logarithms of probabilities differ from the server's by {mean:.4}, at most {most:.4}");
    // Both round activations to 8 bits; one place further they would differ by nats.
    assert!(mean < 0.1 && most < 0.5, "{mean}, at most {most}");
}
