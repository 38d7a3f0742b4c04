//! A teacher that is not here: probabilities that came with the text are what the student is to say.

use sha2::{Digest, Sha256};

use super::loss::{IGNORE, SparseRow, SparseTargets, Sparsity};
use super::windows::Batch;
use crate::pack::hex;
use crate::text::soft::SoftTargets;

/// What `soft` says of the targets of a batch of windows `length` long. A target of which it says nothing is learned
/// as text.
pub(super) fn targets(soft: &SoftTargets, batch: &Batch, length: usize) -> SparseTargets {
    let places = batch.starts.iter().flat_map(|start| start + 1..=start + length);
    let row = |(place, target): (usize, &u32)| match soft.at(place) {
        Some(said) if *target != IGNORE => {
            SparseRow::bucketed(said.ids.iter().copied().zip(said.logprobs.iter().map(|x| x.exp())).collect())
        }
        _ => SparseRow::default(),
    };
    let rows = places.zip(&batch.targets).map(row).collect();
    SparseTargets { sparsity: Sparsity::TopK(Sparsity::MOST), rows }
}

/// SHA-256 of all that is said, hexadecimal.
pub(super) fn fingerprint(soft: &SoftTargets) -> String {
    let mut hash = Sha256::new();
    for (position, said) in soft.iter() {
        hash.update((position as u64).to_le_bytes());
        for (id, logprob) in said.ids.iter().zip(said.logprobs) {
            hash.update(id.to_le_bytes());
            hash.update(logprob.to_le_bytes());
        }
    }
    hex(&hash.finalize())
}
