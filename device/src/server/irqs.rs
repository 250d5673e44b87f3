//! DEVICE_SET_IRQS.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};

use protos::vfio_user::{IrqAction, IrqData, IrqSet};
use rustix::fs::{CWD, readlinkat_raw};

use super::dispatch::{Refusal, starts_with};
use super::frame::Fds;
use super::mask_events::MaskEvents;
use crate::pci::Function;

/// Route, mask, unmask or trigger. Everything is checked before anything is done.
pub(super) fn set_irqs(
    function: &Function,
    body: &[u8],
    fds: &mut Fds,
    mask_events: &mut Option<MaskEvents>,
) -> Result<(), Refusal> {
    let (set, data): (IrqSet, _) = starts_with(body)?;
    let available = function.irq_count(set.index);
    let (form, action) = set.validate(available, data.len(), fds.len())?;
    let interrupts = function.interrupts();
    let range = set.start..set.start + set.count;
    if let Some((index, _)) = fds.iter().enumerate().find(|(_, fd)| !may_be_eventfd(fd)) {
        return Err(Refusal::NotAnEventFd(index));
    }
    match (form, action) {
        (IrqData::EventFd, IrqAction::Trigger) => {
            for (index, vector) in range.enumerate() {
                // No file descriptors at all: routing is taken away.
                interrupts.set_eventfd(vector, fds.take(index));
            }
        }
        (IrqData::EventFd, action) => MaskEvents::set(mask_events, range, action, fds)?,
        (IrqData::None, IrqAction::Trigger) if set.count == 0 => {
            for vector in 0..available {
                interrupts.set_eventfd(vector, None);
            }
            *mask_events = None;
        }
        (IrqData::None | IrqData::Bool, action) => {
            for (index, vector) in range.enumerate() {
                if form == IrqData::Bool && data[index] == 0 {
                    continue;
                }
                match action {
                    IrqAction::Mask => interrupts.mask(vector),
                    IrqAction::Unmask => interrupts.unmask(vector),
                    IrqAction::Trigger => {
                        interrupts.trigger(vector);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Only an eventfd is known not to make a write or a read wait. Without /proc nothing can be told, and it is accepted.
fn may_be_eventfd(fd: &OwnedFd) -> bool {
    let mut target = [MaybeUninit::uninit(); 64];
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    match readlinkat_raw(CWD, path, &mut target) {
        Ok((target, _)) => target == b"anon_inode:[eventfd]",
        Err(_) => true,
    }
}
