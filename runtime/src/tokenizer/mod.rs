//! Text to tokens and back, straight from the vocabulary of a GGUF file.
//!
//! Two tokenizer models, with llama.cpp's ids: byte-level BPE as GPT-2, Llama 3, Qwen2 and SmolLM2 have it
//! (`byte_level`), and SentencePiece's BPE as Llama 2, Mistral, Phi-3 and Gemma have it (`sentence_piece`).
//! Vocabulary, special tokens and merging are the same for both. [`Tokenizer`] is a view over the file's
//! bytes and an [index](Tokenizer::build_index) that a pack has in it and that is built in the caller's memory for any
//! other file; nothing here allocates, recurses or normalizes text. Another
//! tokenizer model or pre-tokenizer is refused by name.
//!
//! Two things differ from llama.cpp, both for texts that are not plain UTF-8: bytes of malformed UTF-8
//! keep their own tokens (llama.cpp makes them U+FFFD), so that decoding gives the text back; and of
//! overlapping special tokens the leftmost wins. A byte for which the vocabulary has no token is left out,
//! as in llama.cpp: SmolLM2 has none for some control characters ([`Tokenizer::byte`] tells). SentencePiece
//! spells spaces as U+2581, so that this character, where a text has it, comes back as a space; and Phi-3's special tokens swallow the white
//! space behind them.

mod byte_level;
mod bytes;
mod index;
mod keys;
mod merge;
mod pretokenize;
mod sentence_piece;
mod special;
mod stream;
mod unicode;
mod unicode_table;
mod vocab;

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod sentence_piece_tests;
#[cfg(test)]
mod tests;

use crate::format::Gguf;
use crate::{Code, Error, Result};
use byte_level::ByteLevel;
use index::Header;
use keys::Keys;
use sentence_piece::SentencePiece;
pub use stream::Utf8Stream;
use vocab::{Kind, NONE, Vocab};

/// A file's tokenizer over its vocabulary.
#[derive(Clone, Copy, Debug)]
pub struct Tokenizer<'a> {
    vocab: Vocab<'a>,
    model: Model<'a>,
    bos: Option<u32>,
    eos: Option<u32>,
    ends: [Option<u32>; 5],
    add_bos: bool,
}

/// What turns text without special tokens into tokens.
#[derive(Clone, Copy, Debug)]
enum Model<'a> {
    ByteLevel(ByteLevel<'a>),
    SentencePiece(SentencePiece<'a>),
}

/// How to encode a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Encode {
    /// Begin with the BOS token if the file asks for it ([`Tokenizer::adds_bos`]).
    pub add_bos: bool,
    /// Let the text name control tokens, such as `<|im_end|>`. For templates, never for a user's text.
    /// User-defined tokens are matched in either case.
    pub parse_special: bool,
}

impl<'a> Tokenizer<'a> {
    /// Bytes of memory that [`Self::new`] needs for this file: for byte-level BPE about 37 for each token with
    /// its merge, for SentencePiece 21 for each token, and none for a pack.
    ///
    /// # Errors
    /// As [`Self::new`], as far as the metadata alone can tell.
    pub fn index_bytes(file: &Gguf<'_>) -> Result<usize> {
        match file.tokenizer_index() {
            Some(_) => Ok(0),
            None => Ok(4 * index::most_words(&Keys::read(file)?)?),
        }
    }

    /// The tokenizer of `file`, with the index of a pack, or with one that is built in `memory` in time linear in
    /// the vocabulary.
    ///
    /// # Errors
    /// Those of [`Self::build_index`] and [`Self::with_index`].
    pub fn new(file: &Gguf<'a>, memory: &'a mut [u8]) -> Result<Self> {
        let index = match file.tokenizer_index() {
            Some(index) => index,
            None => {
                let bytes = Self::build_index(file, memory)?;
                &memory[..bytes]
            }
        };
        Self::with_index(file, index)
    }

