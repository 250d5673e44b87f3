//! `tlbridge bench register --verbs`: what it costs to let an HCA reach memory, by libibverbs, on whatever HCA there
//! is. docs/register.md says what each row means.
//!
//! What this machine, its device or its library cannot do is a skipped row with a reason; the other rows go on.

mod cell;
mod device;
mod floors;
mod limits;
mod options;
mod report;
mod samples;
mod staging;

pub use options::RegisterArgs;

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde::Serialize;

use crate::stop::Stop;
use cell::Cell;
use device::Hca;
use limits::Limits;
use report::{RegisterResult, Skipped};
use samples::Samples;

/// How memory is made reachable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Its pages are pinned at registration.
    Pinned,
    /// Its pages come when the HCA wants them (explicit on-demand paging).
    OnDemand,
    /// On-demand paging, and the HCA is given the pages before it wants them.
    Prefetched,
    /// One region of the whole address space, on demand.
    Implicit,
    /// Pinned, and kept in a registration cache.
    Cache,
}

impl Mode {
    /// All of them, in the order of the table.
    const ALL: [Self; 5] = [
        Self::Pinned,
        Self::OnDemand,
        Self::Prefetched,
        Self::Implicit,
        Self::Cache,
    ];

    /// For the table.
    fn label(self) -> &'static str {
        match self {
            Self::Pinned => "pinned",
            Self::OnDemand => "on-demand",
            Self::Prefetched => "prefetched",
            Self::Implicit => "implicit",
            Self::Cache => "cache",
        }
    }

    fn needs_on_demand(self) -> bool {
        matches!(self, Self::OnDemand | Self::Prefetched | Self::Implicit)
    }
}

/// How long a cell may take, and how many samples it wants.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    samples: u32,
    budget: Duration,
}

/// Measures and prints the table.
///
/// # Errors
/// Interrupted, nowhere to write to, or the data that the HCA moved was wrong.
pub fn run(args: &RegisterArgs, out: &mut impl Write) -> Result<()> {
    let stop = Stop::new()?;
    stop.on_signals(false)?;
    let begin = Instant::now();
    let effort = match args.quick {
        true => Effort {
            samples: 5,
            budget: Duration::from_millis(300),
        },
        false => Effort {
            samples: args.samples,
            budget: Duration::from_secs_f64(args.budget),
        },
    };
    let sizes = limits::sizes(args)?;
    let limits = Limits::of_this_process();
    let mut result = RegisterResult::new(args, limits);
    let mut modes = match args.modes.as_slice() {
        [] => Mode::ALL.to_vec(),
        named => named.to_vec(),
    };
    modes.sort_unstable();
    modes.dedup();

    let hca = match Hca::open(args) {
        Ok(hca) => Some(hca),
        Err(error) => {
            result.skipped.push(Skipped::everything(format!("{error:#}")));
            None
        }
    };
    if let Some(hca) = &hca {
        result.device = Some(hca.facts.clone());
        modes.retain(|mode| match hca.lacks(*mode) {
            None => true,
            Some(reason) => {
                result.skipped.push(Skipped::mode(*mode, reason));
                false
            }
        });
    }
    for skipped in &result.skipped {
        eprintln!("skipped: {}", skipped.line());
    }

    let mut hca = hca;
    for size in sizes {
        if let Some(reason) = limits.lacks(size) {
            result.skip(Skipped::size(size, reason));
            continue;
        }
        // Floors have all iterations of all modes.
        let mut floors = Samples::default();
        let wanted: &[Option<Mode>] = &match hca {
            Some(_) => modes.iter().copied().map(Some).collect::<Vec<_>>(),
            // Without an HCA there are the floors at least.
            None => vec![None],
        };
        for mode in wanted {
            if stop.requested() {
                bail!("interrupted");
            }
            if let (Some(hca), Some(mode)) = (&hca, mode)
                && let Some(reason) = hca.too_large(size)
            {
                result.skip(Skipped::cell(*mode, size, None, reason));
                continue;
            }
            let mut cell = Cell::new(args, *mode, size);
            let ended = cell.measure(hca.as_mut(), effort, &stop);
            result.verified_bytes += cell.verified_bytes;
            for missing in std::mem::take(&mut cell.skipped) {
                result.skip(missing);
            }
            if let (Err(error), Some(mode)) = (&ended, mode) {
                let reason = limits.explain(error);
                let at = cell.doing();
                result.skip(Skipped::cell(*mode, size, at, reason));
                if let Some(hca) = &mut hca
                    && let Err(error) = hca.reconnect()
                {
                    bail!(
                        "{}: the queue pairs cannot be made again: {error:#}",
                        hca.facts.name
                    );
                }
            } else {
                ended?;
            }
            if stop.requested() {
                bail!("interrupted");
            }
            result.wrong_data.append(&mut cell.wrong);
            floors.append(&cell.samples);
            if let Some(mode) = mode {
                result.add(*mode, size, &cell.samples);
            }
        }
        result.add_floors(size, &floors);
    }
    result.elapsed_ms = begin.elapsed().as_millis() as u64;
    super::print(args.json.as_deref(), &result.json(), || result.table(), out)?;
    if let Some(first) = result.wrong_data.first() {
        bail!(
            "the HCA moved wrong data in {} transfers, first: {first}",
            result.wrong_data.len()
        );
    }
    Ok(())
}
