//! The driver's own tests.

use anyhow::{Context, Result, ensure};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::Outcome;
use crate::driver::{Gru, unknown_ioctl};

/// 0: load and store. 1: message queue. 2: completion interrupts. 3: copy. 99: unload the kernel's contexts.
const TESTS: [u64; 5] = [0, 1, 2, 3, 99];

/// Moves the thread to that processor.
///
/// # Errors
/// There is no such processor.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).with_context(|| format!("moving to CPU {cpu}"))
}

pub fn run(gru: &Gru, rounds: u64) -> Outcome {
    let config = gru.config().context("GRU_GET_CONFIG_INFO")?;
    ensure!(config.blades == 1 && config.chiplets == 2, "{config:?}");
    let cpus = config.cpus as usize;
    for round in 0..rounds {
        for cpu in 0..cpus {
            pin(cpu)?;
            for test in TESTS {
                let result = gru
                    .ktest(test)
                    .with_context(|| format!("test {test}, round {round}, CPU {cpu} (details: dmesg)"))?;
                ensure!(
                    result == 0,
                    "test {test}, round {round}, CPU {cpu} returned {result}"
                );
            }
        }
    }
    let invalid = gru.ktest(4).err();
    ensure!(
        invalid == Some(rustix::io::Errno::INVAL),
        "test 4 does not exist: {invalid:?}"
    );
    let unknown = unknown_ioctl(gru).err().and_then(|e| e.raw_os_error());
    ensure!(unknown == Some(libc::EBADRQC), "an unknown ioctl: {unknown:?}");
    Ok(format!("{rounds} rounds of 0, 1, 2, 3 and 99 on {cpus} CPUs"))
}
