//! Tests of the whole toolchain live in the folders beside `src`.
