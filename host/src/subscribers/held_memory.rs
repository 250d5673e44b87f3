//! Sleeping subscriber of an address space whose device holds pages: see [`crate::session::held`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::mm::VmaSource;
use crate::notifier::{Again, Ctx, Event, NotifierRange, Subscriber};
use crate::session::held::{Discard, HeldPages};
use crate::session::identity::FileId;

/// What runs between a start and its end, by range: two calls on one range may overlap.
type Running = HashMap<(u64, u64), Vec<Vec<Discard>>>;

/// Unmaps held pages before they are discarded.
///
/// Registered after the device's own subscriber, so no translation of the range is left when its pages go.
pub struct HeldMemory {
    held: Arc<HeldPages>,
    source: Arc<dyn VmaSource>,
    running: Mutex<Running>,
}

impl std::fmt::Debug for HeldMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeldMemory")
            .field("held", &self.held)
            .finish_non_exhaustive()
    }
}

impl HeldMemory {
    /// For the address space that `source` describes.
    #[must_use]
    pub fn new(held: Arc<HeldPages>, source: Arc<dyn VmaSource>) -> Arc<Self> {
        Arc::new(Self {
            held,
            source,
            running: Mutex::default(),
        })
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// `[start, end)` of the address space is about to be discarded.
    #[must_use]
    pub fn begin(&self, start: u64, end: u64) -> Vec<Discard> {
        let mut discards = Vec::new();
        let mut va = start;
        while va < end {
            match self.source.query_from(va) {
                // The kernel ends a discard at the first hole for some kinds, and goes on behind it for others.
                Ok(Some(vma)) if vma.start < end => {
                    let (start, stop) = (va.max(vma.start), vma.end.min(end));
                    if vma.shared {
                        let offset = vma.offset_of(start);
                        let id = FileId {
                            dev: vma.dev,
                            ino: vma.inode,
                        };
                        discards.push(self.held.begin_discard(id, offset, offset + (stop - start)));
                    }
                    va = stop;
                }
                Ok(_) => break,
                // The process is gone: nobody is left to discard or to be faulted for.
                Err(error) => {
                    tracing::debug!(va, %error, "the address space cannot be asked");
                    break;
                }
            }
        }
        discards
    }

    /// They are over.
    pub fn end(&self, discards: Vec<Discard>) {
        self.held.end_discard(discards);
    }
}

impl Subscriber for HeldMemory {
    fn name(&self) -> &'static str {
        "held memory"
    }

    fn sleeping(&self) -> bool {
        true
    }

    fn invalidate_range_start(&self, range: &NotifierRange, ctx: Ctx<'_>) -> Result<(), Again> {
        if !matches!(ctx, Ctx::MaySleep(_)) {
            // S9: what is mapped there is not known without asking.
            return Err(Again);
        }
        // Only discards take pages from a file. The whole space is the safety net's, which says afterwards which
        // range it was.
        if range.event == Event::Clear && range.end != u64::MAX {
            let discards = self.begin(range.start, range.end);
            self.running()
                .entry((range.start, range.end))
                .or_default()
                .push(discards);
        }
        Ok(())
    }

    fn invalidate_range_end(&self, range: &NotifierRange, _ctx: Ctx<'_>) {
        if range.event != Event::Clear || range.end == u64::MAX {
            return;
        }
        let key = (range.start, range.end);
        let mut running = self.running();
        let ended = running.get_mut(&key).and_then(Vec::pop);
        if running.get(&key).is_some_and(Vec::is_empty) {
            running.remove(&key);
        }
        drop(running);
        self.end(ended.unwrap_or_default());
    }

    fn release(&self) {
        let running = std::mem::take(&mut *self.running());
        self.end(running.into_values().flatten().flatten().collect());
    }
}
