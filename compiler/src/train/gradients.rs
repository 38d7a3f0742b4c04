//! The gradients of one optimizer step, in buffers that live as long as the run.
//!
//! candle starts the gradient of each variable with zeros and adds to it on one thread: for a matrix that is two
//! allocations and three passes over memory beside the product that makes it. While [`Gradients::add`] runs the
//! backward pass, operations that know of it write a variable's gradient straight into its buffer
//! ([`into_buffer`]) and tell candle that there is none; what the others give is added afterwards. The buffers
//! belong to the thread that runs the backward pass, as long as it runs.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{Result, Tensor, TensorId, bail};

use super::error::TrainError;
use super::ops::{threads, widest, with_values};
use super::optimizer::{CHUNK, Parameter};

/// One sum of gradients for each parameter.
#[derive(Debug)]
pub struct Gradients {
    buffers: Buffers,
}

#[derive(Debug, Default)]
struct Buffers {
    index: HashMap<TensorId, usize>,
    list: Vec<Buffer>,
}

#[derive(Debug, Default)]
struct Buffer {
    /// Laid out as the parameter; worth nothing before it is reached.
    sum: Vec<f32>,
    reached: bool,
}

thread_local! {
    /// The buffers of the backward pass that runs on this thread, if one does.
    static UNDER_WAY: RefCell<Buffers> = RefCell::default();
}

impl Gradients {
    /// No gradient yet for each of `parameters`.
    pub fn new(parameters: &[Parameter]) -> Self {
        let index = parameters.iter().enumerate().map(|(index, p)| (p.var.id(), index)).collect();
        let buffer = |p: &Parameter| Buffer { sum: vec![0.0; p.var.elem_count()], reached: false };
        Self { buffers: Buffers { index, list: parameters.iter().map(buffer).collect() } }
    }

    /// Begins another step.
    pub fn clear(&mut self) {
        self.buffers.list.iter_mut().for_each(|buffer| buffer.reached = false);
    }

    /// Adds the gradients of `loss`, a scalar.
    ///
    /// # Errors
    /// What an operation's backward pass answers.
    pub fn add(&mut self, loss: &Tensor) -> Result<()> {
        let _lent = Lent::new(&mut self.buffers);
        let store = loss.backward()?;
        absorb(store.get_ids().filter_map(|id| Some((*id, store.get_id(*id)?.clone()))))
    }

    /// The sums by parameter.
    ///
    /// # Errors
    /// [`TrainError::NoGradient`] names a parameter that no loss has reached: an operation without a backward
    /// pass would otherwise leave it untrained in silence.
    pub fn sums<'a>(&'a self, parameters: &[Parameter]) -> std::result::Result<Vec<&'a [f32]>, TrainError> {
        let reached = |(parameter, buffer): (&Parameter, &'a Buffer)| {
            let missing = || TrainError::NoGradient { name: parameter.name.clone() };
            buffer.reached.then_some(buffer.sum.as_slice()).ok_or_else(missing)
        };
        parameters.iter().zip(&self.buffers.list).map(reached).collect()
    }

    /// The sums by parameter, to be added to those of other processes.
    pub fn sums_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.buffers.list.iter_mut().map(|buffer| buffer.sum.as_mut_slice())
    }
}

/// Euclidean norm over all gradients together.
///
/// Sums in f64 over fixed chunks in a fixed order: the same on any number of threads.
pub fn norm(gradients: &[&[f32]]) -> f64 {
    let chunks = gradients.iter().flat_map(|gradient| gradient.chunks(CHUNK)).collect();
    let sums = threads::map(chunks, |chunk| widest!(sum_of_squares(chunk)));
    sums.iter().sum::<f64>().sqrt()
}

/// Sum of squares in eight independent f64 lanes, which the compiler turns into vector code.
#[inline(always)]
fn sum_of_squares(values: &[f32]) -> f64 {
    let (blocks, tail) = values.as_chunks::<8>();
    let mut lanes = [0f64; 8];
    for block in blocks {
        for (lane, &value) in lanes.iter_mut().zip(block) {
            *lane += f64::from(value) * f64::from(value);
        }
    }
    lanes.iter().sum::<f64>() + tail.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>()
}

/// Calls `write` with the buffer for the gradient of `variable`, if a backward pass that has one runs on this
/// thread, and answers whether it does. `write` is told whether to add to the buffer's values or to replace them.
pub(crate) fn into_buffer(
    variable: &Tensor,
    write: impl FnOnce(&mut [f32], bool) -> Result<()>,
) -> Result<bool> {
    into_buffer_of(variable.id(), write)
}

