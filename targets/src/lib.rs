//! Devices as validated data.
//!
//! A device is a TOML file under `devices/`, never code: what to build for (triple, operating system,
//! ABI folder), what its processor can do, how much memory it has and how fast that is, and on what
//! evidence. The files are part of the crate and are checked key by key when they are loaded. This crate
//! builds nothing, measures nothing and is never seen by the runtime: a device learns its own features
//! at run time.

mod device;
mod reader;

pub use device::{Cluster, Evidence, Isa, Os, Target, Tier};
pub use reader::TargetError;

/// The target that is meant when none is named.
pub const DEFAULT: &str = "aarch64-android";

/// The shipped device files, by file name.
const FILES: &[(&str, &str)] = &[
    ("aarch64-android.toml", include_str!("../devices/aarch64-android.toml")),
    ("aarch64-linux.toml", include_str!("../devices/aarch64-linux.toml")),
    ("dimensity-9300.toml", include_str!("../devices/dimensity-9300.toml")),
    ("i.mx95.toml", include_str!("../devices/i.mx95.toml")),
    ("orin-agx.toml", include_str!("../devices/orin-agx.toml")),
    ("raspberry-pi-5.toml", include_str!("../devices/raspberry-pi-5.toml")),
    ("rk3588.toml", include_str!("../devices/rk3588.toml")),
    ("s32g3.toml", include_str!("../devices/s32g3.toml")),
    ("sa8155p.toml", include_str!("../devices/sa8155p.toml")),
    ("sa8295p.toml", include_str!("../devices/sa8295p.toml")),
    ("sd-8-gen-3.toml", include_str!("../devices/sd-8-gen-3.toml")),
    ("tda4vh.toml", include_str!("../devices/tda4vh.toml")),
    ("x86_64-linux.toml", include_str!("../devices/x86_64-linux.toml")),
];

/// Names of all shipped targets, sorted.
pub fn names() -> impl Iterator<Item = &'static str> {
    FILES.iter().filter_map(|(file, _)| file.strip_suffix(".toml"))
}

impl Target {
    /// The shipped target of that name or alias.
    ///
    /// # Errors
    /// [`TargetError::Unknown`] with the list of names; any other error is a fault in a shipped file.
    pub fn by_name(name: &str) -> Result<Self, TargetError> {
        // File names are the names, so only a miss has to look for an alias in every file.
        for (file, text) in FILES {
            if file.strip_suffix(".toml") == Some(name) {
                return Self::parse(file, text);
            }
        }
        for target in Self::all()? {
            if target.aliases.iter().any(|alias| alias == name) {
                return Ok(target);
            }
        }
        Err(TargetError::Unknown { name: name.into(), known: names().collect::<Vec<_>>().join(", ") })
    }

    /// Every shipped target, by name.
    ///
    /// # Errors
    /// The first fault in a shipped file.
    pub fn all() -> Result<Vec<Self>, TargetError> {
        FILES.iter().map(|(file, text)| Self::parse(file, text)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shipped_file_is_valid_and_named_after_its_target() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("devices");
        let mut on_disk: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        on_disk.sort();
        let listed: Vec<_> = FILES.iter().map(|(file, _)| *file).collect();
        assert_eq!(on_disk, listed, "devices/ and FILES must agree, sorted");

        for (file, text) in FILES {
            let target = Target::parse(file, text).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(format!("{}.toml", target.name), *file);
        }
    }

    #[test]
    fn threads_are_for_big_cores_or_for_the_fastest_of_the_little() {
        for (name, cores, threads) in
            [("rk3588", 8, 4), ("sa8155p", 8, 4), ("raspberry-pi-5", 4, 4), ("s32g3", 8, 8), ("i.mx95", 6, 6)]
        {
            let target = Target::by_name(name).unwrap();
            assert_eq!((target.cores(), target.threads()), (cores, threads), "{name}");
        }
    }

    #[test]
    fn names_and_aliases_are_unique() {
        let mut seen = std::collections::BTreeSet::new();
        for target in Target::all().unwrap() {
            for name in target.aliases.iter().chain([&target.name]) {
                assert!(seen.insert(name.clone()), "{name} is used twice");
            }
        }
    }

    #[test]
    fn the_default_and_aliases_are_found_and_a_miss_lists_the_names() {
        assert_eq!(Target::by_name(DEFAULT).unwrap().triple, "aarch64-linux-android");
        assert_eq!(Target::by_name("am69").unwrap().name, "tda4vh");
        let message = Target::by_name("vax").unwrap_err().to_string();
        assert!(message.starts_with("unknown target `vax`"), "{message}");
        assert!(names().all(|name| message.contains(name)), "{message}");
    }
}
