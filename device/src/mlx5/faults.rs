//! On-demand paging, memory scheme (reference 7): pages that are absent, and who waits for them.
//!
//! A side of a queue pair that meets an absent page is parked, the driver is told once for each page, and its
//! PAGE_FAULT_RESUME names the token of that event and thereby everybody who waits. The worker never waits itself: the
//! UMR that brings the page may come through it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use protos::mlx5::eq::{Eqe, Event, PAGE_FAULT_LAST, page_fault};

use super::hardware::Hca;
use super::memory::Port;
use crate::transport::{Side, Status};

/// Logarithm of the page that events count in.
const PAGE: u32 = 12;
/// Faults that the driver is told of at a time: fewer than the smallest event queue it makes has entries, so that
/// none is lost. Others wait until one of these is resumed.
const WINDOW: usize = 256;
/// Pages of one event: a segment of the transport, which may begin inside a page.
const MOST_PAGES: u64 = 17;

/// Memory that an access has met absent: under this key, from here on, for so many bytes of the access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Missing {
    pub(super) key: u32,
    pub(super) va: u64,
    pub(super) len: u64,
    /// The key whose piece names this key, and the address there.
    pub(super) outer: Option<(u32, u64)>,
}

/// Half of a queue pair, and what it is told when the page cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Waiter {
    pub(super) qpn: u32,
    pub(super) side: Side,
    pub(super) refused: Status,
}

#[derive(Debug)]
struct Fault {
    key: u32,
    /// Number of the first page, and how many.
    first: u64,
    pages: u64,
    /// Where the first page is in the key that was used to get to this one.
    outer: Option<(u32, u64)>,
    waiters: Vec<Waiter>,
    reported: bool,
}

/// How a fault ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The pages are there.
    Served,
    /// The driver cannot bring them.
    Refused,
    /// The driver cannot be asked.
    Lost,
}

/// All faults of an HCA.
#[derive(Debug, Default)]
pub(super) struct Faults {
    /// The driver has chosen the memory scheme.
    chosen: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    last_token: u64,
    faults: HashMap<u64, Fault>,
    /// Tokens by key and first page. Their pages are disjoint.
    pages: BTreeMap<(u32, u64), u64>,
    /// What a side waits for: one thing at a time.
    waits: HashMap<(u32, Side), u64>,
    /// Faults that the driver is not told of yet.
    queue: VecDeque<u64>,
    reported: usize,
}

impl Inner {
    /// Adds a waiter to the fault of its page, or makes one.
    fn wait(&mut self, missing: Missing, waiter: Waiter) {
        let first = missing.va >> PAGE;
        let covering = self
            .pages
            .range((missing.key, 0)..=(missing.key, first))
            .next_back()
            .map(|(_, token)| *token)
            .filter(|token| {
                let fault = &self.faults[token];
                first < fault.first + fault.pages
            });
        // What it waited for before was ended by something else (a flush).
        self.leave((waiter.qpn, waiter.side));
        // (That may have been the only reason for a fault that nobody was told of.)
        let token = match covering.filter(|token| self.faults.contains_key(token)) {
            Some(token) => token,
            None => {
                let last = missing.va.saturating_add(missing.len.max(1) - 1) >> PAGE;
                let mut end = (last + 1).min(first + MOST_PAGES);
                // No page twice: the rest is met again if it is still absent then.
                if let Some(((_, next), _)) =
                    self.pages.range((missing.key, first)..(missing.key, end)).next()
                {
                    end = *next;
                }
                self.last_token = (self.last_token + 1) & ((1 << 48) - 1);
                let token = self.last_token;
                let fault = Fault {
                    key: missing.key,
                    first,
                    pages: end - first,
                    outer: missing
                        .outer
                        .map(|(key, va)| (key, va.wrapping_sub(missing.va % (1 << PAGE)))),
                    waiters: Vec::new(),
                    reported: false,
                };
                self.faults.insert(token, fault);
                self.pages.insert((missing.key, first), token);
                self.queue.push_back(token);
                token
            }
        };
        self.waits.insert((waiter.qpn, waiter.side), token);
        self.faults
            .get_mut(&token)
            .expect("found or made above")
            .waiters
            .push(waiter);
    }

