//! `tlbridge bench`.

pub mod mmio;
mod statistics;

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

/// The table to `out`, or the JSON to a file (`-` = to `out` instead of the table).
fn print(
    file: Option<&Path>,
    json: &serde_json::Value,
    table: impl FnOnce() -> String,
    out: &mut impl Write,
) -> Result<()> {
    match file {
        Some(path) if path == Path::new("-") => writeln!(out, "{json}")?,
        Some(path) => {
            std::fs::write(path, format!("{json:#}\n"))
                .with_context(|| format!("cannot write {}", path.display()))?;
            write!(out, "{}", table())?;
        }
        None => write!(out, "{}", table())?,
    }
    Ok(())
}
