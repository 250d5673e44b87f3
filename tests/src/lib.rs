//! What the integration tests share: processes of the command-line tool.

pub mod processes;
