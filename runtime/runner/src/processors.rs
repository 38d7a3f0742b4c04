//! Which processors a model runs on: of those that this process may use, the big cores.
//!
//! A token is as late as its slowest thread, so a thread on a little core costs time instead of saving it. Linux and
//! Android tell how fast each core is; where nothing is told, all count as equal. Nothing here moves a thread unless
//! [`Processors::pin`] is called.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::OnceLock;

/// Where Linux describes its processors (Linux `Documentation/ABI/testing/sysfs-devices-system-cpu`).
const SYSTEM: &str = "/sys/devices/system/cpu";

/// Processors by their number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Processors {
    /// Those that this process may use; empty where the system does not tell.
    pub allowed: Vec<usize>,
    /// The big cores among them; never empty unless `allowed` is.
    pub big: Vec<usize>,
}

impl Processors {
    /// Those of this process, as they were when it first asked.
    pub fn here() -> &'static Self {
        static HERE: OnceLock<Processors> = OnceLock::new();
        HERE.get_or_init(|| Self::at(Path::new(SYSTEM), system::allowed()))
    }

    /// Those of `allowed`, as `folder` describes them in Linux's manner.
    ///
    /// Big is what has half the capacity of the largest at least: the kernel's own measure, by which little cores
    /// have less than that and middle ones more. Where it is missing, what has four fifths of the highest
    /// clock: little cores have three quarters at most of what the big ones beside them have.
    pub fn at(folder: &Path, allowed: Vec<usize>) -> Self {
        let measured = |file: &str, numerator: u64, denominator: u64| {
            let speeds = allowed.iter().map(|cpu| number(&folder.join(format!("cpu{cpu}/{file}"))));
            // One that is silent could be of either kind.
            let speeds: Vec<u64> = speeds.collect::<Option<_>>()?;
            let least = u128::from(*speeds.iter().max()?) * u128::from(numerator);
            let big = |speed: u64| u128::from(speed) * u128::from(denominator) >= least;
            Some(allowed.iter().zip(&speeds).filter(|(_, speed)| big(**speed)).map(|(cpu, _)| *cpu).collect())
        };
        let big = measured("cpu_capacity", 1, 2).or_else(|| measured("cpufreq/cpuinfo_max_freq", 4, 5));
        Self { big: big.unwrap_or_else(|| allowed.clone()), allowed }
    }

    /// Threads that a model should have if nobody says otherwise: as many as there are big cores, and no more than
    /// the system gives time to.
    pub fn threads(&self) -> usize {
        match self.big.len() {
            0 => most_threads(),
            big => big.min(most_threads()),
        }
    }

    /// Keeps the calling thread, and those that it starts from now on, on the big cores, if there are others and
    /// `threads` threads find room on them. Answers whether that was so.
    ///
    /// # Errors
    /// What the system says if it does not like that.
    pub fn pin(&self, threads: usize) -> io::Result<bool> {
        if threads > self.big.len() || self.big.len() == self.allowed.len() {
            return Ok(false);
        }
        system::pin(&self.big).map(|()| true)
    }
}

/// Threads that can run at the same time: more would only take turns.
pub fn most_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The positive number that a file of the system holds.
fn number(path: &Path) -> Option<u64> {
    let mut text = String::new();
    File::open(path).ok()?.take(32).read_to_string(&mut text).ok()?;
    text.trim_end().parse().ok().filter(|number| *number > 0)
}

#[cfg(any(target_os = "linux", target_os = "android"))]
mod system {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    use std::io;