    /// A side waits for nothing any more.
    fn leave(&mut self, side: (u32, Side)) {
        let Some(token) = self.waits.remove(&side) else {
            return;
        };
        let fault = self.faults.get_mut(&token).expect("somebody waits for it");
        fault.waiters.retain(|waiter| (waiter.qpn, waiter.side) != side);
        if fault.waiters.is_empty() && !fault.reported {
            self.remove(token);
        }
        // (One that was reported is known until the driver resumes it.)
    }

    fn remove(&mut self, token: u64) -> Option<Fault> {
        let fault = self.faults.remove(&token)?;
        self.pages.remove(&(fault.key, fault.first));
        if fault.reported {
            self.reported -= 1;
        } else {
            self.queue.retain(|queued| *queued != token);
        }
        for waiter in &fault.waiters {
            self.waits.remove(&(waiter.qpn, waiter.side));
        }
        Some(fault)
    }

    /// The next fault that the driver can be told of.
    fn report(&mut self) -> Option<(u64, Eqe)> {
        if self.reported >= WINDOW {
            return None;
        }
        let token = self.queue.pop_front()?;
        let fault = self.faults.get_mut(&token).expect("what is queued exists");
        fault.reported = true;
        self.reported += 1;
        let eqe = page_fault(
            PAGE_FAULT_LAST,
            token,
            fault.pages as u32,
            fault.key,
            fault.first << PAGE,
        );
        Some((token, eqe))
    }
}

impl Faults {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver chooses the memory scheme, or none.
    pub(super) fn choose(&self, memory: bool) {
        self.chosen.store(memory, Ordering::SeqCst);
    }

    /// As at the beginning.
    pub(super) fn clear(&self) {
        self.choose(false);
        *self.inner() = Inner::default();
    }

    /// Faults that wait for the driver.
    pub(super) fn len(&self) -> usize {
        self.inner().faults.len()
    }
}

impl Hca {
    /// An access has met an absent page. Whether its side waits for that now; else the page will not come.
    pub(super) fn page_fault(&self, port: &mut Port, missing: Missing, waiter: Waiter) -> bool {
        if !self.faults.chosen.load(Ordering::SeqCst) || self.objects.eq_for(Event::PAGE_FAULT).is_none() {
            return false;
        }
        self.faults.inner().wait(missing, waiter);
        self.report_faults(port);
        true
    }

    /// Tells the driver of what it can be told of.
    fn report_faults(&self, port: &mut Port) {
        loop {
            let Some((token, eqe)) = self.faults.inner().report() else {
                return;
            };
            self.counters.page_faults.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(token, data = ?eqe.data, "a page fault");
            // (Without the lock: writing an event may take a message to the client.)
            if !self.event(port, Event::PAGE_FAULT, &eqe) {
                tracing::warn!(
                    token,
                    "a page fault cannot be reported; the requests that met it fail"
                );
                self.end_fault(token, End::Lost);
            }
        }
    }

    /// PAGE_FAULT_RESUME. Whether there is such a token.
    pub(super) fn resume_fault(&self, port: &mut Port, token: u64, failed: bool) -> bool {
        let known = self.end_fault(token, if failed { End::Refused } else { End::Served });
        tracing::debug!(token, failed, known, "a page fault is over");
        self.report_faults(port);
        known
    }

    fn end_fault(&self, token: u64, end: End) -> bool {
        let mut inner = self.faults.inner();
        let Some(fault) = inner.remove(token) else {
            return false;
        };
        if let (End::Refused, Some((key, va))) = (end, fault.outer) {
            // Keys of an implicit key come and go with their pages, and Linux knows one no longer before it takes it
            // out of the implicit key's table. That one it knows: asked for its page, it makes another key.
            let missing = Missing {
                key,
                va,
                len: fault.pages << PAGE,
                outer: None,
            };
            for waiter in fault.waiters {
                inner.wait(missing, waiter);
            }
            return true;
        }
        // With the lock held, so that no queue pair of that number is made anew between.
        for waiter in fault.waiters {
            let result = if end == End::Served {
                Ok(())
            } else {
                Err(waiter.refused)
            };
            self.shard(waiter.qpn).resume(waiter.qpn, waiter.side, result);
        }
        true
    }

