//! What the integration tests share: processes of the command-line tool, a backing that is a device in
//! the same process, a model page table, and test bodies that run over any backing.

pub mod fuzzing;
pub mod gru;
pub mod guest;
pub mod in_process;
pub mod processes;
pub mod qemu;
