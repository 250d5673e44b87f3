//! A subscriber that records what it is told and does what the test wants.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use host::notifier::{Again, Ctx, NotifierRange, Subscriber};

/// What happened, in order, over all mocks of a test.
pub type Log = Arc<Mutex<Vec<(&'static str, &'static str)>>>;

type Hook = Box<dyn Fn(&NotifierRange, Ctx<'_>) + Send + Sync>;

/// The mock.
pub struct Mock {
    name: &'static str,
    sleeping: bool,
    /// Refuse starts in contexts that must not sleep.
    pub refuses: AtomicBool,
    /// Refuse blockable starts too: a bug.
    pub broken: AtomicBool,
    log: Log,
    on_start: Option<Hook>,
    on_end: Option<Hook>,
    on_release: Option<Box<dyn Fn() + Send + Sync>>,
}

impl Mock {
    /// A well-behaved one.
    pub fn new(name: &'static str, sleeping: bool, log: &Log) -> Self {
        Self {
            name,
            sleeping,
            refuses: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            log: log.clone(),
            on_start: None,
            on_end: None,
            on_release: None,
        }
    }

    /// Runs inside a start, before it is logged.
    pub fn on_start(mut self, hook: impl Fn(&NotifierRange, Ctx<'_>) + Send + Sync + 'static) -> Self {
        self.on_start = Some(Box::new(hook));
        self
    }

    /// Runs inside an end, before it is logged.
    pub fn on_end(mut self, hook: impl Fn(&NotifierRange, Ctx<'_>) + Send + Sync + 'static) -> Self {
        self.on_end = Some(Box::new(hook));
        self
    }

    /// Runs inside a release, before it is logged.
    pub fn on_release(mut self, hook: impl Fn() + Send + Sync + 'static) -> Self {
        self.on_release = Some(Box::new(hook));
        self
    }

    /// Refuses what it may refuse.
    pub fn refusing(self) -> Self {
        self.refuses.store(true, Ordering::Relaxed);
        self
    }

    fn log(&self, what: &'static str) {
        self.log.lock().unwrap().push((self.name, what));
    }
}

impl Subscriber for Mock {
    fn name(&self) -> &'static str {
        self.name
    }
    fn sleeping(&self) -> bool {
        self.sleeping
    }
    fn invalidate_range_start(&self, range: &NotifierRange, ctx: Ctx<'_>) -> Result<(), Again> {
        if let Some(hook) = &self.on_start {
            hook(range, ctx);
        }
        let may_refuse = matches!(ctx, Ctx::NonSleeping(_)) && self.refuses.load(Ordering::Relaxed);
        if may_refuse || self.broken.load(Ordering::Relaxed) {
            self.log("refused");
            return Err(Again);
        }
        self.log("start");
        Ok(())
    }
    fn invalidate_range_end(&self, range: &NotifierRange, ctx: Ctx<'_>) {
        if let Some(hook) = &self.on_end {
            hook(range, ctx);
        }
        self.log("end");
    }
    fn release(&self) {
        if let Some(hook) = &self.on_release {
            hook();
        }
        self.log("release");
    }
}

/// What has been logged since the last time.
pub fn take(log: &Log) -> Vec<(&'static str, &'static str)> {
    std::mem::take(&mut log.lock().unwrap())
}
