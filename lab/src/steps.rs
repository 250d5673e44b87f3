//! Steps of making something: their names and times are shown, their output goes to a log.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::place::{Lab, say};

/// Where what the steps write goes.
#[derive(Debug, Clone)]
pub(crate) struct Steps {
    log: PathBuf,
}

impl Lab {
    /// Steps with the lab's log.
    pub(crate) fn steps(&self) -> Steps {
        Steps {
            log: self.path("build.log"),
        }
    }
}

impl Steps {
    /// Runs one.
    pub(crate) fn run(&self, what: &str, command: &mut Command) -> Result<()> {
        say(what);
        let begin = Instant::now();
        let file = self.file()?;
        let status = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("the log")?)
            .stderr(file)
            .status()
            .with_context(|| format!("starting {}", command.get_program().display()))?;
        if !status.success() {
            bail!("\"{what}\" failed ({status}); {}", self.end());
        }
        say(&format!("  done in {:.0} s", begin.elapsed().as_secs_f64()));
        Ok(())
    }

    /// Runs two with the output of the first one as the input of the second one, and says nothing of it.
    pub(crate) fn pipe(&self, mut first: Command, mut second: Command) -> Result<()> {
        let file = self.file()?;
        let mut writer = first
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(file.try_clone().context("the log")?)
            .spawn()
            .with_context(|| format!("starting {}", first.get_program().display()))?;
        let input = writer.stdout.take().expect("it was asked for");
        let read = second
            .stdin(input)
            .stdout(file.try_clone().context("the log")?)
            .stderr(file)
            .status()
            .with_context(|| format!("starting {}", second.get_program().display()));
        // `second` holds the reading end: without it a writer that is not read ends.
        drop(second);
        let written = writer.wait().context("waiting for a step")?;
        let read = read?;
        ensure!(
            read.success() && written.success(),
            "{} ({written}), {read}; {}",
            first.get_program().display(),
            self.end()
        );
        Ok(())
    }

    fn file(&self) -> Result<std::fs::File> {
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("opening {}", self.log.display()))
    }

    /// The log's name and its last lines.
    fn end(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        let mut end = format!("{}:", self.log.display());
        for line in &lines[lines.len().saturating_sub(8)..] {
            let _ = write!(end, "\n  | {line}");
        }
        end
    }
}
