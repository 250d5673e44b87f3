//! `tlbridge demo`.
mod application;
