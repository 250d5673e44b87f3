//! `/dev/gru`: its ioctls and its GSEG mappings (reference section 14).

#![allow(unsafe_code)] // ioctls with structures of the kernel, and a device mapping

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use anyhow::{Context, Result, bail};
use protos::gru::cb::Control;
use protos::gru::doorbell::Mode;
use protos::gru::map;
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

const PATH: &str = "/dev/gru";
const GSEG: usize = map::GSEG_PAGE as usize;

/// ioctl numbers: type 'G', read and write, the size of a pointer.
const fn number(nr: u8) -> Opcode {
    opcode::read_write::<*mut c_void>(b'G', nr)
}
const CREATE_CONTEXT: Opcode = number(1);
const SET_CONTEXT_OPTION: Opcode = number(4);
const GET_EXCEPTION_DETAIL: Opcode = number(6);
const CALL_OS: Opcode = number(8);
const UNLOAD_CONTEXT: Opcode = number(9);
const DUMP_CHIPLET_STATE: Opcode = number(11);
const GET_GSEG_STATISTICS: Opcode = number(12);
const FLUSH_TLB: Opcode = number(50);
const GET_CONFIG_INFO: Opcode = number(51);
const KTEST: Opcode = number(52);

/// How a context's misses are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Misses {
    /// The user finds CALL_OS in the control block and calls the driver.
    Poll,
    /// The device interrupts the driver.
    Interrupt,
}

impl Misses {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Interrupt, Self::Poll];

    fn option(self) -> u32 {
        match self {
            Self::Poll => 1,
            Self::Interrupt => 2,
        }
    }
}

/// What a context is to have.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Control blocks.
    pub cbs: u32,
    /// Bytes of data segment.
    pub ds: u32,
    /// How misses are served.
    pub misses: Misses,
    /// Pages that the driver may fill beyond a missing one (BCOPY).
    pub preload: u8,
    /// The chiplet that it has to be on, if any.
    pub chiplet: Option<u8>,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            cbs: 2,
            ds: 4096,
            misses: Misses::Interrupt,
            preload: 0,
            chiplet: None,
        }
    }
}

#[repr(C)]
struct CreateContext {
    gseg: u64,
    ds: u32,
    cbs: u32,
    threads: u32,
    options: u32,
    preload: u8,
}

#[repr(C)]
struct ContextOption {
    gseg: u64,
    op: i32,
    val0: i32,
    val1: i64,
}

/// Which option [`Gseg::option`] sets.
#[derive(Debug, Clone, Copy)]
pub enum Set {
    /// This process is the owner.
    Owner,
    /// The chiplet that it has to be on.
    Chiplet(u8),
}

/// Why an instruction ended in an exception.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ExceptionDetail {
    /// Address of the control block.
    pub cb: u64,
    /// Operation code.
    pub opc: i32,
    /// Bits of [`protos::gru::cbe::ecause`].
    pub ecause: i32,
    /// Extended operation code.
    pub exopc: i32,
    /// Current baddr0.
    pub det0: i64,
    /// Low word of the current baddr1.
    pub det1: i32,
    /// State of the CBR.
    pub cbrstate: i32,
    /// Bits of [`protos::gru::cbe::execstatus`].
    pub execstatus: i32,
}

/// Counters of one GSEG.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct GsegStatistics {
    gseg: u64,
    /// Misses served in the interrupt.
    pub fmm: u64,
    /// Misses served at CALL_OS.
    pub upm: u64,
    /// Translations entered.
    pub dropins: u64,
    /// Times that the context was stolen from others.
    pub stolen: u64,
    reserved: [u64; 10],
}

#[repr(C)]
struct FlushTlb {
    gseg: u64,
    va: u64,
    len: usize,
}

/// What the driver says about the machine.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Config {
    /// Processors.
    pub cpus: i32,
    /// Blades.
    pub blades: i32,
    /// NUMA nodes.
    pub nodes: i32,
    /// Chiplets.
    pub chiplets: i32,
    reserved: [i32; 16],
}

