//! The graph inside a block of a decoder: operations in the order in which they ran.
//!
//! candle starts every gradient with zeros and adds to it in a pass of its own, by threads of its own beside rayon's,
//! and holds all activations until the whole graph goes. A tape hands a gradient on as it is, adds only where several
//! meet, and lets go of an operation once the backward pass is through it. What is on it for candle are variables: each
//! is the end of its graph.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Device, Result, Shape, Tensor, TensorId, Var, bail,
};

use super::ops::{add, with_storage};

/// Operations with their arguments and results.
#[derive(Default)]
pub(super) struct Tape(Vec<Entry>);

struct Entry {
    result: TensorId,
    back: Back,
}

/// The gradients of an operation's arguments, from that of its result.
type Back = Box<dyn FnOnce(&Tensor) -> Result<Vec<(Tensor, Option<Tensor>)>> + Send + Sync>;

thread_local! {
    /// The tape that this thread writes, if it does.
    static TAPE: RefCell<Option<Tape>> = const { RefCell::new(None) };
}

/// Runs `body` with a tape for the operations of this module, instead of candle's graph.
///
/// # Errors
/// What `body` answers.
pub(super) fn record<T>(body: impl FnOnce() -> Result<T>) -> Result<(T, Tape)> {
    /// The tape outside comes back however `body` ends.
    struct Outer(Option<Tape>);
    impl Drop for Outer {
        fn drop(&mut self) {
            TAPE.set(self.0.take());
        }
    }
    let _outer = Outer(TAPE.replace(Some(Tape::default())));
    let answer = body()?;
    Ok((answer, TAPE.take().unwrap_or_default()))
}

impl Tape {
    /// Whether nothing was recorded: nothing is trained.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The gradients of all tensors that came from outside and are trained or depend on what is, from the gradient `grad`
    /// of `result`.
    ///
    /// # Errors
    /// What an operation's backward pass answers.
    pub fn backward(self, result: &Tensor, grad: &Tensor) -> Result<HashMap<TensorId, Tensor>> {
        let mut grads = HashMap::from([(result.id(), grad.contiguous()?)]);
        for Entry { result, back } in self.0.into_iter().rev() {
            let Some(grad) = grads.remove(&result) else { continue };
            for (argument, grad) in back(&grad)? {
                let Some(grad) = grad.filter(|_| argument.track_op()) else { continue };
                let grad = match grads.remove(&argument.id()) {
                    Some(before) => add(&before, &grad)?,
                    None => grad,
                };
                grads.insert(argument.id(), grad);
            }
        }
        Ok(grads)
    }
}

fn recording() -> bool {
    TAPE.with_borrow(Option::is_some)
}

/// [`Tensor::apply_op1`], on the tape if there is one.
///
/// # Errors
/// What the operation answers.
pub(super) fn apply1<C: CustomOp1 + Send + Sync + 'static>(x: &Tensor, op: C) -> Result<Tensor> {
    if !recording() {
        return x.apply_op1(op);
    }
    let made = with_storage(x, |x, layout| op.cpu_fwd(x, layout))?;
    keep(made, [x], move |[x], y, grad| Ok(vec![op.bwd(x, y, grad)?]))
}

/// [`Tensor::apply_op2`], on the tape if there is one.
///
/// # Errors
/// What the operation answers.
pub(super) fn apply2<C: CustomOp2 + Send + Sync + 'static>(a: &Tensor, b: &Tensor, op: C) -> Result<Tensor> {
    if !recording() {
        return a.apply_op2(b, op);
    }
    let made =
        with_storage(a, |a, a_layout| with_storage(b, |b, b_layout| op.cpu_fwd(a, a_layout, b, b_layout)))?;
    keep(made, [a, b], move |[a, b], y, grad| {
        let (da, db) = op.bwd(a, b, y, grad)?;
        Ok(vec![da, db])
    })
}

/// [`Tensor::apply_op3`], on the tape if there is one.
///
/// # Errors
/// What the operation answers.
pub(super) fn apply3<C: CustomOp3 + Send + Sync + 'static>([a, b, c]: [&Tensor; 3], op: C) -> Result<Tensor> {
    if !recording() {
        return a.apply_op3(b, c, op);
    }
    let made = with_storage(a, |a, a_layout| {
        with_storage(b, |b, b_layout| {
            with_storage(c, |c, c_layout| op.cpu_fwd(a, a_layout, b, b_layout, c, c_layout))
        })
    })?;
    keep(made, [a, b, c], move |[a, b, c], y, grad| {
        let (da, db, dc) = op.bwd(a, b, c, y, grad)?;
        Ok(vec![da, db, dc])
    })
}

/// What an operation has made, recorded if one of its arguments has to do with training.
fn keep<const N: usize>(
    (storage, shape): (CpuStorage, Shape),
    arguments: [&Tensor; N],
    back: impl FnOnce([&Tensor; N], &Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let CpuStorage::F32(values) = storage else { bail!("tape: an operation made {:?}", storage.dtype()) };
    if !arguments.iter().any(|argument| argument.track_op()) {
        return Tensor::from_vec(values, shape, &Device::Cpu);
    }
    let result = Var::from_vec(values, shape, &Device::Cpu)?.into_inner();
    let (arguments, y) = (arguments.map(Tensor::clone), result.clone());
    let back = Box::new(move |grad: &Tensor| {
        let grads = back(arguments.each_ref(), &y, grad)?;
        Ok(arguments.into_iter().zip(grads).collect())
    });
    let entry = Entry { result: result.id(), back };
    TAPE.with_borrow_mut(|tape| tape.get_or_insert_default().0.push(entry));
    Ok(result)
}
