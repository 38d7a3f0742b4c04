//! Large products on a GPU, by candle's CUDA and Metal backends: operands go there, the result comes back.
//!
//! Everything else of training stays on the CPU, parameters and optimizer too: most of its arithmetic is products.

use std::fmt::{self, Display, Formatter};
use std::mem::MaybeUninit;
use std::str::FromStr;
use std::sync::OnceLock;

use candle_core::{Device, Result, Tensor, utils};

use super::Matrix;
use crate::train::ops::threads;

/// Below this many multiplications the way there and back takes longer than the product.
const SMALL: usize = 1 << 24;
/// Values of a result that one thread takes over at a time.
const CHUNK: usize = 1 << 16;

/// The GPU of this process, once one was chosen.
static CHOSEN: OnceLock<Device> = OnceLock::new();

/// Why products cannot go where they were asked to.
#[derive(Debug, thiserror::Error)]
pub enum AcceleratorError {
    /// This program has no such backend.
    #[error("--device {asked}: this program was built without {backend} (--features {feature})")]
    NotBuilt {
        /// What was asked for.
        asked: Accelerator,
        /// The backend's name.
        backend: &'static str,
        /// What it is called when building.
        feature: &'static str,
    },
    /// The system has no such device, or refuses it.
    #[error("--device {asked}: {said}")]
    NotThere {
        /// What was asked for.
        asked: Accelerator,
        /// What the backend says.
        said: String,
    },
    /// One process has one GPU.
    #[error("--device {0}: another device was chosen before")]
    Taken(Accelerator),
}

/// Where the large matrix products of training are computed: `cpu`, or a GPU by kind and number: `cuda`, `cuda:1`,
/// `metal`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accelerator {
    /// None: by this crate's own kernels.
    #[default]
    Cpu,
    /// By cuBLAS on an NVIDIA GPU; without a number, that of the process among those of its machine.
    Cuda(Option<usize>),
    /// On an Apple GPU, likewise.
    Metal(Option<usize>),
}

impl Accelerator {
    /// Sends the products of this process there from now on; `process` is its number on its machine. Answers the name
    /// of the device that this is.
    ///
    /// # Errors
    /// This build has no such backend, the machine no such device, or another one was chosen before.
    pub fn choose(self, process: usize) -> std::result::Result<Option<String>, AcceleratorError> {
        let (backend, feature, built, number, open): (_, _, _, _, fn(usize) -> Result<Device>) = match self {
            Self::Cpu => return Ok(None),
            Self::Cuda(number) => ("CUDA", "cuda", utils::cuda_is_available(), number, Device::new_cuda),
            Self::Metal(number) => ("Metal", "metal", utils::metal_is_available(), number, Device::new_metal),
        };
        if !built {
            return Err(AcceleratorError::NotBuilt { asked: self, backend, feature });
        }
        let number = number.unwrap_or(process);
        let device = open(number).map_err(|error| {
            // Below its first line there may be a backtrace.
            let said = error.to_string().lines().next().unwrap_or_default().to_owned();
            AcceleratorError::NotThere { asked: self, said }
        })?;
        CHOSEN.set(device).map_err(|_| AcceleratorError::Taken(self))?;
        Ok(Some(format!("{feature}:{number}")))
    }
}

impl Display for Accelerator {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (kind, number) = match self {
            Self::Cpu => return f.write_str("cpu"),
            Self::Cuda(number) => ("cuda", number),
            Self::Metal(number) => ("metal", number),
        };
        f.write_str(kind)?;
        number.map_or(Ok(()), |number| write!(f, ":{number}"))
    }
}

impl FromStr for Accelerator {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (kind, number) = match text.split_once(':') {
            None => (text, Ok(None)),
            Some((kind, number)) => (kind, number.parse().map(Some)),
        };
        match (kind, number) {
            ("cpu", Ok(None)) => Ok(Self::Cpu),
            ("cuda", Ok(number)) => Ok(Self::Cuda(number)),
            ("metal", Ok(number)) => Ok(Self::Metal(number)),
            _ => Err("expected cpu, cuda or metal, or a GPU by its number: cuda:1".to_owned()),
        }
    }
}

/// The GPU that a product of so many multiplications goes to, if it goes to one.
pub(super) fn for_product(multiplications: usize) -> Option<&'static Device> {
    CHOSEN.get().filter(|_| multiplications >= SMALL)
}

/// [`super::into`] on `device`; the caller has found the sizes to fit, and something to multiply.
pub(super) fn product(
    device: &Device,
    c: &mut [MaybeUninit<f32>],
    a: Matrix<'_>,
    b: Matrix<'_>,
    alpha: f32,
    accumulate: bool,
) -> Result<()> {
    let product = upload(a, device)?.matmul(&upload(b, device)?)?;
    let product = product.flatten_all()?.to_vec1::<f32>()?;
    threads::map(c.chunks_mut(CHUNK).zip(product.chunks(CHUNK)).collect(), |(c, product)| {
        for (c, product) in c.iter_mut().zip(product) {
            // SAFETY: with `accumulate` the caller's values are all there, and without it none is read.
            let before = if accumulate { unsafe { c.assume_init() } } else { 0.0 };
            c.write(before + alpha * product);
        }
    });
    Ok(())
}

/// A matrix there, as it lies here where it has no gaps.
fn upload(matrix: Matrix<'_>, device: &Device) -> Result<Tensor> {
    if matrix.col_stride != 1 {
        return upload(matrix.t(), device)?.t();
    }
    let shape = (matrix.rows, matrix.cols);
    if matrix.row_stride == matrix.cols {
        return Tensor::from_slice(&matrix.values[..matrix.end()], shape, device);
    }
    let rows = (0..matrix.rows).map(|row| &matrix.values[row * matrix.row_stride..][..matrix.cols]);
    Tensor::from_vec(rows.flatten().copied().collect(), shape, device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        for (name, device) in [
            ("cpu", Accelerator::Cpu),
            ("cuda", Accelerator::Cuda(None)),
            ("cuda:1", Accelerator::Cuda(Some(1))),
            ("metal", Accelerator::Metal(None)),
        ] {
            assert_eq!(name.parse::<Accelerator>().unwrap(), device);
            assert_eq!(device.to_string(), name);
        }
        for name in ["", "gpu", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "CUDA"] {
            assert!(
                name.parse::<Accelerator>().unwrap_err().contains("expected cpu, cuda or metal"),
                "{name}"
            );
        }
    }

    /// Nobody trains for hours on the CPU who asked for a GPU.
    #[test]
    fn what_was_not_built_is_refused() {
        assert_eq!(Accelerator::Cpu.choose(0).unwrap(), None);
        if !utils::cuda_is_available() {
            let error = Accelerator::Cuda(None).choose(0).unwrap_err().to_string();
            assert!(error.contains("--device cuda: ") && error.contains("--features cuda"), "{error}");
        }
        if !utils::metal_is_available() {
            let error = Accelerator::Metal(Some(3)).choose(0).unwrap_err().to_string();
            assert!(error.contains("--device metal:3: ") && error.contains("--features metal"), "{error}");
        }
    }
}
