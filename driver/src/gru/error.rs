//! What can go wrong, and what the caller is asked about.

use std::io;
use std::time::Duration;

use protos::gru::cch;

/// Why a call of the driver failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GruError {
    /// The device did not answer an access.
    #[error("GRU: {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The transport's error.
        source: io::Error,
    },
    /// Something else answers behind this backing.
    #[error(
        "not a GRU: vendor {vendor:#06x} device {device:#06x} (wanted 0x10a9:0x4752); is this the socket of `tlbridge device --model gru`?"
    )]
    NotAGru {
        /// Vendor id found.
        vendor: u16,
        /// Device id found.
        device: u16,
    },
    /// A BAR is missing or too small.
    #[error("GRU: BAR{bar} has {size:#x} bytes, {wanted:#x} are needed")]
    Bar {
        /// BAR number.
        bar: usize,
        /// Bytes found.
        size: u64,
        /// Bytes needed.
        wanted: u64,
    },
    /// No chiplet has that much left. Nothing is taken away from other contexts.
    #[error(
        "no chiplet has {cbs} control blocks and {ds_bytes} bytes of data segment left: {in_use}; close a context or ask for less"
    )]
    NoResources {
        /// Control blocks asked for.
        cbs: usize,
        /// Bytes asked for.
        ds_bytes: usize,
        /// What is in use, per chiplet.
        in_use: String,
    },
    /// An argument that no device could satisfy.
    #[error("GRU: {what} is {value}, allowed: {allowed}")]
    Argument {
        /// Which.
        what: &'static str,
        /// Given.
        value: u64,
        /// Range.
        allowed: &'static str,
    },
    /// The device refused a context operation that is legal (section 5: never for a legal order).
    #[error("GRU: chiplet {chiplet} context {context}: {operation:?} refused: {cause:?}")]
    Refused {
        /// Chiplet.
        chiplet: usize,
        /// Context number.
        context: usize,
        /// Operation.
        operation: cch::Opc,
        /// The device's cause.
        cause: cch::Cause,
    },
    /// The device process is gone or was reset: nothing of it is running any more.
    #[error("GRU: the device is gone (its process has ended, or it was reset); open it again")]
    DeviceGone,
    /// The address space or context was closed.
    #[error("GRU: the address space is closed")]
    Closed,
}

/// Which kind of handle is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandleKind {
    /// TLB flush handle.
    Tgh,
    /// Context configuration handle.
    Cch,
    /// TLB fault handle.
    Tfh,
}

/// A handle that stays ACTIVE (or cannot be reached) longer than [`super::GruOptions::stall_after`].
#[derive(Debug, Clone, Copy)]
pub struct Stall {
    /// Kind of the handle.
    pub kind: HandleKind,
    /// Its chiplet.
    pub chiplet: usize,
    /// Its index.
    pub index: usize,
    /// Since the command was given.
    pub waited: Duration,
    /// The transport's error, when it is the reason.
    pub transport: Option<io::ErrorKind>,
}

/// What to do about a [`Stall`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StallAction {
    /// Wait on; asked again after the same time.
    KeepWaiting,
    /// The caller has proved that the device process has ended (pidfd readable): nothing can access
    /// memory through it any more, so every flush is complete. Never answer this on a timeout alone: a
    /// stopped device could resume in the middle of a copy.
    DeviceGone,
}
