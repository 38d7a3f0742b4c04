//! One of the two models of a loss: its final hidden states and its head, and logits of them by chunks.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{Head, IGNORE};
use crate::train::ops::{Matrix, Tiles, capped, product, product_into, with_values};

/// Tokens whose logits exist at one time.
pub(super) const CHUNK: usize = 256;

/// Final hidden states and the head of one model.
pub(super) struct Side<'a> {
    hidden: &'a [f32],
    pub head: &'a [f32],
    /// What makes the logits in place of `head`; their gradients go through that all the same.
    pub tiles: Option<&'a Tiles>,
    pub soft_cap: f32,
    pub rows: usize,
    pub width: usize,
    pub vocab: usize,
}

/// Calls `body` with a pair of tensors as a [`Side`].
pub(super) fn with_side<T>(
    hidden: &Tensor,
    head: &Head,
    body: impl FnOnce(&Side<'_>) -> Result<T>,
) -> Result<T> {
    let (shape, head_shape) = (hidden.dims2()?, head.weight.dims2()?);
    with_values(hidden, |hidden| {
        with_values(&head.weight, |weight| {
            let side = Side::new(hidden, shape, weight, head_shape)?;
            body(&Side { soft_cap: head.soft_cap, tiles: head.tiles.as_ref(), ..side })
        })
    })
}

impl<'a> Side<'a> {
    pub fn new(
        hidden: &'a [f32],
        (rows, width): (usize, usize),
        head: &'a [f32],
        (vocab, head_width): (usize, usize),
    ) -> Result<Self> {
        if width != head_width {
            bail!("loss: hidden states of {width}, a head of {head_width}");
        }
        Ok(Self { hidden, head, tiles: None, soft_cap: 0.0, rows, width, vocab })
    }

    pub fn must_match(&self, teacher: &Side<'_>) -> Result<()> {
        if (teacher.rows, teacher.vocab) != (self.rows, self.vocab) {
            bail!(
                "loss: teacher [{}, {}], student [{}, {}]",
                teacher.rows,
                teacher.vocab,
                self.rows,
                self.vocab
            );
        }
        Ok(())
    }

    /// Hidden states of the scored rows, one after the other.
    pub fn pick(&self, chunk: &[(usize, u32)]) -> Vec<f32> {
        chunk.iter().flat_map(|(row, _)| &self.hidden[row * self.width..][..self.width]).copied().collect()
    }

    /// Logits of the scored rows, `[chunk.len(), vocab]`.
    ///
    /// # Errors
    /// What a GPU answers.
    pub fn logits(&self, chunk: &[(usize, u32)], out: &mut [f32]) -> Result<()> {
        let hidden = self.pick(chunk);
        match self.tiles {
            Some(tiles) => tiles.product(out, &hidden),
            None => {
                let hidden = Matrix::new(&hidden, chunk.len(), self.width);
                product_into(out, hidden, Matrix::new(self.head, self.vocab, self.width).t(), 1.0, false)?;
            }
        }
        if self.soft_cap > 0.0 {
            out.par_chunks_mut(self.vocab).flatten().for_each(|x| *x = capped(*x, self.soft_cap));
        }
        Ok(())
    }

    /// The gradients of hidden states, `[n, width]`, from those of their logits (before these are capped). In f32: of the
    /// gradients of logits a few are large among thousands of small ones, which eight bits would round off where one of the
    /// large is in their block. What is pushed down less is always the same, so it adds up: a LoRA ends 1 % of perplexity
    /// higher.
    ///
    /// # Errors
    /// What a GPU answers.
    pub fn dhidden(&self, dlogits: &[f32]) -> Result<Vec<f32>> {
        let head = Matrix::new(self.head, self.vocab, self.width);
        product(Matrix::new(dlogits, dlogits.len() / self.vocab, self.vocab), head, 1.0)
    }
}

/// Rows with something to learn, and their targets.
pub(super) fn scored(targets: &[u32], rows: usize, vocab: usize) -> Result<Vec<(usize, u32)>> {
    if targets.len() != rows {
        bail!("loss: {} targets for {rows} rows", targets.len());
    }
    let scored: Vec<_> =
        targets.iter().copied().enumerate().filter(|(_, target)| *target != IGNORE).collect();
    match scored.iter().find(|(_, target)| *target as usize >= vocab) {
        Some((row, target)) => bail!("loss: target {target} in row {row}, the vocabulary has {vocab}"),
        None => Ok(scored),
    }
}
