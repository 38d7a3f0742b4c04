//! Reads a shared library back and checks what the device side promises about it.

use object::Endianness;
use object::elf;
use object::read::elf::{Dyn, ElfFile64, FileHeader, ProgramHeader, Sym};

/// Page size that every segment is aligned to. Android asks for 16 KiB since 2025; a system with 4 KiB
/// pages loads such a library too.
pub const PAGE: u64 = 16 * 1024;

/// Every name that the library exports starts with this.
pub const PREFIX: &str = "edge_";

/// What a checked library exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Library {
    /// Exported names, sorted.
    pub exports: Vec<String>,
}

/// The promise that a library breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It cannot be read.
    #[error("not a readable 64-bit ELF file: {0}")]
    Unreadable(String),
    /// It is for another machine or is no shared library.
    #[error("ELF type {kind} for machine {machine}, expected a shared library for {expected}")]
    Foreign {
        /// `e_type`.
        kind: u16,
        /// `e_machine`.
        machine: u16,
        /// The target's architecture.
        expected: String,
    },
    /// It asks the device for another library.
    #[error("needs `{0}`, expected no NEEDED entry")]
    Needed(String),
    /// A segment does not start at a page.
    #[error("LOAD segment {index} is aligned to {found} bytes, expected a multiple of {PAGE}")]
    Alignment {
        /// Number of the segment.
        index: usize,
        /// Its alignment.
        found: u64,
    },
    /// A segment could be written and run.
    #[error("LOAD segment {0} is writable and executable")]
    WritableCode(usize),
    /// The loader would have to write into the code.
    #[error("has relocations in its code (TEXTREL)")]
    TextRelocations,
    /// It expects a symbol from elsewhere.
    #[error("symbol `{0}` is not defined in it")]
    Undefined(String),
    /// It exports more than the C ABI.
    #[error("exports `{0}`, expected only names that start with `{PREFIX}`")]
    Export(String),
    /// It exports nothing.
    #[error("exports nothing")]
    Empty,
}

type File<'a> = ElfFile64<'a, Endianness>;

/// Checks a shared library: right machine, no NEEDED entry, no undefined symbol, all LOAD segments
/// aligned to [`PAGE`] and never both writable and executable, no text relocation, exports that all
/// start with [`PREFIX`].
///
/// # Errors
/// The first promise that it breaks.
pub fn check(bytes: &[u8], architecture: &str) -> Result<Library, Fault> {
    let file = File::parse(bytes).map_err(unreadable)?;
    check_platform(&file, architecture)?;
    check_segments(&file, bytes)?;
    let mut exports = exports(&file)?;
    exports.sort();
    Ok(Library { exports })
}

fn unreadable(error: object::Error) -> Fault {
    Fault::Unreadable(error.to_string())
}

fn check_platform(file: &File, architecture: &str) -> Result<(), Fault> {
    let header = file.elf_header();
    let (kind, machine) = (header.e_type(file.endian()), header.e_machine(file.endian()));
    let expected = match architecture {
        "aarch64" => Some(elf::EM_AARCH64),
        "x86_64" => Some(elf::EM_X86_64),
        _ => None,
    };
    if kind == elf::ET_DYN && Some(machine) == expected {
        return Ok(());
    }
    Err(Fault::Foreign { kind, machine, expected: architecture.into() })
}

fn check_segments(file: &File, bytes: &[u8]) -> Result<(), Fault> {
    let endian = file.endian();
    for (index, segment) in file.elf_program_headers().iter().enumerate() {
        if segment.p_type(endian) == elf::PT_LOAD {
            let alignment = segment.p_align(endian);
            if alignment == 0 || alignment % PAGE != 0 {
                return Err(Fault::Alignment { index, found: alignment });
            }
            let flags = segment.p_flags(endian);
            if flags & elf::PF_W != 0 && flags & elf::PF_X != 0 {
                return Err(Fault::WritableCode(index));
            }
        }
        for entry in segment.dynamic(endian, bytes).map_err(unreadable)?.unwrap_or(&[]) {
            check_dynamic(file, entry)?;
        }
    }
    Ok(())
}

fn check_dynamic(file: &File, entry: &elf::Dyn64<Endianness>) -> Result<(), Fault> {
    let value = entry.d_val(file.endian());
    match entry.d_tag(file.endian()) {
        tag if tag == u64::from(elf::DT_NEEDED) => {
            let strings = file.elf_dynamic_symbol_table().strings();
            let name = u32::try_from(value).ok().and_then(|offset| strings.get(offset).ok());
            Err(Fault::Needed(String::from_utf8_lossy(name.unwrap_or_default()).into_owned()))
        }
        tag if tag == u64::from(elf::DT_TEXTREL) => Err(Fault::TextRelocations),
        tag if tag == u64::from(elf::DT_FLAGS) && value & u64::from(elf::DF_TEXTREL) != 0 => {
            Err(Fault::TextRelocations)
        }
        _ => Ok(()),
    }
}

fn exports(file: &File) -> Result<Vec<String>, Fault> {
    let (endian, symbols) = (file.endian(), file.elf_dynamic_symbol_table());
    let mut exports = Vec::new();
    // The first entry of every table is empty.
    for symbol in symbols.iter().skip(1).filter(|symbol| symbol.st_bind() != elf::STB_LOCAL) {
        let name = symbol.name(endian, symbols.strings()).map_err(unreadable)?;
        let name = String::from_utf8_lossy(name).into_owned();
        if symbol.is_undefined(endian) {
            return Err(Fault::Undefined(name));
        }
        if !name.starts_with(PREFIX) {
            return Err(Fault::Export(name));
        }
        exports.push(name);
    }
    if exports.is_empty() { Err(Fault::Empty) } else { Ok(exports) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_files_are_refused() {
        assert!(matches!(check(b"", "aarch64"), Err(Fault::Unreadable(_))));
        assert!(matches!(check(&[0x7F; 4096], "aarch64"), Err(Fault::Unreadable(_))));
        // This very test is a program for the host, linked with its C library.
        #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
        {
            let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
            assert!(matches!(check(&program, "aarch64"), Err(Fault::Foreign { machine: 62, .. })));
            let fault = check(&program, "x86_64").unwrap_err();
            assert!(matches!(fault, Fault::Needed(_) | Fault::Alignment { .. }), "{fault}");
        }
    }
}