    /// A queue pair waits for nothing any more: it is destroyed, or begins anew.
    pub(super) fn forget_faults(&self, qpn: u32) {
        let mut inner = self.faults.inner();
        for side in [Side::Send, Side::Response, Side::Receive, Side::Read] {
            inner.leave((qpn, side));
        }
        self.shard(qpn).forget(qpn);
    }

    /// The queue of page faults is gone: nobody will resume them.
    pub(super) fn fail_faults(&self) {
        let tokens: Vec<u64> = self.faults.inner().faults.keys().copied().collect();
        for token in tokens {
            self.end_fault(token, End::Lost);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiter(qpn: u32) -> Waiter {
        Waiter {
            qpn,
            side: Side::Receive,
            refused: Status::RemoteAccess,
        }
    }

    fn missing(va: u64, len: u64) -> Missing {
        Missing {
            key: 0x1234,
            va,
            len,
            outer: None,
        }
    }

    fn reports(inner: &mut Inner) -> Vec<u64> {
        std::iter::from_fn(|| inner.report().map(|(token, _)| token)).collect()
    }

    #[test]
    fn test_faults_when_several_meet_a_page_are_reported_once_and_name_all() {
        let mut inner = Inner::default();
        inner.wait(missing(0x5678, 3 * 4096), waiter(1));
        inner.wait(missing(0x6000, 8), waiter(2));
        let tokens = reports(&mut inner);
        assert_eq!(tokens.len(), 1);
        // Before it: ends where the other begins.
        inner.wait(missing(0x4000, 1 << 20), waiter(3));
        let next = reports(&mut inner);
        assert_eq!(next.len(), 1);
        assert_eq!(inner.faults[&next[0]].pages, 1);
        let ended = inner.remove(tokens[0]).unwrap();
        assert_eq!(ended.waiters, [waiter(1), waiter(2)]);
        assert!(inner.remove(tokens[0]).is_none());
        // Absent again: a new fault.
        inner.wait(missing(0x5678, 8), waiter(1));
        assert_eq!(reports(&mut inner).len(), 1);
    }

    #[test]
    fn test_faults_when_a_side_waits_for_something_else_leave_the_first_alone() {
        let mut inner = Inner::default();
        inner.wait(missing(0x1000, 8), waiter(1));
        let first = reports(&mut inner)[0];
        inner.wait(missing(0x9000, 8), waiter(1));
        assert!(inner.remove(first).unwrap().waiters.is_empty());
        // Nobody was told of the second one, and nobody waits for it.
        inner.leave((1, Side::Receive));
        assert!(inner.faults.is_empty() && inner.pages.is_empty() && inner.queue.is_empty());
        assert!(inner.report().is_none());
    }

    #[test]
    fn test_faults_when_met_through_another_key_know_the_first_page_there() {
        let mut inner = Inner::default();
        let through = Missing {
            outer: Some((0x99, 0x7_0000_5678)),
            ..missing(0x5678, 8)
        };
        inner.wait(through, waiter(1));
        let token = reports(&mut inner)[0];
        assert_eq!(inner.faults[&token].outer, Some((0x99, 0x7_0000_5000)));
    }

    #[test]
    fn test_faults_when_there_are_many_wait_until_one_is_resumed() {
        let mut inner = Inner::default();
        for page in 0..WINDOW as u64 + 3 {
            inner.wait(missing(page << PAGE, 8), waiter(page as u32));
        }
        let tokens = reports(&mut inner);
        assert_eq!(tokens.len(), WINDOW);
        inner.remove(tokens[7]).unwrap();
        assert_eq!(reports(&mut inner).len(), 1);
        assert_eq!(inner.reported, WINDOW);
    }
}
