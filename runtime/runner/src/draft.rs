//! A small model that drafts for another one: its session, and the memory that judging its drafts needs.

use edge_runtime::session::{CacheType, Sampler, Session, Speculator, same_vocabulary};

use crate::engine::{Engine, Error, ModelFile, Settings};

/// A draft model with everything set aside.
pub struct Drafter<'f> {
    file: &'f ModelFile,
    engine: Engine,
    tokens: usize,
    probabilities: Vec<f32>,
    candidates: Vec<u32>,
}

/// A draft model at work.
pub struct Drafting<'d> {
    file: &'d ModelFile,
    session: Session<'d>,
    speculator: Speculator<'d>,
}

impl<'f> Drafter<'f> {
    /// Plans a session on `file` that drafts `tokens` tokens at a time for sessions on `target` with
    /// `settings`, of which context, threads and kernels count.
    ///
    /// # Errors
    /// [`Error::Refused`] for a file whose vocabulary is another, and as [`Engine::new`].
    pub fn new(
        target: &ModelFile,
        file: &'f ModelFile,
        settings: &Settings,
        tokens: usize,
    ) -> Result<Self, Error> {
        same_vocabulary(&target.parse()?, &file.parse()?).map_err(|error| file.refused(error))?;
        let settings =
            Settings { logits_rows: 1, adapters: Vec::new(), cache: CacheType::Auto, ..settings.clone() };
        let engine = Engine::new(file, settings)?;
        let vocab = engine.plan.spec().vocab;
        let probabilities = vec![0.0; Speculator::floats(vocab, tokens)];
        Ok(Self { file, engine, tokens, probabilities, candidates: vec![0; vocab] })
    }

    /// Begins to draft.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub fn start(&mut self) -> Result<Drafting<'_>, Error> {
        let file = self.file;
        let vocab = self.candidates.len();
        let speculator = Speculator::new(vocab, self.tokens, &mut self.probabilities, &mut self.candidates);
        let speculator = speculator.map_err(|error| file.refused(error))?;
        Ok(Drafting { file, session: self.engine.session(file)?, speculator })
    }
}

impl Drafting<'_> {
    /// See [`Speculator::round`].
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub fn round(
        &mut self,
        target: &mut Session<'_>,
        sampler: &mut Sampler,
        out: &mut [u32],
    ) -> Result<usize, Error> {
        let Self { file, session, speculator } = self;
        speculator.round(target, session, sampler, out).map_err(|error| file.refused(error))
    }

    /// How many drafted tokens stayed, for people.
    pub fn report(&self) -> String {
        let (drafted, accepted) = self.speculator.counts();
        let share = 100.0 * accepted as f64 / (drafted as f64).max(1.0);
        format!("draft: {accepted} of {drafted} tokens accepted ({share:.1} %)")
    }
}
