//! Cutting a text into the words that merges never cross.
//!
//! A pre-tokenizer is a row of [`TABLE`]: names, a few flags, and the patterns that are applied one
//! after the other, each inside the pieces of the one before. The patterns are matched by hand, in one
//! pass and without backtracking, so that the time is linear in the text whatever it holds.
//!
//! Patterns and names are those of llama.cpp (`src/llama-vocab.cpp`) and of the models'
//! `tokenizer.json`. As in llama.cpp, contractions are matched in ASCII only and nothing is normalized.

use super::unicode::{Class, Point, first};

/// A pre-tokenizer of byte-level BPE.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    /// Values of `tokenizer.ggml.pre` that mean this one.
    pub(super) names: &'static [&'static str],
    patterns: &'static [Pattern],
    /// A whole word that is in the vocabulary is taken as it is, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// What `tokenizer.ggml.add_bos_token` is where the file does not say.
    pub(super) add_bos: bool,
}

/// A pattern, given as the regular expression that it matches.
#[derive(Clone, Copy, Debug)]
enum Pattern {
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    Gpt2,
    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,n}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
    Cl100k { digits: usize },
    /// `\p{N}`, the rest left whole.
    Digit,
    /// `\p{N}+`, the rest left whole.
    Number,
    /// `[0-9][0-9][0-9]`, the rest left whole.
    ThreeDigits,
    /// `[\p{P}\$\+<=>\^~\|]+`, the rest left whole; with other symbols behind `\p{P}` for other models.
    Punctuation { symbols: &'static [u8] },
    /// `[\r\n]`, the rest left whole.
    Newline,
    /// `\s?\p{L}+` or `\s?\p{P}+`, the rest left whole.
    AfterSpace(Class),
    /// `[一-龥ࠀ-一가-퟿]+` without white space, which llama.cpp hides from it; the rest left whole.
    EastAsian,
}

/// The pattern of files that name none.
const PUNCTUATION: Pattern = Pattern::Punctuation { symbols: b"$+<=>^~|" };

/// Most patterns in a row.
const MAX_PATTERNS: usize = 5;

const PLAIN: PreTokenizer =
    PreTokenizer { names: &[], patterns: &[Pattern::Gpt2], ignore_merges: false, add_bos: false };

/// Every pre-tokenizer. The first is the one of files that name none.
pub(super) static TABLE: [PreTokenizer; 8] = [
    PreTokenizer {
        names: &["default"],
        patterns: &[PUNCTUATION, Pattern::Gpt2, Pattern::Number, Pattern::ThreeDigits],
        ..PLAIN
    },
    PreTokenizer {
        names: &[
            "gpt-2",
            "phi-2",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
        ],
        patterns: &[Pattern::Gpt2],
        ..PLAIN
    },
    PreTokenizer {
        names: &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        patterns: &[Pattern::Digit, Pattern::Gpt2],
        ..PLAIN
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        patterns: &[Pattern::Cl100k { digits: 3 }],
        ignore_merges: true,
        add_bos: true,
    },
    PreTokenizer { names: &["dbrx", "smaug-bpe"], patterns: &[Pattern::Cl100k { digits: 3 }], ..PLAIN },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "grok-2"],
        patterns: &[Pattern::Cl100k { digits: 1 }],
        ..PLAIN
    },
    PreTokenizer {
        names: &["falcon"],
        patterns: &[Pattern::Punctuation { symbols: b"$+<=>^~|`" }, Pattern::Gpt2, Pattern::ThreeDigits],
        ..PLAIN
    },
    PreTokenizer {
        names: &["deepseek-coder"],
        patterns: &[
            Pattern::Newline,
            Pattern::AfterSpace(Class::Letter),
            Pattern::AfterSpace(Class::Punctuation),
            Pattern::EastAsian,
            Pattern::Digit,
        ],
        ..PLAIN
    },
];

/// What exists, for errors; a test keeps it equal to the table.
pub(super) const NAMES: &str = "pre-tokenizers: \
    default, gpt-2, phi-2, gigachat, a.x-4.0, mellum, mpt, olmo, jais, trillion, \
    granite-docling, exaone4, smollm, starcoder, refact, command-r, codeshell, exaone, \
    minerva-7b, mellum2, llama-bpe, llama3, llama-v3, falcon3, falcon-h1, pixtral, midm-2.0, \
    lfm2, dbrx, smaug-bpe, qwen2, deepseek-r1-qwen, kormo, f2llmv2, megrez, stablelm2, hunyuan, \
    grok-2, falcon, deepseek-coder";

