//! The demo's "physical memory": pages of one memfd, handed out in frames, seen through an alias
//! mapping that never changes and that the device has no address for.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::oracles::{Oracle, Oracles, Violation};
use super::words::{self, WORDS_PER_PAGE};

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// A run of pages of the memfd that is mapped as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Frame {
    /// First page of the memfd.
    pub first_page: usize,
    /// Pages.
    pub pages: usize,
}

impl Frame {
    /// Byte offset in the memfd.
    pub fn offset(self) -> u64 {
        self.first_page as u64 * PAGE
    }
    /// Words in it.
    pub fn words(self) -> usize {
        self.pages * WORDS_PER_PAGE
    }
}

/// A frame that a mapping left behind, full of poison.
#[derive(Debug)]
struct Quarantined {
    frame: Frame,
    epoch: u32,
    until: Instant,
    left: Departure,
}

/// How a frame came to be left behind, for reports.
#[derive(Debug, Clone)]
pub struct Departure {
    /// Slot it left.
    pub slot: usize,
    /// The call, for example "munmap by the agent".
    pub call: String,
    /// Address it was mapped at.
    pub va: u64,
    /// Generation that the call returned.
    pub generation: u64,
}

/// All frames.
#[derive(Debug)]
pub struct Frames<'m> {
    alias: &'m [AtomicU64],
    /// Free frames by their number of pages.
    free: Mutex<HashMap<usize, Vec<Frame>>>,
    quarantine: Mutex<VecDeque<Quarantined>>,
    epoch: AtomicU32,
    stay: Duration,
    /// Pages whose poison was found intact.
    pub canaries_checked: AtomicU64,
}

impl<'m> Frames<'m> {
    /// Frames over `alias` (whole pages); a frame stays in quarantine for `stay`.
    pub fn new(alias: &'m [AtomicU64], stay: Duration) -> Self {
        assert!(
            alias.len() / WORDS_PER_PAGE <= 1 << words::PAGE_BITS,
            "a word holds {} bits of page number",
            words::PAGE_BITS
        );
        Self {
            alias,
            free: Mutex::default(),
            quarantine: Mutex::default(),
            epoch: AtomicU32::new(1),
            stay,
            canaries_checked: AtomicU64::new(0),
        }
    }

    /// Puts a frame into service: fresh content, free.
    pub fn add(&self, frame: Frame) {
        assert!((frame.first_page + frame.pages) * WORDS_PER_PAGE <= self.alias.len());
        let epoch = self.epoch.fetch_add(1, Ordering::Relaxed);
        for (i, word) in self.slice(frame).iter().enumerate() {
            let page = frame.first_page + i / WORDS_PER_PAGE;
            word.store(words::fill(page, epoch, i), Ordering::Relaxed);
        }
        self.free
            .lock()
            .unwrap()
            .entry(frame.pages)
            .or_default()
            .push(frame);
    }

    /// A free frame of that many pages. `None`: all are in use or in quarantine.
    pub fn take(&self, pages: usize) -> Option<Frame> {
        self.free.lock().unwrap().get_mut(&pages)?.pop()
    }

