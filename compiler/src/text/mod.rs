//! Text in and out: tokenizing, chat templates, and training text from files.
//!
//! There is one tokenizer, the device's; the host only gives it memory.

pub mod corpus;
pub mod hf_vocabulary;
mod pieces;
pub mod soft;
mod template;

pub use template::{ChatTemplate, Message};

use std::path::{Path, PathBuf};

use edge_runtime::format::Gguf;
use edge_runtime::tokenizer::{Encode, Tokenizer, Utf8Stream};
use self_cell::self_cell;

/// What can be wrong with a vocabulary, a template or a text.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum TextError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("tokenizer: {0}")]
    Tokenizer(edge_runtime::Error),
    #[error("{}: {message}", path.display())]
    Vocabulary { path: PathBuf, message: String },
    #[error("{}: the file is empty", path.display())]
    Empty { path: PathBuf },
    #[error("{}: not UTF-8 at byte {at}", path.display())]
    NotUtf8 { path: PathBuf, at: usize },
    #[error("{}: unknown kind of text, expected .txt or .jsonl", path.display())]
    UnknownKind { path: PathBuf },
    #[error("{}: line {line}: {message}", path.display())]
    Row { path: PathBuf, line: usize, message: String },
    #[error("{0}")]
    Logprobs(String),
    #[error("chat template: {0}")]
    Template(#[from] minijinja::Error),
    #[error("the chat template is not fixed texts between messages: {0}")]
    Pieces(String),
}

/// The bytes of a file with nothing but metadata, and the index of its vocabulary.
struct Memory {
    header: Vec<u8>,
    index: Vec<u8>,
}

self_cell!(
    struct Cell {
        owner: Memory,
        #[covariant]
        dependent: Tokenizer,
    }
);

/// The index of a file's tokenizer: that of a pack, or one that is built.
pub(crate) fn tokenizer_index(gguf: &Gguf<'_>) -> edge_runtime::Result<Vec<u8>> {
    if let Some(index) = gguf.tokenizer_index() {
        return Ok(index.to_vec());
    }
    let mut index = vec![0; Tokenizer::index_bytes(gguf)?];
    let bytes = Tokenizer::build_index(gguf, &mut index)?;
    index.truncate(bytes);
    Ok(index)
}

/// The device's tokenizer with its memory.
pub struct HostTokenizer {
    cell: Cell,
    template: Option<String>,
}

impl HostTokenizer {
    /// The tokenizer of a GGUF file (a vocabulary alone will do), a Hugging Face folder or a run's folder.
    ///
    /// # Errors
    /// The file cannot be read, or its tokenizer is not one that the runtime has.
    pub fn open(path: &Path) -> Result<Self, crate::profile::Error> {
        if path.is_dir() && !path.join("student.gguf").is_file() {
            let vocabulary = hf_vocabulary::read(path).map_err(crate::teacher::LoadError::from)?;
            let header = crate::export::gguf::vocabulary_file(vocabulary.as_ref());
            return Self::of(&crate::profile::ModelFile::from_memory(path, header));
        }
        Self::of(&crate::profile::open(path)?)
    }

    /// The tokenizer of an open file, by whose name errors call it.
    ///
    /// # Errors
    /// As [`HostTokenizer::from_gguf`].
    pub fn of(file: &crate::profile::ModelFile) -> Result<Self, crate::profile::Error> {
        let named = |error: TextError| {
            let (path, message) = (file.path().to_owned(), error.to_string());
            crate::teacher::LoadError::from(TextError::Vocabulary { path, message })
        };
        Ok(Self::from_gguf(&file.parse()?).map_err(named)?)
    }

    /// The tokenizer of a checked GGUF file.
    ///
    /// # Errors
    /// The vocabulary is missing or not one that the runtime has.
    pub fn from_gguf(gguf: &Gguf<'_>) -> Result<Self, TextError> {
        let index = tokenizer_index(gguf).map_err(TextError::Tokenizer)?;
        let mut header = gguf.header_bytes().to_vec();
        // The number of tensors: this copy has none.
        header[8..16].fill(0);
        let cell = Cell::try_new(Memory { header, index }, |memory| {
            Tokenizer::with_index(&Gguf::parse(&memory.header)?, &memory.index)
        })
        .map_err(TextError::Tokenizer)?;
        let template = gguf.get("tokenizer.chat_template").and_then(|value| value.as_str());
        Ok(Self { cell, template: template.map(str::to_owned) })
    }

