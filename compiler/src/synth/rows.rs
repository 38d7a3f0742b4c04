//! The file of rows: read once, then only ever made longer, by whole lines.
//!
//! Alone among the files that this program writes it does not appear as a whole: it may take days and cost
//! money, so each row is kept at once. A line without an end is what a killed process left of a row; it is
//! taken off.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Error;
use super::answer::Answer;
use super::prompts::Said;
use super::request::Request;
use crate::text::Message;
use crate::text::soft::TokenLogprobs;

/// A row, in the form that [`crate::text::corpus`] reads.
#[derive(Serialize)]
struct Row<'a> {
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    messages: Option<Vec<Message>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    completion: Option<&'a str>,
    model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    finish_reason: Option<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    logprobs: &'a [TokenLogprobs],
}

/// What a row that is there has to say.
#[derive(Deserialize)]
struct Known {
    id: String,
    messages: Option<Vec<Message>>,
    prompt: Option<String>,
    completion: Option<String>,
}

/// The rows of a file.
#[derive(Debug)]
pub struct Rows {
    path: PathBuf,
    /// None until there is something to write.
    file: Option<File>,
    length: u64,
    ids: HashSet<String>,
    /// Hashes of prompts with their answers.
    answers: HashSet<[u8; 32]>,
}

impl Rows {
    /// Opens the file of a run. Returns the bytes of a torn row that were taken off besides.
    ///
    /// # Errors
    /// There are rows and `resume` is false; a line is no row of ours; another process writes the file; the
    /// file system answers.
    pub fn open(path: &Path, resume: bool) -> Result<(Self, u64), Error> {
        let mut rows =
            Self { path: path.into(), file: None, length: 0, ids: HashSet::new(), answers: HashSet::new() };
        match fs::metadata(path) {
            Ok(place) if !place.is_file() => Err(rows.refuse("something that is no file is in the way")),
            Ok(place) if place.len() > 0 && !resume => {
                Err(rows.refuse("there are rows in it; give another --out, or --resume to go on"))
            }
            Ok(_) => {
                rows.file = Some(rows.lock(OpenOptions::new().read(true).append(true).open(path))?);
                let torn = rows.read()?;
                Ok((rows, torn))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                let folder = folder.unwrap_or(Path::new("."));
                if folder.is_dir() { Ok((rows, 0)) } else { Err(rows.io(error)) }
            }
            Err(error) => Err(rows.io(error)),
        }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// The answer to this request is there.
    pub fn has(&self, request: &Request) -> bool {
        self.ids.contains(&request.id)
    }

    /// Writes a row, unless the same prompt has had the same answer: then false.
    ///
    /// # Errors
    /// The file system answers; then the file is as it was.
    pub fn append(&mut self, request: &Request, model: &str, answer: &Answer) -> Result<bool, Error> {
        if !self.answers.insert(hash(&request.prompt, &answer.text)) {
            return Ok(false);
        }
        let (messages, prompt, completion) = match &request.prompt {
            Said::Text(prompt) => (None, Some(prompt.as_str()), Some(answer.text.as_str())),
            Said::Messages(messages) => {
                let said = Message { role: "assistant".into(), content: answer.text.clone() };
                (Some([messages.as_slice(), &[said]].concat()), None, None)
            }
        };
        let row = Row {
            id: &request.id,
            messages,
            prompt,
            completion,
            model,
            finish_reason: answer.finish_reason.as_deref(),
            logprobs: &answer.tokens,
        };
        let mut line = serde_json::to_vec(&row).map_err(|error| self.io(error.into()))?;
        line.push(b'\n');
        if self.file.is_none() {
            let created = OpenOptions::new().append(true).create_new(true).open(&self.path);
            self.file = Some(self.lock(created)?);
        }
        if let Some(file) = &mut self.file
            && let Err(error) = file.write_all(&line)
        {
            // Whatever part of it was written; if that fails too, the next run takes it off.
            drop(file.set_len(self.length));
            return Err(self.io(error));
        }
        self.length += line.len() as u64;
        self.ids.insert(request.id.clone());
        Ok(true)
    }

    /// Waits until the rows are on the disk.
    ///
    /// # Errors
    /// The file system answers.
    pub fn sync(&self) -> Result<(), Error> {
        self.file.as_ref().map_or(Ok(()), File::sync_all).map_err(|error| self.io(error))
    }

    fn lock(&self, file: io::Result<File>) -> Result<File, Error> {
        let file = file.map_err(|error| self.io(error))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(self.refuse("another process writes to it")),
            Err(TryLockError::Error(error)) => Err(self.io(error)),
        }
    }

