//! Several processes that `mpirun` has started to train together.

use std::rc::Rc;

use anyhow::bail;
use edgec::train::Accelerator;
use edgec::train::parallel::{Alone, Communicator};

/// Runs `body` with the processes that were started together; an error in one of them ends all.
pub fn together(body: impl FnOnce(Rc<dyn Communicator>) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let processes = join(started())?;
    let outcome = body(processes.clone());
    if let Err(error) = &outcome
        && processes.size() > 1
    {
        eprintln!("edgec: process {}: {}", processes.rank(), super::one_line(error));
        processes.abort();
    }
    outcome
}

/// Refuses to be one of several processes, which would do the same in one folder.
pub fn alone(command: &str) -> anyhow::Result<()> {
    match started() {
        Some(size) if size > 1 => bail!("{command} is for one process, {size} were started"),
        _ => Ok(()),
    }
}

/// Chooses the device of each process: of several on a machine each has a GPU of its own, unless a number was given.
pub fn choose(device: Accelerator, processes: &dyn Communicator) -> anyhow::Result<()> {
    if let Some(name) = device.choose(processes.local_rank())?
        && processes.rank() == 0
    {
        super::progress::note("device", &format!("large matrix products of training go to {name}"));
    }
    Ok(())
}

/// How many processes the variables of Open MPI or of MPICH and its kin say there are.
fn started() -> Option<usize> {
    let size = |name| std::env::var(name).ok()?.parse().ok();
    size("OMPI_COMM_WORLD_SIZE").or_else(|| size("PMI_SIZE"))
}

#[cfg(feature = "mpi")]
fn join(started: Option<usize>) -> anyhow::Result<Rc<dyn Communicator>> {
    use anyhow::Context;
    use edgec::train::parallel::Mpi;

    if started.is_none() {
        return Ok(Rc::new(Alone));
    }
    let processes = Mpi::join().context("MPI was started before")?;
    if std::env::var_os("RAYON_NUM_THREADS").is_none() {
        rayon::ThreadPoolBuilder::new().num_threads(processes.threads()).build_global()?;
    }
    if processes.size() != started.unwrap_or(1) {
        bail!("{} processes in MPI, {} were started", processes.size(), started.unwrap_or(1));
    }
    if processes.rank() == 0 {
        let (size, threads) = (processes.size(), rayon::current_num_threads());
        super::progress::note("mpi", &format!("{size} processes, {threads} threads in this one"));
    }
    Ok(Rc::new(processes))
}

#[cfg(not(feature = "mpi"))]
fn join(started: Option<usize>) -> anyhow::Result<Rc<dyn Communicator>> {
    match started {
        Some(size) if size > 1 => {
            bail!(
                "started as one of {size} processes, but this program was built without MPI (--features mpi)"
            )
        }
        _ => Ok(Rc::new(Alone)),
    }
}

#[cfg(all(test, not(feature = "mpi")))]
mod tests {
    use super::*;

    /// Processes that do not know of each other would spoil one folder.
    #[test]
    fn without_mpi_several_processes_are_refused() {
        assert_eq!(join(None).unwrap().size(), 1);
        assert_eq!(join(Some(1)).unwrap().size(), 1);
        let error = join(Some(2)).unwrap_err().to_string();
        assert!(error.contains("one of 2 processes") && error.contains("--features mpi"), "{error}");
    }
}
