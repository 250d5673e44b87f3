//! Issuing instructions, and waiting for them as a user of the driver does.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use protos::gru::cb::{self, Control, Instruction, Status};
use protos::gru::cbe::ecause;
use rustix::io::Errno;

use crate::driver::{ExceptionDetail, Gseg};

/// Longer than any instruction takes on a busy machine that emulates processors.
const PATIENCE: Duration = Duration::from_secs(60);

/// How an instruction has ended.
#[derive(Debug, Clone, Copy)]
pub enum End {
    /// Done; avalue.
    Done(u64),
    /// Failed.
    Exception {
        /// The driver's account of it.
        detail: ExceptionDetail,
        /// DW0: has the substatus of a message queue.
        control: Control,
    },
}

impl End {
    /// avalue.
    ///
    /// # Errors
    /// It ended in an exception.
    pub fn done(self) -> Result<u64> {
        match self {
            Self::Done(value) => Ok(value),
            Self::Exception { detail, control } => bail!(
                "exception: ecause {:#x} at {:#x}, substatus {}, {detail:?}",
                detail.ecause,
                detail.det0,
                control.isubstatus()
            ),
        }
    }

    /// Whether it failed for want of memory, as opposed to done.
    ///
    /// # Errors
    /// Any other exception.
    pub fn no_memory(self) -> Result<bool> {
        match self {
            Self::Done(_) => Ok(false),
            Self::Exception { detail, .. } => {
                ensure!(
                    detail.ecause as u32 == ecause::OS_FATAL_TLB_FAULT,
                    "not the exception that missing memory causes: {detail:?}"
                );
                Ok(true)
            }
        }
    }
}

impl Gseg<'_> {
    /// Starts an instruction. The control block must be idle.
    pub fn start(&self, cb: u32, instruction: &Instruction) {
        let at = self.cb(cb);
        self.store(at + cb::IDEF4, instruction.idef4);
        self.store(at + cb::BADDR0, instruction.baddr0);
        self.store(at + cb::NELEM, instruction.nelem);
        self.store(at + cb::STRIDE_OP1, instruction.stride_op1);
        self.store(at + cb::BADDR1_VALUE_OP2, instruction.baddr1_value_op2);
        self.store(at + cb::CONTROL, instruction.control.into_bits());
        self.ring();
    }

    /// Waits for the end, calling the driver for misses that it is to be told of.
    ///
    /// # Errors
    /// The driver refuses, or there is no end.
    pub fn wait(&self, cb: u32) -> Result<End> {
        let begin = Instant::now();
        loop {
            let control = self.control(cb);
            match control.istatus() {
                Status::IDLE => return Ok(End::Done(self.load(self.cb(cb) + cb::AVALUE))),
                Status::EXCEPTION => {
                    return Ok(End::Exception {
                        detail: self.exception(cb)?,
                        control,
                    });
                }
                Status::CALL_OS => match self.call_os(cb) {
                    // EFAULT: the exception is seen at the next look.
                    Ok(()) | Err(Errno::AGAIN | Errno::FAULT) => {}
                    Err(error) => return Err(error).context("GRU_USER_CALL_OS"),
                },
                _ => std::thread::yield_now(),
            }
            if begin.elapsed() > PATIENCE {
                let words: Vec<_> = (0..8).map(|i| self.load(self.cb(cb) + 8 * i)).collect();
                bail!("no end after {PATIENCE:?}: {control:?}, CB {cb}: {words:x?}");
            }
        }
    }

    /// Starts an instruction and waits for its end.
    ///
    /// # Errors
    /// As [`Gseg::wait`].
    pub fn run(&self, cb: u32, instruction: &Instruction) -> Result<End> {
        self.start(cb, instruction);
        self.wait(cb)
    }
}
