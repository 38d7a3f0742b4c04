//! Between a student and a teacher that cut the same text into other tokens.
//!
//! A window of the student's tokens is spelled out and cut anew with the teacher's tokenizer; where both cuts have a
//! boundary at the same place, both models have read the same text, and what they say of what follows can be compared.
//! Places are counted in bytes, control tokens as one. What has no counterpart (a control token that the teacher does
//! not know, bytes for which it has no token) is never compared across.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use super::error::TrainError;
use super::graph::Decoder;
use super::loss::{Group, Head, IGNORE, LONGEST_GROUP, NOT_SHARED, SparseTargets, Universal, translated};
use super::windows::Batch;
use crate::text::soft::Pieces;
use crate::text::{HostTokenizer, TextError};

/// Rows of student and teacher between two boundaries that they share: row `i` predicts token `i + 1`.
type Pair = (Range<usize>, Range<usize>);

/// What a token stands for.
enum Spelling {
    Bytes(Vec<u8>),
    /// A control token; the teacher's of the same name or role.
    Control(Option<u32>),
}

/// Knows both vocabularies.
pub struct Interpreter<'a> {
    student: Vec<Spelling>,
    student_prefix: bool,
    teacher: Pieces<'a>,
    tokenizer: &'a HostTokenizer,
    shared: Vec<u32>,
    in_common: usize,
}

/// A window in the teacher's tokens.
struct Spoken {
    ids: Vec<u32>,
    pairs: Vec<Pair>,
}

/// How much of a text both models cut alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Common {
    /// Targets of the student.
    pub targets: usize,
    /// Those that are one token on both sides.
    pub alike: usize,
    /// Those between boundaries that both have.
    pub grouped: usize,
}

impl<'a> Interpreter<'a> {
    /// Between the tokenizers of a student and of a teacher whose head has `vocab` tokens.
    ///
    /// # Errors
    /// None that vocabularies which were read can cause; a refusal of a tokenizer is passed on.
    pub fn new(
        student: &HostTokenizer,
        tokenizer: &'a HostTokenizer,
        vocab: usize,
    ) -> Result<Self, TextError> {
        let teacher = Pieces::new(tokenizer)?;
        let own = Pieces::new(student)?;
        let (view, theirs) = (student.view(), tokenizer.view());
        // Where one token is both, it ends texts.
        let roles = [(view.eos(), theirs.eos()), (view.bos(), theirs.bos())];
        let mut spellings = Vec::with_capacity(view.len());
        let mut shared = vec![NOT_SHARED; vocab];
        for (id, counterpart) in roles.iter().filter_map(|(id, theirs)| Some(((*id)?, (*theirs)?))) {
            if own.find(&teacher.spelled(counterpart)?.0).is_none()
                && let Some(slot) = shared.get_mut(counterpart as usize)
                && *slot == NOT_SHARED
            {
                *slot = id;
            }
        }
        for id in 0..view.len() as u32 {
            let (bytes, plain) = own.spelled(id)?;
            let named = teacher.find(&bytes);
            let counterpart = if plain {
                // Of several tokens with the same bytes, one stands for them.
                named.filter(|_| own.find(&bytes) == Some(id))
            } else {
                let by_name = named.filter(|&named| matches!(teacher.spelled(named), Ok((_, false))));
                let by_role = roles.iter().find(|(own, _)| *own == Some(id)).and_then(|(_, theirs)| *theirs);
                by_name.or(by_role)
            };
            spellings.push(if plain { Spelling::Bytes(bytes) } else { Spelling::Control(counterpart) });
            if let Some(slot) = counterpart.and_then(|theirs| shared.get_mut(theirs as usize))
                && *slot == NOT_SHARED
            {
                *slot = id;
            }
        }
        let in_common = shared.iter().filter(|id| **id != NOT_SHARED).count();
        let student_prefix = view.adds_space_prefix();
        Ok(Self { student: spellings, student_prefix, teacher, tokenizer, shared, in_common })
    }

    /// Tokens that both have.
    pub fn in_common(&self) -> usize {
        self.in_common
    }

    /// How much of the first `windows` windows of a text both cut alike.
    ///
    /// # Errors
    /// A refusal of the teacher's tokenizer.
    pub fn common(&self, ids: &[u32], length: usize, windows: usize) -> Result<Common, TextError> {
        let mut common = Common::default();
        for window in ids.windows(length + 1).step_by(length).take(windows) {
            common.targets += length;
            for (student, teacher) in self.speak(window, usize::MAX)?.pairs {
                common.grouped += student.len();
                common.alike += usize::from((student.len(), teacher.len()) == (1, 1));
            }
        }
        Ok(common)
    }

