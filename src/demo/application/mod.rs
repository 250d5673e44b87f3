//! The application of the demo: it computes through the GRU in memory that it keeps changing under it.

mod calls;
mod disturber;
mod executor;
mod frames;
#[cfg(test)]
mod model;
mod oracles;
mod plan;
mod random;
mod slots;
mod words;
mod worker;