impl PreTokenizer {
    /// The one that a file names.
    pub(super) fn find(name: &[u8]) -> Option<&'static Self> {
        TABLE.iter().find(|row| row.names.iter().any(|known| known.as_bytes() == name))
    }

    /// The words of `text` in order; joined they are `text`.
    pub(super) fn words<'t>(&self, text: &'t [u8]) -> Words<'t> {
        Words { text, at: 0, patterns: self.patterns, ends: [0; MAX_PATTERNS] }
    }
}

/// The words of a text, see [`PreTokenizer::words`].
pub(super) struct Words<'t> {
    text: &'t [u8],
    at: usize,
    patterns: &'static [Pattern],
    /// Where the current piece of each pattern ends, outermost first.
    ends: [usize; MAX_PATTERNS],
}

impl<'t> Iterator for Words<'t> {
    type Item = &'t [u8];

    fn next(&mut self) -> Option<&'t [u8]> {
        if self.at == self.text.len() {
            return None;
        }
        let mut end = self.text.len();
        for (pattern, piece_end) in self.patterns.iter().zip(&mut self.ends) {
            if *piece_end == self.at {
                *piece_end = self.at + pattern.split(&self.text[self.at..end]);
            }
            end = *piece_end;
        }
        let word = &self.text[self.at..end];
        self.at = end;
        Some(word)
    }
}

impl Pattern {
    /// Bytes of the first piece of `text`, at least 1 where `text` is not empty.
    fn split(self, text: &[u8]) -> usize {
        match self {
            Self::Gpt2 => gpt2(text),
            Self::Cl100k { digits } => cl100k(text, digits),
            Self::Digit => match first(text) {
                Some(point) if point.class == Class::Number => point.len,
                _ => run(text, |point| point.class != Class::Number),
            },
            Self::Number => alternate(text, |point| point.class == Class::Number),
            Self::ThreeDigits => three_digits(text),
            Self::Punctuation { symbols } => alternate(text, |point| {
                point.class == Class::Punctuation
                    || matches!(u8::try_from(point.value), Ok(byte) if symbols.contains(&byte))
            }),
            Self::Newline => match first(text) {
                Some(point) if is_newline(point) => point.len,
                _ => run(text, |point| !is_newline(point)),
            },
            Self::AfterSpace(class) => after_space(text, |point| point.class == class),
            Self::EastAsian => alternate(text, |point| {
                matches!(point.value, 0x0800..=0x9FA5 | 0xAC00..=0xD7FF) && point.class != Class::Space
            }),
        }
    }
}

/// Bytes of the longest start of `text` whose code points all satisfy `accept`.
fn run(text: &[u8], accept: impl Fn(Point) -> bool) -> usize {
    let mut at = 0;
    while let Some(point) = first(&text[at..]) {
        if !accept(point) {
            break;
        }
        at += point.len;
    }
    at
}

/// Bytes of the run at the start of `text` in which all satisfy `accept`, or none does.
fn alternate(text: &[u8], accept: impl Fn(Point) -> bool) -> usize {
    match first(text) {
        Some(point) if accept(point) => run(text, accept),
        _ => run(text, |point| !accept(point)),
    }
}

/// Bytes of the run at the start of `text` in which all satisfy `accept`, with at most one white space before
/// it; where none starts there, the bytes before the first such run.
fn after_space(text: &[u8], accept: impl Fn(Point) -> bool) -> usize {
    let run_at = |at: usize| {
        let space =
            first(&text[at..]).filter(|point| point.class == Class::Space).map_or(0, |point| point.len);
        let accepted = run(&text[at + space..], &accept);
        if accepted > 0 { space + accepted } else { 0 }
    };
    match run_at(0) {
        0 => {
            let mut at = 0;
            while let Some(point) = first(&text[at..]).filter(|_| at == 0 || run_at(at) == 0) {
                at += point.len;
            }
            at
        }
        len => len,
    }
}

fn three_digits(text: &[u8]) -> usize {
    let at = text.windows(3).position(|window| window.iter().all(u8::is_ascii_digit));
    match at {
        Some(0) => 3,
        Some(at) => at,
        None => text.len(),
    }
}

fn gpt2(text: &[u8]) -> usize {
    let Some(start) = first(text) else { return 0 };
    if let Some(len) = contraction(text, |byte| byte) {
        return len;
    }
    let skip = usize::from(start.value == 0x20);
    match first(&text[skip..]).map(|point| point.class) {
        None | Some(Class::Space) => spaces(text),
        Some(class @ (Class::Letter | Class::Number)) => {
            skip + run(&text[skip..], |point| point.class == class)
        }
        Some(_) => skip + run(&text[skip..], |point| point.class.is_rest()),
    }
}

