//! Where the device's misses are answered.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use driver::gru::{Fault, Pager, Translation};
use protos::bridge::changes::generation_in;

use super::held::Hold;
use super::identity::FileId;
use super::space::AddressSpace;
use crate::mm::{Access, Busy, FillPermit, Lookup, Vma};

/// Shift of a small page.
const SMALL: u8 = 12;
/// Shift of a large page, where they are allowed: the x86 page-table level above.
const LARGE: u8 = 21;

/// The pager of one address space. Holds it weakly: the driver keeps pagers alive.
#[derive(Debug)]
pub struct SpacePager {
    space: Weak<AddressSpace>,
    large_pages: bool,
    refusals_logged: AtomicU64,
}

/// What one attempt came to.
enum Attempt {
    Answer(Fault),
    /// The range is being changed.
    Busy,
}

impl SpacePager {
    /// For an address space.
    #[must_use]
    pub fn new(space: &Arc<AddressSpace>, large_pages: bool) -> Self {
        Self {
            space: Arc::downgrade(space),
            large_pages,
            refusals_logged: AtomicU64::new(0),
        }
    }

    fn attempt(&self, space: &AddressSpace, va: u64, access: Access, shift: u8) -> Attempt {
        let faults = &space.stats.faults;
        let refuse = |counter: &AtomicU64| {
            counter.fetch_add(1, Ordering::Relaxed);
            Attempt::Answer(Fault::Bad)
        };
        let permit = match space.fills().begin_fill(va, u32::from(shift)) {
            Ok(permit) => permit,
            Err(Busy::InProgress) => return Attempt::Busy,
            Err(Busy::Closed) => return refuse(&faults.refused_ended),
        };
        match space.cache().lookup(va, access, &permit) {
            Ok(Lookup::Mapped(vma)) => match self.translate(space, va, &vma, &permit, shift) {
                Some(Placed::Page(translation)) => {
                    faults.served.fetch_add(1, Ordering::Relaxed);
                    faults
                        .served_large
                        .fetch_add(u64::from(translation.page_shift > SMALL), Ordering::Relaxed);
                    Attempt::Answer(Fault::Page(translation))
                }
                Some(Placed::Busy) => Attempt::Busy,
                // Once more from the start, with a permit for the whole large page.
                Some(Placed::CouldBeLarge) => self.attempt(space, va, access, LARGE),
                None => {
                    self.say_private(space, va, &vma);
                    refuse(&faults.refused_private)
                }
            },
            Ok(Lookup::NotMapped) => refuse(&faults.refused_unmapped),
            Ok(Lookup::Denied(_)) => refuse(&faults.refused_protection),
            Ok(Lookup::Busy) => Attempt::Busy,
            Err(error) => {
                tracing::debug!(session = space.id(), va, %error, "the address space cannot be asked");
                refuse(&faults.refused_ended)
            }
        }
    }

    fn translate(
        &self,
        space: &AddressSpace,
        va: u64,
        vma: &Vma,
        permit: &FillPermit,
        shift: u8,
    ) -> Option<Placed> {
        if !vma.shared {
            return None;
        }
        let file = space.file(FileId {
            dev: vma.dev,
            ino: vma.inode,
        })?;
        let page = |shift: u8| va & !((1u64 << shift) - 1);
        let small = page(SMALL);
        let (small_iova, _) = file.iova_of(vma.offset_of(small))?;
        let large = page(LARGE);
        let large_iova = (vma.start <= large
            && large.checked_add(1 << LARGE).is_some_and(|end| end <= vma.end))
        .then(|| file.iova_of(vma.offset_of(large)))
        .flatten()
        .filter(|(iova, run)| iova.is_multiple_of(1 << LARGE) && *run >= 1 << LARGE)
        .map(|(iova, _)| iova)
        // Where the device holds pages it holds small ones.
        .filter(|_| self.large_pages && space.held().is_none());
        let (iova, page_shift) = match large_iova {
            Some(_) if shift < LARGE => return Some(Placed::CouldBeLarge),
            Some(iova) => (iova, LARGE),
            None => (small_iova, SMALL),
        };
        if let Some(held) = space.held() {
            match held.hold(file.id, file.fd.as_fd(), vma.offset_of(small), iova) {
                Ok(Hold::Held) => {}
                Ok(Hold::Busy) => return Some(Placed::Busy),
                Err(error) => {
                    tracing::error!(session = space.id(), va = format_args!("{va:#x}"), %error, "the page cannot be mapped for the device");
                    return None;
                }
            }
        }
        Some(Placed::Page(Translation {
            iova,
            page_shift,
            writable: vma.write,
            // The table is the application's to spoil: with its own generations it spoils only its own.
            generation: generation_in(space.id(), permit.generation()),
        }))
    }

    fn say_private(&self, space: &AddressSpace, va: u64, vma: &Vma) {
        // The first, then every thousandth: the application chooses how many there are.
        if self
            .refusals_logged
            .fetch_add(1, Ordering::Relaxed)
            .is_multiple_of(1000)
        {
            tracing::warn!(
                session = space.id(),
                pid = space.pid(),
                va = format_args!("{va:#x}"),
                shared = vma.shared,
                inode = vma.inode,
                "not shared memory known to the session: map a memfd with MAP_SHARED and add it to the session"
            );
        }
    }
}

enum Placed {
    Page(Translation),
    /// The file's page is being discarded.
    Busy,
    CouldBeLarge,
}

impl Pager for SpacePager {
    fn fault(&self, va: u64, write: bool) -> Fault {
        let Some(space) = self.space.upgrade() else {
            return Fault::Bad;
        };
        let access = if write { Access::Write } else { Access::Read };
        if let Attempt::Answer(fault) = self.attempt(&space, va, access, SMALL) {
            return fault;
        }
        // First declared, then looked at once more: whoever ends the change from now on rings.
        space.defer_fault();
        match self.attempt(&space, va, access, SMALL) {
            Attempt::Answer(fault) => {
                space.undefer_fault();
                fault
            }
            Attempt::Busy => {
                space.stats.faults.deferred.fetch_add(1, Ordering::Relaxed);
                Fault::Retry
            }
        }
    }
}
