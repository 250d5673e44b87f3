//! malloc on device-visible memory: an arena on one sealed memfd, mapped shared, managed by dlmalloc.
//!
//! The arena is mapped once, at its full size, and handed out from the bottom; pages are not given back. A
//! forked child shares the arena's pages with its parent, so it must not manage them: it maps them privately
//! (its stores stay its own), allocates from libc, and lets arena memory that it frees be. What it has not
//! touched may still change under it when the parent stores: programs that fork without exec should not use
//! the heap mode.

use agent::{Agent, Memory};
use dlmalloc::{Allocator, Dlmalloc};
use std::cell::UnsafeCell;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

/// Size of the arena without `TLBRIDGE_HEAP_BYTES`.
const DEFAULT_BYTES: u64 = 1 << 30;
/// What dlmalloc asks for at a time, at least.
const GRANULARITY: usize = 1 << 20;

/// Whether new memory comes from the arena.
static ON: AtomicBool = AtomicBool::new(false);
/// The arena; 0 = there is none.
static BASE: AtomicUsize = AtomicUsize::new(0);
static END: AtomicUsize = AtomicUsize::new(0);
/// First byte that has not been handed to dlmalloc.
static NEXT: AtomicUsize = AtomicUsize::new(0);
/// The arena's memfd.
static FD: AtomicI32 = AtomicI32::new(-1);

struct Arena;

// SAFETY: hands out disjoint, mapped, page-aligned parts of the arena, under the heap's lock.
unsafe impl Allocator for Arena {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let failed = (std::ptr::null_mut(), 0, 0);
        let at = NEXT.load(Ordering::Relaxed);
        let Some(size) = size.checked_next_multiple_of(self.page_size()) else {
            return failed;
        };
        if size > END.load(Ordering::Relaxed) - at {
            return failed;
        }
        // Allocate the pages now: under missing mode, each page that is not there when it is touched is a
        // fault that the daemon has to serve, and in user mode only a system call cannot even wait for that.
        let offset = (at - BASE.load(Ordering::Relaxed)) as libc::off_t;
        // SAFETY: fallocate on this library's own memfd.
        let r = unsafe { libc::fallocate(FD.load(Ordering::Relaxed), 0, offset, size as libc::off_t) };
        if r != 0 {
            return failed;
        }
        NEXT.store(at + size, Ordering::Relaxed);
        (at as *mut u8, size, 0)
    }
    fn remap(&self, _: *mut u8, _: usize, _: usize, _: bool) -> *mut u8 {
        std::ptr::null_mut()
    }
    fn free_part(&self, _: *mut u8, _: usize, _: usize) -> bool {
        false
    }
    fn free(&self, _: *mut u8, _: usize) -> bool {
        false
    }
    fn can_release_part(&self, _: u32) -> bool {
        false
    }
    fn allocates_zeros(&self) -> bool {
        true
    }
    fn page_size(&self) -> usize {
        4096
    }
}

struct Heap {
    lock: UnsafeCell<libc::pthread_mutex_t>,
    allocator: UnsafeCell<Dlmalloc<Arena>>,
}

// SAFETY: the allocator is only reached under the lock.
unsafe impl Sync for Heap {}

static HEAP: Heap = Heap {
    lock: UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER),
    allocator: UnsafeCell::new(Dlmalloc::new_with_allocator(Arena)),
};

/// The thread that holds the lock across a fork; 0 = none. Its malloc calls go on meanwhile: other libraries'
/// fork handlers run between this one's, and the heap is whole there.
static FORKING: AtomicUsize = AtomicUsize::new(0);

fn this_thread() -> usize {
    // SAFETY: always valid; the same in a forked child, and never 0 in glibc.
    unsafe { libc::pthread_self() as usize }
}

fn lock() {
    // SAFETY: a statically initialised mutex.
    unsafe { libc::pthread_mutex_lock(HEAP.lock.get()) };
}

fn unlock() {
    // SAFETY: held by this thread.
    unsafe { libc::pthread_mutex_unlock(HEAP.lock.get()) };
}

fn locked<R>(f: impl FnOnce(&mut Dlmalloc<Arena>) -> R) -> R {
    let held = FORKING.load(Ordering::Relaxed) == this_thread();
    if !held {
        lock();
    }
    // SAFETY: the lock is held, and nothing below comes back here.
    let r = f(unsafe { &mut *HEAP.allocator.get() });
    if !held {
        unlock();
    }
    r
}

