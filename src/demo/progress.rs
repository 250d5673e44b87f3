//! The progress line: a bar on a terminal, a line each second elsewhere. Always on stderr.

use std::cell::Cell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

/// Progress of one run.
#[derive(Debug)]
pub struct Progress {
    seconds: u64,
    bar: Option<ProgressBar>,
    next_line: Cell<Instant>,
}

impl Progress {
    /// A run of that length.
    pub fn new(seconds: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{elapsed:>4} [{bar:30}] {msg}")
                .expect("a constant template is valid")
                .progress_chars("=> ");
            ProgressBar::new(seconds * 1000).with_style(style)
        });
        Self {
            seconds,
            bar,
            next_line: Cell::new(Instant::now()),
        }
    }

    /// Shows the application's figures.
    pub fn show(&self, now: &Value) {
        let text = text(now);
        match &self.bar {
            Some(bar) => {
                bar.set_position(now["elapsed_ms"].as_u64().unwrap_or(0));
                bar.set_message(text);
            }
            None if Instant::now() >= self.next_line.get() => {
                self.next_line.set(Instant::now() + Duration::from_secs(1));
                let elapsed = now["elapsed_ms"].as_u64().unwrap_or(0) / 1000;
                eprintln!("{elapsed:>4}/{} s  {text}", self.seconds);
            }
            None => {}
        }
    }

    /// The run is over.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn text(now: &Value) -> String {
    let figure = |key: &str| now[key].as_u64().unwrap_or(0);
    format!(
        "{} operations, {} MiB verified, {} invalidations, {} stale",
        figure("operations"),
        figure("verified_bytes") >> 20,
        figure("invalidations"),
        figure("stale_accesses")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_text_when_figures_are_given_names_each() {
        let now = serde_json::json!({"operations": 5, "verified_bytes": 3 << 20, "invalidations": 7});
        assert_eq!(
            text(&now),
            "5 operations, 3 MiB verified, 7 invalidations, 0 stale"
        );
    }
}
