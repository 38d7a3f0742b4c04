//! The text of a run: what is learned from, and what it is judged on.

use std::path::Path;

use super::stages::hash;
use super::{Data, Error, Observer};
use crate::demo;
use crate::text::corpus::{self, Corpus};
use crate::text::{ChatTemplate, HostTokenizer};

/// Windows of held-out text on which a run is judged, at most.
pub(super) const EVAL_WINDOWS: usize = 16;

/// Share of the text that is held out where no other text to judge on is given.
const HELD_OUT: f64 = 0.05;

/// Which text.
pub(super) struct Wanted<'a> {
    /// Text to learn from.
    pub data: &'a Data,
    /// Text to judge on; `None` holds out the end of `data`.
    pub eval_data: Option<&'a Path>,
    /// Learn answers only.
    pub mask_prompts: bool,
    /// Tokens of a window.
    pub length: usize,
}

/// Reads both parts; the hashes of their files are added to `hashes`.
///
/// # Errors
/// A file cannot be read or understood; there is less than a window of text.
pub(super) fn read(
    wanted: &Wanted<'_>,
    tokenizer: &HostTokenizer,
    hashes: &mut Vec<(String, String)>,
    observer: &mut dyn Observer,
) -> Result<(Corpus, Vec<u32>), Error> {
    let length = wanted.length;
    match wanted.data {
        Data::Embedded => observer.note("text", "none given: the embedded one"),
        Data::Files(paths) => {
            for path in paths {
                hashes.push(hash(path)?);
            }
        }
    }
    let corpus = corpus(wanted, tokenizer)?;
    let (train, eval) = match wanted.eval_data {
        Some(path) => {
            hashes.push(hash(path)?);
            let paths = [path.to_owned()];
            let template = ChatTemplate::of(tokenizer);
            (corpus, corpus::load(&paths, tokenizer, template.as_ref(), false)?.ids)
        }
        None if *wanted.data == Data::Embedded => (corpus, corpus::from_text(demo::HELD_OUT, tokenizer)?.ids),
        None => {
            let count = held_out(corpus.ids.len(), length);
            corpus.split(count)
        }
    };
    if eval.len() < length || train.ids.len() <= length {
        let (text, found) = (wanted.data.names(wanted.eval_data), train.ids.len() + eval.len());
        return Err(Error::TextTooShort { text, found, needed: 2 * length + 1 });
    }
    Ok((train, eval))
}

/// The text to learn from, in tokens.
///
/// # Errors
/// A file cannot be read or understood.
pub(super) fn corpus(wanted: &Wanted<'_>, tokenizer: &HostTokenizer) -> Result<Corpus, Error> {
    Ok(match wanted.data {
        Data::Embedded => corpus::from_text(demo::TEXT, tokenizer)?,
        Data::Files(paths) => {
            corpus::load(paths, tokenizer, ChatTemplate::of(tokenizer).as_ref(), wanted.mask_prompts)?
        }
    })
}

/// Tokens at the end of a text that are held out: a share of it, whole windows, at least one.
fn held_out(tokens: usize, length: usize) -> usize {
    let share = (tokens as f64 * HELD_OUT) as usize / length;
    share.clamp(1, EVAL_WINDOWS) * length
}
