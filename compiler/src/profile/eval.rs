//! Perplexity, KL divergence and agreement over windows of text.
//!
//! Perplexity is llama.cpp's: the text is cut into windows of `context` tokens that share nothing, the
//! first token of each becomes BOS where the vocabulary asks for it, and with [`Score::Half`] only the
//! predictions made from the second half of a window count. The KL divergence is that of the student's
//! distribution from the teacher's, in nats, averaged over the same positions.

use edge_run::{Engine, ModelFile, Settings};
use rayon::prelude::*;

use super::Error;

/// Which positions of a window count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// The second half, as llama.cpp's perplexity tool does.
    Half,
    /// All of them.
    All,
}

/// What to evaluate on.
#[derive(Clone, Debug)]
pub struct Config {
    /// Tokens in a window.
    pub context: usize,
    /// Most windows, from the start of the text.
    pub windows: Option<usize>,
    /// Which positions count.
    pub score: Score,
    /// BOS, if it replaces the first token of each window.
    pub bos: Option<u32>,
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Outcome {
    /// Perplexity of the model.
    pub ppl: f64,
    /// Perplexity of the teacher on the same positions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher_ppl: Option<f64>,
    /// KL(teacher || student) in nats per token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    /// Share of positions at which both prefer the same token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1_agreement: Option<f64>,
    /// Positions that counted.
    pub tokens: usize,
    /// Windows that were read.
    pub windows: usize,
}

/// Sums over positions.
#[derive(Clone, Copy, Default)]
struct Sums {
    nll: f64,
    teacher_nll: f64,
    kl: f64,
    agreed: usize,
    tokens: usize,
}

/// Evaluates `student`, beside `teacher` if there is one, on the token stream `ids`; the rest as for
/// [`evaluate_all`].
///
/// # Errors
/// As [`evaluate_all`].
pub fn evaluate(
    student: &ModelFile,
    teacher: Option<&ModelFile>,
    ids: &[u32],
    config: &Config,
    settings: &Settings,
    progress: &mut dyn FnMut(usize, usize, f64),
) -> Result<Outcome, Error> {
    let models: Vec<_> = [Some(student), teacher].into_iter().flatten().collect();
    let pair = (0, teacher.map(|_| 1));
    Ok(evaluate_all(&models, [pair], ids, config, settings, progress)?[0])
}

/// Runs each of `models` once over the token stream `ids` and evaluates `pairs` of a student and perhaps a
/// teacher, both given by their places in `models`.
///
/// Of `settings` only threads, kernels and, for the first model, adapters count. `progress` is told after every window how many are done,
/// of how many, and the perplexity of the first student so far.
///
/// # Errors
/// The text is shorter than one window, the vocabularies differ in size, or the runtime refuses a file.
pub fn evaluate_all<const N: usize>(
    models: &[&ModelFile],
    pairs: [(usize, Option<usize>); N],
    ids: &[u32],
    config: &Config,
    settings: &Settings,
    progress: &mut dyn FnMut(usize, usize, f64),
) -> Result<[Outcome; N], Error> {
    let context = config.context;
    let most = ids.len() / context;
    let windows = config.windows.map_or(most, |limit| limit.min(most));
    if windows == 0 {
        return Err(Error::TextTooShort { found: ids.len(), needed: context });
    }
    let plain = Settings { adapters: Vec::new(), ..settings.clone() };
    let settings = |index| if index == 0 { settings } else { &plain };
    let scorers = models.iter().enumerate().map(|(index, file)| Scorer::new(file, context, settings(index)));
    let mut scorers = scorers.collect::<Result<Vec<Scorer<'_>>, _>>()?;
    for (student, teacher) in pairs {
        let (student, teacher) = (scorers[student].vocab(), teacher.map(|at| scorers[at].vocab()));
        if let Some(teacher) = teacher.filter(|teacher| *teacher != student) {
            return Err(Error::VocabularySize { teacher, student });
        }
    }
    // llama.cpp scores the predictions of the tokens first + 1 .. context.
    let first = match config.score {
        Score::Half => context / 2,
        Score::All => 0,
    };
    let scored = context - 1 - first;
    let mut logits: Vec<Vec<f32>> = scorers.iter().map(|scorer| vec![0.0; scored * scorer.vocab()]).collect();
    let mut sums = [Sums::default(); N];
    for window in 0..windows {
        let mut tokens = ids[window * context..][..context].to_vec();
        let targets = tokens[first + 1..].to_vec();
        if let Some(bos) = config.bos {
            tokens[0] = bos;
        }
        for (scorer, logits) in scorers.iter_mut().zip(&mut logits) {
            scorer.score(&tokens, first, logits)?;
        }
        for (sums, (student, teacher)) in sums.iter_mut().zip(pairs) {
            let teacher = teacher.map_or(&[][..], |at| &logits[at]);
            sums.add(&logits[student], teacher, &targets, scorers[student].vocab());
        }
        progress(window + 1, windows, (sums[0].nll / sums[0].tokens as f64).exp());
    }
    Ok(std::array::from_fn(|index| sums[index].outcome(pairs[index].1.is_some(), windows)))
}

/// One model with the memory to run it.
struct Scorer<'f> {
    file: &'f ModelFile,
    engine: Engine,
}

