//! What is minimized: which divergences, how warm, and how much of the text itself.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A way to say how far a student's distribution `q` is from its teacher's `p`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `KL(p || q)`: covers everything that the teacher says.
    Forward,
    /// `KL(q || p)`: says only what the teacher says too.
    Reverse,
    /// Generalized Jensen-Shannon divergence with `beta` (Agarwal et al., "On-policy distillation of language
    /// models", ICLR 2024): `beta KL(p || m) + (1 - beta) KL(q || m)`, `m = beta p + (1 - beta) q`. As in TRL
    /// it is `KL(p || q)` at 0 and `KL(q || p)` at 1, which between them it only nears divided by `beta` or
    /// `1 - beta`.
    JensenShannon,
    /// `KL(p || skew p + (1 - skew) q)` (Ko et al., "DistiLLM", ICML 2024).
    Skewed,
    /// `KL(q || (1 - skew) p + skew q)` (the same).
    SkewedReverse,
    /// Total variation: `sum |p - q| / 2`.
    TotalVariation,
}

impl Kind {
    /// All of them, in the order of [`Mixture`].
    pub const ALL: [Self; 6] = [
        Self::Forward,
        Self::Reverse,
        Self::JensenShannon,
        Self::Skewed,
        Self::SkewedReverse,
        Self::TotalVariation,
    ];

    /// What users call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "fkl",
            Self::Reverse => "rkl",
            Self::JensenShannon => "jsd",
            Self::Skewed => "skl",
            Self::SkewedReverse => "srkl",
            Self::TotalVariation => "tvd",
        }
    }
}

/// Largest weight of a divergence.
const MAX_WEIGHT: f64 = 1000.0;

/// A weight for each [`Kind`] of divergence; as text `rkl`, or `fkl=0.7,tvd=0.3`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mixture([f64; Kind::ALL.len()]);

impl Mixture {
    /// One divergence.
    pub fn of(kind: Kind) -> Self {
        let mut weights = [0.0; Kind::ALL.len()];
        weights[kind as usize] = 1.0;
        Self(weights)
    }

    /// The divergences that count, with their weights.
    pub fn terms(&self) -> impl Iterator<Item = (Kind, f64)> + Clone {
        Kind::ALL.into_iter().zip(self.0).filter(|(_, weight)| *weight > 0.0)
    }

    /// Sum of the weights.
    pub fn total(&self) -> f64 {
        self.0.iter().sum()
    }

    /// The weight of the forward KL divergence if there is nothing else.
    pub(super) fn forward_only(&self) -> Option<f64> {
        let [forward, others @ ..] = self.0;
        others.iter().all(|weight| *weight == 0.0).then_some(forward)
    }
}

impl Default for Mixture {
    fn default() -> Self {
        Self::of(Kind::Forward)
    }
}

impl FromStr for Mixture {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut weights = [0.0; Kind::ALL.len()];
        for part in text.split(',') {
            let (name, weight) = part.split_once('=').unwrap_or((part, "1"));
            let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.name() == name.trim()) else {
                let known = Kind::ALL.map(Kind::name).join(", ");
                return Err(format!("loss `{}`, expected one of {known}", name.trim()));
            };
            let weight = weight.trim();
            match weight.parse::<f64>() {
                Ok(value) if value > 0.0 && value <= MAX_WEIGHT => weights[kind as usize] += value,
                _ => {
                    return Err(format!("weight `{weight}` of {name}, expected above 0, up to {MAX_WEIGHT}"));
                }
            }
        }
        Ok(Self(weights))
    }
}

impl fmt::Display for Mixture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut terms = self.terms();
        if let (Some((kind, 1.0)), None) = (terms.next(), terms.next()) {
            return f.write_str(kind.name());
        }
        for (index, (kind, weight)) in self.terms().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}={weight}", kind.name())?;
        }
        Ok(())
    }
}

impl TryFrom<String> for Mixture {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Mixture> for String {
    fn from(mixture: Mixture) -> Self {
        mixture.to_string()
    }
}

/// What is minimized: `alpha * T^2 * sum(weight * divergence) + (1 - alpha) * cross-entropy`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Objective {
    /// Share of the soft loss, 0 to 1.
    pub alpha: f64,
    /// Temperature of the soft loss, above 0.
    pub temperature: f64,
    /// Divergences from the teacher, at the temperature.
    pub soft: Mixture,
    /// Compare probabilities by rank instead ([`Universal`](super::Universal)), between any vocabularies.
    pub universal: bool,
    /// The teacher's share in the middle of [`Kind::JensenShannon`], 0 to 1.
    pub beta: f64,
    /// Share of `p` in [`Kind::Skewed`] and of `q` in [`Kind::SkewedReverse`], 0 to below 1.
    pub skew: f64,
}

impl Default for Objective {
    /// The forward KL divergence alone, at temperature 1.
    fn default() -> Self {
        Self {
            alpha: 1.0,
            temperature: 1.0,
            soft: Mixture::default(),
            universal: false,
            beta: 0.5,
            skew: 0.1,
        }
    }
}

/// What users call the loss by rank.
pub const ULD: &str = "uld";

impl Objective {
    /// What users call the soft loss.
    pub fn loss(&self) -> String {
        if self.universal { ULD.to_owned() } else { self.soft.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixtures_are_text() {
        let mixture = |text: &str| text.parse::<Mixture>();
        assert_eq!(mixture("fkl").unwrap(), Mixture::default());
        assert_eq!(Mixture::default().to_string(), "fkl");
        let mixed = mixture("tvd=0.25, fkl=0.5").unwrap();
        assert_eq!(mixed.to_string(), "fkl=0.5,tvd=0.25");
        assert_eq!(mixture(&mixed.to_string()).unwrap(), mixed);
        assert_eq!((mixed.total(), mixed.forward_only()), (0.75, None));
        assert_eq!(mixture("fkl=2").unwrap().forward_only(), Some(2.0));
        for (text, said) in
            [("", "``"), ("kl", "`kl`"), ("fkl=0", "`0`"), ("rkl=NaN", "`NaN`"), ("rkl=-1", "-1")]
        {
            let error = mixture(text).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
        let objective: Objective = serde_json::from_str(r#"{"alpha":0.5,"temperature":2.0}"#).unwrap();
        assert_eq!(objective, Objective { alpha: 0.5, temperature: 2.0, ..Objective::default() });
        let text = serde_json::to_string(&Objective { soft: mixed, ..objective }).unwrap();
        assert_eq!(serde_json::from_str::<Objective>(&text).unwrap().soft, mixed);
    }
}
