//! The client's memory by IOVA; to be written.

/// IOVA map.
#[derive(Debug)]
pub struct Space;
