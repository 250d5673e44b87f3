//! The command-line tool.
mod demo;
mod latency;
fn main() {}