    /// The words of a frame as the CPU sees them.
    pub fn slice(&self, frame: Frame) -> &'m [AtomicU64] {
        let first = frame.first_page * WORDS_PER_PAGE;
        &self.alias[first..first + frame.words()]
    }

    /// One word of a frame.
    pub fn word(&self, frame: Frame, index: usize) -> u64 {
        self.slice(frame)[index].load(Ordering::Relaxed)
    }

    /// Fills a frame with poison and keeps it aside. To be called once no translation to it can be in
    /// use any more, that is after the call that took it away has returned.
    pub fn quarantine(&self, frame: Frame, left: Departure) {
        let epoch = self.epoch.fetch_add(1, Ordering::Relaxed);
        for (i, word) in self.slice(frame).iter().enumerate() {
            let page = frame.first_page + i / WORDS_PER_PAGE;
            word.store(words::poison(page, epoch, i), Ordering::Relaxed);
        }
        let entry = Quarantined {
            frame,
            epoch,
            until: Instant::now() + self.stay,
            left,
        };
        self.quarantine.lock().unwrap().push_back(entry);
    }

    /// Checks and releases the frames whose time is over (all of them with `everything`). A changed
    /// canary is a late device write.
    pub fn release_due(&self, everything: bool, oracles: &Oracles) -> usize {
        let mut released = 0;
        loop {
            let due = {
                let mut quarantine = self.quarantine.lock().unwrap();
                match quarantine.front() {
                    Some(q) if everything || q.until <= Instant::now() => quarantine.pop_front(),
                    _ => None,
                }
            };
            let Some(due) = due else { return released };
            self.check(&due, oracles);
            self.add(due.frame);
            released += 1;
        }
    }

    fn check(&self, quarantined: &Quarantined, oracles: &Oracles) {
        let frame = quarantined.frame;
        let changed = self.slice(frame).iter().enumerate().find_map(|(i, word)| {
            let page = frame.first_page + i / WORDS_PER_PAGE;
            let found = word.load(Ordering::Relaxed);
            (found != words::poison(page, quarantined.epoch, i)).then_some((i, found))
        });
        self.canaries_checked
            .fetch_add(frame.pages as u64, Ordering::Relaxed);
        if let Some((index, found)) = changed {
            let left = &quarantined.left;
            oracles.report(Violation {
                oracle: Oracle::Canary,
                slot: left.slot,
                va: left.va + index as u64 * 8,
                what: format!(
                    "late device write: the page was left behind by {} (generation {}), \
                     then its poison was replaced by: {}",
                    left.call,
                    left.generation,
                    words::describe(found)
                ),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(pages: usize) -> Vec<AtomicU64> {
        (0..pages * WORDS_PER_PAGE).map(|_| AtomicU64::new(0)).collect()
    }

    fn departure() -> Departure {
        Departure {
            slot: 3,
            call: "munmap by the agent".into(),
            va: 0x10_0000,
            generation: 9,
        }
    }

    #[test]
    fn test_canary_when_poison_is_intact_releases_quietly() {
        let (memory, oracles) = (memory(4), Oracles::default());
        let frames = Frames::new(&memory, Duration::from_secs(60));
        frames.add(Frame {
            first_page: 0,
            pages: 4,
        });
        let frame = frames.take(4).unwrap();
        assert!(frames.take(4).is_none() && frames.take(1).is_none());
        frames.quarantine(frame, departure());
        assert_eq!(frames.release_due(false, &oracles), 0, "its time is not over");
        assert!(words::is_poison(frames.word(frame, 700)));
        assert_eq!(frames.release_due(true, &oracles), 1);
        assert_eq!(oracles.stale_accesses(), 0);
        assert_eq!(frames.take(4), Some(frame));
        assert!(!words::is_poison(frames.word(frame, 700)), "fresh content");
    }

    #[test]
    fn test_canary_when_device_writes_late_reports_where_and_what() {
        let (memory, oracles) = (memory(4), Oracles::default());
        let frames = Frames::new(&memory, Duration::ZERO);
        frames.add(Frame {
            first_page: 0,
            pages: 4,
        });
        let frame = frames.take(4).unwrap();
        frames.quarantine(frame, departure());
        memory[600].store(words::store(3, 77, 88), Ordering::Relaxed);
        assert_eq!(frames.release_due(false, &oracles), 1);
        assert_eq!(oracles.stale_accesses(), 1);
        let report = oracles.samples().remove(0);
        assert_eq!(report.oracle, Oracle::Canary);
        assert_eq!(report.va, 0x10_0000 + 600 * 8);
        assert!(report.what.contains("operation 77"), "{}", report.what);
    }
}
