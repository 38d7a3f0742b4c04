//! Room in a full context: tokens behind the first ones go, and what follows moves up.
//!
//! A key bears its position as a rotation, and rotations add up (Su et al. 2021, arXiv 2104.09864): one that moves by
//! `n` positions is turned back by the angles of `n`, whatever the scaling of the frequencies. That the first tokens
//! stay matters more than that all do (Xiao et al. 2023, arXiv 2309.17453). What later tokens took from those that
//! went is still in their keys and values: a session that was shifted is not one that never saw them.

use super::Session;
use super::cache::Part;
use crate::{Code, Error, Result};

impl Session<'_> {
    /// Forgets `discard` tokens behind the first `keep`; those after them move up, and the logits stay. Each shift
    /// rounds the keys that move once more to the cache's type.
    ///
    /// # Errors
    /// [`Code::OutOfRange`] if there are not so many tokens; [`Code::Unsupported`] for a model with windows, whose
    /// rings have lost what would move up. Then nothing has changed.
    pub fn shift(&mut self, keep: usize, discard: usize) -> Result<()> {
        let Self { spec, limits, kernels, model, angles, cache, buffers, position, .. } = self;
        if (0..spec.layers).any(|layer| spec.window_of(layer) != 0) {
            return Err(Error::new(Code::Unsupported, "attention.sliding_window")
                .hint("layers with a window cannot be shifted"));
        }
        let first = keep.saturating_add(discard);
        if first > *position {
            return Err(Error::new(Code::OutOfRange, "shift")
                .found(first as u64, *position as u64)
                .hint("tokens to keep and to discard"));
        }
        for angles in angles.iter_mut().flatten() {
            angles.fill_back(discard);
        }
        let width = spec.kv_width();
        // The outputs of a batch are as wide as three rows of keys, and nobody needs them between batches.
        let row = &mut buffers.outputs[..width];
        for (index, layer) in model.layers.iter().enumerate() {
            let Some(angles) = &angles[layer.angles] else { continue };
            let (cos, sin) = angles.of(0);
            let mut cache = cache.layer(spec, limits, index);
            for from in first..*position {
                cache.load(Part::Keys, from, row)?;
                for head in row.chunks_exact_mut(spec.head_dim) {
                    kernels.rope(&mut head[..spec.rope_dims], cos, sin, spec.family.gguf_rope);
                }
                cache.store(kernels, Part::Keys, from - discard, row, width);
                cache.copy(Part::Values, from, from - discard);
            }
        }
        self.history.copy_within(first..*position, keep);
        *position -= discard;
        self.highest = *position;
        Ok(())
    }
}
