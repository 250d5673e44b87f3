//! The application of the demo: it computes through the GRU in memory that it keeps changing under it.
//!
//! * [`slots`]: address ranges whose state is published; [`frames`]: pages that are mapped there, and the
//!   quarantine of those that were left behind;
//! * [`disturber`] makes the [`calls`] that change mappings; [`worker`] runs a [`plan`] and judges it;
//! * [`oracles`] keeps the record.

mod arena;
mod calls;
mod context;
mod disturber;
mod executor;
mod frames;
mod mapping;
#[cfg(test)]
mod model;
mod oracles;
mod plan;
mod probe;
mod purgeable;
mod random;
pub mod report;
mod run;
mod slots;
mod words;
mod worker;

pub use random::Random;
pub use run::run;
pub use words::is_poison;
