//! Loops in the widest vectors of the CPU that runs them, while the rest of the program is built for any.

/// An expression, of which what is inlined is compiled for each set of vectors that CPUs have. Numbers are the same with
/// all of them: nothing is fused or reordered.
macro_rules! widest {
    ($body:expr) => {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || $body,
        )
    };
}
pub(crate) use widest;