    /// Builds the index of the vocabulary of `file` in `memory` and returns the bytes that it has.
    ///
    /// # Errors
    /// - [`Code::Unsupported`]: a tokenizer model or pre-tokenizer that is not there, with those that are.
    /// - [`Code::MissingKey`], [`Code::WrongKeyType`], [`Code::BadLength`], [`Code::OutOfRange`]: a
    ///   metadata key, by name.
    /// - [`Code::BadVocabulary`]: two tokens of the same text, a merge of what are no tokens, a score that is
    ///   not a number, a special token of more than 1024 bytes, or texts made to collide, with the number of
    ///   the entry; no token for a space.
    /// - [`Code::BufferTooSmall`]: `memory` is smaller than [`Self::index_bytes`].
    pub fn build_index(file: &Gguf<'_>, memory: &mut [u8]) -> Result<usize> {
        Ok(4 * index::build(&Keys::read(file)?, memory.as_chunks_mut().0)?)
    }

    /// The tokenizer of `file` with an index that was built before. Whatever it holds, nothing panics: one that lies
    /// gives other tokens, such as are not there, or more than [`Self::most_ids`], which encoding refuses.
    ///
    /// # Errors
    /// As for [`Self::build_index`] what the metadata tells, and [`Code::BadLength`] for an index that is not as long
    /// as it says, or of another number of tokens.
    pub fn with_index(file: &Gguf<'a>, index: &'a [u8]) -> Result<Self> {
        let keys = Keys::read(file)?;
        let (vocab, rest) = Vocab::open(&keys, index)?;
        let (model, usual) = match keys.model {
            keys::Model::ByteLevel { pre, .. } => {
                (ByteLevel::open(pre, rest).map(Model::ByteLevel), pre.add_bos)
            }
            keys::Model::SentencePiece { scores, unknown, add_space_prefix, phi3 } => {
                let tokens = vocab.len();
                let model = SentencePiece::open(scores, unknown, add_space_prefix, phi3, tokens, rest);
                (model.map(Model::SentencePiece), true)
            }
        };
        let model =
            model.ok_or_else(|| index::damaged(rest.len(), 0).hint("words of the tokenizer model"))?;
        let add_bos = keys.add_bos.unwrap_or(usual);
        if add_bos && keys.bos.is_none() {
            return Err(keys::missing("bos_token_id"));
        }
        Ok(Self { vocab, model, bos: keys.bos, eos: keys.eos, ends: keys.ends, add_bos })
    }

    /// Bytes of the longest text of a token of `file`: no [piece](Self::piece) has more.
    ///
    /// # Errors
    /// As [`Self::with_index`].
    pub fn longest_text(file: &Gguf<'_>) -> Result<usize> {
        match file.tokenizer_index() {
            Some(index) => Ok(Header::open(index)?.0.longest),
            None => Ok(Keys::read(file)?.longest_text()),
        }
    }

    /// Words of scratch with which encoding a text of `bytes` bytes never fails.
    ///
    /// Scratch is used by one word at a time, and only by those of more than 32 bytes or characters: a
    /// caller who knows its texts may well give less. Byte-level BPE has the words of its pre-tokenizer;
    /// for SentencePiece a word ends at a space.
    pub const fn scratch_words(bytes: usize) -> usize {
        // SentencePiece may put a space before the text.
        merge::scratch_words(bytes.saturating_add(1))
    }

    /// Ids that a text of `bytes` bytes never exceeds: BOS, one for each byte, and with SentencePiece one for
    /// the space before the text and behind each special token. Byte-level BPE needs `bytes` + 1 at most.
    pub const fn most_ids(bytes: usize) -> usize {
        bytes.saturating_mul(2).saturating_add(1)
    }

    /// Encodes `text`, any bytes, into `out` and returns the number of ids, at most [`Self::most_ids`]. EOS
    /// is never added. Takes O(n log n) for a text of n bytes.
    ///
    /// # Errors
    /// [`Code::BufferTooSmall`] with the words needed, of `scratch` or of `out`.
    pub fn encode(
        &self,
        text: &[u8],
        options: Encode,
        scratch: &mut [u32],
        out: &mut [u32],
    ) -> Result<usize> {
        let mut ids = Ids { out, count: 0 };
        if options.add_bos
            && self.add_bos
            && let Some(bos) = self.bos
        {
            ids.push(bos);
        }
        self.encode_fragments(text, options.parse_special, true, scratch, &mut ids)?;
        ids.finish()
    }