impl<'f> Scorer<'f> {
    fn new(file: &'f ModelFile, context: usize, settings: &Settings) -> Result<Self, Error> {
        let settings = Settings { context, batch: 128, logits_rows: 32, ..settings.clone() };
        Ok(Self { file, engine: Engine::new(file, settings)? })
    }

    fn vocab(&self) -> usize {
        self.engine.plan.spec().vocab
    }

    /// Logits after the tokens `first ..` but for the last, `[tokens.len() - 1 - first, vocab]`.
    fn score(&mut self, tokens: &[u32], first: usize, out: &mut [f32]) -> Result<(), Error> {
        let vocab = self.vocab();
        let mut session = self.engine.session(self.file)?;
        let mut run = || {
            if first > 0 {
                session.feed(&tokens[..first])?;
            }
            session.feed_all(&tokens[first..tokens.len() - 1], &mut |row, logits| {
                out[row * vocab..][..vocab].copy_from_slice(logits);
            })
        };
        Ok(run().map_err(|error| self.file.refused(error))?)
    }
}

impl Sums {
    fn outcome(&self, compared: bool, windows: usize) -> Outcome {
        let count = self.tokens as f64;
        Outcome {
            ppl: (self.nll / count).exp(),
            teacher_ppl: compared.then(|| (self.teacher_nll / count).exp()),
            kl: compared.then(|| self.kl / count),
            top1_agreement: compared.then(|| self.agreed as f64 / count),
            tokens: self.tokens,
            windows,
        }
    }

    /// Adds the positions of one window; `teacher` is empty where there is none.
    fn add(&mut self, student: &[f32], teacher: &[f32], targets: &[u32], vocab: usize) {
        let rows: Vec<Self> = student
            .par_chunks(vocab)
            .zip(targets)
            .enumerate()
            .map(|(row, (logits, &target))| {
                let mut sums = Self { tokens: 1, ..Self::default() };
                let normalizer = log_sum_exp(logits);
                sums.nll = normalizer - f64::from(logits[target as usize]);
                if !teacher.is_empty() {
                    let wanted = &teacher[row * vocab..][..vocab];
                    let wanted_normalizer = log_sum_exp(wanted);
                    sums.teacher_nll = wanted_normalizer - f64::from(wanted[target as usize]);
                    sums.kl = kl(wanted, wanted_normalizer, logits, normalizer);
                    sums.agreed = usize::from(
                        edge_runtime::session::argmax(logits) == edge_runtime::session::argmax(wanted),
                    );
                }
                sums
            })
            .collect();
        // Added in order: the result does not depend on the threads.
        for row in rows {
            self.nll += row.nll;
            self.teacher_nll += row.teacher_nll;
            self.kl += row.kl;
            self.agreed += row.agreed;
            self.tokens += row.tokens;
        }
    }
}

/// `ln(sum(exp(x)))`, in f64.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from((logit - max).exp())).sum();
    f64::from(max) + sum.ln()
}

/// `sum(p * (ln p - ln q))` over one position, in nats.
fn kl(teacher: &[f32], teacher_normalizer: f64, student: &[f32], student_normalizer: f64) -> f64 {
    let shift = teacher_normalizer - student_normalizer;
    teacher
        .iter()
        .zip(student)
        .map(|(&t, &s)| {
            let p = f64::from((f64::from(t) - teacher_normalizer) as f32).exp();
            p * (f64::from(t) - f64::from(s) - shift)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_of_known_distributions() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 - 1/4 ln 2.
        let p: Vec<f32> = [0.5f32, 0.25, 0.25].iter().map(|x| x.ln() + 3.0).collect();
        let q: Vec<f32> = [0.25f32, 0.5, 0.25].iter().map(|x| x.ln() - 1.0).collect();
        let found = kl(&p, log_sum_exp(&p), &q, log_sum_exp(&q));
        assert!((found - 0.25 * 2f64.ln()).abs() < 1e-6, "{found}");
        let mut sums = Sums::default();
        sums.add(&q, &p, &[0], 3);
        assert!((sums.nll - 4f64.ln()).abs() < 1e-6);
        assert!((sums.teacher_nll - 2f64.ln()).abs() < 1e-6);
        assert_eq!((sums.agreed, sums.tokens), (0, 1));
    }
}
