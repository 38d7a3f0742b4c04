//! The choice of the next token from its logits.
//!
//! The steps are those of llama.cpp's default chain, in its order: repeat penalty, top-k, top-p, min-p,
//! temperature, draw. The same seed and the same logits give the same tokens on every machine: sums run in a
//! fixed order and the exponential is the kernels' own.

use crate::kernels::exp;
use crate::{Code, Error, Result, sort};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerConfig {
    /// Divides the logits; 0 takes the likeliest token, whatever the rest of this says but for the penalty.
    pub temperature: f32,
    /// Keeps this many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest of the likeliest tokens whose probabilities add up to this (Holtzman et al. 2020,
    /// arXiv 1904.09751), above 0; 1 keeps all.
    pub top_p: f32,
    /// Keeps the tokens that are at least this likely relative to the likeliest (Nguyen et al. 2024, arXiv
    /// 2407.01082); 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of recent tokens (Keskar et al. 2019, arXiv
    /// 1909.05858); 1 leaves them.
    pub repeat_penalty: f32,
    /// How many of the last tokens are recent; 0 is none.
    pub repeat_window: usize,
    /// Start of the random numbers.
    pub seed: u64,
}

impl Default for SamplerConfig {
    /// The likeliest token.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            repeat_window: 0,
            seed: 0,
        }
    }
}

