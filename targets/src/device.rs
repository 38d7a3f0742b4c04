//! What a device is, and how its file is read.

use crate::reader::{Reader, TargetError};

/// A device that models are built for.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// Name on the command line and of the folder of its libraries.
    pub name: String,
    /// Other names it answers to.
    pub aliases: Vec<String>,
    /// One line about it.
    pub description: String,
    /// Rust's name of the platform, such as `aarch64-linux-android`.
    pub triple: String,
    /// Operating system.
    pub os: Os,
    /// Name that packagers give to the binary interface, such as `arm64-v8a`.
    pub abi: String,
    /// Instruction set extensions that every unit of this device has.
    pub isa: Vec<Isa>,
    /// Processor cores, fastest cluster first.
    pub clusters: Vec<Cluster>,
    /// Main memory of the smallest usual unit, in MiB.
    pub ram_mib: u32,
    /// Peak bandwidth of the main memory in GB/s (10^9 bytes).
    pub bandwidth_gbs: f64,
    /// How well all this is known.
    pub evidence: Evidence,
}

/// A group of equal cores.
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// Kind of core, such as `cortex-a76`.
    pub core: String,
    /// Number of cores.
    pub count: u32,
    /// Highest sustained clock in GHz, where it is known.
    pub ghz: Option<f64>,
}

/// Kinds of cores that Arm makes to stand beside bigger ones.
const LITTLE: &[&str] = &["cortex-a53", "cortex-a55", "cortex-a510", "cortex-a520"];

/// How well a device's facts are known, and from where.
#[derive(Clone, Debug, PartialEq)]
pub struct Evidence {
    /// The weakest evidence that any fact of the file rests on, save those in `unverified`.
    pub tier: Tier,
    /// Where the facts come from.
    pub source: String,
    /// Keys of the file that rest on background knowledge alone.
    pub unverified: Vec<String>,
}

macro_rules! named_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl $name {
            /// Every value with its name in the file.
            pub const ALL: &[(&'static str, Self)] = &[$(($text, Self::$variant),)*];

            /// Its name in the file.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}

named_enum! {
    /// Operating systems.
    Os {
        /// Android.
        Android = "android",
        /// Linux with any C library.
        Linux = "linux",
    }
}

named_enum! {
    /// Instruction set extensions beyond the baseline (Armv8.0-A with NEON, x86-64 with SSE2).
    Isa {
        /// Half-precision arithmetic (FEAT_FP16).
        Fp16 = "fp16",
        /// 8-bit dot products (FEAT_DotProd).
        DotProd = "dotprod",
        /// 8-bit matrix products (FEAT_I8MM).
        I8mm = "i8mm",
        /// bfloat16 (FEAT_BF16).
        Bf16 = "bf16",
        /// Scalable vectors (FEAT_SVE2).
        Sve2 = "sve2",
        /// Scalable matrices (FEAT_SME2).
        Sme2 = "sme2",
        /// 256-bit integer vectors of x86-64.
        Avx2 = "avx2",
        /// Fused multiply-add of x86-64.
        Fma = "fma",
    }
}

named_enum! {
    /// Evidence, strongest first.
    Tier {
        /// Run and timed on the device.
        Measured = "measured",
        /// Taken from the maker's documents.
        Datasheet = "datasheet",
        /// Background knowledge or an assumption.
        Unverified = "unverified",
    }
}

impl Isa {
    /// The first part of the triples that have it.
    fn architecture(self) -> &'static str {
        match self {
            Self::Avx2 | Self::Fma => "x86_64",
            _ => "aarch64",
        }
    }
}

impl Target {
    /// First part of the triple: `aarch64` or `x86_64`.
    pub fn architecture(&self) -> &str {
        self.triple.split('-').next().unwrap_or_default()
    }

    /// Number of cores in all clusters.
    pub fn cores(&self) -> u32 {
        self.clusters.iter().map(|cluster| cluster.count).sum()
    }

    /// Threads that a model should have there: one for each core that is not a little one beside bigger ones, since a
    /// token is as late as its slowest thread.
    pub fn threads(&self) -> u32 {
        let count = |big: &dyn Fn(&Cluster) -> bool| -> u32 {
            self.clusters.iter().filter(|cluster| big(cluster)).map(|cluster| cluster.count).sum()
        };
        match count(&|cluster| !LITTLE.contains(&cluster.core.as_str())) {
            // Little cores alone: those of the fastest cluster.
            0 => self.clusters.first().map_or(1, |cluster| cluster.count),
            big => big,
        }
    }

    /// Reads and checks a device file; `file` is what errors call it.
    ///
    /// # Errors
    /// The first fault: the file, the key, what was found there and what was expected.
    pub fn parse(file: &str, text: &str) -> Result<Self, TargetError> {
        let mut root = Reader::open(file, text)?;
        let target = Self {
            name: root.text("name")?,
            aliases: root.optional("aliases", Reader::texts)?.unwrap_or_default(),
            description: root.text("description")?,
            triple: root.text("triple")?,
            os: root.one_of("os", Os::ALL)?,
            abi: root.text("abi")?,
            isa: root.several_of("isa", Isa::ALL)?,
            clusters: root.tables("cluster")?.into_iter().map(read_cluster).collect::<Result<_, _>>()?,
            ram_mib: root.integer("ram_mib", 1..=1 << 20)?,
            bandwidth_gbs: root.number("bandwidth_gbs", 0.1..=10_000.0)?,
            evidence: read_evidence(root.table("evidence")?)?,
        };
        target.check_names(&root)?;
        target.check_platform(&root)?;
        if target.clusters.is_empty() {
            return Err(root.fault("cluster", "no cluster", "at least one [[cluster]]"));
        }
        for key in &target.evidence.unverified {
            if !root.was_read(key) {
                return Err(root.fault("evidence.unverified", format!("`{key}`"), "keys of this file"));
            }
        }
        root.finish()?;
        Ok(target)
    }

    /// Names become folder names, so they are kept plain.
    fn check_names(&self, root: &Reader) -> Result<(), TargetError> {
        let plain = |name: &str| {
            name.starts_with(|c: char| c.is_ascii_alphanumeric())
                && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c))
        };
        let fields = [("name", &self.name), ("abi", &self.abi), ("triple", &self.triple)];
        let aliases = self.aliases.iter().map(|alias| ("aliases", alias));
        for (key, name) in fields.into_iter().chain(aliases) {
            if !plain(name) {
                return Err(root.fault(key, format!("`{name}`"), "letters a-z, digits, `-`, `_` and `.`"));
            }
        }
        Ok(())
    }

    /// The triple, the operating system and the extensions must speak of the same platform.
    fn check_platform(&self, root: &Reader) -> Result<(), TargetError> {
        let architecture = self.architecture();
        if !["aarch64", "x86_64"].contains(&architecture) {
            return Err(root.fault("triple", format!("`{}`", self.triple), "a triple of aarch64 or x86_64"));
        }
        let android = self.triple.ends_with("-android");
        let matches = match self.os {
            Os::Android => android,
            Os::Linux => !android && self.triple.contains("-linux-"),
        };
        if !matches {
            return Err(root.fault("os", format!("`{}`", self.os), format!("that of `{}`", self.triple)));
        }
        match self.isa.iter().find(|isa| isa.architecture() != architecture) {
            Some(isa) => {
                Err(root.fault("isa", format!("`{isa}`"), format!("an extension of {architecture}")))
            }
            None => Ok(()),
        }
    }
}