    /// A window of the student's tokens in at most `most` of the teacher's.
    fn speak(&self, window: &[u32], most: usize) -> Result<Spoken, TextError> {
        let mut speech = Speech::new(self, window.len());
        let mut run = Vec::new();
        // A window begins anywhere; only behind a control token does a text begin.
        let mut begins = false;
        for &id in window {
            match self.student.get(id as usize).unwrap_or(&Spelling::Control(None)) {
                Spelling::Bytes(bytes) => {
                    run.extend_from_slice(bytes);
                    // The space that SentencePiece puts before a text is none of it.
                    let phantom = begins
                        && self.student_prefix
                        && run.len() == bytes.len()
                        && run.first() == Some(&b' ');
                    if phantom {
                        run.remove(0);
                    }
                    speech.student.push(speech.place + run.len());
                }
                Spelling::Control(counterpart) => {
                    speech.say(&std::mem::take(&mut run), begins)?;
                    speech.control(*counterpart);
                    begins = true;
                }
            }
        }
        speech.say(&run, begins)?;
        Ok(speech.finish(most))
    }

    /// What the teacher says of a batch of windows `length` long: its final hidden states, the token behind each of
    /// its rows, and the rows in the batch that are between common boundaries, every target of which is scored.
    fn listen(&self, teacher: &Decoder, batch: &Batch, length: usize) -> Result<Heard, TrainError> {
        let mut spoken = Vec::with_capacity(batch.starts.len());
        for (inputs, targets) in batch.inputs.chunks(length).zip(batch.targets.chunks(length)) {
            let mut window = inputs.to_vec();
            window.extend(targets.last().filter(|target| **target != IGNORE));
            spoken.push(self.speak(&window, teacher.spec().context + 1)?);
        }
        let longest = spoken.iter().map(|spoken| spoken.ids.len()).max().unwrap_or(0).max(2) - 1;
        let mut inputs = vec![0; spoken.len() * longest];
        let mut next = vec![0; inputs.len()];
        let mut pairs = Vec::new();
        for (window, Spoken { ids, pairs: found }) in spoken.iter().enumerate() {
            let at = window * longest;
            let rows = ids.len().saturating_sub(1);
            inputs[at..at + rows].copy_from_slice(&ids[..rows]);
            next[at..at + rows].copy_from_slice(&ids[ids.len() - rows..]);
            pairs.extend(found.iter().map(|(student, teacher)| {
                let moved = |range: &Range<usize>, by| range.start + by..range.end + by;
                (moved(student, window * length), moved(teacher, at))
            }));
        }
        pairs.retain(|(rows, _)| batch.targets[rows.clone()].iter().all(|target| *target != IGNORE));
        // What follows the last token is padding that no token before it sees.
        let hidden = teacher.hidden(&inputs, spoken.len(), longest)?;
        Ok(Heard { hidden, head: teacher.head()?, next, pairs })
    }

    /// The teacher's distributions in the student's tokens, where a token is the same on both sides.
    ///
    /// # Errors
    /// See [`TrainError`].
    pub(super) fn translate(
        &self,
        teacher: &Decoder,
        batch: &Batch,
        length: usize,
        temperature: f64,
    ) -> Result<Arc<SparseTargets>, TrainError> {
        let Heard { hidden, head, pairs, .. } = self.listen(teacher, batch, length)?;
        let alike = pairs.iter().filter(|(student, teacher)| (student.len(), teacher.len()) == (1, 1));
        let rows: Vec<_> = alike.map(|(student, teacher)| (teacher.start, student.start)).collect();
        Ok(translated(&hidden, &head, &self.shared, &rows, temperature, batch.targets.len())?.into())
    }

    /// The teacher beside a batch, in groups that begin and end at the same bytes.
    ///
    /// # Errors
    /// See [`TrainError`].
    pub(super) fn group(
        &self,
        teacher: &Decoder,
        batch: &Batch,
        length: usize,
    ) -> Result<Arc<Universal>, TrainError> {
        let Heard { hidden, head, next, pairs } = self.listen(teacher, batch, length)?;
        let short = |(student, teacher): &Pair| student.len().max(teacher.len()) <= LONGEST_GROUP;
        let groups = pairs.into_iter().filter(short).map(|(student, teacher)| Group { student, teacher });
        Ok(Universal { hidden, head, next, groups: groups.collect() }.into())
    }
}

