//! A server that says what a test wants it to: one for all tests of this process, by the first part of the
//! path.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Asked {
    /// When.
    pub at: Instant,
    /// What was asked for.
    pub path: String,
    /// The header of that name.
    pub authorization: Option<String>,
    /// What was sent.
    pub body: Value,
    /// How often the same body had come before.
    pub before: usize,
}

impl Asked {
    /// The last thing that was said.
    pub fn prompt(&self) -> &str {
        let messages = self.body["messages"].as_array().and_then(|messages| messages.last());
        messages.map_or(&self.body["prompt"], |last| &last["content"]).as_str().unwrap()
    }
}

/// What is sent back.
pub enum Reply {
    /// A whole answer: status, further headers, body.
    Whole(u16, &'static str, Vec<u8>),
    /// The head of an answer that announces that many bytes, these of them, and the end of the connection.
    Broken(usize, Vec<u8>),
    /// Nothing for so long, then an answer.
    Late(Duration, Box<Reply>),
}

impl Reply {
    /// A whole answer of a document.
    pub fn json(status: u16, body: &Value) -> Self {
        Self::Whole(status, "", body.to_string().into_bytes())
    }

    /// An answer in a chat, of 5 tokens to a prompt of 10.
    pub fn chat(text: &str, reason: &str) -> Self {
        Self::json(200, &chat(text, reason))
    }
}

/// The document of an answer in a chat, of 5 tokens to a prompt of 10.
pub fn chat(text: &str, reason: &str) -> Value {
    let message = json!({"role": "assistant", "content": text});
    json!({
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    })
}

type Answer = Box<dyn Fn(&Asked) -> Reply + Send + Sync>;

struct Case {
    answer: Answer,
    asked: Mutex<Vec<Asked>>,
}

static CASES: Mutex<Option<HashMap<String, Arc<Case>>>> = Mutex::new(None);

/// The requests of one test.
pub struct Server {
    case: Arc<Case>,
    /// Root of its interface.
    pub url: String,
}

impl Server {
    /// Answers what is asked below `/<name>/v1`.
    pub fn new(name: &str, answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        static ADDRESS: OnceLock<String> = OnceLock::new();
        let address = ADDRESS.get_or_init(|| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap().to_string();
            thread::spawn(move || {
                for connection in listener.incoming() {
                    thread::spawn(move || serve(connection.unwrap()));
                }
            });
            address
        });
        let case = Arc::new(Case { answer: Box::new(answer), asked: Mutex::default() });
        CASES.lock().unwrap().get_or_insert_default().insert(name.to_owned(), Arc::clone(&case));
        Self { case, url: format!("http://{address}/{name}/v1") }
    }

    /// What was asked until now.
    pub fn asked(&self) -> Vec<Asked> {
        self.case.asked.lock().unwrap().clone()
    }
}

/// Answers requests until the other side or a broken answer ends the connection.
fn serve(stream: TcpStream) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let (path, headers, body) = read(&mut reader)?;
        let name = path.split('/').nth(1)?.to_owned();
        let case = Arc::clone(CASES.lock().unwrap().as_ref()?.get(&name)?);
        let asked = {
            let mut list = case.asked.lock().unwrap();
            let before = list.iter().filter(|asked| asked.body == body).count();
            let authorization = headers.get("authorization").cloned();
            let asked = Asked { at: Instant::now(), path, authorization, body, before };
            list.push(asked.clone());
            asked
        };
        write(&stream, (case.answer)(&asked))?;
    }
}

fn read(reader: &mut impl BufRead) -> Option<(String, HashMap<String, String>, Value)> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let path = line.split(' ').nth(1)?.to_owned();
    let mut headers = HashMap::new();
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let mut body = vec![0; headers.get("content-length")?.parse().ok()?];
    reader.read_exact(&mut body).ok()?;
    Some((path, headers, serde_json::from_slice(&body).unwrap()))
}

fn write(mut stream: &TcpStream, reply: Reply) -> Option<()> {
    let (status, headers, length, body) = match reply {
        Reply::Whole(status, headers, body) => (status, headers, body.len(), body),
        Reply::Broken(length, body) => (200, "", length, body),
        Reply::Late(delay, reply) => {
            thread::sleep(delay);
            return write(stream, *reply);
        }
    };
    let head = format!(
        "HTTP/1.1 {status} Said\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    stream.write_all(&[head.as_bytes(), &body].concat()).ok()?;
    (body.len() == length).then_some(())
}
