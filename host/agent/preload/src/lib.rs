//! The agent as a C library and for LD_PRELOAD.
