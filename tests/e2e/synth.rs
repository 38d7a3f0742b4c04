//! `edgec synth` against a server that does everything that servers do wrong: what passes is asked again,
//! what does not is said at once, and whoever is killed, each answer is in the file once.

use std::collections::HashSet;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use edge_tests::server::{Asked, Reply, Server, chat};
use edge_tests::{Ran, edgec, kill_when, teacher, text};
use serde_json::{Value, json};

const KEY: &str = "sk-not-to-be-seen-0123456789";

/// `edgec synth` of `prompts` with nothing from this process' environment.
fn synth(folder: &Path, url: &str, prompts: &[&str]) -> Command {
    let lines = folder.join("prompts.txt");
    fs::write(&lines, prompts.join("\n")).unwrap();
    let mut command = edgec();
    for variable in ["EDGE_API_KEY", "OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"] {
        command.env_remove(variable);
    }
    command.args(["synth", "--model", "large", "--json", "--url", url, "--prompts"]).arg(lines);
    command.arg("--out").arg(out(folder));
    command
}

fn out(folder: &Path) -> PathBuf {
    folder.join("rows.jsonl")
}

fn rows(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(out(folder)).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Prompt and answer of each row, sorted, and that no id is there twice.
fn said(folder: &Path) -> Vec<(String, String)> {
    let rows = rows(folder);
    let ids: HashSet<_> = rows.iter().map(|row| row["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(ids.len(), rows.len(), "a row is there twice");
    let text = |value: &Value| value["content"].as_str().unwrap().to_owned();
    let mut said: Vec<_> =
        rows.iter().map(|row| (text(&row["messages"][0]), text(&row["messages"][1]))).collect();
    said.sort();
    said
}

fn echo(asked: &Asked) -> Reply {
    Reply::chat(&format!("{}!", asked.prompt()), "stop")
}

fn prompts(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("prompt {number:03}")).collect()
}

fn echoed(prompts: &[impl AsRef<str>]) -> Vec<(String, String)> {
    prompts.iter().map(|prompt| (prompt.as_ref().to_owned(), format!("{}!", prompt.as_ref()))).collect()
}

#[test]
fn faults_that_pass_are_asked_again() {
    const FAULTS: [&str; 8] = ["429", "500", "busy", "cut", "broken", "empty", "late", "proxy"];
    let server = Server::new("faults", |asked| match (asked.before, asked.prompt()) {
        (0, "429") => Reply::Whole(429, "Retry-After: 1\r\n", br#"{"error": {"message": "slower"}}"#.into()),
        (0, "500") => Reply::json(500, &json!({"object": "error", "message": "out of memory"})),
        (0, "busy") => Reply::json(503, &json!({"error": {"message": "Loading model"}})),
        (0, "cut") => {
            let whole = chat("cut!", "stop").to_string();
            Reply::Whole(200, "", whole[..whole.len() / 2].into())
        }
        (0, "broken") => Reply::Broken(1000, b"{\"choices\": [".into()),
        (0, "empty") => Reply::json(200, &json!({"choices": []})),
        (0, "late") => Reply::Late(Duration::from_secs(8), Box::new(echo(asked))),
        (0, "proxy") => Reply::Whole(200, "", b"<html>try again</html>".into()),
        _ => echo(asked),
    });
    let folder = tempfile::tempdir().unwrap();
    let mut command = synth(folder.path(), &server.url, &[&FAULTS[..], &["good"]].concat());
    let ran = Ran::of(command.args(["--timeout", "4", "--concurrency", "9"]).env("OPENAI_API_KEY", KEY));
    let summary = ran.json();
    let mut wanted = [&FAULTS[..], &["good"]].concat();
    wanted.sort_unstable();
    assert_eq!(said(folder.path()), echoed(&wanted));
    for (field, count) in [
        ("asked", 9),
        ("written", 9),
        ("retried", 8),
        ("refused", 0),
        ("present", 0),
        ("prompt_tokens", 90),
        ("completion_tokens", 45),
    ] {
        assert_eq!(summary[field], count, "{field}: {summary}");
    }
    for part in ["slower", "out of memory", "Loading model", "truncated or invalid JSON", "no `choices`"] {
        assert!(ran.err.contains(part), "no `{part}` in {}", ran.err);
    }
    assert!(
        ran.err.contains("no whole answer in 4 s") && ran.err.contains("prompts.txt: line 7"),
        "{}",
        ran.err
    );
    let asked = server.asked();
    let times = |prompt| -> Vec<Instant> {
        asked.iter().filter(|asked| asked.prompt() == prompt).map(|asked| asked.at).collect()
    };
    let limited = times("429");
    assert!(limited[1] - limited[0] >= Duration::from_secs(1), "Retry-After was not honoured");
    assert_eq!(asked.len(), 17);
    let bearer = format!("Bearer {KEY}");
    assert!(asked.iter().all(|asked| asked.authorization.as_ref() == Some(&bearer)));
    assert!(asked.iter().all(|asked| asked.path == "/faults/v1/chat/completions"));
    assert_eq!(asked[0].body["model"], "large");
    let file = fs::read_to_string(out(folder.path())).unwrap();
    assert!(ran.err.contains("OPENAI_API_KEY"), "{}", ran.err);
    assert!(![&file, &ran.out, &ran.err].iter().any(|text| text.contains(KEY)), "the key was shown");
}

#[test]
fn what_every_request_would_meet_ends_the_run_at_once() {
    let error = |status, headers: &'static str| {
        move |_: &Asked| {
            Reply::Whole(status, headers, format!("{{\"error\": {{\"message\": \"no: {KEY}\"}}}}").into())
        }
    };
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = format!("http://{}/v1", silent.local_addr().unwrap());
    drop(silent);
    let moved = "Location: https://example.org/v1\r\n";
    let cases: [(&str, String, &[&str]); 7] = [
        ("401", Server::new("401", error(401, "")).url, &["401", "no: (the key)", "read from EDGE_API_KEY"]),
        ("403", Server::new("403", error(403, "")).url, &["403", "read from EDGE_API_KEY"]),
        ("404", Server::new("404", error(404, "")).url, &["404", "--url", "--model"]),
        ("400", Server::new("400", error(400, "")).url, &["400", "no: (the key)"]),
        ("301", Server::new("301", error(301, moved)).url, &["https://example.org/v1", "not followed"]),
        ("wait", Server::new("wait", error(429, "Retry-After: 86400\r\n")).url, &["429", "86400 s"]),
        ("nobody", nobody, &["refused", "after 2 tries", "0 rows", "--resume"]),
    ];
    for (case, url, parts) in cases {
        let folder = tempfile::tempdir().unwrap();
        let mut command = synth(folder.path(), &url, &["a", "b", "c"]);
        command
            .args(["--concurrency", "1", "--retries", "1"])
            .env("EDGE_API_KEY", KEY)
            .env("OPENAI_API_KEY", "other");
        let ran = Ran::of(&mut command);
        ran.assert_refused(case, parts);
        assert!(!ran.err.contains(KEY) && !ran.out.contains(KEY), "{case}: the key was shown");
        assert!(!out(folder.path()).exists(), "{case}: something was left behind");
    }
    let folder = tempfile::tempdir().unwrap();
    for (url, part) in [
        ("http://127.0.0.1/a b/v1", "not an address"),
        ("ftp://127.0.0.1/v1", "http:// or https://"),
        ("127.0.0.1:8080/v1", "http:// or https://"),
        ("http://me:sesame@127.0.0.1/v1", "password"),
    ] {
        let ran = Ran::of(&mut synth(folder.path(), url, &["a"]));
        ran.assert_refused(url, &["--url", part]);
        assert!(!ran.err.contains("sesame"));
    }
    let server = Server::new("keyless", error(401, ""));
    let parts = ["neither EDGE_API_KEY nor OPENAI_API_KEY is set"];
    Ran::of(&mut synth(folder.path(), &server.url, &["a"])).assert_refused("no key", &parts);
}

#[test]
fn what_is_one_prompts_own_fault_is_counted() {
    let server = Server::new("own", |asked| match asked.prompt() {
        "long" => Reply::json(400, &json!({"error": {"message": "exceeds the context"}})),
        "silent" => Reply::chat(" \n", "stop"),
        "forbidden" => Reply::chat("I", "content_filter"),
        "cut" => Reply::chat("and so", "length"),
        "huge" => Reply::Broken(80 << 20, vec![b' '; 65 << 20]),
        "mad" => Reply::json(500, &json!({"error": {"message": "always"}})),
        _ => echo(asked),
    });
    let folder = tempfile::tempdir().unwrap();
    let asked = ["good", "long", "silent", "good", "forbidden", "cut", "huge", "mad", "better"];
    let mut command = synth(folder.path(), &server.url, &asked);
    command.args([
        "--concurrency",
        "1",
        "--retries",
        "1",
        "--n",
        "2",
        "--temperature",
        "0.5",
        "--max-tokens",
        "7",
    ]);
    let ran = Ran::of(&mut command);
    let summary = ran.json();
    assert_eq!(
        said(folder.path()),
        [("better", "better!"), ("cut", "and so"), ("good", "good!")].map(|(a, b)| (a.into(), b.into()))
    );
    for (field, count) in [
        ("asked", 16),
        ("written", 3),
        ("truncated", 1),
        ("refused", 10),
        ("duplicate_prompts", 1),
        ("duplicate_answers", 3),
    ] {
        assert_eq!(summary[field], count, "{field}: {summary}");
    }
    for part in
        ["line 2: given up: ", "exceeds the context", "finish_reason content_filter", "longer than 64 MiB"]
    {
        assert!(ran.err.contains(part), "no `{part}` in {}", ran.err);
    }
    let cut = rows(folder.path()).into_iter().find(|row| row["finish_reason"] == "length").unwrap();
    assert_eq!(cut["messages"][0]["content"], "cut");
    let body = &server.asked()[0].body;
    assert_eq!((&body["temperature"], &body["max_tokens"]), (&json!(0.5), &json!(7)));

    // Rows are not written over, and other requests' rows stay.
    let again = Ran::of(&mut synth(folder.path(), &server.url, &["good"]));
    again.assert_refused("in use", &["rows.jsonl", "--resume"]);
    let mut other = synth(folder.path(), &server.url, &["cut", "new", "newer"]);
    let summary = Ran::of(other.args(["--resume", "--drop-truncated", "--count", "1"])).json();
    assert_eq!((&summary["written"], &summary["refused"]), (&json!(1), &json!(1)));
    assert_eq!(rows(folder.path()).len(), 4);
}

#[test]
fn a_killed_run_goes_on_without_losing_or_doubling_a_row() {
    let server = Server::new("kill", |asked| Reply::Late(Duration::from_millis(30), Box::new(echo(asked))));
    let folder = tempfile::tempdir().unwrap();
    let prompts = prompts(60);
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let mut command = synth(folder.path(), &server.url, &prompts);
    let lines = || fs::read_to_string(out(folder.path())).map_or(0, |text| text.lines().count());
    kill_when(command.args(["--concurrency", "4"]), Duration::from_secs(60), || lines() >= 15);
    let there = lines();
    assert!(there < 60, "the run was over before it could be killed");

    // What a machine that lost its power may leave: a row without its end.
    let mut torn = fs::read(out(folder.path())).unwrap();
    let row = torn.split_inclusive(|&byte| byte == b'\n').next_back().unwrap().to_vec();
    torn.extend(&row[..row.len() / 2]);
    fs::write(out(folder.path()), &torn).unwrap();

    let ran = Ran::of(synth(folder.path(), &server.url, &prompts).args(["--concurrency", "4", "--resume"]));
    let summary = ran.json();
    assert!(ran.err.contains("torn row"), "{}", ran.err);
    assert_eq!(summary["present"], there);
    assert_eq!(summary["written"], 60 - there);
    assert_eq!(said(folder.path()), echoed(&prompts));
    // Nothing was asked twice but what was under way.
    let asked = server.asked().len();
    assert!((60..=64).contains(&asked), "{asked} requests");

    let again = Ran::of(synth(folder.path(), &server.url, &prompts).arg("--resume")).json();
    assert_eq!((&again["asked"], &again["present"]), (&json!(0), &json!(60)));
    assert_eq!(server.asked().len(), asked);
}

#[test]
fn a_server_that_went_away_is_taken_up_again() {
    // For a while every connection ends without an answer, as when a server is killed.
    static ANSWERS: AtomicUsize = AtomicUsize::new(0);
    static BACK: AtomicUsize = AtomicUsize::new(usize::MAX);
    let server = Server::new("away", |asked| {
        let number = ANSWERS.fetch_add(1, Ordering::SeqCst);
        if (5..BACK.load(Ordering::SeqCst)).contains(&number) {
            Reply::Broken(1, Vec::new())
        } else {
            echo(asked)
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let prompts = prompts(12);
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let mut command = synth(folder.path(), &server.url, &prompts);
    let ran = Ran::of(command.args(["--concurrency", "2", "--retries", "1"]));
    ran.assert_refused("server gone", &["after 2 tries", "5 rows are in", "rows.jsonl", "--resume goes on"]);
    assert_eq!(rows(folder.path()).len(), 5);

    BACK.store(0, Ordering::SeqCst);
    let mut command = synth(folder.path(), &server.url, &prompts);
    let summary = Ran::of(command.args(["--resume", "--rate", "20", "--concurrency", "2"])).json();
    assert_eq!((&summary["present"], &summary["written"]), (&json!(5), &json!(7)));
    assert_eq!(said(folder.path()), echoed(&prompts));
    let times: Vec<_> = server.asked().iter().rev().take(7).map(|asked| asked.at).collect();
    // Less a little for the way of the requests.
    assert!(times[0] - times[6] >= Duration::from_millis(6 * 50 - 25), "faster than the rate");
}

#[test]
fn passages_become_rows_with_probabilities_that_are_distilled() {
    /// Goes on with words of the text, each of which it is rather sure of.
    fn go_on(asked: &Asked) -> Reply {
        let words: Vec<String> = asked.prompt().split(' ').take(12).map(|word| format!(" {word}")).collect();
        // Of equal names the last one counts: the word may be one of the others.
        let top = |word: &String| json!({" the": -2.5, " of": -3.0, (word.as_str()): -0.25});
        let logprobs = json!({
            "tokens": words, "token_logprobs": vec![-0.25; words.len()],
            "top_logprobs": words.iter().map(top).collect::<Vec<_>>(),
        });
        let choice = json!({"text": words.concat(), "finish_reason": "length", "logprobs": logprobs});
        Reply::json(200, &json!({"choices": [choice]}))
    }
    let server = Server::new("passages", go_on);
    let folder = tempfile::tempdir().unwrap();
    let mut command = edgec();
    command.args([
        "synth",
        "--model",
        "large",
        "--endpoint",
        "completions",
        "--passage",
        "200",
        "--count",
        "24",
    ]);
    command.args(["--top-logprobs", "3", "--json", "--url", &server.url, "--seed-data"]).arg(text());
    let ran = Ran::of(command.arg("--out").arg(out(folder.path())).env("EDGE_API_KEY", "EMPTY"));
    let summary = ran.json();
    assert_eq!((&summary["written"], &summary["with_logprobs"]), (&json!(24), &json!(24)));
    let asked = server.asked();
    assert_eq!(asked.len(), 24);
    assert!(asked.iter().all(|asked| asked.body["logprobs"] == 3 && asked.prompt().len() <= 200));
    let first = &rows(folder.path())[0]["logprobs"][0];
    assert_eq!(first["logprob"], -0.25);
    let top = first["top"].as_array().unwrap();
    assert!(top.contains(&json!([first["token"], -0.25])), "{first}");

    let mut distill = edgec();
    distill.args(["distill", "--layers", "1", "--length", "32", "--batch", "2", "--tokens", "512"]);
    distill
        .args(["--mask-prompts", "--target", "x86_64-linux", "--teacher"])
        .arg(teacher().join("model.gguf"));
    distill.arg("--data").arg(out(folder.path())).arg("--eval-data").arg(text());
    let run = folder.path().join("run");
    let ran = Ran::of(distill.arg("--out").arg(&run));
    assert!(ran.success, "{}", ran.err);
    assert!(ran.err.contains("tokens have probabilities that came with them"), "{}", ran.err);
    assert!(run.join("student.gguf").exists());

    // Without a teacher the rows are all that there is to learn from.
    let mut distill = edgec();
    distill.args(["distill", "--length", "32", "--batch", "2", "--tokens", "8192", "--mask-prompts"]);
    // A rate at which a model this small learns whatever the order is in which the rows arrived.
    distill.args(["--lr", "3e-3", "--target", "x86_64-linux", "--student"]).arg(run.join("student"));
    distill.arg("--data").arg(out(folder.path())).arg("--eval-data").arg(text());
    let alone = folder.path().join("alone");
    let ran = Ran::of(distill.arg("--out").arg(&alone));
    assert!(ran.success, "{}", ran.err);
    assert!(ran.err.contains("none: what the data says is learned"), "{}", ran.err);
    let said = ran.err.lines().find(|line| line.contains("have probabilities that came with them")).unwrap();
    let counts: Vec<usize> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    assert!(counts[0] > 100 && counts[0] <= counts[1], "{said}");
    assert!(ran.out.contains("student before") && !ran.out.contains("KL from teacher"), "{}", ran.out);
    let losses: Vec<f64> = fs::read_to_string(alone.join("metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|row| serde_json::from_str::<Value>(row).unwrap()["loss"].as_f64().unwrap())
        .collect();
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..8]), mean(&losses[losses.len() - 8..]));
    assert!(last < first - 0.5, "{first} {last}");

    // Of the sum of all other tokens no other temperature is known.
    let mut warm = edgec();
    warm.args(["distill", "--length", "32", "--temperature", "2", "--student"]).arg(run.join("student"));
    warm.arg("--data").arg(out(folder.path())).arg("--eval-data").arg(text());
    let refused = Ran::of(warm.arg("--out").arg(folder.path().join("warm")));
    refused.assert_refused("temperature", &["temperature is 2", "probabilities that came with the text"]);
}
