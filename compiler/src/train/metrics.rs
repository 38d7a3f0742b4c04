//! One row for each optimizer step, for spreadsheets (`metrics.csv`), programs (`metrics.jsonl`) and
//! TensorBoard (`tensorboard/`).
//!
//! A resumed run cuts both files back to the step of its checkpoint and goes on from there, so that no
//! step has two rows. Nothing here is needed to resume.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tensorboard::Events;

/// One optimizer step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The step, counted from 1.
    pub step: u64,
    /// Tokens seen up to and with this step.
    pub tokens: u64,
    /// The loss that was minimised.
    pub loss: f64,
    /// Divergence between teacher and student, nats per token; 0 without a teacher.
    pub kl: f64,
    /// Cross-entropy of the text, nats per token.
    pub ce: f64,
    /// Learning rate.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens per second in this step.
    pub tok_s: f64,
    /// Seconds of training up to and with this step, all resumed parts together.
    pub seconds: f64,
}

const CSV_HEADER: &str = "step,tokens,loss,kl,ce,lr,grad_norm,tok_s,seconds";

/// All files, open for appending.
#[derive(Debug)]
pub struct Metrics {
    jsonl: File,
    csv: File,
    events: Events,
}

impl Metrics {
    /// Opens the files in `folder`, keeping the rows of steps `1..=keep` and dropping all others.
    ///
    /// Gives the seconds of the last kept row, 0 if there is none.
    ///
    /// # Errors
    /// The folder cannot be read or written.
    pub fn open(folder: &Path, keep: u64) -> io::Result<(Self, f64)> {
        let (jsonl, last) = open_cut(&folder.join("metrics.jsonl"), |line, _| {
            let row: Value = serde_json::from_str(line).ok()?;
            let step = row.get("step")?.as_u64()?;
            (step <= keep).then(|| row.get("seconds").and_then(Value::as_f64).unwrap_or(0.0))
        })?;
        let (mut csv, _) = open_cut(&folder.join("metrics.csv"), |line, number| {
            if number == 0 {
                return (line == CSV_HEADER).then_some(0.0);
            }
            let step: u64 = line.split(',').next()?.parse().ok()?;
            (step <= keep).then_some(0.0)
        })?;
        if csv.metadata()?.len() == 0 {
            writeln!(csv, "{CSV_HEADER}")?;
        }
        let events = Events::open(folder, keep)?;
        Ok((Self { jsonl, csv, events }, last.unwrap_or(0.0)))
    }

    /// Appends one row to each file.
    ///
    /// # Errors
    /// The disk is full.
    pub fn append(&mut self, row: &Row) -> io::Result<()> {
        let fields = serde_json::to_value(row)?;
        let scalars = fields.as_object().into_iter().flatten();
        let scalars = scalars.filter_map(|(name, value)| Some((name.as_str(), value.as_f64()?)));
        let scalars: Vec<_> = scalars.filter(|(name, _)| *name != "step").collect();
        self.events.append(row.step, &scalars)?;
        let Row { step, tokens, loss, kl, ce, lr, grad_norm, tok_s, seconds } = row;
        self.jsonl.write_all(format!("{}\n", serde_json::to_string(row)?).as_bytes())?;
        self.csv.write_all(
            format!("{step},{tokens},{loss},{kl},{ce},{lr},{grad_norm},{tok_s:.1},{seconds:.3}\n").as_bytes(),
        )
    }
}

/// The rows of the run in `folder`; none if it has not begun.
///
/// # Errors
/// The file cannot be read, or a line of it is no row.
pub fn read(folder: &Path) -> io::Result<Vec<Row>> {
    match std::fs::read_to_string(folder.join("metrics.jsonl")) {
        Ok(text) => text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Opens a file for appending after its longest run of whole lines that `keep` answers for (given the
/// line and its number), and gives the last answer.
fn open_cut<T>(path: &Path, keep: impl Fn(&str, usize) -> Option<T>) -> io::Result<(File, Option<T>)> {
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    let (mut length, mut last) = (0u64, None);
    let mut reader = BufReader::new(&file);
    let mut line = Vec::new();
    for number in 0.. {
        line.clear();
        let read = reader.read_until(b'\n', &mut line)?;
        let whole = line.strip_suffix(b"\n").and_then(|line| std::str::from_utf8(line).ok());
        let Some(answer) = whole.and_then(|line| keep(line, number)) else { break };
        last = Some(answer);
        length += read as u64;
    }
    file.set_len(length)?;
    file.seek(SeekFrom::End(0))?;
    Ok((file, last))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn row(step: u64) -> Row {
        Row {
            step,
            tokens: step * 512,
            loss: 1.5,
            kl: 1.25,
            ce: 3.5,
            lr: 6e-4,
            grad_norm: 0.75,
            tok_s: 200.0,
            seconds: step as f64 * 2.5,
        }
    }

    #[test]
    fn a_resume_leaves_no_double_row() {
        let folder = tempfile::tempdir().unwrap();
        let (mut metrics, seconds) = Metrics::open(folder.path(), 0).unwrap();
        assert_eq!(seconds, 0.0);
        (1..=9).for_each(|step| metrics.append(&row(step)).unwrap());
        // A killed process may leave half a line.
        metrics.jsonl.write_all(b"{\"step\":10,\"tok").unwrap();
        metrics.csv.write_all(b"10,5120").unwrap();
        drop(metrics);

        let (mut metrics, seconds) = Metrics::open(folder.path(), 6).unwrap();
        assert_eq!(seconds, 15.0);
        (7..=10).for_each(|step| metrics.append(&row(step)).unwrap());
        let jsonl = fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
        let steps: Vec<u64> = jsonl
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap())
            .collect();
        assert_eq!(steps, (1..=10).collect::<Vec<_>>());
        assert_eq!(read(folder.path()).unwrap()[9], row(10));
        let csv = fs::read_to_string(folder.path().join("metrics.csv")).unwrap();
        assert_eq!(csv.lines().next().unwrap(), CSV_HEADER);
        assert_eq!(csv.lines().nth(10).unwrap(), "10,5120,1.5,1.25,3.5,0.0006,0.75,200.0,25.000");
        assert_eq!(csv.lines().count(), 11);
    }

    #[test]
    fn a_foreign_file_is_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("metrics.csv"), "a,b\n1,2\n").unwrap();
        Metrics::open(folder.path(), 5).unwrap();
        assert_eq!(fs::read_to_string(folder.path().join("metrics.csv")).unwrap(), format!("{CSV_HEADER}\n"));
    }
}