struct Heard {
    hidden: Tensor,
    head: Head,
    next: Vec<u32>,
    pairs: Vec<Pair>,
}

/// A window while it is spelled out.
struct Speech<'i> {
    interpreter: &'i Interpreter<'i>,
    /// Where what was said until now ends.
    place: usize,
    /// Where each token of the student ends.
    student: Vec<usize>,
    ids: Vec<u32>,
    /// Where each token of the teacher ends, if that is sure.
    teacher: Vec<Option<usize>>,
    /// Places that nothing is compared across.
    breaks: Vec<usize>,
}

impl<'i> Speech<'i> {
    fn new(interpreter: &'i Interpreter<'i>, tokens: usize) -> Self {
        let mut speech = Self {
            interpreter,
            place: 0,
            student: Vec::with_capacity(tokens),
            ids: Vec::with_capacity(tokens + 1),
            teacher: Vec::with_capacity(tokens + 1),
            breaks: Vec::new(),
        };
        if let Some(bos) = interpreter.tokenizer.bos_to_add() {
            speech.ids.push(bos);
            speech.teacher.push(Some(0));
        }
        speech
    }

    fn control(&mut self, counterpart: Option<u32>) {
        match counterpart {
            // The BOS of a window that begins with one is there already.
            Some(id) if self.place == 0 && self.ids == [id] => self.teacher[0] = Some(1),
            Some(id) => {
                self.ids.push(id);
                self.teacher.push(Some(self.place + 1));
            }
            None => self.breaks.push(self.place),
        }
        self.place += 1;
        self.student.push(self.place);
    }

    /// Text between control tokens, in the teacher's tokens; `begins` says that it stands behind one.
    fn say(&mut self, run: &[u8], begins: bool) -> Result<(), TextError> {
        if run.is_empty() {
            return Ok(());
        }
        let Interpreter { tokenizer, teacher, .. } = self.interpreter;
        let prefix = begins && tokenizer.view().adds_space_prefix();
        let ids = if prefix {
            tokenizer.encode_bytes(run, false, false)?
        } else {
            tokenizer.encode_behind(run, false)?
        };
        let text = if prefix { [b" ", run].concat() } else { run.to_vec() };
        let mut at = Some(0);
        for &id in &ids {
            let (bytes, plain) = teacher.spelled(id)?;
            let end = at.filter(|&at| plain && text[at..].starts_with(&bytes)).map(|at| at + bytes.len());
            if let (Some(at), None) = (at, end) {
                // A byte without a token was left out, or white space swallowed: nothing behind it is sure.
                self.breaks.push(self.place + at.saturating_sub(usize::from(prefix)));
            }
            at = end;
            self.teacher.push(end.map(|end| self.place + end - usize::from(prefix && end > 0)));
        }
        if let Some(at) = at.filter(|&at| at < text.len()) {
            self.breaks.push(self.place + at.saturating_sub(usize::from(prefix)));
        }
        self.ids.extend(ids);
        self.place += run.len();
        Ok(())
    }

    fn finish(mut self, most: usize) -> Spoken {
        self.ids.truncate(most);
        self.teacher.truncate(most);
        let mut pairs = Vec::new();
        let mut open = None;
        let (mut own, mut theirs) = (0, 0);
        while let (Some(&place), Some(&other)) = (self.student.get(own), self.teacher.get(theirs)) {
            match other.map(|other| place.cmp(&other)) {
                None | Some(std::cmp::Ordering::Greater) => theirs += 1,
                Some(std::cmp::Ordering::Less) => own += 1,
                Some(std::cmp::Ordering::Equal) => {
                    let crossed = |from: usize| {
                        let first = self.breaks.partition_point(|place| *place < self.student[from]);
                        self.breaks.get(first).is_some_and(|found| *found < place)
                    };
                    if let Some((from, beside)) = open.filter(|(from, _)| !crossed(*from)) {
                        pairs.push((from..own, beside..theirs));
                    }
                    // A token of nothing (the space before a text) belongs to what stands before.
                    while self.student.get(own + 1) == Some(&place) {
                        own += 1;
                    }
                    while self.teacher.get(theirs + 1) == Some(&Some(place)) {
                        theirs += 1;
                    }
                    open = Some((own, theirs));
                    (own, theirs) = (own + 1, theirs + 1);
                }
            }
        }
        Spoken { ids: self.ids, pairs }
    }
}

#[cfg(test)]
mod tests;