fn read_cluster(mut table: Reader) -> Result<Cluster, TargetError> {
    let cluster = Cluster {
        core: table.text("core")?,
        count: table.integer("count", 1..=1024)?,
        ghz: table.optional("ghz", |table, key| table.number(key, 0.01..=10.0))?,
    };
    table.finish()?;
    Ok(cluster)
}

fn read_evidence(mut table: Reader) -> Result<Evidence, TargetError> {
    let evidence = Evidence {
        tier: table.one_of("tier", Tier::ALL)?,
        source: table.text("source")?,
        unverified: table.optional("unverified", Reader::texts)?.unwrap_or_default(),
    };
    table.finish()?;
    Ok(evidence)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        name = "board"
        description = "A board"
        triple = "aarch64-unknown-linux-musl"
        os = "linux"
        abi = "arm64-v8a"
        isa = ["fp16", "dotprod"]
        ram_mib = 8192
        bandwidth_gbs = 17
        [[cluster]]
        core = "cortex-a76"
        count = 4
        ghz = 2.4
        [evidence]
        tier = "datasheet"
        source = "its brief"
        unverified = ["ram_mib"]
    "#;

    #[test]
    fn a_good_file_is_read_in_full() {
        let target = Target::parse("board.toml", GOOD).unwrap();
        assert_eq!(target.isa, [Isa::Fp16, Isa::DotProd]);
        assert_eq!((target.cores(), target.threads()), (4, 4));
        assert_eq!(target.clusters[0].ghz, Some(2.4));
        assert_eq!(target.bandwidth_gbs, 17.0);
        assert_eq!(target.evidence.tier, Tier::Datasheet);
    }

    #[test]
    fn every_fault_names_file_key_found_and_expected() {
        let cases = [
            ("count = 4", "count = 0", "`cluster[0].count`: found 0, expected 1 to 1024"),
            ("count = 4", "", "`cluster[0].count`: found nothing, expected a whole number"),
            ("ghz = 2.4", "ghz = \"fast\"", "`cluster[0].ghz`: found a string, expected a number"),
            ("ghz = 2.4", "ghz = 2.4\nturbo = 3", "`cluster[0].turbo`: found an unknown key, expected"),
            ("ram_mib = 8192", "ram_mib = 8192\nnpu = true", "`npu`: found an unknown key, expected"),
            ("os = \"linux\"", "os = \"beos\"", "`os`: found `beos`, expected one of android, linux"),
            ("os = \"linux\"", "os = \"android\"", "`os`: found `android`, expected that of"),
            ("\"dotprod\"]", "\"avx2\"]", "`isa`: found `avx2`, expected an extension of aarch64"),
            ("\"dotprod\"]", "\"fp16\"]", "`isa`: found `fp16` twice, expected each once"),
            ("\"board\"", "\"../board\"", "`name`: found `../board`, expected letters"),
            ("aarch64-unknown", "vax-unknown", "`triple`: found `vax-unknown-linux-musl`, expected"),
            ("\"datasheet\"", "\"rumor\"", "`evidence.tier`: found `rumor`, expected one of measured"),
            ("[\"ram_mib\"]", "[\"cost\"]", "`evidence.unverified`: found `cost`, expected keys"),
            ("\"its brief\"", "\"\"", "`evidence.source`: found an empty string, expected text"),
            ("bandwidth_gbs = 17", "bandwidth_gbs = nan", "`bandwidth_gbs`: found NaN, expected 0.1"),
        ];
        for (from, to, expected) in cases {
            assert!(GOOD.contains(from), "{from}");
            let error = Target::parse("board.toml", &GOOD.replace(from, to)).unwrap_err().to_string();
            assert!(error.starts_with("board.toml: "), "{error}");
            assert!(error.contains(expected), "{to}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn broken_toml_is_refused_with_its_line() {
        let error = Target::parse("board.toml", "name = \"x\"\nos = = 1").unwrap_err().to_string();
        assert!(error.starts_with("board.toml:2: "), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}
