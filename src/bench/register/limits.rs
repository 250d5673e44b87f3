//! What sizes are measured, and what this machine lets a process have.

use anyhow::{Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;

use super::options::RegisterArgs;
use crate::bench::report::size;

/// The smallest and largest size without flags.
const SIZES: (u64, u64) = (4 << 10, 1 << 30);
/// The largest one of a quick run.
const QUICK: u64 = 1 << 20;
/// Beside the buffers of a size: staging, sink, page tables, the rest of the program.
const BESIDE: u64 = 192 << 20;

/// The sizes that are asked for, each four times the one before.
///
/// # Errors
/// None is left.
pub fn sizes(args: &RegisterArgs) -> Result<Vec<u64>> {
    let page = verbs::page_size() as u64;
    if !args.sizes.is_empty() {
        for bytes in &args.sizes {
            ensure!(
                *bytes > 0 && bytes.is_multiple_of(page),
                "--size {bytes}: sizes are multiples of a page, {page} bytes"
            );
        }
        return Ok(args.sizes.clone());
    }
    let largest = if args.quick { QUICK } else { SIZES.1 };
    let (from, to) = (args.min_size.unwrap_or(SIZES.0), args.max_size.unwrap_or(largest));
    let step = if args.quick { 4 } else { 2 };
    let sizes: Vec<u64> = (SIZES.0.trailing_zeros()..=to.max(1).ilog2())
        .step_by(step)
        .map(|power| 1 << power)
        .filter(|bytes| (from..=to).contains(bytes) && bytes.is_multiple_of(page))
        .collect();
    ensure!(
        !sizes.is_empty(),
        "no size from --min-size {from} to --max-size {to}: sizes are 4 KiB times a power of {}",
        1 << step
    );
    Ok(sizes)
}

/// Limits of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// What the kernel can still give without swapping.
    pub memory_available_bytes: Option<u64>,
    /// RLIMIT_MEMLOCK; `None`: unlimited. It does not hold for CAP_IPC_LOCK.
    pub memlock_limit_bytes: Option<u64>,
}

impl Limits {
    /// After raising RLIMIT_MEMLOCK as far as anybody may.
    pub fn of_this_process() -> Self {
        let Rlimit { maximum, .. } = getrlimit(Resource::Memlock);
        let raised = Rlimit {
            current: maximum,
            maximum,
        };
        // What it is afterwards is reported.
        let _ = setrlimit(Resource::Memlock, raised);
        Self {
            memory_available_bytes: std::fs::read_to_string("/proc/meminfo")
                .ok()
                .and_then(|text| available(&text)),
            memlock_limit_bytes: getrlimit(Resource::Memlock).current,
        }
    }

    /// Why there is not enough memory for a size.
    pub fn lacks(&self, bytes: u64) -> Option<String> {
        // The registered buffer, and that of the floors.
        let needed = bytes.saturating_mul(2).saturating_add(BESIDE);
        let available = self.memory_available_bytes?;
        (needed > available).then(|| {
            format!(
                "takes {} of memory, {} are available",
                size(needed),
                size(available)
            )
        })
    }

    /// An error, with the limit that it may come from.
    pub fn explain(&self, error: &anyhow::Error) -> String {
        let no_memory = error
            .chain()
            .filter_map(|e| e.downcast_ref::<verbs::Error>())
            .any(|e| e.errno() == Some(libc::ENOMEM));
        match self.memlock_limit_bytes {
            Some(limit) if no_memory => format!(
                "{error:#} (RLIMIT_MEMLOCK is {}: `ulimit -l`, or CAP_IPC_LOCK)",
                size(limit)
            ),
            _ => format!("{error:#}"),
        }
    }
}

/// MemAvailable of /proc/meminfo, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{BenchCommand, Cli, Command};
    use clap::Parser;

    fn args(rest: &[&str]) -> RegisterArgs {
        let words = [&["tlbridge", "bench", "register", "--verbs"], rest].concat();
        match Cli::parse_from(words).command {
            Some(Command::Bench(BenchCommand::Register(args))) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn test_sizes_when_limited_are_within_the_limits() {
        let all = sizes(&args(&[])).unwrap();
        assert_eq!((all.len(), all[0], all[1], all[9]), (10, 4096, 16_384, 1 << 30));
        assert_eq!(sizes(&args(&["--quick"])).unwrap(), [4096, 65_536, 1 << 20]);
        let some = sizes(&args(&["--min-size", "1M", "--max-size", "20M"])).unwrap();
        assert_eq!(some, [1 << 20, 4 << 20, 16 << 20]);
        let one = sizes(&args(&["--size", "12K", "--size", "1G"])).unwrap();
        assert_eq!(one, [12 << 10, 1 << 30]);
        assert!(sizes(&args(&["--size", "1000"])).is_err());
        assert!(sizes(&args(&["--min-size", "2M", "--max-size", "3M"])).is_err());
    }

    #[test]
    fn test_limits_when_too_small_say_what_is_missing() {
        let limits = Limits {
            memory_available_bytes: available("MemTotal: 9 kB\nMemAvailable:    1048576 kB\n"),
            memlock_limit_bytes: Some(8 << 20),
        };
        assert_eq!(limits.memory_available_bytes, Some(1 << 30));
        assert_eq!(limits.lacks(256 << 20), None);
        assert!(limits.lacks(1 << 30).unwrap().contains("1 GiB are available"));
        let error = |code| {
            anyhow::Error::from(verbs::Error::Call {
                call: "ibv_reg_mr".into(),
                error: std::io::Error::from_raw_os_error(code),
            })
        };
        let explained = limits.explain(&error(libc::ENOMEM));
        assert!(explained.contains("RLIMIT_MEMLOCK is 8 MiB"), "{explained}");
        assert!(!limits.explain(&error(libc::EINVAL)).contains("RLIMIT"));
    }
}
