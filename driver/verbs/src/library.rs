//! libibverbs, found by the loader.
#![allow(unsafe_code, reason = "a library's functions, by their names")]

use std::ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void};
use std::rc::Rc;

use crate::Error;
use crate::abi::{Context, Cq, Device, DeviceAttr, Mr, Pd, PortAttr, Qp, QpAttr, QpInitAttr};

/// Its name, with the only ABI version that it ever had.
const NAME: &str = "libibverbs.so.1";

macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident = $symbol:literal: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// The functions, with the types of `<infiniband/verbs.h>`.
        pub(crate) struct Functions {
            $($(#[$doc])* pub(crate) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            /// Last, so that it is there as long as the functions.
            _library: libloading::Library,
        }

        impl Functions {
            fn find(library: libloading::Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    // SAFETY: the library gives these names to functions of these types; it stays loaded in this
                    // structure. Without a version the loader takes the default one, as a linker would.
                    $($name: unsafe { *library.get(concat!($symbol, "\0"))? },)*
                    _library: library,
                })
            }
        }
    };
}

functions! {
    get_device_list = "ibv_get_device_list": fn(*mut c_int) -> *mut *mut Device;
    free_device_list = "ibv_free_device_list": fn(*mut *mut Device);
    get_device_name = "ibv_get_device_name": fn(*mut Device) -> *const c_char;
    open_device = "ibv_open_device": fn(*mut Device) -> *mut Context;
    close_device = "ibv_close_device": fn(*mut Context) -> c_int;
    query_device = "ibv_query_device": fn(*mut Context, *mut DeviceAttr) -> c_int;
    query_port = "ibv_query_port": fn(*mut Context, u8, *mut PortAttr) -> c_int;
    query_gid = "ibv_query_gid": fn(*mut Context, u8, c_int, *mut [u8; 16]) -> c_int;
    alloc_pd = "ibv_alloc_pd": fn(*mut Context) -> *mut Pd;
    dealloc_pd = "ibv_dealloc_pd": fn(*mut Pd) -> c_int;
    reg_mr = "ibv_reg_mr": fn(*mut Pd, *mut c_void, usize, c_int) -> *mut Mr;
    dereg_mr = "ibv_dereg_mr": fn(*mut Mr) -> c_int;
    create_cq = "ibv_create_cq": fn(*mut Context, c_int, *mut c_void, *mut c_void, c_int) -> *mut Cq;
    destroy_cq = "ibv_destroy_cq": fn(*mut Cq) -> c_int;
    create_qp = "ibv_create_qp": fn(*mut Pd, *mut QpInitAttr) -> *mut Qp;
    modify_qp = "ibv_modify_qp": fn(*mut Qp, *mut QpAttr, c_int) -> c_int;
    destroy_qp = "ibv_destroy_qp": fn(*mut Qp) -> c_int;
    wc_status_str = "ibv_wc_status_str": fn(c_uint) -> *const c_char;
}

/// libibverbs, loaded.
#[derive(Clone)]
pub struct Library(pub(crate) Rc<Functions>);

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(NAME)
    }
}

impl Library {
    /// Loads it from where the loader looks (LD_LIBRARY_PATH, the system's directories).
    ///
    /// # Errors
    /// It is not there, or lacks a function.
    pub fn load() -> Result<Self, Error> {
        Self::load_from(OsStr::new(NAME))
    }

    /// Loads a file that is libibverbs.
    pub(crate) fn load_from(name: &OsStr) -> Result<Self, Error> {
        // SAFETY: libibverbs' constructors have no requirements.
        unsafe { libloading::Library::new(name) }
            .and_then(Functions::find)
            .map(|functions| Self(Rc::new(functions)))
            .map_err(|error| Error::Library {
                name: name.display().to_string(),
                // What the loader said is behind it.
                reason: std::error::Error::source(&error)
                    .map_or_else(|| error.to_string(), ToString::to_string),
            })
    }

    /// The names of the devices that there are.
    ///
    /// # Errors
    /// The kernel has no RDMA, or does not show it.
    pub fn device_names(&self) -> Result<Vec<String>, Error> {
        self.with_devices(|devices| devices.iter().map(|(name, _)| name.clone()).collect())
    }

    /// The devices while their list exists.
    pub(crate) fn with_devices<T>(
        &self,
        take: impl FnOnce(&[(String, *mut Device)]) -> T,
    ) -> Result<T, Error> {
        let mut count: c_int = 0;
        // SAFETY: `count` is a valid place.
        let list = unsafe { (self.0.get_device_list)(&raw mut count) };
        if list.is_null() {
            return Err(Error::last("ibv_get_device_list"));
        }
        let devices: Vec<(String, *mut Device)> = (0..usize::try_from(count).unwrap_or(0))
            .map(|index| {
                // SAFETY: the list has `count` devices.
                let device = unsafe { *list.add(index) };
                // SAFETY: the device is in the list, which exists.
                let name = unsafe { (self.0.get_device_name)(device) };
                (text(name), device)
            })
            .collect();
        let result = take(&devices);
        // SAFETY: it came from ibv_get_device_list; opened devices stay.
        unsafe { (self.0.free_device_list)(list) };
        Ok(result)
    }

    /// What a completion status means.
    pub(crate) fn status_name(&self, status: u32) -> String {
        // SAFETY: any number has a text.
        text(unsafe { (self.0.wc_status_str)(status) })
    }
}

/// A C string that the library keeps.
fn text(string: *const c_char) -> String {
    if string.is_null() {
        return "?".into();
    }
    // SAFETY: the library's strings end with a zero, and it keeps them.
    let string = unsafe { CStr::from_ptr(string) };
    string.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_library_when_missing_or_another_one_is_an_error_with_the_reason() {
        let missing = Library::load_from(OsStr::new("libibverbs-that-is-not.so.1")).unwrap_err();
        assert!(
            missing.to_string().contains("libibverbs1"),
            "the way out is missing: {missing}"
        );
        let other = Library::load_from(OsStr::new("libc.so.6")).unwrap_err();
        assert!(other.to_string().contains("ibv_get_device_list"), "{other}");
    }

    #[test]
    fn test_status_when_named_is_text() {
        let Ok(library) = Library::load() else {
            println!("SKIP: no libibverbs.so.1 on this machine");
            return;
        };
        assert_eq!(library.status_name(0), "success");
        // A machine without RDMA has an empty list or an error, never a crash.
        let _ = library.device_names();
    }
}
