//! Other programs that want every processor: what a wait costs that gives the processor away, when somebody takes it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::thread::CpuSet;
use serde_json::json;

use super::placement::{Unpin, pin};
use crate::cli::HogArgs;
use crate::demo::args;
use crate::stop::{self, Stop};
use crate::supervise::{START_LIMIT, Service};

/// One such program: computes on one processor until it is told to end, or its supervisor does.
///
/// # Errors
/// It may not run there.
pub fn run(args: &HogArgs) -> Result<()> {
    let stop = Stop::new()?;
    stop.on_signals(true)?;
    stop::obey(&stop, |_| json!({}))?;
    pin(args.cpu)?;
    let ended = Arc::new(AtomicBool::new(false));
    let computing = {
        let ended = Arc::clone(&ended);
        std::thread::Builder::new()
            .name("hog".into())
            .spawn(move || while !ended.load(Ordering::Relaxed) {})
            .context("thread")?
    };
    stop::say(&json!({ "ready": {} }));
    while !stop.wait_for(Duration::from_secs(3600)) {}
    ended.store(true, Ordering::Relaxed);
    computing.join().expect("it only counts");
    Ok(())
}

/// One for each processor that this thread may use; they end with this value.
#[derive(Debug)]
pub struct Hogs {
    _services: Vec<Service>,
}

impl Hogs {
    /// Starts them.
    ///
    /// # Errors
    /// A process cannot be started.
    pub fn start(stop: &Stop) -> Result<Self> {
        let here = Unpin::later()?;
        let services = (0..CpuSet::MAX_CPU)
            .filter(|cpu| here.allowed().is_set(*cpu))
            .map(|cpu| {
                let mut service = Service::start("hog", args!["bench-hog", "--cpu", cpu.to_string()])?;
                service.expect("ready", START_LIMIT, stop)?;
                Ok(service)
            })
            .collect::<Result<_>>()?;
        Ok(Self { _services: services })
    }
}
