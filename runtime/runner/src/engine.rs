//! A model file and a session on it, with what they need from an operating system.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use edge_runtime::format::{DType, Gguf};
use edge_runtime::kernels::{Features, Kernels};
use edge_runtime::session::{CacheType, Limits, Plan, Session};
use edge_runtime::workers::{Pool, Single, Workers};
use memmap2::Mmap;

use crate::processors::{Processors, most_threads};

/// Why a model cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened or mapped, or threads cannot be started.
    #[error("{path}: {reason}", path = .0.display(), reason = .1)]
    Io(PathBuf, io::Error),
    /// The runtime refuses the file or what it is asked to do with it.
    #[error("{path}: {reason}", path = .0.display(), reason = .1)]
    Refused(PathBuf, Box<edge_runtime::Error>),
    /// No kernels of that name for this processor.
    #[error("no kernels `{name}` for this processor; there are: {known}")]
    NoKernels {
        /// The name that was asked for.
        name: String,
        /// The names that there are.
        known: String,
    },
}

/// A model file, mapped or laid out in memory.
pub struct ModelFile {
    path: PathBuf,
    bytes: Bytes,
}

enum Bytes {
    Mapped(Mmap),
    Memory(Cow<'static, [u8]>),
}

impl ModelFile {
    /// Maps a file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let io = |error| Error::Io(path.into(), error);
        let file = File::open(path).map_err(io)?;
        // SAFETY: the map is read-only and private to this process. Should another process truncate the
        // file meanwhile, the system ends this one by a signal; no memory of ours is ever touched.
        let bytes = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Self { path: path.into(), bytes: Bytes::Mapped(bytes) })
    }

    /// A file that is already in memory; `path` is what errors call it.
    pub fn from_memory(path: &Path, bytes: impl Into<Cow<'static, [u8]>>) -> Self {
        Self { path: path.into(), bytes: Bytes::Memory(bytes.into()) }
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Memory(bytes) => bytes,
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The checked file.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub fn parse(&self) -> Result<Gguf<'_>, Error> {
        Gguf::parse(self.bytes()).map_err(|error| self.refused(error))
    }

    /// An error of the runtime about this file.
    pub fn refused(&self, error: edge_runtime::Error) -> Error {
        Error::Refused(self.path.clone(), Box::new(error))
    }
}

impl std::fmt::Debug for ModelFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

/// A LoRA adapter, and what it is multiplied by.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// A GGUF file.
    pub file: Arc<ModelFile>,
    /// Besides what the file says.
    pub scale: f32,
}

impl Adapter {
    /// `FILE` or `FILE=SCALE` as its two parts; a file whose name has such an end is the whole.
    ///
    /// # Errors
    /// What stands behind the last `=` is not a finite number.
    pub fn argument(text: &str) -> Result<(PathBuf, f32), String> {
        match text.rsplit_once('=') {
            Some((path, scale)) if !Path::new(text).exists() => match scale.parse() {
                Ok(scale) if f32::is_finite(scale) => Ok((path.into(), scale)),
                _ => Err(format!("`{scale}` in `{text}` is not a finite number")),
            },
            _ => Ok((text.into(), 1.0)),
        }
    }

    /// The largest rank in the file; 0 if it has no pair.
    fn rank(&self) -> Result<usize, Error> {
        let file = self.file.parse()?;
        let ranks =
            file.tensors().filter(|tensor| tensor.name.ends_with(".lora_b")).map(|tensor| tensor.cols());
        Ok(ranks.max().unwrap_or(0))
    }
}

/// What a session may use.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Most tokens in the KV cache.
    pub context: usize,
    /// Prompt tokens computed together.
    pub batch: usize,
    /// Tokens whose logits exist together, where those of every token are asked for.
    pub logits_rows: usize,
    /// Threads; an engine has no more than can run at the same time.
    pub threads: usize,
    /// Name of the kernels; `None` for the fastest that this CPU can run.
    pub kernels: Option<String>,
    /// Adapters that every session begins with, in slots 0, 1, ...
    pub adapters: Vec<Adapter>,
    /// How keys and values are kept.
    pub cache: CacheType,
}

