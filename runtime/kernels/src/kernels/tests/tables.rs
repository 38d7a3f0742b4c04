//! Which tables there are.

use super::super::{Features, Kernels};
use std::vec::Vec;

fn names(tables: impl Iterator<Item = &'static Kernels>) -> Vec<&'static str> {
    tables.map(Kernels::name).collect()
}

/// `EDGE_TEST_KERNELS` says what the processor must have, so that a suite that runs on an emulated one runs for all
/// of its tables.
#[test]
fn the_processor_has_the_tables_that_it_is_said_to_have() {
    let found = names(Kernels::available());
    assert_eq!(found.last(), Some(&"generic"));
    if let Ok(expected) = std::env::var("EDGE_TEST_KERNELS") {
        assert_eq!(found, expected.split(' ').collect::<Vec<_>>());
    }
    assert_eq!(Kernels::select(Features::detect()).name(), found[0]);
    for name in &found {
        assert_eq!(Kernels::by_name(name).map(Kernels::name), Some(*name));
    }
    assert!(Kernels::by_name("abacus").is_none());
}

#[test]
fn linux_s_bits_are_features_of_arm() {
    const ASIMDDP: u64 = 1 << 20;
    const I8MM: u64 = 1 << 13;
    // SAFETY: only names of tables are read, no kernel is called.
    let of = |hwcap, hwcap2| unsafe { Features::from_hwcap(hwcap, hwcap2) };
    assert_eq!(of(!ASIMDDP, I8MM), Features::NONE);
    assert_eq!(of(0, 0), Features::NONE);
    assert_ne!(of(ASIMDDP, 0), Features::NONE);
    assert_ne!(of(ASIMDDP, I8MM), of(ASIMDDP, !I8MM));
    #[cfg(target_arch = "aarch64")]
    assert_eq!(
        [of(0, I8MM), of(ASIMDDP, 0), of(ASIMDDP, I8MM)].map(|features| Kernels::select(features).name()),
        ["neon", "dotprod", "i8mm"]
    );
}