    /// The device's tokenizer.
    pub fn view(&self) -> &Tokenizer<'_> {
        self.cell.borrow_dependent()
    }

    /// The chat template of the file.
    pub fn chat_template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// Ids of `text`; `bos` puts BOS first where the vocabulary asks for it, `special` lets the text name
    /// control tokens.
    ///
    /// # Errors
    /// None that a text can cause; a refusal of the tokenizer is passed on.
    pub fn encode(&self, text: &str, bos: bool, special: bool) -> Result<Vec<u32>, TextError> {
        self.encode_bytes(text.as_bytes(), bos, special)
    }

    /// [`HostTokenizer::encode`] for any bytes.
    ///
    /// # Errors
    /// As [`HostTokenizer::encode`].
    pub fn encode_bytes(&self, text: &[u8], bos: bool, special: bool) -> Result<Vec<u32>, TextError> {
        let options = Encode { add_bos: bos, parse_special: special };
        Self::grow(text, |scratch, ids| self.view().encode(text, options, scratch, ids))
    }

    /// Ids of a text that goes on behind another: no BOS, and no space that SentencePiece puts before a text.
    ///
    /// # Errors
    /// As [`HostTokenizer::encode`].
    pub fn encode_behind(&self, text: &[u8], special: bool) -> Result<Vec<u32>, TextError> {
        Self::grow(text, |scratch, ids| self.view().encode_behind(text, special, scratch, ids))
    }

    /// The ids that `encode` writes for `text`, given scratch and room for them.
    fn grow(
        text: &[u8],
        encode: impl Fn(&mut [u32], &mut [u32]) -> edge_runtime::Result<usize>,
    ) -> Result<Vec<u32>, TextError> {
        let mut ids = vec![0; Tokenizer::most_ids(text.len())];
        // Scratch serves one word at a time: few texts have one of more than this.
        let mut scratch = vec![0; Tokenizer::scratch_words(text.len().min(1 << 12))];
        loop {
            match encode(&mut scratch, &mut ids) {
                Ok(count) => {
                    ids.truncate(count);
                    return Ok(ids);
                }
                Err(error)
                    if error.code == edge_runtime::Code::BufferTooSmall
                        && error.expected as usize > scratch.len() =>
                {
                    scratch.resize(error.expected as usize, 0);
                }
                Err(error) => return Err(TextError::Tokenizer(error)),
            }
        }
    }

    /// The whole text of `ids`, without the space that encoding may have put before it; what is not UTF-8
    /// becomes U+FFFD.
    ///
    /// # Errors
    /// An id beyond the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TextError> {
        // No piece is longer than its token's text.
        let most = ids.iter().map(|&id| self.view().raw_text(id).map_or(0, <[u8]>::len)).sum();
        let mut text = vec![0; most];
        let length = self.view().decode(ids, &mut text).map_err(TextError::Tokenizer)?;
        Ok(String::from_utf8_lossy(&text[..length]).into_owned())
    }

    /// Text of tokens that come one by one, behind other text: no space is left out.
    pub fn stream(&self) -> Stream<'_> {
        Stream { tokenizer: *self.view(), stream: Utf8Stream::new() }
    }

    /// BOS, if the vocabulary asks for it before a text.
    pub fn bos_to_add(&self) -> Option<u32> {
        self.view().bos().filter(|_| self.view().adds_bos())
    }

    /// The token that ends a document.
    pub fn eos(&self) -> Option<u32> {
        self.view().eos()
    }

    /// Generation ends with this token.
    pub fn is_end_of_generation(&self, token: u32) -> bool {
        self.view().is_end_of_generation(token)
    }
}

/// Text of tokens that come one by one: only whole characters come out.
pub struct Stream<'a> {
    tokenizer: Tokenizer<'a>,
    stream: Utf8Stream,
}

impl Stream<'_> {
    /// The text that became whole with `token`.
    ///
    /// # Errors
    /// An id beyond the vocabulary.
    pub fn push(&mut self, token: u32) -> Result<String, TextError> {
        let mut piece = vec![0; self.tokenizer.raw_text(token).map_or(0, <[u8]>::len)];
        let length = self.tokenizer.piece(token, &mut piece).map_err(TextError::Tokenizer)?;
        let mut out = vec![0; Utf8Stream::most(length)];
        let written = self.stream.push(&piece[..length], &mut out).map_err(TextError::Tokenizer)?;
        out.truncate(written);
        Ok(String::from_utf8_lossy(&out).into_owned())
    }

    /// What was left of a character that never became whole.
    pub fn finish(mut self) -> String {
        let mut out = vec![0; Utf8Stream::most(0)];
        let written = self.stream.finish(&mut out).unwrap_or(0);
        out.truncate(written);
        String::from_utf8_lossy(&out).into_owned()
    }
}
