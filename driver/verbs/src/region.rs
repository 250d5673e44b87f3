//! Protection domains and memory regions.
#![allow(unsafe_code, reason = "calls of libibverbs")]

use std::ptr::NonNull;
use std::rc::Rc;

use crate::abi::{self, extended};
use crate::{Buffer, Context, Error};

/// Where regions and queue pairs belong.
#[derive(Debug, Clone)]
pub struct ProtectionDomain(pub(crate) Rc<Allocated>);

#[derive(Debug)]
pub(crate) struct Allocated {
    pub(crate) raw: NonNull<abi::Pd>,
    pub(crate) context: Context,
}

impl Drop for Allocated {
    fn drop(&mut self) {
        // SAFETY: allocated, and whatever is in it has kept it until now.
        let code = unsafe { (self.context.0.library.0.dealloc_pd)(self.raw.as_ptr()) };
        if code != 0 {
            tracing::error!(device = self.context.name(), code, "ibv_dealloc_pd");
        }
    }
}

/// How a region gets its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paging {
    /// All at registration, and they stay.
    Pinned,
    /// When the device wants them, and they may go.
    OnDemand,
}

/// Memory that the device may reach, by everybody who has the key.
#[derive(Debug)]
pub struct Region {
    raw: NonNull<abi::Mr>,
    domain: ProtectionDomain,
    /// What is registered; `None`: the whole address space.
    buffer: Option<Rc<Buffer>>,
}

/// All that the other side may do.
const ACCESS: u32 = abi::ACCESS_LOCAL_WRITE | abi::ACCESS_REMOTE_WRITE | abi::ACCESS_REMOTE_READ;

impl ProtectionDomain {
    pub(crate) fn new(context: &Context) -> Result<Self, Error> {
        // SAFETY: an open context.
        let raw = unsafe { (context.0.library.0.alloc_pd)(context.0.raw.as_ptr()) };
        let raw =
            NonNull::new(raw).ok_or_else(|| Error::last(format!("ibv_alloc_pd of {}", context.name())))?;
        Ok(Self(Rc::new(Allocated {
            raw,
            context: context.clone(),
        })))
    }

    /// Its device.
    #[must_use]
    pub fn context(&self) -> &Context {
        &self.0.context
    }

    /// Registers a part of a buffer, for reading and writing from both sides.
    ///
    /// # Errors
    /// The call's: ENOMEM beyond RLIMIT_MEMLOCK, EOPNOTSUPP or EINVAL without on-demand paging.
    ///
    /// # Panics
    /// When the range is not in the buffer.
    pub fn register(
        &self,
        buffer: &Rc<Buffer>,
        offset: usize,
        length: usize,
        paging: Paging,
    ) -> Result<Region, Error> {
        assert!(
            offset
                .checked_add(length)
                .is_some_and(|end| end <= buffer.length()),
            "{length} bytes at {offset} are not in a buffer of {} bytes",
            buffer.length()
        );
        let access = match paging {
            Paging::Pinned => ACCESS,
            Paging::OnDemand => ACCESS | abi::ACCESS_ON_DEMAND,
        };
        self.region(buffer.address() + offset, length, access, Some(Rc::clone(buffer)))
    }

    /// Registers the whole address space on demand.
    ///
    /// # Errors
    /// The call's.
    pub fn register_everything(&self) -> Result<Region, Error> {
        self.region(0, usize::MAX, ACCESS | abi::ACCESS_ON_DEMAND, None)
    }

    fn region(
        &self,
        address: usize,
        length: usize,
        access: u32,
        buffer: Option<Rc<Buffer>>,
    ) -> Result<Region, Error> {
        let context = self.context();
        // SAFETY: registering touches no memory by itself; what a device does later it does to buffers, which only
        // work requests of `Pair` name, and of which nobody has references.
        let raw = unsafe {
            (context.0.library.0.reg_mr)(
                self.0.raw.as_ptr(),
                std::ptr::with_exposed_provenance_mut(address),
                length,
                access.cast_signed(),
            )
        };
        let raw = NonNull::new(raw).ok_or_else(|| {
            Error::last(format!(
                "ibv_reg_mr of {length} bytes, access {access:#x}, {}",
                context.name()
            ))
        })?;
        Ok(Region {
            raw,
            domain: self.clone(),
            buffer,
        })
    }
}

impl Region {
    /// The key for this side's queues.
    #[must_use]
    pub fn lkey(&self) -> u32 {
        // SAFETY: registered until `self` is dropped.
        unsafe { (*self.raw.as_ptr()).lkey }
    }

    /// The key for the other side's.
    #[must_use]
    pub fn rkey(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.raw.as_ptr()).rkey }
    }

    /// What is registered; `None`: everything.
    #[must_use]
    pub fn buffer(&self) -> Option<&Rc<Buffer>> {
        self.buffer.as_ref()
    }

    /// Lets the device have the pages before it wants them, to write there, and waits until it has
    /// (`ibv_advise_mr`, PREFETCH_WRITE, FLUSH). Ranges of 2 GiB and more go in pieces.
    ///
    /// # Errors
    /// Not there in the library, the driver or the device.
    pub fn prefetch(&self, address: usize, length: usize) -> Result<(), Error> {
        const PIECE: usize = 1 << 30;
        let context = self.domain.context();
        let Some(advise) = context.extended(extended::ADVISE_MR) else {
            return Err(Error::Unsupported {
                what: "ibv_advise_mr",
                why: format!("libibverbs or the provider of {} has none", context.name()),
            });
        };
        // SAFETY: the pointer at this place of the table is this function.
        let advise: abi::AdviseMr = unsafe { std::mem::transmute(advise) };
        for offset in (0..length).step_by(PIECE) {
            let piece = PIECE.min(length - offset);
            let mut sge = abi::Sge {
                addr: (address + offset) as u64,
                length: piece as u32,
                lkey: self.lkey(),
            };
            // SAFETY: a protection domain, and one piece of memory by its key, which only makes pages present.
            let code = unsafe {
                advise(
                    self.domain.0.raw.as_ptr(),
                    abi::ADVICE_PREFETCH_WRITE,
                    abi::ADVISE_FLUSH,
                    &raw mut sge,
                    1,
                )
            };
            if code != 0 {
                return Err(Error::code(
                    format!("ibv_advise_mr of {piece} bytes, {}", context.name()),
                    code,
                ));
            }
        }
        Ok(())
    }

    /// Ends the registration.
    ///
    /// # Errors
    /// The call's; the region is then left as it is, with its memory.
    pub fn deregister(self) -> Result<(), Error> {
        let mut this = std::mem::ManuallyDrop::new(self);
        this.end()?;
        // SAFETY: not used again.
        unsafe { std::ptr::drop_in_place(&raw mut this.buffer) };
        // SAFETY: not used again.
        unsafe { std::ptr::drop_in_place(&raw mut this.domain) };
        Ok(())
    }

    fn end(&mut self) -> Result<(), Error> {
        let context = self.domain.context();
        // SAFETY: registered, and after success not used again.
        let code = unsafe { (context.0.library.0.dereg_mr)(self.raw.as_ptr()) };
        match code {
            0 => Ok(()),
            code => Err(Error::code(format!("ibv_dereg_mr, {}", context.name()), code)),
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(%error, "a region stays registered, and its memory mapped");
            // The device may still reach it.
            std::mem::forget(self.buffer.take());
        }
    }
}
