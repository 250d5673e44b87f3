//! Payload that the other side copies itself, inside the process: from one HCA's memory to the other's, or within
//! one, without a buffer between.
//!
//! The thread that copies belongs to the receiver. It has an engine of its own device TLB, and borrows the lender's
//! [`Desk`], with an engine of the lender's: both guards are held for one copy of at most a chunk. Neither engine is
//! waited for with a guard of the other one held: the source's guard comes first, then the target is looked up, and if
//! that misses everything is let go and begun anew. So the purges of both sides wait for a chunk's copy, as ever.

use std::cell::Cell;
use std::sync::{Arc, Mutex, PoisonError};

use super::access::{self, Trouble};
use super::memory::Port;
use super::mkey::{Mkey, Mkeys};
use crate::atc::{Access, Engine, SpaceId};
use crate::transport::{Gone, Lender, Loan, Place, Shown};

/// A shard's memory, as those see it whom its queue pairs have lent some.
#[derive(Debug)]
pub(super) struct Desk {
    /// Not the worker's own: one copies at a time.
    port: Mutex<Port>,
    mkeys: Arc<Mkeys>,
}

impl Desk {
    pub(super) fn new(port: Port, mkeys: Arc<Mkeys>) -> Arc<Self> {
        Arc::new(Self {
            port: Mutex::new(port),
            mkeys,
        })
    }
}

/// What a lender is told of an address that is covered by the key, which allows to read it. `None`: not so simple.
pub(super) fn place(mkey: &Mkey, va: u64) -> Option<Place> {
    (!access::is_indirect(mkey)).then_some(Place {
        space: mkey.space.0,
        key: mkey.index,
        va,
    })
}

impl Lender for Desk {
    fn show(
        &self,
        place: Place,
        len: usize,
        take: &mut dyn FnMut(Shown<'_>) -> usize,
    ) -> Result<usize, Gone> {
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        // A changed key has another address space: what was lent of it is gone with the old one.
        let key = || {
            self.mkeys
                .at(place.key)
                .filter(|mkey| mkey.space.0 == place.space)
        };
        let (mut done, space) = (0, SpaceId(place.space));
        while done < len {
            let va = place.va.wrapping_add(done as u64);
            let shown = access::show(&mut port, &self.mkeys, (space, va), len - done, key, |guard| {
                take(Shown::Guard(guard))
            });
            match shown {
                Ok(0) => break,
                Ok(step) => done += step,
                Err(_) if done > 0 => break,
                Err(_) => return Err(Gone),
            }
        }
        Ok(done)
    }
}

/// A part of a loan, for whoever stores it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Borrowed<'a> {
    pub(super) loan: &'a Loan,
    pub(super) from: usize,
    pub(super) len: usize,
    /// Set when the lender does not have it: then it has not been stored.
    pub(super) gone: &'a Cell<bool>,
}

