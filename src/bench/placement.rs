//! Which processor each process of the benchmark runs on.
//!
//! What a wake costs depends on where the one that is woken runs: on the waker's processor it is a context
//! switch, on another one that is idle it is an interrupt to a processor in an idle state, which takes several times
//! as long on a virtual machine. The kernel chooses, and chooses differently from run to run. So rows that wake
//! somebody are measured in fixed placements too, each against a floor in the same placement.
#![allow(unsafe_code, reason = "sched_setscheduler")]

use anyhow::{Context, Result, ensure};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::{Deserialize, Serialize};

/// Where the processes run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// Where the kernel puts them.
    Free,
    /// All on one processor.
    OneProcessor,
    /// Application and daemon on one processor, the device on another one.
    DeviceApart,
}

impl Placement {
    /// For the table.
    pub fn label(self) -> &'static str {
        match self {
            Self::Free => "",
            Self::OneProcessor => "one processor",
            Self::DeviceApart => "device apart",
        }
    }

    /// Processors of the application and the daemon, and of the device, out of those that this thread may use.
    /// `None`: the kernel's choice.
    ///
    /// # Errors
    /// There are not enough.
    pub fn processors(self, allowed: &CpuSet) -> Result<Option<(usize, usize)>> {
        let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
        let here = cpus.next().context("this thread may run nowhere")?;
        match self {
            Self::Free => Ok(None),
            Self::OneProcessor => Ok(Some((here, here))),
            Self::DeviceApart => {
                let there = cpus
                    .next()
                    .context("needs two processors, this process may use one")?;
                Ok(Some((here, there)))
            }
        }
    }
}

/// The processors that this thread may use.
///
/// # Errors
/// The system call's.
pub fn allowed() -> Result<CpuSet> {
    sched_getaffinity(None).context("sched_getaffinity")
}

/// Restricts this thread, and the processes and threads that it starts from now on, to one processor.
///
/// # Errors
/// It may not run there.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).with_context(|| format!("cannot pin this thread to CPU {cpu}"))
}

/// Makes this thread, and the processes and threads that it starts from now on, wait for their turn when they are
/// woken (SCHED_BATCH), wherever they share a processor: whether the one that is woken preempts its waker depends on
/// what both used before, and moves a round trip by 5%. Needs no privilege.
///
/// # Errors
/// The system call's.
pub fn wait_for_ones_turn() -> Result<()> {
    // SAFETY: sched_param is plain data; zeros are the only priority of SCHED_BATCH.
    let param: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: the structure lives on this stack.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const param) };
    ensure!(
        result == 0,
        "cannot use SCHED_BATCH: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

/// Undoes [`pin`] when dropped.
#[derive(Debug)]
pub struct Unpin(CpuSet);

impl Unpin {
    /// Remembers the processors of now.
    ///
    /// # Errors
    /// See [`allowed`].
    pub fn later() -> Result<Self> {
        allowed().map(Self)
    }

    /// The processors as they were.
    pub fn allowed(&self) -> &CpuSet {
        &self.0
    }
}

impl Drop for Unpin {
    fn drop(&mut self) {
        // They were allowed before.
        let _ = sched_setaffinity(None, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_processors_when_there_is_only_one_refuse_a_device_apart() {
        let mut one = CpuSet::new();
        one.set(3);
        assert_eq!(Placement::OneProcessor.processors(&one).unwrap(), Some((3, 3)));
        assert_eq!(Placement::Free.processors(&one).unwrap(), None);
        let error = Placement::DeviceApart.processors(&one).unwrap_err();
        assert!(error.to_string().contains("two processors"), "{error}");
        one.set(5);
        assert_eq!(Placement::DeviceApart.processors(&one).unwrap(), Some((3, 5)));
    }
}
