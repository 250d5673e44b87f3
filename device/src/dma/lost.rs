//! Mappings whose file ends early: the SIGBUS of a truncated file is turned into a failed access.
//!
//! A client can truncate a file after it was mapped; the next touch of a page beyond the new end raises
//! SIGBUS in whoever touches it. The handler here marks the mapping as lost and puts zeros in the place of
//! all of it, so that the touching instruction goes on; whoever copied looks at the mark afterwards
//! ([`check`]) and reports an error. A lost mapping stays lost until it is unmapped: nothing resolves to it.
//!
//! Order: the handler sets the mark before the zeros appear, so that an access which has seen zeros sees the
//! mark. An access that finds no lost mapping anywhere pays one load of a static.
//!
//! The handler only reads the table below (which is never freed), makes one mmap call and stores; all of it
//! may be done in a signal handler. Faults outside every client mapping go to the handler that was there
//! before.
#![allow(unsafe_code)] // sigaction, and mmap over our own mapping in the handler.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, OnceLock, PoisonError};

/// Mappings in a chunk of the table.
const CHUNK: usize = 1024;
/// Chunks: room for 131,072 mappings in the process, more than the kernel's default of maps.
const CHUNKS: usize = 128;

/// One mapping, as the handler sees it.
#[derive(Debug)]
struct Place {
    /// 0: free. Written last, cleared first.
    base: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
}

type Chunk = [Place; CHUNK];

/// Made on demand, never freed: the handler may be looking.
static TABLE: [AtomicPtr<Chunk>; CHUNKS] = [const { AtomicPtr::new(std::ptr::null_mut()) }; CHUNKS];
static FREE: Mutex<Vec<&'static Place>> = Mutex::new(Vec::new());
/// Lost mappings that are not unmapped yet.
static LOST: AtomicUsize = AtomicUsize::new(0);
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// A mapping in the table. Dropped before the memory is unmapped.
#[derive(Debug)]
pub(super) struct Watch(&'static Place);

impl Watch {
    /// Watch over `[base, base + len)`; `None` when the table is full.
    pub(super) fn new(base: usize, len: usize) -> Option<Self> {
        install();
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        if free.is_empty() {
            let slot = TABLE.iter().find(|slot| slot.load(Ordering::Relaxed).is_null())?;
            let chunk: &'static mut Chunk = Box::leak(Box::new(
                [const {
                    Place {
                        base: AtomicUsize::new(0),
                        len: AtomicUsize::new(0),
                        lost: AtomicBool::new(false),
                    }
                }; CHUNK],
            ));
            let chunk: *mut Chunk = chunk;
            slot.store(chunk, Ordering::Release);
            // SAFETY: leaked above, and only shared references to it are made from now on.
            free.extend(unsafe { &*chunk }.iter());
        }
        let place = free.pop()?;
        place.lost.store(false, Ordering::Relaxed);
        place.len.store(len, Ordering::Relaxed);
        place.base.store(base, Ordering::Release);
        Some(Self(place))
    }

    /// The file has turned out to be shorter than the mapping.
    pub(super) fn is_lost(&self) -> bool {
        self.0.lost.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.base.store(0, Ordering::SeqCst);
        if self.0.lost.load(Ordering::SeqCst) {
            LOST.fetch_sub(1, Ordering::SeqCst);
        }
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self.0);
    }
}

/// Whether the mapping that holds `address` is intact. To be asked after an access, while the mapping is
/// still held (by a lock or a guard).
#[inline]
pub(crate) fn check(address: *const u8) -> Result<(), Lost> {
    if LOST.load(Ordering::Acquire) == 0 {
        return Ok(());
    }
    match find(address.addr()) {
        Some((place, ..)) if place.lost.load(Ordering::Acquire) => Err(Lost),
        _ => Ok(()),
    }
}

/// The memory of an access has gone away under it: the client truncated the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client's file was truncated under its DMA mapping; unmap it and map what there is")]
pub struct Lost;

/// The place that holds `address`, its base and its length.
fn find(address: usize) -> Option<(&'static Place, usize, usize)> {
    for slot in &TABLE {
        let chunk = slot.load(Ordering::Acquire);
        if chunk.is_null() {
            // They are made in order.
            return None;
        }
        // SAFETY: never freed, and only ever shared.
        for place in unsafe { &*chunk } {
            let base = place.base.load(Ordering::Acquire);
            let len = place.len.load(Ordering::Acquire);
            let inside = base != 0 && address >= base && address - base < len;
            // Given to another mapping in between: not the one that is looked for, which is held.
            if inside && place.base.load(Ordering::Acquire) == base {
                return Some((place, base, len));
            }
        }
    }
    None
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut action: libc::sigaction = {
            // SAFETY: all-zero bytes are a valid sigaction (no handler, empty mask).
            unsafe { MaybeUninit::zeroed().assume_init() }
        };
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        let mut previous = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: first only asked for, so that the handler below finds it from its first moment on; both
        // pointers are to live structures; `on_sigbus` has the signature that SA_SIGINFO asks for.
        let result = unsafe {
            let asked = libc::sigaction(libc::SIGBUS, std::ptr::null(), previous.as_mut_ptr());
            let _ = PREVIOUS.set(previous.assume_init());
            asked | libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut())
        };
        assert_eq!(result, 0, "SIGBUS is a valid signal");
    });
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo; for a SIGBUS of a memory access it holds the address. The
    // thread's errno is kept for the code that was interrupted.
    let (address, errno) = unsafe { ((*info).si_addr() as usize, *libc::__errno_location()) };
    if let Some((place, base, len)) = find(address) {
        if !place.lost.swap(true, Ordering::SeqCst) {
            LOST.fetch_add(1, Ordering::SeqCst);
        }
        // SAFETY: the range is exactly one mapping of this process that only `super::mapping` uses, and that
        // stays mapped, as the thread that is here is in the middle of an access to it.
        let zeros = unsafe {
            libc::mmap(
                base as *mut libc::c_void,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if zeros != libc::MAP_FAILED {
            // SAFETY: this thread's own errno.
            unsafe { *libc::__errno_location() = errno };
            return;
        }
    }
    pass_on(signal, info, context);
}

/// Not ours: as if this handler were not here.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    match PREVIOUS.get() {
        Some(previous) if previous.sa_sigaction > libc::SIG_IGN => {
            let handler = previous.sa_sigaction;
            if previous.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: it was installed with SA_SIGINFO, so it has this signature.
                let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    unsafe { std::mem::transmute(handler) };
                handler(signal, info, context);
            } else {
                // SAFETY: it was installed without SA_SIGINFO, so it has this signature.
                let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
                handler(signal);
            }
        }
        _ => {
            // The instruction runs again when this returns, and then the signal does what it does.
            // SAFETY: signal() may be called in a handler.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
}
