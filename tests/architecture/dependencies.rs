//! Who may know whom: the crates' dependencies as cargo resolves them, without those for tests.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, PackageId};
use edge_tests::workspace;

const MODELS: &str = "edge-models";
const KERNELS: &str = "edge-kernels";
const RUNTIME: &str = "edge-runtime";
const CAPI: &str = "edge-capi";
const RUNNER: &str = "edge-run";
const TARGETS: &str = "edge-targets";
const COMPILER: &str = "edgec";
const TESTS: &str = "edge-tests";

/// What belongs to the host alone: training, text, the terminal, other formats.
const HOST_ONLY: &[&str] = &[
    "candle-core",
    "clap",
    "gemm",
    "gguf-rs",
    "indicatif",
    "minijinja",
    "minijinja-contrib",
    "object",
    "rayon",
    "safetensors",
    "self_cell",
    "sha2",
    "tempfile",
    "tokenizers",
];

struct Dependencies {
    members: BTreeSet<String>,
    /// Direct ones, for any platform and with all features.
    direct: BTreeMap<String, BTreeSet<String>>,
}

impl Dependencies {
    fn read() -> Self {
        let mut command = MetadataCommand::new();
        command.current_dir(workspace()).other_options(["--all-features".to_owned()]);
        let metadata = command.exec().unwrap();
        let members = metadata.workspace_packages().iter().map(|package| package.name.to_string()).collect();
        let resolve = metadata.resolve.as_ref().unwrap();
        let direct = resolve.nodes.iter().map(|node| {
            let normal = node.deps.iter().filter(|dependency| {
                dependency.dep_kinds.iter().any(|kind| kind.kind != DependencyKind::Development)
            });
            (name(&metadata, &node.id), normal.map(|dependency| name(&metadata, &dependency.pkg)).collect())
        });
        Self { members, direct: direct.collect() }
    }

    /// What `package` is compiled with, however far away.
    fn all<'a>(&'a self, package: &'a str) -> BTreeSet<&'a str> {
        let mut found = BTreeSet::new();
        let mut open = vec![package];
        while let Some(package) = open.pop() {
            let direct = self.direct[package].iter().map(String::as_str);
            open.extend(direct.filter(|dependency| found.insert(*dependency)));
        }
        found
    }

    fn members_below<'a>(&'a self, package: &'a str) -> BTreeSet<&'a str> {
        self.all(package).into_iter().filter(|dependency| self.members.contains(*dependency)).collect()
    }
}

fn name(metadata: &Metadata, id: &PackageId) -> String {
    metadata[id].name.to_string()
}

#[test]
fn crates_know_only_whom_they_may() {
    let dependencies = Dependencies::read();
    let all = [MODELS, KERNELS, RUNTIME, CAPI, RUNNER, TARGETS, COMPILER, TESTS];
    assert_eq!(dependencies.members, all.map(str::to_owned).into(), "a new crate needs a rule here");
    let rules: [(&str, &[&str]); 7] = [
        (MODELS, &[]),
        (KERNELS, &[MODELS]),
        (RUNTIME, &[MODELS, KERNELS]),
        (CAPI, &[MODELS, KERNELS, RUNTIME]),
        (RUNNER, &[MODELS, KERNELS, RUNTIME]),
        (TARGETS, &[]),
        (COMPILER, &[MODELS, KERNELS, RUNTIME, RUNNER, CAPI, TARGETS]),
    ];
    for (package, allowed) in rules {
        let below = dependencies.members_below(package);
        let extra: Vec<_> = below.iter().filter(|dependency| !allowed.contains(dependency)).collect();
        assert!(extra.is_empty(), "`{package}` may not know {extra:?}");
    }
    for package in [COMPILER, RUNNER, CAPI] {
        assert!(dependencies.members_below(package).contains(RUNTIME), "`{package}` runs models itself?");
    }
}

#[test]
fn the_device_needs_libm_alone() {
    let dependencies = Dependencies::read();
    assert_eq!(dependencies.all(MODELS), [].into());
    assert_eq!(dependencies.all(KERNELS), [MODELS, "libm"].into());
    assert_eq!(dependencies.all(RUNTIME), [MODELS, KERNELS, "libm"].into());
    assert_eq!(dependencies.all(CAPI), [MODELS, KERNELS, RUNTIME, "libm"].into());
}

#[test]
fn only_the_compiler_needs_the_hosts_libraries() {
    let dependencies = Dependencies::read();
    for package in dependencies.members.iter().filter(|package| *package != COMPILER) {
        let below = dependencies.all(package);
        let found: Vec<_> = HOST_ONLY.iter().filter(|name| below.contains(*name)).collect();
        assert!(found.is_empty(), "`{package}` is compiled with {found:?}");
    }
    assert!(dependencies.all(COMPILER).contains("candle-core"), "the names above are those of the lock file");
}