/// Chooses tokens; remembers nothing but its random state.
#[derive(Clone, Debug)]
pub struct Sampler {
    config: SamplerConfig,
    state: u64,
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    ///
    /// # Errors
    /// [`Code::BadArgument`] with the field that lies outside its range.
    pub fn new(config: SamplerConfig) -> Result<Self> {
        let checks = [
            ("temperature", config.temperature >= 0.0 && config.temperature.is_finite(), "0 or more"),
            ("top_p", config.top_p > 0.0 && config.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", config.min_p >= 0.0 && config.min_p <= 1.0, "0 to 1"),
            ("repeat_penalty", config.repeat_penalty > 0.0 && config.repeat_penalty.is_finite(), "above 0"),
        ];
        match checks.into_iter().find(|(_, sound, _)| !sound) {
            Some((name, _, hint)) => Err(Error::new(Code::BadArgument, name).hint(hint)),
            None => Ok(Self { config, state: config.seed }),
        }
    }

    /// The next token. `logits` (`[vocab]`) are changed by the penalty; `recent` are the tokens so far;
    /// `scratch` must be as long as `logits`.
    ///
    /// # Errors
    /// [`Code::BadArgument`] if a logit is NaN or infinitely likely, or if none is possible (minus infinity
    /// is a token that cannot be chosen); [`Code::BufferTooSmall`]; [`Code::BadToken`] if a recent
    /// token is beyond the vocabulary.
    pub fn sample(&mut self, logits: &mut [f32], recent: &[u32], scratch: &mut [u32]) -> Result<u32> {
        let len = scratch.len();
        let Some(candidates) = scratch.get_mut(..logits.len()) else {
            return Err(Error::new(Code::BufferTooSmall, "scratch").found(len as u64, logits.len() as u64));
        };
        self.penalize(logits, recent, candidates)?;
        check(logits)?;
        if self.config.temperature == 0.0 {
            return Ok(argmax(logits));
        }
        let count = self.keep(logits, candidates);
        Ok(self.draw(logits, &candidates[..count]))
    }

    /// Turns logits into the probabilities with which [`Sampler::sample`] would choose; the arguments and
    /// errors are the same. Without a temperature the likeliest token has all.
    pub(super) fn distribution(
        &self,
        logits: &mut [f32],
        recent: &[u32],
        candidates: &mut [u32],
    ) -> Result<()> {
        self.penalize(logits, recent, candidates)?;
        check(logits)?;
        let best = argmax(logits) as usize;
        if self.config.temperature == 0.0 {
            logits.fill(0.0);
            logits[best] = 1.0;
            return Ok(());
        }
        let count = self.keep(logits, candidates);
        let highest = logits[best];
        let kept = &mut candidates[..count];
        sort::sort(kept, |a, b| a < b);
        let mut kept = kept.iter().peekable();
        let mut total = 0.0;
        for (token, logit) in (0u32..).zip(logits.iter_mut()) {
            let weight = match kept.next_if_eq(&&token) {
                Some(_) => exp((*logit - highest) / self.config.temperature),
                None => 0.0,
            };
            *logit = weight;
            total += f64::from(weight);
        }
        logits.iter_mut().for_each(|weight| *weight = (f64::from(*weight) / total) as f32);
        Ok(())
    }

    /// Draws a token with the given weights, which need not add up to 1.
    pub(super) fn pick(&mut self, weights: &[f32]) -> u32 {
        let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
        let target = total * unit(&mut self.state);
        let (mut sum, mut chosen) = (0.0, 0);
        for (token, weight) in (0u32..).zip(weights).filter(|(_, weight)| **weight > 0.0) {
            chosen = token;
            sum += f64::from(*weight);
            if sum > target {
                break;
            }
        }
        chosen
    }

    /// Whether `drafted`, which was drawn from the probabilities `q`, stays under the probabilities `p`; if
    /// not, the token that comes in its place. Changes `p`.
    pub(super) fn judge(&mut self, p: &mut [f32], q: &[f32], drafted: u32) -> Option<u32> {
        let at = drafted as usize;
        let (wanted, given) = (f64::from(p[at]), f64::from(q[at]));
        if unit(&mut self.state) * given < wanted {
            return None;
        }
        // It was refused, so `p` has less here than `q`, and more elsewhere.
        p.iter_mut().zip(q).for_each(|(p, q)| *p = (*p - q).max(0.0));
        Some(self.pick(p))
    }

    /// Applies the repeat penalty once to every distinct recent token.
    fn penalize(&self, logits: &mut [f32], recent: &[u32], marks: &mut [u32]) -> Result<()> {
        let recent = &recent[recent.len().saturating_sub(self.config.repeat_window)..];
        if let Some(token) = recent.iter().find(|token| **token as usize >= logits.len()) {
            return Err(Error::new(Code::BadToken, "recent").found(u64::from(*token), logits.len() as u64));
        }
        let penalty = self.config.repeat_penalty;
        if penalty == 1.0 {
            return Ok(());
        }
        recent.iter().for_each(|token| marks[*token as usize] = 0);
        for token in recent.iter().map(|token| *token as usize) {
            if core::mem::replace(&mut marks[token], 1) == 0 {
                let logit = &mut logits[token];
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
        Ok(())
    }

    /// Puts the tokens that top-k, top-p and min-p leave at the front of `candidates`; how many there are.
    fn keep(&self, logits: &[f32], candidates: &mut [u32]) -> usize {
        candidates.iter_mut().zip(0..).for_each(|(candidate, token)| *candidate = token);
        let highest = logits[argmax(logits) as usize];
        let mut count = match self.config.top_k {
            0 => candidates.len(),
            top_k => top_k.min(candidates.len()),
        };
        if count < candidates.len() {
            likeliest_first(logits, candidates, count);
        }
        if self.config.top_p < 1.0 {
            count = self.nucleus(logits, &mut candidates[..count], highest);
        }
        if self.config.min_p > 0.0 {
            let likely = |token: u32| exp(logits[token as usize] - highest) >= self.config.min_p;
            count = keep_if(&mut candidates[..count], likely);
        }
        count
    }

    /// The fewest likeliest of `candidates` whose probabilities among them add up to top-p.
    fn nucleus(&self, logits: &[f32], candidates: &mut [u32], highest: f32) -> usize {
        let weight = |token: &u32| f64::from(exp(logits[*token as usize] - highest));
        let wanted = f64::from(self.config.top_p) * candidates.iter().map(weight).sum::<f64>();
        // Nearly always a few tokens are enough, and sorting all is what would take long.
        let mut sorted = 64.min(candidates.len());
        loop {
            likeliest_first(logits, candidates, sorted);
            let mut sum = 0.0;
            for (index, token) in candidates[..sorted].iter().enumerate() {
                sum += weight(token);
                if sum >= wanted {
                    return index + 1;
                }
            }
            if sorted == candidates.len() {
                return sorted;
            }
            sorted = sorted.saturating_mul(8).min(candidates.len());
        }
    }

    /// Draws one of `candidates` with the probabilities that the temperature gives.
    fn draw(&mut self, logits: &[f32], candidates: &[u32]) -> u32 {
        let highest =
            candidates.iter().fold(f32::NEG_INFINITY, |high, token| high.max(logits[*token as usize]));
        let weight =
            |token: u32| f64::from(exp((logits[token as usize] - highest) / self.config.temperature));
        let total: f64 = candidates.iter().map(|token| weight(*token)).sum();
        let target = total * unit(&mut self.state);
        let (mut sum, mut chosen) = (0.0, candidates.first().copied().unwrap_or(0));
        for token in candidates {
            let weight = weight(*token);
            if weight > 0.0 {
                chosen = *token;
            }
            sum += weight;
            if sum > target {
                break;
            }
        }
        chosen
    }
}

/// The token with the highest logit, the first of equals; 0 if there are none. NaN is never higher.
pub fn argmax(logits: &[f32]) -> u32 {
    let higher = |a: f32, b: f32| if b > a { b } else { a };
    let (mut best, mut at) = (f32::NEG_INFINITY, 0);
    // The highest of 64 first, in lanes of which the compiler makes registers; then which of them it is.
    for (index, part) in logits.chunks(64).enumerate() {
        let mut lanes = [f32::NEG_INFINITY; 16];
        let (whole, rest) = part.as_chunks::<16>();
        for sixteen in whole {
            for (lane, logit) in lanes.iter_mut().zip(sixteen) {
                *lane = higher(*lane, *logit);
            }
        }
        let highest = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |highest, x| higher(highest, *x));
        if highest > best {
            best = highest;
            at = index * 64 + part.iter().position(|logit| *logit == highest).unwrap_or(0);
        }
    }
    at as u32
}

/// Refuses logits that are no distribution.
fn check(logits: &[f32]) -> Result<()> {
    let wrong = |logit: &f32| logit.is_nan() || *logit == f32::INFINITY;
    if let Some(at) = logits.iter().position(wrong) {
        return Err(Error::new(Code::BadArgument, "logits").found(at as u64, 0).hint("NaN or infinite"));
    }
    if logits.iter().all(|logit| *logit == f32::NEG_INFINITY) {
        return Err(Error::new(Code::BadArgument, "logits").hint("no token is possible"));
    }
    Ok(())
}

/// Puts the `count` likeliest of `candidates` first, in order; equals by their number.
fn likeliest_first(logits: &[f32], candidates: &mut [u32], count: usize) {
    sort::first(candidates, count, |a, b| {
        let (x, y) = (logits[a as usize], logits[b as usize]);
        x > y || x == y && a < b
    });
}

/// Moves the candidates that pass to the front, in their order; how many there are.
fn keep_if(candidates: &mut [u32], passes: impl Fn(u32) -> bool) -> usize {
    let mut count = 0;
    for index in 0..candidates.len() {
        if passes(candidates[index]) {
            candidates[count] = candidates[index];
            count += 1;
        }
    }
    count
}

/// The next random number, in `0..1` (SplitMix64: Steele, Lea and Flood 2014).
fn unit(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    (z >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests;