    /// [`Self::encode`] for a text that goes on behind another: no BOS, and no space before it. What stands behind a
    /// special token is encoded as ever.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_behind(
        &self,
        text: &[u8],
        parse_special: bool,
        scratch: &mut [u32],
        out: &mut [u32],
    ) -> Result<usize> {
        let mut ids = Ids { out, count: 0 };
        self.encode_fragments(text, parse_special, false, scratch, &mut ids)?;
        ids.finish()
    }

    /// Appends the tokens of `text`; `begins` says that nothing but BOS stands before it.
    fn encode_fragments(
        &self,
        text: &[u8],
        parse_special: bool,
        mut begins: bool,
        scratch: &mut [u32],
        ids: &mut Ids<'_>,
    ) -> Result<()> {
        let specials = special::Finder::new(&self.vocab, parse_special);
        let mut rest = text;
        while let Some(found) = specials.find(rest) {
            self.encode_plain(&rest[..found.start], begins, scratch, ids)?;
            begins = true;
            ids.push(found.token);
            rest = &rest[found.start + found.len..];
            if let Model::SentencePiece(model) = &self.model {
                rest = model.behind_special(self.vocab.text(found.token), rest);
            }
        }
        self.encode_plain(rest, begins, scratch, ids)
    }

    fn encode_plain(&self, text: &[u8], begins: bool, scratch: &mut [u32], ids: &mut Ids<'_>) -> Result<()> {
        match &self.model {
            Model::ByteLevel(model) => model.encode(&self.vocab, text, scratch, ids),
            Model::SentencePiece(model) => model.encode(&self.vocab, text, begins, scratch, ids),
        }
    }

    /// Writes the text of `ids` and returns how many bytes it has; what [`Self::encode`] made of a text gives
    /// that text. Control tokens stand for nothing.
    ///
    /// Where encoding puts a space before a text, the first space is left out here. So does llama.cpp, except
    /// after a BOS that it leaves out itself. A text that goes on after another is written token by token,
    /// with [`Self::piece`].
    ///
    /// # Errors
    /// [`Code::BadToken`] beyond the vocabulary, [`Code::BufferTooSmall`] with the bytes needed.
    pub fn decode(&self, ids: &[u32], out: &mut [u8]) -> Result<usize> {
        let mut text = Bytes { out, len: 0, drop_space: false };
        let begun = ids.first().is_some_and(|&first| self.bos == Some(first));
        for (i, &token) in ids.iter().enumerate() {
            text.drop_space = i == usize::from(begun) && self.adds_space_prefix();
            self.write_piece(token, &mut text)?;
        }
        text.finish("text")
    }

    /// Writes the bytes that a token stands for and returns how many they are: at most as many as
    /// [`Self::raw_text`] has. They may begin or end within a character, see [`Utf8Stream`].
    ///
    /// Control, unknown and unused tokens stand for nothing; their names are in [`Self::raw_text`].
    ///
    /// # Errors
    /// [`Code::BadToken`] beyond the vocabulary, [`Code::BufferTooSmall`] with the bytes needed.
    pub fn piece(&self, token: u32, out: &mut [u8]) -> Result<usize> {
        let mut piece = Bytes { out, len: 0, drop_space: false };
        self.write_piece(token, &mut piece)?;
        piece.finish("piece")
    }

    fn write_piece(&self, token: u32, out: &mut Bytes<'_>) -> Result<()> {
        let Some(text) = self.raw_text(token) else {
            return Err(Error::new(Code::BadToken, "").found(u64::from(token), self.len() as u64));
        };
        match self.vocab.kind(token) {
            Kind::Normal => match self.model {
                Model::ByteLevel(_) => bytes::decode(text, |bytes| out.write(bytes)),
                Model::SentencePiece(_) => sentence_piece::decode(text, |bytes| out.write(bytes)),
            },
            Kind::UserDefined => out.write(text),
            Kind::Byte => {
                if let Some(byte) = sentence_piece::named_byte(text) {
                    out.write(&[byte]);
                }
            }
            Kind::Control | Kind::Unknown | Kind::Other => {}
        }
        Ok(())
    }

    /// A token's text as the vocabulary stores it.
    pub fn raw_text(&self, token: u32) -> Option<&'a [u8]> {
        ((token as usize) < self.len()).then(|| self.vocab.text(token))
    }

    /// Number of tokens.
    #[expect(clippy::len_without_is_empty, reason = "a vocabulary without tokens is refused")]
    pub fn len(&self) -> usize {
        self.vocab.len()
    }

    /// `tokenizer.ggml.model`: `gpt2` for byte-level BPE, `llama` for SentencePiece's.
    pub fn model(&self) -> &'static str {
        match self.model {
            Model::ByteLevel(_) => "gpt2",
            Model::SentencePiece(_) => "llama",
        }
    }

    /// The name of the pre-tokenizer: of several with the same meaning the first. `default` is also that
    /// of files that name none, as llama.cpp reads them, and of SentencePiece, which has none.
    pub fn pre_tokenizer(&self) -> &'static str {
        match &self.model {
            Model::ByteLevel(model) => model.pre.names[0],
            Model::SentencePiece(_) => "default",
        }
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The file asks for BOS before each text; [`Self::bos`] is then there.
    pub fn adds_bos(&self) -> bool {
        self.add_bos
    }

    /// Encoding puts a space before a text and behind special tokens.
    pub fn adds_space_prefix(&self) -> bool {
        matches!(&self.model, Model::SentencePiece(model) if model.add_space_prefix)
    }

    /// Generation stops at this token: EOS, end of turn or message, or a token whose text is a well-known
    /// end marker, such as `<|im_end|>` or `<|endoftext|>`.
    pub fn is_end_of_generation(&self, token: u32) -> bool {
        self.eos == Some(token) || self.ends.contains(&Some(token)) || self.vocab.ends_generation(token)
    }

    /// The token whose stored text is `text`, of any kind.
    pub fn find(&self, text: &[u8]) -> Option<u32> {
        self.vocab.find(text)
    }

    /// The token of a single byte. A text with a byte that has none loses it when encoded; with SentencePiece
    /// that is so for bytes of characters that have no token themselves.
    pub fn byte(&self, byte: u8) -> Option<u32> {
        let token = match &self.model {
            Model::ByteLevel(model) => model.byte(byte),
            Model::SentencePiece(model) => model.byte(byte),
        };
        Some(token).filter(|&token| token != NONE)
    }
}

