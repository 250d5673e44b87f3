//! The driver's counters: /proc/sgi_uv/gru.

use std::fs;

use anyhow::{Context, Result};

use crate::Outcome;

const DIRECTORY: &str = "/proc/sgi_uv/gru";
/// Bit 1 of debug_options: count.
const COUNT: &str = "2";

/// Has the driver count.
///
/// # Errors
/// No driver.
pub fn switch_on() -> Result<()> {
    let path = format!("{DIRECTORY}/debug_options");
    fs::write(&path, COUNT).with_context(|| format!("{path}: is gru.ko loaded?"))
}

fn file(name: &str) -> Result<String> {
    let path = format!("{DIRECTORY}/{name}");
    fs::read_to_string(&path).with_context(|| path)
}

/// One of the counters.
///
/// # Errors
/// There is none of that name.
pub fn counter(name: &str) -> Result<u64> {
    file("statistics")?
        .lines()
        .filter_map(|line| line.trim().split_once(' '))
        .find(|(_, counted)| *counted == name)
        .and_then(|(number, _)| number.parse().ok())
        .with_context(|| format!("no counter {name} in {DIRECTORY}/statistics"))
}

/// Figures of a kind of operation on handles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// How often.
    pub count: u64,
    /// Nanoseconds (the file's heading says clocks).
    pub average: u64,
    /// Nanoseconds.
    pub longest: u64,
}

/// The driver's figures of one kind of operation.
///
/// # Errors
/// There is none of that name.
pub fn operation(name: &str) -> Result<Operation> {
    file("mcs_statistics")?
        .lines()
        .find_map(|line| {
            let mut fields = line.split_whitespace();
            (fields.next()? == name).then_some(())?;
            let mut next = || fields.next()?.parse().ok();
            Some(Operation {
                count: next()?,
                average: next()?,
                longest: next()?,
            })
        })
        .with_context(|| format!("no operation {name} in {DIRECTORY}/mcs_statistics"))
}

/// Has the driver count operations from 0.
///
/// # Errors
/// No driver.
pub fn forget_operations() -> Result<()> {
    let path = format!("{DIRECTORY}/mcs_statistics");
    fs::write(&path, "0").with_context(|| path)
}

/// Prints `statistic NAME VALUE` for each, and `operation NAME COUNT AVERAGE-NS LONGEST-NS` for the handles.
pub fn print() -> Outcome {
    let mut lines = 0;
    for line in file("statistics")?.lines() {
        if let Some((number, name)) = line.trim().split_once(' ') {
            println!("statistic {name} {number}");
            lines += 1;
        }
    }
    for line in file("mcs_statistics")?.lines().skip(1) {
        let fields: Vec<_> = line.split_whitespace().collect();
        println!("operation {}", fields.join(" "));
        lines += 1;
    }
    Ok(format!("{lines} counters"))
}