    /// Reads the rows that are there, and takes off what is no whole line.
    fn read(&mut self) -> Result<u64, Error> {
        let file = File::open(&self.path).map_err(|error| self.io(error))?;
        let (mut reader, mut line, mut number) = (BufReader::new(file), Vec::new(), 0);
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).map_err(|error| self.io(error))?;
            if read == 0 {
                return Ok(0);
            }
            if line.last() != Some(&b'\n') {
                let file = self.file.as_ref().map_or(Ok(()), |file| file.set_len(self.length));
                file.map_err(|error| self.io(error))?;
                return Ok(read as u64);
            }
            number += 1;
            self.length += read as u64;
            if !line.trim_ascii().is_empty() {
                self.note(&line).map_err(|message| Error::Line {
                    path: self.path.clone(),
                    line: number,
                    message,
                })?;
            }
        }
    }

    fn note(&mut self, line: &[u8]) -> Result<(), String> {
        let known: Known =
            serde_json::from_slice(line).map_err(|error| format!("not a row of `edgec synth`: {error}"))?;
        let hash = match (known.messages, known.prompt, known.completion) {
            (Some(mut messages), None, None) => {
                let last = messages.pop().filter(|last| last.role == "assistant");
                last.map(|last| hash(&Said::Messages(messages), &last.content))
            }
            (None, Some(prompt), Some(completion)) => Some(hash(&Said::Text(prompt), &completion)),
            _ => None,
        };
        self.answers.insert(hash.ok_or("not a row of `edgec synth`: no prompt with an answer")?);
        if self.ids.contains(&known.id) {
            return Err(format!("row {} is there twice", known.id));
        }
        self.ids.insert(known.id);
        Ok(())
    }

    fn refuse(&self, message: &str) -> Error {
        Error::File { path: self.path.clone(), message: message.into() }
    }

    fn io(&self, source: io::Error) -> Error {
        Error::Io { path: self.path.clone(), source }
    }
}

/// A hash of a prompt and its answer.
fn hash(prompt: &Said, answer: &str) -> [u8; 32] {
    let mut hash = Sha256::new();
    // Lengths before texts: no two lists of texts are the same bytes.
    let mut put = |text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    match prompt {
        Said::Text(text) => put(text),
        Said::Messages(messages) => messages.iter().for_each(|message| {
            put(&message.role);
            put(&message.content);
        }),
    }
    put(answer);
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::answer::Usage;
    use crate::synth::prompts::Prompt;
    use crate::synth::{Endpoint, Sampling};

    fn request(text: &str, answer: usize) -> Request {
        let prompt = Prompt { origin: String::new(), said: Said::Text(text.into()) };
        Request::new(&prompt, Endpoint::Completions, &Sampling::default(), answer)
    }

    fn answer(text: &str) -> Answer {
        Answer { text: text.into(), finish_reason: None, tokens: Vec::new(), usage: Usage::default() }
    }

    #[test]
    fn whole_rows_stay_and_torn_ones_go() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        let (mut rows, _) = Rows::open(&path, false).unwrap();
        assert!(!path.exists(), "a file without a row");
        assert!(rows.append(&request("a", 0), "m", &answer("x\ny")).unwrap());
        assert!(!rows.append(&request("a", 1), "m", &answer("x\ny")).unwrap(), "the same answer");
        assert!(rows.append(&request("b", 0), "m", &answer("x\ny")).unwrap(), "another prompt");
        let busy = Rows::open(&path, true).unwrap_err().to_string();
        assert!(busy.contains("another process writes to it"), "{busy}");
        drop(rows);
        let whole = fs::read(&path).unwrap();
        assert!(Rows::open(&path, false).unwrap_err().to_string().contains("--resume"));

        for torn in 0..whole.len() {
            fs::write(&path, &whole[..torn]).unwrap();
            let (rows, taken) = Rows::open(&path, true).unwrap();
            let lines = whole[..torn].iter().filter(|&&byte| byte == b'\n').count();
            assert_eq!(rows.len(), lines);
            assert_eq!(rows.has(&request("a", 0)), lines > 0);
            assert_eq!(fs::metadata(&path).unwrap().len() + taken, torn as u64);
        }
        fs::write(&path, &whole).unwrap();
        let (mut rows, taken) = Rows::open(&path, true).unwrap();
        assert_eq!((rows.len(), taken), (2, 0));
        assert!(!rows.append(&request("b", 1), "m", &answer("x\ny")).unwrap(), "remembered");
        drop(rows);

        let refused = |text: &[u8], part: &str| {
            fs::write(&path, text).unwrap();
            let message = Rows::open(&path, true).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
            assert_eq!(fs::read(&path).unwrap(), text, "it was changed");
        };
        refused(b"{\"text\": \"x\"}\n", "line 1: not a row of `edgec synth`: missing field `id`");
        refused(b"{\"id\": \"1\"}\n{", "line 1: not a row of `edgec synth`: no prompt");
        refused(&[&whole[..], &whole].concat(), "line 3: row ");
        assert!(Rows::open(folder.path(), true).unwrap_err().to_string().contains("no file"));
        assert!(
            Rows::open(&folder.path().join("no/rows"), true).unwrap_err().to_string().contains("No such")
        );
    }
}
