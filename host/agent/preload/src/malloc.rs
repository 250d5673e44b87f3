//! malloc and its family: the arena's when the heap is on, else glibc's own.

use crate::heap;
use crate::set_errno;
use libc::{c_int, c_void, size_t};
use std::sync::atomic::{AtomicPtr, Ordering};

unsafe extern "C" {
    fn __libc_malloc(size: size_t) -> *mut c_void;
    fn __libc_calloc(count: size_t, size: size_t) -> *mut c_void;
    fn __libc_realloc(p: *mut c_void, size: size_t) -> *mut c_void;
    fn __libc_free(p: *mut c_void);
    fn __libc_memalign(align: size_t, size: size_t) -> *mut c_void;
}

/// The arena's answer in the C way.
fn answer(p: *mut u8) -> *mut c_void {
    if p.is_null() {
        set_errno(libc::ENOMEM);
    }
    p.cast()
}

/// malloc(3).
#[unsafe(no_mangle)]
pub extern "C" fn malloc(size: size_t) -> *mut c_void {
    if heap::is_on() {
        return answer(heap::alloc(size));
    }
    // SAFETY: glibc's malloc.
    unsafe { __libc_malloc(size) }
}

/// calloc(3).
#[unsafe(no_mangle)]
pub extern "C" fn calloc(count: size_t, size: size_t) -> *mut c_void {
    if heap::is_on() {
        let Some(bytes) = count.checked_mul(size) else {
            return answer(std::ptr::null_mut());
        };
        let p = heap::alloc(bytes);
        if !p.is_null() {
            // SAFETY: fresh memory of that many bytes.
            unsafe { p.write_bytes(0, bytes) };
        }
        return answer(p);
    }
    // SAFETY: glibc's calloc.
    unsafe { __libc_calloc(count, size) }
}

/// realloc(3).
///
/// # Safety
/// As realloc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn realloc(p: *mut c_void, size: size_t) -> *mut c_void {
    if p.is_null() {
        return malloc(size);
    }
    let ours = heap::owns(p.cast());
    if ours != heap::is_on() {
        // From one heap to the other: memory from before the heap was on, or a forked child with arena memory.
        // SAFETY: the caller's promise; the smaller of both sizes is copied.
        unsafe {
            if size == 0 {
                free(p);
                return std::ptr::null_mut();
            }
            let new = malloc(size);
            if !new.is_null() {
                let old = malloc_usable_size(p);
                std::ptr::copy_nonoverlapping(p.cast::<u8>(), new.cast::<u8>(), old.min(size));
                free(p);
            }
            return new;
        }
    }
    // SAFETY: the caller's promise.
    unsafe {
        if !ours {
            return __libc_realloc(p, size);
        }
        if size == 0 {
            heap::free(p.cast());
            return std::ptr::null_mut();
        }
        answer(heap::resize(p.cast(), size))
    }
}

/// reallocarray(3).
///
/// # Safety
/// As realloc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn reallocarray(p: *mut c_void, count: size_t, size: size_t) -> *mut c_void {
    match count.checked_mul(size) {
        // SAFETY: the caller's promise.
        Some(bytes) => unsafe { realloc(p, bytes) },
        None => answer(std::ptr::null_mut()),
    }
}

/// free(3).
///
/// # Safety
/// As free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free(p: *mut c_void) {
    // SAFETY: the caller's promise.
    unsafe {
        if !heap::owns(p.cast()) {
            __libc_free(p);
        } else if heap::is_on() {
            heap::free(p.cast());
        }
        // Arena memory in a forked child: the arena is the parent's.
    }
}

/// memalign(3).
#[unsafe(no_mangle)]
pub extern "C" fn memalign(align: size_t, size: size_t) -> *mut c_void {
    if heap::is_on() {
        let Some(align) = align.max(1).checked_next_power_of_two() else {
            set_errno(libc::EINVAL);
            return std::ptr::null_mut();
        };
        return answer(heap::alloc_aligned(align, size));
    }
    // SAFETY: glibc's memalign.
    unsafe { __libc_memalign(align, size) }
}

/// aligned_alloc(3).
#[unsafe(no_mangle)]
pub extern "C" fn aligned_alloc(align: size_t, size: size_t) -> *mut c_void {
    memalign(align, size)
}

/// valloc(3).
#[unsafe(no_mangle)]
pub extern "C" fn valloc(size: size_t) -> *mut c_void {
    memalign(PAGE, size)
}

/// pvalloc(3).
#[unsafe(no_mangle)]
pub extern "C" fn pvalloc(size: size_t) -> *mut c_void {
    match size.max(1).checked_next_multiple_of(PAGE) {
        Some(size) => memalign(PAGE, size),
        None => answer(std::ptr::null_mut()),
    }
}

const PAGE: usize = 4096;

/// posix_memalign(3).
///
/// # Safety
/// `out` can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_memalign(out: *mut *mut c_void, align: size_t, size: size_t) -> c_int {
    if !align.is_power_of_two() || !align.is_multiple_of(size_of::<usize>()) {
        return libc::EINVAL;
    }
    // SAFETY: errno of this thread; out is the caller's promise. errno is not to be changed.
    unsafe {
        let errno = *libc::__errno_location();
        let p = memalign(align, size);
        *libc::__errno_location() = errno;
        if p.is_null() {
            return libc::ENOMEM;
        }
        *out = p;
    }
    0
}

/// malloc_usable_size(3).
///
/// # Safety
/// `p` is null or live memory of malloc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc_usable_size(p: *mut c_void) -> size_t {
    type Function = unsafe extern "C" fn(*mut c_void) -> size_t;
    /// glibc's has no second name, unlike the rest of the family. Looked up when it is first used: dlsym may
    /// call malloc, which does not come here.
    static NEXT: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
    if p.is_null() {
        return 0;
    }
    // SAFETY: the caller's promise; the symbol has that type in glibc.
    unsafe {
        if heap::owns(p.cast()) {
            return heap::usable_size(p.cast());
        }
        let mut next = NEXT.load(Ordering::Acquire);
        if next.is_null() {
            next = libc::dlsym(libc::RTLD_NEXT, c"malloc_usable_size".as_ptr());
            NEXT.store(next, Ordering::Release);
        }
        if next.is_null() {
            return 0;
        }
        std::mem::transmute::<*mut c_void, Function>(next)(p)
    }
}
