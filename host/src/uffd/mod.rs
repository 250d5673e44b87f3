//! userfaultfd.
mod ioctl;
mod message;
