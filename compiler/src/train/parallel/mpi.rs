//! Processes that `mpirun` started, on one machine or several.
//!
//! MPI ends all processes when one of them dies or cannot be reached, so nothing here can fail. It is called from
//! one thread only.

use std::collections::hash_map::DefaultHasher;
use std::fmt;
use std::hash::{Hash, Hasher};

use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator as _, CommunicatorCollectives, Root};

use super::Communicator;

/// Values that travel at once: MPI counts with 32 bits, and the sum needs as much room again.
const CHUNK: usize = 1 << 20;

/// The processes of one `mpirun`. Dropping it waits for all of them.
pub struct Mpi {
    world: SimpleCommunicator,
    /// Last, so that it outlives the communicator.
    _universe: Universe,
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mpi({} of {})", self.world.rank(), self.world.size())
    }
}

impl Mpi {
    /// Joins the other processes; `None` if this one has done so before.
    pub fn join() -> Option<Self> {
        let (universe, _) = mpi::initialize_with_threading(Threading::Funneled)?;
        Some(Self { world: universe.world(), _universe: universe })
    }

    /// Threads for this process, so that each processor has one: those that it may run on, divided by the
    /// processes that may run on the same (`mpirun` binds to processors, unless told `--bind-to none`).
    pub fn threads(&self) -> usize {
        let mine = std::fs::read_to_string("/proc/self/status").ok().and_then(|status| {
            status.lines().find(|line| line.starts_with("Cpus_allowed:")).map(str::to_owned)
        });
        let mut hash = DefaultHasher::new();
        mine.hash(&mut hash);
        let mine = hash.finish();
        let host = self.host();
        let mut all = vec![0u64; host.size() as usize];
        host.all_gather_into(&mine, &mut all[..]);
        let sharing = all.iter().filter(|other| **other == mine).count();
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        (processors / sharing.max(1)).max(1)
    }

    /// The processes of this machine.
    fn host(&self) -> SimpleCommunicator {
        self.world.split_shared(self.world.rank())
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn local_rank(&self) -> usize {
        self.host().rank() as usize
    }

    fn all_reduce(&self, values: &mut [f32]) {
        let mut sums = vec![0f32; values.len().min(CHUNK)];
        for chunk in values.chunks_mut(CHUNK) {
            let sums = &mut sums[..chunk.len()];
            self.world.all_reduce_into(&*chunk, sums, SystemOperation::sum());
            chunk.copy_from_slice(sums);
        }
    }

    fn broadcast(&self, values: &mut [f32]) {
        for chunk in values.chunks_mut(CHUNK) {
            self.world.process_at_rank(0).broadcast_into(chunk);
        }
    }

    fn broadcast_bytes(&self, bytes: &mut Vec<u8>) {
        let mut length = bytes.len() as u64;
        self.world.process_at_rank(0).broadcast_into(&mut length);
        bytes.resize(length as usize, 0);
        for chunk in bytes.chunks_mut(CHUNK) {
            self.world.process_at_rank(0).broadcast_into(chunk);
        }
    }

    fn abort(&self) {
        self.world.abort(1);
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // The others would wait for a process that is not coming.
        if std::thread::panicking() {
            self.world.abort(101);
        }
    }
}