fn cl100k(text: &[u8], digits: usize) -> usize {
    let Some(start) = first(text) else { return 0 };
    if let Some(len) = contraction(text, |byte| byte.to_ascii_lowercase()) {
        return len;
    }
    if start.class == Class::Number {
        return numbers(text, digits);
    }
    let letters = |skip: usize| run(&text[skip..], |point| point.class == Class::Letter);
    if start.class == Class::Letter {
        return letters(0);
    }
    let after = first(&text[start.len..]).map(|point| point.class);
    if after == Some(Class::Letter) && !is_newline(start) {
        return start.len + letters(start.len);
    }
    let (skip, class) = if start.value == 0x20 { (1, after) } else { (0, Some(start.class)) };
    if class.is_some_and(Class::is_rest) {
        let end = skip + run(&text[skip..], |point| point.class.is_rest());
        return end + run(&text[end..], is_newline);
    }
    let run = run(text, |point| point.class == Class::Space);
    match text[..run].iter().rposition(|byte| matches!(byte, b'\r' | b'\n')) {
        Some(last) => last + 1,
        None => spaces(text),
    }
}

fn is_newline(point: Point) -> bool {
    matches!(point.value, 0x0A | 0x0D)
}

/// `'s|'t|'re|'ve|'m|'ll|'d` on the bytes as `fold` maps them.
fn contraction(text: &[u8], fold: impl Fn(u8) -> u8) -> Option<usize> {
    let [b'\'', second, rest @ ..] = text else { return None };
    match (fold(*second), rest.first().map(|byte| fold(*byte))) {
        (b's' | b't' | b'm' | b'd', _) => Some(2),
        (b'r' | b'v', Some(b'e')) | (b'l', Some(b'l')) => Some(3),
        _ => None,
    }
}

/// `\p{N}{1,most}`
fn numbers(text: &[u8], most: usize) -> usize {
    let mut at = 0;
    for _ in 0..most {
        match first(&text[at..]) {
            Some(point) if point.class == Class::Number => at += point.len,
            _ => break,
        }
    }
    at
}

/// `\s+(?!\S)|\s+`: a run of white space leaves its last one to the word that follows.
fn spaces(text: &[u8]) -> usize {
    let (mut end, mut last) = (0, 0);
    while let Some(point) = first(&text[end..]) {
        if point.class != Class::Space {
            return if last > 0 { last } else { end };
        }
        last = end;
        end += point.len;
    }
    end
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::{string::String, vec::Vec};

    fn split<'t>(name: &str, text: &'t str) -> Vec<&'t str> {
        let words = PreTokenizer::find(name.as_bytes()).unwrap().words(text.as_bytes());
        words.map(|word| core::str::from_utf8(word).unwrap()).collect()
    }

    #[test]
    fn the_list_in_errors_is_the_table() {
        let names: Vec<&str> = TABLE.iter().flat_map(|row| row.names).copied().collect();
        assert_eq!(NAMES, String::from("pre-tokenizers: ") + &names.join(", "));
        assert!(TABLE.iter().all(|row| row.patterns.len() <= MAX_PATTERNS && !row.patterns.is_empty()));
    }

    #[test]
    fn words_of_known_texts() {
        assert_eq!(
            split("gpt-2", "I'll  go\n\n  2024 !?"),
            ["I", "'ll", " ", " go", "\n\n ", " 2024", " !?"]
        );
        assert_eq!(split("smollm", "in 2024  x"), ["in", " ", "2", "0", "2", "4", " ", " x"]);
        assert_eq!(
            split("llama-bpe", "I'LL pay 12345 \r\n x"),
            ["I", "'LL", " pay", " ", "123", "45", " \r\n", " x"]
        );
        assert_eq!(split("qwen2", "$a  b!\n\n1"), ["$a", " ", " b", "!\n\n", "1"]);
        assert_eq!(split("default", "a+1234 b"), ["a", "+", "123", "4", " b"]);
        assert_eq!(split("gpt-2", "a  "), ["a", "  "]);
        assert_eq!(split("falcon", "a`b` 12345 +"), ["a", "`", "b", "`", " ", "123", "45", " ", "+"]);
        assert_eq!(
            split("deepseek-coder", "a  bc (d);\n\n12 漢字 x=y"),
            ["a", " ", " bc", " (", "d", ");", "\n", "\n", "1", "2", " ", "漢字", " x", "=", "y"]
        );
    }
}