impl Borrowed<'_> {
    /// Bytes `done..` of it.
    pub(super) fn part(&self, done: usize, len: usize) -> Self {
        Self {
            from: self.from + done,
            len,
            ..*self
        }
    }

    /// It cannot be stored from where it is.
    pub(super) fn refuse(&self) -> Trouble {
        self.gone.set(true);
        Trouble::Violation
    }

    /// Copies to `va`, as far as the device TLB has it.
    pub(super) fn store(&self, engine: &mut Engine, space: SpaceId, va: u64) -> Result<usize, Trouble> {
        let (mut done, mut lost) = (0, false);
        let shown = self.loan.show(self.from, self.len, &mut |source| {
            let at = va.wrapping_add(done as u64);
            let Ok(guard) = engine.access(space, at, source.len() as u64, Access::Write) else {
                return 0;
            };
            match source {
                Shown::Guard(source) => guard.copy_from(source),
                Shown::Bytes(bytes) => guard.write_from(&bytes[..guard.len()]),
            }
            lost |= guard.check().is_err();
            done += guard.len();
            guard.len()
        });
        match shown {
            _ if lost => Err(Trouble::Violation),
            Ok(taken) => Ok(taken),
            Err(Gone) => Err(self.refuse()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
    use std::time::Duration;

    use protos::mlx5::Layout;
    use protos::mlx5::mkey::{AccessMode, Mkc};

    use super::*;
    use crate::atc::{Atc, AtcConfig, Hooks, Purge};
    use crate::dma::{Prot, Space};
    use crate::transport::{Lent, Term};

    const PAGE: u64 = 4096;
    const PAGES: u64 = 16;
    const LEN: usize = (PAGES * PAGE) as usize;
    const VA: u64 = 0x7000_0000;

    /// An HCA's memory: pages of two keys.
    struct Side {
        atc: Arc<Atc>,
        mkeys: Arc<Mkeys>,
        port: Port,
        desk: Arc<Desk>,
        key: Arc<Mkey>,
    }

    fn side(byte: u8) -> Side {
        let dma = Space::new();
        let fd = rustix::fs::memfd_create("lending", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, LEN as u64).unwrap();
        dma.map(0, LEN as u64, fd, 0, Prot::READ_WRITE).unwrap();
        let atc = Atc::new(AtcConfig::default(), Arc::clone(&dma));
        let port = |ticket| Port {
            engine: atc.engine().unwrap(),
            ticket,
            dma: Arc::clone(&dma),
        };
        let mkeys = Arc::new(Mkeys::new(8));
        let context = Mkc::zeroed()
            .with(Mkc::MODE_LOW, u32::from(AccessMode::MTT.0))
            .with(Mkc::LOG_PAGE_SIZE, 12)
            .with(Mkc::TRANSLATIONS, PAGES as u32 / 2)
            .with_wide(Mkc::START, VA)
            .with_wide(Mkc::LENGTH, LEN as u64);
        // Backwards, so that neighbours are no neighbours.
        let table: Vec<u8> = (0..PAGES)
            .rev()
            .flat_map(|page| (page * PAGE).to_be_bytes())
            .collect();
        let index = mkeys.create(&context, false, PAGES as u32 / 2, &table).unwrap();
        let key = mkeys.at(index).unwrap();
        let mut side = Side {
            desk: Desk::new(port(1), Arc::clone(&mkeys)),
            port: port(0),
            atc,
            mkeys,
            key,
        };
        side.set(byte);
        side
    }

    impl Side {
        fn set(&mut self, byte: u8) {
            let bytes = [byte; LEN];
            access::copy(
                &mut self.port,
                &self.mkeys,
                &self.key,
                VA,
                &mut access::Bytes::From(&bytes),
            )
            .unwrap();
        }

        fn get(&mut self) -> Vec<u8> {
            let mut bytes = vec![0; LEN];
            access::copy(
                &mut self.port,
                &self.mkeys,
                &self.key,
                VA,
                &mut access::Bytes::Into(&mut bytes),
            )
            .unwrap();
            bytes
        }

        fn lend(&self, term: &Term) -> Loan {
            let lent = Lent {
                lender: Arc::clone(&self.desk) as Arc<dyn Lender>,
                place: place(&self.key, VA).unwrap(),
            };
            term.lend(lent, LEN as u32)
        }

        /// Copies from byte `from` of a loan on. Whether it was there.
        fn pull(&mut self, loan: &Loan, from: usize, len: usize) -> bool {
            let gone = Cell::new(false);
            let mut bytes = access::Bytes::Lent(Borrowed {
                loan,
                from,
                len,
                gone: &gone,
            });
            let result = access::copy(
                &mut self.port,
                &self.mkeys,
                &self.key,
                VA + from as u64,
                &mut bytes,
            );
            assert_eq!(result.is_err(), gone.get());
            !gone.get()
        }
    }

    #[test]
    fn test_loan_when_pulled_is_copied_and_when_its_key_or_term_has_ended_is_gone() {
        let (mut from, mut to) = (side(1), side(2));
        let mut term = Term::default();
        let loan = from.lend(&term);
        assert!(to.pull(&loan, 0, LEN));
        assert_eq!(to.get(), [1; LEN]);
        // Inside one HCA, too.
        let own = from.lend(&term);
        assert!(from.pull(&own, 0, LEN));
        to.set(2);
        assert!(to.pull(&loan, 0, LEN / 2));
        from.mkeys.destroy(&from.atc, from.key.index).unwrap();
        assert!(!to.pull(&loan, LEN / 2, LEN / 2));
        assert_eq!(to.get(), [[1; LEN / 2], [2; LEN / 2]].concat());
        let other = side(3);
        let loan = other.lend(&term);
        term.end();
        assert!(!to.pull(&loan, 0, LEN));
        let loan = other.lend(&term);
        assert!(to.pull(&loan, 0, 8));
        drop(term);
        assert!(!to.pull(&loan, 0, 8));
    }

    /// Parks the first access of that kind inside its guard.
    #[derive(Debug)]
    struct Parking {
        kind: Access,
        armed: AtomicBool,
        inside: SyncSender<()>,
        begun: SyncSender<()>,
        go: Mutex<Receiver<()>>,
    }

    impl Hooks for Parking {
        fn translated(&self, _: SpaceId, _: u64, access: Access, _: u64) {
            if access == self.kind && self.armed.swap(false, Ordering::SeqCst) {
                self.inside.send(()).unwrap();
                self.go.lock().unwrap().recv().unwrap();
            }
        }
        fn purge_begun(&self, _: &Purge) {
            let _ = self.begun.try_send(());
        }
    }

    #[test]
    fn test_purge_when_lent_bytes_are_being_copied_waits_for_it_on_either_side() {
        for kind in [Access::Read, Access::Write] {
            let (from, mut to) = (side(1), side(2));
            let mut term = Term::default();
            let loan = from.lend(&term);
            let (inside, is_inside) = sync_channel(1);
            let (begun, has_begun) = sync_channel(1);
            let (go, goes) = sync_channel(1);
            let (atc, space) = match kind {
                Access::Read => (Arc::clone(&from.atc), from.key.space),
                Access::Write => (Arc::clone(&to.atc), to.key.space),
            };
            let parking = Arc::new(Parking {
                kind,
                armed: AtomicBool::new(true),
                inside,
                begun,
                go: Mutex::new(goes),
            });
            atc.set_hooks(parking).unwrap();
            let (purged, ended) = (AtomicBool::new(false), AtomicBool::new(false));
            std::thread::scope(|scope| {
                let copies = scope.spawn(|| {
                    assert!(to.pull(&loan, 0, LEN));
                });
                is_inside.recv().unwrap();
                scope.spawn(|| {
                    atc.purge(Purge::Space(space));
                    purged.store(true, Ordering::SeqCst);
                });
                has_begun.recv().unwrap();
                // (With the target purged, the copy is begun anew for the rest, and a loan that has ended is gone then.)
                let ends = kind == Access::Read;
                ends.then(|| {
                    scope.spawn(|| {
                        term.end();
                        ended.store(true, Ordering::SeqCst);
                    })
                });
                // (Neither would take so long if nothing held it up.)
                std::thread::sleep(Duration::from_millis(50));
                assert!(!purged.load(Ordering::SeqCst), "{kind:?}");
                assert!(!ended.load(Ordering::SeqCst), "{kind:?}");
                go.send(()).unwrap();
                copies.join().unwrap();
            });
            assert_eq!(
                (purged.into_inner(), ended.into_inner()),
                (true, kind == Access::Read)
            );
            assert_eq!(to.get(), [1; LEN], "{kind:?}");
        }
    }
}
