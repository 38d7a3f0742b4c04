//! A DoRA as a LoRA, for formats that know nothing else.
//!
//! DoRA brings every row of `W + scale B A` to its length, so what it changes has as high a rank as the matrix: one
//! factor is the change `W' - W` itself, the other the unit matrix. That is exact, and as large as what it changes.

use super::merge::{matrices, merged};
use super::{Adapter, AdapterError};
use crate::model::Model;

/// A LoRA that makes of `model`, for which `adapter` was read, the same as `adapter`; pairs without lengths stay as
/// they are.
///
/// # Errors
/// A matrix that the model has not.
pub fn as_lora(mut adapter: Adapter, model: &Model) -> Result<Adapter, AdapterError> {
    for pair in adapter.pairs.iter_mut().filter(|pair| pair.magnitude.is_some()) {
        let [rows, cols] = pair.row.file_shape(&model.spec);
        let mut change = Vec::with_capacity(rows * cols);
        for (_, weight, part) in matrices(model, pair, &adapter.path)? {
            let changed = (merged(&weight, pair, part, 1.0)? - weight)?;
            change.extend(changed.flatten_all()?.to_vec1::<f32>()?);
        }
        (pair.rank, pair.down, pair.up) =
            if cols <= rows { (cols, unit(cols), change) } else { (rows, change, unit(rows)) };
        (pair.scale, pair.magnitude) = (1.0, None);
    }
    Ok(Adapter { rs: false, ..adapter })
}

/// The unit matrix.
fn unit(size: usize) -> Vec<f32> {
    let mut matrix = vec![0.0; size * size];
    matrix.iter_mut().step_by(size + 1).for_each(|diagonal| *diagonal = 1.0);
    matrix
}
