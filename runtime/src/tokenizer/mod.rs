//! Text to tokens and back, straight from the vocabulary of a GGUF file.
//!
//! Byte-level BPE as GPT-2, Llama 3, Qwen2 and SmolLM2 have it, giving llama.cpp's ids. [`Tokenizer`] is
//! a view over the file's bytes and an index in the caller's memory; nothing here allocates, recurses or
//! normalizes text. Another tokenizer model or pre-tokenizer is refused by name.
//!
//! Two things differ from llama.cpp, both for texts that are not plain UTF-8: bytes of malformed UTF-8
//! keep their own tokens (llama.cpp makes them U+FFFD), so that decoding gives the text back; and of
//! overlapping special tokens the leftmost wins. As in llama.cpp, a byte for which the vocabulary has no
//! token is left out: SmolLM2 has none for some control characters ([`Tokenizer::byte`] tells).

mod bytes;
mod keys;
mod merge;
mod pretokenize;
mod special;
mod stream;
mod unicode;
mod unicode_table;
mod vocab;

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;

use crate::format::Gguf;
use crate::{Code, Error, Result};
use keys::Keys;
use pretokenize::PreTokenizer;
pub use stream::Utf8Stream;
use vocab::{Kind, NONE, Vocab};

/// Byte-level BPE over a file's vocabulary.
#[derive(Clone, Copy, Debug)]
pub struct Tokenizer<'a> {
    vocab: Vocab<'a>,
    pre: &'static PreTokenizer,
    bos: Option<u32>,
    eos: Option<u32>,
    ends: [Option<u32>; 5],
    add_bos: bool,
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
    /// Words of index that [`Self::new`] needs for this file: about 9 for each token with its merge.
    ///
    /// # Errors
    /// As [`Self::new`], as far as the metadata alone can tell.
    pub fn index_words(file: &Gguf<'_>) -> Result<usize> {
        vocab::index_words(&Keys::read(file)?)
    }

    /// Reads the vocabulary of `file` and builds its index in `index`, in time linear in the vocabulary.
    ///
    /// # Errors
    /// - [`Code::Unsupported`]: a tokenizer model or pre-tokenizer that is not there, with those that are.
    /// - [`Code::MissingKey`], [`Code::WrongKeyType`], [`Code::BadLength`], [`Code::OutOfRange`]: a
    ///   metadata key, by name.
    /// - [`Code::BadVocabulary`]: two tokens of the same text, a merge of what are no tokens, a special token
    ///   of more than 1024 bytes, or texts made to collide, with the number of the entry.
    /// - [`Code::BufferTooSmall`]: `index` is smaller than [`Self::index_words`].
    pub fn new(file: &Gguf<'a>, index: &'a mut [u32]) -> Result<Self> {
        let keys = Keys::read(file)?;
        let pre = match keys.pre {
            None => &pretokenize::TABLE[0],
            Some(name) => {
                PreTokenizer::find(name).ok_or_else(|| keys::unsupported(name, pretokenize::NAMES))?
            }
        };
        let add_bos = keys.add_bos.unwrap_or(pre.add_bos);
        if add_bos && keys.bos.is_none() {
            return Err(keys::missing("bos_token_id"));
        }
        let (bos, eos, ends) = (keys.bos, keys.eos, keys.ends);
        Ok(Self { vocab: Vocab::build(&keys, index)?, pre, bos, eos, ends, add_bos })
    }

    /// Words of scratch with which encoding a text of `bytes` bytes never fails.
    ///
    /// Scratch is used by one word of the pre-tokenizer at a time, and only by those of more than 32
    /// bytes: a caller who knows its texts may well give less.
    pub const fn scratch_words(bytes: usize) -> usize {
        if bytes <= merge::SHORT { 0 } else { bytes.saturating_mul(merge::SCRATCH_PER_BYTE) }
    }

    /// Encodes `text`, any bytes, into `out` and returns the number of ids. There are at most as many as
    /// bytes, and one for BOS. EOS is never added. Takes O(n log n) for a text of n bytes.
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
        let specials = special::Finder::new(&self.vocab, options.parse_special);
        let mut rest = text;
        while let Some(found) = specials.find(rest) {
            self.encode_plain(&rest[..found.start], scratch, &mut ids)?;
            ids.push(found.token);
            rest = &rest[found.start + found.len..];
        }
        self.encode_plain(rest, scratch, &mut ids)?;
        ids.finish()
    }

    fn encode_plain(&self, text: &[u8], scratch: &mut [u32], ids: &mut Ids<'_>) -> Result<()> {
        for word in self.pre.words(text) {
            if let [byte] = word {
                ids.push(self.vocab.byte(*byte));
                continue;
            }
            if self.pre.ignore_merges
                && let Some(token) = self.vocab.find_word(word)
            {
                ids.push(token);
                continue;
            }
            let needed = Self::scratch_words(word.len());
            if scratch.len() < needed || word.len() >= NONE as usize {
                return Err(Error::new(Code::BufferTooSmall, "tokenizer scratch")
                    .found(scratch.len() as u64, needed as u64)
                    .hint("words"));
            }
            merge::merge(&self.vocab, word, scratch, |token| ids.push(token));
        }
        Ok(())
    }

    /// Writes the bytes that a token stands for and returns how many they are: at most as many as
    /// [`Self::raw_text`] has. They may begin or end within a character, see [`Utf8Stream`].
    ///
    /// Control, unknown and unused tokens stand for nothing; their names are in [`Self::raw_text`].
    ///
    /// # Errors
    /// [`Code::BadToken`] beyond the vocabulary, [`Code::BufferTooSmall`] with the bytes needed.
    pub fn piece(&self, token: u32, out: &mut [u8]) -> Result<usize> {
        let Some(text) = self.raw_text(token) else {
            return Err(Error::new(Code::BadToken, "").found(u64::from(token), self.len() as u64));
        };
        let mut len = 0;
        let mut write = |bytes: &[u8]| {
            if let Some(room) = out.get_mut(len..len + bytes.len()) {
                room.copy_from_slice(bytes);
            }
            len += bytes.len();
        };
        match self.vocab.kind(token) {
            Kind::Normal => bytes::decode(text, write),
            Kind::UserDefined => write(text),
            Kind::Control | Kind::Unknown | Kind::Other => {}
        }
        if len > out.len() {
            return Err(Error::new(Code::BufferTooSmall, "piece")
                .found(out.len() as u64, len as u64)
                .hint("bytes"));
        }
        Ok(len)
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

    /// The name of the pre-tokenizer: of several with the same meaning the first. `default` is also that
    /// of files that name none, as llama.cpp reads them.
    pub fn pre_tokenizer(&self) -> &'static str {
        self.pre.names[0]
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

    /// Generation stops at this token: EOS, end of turn or message, or a token whose text is a well-known
    /// end marker, such as `<|im_end|>` or `<|endoftext|>`.
    pub fn is_end_of_generation(&self, token: u32) -> bool {
        self.eos == Some(token) || self.ends.contains(&Some(token)) || self.vocab.ends_generation(token)
    }

    /// The token whose stored text is `text`, of any kind.
    pub fn find(&self, text: &[u8]) -> Option<u32> {
        self.vocab.find(text, &[])
    }

    /// The token of a single byte. A text with a byte that has none loses it when encoded.
    pub fn byte(&self, byte: u8) -> Option<u32> {
        Some(self.vocab.byte(byte)).filter(|&token| token != NONE)
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
