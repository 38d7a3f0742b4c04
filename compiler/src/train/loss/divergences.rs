//! Each divergence at one outcome: what it adds to the loss, and how it pulls at the student.
//!
//! With `g = dD/dq` and `q = softmax(z)`, `dD/dz = q (g - sum(q g))`: a divergence is told by its summand and
//! by `q g` alone, and a constant in `g` does not matter. The formulas hold for whole distributions and for
//! ones whose rarest outcomes were put together.

use super::objective::{Kind, Objective};
use crate::train::ops::exp;
use crate::train::ops::sums::ln;

/// `[summand, q g]` at an outcome that has the logarithms `lq` and `lp`.
pub(super) type At = [f32; 2];

/// Something to be done with the formula of a divergence, for which it is then compiled.
pub(super) trait With {
    /// What comes out.
    type Out;
    /// Does it with the formula `f(lq, lp)`.
    fn with(self, f: impl Fn(f32, f32) -> At) -> Self::Out;
}

/// Calls `then` with the formula of `kind`.
pub(super) fn formula<W: With>(kind: Kind, objective: &Objective, then: W) -> W::Out {
    let (beta, skew) = (objective.beta as f32, objective.skew as f32);
    match kind {
        Kind::Forward => then.with(forward),
        Kind::Reverse => then.with(reverse),
        // At its ends the middle is one of the two.
        Kind::JensenShannon if beta == 0.0 => then.with(forward),
        Kind::JensenShannon if beta == 1.0 => then.with(reverse),
        Kind::JensenShannon => then.with(|lq, lp| jensen_shannon(lq, lp, beta)),
        Kind::Skewed if skew == 0.0 => then.with(forward),
        Kind::Skewed => then.with(|lq, lp| skewed(lq, lp, skew)),
        Kind::SkewedReverse if skew == 0.0 => then.with(reverse),
        Kind::SkewedReverse => then.with(|lq, lp| skewed_reverse(lq, lp, skew)),
        Kind::TotalVariation => then.with(total_variation),
    }
}

/// `p ln(p / q)`; `g = -p / q`.
#[inline(always)]
fn forward(lq: f32, lp: f32) -> At {
    let p = exp(lp);
    [p * (lp - lq), -p]
}

/// `q ln(q / p)`; `g = ln(q / p) + 1`.
#[inline(always)]
fn reverse(lq: f32, lp: f32) -> At {
    let x = exp(lq) * (lq - lp);
    [x, x]
}

/// `beta p ln(p / m) + (1 - beta) q ln(q / m)`; `g = (1 - beta) ln(q / m)`, all else cancels.
#[inline(always)]
fn jensen_shannon(lq: f32, lp: f32, beta: f32) -> At {
    let (p, q) = (exp(lp), exp(lq));
    let lm = ln(beta * p + (1.0 - beta) * q);
    let pull = (1.0 - beta) * q * (lq - lm);
    [beta * p * (lp - lm) + pull, pull]
}

/// `p ln(p / m)`, `m = skew p + (1 - skew) q`; `g = -(1 - skew) p / m`.
#[inline(always)]
fn skewed(lq: f32, lp: f32, skew: f32) -> At {
    let (p, q) = (exp(lp), exp(lq));
    let m = skew * p + (1.0 - skew) * q;
    [p * (lp - ln(m)), -(1.0 - skew) * p * (q / m)]
}

/// `q ln(q / m)`, `m = (1 - skew) p + skew q`; `g = ln(q / m) + 1 - skew q / m`.
#[inline(always)]
fn skewed_reverse(lq: f32, lp: f32, skew: f32) -> At {
    let (p, q) = (exp(lp), exp(lq));
    let m = (1.0 - skew) * p + skew * q;
    let x = q * (lq - ln(m));
    [x, x - skew * q * (q / m)]
}

/// `|p - q| / 2`; `g = sign(q - p) / 2`.
#[inline(always)]
fn total_variation(lq: f32, lp: f32) -> At {
    let (p, q) = (exp(lp), exp(lq));
    let half = if lq > lp { 0.5 } else { -0.5 };
    [half * (q - p), half * q]
}