#[repr(C)]
struct DumpChipletState {
    op: u32,
    gid: u32,
    ctxnum: i32,
    data_opt: u8,
    lock_cch: u8,
    flush_cbrs: u8,
    fill: [u8; 10],
    pid: i32,
    buf: u64,
    len: usize,
    contexts: u32,
}

/// One call; its result is what the driver returned.
struct Call {
    opcode: Opcode,
    argument: *mut c_void,
}

// SAFETY: the argument is what the driver takes for this number (see the callers).
unsafe impl Ioctl for Call {
    type Output = i32;
    const IS_MUTATING: bool = true;
    fn opcode(&self) -> Opcode {
        self.opcode
    }
    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }
    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

/// The open device.
#[derive(Debug)]
pub struct Gru {
    file: File,
}

impl Gru {
    /// Opens it.
    ///
    /// # Errors
    /// No driver, or no permission.
    pub fn open() -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .open(PATH)
            .with_context(|| format!("{PATH}: is gru.ko loaded, after tlbridge_uv.ko?"))?;
        Ok(Self { file })
    }

    fn call<T>(&self, opcode: Opcode, argument: &mut T) -> rustix::io::Result<i32> {
        // SAFETY: each caller passes the structure that the driver reads and writes for this number.
        unsafe {
            ioctl(
                self.file.as_fd(),
                Call {
                    opcode,
                    argument: std::ptr::from_mut(argument).cast(),
                },
            )
        }
    }

    fn call_value(&self, opcode: Opcode, value: u64) -> rustix::io::Result<i32> {
        // SAFETY: these numbers take a value, not a pointer.
        unsafe {
            ioctl(
                self.file.as_fd(),
                Call {
                    opcode,
                    argument: value as *mut c_void,
                },
            )
        }
    }

    /// One of the driver's own tests: 0 to 3, and 99.
    ///
    /// # Errors
    /// It failed.
    pub fn ktest(&self, number: u64) -> rustix::io::Result<i32> {
        self.call_value(KTEST, number)
    }

    /// What the driver says about the machine.
    ///
    /// # Errors
    /// None are known.
    pub fn config(&self) -> rustix::io::Result<Config> {
        let mut config = Config::default();
        self.call(GET_CONFIG_INFO, &mut config)?;
        Ok(config)
    }

    /// Unloads every context of the machine whose lock is free.
    ///
    /// # Errors
    /// Not root.
    pub fn unload_all(&self) -> rustix::io::Result<()> {
        self.call(UNLOAD_CONTEXT, &mut 0u64).map(drop)
    }

    /// Dumps a chiplet's handles (no context when `context` is none). Returns what the driver did.
    ///
    /// # Errors
    /// As the driver has it.
    pub fn dump(&self, chiplet: u32, context: i32, into: &mut [u8]) -> rustix::io::Result<i32> {
        let mut request = DumpChipletState {
            op: 1,
            gid: chiplet,
            ctxnum: context,
            data_opt: 1,
            lock_cch: 1,
            flush_cbrs: 1,
            fill: [0; 10],
            pid: 0,
            buf: into.as_mut_ptr() as u64,
            len: into.len(),
            contexts: 0,
        };
        self.call(DUMP_CHIPLET_STATE, &mut request)
    }

    /// Maps `count` GSEGs in one piece, without a context.
    ///
    /// # Errors
    /// No address space.
    pub fn map(&self, count: usize) -> Result<NonNull<u8>> {
        let len = count * GSEG;
        // SAFETY: a fresh reservation, of which the aligned part is replaced and the rest given back.
        unsafe {
            let none = ProtFlags::empty();
            let room = mmap_anonymous(std::ptr::null_mut(), len + GSEG, none, MapFlags::PRIVATE)
                .context("room for a GSEG")?;
            let start = (room as usize).next_multiple_of(GSEG);
            let (before, after) = (start - room as usize, room as usize + GSEG - start);
            if before > 0 {
                munmap(room, before).context("trimming")?;
            }
            if after > 0 {
                munmap((start + len) as *mut c_void, after).context("trimming")?;
            }
            let at = mmap(
                start as *mut c_void,
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                &self.file,
                0,
            )
            .context("mmap of /dev/gru")?;
            Ok(NonNull::new(at.cast()).expect("mmap returns no null"))
        }
    }

    /// CREATE_CONTEXT at `at`.
    ///
    /// # Errors
    /// More than a chiplet has.
    pub fn create(&self, at: u64, shape: Shape) -> rustix::io::Result<()> {
        let mut request = CreateContext {
            gseg: at,
            ds: shape.ds,
            cbs: shape.cbs,
            threads: 1,
            options: shape.misses.option(),
            preload: shape.preload,
        };
        self.call(CREATE_CONTEXT, &mut request).map(drop)
    }

    /// SET_CONTEXT_OPTION at `at`. The first one makes the context.
    ///
    /// # Errors
    /// No GSEG there.
    pub fn set(&self, at: u64, set: Set) -> rustix::io::Result<()> {
        let (op, val0, val1) = match set {
            Set::Owner => (0, 0, 0),
            Set::Chiplet(chiplet) => (2, i32::from(chiplet), -1),
        };
        let mut request = ContextOption {
            gseg: at,
            op,
            val0,
            val1,
        };
        self.call(SET_CONTEXT_OPTION, &mut request).map(drop)
    }

    /// A context, ready for its first touch.
    ///
    /// # Errors
    /// As its parts.
    pub fn context(&self, shape: Shape) -> Result<Gseg<'_>> {
        let at = self.map(1)?;
        let gseg = Gseg {
            gru: self,
            at,
            shape,
            mode: AtomicU32::new(UNKNOWN),
        };
        let va = gseg.va();
        self.create(va, shape)
            .with_context(|| format!("GRU_CREATE_CONTEXT of {shape:?}"))?;
        self.set(va, Set::Owner).context("GRU_SET_CONTEXT_OPTION")?;
        if let Some(chiplet) = shape.chiplet {
            self.set(va, Set::Chiplet(chiplet))
                .context("GRU_SET_CONTEXT_OPTION: chiplet")?;
        }
        Ok(gseg)
    }
}