fn into_buffer_of(id: TensorId, write: impl FnOnce(&mut [f32], bool) -> Result<()>) -> Result<bool> {
    // Taken out, not borrowed: whatever `write` waits for may run something else on this thread.
    let taken = UNDER_WAY.with_borrow_mut(|buffers| {
        let index = *buffers.index.get(&id)?;
        Some((index, std::mem::take(&mut buffers.list[index])))
    });
    let Some((index, mut buffer)) = taken else { return Ok(false) };
    let written = write(&mut buffer.sum, buffer.reached);
    buffer.reached = true;
    UNDER_WAY.with_borrow_mut(|buffers| buffers.list[index] = buffer);
    written.map(|()| true)
}

/// Whether a backward pass into buffers runs on this thread.
pub(crate) fn under_way() -> bool {
    UNDER_WAY.with_borrow(|buffers| !buffers.list.is_empty())
}

/// Adds gradients that a backward pass has left to the buffers under way, those that have one.
pub(crate) fn absorb(gradients: impl IntoIterator<Item = (TensorId, Tensor)>) -> Result<()> {
    for (id, gradient) in gradients {
        into_buffer_of(id, |sum, add| {
            with_values(&gradient.contiguous()?, |values| {
                if values.len() != sum.len() {
                    bail!("a gradient of {} values for a parameter of {}", values.len(), sum.len());
                }
                threads::map(sum.chunks_mut(CHUNK).zip(values.chunks(CHUNK)).collect(), |(sum, values)| {
                    if add {
                        widest!(sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value));
                    } else {
                        sum.copy_from_slice(values);
                    }
                });
                Ok(())
            })
        })?;
    }
    Ok(())
}

/// Buffers that are lent to the backward pass on this thread, and come back however it ends.
struct Lent<'a>(&'a mut Buffers);

impl<'a> Lent<'a> {
    fn new(buffers: &'a mut Buffers) -> Self {
        UNDER_WAY.set(std::mem::take(buffers));
        Self(buffers)
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        *self.0 = UNDER_WAY.take();
    }
}

#[cfg(test)]
mod tests {
    use super::super::ops::{linear, rows};
    use super::*;
    use candle_core::{Device, Var};

    fn parameter(name: &str, values: &[f32], shape: (usize, usize)) -> Parameter {
        let var = Var::from_slice(values, shape, &Device::Cpu).unwrap();
        Parameter { name: name.into(), var, decay: true }
    }

    #[test]
    fn norm_and_accumulation() {
        let parameters = [parameter("p", &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0], (1, 9))];
        let mut gradients = Gradients::new(&parameters);
        for _ in 0..2 {
            gradients.clear();
            for factor in [1.0, 2.0] {
                let loss = (parameters[0].var.sqr().unwrap().sum_all().unwrap() * factor).unwrap();
                gradients.add(&loss).unwrap();
            }
            // d/dp 3 p^2 = 6 p; sum of squares of 1..=9 is 285.
            let found = norm(&gradients.sums(&parameters).unwrap());
            assert!((found - 6.0 * 285f64.sqrt()).abs() < 1e-4);
        }
    }

    /// A table that is used as embeddings, twice as a matrix, and by an operation of candle's.
    #[test]
    fn every_way_into_a_buffer_counts() {
        let values: Vec<f32> = (0..12).map(|i| (i as f32 * 0.7).sin()).collect();
        let parameters = [parameter("table", &values, (4, 3))];
        let table = parameters[0].var.as_tensor();
        let loss = || {
            let x = rows(table, &[2, 0, 2]).unwrap();
            let y = linear(&linear(&x, table).unwrap(), &table.t().unwrap().contiguous().unwrap()).unwrap();
            (linear(&y, table).unwrap().sqr().unwrap().sum_all().unwrap() + table.sum_all().unwrap()).unwrap()
        };
        let expected = loss().backward().unwrap().remove(table).unwrap();
        let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut gradients = Gradients::new(&parameters);
        for times in [1.0, 2.0] {
            gradients.add(&loss()).unwrap();
            for (found, expected) in gradients.sums(&parameters).unwrap()[0].iter().zip(&expected) {
                assert!(
                    (found - times * expected).abs() < 1e-4 * expected.abs().max(1.0),
                    "{found} {expected}"
                );
            }
        }
        // Outside of `add` nothing goes into buffers.
        assert!(loss().backward().unwrap().remove(table).is_some());
    }

    #[test]
    fn an_unreached_parameter_is_named() {
        let parameters = [parameter("p", &[1.0], (1, 1)), parameter("lost", &[1.0], (1, 1))];
        let mut gradients = Gradients::new(&parameters);
        gradients.add(&parameters[0].var.sum_all().unwrap()).unwrap();
        let error = gradients.sums(&parameters).unwrap_err();
        assert!(error.to_string().contains("`lost`"), "{error}");
    }
}