    pub(super) fn allowed() -> Vec<usize> {
        let set = sched_getaffinity(None);
        set.map_or(Vec::new(), |set| (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect())
    }

    pub(super) fn pin(processors: &[usize]) -> io::Result<()> {
        let mut set = CpuSet::new();
        processors.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU).for_each(|cpu| set.set(*cpu));
        Ok(sched_setaffinity(None, &set)?)
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
mod system {
    use std::io;

    pub(super) fn allowed() -> Vec<usize> {
        Vec::new()
    }

    pub(super) fn pin(_: &[usize]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A folder as Linux has it, with one file for each processor.
    fn tree(files: &[(usize, &str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (cpu, file, text) in files {
            let path = folder.path().join(format!("cpu{cpu}")).join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    fn big(files: &[(usize, &str, &str)], allowed: &[usize]) -> Vec<usize> {
        let found = Processors::at(tree(files).path(), allowed.into());
        assert_eq!(found.allowed, allowed);
        found.big
    }

    #[test]
    fn capacity_tells_the_big_cores() {
        // Snapdragon 855: four little, three big, one prime.
        let capacities = ["378", "378", "378", "378", "871", "871", "871", "1024"];
        let files: Vec<_> =
            capacities.iter().enumerate().map(|(cpu, text)| (cpu, "cpu_capacity", *text)).collect();
        assert_eq!(big(&files, &[0, 1, 2, 3, 4, 5, 6, 7]), [4, 5, 6, 7]);
        // What the process may not use does not count, nor set the measure.
        assert_eq!(big(&files, &[0, 2, 4]), [4]);
        assert_eq!(big(&files, &[0, 1, 2]), [0, 1, 2]);
        assert!(big(&files, &[]).is_empty());
    }

    #[test]
    fn clocks_tell_where_capacities_do_not() {
        let clock = "cpufreq/cpuinfo_max_freq";
        // RK3588, with a newline as the kernel writes it.
        let mut files = vec![(0, clock, "1800000\n"), (1, clock, "2400000\n"), (2, clock, "2352000\n")];
        assert_eq!(big(&files, &[0, 1, 2]), [1, 2]);
        // A capacity of one processor alone compares it with nothing.
        files.push((0, "cpu_capacity", "1024"));
        assert_eq!(big(&files, &[0, 1, 2]), [1, 2]);
        assert_eq!(big(&files[..2], &[0, 1, 2]), [0, 1, 2]);
    }

    #[test]
    fn nonsense_counts_as_nothing_told() {
        let long = "9".repeat(1 << 16);
        for text in ["", "fast", "-3", "0", "1e3", "12 34", "\0", &long, "99999999999999999999"] {
            let files = [(0, "cpu_capacity", "1024"), (1, "cpu_capacity", text)];
            assert_eq!(big(&files, &[0, 1]), [0, 1], "{}", text.len());
        }
        let files = [(0, "cpu_capacity", "18446744073709551615"), (1, "cpu_capacity", "1")];
        assert_eq!(big(&files, &[0, 1]), [0]);
        // A folder in place of the file, and no folder at all.
        assert_eq!(big(&[(0, "cpu_capacity/x", "1"), (1, "cpu_capacity", "1")], &[0, 1]), [0, 1]);
        assert_eq!(Processors::at(Path::new("/nowhere"), vec![3]).big, [3]);
    }

    #[test]
    fn threads_are_pinned_only_where_there_is_a_choice_and_room() {
        let here = Processors::here();
        assert!((1..=most_threads()).contains(&here.threads()));
        let both = Processors { allowed: vec![0, 1], big: vec![0, 1] };
        assert!(!both.pin(1).unwrap(), "no other cores");
        let one = Processors { allowed: vec![0, 1], big: vec![1] };
        assert!(!one.pin(2).unwrap(), "no room");
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    #[test]
    fn a_pinned_thread_and_what_it_starts_stay_on_the_big_cores() {
        std::thread::spawn(|| {
            let allowed = system::allowed();
            let Some((last, [_, ..])) = allowed.split_last() else {
                return eprintln!("SKIPPED: one processor leaves no choice");
            };
            let one = Processors { big: vec![*last], allowed: allowed.clone() };
            assert!(one.pin(1).unwrap());
            assert_eq!(system::allowed(), one.big);
            assert_eq!(std::thread::spawn(system::allowed).join().unwrap(), one.big);
        })
        .join()
        .unwrap();
    }
}