/// Put malloc on an arena.
pub(crate) fn start(agent: &'static Agent) -> Result<(), String> {
    let bytes = std::env::var("TLBRIDGE_HEAP_BYTES")
        .ok()
        .map_or(Ok(DEFAULT_BYTES), |v| {
            v.parse()
                .map_err(|_| format!("TLBRIDGE_HEAP_BYTES={v} is not a number of bytes"))
        })?;
    let memory: Memory = agent
        .memory_sparse(bytes, "tlbridge-heap")
        .map_err(|e| format!("the heap's memory: {e}"))?;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping.
    let base = unsafe { agent.mmap(0, memory.len() as usize, prot, flags, Some(memory.fd()), 0) }
        .map_err(|e| format!("mapping the heap: {e}"))?
        .value;
    BASE.store(base, Ordering::Relaxed);
    NEXT.store(base, Ordering::Relaxed);
    END.store(base + memory.len() as usize, Ordering::Relaxed);
    FD.store(memory.fd().as_raw_fd(), Ordering::Relaxed);
    // The arena lasts as long as the process.
    std::mem::forget(memory);
    locked(|a| a.set_granularity(GRANULARITY));
    check_layout()?;
    // SAFETY: the handlers take and give back the heap's lock, and live as long as the process.
    let r = unsafe { libc::pthread_atfork(Some(before_fork), Some(in_parent), Some(in_child)) };
    if r != 0 {
        return Err(format!(
            "pthread_atfork: {}",
            std::io::Error::from_raw_os_error(r)
        ));
    }
    ON.store(true, Ordering::Release);
    Ok(())
}

/// [`usable_size`] reads dlmalloc's chunk header: make sure that it is what is expected.
fn check_layout() -> Result<(), String> {
    for size in [1, 24, 25, 100, 4000, 70_000] {
        // SAFETY: fresh memory of this heap.
        let usable = unsafe {
            let p = alloc(size);
            if p.is_null() {
                return Err("TLBRIDGE_HEAP_BYTES is too small".into());
            }
            let usable = usable_size(p);
            free(p);
            usable
        };
        if usable < size || usable > size + 64 {
            return Err("this build's dlmalloc has another chunk layout: the heap stays off".into());
        }
    }
    Ok(())
}

extern "C" fn before_fork() {
    lock();
    FORKING.store(this_thread(), Ordering::Relaxed);
}

extern "C" fn in_parent() {
    FORKING.store(0, Ordering::Relaxed);
    unlock();
}

extern "C" fn in_child() {
    ON.store(false, Ordering::Release);
    let base = BASE.load(Ordering::Relaxed);
    // Private from here on. Only what has been handed out: the rest of the file is not allocated.
    // SAFETY: replaces the mapping of the same pages at the same addresses; the descriptor stays open.
    let mapped = unsafe {
        agent::raw::mmap(
            base,
            NEXT.load(Ordering::Relaxed) - base,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            Some(BorrowedFd::borrow_raw(FD.load(Ordering::Relaxed))),
            0,
        )
    };
    if mapped.is_err() {
        // The child would store into its parent's heap.
        // SAFETY: ends the child.
        unsafe { libc::abort() };
    }
    FORKING.store(0, Ordering::Relaxed);
    unlock();
}

/// Whether new memory comes from the arena.
pub(crate) fn is_on() -> bool {
    ON.load(Ordering::Acquire)
}

/// Whether `p` is arena memory.
pub(crate) fn owns(p: *const u8) -> bool {
    let at = p as usize;
    at >= BASE.load(Ordering::Relaxed) && at < END.load(Ordering::Relaxed)
}

/// Memory of `size` bytes, or null.
pub(crate) fn alloc(size: usize) -> *mut u8 {
    // SAFETY: any size is allowed.
    locked(|a| unsafe { a.c_malloc(size) })
}

/// Aligned memory, or null.
pub(crate) fn alloc_aligned(align: usize, size: usize) -> *mut u8 {
    // SAFETY: the caller has checked that align is a power of two.
    locked(|a| unsafe { a.c_memalign(align, size) })
}

/// Another size for `p`, or null.
///
/// # Safety
/// `p` is live memory of this heap.
pub(crate) unsafe fn resize(p: *mut u8, size: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    locked(|a| unsafe { a.c_realloc(p, size) })
}

/// Give `p` back.
///
/// # Safety
/// `p` is live memory of this heap.
pub(crate) unsafe fn free(p: *mut u8) {
    // SAFETY: the caller's promise.
    locked(|a| unsafe { a.c_free(p) });
}

/// Bytes that may be used at `p`: the chunk's size, of which the header word (the one before `p`, with three
/// flag bits) is not the user's.
///
/// # Safety
/// `p` is live memory of this heap.
pub(crate) unsafe fn usable_size(p: *const u8) -> usize {
    // SAFETY: the caller's promise; every chunk has a header word.
    let head = unsafe { *p.cast::<usize>().sub(1) };
    (head & !7).saturating_sub(size_of::<usize>())
}