impl Settings {
    /// Room for `context` tokens; one thread for each big core, the fastest kernels.
    pub fn new(context: usize) -> Self {
        let threads = Processors::here().threads();
        let cache = CacheType::Auto;
        Self { context, batch: 64, logits_rows: 1, threads, kernels: None, adapters: Vec::new(), cache }
    }
}

/// Kernels and threads, and the memory for one session.
pub struct Engine {
    /// What was asked for, as far as it can be had.
    pub settings: Settings,
    /// What the session needs.
    pub plan: Plan,
    /// The kernels in use.
    pub kernels: &'static Kernels,
    workers: Box<dyn Workers>,
    arena: Vec<u8>,
}

impl Engine {
    /// Plans a session on `model` and sets aside what it needs.
    ///
    /// # Errors
    /// [`Error::Refused`] for the model, [`Error::NoKernels`], [`Error::Io`] where threads cannot be
    /// started.
    pub fn new(model: &ModelFile, mut settings: Settings) -> Result<Self, Error> {
        settings.threads = settings.threads.clamp(1, most_threads());
        let kernels = match &settings.kernels {
            None => Kernels::select(Features::detect()),
            Some(name) => Kernels::by_name(name).ok_or_else(|| {
                let names: Vec<_> = Kernels::available().map(Kernels::name).collect();
                Error::NoKernels { name: name.clone(), known: names.join(", ") }
            })?,
        };
        let workers: Box<dyn Workers> = match settings.threads {
            1 => Box::new(Single),
            threads => Box::new(Pool::new(threads).map_err(|error| Error::Io(model.path.clone(), error))?),
        };
        let Settings { context, batch, logits_rows, cache, .. } = settings;
        let ranks = settings.adapters.iter().map(Adapter::rank).collect::<Result<Vec<_>, _>>()?;
        let limits = Limits {
            context,
            batch,
            logits_rows,
            workers: workers.count(),
            adapters: ranks.len(),
            // A rank that is too large, or none at all, is refused with the tensor's name when it is attached.
            adapter_rank: ranks.into_iter().max().unwrap_or(0).clamp(1, Limits::MAX_ADAPTER_RANK),
            cache,
        };
        let plan = Plan::new(&model.parse()?, limits).map_err(|error| model.refused(error))?;
        let arena = vec![0; plan.arena_bytes()];
        Ok(Self { settings, plan, kernels, workers, arena })
    }

    /// Begins a session with the adapters of the settings.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub fn session<'a>(&'a mut self, model: &'a ModelFile) -> Result<Session<'a>, Error> {
        let file = model.parse()?;
        let mut session = Session::new(&file, &self.plan, self.kernels, &*self.workers, &mut self.arena)
            .map_err(|error| model.refused(error))?;
        for (slot, adapter) in self.settings.adapters.iter().enumerate() {
            let attached = session.attach(slot, &adapter.file.parse()?, adapter.scale);
            attached.map_err(|error| adapter.file.refused(error))?;
        }
        Ok(session)
    }
}

/// What a file holds, for people: `llama 134.5M Q4_1`, its tensors' bytes and its parameters.
pub(crate) fn describe(file: &Gguf<'_>) -> (String, u64, u64) {
    let (mut bytes, mut parameters) = (0u64, 0u64);
    let mut by_type = [0usize; DType::ALL.len()];
    for tensor in file.tensors() {
        bytes += tensor.data.len() as u64;
        parameters += tensor.dims.iter().product::<u64>();
        if let Some(index) = DType::ALL.iter().position(|dtype| Some(*dtype) == tensor.weights().map(|w| w.0))
        {
            by_type[index] += tensor.data.len();
        }
    }
    let most = (0..by_type.len()).max_by_key(|index| by_type[*index]).unwrap_or(0);
    let family = file.architecture().unwrap_or("unknown");
    let millions = parameters as f64 / 1e6;
    (format!("{family} {millions:.1}M {}", DType::ALL[most].name()), bytes, parameters)
}