const UNKNOWN: u32 = u32::MAX;

/// A mapped context. Unmapped when dropped.
#[derive(Debug)]
pub struct Gseg<'a> {
    gru: &'a Gru,
    at: NonNull<u8>,
    shape: Shape,
    /// [`Mode`] of the device, or [`UNKNOWN`] before the first touch.
    mode: AtomicU32,
}

// SAFETY: all accesses are volatile accesses of a device, which is made for several threads.
unsafe impl Send for Gseg<'_> {}
// SAFETY: as above.
unsafe impl Sync for Gseg<'_> {}

impl Drop for Gseg<'_> {
    fn drop(&mut self) {
        // SAFETY: nobody else has this mapping, and nothing borrows from it.
        if let Err(error) = unsafe { munmap(self.at.as_ptr().cast(), GSEG) } {
            panic!("unmapping a GSEG: {error}");
        }
    }
}

impl Gseg<'_> {
    /// Its address.
    #[must_use]
    pub fn va(&self) -> u64 {
        self.at.as_ptr() as u64
    }

    /// What it was asked to have.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    fn word(&self, offset: u64) -> *mut u64 {
        assert!(
            offset.is_multiple_of(8) && offset < map::GSEG_PAGE,
            "{offset:#x} is no word of a GSEG"
        );
        // SAFETY: inside the mapping.
        unsafe { self.at.as_ptr().add(offset as usize).cast() }
    }

    /// A word of the GSEG.
    #[must_use]
    pub fn load(&self, offset: u64) -> u64 {
        // SAFETY: inside the mapping, aligned; others write it at any time, hence an atomic load.
        unsafe { AtomicU64::from_ptr(self.word(offset)) }.load(Ordering::Acquire)
    }

    /// Stores a word of the GSEG.
    pub fn store(&self, offset: u64, value: u64) {
        // SAFETY: as in load.
        unsafe { AtomicU64::from_ptr(self.word(offset)) }.store(value, Ordering::Release);
    }

    /// Copies into the data segment, word by word.
    pub fn write_ds(&self, at: u64, words: &[u64]) {
        for (i, &word) in words.iter().enumerate() {
            self.store(map::GSEG_DS + at + 8 * i as u64, word);
        }
    }

    /// Words of the data segment.
    #[must_use]
    pub fn read_ds(&self, at: u64, words: usize) -> Vec<u64> {
        (0..words as u64)
            .map(|i| self.load(map::GSEG_DS + at + 8 * i))
            .collect()
    }

    /// What follows a start: see [`protos::gru::doorbell`].
    pub fn ring(&self) {
        fence(Ordering::SeqCst);
        let mut mode = self.mode.load(Ordering::Relaxed);
        if mode == UNKNOWN {
            mode = (self.load(map::GSEG_STATUS) >> 32) as u32;
            self.mode.store(mode, Ordering::Relaxed);
        }
        let asleep = || self.load(map::GSEG_STATUS) as u32 == 0;
        if mode != u32::from(Mode::TRAP.0) && (mode == u32::from(Mode::BELL.0) || asleep()) {
            self.store(map::GSEG_BELL, 1);
        }
    }

    /// DW0 of a control block.
    #[must_use]
    pub fn control(&self, cb: u32) -> Control {
        Control::from_bits(self.load(self.cb(cb)))
    }

    /// Offset of a control block.
    #[must_use]
    pub fn cb(&self, cb: u32) -> u64 {
        assert!(cb < self.shape.cbs, "the context has {} CBs", self.shape.cbs);
        map::GSEG_CB + u64::from(cb) * map::HANDLE_STRIDE
    }

    /// CALL_OS: the driver serves the control block's miss.
    ///
    /// # Errors
    /// EFAULT: no such memory (the instruction ends in an exception). EAGAIN: look again.
    pub fn call_os(&self, cb: u32) -> rustix::io::Result<()> {
        self.gru.call_value(CALL_OS, self.va() + self.cb(cb)).map(drop)
    }

    /// Why the control block's instruction ended in an exception. A context that has been unloaded is loaded
    /// again for it.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn exception(&self, cb: u32) -> Result<ExceptionDetail> {
        for _ in 0..100 {
            let mut detail = ExceptionDetail {
                cb: self.va() + self.cb(cb),
                ..ExceptionDetail::default()
            };
            match self.gru.call(GET_EXCEPTION_DETAIL, &mut detail) {
                Ok(_) => return Ok(detail),
                Err(Errno::AGAIN) => {
                    let _ = self.control(cb);
                }
                Err(error) => return Err(error).context("GRU_USER_GET_EXCEPTION_DETAIL"),
            }
        }
        bail!("the context is unloaded again and again before its exception can be read")
    }

    /// Unloads the context; the next touch loads it again.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn unload(&self) -> rustix::io::Result<()> {
        self.gru.call(UNLOAD_CONTEXT, &mut self.va()).map(drop)
    }

    /// Has the driver flush a range.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn flush(&self, va: u64, len: usize) -> rustix::io::Result<()> {
        let gseg = self.va();
        self.gru
            .call(FLUSH_TLB, &mut FlushTlb { gseg, va, len })
            .map(drop)
    }

    /// Its counters.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn statistics(&self) -> Result<GsegStatistics> {
        let mut counters = GsegStatistics {
            gseg: self.va(),
            ..GsegStatistics::default()
        };
        self.gru
            .call(GET_GSEG_STATISTICS, &mut counters)
            .context("GRU_GET_GSEG_STATISTICS")?;
        Ok(counters)
    }
}

/// What an ioctl of the driver says to a number that it does not know.
///
/// # Errors
/// Always; EBADRQC if all is well.
pub fn unknown_ioctl(gru: &Gru) -> io::Result<i32> {
    Ok(gru.call_value(number(200), 0)?)
}
