//! The metrics of a run as TensorBoard reads them: event files in the folder `tensorboard`.
//!
//! An event file is a sequence of TFRecords, each the protobuf message `Event`; only the few fields that a
//! scalar needs are declared here. A run that goes on begins another file, which first tells the reader to
//! forget the steps after its checkpoint (`SessionLog.START`; TensorBoard does so after a restart). Nothing
//! here is read back and nothing here is needed to resume.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

/// The folder of event files in a run's folder.
const FOLDER: &str = "tensorboard";

/// How the names of event files begin; readers look for `tfevents` and go through files by name.
const PREFIX: &str = "events.out.tfevents.";

/// tensorflow/core/util/event.proto.
#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    /// The first event of each file.
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

/// tensorflow/core/framework/summary.proto.
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Scalar>,
}

/// `Summary.Value` with a plain number.
#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(enumeration = "Status", tag = "1")]
    status: i32,
}

/// `SessionLog.SessionStatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
enum Status {
    Unspecified = 0,
    Start = 1,
}

/// The event file of a run under way.
#[derive(Debug)]
pub struct Events {
    file: File,
}

impl Events {
    /// Begins an event file for the steps after `keep` in the run's `folder`. With `keep` 0 the run is new and
    /// the files of an older one go.
    ///
    /// # Errors
    /// The folder cannot be read or written.
    pub fn open(folder: &Path, keep: u64) -> io::Result<Self> {
        let folder = folder.join(FOLDER);
        fs::create_dir_all(&folder)?;
        // The number in the name decides the order in which files are read: it must grow.
        let mut number = now() as u64;
        for entry in fs::read_dir(&folder)? {
            let (name, path) = entry.map(|entry| (entry.file_name(), entry.path()))?;
            let Some(rest) = name.to_string_lossy().strip_prefix(PREFIX).map(str::to_owned) else { continue };
            if keep == 0 {
                fs::remove_file(path)?;
            } else if let Some(used) = rest.split('.').next().and_then(|digits| digits.parse::<u64>().ok()) {
                number = number.max(used.saturating_add(1));
            }
        }
        let mut events = Self { file: File::create(folder.join(format!("{PREFIX}{number:010}.edgec")))? };
        events.write(0, What::FileVersion("brain.Event:2".to_owned()))?;
        events.write(keep as i64 + 1, What::SessionLog(SessionLog { status: Status::Start.into() }))?;
        Ok(events)
    }

    /// Appends the `scalars` of one step.
    ///
    /// # Errors
    /// The disk is full.
    pub fn append(&mut self, step: u64, scalars: &[(&str, f64)]) -> io::Result<()> {
        let value = |&(name, value): &(&str, f64)| Scalar {
            tag: format!("train/{name}"),
            simple_value: Some(value as f32),
        };
        self.write(step as i64, What::Summary(Summary { values: scalars.iter().map(value).collect() }))
    }

    /// One TFRecord: the length as u64, its checksum, the message, its checksum, all little-endian.
    fn write(&mut self, step: i64, what: What) -> io::Result<()> {
        let message = Event { wall_time: now(), step, what: Some(what) }.encode_to_vec();
        let length = (message.len() as u64).to_le_bytes();
        let record =
            [&length[..], &masked(&length).to_le_bytes(), &message, &masked(&message).to_le_bytes()].concat();
        self.file.write_all(&record)
    }
}

/// CRC-32C, rotated and shifted so that a checksum over bytes that hold checksums stays useful
/// (tensorflow/tsl/lib/hash/crc32c.h).
fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events of all files in the order in which TensorBoard reads them; a record that was cut ends its file.
    fn read(folder: &Path) -> Vec<Event> {
        let mut paths: Vec<_> =
            fs::read_dir(folder.join(FOLDER)).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        let mut events = Vec::new();
        for path in paths {
            let bytes = fs::read(path).unwrap();
            let mut rest = &bytes[..];
            while let Some((length, after)) = rest.split_first_chunk::<8>() {
                let Some((checksum, after)) = after.split_first_chunk::<4>() else { break };
                assert_eq!(u32::from_le_bytes(*checksum), masked(length));
                let length = u64::from_le_bytes(*length) as usize;
                if after.len() < length + 4 {
                    break;
                }
                let (message, after) = after.split_at(length);
                assert_eq!(after[..4], masked(message).to_le_bytes());
                events.push(Event::decode(message).unwrap());
                rest = &after[4..];
            }
        }
        events
    }

    /// What a reader shows: steps and values, after forgetting what a restart says.
    fn shown(folder: &Path) -> Vec<(i64, Vec<(String, f32)>)> {
        let mut shown: Vec<(i64, Vec<(String, f32)>)> = Vec::new();
        for event in read(folder) {
            match event.what.unwrap() {
                What::FileVersion(version) => assert_eq!(version, "brain.Event:2"),
                What::SessionLog(log) => {
                    assert_eq!(log.status(), Status::Start);
                    shown.retain(|(step, _)| *step < event.step);
                }
                What::Summary(summary) => {
                    let values = summary.values.into_iter();
                    shown.push((event.step, values.map(|v| (v.tag, v.simple_value.unwrap())).collect()));
                }
            }
        }
        shown
    }

    #[test]
    fn a_resumed_run_goes_on_without_double_steps() {
        let folder = tempfile::tempdir().unwrap();
        let mut events = Events::open(folder.path(), 0).unwrap();
        for step in 1..=9 {
            events.append(step, &[("loss", step as f64 / 2.0), ("lr", 0.0)]).unwrap();
        }
        // A killed process may leave half a record.
        events.file.write_all(&[7, 0, 0, 0, 0, 0, 0, 0, 1, 2]).unwrap();
        let mut events = Events::open(folder.path(), 6).unwrap();
        for step in 7..=10 {
            events.append(step, &[("loss", step as f64), ("lr", 0.0)]).unwrap();
        }
        let found = shown(folder.path());
        assert_eq!(found.iter().map(|(step, _)| *step).collect::<Vec<_>>(), (1..=10).collect::<Vec<_>>());
        assert_eq!(found[5].1, [("train/loss".to_owned(), 3.0), ("train/lr".to_owned(), 0.0)]);
        assert_eq!(found[6].1[0].1, 7.0);

        // A new run in the same folder shows nothing of the old one.
        Events::open(folder.path(), 0).unwrap();
        assert_eq!(read(folder.path()).len(), 2);
    }

    /// The bytes of the record that every event file begins with, but for the time, as TensorFlow writes them.
    #[test]
    fn checksums_are_those_of_tfrecords() {
        // crc32c of 32 zeros (RFC 3720, B.4) is 0x8a9136aa.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked(&[0; 32]), 0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8));
    }
}