/// Takes ids, counting those beyond the end of the buffer.
struct Ids<'o> {
    out: &'o mut [u32],
    count: usize,
}

impl Ids<'_> {
    /// Appends a token; [`NONE`], a byte without one, is left out.
    fn push(&mut self, token: u32) {
        if token == NONE {
            return;
        }
        if let Some(slot) = self.out.get_mut(self.count) {
            *slot = token;
        }
        self.count += 1;
    }

    fn finish(self) -> Result<usize> {
        if self.count > self.out.len() {
            return Err(Error::new(Code::BufferTooSmall, "tokens")
                .found(self.out.len() as u64, self.count as u64)
                .hint("ids"));
        }
        Ok(self.count)
    }
}

/// Takes bytes, counting those beyond the end of the buffer.
struct Bytes<'o> {
    out: &'o mut [u8],
    len: usize,
    /// If the next byte is a space it is left out.
    drop_space: bool,
}

impl Bytes<'_> {
    fn write(&mut self, mut bytes: &[u8]) {
        if self.drop_space && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            self.drop_space = false;
        }
        if let Some(room) = self.out.get_mut(self.len..self.len + bytes.len()) {
            room.copy_from_slice(bytes);
        }
        self.len += bytes.len();
    }

    fn finish(self, name: &'static str) -> Result<usize> {
        if self.len > self.out.len() {
            return Err(Error::new(Code::BufferTooSmall, name)
                .found(self.out.len() as u64, self.len as u64)
                .hint("bytes"));
        }
        Ok(self.len)
    }
}
